"""bpf(2) on maps: one function for each command that we use, and rows by the batch.

Rules of this file: those of `syscall`. Keys and values are bytes in the kernel's layout; many of them are one
contiguous buffer. A map type without batch commands is served one by one, at the same interface.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ebpflb.dataplane.bpf.syscall import (
    ENOTSUPP,
    NAME,
    NUMBER,
    Buffer,
    all_ids,
    bpf,
    bpf_attr,
    invoke,
    name_of,
    object_info,
    pointer,
    reason,
    refusal,
)

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

_PERCPU = (MAP_PERCPU_HASH, MAP_PERCPU_ARRAY, MAP_LRU_PERCPU_HASH)
_ARRAYS = (MAP_ARRAY, MAP_PERCPU_ARRAY)

_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY = range(5)
_MAP_NEXT_ID, _MAP_BY_ID = 12, 14
_LOOKUP_BATCH, _UPDATE_BATCH, _DELETE_BATCH = 24, 26, 27


class MapInfo(NamedTuple):
    """What the kernel says of a map; sizes in bytes. A per-CPU value is `value_size` for each possible CPU."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class BatchError(OSError):
    """A batch stopped early; its first `done` entries are in force."""

    def __init__(self, number: int, done: int) -> None:
        super().__init__(number, reason(number))
        self.done = done


def map_create(type: int, key_size: int, value_size: int, max_entries: int, flags: int = 0, name: str = "") -> int:
    """A new map; `name` is cut to 15 characters."""
    attributes = bpf_attr("IIIIIII16s", type, key_size, value_size, max_entries, flags, 0, 0, name.encode()[: NAME - 1])
    return bpf(_MAP_CREATE, attributes)


def map_info(fd: int) -> MapInfo:
    """Raises OSError(EINVAL) for a descriptor that is no BPF object."""
    info = object_info(fd, 80)
    type_, id_, key, value, entries, flags, name = struct.unpack_from("=IIIIII16s", info)
    return MapInfo(type_, id_, key, value, entries, flags, name_of(name))


def map_ids() -> Iterator[int]:
    """The ids of all maps of this machine."""
    return all_ids(_MAP_NEXT_ID)


def map_by_id(id: int) -> int:
    """A descriptor of the map; raises OSError(ENOENT) if it has gone."""
    return bpf(_MAP_BY_ID, bpf_attr("III", id, 0, 0))


class _Element(ctypes.Structure):
    """One entry's bpf_attr, with the address that the kernel is to write to."""

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


_ELEMENT = ctypes.sizeof(_Element)


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value at `key`, None if there is none. `value_size` is what the kernel writes: for a per-CPU map,
    `percpu_size(...)`."""
    value = ctypes.create_string_buffer(value_size)
    element = _Element(fd, 0, key, ctypes.addressof(value), 0)
    if invoke(NUMBER, _LOOKUP, ctypes.addressof(element), _ELEMENT) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise refusal()
    return value.raw


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Set one entry. `flags`: ANY, NOEXIST or EXIST."""
    element = _ElementIn(fd, 0, key, value, flags)
    if invoke(NUMBER, _UPDATE, ctypes.addressof(element), _ELEMENT) < 0:
        raise refusal()


def delete(fd: int, key: bytes) -> bool:
    """Remove one entry; False if there was none."""
    element = _ElementIn(fd, 0, key, None, 0)
    if invoke(NUMBER, _DELETE, ctypes.addressof(element), _ELEMENT) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return False
        raise refusal()
    return True


