"""Rules as routes: the inverse of `rules`.

Rules of this file: pure. What it does not understand (a rule that somebody put into a chain of ours) it passes over:
`state` tells what the kernel holds of ours, and an audit, which compares text, finds the rest. A row of which a part is
missing (a chain, a rule) is no row. Where two rules speak of one frontend the first does, as in the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ebpflb.dataplane.iptables import names
from ebpflb.model import Address, Family, Protocol, ServiceName
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Forwarding,
    Frontend,
    Key,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
    address_order,
    backend_order,
    cidr_order,
)

MARK_OF_OWNERSHIP = ("filter", names.LOCALITY)
"""(table, chain): KUBE-* chains beside it are this project's, without it kube-proxy's. See `owned`."""

_NEVER, _NOT_POD, _ALWAYS = Masquerade.NEVER, Masquerade.NOT_POD, Masquerade.ALWAYS

_PROTOCOLS = {protocol.name.lower(): protocol for protocol in Protocol}
_KINDS = {kind.label: kind for kind in Kind}
_ALGORITHMS = {algorithm.label: algorithm for algorithm in Algorithm}
_FORWARDINGS = {forwarding.name.lower(): forwarding for forwarding in Forwarding}

_COMMENT = r'-m comment --comment "((?:[^"\\]|\\.)*)"'
# A line in a chain that all service ports share.
_LINE = re.compile(rf"-A \S+ (?:-d (\S+)/\d+ )?-p (\w+) {_COMMENT} -m \2 --dport (\d+) -j (\S+)(?: --reject-with \S+)?")
# Where node ports are, and which cluster IPs are refused.
_NODE_PORTS = re.compile(rf"-A \S+ -d (\S+)/\d+ {_COMMENT} -j {names.NODE_PORTS}")
_REFUSED = re.compile(rf"-A \S+ -d (\S+)/\d+ {_COMMENT} -j {names.CIP_REJECT}")
# KUBE-SVC-… and KUBE-SVL-…: who is masqueraded, and who is chosen.
_MASQUERADE = re.compile(
    rf"-A \S+ (! -s \S+ )?-d (\S+)/\d+ (! -i \S+ )?-p (\w+) {_COMMENT} -m \4 --dport (\d+)"
    rf" -j ({names.MARK_MASQ}|{names.NOT_POD})"
)
_CHOICE = re.compile(
    rf"-A \S+(?: {_COMMENT})?"
    r"(?: -m statistic --mode random --probability ([\d.]+)"
    r"| -m recent --rcheck --seconds (\d+) --reap --name \S+ --mask \S+ --rsource)?"
    rf" -j ({names.SEP}\S+)"
)
# KUBE-SEP-….
_HAIRPIN = re.compile(rf"-A \S+ -s (\S+)/\d+(?: {_COMMENT})? -j {names.MARK_MASQ}")
_DNAT = re.compile(
    rf"-A \S+ -p (\w+)(?: {_COMMENT})?(?: -m recent --set --name \S+ --mask \S+ --rsource)?"
    r" -m \1 -j DNAT --to-destination \[?([^\]\s]+?)\]?:(\d+)"
)
# KUBE-EXT-… and KUBE-FW-…, the latter in either table.
_EXTERN = re.compile(rf"-A \S+(?: -[si] \S+)?(?: {_COMMENT})?( -m addrtype --src-type LOCAL)? -j (\S+)")
_SPARING = re.compile(rf"-A \S+ -p \w+ {_COMMENT} -j (REJECT|DROP)(?: --reject-with \S+)?")
_ALLOWED = re.compile(
    rf"-A \S+ -s (\S+)(?: -d (\S+)/\d+)?(?: -p \w+)? {_COMMENT}"
    rf" -j ({names.EXT}\S+|RETURN|REJECT|DROP)(?: --reject-with \S+)?"
)


def owned(ruleset: Ruleset) -> bool:
    """Whether the KUBE-* chains of `ruleset` are this dataplane's. Under IPVS, KUBE-SERVICES asks its sets."""
    table, chain = MARK_OF_OWNERSHIP
    chains = ruleset.get(table, {})
    services = ruleset.get("nat", {}).get(names.SERVICES, ())
    return chain in chains and names.IPVS_MARK not in chains and not any(" --match-set " in rule for rule in services)


