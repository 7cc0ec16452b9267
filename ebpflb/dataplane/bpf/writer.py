"""Makes maps hold a RouteTable: the order of the writes, and what follows from those that fail.

Rules of this file: it decides when, `ledger` decides what, `pen` does it. The order is

    what tells local clients, the settings, owners of addresses that go,
    backends, slots, names, ranges, tables, members: all that new rows will refer to,
    frontends that go, bits of addresses, frontends that come or change, each at once by its row,
    owners of addresses that come, and what nothing refers to any more.

At every prefix of the writes each frontend's row refers only to rows that are there. What failed is remembered and
tried again by the next sync; a sync of what is held writes nothing. The cost is that of the change.
"""

from __future__ import annotations

import gc
import os
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext

from ebpflb.dataplane import Report
from ebpflb.dataplane.bpf.addresses import Addresses
from ebpflb.dataplane.bpf.affinity_rows import forget_clients
from ebpflb.dataplane.bpf.image import Image, accounts_for
from ebpflb.dataplane.bpf.layouts import BACKEND, U32
from ebpflb.dataplane.bpf.ledger import Ledger
from ebpflb.dataplane.bpf.locality import NodeFacts
from ebpflb.dataplane.bpf.looking import digest_of, read_all, read_tables
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.pen import NODE, Pen, Tally
from ebpflb.dataplane.bpf.reading import RawTables, Reading
from ebpflb.dataplane.bpf.records import Change
from ebpflb.dataplane.bpf.set_rows import SetRows, Sets
from ebpflb.dataplane.bpf.table_parts import LARGEST
from ebpflb.dataplane.bpf.tables import pack_frontend
from ebpflb.dataplane.bpf.whereabouts import Whereabouts
from ebpflb.model import Address
from ebpflb.routes import Frontend, RouteTable, Scope

_COLD = 1000
"""Frontends from which on a sync pauses the garbage collector: it would walk every new row again and again."""

PART = 2048
"""Frontends that are planned and written at a time: what a plan holds in memory is theirs."""

_ROWS_AT_ONCE = 2048
"""Rows of `tables`, 2 KiB each, that are filled before they are written."""


