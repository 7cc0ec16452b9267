"""Random clusters, and random histories of one, for properties of whatever is made of them.

Rules of this file: strategies only. The worlds are small on purpose (few Services, addresses, ports and nodes), so that
claims collide, slices overlap and endpoints repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import strategies as st

from ebpflb.model import (
    DetectLocal,
    Endpoint,
    EndpointSlice,
    Family,
    Node,
    ProxyOptions,
    Service,
    ServiceName,
    ServicePort,
    ServiceType,
    SlicePort,
    Snapshot,
    TrafficPolicy,
)
from tests.world import SCTP, TCP, UDP, snapshot, v6

NAMES = [ServiceName("ns1", name) for name in ("a", "b", "c")]
PROTOCOLS = (TCP, UDP, SCTP)
PORT_NAMES = ("", "p")


def some(values: Sequence[str], most: int) -> st.SearchStrategy[tuple[str, ...]]:
    """A few of `values` and of their IPv6 counterparts, in any order."""
    both = [*values, *map(v6, values)]
    return st.lists(st.sampled_from(both), max_size=most, unique=True).map(tuple)


def hints(values: Sequence[str]) -> st.SearchStrategy[frozenset[str]]:
    return st.frozensets(st.sampled_from(values), max_size=2)


service_ports = st.lists(
    st.builds(
        ServicePort,
        st.sampled_from(PORT_NAMES),
        st.sampled_from(PROTOCOLS),
        st.sampled_from([80, 30080]),
        st.sampled_from([0, 30080]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda port: (port.name, port.protocol),
).map(tuple)

slice_ports = st.lists(
    st.builds(SlicePort, st.sampled_from(PORT_NAMES), st.sampled_from(PROTOCOLS), st.sampled_from([80, 8080])),
    min_size=1,
    max_size=4,
    unique_by=lambda port: (port.name, port.protocol),
).map(tuple)


def services(name: ServiceName) -> st.SearchStrategy[Service]:
    return st.builds(
        Service,
        st.just(name),
        st.sampled_from(ServiceType),
        some(["172.30.0.1", "172.30.0.2"], 2),
        service_ports,
        external_ips=some(["192.168.99.1", "192.168.0.2", "172.30.0.1"], 2),
        load_balancer_ips=some(["1.2.3.4", "192.168.99.1"], 2),
        internal_policy=st.sampled_from(TrafficPolicy),
        external_policy=st.sampled_from(TrafficPolicy),
        affinity_seconds=st.sampled_from([0, 60]),
        source_ranges=st.one_of(st.just(()), some(["203.0.113.0/24", "192.168.0.0/24", "0.0.0.0/0"], 2)),
        created=st.sampled_from(["", "2024-01-01T00:00:00Z", "2024-06-01T00:00:00Z"]),
        annotations=st.sampled_from([(), (("algorithm", "maglev"),), (("algorithm", "magic"),)]),
    )


def endpoints(family: Family) -> st.SearchStrategy[Endpoint]:
    values = [f"10.0.1.{last}" for last in range(1, 7)]
    return st.builds(
        Endpoint,
        st.sampled_from(values if family is Family.IPV4 else [v6(value) for value in values]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["node1", "node2", ""]),
        st.one_of(st.just(frozenset[str]()), hints(["zone-a", "zone-b"])),
        st.one_of(st.just(frozenset[str]()), hints(["node1", "node2"])),
    )


@st.composite
def slices(draw: st.DrawFn, owner: ServiceName, number: int) -> EndpointSlice:
    family = draw(st.sampled_from(Family))
    items = tuple(draw(st.lists(endpoints(family), max_size=4)))
    return EndpointSlice(
        ServiceName(owner.namespace, f"{owner.name}-{number}"), owner, family, draw(slice_ports), items
    )


objects = st.one_of(
    *(services(name) for name in NAMES), *(slices(name, number) for name in NAMES for number in range(2))
)

nodes = st.builds(
    Node,
    st.sampled_from(["node1", "node2"]),
    some(["127.0.0.1", "192.168.0.2", "10.0.1.254"], 4),
    some(["192.168.0.2"], 2),
    st.sampled_from(["", "zone-a", "zone-b"]),
    some(["10.0.1.0/24"], 2),
)

choices = st.builds(
    ProxyOptions,
    masquerade_all=st.booleans(),
    detect_local=st.sampled_from(DetectLocal),
    cluster_cidrs=some(["10.0.0.0/8"], 2),
    bridge_interface=st.sampled_from(["", "cni0"]),
    interface_name_prefix=st.just("veth"),
    nodeport_addresses=some(["192.168.0.0/24"], 1),
    nodeport_primary=st.booleans(),
    localhost_nodeports=st.booleans(),
)

choices_for_rules = st.builds(
    ProxyOptions,
    masquerade_all=st.booleans(),
    detect_local=st.sampled_from(DetectLocal),
    cluster_cidrs=st.one_of(some(["10.0.0.0/8", "172.30.0.0/16"], 3), st.just(("0.0.0.0/0", "::/0"))),
    bridge_interface=st.sampled_from(["", "cni0"]),
    interface_name_prefix=st.sampled_from(["veth", "fifteen-letters"]),
    nodeport_addresses=some(["192.168.0.0/24"], 1),
    nodeport_primary=st.booleans(),
    localhost_nodeports=st.booleans(),
    default_algorithm=st.sampled_from(["random", "round-robin"]),
)
"""As `choices`, with all that decides rules."""

things = st.lists(objects, max_size=12)


def world(said: Iterable[Service | EndpointSlice], node: Node) -> Snapshot:
    """The snapshot after all that was said in turn: the last word on each object holds."""
    last = {(type(each), each.name): each for each in said}
    return snapshot(*last.values(), node=node)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), objects),
        st.tuples(st.just("drop"), st.integers(0, 20)),
        st.tuples(st.just("node"), nodes),
        st.tuples(st.just("options"), choices),
        st.tuples(st.just("resync"), st.none()),
    ),
    min_size=1,
    max_size=15,
)


def owner(each: Service | EndpointSlice) -> ServiceName:
    """The Service whose routes an object shapes."""
    return each.service if isinstance(each, EndpointSlice) else each.name