def routes(rulesets: Mapping[Family, Ruleset], node_addresses: Iterable[Address]) -> RouteTable:
    """The routes that saved rulesets carry (tables filter and nat), with the locality that they name; `node_addresses`
    are what the kernel calls local. Rulesets that are not ours give no rows. `owned` is read back, too."""
    rows: dict[Key, Route] = {}
    refused: dict[Address, ServiceName] = {}
    cidrs: set[str] = set()
    interfaces: set[str] = set()
    for ruleset in rulesets.values():
        if not owned(ruleset):
            continue
        reader = _Reader(ruleset)
        cidrs |= reader.cidrs
        interfaces |= reader.interfaces
        for frontend, internal, external in reader.pairs():
            if internal is not None:
                rows[frontend, Scope.INTERNAL] = internal
            if external is not None:
                rows[frontend, Scope.EXTERNAL] = external
        refused.update(reader.refused())
    return RouteTable(
        rows,
        Locality(
            tuple(sorted(set(node_addresses), key=address_order)),
            tuple(sorted(cidrs, key=cidr_order)),
            min(interfaces, default=""),
        ),
        owned=refused,
    )


class _Said(NamedTuple):
    """What the comment of a line says of its row."""

    service: ServicePortName
    kind: Kind
    affinity_seconds: int
    algorithm: Algorithm
    forwarding: Forwarding


class _Line(NamedTuple):
    """A line in a shared chain. `address` is "" for any."""

    address: Address
    port: int
    protocol: Protocol
    said: _Said
    target: str


class _Set(NamedTuple):
    """What a chain KUBE-SVC-… or KUBE-SVL-… holds; `masquerades` by address and port of cluster IPs."""

    backends: tuple[Backend, ...]
    affinity_seconds: int
    masquerades: dict[tuple[Address, int], Masquerade]


class _Extern(NamedTuple):
    """What a chain KUBE-EXT-… does: where scope INTERNAL goes, and EXTERNAL, None for nowhere."""

    internal: _Set
    external: _Set | None
    masquerade: tuple[Masquerade, Masquerade]


class _Guard(NamedTuple):
    """A chain KUBE-FW-…: source ranges, each with the destination that it is for or "", and where they lead."""

    ranges: tuple[tuple[str, Address], ...]
    target: str

    def of(self, address: Address) -> tuple[str, ...]:
        """The ranges that may use `address`."""
        return tuple(sorted({cidr for cidr, where in self.ranges if where in ("", address)}, key=cidr_order))


