"""bpf(2) itself, typed: the call, its attributes, and what goes for objects of every kind: pins, ids, what one is.

Rules of this file: ctypes and the standard library only; nothing of what a call is used for. `map_calls` has one
function for each command on maps that we use, `program_calls` for programs and links, and all three keep to this: every
refusal of the kernel is an OSError with its errno; descriptors are plain ints which the caller closes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterator
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray

ENOTSUPP = 524
"""The kernel's internal "not supported", which batch commands let out; errno.h has no name for it."""

NAME = 16
"""Bytes of an object's name, with the zero that ends it."""

_NUMBERS = {"x86_64": 321, "aarch64": 280}
NUMBER = _NUMBERS.get(platform.machine(), -1)
"""The system call's own number; -1 where we do not know it."""

_OBJ_PIN, _OBJ_GET, _INFO = 6, 7, 15

_libc = ctypes.CDLL(None, use_errno=True)
invoke = _libc.syscall
"""syscall(2), called with NUMBER, a command, the address of its attributes and their size. Negative where the kernel
refuses, which `refusal` then tells."""
invoke.restype = ctypes.c_long
invoke.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]


def supported() -> bool:
    """Whether this machine's bpf(2) is known to us (x86_64, aarch64)."""
    return NUMBER > 0


def raise_memlock_limit() -> None:
    """Kernels before 5.11 charge maps to the locked-memory limit; lift it. No harm where it cannot be lifted."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        return


def reason(number: int) -> str:
    """What an errno says."""
    return "not supported" if number == ENOTSUPP else os.strerror(number)


def refusal() -> OSError:
    """The refusal of this thread's last call."""
    number = ctypes.get_errno()
    return OSError(number, reason(number))


def bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    """One command: what the kernel returns, a new descriptor for many. Raises OSError."""
    result: int = invoke(NUMBER, command, ctypes.addressof(attributes), len(attributes))
    if result < 0:
        raise refusal()
    return result


def bpf_attr(format: str, *values: int | bytes) -> ctypes.Array[ctypes.c_char]:
    """The bpf_attr of one command: `format` as struct's, without padding of its own."""
    packed = struct.pack("=" + format, *values)
    return ctypes.create_string_buffer(packed, len(packed))


def pointer(data: Buffer) -> int:
    """Address of the bytes, valid while `data` lives and is not resized."""
    if isinstance(data, bytearray):
        return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data)) if data else 0
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


def obj_pin(fd: int, path: str) -> None:
    """Pin a map, program or link; raises OSError(EEXIST) if the path is taken."""
    name = path.encode() + b"\0"
    bpf(_OBJ_PIN, bpf_attr("QII", pointer(name), fd, 0))


def obj_get(path: str) -> int:
    """Open what is pinned at `path`."""
    name = path.encode() + b"\0"
    return bpf(_OBJ_GET, bpf_attr("QII", pointer(name), 0, 0))


def object_info(fd: int, size: int, info: bytes = b"") -> bytes:
    """What the kernel says of a descriptor's object, `size` bytes of it; `info` is what it is asked with. Raises
    OSError(EINVAL) for a descriptor that is no BPF object."""
    buffer = ctypes.create_string_buffer(info, size)
    bpf(_INFO, bpf_attr("IIQ", fd, size, ctypes.addressof(buffer)))
    return buffer.raw


def name_of(field: bytes) -> str:
    """An object's name, as the kernel gives it."""
    return field.partition(b"\0")[0].decode(errors="replace")


def all_ids(next_id: int) -> Iterator[int]:
    """All ids that the command `next_id` leads through, one after the other."""
    current = 0
    while True:
        attributes = bpf_attr("III", current, 0, 0)
        try:
            bpf(next_id, attributes)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        current = struct.unpack_from("=I", attributes, 4)[0]
        yield current
