"""The daemon beside an API server: how soon it is ready, how soon it follows, and what it costs.

Rules of this file: the daemon is started as an operator would start it, with a kubeconfig, a warm compile cache, and
maps and a state directory of its own; the server is another process, and answers from bytes that are ready. Both are
in one network namespace and speak TLS. Ready is when /healthz says so and the control socket says that the first
complete sync is in the kernel. That a change has arrived is seen in the kernel's maps, never asked of the daemon. The
processor's time is that of the daemon's own cgroup: all of its threads and children.
"""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec

from bench.clusters import PORT, cluster_ip
from bench.daemon import PLACE, memory
from bench.lab import CHECKOUT, Lab, ahead
from bench.orders import LIVE, ApiServer, Asked, Bookmark, Change, Churn, Forget, Requests, Written, churned
from bench.plane import ENDPOINTS, SPARE, View
from bench.prober import Tally
from bench.report import Figure, middle, percentile
from ebpflb import control
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.demo.daemon import Daemon
from ebpflb.errors import EbpflbError

HEALTHZ, METRICS = 10256, 10249
_WATCHED = 3  # Services, EndpointSlices, the Node

# What the daemon writes and looks at after its first sync has then been done: the snapshot, the first audit.
_SETTLED = 35.0

# What a scrape makes the daemon look at has then been looked at.
_LOOKED = 2.0

# Of a churn: which changes are looked for, and seconds between two scrapes.
_EVERY, _SCRAPE_EVERY = 10, 10.0


class Effort(NamedTuple):
    """How thoroughly: daemons started, single changes, changes of the churn and how many a second, seconds without
    anything to do."""

    rounds: int
    changes: int
    churn: int
    rate: int
    idle: float
    settled: float = _SETTLED


class Node(NamedTuple):
    """A daemon that is ready, its server, and the seconds from exec to ready."""

    daemon: Daemon
    server: ApiServer
    bpffs: Path
    cgroup: Path
    seconds: float


