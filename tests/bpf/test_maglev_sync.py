"""Consistent hashing on a kernel's maps: which rows a Service's algorithm costs, and what stays when it changes.

Rules of this file: as test_sync's. What a program reads of a choice is looked at, not what it chooses.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import pytest

from ebpflb.dataplane.bpf import maglev, pins, syscall
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.dataplane.bpf.layouts import ROUTE_REFERENCES, TABLE_KEY, TABLE_PART
from ebpflb.dataplane.bpf.maglev import SIZES, positions
from ebpflb.dataplane.bpf.maps import KernelMaps
from ebpflb.model import Protocol
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Frontend,
    Key,
    Kind,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
)
from tests.bpf.dataplanes import LOCALITY, Node, own_namespace, own_node
from tests.bpf.dataplanes import SIZES as CAPACITY

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

WEB = ServicePortName("default", "web", "http")
VIP = Frontend("172.30.0.9", 80, Protocol.TCP)
OLD, NEW = Backend("10.180.9.1", 8080, state=BackendState.DRAINING), Backend("10.180.9.2", 8080)


@pytest.fixture
def node() -> Iterator[Node]:
    with own_namespace(), own_node() as made:
        yield made


def started(node: Node, maglev_table_size: int = SIZES[8]) -> BpfDataplane:
    """Another process's dataplane."""
    for each in node.made:
        each.close()
    made = BpfDataplane(node.bpffs, node.cgroup, sizes=CAPACITY, maglev_table_size=maglev_table_size)
    node.made.append(made)
    made.start()
    return made


def pods(count: int) -> tuple[Backend, ...]:
    return tuple(Backend(f"10.180.0.{number + 1}", 8080) for number in range(count))


def web(algorithm: Algorithm, backends: tuple[Backend, ...], affinity: int = 0) -> RouteTable:
    inside = Route(WEB, Kind.CLUSTER_IP, Verdict.FORWARD, backends, Masquerade.NOT_POD, affinity, algorithm=algorithm)
    outside = msgspec.structs.replace(inside, masquerade=Masquerade.ALWAYS)
    rows: dict[Key, Route] = {(VIP, Scope.INTERNAL): inside, (VIP, Scope.EXTERNAL): outside}
    return RouteTable(rows, LOCALITY)


class Choice(NamedTuple):
    """What programs go by in a frontend's row for one scope."""

    slots: int
    active: int
    table: int


def parts_of(backends: tuple[Backend, ...], code: int) -> bytes:
    """A table as the kernel has it: the last part is padded."""
    places = positions(backends, code)
    return places + bytes(-len(places) % (2 * TABLE_PART))


class Held:
    """The kernel's rows, read from the pins."""

    def __init__(self, node: Node) -> None:
        self._rows: dict[str, tuple[bytes, bytes]] = {}
        for name in ("frontends", "tables", "slots", "backends"):
            fd = syscall.obj_get(str(node.bpffs / pins.MAPS / name))
            try:
                self._rows[name] = KernelMaps({name: fd}).read(name)
            finally:
                os.close(fd)

    def raw(self, *names: str) -> dict[str, tuple[bytes, bytes]]:
        return {name: self._rows[name] for name in names}

    @property
    def choice(self) -> Choice:
        """That of both scopes."""
        halves = {
            Choice(slots, count, table)
            for _, slots, count, *_, table in ROUTE_REFERENCES.iter_unpack(self._rows["frontends"][1])
        }
        (found,) = halves
        return found

    @property
    def places(self) -> dict[int, bytes]:
        """The tables, put together, by first slot."""
        keys, values = self._rows["tables"]
        size = 2 * TABLE_PART
        parts = {key: values[at * size : (at + 1) * size] for at, key in enumerate(TABLE_KEY.iter_unpack(keys))}
        return {start: b"".join(parts[key] for key in sorted(parts) if key[0] == start) for start, _ in parts}


def test_the_kernel_holds_the_table_of_the_active_backends(node: Node) -> None:
    routes = web(Algorithm.MAGLEV, (*pods(12), OLD))
    dataplane = started(node)
    assert dataplane.sync(routes).complete
    held = Held(node)
    assert held.choice.active == 12 and SIZES[held.choice.table] == 4093
    assert held.places == {held.choice.slots: parts_of(pods(12), held.choice.table)}
    assert dataplane.state() == node.dataplane().state() == routes
    again = dataplane.sync(RouteTable(dict(routes), LOCALITY))
    restarted = started(node).sync(RouteTable(dict(routes), LOCALITY))
    for report in (again, restarted):
        assert (report.written, report.removed, report.failed) == (0, 0, 0)


