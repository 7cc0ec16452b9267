"""Ids and slot ranges: nothing is given out twice, nothing is lost, and full means full."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpflb.dataplane.bpf.ids import Exhausted, IdPool, SlotPool


def test_ids_begin_with_one() -> None:
    """0 means "none" in every row."""
    pool = IdPool("names", 3)
    assert [pool.take() for _ in range(3)] == [1, 2, 3]


def test_a_full_pool_says_which_map_is_full() -> None:
    pool = IdPool("names", 1)
    pool.take()
    with pytest.raises(Exhausted, match=r"the map names is full \(1 entries\)"):
        pool.take()


def test_many_ids_or_none() -> None:
    pool = IdPool("backends", 4, used=[2])
    with pytest.raises(Exhausted):
        pool.take_many(4)
    assert pool.available == 3
    assert sorted(pool.take_many(3)) == [1, 3, 4]


def test_what_is_in_use_is_not_given_out() -> None:
    """As after a restart."""
    pool = IdPool("names", 6, used=[2, 5])
    assert {pool.take() for _ in range(4)} == {1, 3, 4, 6}


def test_ids_beyond_the_map_do_not_count() -> None:
    """A row of nobody may have any number at all."""
    pool = IdPool("names", 2, used=[4_000_000_000, 0])
    assert [pool.take(), pool.take()] == [1, 2]
    pool.give(4_000_000_000)
    assert pool.available == 0


def test_a_freed_id_rests_before_it_is_used_again() -> None:
    """A program may still be looking at the old row."""
    pool = IdPool("backends", 10_000)
    first = pool.take()
    pool.give(first)
    assert pool.take() != first


@settings(max_examples=50)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 12))
def test_ids_are_unique(history: list[bool], capacity: int) -> None:
    """Invariant: whatever is taken and given back, no id is out twice, and `available` is what can be had."""
    pool = IdPool("names", capacity)
    out: list[int] = []
    for take in history:
        if take and pool.available:
            number = pool.take()
            assert 1 <= number <= capacity and number not in out
            out.append(number)
        elif out:
            pool.give(out.pop(0))
        assert pool.available == capacity - len(out)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_ranges_do_not_overlap(history: list[tuple[bool, int]]) -> None:
    """Invariant: ranges never overlap or leave the array, a request fails only if no hole holds it, holes never touch,
    and a pool made of what is out is the same pool."""
    pool = SlotPool("slots", 40)
    out: list[tuple[int, int]] = []
    for take, length in history:
        if take:
            try:
                start = pool.take(length)
            except Exhausted:
                assert all(size < length for _, size in pool.holes)
                continue
            assert start >= 0 and start + length <= 40
            assert all(start + length <= other or other + size <= start for other, size in out)
            out.append((start, length))
        elif out:
            pool.give(*out.pop(length % len(out)))
        assert pool.available == 40 - sum(size for _, size in out)
        ends = [start + size for start, size in pool.holes]
        assert not set(ends) & {start for start, _ in pool.holes}
        assert SlotPool("slots", 40, out).holes == pool.holes


def test_the_smallest_hole_that_fits() -> None:
    """Big holes stay big for big Services."""
    pool = SlotPool("slots", 100, used=[(10, 5), (20, 10), (90, 10)])
    assert pool.holes == ((0, 10), (15, 5), (30, 60))
    assert pool.take(5) == 15
    assert pool.take(7) == 0
    assert pool.take(60) == 30


def test_churn_does_not_fragment() -> None:
    """Services of all sizes, each replaced a thousand times, old range freed after the new one was taken: two thirds
    of the array always suffice."""
    sizes = [1 + at % 50 for at in range(200)]
    pool = SlotPool("slots", sum(sizes) * 3 // 2)
    starts = [pool.take(size) for size in sizes]
    for turn in range(5000):
        at = turn * 37 % len(sizes)
        old, size = starts[at], sizes[at]
        sizes[at] = 1 + (size + turn) % 50
        starts[at] = pool.take(sizes[at])
        pool.give(old, size)
    assert len(pool.holes) <= len(sizes) + 1


def test_overlapping_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        SlotPool("slots", 10, used=[(0, 4), (3, 2)])