class Writer:
    """One process's hold on the maps. `facts` go into the settings; `clock` counts seconds from anywhere; `part` is how
    many frontends are planned and written at a time; `cap` how many positions the largest table of consistent hashing
    may have."""

    def __init__(
        self, maps: Maps, facts: NodeFacts, clock: Callable[[], float], part: int = PART, cap: int = LARGEST
    ) -> None:
        self._maps = maps
        self.gone_udp: Callable[[Collection[int]], None] = lambda backends: None
        """Told, after each sync, of the UDP backends that have gone, by id."""
        self.understood = 0
        """How often all rows had to be understood: by the first sync, and by audits that found others than written."""
        self._part = part
        self._cap = cap
        self._clock = clock
        self._pen = Pen(maps)
        self._whereabouts = Whereabouts(self._pen, facts)
        self._addresses = Addresses(self._pen)
        self._ledger: Ledger | None = None
        self._target: RouteTable | None = None
        self._retry: set[Frontend] = set()
        self._sound = b""

    def state(self) -> RouteTable:
        """What the maps hold. Raises OSError."""
        with collector_paused():
            return Reading(read_tables(self._maps)).routes()

    def sync(self, routes: RouteTable) -> Report:
        """Make the maps hold `routes`; the cost is that of what changed since the last call."""
        started = self._clock()
        tally = Tally()
        target, self._target = self._target, routes
        first = self._ledger is None
        if self._ledger is None:
            try:
                self._ledger = self._adopted(read_all(self._maps))
            except OSError as error:
                tally.refuse(NODE, f"the maps cannot be read: {os.strerror(error.errno or 0)}")
                return tally.report(self._clock() - started)
            target = None
        if target is None:
            frontends = dict.fromkeys([frontend for frontend, _ in routes.changed_from(RouteTable())])
            frontends.update(dict.fromkeys(self._ledger.held))
            addresses = {*routes.owned, *self._addresses.owned}
        else:
            frontends = dict.fromkeys([frontend for frontend, _ in routes.changed_from(target)])
            frontends.update(dict.fromkeys(self._retry))
            addresses = {*routes.owned_changed_from(target), *self._addresses.retry}
        with nullcontext() if len(frontends) < _COLD else collector_paused(freeze=first):
            self._write(self._ledger, routes, frontends.keys(), addresses, tally)
        return tally.report(self._clock() - started)

    def audit(self) -> Report:
        """Read the maps back and make them hold the last `routes` again. Before the first sync nothing is known to
        be right, and nothing is done. Where every row is what was written, it is not asked what it means; where
        nothing was written since then, it is enough that the bytes are the same."""
        routes = self._target
        if routes is None:
            return Report()
        started = self._clock()
        tally = Tally()
        try:
            raw = read_all(self._maps)
        except OSError as error:
            tally.refuse(NODE, f"the maps cannot be read: {os.strerror(error.errno or 0)}")
            return tally.report(self._clock() - started)
        digest = digest_of(raw)
        if digest != self._sound and self._is_accounted_for(raw):
            self._sound = digest
        if digest != self._sound:
            self._ledger = None  # the memory of the old account is room for the new one
            self._ledger = ledger = self._adopted(raw)
            del raw
            frontends = {*ledger.held, *(frontend for frontend, _ in routes)}
            with collector_paused():
                self._write(ledger, routes, frontends, {*routes.owned, *self._addresses.owned}, tally)
            if not (tally.written or tally.removed or tally.failed):
                self._sound = digest
        return tally.report(self._clock() - started)

    def _is_accounted_for(self, raw: RawTables) -> bool:
        """Whether the maps hold what was written, all of it, and nothing else."""
        ledger = self._ledger
        if ledger is None or self._retry:
            return False
        return (
            self._whereabouts.shows(raw)
            and self._addresses.shows(raw)
            and accounts_for(ledger, self._pen.images["slots"], self._pen.images["backends"], raw)
        )

    def _adopted(self, raw: RawTables) -> Ledger:
        """A new account of what the maps hold."""
        self.understood += 1
        self._pen.images = {"slots": Image(raw.slots, U32.size), "backends": Image(raw.backends, BACKEND.size)}
        ledger = Ledger(self._maps.capacity, self._cap)
        with collector_paused():
            ledger.adopt(Reading(raw))
            self._addresses.adopt(raw, map(pack_frontend, ledger.held))
        self._whereabouts.adopt(raw)
        return ledger

    # ---- One sync, step by step

    def _write(
        self,
        ledger: Ledger,
        routes: RouteTable,
        frontends: AbstractSet[Frontend],
        addresses: AbstractSet[Address],
        tally: Tally,
    ) -> None:
        """Make the rows of `frontends`, and the owners of `addresses`, those of `routes`."""
        try:
            self._retry = set()
            self._whereabouts.write(routes.locality, tally)
            self._mend(ledger, tally)
            self._addresses.begin(routes.owned, addresses, tally)
            for part in _parts(routes, frontends, self._part):
                self._write_part(ledger, ledger.prepare(routes, part), tally)
            ledger.sweep()
            self._addresses.end(tally)
            self._write_stale(ledger, tally)
        except BaseException:
            # Where it stopped, only the maps know: the next sync reads them.
            self._ledger = None
            raise
        if ledger.gone_udp:
            gone, ledger.gone_udp = ledger.gone_udp, set()
            self.gone_udp(gone)
        if tally.written or tally.removed or tally.failed:
            self._sound = b""

    def _write_part(self, ledger: Ledger, change: Change, tally: Tally) -> None:
        failed = tally.failed
        for frontend, service, reason in change.refused:
            self._retry.add(frontend)
            tally.refuse(str(service), reason)
        self._write_new(ledger, change, tally)
        self._remove_frontends(ledger, change, tally)
        self._put_frontends(ledger, change, tally)
        if tally.failed != failed:
            ledger.sweep()  # the next part must not build on what could not be written

    def _write_new(self, ledger: Ledger, change: Change, tally: Tally) -> None:
        """Everything that the frontends' new rows will refer to. Rows that cannot have theirs are taken out of
        `change`."""
        backends = self._pen.put_numbered("backends", change.backends, tally)
        slots = self._put_slots(change, tally)
        names = self._pen.put_numbered("names", change.names, tally)
        ranges = self._pen.put("ranges", {key: U32.pack(1) for keys in change.ranges.values() for key in keys}, tally)
        tables = self._put_set_rows("tables", ledger.tables, change.tables, tally)
        members = self._put_set_rows("members", ledger.members, change.members, tally)
        if not (backends or slots or names or ranges or tables or members):
            return
        broken = {
            start
            for start, found in change.sets.items()
            if not backends.keys().isdisjoint(found.numbers())
            or any(start <= slot < start + found.length for slot in slots)
        }
        unranged = {id for id, keys in change.ranges.items() if not ranges.keys().isdisjoint(keys)}
        errors: dict[str, Mapping[int, int] | Mapping[bytes, int]] = {
            "backends": backends,
            "slots": slots,
            "names": names,
            "ranges": ranges,
            "tables": tables,
            "members": members,
        }
        table, first = next((table, next(iter(found.values()))) for table, found in errors.items() if found)
        for frontend, row in list(change.puts.items()):
            if ledger.depends(row, broken, set(names), unranged, set(tables), set(members)):
                self._give_up(ledger, change, frontend, self._pen.words(table, first), tally)

    def _give_up(self, ledger: Ledger, change: Change, frontend: Frontend, reason: str, tally: Tally) -> None:
        """A frontend keeps the row that it has, for now."""
        row = change.puts.pop(frontend)
        self._retry.add(frontend)
        tally.refuse(ledger.owner(row), reason)
        ledger.abandoned(row)

    def _put_slots(self, change: Change, tally: Tally) -> dict[int, int]:
        if not change.sets:
            return {}
        numbers = array("I")
        for start, found in change.sets.items():
            numbers.extend(range(start, start + found.length))
        return self._pen.put_array("slots", numbers, b"".join([found.ids for found in change.sets.values()]), tally)

    def _put_set_rows(self, table: str, made: SetRows, sets: Sets, tally: Tally) -> dict[int, int]:
        """Write what these sets have beside their slots; the sets whose rows are not all there, by first slot, with
        errno."""
        refused: dict[bytes, int] = {}
        rows: dict[bytes, bytes] = {}
        for slots in sets.values():
            rows.update(made.rows(slots))
            if len(rows) >= _ROWS_AT_ONCE:
                refused |= self._pen.put(table, rows, tally)
                rows = {}
        refused |= self._pen.put(table, rows, tally)
        return {U32.unpack(key[:4])[0]: error for key, error in refused.items()}

    def _mend(self, ledger: Ledger, tally: Tally) -> None:
        """What was found to be other than it should be, of sets that are in use."""
        for table, made in (("tables", ledger.tables), ("members", ledger.members)):
            if made.torn:
                refused = self._put_set_rows(table, made, made.torn, tally)
                for error in refused.values():
                    tally.refuse(NODE, f"what was lost stays lost: {self._pen.words(table, error)}")
                made.torn = {start: slots for start, slots in made.torn.items() if start in refused}

    def _remove_frontends(self, ledger: Ledger, change: Change, tally: Tally) -> None:
        """Before the new ones come: a full map needs the room."""
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
                self._retry.add(frontend)
                tally.refuse(ledger.owner(ledger.held[frontend]), self._pen.words("frontends", found))

    def _put_frontends(self, ledger: Ledger, change: Change, tally: Tally) -> None:
        keys = {frontend: pack_frontend(frontend) for frontend in change.puts}
        new = {key: frontend for frontend, key in keys.items() if frontend not in ledger.held}
        for key, error in self._addresses.announce(new, tally).items():
            self._give_up(ledger, change, new[key], self._pen.words("known", error), tally)
        refused = self._pen.put("frontends", {keys[each]: row for each, row in change.puts.items()}, tally)
        for frontend, row in list(change.puts.items()) if refused else change.puts.items():
            key = keys[frontend]
            error = refused.get(key, 0) if refused else 0
            if error:
                self._give_up(ledger, change, frontend, self._pen.words("frontends", error), tally)
                continue
            ledger.switched(frontend, row)
            if key in new:
                self._addresses.came(key)

    def _write_stale(self, ledger: Ledger, tally: Tally) -> None:
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
            self._forget_clients(ledger, tally)
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

    def _forget_clients(self, ledger: Ledger, tally: Tally) -> None:
        try:
            refused = forget_clients(self._maps, ledger.keeps)
        except OSError as error:
            tally.refuse(NODE, f"the map affinity cannot be read: {os.strerror(error.errno or 0)}")
            return
        self._pen.left(refused, "affinity", tally)
        ledger.forgetting = bool(refused)


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


@contextmanager
def collector_paused(*, freeze: bool = False) -> Iterator[None]:
    """No garbage collection meanwhile. With `freeze`, what is there by then is never looked at again: for the once
    that a process fills its tables, which are in no cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if enabled:
            gc.enable()
