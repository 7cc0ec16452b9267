"""The iptables dataplane on the kernel's own rules, in either variant: what a sync writes, and that it is all it does.

A cluster is written in IPv4 (see `tests.world`) and carried in both families where that matters.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpflb.dataplane.iptables import names
from ebpflb.model import EndpointSlice, Family, Node, Protocol, ProxyOptions, Service
from ebpflb.policy import Router, routes
from ebpflb.routes import (
    Backend,
    BackendState,
    Frontend,
    Kind,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
)
from tests.iptables import WEB, WEB_PODS, table_of
from tests.netfilter.conftest import Place, entered
from tests.netfilter.test_rules_as_saved import EVERYTHING
from tests.property.clusters import choices_for_rules, nodes, objects, things, world
from tests.world import endpoint_slice, port, service

pytestmark = pytest.mark.root

WEB_SVC = names.SVC + names.port_hash("ns1/web:p80", "tcp")


def sep(endpoint: str) -> str:
    return names.endpoint_chain("ns1/web:p80", "tcp", endpoint)


def many(services: int, endpoints: int) -> RouteTable:
    """A cluster of some size: cluster IPs 10.96.0.0/16, backends in 10.0.0.0/8."""
    rows = {}
    for number in range(services):
        backends = tuple(Backend(f"10.{each}.{number >> 8}.{number & 255}", 8080) for each in range(endpoints))
        frontend = Frontend(f"10.96.{number >> 8}.{number & 255}", 80, Protocol.TCP)
        name = ServicePortName("ns", f"svc-{number}", "http")
        for scope in Scope:
            rows[frontend, scope] = Route(
                name, Kind.CLUSTER_IP, Verdict.FORWARD, backends, (Masquerade.NOT_POD, Masquerade.ALWAYS)[scope]
            )
    locality = table_of(WEB).locality
    return RouteTable(rows, locality)


def holds(place: Place, table: RouteTable) -> bool:
    """Whether the kernel has these rows, read back by another process' dataplane."""
    state = place.dataplane().state()
    return (
        dict(state) == dict(table)
        and state.owned == table.owned
        and state.locality.pod_cidrs == table.locality.pod_cidrs
        and state.locality.pod_interface == table.locality.pod_interface
    )


# ---- Sync


@pytest.mark.parametrize("family", Family)
def test_what_is_written_is_read_back(place: Place, family: Family) -> None:
    table = table_of(*EVERYTHING, family=family)
    report = place.dataplane().sync(table)
    assert report.complete and report.written and not report.problems
    assert holds(place, table)


def test_a_second_sync_writes_nothing(place: Place) -> None:
    table = table_of(*EVERYTHING)
    dataplane = place.dataplane()
    dataplane.sync(table)
    before = place.everything()
    report = dataplane.sync(table_of(*EVERYTHING))  # another table that is equal
    assert (report.written, report.removed, report.failed) == (0, 0, 0)
    assert place.everything() == before


def test_a_restart_with_nothing_changed_writes_nothing(place: Place) -> None:
    table = table_of(*EVERYTHING)
    place.dataplane().sync(table)
    restarted = place.dataplane()
    report = restarted.sync(table)
    assert (report.written, report.removed, report.failed) == (0, 0, 0)
    report = restarted.audit()
    assert (report.written, report.removed, report.failed) == (0, 0, 0)


def test_an_endpoint_that_comes_rewrites_its_ports_chain_alone() -> None:
    other = service("ns1/other", "172.30.0.99"), endpoint_slice("10.0.1.7", of="ns1/other")
    with entered("nft") as place:
        dataplane = place.dataplane()
        dataplane.sync(table_of(WEB, WEB_PODS, *other))
        before = place.handles()
        more = msgspec.structs.replace(
            WEB_PODS, endpoints=(*WEB_PODS.endpoints, *endpoint_slice("10.0.1.9", of="ns1/web").endpoints)
        )
        after = table_of(WEB, more, *other)
        report = dataplane.sync(after)
        assert report.complete and holds(place, after)
        now = place.handles()
        assert {chain for chain in now if now[chain] != before.get(chain)} == {WEB_SVC, sep("10.0.1.9:8080")}
        assert before.keys() <= now.keys()


def test_a_service_that_comes_and_goes_leaves_the_lines_of_others_alone() -> None:
    first = (
        service("ns1/first", "172.30.0.98", port(80, "", node_port=30080)),
        endpoint_slice("10.0.1.6", of="ns1/first"),
    )
    other = (
        service("ns1/other", "172.30.0.99", port(80, "", node_port=30081)),
        endpoint_slice("10.0.1.7", of="ns1/other"),
    )
    with entered("nft") as place:
        dataplane = place.dataplane()
        dataplane.sync(table_of(WEB, WEB_PODS, *first))
        before, saved = place.handles(), place.everything()
        assert dataplane.sync(table_of(WEB, WEB_PODS, *first, *other)).complete
        now = place.handles()
        for chain in (names.SERVICES, names.NODE_PORTS):
            assert set(before[chain]) < set(now[chain])
        assert dataplane.sync(table_of(WEB, WEB_PODS, *first)).complete
        assert place.handles() == before
        assert place.everything() == saved


