"""The pin directory: where maps, programs and links live on between daemons, and how all of it is removed again.

    <bpffs>/maps/<name>   <bpffs>/programs/<C function>   <bpffs>/links/<C function>, xdp-<index of the device>

Rules of this file: only what bears our names is ever removed, whatever directory we are given. A pin is replaced by a
rename, so that its name always leads to a whole object. The file system itself is mounted where it plainly should be,
and never unmounted: others may have begun to use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ebpflb.dataplane.bpf import map_calls, program_calls, syscall
from ebpflb.dataplane.bpf.constants import CGROUP_HOOKS, PREFIX
from ebpflb.dataplane.bpf.facts import filesystem_of
from ebpflb.errors import ApplyError, UserError

log = logging.getLogger(__name__)

MAPS, PROGRAMS, LINKS = "maps", "programs", "links"
_KINDS = (LINKS, PROGRAMS, MAPS)
"""In the order of removal: what is attached first."""
_USUAL = Path("/sys/fs/bpf")
_FRESH = "_fresh"


class Pin(NamedTuple):
    """One of our pins: `kind` is MAPS, PROGRAMS or LINKS; `kernel_name` is what bpftool shows of the object (of a
    link: its program's name)."""

    kind: str
    path: Path
    kernel_name: str
    id: int


def require_place(bpffs: Path) -> None:
    """Raises UserError unless `bpffs` is on a BPF file system, or would be if one were mounted at its usual place."""
    if filesystem_of(bpffs).type != "bpf" and not bpffs.resolve().is_relative_to(_USUAL):
        raise UserError(
            f"--bpffs: {bpffs} is not in a BPF file system; give a directory in one, such as {_USUAL / 'ebpflb'}"
        )


def require_file_system(bpffs: Path) -> None:
    """As `require_place`, and mounts the BPF file system if it is only missing at its usual place. Raises UserError
    with what helps."""
    require_place(bpffs)
    if filesystem_of(bpffs).type == "bpf":
        return
    remedy = f"mount -t bpf bpf {_USUAL}"
    try:
        if not _USUAL.is_dir() or any(_USUAL.iterdir()):
            raise UserError(f"{bpffs} is not on a BPF file system: {remedy}")
        _mount(_USUAL)
    except OSError as error:
        raise UserError(f"the BPF file system cannot be mounted ({error.strerror}): {remedy}") from None
    log.info("mounted the BPF file system at %s", _USUAL)


def prepare(bpffs: Path) -> None:
    """Make the three directories, on a BPF file system that is mounted first if need be. Raises UserError with what
    helps."""
    require_file_system(bpffs)
    try:
        for kind in (MAPS, PROGRAMS, LINKS):
            (bpffs / kind).mkdir(mode=0o700, parents=True, exist_ok=True)
    except PermissionError:
        raise UserError(f"{bpffs / kind} may not be made: run as root") from None
    except OSError as error:
        raise UserError(f"cannot make {bpffs / kind}: {error.strerror}: give --bpffs another directory") from None


def _mount(directory: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(directory), b"bpf", ctypes.c_ulong(0), b"mode=700") < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def opened(path: Path) -> int | None:
    """A descriptor of what is pinned at `path`; None if nothing is. Raises UserError (no permission) or ApplyError."""
    try:
        return syscall.obj_get(str(path))
    except FileNotFoundError:
        return None
    except PermissionError:
        raise UserError(f"{path} may not be opened: run as root") from None
    except OSError as error:
        raise ApplyError(path.parent.name, path.name, error.errno or 0, f"{path}: {error.strerror}") from error


def put(fd: int, path: Path) -> None:
    """Pin `fd` at `path`, in place of what may be there. Raises ApplyError."""
    fresh = path.with_name(path.name + _FRESH)
    try:
        fresh.unlink(missing_ok=True)
        syscall.obj_pin(fd, str(fresh))
        os.rename(fresh, path)
    except OSError as error:
        message = f"cannot pin {path}: {error.strerror}"
        raise ApplyError(path.parent.name, path.name, error.errno or 0, message) from error


def ours(bpffs: Path) -> Iterator[Pin]:
    """Everything of ours under `bpffs`, links first. Raises UserError or ApplyError for what cannot be opened."""
    for kind in _KINDS:
        directory = bpffs / kind
        try:
            paths = sorted(directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            raise UserError(f"{directory} may not be read: run as root") from None
        for path in paths:
            fd = opened(path) if path.is_file() else None
            if fd is None:
                continue
            try:
                found = _identify(kind, fd, path)
            except OSError:
                continue  # a pin of another kind of object than the directory is for: not ours
            finally:
                os.close(fd)
            if found is not None and found[0].startswith(PREFIX):
                yield Pin(kind, path, *found)


def _identify(kind: str, fd: int, path: Path) -> tuple[str, int] | None:
    """(kernel name, id) of the object, if it is of that kind."""
    target = os.readlink(f"/proc/self/fd/{fd}")
    if kind == MAPS and "bpf-map" in target:
        described = map_calls.map_info(fd)
        return described.name, described.id
    if kind == PROGRAMS and "bpf-prog" in target:
        program = program_calls.prog_info(fd)
        return program.name, program.id
    if kind == LINKS and ("bpf_link" in target or "bpf-link" in target):
        link = program_calls.link_info(fd)
        try:
            attached = program_calls.program_by_id(link.program)
        except FileNotFoundError:
            # Its cgroup has gone and took the program along: the name of the pin is all there is to tell by.
            hook = CGROUP_HOOKS.get(path.name.removesuffix(_FRESH))
            return (hook.kernel_name, link.id) if hook else None
        try:
            return program_calls.prog_info(attached).name, link.id
        finally:
            os.close(attached)
    return None


def complete(bpffs: Path, maps: Iterable[str]) -> bool:
    """Whether there are pins of these maps and of every hook's link, whatever they lead to."""
    wanted = [bpffs / MAPS / name for name in maps] + [bpffs / LINKS / hook for hook in CGROUP_HOOKS]
    return all(os.path.lexists(path) for path in wanted)


def inventory(bpffs: Path) -> tuple[str, ...]:
    """One line for each pin of ours; () if there is none."""
    return tuple(f"{pin.kind[:-1]} {pin.path} (id {pin.id})" for pin in ours(bpffs))


def remove_all(bpffs: Path) -> tuple[str, ...]:
    """Detach, unpin and remove our directories; what was removed, one line each. What is not ours stays, and with it
    the directory that it is in. Raises ApplyError."""
    removed = []
    for pin in list(ours(bpffs)):
        if pin.kind == LINKS:
            _detach(pin.path)
        try:
            pin.path.unlink(missing_ok=True)
        except OSError as error:
            raise ApplyError(pin.kind, pin.path.name, error.errno or 0, f"{pin.path}: {error.strerror}") from error
        removed.append(f"{pin.kind[:-1]} {pin.path} (id {pin.id})")
    for directory in (*(bpffs / kind for kind in _KINDS), bpffs):
        with contextlib.suppress(OSError):  # absent, or somebody else's things are in it
            directory.rmdir()
    return tuple(removed)


def _detach(path: Path) -> None:
    """Removing the last pin detaches a link too, but later, when the kernel's worker comes to it."""
    link = opened(path)
    if link is None:
        return
    try:
        with contextlib.suppress(OSError):  # kernels before 5.9 leave it to the pin's removal
            program_calls.link_detach(link)
    finally:
        os.close(link)
