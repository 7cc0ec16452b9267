"""Numbers for things that the kernel's rows name by number: who gets which, and which are free.

Rules of this file: pure. Both pools can be told what is in use already, so that a restart renumbers nothing. A number
that is given back becomes free at once: who gives it back must know that no row names it any more. Reuse is as late as
the pool's shape allows (ids: first freed, first reused), because a program may still be looking at an old row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class Exhausted(Exception):
    """A pool has nothing left that fits. `what` is the map that is full, `capacity` its size."""

    def __init__(self, what: str, capacity: int) -> None:
        super().__init__(f"the map {what} is full ({capacity} entries)")
        self.what = what
        self.capacity = capacity


_LATE = 1024
"""How many freed ids lie idle before the oldest is used again."""


class IdPool:
    """Ids 1 … `capacity`; 0 means "none" in every row. `what` names the map for error texts.

    Ids in `used` beyond `capacity` are ignored: this pool has not given them."""

    __slots__ = ("_free", "_next", "capacity", "what")

    def __init__(self, what: str, capacity: int, used: Iterable[int] = ()) -> None:
        self.what = what
        self.capacity = capacity
        taken = {number for number in used if 1 <= number <= capacity}
        self._next = max(taken, default=0) + 1
        self._free = deque(number for number in range(1, self._next) if number not in taken)

    @property
    def end(self) -> int:
        """One more than the highest id that was ever given out."""
        return self._next

    @property
    def available(self) -> int:
        """How many ids are left."""
        return len(self._free) + max(0, self.capacity + 1 - self._next)

    def take(self) -> int:
        """A free id. Raises Exhausted."""
        if self._free and (len(self._free) > _LATE or self._next > self.capacity):
            return self._free.popleft()
        if self._next <= self.capacity:
            self._next += 1
            return self._next - 1
        raise Exhausted(self.what, self.capacity)

    def take_many(self, count: int) -> list[int]:
        """`count` free ids, or none at all. Raises Exhausted."""
        if not self._free and self._next + count <= self.capacity + 1:
            first = self._next
            self._next += count
            return list(range(first, self._next))
        if count > self.available:
            raise Exhausted(self.what, self.capacity)
        return [self.take() for _ in range(count)]

    def give(self, number: int) -> None:
        """Take back an id that no row names. One that this pool could not have given is forgotten."""
        if number <= self.capacity:
            self._free.append(number)


class SlotPool:
    """Contiguous ranges of an array of `capacity` cells, cell 0 included.

    Best fit with merging: a range comes from the smallest hole that holds it, and a freed one grows together with its
    neighbours, so that histories of any length leave no more holes than there are ranges in use (plus one).
    """

    __slots__ = ("_by_end", "_by_size", "_by_start", "capacity", "what")

    def __init__(self, what: str, capacity: int, used: Iterable[tuple[int, int]] = ()) -> None:
        """`used`: (start, length) of ranges that are taken; they must not overlap."""
        self.what = what
        self.capacity = capacity
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        at = 0
        for start, length in sorted(used):
            if start < at or start + length > capacity:
                raise ValueError(f"range {start}+{length} overlaps another or leaves the array")
            if start > at:
                self._insert(at, start - at)
            at = start + length
        if at < capacity:
            self._insert(at, capacity - at)

    @property
    def available(self) -> int:
        """How many cells are free, in whatever pieces."""
        return sum(self._by_start.values())

    @property
    def holes(self) -> tuple[tuple[int, int], ...]:
        """Every free range as (start, length), by start."""
        return tuple(sorted(self._by_start.items()))

    def take(self, length: int) -> int:
        """The start of `length` (at least 1) free cells. Raises Exhausted, also where enough cells are free but not
        side by side."""
        at = bisect_left(self._by_size, (length, 0))
        if at == len(self._by_size):
            raise Exhausted(self.what, self.capacity)
        size, start = self._by_size[at]
        left = size - length
        if left and (not at or self._by_size[at - 1] < (left, start)):
            # What is left of the hole keeps its place in the order: it is the one hole, or far larger than the next.
            del self._by_start[start]
            self._by_start[start + length] = left
            self._by_end[start + size] = start + length
            self._by_size[at] = (left, start + length)
            return start
        self._remove(start, size)
        if left:
            self._insert(start + length, left)
        return start

    def give(self, start: int, length: int) -> None:
        """Take back a range that no row names."""
        end = start + length
        after = self._by_start.get(end)
        if after is not None:
            self._remove(end, after)
            length += after
        before = self._by_end.get(start)
        if before is not None:
            self._remove(before, start - before)
            length += start - before
            start = before
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._by_start[start] = length
        self._by_end[start + length] = start
        insort(self._by_size, (length, start))

    def _remove(self, start: int, length: int) -> None:
        del self._by_start[start]
        del self._by_end[start + length]
        del self._by_size[bisect_left(self._by_size, (length, start))]
