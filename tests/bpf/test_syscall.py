"""bpf(2): what goes in comes out, one by one and in batches, for every map type; refusals name what they refused."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf import facts, map_calls, ports, program_calls, syscall
from ebpflb.dataplane.bpf.assembly import EXIT, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_CGROUP_SOCK_ADDR, PROG_TYPE_SCHED_CLS, PROG_TYPE_XDP

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

Make = Callable[..., int]
MAP_PROG_ARRAY = 3


@pytest.fixture
def make() -> Iterator[Make]:
    """`make(type, key size, value size, entries, flags)`: a map for this test."""
    syscall.raise_memlock_limit()
    fds: list[int] = []

    def create(type: int, key: int, value: int, entries: int, flags: int = 0) -> int:
        fds.append(map_calls.map_create(type, key, value, entries, flags, "test_syscall"))
        return fds[-1]

    yield create
    for fd in fds:
        os.close(fd)


def lpm_key(number: int) -> bytes:
    return struct.pack("=I", 32) + struct.pack(">I", number)


def number_key(number: int) -> bytes:
    return struct.pack("=I", number)


KINDS = [
    pytest.param(map_calls.MAP_HASH, 4, 0, number_key, id="hash"),
    pytest.param(map_calls.MAP_HASH, 4, map_calls.F_NO_PREALLOC, number_key, id="hash without preallocation"),
    pytest.param(map_calls.MAP_LRU_HASH, 4, 0, number_key, id="lru hash"),
    pytest.param(map_calls.MAP_LPM_TRIE, 8, map_calls.F_NO_PREALLOC, lpm_key, id="lpm trie"),
]


@pytest.mark.parametrize(("type", "size", "flags", "key"), KINDS)
@pytest.mark.parametrize("count", [0, 1, 1000, 40000])
def test_batches(make: Make, type: int, size: int, flags: int, key: Callable[[int], bytes], count: int) -> None:
    fd = make(type, size, 12, 131072, flags)
    wanted = {key(number): struct.pack("=III", number, 7, number + 1) for number in range(count)}
    map_calls.update_batch(fd, b"".join(wanted), b"".join(wanted.values()), count)
    keys, values, found = map_calls.lookup_all(fd)
    assert found == count
    assert rows(keys, values, size, 12) == wanted
    # Every second one goes, and some that never were.
    gone = [key(number) for number in range(0, count, 2)] + [key(number) for number in range(100000, 100005)]
    map_calls.delete_batch(fd, b"".join(gone), len(gone))
    keys, values, found = map_calls.lookup_all(fd)
    for each in gone:
        wanted.pop(each, None)
    assert rows(keys, values, size, 12) == wanted


def rows(keys: bytes, values: bytes, key: int, value: int) -> dict[bytes, bytes]:
    return {keys[at * key : (at + 1) * key]: values[at * value : (at + 1) * value] for at in range(len(keys) // key)}


@pytest.mark.parametrize(("type", "size", "flags", "key"), KINDS)
def test_one_by_one(make: Make, type: int, size: int, flags: int, key: Callable[[int], bytes]) -> None:
    fd = make(type, size, 8, 64, flags)
    one, other = key(1), key(2)
    assert map_calls.lookup(fd, one, 8) is None
    assert map_calls.next_key(fd, None, size) is None
    map_calls.update(fd, one, b"12345678")
    assert map_calls.lookup(fd, one, 8) == b"12345678"
    assert map_calls.next_key(fd, None, size) == one
    assert map_calls.next_key(fd, one, size) is None
    map_calls.update(fd, one, b"87654321", map_calls.EXIST)
    with pytest.raises(OSError) as refused:
        map_calls.update(fd, other, bytes(8), map_calls.EXIST)
    assert refused.value.errno == errno.ENOENT
    with pytest.raises(FileExistsError):
        map_calls.update(fd, one, bytes(8), map_calls.NOEXIST)
    assert map_calls.delete(fd, one)
    assert not map_calls.delete(fd, one)


def test_batch_that_overflows_says_how_far_it_came(make: Make) -> None:
    fd = make(map_calls.MAP_HASH, 4, 8, 10)
    keys = struct.pack("=12I", *range(12))
    with pytest.raises(map_calls.BatchError) as refused:
        map_calls.update_batch(fd, keys, bytes(96), 12)
    assert (refused.value.errno, refused.value.done) == (errno.E2BIG, 10)
    assert map_calls.lookup_all(fd)[2] == 10


def test_array(make: Make) -> None:
    fd = make(map_calls.MAP_ARRAY, 4, 8, 10)
    map_calls.update_batch(fd, struct.pack("=10I", *range(10)), struct.pack("=10Q", *range(10)), 10)
    for start, count, expected in (
        (0, 10, range(10)),
        (3, 4, range(3, 7)),
        (8, 5, range(8, 10)),
        (10, 1, ()),
        (0, 0, ()),
    ):
        keys, values, found = map_calls.lookup_range(fd, start, count)
        numbers = list(expected)
        assert found == len(numbers)
        assert keys == struct.pack(f"={found}I", *numbers)
        assert values == struct.pack(f"={found}Q", *numbers)
    with pytest.raises(map_calls.BatchError) as refused:
        map_calls.delete_batch(fd, bytes(4), 1)
    assert refused.value.errno == errno.EINVAL


def test_a_map_type_without_batches_is_served_one_by_one(make: Make) -> None:
    """An array of programs, which no kernel so far does in batches: descriptors go in, ids come out."""
    fd = make(MAP_PROG_ARRAY, 4, 4, 8)
    program = program_calls.prog_load(PROG_TYPE_SCHED_CLS, move(0, 0) + EXIT, "test_batch")
    try:
        keys = struct.pack("=3I", 1, 4, 6)
        map_calls.update_batch(fd, keys, struct.pack("=I", program) * 3, 3)
        number = struct.pack("=I", program_calls.prog_info(program).id)
        assert map_calls.lookup_all(fd) == (keys, number * 3, 3)
        with pytest.raises(map_calls.BatchError) as refused:
            map_calls.update_batch(fd, struct.pack("=3I", 1, 99, 6), struct.pack("=I", program) * 3, 3)
        assert (refused.value.errno, refused.value.done) == (errno.E2BIG, 1)
        map_calls.delete_batch(fd, struct.pack("=3I", 1, 2, 6), 3)
        assert map_calls.lookup_all(fd) == (struct.pack("=I", 4), number, 1)
    finally:
        os.close(program)


def test_percpu_values_have_a_cell_for_each_cpu(make: Make) -> None:
    fd = make(map_calls.MAP_PERCPU_ARRAY, 4, 8, 3)
    size = map_calls.percpu_size(8)
    assert size == 8 * map_calls.possible_cpus()
    cells = struct.pack(f"={map_calls.possible_cpus()}Q", *range(1, map_calls.possible_cpus() + 1))
    map_calls.update(fd, number_key(1), cells)
    assert map_calls.lookup(fd, number_key(1), size) == cells
    keys, values, count = map_calls.lookup_all(fd)
    assert (keys, values, count) == (struct.pack("=III", 0, 1, 2), bytes(size) + cells + bytes(size), 3)


@pytest.mark.parametrize("type", [PROG_TYPE_SCHED_CLS, PROG_TYPE_XDP])
def test_program_runs_on_a_packet(type: int) -> None:
    fd = program_calls.prog_load(type, move(0, 2) + EXIT, "test_run")
    try:
        packet = bytes(range(64))
        ran = program_calls.prog_test_run(fd, packet, repeat=3)
        assert (ran.verdict, ran.data) == (2, packet)
        info = program_calls.prog_info(fd)
        assert (info.type, info.name, info.map_ids) == (type, "test_run", ())
        assert info.id in set(program_calls.program_ids())
    finally:
        os.close(fd)


def test_refused_program_says_why() -> None:
    with pytest.raises(program_calls.VerifierError) as refused:
        program_calls.prog_load(PROG_TYPE_SCHED_CLS, EXIT, "no_result")
    assert refused.value.errno == errno.EACCES
    assert "R0 !read_ok" in str(refused.value)
    assert "R0 !read_ok" in refused.value.log


def test_objects_are_found_by_id(make: Make) -> None:
    fd = make(map_calls.MAP_HASH, 4, 8, 10)
    number = map_calls.map_info(fd).id
    assert number in set(map_calls.map_ids())
    again = map_calls.map_by_id(number)
    assert map_calls.map_info(again) == map_calls.map_info(fd)
    os.close(again)
    with pytest.raises(FileNotFoundError):
        map_calls.map_by_id((1 << 31) - 1)


def test_network_namespace_is_told_by_a_program_too(tmp_path: Path) -> None:
    hierarchy = facts.cgroup2_root()
    assert hierarchy is not None
    # In a cgroup of its own: in the root others come and go.
    own = hierarchy / f"ebpflb-syscall-{os.getpid()}"
    own.mkdir()
    try:
        assert facts.cookie_by_program(own) == facts.netns_cookie()
        assert not [each for each in own.iterdir() if each.is_dir()]
    finally:
        own.rmdir()
    assert facts.cookie_by_program(tmp_path) is None


def both_clocks() -> tuple[int, float]:
    """Jiffies and seconds of one moment: whoever was kept waiting between the two looks again."""
    while True:
        before, jiffies, after = time.monotonic(), facts.jiffies(), time.monotonic()
        if after - before < 0.01:
            return jiffies, after


def test_a_second_has_so_many_jiffies() -> None:
    """After a stall of the machine the tick may have to catch up with what it missed: the longer it is counted, the
    less that matters."""
    first, began = both_clocks()
    while True:
        last, ended = both_clocks()
        counted = (last - first) & 0xFFFFFFFF
        rate = counted / (ended - began)
        nearest = min((100, 250, 300, 1000), key=lambda hertz: abs(hertz - rate))
        if counted >= 50 and nearest == facts.jiffies_per_second():
            return
        assert ended - began < 60, f"{rate} in a second, and {facts.jiffies_per_second()} are said"


def test_facts_of_this_kernel() -> None:
    assert facts.netns_cookie() not in (None, 0)
    low, high = ports.snat_ports()
    assert 1024 <= low < high <= 65535
    assert not facts.bpf_refusal() and facts.has_socket_programs() and facts.has_clsact()
    assert facts.may_administrate()
    assert not facts.loads(PROG_TYPE_CGROUP_SOCK_ADDR, EXIT, 10)
