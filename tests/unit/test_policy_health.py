"""healthCheckNodePort: what a load balancer is told about this node, for each family."""

from __future__ import annotations

import pytest

from ebpflb.decide import decide
from ebpflb.model import Endpoint, EndpointSlice, Family, Service
from ebpflb.policy import Router, health_counts, routes
from ebpflb.routes import HealthCheck
from tests.flows import expected, outcome, packet
from tests.world import (
    CLUSTER,
    LOCAL,
    UDP,
    dying,
    endpoint_slice,
    leaving,
    node,
    options,
    port,
    service,
    slice_port,
    snapshot,
    unready,
)

LB = service(lb=["1.2.3.4"], external_policy=LOCAL, health_port=32000)
DUAL = service("ns1/svc1", ["172.30.0.41", "fd00:172:30::41"], lb=["1.2.3.4"], external_policy=LOCAL, health_port=32000)
A, B = slice_port(80, "a"), slice_port(81, "b")

COUNTS: dict[str, tuple[tuple[EndpointSlice, ...], int]] = {
    "esipp-should-only-target-nodes-with-endpoints": ((endpoint_slice("10.0.2.1"),), 0),
    "local-endpoints-count": ((endpoint_slice("10.0.1.1", "10.0.1.2", "10.0.2.1"),), 2),
    "no-slices": ((), 0),
    "should-fail-health-check-node-port-if-there-are-only-terminating-endpoints": (
        (endpoint_slice(leaving("10.0.1.1"), leaving("10.0.1.2")),),
        0,
    ),
    "terminating-ones-do-not-count-beside-ready-ones": ((endpoint_slice("10.0.1.1", leaving("10.0.1.2")),), 1),
    "unready-and-dying": ((endpoint_slice(unready("10.0.1.1"), dying("10.0.1.2")),), 0),
    "one-address-on-two-ports-counts-once": ((endpoint_slice("10.0.1.1", ports=[A, B]),), 1),
    "one-address-in-two-slices-counts-once": (
        (endpoint_slice("10.0.1.1", ports=[A]), endpoint_slice("10.0.1.1", "10.0.1.2", ports=[B])),
        2,
    ),
    "ports-that-the-service-lacks-count": ((endpoint_slice("10.0.1.1", ports=[slice_port(9, "x", UDP)]),), 1),
    "slice-without-ports": ((endpoint_slice("10.0.1.1", ports=[]),), 0),
    "other-family": ((endpoint_slice(Endpoint("fd00:10:0:1::1", node="node1")),), 0),
}


@pytest.mark.parametrize(("slices", "wanted"), COUNTS.values(), ids=COUNTS)
def test_count(slices: tuple[EndpointSlice, ...], wanted: int) -> None:
    assert health_counts(LB, slices, "node1") == {Family.IPV4: wanted}


def test_each_family_has_its_own_count() -> None:
    slices = (
        endpoint_slice("10.0.1.1", "10.0.1.2"),
        endpoint_slice(Endpoint("fd00:10:0:1::1", node="node1"), name="six"),
    )
    assert health_counts(DUAL, slices, "node1") == {Family.IPV4: 2, Family.IPV6: 1}
    assert health_counts(DUAL, slices, "node2") == {Family.IPV4: 0, Family.IPV6: 0}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(service(lb=["1.2.3.4"], health_port=32000), id="policy-cluster"),
        pytest.param(service(lb=["1.2.3.4"], external_policy=LOCAL), id="no-port"),
        pytest.param(
            service("ns1/svc1", "172.30.0.41", port(80, node_port=30080), external_policy=LOCAL, health_port=32000),
            id="node-port-only",
        ),
    ],
)
def test_no_health_check(what: Service) -> None:
    assert health_counts(what, (endpoint_slice("10.0.1.1"),), "node1") == {}


def test_should_implement_nodeport_and_healthchecknodeport_correctly_when_externaltrafficpolicy_changes() -> None:
    """Three nodes; the only endpoint is on node2. Local, then Cluster, then Local again."""
    slices = (endpoint_slice("10.0.2.1"),)
    for policy, here, elsewhere in (
        (LOCAL, ("10.0.2.1:80", {Family.IPV4: 1}), ("DROP", {Family.IPV4: 0})),
        (CLUSTER, ("masq 10.0.2.1:80", {}), ("masq 10.0.2.1:80", {})),
        (LOCAL, ("10.0.2.1:80", {Family.IPV4: 1}), ("DROP", {Family.IPV4: 0})),
    ):
        both = service(
            "ns1/svc1",
            "172.30.0.41",
            port(80, node_port=30080),
            lb=["1.2.3.4"],
            external_policy=policy,
            health_port=32000,
        )
        for number in (1, 2, 3):
            address = f"192.168.0.{number + 1}"
            this = node(f"node{number}", ["127.0.0.1", address], [address])
            table = routes(snapshot(both, *slices, node=this), options())
            then, count = here if number == 2 else elsewhere
            assert outcome(decide(table, packet(f"outside {address}:30080"))) == expected(then), (policy, number)
            assert health_counts(both, slices, this.name) == count, (policy, number)


