"""A place where a daemon can run beside everything else on this machine: a network namespace with one device, a cgroup,
a pin directory, a directory of manifests; and a shell in it.

Rules of this file: names carry the pid, everything is removed at the end whatever happened in between, and every wait
is for a condition with a deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ebpflb.dataplane.bpf import tc, tcx
from ebpflb.demo import namespaces
from tests.conftest import CHECKOUT, cgroup2
from tests.said import Said

T = TypeVar("T")

SIDES = {tc.INGRESS: "ingress", tc.EGRESS: "egress"}
BPFFS = Path("/sys/fs/bpf")
DEADLINE = 100.0
_numbers = itertools.count()


def until(what: str, probe: Callable[[], T], seconds: float = DEADLINE) -> T:
    """The first true answer of `probe`."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}; last seen: {answer!r}"
        time.sleep(0.01)
    return answer


class Daemon:
    """`ebpflb run` in a Place."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self, number: int) -> int:
        """Send a signal, and give the exit status."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It stands still in the block, with all its threads."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            until("it stands still", lambda: set(self._states()) == {"T"})
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def _states(self) -> Iterator[str]:
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            yield (task / "stat").read_text().rpartition(")")[2].split()[0]


class Place:
    """See the top of this file. `options` are those that every `ebpflb` here needs."""

    def __init__(self, directory: Path) -> None:
        self.name = f"ebpflb-cli-{os.getpid()}-{next(_numbers)}"
        self.directory = directory
        self.manifests = directory / "manifests"
        self.bpffs = BPFFS / self.name
        hierarchy = cgroup2()
        assert hierarchy is not None
        self.cgroup = hierarchy / self.name
        self.environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        self._daemons: list[Daemon] = []

    def make(self) -> None:
        self.manifests.mkdir()
        if not os.path.ismount(BPFFS):
            _command("mount", "-t", "bpf", "bpf", str(BPFFS))
        self.cgroup.mkdir()
        _command("ip", "netns", "add", self.name)
        # A link-local address is tentative for a second or two, which would be a difference of its own.
        for scope in ("default", "all"):
            self.command("sysctl", "-qw", f"net.ipv6.conf.{scope}.accept_dad=0")
        self.ip("link", "set", "lo", "up")
        self.ip("link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
        self.ip("address", "add", "192.168.0.2/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self.ip("link", "set", "peer0", "up")
        # They come a moment later, each with its routes, which no difference shall be.
        until("link-local addresses", self._is_settled)

    def _is_settled(self) -> bool:
        """Whether both devices have their link-local addresses, to be used."""
        said = self.ip("-6", "-oneline", "address", "show", "scope", "link").splitlines()
        return len(said) == 2 and not any("tentative" in line for line in said)

    def remove(self) -> None:
        """Also what a failed test left; a place that was cleaned up has none of it."""
        for daemon in self._daemons:
            if daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()
        self.ebpflb("cleanup")
        with contextlib.suppress(FileNotFoundError):
            self.bpffs.rmdir()
        subprocess.run(["ip", "netns", "delete", self.name], check=False)
        with contextlib.suppress(FileNotFoundError):
            self.cgroup.rmdir()

    # ---- Commands ----

    @property
    def options(self) -> tuple[str, ...]:
        return ("--bpffs", str(self.bpffs), "--cgroup", str(self.cgroup))

    @property
    def run_options(self) -> tuple[str, ...]:
        return (*self.options, "--manifests", str(self.manifests), "--node-name", "node-1")

    def inside(self, *words: str) -> list[str]:
        """The command that runs `words` in the namespace; unlike `ip netns exec` it keeps the mounts."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *words]

    def command(self, *words: str) -> str:
        return _command(*self.inside(*words))

    def ip(self, *words: str) -> str:
        return self.command("ip", *words)

    def ebpflb(self, command: str, *words: str, before: Sequence[str] = ()) -> Said:
        """Run one command to its end. `before` stands in front of it, such as setpriv."""
        own = {"status": ("--bpffs", str(self.bpffs)), "run": self.run_options, "plan": self.run_options}
        own["verify"] = self.run_options
        argv = [*before, sys.executable, "-m", "ebpflb", command, *own.get(command, self.options), *words]
        done = subprocess.run(
            self.inside(*argv), capture_output=True, text=True, env=self.environment, timeout=DEADLINE, check=False
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str, wait: bool = True) -> Daemon:
        """Start the daemon; with `wait`, return when its first complete sync is in the kernel."""
        path = self.directory / f"daemon-{len(self._daemons)}.log"
        argv = self.inside(sys.executable, "-m", "ebpflb", "run", *self.run_options, *words)
        with path.open("w") as log:
            # nsenter replaces itself by the daemon, so that the pid is the daemon's.
            process = subprocess.Popen(argv, stdout=log, stderr=log, env=self.environment, text=True)
        daemon = Daemon(process, path)
        self._daemons.append(daemon)
        if wait:
            said = self.ebpflb("status", "--wait", str(DEADLINE - 10))
            assert said.status == 0, (said, daemon.log)
        return daemon

    # ---- Manifests ----

    def write(self, name: str, text: str) -> None:
        """Replace a manifest as kubectl and editors do: whole, by a rename."""
        path = self.manifests / f".{name}.new"
        path.write_text(text)
        path.rename(self.manifests / name)

    # ---- The kernel ----

    def objects(self) -> set[tuple[str, int]]:
        """The BPF maps, programs and links that are pinned here, by kind and id."""
        kinds = {"maps": "map", "programs": "prog", "links": "link"}
        found = set()
        for path in sorted(self.bpffs.glob("*/*")):
            kind = kinds[path.parent.name]
            found.add((kind, int(json.loads(_command("bpftool", "-j", kind, "show", "pinned", str(path)))["id"])))
        return found

    def delete_first_row(self, table: str) -> None:
        """As a careless hand would."""
        path = str(self.bpffs / "maps" / table)
        key = json.loads(_command("bpftool", "-j", "map", "dump", "pinned", path))[0]["key"]
        _command("bpftool", "map", "delete", "pinned", path, "key", *(f"{int(part, 16)}" for part in key))

    def hooks(self) -> set[tuple[str, str]]:
        """Device and side of each of our tc programs, at tcx or in a filter."""
        found = set()
        links = json.loads(self.ip("-json", "link"))
        for link in links:
            for side in SIDES.values():
                if "ebpflb" in self.command("tc", "filter", "show", "dev", link["ifname"], side):
                    found.add((link["ifname"], side))
        with namespaces.inside(self.name):
            found |= {(link["ifname"], SIDES[each.side]) for link in links for each in tcx.running(link["ifindex"])}
        return found

    def detach(self, device: str) -> None:
        """Take our tc programs from a device, as a careless hand would."""
        with namespaces.inside(self.name):
            assert tcx.release(socket.if_nametoindex(device)) == 2

    def traces(self) -> set[str]:
        """Everything that a daemon could have left here, one line each."""
        found = {f"pin {path}" for path in self.bpffs.rglob("*")} | ({f"pin {self.bpffs}"} & _existing(self.bpffs))
        found |= {f"tc program {device} {side}" for device, side in self.hooks()}
        for device in ("lo", "eth0", "peer0"):
            for side in ("ingress", "egress"):
                shown = self.command("tc", "filter", "show", "dev", device, side)
                found |= {f"filter {device} {side} {line}" for line in shown.splitlines()}
        found |= {f"qdisc {line}" for line in self.command("tc", "qdisc", "show").splitlines()}
        found |= {f"link {link['ifname']}" for link in json.loads(self.ip("-json", "link"))}
        found |= {f"address {line}" for line in self.ip("-oneline", "address").splitlines()}
        found |= {f"route {line}" for line in self.ip("route", "show", "table", "all").splitlines()}
        found |= {f"rule {line}" for line in self.ip("rule").splitlines()}
        found |= {f"cgroup {line}" for line in _command("bpftool", "cgroup", "show", str(self.cgroup)).splitlines()}
        found |= {f"sysctl {line}" for line in self.command("sysctl", "-a", "-r", r"^net\.").splitlines()}
        return found


def alive() -> set[tuple[str, int]]:
    """Every BPF object of this machine."""
    return {(kind, number) for kind in ("map", "prog", "link") for number in _numbers_of(kind)}


def _numbers_of(kind: str) -> set[int]:
    """Those of one kind. A list breaks off where it meets a link that somebody is just making."""

    def listed() -> subprocess.CompletedProcess[str] | None:
        done = subprocess.run(["bpftool", "-j", kind, "list"], capture_output=True, text=True, check=False)
        return done if done.returncode == 0 else None

    done = until(f"bpftool lists every {kind}", listed)
    assert done is not None
    return {int(each["id"]) for each in json.loads(done.stdout or "[]")}


def _existing(path: Path) -> set[str]:
    return {f"pin {path}"} if path.exists() else set()


def _command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def place_in(directory: Path) -> Iterator[Place]:
    made = Place(directory)
    try:
        made.make()
        yield made
    finally:
        made.remove()
