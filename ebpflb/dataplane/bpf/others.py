"""Programs of another ebpflb where ours run: whose they are, and how its socket programs end.

Rules of this file: it knows nothing of our own programs but the maps that they share; what bears our name over other
maps is another's. A network namespace has one daemon at a time (`control`), so that another's programs of the same
namespace are what a daemon with another --bpffs left behind: ours succeed them. Those of another namespace are nobody's
to end.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

from ebpflb.dataplane.bpf import map_calls, pins, program_calls
from ebpflb.dataplane.bpf.constants import PREFIX
from ebpflb.dataplane.bpf.facts import filesystem_of
from ebpflb.errors import EbpflbError


class Other(NamedTuple):
    """A program of another ebpflb, by its id. `netns` is the cookie of that one's network namespace, 0 if nothing tells
    it; `bpffs` is its pin directory, None if there is none to be seen from here."""

    id: int
    netns: int
    bpffs: Path | None


def among(programs: Iterable[tuple[str, int]], maps: AbstractSet[int], near: Path) -> tuple[Other, ...]:
    """Those of `programs`, each a C function and an id, that are another ebpflb's than the one of these `maps`; pins
    are looked for in the BPF file system of `near`. Costs little where there is none. Raises OSError."""
    found: list[tuple[str, int, tuple[int, ...]]] = []
    for function, number in programs:
        try:
            fd = program_calls.program_by_id(number)
        except FileNotFoundError:
            continue  # it has gone meanwhile
        try:
            info = program_calls.prog_info(fd)
        finally:
            os.close(fd)
        if info.name.startswith(PREFIX) and maps.isdisjoint(info.map_ids):
            found.append((function, number, info.map_ids))
    owners: dict[int, int] = {}
    for _, _, theirs in found:
        if owner := _owner(theirs):
            owners |= dict.fromkeys(theirs, owner)
    others = []
    for function, number, theirs in found:
        # Not every program has the map that tells, but they have others in common.
        netns = next((owners[each] for each in theirs if each in owners), 0)
        others.append(Other(number, netns, pinned(number, function, near)))
    return tuple(others)


def pinned(program: int, function: str, near: Path) -> Path | None:
    """The pin directory in which a program is, in the BPF file system that `near` is on."""
    for directory, inside, _ in os.walk(filesystem_of(near).directory):
        if pins.PROGRAMS not in inside:
            continue
        with contextlib.suppress(EbpflbError, OSError):  # unreadable, or another's idea of a directory of programs
            fd = pins.opened(Path(directory) / pins.PROGRAMS / function)
            if fd is None:
                continue
            try:
                if program_calls.prog_info(fd).id == program:
                    return Path(directory)
            finally:
                os.close(fd)
    return None


def described(others: Iterable[Other]) -> str:
    """Whose they are, for an operator."""
    directories = sorted({str(other.bpffs) for other in others if other.bpffs is not None})
    return f"the ebpflb with --bpffs {' and '.join(directories)}" if directories else "an ebpflb that has no pins here"


def end(cgroup: int, others: Iterable[Other]) -> int:
    """Detach these from the cgroup of that inode number; how many links there were. Raises OSError."""
    programs = {other.id for other in others}
    ended = 0
    for number in program_calls.link_ids():
        try:
            fd = program_calls.link_by_id(number)
        except FileNotFoundError:
            continue
        try:
            info = program_calls.link_info(fd)
            if info.cgroup == cgroup and info.program in programs:
                program_calls.link_detach(fd)
                ended += 1
        finally:
            os.close(fd)
    return ended


def _owner(maps: Iterable[int]) -> int:
    """The network namespace that the `settings` among these maps tell of; 0 without them."""
    for number in maps:
        try:
            fd = map_calls.map_by_id(number)
        except FileNotFoundError:
            continue
        try:
            info = map_calls.map_info(fd)
            # Of all versions of the row, the owner is at the same place.
            if info.name == f"{PREFIX}settings" and info.value_size >= 8:
                row = map_calls.lookup(fd, bytes(info.key_size), info.value_size) or bytes(8)
                (owner,) = struct.unpack_from("=Q", row)
                return int(owner)
        finally:
            os.close(fd)
    return 0
