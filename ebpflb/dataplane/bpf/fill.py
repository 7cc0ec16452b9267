"""How many rows each map holds, and has room for: for `status` and for metrics.

Rules of this file: it reads and never writes. It is asked while changes wait, and there may be a hundred thousand rows:
none is looked at more closely than its number takes.
"""

from __future__ import annotations

import struct
from collections.abc import Set as AbstractSet

from ebpflb.dataplane.bpf.constants import BACKEND_FREE
from ebpflb.dataplane.bpf.layouts import BACKEND, KEY_VALUE, ROUTE_REFERENCES, SIZES
from ebpflb.dataplane.bpf.looking import read_backends
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.table_parts import part_count
from ebpflb.dataplane.items import Item

# Of a backend its state and service.
_BACKEND_USE = struct.Struct(f"={BACKEND.size - 8}xB3xI")

# Their rows are always there, or are told from the routes.
_NOT_COUNTED = ("slots", "backends", "known", "marks", "counters", "settings", "tables", "members")


def fill_items(maps: Maps) -> list[Item]:
    """One item per map, by name. Raises OSError."""
    entries: dict[str, int] = {}
    for table in KEY_VALUE:
        if table not in _NOT_COUNTED:
            keys, values = maps.read(table)
            entries[table] = len(keys) // SIZES[table][0]
            if table == "frontends":
                entries |= _of_sets(set(ROUTE_REFERENCES.iter_unpack(values)))
    uses = _BACKEND_USE.iter_unpack(read_backends(maps))
    entries["backends"] = len([None for state, service in uses if service and state != BACKEND_FREE])
    return [
        {"name": table, "entries": number, "max": maps.capacity[table]} for table, number in sorted(entries.items())
    ]


def _of_sets(routes: AbstractSet[tuple[int, ...]]) -> dict[str, int]:
    """How many rows there are of sets of backends, by what the routes refer to."""
    sets = {start: count + draining for _, start, count, draining, *_ in routes if count + draining}
    tables = {start: table for _, start, *_, table in routes if table}
    members = {start: count for _, start, count, _, affinity, *_ in routes if affinity}
    return {
        "slots": sum(sets.values()),
        "tables": sum(map(part_count, tables.values())),
        "members": sum(members.values()),
    }
