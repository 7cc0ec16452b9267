"""What the kernel must hold for one frontend: virtual servers, destinations, ipset entries, an address of kube-ipvs0.

Rules of this file: pure. A frontend's rows are a function of its two routes, the options and the firewall marks that
its virtual servers have; nothing depends on another frontend. Keys are packed bytes, since there are a hundred
thousand of them. A pair of routes that cannot be said in these rows is a Refusal, never half of its rows.

Who goes where. The virtual server of the frontend's own address and port serves INTERNAL clients, and EXTERNAL ones
too where they have the same backends. Else (policy Local) EXTERNAL clients get a mark in mangle PREROUTING, and the
virtual server of that mark. IPVS forwards nothing from a loopback address: the virtual server of a node port there is
one of a mark that no packet gets ("parked"), so that the frontend is known and a connection to it is refused.

IPVS keeps no port of the destination for a persistent virtual server of a mark (ip_vs_sched_persist): where ports
differ, such a one has the scheduler mh instead, which keeps a client where it is by its address.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple, TypeAlias

import msgspec

from ebpflb.dataplane.ipvs.names import Set
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.model import Address, Protocol
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Forwarding,
    Frontend,
    Kind,
    Masquerade,
    Route,
    Scope,
    Verdict,
)

PERSISTENT = 0x1
MH_PORT = 0x10  # IP_VS_SVC_F_SCHED_MH_PORT: the client's port counts too
STICKY_SCHEDULER = "mh"

_PORT = struct.Struct("!H")
_PORT_PROTOCOL = struct.Struct("!HB")

_SCHEDULERS = {
    Algorithm.ROUND_ROBIN: "rr",
    Algorithm.LEAST_CONNECTIONS: "lc",
    Algorithm.MAGLEV: "mh",
}

_PAIRS = {
    (Verdict.FORWARD, Verdict.FORWARD): None,
    (Verdict.FORWARD, Verdict.DROP): Set.DROP_EXTERNAL,
    (Verdict.REJECT, Verdict.REJECT): Set.REJECT,
    (Verdict.DROP, Verdict.DROP): Set.DROP,
}
"""The set that says each pair of verdicts (INTERNAL, EXTERNAL)."""

_NEVER, _NOT_POD, _ALWAYS = Masquerade.NEVER, Masquerade.NOT_POD, Masquerade.ALWAYS

_CLUSTER_IP_PAIRS: dict[tuple[Masquerade, Masquerade], tuple[Set, ...]] = {
    (_NOT_POD, _ALWAYS): (Set.CLUSTER_IP,),
    (_ALWAYS, _ALWAYS): (Set.CLUSTER_IP, Set.MASQUERADE_ALL),
    (_NEVER, _NEVER): (Set.CLUSTER_IP, Set.MASQUERADE_NONE),
}

_NODE_PORTS = {
    Protocol.TCP: (Set.NODE_PORT_TCP, Set.NODE_PORT_LOCAL_TCP),
    Protocol.UDP: (Set.NODE_PORT_UDP, Set.NODE_PORT_LOCAL_UDP),
    Protocol.SCTP: (Set.NODE_PORT_SCTP, Set.NODE_PORT_LOCAL_SCTP),
}

SHARED = frozenset(
    (
        *(Set.LOOP_BACK, Set.NODE_IPS, Set.IPVS_IPS),
        *(Set.NODE_PORT_TCP, Set.NODE_PORT_LOCAL_TCP, Set.NODE_PORT_UDP, Set.NODE_PORT_LOCAL_UDP),
    )
)
"""Sets whose entries several frontends may ask for."""


class Server(NamedTuple):
    """A virtual server's identity: an address and a port, or (`mark` not 0, the rest empty) a firewall mark."""

    version: int
    mark: int = 0
    protocol: int = 0
    address: bytes = b""
    port: int = 0

    def __str__(self) -> str:
        if self.mark:
            return f"FWM {self.mark:#x} IPv{self.version}"
        return str(Frontend(unpacked(self.address), self.port, Protocol(self.protocol)))


class Settings(NamedTuple):
    """A virtual server's scheduler, IP_VS_SVC_F_… flags, and seconds that a client stays with its destination."""

    scheduler: str
    flags: int = 0
    timeout: int = 0


Destinations: TypeAlias = dict[bytes, int]
"""Weight by destination (`place`)."""

EntryValue: TypeAlias = str | int | None
"""What an ipset entry carries: a comment, a mark, or nothing."""

Entry: TypeAlias = tuple[Set, int, bytes]
"""An ipset entry: the set, the IP version, the packed key."""


