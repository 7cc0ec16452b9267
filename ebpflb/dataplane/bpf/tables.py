"""The bytes of the kernel's rows, and what they say as routes.

Rules of this file: pure. Reading never raises for what a row says: a row that cannot be understood reads as None, so
that it compares unequal to every wanted one and is written anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from socket import AF_INET6, htons, inet_aton, inet_ntoa, inet_ntop, inet_pton, ntohs

import msgspec

from ebpflb.dataplane.bpf.constants import BACKEND_FREE, POD_SOCKETS_IPV4, POD_SOCKETS_IPV6, SOURCE_NODE, SOURCE_POD
from ebpflb.dataplane.bpf.layouts import (
    BACKEND,
    FRONTEND_KEY,
    LAYOUT,
    NAME,
    RANGE_KEY,
    ROUTE,
    SETTINGS,
    SOURCE_KEY,
    U32,
)
from ebpflb.model import Family, Protocol, family_of
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Forwarding,
    Frontend,
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
    packed_network,
)

ABSENT = bytes(ROUTE.size)
"""The route of a scope that has none: no service has number 0."""

FREE = BACKEND.pack(bytes(16), 0, 0, BACKEND_FREE, 0)
"""The row of a backend that belongs to nobody."""

PRESENT = U32.pack(1)
"""The value of a `ranges` row."""

ONLY = U32.pack(0)
"""The key of the only `settings` row."""

NAME_LIMIT = 63
"""Bytes of a name that fit beside its NUL."""

_MAPPED = bytes(10) + b"\xff\xff"
_IPV4_BITS = 96
# The upper half of a source's flags says what the row itself stands for, the lower half what holds for the address:
# a node address inside a pod CIDR has both bits below, but is no pod CIDR itself.
_OWN = 16


# ---- Addresses and ports


def pack_address(address: str) -> bytes:
    """As `routes.packed`, without its cache: a hundred thousand backends are packed once each."""
    return inet_pton(AF_INET6, address) if ":" in address else _MAPPED + inet_aton(address)


def unpack_address(address: bytes) -> str:
    """The inverse of `pack_address`."""
    return inet_ntoa(address[12:]) if address[:12] == _MAPPED else inet_ntop(AF_INET6, address)


def pack_network(cidr: str) -> tuple[int, bytes]:
    """A CIDR as prefix in bits of 128 and address."""
    address, bits = packed_network(cidr)
    return bits, address


def unpack_network(bits: int, address: bytes) -> str:
    """The inverse of `pack_network`."""
    if address[:12] == _MAPPED and bits >= _IPV4_BITS:
        return f"{inet_ntoa(address[12:])}/{bits - _IPV4_BITS}"
    return f"{inet_ntop(AF_INET6, address)}/{bits}"


def pack_frontend(frontend: Frontend) -> bytes:
    """The key of a `frontends` row."""
    return FRONTEND_KEY.pack(pack_address(frontend.address), htons(frontend.port), frontend.protocol)


def unpack_frontend(key: bytes) -> Frontend | None:
    """The inverse of `pack_frontend`; None for a protocol that no frontend has."""
    address, port, protocol = FRONTEND_KEY.unpack(key)
    if protocol not in _PROTOCOLS:
        return None
    return Frontend(unpack_address(address), ntohs(port), _PROTOCOLS[protocol])


# Calling an Enum costs a microsecond; these cost nothing.
_PROTOCOLS = {int(protocol): protocol for protocol in Protocol}
_VERDICTS = {int(verdict): verdict for verdict in Verdict}
_MASQUERADES = {int(masquerade): masquerade for masquerade in Masquerade}
_ALGORITHMS = {int(algorithm): algorithm for algorithm in Algorithm}
_FORWARDINGS = {int(forwarding): forwarding for forwarding in Forwarding}
_KINDS = {int(kind): kind for kind in Kind}


# ---- Rows of one field or another


def pack_route(route: Route, service: int, slots: int, count: int, draining: int, ranges: int) -> bytes:
    """One scope's half of a frontend's row."""
    return ROUTE.pack(
        route.verdict,
        route.masquerade,
        route.algorithm,
        route.forwarding,
        service,
        slots,
        count,
        draining,
        route.affinity_seconds,
        ranges,
        route.kind,
    )


def pack_backend(backend: Backend, state: int, service: int) -> bytes:
    """A `backends` row. `state`: of the row, which several routes may share."""
    return BACKEND.pack(pack_address(backend.address), htons(backend.port), backend.weight, state, service)


def pack_backends(backends: Iterable[Backend], service: int) -> list[bytes]:
    """As `pack_backend` with each one's own state: written out, for a hundred thousand of them."""
    pack = BACKEND.pack
    return [
        pack(
            inet_pton(AF_INET6, backend.address) if ":" in backend.address else _MAPPED + inet_aton(backend.address),
            htons(backend.port),
            backend.weight,
            backend.state,
            service,
        )
        for backend in backends
    ]


