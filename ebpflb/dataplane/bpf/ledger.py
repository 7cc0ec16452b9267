"""What to write when routes change, beside what is held; and what is held after a restart.

Rules of this file: pure. `prepare` reserves and describes. A sync goes: `prepare`, write what came in, `switched` /
`gone` / `abandoned` for each frontend by what became of its row, `sweep`, write what went out, `freed_…`.

A frontend's row is the unit of success: whatever could not be written for it leaves its old row in force, and no other
frontend notices.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping

import msgspec

from ebpflb.dataplane.bpf.holdings import Holdings
from ebpflb.dataplane.bpf.ids import Exhausted, IdPool, SlotPool
from ebpflb.dataplane.bpf.layouts import ROUTE_REFERENCES
from ebpflb.dataplane.bpf.reading import Reading
from ebpflb.dataplane.bpf.records import UNKNOWN, BackendSlots, Change, Ranges, Refused, Service, ServiceKey
from ebpflb.dataplane.bpf.set_rows import SetRows
from ebpflb.dataplane.bpf.table_parts import (
    LARGEST,
    part_count,
    table_code,
)
from ebpflb.dataplane.bpf.tables import (
    ABSENT,
    FREE,
    NAME_LIMIT,
    by_slot,
    pack_backend,
    pack_backends,
    pack_frontend,
    pack_name,
    pack_ranges,
    pack_route,
    unpack_frontend,
)
from ebpflb.model import Protocol
from ebpflb.routes import Algorithm, Backend, BackendState, Frontend, Route, RouteTable, Scope

_Made = Service | BackendSlots | Ranges | tuple[SetRows, BackendSlots]


class Ledger(Holdings):
    """`capacity`: entries of each map by name; `cap`: positions of the largest table of consistent hashing. A new
    ledger knows of nothing; `adopt` takes over what was read."""

    def __init__(self, capacity: Mapping[str, int], cap: int = LARGEST) -> None:
        super().__init__(capacity)
        self._cap = cap

    # ---- Taking over what the kernel holds

    def adopt(self, reading: Reading) -> None:
        """Take over rows that were read. Rows that refer to nothing sound are held as UNKNOWN, rows that nobody
        refers to become stale."""
        rows: list[tuple[Frontend, bytes]] = []
        claims: dict[int, tuple[int, int, int, int]] = {}
        for key, value in reading.frontends():
            frontend = unpack_frontend(key)
            if frontend is None or pack_frontend(frontend) != key:
                self.stale_frontends.add(key)
                continue
            rows.append((frontend, value))
            for service, start, count, draining, *_ in ROUTE_REFERENCES.iter_unpack(value):
                if not service or not count + draining:
                    continue
                if reading.backend_set(service, start, count, draining) is not None:
                    claims.setdefault(start, (service, start, count, draining))
        end = 0
        for start in sorted(claims):
            if start < end:
                del claims[start]
            else:
                end = start + claims[start][2] + claims[start][3]
        for frontend, value in rows:
            self.held[frontend] = value if self._adopt_row(reading, frontend, value, claims) else UNKNOWN
        self._adopt_rest(reading)

    def _adopt_row(
        self, reading: Reading, frontend: Frontend, value: bytes, claims: Mapping[int, tuple[int, int, int, int]]
    ) -> bool:
        halves = [half for half in ROUTE_REFERENCES.iter_unpack(value) if half[0]]
        codes: dict[int, int] = {}
        for service, start, count, draining, _, ranges, table in halves:
            if service not in reading.names or (ranges and ranges not in reading.ranges):
                return False
            if count + draining and claims.get(start) != (service, start, count, draining):
                return False
            if table and not (count and part_count(table) and self.tables.suits(start, codes.get(start, table))):
                return False
            if table and codes.setdefault(start, table) != table:
                return False
        for service, start, count, draining, affinity, ranges, table in halves:
            record = self._by_id.get(service)
            if record is None:
                record = Service((reading.names[service], frontend.protocol), service)
                self._by_id[service] = record
                self._services.setdefault(record.key, record)
            if count + draining and start not in self._sets:
                found = reading.backend_set(service, start, count, draining)
                assert found is not None  # a claim is one that could be read
                slots = BackendSlots(service, start, count, found.backends, found.ids)
                self._sets[start] = slots
                record.sets.append(slots)
            if table:
                self.tables.claim(start, table)
            if affinity and count:
                self.members.claim(start, 1)
            if ranges and ranges not in self._ranges_by_id:
                known = Ranges(reading.ranges[ranges], ranges)
                self._ranges_by_id[ranges] = known
                self._ranges.setdefault(known.cidrs, known)
        self._hold(value)
        return True

    def _adopt_rest(self, reading: Reading) -> None:
        """Numbers in use, and rows that nobody refers to."""
        active: set[int] = set()
        used: set[int] = set()
        for slots in self._sets.values():
            numbers = slots.numbers()
            used.update(numbers)
            active.update(numbers[: slots.count])
        wrong: set[int] = set()
        for number, state, _ in reading.backend_rows():
            if number not in used:
                self.stale_backends[number] = FREE
            elif state != (BackendState.ACTIVE if number in active else BackendState.DRAINING):
                wrong.add(number)
        if wrong:
            for slots in self._sets.values():
                for number, backend in zip(slots.numbers(), slots.by_slot(), strict=True):
                    if number in wrong:
                        state = BackendState.ACTIVE if number in active else BackendState.DRAINING
                        self.stale_backends[number] = pack_backend(backend, state, slots.service)
        self.stale_names = set(reading.names) - set(self._by_id)
        for id, cidrs in reading.ranges.items():
            self._range_rows += len(cidrs)
            if id not in self._ranges_by_id:
                self.stale_ranges[id] = pack_ranges(id, cidrs)
        self.tables.adopt(self._sets, reading.tables)
        self.members.adopt(self._sets, reading.members)
        self.forgetting = True  # who remembered clients before is not known
        self._service_ids = IdPool("names", self._capacity["names"], reading.names)
        self._backend_ids = IdPool("backends", self._capacity["backends"] - 1, used | set(self.stale_backends))
        self._range_ids = IdPool("ranges", self._capacity["ranges"], reading.ranges)
        taken = ((slots.start, slots.length) for slots in self._sets.values())
        self._slots = SlotPool("slots", self._capacity["slots"], taken)

    # ---- Planning

    def prepare(self, want: RouteTable, frontends: Iterable[Frontend]) -> Change:
        """What makes the rows of `frontends` those of `want`. Reserves numbers; costs those frontends only."""
        change = Change()
        wanted: list[tuple[Frontend, Route | None, Route | None]] = []
        inside, outside = Scope.INTERNAL, Scope.EXTERNAL
        for frontend in frontends:
            internal = want.get((frontend, inside))
            external = want.get((frontend, outside))
            if internal is None and external is None:
                if frontend in self.held:
                    change.removals.append(frontend)
            else:
                wanted.append((frontend, internal, external))
        capacity = self._capacity["frontends"]
        room = capacity - len(self.held) + len(change.removals)
        for frontend, internal, external in wanted:
            held = self.held.get(frontend)
            if held is None and room <= 0:
                self._refuse(frontend, internal or external, change, str(Exhausted("frontends", capacity)))
                continue
            row = self._planned(frontend, internal, external, change)
            if row is not None and row != held:
                change.puts[frontend] = row
                self._hold(row)
                if held is None:
                    room -= 1
        return change

    def _planned(
        self, frontend: Frontend, internal: Route | None, external: Route | None, change: Change
    ) -> bytes | None:
        """A frontend's row; None for one that cannot be had. Where there is no room for its table it chooses at random,
        or it would keep backends that have gone, or have none at all; it counts among the refused."""
        row, error = self._attempt(frontend, internal, external, change)
        if error is None:
            return row
        reason = str(error)
        if isinstance(error, Exhausted) and error.what == "tables":
            plain = _at_random(internal)
            row, _ = self._attempt(frontend, plain, plain if external is internal else _at_random(external), change)
            reason += ": its backends are chosen at random" if row is not None else ""
        self._refuse(frontend, internal or external, change, reason)
        return row

    def _attempt(
        self, frontend: Frontend, internal: Route | None, external: Route | None, change: Change
    ) -> tuple[bytes | None, Exception | None]:
        """A frontend's row, or why there cannot be one; nothing is left of the attempt then."""
        fresh: list[_Made] = []
        try:
            return self._row(internal, external, frontend.protocol, change, fresh), None
        except (Exhausted, Refused, struct.error, OSError, OverflowError) as error:
            for made in reversed(fresh):
                self._forget(made, change)
            return None, error

    @staticmethod
    def _refuse(frontend: Frontend, route: Route | None, change: Change, reason: str) -> None:
        assert route is not None  # a frontend without any is a removal
        change.refused.append((frontend, route.service, reason))

    def _row(
        self,
        internal: Route | None,
        external: Route | None,
        protocol: Protocol,
        change: Change,
        fresh: list[_Made],
    ) -> bytes:
        """A frontend's row, of both scopes. Raises Exhausted or Refused; what was made until then is in `fresh`."""
        first = second = ABSENT
        if internal is not None:
            numbers = self._numbers(internal, protocol, change, fresh)
            first = pack_route(internal, *numbers)
        if external is internal:
            return first + first
        if external is not None:
            alike = (
                internal is not None
                and external.backends is internal.backends
                and external.service == internal.service
                and external.source_ranges == internal.source_ranges
                and external.algorithm == internal.algorithm
                and not external.affinity_seconds
            )
            if not alike:
                numbers = self._numbers(external, protocol, change, fresh)
            second = pack_route(external, *numbers)
        return first + second

    def _numbers(
        self,
        route: Route,
        protocol: Protocol,
        change: Change,
        fresh: list[_Made],
    ) -> tuple[int, int, int, int, int, int]:
        """What a route's half of a row refers to: service, first slot, active slots, draining slots, ranges, table."""
        key = (route.service, protocol)
        service = self._services.get(key)
        if service is None:
            service = self._new_service(key, change)
            fresh.append(service)
        start = count = draining = ranges = code = 0
        if route.backends:
            if route.algorithm is Algorithm.MAGLEV:
                code = table_code(route.backends, self._cap)
            slots = self._find(service, route.backends, code)
            if slots is None:
                slots = self._new_set(service, route.backends, change)
                fresh.append(slots)
            start, count = slots.start, slots.count
            if code and not self.tables.kind(start):
                self.tables.make(slots, code)
                fresh.append((self.tables, slots))
                change.tables[start] = slots
            if route.affinity_seconds and count and not self.members.kind(start):
                self.members.make(slots, 1)
                fresh.append((self.members, slots))
                change.members[start] = slots
            draining = slots.length - count
        if route.source_ranges:
            known = self._ranges.get(route.source_ranges)
            if known is None:
                known = self._new_ranges(route.source_ranges, change)
                fresh.append(known)
            ranges = known.id
        return service.id, start, count, draining, ranges, code

    def _find(self, service: Service, backends: tuple[Backend, ...], code: int) -> BackendSlots | None:
        """The set of these backends, whose table, if it has one and it is asked for, is of that size: another size
        goes with other slots, since rows that name the old one must find it whole."""
        for slots in service.sets:
            if slots.backends is backends and self.tables.suits(slots.start, code):
                return slots
        for slots in service.sets:
            if slots.backends == backends and self.tables.suits(slots.start, code):
                # After a restart, the tuple that was read gives way to the one that the routes hold anyway.
                slots.backends = backends
                return slots
        return None

    def _new_service(self, key: ServiceKey, change: Change) -> Service:
        name = pack_name(key[0])
        if name is None:
            raise Refused(f"a name has more than {NAME_LIMIT} bytes")
        service = Service(key, self._service_ids.take())
        self._services[key] = service
        self._by_id[service.id] = service
        change.names[service.id] = name
        return service

    def _new_set(self, service: Service, backends: tuple[Backend, ...], change: Change) -> BackendSlots:
        ordered = by_slot(backends)
        count = len(ordered)
        while count and ordered[count - 1].state != BackendState.ACTIVE:
            count -= 1
        known: dict[tuple[str, int, int], int] = {}
        active: set[int] = set()
        for slots in service.sets:
            numbers = slots.numbers()
            active.update(numbers[: slots.count])
            for number, backend in zip(numbers, slots.by_slot(), strict=True):
                known[backend.address, backend.port, backend.weight] = number
        # Packed before anything is taken: a value that no row can hold ends it here.
        rows = pack_backends(ordered, service.id)
        if known:
            found = [known.get((backend.address, backend.port, backend.weight), 0) for backend in ordered]
            missing = found.count(0)
        else:
            found, missing = [], len(ordered)
        made = self._backend_ids.take_many(missing)
        try:
            start = self._slots.take(len(ordered))
        except Exhausted:
            for number in made:
                self._backend_ids.give(number)
            raise
        if known:
            fresh = iter(made)
            ids = [number or next(fresh) for number in found]
            for at, number in enumerate(ids):
                if not found[at] or (at < count and number not in active):
                    change.backends[number] = rows[at]
                    self.stale_backends.pop(number, None)
        else:
            ids = made
            change.backends.update(zip(ids, rows, strict=True))
        slots = BackendSlots(service.id, start, count, backends, array("I", ids).tobytes())
        service.sets.append(slots)
        self._sets[start] = slots
        change.sets[start] = slots
        return slots

    def _new_ranges(self, cidrs: tuple[str, ...], change: Change) -> Ranges:
        if self._range_rows + len(cidrs) > self._capacity["ranges"]:
            raise Exhausted("ranges", self._capacity["ranges"])
        known = Ranges(cidrs, self._range_ids.take())
        self._range_rows += len(cidrs)
        self._ranges[cidrs] = known
        self._ranges_by_id[known.id] = known
        change.ranges[known.id] = pack_ranges(known.id, cidrs)
        return known

    def _forget(self, made: _Made, change: Change) -> None:
        """Undo what `prepare` made for a frontend that it then had to refuse; the last made first."""
        if isinstance(made, Service):
            del self._services[made.key], self._by_id[made.id], change.names[made.id]
            self._service_ids.give(made.id)
        elif isinstance(made, Ranges):
            del self._ranges[made.cidrs], self._ranges_by_id[made.id], change.ranges[made.id]
            self._range_rows -= len(made.cidrs)
            self._range_ids.give(made.id)
        elif isinstance(made, tuple):
            rows, slots = made
            rows.forget(slots)
            del (change.tables if rows is self.tables else change.members)[slots.start]
        else:
            self._drop_set(made)
            del change.sets[made.start]
            for number, row in self._unused(made).items():
                if row is FREE:
                    del change.backends[number]
                    self._backend_ids.give(number)
                else:
                    change.backends[number] = row


def _at_random(route: Route | None) -> Route | None:
    if route is None or route.algorithm is not Algorithm.MAGLEV:
        return route
    return msgspec.structs.replace(route, algorithm=Algorithm.RANDOM)
