"""One sync's writes, in the order that keeps traffic right.

Rules of this file: `ledger` says what, `pen` does it. The order is

    what tells local clients, the settings, owners of addresses that go,
    backends, slots, names, ranges, tables, members: all that new rows will refer to,
    frontends that go, bits of addresses, frontends that come or change, each at once by its row,
    owners of addresses that come, and what nothing refers to any more.

At every prefix of the writes each frontend's row refers only to rows that are there. A frontend whose rows are refused
keeps the one that it has; no other is kept waiting.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet

from ebpflb.dataplane import NODE
from ebpflb.dataplane.bpf.addresses import Addresses
from ebpflb.dataplane.bpf.affinity_rows import forget_clients
from ebpflb.dataplane.bpf.layouts import U32
from ebpflb.dataplane.bpf.ledger import Ledger
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.pen import Pen, Tally
from ebpflb.dataplane.bpf.records import Change, Missing
from ebpflb.dataplane.bpf.set_rows import SetRows, Sets
from ebpflb.dataplane.bpf.tables import pack_frontend
from ebpflb.dataplane.bpf.whereabouts import Whereabouts
from ebpflb.model import Address
from ebpflb.routes import Frontend, RouteTable, Scope

_ROWS_AT_ONCE = 2048
"""Rows of `tables`, 2 KiB each, that are filled before they are written."""


class Steps:
    """The writes of one sync to `maps`, which `tally` counts. `part` is how many frontends are planned and written at a
    time."""

    def __init__(
        self,
        maps: Maps,
        pen: Pen,
        whereabouts: Whereabouts,
        addresses: Addresses,
        ledger: Ledger,
        tally: Tally,
        part: int,
    ) -> None:
        self._maps = maps
        self._pen = pen
        self._whereabouts = whereabouts
        self._addresses = addresses
        self._ledger = ledger
        self._tally = tally
        self._part = part
        self.retry: set[Frontend] = set()
        """Frontends that are not as wanted."""

    def write(self, routes: RouteTable, frontends: AbstractSet[Frontend], addresses: AbstractSet[Address]) -> None:
        """Make the rows of `frontends`, and the owners of `addresses`, those of `routes`. Where this is interrupted,
        only the maps know what they hold."""
        self._whereabouts.write(routes.locality, self._tally)
        self._mend()
        self._addresses.begin(routes.owned, addresses, self._tally)
        for part in _parts(routes, frontends, self._part):
            self._write_part(self._ledger.prepare(routes, part))
        self._ledger.sweep()
        self._addresses.end(self._tally)
        self._write_stale()

    def _mend(self) -> None:
        """What was found to be other than it should be, of sets that are in use."""
        for table, made in (("tables", self._ledger.tables), ("members", self._ledger.members)):
            if made.torn:
                refused = self._put_set_rows(table, made, made.torn)
                for error in refused.values():
                    self._tally.refuse(NODE, f"what was lost stays lost: {self._pen.words(table, error)}")
                made.torn = {start: slots for start, slots in made.torn.items() if start in refused}

    # ---- Some frontends

    def _write_part(self, change: Change) -> None:
        failed = self._tally.failed
        for frontend, service, reason in change.refused:
            self.retry.add(frontend)
            self._tally.refuse(str(service), reason)
        self._write_new(change)
        self._remove_frontends(change)
        self._put_frontends(change)
        if self._tally.failed != failed:
            self._ledger.sweep()  # the next part must not build on what could not be written

    def _write_new(self, change: Change) -> None:
        """Everything that the frontends' new rows will refer to. Rows that cannot have theirs are taken out of
        `change`."""
        tally = self._tally
        backends = self._pen.put_numbered("backends", change.backends, tally)
        slots = self._put_slots(change)
        names = self._pen.put_numbered("names", change.names, tally)
        ranges = self._pen.put("ranges", {key: U32.pack(1) for keys in change.ranges.values() for key in keys}, tally)
        tables = self._put_set_rows("tables", self._ledger.tables, change.tables)
        members = self._put_set_rows("members", self._ledger.members, change.members)
        refused: dict[str, Mapping[int, int] | Mapping[bytes, int]] = {
            "backends": backends,
            "slots": slots,
            "names": names,
            "ranges": ranges,
            "tables": tables,
            "members": members,
        }
        first = next(((table, next(iter(found.values()))) for table, found in refused.items() if found), None)
        if first is None:
            return
        reason = self._pen.words(*first)
        missing = Missing(
            sets={
                start
                for start, found in change.sets.items()
                if not backends.keys().isdisjoint(found.numbers())
                or any(start <= slot < start + found.length for slot in slots)
            },
            names=names.keys(),
            ranges={id for id, keys in change.ranges.items() if not ranges.keys().isdisjoint(keys)},
            tables=tables.keys(),
            members=members.keys(),
        )
        for frontend, row in list(change.puts.items()):
            if self._ledger.depends(row, missing):
                self._give_up(change, frontend, reason)

    def _put_slots(self, change: Change) -> dict[int, int]:
        if not change.sets:
            return {}
        numbers = array("I")
        for start, found in change.sets.items():
            numbers.extend(range(start, start + found.length))
        ids = b"".join([found.ids for found in change.sets.values()])
        return self._pen.put_array("slots", numbers, ids, self._tally)

    def _put_set_rows(self, table: str, made: SetRows, sets: Sets) -> dict[int, int]:
        """Write what these sets have beside their slots; the sets whose rows are not all there, by first slot, with
        errno."""
        refused: dict[bytes, int] = {}
        rows: dict[bytes, bytes] = {}
        for slots in sets.values():
            rows.update(made.rows(slots))
            if len(rows) >= _ROWS_AT_ONCE:
                refused |= self._pen.put(table, rows, self._tally)
                rows = {}
        refused |= self._pen.put(table, rows, self._tally)
        return {U32.unpack(key[:4])[0]: error for key, error in refused.items()}

    def _remove_frontends(self, change: Change) -> None:
        """Before the new ones come: a full map needs the room."""
        ledger, tally = self._ledger, self._tally
        foreign = list(ledger.stale_frontends)
        refused = self._pen.remove("frontends", foreign, tally)
        for key in foreign:
            if key not in refused:
                ledger.stale_frontends.remove(key)
        for error in refused.values():
            tally.refuse(NODE, f"a row of nobody: {self._pen.words('frontends', error)}")
        keys = [pack_frontend(frontend) for frontend in change.removals]
        refused = self._pen.remove("frontends", keys, tally)
        for key, frontend in zip(keys, change.removals, strict=True):
            found = refused.get(key, 0) if refused else 0
            if not found:
                ledger.gone(frontend)
                self._addresses.went(key)
            else:
                self.retry.add(frontend)
                tally.refuse(ledger.owner(ledger.held[frontend]), self._pen.words("frontends", found))

    def _put_frontends(self, change: Change) -> None:
        keys = {frontend: pack_frontend(frontend) for frontend in change.puts}
        new = {key: frontend for frontend, key in keys.items() if frontend not in self._ledger.held}
        for key, error in self._addresses.announce(new, self._tally).items():
            self._give_up(change, new[key], self._pen.words("known", error))
        refused = self._pen.put("frontends", {keys[each]: row for each, row in change.puts.items()}, self._tally)
        for frontend, row in list(change.puts.items()) if refused else change.puts.items():
            key = keys[frontend]
            error = refused.get(key, 0) if refused else 0
            if error:
                self._give_up(change, frontend, self._pen.words("frontends", error))
                continue
            self._ledger.switched(frontend, row)
            if key in new:
                self._addresses.came(key)

    def _give_up(self, change: Change, frontend: Frontend, reason: str) -> None:
        """A frontend keeps the row that it has, for now."""
        row = change.puts.pop(frontend)
        self.retry.add(frontend)
        self._tally.refuse(self._ledger.owner(row), reason)
        self._ledger.abandoned(row)

    # ---- What is left over

    def _write_stale(self) -> None:
        ledger, tally = self._ledger, self._tally
        if ledger.stale_backends:
            kept = self._pen.put_numbered("backends", ledger.stale_backends, tally)
            for number in list(ledger.stale_backends):
                if number not in kept:
                    ledger.freed_backend(number)
            self._pen.left(kept, "backends", tally)
        for table, made in (("tables", ledger.tables), ("members", ledger.members)):
            refused = self._pen.remove(table, made.stale, tally)
            made.stale &= refused.keys()
            self._pen.left(refused, table, tally)
        if ledger.forgetting:
            self._forget_clients()
        if ledger.stale_names and not ledger.forgetting:  # the number is another's then
            names = [U32.pack(id) for id in ledger.stale_names]
            refused = self._pen.remove("names", names, tally)
            # A row that stays would begin the count of whoever gets the number next; it costs nothing else.
            self._maps.remove("traffic", b"".join(names))
            for key in names:
                if key not in refused:
                    ledger.freed_name(U32.unpack(key)[0])
            self._pen.left(refused, "names", tally)
        if ledger.stale_ranges:
            keys = [key for keys in ledger.stale_ranges.values() for key in keys]
            refused = self._pen.remove("ranges", keys, tally)
            for id, listed in list(ledger.stale_ranges.items()):
                ledger.freed_ranges(id, [key for key in listed if key in refused])
            self._pen.left(refused, "ranges", tally)

    def _forget_clients(self) -> None:
        try:
            refused = forget_clients(self._maps, self._ledger.keeps)
        except OSError as error:
            self._tally.refuse(NODE, f"the map affinity cannot be read: {os.strerror(error.errno or 0)}")
            return
        self._pen.left(refused, "affinity", self._tally)
        self._ledger.forgetting = bool(refused)


def _parts(routes: RouteTable, frontends: AbstractSet[Frontend], size: int) -> Iterator[Collection[Frontend]]:
    """`frontends` in parts of at most `size`; where there are several, those that go come first, since
    a full map needs their room."""
    if len(frontends) <= size:
        yield frontends
        return
    internal, external = Scope.INTERNAL, Scope.EXTERNAL
    gone: list[Frontend] = []
    stay: list[Frontend] = []
    for key in frontends:
        (stay if (key, internal) in routes or (key, external) in routes else gone).append(key)
    for listed in (gone, stay):
        for at in range(0, len(listed), size):
            yield listed[at : at + size]
