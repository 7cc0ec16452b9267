"""bpf(2), typed: one function for each command that we use, and nothing of what it is used for.

Rules of this file: ctypes and the standard library only. Every refusal of the kernel is an OSError with its errno;
descriptors are plain ints which the caller closes. Keys and values are bytes in the kernel's layout; many of them are
one contiguous buffer. A map type without batch commands is served one by one, at the same interface.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | bytearray

ENOTSUPP = 524
"""The kernel's internal "not supported", which batch commands let out; errno.h has no name for it."""

MAP_HASH = 1
MAP_ARRAY = 2
MAP_PERCPU_HASH = 5
MAP_PERCPU_ARRAY = 6
MAP_LRU_HASH = 9
MAP_LRU_PERCPU_HASH = 10
MAP_LPM_TRIE = 11

ANY = 0
NOEXIST = 1
EXIST = 2
F_NO_PREALLOC = 1
F_REPLACE_PROGRAM = 4
"""link_update: only if the link still runs the program that the caller names; prog_attach: in place of that one."""
_F_BEFORE = 8
F_XDP_HAS_FRAGS = 1 << 5
"""prog_load: the XDP program takes frames that lie in several buffers (Linux 5.18)."""

LINK_XDP = 6
"""`LinkInfo.type` of an XDP program's link."""

_NUMBERS = {"x86_64": 321, "aarch64": 280}
_NUMBER = _NUMBERS.get(platform.machine(), -1)
_PERCPU = (MAP_PERCPU_HASH, MAP_PERCPU_ARRAY, MAP_LRU_PERCPU_HASH)
_ARRAYS = (MAP_ARRAY, MAP_PERCPU_ARRAY)

_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PROG_LOAD, _OBJ_PIN, _OBJ_GET = range(8)
_PROG_ATTACH, _PROG_DETACH = 8, 9
_TEST_RUN, _PROG_NEXT_ID, _MAP_NEXT_ID, _PROG_BY_ID, _MAP_BY_ID, _INFO, _PROG_QUERY = range(10, 17)
_LOOKUP_BATCH, _, _UPDATE_BATCH, _DELETE_BATCH, _LINK_CREATE, _LINK_UPDATE, _LINK_BY_ID = range(24, 31)
_LINK_NEXT_ID = 31
_LINK_DETACH = 34

_LOG_BYTES = 1 << 20
_NAME = 16

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]


class MapInfo(NamedTuple):
    """What the kernel says of a map; sizes in bytes. A per-CPU value is `value_size` for each possible CPU."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


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


class BatchError(OSError):
    """A batch stopped early; its first `done` entries are in force."""

    def __init__(self, number: int, done: int) -> None:
        super().__init__(number, os.strerror(number) if number != ENOTSUPP else "not supported")
        self.done = done


class VerifierError(OSError):
    """The kernel refused a program; `log` is the verifier's reasoning."""

    def __init__(self, number: int, name: str, log: str) -> None:
        lines = [line for line in log.splitlines() if line and not line.startswith("processed ")]
        super().__init__(number, f"{name}: {os.strerror(number)}" + (f": {lines[-1]}" if lines else ""))
        self.log = log


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    result: int = _syscall(_NUMBER, command, ctypes.addressof(attributes), len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, "not supported" if number == ENOTSUPP else os.strerror(number))
    return result


def _attributes(format: str, *values: int | bytes) -> ctypes.Array[ctypes.c_char]:
    """The bpf_attr of one command: `format` as struct's, without padding of its own."""
    packed = struct.pack("=" + format, *values)
    return ctypes.create_string_buffer(packed, len(packed))


def _pointer(data: Buffer) -> int:
    """Address of the bytes, valid while `data` lives and is not resized."""
    if isinstance(data, bytearray):
        return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data)) if data else 0
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


def supported() -> bool:
    """Whether this machine's bpf(2) is known to us (x86_64, aarch64)."""
    return _NUMBER > 0


