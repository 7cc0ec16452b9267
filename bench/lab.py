"""Where benchmarks run: namespaces, a cgroup and bpf file systems of one name, all gone at the end.

Rules of this file: copies of client - node - server with the same addresses. The `plain` one has no program of ours at
all and is what everything is divided by; the others have a daemon on their node: `served` one as it is by default,
`around` one that lets pods' flows go around the stack, `xdp` one to which client and server are outside.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ebpflb.demo import namespaces
from ebpflb.errors import EbpflbError

CLIENT, CLIENT_GATEWAY = "10.200.0.5", "10.200.0.1"
SERVER, SERVER_GATEWAY = "10.200.1.10", "10.200.1.1"
PORT = 7777
COPIES = ("plain", "served", "around", "xdp")
CHECKOUT = Path(__file__).resolve().parents[1]
BUILD = CHECKOUT / "build" / "bench"


class Lab:
    """One run's namespaces. `cgroup` is where socket programs attach; a process outside of it is not served."""

    def __init__(self) -> None:
        self.name = f"ebpflb-bench{os.getpid()}"
        self.directory = namespaces.STATE / self.name
        self.cgroup = namespaces.cgroup_root() / self.name
        self._mounted = 0

    def namespace(self, copy: str, place: str) -> str:
        """Of one of COPIES: its client, node or server; or of a group's own."""
        return f"{self.name}-{copy}-{place}"

    def build(self) -> None:
        """All copies."""
        self.directory.mkdir()
        self.cgroup.mkdir()
        for copy in COPIES:
            self.cgroup_of(copy).mkdir(exist_ok=True)
            self._copy(copy)

    def _copy(self, copy: str) -> None:
        client, node, server = (self.namespace(copy, place) for place in ("client", "node", "server"))
        for namespace in (client, node, server):
            namespaces.create(namespace)
        namespaces.ip(
            node,
            [
                f"link add to-client type veth peer name eth0 netns {client}",
                f"link add to-server type veth peer name eth0 netns {server}",
                "link set to-client up",
                "link set to-server up",
            ],
        )
        for device, gateway, address in (
            ("to-client", CLIENT_GATEWAY, CLIENT),
            ("to-server", SERVER_GATEWAY, SERVER),
        ):
            if copy == "around":  # as a CNI numbers a pod's wire: what has a network is no pod's
                lines = [f"addr add {gateway}/32 dev {device}", f"route add {address}/32 dev {device}"]
            else:
                lines = [f"addr add {gateway}/24 dev {device}"]
            namespaces.ip(node, lines)
        for namespace, address, gateway in ((client, CLIENT, CLIENT_GATEWAY), (server, SERVER, SERVER_GATEWAY)):
            namespaces.ip(
                namespace, [f"addr add {address}/24 dev eth0", "link set eth0 up", f"route add default via {gateway}"]
            )
        namespaces.sysctl(node, {"ipv4/ip_forward": 1})

    def cgroup_of(self, copy: str) -> Path:
        """Where the daemon of a copy attaches its socket programs: that of all but `served` has no process in it."""
        return self.cgroup if copy == "served" else self.cgroup / copy

    def bpffs(self) -> Path:
        """A fresh bpf file system."""
        self._mounted += 1
        path = self.directory / f"bpf{self._mounted}"
        namespaces.mount_bpffs(path)
        return path / "ebpflb"

    def spawn(self, copy: str, place: str, argv: list[str], *, served: bool = False) -> subprocess.Popen[str]:
        """A process in a namespace, inside the cgroup or outside of it."""
        process: subprocess.Popen[str] = namespaces.spawn(  # type: ignore[assignment]
            self.namespace(copy, place),
            self.cgroup if served else None,
            argv,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        return process

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
        """Until the condition holds. Raises EbpflbError."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise EbpflbError(f"{what}: not within {seconds:g} s")
            time.sleep(0.002)


@contextmanager
def lab() -> Iterator[Lab]:
    """A lab, removed whatever happens."""
    made = Lab()
    try:
        made.build()
        yield made
    finally:
        left = namespaces.remove(made.name)
        if left:
            raise EbpflbError("could not be removed: " + "; ".join(left))


@contextmanager
def ahead(process: int) -> Iterator[None]:
    """A process (0: this one) and its session go before whatever else wants a processor: what others do on the machine
    is not to be measured."""
    autogroup = Path(f"/proc/{process or os.getpid()}/autogroup")
    os.setpriority(os.PRIO_PROCESS, process, -20)
    if autogroup.exists():  # then the scheduler shares among sessions first
        autogroup.write_text("-20")
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process, 0)
        with suppress(OSError):
            autogroup.write_text("0")


def crr_binary() -> str:
    """The client and server of crr.c, compiled if it is newer than what was compiled before."""
    source, binary = Path(__file__).with_name("crr.c"), BUILD / "crr"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = BUILD / f"crr.{os.getpid()}"
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(fresh), str(source)], check=True)
        fresh.replace(binary)
    return str(binary)
