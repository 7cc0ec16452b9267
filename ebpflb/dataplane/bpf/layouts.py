"""How the rows of `bpf/maps.h` are laid out, as far as Python packs and unpacks them; many of them are back to back.

Rules of this file: pure. `bpf/maps.h` defines the rows; REQUIRED repeats the names and sizes that are needed, and
`check_layouts` refuses what the compiler laid out in any other way, before a row is written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from ebpflb.errors import Unsupported

LAYOUT = 2
"""The version of `bpf/maps.h` that this file speaks."""

REQUIRED: dict[str, tuple[tuple[str, int], ...]] = {
    "frontend_key": (("address", 16), ("port", 2), ("protocol", 1), ("pad", 1)),
    "frontend": (("scope", 64),),
    "route": (
        ("verdict", 1),
        ("masquerade", 1),
        ("algorithm", 1),
        ("forwarding", 1),
        ("service", 4),
        ("slots", 4),
        ("count", 4),
        ("draining", 4),
        ("affinity", 4),
        ("ranges", 4),
        ("kind", 1),
        ("table", 1),
        ("pad", 2),
    ),
    "backend": (("address", 16), ("port", 2), ("weight", 2), ("state", 1), ("pad", 3), ("service", 4)),
    "name": (("namespace", 64), ("name", 64), ("port", 64)),
    "source_key": (("prefix", 4), ("address", 16)),
    "source": (("flags", 4),),
    "range_key": (("prefix", 4), ("ranges", 4), ("address", 16)),
    "mark": (("set", 8),),
    "device": (("ipv4", 16), ("ipv6", 16), ("flags", 4), ("mtu", 4), ("mac", 6), ("pad", 2)),
    "address": (("word", 16),),
    "owner": (("namespace", 64), ("name", 64)),
    "known": (("bits", 8),),
    "table_key": (("slots", 4), ("part", 4)),
    "table_part": (("position", 2048),),
    "member_key": (("slots", 4), ("backend", 4)),
    "vlan_key": (("device", 4), ("id", 2), ("pad", 2)),
    "affinity_key": (("client", 16), ("service", 4), ("kind", 1), ("pad", 3)),
    "affinity": (("backend", 4), ("position", 4), ("seen", 8)),
    "settings": (
        ("netns", 8),
        ("flow_idle", 8),
        ("refresh", 8),
        ("layout", 4),
        ("pod_sockets", 4),
        ("snat_low", 2),
        ("snat_high", 2),
        ("second", 4),
        ("pod_interface", 16),
        ("pod_interface_is_prefix", 1),
        ("flows_elsewhere", 1),
        ("retired", 1),
        ("pad", 1),
        ("by_stack", 4),
    ),
    "flow_key": (
        ("source", 16),
        ("destination", 16),
        ("source_port", 2),
        ("destination_port", 2),
        ("protocol", 1),
        ("hook", 1),
        ("pad", 2),
    ),
    "flow": (
        ("address", 16),
        ("port", 2),
        ("other_port", 2),
        ("action", 1),
        ("flags", 1),
        ("pad", 2),
        ("service", 4),
        ("backend", 4),
        ("seen", 8),
        ("created", 8),
        ("beyond", 16),
        ("beyond_port", 2),
        ("client_port", 2),
        ("way", 32),
        ("way_pad", 4),
    ),
    "fragment_key": (("source", 16), ("destination", 16), ("id", 4), ("protocol", 1), ("hook", 1), ("pad", 2)),
    "fragment": (("source_port", 2), ("destination_port", 2)),
    "socket_key": (("cookie", 8), ("address", 16), ("port", 2), ("protocol", 1), ("direction", 1), ("pad", 4)),
    "socket_value": (
        ("address", 16),
        ("port", 2),
        ("pad", 2),
        ("service", 4),
        ("backend", 4),
        ("pad2", 4),
        ("seen", 8),
    ),
    "traffic": (("connections", 8), ("packets", 8), ("bytes", 8)),
}
"""The members of each row in order, with their sizes in bytes; no gaps."""

KEY_VALUE: dict[str, tuple[str, str]] = {
    "frontends": ("frontend_key", "frontend"),
    "slots": ("u32", "u32"),
    "backends": ("u32", "backend"),
    "names": ("u32", "name"),
    "sources": ("source_key", "source"),
    "ranges": ("range_key", "u32"),
    "owned": ("address", "owner"),
    "known": ("u32", "known"),
    "tables": ("table_key", "table_part"),
    "members": ("member_key", "u32"),
    "devices": ("u32", "device"),
    "vlans": ("vlan_key", "u32"),
    "settings": ("u32", "settings"),
    "flows": ("flow_key", "flow"),
    "fragments": ("fragment_key", "fragment"),
    "sockets": ("socket_key", "socket_value"),
    "affinity": ("affinity_key", "affinity"),
    "marks": ("u32", "mark"),
    "counters": ("u32", "u64"),
    "traffic": ("u32", "traffic"),
}
"""The maps that this dataplane's control plane reads or writes, with the types of their rows."""