def next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key` (None: the first one), None at the end. A key that has gone leads to the first one."""
    following = ctypes.create_string_buffer(key_size)
    element = _Element(fd, 0, key, ctypes.addressof(following), 0)
    if invoke(NUMBER, _NEXT_KEY, ctypes.addressof(element), _ELEMENT) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise refusal()
    return following.raw


def possible_cpus() -> int:
    """How many CPUs this kernel may ever have: the cells of a per-CPU value."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        ranges = file.read().strip().split(",")
    return max(int(text.rpartition("-")[2]) for text in ranges) + 1


def percpu_size(value_size: int) -> int:
    """Bytes of a per-CPU map's value as the system call passes it: a cell of 8·n bytes for each possible CPU."""
    return (value_size + 7) // 8 * 8 * possible_cpus()


# ---- Many at once


def update_batch(fd: int, keys: Buffer, values: Buffer, count: int, flags: int = ANY) -> None:
    """Set `count` entries, keys and values each back to back. Raises BatchError when the kernel refuses one."""
    if count == 0:
        return
    attributes = _batch_attr(fd, pointer(keys), pointer(values), count, flags)
    try:
        bpf(_UPDATE_BATCH, attributes)
        return
    except OSError as error:
        done = _done(attributes, count)
        if done or not _unbatched(error):
            raise BatchError(error.errno or 0, done) from None
    width, size = len(keys) // count, len(values) // count
    for number in range(count):
        key, value = keys[number * width : (number + 1) * width], values[number * size : (number + 1) * size]
        try:
            update(fd, bytes(key), bytes(value), flags)
        except OSError as error:
            raise BatchError(error.errno or 0, number) from None


def delete_batch(fd: int, keys: Buffer, count: int) -> None:
    """Remove `count` entries; those that are not there are no error. Raises BatchError."""
    width = len(keys) // count if count else 0
    start = 0
    while start < count:
        attributes = _batch_attr(fd, pointer(keys) + start * width, 0, count - start)
        try:
            bpf(_DELETE_BATCH, attributes)
            return
        except OSError as error:
            done = _done(attributes, count - start)
            if error.errno == errno.ENOENT:
                start += done + 1  # behind the one that is not there
                continue
            if done or not _unbatched(error):
                raise BatchError(error.errno or 0, start + done) from None
        for number in range(start, count):
            try:
                delete(fd, bytes(keys[number * width : (number + 1) * width]))
            except OSError as error:
                raise BatchError(error.errno or 0, number) from None
        return


def lookup_all(fd: int, info: MapInfo | None = None) -> tuple[bytes, bytes, int]:
    """Every entry: (keys, values, count), keys and values each back to back.

    Entries that are written meanwhile may be in or out; one that stays is never missing and never twice, except that
    the one-by-one way starts over (and drops doubles) where an entry is deleted under it.
    """
    info = info or map_info(fd)
    if info.type in _ARRAYS:
        return lookup_range(fd, 0, info.max_entries, info)
    keys, values = bytearray(), bytearray()
    total = 0
    try:
        for some_keys, some_values, count in _batches(fd, info, 16384):
            keys += some_keys
            values += some_values
            total += count
    except OSError as error:
        if not _unbatched(error):
            raise
        return _one_by_one(fd, info)
    return bytes(keys), bytes(values), total


def lookup_batches(fd: int, info: MapInfo, step: int) -> Iterator[tuple[Buffer, Buffer]]:
    """As `lookup_all` of a hash, about `step` entries at a time: (keys, values) of each batch, for rows so large that
    not all of them should be in memory at once."""
    try:
        for keys, values, _ in _batches(fd, info, step):
            yield bytes(keys), bytes(values)
    except OSError as error:
        if not _unbatched(error):
            raise
        yield _one_by_one(fd, info)[:2]


def lookup_range(fd: int, start: int, count: int, info: MapInfo | None = None) -> tuple[bytes, bytes, int]:
    """Entries `start` … `start + count` of an array: (keys, values, count); fewer where the array ends."""
    info = info or map_info(fd)
    size = _value_size(info)
    count = max(0, min(count, info.max_entries - start))
    if count == 0:
        return b"", b"", 0
    keys, values = bytearray(count * 4), bytearray(count * size)
    # The kernel goes on after the key that it is given.
    before, after = ctypes.create_string_buffer(struct.pack("=I", max(start - 1, 0)), 4), ctypes.create_string_buffer(4)
    cursors = (ctypes.addressof(before) if start else 0, ctypes.addressof(after))
    try:
        bpf(_LOOKUP_BATCH, _batch_attr(fd, pointer(keys), pointer(values), count, cursors=cursors))
    except OSError as error:
        if error.errno != errno.ENOENT:
            if not _unbatched(error):
                raise
            wanted = [struct.pack("=I", index) for index in range(start, start + count)]
            return b"".join(wanted), b"".join([lookup(fd, key, size) or bytes(size) for key in wanted]), count
    return bytes(keys), bytes(values), count


def _batches(fd: int, info: MapInfo, step: int) -> Iterator[tuple[memoryview, memoryview, int]]:
    """(keys, values, count) of each batch of a hash. The cursor is opaque; the kernel wants room for a whole bucket,
    hence the growing step."""
    step = min(info.max_entries, step)
    width, size = info.key_size, _value_size(info)
    here, there = (ctypes.create_string_buffer(max(width, 4)) for _ in range(2))
    first = True
    while True:
        keys, values = bytearray(step * width), bytearray(step * size)
        cursors = (0 if first else ctypes.addressof(here), ctypes.addressof(there))
        attributes = _batch_attr(fd, pointer(keys), pointer(values), step, cursors=cursors)
        ended = False
        try:
            bpf(_LOOKUP_BATCH, attributes)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                step *= 2
                continue
            if error.errno != errno.ENOENT:
                raise
            ended = True
        count = _count(attributes)
        yield memoryview(keys)[: count * width], memoryview(values)[: count * size], count
        if ended:
            return
        first = False
        here, there = there, here


def _one_by_one(fd: int, info: MapInfo) -> tuple[bytes, bytes, int]:
    """As `lookup_all`, of a map type without batch commands."""
    size = _value_size(info)
    found: dict[bytes, bytes] = {}
    key: bytes | None = None
    steps = 0
    while (key := next_key(fd, key, info.key_size)) is not None:
        value = lookup(fd, key, size)
        if value is not None:
            found[key] = value
        steps += 1
        if steps > 4 * info.max_entries + 64:
            raise OSError(errno.EAGAIN, "the map changes faster than it can be read")
    return b"".join(found), b"".join(found.values()), len(found)


def _value_size(info: MapInfo) -> int:
    """Bytes of a value as the system call passes it."""
    return percpu_size(info.value_size) if info.type in _PERCPU else info.value_size


def _unbatched(error: OSError) -> bool:
    """Whether a batch command failed because the map's type has none."""
    return error.errno in (ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP)


def _batch_attr(
    fd: int, keys: int, values: int, count: int, flags: int = 0, *, cursors: tuple[int, int] = (0, 0)
) -> ctypes.Array[ctypes.c_char]:
    """The bpf_attr of a batch command, by addresses: `cursors` say where it begins, and where it leaves off."""
    return bpf_attr("QQQQIIQQ", *cursors, keys, values, count, fd, flags, 0)


def _count(attributes: ctypes.Array[ctypes.c_char]) -> int:
    """How many entries a batch command says that it has done."""
    count: int = struct.unpack_from("=I", attributes, 32)[0]
    return count


def _done(attributes: ctypes.Array[ctypes.c_char], count: int) -> int:
    """How many of `count` a batch did before it was refused: an error before the first leaves the count as it was
    given."""
    done = _count(attributes)
    return 0 if done >= count else done