def raise_memlock_limit() -> None:
    """Kernels before 5.11 charge maps to the locked-memory limit; lift it. No harm where it cannot be lifted."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        return


# ---- maps


def map_create(type: int, key_size: int, value_size: int, max_entries: int, flags: int = 0, name: str = "") -> int:
    """A new map; `name` is cut to 15 characters."""
    attributes = _attributes(
        "IIIIIII16s", type, key_size, value_size, max_entries, flags, 0, 0, name.encode()[: _NAME - 1]
    )
    return _bpf(_MAP_CREATE, attributes)


def map_info(fd: int) -> MapInfo:
    """Raises OSError(EINVAL) for a descriptor that is no BPF object."""
    info = _info(fd, 80)
    type_, id_, key, value, entries, flags, name = struct.unpack_from("=IIIIII16s", info)
    return MapInfo(type_, id_, key, value, entries, flags, _text(name))


class _Element(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_char_p),
        ("value", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


class _ElementIn(ctypes.Structure):
    """As _Element, with the value given by bytes: half the cost of asking for an address first."""

    _fields_ = (
        ("map", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_char_p),
        ("value", ctypes.c_char_p),
        ("flags", ctypes.c_uint64),
    )


def _raise() -> None:
    number = ctypes.get_errno()
    raise OSError(number, "not supported" if number == ENOTSUPP else os.strerror(number))


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value at `key`, None if there is none. `value_size` is what the kernel writes: for a per-CPU map,
    `percpu_size(...)`."""
    value = ctypes.create_string_buffer(value_size)
    element = _Element(fd, 0, key, ctypes.addressof(value), 0)
    if _syscall(_NUMBER, _LOOKUP, ctypes.addressof(element), 32) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        _raise()
    return value.raw


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Set one entry. `flags`: ANY, NOEXIST or EXIST."""
    element = _ElementIn(fd, 0, key, value, flags)
    if _syscall(_NUMBER, _UPDATE, ctypes.addressof(element), 32) < 0:
        _raise()


def delete(fd: int, key: bytes) -> bool:
    """Remove one entry; False if there was none."""
    element = _ElementIn(fd, 0, key, None, 0)
    if _syscall(_NUMBER, _DELETE, ctypes.addressof(element), 32) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return False
        _raise()
    return True


def next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key` (None: the first one), None at the end. A key that has gone leads to the first one."""
    following = ctypes.create_string_buffer(key_size)
    element = _Element(fd, 0, key, ctypes.addressof(following), 0)
    if _syscall(_NUMBER, _NEXT_KEY, ctypes.addressof(element), 32) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        _raise()
    return following.raw


def possible_cpus() -> int:
    """How many CPUs this kernel may ever have: the cells of a per-CPU value."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        ranges = file.read().strip().split(",")
    return max(int(text.rpartition("-")[2]) for text in ranges) + 1


def percpu_size(value_size: int) -> int:
    """Bytes of a per-CPU map's value as the system call passes it: a cell of 8·n bytes for each possible CPU."""
    return (value_size + 7) // 8 * 8 * possible_cpus()


def _unbatched(error: OSError) -> bool:
    """Whether a batch command failed because the map's type has none."""
    return error.errno in (ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP)


def update_batch(fd: int, keys: Buffer, values: Buffer, count: int, flags: int = ANY) -> None:
    """Set `count` entries, keys and values each back to back. Raises BatchError when the kernel refuses one."""
    if count == 0:
        return
    attributes = _attributes("QQQQIIQQ", 0, 0, _pointer(keys), _pointer(values), count, fd, flags, 0)
    try:
        _bpf(_UPDATE_BATCH, attributes)
        return
    except OSError as error:
        done = _batch_count(attributes)
        # An error before the first entry leaves the count as it was given.
        done = 0 if done >= count else done
        if done or not _unbatched(error):
            raise BatchError(error.errno or 0, done) from None
    key_size, value_size = len(keys) // count, len(values) // count
    for number in range(count):
        try:
            update(
                fd,
                bytes(keys[number * key_size : (number + 1) * key_size]),
                bytes(values[number * value_size : (number + 1) * value_size]),
                flags,
            )
        except OSError as error:
            raise BatchError(error.errno or 0, number) from None


