"""What is written of a set of backends beside its slots, as rows.

    tables    where consistent hashing finds a slot, cut into parts of one size, the last one padded
    members   where each backend is among the active slots, for clients that come again

Rules of this file: pure. Both are told by the set's first slot and hold positions among its active slots, so they say
nothing without them.
"""

from __future__ import annotations

from ebpflb.dataplane.bpf import maglev
from ebpflb.dataplane.bpf.layouts import MEMBER_KEY, TABLE_KEY, TABLE_PART, U32
from ebpflb.dataplane.bpf.records import BackendSlots
from ebpflb.routes import Backend

PART_BYTES = 2 * TABLE_PART

LARGEST = max(maglev.SIZES.values())
"""Positions of the largest table."""


def table_code(backends: tuple[Backend, ...], cap: int) -> int:
    """The size of the table that a route's backends want, with at most `cap` positions; 0 for none."""
    active = len([None for backend in backends if not backend.state])
    return maglev.size_code(active, cap) if active else 0


def table_size(code: int) -> int:
    """How many positions a table has; 0 for a size that there is not."""
    return maglev.SIZES.get(code, 0)


def part_count(code: int) -> int:
    """How many parts a table of that size has; 0 for a size that there is not."""
    return -(-table_size(code) // TABLE_PART)


def part_keys(slots: BackendSlots, code: int) -> list[bytes]:
    """The keys of the parts of a set's table of that size, in order."""
    return [TABLE_KEY.pack(slots.start, part) for part in range(part_count(code))]


def part_rows(slots: BackendSlots, code: int) -> list[bytes]:
    """The parts of a set's table of that size, in order."""
    positions = maglev.positions(slots.by_slot()[: slots.count], code)
    if len(positions) <= PART_BYTES:
        return [positions.ljust(PART_BYTES, b"\0")]
    return [positions[at : at + PART_BYTES].ljust(PART_BYTES, b"\0") for at in range(0, len(positions), PART_BYTES)]


def member_keys(slots: BackendSlots, _: int) -> list[bytes]:
    """The keys of a set's members, by slot."""
    start = U32.pack(slots.start)
    ids = slots.ids
    return [start + ids[at : at + 4] for at in range(0, slots.count * 4, 4)]


def member_rows(slots: BackendSlots, _: int) -> list[bytes]:
    """The rows of a set's members, by slot."""
    return list(map(U32.pack, range(slots.count)))


assert MEMBER_KEY.size == 2 * U32.size
