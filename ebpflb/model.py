"""What Kubernetes said: the immutable objects that `source` parses and `policy` reads.

Rules of this file: data only, no I/O, imports nothing of ours. Defaults of the API server have been applied by
`source.parse` already, so that no field here needs a second guess. Addresses are canonical text (RFC 5952 for IPv6,
dotted decimal without leading zeros for IPv4; an IPv4-mapped IPv6 address is written as IPv4), because text is what
the other end of every interface wants and it hashes fast.

Structs are msgspec's rather than dataclasses: they are as frozen and slotted, and ten times cheaper to build, which
is what a cold start with 100,000 endpoints consists of. `gc=False` is sound because none can be part of a cycle.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import msgspec

Address: TypeAlias = str


class Protocol(enum.IntEnum):
    """Transport protocol, by its IP protocol number; `name` is Kubernetes' spelling."""

    TCP = 6
    UDP = 17
    SCTP = 132

    # Enum hashes its name in Python code; frontends are hashed by the hundred thousand.
    __hash__ = int.__hash__


class Family(enum.IntEnum):
    """IP family, by its version number."""

    IPV4 = 4
    IPV6 = 6

    __hash__ = int.__hash__


def family_of(address_or_cidr: str) -> Family:
    """The family of a canonical address or CIDR."""
    return Family.IPV6 if ":" in address_or_cidr else Family.IPV4


class ServiceName(NamedTuple):
    """`namespace/name` of a Service (or of a slice's owner)."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class TrafficPolicy(enum.Enum):
    """internalTrafficPolicy and externalTrafficPolicy."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class ServiceType(enum.Enum):
    """spec.type, without ExternalName: such a Service has no row anywhere and is parsed to nothing."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """One entry of spec.ports. `name` is "" if unnamed; `node_port` is 0 if none is allocated."""

    name: str
    protocol: Protocol
    port: int
    node_port: int = 0


class Service(msgspec.Struct, frozen=True, gc=False):
    """A Service that a proxy serves (headless, ExternalName and foreign-proxy ones never get here).

    `cluster_ips`, `external_ips`, `load_balancer_ips` hold addresses of either family; `load_balancer_ips` only
    those whose ipMode is VIP (KEP-1860). `created` is metadata.creationTimestamp in RFC 3339 text ("" if unknown,
    which counts as youngest): the older Service wins a conflict. `affinity_seconds` is 0 for sessionAffinity None.
    `source_ranges` are canonical CIDRs with host bits masked. `health_check_node_port` is 0 unless allocated.
    `annotations` holds only the `ebpflb/…` ones, sorted, without the prefix.
    """

    name: ServiceName
    type: ServiceType
    cluster_ips: tuple[Address, ...]
    ports: tuple[ServicePort, ...]
    external_ips: tuple[Address, ...] = ()
    load_balancer_ips: tuple[Address, ...] = ()
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    affinity_seconds: int = 0
    source_ranges: tuple[str, ...] = ()
    health_check_node_port: int = 0
    created: str = ""
    annotations: tuple[tuple[str, str], ...] = ()


class SlicePort(msgspec.Struct, frozen=True, gc=False):
    """One usable entry of an EndpointSlice's ports (nil or zero ports were skipped while parsing)."""

    name: str
    protocol: Protocol
    port: int


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One entry of an EndpointSlice's endpoints; conditions with their nil rules applied (semantics: nil ready and
    nil serving are true, nil terminating is false). `node` is "" if unknown. Hints are names of zones and nodes."""

    address: Address
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    zone_hints: frozenset[str] = frozenset()
    node_hints: frozenset[str] = frozenset()


class EndpointSlice(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice of one Service in one family (FQDN slices are parsed to nothing)."""

    name: ServiceName
    service: ServiceName
    family: Family
    ports: tuple[SlicePort, ...]
    endpoints: tuple[Endpoint, ...]


class Node(msgspec.Struct, frozen=True, gc=False):
    """This node, as its Node object and its kernel say.

    `addresses`: every address that the kernel calls local, loopback included, sorted. `primary`: the node's main
    address per family, in the order of the Node object (InternalIP first), else from the kernel's default route.
    `zone` is the label topology.kubernetes.io/zone ("" if unlabelled). `pod_cidrs`: spec.podCIDRs.
    `known`: whether a Node object has been seen; `deleting`: it has a deletionTimestamp or the taint
    ToBeDeletedByClusterAutoscaler (KEP-3836).
    """

    name: str
    addresses: tuple[Address, ...] = ()
    primary: tuple[Address, ...] = ()
    zone: str = ""
    pod_cidrs: tuple[str, ...] = ()
    known: bool = False
    deleting: bool = False


class Problem(NamedTuple):
    """Something that an operator should know and the daemon survived: `subject` names the object ("default/web",
    "web.yaml document 2"), `reason` is one sentence, `code` its kind in one CamelCase word for machines ("" for
    none), as the `reason` of a Kubernetes Event has it."""

    subject: str
    reason: str
    code: str = ""


class Snapshot(msgspec.Struct, frozen=True):
    """All that the sources said at one moment. Both mappings are persistent maps (immutables.Map): taking the next
    Snapshot costs the change, not the table. `slices` is keyed by the owning Service, which need not exist (yet);
    each tuple is sorted by slice name."""

    services: Mapping[ServiceName, Service]
    slices: Mapping[ServiceName, tuple[EndpointSlice, ...]]
    node: Node


class DetectLocal(enum.Enum):
    """kube-proxy's detectLocalMode: what tells that a packet comes from a pod of this node."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class ProxyOptions(msgspec.Struct, frozen=True, gc=False):
    """The operator's options that shape routes (kube-proxy's names and defaults).

    `nodeport_addresses`: CIDRs; empty means every local address; `nodeport_primary` means the primary ones only.
    `localhost_nodeports`: whether IPv4 loopback addresses carry NodePorts too. `default_algorithm`: the label of how a
    backend is chosen where a Service does not say; `algorithms`: of those that can be had here, () for all.
    `direct_return`: whether replies can be had to go around this node (`ebpflb/forwarding: dsr`).
    """

    masquerade_all: bool = False
    detect_local: DetectLocal = DetectLocal.CLUSTER_CIDR
    cluster_cidrs: tuple[str, ...] = ()
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    nodeport_addresses: tuple[str, ...] = ()
    nodeport_primary: bool = False
    localhost_nodeports: bool = True
    default_algorithm: str = "random"
    algorithms: tuple[str, ...] = ()
    direct_return: bool = True
