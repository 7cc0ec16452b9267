"""Runs a command on another kernel: in an emulated machine whose files are this machine's.

    python -m tests.vm.machine --kernel 6.12 -- .venv/bin/python -m pytest -m vm tests/vm/test_ipvs.py

Standard output and error of the command come out as it runs, and its exit status is this program's; 124 if it took
longer than --timeout, 125 if the machine did not come up or died. Inside:

* root, in the same directory; one processor, emulated (some ten to thirty times slower than a real one);
* the root file system is this machine's, read only; /usr, /etc, /var, /opt, /home are writable for as long as the
  machine runs; /tmp is empty; `artifacts/` is this machine's, so that what is written there stays;
* cgroup2 at /sys/fs/cgroup and nothing beside it, bpffs, and every module of the kernel's networking;
* no network but a loopback interface; the variables of our tests (EBPFLB_*), and EBPFLB_VM, the kernel's name.

Rules of this file: it never uses /dev/kvm, whose guests hang on machines that are themselves virtual in some ways; a
test in here must not depend on being fast. Nor has it more than one processor unless it is asked: where the guest
patches its own code while another processor runs it, QEMU up to 7.2 shows that one half of the patch now and then. A
machine that hangs is ended and its console shown; one that dies before the command has begun is started again. What it
needs beside Python's library: virtme-ng (in .venv), qemu-system-x86, busybox-static, kmod.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.vm.kernels import DEFAULT, MATRIX, Kernel, Missing, fetch

CHECKOUT = Path(__file__).resolve().parents[2]
ARTIFACTS = CHECKOUT / "artifacts"
LOGS = ARTIFACTS / "vm"
CACHE = LOGS / "cache"
"""Where what is compiled in a machine stays, by kernel and source: it takes a minute in there."""
BIN = Path(__file__).resolve().with_name("bin")
OLD_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
NEW_VIRTIOFSD = Path("/usr/libexec/virtiofsd")  # in no PATH; vng looks there, too

TIMED_OUT, NO_MACHINE = 124, 125
CONSOLE_LINES = 60
BOOTS = 3
LOOK_SECONDS = 0.2
PACE = 12
"""How many times slower than this machine the emulated one is, as tests/pace.py means it."""

# What the init of virtme-ng leaves to do, then the command. Its words come as arguments.
_INSIDE = r"""
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export PYTHONDONTWRITEBYTECODE=1
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs tmpfs /run/lock 2>/dev/null
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
modprobe tun  # without udev nothing makes /dev/net/tun, whose opening would load it
modprobe -q dummy numdummies=0  # loaded by itself, for kube-ipvs0, it would come with a device that nobody asked for
ulimit -n 65536
cd "$1" && share=$2 && shift 2
: >"$share/began"
"$@" >"$share/output" 2>&1 </dev/null
echo $? >"$share/status.new"
mv "$share/status.new" "$share/status"
sync
"""


def run(kernel: Kernel, command: Sequence[str], *, timeout: float, memory: str = "3G", cpus: int = 1) -> int:
    """Run `command` in a machine of that kernel, copying what it says to standard output; its exit status, TIMED_OUT
    or NO_MACHINE. Its console is kept in artifacts/vm/. Raises Missing if something that is needed is not installed."""
    _needed()
    LOGS.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    for boot in range(1, BOOTS + 1):
        with tempfile.TemporaryDirectory(prefix=f"{kernel.name}-", dir=LOGS) as share, _private_home() as home:
            words = [*("--memory", memory, "--cpus", str(cpus))]
            over = _boot(kernel, command, words, Path(share), home, deadline)
            began, status = (Path(share) / name for name in ("began", "status"))
            if status.exists():
                return int(status.read_text())
            again = not over and not began.exists() and boot < BOOTS
        console = _console(kernel)
        for line in console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]:
            print(f"vm: | {line}", file=sys.stderr)
        why = f"took longer than {timeout:.0f} s" if over else "ended without an answer"
        print(f"vm: the machine with {kernel.release} {why}; its console is in {console}", file=sys.stderr)
        if not again:
            break
        print("vm: it had not begun; starting it again", file=sys.stderr)
    return TIMED_OUT if over else NO_MACHINE


def _boot(
    kernel: Kernel, command: Sequence[str], options: Sequence[str], share: Path, home: Path, deadline: float
) -> bool:
    """One life of a machine: the command's words go to standard output, its status to `share`. Whether its time was
    over first."""
    (share / "output").touch()
    (share / "inside").write_text(_INSIDE)
    inside = shlex.join(["/bin/sh", str(share / "inside"), os.getcwd(), str(share), "env", *_variables(kernel)])
    words = [
        *("vng", "--verbose", "--run", str(kernel.image), "--disable-kvm", *options),
        *("--cwd", "/", "--rwdir", str(ARTIFACTS), "--exec", f"{inside} {shlex.join(command)}"),
    ]
    with open(_console(kernel), "wb") as to:
        machine = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=to, stderr=to, start_new_session=True,
            env={**os.environ, "PATH": _path(), "HOME": str(home), "TMPDIR": str(home)},
        )  # fmt: skip
        try:
            return _follow(machine, share, deadline)
        finally:
            _end(machine)


def _console(kernel: Kernel) -> Path:
    return LOGS / f"console-{kernel.name}.txt"


def _follow(machine: subprocess.Popen[bytes], share: Path, deadline: float) -> bool:
    """Copies the output until the machine or the time is over; whether it was the time."""
    with open(share / "output", "rb") as output:
        while True:
            ended = machine.poll() is not None
            while some := output.read(65536):
                sys.stdout.buffer.write(some)
                sys.stdout.buffer.flush()
            if ended:
                return False
            if time.monotonic() > deadline:
                return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                machine.wait(LOOK_SECONDS)


def _end(machine: subprocess.Popen[bytes]) -> None:
    """vng, QEMU and the file system's daemons are one process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(machine.pid, signal.SIGKILL)
    machine.wait()


