"""Looks at what the daemon's own thread alone may ask, for scrapes that another thread answers.

Rules of this file: a scrape never asks the dataplane or a source. It leaves word that somebody is interested; the
daemon's loop then looks, at most every `period` seconds and for at most a hundredth of its time, one table at a time so
that changes are not kept waiting, and the next scrape tells what was seen. Nobody scrapes: nobody looks, but once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

import msgspec

from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError, UserError
from ebpflb.metrics.cells import Labels, Rising
from ebpflb.metrics.own import OwnMetrics
from ebpflb.metrics.traffic import Carried, Port, Traffic
from ebpflb.routes import RouteTable
from ebpflb.source import Source

log = logging.getLogger("ebpflb.metrics")

PERIOD = 15.0
_SHARE = 100
# The first look, without which the first scrape would find little, waits until the start is over.
_AFTER_START = 5.0
_SOURCES_PERIOD = 1.0


class Amounts(Protocol):
    """How much a table holds."""

    @property
    def services(self) -> int: ...
    @property
    def frontends(self) -> int: ...
    @property
    def routes(self) -> int: ...
    @property
    def backends(self) -> int: ...


class _Fill(msgspec.Struct, frozen=True):
    name: str
    entries: int
    max: int


class _Device(msgspec.Struct, frozen=True):
    name: str
    xdp: str


class _Count(msgspec.Struct, frozen=True):
    counter: str
    value: int


class _Name(msgspec.Struct, frozen=True):
    namespace: str
    name: str
    port: str


class _Row(msgspec.Struct, frozen=True):
    service: _Name
    connections: int
    packets: int
    bytes: int


class Sampler:
    """A Worker of the daemon's loop, with a descriptor that wakes it when a scrape has come.

    `amounts` counts a table, in steps; `seats` is how many Services may have series of their own, 0 for none; `release`
    is called after each look, which needed more memory than what stays of it; `clock` is the loop's, `wall` the time of
    day in seconds since the epoch.
    """

    def __init__(
        self,
        metrics: OwnMetrics,
        dataplane: Dataplane,
        sources: Sequence[Source],
        amounts: Callable[[RouteTable], Generator[None, None, Amounts]],
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        seats: int = 0,
        period: float = PERIOD,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._release = release
        self._metrics = metrics
        self._dataplane = dataplane
        self._sources = tuple(sources)
        self._amounts = amounts
        self._clock = clock
        self._wall = wall
        self._period = period
        self._counters = Rising()
        self._traffic = Traffic(seats) if seats else None
        self._counted: RouteTable | None = None
        self._steps: Iterator[None] | None = None  # of the look that has begun
        self._took = 0.0
        self._not_before = clock() + _AFTER_START
        self._sources_at = clock()
        self._wanted = True
        self._lock = threading.Lock()
        self._wake: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # ---- From the thread that answers scrapes ----

    def scraped(self) -> None:
        """Somebody is interested: look again when it is time. From any thread."""
        with self._lock:
            self._wanted = True
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    # ---- In the daemon's loop ----

    def fileno(self) -> int:
        """Readable when a scrape has come; ValueError once closed."""
        if self._wake is None:
            raise ValueError("closed")
        return self._wake

    def woken(self) -> None:
        """To be called when `fileno` is readable; `work` does the rest."""
        with self._lock:
            if self._wake is not None:
                os.eventfd_read(self._wake)

    def close(self) -> None:
        """No more waking; a scrape that comes later still is no error."""
        with self._lock:
            if self._wake is not None:
                os.close(self._wake)
                self._wake = None

    def due(self) -> float | None:
        if self._steps is not None:
            return self._clock()
        # Before the first attempt there is nothing to see, and after it the loop comes round by itself.
        return self._not_before if self._wanted and self._metrics.routes is not None else None

    def work(self) -> None:
        now = self._clock()
        if now >= self._sources_at:
            self._sources_at = now + _SOURCES_PERIOD
            self._metrics.conditions({source.name: source.condition() for source in self._sources})
        if self._steps is None:
            if not self._wanted or self._metrics.routes is None or now < self._not_before:
                return
            with self._lock:
                self._wanted = False
            self._took = 0.0
            self._steps = self._look()
        over = next(self._steps, self)
        self._took += self._clock() - now
        if over is self:
            self._steps = None
            self._not_before = now + max(self._period, _SHARE * self._took)
            self._metrics.looking.set(self._took)
            self._metrics.looked.set(self._wall())

    # ---- One look, in steps ----

    def _look(self) -> Iterator[None]:
        for step in (self._look_at_counters, self._look_at_fill, self._look_at_devices, self._look_at_traffic):
            try:
                step()
            except UserError as error:
                log.debug("%s", error)  # a dataplane need not have such a table
            except (EbpflbError, OSError, msgspec.ValidationError) as error:
                self._metrics.unreadable.add(1)
                log.warning("metrics: the kernel's tables cannot be read: %s", error)
            yield
        yield from self._count_routes()
        self._release()

    def _look_at_counters(self) -> None:
        rows = msgspec.convert(self._dataplane.tables("counters"), list[_Count])
        values: dict[Labels, float] = {(row.counter,): row.value for row in rows}
        self._metrics.datapath.replace(self._counters.take(values))

    def _look_at_fill(self) -> None:
        rows = msgspec.convert(self._dataplane.tables("fill"), list[_Fill])
        self._metrics.entries.replace({(row.name,): row.entries for row in rows})
        self._metrics.room.replace({(row.name,): row.max for row in rows})

    def _look_at_devices(self) -> None:
        rows = msgspec.convert(self._dataplane.tables("devices"), list[_Device])
        self._metrics.devices.replace({(row.name, row.xdp): 1 for row in rows})

    def _look_at_traffic(self) -> None:
        if self._traffic is None:
            return
        series = self._traffic.take(map(_carried, self._dataplane.tables("traffic")))
        self._metrics.connections.replace({port: carried.connections for port, carried in series.items()})
        self._metrics.packets.replace({port: carried.packets for port, carried in series.items()})
        self._metrics.bytes.replace({port: carried.bytes for port, carried in series.items()})

    def _count_routes(self) -> Iterator[None]:
        routes = self._metrics.routes
        if routes is None or routes is self._counted:
            return
        amounts = yield from self._amounts(routes)
        self._counted = routes
        for name, gauge in self._metrics.amounts.items():
            gauge.set(getattr(amounts, name))


def _carried(row: dict[str, object]) -> tuple[Port, Carried]:
    found = msgspec.convert(row, _Row)
    name = found.service
    return (name.namespace, name.name, name.port), Carried(found.connections, found.packets, found.bytes)
