"""Any row of `bpf/maps.h` field by field, under the names that it has there: for `dump raw`.

Rules of this file: pure. It goes by the layouts alone and knows no row's meaning: addresses and names become text,
ports are in host order, what is wider than any number is hexadecimal, and padding is left out.
"""

from __future__ import annotations

from array import array

from ebpflb.dataplane.bpf.layouts import REQUIRED, rows_of, size_of
from ebpflb.dataplane.bpf.tables import unpack_address


def fields(type: str, row: bytes) -> object:
    """A key or value of that C type as {field: value}, or as a number where it is one."""
    if type not in REQUIRED:
        return int.from_bytes(row, "little")
    if type == "address":
        return unpack_address(row)
    found: dict[str, object] = {}
    at = 0
    for name, width in REQUIRED[type]:
        part = row[at : at + width]
        at += width
        if not name.startswith("pad") and not name.endswith("_pad"):
            found[name] = _field(type, name, part)
    return found


def _field(type: str, name: str, part: bytes) -> object:
    if type == "frontend":
        return [fields("route", half) for half in rows_of(part, size_of("route"))]
    if type in ("name", "owner") or name == "pod_interface":
        return part.partition(b"\0")[0].decode(errors="replace")
    if type == "table_part":
        return list(array("H", part))
    if len(part) == 16:
        return unpack_address(part)
    if name == "mac":
        return part.hex(":")
    if len(part) > 8:
        return part.hex()
    if len(part) == 2 and name.endswith("port"):
        return int.from_bytes(part, "big")
    return int.from_bytes(part, "little")
