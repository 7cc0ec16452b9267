"""The maps of routes as they were read, and what they say.

Rules of this file: pure. Reading never raises for what a row says: a row that cannot be understood reads as None, so
that it compares unequal to every wanted one and is written anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from socket import ntohs

import msgspec

from ebpflb.dataplane.bpf.constants import BACKEND_FREE
from ebpflb.dataplane.bpf.layouts import BACKEND, ROUTE, ROUTE_REFERENCES, U32, entries
from ebpflb.dataplane.bpf.locality import unpack_locality
from ebpflb.dataplane.bpf.owned import unpack_owned
from ebpflb.dataplane.bpf.tables import by_slot, unpack_address, unpack_frontend, unpack_name, unpack_ranges
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Forwarding,
    Frontend,
    Kind,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    Verdict,
    backend_order,
)

_VERDICTS = {int(verdict): verdict for verdict in Verdict}
_MASQUERADES = {int(masquerade): masquerade for masquerade in Masquerade}
_ALGORITHMS = {int(algorithm): algorithm for algorithm in Algorithm}
_FORWARDINGS = {int(forwarding): forwarding for forwarding in Forwarding}
_KINDS = {int(kind): kind for kind in Kind}


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
    from index 0, without keys, as far as they are of interest. What only makes looking up faster is read where it is to
    be checked: `known`, and of `tables` and `members` a sum of each row by its key."""

    frontends: tuple[bytes, bytes]
    slots: bytes
    backends: bytes
    names: tuple[bytes, bytes]
    ranges: bytes
    sources: tuple[bytes, bytes]
    settings: bytes
    owned: tuple[bytes, bytes]
    known: bytes = b""
    tables: Mapping[bytes, int] = msgspec.field(default_factory=dict)
    members: Mapping[bytes, int] = msgspec.field(default_factory=dict)


def slots_end(frontends: bytes, capacity: int) -> int:
    """One more than the last slot that any of these `frontends` values names, as far as the array has it."""
    end = 0
    for _, start, count, draining, *_ in ROUTE_REFERENCES.iter_unpack(frontends):
        if count + draining and start + count + draining > end:
            end = start + count + draining
    return min(end, capacity)


class Reading:
    """The maps of routes, understood. Made once from RawTables; reading a set of backends twice costs nothing."""

    def __init__(self, raw: RawTables) -> None:
        self._raw = raw
        self._sets: dict[tuple[int, int, int, int], BackendSet | None] = {}
        self.names = {U32.unpack(key)[0]: unpack_name(row) for key, row in entries("names", *raw.names)}
        self.ranges = unpack_ranges(raw.ranges)
        self.tables, self.members = raw.tables, raw.members
        self._slots = array("I", raw.slots)

    def frontends(self) -> Iterator[tuple[bytes, bytes]]:
        """Every row's key and value."""
        return entries("frontends", *self._raw.frontends)

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
        verdict, masquerade, algorithm, forwarding, service, slots, count, draining, affinity, ranges, kind, _ = fields
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
        locality = unpack_locality(*self._raw.sources, self._raw.settings)
        return RouteTable(rows, locality, owned=unpack_owned(*self._raw.owned))