def test_a_service_that_loses_its_last_endpoint_is_refused_and_comes_back(place: Place) -> None:
    dataplane = place.dataplane()
    for table in (table_of(WEB, WEB_PODS), table_of(WEB), table_of(WEB, WEB_PODS)):
        assert dataplane.sync(table).complete
        assert holds(place, table)
        refusals = [rule for rule in place.saved()["filter"][names.SERVICES] if "has no endpoints" in rule]
        assert len(refusals) == (not any(route.backends for route in table.values()))


def test_draining_backends_algorithms_and_forwarding_survive(place: Place) -> None:
    table = table_of(*EVERYTHING)
    states = {backend.state for route in table.values() for backend in route.backends}
    assert BackendState.DRAINING in states or states == {BackendState.ACTIVE}
    place.dataplane().sync(table)
    state = place.dataplane().state()
    assert {(key, route.algorithm, route.forwarding) for key, route in state.items()} == {
        (key, route.algorithm, route.forwarding) for key, route in table.items()
    }


def test_more_chains_than_iptables_nft_can_save(place: Place) -> None:
    """Beyond a thousand chains the tables of variant nft are read by chain."""
    table = many(150, 10)
    dataplane = place.dataplane()
    assert dataplane.sync(table).complete
    assert holds(place, table)
    frontend = Frontend("10.96.0.7", 80, Protocol.TCP)
    fewer = table.evolve({}, [(frontend, scope) for scope in Scope])
    report = dataplane.sync(fewer)
    assert report.complete and report.removed == 11 + 1  # chains, and the line that led to them
    report = dataplane.audit()
    assert (report.written, report.removed) == (0, 0)
    assert holds(place, fewer)
    dataplane.cleanup()
    assert place.everything() == {family: {} for family in Family}


def test_many_services_at_once(place: Place) -> None:
    """More than one transaction's worth of chains, by a change."""
    dataplane = place.dataplane()
    dataplane.sync(many(1, 1))
    table = many(120, 10)
    assert dataplane.sync(table).complete
    assert holds(place, table)
    assert dataplane.sync(many(1, 1)).complete
    assert holds(place, many(1, 1))


@settings(max_examples=6, suppress_health_check=list(HealthCheck), deadline=None)
@given(things, nodes, choices_for_rules, st.lists(objects, max_size=8), st.sampled_from(["nft", "legacy"]))
def test_any_history_ends_in_the_rules_of_its_end(
    said: list[Service | EndpointSlice],
    node: Node,
    chosen: ProxyOptions,
    history: list[Service | EndpointSlice],
    variant: str,
) -> None:
    """Invariant: after each change the kernel holds the routes, and an audit has nothing to do."""
    router = Router()
    with entered(variant) as place:
        dataplane = place.dataplane()
        told = [*said]
        table = router.update(world(told, node), None, chosen)
        assert dataplane.sync(table).complete
        for each in history:
            told.append(each)
            table = router.update(world(told, node), None, chosen)
            assert dataplane.sync(table).complete
            report = dataplane.audit()
            assert (report.written, report.removed, report.failed) == (0, 0, 0)
        assert holds(place, routes(world(told, node), chosen))


# ---- What cannot be written


def test_a_service_that_is_refused_harms_no_other(place: Place) -> None:
    table = many(5, 2)
    broken = Frontend("10.96.0.3", 80, Protocol.TCP)
    bad = (Backend("10.0.0.1", 70_000),)  # no port has such a number
    rows = {(broken, scope): msgspec.structs.replace(table[broken, scope], backends=bad) for scope in Scope}
    dataplane = place.dataplane()
    report = dataplane.sync(table.evolve(rows))
    assert report.failed == 1
    (problem,) = report.problems
    assert problem.subject == "ns/svc-3"
    state = place.dataplane().state()
    assert {key for key in table if key[0] != broken} == set(state)
    # It is told each time, costs nothing meanwhile, and heals.
    more = table.evolve(rows | {key: route for key, route in many(6, 2).items() if key not in table})
    assert dataplane.sync(more).failed == 1
    assert dataplane.sync(many(6, 2)).complete
    assert holds(place, many(6, 2))


def test_a_pair_of_routes_of_an_unknown_shape_is_a_problem_of_its_service(place: Place) -> None:
    table = many(2, 2)
    broken = Frontend("10.96.0.1", 80, Protocol.TCP)
    rows = {(broken, Scope.EXTERNAL): msgspec.structs.replace(table[broken, Scope.EXTERNAL], backends=())}
    report = place.dataplane().sync(table.evolve(rows))
    assert report.failed == 1 and [each.subject for each in report.problems] == ["ns/svc-1"]
    assert {frontend.address for frontend, _ in place.dataplane().state()} == {"10.96.0.0"}
