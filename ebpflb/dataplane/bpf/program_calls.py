"""bpf(2) on programs and on what attaches them: one function for each command that we use.

Rules of this file: those of `syscall`. What is attached without a link stays until it is detached, or until its target
goes; a link goes with its last descriptor or pin.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ebpflb.dataplane.bpf.syscall import NAME, all_ids, bpf, bpf_attr, name_of, object_info, pointer

F_REPLACE_PROGRAM = 4
"""link_update: only if the link still runs the program that the caller names; prog_attach: in place of that one."""
_F_BEFORE = 8
F_XDP_HAS_FRAGS = 1 << 5
"""prog_load: the XDP program takes frames that lie in several buffers (Linux 5.18)."""
TEST_LIVE_FRAMES = 1 << 1
"""Flag of `prog_test_run` for XDP (5.18): frames are really sent and passed up. Nothing comes back; `room` is 0."""

LINK_XDP = 6
"""`LinkInfo.type` of an XDP program's link."""

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _TEST_RUN, _PROG_NEXT_ID = 5, 8, 9, 10, 11
_PROG_BY_ID, _PROG_QUERY = 13, 16
_LINK_CREATE, _LINK_UPDATE, _LINK_BY_ID, _LINK_NEXT_ID, _LINK_DETACH = 28, 29, 30, 31, 34

_LOG_BYTES = 1 << 20


class ProgramInfo(NamedTuple):
    """What the kernel says of a program; `tag` is the hash of its instructions without map descriptors."""

    type: int
    id: int
    tag: str
    name: str
    map_ids: tuple[int, ...]
    instructions: int


class LinkInfo(NamedTuple):
    """What the kernel says of a link. Of a cgroup's: `cgroup` is its inode number, 0 once it is gone. Of an XDP link:
    `device` is the index of its device, in whatever network namespace that is; 0 once it is gone or detached."""

    type: int
    id: int
    program: int
    cgroup: int
    attach_type: int
    device: int = 0


class TestRun(NamedTuple):
    """What a program did with a test packet; `duration` is the mean of the repeats in nanoseconds."""

    verdict: int
    data: bytes
    context: bytes
    duration: int


class VerifierError(OSError):
    """The kernel refused a program; `log` is the verifier's reasoning."""

    def __init__(self, number: int, name: str, log: str) -> None:
        lines = [line for line in log.splitlines() if line and not line.startswith("processed ")]
        super().__init__(number, f"{name}: {os.strerror(number)}" + (f": {lines[-1]}" if lines else ""))
        self.log = log


def prog_load(
    type: int,
    code: bytes,
    name: str = "",
    attach_type: int = 0,
    license: str = "Dual BSD/GPL",
    verbose: bool = False,
    flags: int = 0,
) -> int:
    """Verify and load; `name` is cut to 15 characters. Raises VerifierError, with the verifier's log."""
    terms = license.encode() + b"\0"

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        return bpf(
            _PROG_LOAD,
            bpf_attr(
                "IIQQIIQII16sII",
                type,
                len(code) // 8,
                pointer(code),
                pointer(terms),
                1 if log else 0,
                len(log) if log else 0,
                ctypes.addressof(log) if log else 0,
                0,
                flags,
                name.encode()[: NAME - 1],
                0,
                attach_type,
            ),
        )

    for _ in range(5):
        try:
            return attempt(ctypes.create_string_buffer(_LOG_BYTES) if verbose else None)
        except OSError as error:
            # A signal that arrives while the verifier works makes it give up with EAGAIN.
            if error.errno != errno.EAGAIN:
                refused = error.errno or 0
                break
            refused = errno.EAGAIN
    # The log costs verification time, so it is asked for only when there is something to explain.
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return attempt(log)
    except OSError as error:
        raise VerifierError(error.errno or refused, name, log.value.decode(errors="replace")) from None