def test_should_fail_health_check_node_port_while_terminating_endpoints_still_serve() -> None:
    slices = (endpoint_slice(leaving("10.0.1.1")),)
    table = routes(snapshot(LB, *slices), options())
    assert outcome(decide(table, packet("outside 1.2.3.4:80"))) == expected("10.0.1.1:80")
    assert health_counts(LB, slices, "node1") == {Family.IPV4: 0}


# ---- What the table asks to be answered ----

SIX = Endpoint("fd00:10:0:1::1", node="node1")


def checks(*objects: object, **more: object) -> dict[tuple[str, int], HealthCheck]:
    table = routes(snapshot(*objects), options(**more))  # type: ignore[arg-type]
    return {(str(name), int(family)): check for (name, family), check in table.health.items()}


def test_a_check_is_answered_in_each_family_of_the_service() -> None:
    found = checks(DUAL, endpoint_slice("10.0.1.1", "10.0.1.2"), endpoint_slice(SIX, name="six"))
    assert found == {
        ("ns1/svc1", 4): HealthCheck(DUAL.name, Family.IPV4, 32000, (), 2),
        ("ns1/svc1", 6): HealthCheck(DUAL.name, Family.IPV6, 32000, (), 1),
    }


def test_a_check_listens_where_node_ports_do() -> None:
    (check,) = checks(LB, endpoint_slice("10.0.1.1"), nodeport_addresses=("192.168.0.0/24",)).values()
    assert check.addresses == ("192.168.0.2",)
    (everywhere,) = checks(LB, endpoint_slice("10.0.1.1"), nodeport_addresses=("0.0.0.0/0",)).values()
    assert everywhere.addresses == ()
    (other_family,) = checks(LB, endpoint_slice("10.0.1.1"), nodeport_addresses=("fd00::/8",)).values()
    assert other_family.addresses == ()
    (primary,) = checks(LB, endpoint_slice("10.0.1.1"), nodeport_primary=True).values()
    assert primary.addresses == ("192.168.0.2",)


def test_no_address_for_node_ports_is_no_check() -> None:
    assert checks(LB, endpoint_slice("10.0.1.1"), nodeport_addresses=("198.51.100.0/24",)) == {}


def test_esipp_health_check_is_not_leaked_after_a_type_change() -> None:
    """The checks of the next table differ by the change, whatever happens to its rows."""
    router = Router()
    slices = (endpoint_slice("10.0.1.1"),)
    first = router.update(snapshot(LB, *slices), None, options())
    assert [check.local_endpoints for check in first.health.values()] == [1]
    touched = frozenset({LB.name})
    more = router.update(snapshot(LB, endpoint_slice("10.0.1.1", "10.0.1.2")), touched, options())
    assert [check.local_endpoints for check in more.health.values()] == [2]
    elsewhere = router.update(snapshot(LB, endpoint_slice("10.0.2.1")), touched, options())
    assert [check.local_endpoints for check in elsewhere.health.values()] == [0]
    plain = router.update(snapshot(service("ns1/svc1", "172.30.0.41"), *slices), touched, options())
    assert not plain.health
    again = router.update(snapshot(LB, *slices), touched, options())
    assert len(again.health) == 1
    assert not router.update(snapshot(*slices), touched, options()).health


def test_the_count_alone_may_change() -> None:
    """Cluster-wide routes need not change with it, but the table does."""
    router = Router()
    lb = service(lb=["1.2.3.4"], external_policy=LOCAL, health_port=32000)
    before = router.update(snapshot(lb, endpoint_slice("10.0.1.1", ports=[A])), None, options())
    after = router.update(
        snapshot(lb, endpoint_slice("10.0.1.1", "10.0.1.2", ports=[A])), frozenset({lb.name}), options()
    )
    assert [check.local_endpoints for check in before.health.values()] == [1]
    assert [check.local_endpoints for check in after.health.values()] == [2]
    assert after == before
