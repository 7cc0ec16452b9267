"""Which sets of backends have rows beside their slots: tables of consistent hashing, members.

Rules of this file: pure. Such rows are told by the first slot of their set, and live as long as a held row of a
frontend needs them. The slots are used again as soon as the set has gone, so what is left over of its rows is told by
key: it belongs to whoever begins there next, and is never removed from under it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from ebpflb.dataplane.bpf.ids import Exhausted
from ebpflb.dataplane.bpf.records import Attachment, BackendSlots

Sets: TypeAlias = Mapping[int, BackendSlots]
"""By first slot."""


class SetRows:
    """The map `what` of `capacity` entries. `keys` and `rows` make a set's rows, given the set and a number that says
    which ones it has (not 0). `remember`: rows are so dear to make that a sum of each is kept."""

    def __init__(
        self,
        what: str,
        capacity: int,
        keys: Callable[[BackendSlots, int], list[bytes]],
        rows: Callable[[BackendSlots, int], list[bytes]],
        *,
        remember: bool = False,
    ) -> None:
        self._what = what
        self._capacity = capacity
        self._keys = keys
        self._rows = rows
        self._remember = remember
        self._made: dict[int, Attachment] = {}
        self._entries = 0
        self._idle: set[int] = set()
        self._inherited: dict[int, set[bytes]] = {}  # stale keys that were taken over since the last sweep
        self.stale: set[bytes] = set()
        """Keys of rows that nothing refers to."""
        self.torn: dict[int, BackendSlots] = {}
        """Sets whose rows were found to be others than they should be, by first slot."""

    @property
    def tidy(self) -> bool:
        """Whether nothing waits to be written or removed."""
        return not (self.stale or self.torn)

    def kind(self, start: int) -> int:
        """Which rows the set from this slot has; 0 for none."""
        made = self._made.get(start)
        return made.kind if made is not None else 0

    def suits(self, start: int, kind: int) -> bool:
        """Whether the set from this slot has these rows, or could get them: there is no changing them in place, since
        those who use them must find them whole."""
        made = self._made.get(start)
        return not kind or made is None or made.kind == kind

    def make(self, slots: BackendSlots, kind: int) -> None:
        """The set has such rows from now on. Raises Exhausted."""
        keys = self._keys(slots, kind)
        mine = self.stale.intersection(keys) if self.stale else set()
        if self._entries + len(self.stale) - len(mine) + len(keys) > self._capacity:
            raise Exhausted(self._what, self._capacity)
        if mine:
            self.stale -= mine
            self._inherited[slots.start] = mine
        self._entries += len(keys)
        self._made[slots.start] = Attachment(kind)

    def forget(self, slots: BackendSlots) -> None:
        """Undo `make`, nothing having been written since."""
        self._entries -= len(self._keys(slots, self._made.pop(slots.start).kind))
        self.stale |= self._inherited.pop(slots.start, set())

    def drop(self, slots: BackendSlots) -> None:
        """The set has no such rows any more; what may be in the map of them is stale."""
        made = self._made.pop(slots.start, None)
        if made is not None:
            keys = self._keys(slots, made.kind)
            self._entries -= len(keys)
            self.stale.update(keys)
            self.torn.pop(slots.start, None)

    def hold(self, start: int) -> None:
        """One more row needs those of the set from this slot."""
        self._made[start].refs += 1

    def release(self, start: int) -> None:
        """One row less needs those of the set from this slot."""
        made = self._made[start]
        made.refs -= 1
        if not made.refs:
            self._idle.add(start)

    def sweep(self, sets: Sets) -> None:
        """Drop what no row needs."""
        for start in self._idle:
            made = self._made.get(start)
            if made is not None and not made.refs:
                self.drop(sets[start])
        self._idle.clear()
        self._inherited.clear()

    def rows(self, slots: BackendSlots) -> dict[bytes, bytes]:
        """The rows of a set that has some, by key."""
        made = self._made[slots.start]
        rows = self._rows(slots, made.kind)
        if self._remember:
            made.sums = tuple(map(hash, rows))
        return dict(zip(self._keys(slots, made.kind), rows, strict=True))

    # ---- What the map holds

    def claim(self, start: int, kind: int) -> None:
        """A row that was read needs such rows of the set from this slot."""
        self._made.setdefault(start, Attachment(kind))

    def adopt(self, sets: Sets, found: Mapping[bytes, int]) -> None:
        """Compare what was claimed with the rows that were found: a sum of each, by key."""
        stale = set(found)
        for start in self._made:
            rows = self.rows(sets[start])
            self._entries += len(rows)
            stale.difference_update(rows)
            if any(found.get(key) != hash(row) for key, row in rows.items()):
                self.torn[start] = sets[start]
        self.stale = stale

    def shows(self, sets: Sets, found: Mapping[bytes, int]) -> bool:
        """Whether what was found, a sum of each row by key, is what should be there."""
        return self.tidy and len(found) == self._entries and all(found.get(key) == sum for key, sum in self._sums(sets))

    def _sums(self, sets: Sets) -> Iterator[tuple[bytes, int]]:
        for start, made in self._made.items():
            slots = sets[start]
            sums = made.sums or tuple(map(hash, self._rows(slots, made.kind)))
            yield from zip(self._keys(slots, made.kind), sums, strict=True)
