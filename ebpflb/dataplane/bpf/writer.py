"""Makes maps hold a RouteTable: what each sync looks at, and what is remembered between them.

Rules of this file: it decides when and how much, `ledger` decides what, and `steps` in which order. What failed is
remembered and tried again by the next sync; a sync of what is held writes nothing. The cost is that of the change.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Collection, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext

from ebpflb.dataplane import NODE, Report
from ebpflb.dataplane.bpf.addresses import Addresses
from ebpflb.dataplane.bpf.image import Image, accounts_for
from ebpflb.dataplane.bpf.layouts import BACKEND, U32
from ebpflb.dataplane.bpf.ledger import Ledger
from ebpflb.dataplane.bpf.locality import NodeFacts
from ebpflb.dataplane.bpf.looking import digest_of, read_all, read_tables
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.pen import Pen, Tally
from ebpflb.dataplane.bpf.reading import RawTables, Reading
from ebpflb.dataplane.bpf.steps import Steps
from ebpflb.dataplane.bpf.table_parts import LARGEST
from ebpflb.dataplane.bpf.tables import pack_frontend
from ebpflb.dataplane.bpf.whereabouts import Whereabouts
from ebpflb.model import Address
from ebpflb.routes import Frontend, RouteTable

_COLD = 1000
"""Frontends from which on a sync pauses the garbage collector: it would walk every new row again and again."""

PART = 2048
"""Frontends that are planned and written at a time: what a plan holds in memory is theirs."""


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

    def _write(
        self,
        ledger: Ledger,
        routes: RouteTable,
        frontends: AbstractSet[Frontend],
        addresses: AbstractSet[Address],
        tally: Tally,
    ) -> None:
        """Make the rows of `frontends`, and the owners of `addresses`, those of `routes`."""
        steps = Steps(self._maps, self._pen, self._whereabouts, self._addresses, ledger, tally, self._part)
        try:
            steps.write(routes, frontends, addresses)
        except BaseException:
            # Where it stopped, only the maps know: the next sync reads them.
            self._ledger = None
            raise
        self._retry = steps.retry
        if ledger.gone_udp:
            gone, ledger.gone_udp = ledger.gone_udp, set()
            self.gone_udp(gone)
        if tally.written or tally.removed or tally.failed:
            self._sound = b""


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