class _Reader:
    """Reads one family."""

    def __init__(self, ruleset: Ruleset) -> None:
        self.nat = ruleset.get("nat", {})
        self.filter = ruleset.get("filter", {})
        self.cidrs: set[str] = set()
        self.interfaces: set[str] = set()
        self._sets: dict[str, _Set | None] = {}
        self._externs: dict[str, _Extern | None] = {}
        self._guards: dict[tuple[str, str], _Guard | None] = {}
        for rule in self.filter[names.LOCALITY]:
            flag, *words = rule.split(" ")[2:] or ("",)
            if not words:
                continue
            if flag == "-s":
                self.cidrs.add(words[0])
            elif flag == "-i":
                name = re.sub(r"\+$", "*", words[0])
                self.interfaces.add(name + "*" if words[-1] == "prefix" else name)
            elif (flag, words[0]) == ("-m", "comment"):  # a CIDR that holds everything, which is no match
                self.cidrs.add(words[-1].strip('"'))
        self._matches = len(self.cidrs) + len(self.interfaces)

    def refused(self) -> Iterator[tuple[Address, ServiceName]]:
        """The cluster IPs whose undefined ports are refused."""
        for chain, rules in self.filter.items():
            if chain.startswith(names.CIP):
                for rule in rules:
                    found = _REFUSED.fullmatch(rule)
                    if found is not None:
                        namespace, _, name = found[2].partition("/")
                        yield found[1], ServiceName(namespace, name)

    def pairs(self) -> Iterator[tuple[Frontend, Route | None, Route | None]]:
        """Every frontend with its routes for INTERNAL and EXTERNAL, None for one that is not whole."""
        verdicts = self._verdicts()
        guarded = {
            Frontend(line.address, line.port, line.protocol)
            for line in self._lines(self.filter.get(names.PROXY_FIREWALL, ()), Kind.LOAD_BALANCER)
            if line.target == "DROP" or self._lets_pass(line)
        }
        done: set[Frontend] = set()
        for line in self._dispatched():
            frontend = Frontend(line.address, line.port, line.protocol)
            if frontend in done:
                continue
            done.add(frontend)
            if line.target.startswith((names.SVC, names.SVL)):
                yield (frontend, *self._inside(line))
            elif line.target.startswith(names.FW):
                if frontend in guarded:
                    yield (frontend, *self._outside(line, verdicts.get(frontend)))
            elif line.target.startswith(names.EXT):
                yield (frontend, *self._outside(line, verdicts.get(frontend)))
        for frontend, route in verdicts.items():
            if frontend not in done:
                yield frontend, route, route

    # ---- Lines of shared chains ----

    def _lines(self, rules: Iterable[str], kind: Kind | None) -> Iterator[_Line]:
        """Those of `rules` that are lines of service ports; `kind` where neither words nor `kind=` tell it."""
        for rule in rules:
            found = _LINE.fullmatch(rule)
            if found is None or found[2] not in _PROTOCOLS:
                continue
            said = _said(found[3], kind)
            if said is not None:
                yield _Line(found[1] or "", int(found[4]), _PROTOCOLS[found[2]], said, found[5])

    def _dispatched(self) -> Iterator[_Line]:
        """The lines that lead to backends, one for each frontend."""
        services = self.nat.get(names.SERVICES, ())
        for line in self._lines(services, None):
            if line.address:
                yield line
        addresses = [found[1] for rule in services if (found := _NODE_PORTS.fullmatch(rule))]
        for line in self._lines(self.nat.get(names.NODE_PORTS, ()), Kind.NODE_PORT):
            if line.address in addresses:
                yield line
            elif not line.address:
                for address in addresses:
                    yield line._replace(address=address)

    def _verdicts(self) -> dict[Frontend, Route]:
        """What table filter answers, by frontend."""
        found: dict[Frontend, Route] = {}
        for chain, kind in ((names.SERVICES, Kind.CLUSTER_IP), (names.EXTERNAL_SERVICES, None)):
            for line in self._lines(self.filter.get(chain, ()), kind):
                answer = self._answered(line.target)
                if line.address and answer:
                    frontend = Frontend(line.address, line.port, line.protocol)
                    found.setdefault(frontend, _refusal(line.said, Verdict[answer], ()))
        for line in self._lines(self.filter.get(names.PROXY_FIREWALL, ()), None):
            guard = self._guard("filter", line.target) if line.target.startswith(names.FW) else None
            if line.address and guard is not None and guard.target in ("REJECT", "DROP"):
                frontend = Frontend(line.address, line.port, line.protocol)
                found[frontend] = _refusal(line.said, Verdict[guard.target], guard.of(line.address))
        return found

    def _lets_pass(self, line: _Line) -> bool:
        """Whether a line leads to the source ranges of a frontend that has a backend in its own place."""
        guard = self._guard("filter", line.target) if line.target.startswith(names.FW) else None
        return guard is not None and guard.target == "RETURN"

    def _answered(self, target: str) -> str:
        """REJECT or DROP, be it by a chain that spares scope INTERNAL; "" for neither."""
        if target.startswith(names.EXT):
            found = [each for rule in self.filter.get(target, ()) if (each := _SPARING.fullmatch(rule))]
            return found[0][2] if found else ""
        return target if target in ("REJECT", "DROP") else ""

    # ---- Rows ----

    def _inside(self, line: _Line) -> tuple[Route, Route] | tuple[None, None]:
        chosen = self._set(line.target)
        if chosen is None:
            return None, None
        masquerade = chosen.masquerades.get((line.address, line.port), _NEVER)
        internal = _forward(line.said, chosen, masquerade, ())
        if masquerade is not _NOT_POD:
            return internal, internal
        return internal, _forward(line.said, chosen, _ALWAYS, ())

    def _outside(self, line: _Line, otherwise: Route | None) -> tuple[Route | None, Route | None]:
        """`otherwise`: what table filter does with what is not translated."""
        target = line.target
        ranges: tuple[str, ...] = ()
        if target.startswith(names.FW):
            guard = self._guard("nat", target)
            if guard is None:
                return None, None
            target, ranges = guard.target, guard.of(line.address)
        extern = self._extern(target)
        if extern is None:
            return None, None
        internal = _forward(line.said, extern.internal, extern.masquerade[0], ranges)
        if extern.external is not None:
            external: Route | None = _forward(line.said, extern.external, extern.masquerade[1], ranges)
        elif otherwise is not None:
            external = _refusal(
                line.said._replace(affinity_seconds=extern.internal.affinity_seconds), otherwise.verdict, ranges
            )
        else:
            external = None
        return internal, external

    # ---- Chains ----

    def _set(self, chain: str) -> _Set | None:
        if chain not in self._sets:
            self._sets[chain] = self._read_set(self.nat.get(chain, ()))
        return self._sets[chain]

    def _read_set(self, rules: Iterable[str]) -> _Set | None:
        backends: list[Backend] = []
        masquerades: dict[tuple[Address, int], Masquerade] = {}
        seconds = 0
        complete = False
        for rule in rules:
            found = _CHOICE.fullmatch(rule)
            if found is not None:
                if found[3]:
                    seconds = int(found[3])
                    continue
                draining = found[2] is not None and float(found[2]) == 0
                backend = self._backend(found[4], BackendState.DRAINING if draining else BackendState.ACTIVE)
                if backend is None:
                    return None
                backends.append(backend)
                complete = found[2] is None
                continue
            found = _MASQUERADE.fullmatch(rule)
            if found is not None:
                spares = found[1] or found[3] or found[7] == names.NOT_POD
                masquerades.setdefault((found[2], int(found[6])), _NOT_POD if spares else _ALWAYS)
        if not complete:
            return None
        return _Set(tuple(sorted(backends, key=backend_order)), seconds, masquerades)

    def _backend(self, chain: str, state: BackendState) -> Backend | None:
        masqueraded = ""
        for rule in self.nat.get(chain, ()):
            found = _HAIRPIN.fullmatch(rule)
            if found is not None:
                masqueraded = found[1]
                continue
            found = _DNAT.fullmatch(rule)
            if found is not None and found[3] == masqueraded:
                return Backend(found[3], int(found[4]), 1, state)
        return None

    def _extern(self, chain: str) -> _Extern | None:
        if chain not in self._externs:
            self._externs[chain] = self._read_extern(self.nat.get(chain, ()))
        return self._externs[chain]

    def _read_extern(self, rules: Iterable[str]) -> _Extern | None:
        found = [each for rule in rules if (each := _EXTERN.fullmatch(rule)) is not None]
        jumps = [(each[1] or "", bool(each[2]), each[3]) for each in found]
        plain = [target for comment, local, target in jumps if not comment and not local]
        last = self._set(plain[-1]) if plain else None
        if any(target == names.MARK_MASQ and not local for _, local, target in jumps):
            return None if last is None else _Extern(last, last, (_ALWAYS, _ALWAYS))
        pods = sum(comment.startswith("pod traffic ") for comment, _, _ in jumps)
        targets = [target for _, local, target in jumps if local]
        if len(targets) != 2 or targets[0] != names.MARK_MASQ or pods != self._matches or (plain and last is None):
            return None
        near = self._set(targets[1])
        if near is None:
            return None
        return _Extern(near, last, (_NOT_POD if pods else _ALWAYS, _NEVER))

    def _guard(self, table: str, chain: str) -> _Guard | None:
        if (table, chain) not in self._guards:
            rules = (self.nat if table == "nat" else self.filter).get(chain, ())
            found = [each for rule in rules if (each := _ALLOWED.fullmatch(rule)) is not None]
            targets = {each[4] for each in found}
            self._guards[table, chain] = (
                _Guard(tuple((each[1], each[2] or "") for each in found), targets.pop()) if len(targets) == 1 else None
            )
        return self._guards[table, chain]


