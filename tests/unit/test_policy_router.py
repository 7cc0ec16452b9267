"""The Router is `routes` that remembers: equal tables whatever came before, at the cost of the change."""

from __future__ import annotations

import msgspec
import pytest

from ebpflb.model import DetectLocal, EndpointSlice, Family, Node, ProxyOptions, Service, ServiceName, Snapshot
from ebpflb.policy import Router, routes
from ebpflb.routes import Frontend, Key, RouteTable, Scope
from tests.world import (
    LOCAL,
    SCTP,
    TCP,
    UDP,
    endpoint_slice,
    in_family,
    leaving,
    name_of,
    node,
    options,
    port,
    ready,
    service,
    slice_port,
    snapshot,
    unready,
)

MANY = 2_000


def many() -> Snapshot:
    """Thousands of Services with a slice of two endpoints each."""
    objects: list[Service | EndpointSlice] = []
    for index in range(MANY):
        high, low = divmod(index, 250)
        objects.append(service(f"ns1/s{index}", f"172.30.{high}.{low}"))
        objects.append(endpoint_slice(f"10.1.{high}.{low}", f"10.2.{high}.{low}", of=f"ns1/s{index}", name=f"s{index}"))
    return snapshot(*objects)


def with_slices(before: Snapshot, name: ServiceName, *slices: EndpointSlice) -> Snapshot:
    return msgspec.structs.replace(before, slices=before.slices.set(name, slices))  # type: ignore[attr-defined]


def rows_of(address: str, number: int = 80) -> set[Key]:
    return {(Frontend(address, number, TCP), scope) for scope in Scope}


def test_one_endpoint_among_thousands_of_services_costs_one_service() -> None:
    router = Router()
    before = many()
    old = router.update(before, None, options())
    assert (router.recomputed, len(old)) == (MANY, 2 * MANY)

    name = name_of("ns1/s1711")
    after = with_slices(before, name, endpoint_slice("10.1.6.211", of="ns1/s1711", name="s1711"))
    new = router.update(after, frozenset([name]), options())
    assert router.recomputed == 1
    assert new.changed_from(old) == rows_of("172.30.6.211")

    again = router.update(after, None, options())
    assert router.recomputed == 0
    assert again is new

    moved = msgspec.structs.replace(after, node=node(zone="zone-b"))
    assert router.update(moved, frozenset(), options()) is new
    assert router.update(moved, None, options(localhost_nodeports=False)) is new
    assert new == routes(after, options())


BASE = (service(), endpoint_slice("10.0.1.1", "10.0.2.1"))
NP = port(80, node_port=30080)
TWO_NODE_ADDRESSES = node(addresses=["127.0.0.1", "192.168.0.2", "198.51.100.2"])
ANNOTATED = service(annotations=[("algorithm", "maglev")])

