"""What this kernel and this network namespace are like, as the BPF dataplane must know it.

Rules of this file: it asks and never changes anything that outlives the call. A fact that cannot be had is None or
False, not an exception, and who asked decides what that means; only what nothing works without raises OSError.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ebpflb.dataplane import Requirement
from ebpflb.dataplane.bpf import maglev, map_calls, program_calls, syscall, tc, tcx
from ebpflb.dataplane.bpf.artifact import compiler_version
from ebpflb.dataplane.bpf.assembly import EXIT, assemble, call, cell, instruction, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_CGROUP_SOCK_ADDR, PROG_TYPE_SCHED_CLS, PROG_TYPE_XDP
from ebpflb.rtnetlink import Netlink

_SO_NETNS_COOKIE = 71
_CONNECT4 = 10
_GETPEERNAME4 = 29
_HELPER_JIFFIES = 118
_HELPER_NETNS_COOKIE = 122
_HELPER_SET_RETVAL = 187
_XDP = 37
_XDP_PASS = assemble(move(0, 2), EXIT)
_CLOCK_MONOTONIC_COARSE = 6
_CAP_NET_ADMIN, _CAP_SYS_ADMIN, _CAP_BPF = 12, 21, 39
_CLONE_NEWNET = 0x40000000
_LOOPBACK = 1


class Mount(NamedTuple):
    """One line of mountinfo: where, and of what type."""

    directory: Path
    type: str


def mounts() -> tuple[Mount, ...]:
    """What is mounted in this mount namespace; a later one hides an earlier one at the same place."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        directory = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4])
        found.append(Mount(Path(directory), after.split()[0]))
    return tuple(found)


def filesystem_of(path: Path) -> Mount:
    """The mount that `path`, which need not exist, is or would be on."""
    real = path.resolve()
    best = Mount(Path("/"), "")
    for mount in mounts():
        if real.is_relative_to(mount.directory) and len(mount.directory.parts) >= len(best.directory.parts):
            best = mount
    return best


def cgroup2_root() -> Path | None:
    """Where cgroup2 is mounted (also beside cgroup1, as /sys/fs/cgroup/unified); None if it is not."""
    return next((mount.directory for mount in mounts() if mount.type == "cgroup2"), None)


def kernel_release() -> str:
    """As `uname -r`."""
    return os.uname().release


def netns_cookie(cgroup: Path | None = None) -> int | None:
    """The number that identifies the network namespace of this thread until the machine restarts; never 0.

    Kernels before 5.14 tell it to programs only, which then takes a moment's cgroup inside `cgroup` (None: inside the
    mounted root). None if that fails too.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            data = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError:
            return cookie_by_program(cgroup or cgroup2_root())
    return int(struct.unpack("=Q", data)[0])


def cookie_by_program(cgroup: Path | None) -> int | None:
    """As `netns_cookie`, the long way: a child in a cgroup of its own connects, and a program there says where from."""
    if cgroup is None:
        return None
    inner = cgroup / f"ebpflb-{os.getpid()}"
    with ExitStack() as stack:
        try:
            told = map_calls.map_create(map_calls.MAP_ARRAY, 4, 8, 1, 0, "ebpflb_cookie")
            stack.callback(os.close, told)
            code = assemble(
                instruction(0xBF, 6, 1),  # r6 = context
                cell(told),
                instruction(0xBF, 7, 0),  # r7 = cell
                instruction(0xBF, 1, 6),
                call(_HELPER_NETNS_COOKIE),
                instruction(0x7B, 7, 0),  # *(u64 *)r7 = r0
                move(0, 1),
                EXIT,
            )
            program = program_calls.prog_load(PROG_TYPE_CGROUP_SOCK_ADDR, code, "ebpflb_cookie", _CONNECT4)
            stack.callback(os.close, program)
            inner.mkdir()
            stack.callback(inner.rmdir)
            directory = os.open(inner, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, directory)
            stack.callback(os.close, program_calls.link_create(program, directory, _CONNECT4))
            _connect_in(inner)
            cookie = map_calls.lookup(told, bytes(4), 8)
        except OSError:
            return None
    return struct.unpack("=Q", cookie)[0] or None if cookie else None


def _connect_in(cgroup: Path) -> None:
    """Connect a UDP socket to nowhere in particular, in a child that joins the cgroup for that and ends."""
    child = os.fork()
    if child == 0:
        try:
            (cgroup / "cgroup.procs").write_text("0")
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def jiffies_per_second() -> int:
    """CONFIG_HZ: the coarse clocks advance once a tick, and say so (Linux 2.6.32)."""
    return round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))


def jiffies() -> int:
    """The lower 32 bits of the kernel's jiffies: nothing but a program can ask for them. Raises OSError."""
    fd = program_calls.prog_load(PROG_TYPE_SCHED_CLS, assemble(call(_HELPER_JIFFIES), EXIT), "ebpflb_jiffies")
    try:
        return program_calls.prog_test_run(fd, bytes(14)).verdict & 0xFFFFFFFF
    finally:
        os.close(fd)


