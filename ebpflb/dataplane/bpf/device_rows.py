"""The `devices` map: what the tc programs know of the device that they run on.

Rules of this file: rows only; which device has which row is decided elsewhere. Only differences are written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from ebpflb.dataplane.bpf import syscall
from ebpflb.dataplane.bpf.artifact import Layout
from ebpflb.dataplane.bpf.constants import DEVICE_CLSACT


class Row(NamedTuple):
    """A row of `devices`: the addresses for masquerade (16 bytes, zero for none), and DEVICE_… bits."""

    ipv4: bytes
    ipv6: bytes
    flags: int

    @property
    def made(self) -> bool:
        """Whether we made the device's clsact."""
        return bool(self.flags & DEVICE_CLSACT)


class Rows:
    """The `devices` map, with a copy so that only differences are written."""

    def __init__(self, map: int, layout: Layout) -> None:
        self._map = map
        self._size = layout.size
        self._at = tuple(layout.field(name).offset for name in Row._fields)
        self._held: dict[int, Row] = {}
        self.read()

    def read(self) -> None:
        """Take the copy from the kernel."""
        keys, values, count = syscall.lookup_all(self._map)
        self._held = {
            index: self._unpack(values[at * self._size : (at + 1) * self._size])
            for at, index in enumerate(struct.unpack(f"={count}I", keys))
        }

    def _unpack(self, value: bytes) -> Row:
        ipv4, ipv6, flags = self._at
        return Row(value[ipv4 : ipv4 + 16], value[ipv6 : ipv6 + 16], struct.unpack_from("=I", value, flags)[0])

    def get(self, index: int) -> Row | None:
        return self._held.get(index)

    def put(self, index: int, row: Row) -> int:
        """Write the row if it differs; whether it did. Raises OSError."""
        if self._held.get(index) == row:
            return 0
        value = bytearray(self._size)
        for at, field in zip(self._at, (row.ipv4, row.ipv6, struct.pack("=I", row.flags)), strict=True):
            value[at : at + len(field)] = field
        syscall.update(self._map, struct.pack("=I", index), bytes(value))
        self._held[index] = row
        return 1

    def keep_only(self, indexes: Iterable[int]) -> int:
        """Remove the rows of all other devices; how many."""
        gone = set(self._held) - set(indexes)
        for index in gone:
            syscall.delete(self._map, struct.pack("=I", index))
            del self._held[index]
        return len(gone)
