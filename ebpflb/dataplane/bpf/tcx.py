"""Our programs at a device's tcx hooks (Linux 6.6): no qdisc, no filter, and no packet lost while they come or go.

Rules of this file: a program is put before all others and replaced in one step. It stays with the device without a
pin, as a filter would, and goes with it. What bears our name is ours, and nothing else is ever touched. Our programs
end with TC_ACT_UNSPEC, which lets the next one run, and the device's filters after the last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import NamedTuple

from ebpflb.dataplane.bpf import program_calls, tc
from ebpflb.dataplane.bpf.constants import PREFIX
from ebpflb.dataplane.bpf.xdp_links import namespace

_ATTACH_TYPES = {tc.INGRESS: 46, tc.EGRESS: 47}
"""The kernel's BPF_TCX_… for each side."""

_LOOPBACK = 1


class Running(NamedTuple):
    """One of our programs at a device."""

    side: int
    id: int
    name: str


def supported() -> bool:
    """Whether this kernel has tcx."""
    try:
        program_calls.prog_query(_LOOPBACK, _ATTACH_TYPES[tc.INGRESS])
    except OSError:
        return False
    return True


def running(index: int) -> tuple[Running, ...]:
    """Our programs at a device of the calling thread's network namespace; () where the kernel has no tcx."""
    found = []
    for side, attach_type in _ATTACH_TYPES.items():
        try:
            _, programs = program_calls.prog_query(index, attach_type)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV):
                continue
            raise
        names = ((program, program_calls.program_name(program)) for program in programs)
        found += [Running(side, program, name) for program, name in names if name.startswith(PREFIX)]
    return tuple(found)


def release(index: int) -> int:
    """Detach all of ours from a device of the calling thread's network namespace; how many."""
    removed = 0
    for each in running(index):
        try:
            _detach(index, each)
        except FileNotFoundError:  # somebody else did, or the program has gone with it
            continue
        removed += 1
    return removed


def inventory(index: int, device: str) -> list[str]:
    """What `release` would remove, one line each."""
    sides = {tc.INGRESS: "ingress", tc.EGRESS: "egress"}
    return [f"tcx program {each.name} on {device} {sides[each.side]}" for each in running(index)]


class Tcx:
    """These programs on devices of the network namespace in which this was made. Every call is for the same thread's
    namespace: another's device may have the same index, and so OSError(EXDEV) is raised elsewhere."""

    def __init__(self, hooked: Iterable[tc.Hooked]) -> None:
        self._hooked = tuple(hooked)
        self._namespace = namespace()

    def keep(self, index: int) -> int:
        """Our programs on both sides, whatever was there; how many had to be attached. Raises OSError."""
        self._require_namespace()
        there = running(index)
        return sum(self._put(index, each, [old for old in there if old.side == each.side]) for each in self._hooked)

    def _put(self, index: int, hooked: tc.Hooked, mine: list[Running]) -> int:
        others = [each for each in mine if each.id != hooked.id]
        written = 0
        if len(others) == len(mine):
            older = others.pop(0) if others else None
            replaced = program_calls.program_by_id(older.id) if older is not None else None
            try:
                program_calls.prog_attach(hooked.program, index, _ATTACH_TYPES[hooked.side], replaced)
            finally:
                if replaced is not None:
                    os.close(replaced)
            written = 1
        for each in others:
            _detach(index, each)
        return written

    def release(self, index: int) -> int:
        """As the function of that name."""
        self._require_namespace()
        return release(index)

    def intact(self, indexes: Iterable[int]) -> bool:
        """Whether each of these devices runs our programs, or has gone. Costs two system calls for each."""
        self._require_namespace()
        for index in indexes:
            try:
                for each in self._hooked:
                    if each.id not in program_calls.prog_query(index, _ATTACH_TYPES[each.side])[1]:
                        return False
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
        return True

    def _require_namespace(self) -> None:
        if namespace() != self._namespace:
            raise OSError(errno.EXDEV, "this thread is in another network namespace")


def _detach(index: int, each: Running) -> None:
    program = program_calls.program_by_id(each.id)
    try:
        program_calls.prog_detach(program, index, _ATTACH_TYPES[each.side])
    finally:
        os.close(program)
