"""Every dataplane's plan does with every packet what `decide` says.

Rules of this file: worlds are random, packets are a grid over each; what a dataplane cannot do is skipped by the name
that `ebpflb.dataplane.limits` has for it, and by nothing else. How many packets were compared is counted: a run that
was asked for many worlds (EBPFLB_FUZZ) fails if they came to little.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings

from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.dataplane.ipvs.names import Mark
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.writer import Writer as IpvsWriter
from ebpflb.dataplane.limits import limited
from ebpflb.decide import Decision, Outcome, Packet, decide
from ebpflb.model import Protocol
from ebpflb.policy import routes
from ebpflb.routes import Route, RouteTable
from tests.ipvs import FakeKernel, FakeTables, with_sets
from tests.maps import FakeMaps
from tests.plan.rulesets import saved, text_of
from tests.plan.worlds import Client, World, packets, worlds
from tests.tables import FACTS
from tests.tracers import Traced, expected, is_local
from tests.tracers.bpf import Tracer as BpfTracer
from tests.tracers.iptables import Tracer as IptablesTracer
from tests.tracers.ipvs import Held
from tests.tracers.ipvs import Tracer as IpvsTracer
from tests.world import NODE_IP, v6

pytestmark = pytest.mark.timeout(1200)  # EBPFLB_FUZZ may ask for any number

AS_OFTEN = settings(max_examples=settings().max_examples if "EBPFLB_FUZZ" in os.environ else 6)
"""A world is a few hundred packets: not as many as a property has examples where nobody asked for many."""

MANY, LEAST, LEAST_OF_A_VERDICT = 100, 20_000, 100
"""From so many worlds on, so many packets are compared for each dataplane, and so many of each verdict. Of 150 worlds
come some 50,000, of which 1,600 are dropped: a third more or less of these in one run than in another, so that a bound
anywhere near that would be broken by chance."""

MAIN = (NODE_IP, v6(NODE_IP))
"""The addresses from which the node speaks unless a socket is bound to another one."""

_compared: dict[str, Counter[Outcome]] = {}


@pytest.fixture(scope="module", autouse=True)
def enough_packets() -> Iterator[None]:
    yield
    if AS_OFTEN.max_examples >= MANY:
        for counted in _compared.values():
            assert counted.total() >= LEAST and min(counted[each] for each in Outcome) >= LEAST_OF_A_VERDICT, _compared


def described(world: World, table: RouteTable, packet: Packet, wanted: Traced, found: Traced) -> str:
    steps = "\n  ".join(decide(table, packet).reasons)
    return f"{packet}\nwanted {wanted}\nfound  {found}\n  {steps}\n{world.options}\n{table.locality}"


@AS_OFTEN
@given(worlds)
def test_bpf(world: World) -> None:
    """Invariant: the rows lead every packet where `decide` does."""
    table = routes(*world)
    maps = FakeMaps()
    assert Writer(maps, FACTS, time.monotonic).sync(table).complete
    local = frozenset(table.locality.node_addresses)
    tracer = BpfTracer(maps.tables, local)
    for client, packet in packets(table):
        decision = decide(table, packet)
        if bpf_is_limited(client, packet, decision):
            continue
        wanted = expected(decision, packet)
        if not client.interface:  # whom a socket of the node asks sees the node, without any masquerade
            wanted = wanted._replace(backends=dict.fromkeys(wanted.backends, False))
        found = tracer.trace(packet)
        assert found[:3] == wanted[:3] and found.evenly, described(world, table, packet, wanted, found)
        _compared.setdefault("bpf", Counter())[wanted.verdict] += 1


def bpf_is_limited(client: Client, packet: Packet, decision: Decision) -> bool:
    """Whether a limit of bpf covers this packet."""
    own, route = not client.interface, decision.route
    if limited("bpf", "bound-sockets") and own and packet.source not in MAIN and route and route.source_ranges:
        return True
    if limited("bpf", "sctp-sockets") and own and packet.protocol is Protocol.SCTP:
        return True
    changes = any(each.backend.port != packet.port for each in decision.candidates)
    return limited("bpf", "sctp-ports") and packet.protocol is Protocol.SCTP and changes


@AS_OFTEN
@given(worlds)
def test_iptables(world: World) -> None:
    """Invariant: the rules lead every packet where `decide` does."""
    table = routes(*world)
    local = frozenset(table.locality.node_addresses)
    tracer = IptablesTracer(saved(table), local)
    for _, packet in packets(table):
        wanted = expected(decide(table, packet), packet)
        found = tracer.trace(packet)
        assert found[:3] == wanted[:3] and found.evenly, described(world, table, packet, wanted, found)
        _compared.setdefault("iptables", Counter())[wanted.verdict] += 1


@AS_OFTEN
@given(worlds)
def test_affinity_of_iptables(world: World) -> None:
    """Invariant: whoever was sent to a backend is sent there again, by every frontend of that Service port that may use
    it, until the Service's time is over; what other Services do with him is the same as ever."""
    table = routes(*world)
    tracer = IptablesTracer(saved(table), frozenset(table.locality.node_addresses))
    forwarded: dict[Client, list[tuple[Packet, Route, Traced]]] = {}
    for client, packet in packets(table):
        decision = decide(table, packet)
        if decision.route is not None and decision.verdict is Outcome.FORWARD:
            forwarded.setdefault(client, []).append((packet, decision.route, expected(decision, packet)))
    for asked in forwarded.values():
        for service in {route.service for _, route, _ in asked if route.affinity_seconds}:
            first, seconds = next((each[0], each[1].affinity_seconds) for each in asked if each[1].service == service)
            went = tracer.paths(first)[0]
            for packet, route, wanted in asked:
                for age in (seconds - 1, seconds):
                    found = tracer.trace(packet, {name: {packet.source: age} for name in went.remembered})
                    stays = route.service == service and age < seconds and went.to in wanted.backends
                    places = {went.to} if stays else set(wanted.backends)
                    assert set(found.backends) == places, (first, went, age, packet, found, table)