def _said(comment: str, kind: Kind | None) -> _Said | None:
    """What a comment says; None if it is not of our making."""
    name, _, text = comment.partition(" ")
    namespace, slash, rest = name.partition("/")
    service, _, port = rest.partition(":")
    values = dict(word.split("=", 1) for word in text.split(" ") if "=" in word)
    if text.startswith("cluster IP"):
        kind = Kind.CLUSTER_IP
    elif text.startswith("loadbalancer IP"):
        kind = Kind.LOAD_BALANCER
    elif text.startswith("external IP"):
        kind = Kind.EXTERNAL_IP
    kind = _KINDS.get(values.get("kind", ""), kind)
    algorithm = _ALGORITHMS.get(values.get("algorithm", Algorithm.RANDOM.label))
    forwarding = _FORWARDINGS.get(values.get("forwarding", "snat"))
    seconds = values.get("affinity", "0")
    if not slash or kind is None or algorithm is None or forwarding is None or not seconds.isdecimal():
        return None
    return _Said(ServicePortName(namespace, service, port), kind, int(seconds), algorithm, forwarding)


def _forward(said: _Said, chosen: _Set, masquerade: Masquerade, ranges: tuple[str, ...]) -> Route:
    return Route(
        said.service,
        said.kind,
        Verdict.FORWARD,
        chosen.backends,
        masquerade,
        chosen.affinity_seconds,
        ranges,
        said.algorithm,
        said.forwarding,
    )


def _refusal(said: _Said, verdict: Verdict, ranges: tuple[str, ...]) -> Route:
    return Route(
        said.service,
        said.kind,
        verdict,
        (),
        _NEVER,
        said.affinity_seconds,
        ranges,
        said.algorithm,
        said.forwarding,
    )
