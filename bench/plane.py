"""The control plane in one process: from bytes in memory to the last map entry.

Rules of this file: the parts are the daemon's own, put together as `ebpflb.wiring` does; only the source is missing, as
the bytes are there already. The garbage collector is off until the first sync is in and frozen then, as in the daemon.
That an entry is visible is checked by a lookup in the map, inside the measured time.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from bench.clusters import bytes_of, cluster_ip, endpoint_ips, endpoint_slice, lists
from bench.lab import Lab, ahead
from bench.report import Figure, middle, percentile
from ebpflb.dataplane.bpf import map_calls, syscall
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.errors import EbpflbError
from ebpflb.model import ProxyOptions
from ebpflb.routes import packed
from ebpflb.source import LocalAddresses, PutService, PutSlice, Synced, parse, wire
from ebpflb.wiring import Intent

_T = TypeVar("_T")

ENDPOINTS = 10
SPARE = tuple(f"10.255.0.{number}" for number in range(1, 251))
"""Endpoints' addresses that no Service has at first."""


def plane(
    lab: Lab,
    cold_sizes: tuple[int, ...],
    change_sizes: tuple[int, ...],
    rounds: int,
    changes: int,
    say: Callable[[str], None],
) -> Iterator[Figure]:
    """All figures of this file."""
    for services in cold_sizes:
        say(f"cold sync of {services} Services")
        files = [lab.directory / f"{kind}-{services}.json" for kind in ("services", "slices")]
        for file, content in zip(files, lists(services, ENDPOINTS), strict=True):
            file.write_bytes(content)
        samples: dict[str, list[float]] = {"random": [], "maglev": []}
        for _ in range(rounds):
            for algorithm, taken in samples.items():
                taken.append(_cold_in_a_child(lab, services, algorithm, files))
        what = f"cold sync, {services:,} Services × {ENDPOINTS}: JSON in memory to the last entry"
        yield middle(f"cold.{services}", what, samples["random"], "s")
        yield middle(f"cold.{services}.maglev", f"{what}, Maglev everywhere", samples["maglev"], "s")
    yield from _change_figures(lab, change_sizes, changes, say)


def _cold_in_a_child(lab: Lab, services: int, algorithm: str, files: list[Path]) -> float:
    """Seconds, in a process that has done nothing before, as a daemon that starts."""
    argv = [sys.executable, "-m", "bench.plane", str(lab.bpffs()), str(lab.cgroup), str(services), algorithm]
    argv += map(str, files)
    child = lab.spawn("plain", "client", argv)
    with ahead(child.pid):
        said, _ = child.communicate(timeout=120)
    if child.returncode:
        raise EbpflbError(f"the cold sync of {services} Services failed")
    return float(said)


def _cold_alone(bpffs: str, cgroup: str, services: str, algorithm: str, *files: str) -> float:
    """What the child does."""
    contents = [Path(file).read_bytes() for file in files]
    dataplane = BpfDataplane(Path(bpffs), Path(cgroup))
    try:
        dataplane.start()
        with _collector_off():
            begin = time.perf_counter()
            _cold(dataplane, contents[0], contents[1], int(services), algorithm)
            taken = time.perf_counter() - begin
        made = sum(1 for _ in dataplane.tables("maglev"))
        if made < int(services) * (algorithm == "maglev"):
            raise EbpflbError(f"of {services} Services {made} have a table")
        return taken
    finally:
        dataplane.cleanup()


class _Series(NamedTuple):
    """Changes that go round over the first `spread` of `services` Services, as milliseconds each."""

    services: int
    spread: int
    changer: Iterator[float]
    times: list[float]