def delete_batch(fd: int, keys: Buffer, count: int) -> None:
    """Remove `count` entries; those that are not there are no error. Raises BatchError."""
    key_size = len(keys) // count if count else 0
    start = 0
    while start < count:
        rest = bytes(keys[start * key_size :])
        attributes = _attributes("QQQQIIQQ", 0, 0, _pointer(rest), 0, count - start, fd, 0, 0)
        try:
            _bpf(_DELETE_BATCH, attributes)
            return
        except OSError as error:
            done = _batch_count(attributes)
            done = 0 if done >= count - start else done
            if error.errno == errno.ENOENT:
                start += done + 1
                continue
            if done or not _unbatched(error):
                raise BatchError(error.errno or 0, start + done) from None
        for number in range(start, count):
            try:
                delete(fd, bytes(keys[number * key_size : (number + 1) * key_size]))
            except OSError as error:
                raise BatchError(error.errno or 0, number) from None
        return


def lookup_all(fd: int, info: MapInfo | None = None) -> tuple[bytes, bytes, int]:
    """Every entry: (keys, values, count), keys and values each back to back.

    Entries that are written meanwhile may be in or out; one that stays is never missing and never twice, except that
    the one-by-one way starts over (and drops doubles) where an entry is deleted under it.
    """
    info = info or map_info(fd)
    value_size = percpu_size(info.value_size) if info.type in _PERCPU else info.value_size
    if info.type in _ARRAYS:
        return lookup_range(fd, 0, info.max_entries, info)
    try:
        return _lookup_hash(fd, info, value_size)
    except OSError as error:
        if not _unbatched(error):
            raise
    found: dict[bytes, bytes] = {}
    key: bytes | None = None
    steps = 0
    while (key := next_key(fd, key, info.key_size)) is not None:
        value = lookup(fd, key, value_size)
        if value is not None:
            found[key] = value
        steps += 1
        if steps > 4 * info.max_entries + 64:
            raise OSError(errno.EAGAIN, "the map changes faster than it can be read")
    return b"".join(found), b"".join(found.values()), len(found)


def _lookup_hash(fd: int, info: MapInfo, value_size: int) -> tuple[bytes, bytes, int]:
    keys, values = bytearray(), bytearray()
    total = 0
    for some_keys, some_values, count in _batches(fd, info, value_size, 16384):
        keys += some_keys
        values += some_values
        total += count
    return bytes(keys), bytes(values), total


def lookup_batches(fd: int, info: MapInfo, step: int) -> Iterator[tuple[Buffer, Buffer]]:
    """As `lookup_all` of a hash, about `step` entries at a time: (keys, values) of each batch, for rows so large that
    not all of them should be in memory at once."""
    try:
        for keys, values, _ in _batches(fd, info, info.value_size, step):
            yield bytes(keys), bytes(values)
    except OSError as error:
        if not _unbatched(error):
            raise
        found = lookup_all(fd, info)  # one by one, then
        yield found[0], found[1]


def _batches(fd: int, info: MapInfo, value_size: int, step: int) -> Iterator[tuple[memoryview, memoryview, int]]:
    """(keys, values, count) of each batch. The cursor is opaque; the kernel wants room for a whole bucket, hence the
    growing step."""
    step = min(info.max_entries, step)
    cursor_size = max(info.key_size, 4)
    cursors = (ctypes.create_string_buffer(cursor_size), ctypes.create_string_buffer(cursor_size))
    first = True
    while True:
        room_keys, room_values = bytearray(step * info.key_size), bytearray(step * value_size)
        attributes = _attributes(
            "QQQQIIQQ",
            0 if first else ctypes.addressof(cursors[0]),
            ctypes.addressof(cursors[1]),
            _pointer(room_keys),
            _pointer(room_values),
            step,
            fd,
            0,
            0,
        )
        ended = False
        try:
            _bpf(_LOOKUP_BATCH, attributes)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                step *= 2
                continue
            if error.errno != errno.ENOENT:
                raise
            ended = True
        count = _batch_count(attributes)
        yield memoryview(room_keys)[: count * info.key_size], memoryview(room_values)[: count * value_size], count
        if ended:
            return
        first = False
        cursors = (cursors[1], cursors[0])