def loads(type: int, code: bytes, attach_type: int = 0, flags: int = 0) -> bool:
    """Whether the kernel accepts a program."""
    try:
        os.close(program_calls.prog_load(type, code, "ebpflb_probe", attach_type, flags=flags))
    except OSError:
        return False
    return True


def has_set_retval() -> bool:
    """Whether sock_addr programs may call bpf_set_retval (5.18), which is how a refusal gets its errno."""
    code = assemble(move(1, -111), call(_HELPER_SET_RETVAL), move(0, 1), EXIT)
    return loads(PROG_TYPE_CGROUP_SOCK_ADDR, code, _CONNECT4)


def has_socket_programs() -> bool:
    """Whether sock_addr programs, getpeername included (5.8), may ask for their network namespace."""
    code = assemble(call(_HELPER_NETNS_COOKIE), move(0, 1), EXIT)
    return loads(PROG_TYPE_CGROUP_SOCK_ADDR, code, _CONNECT4) and loads(
        PROG_TYPE_CGROUP_SOCK_ADDR, assemble(move(0, 1), EXIT), _GETPEERNAME4
    )


def has_xdp_frags() -> bool:
    """Whether XDP programs may take frames that lie in several buffers (5.18), without which drivers refuse them where
    the MTU is larger than a buffer."""
    return loads(PROG_TYPE_XDP, _XDP_PASS, _XDP, program_calls.F_XDP_HAS_FRAGS)


def has_clsact() -> bool:
    """Whether devices can have tc programs on both sides; tried on the loopback of a network namespace that exists for
    that only. False also where none can be made."""
    found: list[bool] = []
    libc = ctypes.CDLL(None, use_errno=True)

    def attempt() -> None:
        # The namespace is this thread's alone, and goes with it.
        if libc.unshare(_CLONE_NEWNET) < 0:
            return
        requests = Netlink()
        try:
            program = program_calls.prog_load(PROG_TYPE_SCHED_CLS, assemble(move(0, -1), EXIT), "ebpflb_probe")
            try:
                tc.add_clsact(requests, _LOOPBACK)
                for parent in (tc.INGRESS, tc.EGRESS):
                    tc.put_filter(requests, _LOOPBACK, parent, 1, 1, program, "ebpflb_probe", replace=False)
            finally:
                os.close(program)
            found.append(True)
        except OSError:
            return
        finally:
            requests.close()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(found)


def bpf_refusal() -> str:
    """Why bpf(2) cannot be used at all, "" if it can: the kernel has none, or it is kept from this process, which a
    seccomp profile does with either errno."""
    if not syscall.supported():
        return "its number on this kind of machine is not known"
    try:
        next(map_calls.map_ids(), None)
    except OSError as error:
        # Without the capability for it, the kernel itself says EPERM to this question.
        if error.errno == errno.ENOSYS or (error.errno == errno.EPERM and may_administrate()):
            return os.strerror(error.errno)
    return ""


