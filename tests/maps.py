"""Maps without a kernel: one that behaves, one that fails, and one that looks at every write.

Rules of this file: each fulfils `ebpflb.dataplane.bpf.maps.Maps` and nothing more; what a kernel map would refuse (a
full hash, a missing array cell) these refuse too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from ebpflb.dataplane.bpf.layouts import KNOWN_CELLS, SIZES, U32
from ebpflb.dataplane.bpf.maps import Maps

ARRAYS = ("slots", "backends", "settings", "known")
TABLES = (
    "frontends",
    "slots",
    "backends",
    "names",
    "sources",
    "ranges",
    "owned",
    "known",
    "tables",
    "members",
    "settings",
    "flows",
    "affinity",
    "traffic",
)

CAPACITY = {
    "frontends": 1000,
    "slots": 4000,
    "backends": 2000,
    "names": 1000,
    "sources": 200,
    "ranges": 200,
    "owned": 200,
    "known": KNOWN_CELLS,
    "tables": 2000,
    "members": 2000,
    "settings": 1,
    "flows": 100,
    "affinity": 100,
    "traffic": 100,
}


class FakeMaps:
    """Dictionaries with the sizes of maps. `writes` counts rows put or removed."""

    def __init__(self, capacity: Mapping[str, int] | None = None) -> None:
        self.capacity: dict[str, int] = {**CAPACITY, **(capacity or {})}
        self.tables: dict[str, dict[bytes, bytes]] = {table: {} for table in TABLES}
        self.writes = 0

    def put(self, table: str, keys: bytes, values: bytes) -> Mapping[int, int]:
        rows = self.tables[table]
        width, size = SIZES[table]
        assert len(keys) % width == 0 and len(values) == len(keys) // width * size
        refused = {}
        for at in range(len(keys) // width):
            key, value = keys[at * width : (at + 1) * width], values[at * size : (at + 1) * size]
            if table in ARRAYS and U32.unpack(key)[0] >= self.capacity[table]:
                refused[at] = errno.E2BIG
            elif table not in ARRAYS and key not in rows and len(rows) >= self.capacity[table]:
                refused[at] = errno.ENOSPC if table in ("sources", "ranges") else errno.E2BIG
            else:
                self.writes += 1
                self.row(table, key, value)
        return refused

    def remove(self, table: str, keys: bytes) -> Mapping[int, int]:
        assert table not in ARRAYS
        width, _ = SIZES[table]
        for at in range(len(keys) // width):
            self.writes += 1
            self.row(table, keys[at * width : (at + 1) * width], None)
        return {}

    def row(self, table: str, key: bytes, value: bytes | None) -> None:
        """One row is written, or removed with None."""
        if value is None:
            self.tables[table].pop(key, None)
        else:
            self.tables[table][key] = value

    def read(self, table: str) -> tuple[bytes, bytes]:
        rows = self.tables[table]
        return b"".join(rows), b"".join(rows.values())

    def sums(self, table: str) -> dict[bytes, int]:
        return {key: hash(value) for key, value in self.tables[table].items()}

    def read_array(self, table: str, start: int, count: int) -> bytes:
        rows, empty = self.tables[table], bytes(SIZES[table][1])
        end = min(start + count, self.capacity[table])
        return b"".join(rows.get(U32.pack(at), empty) for at in range(start, end))


class WatchedMaps(FakeMaps):
    """Calls `look` after every single row."""

    def __init__(self, look: Callable[[FakeMaps], None], capacity: Mapping[str, int] | None = None) -> None:
        super().__init__(capacity)
        self.look = look

    def row(self, table: str, key: bytes, value: bytes | None) -> None:
        super().row(table, key, value)
        self.look(self)


class FaultyMaps:
    """Lets `fails` decide, for each call and then for each row, whether the kernel refuses: an errno, or 0."""

    def __init__(self, maps: Maps, fails: Callable[[], int]) -> None:
        self.maps = maps
        self.fails = fails

    @property
    def capacity(self) -> Mapping[str, int]:
        return self.maps.capacity

    def put(self, table: str, keys: bytes, values: bytes) -> Mapping[int, int]:
        width, size = SIZES[table]

        def write(at: int) -> Mapping[int, int]:
            return self.maps.put(table, keys[at * width : (at + 1) * width], values[at * size : (at + 1) * size])

        return self._each(len(keys) // width, write)

    def remove(self, table: str, keys: bytes) -> Mapping[int, int]:
        width, _ = SIZES[table]
        return self._each(len(keys) // width, lambda at: self.maps.remove(table, keys[at * width : (at + 1) * width]))

    def _each(self, count: int, write: Callable[[int], Mapping[int, int]]) -> Mapping[int, int]:
        whole = self.fails()
        if whole:
            return dict.fromkeys(range(count), whole)
        refused: dict[int, int] = {}
        for at in range(count):
            error = self.fails() or write(at).get(0, 0)
            if error:
                refused[at] = error
        return refused

    def read(self, table: str) -> tuple[bytes, bytes]:
        self._maybe()
        return self.maps.read(table)

    def sums(self, table: str) -> dict[bytes, int]:
        self._maybe()
        return self.maps.sums(table)

    def read_array(self, table: str, start: int, count: int) -> bytes:
        self._maybe()
        return self.maps.read_array(table, start, count)

    def _maybe(self) -> None:
        error = self.fails()
        if error:
            raise OSError(error, "injected")
