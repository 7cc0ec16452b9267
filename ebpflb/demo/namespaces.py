"""Network namespaces, cgroups and processes of one small cluster: how they are made, entered and removed.

Rules of this file: everything here is named after its cluster, so that removal needs no memory: `remove(name)` finds by
name whatever there is, in the right order, from any process and after any half-done set-up. Nothing outside of what
bears that name is touched. Commands run in sessions of their own, so that Ctrl-C reaches the caller alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ebpflb.errors import Unsupported, UserError

NETNS = Path("/run/netns")
STATE = Path("/run")

_CLONE_NEWNET = 0x40000000
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17
_libc = ctypes.CDLL(None, use_errno=True)

# Joins a cgroup ("" for none), enters a network namespace, becomes the program: in that order, since the sockets of the
# program must belong to both. Not `ip netns exec`: it would hide the cgroup and bpf mounts.
_ENTER = '[ -z "$1" ] || echo 0 >"$1/cgroup.procs" || exit 126; net=$2; shift 2; exec nsenter --net="$net" -- "$@"'


def path_of(namespace: str) -> Path:
    """The file that stands for a named network namespace."""
    return NETNS / namespace


def create(namespace: str) -> None:
    """Make a network namespace with its loopback up. Raises UserError if it cannot."""
    ip(None, [f"netns add {namespace}"])
    ip(namespace, ["link set lo up"])


def delete(namespace: str) -> None:
    """Kill whatever runs in a network namespace, and remove it; a missing one is no error."""
    for process in _processes(namespace):
        with suppress(ProcessLookupError):  # gone by itself
            os.kill(process, signal.SIGKILL)
    _quietly("ip", "netns", "delete", namespace)


def ip(namespace: str | None, lines: Sequence[str]) -> None:
    """Run `ip` commands in a namespace (None: none), all or the first that fails. Raises UserError with its words."""
    _batch("ip", namespace, lines)


def bridge(namespace: str, lines: Sequence[str]) -> None:
    """Run `bridge` commands in a namespace. Raises UserError with their words."""
    _batch("bridge", namespace, lines)


def nft(namespace: str, lines: Sequence[str]) -> None:
    """Load rules of nftables in a namespace. Raises UserError with its words."""
    _feed(["nsenter", f"--net={path_of(namespace)}", "nft", "-f", "-"], namespace, lines)


def _batch(tool: str, namespace: str | None, lines: Sequence[str]) -> None:
    _feed([tool, *(("-n", namespace) if namespace else ()), "-batch", "-"], namespace, lines)


def _feed(argv: Sequence[str], namespace: str | None, lines: Sequence[str]) -> None:
    if not lines:
        return
    text = "".join(f"{line}\n" for line in lines)
    done = _run(argv, text)
    if done.returncode:
        words = " ".join(done.stderr.split())
        raise UserError(f"cannot set up the network of {namespace or 'the cluster'}: {words}{_as_root()}")


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread is in a network namespace within the block: sockets made and sysctls written there belong to it."""
    with open("/proc/thread-self/ns/net", "rb") as home, open(path_of(namespace), "rb") as there:
        _set_namespace(there.fileno())
        try:
            yield
        finally:
            _set_namespace(home.fileno())


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def sysctl(namespace: str, values: Mapping[str, int | str]) -> None:
    """Write settings below /proc/sys/net of a namespace; keys are paths with slashes, such as `ipv4/ip_forward`."""
    with inside(namespace):
        for key, value in values.items():
            Path("/proc/sys/net", key).write_text(str(value))