FRONTEND_KEY = struct.Struct("=16sHBx")
ROUTE = struct.Struct("=BBBBIIIIIIBB2x")
ROUTE_REFERENCES = struct.Struct("=4xIIIIIIxB2x")
"""Of a route, what other rows hang on: (service, slots, count, draining, affinity, ranges, table)."""
BACKEND = struct.Struct("=16sHHB3xI")
NAME = struct.Struct("=64s64s64s")
SOURCE_KEY = struct.Struct("=I16s")
RANGE_KEY = struct.Struct("=II16s")
SETTINGS = struct.Struct("=QQQIIHHI16sBBBxI")
FLOW_KEY = struct.Struct("=16s16sHHBBH")
FLOW = struct.Struct("=16sHHBBHIIQQ16sHH36x")
SOCKET_KEY = struct.Struct("=Q16sHBB4x")
SOCKET_VALUE = struct.Struct("=16sH2xII4xQ")
OWNER = struct.Struct("=64s64s")
TABLE_KEY = struct.Struct("=II")
MEMBER_KEY = struct.Struct("=II")
VLAN_KEY = struct.Struct("=IHxx")
AFFINITY_KEY = struct.Struct("=16sIB3x")
AFFINITY = struct.Struct("=IIQ")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")

KNOWN_CELLS = 16384
TABLE_PART = 1024
CLIENT_ADDRESS, CLIENT_NETNS = 0, 1
"""The values of bpf/maps.h."""

_PLAIN = {"u32": 4, "u64": 8}


def size_of(name: str) -> int:
    """Bytes of a row's type."""
    return _PLAIN[name] if name in _PLAIN else sum(width for _, width in REQUIRED[name])


SIZES: dict[str, tuple[int, int]] = {table: (size_of(key), size_of(value)) for table, (key, value) in KEY_VALUE.items()}
"""Bytes of each map's key and value."""


def rows_of(data: bytes, size: int) -> Iterator[bytes]:
    """Rows of that size which are back to back."""
    return (row for (row,) in struct.iter_unpack(f"{size}s", data))


def entries(table: str, keys: bytes, values: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A map's rows, one by one."""
    width, size = SIZES[table]
    return zip(rows_of(keys, width), rows_of(values, size), strict=True)


class FieldShape(Protocol):
    """A member, as `artifact.Field` describes it."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def fields(self) -> Sequence[FieldShape]: ...


class LayoutShape(Protocol):
    """A row, as `artifact.Layout` describes it."""

    @property
    def size(self) -> int: ...
    @property
    def fields(self) -> Sequence[FieldShape]: ...


class MapShape(Protocol):
    """A map, as `artifact.MapSpec` describes it."""

    @property
    def max_entries(self) -> int: ...
    @property
    def key(self) -> LayoutShape: ...
    @property
    def value(self) -> LayoutShape: ...


def check_layouts(maps: Mapping[str, MapShape]) -> None:
    """Raise Unsupported, in words, unless the compiler laid out every row as REQUIRED says."""
    for table, types in KEY_VALUE.items():
        if table not in maps:
            raise Unsupported(f"the compiled programs have no map {table}: reinstall ebpflb, its parts do not fit")
        for name, layout in zip(types, (maps[table].key, maps[table].value), strict=True):
            _check(table, name, layout.size, layout.fields)


def _check(table: str, name: str, size: int, fields: Sequence[FieldShape]) -> None:
    required = REQUIRED.get(name)
    expected: list[tuple[str, int, int]] = []
    found: list[tuple[str, int, int]] = []
    total = size_of(name)
    if required is not None:
        at = 0
        for member, width in required:
            expected.append((member, at, width))
            at += width
        found = [(field.name, field.offset, field.bytes) for field in fields]
    if found != expected or size != total:
        wrong = next((have for have in found if have not in expected), None) or f"{size} bytes"
        raise Unsupported(
            f"map {table}: struct {name} is laid out as {wrong}, not as this version writes it: reinstall ebpflb"
        )
    if name == "frontend":
        _check(table, "route", ROUTE.size, fields[0].fields)
