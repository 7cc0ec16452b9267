"""At every prefix of the writes, a row refers only to rows that are there, and says the old thing or the new one."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpflb.dataplane.bpf.layouts import BACKEND, ROUTE, U32
from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.routes import RouteTable
from tests.maps import FakeMaps, WatchedMaps
from tests.tables import FACTS, interpret, left_over, tables

Held = tuple[frozenset[bytes], frozenset[bytes]]
"""The keys of frontends and owned addresses."""


def held(maps: FakeMaps) -> Held:
    return frozenset(maps.tables["frontends"]), frozenset(maps.tables["owned"])


class Watch:
    """Looks at the maps after every row: each frontend leads to what it led to before the sync, or to what it leads
    to after it, which is found by the same sync on maps of its own. No port is refused because its address is owned
    before its row has come, or is still owned after it went."""

    def __init__(self, capacity: dict[str, int] | None = None) -> None:
        self.maps = WatchedMaps(self.look, capacity)
        self.allowed: dict[tuple[bytes, int], list[object]] = {}
        self.before: Held = (frozenset(), frozenset())
        self.after: Held = (frozenset(), frozenset())
        self.looks = 0

    def look(self, maps: FakeMaps) -> None:
        self.looks += 1
        for key, leads_to in interpret(maps).items():
            assert leads_to in self.allowed.get(key, []), f"{key!r} leads to neither the old nor the new"
        frontends, owned = held(maps)
        for (wanted, stays), what in (
            ((self.after[0], self.before[1]), "yet"),
            ((self.before[0], self.after[1]), "still"),
        ):
            refused = [key for key in wanted - frontends if key[:16] in owned - stays]
            assert not refused, f"{refused[0]!r} is refused, though it is {what} to be served"

    def sync(self, writer: Writer, routes: RouteTable) -> None:
        fresh = FakeMaps()
        assert Writer(fresh, FACTS, time.monotonic).sync(routes).complete
        before, after = interpret(self.maps), interpret(fresh)
        self.before, self.after = held(self.maps), held(fresh)
        self.allowed = {key: [one[key] for one in (before, after) if key in one] for key in {*before, *after}}
        assert writer.sync(routes).complete
        assert interpret(self.maps) == after
        assert left_over(self.maps) == []
        assert self.maps.tables["owned"] == fresh.tables["owned"]


@given(st.lists(tables(), min_size=1, max_size=6))
def test_every_prefix_is_sound(history: list[RouteTable]) -> None:
    """Invariant: at every prefix of the writes of any history, each frontend's row leads only to rows that are there
    and are its Service's, as many backends as it counts, and says what it said before the sync or what it says after
    it: never a mixture."""
    watch = Watch()
    writer = Writer(watch.maps, FACTS, time.monotonic)
    for routes in history:
        watch.sync(writer, routes)


@given(st.lists(tables(), min_size=2, max_size=8))
def test_every_prefix_is_sound_where_numbers_are_scarce(history: list[RouteTable]) -> None:
    """Invariant: the same where maps are so small that freed slots and ids are taken again at once, and where
    a sync is written in many parts."""
    watch = Watch({"backends": 124, "slots": 120, "names": 13})
    writer = Writer(watch.maps, FACTS, time.monotonic, part=2)
    for routes in history:
        watch.sync(writer, routes)


def half(count: int = 1, affinity: int = 0, table: int = 0) -> bytes:
    """A route of service 1, to `count` backends from slot 0."""
    return ROUTE.pack(0, 0, 0, 0, 1, 0, count, 0, affinity, 0, 0, table)


BACKENDS = ("known", "names", "backends", "slots")


@pytest.mark.parametrize(
    ("before", "row", "complaint"),
    [
        ((), half(), "nobody looks for this frontend"),
        (("known",), half(), "has no name"),
        (("known", "names"), half(), "slot 0 was never written"),
        (BACKENDS, half(table=1), "part 0 of the table"),
        (BACKENDS, half(affinity=60), "do not find it"),
    ],
    ids=["address", "name", "slot", "table", "member"],
)
def test_the_watch_sees_a_write_in_the_wrong_order(before: tuple[str, ...], row: bytes, complaint: str) -> None:
    """A check that never looks would pass everything: it looks after every row, and refuses a dangling one."""
    watch = Watch()
    rows = {
        "known": (bytes(4), b"\1" + bytes(7)),
        "names": (U32.pack(1), bytes(192)),
        "backends": (U32.pack(1), BACKEND.pack(bytes(16), 0, 0, 0, 1)),
        "slots": (bytes(4), U32.pack(1)),
    }
    for table in before:
        watch.maps.put(table, *rows[table])
    with pytest.raises(AssertionError, match=complaint):
        watch.maps.put("frontends", bytes(20), row.ljust(64, b"\0"))
    assert watch.looks == len(before) + 1
