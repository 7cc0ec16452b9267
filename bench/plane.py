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
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.clusters import bytes_of, cluster_ip, endpoint_ips, endpoint_slice, lists
from bench.lab import Lab
from bench.report import Figure, middle, percentile
from ebpflb.dataplane.bpf import syscall
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.errors import EbpflbError
from ebpflb.model import ProxyOptions
from ebpflb.routes import packed
from ebpflb.source import LocalAddresses, Synced, parse, wire
from ebpflb.wiring import Intent

ENDPOINTS = 10
SPARE = "10.255.0."  # addresses that endpoint_ips never gives


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
        services_bytes, slices_bytes = lists(services, ENDPOINTS)
        samples = []
        for _ in range(rounds):
            with _dataplane(lab) as (dataplane, _), _collector_off():
                begin = time.perf_counter()
                _cold(dataplane, services_bytes, slices_bytes, services)
                samples.append(time.perf_counter() - begin)
        yield middle(
            f"cold.{services}",
            f"cold sync, {services:,} Services × {ENDPOINTS}: JSON in memory to the last entry",
            samples,
            "s",
        )
        del services_bytes, slices_bytes
    medians = []
    for services in change_sizes:
        say(f"changes at {services} Services")
        with _dataplane(lab) as (dataplane, bpffs), _collector_off():
            intent = _cold(dataplane, *lists(services, ENDPOINTS), services)
            gc.freeze()
            gc.enable()
            times = [seconds * 1000 for seconds in _changes(dataplane, intent, bpffs, services, changes)]
            gc.unfreeze()
        medians.append(statistics.median(times))
        what = f"one endpoint changes at {services:,} Services: event in memory to visible in the map"
        yield Figure(f"change.{services}.p50", f"{what}, p50", medians[-1], "ms", tuple(times))
        yield Figure(f"change.{services}.p99", f"{what}, p99", percentile(times, 99), "ms", (), f"of {changes}")
    if len(medians) > 1:
        yield Figure(
            "change.flatness",
            f"the same, p50 at {change_sizes[-1]:,} ÷ at {change_sizes[0]:,}",
            medians[-1] / medians[0],
            "",
        )


@contextmanager
def _dataplane(lab: Lab) -> Iterator[tuple[BpfDataplane, Path]]:
    """Started, with empty maps, in a namespace without traffic."""
    bpffs = lab.bpffs()
    with namespaces.inside(lab.namespace("plain", "client")):
        dataplane = BpfDataplane(bpffs, lab.cgroup)
        try:
            dataplane.start()
            yield dataplane, bpffs
        finally:
            dataplane.cleanup()


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _apply(intent: Intent, events: Iterable[object]) -> None:
    for event in events:
        intent.apply(event)  # type: ignore[arg-type]


def _cold(dataplane: BpfDataplane, services: bytes, slices: bytes, count: int) -> Intent:
    """From the lists to a complete sync. Raises EbpflbError if something is not in."""
    intent = Intent("node-0", ProxyOptions(), ["lists"])
    intent.apply(LocalAddresses(("192.168.0.2",), ("192.168.0.2",)))
    _apply(intent, map(parse.service_event, msgspec.json.decode(services, type=wire.ServiceList).items or ()))
    _apply(intent, map(parse.slice_event, msgspec.json.decode(slices, type=wire.EndpointSliceList).items or ()))
    intent.apply(Synced("lists"))
    routes = intent.routes()
    report = dataplane.sync(routes)
    if not report.complete or len(routes) != 2 * count:
        raise EbpflbError(f"the cold sync is not complete: {len(routes)} routes, {report}")
    return intent


def _changes(dataplane: BpfDataplane, intent: Intent, bpffs: Path, services: int, count: int) -> Iterator[float]:
    """Seconds that each of `count` changes took: one endpoint of one Service is replaced by one never seen before."""
    slots = syscall.obj_get(str(bpffs / "maps" / "slots"))
    backends = syscall.obj_get(str(bpffs / "maps" / "backends"))
    frontends = syscall.obj_get(str(bpffs / "maps" / "frontends"))
    spare = (f"{SPARE}{number % 250 + 1}" for number in itertools.count())
    decode = msgspec.json.Decoder(wire.EndpointSlice).decode
    try:
        for turn in range(count):
            number = turn * 7919 % services
            fresh = next(spare)
            addresses = [*endpoint_ips(number, ENDPOINTS)[:-1], fresh]
            event = bytes_of(endpoint_slice(number, addresses))
            key = packed(cluster_ip(number)) + b"\x00\x50\x06\x00"
            begin = time.perf_counter()
            intent.apply(parse.slice_event(decode(event)))
            report = dataplane.sync(intent.routes())
            visible = _is_visible(frontends, slots, backends, key, packed(fresh))
            taken = time.perf_counter() - begin
            if not visible or not report.complete:
                raise EbpflbError(f"a change is not in the maps: {report}")
            yield taken
    finally:
        for fd in (slots, backends, frontends):
            os.close(fd)


def _is_visible(frontends: int, slots: int, backends: int, key: bytes, address: bytes) -> bool:
    """Whether the frontend's route leads to a backend with this address, by lookups from the row on."""
    row = syscall.lookup(frontends, key, 64)
    if row is None:
        return False
    first, count = int.from_bytes(row[8:12], "little"), int.from_bytes(row[12:16], "little")
    for slot in range(first + count - 1, first - 1, -1):
        id = syscall.lookup(slots, slot.to_bytes(4, "little"), 4)
        backend = syscall.lookup(backends, id, 28) if id is not None else None
        if backend is not None and backend[:16] == address:
            return True
    return False
