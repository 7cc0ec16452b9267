"""The rules around those of service ports: fixed chains, the jumps to them, and what refuses undefined ports.

Rules of this file: pure. All text is what `iptables-save` prints, of either variant (checked with 1.8.9).

Jumps are kube-proxy's but for three things. KUBE-EXTERNAL-SERVICES comes before KUBE-SERVICES in table filter: an
external address may be a cluster IP of another Service, whose undefined ports are refused there. Both are asked from
INPUT, FORWARD and OUTPUT: the node's own packets get the same answer as others, and so do those to a cluster IP that is
bound to this node. And what was translated is asked nothing: a backend on the host's network may listen where another
Service, which has no endpoint, has its node port or external IP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

from ebpflb.dataplane.iptables import names
from ebpflb.dataplane.iptables.layout import is_full_prefix, matches_of
from ebpflb.model import Address, Family, ServiceName
from ebpflb.netfilter.ruleset import Ruleset, quoted
from ebpflb.routes import HealthCheck, HealthKey, Locality, RouteTable, address_order, packed, unpacked

SHARED: tuple[tuple[str, str], ...] = (
    ("nat", names.SERVICES),
    ("nat", names.NODE_PORTS),
    ("filter", names.SERVICES),
    ("filter", names.EXTERNAL_SERVICES),
    ("filter", names.PROXY_FIREWALL),
)
"""(table, chain) in which every service port has lines: any order, then the lines of `tails`."""

LARGE = 4096
"""Rows and backends from which on the rules of endpoints go without comments: about kube-proxy's 1000 endpoints."""

BLOCK_BITS = 12  # of an address, within one KUBE-CIP chain
_NODE_PORTS_COMMENT = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"


class Settings(NamedTuple):
    """What shapes rules beside the routes. `mark` is the bit's value; `random_fully`: whether this iptables knows it;
    `drop_invalid`: unless nf_conntrack_tcp_be_liberal is on; `comments`: on the rules of each endpoint, which cost a
    large cluster a third of its text (see `wants_comments`)."""

    mark: int = 1 << 14
    random_fully: bool = True
    drop_invalid: bool = True
    comments: bool = True


def wants_comments(routes: RouteTable) -> bool:
    """Whether the rules of endpoints should have comments: a pure function of the table, in some milliseconds at most.
    Where it changes, all chains of endpoints do."""
    if len(routes) > LARGE:
        return False
    size = 0
    for route in islice(routes.values(), LARGE + 1):
        size += 1 + len(route.backends)
        if size > LARGE:
            return False
    return True


def fixed(routes: RouteTable, family: Family, settings: Settings) -> Ruleset:
    """The chains of ours whose content this names wholly; depends on locality and health checks alone."""
    mark = f"{settings.mark:#x}/{settings.mark:#x}"
    matches = matches_of(routes.locality, family)
    fully = " --random-fully" if settings.random_fully else ""
    nat = {
        names.POSTROUTING: (
            f"-A {names.POSTROUTING} -m mark ! --mark {mark} -j RETURN",
            f"-A {names.POSTROUTING} -j MARK --set-xmark {settings.mark:#x}/0x0",
            f'-A {names.POSTROUTING} -m comment --comment "kubernetes service traffic requiring SNAT"'
            f" -j MASQUERADE{fully}",
        ),
        names.MARK_MASQ: (f"-A {names.MARK_MASQ} -j MARK --set-xmark {mark}",),
        names.CANARY: (),
    }
    if needs_not_pod(matches):
        nat[names.NOT_POD] = (
            *(f"-A {names.NOT_POD}{match and ' '}{match} -j RETURN" for match in matches),
            f"-A {names.NOT_POD} -j {names.MARK_MASQ}",
        )
    return {
        "mangle": {names.CANARY: ()},
        "nat": nat,
        "filter": {
            names.LOCALITY: _locality(routes.locality, family),
            names.FORWARD: _forward(mark, settings),
            names.NODE_PORTS: _health(routes.health, family),
            names.CIP_REJECT: (
                f"-A {names.CIP_REJECT} -p tcp -j REJECT --reject-with tcp-reset",
                f"-A {names.CIP_REJECT} -j REJECT --reject-with {unreachable(family)}",
            ),
            names.CANARY: (),
        },
    }


def needs_not_pod(matches: tuple[str, ...]) -> bool:
    """Whether "is no pod" takes a chain: one rule can only deny one match."""
    return len(matches) > 1 or "" in matches


def unreachable(family: Family) -> str:
    """What REJECT answers to all but TCP."""
    return "icmp6-port-unreachable" if family is Family.IPV6 else "icmp-port-unreachable"


def blocks(owned: Mapping[Address, ServiceName], family: Family) -> Ruleset:
    """The chains KUBE-CIP-…, one a /20 (IPv6: /116) in which there are cluster IPs: what meets them was translated by
    no rule, so that it goes to a port that they do not have."""
    return {
        "filter": {
            chain: tuple(
                f"-A {chain} -d {host(address)} -m comment --comment {quoted(str(name))} -j {names.CIP_REJECT}"
                for address, name in members
            )
            for chain, members in (
                (names.CIP + names.hashed(cidr), members) for cidr, members in _by_block(owned, family)
            )
        }
    }