def unpack_backend(row: bytes) -> tuple[Backend, int]:
    """The inverse of `pack_backend`: (backend, service). The state is the row's; BACKEND_FREE reads as DRAINING."""
    address, port, weight, state, service = BACKEND.unpack(row)
    found = BackendState.ACTIVE if state == BackendState.ACTIVE else BackendState.DRAINING
    return Backend(unpack_address(address), ntohs(port), weight, found), service


def pack_name(service: ServicePortName) -> bytes | None:
    """A `names` row; None if a name is too long for one."""
    parts = [part.encode() for part in service]
    if any(len(part) > NAME_LIMIT or b"\0" in part for part in parts):
        return None
    return NAME.pack(*parts)


def unpack_name(row: bytes) -> ServicePortName:
    """The inverse of `pack_name`."""
    return ServicePortName(*(part.rstrip(b"\0").decode(errors="replace") for part in NAME.unpack(row)))


def pack_ranges(ranges: int, cidrs: Iterable[str]) -> list[bytes]:
    """The keys of the `ranges` rows of one set."""
    return [RANGE_KEY.pack(32 + bits, ranges, address) for bits, address in map(pack_network, cidrs)]


def unpack_ranges(keys: bytes) -> dict[int, tuple[str, ...]]:
    """All sets of ranges by id, each sorted as `Route.source_ranges`."""
    found: dict[int, list[str]] = {}
    for bits, ranges, address in RANGE_KEY.iter_unpack(keys):
        if bits >= 32:
            found.setdefault(ranges, []).append(unpack_network(bits - 32, address))
    return {ranges: tuple(sorted(cidrs, key=cidr_order)) for ranges, cidrs in found.items()}


# ---- Locality: the sources' trie and the settings


class NodeFacts(msgspec.Struct, frozen=True, gc=False):
    """What the settings say besides locality. `netns` is the cookie of the node's network namespace; times are in
    jiffies; the ports are the range of masquerade, both inclusive."""

    netns: int
    flow_idle: int
    refresh: int
    snat_low: int
    snat_high: int


def pack_sources(locality: Locality) -> dict[bytes, bytes]:
    """The `sources` rows. A longest-prefix match finds one row only, so each row also has the bits of all prefixes
    around it."""
    own: dict[tuple[int, bytes], int] = {}
    for cidr in locality.pod_cidrs:
        own[pack_network(cidr)] = SOURCE_POD
    for address in locality.node_addresses:
        key = (128, pack_address(address))
        own[key] = own.get(key, 0) | SOURCE_NODE
    # An IPv6 prefix that is short enough holds all of IPv4's, which it does not mean: a row of no bits stops it.
    ipv4 = (_IPV4_BITS, _MAPPED + bytes(4))
    if any(bits < _IPV4_BITS and _encloses((bits, network), ipv4[1]) for bits, network in own):
        own.setdefault(ipv4, 0)
    wide = sorted(key for key in own if key[0] < 128)
    rows: dict[bytes, bytes] = {}
    for (bits, network), mine in own.items():
        flags = mine
        for around in wide:
            same = _is_ipv4(bits, network) == _is_ipv4(*around)
            if same and around[0] < bits and _encloses(around, network):
                flags |= own[around]
        rows[SOURCE_KEY.pack(bits, network)] = U32.pack(flags | mine << _OWN)
    return rows


