"""Reads the maps of routes.

Rules of this file: it reads, and understands nothing: that is `reading`'s business.
"""

from __future__ import annotations

import hashlib
from array import array

import msgspec

from ebpflb.dataplane.bpf.layouts import BACKEND
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.reading import RawTables, slots_end

_CHUNK = 4096


def read_tables(maps: Maps) -> RawTables:
    """All that routes are made of. Raises OSError."""
    frontends = maps.read("frontends")
    slots = maps.read_array("slots", 0, slots_end(frontends[1], maps.capacity["slots"]))
    return RawTables(
        frontends,
        slots,
        read_backends(maps),
        maps.read("names"),
        maps.read("ranges")[0],
        maps.read("sources"),
        maps.read_array("settings", 0, 1),
        maps.read("owned"),
    )


def read_all(maps: Maps) -> RawTables:
    """All maps that the control plane alone writes. Raises OSError."""
    tables, members = maps.sums("tables"), maps.sums("members")
    known = maps.read_array("known", 0, maps.capacity["known"])
    return msgspec.structs.replace(read_tables(maps), known=known, tables=tables, members=members)


def read_backends(maps: Maps) -> bytes:
    """The array as far as it was ever used: ids are given out from below, so nothing lies behind a chunk of zeros."""
    found = bytearray()
    while True:
        chunk = maps.read_array("backends", len(found) // BACKEND.size, _CHUNK)
        if not chunk.strip(b"\0"):
            return bytes(found)
        found += chunk


def digest_of(raw: RawTables) -> bytes:
    """Names the bytes, within this process."""
    found = hashlib.blake2b(digest_size=16)
    parts = (*raw.frontends, raw.slots, raw.backends, *raw.names, raw.ranges, *raw.sources, raw.settings, *raw.owned)
    sums = array("q", (*raw.tables.values(), *raw.members.values())).tobytes()
    for part in (*parts, raw.known, b"".join(raw.tables), b"".join(raw.members), sums):
        found.update(len(part).to_bytes(8))
        found.update(part)
    return found.digest()