def tails(owned: Mapping[Address, ServiceName], nodeports: Iterable[Address], family: Family) -> Ruleset:
    """The lines that stand last in SHARED chains, in this order. `nodeports` are the addresses of node ports."""
    return {
        "nat": {
            names.SERVICES: tuple(
                f"-A {names.SERVICES} -d {host(address)} -m comment --comment {quoted(_NODE_PORTS_COMMENT)}"
                f" -j {names.NODE_PORTS}"
                for address in sorted(nodeports, key=address_order)
            )
        },
        "filter": {
            names.SERVICES: tuple(
                f'-A {names.SERVICES} -d {cidr} -m comment --comment "undefined ports of cluster IPs"'
                f" -j {names.CIP + names.hashed(cidr)}"
                for cidr, _ in _by_block(owned, family)
            )
        },
    }


def guests(nodeports: Iterable[Address]) -> Ruleset:
    """Rules of ours in chains that are not: jumps from the built-in ones, to stand at their head in this order, and
    kubelet's rule against martians in KUBE-FIREWALL, which may hold others, where a node port is on loopback."""
    new = " -m conntrack --ctstate NEW -m conntrack ! --ctstate DNAT"
    firewall = f'{new} -m comment --comment "kubernetes load balancer firewall" -j {names.PROXY_FIREWALL}'
    health = f' -m comment --comment "kubernetes health check service ports" -j {names.NODE_PORTS}'
    external = (
        f'{new} -m comment --comment "kubernetes externally-visible service portals" -j {names.EXTERNAL_SERVICES}'
    )
    services = f' -m comment --comment "kubernetes service portals" -j {names.SERVICES}'
    forward = f' -m comment --comment "kubernetes forwarding rules" -j {names.FORWARD}'
    postrouting = f' -m comment --comment "kubernetes postrouting rules" -j {names.POSTROUTING}'
    kubelet: tuple[str, ...] = ()
    filter_chains: dict[str, tuple[str, ...]] = {}
    if any(address.startswith("127.") for address in nodeports):
        kubelet = (f" -j {names.KUBELET_FIREWALL}",)
        filter_chains[names.KUBELET_FIREWALL] = (
            f"-A {names.KUBELET_FIREWALL} ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment"
            f' "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP',
        )
    jumps = {
        "INPUT": (*kubelet, firewall, health, external, new + services),
        "FORWARD": (firewall, forward, external, new + services),
        "OUTPUT": (*kubelet, firewall, external, new + services),
    }
    filter_chains |= {chain: tuple(f"-A {chain}{jump}" for jump in found) for chain, found in jumps.items()}
    return {
        "nat": {
            "PREROUTING": (f"-A PREROUTING{services}",),
            "OUTPUT": (f"-A OUTPUT{services}",),
            "POSTROUTING": (f"-A POSTROUTING{postrouting}",),
        },
        "filter": filter_chains,
    }


def host(address: Address) -> str:
    """An address as a destination or source is printed."""
    return f"{address}/128" if ":" in address else f"{address}/32"


def _locality(locality: Locality, family: Family) -> tuple[str, ...]:
    """What tells pods, as rules without a target. A CIDR that holds everything is not printed as a match."""
    found = []
    for match in matches_of(locality, family):
        comment = ""
        if not match:
            comment = '-m comment --comment "::/0"' if family is Family.IPV6 else '-m comment --comment "0.0.0.0/0"'
        elif match.startswith("-i") and is_full_prefix(locality.pod_interface):
            comment = " -m comment --comment prefix"
        found.append(f"-A {names.LOCALITY} {match}{comment}")
    return tuple(found)


def _forward(mark: str, settings: Settings) -> tuple[str, ...]:
    """INVALID packets are dropped because the kernel does not translate them: a server would meet them as strangers and
    reset (kubernetes/kubernetes#74839)."""
    invalid = (f"-A {names.FORWARD} -m conntrack --ctstate INVALID -j DROP",) if settings.drop_invalid else ()
    return (
        *invalid,
        f'-A {names.FORWARD} -m comment --comment "kubernetes forwarding rules" -m mark --mark {mark} -j ACCEPT',
        f'-A {names.FORWARD} -m comment --comment "kubernetes forwarding conntrack rule"'
        " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )


def _health(health: Mapping[HealthKey, HealthCheck], family: Family) -> tuple[str, ...]:
    return tuple(
        f"-A {names.NODE_PORTS} -p tcp -m comment --comment {quoted(f'{check.service} health check node port')}"
        f" -m tcp --dport {check.port} -j ACCEPT"
        for check in sorted(health.values(), key=lambda check: check[:3])
        if check.family is family
    )


def _by_block(
    owned: Mapping[Address, ServiceName], family: Family
) -> list[tuple[str, list[tuple[Address, ServiceName]]]]:
    """Cluster IPs with their Services by the CIDR of their block, all in order."""
    version6 = family is Family.IPV6
    found: dict[int, list[tuple[int, Address, ServiceName]]] = {}
    for address, name in owned.items():
        if (":" in address) == version6:
            value = int.from_bytes(packed(address))
            found.setdefault(value >> BLOCK_BITS, []).append((value, address, name))
    bits = (128 if version6 else 32) - BLOCK_BITS
    return [
        (
            f"{unpacked((block << BLOCK_BITS).to_bytes(16))}/{bits}",
            [(address, name) for _, address, name in sorted(found[block])],
        )
        for block in sorted(found)
    ]
