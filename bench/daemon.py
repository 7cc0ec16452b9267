"""The daemon as a process of its own: how soon it is ready and how much memory it takes, and how soon it follows.

Rules of this file: the daemon is started as an operator would start it, with manifests, a warm compile cache and maps
of its own. Ready is when its control socket says that the first complete sync is in the kernel.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.clusters import bytes_of, endpoint_ips, endpoint_slice, manifest_files, service
from bench.lab import Lab
from bench.plane import ENDPOINTS, SPARE, View
from bench.report import Figure, middle, percentile
from ebpflb import control
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.demo.daemon import Daemon
from ebpflb.errors import EbpflbError

PLACE = ("plain", "server")
CHANGING = "changing.json"


def daemon(lab: Lab, sizes: tuple[int, ...], rounds: int, changes: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file; memory is that at the largest size."""
    for services in sizes:
        manifests = lab.directory / f"manifests-{services}"
        manifests.mkdir()
        for name, content in manifest_files(services, ENDPOINTS):
            (manifests / name).write_bytes(content)
        # One Service more, in a file of its own, which is the one that changes.
        (manifests / CHANGING).write_bytes(_changing(services, endpoint_ips(services, ENDPOINTS)))
        ready, rss, peak, follow = [], [], [], []
        for number in range(rounds):
            say(f"daemon with {services} Services, {number + 1}/{rounds}")
            with _running(lab, manifests, services) as (started, seconds, bpffs):
                ready.append(seconds)
                rss.append(memory(started.pid)["VmRSS"] / 1024)
                peak.append(memory(started.pid)["VmHWM"] / 1024)
                if number == rounds - 1:
                    say(f"daemon with {services} Services follows")
                    follow = [seconds * 1000 for seconds in _follow(lab, manifests, bpffs, services, changes)]
        size = f"{services:,} Services × {ENDPOINTS}"
        yield middle(f"daemon.ready.{services}", f"exec to ready, warm cache, {size}", ready, "s")
        what = f"a manifest is replaced at {services:,} Services: rename to visible in the map"
        yield Figure(f"daemon.follow.{services}.p50", f"{what}, p50", statistics.median(follow), "ms", tuple(follow))
        yield Figure(f"daemon.follow.{services}.p99", f"{what}, p99", percentile(follow, 99), "ms", (), f"of {changes}")
        if services == sizes[-1]:
            yield middle("daemon.rss", f"daemon, resident, {size}", rss, "MB")
            yield middle("daemon.peak", f"daemon, most resident, {size}", peak, "MB")


def _changing(number: int, addresses: Sequence[str]) -> bytes:
    items = [service(number), endpoint_slice(number, addresses)]
    return bytes_of({"apiVersion": "v1", "kind": "List", "items": items})


@contextmanager
def _running(lab: Lab, manifests: Path, services: int) -> Iterator[tuple[Daemon, float, Path]]:
    """A daemon that is ready and has nothing to do, the seconds from exec to ready, and its pins."""
    bpffs = lab.bpffs()
    options = ["--manifests", str(manifests), "--bpffs", str(bpffs), "--cgroup", str(lab.cgroup)]
    options += ["--node-name", "node-0"]
    begin = time.perf_counter()
    started = Daemon(lab.namespace(*PLACE), lab.cgroup, options, lab.directory / "daemon.log")
    try:
        with namespaces.inside(lab.namespace(*PLACE)):
            answer = _asked(started)
        seconds = time.perf_counter() - begin
        known = len(BpfDataplane(bpffs).tables("services"))
        if known < services:
            raise EbpflbError(f"the daemon says it is ready with {known} of {services} Services: {answer!r}")
        lab.wait_for(lambda: _idle(started.pid), "the daemon to be idle", 30)
        yield started, seconds, bpffs
    finally:
        started.stop()
        with namespaces.inside(lab.namespace(*PLACE)):
            BpfDataplane(bpffs, lab.cgroup).cleanup()


def _follow(lab: Lab, manifests: Path, bpffs: Path, number: int, changes: int) -> Iterator[float]:
    """Seconds from the rename of a manifest with one other endpoint until programs see it."""
    spare = itertools.cycle(SPARE)
    fresh_file = lab.directory / "fresh.json"
    with View(bpffs) as view:
        for _ in range(changes):
            fresh = next(spare)
            fresh_file.write_bytes(_changing(number, [*endpoint_ips(number, ENDPOINTS)[:-1], fresh]))
            begin = time.perf_counter()
            os.rename(fresh_file, manifests / CHANGING)
            while not view.leads_to(number, fresh):
                if time.perf_counter() - begin > 10:
                    raise EbpflbError("the daemon does not follow its manifests")
                time.sleep(0.0002)
            yield time.perf_counter() - begin


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


def memory(pid: int) -> dict[str, int]:
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
