"""Loading: maps, programs and links outlive the process, belong to one node, and are gone after a cleanup.

Rules of this file: pins and cgroups bear this process' number and are removed whatever happens. Nothing is ever
attached to a cgroup that a process of this machine is in.
"""

from __future__ import annotations

import errno
import itertools
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ebpflb.dataplane.bpf import facts, map_calls, pins, program_calls, syscall
from ebpflb.dataplane.bpf.artifact import Artifact, load_artifact
from ebpflb.dataplane.bpf.assembly import EXIT, move
from ebpflb.dataplane.bpf.constants import CGROUP_HOOKS, PROG_TYPE_CGROUP_SOCK_ADDR, Sizes
from ebpflb.dataplane.bpf.layouts import SIZES
from ebpflb.dataplane.bpf.programs import Programs, open_maps
from ebpflb.errors import Unsupported, UserError
from tests.conftest import cgroup2

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

DEADLINE = 30.0
SMALL = Sizes(frontends=64, backends=64, slots=64, flows=64, sockets=64, fragments=64, services=64)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def small() -> Artifact:
    return load_artifact(SMALL, set_retval=facts.has_set_retval())


@pytest.fixture(scope="module")
def changed() -> Artifact:
    """Other programs over the same maps."""
    return load_artifact(SMALL, set_retval=facts.has_set_retval(), count_traffic=True)


class Place:
    """A pin directory and a cgroup of a test's own."""

    def __init__(self, hierarchy: Path) -> None:
        name = f"ebpflb-load-{os.getpid()}-{next(_numbers)}"
        self.bpffs = Path("/sys/fs/bpf") / name
        self.cgroup = hierarchy / name
        self.cgroup.mkdir()

    def programs(self, artifact: Artifact, netns: int | None = None) -> Programs:
        return Programs(artifact, self.bpffs, self.cgroup, facts.netns_cookie() if netns is None else netns)

    def loaded(self, artifact: Artifact, netns: int | None = None) -> tuple[bool, int]:
        """Load, attach and let go, as a daemon that ends: (maps were new, links changed)."""
        made = self.programs(artifact, netns)
        try:
            return made.open(), made.attach()
        finally:
            made.close()

    def ids(self, kind: str) -> dict[str, int]:
        return {pin.path.name: pin.id for pin in pins.ours(self.bpffs) if pin.kind == kind}

    def attached(self) -> dict[int, tuple[int, ...]]:
        """Program ids by attach type, as the cgroup has them."""
        fd = os.open(self.cgroup, os.O_RDONLY)
        try:
            return {
                hook.attach_type: program_calls.prog_query(fd, hook.attach_type)[1] for hook in CGROUP_HOOKS.values()
            }
        finally:
            os.close(fd)

    def remove(self) -> None:
        pins.remove_all(self.bpffs)
        for directory in sorted(self.cgroup.glob("**/"), reverse=True):
            directory.rmdir()


@pytest.fixture
def place() -> Iterator[Place]:
    hierarchy = cgroup2()
    assert hierarchy is not None
    if facts.filesystem_of(Path("/sys/fs/bpf")).type != "bpf":
        subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)
    made = Place(hierarchy)
    yield made
    made.remove()


def test_everything_is_pinned_and_attached(place: Place, small: Artifact) -> None:
    assert place.loaded(small) == (True, 8)
    assert sorted(place.ids(pins.MAPS)) == sorted(small.maps)
    assert sorted(place.ids(pins.PROGRAMS)) == sorted(small.programs)
    programs = place.ids(pins.PROGRAMS)
    assert sorted(place.ids(pins.LINKS)) == sorted(CGROUP_HOOKS)
    assert place.attached() == {hook.attach_type: (programs[name],) for name, hook in CGROUP_HOOKS.items()}
    assert {pin.kernel_name[:7] for pin in pins.ours(place.bpffs)} == {"ebpflb_"}


def test_restart_changes_nothing(place: Place, small: Artifact) -> None:
    place.loaded(small)
    before = pins.inventory(place.bpffs)
    assert place.loaded(small) == (False, 0)
    assert pins.inventory(place.bpffs) == before


