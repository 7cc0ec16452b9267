"""Makes maps hold a RouteTable: the order of the writes, and what follows from those that fail.

Rules of this file: it decides when, `ledger` decides what, `maps` does it. The order is backends, slots, names, ranges,
then frontends' rows (each switches at once), then what nothing refers to any more. At every prefix of the writes each
frontend's row refers only to rows that are there. What failed is remembered and tried again by the next sync; a sync of
what is held writes nothing. The cost is that of the change.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext

from ebpflb.dataplane import Report
from ebpflb.dataplane.bpf.image import Image, accounts_for
from ebpflb.dataplane.bpf.layouts import BACKEND, SOURCE_KEY, U32
from ebpflb.dataplane.bpf.ledger import Ledger
from ebpflb.dataplane.bpf.locality import ONLY, NodeFacts, interface_fits, pack_settings, pack_sources
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.reading import RawTables, Reading, slots_end
from ebpflb.dataplane.bpf.records import Change
from ebpflb.dataplane.bpf.tables import pack_frontend
from ebpflb.diff import diff
from ebpflb.model import Problem
from ebpflb.routes import Frontend, Locality, RouteTable, Scope

NODE = "node"
"""The subject of problems that concern no Service."""

_COLD = 1000
"""Frontends from which on a sync pauses the garbage collector: it would walk every new row again and again."""

PART = 2048
"""Frontends that are planned and written at a time: what a plan holds in memory is theirs."""

_CHUNK = 4096


class Tally:
    """What a sync has done so far."""

    def __init__(self) -> None:
        self.written = 0
        self.removed = 0
        self.failed = 0
        self.problems: dict[Problem, None] = {}

    def refuse(self, subject: str, reason: str) -> None:
        self.failed += 1
        self.problems[Problem(subject, reason)] = None

    def report(self, seconds: float) -> Report:
        return Report(self.written, self.removed, self.failed, seconds, tuple(self.problems))


def read_tables(maps: Maps) -> RawTables:
    """All maps of routes. Raises OSError."""
    frontends = maps.read("frontends")
    slots = maps.read_array("slots", 0, slots_end(frontends[1], maps.capacity["slots"]))
    return RawTables(
        frontends,
        slots,
        read_backends(maps),
        maps.read("names"),
        maps.read("ranges")[0],
        maps.read("sources"),
        maps.read_array("settings", 0, 1),
    )


def read_backends(maps: Maps) -> bytes:
    """The array as far as it was ever used: ids are given out from below, so nothing lies behind a chunk of zeros."""
    found = bytearray()
    while True:
        chunk = maps.read_array("backends", len(found) // BACKEND.size, _CHUNK)
        if not chunk.strip(b"\0"):
            return bytes(found)
        found += chunk


class Writer:
    """One process's hold on the maps. `facts` go into the settings; `clock` counts seconds from anywhere; `part` is how
    many frontends are planned and written at a time."""

    def __init__(self, maps: Maps, facts: NodeFacts, clock: Callable[[], float], part: int = PART) -> None:
        self._maps = maps
        self.gone_udp: Callable[[Collection[int]], None] = lambda backends: None
        """Told, after each sync, of the UDP backends that have gone, by id."""
        self.understood = 0
        """How often all rows had to be understood: by the first sync, and by audits that found others than written."""
        self._part = part
        self._facts = facts
        self._clock = clock
        self._ledger: Ledger | None = None
        self._target: RouteTable | None = None
        self._retry: set[Frontend] = set()
        self._sources: dict[bytes, bytes] = {}
        self._settings = b""
        self._locality: Locality | None = None
        self._images = {"slots": Image(b"", U32.size), "backends": Image(b"", BACKEND.size)}
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
                self._ledger = self._adopted(read_tables(self._maps))
            except OSError as error:
                tally.refuse(NODE, f"the maps cannot be read: {os.strerror(error.errno or 0)}")
                return tally.report(self._clock() - started)
            target = None
        if target is None:
            frontends = dict.fromkeys([frontend for frontend, _ in routes.changed_from(RouteTable())])
            frontends.update(dict.fromkeys(self._ledger.held))
        else:
            frontends = dict.fromkeys([frontend for frontend, _ in routes.changed_from(target)])
            frontends.update(dict.fromkeys(self._retry))
        with nullcontext() if len(frontends) < _COLD else collector_paused(freeze=first):
            self._write(self._ledger, routes, frontends.keys(), tally)
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
            raw = read_tables(self._maps)
        except OSError as error:
            tally.refuse(NODE, f"the maps cannot be read: {os.strerror(error.errno or 0)}")
            return tally.report(self._clock() - started)
        digest = _digest(raw)
        if digest != self._sound and self._is_accounted_for(raw):
            self._sound = digest
        if digest != self._sound:
            self._ledger = None  # the memory of the old account is room for the new one
            self._ledger = ledger = self._adopted(raw)
            del raw
            with collector_paused():
                self._write(ledger, routes, {*ledger.held, *(frontend for frontend, _ in routes)}, tally)
            if not (tally.written or tally.removed or tally.failed):
                self._sound = digest
        return tally.report(self._clock() - started)

    def _is_accounted_for(self, raw: RawTables) -> bool:
        """Whether the maps hold what was written, all of it, and nothing else."""
        ledger = self._ledger
        if ledger is None or self._retry or self._locality is None or raw.settings != self._settings:
            return False
        return _sources(raw) == self._sources and accounts_for(
            ledger, self._images["slots"], self._images["backends"], raw
        )

    def _adopted(self, raw: RawTables) -> Ledger:
        """A new account of what the maps hold."""
        self.understood += 1
        self._images = {"slots": Image(raw.slots, U32.size), "backends": Image(raw.backends, BACKEND.size)}
        ledger = Ledger(self._maps.capacity)
        with collector_paused():
            ledger.adopt(Reading(raw))
        self._sources = _sources(raw)
        self._settings = raw.settings
        self._locality = None
        return ledger

    # ---- One sync, step by step

    def _write(self, ledger: Ledger, routes: RouteTable, frontends: AbstractSet[Frontend], tally: Tally) -> None:
        try:
            self._write_steps(ledger, routes, frontends, tally)
        except BaseException:
            # Where it stopped, only the maps know: the next sync reads them.
            self._ledger = None
            raise
        if tally.written or tally.removed or tally.failed:
            self._sound = b""

    def _write_steps(self, ledger: Ledger, routes: RouteTable, frontends: AbstractSet[Frontend], tally: Tally) -> None:
        self._retry = set()
        self._write_locality(routes.locality, tally)
        for part in _parts(routes, frontends, self._part):
            failed = tally.failed
            change = ledger.prepare(routes, part)
            for frontend, service, reason in change.refused:
                self._retry.add(frontend)
                tally.refuse(str(service), reason)
            self._write_new(ledger, change, tally)
            self._remove_frontends(ledger, change, tally)
            self._put_frontends(ledger, change, tally)
            if tally.failed != failed:
                ledger.sweep()  # the next part must not build on what could not be written
        ledger.sweep()
        self._write_stale(ledger, tally)
        if ledger.gone_udp:
            gone, ledger.gone_udp = ledger.gone_udp, set()
            self.gone_udp(gone)

    def _write_locality(self, locality: Locality, tally: Tally) -> None:
        if locality == self._locality:
            return
        self._locality = None
        whole = True
        delta = diff(pack_sources(locality), self._sources)
        put, removed = self._put("sources", delta.put, tally), self._remove("sources", delta.removed, tally)
        for error in (*put.values(), *removed.values()):
            whole = False
            tally.refuse(NODE, f"an address of the node or its pods: {self._words('sources', error)}")
        settings = pack_settings(self._facts, locality)
        if settings != self._settings:
            errors = self._put("settings", {ONLY: settings}, tally)
            if errors:
                whole = False
                tally.refuse(NODE, f"the settings: {self._words('settings', errors[ONLY])}")
            else:
                self._settings = settings
        if not interface_fits(locality):
            tally.problems[Problem(NODE, f"no device can be called {locality.pod_interface}: 15 bytes at most")] = None
        if whole:
            self._locality = locality

    def _write_new(self, ledger: Ledger, change: Change, tally: Tally) -> None:
        """Everything that the frontends' new rows will refer to. Rows that cannot have theirs are taken out of
        `change`."""
        backends = self._put_numbered("backends", change.backends, tally)
        slots = self._put_slots(change, tally)
        names = self._put_numbered("names", change.names, tally)
        ranges = self._put("ranges", {key: U32.pack(1) for keys in change.ranges.values() for key in keys}, tally)
        if not (backends or slots or names or ranges):
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
        }
        table, first = next((table, next(iter(found.values()))) for table, found in errors.items() if found)
        for frontend, row in list(change.puts.items()):
            if ledger.depends(row, broken, set(names), unranged):
                del change.puts[frontend]
                self._retry.add(frontend)
                tally.refuse(ledger.owner(row), self._words(table, first))
                ledger.abandoned(row)

    def _put_slots(self, change: Change, tally: Tally) -> dict[int, int]:
        if not change.sets:
            return {}
        numbers = array("I")
        for start, found in change.sets.items():
            numbers.extend(range(start, start + found.length))
        ids = b"".join([found.ids for found in change.sets.values()])
        refused = self._maps.put("slots", numbers.tobytes(), ids)
        self._imagine("slots", numbers, ids, refused)
        tally.written += len(numbers) - len(refused)
        return {numbers[at]: error for at, error in refused.items()}

    def _remove_frontends(self, ledger: Ledger, change: Change, tally: Tally) -> None:
        """Before the new ones come: a full map needs the room."""
        foreign = list(ledger.stale_frontends)
        refused = self._remove("frontends", foreign, tally)
        for key in foreign:
            if key not in refused:
                ledger.stale_frontends.remove(key)
        for error in refused.values():
            tally.refuse(NODE, f"a row of nobody: {self._words('frontends', error)}")
        refused = self._remove("frontends", map(pack_frontend, change.removals), tally)
        for frontend in change.removals:
            found = refused.get(pack_frontend(frontend), 0) if refused else 0
            if not found:
                ledger.gone(frontend)
            else:
                self._retry.add(frontend)
                tally.refuse(ledger.owner(ledger.held[frontend]), self._words("frontends", found))

    def _put_frontends(self, ledger: Ledger, change: Change, tally: Tally) -> None:
        keys = [pack_frontend(frontend) for frontend in change.puts]
        refused = self._put("frontends", dict(zip(keys, change.puts.values(), strict=True)), tally)
        for key, (frontend, row) in zip(keys, change.puts.items(), strict=True):
            error = refused.get(key, 0) if refused else 0
            if not error:
                ledger.switched(frontend, row)
            else:
                self._retry.add(frontend)
                tally.refuse(ledger.owner(row), self._words("frontends", error))
                ledger.abandoned(row)

    def _write_stale(self, ledger: Ledger, tally: Tally) -> None:
        if ledger.stale_backends:
            kept = self._put_numbered("backends", ledger.stale_backends, tally)
            for number in list(ledger.stale_backends):
                if number not in kept:
                    ledger.freed_backend(number)
            self._left(kept, "backends", tally)
        if ledger.stale_names:
            names = [U32.pack(id) for id in ledger.stale_names]
            refused = self._remove("names", names, tally)
            # A row that stays would begin the count of whoever gets the number next; it costs nothing else.
            self._maps.remove("traffic", b"".join(names))
            for key in names:
                if key not in refused:
                    ledger.freed_name(U32.unpack(key)[0])
            self._left(refused, "names", tally)
        if ledger.stale_ranges:
            refused = self._remove("ranges", [key for keys in ledger.stale_ranges.values() for key in keys], tally)
            for id, keys in list(ledger.stale_ranges.items()):
                ledger.freed_ranges(id, [key for key in keys if key in refused])
            self._left(refused, "ranges", tally)

    def _left(self, refused: Mapping[int, int] | Mapping[bytes, int], table: str, tally: Tally) -> None:
        for error in refused.values():
            tally.refuse(NODE, f"a row that is no longer needed stays: {self._words(table, error)}")

    # ---- Rows to bytes

    def _put_numbered(self, table: str, rows: Mapping[int, bytes], tally: Tally) -> dict[int, int]:
        """As `_put`, for keys that are one u32."""
        if not rows:
            return {}
        keys, values = array("I", rows), b"".join(rows.values())
        refused = self._maps.put(table, keys.tobytes(), values)
        self._imagine(table, keys, values, refused)
        tally.written += len(rows) - len(refused)
        if not refused:
            return {}
        numbers = list(rows)
        return {numbers[at]: error for at, error in refused.items()}

    def _imagine(self, table: str, numbers: array[int], rows: bytes, refused: Mapping[int, int]) -> None:
        """Follow a write, where it was to an array."""
        image = self._images.get(table)
        if image is None:
            return
        if refused:
            image.doubt()
        else:
            image.put(numbers, rows)

    def _put(self, table: str, rows: Mapping[bytes, bytes], tally: Tally) -> dict[bytes, int]:
        """The keys that were refused, with errno."""
        if not rows:
            return {}
        refused = self._maps.put(table, b"".join(rows), b"".join(rows.values()))
        tally.written += len(rows) - len(refused)
        if table == "sources":
            kept = [row for at, row in enumerate(rows.items()) if at not in refused]
            self._sources.update(kept)
        if not refused:
            return {}
        keys = list(rows)
        return {keys[at]: error for at, error in refused.items()}

    def _remove(self, table: str, keys: Iterable[bytes], tally: Tally) -> dict[bytes, int]:
        listed = list(keys)
        if not listed:
            return {}
        refused = self._maps.remove(table, b"".join(listed))
        tally.removed += len(listed) - len(refused)
        if table == "sources":
            for at, key in enumerate(listed):
                if at not in refused:
                    self._sources.pop(key, None)
        return {listed[at]: error for at, error in refused.items()}

    def _words(self, table: str, error: int) -> str:
        if error in (errno.E2BIG, errno.ENOSPC):
            return f"the map {table} is full ({self._maps.capacity[table]} entries)"
        return f"the kernel refused a row of the map {table}: {os.strerror(error)}"


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


def _sources(raw: RawTables) -> dict[bytes, bytes]:
    keys, values = raw.sources
    width = SOURCE_KEY.size
    return {keys[at * width : (at + 1) * width]: values[at * 4 : (at + 1) * 4] for at in range(len(keys) // width)}


def _digest(raw: RawTables) -> bytes:
    """Names the bytes."""
    found = hashlib.blake2b(digest_size=16)
    for part in (*raw.frontends, raw.slots, raw.backends, *raw.names, raw.ranges, *raw.sources, raw.settings):
        found.update(len(part).to_bytes(8))
        found.update(part)
    return found.digest()


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