def whole_checksums(namespace: str, device: str) -> None:
    """Let a device send packets with their checksums filled in (`ethtool -K DEVICE tx off`): between network namespaces
    the stack leaves that to whoever receives them, which no XDP program can see."""
    value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP8x", device.encode(), ctypes.addressof(value))
    with inside(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        fcntl.ioctl(asking, _SIOCETHTOOL, request)


def cgroup_root() -> Path:
    """Where cgroup2 is mounted. Raises Unsupported if it is not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise Unsupported("cgroup2 is not mounted: mkdir -p /run/cgroup2; mount -t cgroup2 none /run/cgroup2")


def spawn(namespace: str, cgroup: Path | None, argv: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
    """Start a program in a network namespace and a cgroup; `options` are Popen's."""
    prefix = ["sh", "-c", _ENTER, "enter", str(cgroup or ""), str(path_of(namespace))]
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen([*prefix, *argv], start_new_session=True, **options)  # type: ignore[call-overload, no-any-return]


def mount_bpffs(directory: Path) -> None:
    """A bpf file system of the cluster's own: what it pins is gone with its mount, and nobody else's is near."""
    directory.mkdir(parents=True, exist_ok=True)
    done = _run(["mount", "-t", "bpf", "none", str(directory)])
    if done.returncode:
        raise UserError(f"cannot mount a bpf file system: {' '.join(done.stderr.split())}{_as_root()}")


def _as_root() -> str:
    return "; run as root" if os.geteuid() else ""


def leftovers(name: str) -> tuple[str, ...]:
    """Everything that bears a cluster's name, one line each; () once it is removed."""
    return (
        *(f"process {process} in {namespace}" for namespace in _namespaces(name) for process in _processes(namespace)),
        *(f"network namespace {namespace}" for namespace in _namespaces(name)),
        *(f"mount {mount}" for mount in _mounts(name)),
        *(f"cgroup {cgroup}" for cgroup in _cgroups(name)),
        *(f"directory {STATE / name}" for _ in range((STATE / name).exists())),
    )


def remove(name: str) -> tuple[str, ...]:
    """Remove everything that bears a cluster's name; returns what would not go. Ctrl-C waits until it is done."""
    with _uninterrupted():
        for cgroup in _cgroups(name):
            with suppress(OSError):  # before 5.14 there is no such file; the namespaces' processes are killed anyway
                (cgroup / "cgroup.kill").write_text("1")
        for namespace in _namespaces(name):
            delete(namespace)
        for mount in _mounts(name):
            _quietly("umount", str(mount))
        if not _mounts(name):
            shutil.rmtree(STATE / name, ignore_errors=True)
        _remove_cgroups(name)
        return leftovers(name)


def _remove_cgroups(name: str) -> None:
    # A killed process counts as a member until it has been reaped by whoever started it.
    deadline = time.monotonic() + 30
    while (found := _cgroups(name)) and time.monotonic() < deadline:
        for cgroup in found:
            with suppress(OSError):  # not empty yet
                cgroup.rmdir()
        if _cgroups(name):
            with suppress(ChildProcessError):  # none of them was ours
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            time.sleep(0.005)


def _run(argv: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Ctrl-C waits for the command: one that was given up would go on making what is being removed already."""
    with _uninterrupted():
        return subprocess.run(argv, input=text, text=True, capture_output=True, start_new_session=True, check=False)


def _quietly(*argv: str) -> None:
    """What it was to remove is looked for again afterwards, by name."""
    _run(argv)


def _namespaces(name: str) -> list[str]:
    return sorted(path.name for path in NETNS.glob(f"{name}-*"))


def _processes(namespace: str) -> list[int]:
    done = _run(["ip", "netns", "pids", namespace])
    return [process for word in done.stdout.split() if (process := int(word)) != os.getpid()]


def _mounts(name: str) -> list[Path]:
    top = f"{STATE / name}/"
    points = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
    return sorted((Path(point) for point in points if point.startswith(top)), reverse=True)


def _cgroups(name: str) -> list[Path]:
    """Children before their parents."""
    with suppress(Unsupported):
        top = cgroup_root() / name
        if top.exists():
            return [Path(directory) for directory, _, _ in os.walk(top, topdown=False)]
    return []


@contextmanager
def _uninterrupted() -> Iterator[None]:
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