class Rows(msgspec.Struct):
    """What is asked of the kernel. `addresses` are those to be bound to kube-ipvs0, packed."""

    servers: dict[Server, tuple[Settings, Destinations]] = msgspec.field(default_factory=dict)
    entries: dict[Entry, EntryValue] = msgspec.field(default_factory=dict)
    addresses: list[bytes] = msgspec.field(default_factory=list)


class Refusal(Exception):
    """Routes that IPVS cannot carry; says why."""


def packed(address: Address) -> bytes:
    """4 or 16 bytes."""
    return inet_pton(AF_INET6 if ":" in address else AF_INET, address)


def unpacked(address: bytes) -> Address:
    """The inverse of `packed`."""
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def place(address: Address, port: int) -> bytes:
    """A destination."""
    return packed(address) + _PORT.pack(port)


def placed(key: bytes) -> tuple[Address, int]:
    """The inverse of `place`."""
    return unpacked(key[:-2]), _PORT.unpack(key[-2:])[0]


@lru_cache(maxsize=1 << 10)
def network(cidr: str) -> bytes:
    """Address and prefix length."""
    address, _, bits = cidr.partition("/")
    return packed(address) + bytes([int(bits)])


def cidr_of(key: bytes) -> str:
    """The inverse of `network`."""
    return f"{unpacked(key[:-1])}/{key[-1]}"


def is_loopback(address: Address) -> bool:
    return address.startswith("127.") or address == "::1"


def is_udp(frontend: Frontend) -> bool:
    return frontend.protocol is Protocol.UDP


def server_of(frontend: Frontend) -> Server:
    """The virtual server of a frontend's own address and port."""
    version = 6 if ":" in frontend.address else 4
    return Server(version, 0, int(frontend.protocol), packed(frontend.address), frontend.port)


def frontend_key(frontend: Frontend) -> bytes:
    """The key of an entry of type hash:ip,port."""
    return packed(frontend.address) + _PORT_PROTOCOL.pack(frontend.port, int(frontend.protocol))


def frontend_of(key: bytes) -> Frontend:
    """The inverse of `frontend_key`; ValueError for a protocol that is no Service's."""
    port, protocol = _PORT_PROTOCOL.unpack(key[-3:])
    return Frontend(unpacked(key[:-3]), port, Protocol(protocol))


def rows_of(
    frontend: Frontend,
    internal: Route,
    external: Route,
    options: IpvsOptions,
    mark: Callable[[Scope], int],
    node_addresses: Iterable[Address] = (),
) -> Rows:
    """All rows of one frontend. `mark` gives the firewall mark of the virtual server for a scope where it needs one; a
    virtual address that is one of `node_addresses` already is not bound. Raises Refusal."""
    if (internal.service, internal.kind, internal.affinity_seconds, internal.source_ranges) != (
        *(external.service, external.kind, external.affinity_seconds, external.source_ranges),
    ) or (internal.algorithm, internal.forwarding) != (external.algorithm, external.forwarding):
        raise Refusal("its clients inside and outside are told apart by more than backends")
    rows = Rows()
    version = 6 if ":" in frontend.address else 4
    key = frontend_key(frontend)
    parked = is_loopback(frontend.address)
    verdicts = (internal.verdict, external.verdict)
    if verdicts not in _PAIRS:
        raise Refusal(f"{verdicts[0].name} inside and {verdicts[1].name} outside cannot be told apart by IPVS")
    for each in _sets(frontend, internal, external):
        rows.entries[(each, version, key if each.type.value != "bitmap:port" else _PORT.pack(frontend.port))] = None
    said = _PAIRS[verdicts]
    if said is not None:
        rows.entries[(said, version, key)] = None
    _add_ranges(rows, version, key, frontend, internal)
    if internal.kind is Kind.NODE_PORT:
        rows.entries[(Set.NODE_IPS, version, packed(frontend.address))] = None
    elif internal.kind is Kind.CLUSTER_IP or frontend.address not in node_addresses:
        address = packed(frontend.address)
        rows.addresses.append(address)
        rows.entries[(Set.IPVS_IPS, version, address)] = None
    number = 0
    if internal.verdict is Verdict.FORWARD:
        server = server_of(frontend)
        if parked:
            number = mark(Scope.INTERNAL)
            server = Server(version, number)
        rows.servers[server] = _server(server, frontend, internal, options)
        if external.verdict is Verdict.FORWARD and external.backends != internal.backends:
            other = Server(version, mark(Scope.EXTERNAL))
            rows.servers[other] = _server(other, frontend, external, options)
            rows.entries[(Set.MARKS, version, key)] = other.mark
        _add_loops(rows, version, int(frontend.protocol), (internal, external))
    rows.entries[(Set.FRONTENDS, version, key)] = remark(internal, number)
    return rows


