"""Random clusters as this node sees them, and the packets that are worth a question.

Rules of this file: addresses follow `tests.world` and tell their roles. Services are few and collide now and then: two
claim one address, an external IP is the node's own or another Service's cluster IP. A packet of the grid is one that
could exist: nobody but the node comes from its addresses, and only what comes from its loopback goes there (all else
is dropped by a rule of the kubelet's, that of martians).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from hypothesis import strategies as st

from ebpflb.decide import Packet
from ebpflb.model import (
    Address,
    DetectLocal,
    Endpoint,
    EndpointSlice,
    Family,
    Node,
    Protocol,
    ProxyOptions,
    Service,
    ServiceName,
    ServicePort,
    ServiceType,
    SlicePort,
    Snapshot,
    TrafficPolicy,
)
from ebpflb.routes import Kind, RouteTable, in_cidr
from tests.world import NODE_IP, OTHER_NODE_IP, OUTSIDE, POD, REMOTE_POD, options, snapshot, v6

T = TypeVar("T")

BRIDGE_IP = "10.0.1.254"
"""The node's own address among its pods'."""

SECOND_IP = "192.168.1.2"

NEVER_HEARD_OF = "198.51.100.7"

_LOOPBACK = ("127.0.0.1", "::1")
_PROTOCOLS = tuple(Protocol)
_EXTERNALS = ("192.168.99.1", "192.168.99.2", NODE_IP, "172.30.0.43")
_BALANCERS = ("1.2.3.4", "5.6.7.8", "192.168.99.1", NODE_IP)
_RANGES = ("203.0.113.0/24", "192.168.0.0/24", "10.0.0.0/8", "0.0.0.0/0")
_HOMES = {
    "10.0.1.1": "node1", "10.0.1.2": "node1", "10.0.2.1": "node2", "10.0.2.2": "node2",
    NODE_IP: "node1", OTHER_NODE_IP: "node2",
}  # fmt: skip


class World(NamedTuple):
    """What was said, and the operator's options."""

    snapshot: Snapshot
    options: ProxyOptions


def some(chance: Random, values: Sequence[T], most: int, least: int = 0) -> tuple[T, ...]:
    """A few of `values`, in any order."""
    return tuple(chance.sample(values, chance.randint(least, most)))


def in_families(chance: Random, families: Sequence[Family], addresses: Iterable[str]) -> tuple[str, ...]:
    """Each address as it is, or as its IPv6 counterpart."""
    return tuple(v6(each) if chance.choice(families) is Family.IPV6 else each for each in addresses)


def random_service(chance: Random, name: str, ip: str) -> Service:
    """One of any type, or several at once."""
    families = chance.choice(((Family.IPV4,), (Family.IPV6,), tuple(Family), tuple(Family)))
    ports = tuple(
        ServicePort(chance.choice(("", "p")) if at == 0 else "q", protocol, 80, chance.choice((0, 30080, 30081)))
        for at, protocol in enumerate(some(chance, _PROTOCOLS, 2, 1))
    )
    local = (TrafficPolicy.CLUSTER, TrafficPolicy.LOCAL)
    return Service(
        ServiceName("ns1", name),
        ServiceType.LOAD_BALANCER,
        tuple(v6(ip) if family is Family.IPV6 else ip for family in families),
        ports,
        external_ips=in_families(chance, families, some(chance, _EXTERNALS, 2)),
        load_balancer_ips=in_families(chance, families, some(chance, _BALANCERS, 2)),
        internal_policy=chance.choice(local),
        external_policy=chance.choice(local),
        affinity_seconds=chance.choice((0, 0, 60)),
        source_ranges=in_families(chance, families, some(chance, _RANGES, 2, 1)) if chance.random() < 0.4 else (),
        health_check_node_port=chance.choice((0, 0, 30090)),
        created=chance.choice(("", "2024-01-01T00:00:00Z", "2024-06-01T00:00:00Z")),
    )


def random_endpoint(chance: Random, address: Address, family: Family, most_ready: bool) -> Endpoint:
    """On the node that its address says; with a hint for a zone at times."""
    states = ((True, True, False), (False, True, True), (False, False, True), (False, False, False))
    ready, serving, terminating = states[0] if most_ready and chance.random() < 0.8 else chance.choice(states)
    zones = chance.choice(((), (), ("zone-a",), ("zone-b",)))
    written = v6(address) if family is Family.IPV6 else address
    return Endpoint(written, ready, serving, terminating, _HOMES[address], frozenset(zones))


def random_slice(chance: Random, owner: Service, family: Family) -> EndpointSlice:
    """All endpoints of a Service in one family: mostly several, at times none."""
    most_ready = chance.random() < 0.7
    chosen = some(chance, tuple(_HOMES), 4, chance.choice((0, 1, 2, 2)))
    ports = tuple(
        SlicePort(port.name, port.protocol, chance.choice((80, 8080))) for port in owner.ports if chance.random() < 0.9
    )
    return EndpointSlice(
        ServiceName("ns1", f"{owner.name.name}-{family.name.lower()}"),
        owner.name,
        family,
        ports,
        tuple(random_endpoint(chance, each, family, most_ready) for each in chosen),
    )


