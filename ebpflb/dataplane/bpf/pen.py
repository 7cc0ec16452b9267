"""Writes rows to maps, and keeps count of what became of them.

Rules of this file: rows in, refusals out; what a row means, and when it is written, is its callers' business. A refusal
never keeps other rows from being written.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterable, Mapping

from ebpflb.dataplane import NODE, Report
from ebpflb.dataplane.bpf.image import Image
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.model import Problem


class Tally:
    """What a sync has done so far."""

    def __init__(self) -> None:
        self.written = 0
        self.removed = 0
        self.failed = 0
        self.problems: dict[Problem, None] = {}

    def refuse(self, subject: str, reason: str) -> None:
        self.failed += 1
        self.problems[Problem(subject, reason)] = None

    def report(self, seconds: float) -> Report:
        return Report(self.written, self.removed, self.failed, seconds, tuple(self.problems))


class Pen:
    """Writes to `maps`; `images` follow the writes to arrays."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self.images: dict[str, Image] = {}

    def put(self, table: str, rows: Mapping[bytes, bytes], tally: Tally) -> dict[bytes, int]:
        """The keys that were refused, with errno."""
        if not rows:
            return {}
        refused = self._maps.put(table, b"".join(rows), b"".join(rows.values()))
        tally.written += len(rows) - len(refused)
        if not refused:
            return {}
        keys = list(rows)
        return {keys[at]: error for at, error in refused.items()}

    def put_numbered(self, table: str, rows: Mapping[int, bytes], tally: Tally) -> dict[int, int]:
        """As `put`, for keys that are one u32."""
        if not rows:
            return {}
        return self.put_array(table, array("I", rows), b"".join(rows.values()), tally)

    def put_array(self, table: str, numbers: array[int], rows: bytes, tally: Tally) -> dict[int, int]:
        """As `put_numbered`, of rows that are back to back."""
        refused = self._maps.put(table, numbers.tobytes(), rows)
        image = self.images.get(table)
        if image is not None:
            if refused:
                image.doubt()
            else:
                image.put(numbers, rows)
        tally.written += len(numbers) - len(refused)
        return {numbers[at]: error for at, error in refused.items()} if refused else {}

    def remove(self, table: str, keys: Iterable[bytes], tally: Tally) -> dict[bytes, int]:
        """The keys that were refused, with errno."""
        listed = list(keys)
        if not listed:
            return {}
        refused = self._maps.remove(table, b"".join(listed))
        tally.removed += len(listed) - len(refused)
        return {listed[at]: error for at, error in refused.items()}

    def left(self, refused: Mapping[int, int] | Mapping[bytes, int], table: str, tally: Tally) -> None:
        """Say that these rows could not be removed."""
        for error in refused.values():
            tally.refuse(NODE, f"a row that is no longer needed stays: {self.words(table, error)}")

    def words(self, table: str, error: int) -> str:
        """Why a row was refused."""
        if error in (errno.E2BIG, errno.ENOSPC):
            return f"the map {table} is full ({self._maps.capacity[table]} entries)"
        return f"the kernel refused a row of the map {table}: {os.strerror(error)}"
