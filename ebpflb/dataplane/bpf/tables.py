"""The bytes of the kernel's rows, and what each says.

Rules of this file: pure; one row at a time. What a row refers to is the business of `reading` and `ledger`.
"""

from __future__ import annotations

from collections.abc import Iterable
from socket import AF_INET6, htons, inet_aton, inet_ntoa, inet_ntop, inet_pton, ntohs

from ebpflb.dataplane.bpf.constants import BACKEND_FREE
from ebpflb.dataplane.bpf.layouts import (
    BACKEND,
    FRONTEND_KEY,
    NAME,
    RANGE_KEY,
    ROUTE,
)
from ebpflb.model import Protocol
from ebpflb.routes import (
    Backend,
    BackendState,
    Frontend,
    Route,
    ServicePortName,
    cidr_order,
    packed_network,
)

ABSENT = bytes(ROUTE.size)
"""The route of a scope that has none: no service has number 0."""

FREE = BACKEND.pack(bytes(16), 0, 0, BACKEND_FREE, 0)
"""The row of a backend that belongs to nobody."""


NAME_LIMIT = 63
"""Bytes of a name that fit beside its NUL."""

MAPPED = bytes(10) + b"\xff\xff"
IPV4_BITS = 96
ADDRESS_BYTES = 16


# ---- Addresses and ports


def pack_address(address: str) -> bytes:
    """As `routes.packed`, without its cache: a hundred thousand backends are packed once each."""
    return inet_pton(AF_INET6, address) if ":" in address else MAPPED + inet_aton(address)


def unpack_address(address: bytes) -> str:
    """The inverse of `pack_address`."""
    return inet_ntoa(address[12:]) if address[:12] == MAPPED else inet_ntop(AF_INET6, address)


def pack_network(cidr: str) -> tuple[int, bytes]:
    """A CIDR as prefix in bits of 128 and address."""
    address, bits = packed_network(cidr)
    return bits, address


def unpack_network(bits: int, address: bytes) -> str:
    """The inverse of `pack_network`."""
    if address[:12] == MAPPED and bits >= IPV4_BITS:
        return f"{inet_ntoa(address[12:])}/{bits - IPV4_BITS}"
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


# ---- Rows of one field or another


def pack_route(route: Route, service: int, slots: int, count: int, draining: int, ranges: int, table: int = 0) -> bytes:
    """One scope's half of a frontend's row. `table`: the size of its slots' table, as `table_size` of bpf/maglev.h
    counts it; 0 for none."""
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
        table,
    )


def pack_backend(backend: Backend, state: int, service: int) -> bytes:
    """A `backends` row. `state`: of the row, which several routes may share."""
    return BACKEND.pack(pack_address(backend.address), htons(backend.port), backend.weight, state, service)


def pack_backends(backends: Iterable[Backend], service: int) -> list[bytes]:
    """As `pack_backend` with each one's own state: written out, for a hundred thousand of them, most of which differ
    from their neighbour in the address alone."""
    rows: list[bytes] = []
    rest = b""
    port = weight = state = -1
    for backend in backends:
        if backend.port != port or backend.weight != weight or backend.state != state:
            port, weight, state = backend.port, backend.weight, backend.state
            rest = BACKEND.pack(b"", htons(port), weight, state, service)[ADDRESS_BYTES:]
        address = backend.address
        rows.append((inet_pton(AF_INET6, address) if ":" in address else MAPPED + inet_aton(address)) + rest)
    return rows


def unpack_backend(row: bytes) -> tuple[Backend, int]:
    """The inverse of `pack_backend`: (backend, service). The state is the row's; BACKEND_FREE reads as DRAINING."""
    address, port, weight, state, service = BACKEND.unpack(row)
    found = BackendState.ACTIVE if state == BackendState.ACTIVE else BackendState.DRAINING
    return Backend(unpack_address(address), ntohs(port), weight, found), service


def pack_name(service: ServicePortName) -> bytes | None:
    """A `names` row; None if a name is too long for one."""
    namespace, name, port = service.namespace.encode(), service.name.encode(), service.port.encode()
    if max(len(namespace), len(name), len(port)) > NAME_LIMIT or b"\0" in namespace + name + port:
        return None
    return NAME.pack(namespace, name, port)


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


def by_slot(backends: tuple[Backend, ...]) -> list[Backend]:
    """Active backends first, draining ones behind them, each in their order."""
    active = [backend for backend in backends if not backend.state]
    if len(active) == len(backends):
        return active
    return active + [backend for backend in backends if backend.state]