# What a Service's life looks like to a proxy: each step is all that exists then.
HISTORIES: dict[str, tuple[tuple[Service | EndpointSlice, ...], ...]] = {
    "should-work-after-the-service-has-been-recreated": (BASE, BASE[1:], BASE),
    "should-be-updated-after-adding-or-deleting-ports": (
        (service("ns1/svc1", "172.30.0.41", port(80, "a")), endpoint_slice("10.0.1.1", ports=[slice_port(80, "a")])),
        (
            service("ns1/svc1", "172.30.0.41", port(80, "a"), port(81, "b")),
            endpoint_slice("10.0.1.1", ports=[slice_port(80, "a"), slice_port(90, "b")]),
        ),
        (service("ns1/svc1", "172.30.0.41", port(81, "b")), endpoint_slice("10.0.1.1", ports=[slice_port(90, "b")])),
    ),
    "should-be-able-to-change-the-type-from-externalname-to-clusterip": ((), BASE[:1], BASE),
    "should-be-able-to-change-the-type-from-externalname-to-nodeport": (
        (),
        (service("ns1/svc1", "172.30.0.41", NP), BASE[1]),
    ),
    "should-be-able-to-change-the-type-from-clusterip-to-externalname": (BASE, BASE[1:], ()),
    "should-be-able-to-change-the-type-from-nodeport-to-externalname": (
        (service("ns1/svc1", "172.30.0.41", NP), BASE[1]),
        BASE[1:],
    ),
    "should-implement-service-proxy-name": (BASE, BASE[1:], BASE),
    "should-implement-headless": (BASE, BASE[:1], BASE),
    "should-be-able-to-switch-session-affinity-for-service-with-type-clusterip": (
        BASE,
        (service(affinity=10800), BASE[1]),
        BASE,
    ),
    "should-be-able-to-switch-session-affinity-for-nodeport-service": (
        (service("ns1/svc1", "172.30.0.41", NP), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", NP, affinity=60), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", NP), BASE[1]),
    ),
    "should-be-able-to-change-the-type-and-ports-of-a-tcp-service": (
        BASE,
        (service("ns1/svc1", "172.30.0.41", NP), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", NP, lb=["1.2.3.4"]), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", port(80, node_port=30081), lb=["1.2.3.4"]), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", port(81, node_port=30081), lb=["1.2.3.4"]), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", port(81, node_port=30081), lb=["1.2.3.4"]),),
        (service("ns1/svc1", "172.30.0.41", port(81)), BASE[1]),
    ),
    "should-be-able-to-change-the-type-and-ports-of-a-udp-service": (
        (
            service("ns1/svc1", "172.30.0.41", port(53, "", UDP)),
            endpoint_slice("10.0.1.1", ports=[slice_port(53, "", UDP)]),
        ),
        (service("ns1/svc1", "172.30.0.41", port(53, "", UDP, 30053), lb=["1.2.3.4"]),),
        (service("ns1/svc1", "172.30.0.41", port(54, "", UDP)),),
    ),
    "esipp-should-handle-updates-to-externaltrafficpolicy-field": (
        (service("ns1/svc1", "172.30.0.41", NP, lb=["1.2.3.4"], external_policy=LOCAL), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", NP, lb=["1.2.3.4"]), BASE[1]),
        (service("ns1/svc1", "172.30.0.41", NP, lb=["1.2.3.4"], external_policy=LOCAL), BASE[1]),
    ),
    "should-only-allow-access-from-source-ranges-updated-live": (
        (service(lb=["1.2.3.4"], ranges=["203.0.113.0/24"]), BASE[1]),
        (service(lb=["1.2.3.4"], ranges=["10.0.0.0/8"]), BASE[1]),
        (service(lb=["1.2.3.4"]), BASE[1]),
    ),
    "endpoints-come-and-go": (
        BASE[:1],
        (BASE[0], endpoint_slice(unready("10.0.1.1"), name="s")),
        (BASE[0], endpoint_slice("10.0.1.1", name="s")),
        (BASE[0], endpoint_slice("10.0.1.1", leaving("10.0.2.1"), name="s")),
        (BASE[0], endpoint_slice(leaving("10.0.1.1"), name="s")),
        (BASE[0], endpoint_slice(name="s")),
    ),
    "a-slice-moves-to-another-service": (
        (*BASE, service("ns1/svc2", "172.30.0.42")),
        (BASE[0], service("ns1/svc2", "172.30.0.42"), endpoint_slice("10.0.1.1", "10.0.2.1", of="ns1/svc2")),
    ),
    "an-annotation-is-broken-and-mended": (
        (ANNOTATED, BASE[1]),
        (service(annotations=[("algorithm", "magic")]), BASE[1]),
        (ANNOTATED, BASE[1]),
    ),
    "sctp-comes-beside-tcp": (
        BASE,
        (
            service("ns1/svc1", "172.30.0.41", port(80), port(80, "s", SCTP)),
            endpoint_slice("10.0.1.1", ports=[slice_port(80), slice_port(80, "s", SCTP)]),
        ),
    ),
}


def touched(before: Snapshot, after: Snapshot) -> frozenset[ServiceName]:
    names = {*before.services, *after.services, *before.slices, *after.slices}
    return frozenset(
        name
        for name in names
        if (before.services.get(name), before.slices.get(name)) != (after.services.get(name), after.slices.get(name))
    )


def check_step(older: RouteTable, newer: RouteTable, wanted: RouteTable) -> None:
    """`newer` is the table wanted, and names exactly the rows in which it differs from `older`."""
    assert newer == wanted
    assert newer.problems == wanted.problems
    rows = {*older, *newer}
    assert newer.changed_from(older) == {key for key in rows if older.get(key) != newer.get(key)}


