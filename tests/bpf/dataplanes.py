"""A node's dataplanes over maps of their own, and Services to give them, for the tests of whole dataplanes.

Rules of this file: what a test makes here has a cgroup, a pin directory and, where it asks for one, a network namespace
of its own, and nothing of that is left behind.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ebpflb.dataplane.bpf import map_calls, pins, syscall
from ebpflb.dataplane.bpf.constants import Sizes
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.dataplane.bpf.layouts import U32
from ebpflb.model import Protocol
from ebpflb.routes import (
    Backend,
    Frontend,
    Key,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
)
from tests.bpf.namespaces import Namespace
from tests.conftest import cgroup2

ROOMY = {"frontends": 80, "backends": 80, "slots": 80, "services": 80, "ranges": 80}
ROOMY |= {"owned": 80, "tables": 80}
SIDE = {"flows": 64, "sockets": 64, "fragments": 64, "sources": 16, "devices": 8, "clients": 64}
SIZES = Sizes(**ROOMY, **SIDE)
BIGGER = Sizes(**{**ROOMY, "frontends": 160}, **SIDE)
_numbers = itertools.count()

LOCALITY = Locality(("127.0.0.1", "192.168.0.2", "::1"), ("10.180.0.0/24", "fd00:10::/64"), "cali*")


class Node:
    """A node's dataplanes: each `dataplane()` is another process's, as far as the kernel can tell."""

    def __init__(self, hierarchy: Path) -> None:
        name = f"ebpflb-sync-{os.getpid()}-{next(_numbers)}"
        self.bpffs = Path("/sys/fs/bpf") / name
        self.cgroup = hierarchy / name
        self.cgroup.mkdir()
        self.made: list[BpfDataplane] = []

    def dataplane(self, sizes: Sizes = SIZES) -> BpfDataplane:
        made = BpfDataplane(self.bpffs, self.cgroup, sizes=sizes)
        self.made.append(made)
        return made

    def started(self, sizes: Sizes = SIZES) -> BpfDataplane:
        made = self.dataplane(sizes)
        made.start()
        return made

    def restarted(self) -> BpfDataplane:
        for each in self.made:
            each.close()
        return self.started()

    def remove(self) -> None:
        for each in self.made:
            each.close()
        BpfDataplane(self.bpffs, self.cgroup).cleanup()
        deadline = time.monotonic() + 30
        while True:
            try:
                self.cgroup.rmdir()
                return
            except OSError:
                assert time.monotonic() < deadline, f"{self.cgroup} stays busy"
                time.sleep(0.01)


@contextmanager
def own_node() -> Iterator[Node]:
    """A node's dataplanes in the calling thread's network namespace."""
    hierarchy = cgroup2()
    assert hierarchy is not None
    made = Node(hierarchy)
    try:
        yield made
    finally:
        made.remove()


@contextmanager
def own_namespace() -> Iterator[Namespace]:
    """A network namespace, which this thread is in meanwhile."""
    made = Namespace()
    try:
        made.ip("link set lo up")
        with made.entered():
            yield made
    finally:
        made.remove()


def service(number: int) -> ServicePortName:
    return ServicePortName("default", f"s{number}", "http")


def rows(number: int, count: int = 2, **more: object) -> dict[Key, Route]:
    """Both scopes of Service `number`, IPv6 for the odd ones."""
    address, pod = ("fd00:30::{}", "fd00:10::{}") if number % 2 else ("172.30.0.{}", "10.180.0.{}")
    to = tuple(Backend(pod.format(10 * number + at + 1), 8080) for at in range(count))
    route = Route(service(number), Kind.CLUSTER_IP, Verdict.FORWARD, to, Masquerade.NOT_POD)
    external = msgspec.structs.replace(route, masquerade=Masquerade.ALWAYS, **more)
    frontend = Frontend(address.format(number + 1), 80, Protocol.TCP)
    return {(frontend, Scope.INTERNAL): route, (frontend, Scope.EXTERNAL): external}


def table(count: int) -> RouteTable:
    found: dict[Key, Route] = {}
    for number in range(count):
        found |= rows(number, source_ranges=() if number else ("10.0.0.0/8", "203.0.113.0/24"))
    return RouteTable(found, LOCALITY)


def carried(node: Node, id: int, *cells: int) -> None:
    """Write what the first CPU would have counted for a Service."""
    fd = syscall.obj_get(str(node.bpffs / pins.MAPS / "traffic"))
    try:
        map_calls.update(fd, U32.pack(id), struct.pack("=3Q", *cells).ljust(map_calls.percpu_size(24), b"\0"))
    finally:
        os.close(fd)