@pytest.mark.parametrize("affinity", [0, 60], ids=["no affinity", "affinity"])
def test_the_algorithm_of_a_live_service_changes_by_its_row_alone(node: Node, affinity: int) -> None:
    """Backends keep their numbers and slots, by which flows know them; the table is there before and gone after."""
    backends = (*pods(5), OLD)
    dataplane = started(node)
    dataplane.sync(web(Algorithm.RANDOM, backends, affinity))
    before = Held(node)
    assert before.choice.table == 0 and before.places == {}
    for algorithm in (Algorithm.MAGLEV, Algorithm.RANDOM, Algorithm.MAGLEV, Algorithm.ROUND_ROBIN):
        report = dataplane.sync(web(algorithm, backends, affinity))
        assert report.complete
        assert report.written == (2 if algorithm is Algorithm.MAGLEV else 1)
        held = Held(node)
        assert held.raw("slots", "backends") == before.raw("slots", "backends")
        assert bool(held.choice.table) is bool(held.places) is (algorithm is Algorithm.MAGLEV)
        assert dataplane.state() == web(algorithm, backends, affinity)


def test_another_backend_is_another_set_with_another_table(node: Node) -> None:
    """Whoever still reads the old row finds the old table, until nothing names it."""
    dataplane = started(node)
    dataplane.sync(web(Algorithm.MAGLEV, pods(5)))
    before = Held(node)
    dataplane.sync(web(Algorithm.MAGLEV, (*pods(5), NEW)))
    held = Held(node)
    assert held.choice.slots != before.choice.slots
    assert held.places == {held.choice.slots: parts_of((*pods(5), NEW), 1)}
    dataplane.sync(RouteTable({}, LOCALITY))
    assert Held(node).places == {}


CAPS = {"that it does not reach": (SIZES[8], 4093), "between sizes": (2000, 1021), "below all": (1, 1021)}


@pytest.mark.parametrize(("cap", "size"), CAPS.values(), ids=CAPS)
def test_a_table_is_no_larger_than_it_may_be(node: Node, cap: int, size: int) -> None:
    started(node, cap).sync(web(Algorithm.MAGLEV, pods(12)))
    assert SIZES[Held(node).choice.table] == size


def test_another_limit_after_a_restart_is_another_table(node: Node) -> None:
    started(node).sync(web(Algorithm.MAGLEV, pods(12)))
    dataplane = started(node, 1021)
    assert dataplane.sync(web(Algorithm.MAGLEV, pods(12))).complete
    held = Held(node)
    assert SIZES[held.choice.table] == 1021
    assert held.places == {held.choice.slots: parts_of(pods(12), 1)}
    quiet = dataplane.audit()
    assert (quiet.written, quiet.removed, quiet.failed) == (0, 0, 0)


def test_audit_mends_a_table(node: Node) -> None:
    dataplane = started(node)
    dataplane.sync(web(Algorithm.MAGLEV, pods(12)))
    whole = Held(node).places
    fd = syscall.obj_get(str(node.bpffs / pins.MAPS / "tables"))
    try:
        maps = KernelMaps({"tables": fd})
        keys, values = maps.read("tables")
        maps.put("tables", keys[:8], struct.pack("=H", values[0] ^ 1) + values[2 : 2 * TABLE_PART])
        maps.remove("tables", keys[8:16])
    finally:
        os.close(fd)
    assert dataplane.audit().complete
    assert Held(node).places == whole
    quiet = dataplane.audit()
    assert (quiet.written, quiet.removed) == (0, 0)


def test_where_tables_do_not_fit_the_service_keeps_what_it_had(node: Node) -> None:
    """A full map costs those that ask for more, by name; at random is better than not at all, which is what it had."""
    few = BpfDataplane(node.bpffs, node.cgroup, sizes=dataclasses.replace(CAPACITY, tables=1))
    node.made.append(few)
    few.start()
    assert few.sync(web(Algorithm.RANDOM, pods(12))).complete
    report = few.sync(web(Algorithm.MAGLEV, pods(12)))
    assert report.failed == 1
    assert [problem.subject for problem in report.problems] == [str(WEB)]
    assert "the map tables is full" in report.problems[0].reason
    assert few.state() == web(Algorithm.RANDOM, pods(12))


def test_a_checkout_that_was_not_built_serves_all_the_same(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Slower, the same tables, and said once."""
    compiled = parts_of(pods(12), 3)
    monkeypatch.setitem(sys.modules, maglev.MODULE, None)  # so that Python finds none
    maglev.built.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "ebpflb"):
            dataplane = started(node)
        (said,) = [record.message for record in caplog.records if "maglev.c" in record.message]
        assert "make setup" in said and "\n" not in said
        assert dataplane.sync(web(Algorithm.MAGLEV, pods(12))).complete
    finally:
        maglev.built.cache_clear()
    assert Held(node).places == {Held(node).choice.slots: compiled}
