"""What the kernel holds as routes: the inverse of `table`.

Rules of this file: pure. A frontend is what EBPFLB-FRONTENDS names; its route is put together from the rows that make
it work. Where one of them is missing it is no row, so that whoever compares sees that something is amiss. Virtual
servers, sets and rules of others are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from ebpflb.dataplane.ipvs.names import LOCALITY, Set
from ebpflb.dataplane.ipvs.rules import is_ours, pod_cidrs
from ebpflb.dataplane.ipvs.table import (
    PERSISTENT,
    Entry,
    EntryValue,
    Server,
    Settings,
    cidr_of,
    frontend_of,
    placed,
    server_of,
    unpacked,
)
from ebpflb.model import Address, Protocol, ServiceName
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

_KINDS = {kind.label: kind for kind in Kind}
_ALGORITHMS = {algorithm.label: algorithm for algorithm in Algorithm}
_FORWARDINGS = {forwarding.name.lower(): forwarding for forwarding in Forwarding}
_NODE_PORTS = {
    Protocol.TCP: (Set.NODE_PORT_TCP, Set.NODE_PORT_LOCAL_TCP),
    Protocol.UDP: (Set.NODE_PORT_UDP, Set.NODE_PORT_LOCAL_UDP),
    Protocol.SCTP: (Set.NODE_PORT_SCTP, Set.NODE_PORT_LOCAL_SCTP),
}


class Destination(NamedTuple):
    """A virtual server's destination as the kernel has it. `leaving`: it is kept for its connections only, and is no
    backend any more."""

    weight: int
    leaving: bool = False
    active: int = 0
    inactive: int = 0
    persistent: int = 0

    @property
    def connections(self) -> int:
        return self.active + self.inactive


class Held(msgspec.Struct):
    """What the kernel holds. `addresses` are those of kube-ipvs0, `node_addresses` all others that it calls local;
    `rulesets` are by IP version."""

    servers: dict[Server, Settings] = msgspec.field(default_factory=dict)
    destinations: dict[Server, dict[bytes, Destination]] = msgspec.field(default_factory=dict)
    entries: dict[tuple[Set, int], dict[bytes, EntryValue]] = msgspec.field(default_factory=dict)
    addresses: set[bytes] = msgspec.field(default_factory=set)
    node_addresses: tuple[Address, ...] = ()
    rulesets: dict[int, Ruleset] = msgspec.field(default_factory=dict)

    def has(self, entry: Entry) -> bool:
        each, version, key = entry
        return key in self.entries.get((each, version), ())


class Remark(NamedTuple):
    """What the comment of a frontend says (see `table.remark`)."""

    service: ServicePortName
    kind: Kind
    algorithm: Algorithm = Algorithm.RANDOM
    forwarding: Forwarding = Forwarding.SNAT
    affinity_seconds: int = 0
    spares_pods: bool = False
    parked: int = 0


def remark_of(comment: str) -> Remark | None:
    """The inverse of `table.remark`; None for a comment that is none of ours."""
    words = comment.split(" ")
    namespace, slash, rest = words[0].partition("/")
    if not slash or len(words) < 2 or words[1] not in _KINDS:
        return None
    name, _, port = rest.partition(":")
    said = dict(word.partition("=")[::2] for word in words[2:])
    try:
        return Remark(
            ServicePortName(namespace, name, port),
            _KINDS[words[1]],
            _ALGORITHMS[said.get("algorithm", Algorithm.RANDOM.label)],
            _FORWARDINGS[said.get("forwarding", "snat")],
            int(said.get("affinity", "0")),
            said.get("masquerade") == "not-pod",
            int(said.get("parked", "0"), 16),
        )
    except (KeyError, ValueError):
        return None


def routes(held: Held) -> RouteTable:
    """The routes that the kernel carries, with the locality that the rules tell."""
    cidrs: list[str] = []
    interface = ""
    rows: dict[Key, Route] = {}
    owned: dict[Address, ServiceName] = {}
    ours = False
    for version in (4, 6):
        ruleset = held.rulesets.get(version, {})
        if not is_ours(ruleset):
            continue
        ours = True
        found, interface_here = pod_cidrs(ruleset.get("filter", {}).get(LOCALITY, ()))
        cidrs += found
        interface = interface or interface_here
        ranges = _source_ranges(held, version)
        for frontend, key, said in frontends(held, version):
            pair = _pair(held, version, frontend, key, said, ranges.get(key, ()))
            if pair is None:
                continue
            rows[frontend, Scope.INTERNAL], rows[frontend, Scope.EXTERNAL] = pair
            if said.kind is Kind.CLUSTER_IP:
                owner = said.service.service
                owned[frontend.address] = min(owner, owned.get(frontend.address, owner))  # as policy has it
    local = Locality(
        tuple(sorted(held.node_addresses, key=address_order)), tuple(sorted(cidrs, key=cidr_order)), interface
    )
    return RouteTable(rows, local, owned=owned) if ours else RouteTable()


def frontends(held: Held, version: int) -> Iterator[tuple[Frontend, bytes, Remark]]:
    """Each frontend of a family that is named, with its packed key and what is said of it."""
    for key, comment in held.entries.get((Set.FRONTENDS, version), {}).items():
        said = remark_of(comment) if isinstance(comment, str) else None
        if said is None:
            continue
        try:
            yield frontend_of(key), key, said
        except ValueError:
            continue


def _pair(
    held: Held, version: int, frontend: Frontend, key: bytes, said: Remark, ranges: tuple[str, ...]
) -> tuple[Route, Route] | None:
    """Both routes of a frontend; None if a part is missing."""
    if not _is_reached(held, version, key, said.kind):
        return None
    if held.has((Set.REJECT, version, key)) or held.has((Set.DROP, version, key)):
        verdict = Verdict.REJECT if held.has((Set.REJECT, version, key)) else Verdict.DROP
        route = _route(said, verdict, (), Masquerade.NEVER, said.affinity_seconds, ranges)
        return route, route
    masquerade = _masquerade(held, version, frontend, key, said)
    inside = _backends(held, Server(version, said.parked) if said.parked else server_of(frontend), said)
    if masquerade is None or inside is None:
        return None
    backends, affinity = inside
    internal = _route(said, Verdict.FORWARD, backends, masquerade[0], affinity, ranges)
    if held.has((Set.DROP_EXTERNAL, version, key)):
        return internal, _route(said, Verdict.DROP, (), Masquerade.NEVER, affinity, ranges)
    mark = held.entries.get((Set.MARKS, version), {}).get(key)
    if isinstance(mark, int):
        outside = _backends(held, Server(version, mark), said)
        if outside is None:
            return None
        return internal, _route(said, Verdict.FORWARD, outside[0], masquerade[1], outside[1], ranges)
    if masquerade[0] == masquerade[1]:
        return internal, internal
    return internal, _route(said, Verdict.FORWARD, backends, masquerade[1], affinity, ranges)


def _is_reached(held: Held, version: int, key: bytes, kind: Kind) -> bool:
    """Whether the stack takes the frontend's packets for its own."""
    address = key[:-3]
    if kind is Kind.NODE_PORT:
        return held.has((Set.NODE_IPS, version, address))
    if address in held.addresses:
        return held.has((Set.IPVS_IPS, version, address))
    return unpacked(address) in held.node_addresses


