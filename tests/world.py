"""Tiny builders of what Kubernetes said, with an address convention: an address tells its role.

    pods           10.0.0.0/8         10.0.N.0/24 on node N
    cluster IPs    172.30.0.0/16      nodes  192.168.0.0/24   node N is .N+1, so that this one, node1, is .2
    external IPs   192.168.99.0/24    load balancer IPs  1.2.3.4, 5.6.7.8, 9.10.11.12
    outside        203.0.113.0/24

Everything is written in IPv4; `v6` maps an address or CIDR to its IPv6 counterpart digit by digit (10.0.1.2 is
fd00:10:0:1::2), and `in_family` maps whole objects, so that one row of a table runs in both families.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv6Network, ip_address
from typing import Any, TypeVar

import immutables
import msgspec

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
    family_of,
)

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
LOCAL, CLUSTER = TrafficPolicy.LOCAL, TrafficPolicy.CLUSTER

NODE_IP = "192.168.0.2"
OTHER_NODE_IP = "192.168.0.3"
POD = "10.0.1.9"  # a client on this node
REMOTE_POD = "10.0.2.9"  # a client on node2
OUTSIDE = "203.0.113.5"

_T = TypeVar("_T")


def name_of(text: str) -> ServiceName:
    """`namespace/name` as a ServiceName."""
    namespace, _, name = text.partition("/")
    return ServiceName(namespace, name)


def port(number: int = 80, name: str = "", protocol: Protocol = TCP, node_port: int = 0) -> ServicePort:
    """An entry of a Service's ports."""
    return ServicePort(name, protocol, number, node_port)


def service(
    name: str = "ns1/svc1",
    ip: str | Sequence[str] = "172.30.0.41",
    *ports: ServicePort,
    type: ServiceType | None = None,
    external: Sequence[str] = (),
    lb: Sequence[str] = (),
    internal_policy: TrafficPolicy = CLUSTER,
    external_policy: TrafficPolicy = CLUSTER,
    affinity: int = 0,
    ranges: Sequence[str] = (),
    health_port: int = 0,
    created: str = "",
    annotations: Sequence[tuple[str, str]] = (),
) -> Service:
    """A Service on port 80/TCP, or on `ports`; its type follows from what it has."""
    ports = ports or (port(),)
    if type is None:
        type = ServiceType.NODE_PORT if any(each.node_port for each in ports) else ServiceType.CLUSTER_IP
        type = ServiceType.LOAD_BALANCER if lb else type
    return Service(
        name=name_of(name),
        type=type,
        cluster_ips=(ip,) if isinstance(ip, str) else tuple(ip),
        ports=ports,
        external_ips=tuple(external),
        load_balancer_ips=tuple(lb),
        internal_policy=internal_policy,
        external_policy=external_policy,
        affinity_seconds=affinity,
        source_ranges=tuple(ranges),
        health_check_node_port=health_port,
        created=created,
        annotations=tuple(annotations),
    )


def node_of(address: Address) -> str:
    """The node that an endpoint's IPv4 address says it is on."""
    octets = address.split(".")
    return f"node{octets[2]}" if octets[0] == "10" else f"node{int(octets[3]) - 1}"


def ready(address: Address, *, zones: Iterable[str] = (), nodes: Iterable[str] = ()) -> Endpoint:
    """An endpoint that serves."""
    return Endpoint(address, node=node_of(address), zone_hints=frozenset(zones), node_hints=frozenset(nodes))


def unready(address: Address) -> Endpoint:
    """An endpoint whose probe fails."""
    return Endpoint(address, False, False, False, node_of(address))


def leaving(address: Address) -> Endpoint:
    """An endpoint that terminates and still serves."""
    return Endpoint(address, False, True, True, node_of(address))


def dying(address: Address) -> Endpoint:
    """An endpoint that terminates and serves no more."""
    return Endpoint(address, False, False, True, node_of(address))


def slice_port(number: int = 80, name: str = "", protocol: Protocol = TCP) -> SlicePort:
    """An entry of a slice's ports."""
    return SlicePort(name, protocol, number)


def endpoint_slice(
    *endpoints: Endpoint | Address,
    of: str = "ns1/svc1",
    ports: Sequence[SlicePort] = (SlicePort("", TCP, 80),),
    name: str = "",
    family: Family | None = None,
) -> EndpointSlice:
    """A slice of the Service `of`; a bare address is a ready endpoint. Named after the Service and its content."""
    items = tuple(ready(each) if isinstance(each, str) else each for each in endpoints)
    owner = name_of(of)
    own = name or "-".join([owner.name, *(str(each.port) for each in ports), *(each.address for each in items)])
    found = family or (family_of(items[0].address) if items else Family.IPV4)
    return EndpointSlice(ServiceName(owner.namespace, own), owner, found, tuple(ports), items)


