"""The API objects as they arrive: what is read of a Service, an EndpointSlice and a Node, as msgspec Structs.

Rules of this file: shapes only, no defaults of the API server and no judgement. Everything may be absent or null, as
in Go's decoder. A Struct declares the fields that we read, and names in `unread` the others that the API knows; a
decoder made from it skips both those and unknown ones without building them, which is what keeps a watch cheap.
`strict(type)` is its twin for what people write by hand: it refuses a field that the API does not know.

Structs are not tracked by the garbage collector (`gc=False`): no API object can refer to itself.
"""

from __future__ import annotations

import types
import typing
from functools import cache
from typing import Any, ClassVar, TypeVar

import msgspec

_T = TypeVar("_T")

_TYPE_META = ("apiVersion", "kind")

Labels: typing.TypeAlias = dict[str, str | None]


class Meta(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """metadata."""

    unread: ClassVar[tuple[str, ...]] = (
        "generateName", "selfLink", "uid", "generation", "deletionGracePeriodSeconds", "ownerReferences", "finalizers",
        "managedFields",
    )  # fmt: skip

    name: str | None = None
    namespace: str | None = None
    labels: Labels | None = None
    annotations: Labels | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    resource_version: str | None = None


class ServicePort(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """spec.ports[]."""

    unread: ClassVar[tuple[str, ...]] = ("appProtocol",)

    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    target_port: int | str | None = None
    node_port: int | None = None


class ClientIPConfig(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """spec.sessionAffinityConfig.clientIP."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(msgspec.Struct, frozen=True, gc=False):
    """spec.sessionAffinityConfig."""

    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """A Service's spec."""

    unread: ClassVar[tuple[str, ...]] = ("selector", "loadBalancerIP", "publishNotReadyAddresses")

    ports: list[ServicePort] | None = None
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    type: str | None = None
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    load_balancer_source_ranges: list[str] | None = None
    load_balancer_class: str | None = None
    allocate_load_balancer_node_ports: bool | None = None
    external_name: str | None = None
    external_traffic_policy: str | None = None
    internal_traffic_policy: str | None = None
    traffic_distribution: str | None = None
    health_check_node_port: int | None = None
    ip_families: list[str] | None = None
    ip_family_policy: str | None = None


class Ingress(msgspec.Struct, frozen=True, gc=False):
    """status.loadBalancer.ingress[]."""

    unread: ClassVar[tuple[str, ...]] = ("hostname", "ports")

    ip: str | None = None
    ip_mode: str | None = msgspec.field(default=None, name="ipMode")


class LoadBalancerStatus(msgspec.Struct, frozen=True, gc=False):
    """status.loadBalancer."""

    ingress: list[Ingress] | None = None


class ServiceStatus(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """A Service's status."""

    unread: ClassVar[tuple[str, ...]] = ("conditions",)

    load_balancer: LoadBalancerStatus | None = None


class Service(msgspec.Struct, frozen=True, gc=False):
    """v1 Service."""

    unread: ClassVar[tuple[str, ...]] = _TYPE_META

    metadata: Meta | None = None
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class Conditions(msgspec.Struct, frozen=True, gc=False):
    """endpoints[].conditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForName(msgspec.Struct, frozen=True, gc=False):
    """endpoints[].hints.forZones[] and forNodes[]."""

    name: str | None = None


class Hints(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """endpoints[].hints."""

    for_zones: list[ForName] | None = None
    for_nodes: list[ForName] | None = None


class Endpoint(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """endpoints[]."""

    unread: ClassVar[tuple[str, ...]] = ("hostname", "targetRef", "deprecatedTopology", "zone")

    addresses: list[str] | None = None
    conditions: Conditions | None = None
    node_name: str | None = None
    hints: Hints | None = None


class EndpointPort(msgspec.Struct, frozen=True, gc=False):
    """ports[] of a slice."""

    unread: ClassVar[tuple[str, ...]] = ("appProtocol",)

    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSlice(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """discovery.k8s.io/v1 EndpointSlice."""

    unread: ClassVar[tuple[str, ...]] = _TYPE_META

    metadata: Meta | None = None
    address_type: str | None = None
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None


class Taint(msgspec.Struct, frozen=True, gc=False):
    """spec.taints[] of a Node."""

    unread: ClassVar[tuple[str, ...]] = ("value", "effect", "timeAdded")

    key: str | None = None


class NodeSpec(msgspec.Struct, frozen=True, gc=False):
    """A Node's spec."""

    unread: ClassVar[tuple[str, ...]] = ("providerID", "unschedulable", "configSource", "externalID")

    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeAddress(msgspec.Struct, frozen=True, gc=False):
    """status.addresses[] of a Node."""

    type: str | None = None
    address: str | None = None


class NodeStatus(msgspec.Struct, frozen=True, gc=False):
    """A Node's status; the kubelet writes it, and adds fields with every version."""

    open: ClassVar[bool] = True

    addresses: list[NodeAddress] | None = None


class Node(msgspec.Struct, frozen=True, gc=False):
    """v1 Node."""

    unread: ClassVar[tuple[str, ...]] = _TYPE_META

    metadata: Meta | None = None
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class Head(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """What any object says of itself; the rest is left undecoded."""

    api_version: str | None = None
    kind: str | None = None


class RawList(msgspec.Struct, frozen=True, gc=False):
    """Any List, its items left undecoded."""

    metadata: Meta | None = None
    items: list[msgspec.Raw] | None = None


def strict(type_: type[_T]) -> type[_T]:
    """A subclass of a Struct here whose decoders refuse fields that the API does not know, at every depth."""
    twin: type[_T] = _twin(typing.cast(Any, type_))
    return twin


@cache
def _twin(type_: Any) -> Any:
    fields: list[Any] = [
        (field.name, _twin_of_hint(field.type), msgspec.field(default=field.default, name=field.encode_name))
        for field in msgspec.structs.fields(type_)
    ]
    fields += [(name, Any, None) for name in getattr(type_, "unread", ())]
    return msgspec.defstruct(
        type_.__name__,
        fields,
        bases=(type_,),
        module=__name__,
        forbid_unknown_fields=not getattr(type_, "open", False),
        frozen=True,
        gc=False,
    )


def _twin_of_hint(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return _twin(hint)
    origin, arguments = typing.get_origin(hint), tuple(_twin_of_hint(each) for each in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return typing.Union[arguments]  # noqa: UP007  # a union of what is only known when it runs
    return origin[arguments] if origin is list else hint