def _masquerade(
    held: Held, version: int, frontend: Frontend, key: bytes, said: Remark
) -> tuple[Masquerade, Masquerade] | None:
    """Who is masqueraded, inside and outside, by the sets that the frontend is in; None if it is in none."""

    def within(each: Set) -> bool:
        return held.has((each, version, key if each.type.value != "bitmap:port" else key[-3:-1]))

    local = (Masquerade.NOT_POD if said.spares_pods else Masquerade.ALWAYS, Masquerade.NEVER)
    everybody = (Masquerade.ALWAYS, Masquerade.ALWAYS)
    if said.kind is Kind.CLUSTER_IP:
        if not within(Set.CLUSTER_IP):
            return None
        if within(Set.MASQUERADE_NONE):
            return Masquerade.NEVER, Masquerade.NEVER
        return everybody if within(Set.MASQUERADE_ALL) else (Masquerade.NOT_POD, Masquerade.ALWAYS)
    if said.kind is Kind.EXTERNAL_IP:
        if within(Set.EXTERNAL_IP_LOCAL):
            return local
        return everybody if within(Set.EXTERNAL_IP) else None
    plain, kept = (
        _NODE_PORTS[frontend.protocol] if said.kind is Kind.NODE_PORT else (Set.LOAD_BALANCER, Set.LOAD_BALANCER_LOCAL)
    )
    if not within(plain):
        return None
    return local if within(kept) else everybody


def _backends(held: Held, server: Server, said: Remark) -> tuple[tuple[Backend, ...], int] | None:
    """The backends of a virtual server and the seconds of its affinity; None if there is no such server."""
    settings = held.servers.get(server)
    if settings is None:
        return None
    found = []
    for key, each in held.destinations.get(server, {}).items():
        if not each.leaving:
            address, port = placed(key)
            state = BackendState.ACTIVE if each.weight else BackendState.DRAINING
            found.append(Backend(address, port, each.weight or 1, state))
    if not found:
        return None
    # By mark and another port than the backends' the client's address alone keeps it where it is.
    by_hash = bool(server.mark) and not settings.flags & PERSISTENT
    affinity = settings.timeout if settings.flags & PERSISTENT else said.affinity_seconds if by_hash else 0
    return tuple(sorted(found, key=backend_order)), affinity


def _route(
    said: Remark,
    verdict: Verdict,
    backends: tuple[Backend, ...],
    masquerade: Masquerade,
    affinity: int,
    ranges: tuple[str, ...],
) -> Route:
    return Route(
        said.service, said.kind, verdict, backends, masquerade, affinity, ranges, said.algorithm, said.forwarding
    )


def _source_ranges(held: Held, version: int) -> Mapping[bytes, tuple[str, ...]]:
    """By the key of a frontend that has any: who may use it."""
    guarded: Iterable[bytes] = held.entries.get((Set.LOAD_BALANCER_FW, version), ())
    found: dict[bytes, list[str]] = {key: [] for key in guarded}
    width = 16 if version == 6 else 4
    for key in held.entries.get((Set.SOURCE_CIDR, version), ()):
        if (frontend := key[: width + 3]) in found:
            found[frontend].append(cidr_of(key[width + 3 :]))
    for key in held.entries.get((Set.SOURCE_IP, version), ()):
        if (frontend := key[: width + 3]) in found:
            found[frontend].append(f"{unpacked(key[width + 3 :])}/{width * 8}")
    return {key: tuple(sorted(cidrs, key=cidr_order)) for key, cidrs in found.items()}