@AS_OFTEN
@given(worlds)
def test_ipvs(world: World) -> None:
    """Invariant: rules, sets and virtual servers lead every packet where `decide` does."""
    table = routes(*world)
    local = frozenset(table.locality.node_addresses)
    tracer = IpvsTracer(held_by_ipvs(table), local)
    for _, packet in packets(table):
        decision = decide(table, packet)
        if ipvs_is_limited(packet, decision, table):
            continue
        wanted, found = expected(decision, packet), tracer.trace(packet)
        assert found[:3] == wanted[:3] and found.evenly, described(world, table, packet, wanted, found)
        _compared.setdefault("ipvs", Counter())[wanted.verdict] += 1


@AS_OFTEN
@given(worlds)
def test_ipvs_and_sockets_of_the_node(world: World) -> None:
    """Invariant: a socket of the node that is bound to no address speaks to an address of kube-ipvs0 from that address;
    it gets what the node gets, and no backend sees that source."""
    table = routes(*world)
    tracer = IpvsTracer(held_by_ipvs(table), frozenset(table.locality.node_addresses))
    for frontend in {frontend for frontend, _ in table if frontend.address not in table.locality.node_addresses}:
        packet = Packet(NODE_IP if ":" not in frontend.address else v6(NODE_IP), *frontend)
        wanted = expected(decide(table, packet), packet)
        wanted = wanted._replace(backends=dict.fromkeys(wanted.backends, True))
        found = tracer.trace(msgspec.structs.replace(packet, source=frontend.address))
        assert found[:3] == wanted[:3] and found.evenly, described(world, table, packet, wanted, found)


def held_by_ipvs(table: RouteTable) -> Held:
    """What a kernel in memory has after one sync."""
    kernel = with_sets(FakeKernel(table.locality.node_addresses))
    tables = {4: FakeTables(), 6: FakeTables()}
    report = IpvsWriter(kernel, tables, IpvsOptions(), Mark(), time.monotonic).sync(table)
    assert report.complete, report.problems
    return Held(
        {version == 6: text_of(each.read()) for version, each in tables.items()},
        {name: (header.type, kernel.contents[name]) for name, header in kernel.sets.items()},
        {
            (each.version, each.mark, each.protocol, each.address, each.port): {
                key: found.weight for key, found in kernel.places[each].items()
            }
            for each in kernel.held
        },
        frozenset(kernel.bound),
    )


def ipvs_is_limited(packet: Packet, decision: Decision, table: RouteTable) -> bool:
    """Whether a limit of ipvs covers this packet."""
    if limited("ipvs", "loopback") and is_local(packet.source, ()) | (packet.source == "::1"):
        return decision.verdict is not Outcome.NOT_SERVICE
    external = any(packet.destination == each.address for each, _ in table)
    return limited("ipvs", "external-ports") and decision.verdict is Outcome.NOT_SERVICE and external