def _is_ipv4(bits: int, network: bytes) -> bool:
    return bits >= _IPV4_BITS and network[:12] == _MAPPED


def _encloses(around: tuple[int, bytes], address: bytes) -> bool:
    shift = 128 - around[0]
    return int.from_bytes(around[1]) >> shift == int.from_bytes(address) >> shift


def interface_fits(locality: Locality) -> bool:
    """Whether the kernel could have a device of the name `pod_interface`."""
    return len(locality.pod_interface.removesuffix("*").encode()) <= 15


def pack_settings(facts: NodeFacts, locality: Locality) -> bytes:
    """The `settings` row. A family has `pod_sockets` where something tells its pods apart."""
    families = {family_of(cidr) for cidr in locality.pod_cidrs}
    if locality.pod_interface:
        families = set(Family)
    sockets = POD_SOCKETS_IPV4 * (Family.IPV4 in families) | POD_SOCKETS_IPV6 * (Family.IPV6 in families)
    interface = locality.pod_interface
    return SETTINGS.pack(
        facts.netns,
        facts.flow_idle,
        facts.refresh,
        LAYOUT,
        sockets,
        facts.snat_low,
        facts.snat_high,
        interface.removesuffix("*").encode()[:15],
        interface.endswith("*"),
    )


def unpack_facts(settings: bytes) -> tuple[NodeFacts, int]:
    """The facts of a `settings` row, and its layout version (0: never written)."""
    netns, flow_idle, refresh, layout, _, low, high, _, _ = SETTINGS.unpack(settings)
    return NodeFacts(netns, flow_idle, refresh, low, high), layout


def unpack_locality(keys: bytes, values: bytes, settings: bytes) -> Locality:
    """Locality as the `sources` rows (keys and values back to back) and the `settings` row say it."""
    nodes, cidrs = [], []
    for (bits, address), (flags,) in zip(SOURCE_KEY.iter_unpack(keys), U32.iter_unpack(values), strict=True):
        if flags >> _OWN & SOURCE_NODE:
            nodes.append(unpack_address(address))
        if flags >> _OWN & SOURCE_POD:
            cidrs.append(unpack_network(bits, address))
    *_, interface, prefix = SETTINGS.unpack(settings)
    return Locality(
        tuple(sorted(nodes, key=address_order)),
        tuple(sorted(cidrs, key=cidr_order)),
        interface.rstrip(b"\0").decode(errors="replace") + ("*" if prefix else ""),
    )


# ---- Everything at once


def by_slot(backends: tuple[Backend, ...]) -> list[Backend]:
    """Active backends first, draining ones behind them, each in their order."""
    active = [backend for backend in backends if not backend.state]
    if len(active) == len(backends):
        return active
    return active + [backend for backend in backends if backend.state]


class BackendSet(msgspec.Struct, frozen=True, gc=False):
    """The backends of a slot range: `backends` in the order of `Route.backends`, `ids` in the order of the slots."""

    service: int
    start: int
    count: int
    draining: int
    backends: tuple[Backend, ...]
    ids: bytes

    @property
    def length(self) -> int:
        return self.count + self.draining


class RawTables(msgspec.Struct, frozen=True):
    """What was read of the maps of routes: keys and values of each, back to back. `slots` and `backends` are arrays
    from index 0, without keys, as far as they are of interest."""

    frontends: tuple[bytes, bytes]
    slots: bytes
    backends: bytes
    names: tuple[bytes, bytes]
    ranges: bytes
    sources: tuple[bytes, bytes]
    settings: bytes


def slots_end(frontends: bytes, capacity: int) -> int:
    """One more than the last slot that any of these `frontends` values names, as far as the array has it."""
    end = 0
    for _, _, _, _, _, start, count, draining, _, _, _ in ROUTE.iter_unpack(frontends):
        if count + draining and start + count + draining > end:
            end = start + count + draining
    return min(end, capacity)


