"""Every dataplane's plan does with every packet what `decide` says.

Rules of this file: worlds are random, packets are a grid over each; what a dataplane cannot do is skipped by the name
that `ebpflb.dataplane.limits` has for it, and by nothing else. How many packets were compared is counted: a run that
was asked for many worlds (EBPFLB_FUZZ) fails if they came to little.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings

from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.dataplane.limits import limited
from ebpflb.decide import Decision, Outcome, Packet, decide
from ebpflb.model import Protocol
from ebpflb.policy import routes
from ebpflb.routes import Route, RouteTable
from tests.maps import FakeMaps
from tests.plan.rulesets import saved
from tests.plan.worlds import Client, World, packets, worlds
from tests.tables import FACTS
from tests.tracers import Traced, expected
from tests.tracers.bpf import Tracer as BpfTracer
from tests.tracers.iptables import Tracer as IptablesTracer
from tests.world import NODE_IP, v6

MANY, LEAST = 100, 20_000
"""From so many worlds on, so many packets are compared for each dataplane."""

MAIN = (NODE_IP, v6(NODE_IP))
"""The addresses from which the node speaks unless a socket is bound to another one."""

_compared: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def enough_packets() -> Iterator[None]:
    yield
    if settings().max_examples >= MANY:
        assert min(_compared.values()) >= LEAST, _compared


def described(world: World, table: RouteTable, packet: Packet, wanted: Traced, found: Traced) -> str:
    steps = "\n  ".join(decide(table, packet).reasons)
    return f"{packet}\nwanted {wanted}\nfound  {found}\n  {steps}\n{world.options}\n{table.locality}"


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
        _compared["bpf"] += 1


def bpf_is_limited(client: Client, packet: Packet, decision: Decision) -> bool:
    """Whether a limit of bpf covers this packet."""
    if limited("bpf", "undefined-ports") and decision.verdict is Outcome.REJECT and decision.route is None:
        return True
    own, route = not client.interface, decision.route
    if limited("bpf", "bound-sockets") and own and packet.source not in MAIN and route and route.source_ranges:
        return True
    if limited("bpf", "sctp-sockets") and own and packet.protocol is Protocol.SCTP:
        return True
    changes = any(each.backend.port != packet.port for each in decision.candidates)
    return limited("bpf", "sctp-ports") and packet.protocol is Protocol.SCTP and changes


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
        _compared["iptables"] += 1


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
                    _compared["affinity of iptables"] += 1