def prog_info(fd: int) -> ProgramInfo:
    """Raises OSError(EINVAL) for a descriptor that is no BPF object."""
    info = object_info(fd, 128)
    type_, id_, tag, _, translated = struct.unpack_from("=II8sII", info)
    (maps,) = struct.unpack_from("=I", info, 52)
    name = name_of(info[64:80])
    ids: tuple[int, ...] = ()
    if maps:
        room = ctypes.create_string_buffer(maps * 4)
        request = bytearray(128)
        struct.pack_into("=I", request, 52, maps)
        struct.pack_into("=Q", request, 56, ctypes.addressof(room))
        object_info(fd, 128, bytes(request))
        ids = struct.unpack(f"={maps}I", room.raw)
    return ProgramInfo(type_, id_, tag.hex(), name, ids, translated // 8)


def program_ids() -> Iterator[int]:
    """The ids of all programs of this machine."""
    return all_ids(_PROG_NEXT_ID)


def program_by_id(id: int) -> int:
    """A descriptor of the program; raises OSError(ENOENT) if it has gone."""
    return bpf(_PROG_BY_ID, bpf_attr("III", id, 0, 0))


def program_name(id: int) -> str:
    """The name of a program; "" if it has gone. Raises PermissionError to who may not ask."""
    try:
        fd = program_by_id(id)
    except FileNotFoundError:
        return ""
    try:
        return prog_info(fd).name
    finally:
        os.close(fd)


def prog_test_run(
    fd: int,
    data: bytes = b"",
    context: bytes = b"",
    repeat: int = 1,
    flags: int = 0,
    room: int | None = None,
) -> TestRun:
    """Run a tc or XDP program on `data` (at least 14 bytes). `room`: bytes for the packet after; default 256 more than
    before. Raises OSError(ENOTSUPP) for types that cannot be run so."""
    room = len(data) + 256 if room is None else room
    out = ctypes.create_string_buffer(max(room, 1))
    context_out = ctypes.create_string_buffer(max(len(context), 1))
    attributes = bpf_attr(
        "IIIIQQIIIIQQIII",
        fd,
        0,
        len(data),
        room,
        pointer(data) if data else 0,
        ctypes.addressof(out) if room else 0,
        repeat,
        0,
        len(context),
        0 if flags & TEST_LIVE_FRAMES else len(context),
        pointer(context) if context else 0,
        ctypes.addressof(context_out) if context and not flags & TEST_LIVE_FRAMES else 0,
        flags,
        0,
        0,
    )
    bpf(_TEST_RUN, attributes)
    verdict, _, written = struct.unpack_from("=III", attributes, 4)
    (duration,) = struct.unpack_from("=I", attributes, 36)
    return TestRun(verdict, out.raw[:written], context_out.raw[: len(context)], duration)


# ---- programs at devices (tcx, Linux 6.6) or at a cgroup, without a link


def prog_attach(program: int, device: int, attach_type: int, replaced: int | None = None) -> None:
    """Have a tc program run at a device, before all others, or in place of the program `replaced` in one step. `device`
    is an index in the calling thread's network namespace."""
    flags = _F_BEFORE if replaced is None else F_REPLACE_PROGRAM
    bpf(_PROG_ATTACH, bpf_attr("IIIII", device, program, attach_type, flags, replaced or 0))


def prog_detach(program: int, device: int, attach_type: int) -> None:
    """The reverse of `prog_attach`. Raises OSError(ENOENT) if the program does not run there."""
    bpf(_PROG_DETACH, bpf_attr("III", device, program, attach_type))


def prog_query(target: int, attach_type: int, effective: bool = False) -> tuple[int, tuple[int, ...]]:
    """(attach flags, program ids) at a cgroup's descriptor, or at a device by its index in the calling thread's network
    namespace, in the order in which they run; `effective` counts those of a cgroup's ancestors.

    Raises OSError: EINVAL where the kernel does not know the attach type."""
    room = 64
    while True:
        ids = ctypes.create_string_buffer(room * 4)
        # The last word is the revision (6.6), which the kernel writes whether or not it is told of room for it.
        attributes = bpf_attr(
            "IIIIQIIQQQQ", target, attach_type, int(effective), 0, ctypes.addressof(ids), room, 0, 0, 0, 0, 0
        )
        try:
            bpf(_PROG_QUERY, attributes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room *= 2
            continue
        (flags,) = struct.unpack_from("=I", attributes, 12)
        (count,) = struct.unpack_from("=I", attributes, 24)
        return flags, struct.unpack_from(f"={count}I", ids)


# ---- links


def link_create(program: int, target: int, attach_type: int, flags: int = 0) -> int:
    """Attach a program; gone with the link's last descriptor or pin. `target` is a cgroup's descriptor, beside whatever
    else is attached, or for XDP a device's index in the calling thread's network namespace, with `flags` XDP_FLAGS_….

    Raises OSError: EPERM where a program without ALLOW_MULTI is attached at or above the cgroup; EBUSY or EEXIST where
    the device runs another XDP program."""
    return bpf(_LINK_CREATE, bpf_attr("IIII", program, target, attach_type, flags))


def link_update(link: int, program: int, expected: int | None = None) -> None:
    """Replace the link's program at once; with `expected` only if it is that one."""
    flags = 0 if expected is None else F_REPLACE_PROGRAM
    bpf(_LINK_UPDATE, bpf_attr("IIII", link, program, flags, expected or 0))


def link_detach(link: int) -> None:
    """Detach at once, whoever else still holds the link. Raises OSError(EINVAL) before 5.9."""
    bpf(_LINK_DETACH, bpf_attr("I", link))


def link_info(fd: int) -> LinkInfo:
    """Raises OSError(EINVAL) for a descriptor that is no link."""
    info = object_info(fd, 64)
    type_, id_, program, _, cgroup, attach_type = struct.unpack_from("=IIIIQI", info)
    if type_ == LINK_XDP:
        return LinkInfo(type_, id_, program, 0, 0, struct.unpack_from("=I", info, 16)[0])
    return LinkInfo(type_, id_, program, cgroup, attach_type)


def link_ids() -> Iterator[int]:
    """The ids of all links of this machine."""
    return all_ids(_LINK_NEXT_ID)


def link_by_id(id: int) -> int:
    """A descriptor of the link; raises OSError(ENOENT) if it has gone."""
    return bpf(_LINK_BY_ID, bpf_attr("III", id, 0, 0))
