"""Loads the programs, over maps that outlive them, and attaches the socket programs to a cgroup.

Rules of this file: every step may be done again and changes nothing that is right already. Programs and maps belong
together: maps of another shape are replaced as a whole, and programs with them, while the old programs, attached
still, go on with the old maps until `attach` replaces each in one step. Nobody else's program is ever detached, but
those that an ebpflb of the same network namespace left at the cgroup with pins elsewhere: see `others`.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from ebpflb.dataplane.bpf import map_calls, others, pins, program_calls, syscall
from ebpflb.dataplane.bpf.artifact import Artifact, MapSpec, Program
from ebpflb.dataplane.bpf.constants import CGROUP_HOOKS, PREFIX, PROG_TYPE_XDP
from ebpflb.dataplane.bpf.facts import cgroup2_root, filesystem_of, has_xdp_frags
from ebpflb.errors import ApplyError, Unsupported, UserError

log = logging.getLogger(__name__)

_ALLOW_MULTI = 2


class Programs:
    """The maps and programs under one pin directory.

    `netns` is the cookie of the network namespace whose node this is; None where the kernel does not tell it.
    `cgroup` is where the socket programs attach; None for the mounted root. `xdp`: whether XDP programs are loaded.
    """

    def __init__(
        self,
        artifact: Artifact,
        bpffs: Path,
        cgroup: Path | None = None,
        netns: int | None = None,
        *,
        xdp: bool = True,
    ) -> None:
        self._artifact = artifact
        self._bpffs = bpffs
        self._cgroup = cgroup
        self._netns = netns
        self._xdp = xdp
        self._maps: dict[str, int] = {}
        self._programs: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._looked = False

    @property
    def maps(self) -> Mapping[str, int]:
        """Descriptors of the maps by name, once `open` has returned."""
        return self._maps

    @property
    def programs(self) -> Mapping[str, int]:
        """Descriptors of the programs by C function, once `open` has returned."""
        return self._programs

    @property
    def refused(self) -> Mapping[str, str]:
        """XDP programs that the kernel refuses, by C function, with the reason: Services are carried without them."""
        return self._refused

    def open(self) -> bool:
        """Open or make the maps, load the programs, pin both; attaches nothing. Returns whether the maps are new and
        empty, in which case rows should be written before `attach`, lest an upgrade refuses what worked.

        Raises UserError (no BPF file system, another instance's directory), Unsupported (a program is refused) or
        ApplyError.
        """
        self.close()
        syscall.raise_memlock_limit()
        pins.prepare(self._bpffs)
        self._refuse_foreign_instance()
        found = open_maps(self._bpffs, self._artifact)
        if found is None:
            self._make_maps()
        else:
            self._maps = found
        frags = program_calls.F_XDP_HAS_FRAGS if self._xdp and has_xdp_frags() else 0
        for program in self._artifact.programs.values():
            if program.type != PROG_TYPE_XDP:
                self._programs[program.name] = self._load(program)
            elif self._xdp:
                try:
                    self._programs[program.name] = self._load(program, frags)
                except Unsupported as error:
                    self._refused[program.name] = str(error)
            else:
                (self._bpffs / pins.PROGRAMS / program.name).unlink(missing_ok=True)
        return found is None

    def close(self) -> None:
        """Close the descriptors; what is pinned and attached stays."""
        for fd in (*self._maps.values(), *self._programs.values()):
            os.close(fd)
        self._maps.clear()
        self._programs.clear()
        self._refused.clear()

    def repin(self) -> int:
        """Pin again what somebody has unpinned or replaced; how many. Raises ApplyError or UserError."""
        pins.prepare(self._bpffs)
        done = 0
        for kind, held in ((pins.MAPS, self._maps), (pins.PROGRAMS, self._programs)):
            for name, fd in held.items():
                path = self._bpffs / kind / name
                pinned = pins.opened(path)
                if pinned is not None:
                    same = _identity(kind, pinned) == _identity(kind, fd)
                    os.close(pinned)
                    if same:
                        continue
                pins.put(fd, path)
                done += 1
        return done

    def _refuse_foreign_instance(self) -> None:
        """A network namespace has its own routes: two that share a directory would undo each other's."""
        spec = self._artifact.maps.get("settings")
        fd = pins.opened(self._bpffs / pins.MAPS / "settings")
        if fd is None:
            return
        try:
            info = map_calls.map_info(fd)
            # Of all versions of the row, the owner is at the same place.
            at = spec.value.field("netns").offset if spec else 0
            if self._netns is None or info.value_size < at + 8:
                return
            row = map_calls.lookup(fd, bytes(info.key_size), info.value_size) or bytes(info.value_size)
        finally:
            os.close(fd)
        (owner,) = struct.unpack_from("=Q", row, at)
        if owner not in (0, self._netns):
            raise UserError(
                f"{self._bpffs} belongs to the ebpflb of another network namespace: give --bpffs another directory "
                f"(or, if that namespace has gone: ebpflb cleanup --bpffs {self._bpffs})"
            )

    def _make_maps(self) -> None:
        directory = self._bpffs / pins.MAPS
        for pin in list(pins.ours(self._bpffs)):
            # Links stay until `attach` gives them the new programs, which makes the change one step for each hook.
            if pin.kind != pins.LINKS:
                pin.path.unlink(missing_ok=True)
        for spec in self._artifact.maps.values():
            self._maps[spec.name] = fd = _create(spec)
            pins.put(fd, directory / spec.name)

    def _load(self, program: Program, flags: int = 0) -> int:
        """The pinned program if it is what we would load, else a new one, pinned in its place. `flags` are BPF_F_…"""
        path = self._bpffs / pins.PROGRAMS / program.name
        try:
            fresh = program_calls.prog_load(
                program.type, program.patched(self._maps), program.kernel_name, program.attach_type, flags=flags
            )
        except program_calls.VerifierError as error:
            log.error("%s", error.log)
            if error.errno == errno.EPERM:
                raise UserError("loading BPF programs is not permitted: run as root") from None
            raise Unsupported(f"the kernel refuses the program {program.name}: {error.strerror}") from None
        pinned = pins.opened(path)
        if pinned is not None:
            if _same(pinned, fresh):
                os.close(fresh)
                return pinned
            os.close(pinned)
        try:
            pins.put(fresh, path)
        except ApplyError:
            os.close(fresh)
            raise
        return fresh

    def attach(self) -> int:
        """Have every socket program run for the cgroup, each replaced in one step; returns how many had to be changed.

        Raises UserError (no such cgroup, or somebody attached a program that tolerates no other) or ApplyError.
        """
        directory = cgroup_directory(self._cgroup)
        cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            wanted = [program for program in self._artifact.programs.values() if program.name in CGROUP_HOOKS]
            changed = sum(self._attach(program, cgroup, directory) for program in wanted)
            self._succeed(cgroup, directory)
            return changed
        finally:
            os.close(cgroup)

    def _succeed(self, cgroup: int, directory: Path) -> None:
        """What another ebpflb left at this cgroup ends, once, when ours run and have rows: the kernel runs the older
        ones first, and sockets would be led by rows that nobody keeps any more."""
        try:
            if self._looked or not self._has_rows():
                return
            self._looked = True
            found = self._others(cgroup)
            left = [other for other in found if other.netns == self._netns]
            others.end(os.fstat(cgroup).st_ino, left)
        except OSError as error:
            log.warning("cgroup %s: whether another ebpflb was here cannot be seen: %s", directory, error.strerror)
            return
        if left:
            log.warning(
                "cgroup %s: replaced the socket programs of %s, whose daemon is gone; ours run on devices, too, and "
                "connections on the packet path begin again",
                directory, others.described(left),
            )  # fmt: skip
        beside = [other for other in found if other not in left]
        if beside:
            log.warning(
                "cgroup %s: the socket programs of %s, in another network namespace, lead the same sockets: give each "
                "ebpflb a --cgroup of its own",
                directory, others.described(beside),
            )  # fmt: skip

    def succeeds(self) -> bool:
        """Whether an ebpflb with other pins has left socket programs at the cgroup, which serve until ours have rows.
        Raises UserError for a cgroup that is none."""
        cgroup = os.open(cgroup_directory(self._cgroup), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return any(other.netns == self._netns for other in self._others(cgroup))
        except OSError:
            return False  # `attach` says so
        finally:
            os.close(cgroup)

    def _has_rows(self) -> bool:
        """Whether a frontend is there. Raises OSError."""
        fd = self._maps["frontends"]
        return map_calls.next_key(fd, None, map_calls.map_info(fd).key_size) is not None

    def _others(self, cgroup: int) -> tuple[others.Other, ...]:
        """The socket programs of other ebpflbs at a cgroup. Raises OSError."""
        maps = {map_calls.map_info(fd).id for fd in self._maps.values()}
        hooks = CGROUP_HOOKS.items()
        running = [(name, id) for name, hook in hooks for id in program_calls.prog_query(cgroup, hook.attach_type)[1]]
        return others.among(running, maps, self._bpffs)

    def _attach(self, program: Program, cgroup: int, directory: Path) -> bool:
        path = self._bpffs / pins.LINKS / program.name
        fd = self._programs[program.name]
        link = pins.opened(path)
        if link is not None:
            try:
                info = program_calls.link_info(link)
                # The cgroup's inode number is 0 once the cgroup has been removed or the link been detached.
                if info.cgroup == os.fstat(cgroup).st_ino:
                    if info.program == program_calls.prog_info(fd).id:
                        return False
                    program_calls.link_update(link, fd)
                    return True
            except OSError as error:
                raise ApplyError(
                    pins.LINKS, program.name, error.errno or 0, f"{path} cannot be updated: {error.strerror}"
                ) from error
            finally:
                os.close(link)
        try:
            made = program_calls.link_create(fd, cgroup, program.attach_type)
        except OSError as error:
            raise _refused(error, program, directory) from error
        try:
            # A link to another cgroup ends here, with its last pin, after the new one has begun.
            pins.put(made, path)
        finally:
            os.close(made)
        return True


def cgroup_directory(cgroup: Path | None) -> Path:
    """The cgroup to attach to; raises UserError if there is no such cgroup."""
    directory = cgroup or cgroup2_root()
    if directory is None:
        raise UserError("cgroup2 is not mounted: mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2")
    if not directory.is_dir():
        raise UserError(f"--cgroup: {directory} does not exist")
    if filesystem_of(directory).type != "cgroup2":
        raise UserError(f"--cgroup: {directory} is not in a cgroup2 file system; give a directory of cgroup2")
    return directory


def open_maps(bpffs: Path, artifact: Artifact) -> dict[str, int] | None:
    """Descriptors of all maps that `artifact` has, as pinned under `bpffs`; None if none is pinned, or if they are of
    another version (said in the log). Changes nothing."""
    found: dict[str, int] = {}
    reason = ""
    for spec in artifact.maps.values():
        fd = pins.opened(bpffs / pins.MAPS / spec.name)
        if fd is None:
            reason = reason or f"the map {spec.name} is missing"
            continue
        found[spec.name] = fd
        info = map_calls.map_info(fd)
        have = (info.type, info.key_size, info.value_size, info.max_entries, info.flags)
        want = (spec.type, spec.key.size, spec.value.size, spec.max_entries, spec.flags)
        if have != want:
            reason = reason or f"the map {spec.name} is (type, key, value, entries, flags) {have} instead of {want}"
    if found and not reason:
        reason = _other_layout(found, artifact)
    if not reason and found:
        return found
    if found:
        log.warning(
            "the maps under %s are of another version, and made anew: what came from outside begins again (%s)",
            bpffs,
            reason,
        )
    for fd in found.values():
        os.close(fd)
    return None


def _other_layout(maps: Mapping[str, int], artifact: Artifact) -> str:
    """Why the rows are not to be read as ours: their version, which the settings row tells."""
    layout = artifact.numbers.get("LAYOUT")
    spec = artifact.maps.get("settings")
    if layout is None or spec is None:
        return ""
    row = map_calls.lookup(maps["settings"], bytes(spec.key.size), spec.value.size) or bytes(spec.value.size)
    (have,) = struct.unpack_from("=I", row, spec.value.field("layout").offset)
    return f"their layout is {have} instead of {layout}" if have not in (0, layout) else ""


def _create(spec: MapSpec) -> int:
    try:
        return map_calls.map_create(
            spec.type, spec.key.size, spec.value.size, spec.max_entries, spec.flags, PREFIX + spec.name
        )
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UserError("making BPF maps is not permitted: run as root") from None
        raise ApplyError(
            pins.MAPS, spec.name, error.errno or 0, f"the map {spec.name} cannot be made: {error.strerror}"
        ) from error


def _identity(kind: str, fd: int) -> int:
    """The kernel's id of a map or program; 0 for something else."""
    try:
        return map_calls.map_info(fd).id if kind == pins.MAPS else program_calls.prog_info(fd).id
    except OSError:
        return 0


def _same(one: int, other: int) -> bool:
    """Whether two programs have the same instructions over the same maps."""
    first, second = program_calls.prog_info(one), program_calls.prog_info(other)
    return (first.type, first.tag, first.map_ids) == (second.type, second.tag, second.map_ids)


def _attached(cgroup: Path, attach_type: int) -> tuple[int, tuple[int, ...]]:
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return program_calls.prog_query(fd, attach_type)
    finally:
        os.close(fd)


def _refused(error: OSError, program: Program, directory: Path) -> ApplyError | UserError:
    """What an attachment's refusal means: EPERM is mostly somebody's program that tolerates no other."""
    if error.errno == errno.EPERM:
        place = directory
        while filesystem_of(place).type == "cgroup2":
            flags, ids = _attached(place, program.attach_type)
            if ids and not flags & _ALLOW_MULTI:
                return UserError(
                    f"the BPF program {ids[0]} at {place} tolerates no other for {program.name}: detach it "
                    f"(bpftool cgroup show {place}) or have it attached with the flag multi"
                )
            place = place.parent
    message = f"{program.name} cannot be attached to {directory}: {error.strerror}"
    return ApplyError(pins.LINKS, program.name, error.errno or 0, message)
