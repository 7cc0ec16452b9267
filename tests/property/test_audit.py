"""An audit that finds what was written does not ask what it means; one that finds anything else does, and mends it."""

from __future__ import annotations

import time
from array import array

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.dataplane.bpf.image import Image
from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.routes import RouteTable
from tests.maps import ARRAYS, FakeMaps
from tests.tables import FACTS, tables

DESIRED = (
    "frontends",
    "slots",
    "backends",
    "names",
    "sources",
    "ranges",
    "settings",
    "owned",
    "known",
    "tables",
    "members",
)


@given(st.lists(tables(), min_size=1, max_size=6))
def test_an_audit_of_what_was_written_understands_nothing(history: list[RouteTable]) -> None:
    """Invariant: whatever was synced before, the maps are accounted for."""
    maps = FakeMaps()
    writer = Writer(maps, FACTS, time.monotonic)
    for routes in history:
        assert writer.sync(routes).complete
        writes = maps.writes
        report = writer.audit()
        assert (report.written, report.removed, report.failed) == (0, 0, 0)
        assert (writer.understood, maps.writes) == (1, writes)


@given(st.lists(tables(), min_size=1, max_size=4), st.data())
def test_an_audit_finds_any_row_that_is_another(history: list[RouteTable], data: st.DataObject) -> None:
    """Invariant: a byte changed, a row gone or a row too many, in any map: the routes are read back as synced."""
    maps = FakeMaps()
    writer = Writer(maps, FACTS, time.monotonic)
    for routes in history:
        assert writer.sync(routes).complete
    table = data.draw(st.sampled_from([each for each in DESIRED if maps.tables[each]]))
    rows = maps.tables[table]
    before = dict(rows)
    key = data.draw(st.sampled_from(sorted(rows)))
    if table not in ARRAYS and data.draw(st.booleans()):
        del rows[key]
    else:
        row = bytearray(rows[key])
        row[data.draw(st.integers(0, len(row) - 1))] ^= data.draw(st.integers(1, 255))
        rows[key] = bytes(row)
    writer.audit()
    assert writer.state() == history[-1] and writer.state().owned == history[-1].owned
    if table in ("owned", "known", "tables", "members"):
        assert rows == before, "what programs find is as it was"


def test_an_image_follows_writes_wherever_they_are() -> None:
    image = Image(b"aabb", 2)
    image.put(array("I", [1, 2, 3]), b"BBCCDD")
    assert image.shows(b"aaBBCCDD")
    image.put(array("I", [3, 0]), b"ddAA")
    assert image.shows(b"AABBCCdd")
    image.put(array("I", [6]), b"gg")
    assert image.shows(b"AABBCCdd\0\0\0\0gg")


def test_an_image_is_of_what_was_of_interest() -> None:
    """What is read ends where nothing refers to it any more, or where there has never been anything."""
    image = Image(b"aabbcc", 2)
    assert image.shows(b"aabb")
    assert image.shows(b"aabbcc\0\0")
    assert not image.shows(b"aabbccdd")
    assert not image.shows(b"aaxx")


def test_an_image_misses_rows_that_were_wiped_out() -> None:
    """Reading stops where only zeros come, wherever they come from."""
    image = Image(b"aabbcc", 2)
    assert not image.shows(b"aabb", all_there_are=True)
    assert image.shows(b"aabbcc\0\0", all_there_are=True)
    assert Image(b"aabb\0\0", 2).shows(b"aabb", all_there_are=True)


def test_an_image_is_not_believed_after_a_refused_write() -> None:
    image = Image(b"aa", 2)
    image.doubt()
    assert not image.shows(b"aa")
