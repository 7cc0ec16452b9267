"""What the kernel's rows say by this process's own account: what is held, who refers to whom, and what is left over.

Rules of this file: pure. References are counted by the rows held, so a set of backends or a name lives exactly as long
as a row names it. Nothing is given back before `sweep`, so within one sync no number that a row may still name is used
for anything else.

A backend is known by address, port and weight, not by state: one that begins to drain keeps its id, and with it its
flows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ebpflb.dataplane.bpf.ids import IdPool, SlotPool
from ebpflb.dataplane.bpf.layouts import ROUTE_REFERENCES
from ebpflb.dataplane.bpf.records import BackendSlots, Missing, Ranges, Service, ServiceKey
from ebpflb.dataplane.bpf.set_rows import SetRows
from ebpflb.dataplane.bpf.table_parts import member_keys, member_rows, part_keys, part_rows
from ebpflb.dataplane.bpf.tables import FREE, pack_backend, pack_name, pack_ranges
from ebpflb.model import Protocol
from ebpflb.routes import BackendState, Frontend


class Holdings:
    """`capacity`: entries of each map by name."""

    def __init__(self, capacity: Mapping[str, int]) -> None:
        self._capacity = capacity
        self.held: dict[Frontend, bytes] = {}
        self._services: dict[ServiceKey, Service] = {}
        self._by_id: dict[int, Service] = {}
        self._sets: dict[int, BackendSlots] = {}
        self._ranges: dict[tuple[str, ...], Ranges] = {}
        self._ranges_by_id: dict[int, Ranges] = {}
        self._range_rows = 0
        self._service_ids = IdPool("names", capacity["names"])
        self._backend_ids = IdPool("backends", capacity["backends"] - 1)
        self._range_ids = IdPool("ranges", capacity["ranges"])
        self._slots = SlotPool("slots", capacity["slots"])
        self._idle_sets: set[int] = set()
        self._idle_services: set[int] = set()
        self._idle_ranges: set[int] = set()
        # What is to be written once no row refers to it; what fails stays here for the next sync.
        self.stale_backends: dict[int, bytes] = {}
        self.stale_names: set[int] = set()
        self.stale_ranges: dict[int, list[bytes]] = {}
        self.stale_frontends: set[bytes] = set()
        self.tables = SetRows("tables", capacity["tables"], part_keys, part_rows, remember=True)
        self.members = SetRows("members", capacity["members"], member_keys, member_rows)
        self.gone_udp: set[int] = set()
        """Backends of UDP Services that nobody uses any more; for the writer to take."""
        self.forgetting = False
        """Whether a service may have remembered clients that keeps none any more; for the writer to unset."""
        self._unkept: set[int] = set()

    # ---- What the rows are

    @property
    def tidy(self) -> bool:
        """Whether nothing waits to be written or removed because no row refers to it any more."""
        return not (
            self.stale_backends
            or self.stale_names
            or self.stale_ranges
            or self.stale_frontends
            or self.forgetting
            or not self.tables.tidy
            or not self.members.tidy
        )

    @property
    def services(self) -> int:
        """How many names there are."""
        return len(self._by_id)

    def names(self) -> Iterator[tuple[int, bytes | None]]:
        """Each service's id, and its row of `names`."""
        return ((id, pack_name(service.key[0])) for id, service in self._by_id.items())

    def keeps(self, id: int) -> bool:
        """Whether a service has session affinity."""
        service = self._by_id.get(id)
        return service is not None and service.keeping > 0

    def shows(self, tables: Mapping[bytes, int], members: Mapping[bytes, int]) -> bool:
        """Whether these are the rows of `tables` and `members`: a sum of each, by key."""
        return self.tables.shows(self._sets, tables) and self.members.shows(self._sets, members)

    def range_keys(self) -> set[bytes]:
        """The keys of all rows of `ranges`."""
        return {key for each in self._ranges_by_id.values() for key in pack_ranges(each.id, each.cidrs)}

    # ---- What became of it

    def depends(self, row: bytes, missing: Missing) -> bool:
        """Whether a row refers to anything that is missing."""
        for service, start, count, draining, affinity, ranges, table in ROUTE_REFERENCES.iter_unpack(row):
            if service in missing.names or ranges in missing.ranges or (count + draining and start in missing.sets):
                return True
            if (table and start in missing.tables) or (affinity and count and start in missing.members):
                return True
        return False

    def switched(self, frontend: Frontend, row: bytes) -> None:
        """The kernel now holds `row`."""
        old = self.held.get(frontend)
        self.held[frontend] = row
        if old:
            self._release(old)

    def gone(self, frontend: Frontend) -> None:
        """The kernel no longer holds the frontend."""
        self._release(self.held.pop(frontend))

    def abandoned(self, row: bytes) -> None:
        """`prepare`'s row did not get into the kernel."""
        self._release(row)

    def owner(self, row: bytes) -> str:
        """The Service of a held row, in words."""
        for id, *_ in ROUTE_REFERENCES.iter_unpack(row):
            service = self._by_id.get(id)
            if service is not None:
                return str(service.key[0])
        return "an unknown Service"

    def _hold(self, row: bytes) -> None:
        for service, start, count, draining, affinity, ranges, table in ROUTE_REFERENCES.iter_unpack(row):
            if service:
                record = self._by_id[service]
                record.refs += 1
                if affinity:
                    record.keeping += 1
                if count + draining:
                    self._sets[start].refs += 1
                    if table:
                        self.tables.hold(start)
                    if affinity and count:
                        self.members.hold(start)
                if ranges:
                    self._ranges_by_id[ranges].refs += 1

    def _release(self, row: bytes) -> None:
        for service, start, count, draining, affinity, ranges, table in ROUTE_REFERENCES.iter_unpack(row):
            if not service:
                continue
            record = self._by_id[service]
            record.refs -= 1
            if not record.refs:
                self._idle_services.add(service)
            if affinity:
                record.keeping -= 1
                if not record.keeping:
                    self._unkept.add(service)
            if count + draining:
                slots = self._sets[start]
                slots.refs -= 1
                if not slots.refs:
                    self._idle_sets.add(start)
                if table:
                    self.tables.release(start)
                if affinity and count:
                    self.members.release(start)
            if ranges:
                known = self._ranges_by_id[ranges]
                known.refs -= 1
                if not known.refs:
                    self._idle_ranges.add(ranges)

    # ---- What is left over

    def sweep(self) -> None:
        """Everything that no row refers to any more: slot ranges are free at once, the rest becomes stale."""
        self.tables.sweep(self._sets)
        self.members.sweep(self._sets)
        self.forgetting = self.forgetting or any(not self.keeps(id) for id in self._unkept)
        self._unkept.clear()
        for start in self._idle_sets:
            slots = self._sets.get(start)
            if slots is not None and not slots.refs:
                self._retire(slots)
        for id in self._idle_services:
            service = self._by_id.get(id)
            if service is not None and not service.refs:
                del self._by_id[id]
                if self._services.get(service.key) is service:
                    del self._services[service.key]
                self.stale_names.add(id)
        for id in self._idle_ranges:
            known = self._ranges_by_id.get(id)
            if known is not None and not known.refs:
                del self._ranges_by_id[id]
                if self._ranges.get(known.cidrs) is known:
                    del self._ranges[known.cidrs]
                self.stale_ranges[id] = pack_ranges(id, known.cidrs)
        self._idle_sets.clear()
        self._idle_services.clear()
        self._idle_ranges.clear()

    def _drop_set(self, slots: BackendSlots) -> None:
        self.tables.drop(slots)
        self.members.drop(slots)
        self._by_id[slots.service].sets.remove(slots)
        del self._sets[slots.start]
        self._slots.give(slots.start, slots.length)

    def _retire(self, slots: BackendSlots) -> None:
        self._drop_set(slots)
        rows = self._unused(slots)
        self.stale_backends.update(rows)
        if self._by_id[slots.service].key[1] == Protocol.UDP:
            self.gone_udp.update(number for number, row in rows.items() if row is FREE)

    def _unused(self, slots: BackendSlots) -> dict[int, bytes]:
        """The rows that backends get when `slots`, already out of its service, has gone: FREE, or no longer active."""
        rows: dict[int, bytes] = {}
        used: set[int] = set()
        active: set[int] = set()
        for other in self._by_id[slots.service].sets:
            numbers = other.numbers()
            used.update(numbers)
            active.update(numbers[: other.count])
        for at, (number, backend) in enumerate(zip(slots.numbers(), slots.by_slot(), strict=True)):
            if number not in used:
                rows[number] = FREE
            elif at < slots.count and number not in active:
                rows[number] = pack_backend(backend, BackendState.DRAINING, slots.service)
        return rows

    def freed_backend(self, number: int) -> None:
        """A stale backend's row has been written."""
        if self.stale_backends.pop(number) is FREE:
            self._backend_ids.give(number)

    def freed_name(self, id: int) -> None:
        """A stale name's row has been removed."""
        self.stale_names.remove(id)
        self._service_ids.give(id)

    def freed_ranges(self, id: int, left: list[bytes]) -> None:
        """Stale ranges have been removed, but for the rows in `left`."""
        self._range_rows -= len(self.stale_ranges[id]) - len(left)
        if left:
            self.stale_ranges[id] = left
        else:
            del self.stale_ranges[id]
            self._range_ids.give(id)