@pytest.mark.parametrize("family", Family, ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "anything-may-have-changed"])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_history(history: tuple[tuple[Service | EndpointSlice, ...], ...], named: bool, family: Family) -> None:
    router, chosen = Router(), in_family(options(), family)
    before, table = snapshot(), RouteTable()
    for objects in history:
        after = in_family(snapshot(*objects), family)
        newer = router.update(after, touched(before, after) if named else None, chosen)
        check_step(table, newer, routes(after, chosen))
        before, table = after, newer


FACES: tuple[Service | EndpointSlice, ...] = (
    service("ns1/plain", "172.30.0.1"),
    service("ns1/np", "172.30.0.2", NP, external_policy=LOCAL),
    service("ns1/lb", "172.30.0.3", lb=["1.2.3.4"], ranges=["192.168.0.0/24"]),
    service("ns1/hint", "172.30.0.4"),
    *(endpoint_slice("10.0.1.1", "10.0.2.1", of=f"ns1/{name}") for name in ("plain", "np", "lb")),
    endpoint_slice(ready("10.0.1.1", zones=["zone-a"]), ready("10.0.2.1", zones=["zone-b"]), of="ns1/hint"),
)

NODES_AND_OPTIONS: dict[str, tuple[Node, ProxyOptions, int]] = {
    "another-address": (TWO_NODE_ADDRESSES, options(), 1),
    "another-loopback-address": (node(addresses=["127.0.0.1", "127.0.0.2", "192.168.0.2"]), options(), 0),
    "another-primary": (node(primary=["10.0.1.254"]), options(), 1),
    "another-zone": (node(zone="zone-b"), options(), 1),
    "another-name": (node(name="node2"), options(), 4),
    "no-detector": (node(), options(cluster_cidrs=()), 4),
    "another-cluster-cidr": (node(), options(cluster_cidrs=["10.0.0.0/16"]), 0),
    "node-cidr": (node(), options(detect_local=DetectLocal.NODE_CIDR), 0),
    "bridge": (node(), options(detect_local=DetectLocal.BRIDGE_INTERFACE, bridge_interface="cni0"), 4),
    "masquerade-all": (node(), options(masquerade_all=True), 4),
    "nodeport-addresses": (node(), options(nodeport_addresses=["192.168.0.0/24"]), 1),
    "no-localhost": (node(), options(localhost_nodeports=False), 1),
    "another-algorithm": (node(), options(default_algorithm="maglev"), 4),
}


@pytest.mark.parametrize(("this", "chosen", "recomputed"), NODES_AND_OPTIONS.values(), ids=NODES_AND_OPTIONS)
def test_node_and_options_recompute_what_they_concern(this: Node, chosen: ProxyOptions, recomputed: int) -> None:
    router = Router()
    first = router.update(snapshot(*FACES), None, options())
    second = router.update(snapshot(*FACES, node=this), frozenset(), chosen)
    assert router.recomputed == recomputed
    check_step(first, second, routes(snapshot(*FACES, node=this), chosen))
    assert second != first
    third = router.update(snapshot(*FACES), frozenset(), options())
    check_step(second, third, first)


def test_another_dataplane_leaves_the_rows_and_remarks_on_what_it_does_not_have() -> None:
    router = Router()
    asking = service("ns1/asking", annotations=[("algorithm", "round-robin")])
    first = router.update(snapshot(asking), None, options())
    second = router.update(snapshot(asking), frozenset(), options(algorithms=["random"]))
    assert second == first and not first.problems
    assert [problem.code for problem in second.problems[name_of("ns1/asking")]] == ["AlgorithmNotSupported"]


def test_another_dataplane_remarks_on_direct_return() -> None:
    """To whom it concerns: only Services with annotations are looked at again."""
    router = Router()
    asking = service("ns1/asking", annotations=[("forwarding", "dsr")])
    other = service("ns1/other", "172.30.0.42")
    first = router.update(snapshot(asking, other), None, options())
    second = router.update(snapshot(asking, other), frozenset(), options(direct_return=False))
    assert second == first and not first.problems
    assert router.recomputed == 1
    assert [problem.code for problem in second.problems[name_of("ns1/asking")]] == ["ForwardingNotSupported"]
    third = router.update(
        snapshot(service("ns1/asking"), other), frozenset([name_of("ns1/asking")]), options(direct_return=False)
    )
    assert not third.problems


def test_touched_names_of_nothing() -> None:
    router = Router()
    assert router.update(snapshot(), frozenset([name_of("ns1/nobody")]), options()) == routes(snapshot(), options())
    assert router.recomputed == 0