def api(lab: Lab, sizes: tuple[int, ...], effort: Effort, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file; what is asked of one size only is asked of the largest."""
    namespace = lab.namespace(*PLACE)
    namespaces.ip(namespace, [f"addr add {address}/24 dev eth0" for address in LIVE[1:]])
    medians = []
    for services in sizes:
        largest = services == sizes[-1]
        size = f"{services:,} Services × {ENDPOINTS}"
        with ApiServer(namespace, lab.directory, services, ENDPOINTS) as server:
            ready = []
            for number in range(effort.rounds):
                say(f"API server with {services} Services, {number + 1}/{effort.rounds}")
                with _node(lab, server, services) as node:
                    ready.append(node.seconds)
                    if number < effort.rounds - 1:
                        continue
                    yield middle(f"api.ready.{services}", f"exec to ready, lists streamed, {size}", ready, "s")
                    if largest:
                        yield from _scrape(lab, node, size)
                    yield from _idle(lab, node, services, effort, say)
                    if largest:
                        yield Figure(
                            "api.rss", f"daemon, resident, {size}", memory(node.daemon.pid)["VmRSS"] / 1024, "MB"
                        )
                        yield Figure(
                            "api.peak", f"daemon, most resident, {size}", memory(node.daemon.pid)["VmHWM"] / 1024, "MB"
                        )
                        yield from _relist(lab, node, size)
                    say(f"changes at {services} Services")
                    follow = [seconds * 1000 for seconds in _follow(node, services, effort.changes)]
                    medians.append(statistics.median(follow))
                    what = f"a slice changes at {services:,} Services: bytes written to visible in the map"
                    yield Figure(f"api.follow.{services}.p50", f"{what}, p50", medians[-1], "ms", tuple(follow))
                    yield Figure(
                        f"api.follow.{services}.p99",
                        f"{what}, p99",
                        percentile(follow, 99),
                        "ms",
                        (),
                        f"of {len(follow)}",
                    )
                    if largest:
                        say(f"churn at {services} Services")
                        yield from _churn(lab, node, services, effort)
    yield Figure("api.flatness", "the same p50, largest ÷ smallest", medians[-1] / medians[0], "")
    with ApiServer(namespace, lab.directory, sizes[-1], ENDPOINTS, streams=False) as server:
        ready, peak = [], []
        for number in range(effort.rounds):
            say(f"API server with lists in pages, {number + 1}/{effort.rounds}")
            with _node(lab, server, sizes[-1]) as node:
                ready.append(node.seconds)
                peak.append(memory(node.daemon.pid)["VmHWM"] / 1024)
    size = f"{sizes[-1]:,} Services × {ENDPOINTS}"
    yield middle(f"api.ready.{sizes[-1]}.pages", f"exec to ready, lists in pages, {size}", ready, "s")
    yield middle("api.peak.pages", f"daemon, most resident until then, lists in pages, {size}", peak, "MB")


# ---- One daemon ----


@contextmanager
def _node(lab: Lab, server: ApiServer, services: int) -> Iterator[Node]:
    bpffs = lab.bpffs()
    state = bpffs.parent.with_name(f"{bpffs.parent.name}-state")
    cgroup = lab.cgroup / "daemon"
    cgroup.mkdir(exist_ok=True)
    server.do(Requests())
    options = ["--kubeconfig", str(server.kubeconfig), "--node-name", "node-0", "--state-dir", str(state)]
    options += ["--bpffs", str(bpffs), "--cgroup", str(lab.cgroup)]
    namespace = lab.namespace(*PLACE)
    begin = time.monotonic()
    daemon = Daemon(namespace, cgroup, options, lab.directory / "daemon.log")
    try:
        with ahead(server.pid), ahead(daemon.pid):
            with namespaces.inside(namespace):
                _await_ready(daemon)
            seconds = time.monotonic() - begin
            known = len(BpfDataplane(bpffs).tables("services"))
            if known <= services:
                raise EbpflbError(f"the daemon says it is ready with {known} of {services + 1} Services")
            yield Node(daemon, server, bpffs, cgroup, seconds)
    finally:
        daemon.stop()
        with namespaces.inside(namespace):
            BpfDataplane(bpffs, lab.cgroup).cleanup()


def _await_ready(daemon: Daemon) -> None:
    """Until /healthz says 200, and the control socket says that the first sync is complete."""
    deadline = time.monotonic() + 60
    healthy = synced = False
    while not (healthy and synced):
        if not daemon.running or time.monotonic() > deadline:
            raise EbpflbError(f"the daemon did not become ready:\n{daemon.last_words()}")
        time.sleep(0.002)
        try:
            synced = synced or bool(control._ask_once(60, 60, control.NAME))
            healthy = _get(HEALTHZ, "/healthz")[0] == 200
        except OSError:
            continue


def _get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body. Raises OSError."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _metrics(lab: Lab) -> dict[str, float]:
    """What the daemon says of itself, by name and labels."""
    with namespaces.inside(lab.namespace(*PLACE)):
        _, body = _get(METRICS, "/metrics")
    pairs = (line.rpartition(" ") for line in body.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def _used(node: Node) -> float:
    """Seconds of processor time, so far."""
    found = re.search(r"^usage_usec (\d+)$", (node.cgroup / "cpu.stat").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1e6


# ---- What is measured ----


def _scrape(lab: Lab, node: Node, size: str) -> Iterator[Figure]:
    times, length = [], 0
    with namespaces.inside(lab.namespace(*PLACE)):
        for _ in range(20):
            begin = time.monotonic()
            status, body = _get(METRICS, "/metrics")
            times.append((time.monotonic() - begin) * 1000)
            length = len(body)
            if status != 200 or b"ebpflb_rows_written_total" not in body:
                raise EbpflbError(f"/metrics answers {status} and {length} bytes")
            time.sleep(0.05)
    first = f"the first {times[0]:.1f} ms, most {max(times):.1f} ms; {length / 1024:.0f} kB"
    yield Figure("api.scrape", f"a scrape of /metrics, {size}", statistics.median(times), "ms", tuple(times), first)


def _idle(lab: Lab, node: Node, services: int, effort: Effort, say: Callable[[str], None]) -> Iterator[Figure]:
    """With a bookmark for each watch in that time, as servers send them once a minute. Audits are figures of their own
    (`audit.…`): whether one falls into this time is chance."""
    say(f"nothing happens at {services} Services")
    time.sleep(effort.settled)
    seconds, number = (f'ebpflb_sync_duration_seconds_{what}{{kind="audit"}}' for what in ("sum", "count"))
    before = _metrics(lab)
    time.sleep(_LOOKED)
    begin, used = time.monotonic(), _used(node)
    time.sleep(effort.idle / 2)
    node.server.do(Bookmark())
    time.sleep(effort.idle / 2)
    took, spent = time.monotonic() - begin, _used(node) - used
    after = _metrics(lab)
    audits, auditing = after[number] - before[number], after[seconds] - before[seconds]
    yield Figure(
        f"api.idle.{services}", f"idle at {services:,} Services, between audits: processor time a minute",
        max(0.0, spent - auditing) * 1000 * 60 / took, "ms", (),
        f"over {effort.idle:g} s; {audits:g} audits besides, {auditing * 1000:.0f} ms",
    )  # fmt: skip


def _relist(lab: Lab, node: Node, size: str) -> Iterator[Figure]:
    """The server comes back having forgotten all history, and everything is as it was."""
    written = "ebpflb_rows_written_total"
    before = _metrics(lab)[written]
    node.server.do(Requests())
    used = _used(node)
    node.server.do(Forget())
    asked: list[Asked] = []

    def watching() -> bool:
        asked.extend(node.server.do(Requests()).requests)
        return len({each.resource for each in asked if each.verb == "watch"}) == _WATCHED

    lab.wait_for(watching, "lists and watches after an outage", 30)
    time.sleep(0.5)  # whatever there is to write would have been written by now
    lists = [each for each in asked if each.verb in ("list", "page", "stream")]
    if len({each.resource for each in lists}) != _WATCHED:
        raise EbpflbError(f"not everything was listed again: {lists}")
    seconds = max(each.done for each in lists) - min(each.at for each in lists)
    spent = f"{_used(node) - used:.2f} s of processor time"
    yield Figure("api.relist.time", f"lists again after an outage, {size}", seconds, "s", (), spent)
    yield Figure("api.relist.rows", "rows written then, nothing having changed", _metrics(lab)[written] - before, "")


def _follow(node: Node, services: int, changes: int) -> Iterator[float]:
    """Seconds that each change takes, the daemon being at rest before it."""
    spare, random = itertools.cycle(SPARE), Random(1)
    with View(node.bpffs) as view:
        for turn in range(changes):
            number, fresh = turn * 7919 % services, next(spare)
            time.sleep(0.012 + random.random() * 0.01)
            node.server.begin(Change(number, fresh))
            seen = _await(view, number, fresh)
            yield seen - node.server.end().at


def _await(view: View, number: int, address: str) -> float:
    """When the backend was seen in the map."""
    deadline = time.monotonic() + 10
    while not view.leads_to(number, address):
        if time.monotonic() > deadline:
            raise EbpflbError(f"Service {number} never came to lead to {address}")
        time.sleep(0.0002)
    return time.monotonic()


def _churn(lab: Lab, node: Node, services: int, effort: Effort) -> Iterator[Figure]:
    """Every tenth change is looked for, by the schedule of the writer: a daemon that stalls delays all that come
    meanwhile, and all of them count. Somebody scrapes and somebody connects all the time."""
    lags: list[float] = []
    file = str(lab.directory / "written")
    with (
        View(node.bpffs) as view,
        Written(file, effort.churn) as written,
        _probing(lab, services) as prober,
        _scraping(lab),
    ):
        used, began = _used(node), time.monotonic()
        node.server.begin(Churn(file, effort.churn, effort.rate))
        waiting: list[int] = []
        turn = 0
        while turn < effort.churn or waiting:
            while turn < effort.churn and written[turn]:
                waiting.append(turn)
                turn += _EVERY
            seen = [each for each in waiting if view.leads_to(*churned(each, services))]
            now = time.monotonic()
            lags += [(now - written[each]) * 1000 for each in seen]
            waiting = [each for each in waiting if each not in seen]
            if waiting and now - written[waiting[0]] > 10:
                raise EbpflbError(f"change {waiting[0]} of the churn never arrived")
            time.sleep(0.0002)
        node.server.end()
        took, spent = time.monotonic() - began, _used(node) - used
        tally = prober()
    rate, ran = effort.churn / took, f"{effort.churn:,} changes in {took:.1f} s"
    if rate < 0.95 * effort.rate:
        raise EbpflbError(f"the server kept up with {rate:.0f} changes a second only")
    yield Figure(
        "api.churn.p50", f"{effort.rate:,} changes a second: written to visible, p50", statistics.median(lags), "ms"
    )
    yield Figure(
        "api.churn.p99", f"{effort.rate:,} changes a second: written to visible, p99", percentile(lags, 99), "ms",
        tuple(lags), f"{len(lags):,} looked at, most {max(lags):.1f} ms; {ran}",
    )  # fmt: skip
    yield Figure("api.churn.cpu", "of one processor, meanwhile", spent / took * 100, "%")
    yield Figure(
        "api.churn.errors",
        f"connects that failed meanwhile, of {tally.made + tally.failed:,}",
        tally.failed,
        "",
        (),
        tally.reason,
    )
    yield Figure("api.churn.rss", "daemon, resident, after that", memory(node.daemon.pid)["VmRSS"] / 1024, "MB")


@contextmanager
def _scraping(lab: Lab) -> Iterator[None]:
    """Somebody reads /metrics every few seconds."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(_SCRAPE_EVERY):
            _metrics(lab)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _probing(lab: Lab, services: int) -> Iterator[Callable[[], Tally]]:
    """Somebody connects all the time to the Service after the last; call what is given to end that."""
    cgroup = lab.cgroup / "prober"
    cgroup.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "bench.prober", "tally", cluster_ip(services), str(PORT), *LIVE]
    process = namespaces.spawn(
        lab.namespace(*PLACE), cgroup, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT
    )

    def end() -> Tally:
        said, _ = process.communicate(timeout=30)
        return msgspec.json.decode(said, type=Tally)

    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise EbpflbError("the prober did not begin")
        yield end
    finally:
        process.kill()
        process.communicate()