def lookup_range(fd: int, start: int, count: int, info: MapInfo | None = None) -> tuple[bytes, bytes, int]:
    """Entries `start` … `start + count` of an array: (keys, values, count); fewer where the array ends."""
    info = info or map_info(fd)
    value_size = percpu_size(info.value_size) if info.type in _PERCPU else info.value_size
    count = max(0, min(count, info.max_entries - start))
    if count == 0:
        return b"", b"", 0
    keys, values = bytearray(count * 4), bytearray(count * value_size)
    # The kernel goes on after the key that it is given.
    before, after = ctypes.create_string_buffer(struct.pack("=I", max(start - 1, 0)), 4), ctypes.create_string_buffer(4)
    attributes = _attributes(
        "QQQQIIQQ",
        ctypes.addressof(before) if start else 0,
        ctypes.addressof(after),
        _pointer(keys),
        _pointer(values),
        count,
        fd,
        0,
        0,
    )
    try:
        _bpf(_LOOKUP_BATCH, attributes)
    except OSError as error:
        if error.errno != errno.ENOENT:
            if not _unbatched(error):
                raise
            wanted = [struct.pack("=I", index) for index in range(start, start + count)]
            cells = [lookup(fd, key, value_size) or bytes(value_size) for key in wanted]
            return b"".join(wanted), b"".join(cells), count
    return bytes(keys), bytes(values), count


def _batch_count(attributes: ctypes.Array[ctypes.c_char]) -> int:
    count: int = struct.unpack_from("=I", attributes, 32)[0]
    return count


# ---- pins and descriptors


def obj_pin(fd: int, path: str) -> None:
    """Pin a map, program or link; raises OSError(EEXIST) if the path is taken."""
    name = path.encode() + b"\0"
    _bpf(_OBJ_PIN, _attributes("QII", _pointer(name), fd, 0))


def obj_get(path: str) -> int:
    """Open what is pinned at `path`."""
    name = path.encode() + b"\0"
    return _bpf(_OBJ_GET, _attributes("QII", _pointer(name), 0, 0))


def _info(fd: int, size: int, info: bytes = b"") -> bytes:
    buffer = ctypes.create_string_buffer(info, size)
    _bpf(_INFO, _attributes("IIQ", fd, size, ctypes.addressof(buffer)))
    return buffer.raw


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode(errors="replace")


def _ids(command: int) -> Iterator[int]:
    current = 0
    while True:
        attributes = _attributes("III", current, 0, 0)
        try:
            _bpf(command, attributes)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        current = struct.unpack_from("=I", attributes, 4)[0]
        yield current


def map_ids() -> Iterator[int]:
    """The ids of all maps of this machine."""
    return _ids(_MAP_NEXT_ID)


def program_ids() -> Iterator[int]:
    """The ids of all programs of this machine."""
    return _ids(_PROG_NEXT_ID)


def link_ids() -> Iterator[int]:
    """The ids of all links of this machine."""
    return _ids(_LINK_NEXT_ID)


def map_by_id(id: int) -> int:
    """A descriptor of the map; raises OSError(ENOENT) if it has gone."""
    return _bpf(_MAP_BY_ID, _attributes("III", id, 0, 0))


def program_by_id(id: int) -> int:
    """A descriptor of the program; raises OSError(ENOENT) if it has gone."""
    return _bpf(_PROG_BY_ID, _attributes("III", id, 0, 0))


def link_by_id(id: int) -> int:
    """A descriptor of the link; raises OSError(ENOENT) if it has gone."""
    return _bpf(_LINK_BY_ID, _attributes("III", id, 0, 0))