def test_rows_outlive_the_process(place: Place, small: Artifact) -> None:
    first = place.programs(small)
    first.open()
    map_calls.update(first.maps["slots"], struct.pack("=I", 7), struct.pack("=I", 77))
    first.close()
    found = open_maps(place.bpffs, small)
    assert found is not None
    assert map_calls.lookup(found["slots"], struct.pack("=I", 7), 4) == struct.pack("=I", 77)
    for fd in found.values():
        os.close(fd)


def test_nothing_pinned_is_no_maps(place: Place, small: Artifact) -> None:
    assert open_maps(place.bpffs, small) is None
    assert pins.inventory(place.bpffs) == ()
    assert pins.remove_all(place.bpffs) == ()


def test_new_programs_over_the_same_maps_replace_the_old_in_their_links(
    place: Place, small: Artifact, changed: Artifact
) -> None:
    place.loaded(small)
    maps, programs, links = (place.ids(kind) for kind in (pins.MAPS, pins.PROGRAMS, pins.LINKS))
    differing = {name for name in small.programs if small.programs[name].code != changed.programs[name].code} & set(
        CGROUP_HOOKS
    )
    assert "connect4" in differing
    assert "getpeername4" not in differing
    fresh, updated = place.loaded(changed)
    assert not fresh
    assert updated == len(differing)
    assert place.ids(pins.MAPS) == maps
    assert place.ids(pins.LINKS) == links
    now = place.ids(pins.PROGRAMS)
    assert {name for name in CGROUP_HOOKS if now[name] != programs[name]} == differing
    assert place.attached()[CGROUP_HOOKS["connect4"].attach_type] == (now["connect4"],)


