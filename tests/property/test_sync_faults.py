"""Whatever fails, in whatever order things happen: it ends as if it had been made from scratch."""

from __future__ import annotations

import errno
import random
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ebpflb.dataplane.bpf.layouts import AFFINITY, AFFINITY_KEY, ROUTE_REFERENCES
from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.model import Address, ServiceName
from ebpflb.routes import Key, Locality, Route, RouteTable
from tests.maps import ARRAYS, FakeMaps, FaultyMaps, WatchedMaps
from tests.tables import FACTS, LOCALITIES, interpret, left_over, owners, rows, tables

MEDDLED = ("frontends", "backends", "names", "ranges", "sources", "slots", "owned", "known", "tables", "members")
ERRORS = (errno.EAGAIN, errno.ENOSPC, errno.E2BIG, errno.ENOMEM)


class Node(RuleBasedStateMachine):
    """A node whose kernel fails one write in ten, whose daemon restarts, and whose tables others change."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = WatchedMaps(self._look)
        self.careful = True
        self.random = random.Random(0)
        self.rate = 0.0
        self.routes = RouteTable()
        self.writer = self._daemon()

    def _look(self, maps: FakeMaps) -> None:
        """Rows are sound at every moment, unless somebody else has just broken them."""
        if self.careful:
            interpret(maps)

    def _fails(self) -> int:
        return self.random.choice(ERRORS) if self.random.random() < self.rate else 0

    def _daemon(self) -> Writer:
        return Writer(FaultyMaps(self.maps, self._fails), FACTS, time.monotonic, part=self.random.choice((2, 100)))

    @initialize(seed=st.integers(0, 2**32 - 1))
    def seed(self, seed: int) -> None:
        self.random = random.Random(seed)

    @rule(rate=st.sampled_from((0.0, 0.1, 0.1, 0.5)))
    def weather(self, rate: float) -> None:
        self.rate = rate

    @rule(put=rows())
    def update(self, put: dict[Key, Route]) -> None:
        self._sync(self.routes.evolve(put))

    @rule(puts=st.lists(rows(), max_size=4), locality=LOCALITIES, owned=owners())
    def update_several(
        self, puts: list[dict[Key, Route]], locality: Locality, owned: dict[Address, ServiceName]
    ) -> None:
        merged: dict[Key, Route] = {}
        for put in puts:
            merged |= put
        changes: dict[Address, ServiceName | None] = {**dict.fromkeys(list(self.routes.owned)[:1]), **owned}
        self._sync(self.routes.evolve(merged, locality=locality, owned=changes))

    @rule(number=st.integers(0, 9))
    def a_client_comes(self, number: int) -> None:
        """A program remembers it."""
        for row in self.maps.tables["frontends"].values():
            for service, _, _, _, affinity, *_ in ROUTE_REFERENCES.iter_unpack(row):
                if affinity:
                    key = AFFINITY_KEY.pack(bytes(15) + bytes((number,)), service, 0)
                    self.maps.tables["affinity"][key] = AFFINITY.pack(1, 0, 1)

    @rule(at=st.integers(0, 20))
    def delete(self, at: int) -> None:
        keys = sorted(self.routes)
        if keys:
            frontend = keys[at % len(keys)][0]
            self._sync(self.routes.evolve({}, [key for key in keys if key[0] == frontend]))

    @rule(routes=tables())
    def replace(self, routes: RouteTable) -> None:
        """A table that did not evolve from the last one."""
        self._sync(routes)

    @rule()
    def again(self) -> None:
        self._sync(self.routes)

    @rule()
    def restart(self) -> None:
        self.writer = self._daemon()

    @rule(routes=tables())
    def restart_with_other_routes(self, routes: RouteTable) -> None:
        self.writer = self._daemon()
        self._sync(routes)

    @rule()
    def audit(self) -> None:
        self.writer.audit()

    @rule(table=st.sampled_from(MEDDLED), at=st.integers(0, 9))
    def meddle(self, table: str, at: int) -> None:
        """Somebody else removes or overwrites a row; the next audit puts it right."""
        rate, self.rate = self.rate, 0.0
        self.writer.sync(self.routes)
        keys = sorted(self.maps.tables[table])
        if keys:
            self.careful = False
            self._break(table, keys[at % len(keys)], at)
            assert self.writer.audit().complete
            self.careful = True
        assert self.writer.state() == self.routes and self.writer.state().owned == self.routes.owned
        self.rate = rate

    def _break(self, table: str, key: bytes, at: int) -> None:
        if table not in ARRAYS and at % 2:
            del self.maps.tables[table][key]
        else:
            value = bytearray(self.maps.tables[table][key])
            value[at % len(value)] ^= 1 << at % 8
            self.maps.tables[table][key] = bytes(value)

    def _sync(self, routes: RouteTable) -> None:
        self.routes = routes
        report = self.writer.sync(routes)
        assert report.complete == (not report.problems)

    @invariant()
    def failures_are_counted(self) -> None:
        if not self.rate and self.careful:
            report = self.writer.sync(self.routes)
            assert report.complete, report.problems

    def teardown(self) -> None:
        """Invariant: once nothing fails any more, one sync makes the maps what they would be from scratch, with
        nothing left over; then neither another sync nor a restart writes anything."""
        self.rate = 0.0
        assert self.writer.sync(self.routes).complete
        assert self.writer.audit().complete
        fresh = FakeMaps()
        Writer(fresh, FACTS, time.monotonic).sync(self.routes)
        assert interpret(self.maps) == interpret(fresh)
        assert self.maps.tables["sources"] == fresh.tables["sources"]
        assert self.maps.tables["settings"] == fresh.tables["settings"]
        assert self.maps.tables["owned"] == fresh.tables["owned"]
        assert left_over(self.maps) == []
        assert self.writer.state() == self.routes and self.writer.state().owned == self.routes.owned
        writes = self.maps.writes
        assert self.writer.sync(self.routes).complete
        assert self._daemon().sync(self.routes).complete
        assert self.maps.writes == writes


TestNode = Node.TestCase
TestNode.settings = settings(stateful_step_count=12)
