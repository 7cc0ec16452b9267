"""The difference of two tables, as the writes that turn one into the other.

Rules of this file: pure, and knows nothing of what the rows mean. Additions come first, then changes, then removals, so
that whoever applies a delta in its own order never takes away before it has given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import msgspec

K = TypeVar("K")
V = TypeVar("V")


class Delta(msgspec.Struct, Generic[K, V], frozen=True):
    """What `want` has that `have` lacks (`added`), what it has otherwise (`changed`, the wanted value), and what only
    `have` has (`removed`). Empty deltas are false."""

    added: dict[K, V]
    changed: dict[K, V]
    removed: tuple[K, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __len__(self) -> int:
        """How many rows it touches."""
        return len(self.added) + len(self.changed) + len(self.removed)

    def writes(self) -> Iterator[tuple[K, V | None]]:
        """All writes in the order of this file's rules; None removes."""
        yield from self.added.items()
        yield from self.changed.items()
        for key in self.removed:
            yield key, None

    @property
    def put(self) -> dict[K, V]:
        """Additions and changes."""
        return {**self.added, **self.changed}


def diff(want: Mapping[K, V], have: Mapping[K, V]) -> Delta[K, V]:
    """The smallest delta with `apply(diff(want, have), have) == want`."""
    added: dict[K, V] = {}
    changed: dict[K, V] = {}
    for key, value in want.items():
        if key not in have:
            added[key] = value
        elif have[key] != value:
            changed[key] = value
    return Delta(added, changed, tuple(key for key in have if key not in want))


def apply(delta: Delta[K, V], have: Mapping[K, V]) -> dict[K, V]:
    """`have` after all of `delta`'s writes."""
    after = dict(have)
    for key, value in delta.writes():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = value
    return after
