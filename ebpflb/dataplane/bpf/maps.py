"""The kernel's maps as this dataplane reads and writes them.

Rules of this file: rows are bytes, back to back; nothing here knows what they mean. A row that the kernel refuses is an
answer and not an exception, and never keeps the rows behind it from being written. Removing what is not there is
success. Only what makes reading impossible raises (OSError).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ebpflb.dataplane.bpf import map_calls
from ebpflb.dataplane.bpf.layouts import SIZES

# A refused row splits its batch; small batches keep the copying of what is left small.
_BATCH = 4096


class Maps(Protocol):
    """Maps by name, with rows of the sizes in `layouts.SIZES`."""

    @property
    def capacity(self) -> Mapping[str, int]:
        """Entries of each map."""

    def put(self, table: str, keys: bytes, values: bytes) -> Mapping[int, int]:
        """Set rows, in this order. What was refused, as errno by index; {} if nothing."""

    def remove(self, table: str, keys: bytes) -> Mapping[int, int]:
        """Remove rows, in this order. What was refused, as errno by index."""

    def read(self, table: str) -> tuple[bytes, bytes]:
        """All keys and values. Raises OSError."""

    def sums(self, table: str) -> dict[bytes, int]:
        """A sum of each row's value by its key, as `hash` makes it of bytes: for rows that are too large to be held
        just to be compared. Raises OSError."""

    def read_array(self, table: str, start: int, count: int) -> bytes:
        """The values of an array at `start` … `start + count`, fewer where it ends. Raises OSError."""


class KernelMaps:
    """Maps by their descriptors, which the caller keeps open."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        self._descriptors = descriptors
        self._infos = {table: map_calls.map_info(fd) for table, fd in descriptors.items()}

    @property
    def capacity(self) -> Mapping[str, int]:
        return {table: info.max_entries for table, info in self._infos.items()}

    def put(self, table: str, keys: bytes, values: bytes) -> Mapping[int, int]:
        fd = self._descriptors[table]
        width, size = SIZES[table]

        def update(at: int, end: int) -> None:
            map_calls.update_batch(fd, keys[at * width : end * width], values[at * size : end * size], end - at)

        return _in_batches(len(keys) // width, update)

    def remove(self, table: str, keys: bytes) -> Mapping[int, int]:
        fd = self._descriptors[table]
        width, _ = SIZES[table]

        def delete(at: int, end: int) -> None:
            map_calls.delete_batch(fd, keys[at * width : end * width], end - at)

        return _in_batches(len(keys) // width, delete)

    def read(self, table: str) -> tuple[bytes, bytes]:
        keys, values, _ = map_calls.lookup_all(self._descriptors[table], self._infos[table])
        return keys, values

    def sums(self, table: str) -> dict[bytes, int]:
        width, size = SIZES[table]
        found: dict[bytes, int] = {}
        for keys, values in map_calls.lookup_batches(self._descriptors[table], self._infos[table], _BATCH // 2):
            for at in range(len(keys) // width):
                found[bytes(keys[at * width : (at + 1) * width])] = hash(bytes(values[at * size : (at + 1) * size]))
        return found

    def read_array(self, table: str, start: int, count: int) -> bytes:
        return map_calls.lookup_range(self._descriptors[table], start, count, self._infos[table])[1]


def _in_batches(count: int, act: Callable[[int, int], None]) -> dict[int, int]:
    """Do `act(start, end)` to all rows 0 … `count`; what was refused, as errno by index."""
    refused: dict[int, int] = {}
    at = 0
    while at < count:
        end = min(count, at + _BATCH)
        try:
            act(at, end)
            at = end
        except map_calls.BatchError as error:
            at += error.done
            refused[at] = error.errno or 0
            at += 1
    return refused
