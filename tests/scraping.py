"""Metrics with fakes around them, and what a scrape shows.

Rules of this file: time passes only when a test says so; what is read is the page as it would be served.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from ebpflb.dataplane import Report
from ebpflb.httpd import Request, Response
from ebpflb.metrics import Metrics
from ebpflb.observer import Attempt, Trigger
from ebpflb.routes import RouteTable
from ebpflb.source import Condition
from tests.fakes import FakeClock, FakeDataplane, FakeSource

EPOCH = 1_800_000_000.0


class Amounts:
    """Counts a table as simply as can be."""

    def __init__(self, table: RouteTable) -> None:
        self.services = len({route.service.service for route in table.values()})
        self.frontends = len(table) // 2
        self.routes = len(table)
        self.backends = len({backend for route in table.values() for backend in route.backends})


class Tables(FakeDataplane):
    """Remembers what of it was read; reading takes `seconds`, and fails where a test says so."""

    def __init__(self, clock: FakeClock, name: str) -> None:
        super().__init__(name=name)
        self.asked: list[str] = []
        self.seconds = 0.0
        self.fails: dict[str, Exception] = {}
        self._clock = clock

    def tables(self, what: str) -> list[dict[str, object]]:
        self.asked.append(what)
        self._clock.advance(self.seconds)
        if what in self.fails:
            raise self.fails[what]
        return super().tables(what)


class Asked(FakeSource):
    """Remembers how often it was asked how it does."""

    asked = 0

    def condition(self) -> Condition:
        self.asked += 1
        return super().condition()


class Bench:
    """`each_service`: how many Services may have series of their own; `started`: so many seconds ago; `passed`: better
    dataplanes than the one called `dataplane`."""

    def __init__(
        self, each_service: int = 0, started: float = 60.0, dataplane: str = "bpf", passed: Sequence[str] = ()
    ) -> None:
        self.clock = FakeClock()
        self.dataplane = Tables(self.clock, dataplane)
        self.dataplane.rows["counters"] = [
            {"counter": "packet_forwarded", "value": 5},
            {"counter": "packet_dropped", "value": 0},
        ]
        self.dataplane.rows["devices"] = [{"name": "eth0", "xdp": "native", "reason": ""}]
        self.source = Asked()
        self.counted: list[RouteTable] = []
        self.metrics = Metrics(
            self.dataplane,
            [self.source],
            self._count,
            clock=self.clock,
            wall=self.wall,
            each_service=each_service,
            release=lambda: self.dataplane.asked.append("released"),
            passed=passed,
        )
        self.table = RouteTable()
        self.clock.advance(started)

    def _count(self, table: RouteTable) -> Generator[None, None, Amounts]:
        self.counted.append(table)
        yield
        return Amounts(table)

    def wall(self) -> float:
        return EPOCH + self.clock.now

    def attempt(
        self,
        what: str = "sync",
        *,
        table: RouteTable | None = None,
        queued: float | None = None,
        took: float = 0.0,
        triggers: Sequence[Trigger] = (),
        **report: Any,
    ) -> None:
        """A sync or an audit that ended now."""
        if table is not None:
            self.table = table
        began = self.clock.now - took
        said = Report(**report)
        self.metrics.attempted(Attempt(what, began, self.clock.now, queued, self.table, 0, said, tuple(triggers)))

    def look(self) -> None:
        """The loop comes round until it has nothing to do."""
        for _ in range(10):
            self.metrics.sampler.work()
            due = self.metrics.sampler.due()
            if due is None or due > self.clock.now:
                return
        raise AssertionError("it goes on and on")

    def get(self, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.metrics.page(Request("GET", "/metrics", "", named))

    def scrape(self) -> dict[str, float]:
        """Every sample, by its text."""
        lines = self.get().body.decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def value(self, sample: str) -> float:
        return self.scrape()[sample]

    def close(self) -> None:
        self.metrics.sampler.close()