def test_maps_of_another_size_are_replaced_with_their_programs(
    place: Place, small: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    place.loaded(small)
    old_maps, links = place.ids(pins.MAPS), place.ids(pins.LINKS)
    sizes = Sizes(frontends=128, backends=64, slots=64, flows=64, sockets=64, fragments=64, services=64)
    other = load_artifact(sizes, set_retval=facts.has_set_retval())
    made = place.programs(other)
    assert made.open()
    # Until the new rows are written, what runs is the old programs over the old maps.
    assert set(place.ids(pins.PROGRAMS).values()).isdisjoint(place.attached()[10])
    assert made.attach() == 8
    made.close()
    assert not set(place.ids(pins.MAPS).values()) & set(old_maps.values())
    assert place.ids(pins.LINKS) == links
    assert place.attached()[10] == (place.ids(pins.PROGRAMS)["connect4"],)
    assert "another version" in caplog.text and "the map frontends is" in caplog.text


def settle(place: Place, artifact: Artifact, netns: int, layout: int) -> None:
    """Write a settings row as the daemon of `netns` would."""
    spec = artifact.maps["settings"]
    row = bytearray(spec.value.size)
    struct.pack_into("=Q", row, spec.value.field("netns").offset, netns)
    struct.pack_into("=I", row, spec.value.field("layout").offset, layout)
    fd = syscall.obj_get(str(place.bpffs / "maps" / "settings"))
    map_calls.update(fd, bytes(4), bytes(row))
    os.close(fd)


def test_maps_of_another_layout_are_replaced(place: Place, small: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    place.loaded(small)
    settle(place, small, facts.netns_cookie() or 0, small.numbers["LAYOUT"])
    assert place.loaded(small) == (False, 0)
    settle(place, small, facts.netns_cookie() or 0, small.numbers["LAYOUT"] + 1)
    assert place.loaded(small)[0]
    assert "layout is" in caplog.text


def test_another_instances_directory_is_refused(place: Place, small: Artifact) -> None:
    place.loaded(small)
    settle(place, small, 12345, small.numbers["LAYOUT"])
    before = pins.inventory(place.bpffs)
    with pytest.raises(UserError, match="another network namespace: give --bpffs another directory"):
        place.loaded(small)
    assert pins.inventory(place.bpffs) == before


def test_a_pin_that_somebody_removed_comes_back(place: Place, small: Artifact) -> None:
    place.loaded(small)
    (place.bpffs / "links" / "connect4").unlink()
    (place.bpffs / "programs" / "sendmsg6").unlink()
    assert place.loaded(small) == (False, 2)
    assert sorted(place.ids(pins.LINKS)) == sorted(CGROUP_HOOKS)
    attached_in_the_end(place, 1)


def test_a_link_that_somebody_detached_comes_back(place: Place, small: Artifact) -> None:
    place.loaded(small)
    link = syscall.obj_get(str(place.bpffs / "links" / "connect6"))
    program_calls.link_detach(link)
    os.close(link)
    assert place.attached()[11] == ()
    assert place.loaded(small) == (False, 1)
    assert place.attached()[11] == (place.ids(pins.PROGRAMS)["connect6"],)


def test_another_cgroup_is_taken_up(place: Place, small: Artifact) -> None:
    place.loaded(small)
    inner = place.cgroup / "inner"
    inner.mkdir()
    made = Programs(small, place.bpffs, inner, facts.netns_cookie())
    made.open()
    assert made.attach() == 8
    assert made.attach() == 0
    made.close()
    attached_in_the_end(place, 0)


def attached_in_the_end(place: Place, count: int) -> None:
    """So many programs run at every hook, once links have gone with their pins, which the kernel's worker sees to."""
    deadline = time.monotonic() + DEADLINE
    while any(len(ids) != count for ids in place.attached().values()):
        assert time.monotonic() < deadline, place.attached()
        time.sleep(0.01)


def test_another_program_that_tolerates_others_keeps_running(place: Place, small: Artifact) -> None:
    foreign = program_calls.prog_load(PROG_TYPE_CGROUP_SOCK_ADDR, move(0, 1) + EXIT, "foreign", 10)
    cgroup = os.open(place.cgroup, os.O_RDONLY)
    link = program_calls.link_create(foreign, cgroup, 10)
    try:
        place.loaded(small)
        wanted = {program_calls.prog_info(foreign).id, place.ids(pins.PROGRAMS)["connect4"]}
        assert set(place.attached()[10]) == wanted
        pins.remove_all(place.bpffs)
        assert place.attached()[10] == (program_calls.prog_info(foreign).id,)
    finally:
        for fd in (link, cgroup, foreign):
            os.close(fd)


def test_a_program_that_tolerates_no_other_does_so_for_those_below_it_only(place: Place, small: Artifact) -> None:
    """One such at a cgroup inside ours: both run for the processes there."""
    foreign = program_calls.prog_load(PROG_TYPE_CGROUP_SOCK_ADDR, move(0, 1) + EXIT, "foreign", 10)
    number = program_calls.prog_info(foreign).id
    inner = place.cgroup / "inner"
    inner.mkdir()
    attach = ["bpftool", "cgroup", "attach", str(inner), "connect4", "id", str(number)]
    subprocess.run(attach, check=True)
    directory = os.open(inner, os.O_RDONLY)
    try:
        place.loaded(small)
        both = {number, place.ids(pins.PROGRAMS)["connect4"]}
        assert set(program_calls.prog_query(directory, 10, effective=True)[1]) == both
    finally:
        os.close(directory)
        os.close(foreign)


@pytest.fixture
def elsewhere(place: Place) -> Iterator[Place]:
    """The same cgroup with another pin directory."""
    hierarchy = cgroup2()
    assert hierarchy is not None
    made = Place(hierarchy)
    made.cgroup.rmdir()
    made.cgroup = place.cgroup
    yield made
    pins.remove_all(made.bpffs)


def run_as(programs: Programs, netns: int) -> None:
    """Load, write the settings of that network namespace and a frontend, and attach, as a daemon that ends."""
    try:
        programs.open()
        width, size = SIZES["frontends"]
        map_calls.update(programs.maps["frontends"], bytes(width), bytes(size))
        row = struct.pack("=Q", netns).ljust(map_calls.map_info(programs.maps["settings"]).value_size, b"\0")
        map_calls.update(programs.maps["settings"], bytes(4), row)
        programs.attach()
    finally:
        programs.close()


def test_what_an_ebpflb_with_other_pins_left_is_replaced(
    place: Place, elsewhere: Place, small: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    """Its programs would run before ours, by rows that nobody keeps. It is said once whose they were."""
    run_as(elsewhere.programs(small), 7)
    foreign = program_calls.prog_load(PROG_TYPE_CGROUP_SOCK_ADDR, move(0, 1) + EXIT, "foreign", 10)
    cgroup = os.open(place.cgroup, os.O_RDONLY)
    link = program_calls.link_create(foreign, cgroup, 10)
    try:
        caplog.clear()
        place.loaded(small, 7)
        assert len(place.attached()[10]) == 3 and not caplog.records, "without rows ours can take nobody's place"
        for _ in range(2):
            run_as(place.programs(small, 7), 7)
        ours = place.ids(pins.PROGRAMS)
        assert set(place.attached()[10]) == {ours["connect4"], program_calls.prog_info(foreign).id}
        assert all(
            place.attached()[hook.attach_type] == (ours[name],)
            for name, hook in CGROUP_HOOKS.items()
            if name != "connect4"
        )
    finally:
        for fd in (link, cgroup, foreign):
            os.close(fd)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"cgroup {place.cgroup}: replaced the socket programs of the ebpflb with --bpffs {elsewhere.bpffs}, "
        "whose daemon is gone; ours run on devices, too, and connections on the packet path begin again"
    ]


def test_an_ebpflb_of_another_network_namespace_at_the_same_cgroup_is_named(
    place: Place, elsewhere: Place, small: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be alive: both run."""
    run_as(elsewhere.programs(small), 8)
    caplog.clear()
    run_as(place.programs(small, 7), 7)
    both = (elsewhere.ids(pins.PROGRAMS), place.ids(pins.PROGRAMS))
    assert place.attached() == {
        hook.attach_type: tuple(ids[name] for ids in both) for name, hook in CGROUP_HOOKS.items()
    }
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"the ebpflb with --bpffs {elsewhere.bpffs}, in another network namespace" in said and "--cgroup" in said


def test_an_ebpflb_whose_pins_are_gone_is_told_so(
    place: Place, elsewhere: Place, small: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    run_as(elsewhere.programs(small), 7)
    held = [syscall.obj_get(str(elsewhere.bpffs / pins.LINKS / name)) for name in CGROUP_HOOKS]
    for path in sorted(elsewhere.bpffs.glob("*/*")):
        path.unlink()
    caplog.clear()
    run_as(place.programs(small, 7), 7)
    for fd in held:
        os.close(fd)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "an ebpflb that has no pins here" in said


@pytest.mark.parametrize("where", ["at the cgroup", "above it"])
def test_a_program_that_tolerates_no_other_is_named(place: Place, small: Artifact, where: str) -> None:
    foreign = program_calls.prog_load(PROG_TYPE_CGROUP_SOCK_ADDR, move(0, 1) + EXIT, "foreign", 10)
    number = program_calls.prog_info(foreign).id
    inner = place.cgroup / "inner"
    inner.mkdir()
    subprocess.run(["bpftool", "cgroup", "attach", str(place.cgroup), "connect4", "id", str(number)], check=True)
    made = Programs(small, place.bpffs, inner if where == "above it" else place.cgroup, facts.netns_cookie())
    try:
        made.open()
        with pytest.raises(UserError, match=f"the BPF program {number} at {place.cgroup} tolerates no other"):
            made.attach()
        subprocess.run(["bpftool", "cgroup", "detach", str(place.cgroup), "connect4", "id", str(number)], check=True)
        made.attach()
        assert made.attach() == 0
    finally:
        made.close()
        os.close(foreign)


def test_directory_that_is_no_bpf_file_system(tmp_path: Path, small: Artifact) -> None:
    with pytest.raises(UserError, match=f"--bpffs: {tmp_path} is not in a BPF file system; give a directory in one"):
        Programs(small, tmp_path).open()


@pytest.mark.parametrize("what", ["open", "inventory", "prepare"])
def test_without_permission_one_is_told_to_be_root(place: Place, small: Artifact, what: str) -> None:
    place.loaded(small)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            try:
                if what == "open":
                    pins.opened(place.bpffs / "maps" / "settings")
                elif what == "inventory":
                    pins.inventory(place.bpffs)
                else:
                    pins.prepare(place.bpffs / "maps" / "inner")
                said = "nothing"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writing, said.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said.startswith("UserError: ")
    assert said.endswith(": run as root")


def test_cgroup_that_is_none(place: Place, small: Artifact, tmp_path: Path) -> None:
    for wrong, said in ((tmp_path, "not in a cgroup2 file system"), (tmp_path / "gone", "does not exist")):
        made = Programs(small, place.bpffs, wrong, facts.netns_cookie())
        made.open()
        with pytest.raises(UserError, match=said):
            made.attach()
        made.close()


def test_program_that_the_kernel_refuses(place: Place, small: Artifact) -> None:
    broken = msgspec.structs.replace(small.programs["connect4"], code=EXIT, relocations=())
    other = msgspec.structs.replace(small, programs={"connect4": broken})
    with pytest.raises(Unsupported, match=r"refuses the program connect4: .*R0 !read_ok"):
        place.loaded(other)


def test_bpffs_is_mounted_where_it_is_missing() -> None:
    """In a mount namespace of its own."""
    script = """
        set -e
        umount /sys/fs/bpf 2>/dev/null || true
        python -c 'import pathlib, ebpflb.dataplane.bpf.pins as p; p.prepare(pathlib.Path("/sys/fs/bpf/fresh"))'
        stat -f -c %T /sys/fs/bpf
        ls /sys/fs/bpf/fresh
        umount /sys/fs/bpf
    """
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "."}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.stdout.split() == ["bpf_fs", "links", "maps", "programs"], done.stderr


def exists(kind: str, number: int) -> bool:
    opener = {
        pins.MAPS: map_calls.map_by_id,
        pins.PROGRAMS: program_calls.program_by_id,
        pins.LINKS: program_calls.link_by_id,
    }[kind]
    try:
        os.close(opener(number))
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.EAGAIN)
        return False
    return True


def test_cleanup_leaves_nothing(place: Place, small: Artifact) -> None:
    place.loaded(small)
    found = list(pins.ours(place.bpffs))
    assert len(found) == len(small.maps) + len(small.programs) + len(CGROUP_HOOKS)
    promised = pins.inventory(place.bpffs)
    assert pins.remove_all(place.bpffs) == promised
    assert not place.bpffs.exists()
    assert not any(place.attached().values())
    shown = subprocess.run(["bpftool", "-j", "cgroup", "show", str(place.cgroup)], capture_output=True, check=False)
    assert shown.stdout.strip() in (b"", b"[]")
    deadline = time.monotonic() + DEADLINE
    while left := [pin for pin in found if exists(pin.kind, pin.id)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert pins.inventory(place.bpffs) == ()


def test_cleanup_after_the_cgroup_has_gone(place: Place, small: Artifact) -> None:
    place.loaded(small)
    place.cgroup.rmdir()
    assert len(pins.remove_all(place.bpffs)) == len(small.maps) + len(small.programs) + len(CGROUP_HOOKS)
    assert not place.bpffs.exists()
    place.cgroup.mkdir()


def test_cleanup_keeps_what_is_not_ours(place: Place, small: Artifact) -> None:
    place.loaded(small)
    foreign = map_calls.map_create(map_calls.MAP_HASH, 4, 4, 1, 0, "foreign")
    path = place.bpffs / "maps" / "foreign"
    try:
        syscall.obj_pin(foreign, str(path))
        pins.remove_all(place.bpffs)
        assert [each.name for each in place.bpffs.rglob("*")] == ["maps", "foreign"]
    finally:
        os.close(foreign)
        path.unlink(missing_ok=True)