def may_administrate() -> bool:
    """Whether this process has the capabilities that loading and attaching need."""
    effective = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    bpf = effective >> _CAP_SYS_ADMIN & 1 or effective >> _CAP_BPF & 1
    return bool(bpf and effective >> _CAP_NET_ADMIN & 1)


def has_uapi_headers() -> bool:
    """Whether the headers of linux-libc-dev are installed."""
    return Path("/usr/include/linux/in.h").exists()


def requirements(bpffs: Path, cgroup: Path | None = None, *, compiled: bool = False) -> tuple[Requirement, ...]:
    """All that this dataplane needs here, found or missing; `bpffs` is the pin directory, `cgroup` the wanted cgroup
    (None: the mounted root). `compiled`: the programs are in the cache already, so that no compiler is needed."""
    root = may_administrate()
    mounted = filesystem_of(bpffs)
    automatic = bpffs.resolve().is_relative_to("/sys/fs/bpf") and Path("/sys/fs/bpf").is_dir()
    where = cgroup or cgroup2_root()
    is_cgroup = where is not None and where.is_dir() and filesystem_of(where).type == "cgroup2"
    version = compiler_version()
    refusal = bpf_refusal()
    with_tcx = tcx.supported()
    # Without bpf(2) nothing can be said about programs.
    able, helps = root and not refusal, "run as root" if not root else "bpf(2) first" if refusal else ""
    return (
        Requirement("privileges", root, "CAP_BPF or CAP_SYS_ADMIN, and CAP_NET_ADMIN", "run as root"),
        Requirement(
            "bpf",
            not refusal,
            f"bpf(2) of kernel {kernel_release()}" + (f": {refusal}" if refusal else ""),
            "a kernel with CONFIG_BPF_SYSCALL, and in a container a seccomp profile that lets bpf(2) pass",
        ),
        Requirement(
            "socket programs",
            able and has_socket_programs(),
            "cgroup programs that know their network namespace",
            helps or "kernel 5.10 or newer with CONFIG_CGROUP_BPF",
        ),
        Requirement(
            "packet programs",
            able and (with_tcx or has_clsact()),
            "tc programs on both sides of a device",
            helps or "kernel 5.10 or newer with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF",
        ),
        Requirement(
            "tcx",
            able and with_tcx,
            "tc programs come to a device, and go, without a datagram lost",
            helps or "kernel 6.6 or newer",
            essential=False,
        ),
        Requirement(
            "errno of a refusal",
            able and has_set_retval(),
            "bpf_set_retval, with which a refused connect fails at once",
            helps or "kernel 5.18 or newer",
            essential=False,
        ),
        Requirement(
            "maglev.c",
            not maglev.missing(),
            maglev.missing() or "fills tables of consistent hashing",
            "run `make setup`, or reinstall with a C compiler at hand",
            essential=False,
        ),
        Requirement(
            "bpffs",
            mounted.type == "bpf" or automatic,
            f"{bpffs} on {mounted.type or 'nothing'}",
            "mount -t bpf bpf /sys/fs/bpf",
        ),
        Requirement(
            "cgroup2",
            is_cgroup,
            str(where) if where else "cgroup2 is not mounted",
            "--cgroup with a directory of cgroup2, or: mkdir -p /run/cgroup2; mount -t cgroup2 none /run/cgroup2",
        ),
        Requirement(
            "compiler",
            bool(version),
            f"bcc {version}" if version else "no bcc",
            "apt-get install python3-bpfcc",
            essential=not compiled,
        ),
        Requirement(
            "headers",
            has_uapi_headers(),
            "/usr/include/linux",
            "apt-get install linux-libc-dev",
            essential=not compiled,
        ),
    )