def random_node(chance: Random) -> Node:
    """This one, with more addresses at times."""
    more = in_families(chance, tuple(Family), some(chance, (SECOND_IP, BRIDGE_IP), 2))
    cidrs = chance.choice((("10.0.1.0/24",), ("10.0.1.0/24", v6("10.0.1.0/24")), (v6("10.0.1.0/24"),), ()))
    addresses = ("127.0.0.1", "::1", NODE_IP, v6(NODE_IP), *more)
    return Node("node1", addresses, (NODE_IP, v6(NODE_IP)), "zone-a", cidrs, known=True)


def random_options(chance: Random) -> ProxyOptions:
    """Whatever shapes routes."""
    cidrs = (("10.0.0.0/8",), ("10.0.0.0/8", v6("10.0.0.0/8")), (v6("10.0.0.0/8"),), ())
    node_ports = ((), (), ("192.168.0.0/24",), ("127.0.0.0/8", "192.168.1.0/24"), (v6("192.168.0.0/24"),))
    return options(
        cluster_cidrs=chance.choice(cidrs),
        masquerade_all=chance.random() < 0.25,
        detect_local=chance.choice(tuple(DetectLocal)),
        bridge_interface=chance.choice(("cni0", "cni0", "")),
        interface_name_prefix=chance.choice(("veth", "v")),
        nodeport_addresses=chance.choice(node_ports),
        nodeport_primary=chance.random() < 0.25,
        localhost_nodeports=chance.random() < 0.7,
    )


def random_world(chance: Random) -> World:
    """One to three Services with their slices."""
    said: list[Service | EndpointSlice] = []
    for at in range(1, chance.randint(1, 3) + 1):
        made = random_service(chance, f"svc{at}", f"172.30.0.4{at}")
        said += [made, *(random_slice(chance, made, family) for family in Family)]
    return World(snapshot(*said, node=random_node(chance)), random_options(chance))


worlds = st.builds(random_world, st.randoms(use_true_random=False))
"""The same for Hypothesis, which finds the least world that shows a failure."""


# ---- Packets ----


class Client(NamedTuple):
    """Who sends: `interface` is the one that its packets enter by, "" for the node itself."""

    kind: str
    source: Address
    interface: str


def clients(routes: RouteTable, family: Family) -> Iterator[Client]:
    """One of each kind; and whoever is a backend, since it may be sent to itself."""

    def at(address: Address) -> Address:
        return v6(address) if family is Family.IPV6 else address

    local = routes.locality.node_addresses
    for address in (NODE_IP, OTHER_NODE_IP, "127.0.0.1", BRIDGE_IP, SECOND_IP):
        if at(address) in local:
            yield Client("node", at(address), "")
        elif address in (NODE_IP, OTHER_NODE_IP):
            yield Client("host of another node", at(address), "eth0")
    yield Client("pod on the bridge", at(POD), "cni0")
    yield Client("pod by its own device", at(POD), "veth1")
    yield Client("pod of another node", at(REMOTE_POD), "eth0")
    yield Client("outside", at(OUTSIDE), "eth0")
    yield Client("outside, in no range", at(NEVER_HEARD_OF), "eth0")
    backends = {each.address for route in routes.values() for each in route.backends}
    for address in sorted(backends - {*local, at(NODE_IP), at(OTHER_NODE_IP)}):
        if (":" in address) == (family is Family.IPV6):
            yield Client("backend", address, "cni0" if in_cidr(address, at("10.0.1.0/24")) else "eth0")


def destinations(routes: RouteTable, family: Family) -> set[tuple[Address, int, Protocol]]:
    """Every frontend; and beside each what is none: another port, another protocol, an address of no Service."""
    version6 = family is Family.IPV6
    frontends = {frontend for frontend, _ in routes if (":" in frontend.address) == version6}
    found = {(each.address, each.port, each.protocol) for each in frontends}
    found |= {(each.address, 81, each.protocol) for each in frontends}
    found |= {(each.address, each.port, Protocol.UDP) for each in frontends if each.protocol is Protocol.TCP}
    addresses = {*routes.locality.node_addresses, *sorted(routes.owned)[:2]}
    addresses |= {v6(OTHER_NODE_IP), v6("172.30.0.99")} if version6 else {OTHER_NODE_IP, "172.30.0.99"}
    opened = {(each.port, each.protocol) for (each, _), route in routes.items() if route.kind is Kind.NODE_PORT}
    opened.add((30080, Protocol.TCP))
    return found | {(each, *port) for each in addresses if (":" in each) == version6 for port in opened}


def packets(routes: RouteTable) -> Iterator[tuple[Client, Packet]]:
    """The grid: client x destination."""
    local = routes.locality.node_addresses
    for family in Family:
        where = sorted(destinations(routes, family))
        for client in clients(routes, family):
            for address, port, protocol in where:
                if address in _LOOPBACK and client.source not in _LOOPBACK:
                    continue
                if client.source in _LOOPBACK and address not in local:
                    continue
                yield client, Packet(client.source, address, port, protocol, client.interface)
