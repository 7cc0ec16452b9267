"""The maps `devices` and `vlans`: what the tc and XDP programs know of the devices that they run on.

Rules of this file: rows only; which device has which row is decided elsewhere. Only differences are written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ebpflb.dataplane.bpf import map_calls
from ebpflb.dataplane.bpf.artifact import Field, Layout
from ebpflb.dataplane.bpf.constants import DEVICE_CLSACT
from ebpflb.dataplane.bpf.layouts import REQUIRED, U32, VLAN_KEY, size_of


class Row(NamedTuple):
    """A row of `devices`: the addresses for masquerade (16 bytes, zero for none), DEVICE_… bits, the MTU in bytes from
    the IP header up, and the link-layer address (6 bytes)."""

    ipv4: bytes
    ipv6: bytes
    flags: int
    mtu: int = 0
    mac: bytes = bytes(6)

    @property
    def made(self) -> bool:
        """Whether we made the device's clsact."""
        return bool(self.flags & DEVICE_CLSACT)


def device_layout() -> Layout:
    """The layout of a `devices` row, which the pins are read by where nothing has been compiled."""
    members = []
    at = 0
    for name, width in REQUIRED["device"]:
        members.append(Field(name, at, width, 0, ""))
        at += width
    return Layout("device", size_of("device"), tuple(members))


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
        keys, values, count = map_calls.lookup_all(self._map)
        self._held = {
            index: self._unpack(values[at * self._size : (at + 1) * self._size])
            for at, index in enumerate(struct.unpack(f"={count}I", keys))
        }

    def _unpack(self, value: bytes) -> Row:
        ipv4, ipv6, flags, mtu, mac = self._at
        return Row(
            value[ipv4 : ipv4 + 16],
            value[ipv6 : ipv6 + 16],
            U32.unpack_from(value, flags)[0],
            U32.unpack_from(value, mtu)[0],
            value[mac : mac + 6],
        )

    def get(self, index: int) -> Row | None:
        return self._held.get(index)

    def put(self, index: int, row: Row) -> int:
        """Write the row if it differs; whether it did. Raises OSError."""
        if self._held.get(index) == row:
            return 0
        value = bytearray(self._size)
        fields = (row.ipv4, row.ipv6, U32.pack(row.flags), U32.pack(row.mtu), row.mac)
        for at, field in zip(self._at, fields, strict=True):
            value[at : at + len(field)] = field
        map_calls.update(self._map, U32.pack(index), bytes(value))
        self._held[index] = row
        return 1

    def keep_only(self, indexes: Iterable[int]) -> int:
        """Remove the rows of all other devices; how many."""
        gone = set(self._held) - set(indexes)
        for index in gone:
            map_calls.delete(self._map, U32.pack(index))
            del self._held[index]
        return len(gone)


class VlanRows:
    """The `vlans` map, with a copy so that only differences are written."""

    def __init__(self, map: int) -> None:
        self._map = map
        self._held: dict[tuple[int, int], int] = {}
        self.read()

    def read(self) -> None:
        """Take the copy from the kernel."""
        keys, values, _ = map_calls.lookup_all(self._map)
        self._held = {
            (parent, id): index
            for (parent, id), (index,) in zip(VLAN_KEY.iter_unpack(keys), U32.iter_unpack(values), strict=True)
        }

    def replace(self, wanted: Mapping[tuple[int, int], int]) -> int:
        """Make these the rows, (parent, id) -> device; how many were written or removed. Raises OSError."""
        changed = 0
        for key in set(self._held) - set(wanted):
            map_calls.delete(self._map, VLAN_KEY.pack(*key))
            del self._held[key]
            changed += 1
        for key, index in wanted.items():
            if self._held.get(key) != index:
                map_calls.update(self._map, VLAN_KEY.pack(*key), U32.pack(index))
                self._held[key] = index
                changed += 1
        return changed
