"""The difference of two tables."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.diff import apply, diff

TABLES = st.dictionaries(st.integers(0, 8), st.integers(0, 3))


@given(TABLES, TABLES)
def test_apply_undoes_diff(want: dict[int, int], have: dict[int, int]) -> None:
    """Invariant: apply(diff(a, b), b) == a, and nothing is written that need not be."""
    delta = diff(want, have)
    assert apply(delta, have) == want
    assert len(delta) == sum(want.get(key) != have.get(key) for key in {*want, *have})
    assert len(delta) == len(list(delta.writes()))


@given(TABLES)
def test_no_difference(table: dict[int, int]) -> None:
    """Invariant: diff(a, a) is empty, and false."""
    assert not diff(table, dict(table))
    assert list(diff(table, dict(table)).writes()) == []


def test_order_of_writes() -> None:
    """Additions, then changes, then removals: nothing is taken away before what replaces it is there."""
    delta = diff({1: "new", 2: "same", 3: "after"}, {4: "gone", 3: "before", 2: "same"})
    assert list(delta.writes()) == [(1, "new"), (3, "after"), (4, None)]
    assert (delta.added, delta.changed, delta.removed) == ({1: "new"}, {3: "after"}, (4,))
    assert delta.put == {1: "new", 3: "after"}