def _change_figures(lab: Lab, sizes: tuple[int, ...], changes: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """Both sizes at once, turn by turn: over as many Services in the large table as there are in the small one, which
    is what the ratio of the sizes is taken of, and over all Services of the large one, whose rows and objects are then
    in no cache."""
    small, large = sizes
    say(f"changes at {small} and {large} Services")
    with _dataplane(lab, "client") as one, _dataplane(lab, "server") as other, _collector_off():
        made = [
            (dataplane, _cold(dataplane, *lists(services, ENDPOINTS), services), bpffs, services)
            for (dataplane, bpffs), services in ((one, small), (other, large))
        ]
        gc.freeze()
        gc.enable()
        series = [
            _Series(small, small, _changes(*made[0], small), []),
            _Series(large, small, _changes(*made[1], small), []),
            _Series(large, large, _changes(*made[1], large), []),
        ]
        for _ in range(changes):
            for each in series:
                each.times.append(next(each.changer) * 1000)
        for each in series:
            each.changer.close()  # type: ignore[attr-defined]
        audits = [figure for dataplane, _, _, services in made for figure in _audits(dataplane, services)]
        gc.unfreeze()
    for each in series:
        where = "" if each.spread == each.services else f", always one of the same {each.spread}"
        what = f"one endpoint changes at {each.services:,} Services{where}: event in memory to visible in the map"
        id = f"change.{each.services}" + (".same" if where else "")
        yield Figure(f"{id}.p50", f"{what}, p50", statistics.median(each.times), "ms", tuple(each.times))
        yield Figure(f"{id}.p99", f"{what}, p99", percentile(each.times, 99), "ms", (), f"of {changes}")
    medians = [statistics.median(each.times) for each in series]
    yield Figure(
        "change.flatness", f"p50 at {large:,} ÷ at {small:,}, the same {small} change", medians[1] / medians[0], ""
    )
    yield Figure("change.spread", f"p50 at {large:,} ÷ at {small:,}, all change in turn", medians[2] / medians[0], "")
    yield from audits


def _audits(dataplane: BpfDataplane, services: int) -> Iterator[Figure]:
    """One after changes, which looks at every row, and those after one that found all right. Changes wait meanwhile."""
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        report = dataplane.audit()
        times.append((time.perf_counter() - begin) * 1000)
        if not report.complete or report.written or report.removed:
            raise EbpflbError(f"an audit found what nobody did: {report}")
    yield Figure(f"audit.{services}.changed", f"an audit after changes, {services:,} Services", times[0], "ms")
    yield Figure(
        f"audit.{services}.same",
        f"an audit with nothing changed since the last, {services:,} Services",
        statistics.median(times[1:]),
        "ms",
        tuple(times[1:]),
    )


@contextmanager
def _dataplane(lab: Lab, place: str = "client") -> Iterator[tuple[BpfDataplane, Path]]:
    """Started, with empty maps, in a namespace without traffic."""
    bpffs = lab.bpffs()
    dataplane = BpfDataplane(bpffs, lab.cgroup)
    try:
        with namespaces.inside(lab.namespace("plain", place)):
            dataplane.start()
        yield dataplane, bpffs
    finally:
        with namespaces.inside(lab.namespace("plain", place)):
            dataplane.cleanup()


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _put_service(object: wire.Service) -> PutService:
    found = parse.service(object)
    assert found is not None, "all Services of bench.clusters are ours to serve"
    return PutService(found)


def _put_slice(object: wire.EndpointSlice) -> PutSlice:
    found = parse.endpoint_slice(object)
    assert found is not None
    return PutSlice(found)


def _apply(intent: Intent, events: Iterable[object]) -> None:
    for event in events:
        intent.apply(event)  # type: ignore[arg-type]


def _items(content: bytes, type: type[_T]) -> Iterator[_T]:
    """A List's items, each decoded when its turn comes, as `source.documents` does."""
    return map(msgspec.json.Decoder(type).decode, msgspec.json.decode(content, type=wire.RawList).items or ())


def _cold(dataplane: BpfDataplane, services: bytes, slices: bytes, count: int, algorithm: str = "random") -> Intent:
    """From the lists to a complete sync. Raises EbpflbError if something is not in."""
    intent = Intent("node-0", ProxyOptions(default_algorithm=algorithm), ["lists"])
    intent.apply(LocalAddresses(("192.168.0.2",), ("192.168.0.2",)))
    _apply(intent, map(_put_service, _items(services, wire.Service)))
    _apply(intent, map(_put_slice, _items(slices, wire.EndpointSlice)))
    intent.apply(Synced("lists"))
    routes = intent.routes()
    report = dataplane.sync(routes)
    if not report.complete or len(routes) != 2 * count:
        raise EbpflbError(f"the cold sync is not complete: {len(routes)} routes, {report}")
    return intent


def _changes(dataplane: BpfDataplane, intent: Intent, bpffs: Path, services: int, spread: int) -> Iterator[float]:
    """Seconds that each change takes: one endpoint of one of `spread` Services is replaced by one it did not have."""
    spare = itertools.cycle(SPARE[spread % 125 :] + SPARE[: spread % 125])  # two series never write the same
    decode = msgspec.json.Decoder(wire.EndpointSlice).decode
    with View(bpffs) as view:
        for turn in itertools.count():
            number = turn % spread * 7919 % services
            fresh = next(spare)
            event = bytes_of(endpoint_slice(number, [*endpoint_ips(number, ENDPOINTS)[:-1], fresh]))
            begin = time.perf_counter()
            intent.apply(_put_slice(decode(event)))
            report = dataplane.sync(intent.routes())
            visible = view.leads_to(number, fresh)
            taken = time.perf_counter() - begin
            if not visible or not report.complete:
                raise EbpflbError(f"a change is not in the maps: {report}")
            yield taken


class View:
    """The pinned maps, as a program sees them."""

    def __init__(self, bpffs: Path) -> None:
        self._fds = [syscall.obj_get(str(bpffs / "maps" / name)) for name in ("frontends", "slots", "backends")]

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def leads_to(self, number: int, address: str) -> bool:
        """Whether the route of Service `number` leads to a backend with this address, by lookups from the row on."""
        frontends, slots, backends = self._fds
        wanted = packed(address)
        row = map_calls.lookup(frontends, packed(cluster_ip(number)) + b"\x00\x50\x06\x00", 64)
        if row is None:
            return False
        first, count = int.from_bytes(row[8:12], "little"), int.from_bytes(row[12:16], "little")
        for slot in range(first + count - 1, first - 1, -1):
            id = map_calls.lookup(slots, slot.to_bytes(4, "little"), 4)
            backend = map_calls.lookup(backends, id, 28) if id is not None else None
            if backend is not None and backend[:16] == wanted:
                return True
        return False


if __name__ == "__main__":
    print(_cold_alone(*sys.argv[1:]))