def node(
    name: str = "node1",
    addresses: Sequence[Address] = ("127.0.0.1", NODE_IP),
    primary: Sequence[Address] = (NODE_IP,),
    zone: str = "zone-a",
    pod_cidrs: Sequence[str] = ("10.0.1.0/24",),
) -> Node:
    """This node: node1 in zone-a."""
    return Node(name, tuple(addresses), tuple(primary), zone, tuple(pod_cidrs), known=True)


def options(
    *,
    cluster_cidrs: Sequence[str] = ("10.0.0.0/8",),
    masquerade_all: bool = False,
    detect_local: DetectLocal = DetectLocal.CLUSTER_CIDR,
    bridge_interface: str = "",
    interface_name_prefix: str = "",
    nodeport_addresses: Sequence[str] = (),
    nodeport_primary: bool = False,
    localhost_nodeports: bool = True,
    default_algorithm: str = "random",
    algorithms: Sequence[str] = (),
    direct_return: bool = True,
) -> ProxyOptions:
    """The operator's options; unlike the product's default, a cluster CIDR is given."""
    return ProxyOptions(
        masquerade_all=masquerade_all,
        detect_local=detect_local,
        cluster_cidrs=tuple(cluster_cidrs),
        bridge_interface=bridge_interface,
        interface_name_prefix=interface_name_prefix,
        nodeport_addresses=tuple(nodeport_addresses),
        nodeport_primary=nodeport_primary,
        localhost_nodeports=localhost_nodeports,
        default_algorithm=default_algorithm,
        algorithms=tuple(algorithms),
        direct_return=direct_return,
    )


def snapshot(*objects: Service | EndpointSlice, node: Node | None = None) -> Snapshot:
    """All that was said at one moment; without `node`, the node of the convention."""
    services = {each.name: each for each in objects if isinstance(each, Service)}
    slices: dict[ServiceName, tuple[EndpointSlice, ...]] = {}
    for each in sorted((each for each in objects if isinstance(each, EndpointSlice)), key=lambda each: each.name):
        slices[each.service] = (*slices.get(each.service, ()), each)
    return Snapshot(immutables.Map(services), immutables.Map(slices), node or _NODE)


def v6(text: str) -> str:
    """The IPv6 counterpart of an IPv4 address, or of a CIDR of whole bytes."""
    address, slash, bits = text.partition("/")
    if address == "127.0.0.1":
        return "::1" + slash + (slash and "128")
    a, b, c, d = address.split(".")
    if not slash:
        return str(ip_address(f"fd00:{a}:{b}:{c}::{d}"))
    length = {"0": 0, "8": 32, "16": 48, "24": 64, "32": 128}[bits]
    return str(IPv6Network((f"fd00:{a}:{b}:{c}::{d}" if length else "::", length)))


def in_family(value: _T, family: Family) -> _T:
    """`value`, or its IPv6 counterpart: an address, a Service, a slice, a Node, options, a Snapshot, or a tuple."""
    if family is Family.IPV4:
        return value
    mapped: _T = _mapped(value)
    return mapped


def _mapped(value: Any) -> Any:
    if isinstance(value, str):
        return v6(value) if ":" not in value else value
    if isinstance(value, tuple):
        return tuple(map(_mapped, value))
    if isinstance(value, Snapshot):
        return Snapshot(
            immutables.Map({name: _mapped(each) for name, each in value.services.items()}),
            immutables.Map({name: _mapped(each) for name, each in value.slices.items()}),
            _mapped(value.node),
        )
    if isinstance(value, EndpointSlice):
        flipped = {"family": Family.IPV6, "endpoints": _mapped(value.endpoints)}
        return msgspec.structs.replace(value, **flipped) if value.family is Family.IPV4 else value
    fields = _ADDRESS_FIELDS[type(value).__name__]
    return msgspec.structs.replace(value, **{field: _mapped(getattr(value, field)) for field in fields})


_ADDRESS_FIELDS = {
    "Service": ("cluster_ips", "external_ips", "load_balancer_ips", "source_ranges"),
    "Endpoint": ("address",),
    "Node": ("addresses", "primary", "pod_cidrs"),
    "ProxyOptions": ("cluster_cidrs", "nodeport_addresses"),
}
_NODE = node()