def _sets(frontend: Frontend, internal: Route, external: Route) -> tuple[Set, ...]:
    """The sets that say who is masqueraded; none where nothing is forwarded."""
    if internal.verdict is not Verdict.FORWARD:
        return ()
    pair = (internal.masquerade, external.masquerade)
    if internal.kind is Kind.CLUSTER_IP:
        if pair not in _CLUSTER_IP_PAIRS or internal.backends != external.backends:
            raise Refusal(f"a cluster IP with masquerade {pair[0].name} inside and {pair[1].name} outside")
        return _CLUSTER_IP_PAIRS[pair]
    local = external.masquerade is _NEVER and internal.masquerade is not _NEVER
    if not local and (pair != (_ALWAYS, _ALWAYS) or internal.backends != external.backends):
        raise Refusal(f"an external frontend with masquerade {pair[0].name} inside and {pair[1].name} outside")
    if internal.kind is Kind.NODE_PORT:
        plain, kept = _NODE_PORTS[frontend.protocol]
        return (plain, kept) if local else (plain,)
    if internal.kind is Kind.LOAD_BALANCER:
        return (Set.LOAD_BALANCER, Set.LOAD_BALANCER_LOCAL) if local else (Set.LOAD_BALANCER,)
    return (Set.EXTERNAL_IP_LOCAL,) if local else (Set.EXTERNAL_IP,)


def _add_ranges(rows: Rows, version: int, key: bytes, frontend: Frontend, route: Route) -> None:
    if not route.source_ranges:
        return
    rows.entries[(Set.LOAD_BALANCER_FW, version, key)] = None
    itself = f"{frontend.address}/{128 if version == 6 else 32}"
    for cidr in route.source_ranges:
        if cidr == itself:
            rows.entries[(Set.SOURCE_IP, version, key + packed(frontend.address))] = None
        else:
            rows.entries[(Set.SOURCE_CIDR, version, key + network(cidr))] = None


def _add_loops(rows: Rows, version: int, protocol: int, pair: tuple[Route, Route]) -> None:
    """Where not everybody is masqueraded, those who reach themselves are."""
    for route in pair:
        if route.verdict is Verdict.FORWARD and route.masquerade is not _ALWAYS:
            for backend in route.backends:
                address = packed(backend.address)
                rows.entries[
                    (Set.LOOP_BACK, version, address + _PORT_PROTOCOL.pack(backend.port, protocol) + address)
                ] = None


def _server(server: Server, frontend: Frontend, route: Route, options: IpvsOptions) -> tuple[Settings, Destinations]:
    return settings_of(server, frontend, route, options), destinations_of(route.backends)


def settings_of(server: Server, frontend: Frontend, route: Route, options: IpvsOptions) -> Settings:
    """How a virtual server chooses among its destinations."""
    scheduler = _SCHEDULERS.get(route.algorithm, options.scheduler)
    if route.affinity_seconds:
        if server.mark and any(backend.port != frontend.port for backend in route.backends):
            return Settings(STICKY_SCHEDULER)
        return Settings(scheduler, PERSISTENT | (MH_PORT if scheduler == "mh" else 0), route.affinity_seconds)
    return Settings(scheduler, MH_PORT if scheduler == "mh" else 0)


def destinations_of(backends: tuple[Backend, ...]) -> Destinations:
    """A backend that drains has weight 0."""
    return {
        place(backend.address, backend.port): backend.weight if backend.state is BackendState.ACTIVE else 0
        for backend in backends
    }


# ---- What the rows cannot say


def remark(route: Route, parked: int) -> str:
    """The comment of a frontend's entry in EBPFLB-FRONTENDS: Service port, kind, and what no other row says. `parked`
    is the mark of the virtual server that stands in for the address's own, 0 if none does."""
    words = [str(route.service), route.kind.label]
    if route.algorithm is not Algorithm.RANDOM:
        words.append(f"algorithm={route.algorithm.label}")
    if route.forwarding is not Forwarding.SNAT:
        words.append(f"forwarding={route.forwarding.name.lower()}")
    if route.affinity_seconds:
        words.append(f"affinity={route.affinity_seconds}")
    if route.kind is not Kind.CLUSTER_IP and route.masquerade is Masquerade.NOT_POD:
        words.append("masquerade=not-pod")
    if parked:
        words.append(f"parked={parked:#x}")
    return " ".join(words)


def health_entries(ports: Iterable[tuple[int, int]]) -> Mapping[Entry, EntryValue]:
    """The entries of health check node ports, given as (IP version, port)."""
    return {(Set.HEALTH, version, _PORT.pack(port)): None for version, port in ports}