@contextlib.contextmanager
def _private_home() -> Iterator[Path]:
    """For what vng keeps in its user's home, and for its sockets, which it would leave behind when it is ended."""
    with tempfile.TemporaryDirectory(prefix="ebpflb-vm-") as name:
        yield Path(name)


def _variables(kernel: Kernel) -> list[str]:
    ours = {key: value for key, value in os.environ.items() if key.startswith("EBPFLB_")}
    ours |= {"EBPFLB_VM": kernel.name, "EBPFLB_PACE": str(PACE), "EBPFLB_CACHE": str(CACHE)}
    return [f"{key}={value}" for key, value in ours.items()]


def _path() -> str:
    """For vng: it and what it calls, and the old virtiofsd in the clothes of the new one where only that is there."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
    if OLD_VIRTIOFSD.exists() and not NEW_VIRTIOFSD.exists() and not shutil.which("virtiofsd"):
        places.insert(0, str(BIN))
    return os.pathsep.join(places)


def _needed() -> None:
    for program, package in (
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("modprobe", "kmod"),
    ):
        if not shutil.which(program, path=_path()):
            raise Missing(f"there is no {program}: install the Debian package {package}")
    if not shutil.which("vng", path=_path()):
        raise Missing("there is no vng: make setup, or pip install virtme-ng")
    if not shutil.which("virtiofsd", path=_path()) and not NEW_VIRTIOFSD.exists():
        print("vm: without the Debian package virtiofsd files come ten times slower, by 9p", file=sys.stderr)
    if CHECKOUT.is_relative_to("/tmp"):
        raise Missing(f"a machine has a /tmp of its own: put the checkout elsewhere than in {CHECKOUT}")
    if os.geteuid() != 0:
        raise Missing("needs root, whose files the machine shows; run it with sudo")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm.machine")
    parser.add_argument("--kernel", default=DEFAULT, metavar="KERNEL", help=", ".join(each.name for each in MATRIX))
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS")
    parser.add_argument("--memory", default="3G")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended takes the machine down, too
    try:
        kernel = fetch(asked.kernel)
        return run(kernel, asked.command, timeout=asked.timeout, memory=asked.memory, cpus=asked.cpus)
    except Missing as error:
        print(f"vm: {error}", file=sys.stderr)
        return NO_MACHINE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
