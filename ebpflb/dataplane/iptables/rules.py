"""Routes as iptables rules, in exactly the text in which `iptables-save` prints them.

Rules of this file: pure; no policy. The whole ruleset of a family is

    frame.guests()   rules of ours in chains of others (INPUT, …, KUBE-FIREWALL), at the head of the built-in ones
    frame.fixed()    chains whose whole content this names: KUBE-POSTROUTING, KUBE-MARK-MASQ, KUBE-FORWARD,
                     filter KUBE-NODEPORTS, EBPFLB-LOCALITY, KUBE-PROXY-CANARY, …
    port_rules()     of each service port: `own`, the chains of it alone; `shared`, its lines in the SHARED chains,
                     whose order among themselves means nothing: no two match the same packet
    frame.blocks()   KUBE-CIP-…: what refuses the undefined ports of cluster IPs
    frame.tails()    the last lines of SHARED chains, which must stay behind all others

and `ruleset` puts these together, but for the guests. Every rule of a port names in its comment what it is for, in
kube-proxy's words; what those have no word for follows as `key=value` (see `_suffix`), for `reading`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ebpflb.dataplane.iptables import frame, names
from ebpflb.dataplane.iptables.frame import SHARED, Settings, host, unreachable
from ebpflb.dataplane.iptables.layout import (
    Index,
    Outside,
    Place,
    PortKey,
    PortLayout,
    ShapeError,
    layout_of,
    matches_of,
)
from ebpflb.model import Address, Family, Problem, Protocol
from ebpflb.netfilter.ruleset import Chains, Ruleset
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Forwarding,
    Frontend,
    Kind,
    Masquerade,
    RouteTable,
    Verdict,
    cidr_order,
)

_FORWARD, _REJECT = Verdict.FORWARD, Verdict.REJECT
_ACTIVE = BackendState.ACTIVE
_PROTOCOLS = {protocol: protocol.name.lower() for protocol in Protocol}
_NAME_LIMIT = 150  # bytes: the longest comment around a name takes 105, of 255; a valid name has 143 at most
_PLACES = {Kind.LOAD_BALANCER: "loadbalancer IP", Kind.EXTERNAL_IP: "external IP"}
_EVERY_HOST = {Family.IPV4: "255.255.255.255", Family.IPV6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}


class PortRules(NamedTuple):
    """The rules of one service port. If its routes have a shape that there is no rule for, `problem` says so and the
    others are empty."""

    own: Ruleset
    shared: Ruleset
    problem: Problem | None = None


def port_rules(key: PortKey, routes: RouteTable, index: Index, settings: Settings) -> PortRules:
    """The rules of one service port of `routes`, of which `index` is the index; without a frontend it has none. Depends
    on nothing but its rows, the locality and the addresses of node ports."""
    frontends = index.frontends(key)
    if not frontends:
        return PortRules({}, {})
    matches = matches_of(routes.locality, key.family)
    try:
        if len(str(key.service).encode()) > _NAME_LIMIT:
            raise ShapeError("its name is too long for a comment")
        layout = layout_of(frontends, routes, bool(matches))
    except ShapeError as error:
        reason = f"port {key.service.port or key.protocol.name}: {error}; no rules for it"
        return PortRules({}, {}, Problem(str(key.service.service), reason, "UnknownShape"))
    return _Writer(key, layout, matches, settings).rules(index.nodeports(key.family))


def ruleset(routes: RouteTable, family: Family, settings: Settings) -> tuple[Ruleset, tuple[Problem, ...]]:
    """All chains of ours in one family, with their rules, and what could not be written."""
    index = Index(routes)
    found = frame.fixed(routes, family, settings)
    shared: dict[tuple[str, str], list[str]] = {each: [] for each in SHARED}
    problems = []
    for key in index.ports():
        if key.family is family:
            own, lines, problem = port_rules(key, routes, index, settings)
            for table, chains in own.items():
                found[table].update(chains)
            for table, chains in lines.items():
                for chain, rules in chains.items():
                    shared[table, chain] += rules
            if problem is not None:
                problems.append(problem)
    for table, chains in frame.blocks(routes.owned, family).items():
        found[table].update(chains)
    for table, chains in frame.tails(routes.owned, index.nodeports(family), family).items():
        for chain, rules in chains.items():
            shared[table, chain] += rules
    for (table, chain), rules_of in shared.items():
        found[table][chain] = tuple(rules_of)
    return found, tuple(sorted(problems))


@lru_cache(maxsize=1 << 10)
def probabilities(count: int) -> tuple[str, ...]:
    """What is printed for each of `count` equal rules but the last one: the i-th takes 1/(count - i) of what came so
    far. The kernel holds it in units of 2^-31."""
    return tuple(f"{round((1 << 31) / left) / (1 << 31):.11f}" for left in range(count, 1, -1))


class _Writer:
    """Writes the rules of one service port."""

    def __init__(self, key: PortKey, layout: PortLayout, matches: tuple[str, ...], settings: Settings) -> None:
        self.family = key.family
        self.layout = layout
        self.matches = matches
        self.comments = settings.comments
        self.protocol = _PROTOCOLS[key.protocol]
        self.service = str(key.service)
        self.text = self.service.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
        self.hash = names.port_hash(self.service, self.protocol)
        self.suffix = _suffix(layout)
        self.nat: Chains = {}
        self.filter: Chains = {}
        self.nat_lines: dict[str, list[str]] = {}
        self.filter_lines: dict[str, list[str]] = {}

    def rules(self, nodeports: frozenset[Address]) -> PortRules:
        if self.layout.inside is not None:
            self._write_inside()
        if self.layout.outside is not None:
            self._write_outside(self.layout.outside, nodeports)
        endpoints: Chains = {}
        if self.layout.cluster:
            self._write_backends(names.SVC + self.hash, self.layout.cluster, endpoints)
        if self.layout.local:
            self._write_backends(names.SVL + self.hash, self.layout.local, endpoints)
        self.nat |= endpoints
        own = {table: chains for table, chains in (("nat", self.nat), ("filter", self.filter)) if chains}
        shared = {
            table: {chain: tuple(rules) for chain, rules in lines.items()}
            for table, lines in (("nat", self.nat_lines), ("filter", self.filter_lines))
            if lines
        }
        return PortRules(own, shared)

    # ---- Cluster IPs ----

    def _write_inside(self) -> None:
        inside = self.layout.inside
        assert inside is not None
        if inside.verdict is not _FORWARD:
            for frontend in inside.frontends:
                suffix = self._unsaid(None)
                self._line("filter", names.SERVICES, frontend, self._lacking(inside.verdict) + suffix, inside.verdict)
            return
        chain = (names.SVL if inside.local else names.SVC) + self.hash
        masquerades = []
        for frontend in inside.frontends:
            self._line("nat", names.SERVICES, frontend, f"cluster IP{self.suffix}", chain)
            if inside.masquerade is not Masquerade.NEVER:
                masquerades.append(self._masquerade(chain, frontend, inside.masquerade is Masquerade.NOT_POD))
        self.nat[chain] = tuple(masquerades)

    def _masquerade(self, chain: str, frontend: Frontend, spare_pods: bool) -> str:
        """Marks what goes to a cluster IP from outside, and what comes from this node itself."""
        source = interface = ""
        target = names.MARK_MASQ
        if spare_pods:
            if frame.needs_not_pod(self.matches):
                target = names.NOT_POD
            elif self.matches[0].startswith("-s"):
                source = f"! {self.matches[0]} "
            else:
                interface = f"! {self.matches[0]} "
        return (
            f"-A {chain} {source}-d {host(frontend.address)} {interface}-p {self.protocol}"
            f' -m comment --comment "{self.text} cluster IP" -m {self.protocol} --dport {frontend.port} -j {target}'
        )

    # ---- External frontends ----

    def _write_outside(self, outside: Outside, nodeports: frozenset[Address]) -> None:
        extern = names.EXT + self.hash
        forwards = outside.internal is _FORWARD
        if forwards:
            self._write_extern(extern, outside)
        # A backend that is where its frontend is: what goes there is not translated, hence not told by that.
        itself = {(each.address, each.port) for each in (*self.layout.cluster, *self.layout.local)}
        unmoved = {place.frontend for place in outside.places if place.frontend[:2] in itself}
        guarded = [place for place in outside.places if place.source_ranges]
        if guarded:
            self._write_firewall(guarded, outside, unmoved)
        on_nodes = [place for place in outside.places if place.kind is Kind.NODE_PORT]
        if forwards and on_nodes:
            self._write_node_ports(on_nodes, extern, nodeports)
        for place in outside.places:
            if forwards and place.kind is not Kind.NODE_PORT:
                target = names.FW + self.hash if place.source_ranges else extern
                self._line("nat", names.SERVICES, place.frontend, _PLACES[place.kind] + self.suffix, target)
            if outside.external is not _FORWARD and (forwards or not place.source_ranges):
                answer: str | Verdict = outside.external
                if place.frontend in unmoved:
                    self._write_sparing(extern, outside)
                    answer = extern
                comment = self._lacking(outside.external) + self._unsaid(place.kind)
                self._line("filter", names.EXTERNAL_SERVICES, place.frontend, comment, answer)

    def _write_extern(self, chain: str, outside: Outside) -> None:
        def rule(match: str, what: str, more: str, target: str) -> str:
            return (
                f"-A {chain}{match and ' '}{match} -m comment --comment"
                f' "{what} for {self.text} external destinations"{more} -j {target}'
            )

        cluster = names.SVC + self.hash
        if not outside.split:
            self.nat[chain] = (rule("", "masquerade traffic", "", names.MARK_MASQ), f"-A {chain} -j {cluster}")
            return
        node = " -m addrtype --src-type LOCAL"
        rules = []
        if outside.spare_pods:
            rules += [rule(match, "pod traffic", "", cluster) for match in self.matches]
        rules.append(rule("", "masquerade LOCAL traffic", node, names.MARK_MASQ))
        rules.append(rule("", "route LOCAL traffic", node, cluster))
        if outside.external is _FORWARD:
            rules.append(f"-A {chain} -j {names.SVL + self.hash}")
        self.nat[chain] = tuple(rules)

    def _write_sparing(self, chain: str, outside: Outside) -> None:
        """KUBE-EXT-… in table filter: answers scope EXTERNAL, and lets INTERNAL pass."""
        spared = [*(self.matches if outside.spare_pods else ()), "-m addrtype --src-type LOCAL"]
        self.filter[chain] = (
            *(f"-A {chain}{match and ' '}{match} -j RETURN" for match in spared),
            f'-A {chain} -p {self.protocol} -m comment --comment "{self.text} {self._lacking(outside.external)}"'
            f" {self._answer(outside.external)}",
        )

    def _write_node_ports(self, places: list[Place], extern: str, nodeports: frozenset[Address]) -> None:
        """One rule for all addresses where the port has them all, as it mostly has; else one for each."""
        by_port: dict[int, list[Frontend]] = {}
        for place in places:
            by_port.setdefault(place.frontend.port, []).append(place.frontend)
        lines = self.nat_lines.setdefault(names.NODE_PORTS, [])
        for port, frontends in by_port.items():
            everywhere = len(frontends) == len(nodeports)
            destinations = [""] if everywhere else [f"-d {host(frontend.address)} " for frontend in frontends]
            lines += [
                f"-A {names.NODE_PORTS} {destination}-p {self.protocol} -m comment --comment"
                f' "{self.text}{self.suffix}" -m {self.protocol} --dport {port} -j {extern}'
                for destination in destinations
            ]

    def _write_firewall(self, guarded: list[Place], outside: Outside, unmoved: set[Frontend]) -> None:
        """KUBE-FW-…: in table nat it lets those in who may, and filter drops what was not translated; where nothing is
        to be translated, filter alone sorts them."""
        chain = names.FW + self.hash
        refused = f"traffic not accepted by {chain}"
        if outside.internal is _FORWARD:
            allow = f' -m comment --comment "{self.text} loadbalancer IP" -j {names.EXT + self.hash}'
            rules = [f"-A {chain} {match}{allow}" for match in _allowed(guarded)]
            comment = f"other traffic to {self.text} will be dropped by {names.PROXY_FIREWALL}"
            self.nat[chain] = (*rules, f'-A {chain} -m comment --comment "{comment}"')
            if any(place.frontend in unmoved for place in guarded):
                allow = f' -m comment --comment "{self.text} loadbalancer IP" -j RETURN'
                rules = [f"-A {chain} {match}{allow}" for match in _allowed(guarded)]
                self.filter[chain] = (*rules, f'-A {chain} -m comment --comment "{self.text} {refused}" -j DROP')
            for place in guarded:
                answer = chain if place.frontend in unmoved else Verdict.DROP
                self._line("filter", names.PROXY_FIREWALL, place.frontend, refused, answer)
            return
        lacking = self._lacking(outside.external)
        refuse = f' -p {self.protocol} -m comment --comment "{self.text} {lacking}" {self._answer(outside.external)}'
        rules = [f"-A {chain} {match}{refuse}" for match in _allowed(guarded)]
        self.filter[chain] = (*rules, f'-A {chain} -m comment --comment "{self.text} {refused}" -j DROP')
        for place in guarded:
            comment = lacking + self._unsaid(place.kind)
            self._line("filter", names.PROXY_FIREWALL, place.frontend, comment, chain)

    # ---- Backends ----

    def _write_backends(self, chain: str, backends: tuple[Backend, ...], endpoints: Chains) -> None:
        """Affinity first, then the choice. A DRAINING backend gets a rule that never matches: it tells that the backend
        is there, so that whoever reads the rules sees the same as whoever reads the route."""
        sticky: list[str] = []
        draining: list[str] = []
        active: list[str] = []
        seconds = self.layout.affinity_seconds
        count = sum(backend.state is _ACTIVE for backend in backends)
        chances = probabilities(count)
        comment = "" if not self.comments else f' -m comment --comment "{self.text} -> '
        service, protocol, version6 = self.service, self.protocol, self.family is Family.IPV6
        for backend in backends:
            place = f"[{backend.address}]:{backend.port}" if version6 else f"{backend.address}:{backend.port}"
            own = names.endpoint_chain(service, protocol, place)
            if own not in endpoints:
                endpoints[own] = self._endpoint(own, backend.address, place)
            said = f'{comment}{place}"' if comment else ""
            if backend.state is not _ACTIVE:
                draining.append(f"-A {chain}{said} -m statistic --mode random --probability 0.00000000000 -j {own}")
                continue
            if seconds:
                sticky.append(
                    f"-A {chain}{said} -m recent --rcheck --seconds {seconds} --reap --name {own}"
                    f" --mask {_EVERY_HOST[self.family]} --rsource -j {own}"
                )
            if len(active) < count - 1:
                chance = chances[len(active)]
                active.append(f"-A {chain}{said} -m statistic --mode random --probability {chance} -j {own}")
            else:
                active.append(f"-A {chain}{said} -j {own}")
        self.nat[chain] = (*self.nat.get(chain, ()), *sticky, *draining, *active)

    def _endpoint(self, chain: str, address: Address, place: str) -> tuple[str, str]:
        """Whoever is sent to himself is masqueraded, or the answer would not come back this way."""
        said = f' -m comment --comment "{self.text}"' if self.comments else ""
        recent = ""
        if self.layout.affinity_seconds:
            recent = f" -m recent --set --name {chain} --mask {_EVERY_HOST[self.family]} --rsource"
        return (
            f"-A {chain} -s {host(address)}{said} -j {names.MARK_MASQ}",
            f"-A {chain} -p {self.protocol}{said}{recent} -m {self.protocol} -j DNAT --to-destination {place}",
        )

    # ---- Lines in shared chains ----

    def _line(self, table: str, chain: str, frontend: Frontend, comment: str, target: str | Verdict) -> None:
        lines = self.nat_lines if table == "nat" else self.filter_lines
        jump = self._answer(target) if isinstance(target, Verdict) else f"-j {target}"
        lines.setdefault(chain, []).append(
            f"-A {chain} -d {host(frontend.address)} -p {self.protocol} -m comment --comment"
            f' "{self.text} {comment}" -m {self.protocol} --dport {frontend.port} {jump}'
        )

    def _answer(self, verdict: Verdict) -> str:
        """TCP is refused by a reset: an ICMP error may be lost on a socket that is being connected, for a second."""
        if verdict is not _REJECT:
            return "-j DROP"
        how = "tcp-reset" if self.protocol == "tcp" else unreachable(self.family)
        return f"-j REJECT --reject-with {how}"

    def _lacking(self, verdict: Verdict) -> str:
        return "has no endpoints" if verdict is _REJECT else "has no local endpoints"

    def _unsaid(self, kind: Kind | None) -> str:
        """What a rule that has no chains behind it says of its row."""
        affinity = self.layout.affinity_seconds
        return (
            (f" kind={kind.label}" if kind is not None else "")
            + (f" affinity={affinity}" if affinity else "")
            + self.suffix
        )


def _suffix(layout: PortLayout) -> str:
    """What of a route iptables does not do or cannot tell, where it is not the default."""
    return (f" algorithm={layout.algorithm.label}" if layout.algorithm is not Algorithm.RANDOM else "") + (
        f" forwarding={layout.forwarding.name.lower()}" if layout.forwarding is not Forwarding.SNAT else ""
    )


def _allowed(guarded: list[Place]) -> list[str]:
    """Who may use the guarded frontends, as matches. A range of some of them only, as is a load balancer's own address,
    names its destination."""
    shared = set(guarded[0].source_ranges).intersection(*(place.source_ranges for place in guarded))
    found = []
    for cidr in sorted({cidr for place in guarded for cidr in place.source_ranges}, key=cidr_order):
        if cidr in shared:
            found.append(f"-s {cidr}")
        else:
            found += [
                f"-s {cidr} -d {host(place.frontend.address)}" for place in guarded if cidr in place.source_ranges
            ]
    return found
