"""The daemon as a process of its own: how soon it is ready, and how much memory it takes.

Rules of this file: the daemon is started as an operator would start it, with manifests, a warm compile cache and maps
of its own. Ready is when its control socket says that the first complete sync is in the kernel.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.clusters import manifest_files
from bench.lab import Lab
from bench.plane import ENDPOINTS
from bench.report import Figure, middle
from ebpflb import control
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.demo.daemon import Daemon
from ebpflb.errors import EbpflbError

PLACE = ("plain", "server")


def daemon(lab: Lab, sizes: tuple[int, ...], rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file; memory is that at the largest size."""
    for services in sizes:
        manifests = lab.directory / f"manifests-{services}"
        manifests.mkdir()
        for name, content in manifest_files(services, ENDPOINTS):
            (manifests / name).write_bytes(content)
        ready, rss, peak = [], [], []
        for number in range(rounds):
            say(f"daemon with {services} Services, {number + 1}/{rounds}")
            seconds, now, most = _once(lab, manifests, services)
            ready.append(seconds)
            rss.append(now)
            peak.append(most)
        yield middle(
            f"daemon.ready.{services}", f"exec to ready, warm cache, {services:,} Services × {ENDPOINTS}", ready, "s"
        )
        if services == sizes[-1]:
            yield middle("daemon.rss", f"daemon, resident, {services:,} Services × {ENDPOINTS}", rss, "MB")
            yield middle("daemon.peak", f"daemon, most resident, {services:,} Services × {ENDPOINTS}", peak, "MB")


def _once(lab: Lab, manifests: Path, services: int) -> tuple[float, float, float]:
    """Seconds to ready, and megabytes resident then and at most."""
    bpffs = lab.bpffs()
    options = [
        "--manifests",
        str(manifests),
        "--bpffs",
        str(bpffs),
        "--cgroup",
        str(lab.cgroup),
        "--node-name",
        "node-0",
    ]
    begin = time.perf_counter()
    started = Daemon(lab.namespace(*PLACE), lab.cgroup, options, lab.directory / "daemon.log")
    try:
        with namespaces.inside(lab.namespace(*PLACE)):
            answer = json.loads(_asked(started))
        seconds = time.perf_counter() - begin
        routes = len(BpfDataplane(bpffs).tables("services"))
        if routes < services:
            raise EbpflbError(f"the daemon says it is ready with {routes} of {services} Services: {answer}")
        lab.wait_for(lambda: _idle(started.pid), "the daemon to be idle", 30)
        memory = _memory(started.pid)
    finally:
        started.stop()
        with namespaces.inside(lab.namespace(*PLACE)):
            BpfDataplane(bpffs, lab.cgroup).cleanup()
    return seconds, memory["VmRSS"] / 1024, memory["VmHWM"] / 1024


def _asked(started: Daemon) -> bytes:
    """The status of the daemon once it is ready; the socket is there before that. Asked often, since the way that
    people wait sleeps between attempts."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return control._ask_once(60, 60, control.NAME)
        except OSError:
            if not started.running or time.monotonic() > deadline:
                raise EbpflbError(f"the daemon did not become ready:\n{started.last_words()}") from None
        time.sleep(0.002)


def _memory(pid: int) -> dict[str, int]:
    """Kilobytes by name, of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if name.startswith("Vm")
    }


def _idle(pid: int) -> bool:
    """Whether the process sleeps now."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