# ---- programs


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
        return _bpf(
            _PROG_LOAD,
            _attributes(
                "IIQQIIQII16sII",
                type,
                len(code) // 8,
                _pointer(code),
                _pointer(terms),
                1 if log else 0,
                len(log) if log else 0,
                ctypes.addressof(log) if log else 0,
                0,
                flags,
                name.encode()[: _NAME - 1],
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
    info = _info(fd, 128)
    type_, id_, tag, _, translated = struct.unpack_from("=II8sII", info)
    (maps,) = struct.unpack_from("=I", info, 52)
    name = _text(info[64:80])
    ids: tuple[int, ...] = ()
    if maps:
        room = ctypes.create_string_buffer(maps * 4)
        request = bytearray(128)
        struct.pack_into("=I", request, 52, maps)
        struct.pack_into("=Q", request, 56, ctypes.addressof(room))
        _info(fd, 128, bytes(request))
        ids = struct.unpack(f"={maps}I", room.raw)
    return ProgramInfo(type_, id_, tag.hex(), name, ids, translated // 8)


TEST_LIVE_FRAMES = 1 << 1
"""Flag of `prog_test_run` for XDP (5.18): frames are really sent and passed up. Nothing comes back; `room` is 0."""


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
    attributes = _attributes(
        "IIIIQQIIIIQQIII",
        fd,
        0,
        len(data),
        room,
        _pointer(data) if data else 0,
        ctypes.addressof(out) if room else 0,
        repeat,
        0,
        len(context),
        0 if flags & TEST_LIVE_FRAMES else len(context),
        _pointer(context) if context else 0,
        ctypes.addressof(context_out) if context and not flags & TEST_LIVE_FRAMES else 0,
        flags,
        0,
        0,
    )
    _bpf(_TEST_RUN, attributes)
    verdict, _, written = struct.unpack_from("=III", attributes, 4)
    (duration,) = struct.unpack_from("=I", attributes, 36)
    return TestRun(verdict, out.raw[:written], context_out.raw[: len(context)], duration)


# ---- programs at devices (tcx, Linux 6.6), without a link: they stay until they are detached or the device goes


def prog_attach(program: int, device: int, attach_type: int, replaced: int | None = None) -> None:
    """Have a tc program run at a device, before all others, or in place of the program `replaced` in one step. `device`
    is an index in the calling thread's network namespace."""
    flags = _F_BEFORE if replaced is None else F_REPLACE_PROGRAM
    _bpf(_PROG_ATTACH, _attributes("IIIII", device, program, attach_type, flags, replaced or 0))


def prog_detach(program: int, device: int, attach_type: int) -> None:
    """The reverse of `prog_attach`. Raises OSError(ENOENT) if the program does not run there."""
    _bpf(_PROG_DETACH, _attributes("III", device, program, attach_type))


# ---- links


def link_create(program: int, target: int, attach_type: int, flags: int = 0) -> int:
    """Attach a program; gone with the link's last descriptor or pin. `target` is a cgroup's descriptor, beside whatever
    else is attached, or for XDP a device's index in the calling thread's network namespace, with `flags` XDP_FLAGS_….

    Raises OSError: EPERM where a program without ALLOW_MULTI is attached at or above the cgroup; EBUSY or EEXIST where
    the device runs another XDP program."""
    return _bpf(_LINK_CREATE, _attributes("IIII", program, target, attach_type, flags))


def link_update(link: int, program: int, expected: int | None = None) -> None:
    """Replace the link's program at once; with `expected` only if it is that one."""
    flags = 0 if expected is None else F_REPLACE_PROGRAM
    _bpf(_LINK_UPDATE, _attributes("IIII", link, program, flags, expected or 0))


def link_detach(link: int) -> None:
    """Detach at once, whoever else still holds the link. Raises OSError(EINVAL) before 5.9."""
    _bpf(_LINK_DETACH, _attributes("I", link))


def link_info(fd: int) -> LinkInfo:
    """Raises OSError(EINVAL) for a descriptor that is no link."""
    info = _info(fd, 64)
    type_, id_, program, _, cgroup, attach_type = struct.unpack_from("=IIIIQI", info)
    if type_ == LINK_XDP:
        return LinkInfo(type_, id_, program, 0, 0, struct.unpack_from("=I", info, 16)[0])
    return LinkInfo(type_, id_, program, cgroup, attach_type)


def prog_query(target: int, attach_type: int, effective: bool = False) -> tuple[int, tuple[int, ...]]:
    """(attach flags, program ids) at a cgroup's descriptor, or at a device by its index in the calling thread's network
    namespace, in the order in which they run; `effective` counts those of a cgroup's ancestors.

    Raises OSError: EINVAL where the kernel does not know the attach type."""
    room = 64
    while True:
        ids = ctypes.create_string_buffer(room * 4)
        # The last word is the revision (6.6), which the kernel writes whether or not it is told of room for it.
        attributes = _attributes(
            "IIIIQIIQQQQ", target, attach_type, int(effective), 0, ctypes.addressof(ids), room, 0, 0, 0, 0, 0
        )
        try:
            _bpf(_PROG_QUERY, attributes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room *= 2
            continue
        (flags,) = struct.unpack_from("=I", attributes, 12)
        (count,) = struct.unpack_from("=I", attributes, 24)
        return flags, struct.unpack_from(f"={count}I", ids)