class Reading:
    """The maps of routes, understood. Made once from RawTables; reading a set of backends twice costs nothing."""

    def __init__(self, raw: RawTables) -> None:
        self._raw = raw
        self._sets: dict[tuple[int, int, int, int], BackendSet | None] = {}
        numbers = [number for (number,) in U32.iter_unpack(raw.names[0])]
        size = NAME.size
        self.names = {
            number: unpack_name(raw.names[1][at * size : (at + 1) * size]) for at, number in enumerate(numbers)
        }
        self.ranges = unpack_ranges(raw.ranges)
        self._slots = array("I", raw.slots)

    def frontends(self) -> Iterator[tuple[bytes, bytes]]:
        """Every row's key and value."""
        keys, values = self._raw.frontends
        width, size = FRONTEND_KEY.size, 2 * ROUTE.size
        for at in range(len(keys) // width):
            yield keys[at * width : (at + 1) * width], values[at * size : (at + 1) * size]

    def backend_rows(self) -> Iterator[tuple[int, int, int]]:
        """(id, state, service) of every row that belongs to a service."""
        for number, (_, _, _, state, service) in enumerate(BACKEND.iter_unpack(self._raw.backends)):
            if service and state != BACKEND_FREE:
                yield number, state, service

    def backend_set(self, service: int, start: int, count: int, draining: int) -> BackendSet | None:
        """What a slot range holds for a service; None if a slot or a backend is not there, or is another's."""
        key = (service, start, count, draining)
        if key not in self._sets:
            self._sets[key] = self._read_set(*key)
        return self._sets[key]

    def _read_set(self, service: int, start: int, count: int, draining: int) -> BackendSet | None:
        ids = self._slots[start : start + count + draining]
        if len(ids) != count + draining:
            return None
        found: list[Backend] = []
        rows, size = self._raw.backends, BACKEND.size
        state = BackendState.ACTIVE
        for at, number in enumerate(ids):
            if number == 0 or (number + 1) * size > len(rows):
                return None
            address, port, weight, row_state, owner = BACKEND.unpack_from(rows, number * size)
            if owner != service or row_state == BACKEND_FREE:
                return None
            if at == count:
                state = BackendState.DRAINING
            found.append(Backend(unpack_address(address), ntohs(port), weight, state))
        if draining:
            slots, found = found, sorted(found, key=backend_order)
            if by_slot(tuple(found)) != slots:
                return None  # not in the order that it was written in
        return BackendSet(service, start, count, draining, tuple(found), ids.tobytes())

    def route(self, half: bytes) -> Route | None:
        """One scope's half of a frontend's row as a route; None if it says nothing that can be understood."""
        fields = ROUTE.unpack(half)
        verdict, masquerade, algorithm, forwarding, service, slots, count, draining, affinity, ranges, kind = fields
        name = self.names.get(service)
        backends: tuple[Backend, ...] = ()
        cidrs: tuple[str, ...] | None = ()
        if count or draining:
            found = self.backend_set(service, slots, count, draining)
            if found is None:
                return None
            backends = found.backends
        if ranges:
            cidrs = self.ranges.get(ranges)
        if name is None or cidrs is None:
            return None
        try:
            return Route(
                name,
                _KINDS[kind],
                _VERDICTS[verdict],
                backends,
                _MASQUERADES[masquerade],
                affinity,
                cidrs,
                _ALGORITHMS[algorithm],
                _FORWARDINGS[forwarding],
            )
        except KeyError:
            return None

    def routes(self) -> RouteTable:
        """The whole as routes; what cannot be understood is left out."""
        rows: dict[tuple[Frontend, Scope], Route] = {}
        for key, value in self.frontends():
            frontend = unpack_frontend(key)
            if frontend is None:
                continue
            for scope in Scope:
                route = self.route(value[scope * ROUTE.size : (scope + 1) * ROUTE.size])
                if route is not None:
                    rows[frontend, scope] = route
        return RouteTable(rows, unpack_locality(*self._raw.sources, self._raw.settings))
