"""From API objects to the model: what the API server defaults is defaulted here, and what is not ours is left out.

Rules of this file: pure and lenient. An API server still hands out objects that it would refuse today (host bits in a
CIDR, leading zeros in an address, spaces around a range), so that nothing here refuses; what can mean nothing is left
out. Whether a server would accept an object is `validate`'s question, and only manifests are asked it. Whatever text
leaves here as an address or CIDR is canonical, as `model` promises.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import TypeGuard

from ebpflb.model import (
    Address,
    Endpoint,
    EndpointSlice,
    Family,
    Node,
    Protocol,
    Service,
    ServiceName,
    ServicePort,
    ServiceType,
    SlicePort,
    TrafficPolicy,
    family_of,
)
from ebpflb.source import wire

SERVICE_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
SERVICE_NAME = "kubernetes.io/service-name"
ZONE = "topology.kubernetes.io/zone"
TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"
ANNOTATION_PREFIX = "ebpflb/"

DEFAULT_AFFINITY_SECONDS = 10800

_TYPES = {"": ServiceType.CLUSTER_IP, **{each.value: each for each in ServiceType}}
_POLICIES = {each.value: each for each in TrafficPolicy}
_PROTOCOLS = {"": Protocol.TCP, **{each.name: each for each in Protocol}}
_FAMILIES = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}
_NOTHING: frozenset[str] = frozenset()
_ALL_NIL = wire.Conditions()

# One object for the many equal names that a cluster repeats: a cluster's endpoints name a few thousand nodes.
_one = lru_cache(maxsize=1 << 16)(str)

_SLOPPY_IPV4 = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}){3}", re.ASCII)
_MAPPED = b"\0" * 10 + b"\xff\xff"


# ---- Addresses ----


def address(text: str) -> Address | None:
    """The canonical form, or None if `text` is no address. Leading zeros are read as decimal, as Kubernetes does."""
    try:
        if ":" not in text:
            inet_pton(AF_INET, text)
            return text
        packed = inet_pton(AF_INET6, text)
    except (OSError, ValueError):
        return _sloppy(text)
    return inet_ntop(AF_INET, packed[12:]) if packed.startswith(_MAPPED) else inet_ntop(AF_INET6, packed)


def _sloppy(text: str) -> Address | None:
    """An address with leading zeros in its dotted part: 010.1.2.3 or ::ffff:010.1.2.3."""
    head, colon, tail = text.rpartition(":")
    if not _SLOPPY_IPV4.fullmatch(tail):
        return None
    octets = [int(each) for each in tail.split(".")]
    if max(octets) > 255:
        return None
    dotted = ".".join(map(str, octets))
    if not colon:
        return dotted
    return address(f"{head}:{dotted}") if dotted != tail else None


def cidr(text: str) -> str | None:
    """The canonical form with host bits masked, or None if `text` is no CIDR."""
    host, slash, length = text.partition("/")
    found = address(host)
    if found is None or not slash or not length.isascii() or not length.isdigit() or len(length) > 9:
        return None
    bits, width = int(length), 128 if ":" in host else 32
    if bits > width:
        return None
    if width == 128 and ":" not in found:
        if bits < 96:
            # Masking an IPv4-mapped address below its prefix leaves an IPv6 network.
            return f"{_masked(AF_INET6, _MAPPED + inet_pton(AF_INET, found), bits)}/{bits}"
        bits -= 96
    family = AF_INET6 if ":" in found else AF_INET
    return f"{_masked(family, inet_pton(family, found), bits)}/{bits}"


def _masked(family: int, packed: bytes, bits: int) -> Address:
    host_bits = len(packed) * 8 - bits
    value = int.from_bytes(packed) >> host_bits << host_bits
    return inet_ntop(family, value.to_bytes(len(packed)))


def _addresses(texts: Iterable[str | None] | None) -> tuple[Address, ...]:
    """Canonical, in order, without repetition; what is no address is left out."""
    if not texts:
        return ()
    return tuple(dict.fromkeys([found for text in texts if text and (found := address(text))]))


# ---- Services ----


def service_name(meta: wire.Meta | None) -> ServiceName:
    """Namespace and name; the namespace of a namespaced object without one is `default`."""
    if meta is None:
        return ServiceName("default", "")
    return ServiceName(_one(meta.namespace or "default"), meta.name or "")


def service(obj: wire.Service) -> Service | None:
    """The Service that a proxy serves; None if it is headless, an ExternalName, another proxy's, or has no address."""
    spec, meta = obj.spec, obj.metadata
    if spec is None or meta is None or (meta.labels and SERVICE_PROXY_NAME in meta.labels):
        return None
    kind = _TYPES.get(spec.type or "")
    cluster_ips = _cluster_ips(spec)
    if kind is None or not cluster_ips:
        return None
    ports = tuple(_service_ports(spec.ports or ()))
    external = TrafficPolicy.LOCAL if spec.external_traffic_policy == "Local" else TrafficPolicy.CLUSTER
    wants_health_check = kind is ServiceType.LOAD_BALANCER and external is TrafficPolicy.LOCAL
    return Service(
        name=service_name(meta),
        type=kind,
        cluster_ips=cluster_ips,
        ports=ports,
        external_ips=_addresses(spec.external_ips),
        load_balancer_ips=_load_balancer_ips(obj.status),
        internal_policy=_POLICIES.get(spec.internal_traffic_policy or "", TrafficPolicy.CLUSTER),
        external_policy=external,
        affinity_seconds=_affinity_seconds(spec),
        source_ranges=_source_ranges(spec.load_balancer_source_ranges),
        health_check_node_port=(spec.health_check_node_port or 0) if wants_health_check else 0,
        created=meta.creation_timestamp or "",
        annotations=_annotations(meta.annotations),
    )


def _cluster_ips(spec: wire.ServiceSpec) -> tuple[Address, ...]:
    """At most one of each family; an old object has only the singular field."""
    if not spec.cluster_ip or spec.cluster_ip == "None":
        return ()
    found = _addresses(spec.cluster_ips or (spec.cluster_ip,))
    if len(found) < 2:
        return found
    return tuple({family_of(each): each for each in reversed(found)}.values())[::-1]


def _service_ports(ports: Iterable[wire.ServicePort]) -> Iterable[ServicePort]:
    for port in ports:
        protocol = _PROTOCOLS.get(port.protocol or "")
        if protocol is not None and _is_port(port.port):
            node_port = port.node_port if _is_port(port.node_port) else 0
            yield ServicePort(_one(port.name or ""), protocol, port.port, node_port)


def _is_port(number: int | None) -> TypeGuard[int]:
    return number is not None and 0 < number <= 65535


def _load_balancer_ips(status: wire.ServiceStatus | None) -> tuple[Address, ...]:
    """Those that packets reach with their destination unchanged: ipMode VIP, the default."""
    if status is None or status.load_balancer is None or not status.load_balancer.ingress:
        return ()
    return _addresses(each.ip for each in status.load_balancer.ingress if (each.ip_mode or "VIP") == "VIP")


def _affinity_seconds(spec: wire.ServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    return DEFAULT_AFFINITY_SECONDS if seconds is None else seconds


def _source_ranges(texts: list[str] | None) -> tuple[str, ...]:
    if not texts:
        return ()
    return tuple(dict.fromkeys([found for text in texts if (found := cidr(text.strip()))]))


def _annotations(annotations: wire.Labels | None) -> tuple[tuple[str, str], ...]:
    if not annotations:
        return ()
    return tuple(
        sorted(
            (key.removeprefix(ANNOTATION_PREFIX), value or "")
            for key, value in annotations.items()
            if key.startswith(ANNOTATION_PREFIX)
        )
    )


# ---- EndpointSlices ----


def endpoint_slice(obj: wire.EndpointSlice) -> EndpointSlice | None:
    """The slice; None if it is of no Service or of a headless one, or holds names instead of addresses."""
    meta = obj.metadata
    labels = (meta and meta.labels) or {}
    owner = labels.get(SERVICE_NAME)
    family = _FAMILIES.get(obj.address_type or "")
    if meta is None or not owner or HEADLESS in labels or family is None:
        return None
    name = service_name(meta)
    return EndpointSlice(
        name=name,
        service=ServiceName(name.namespace, _one(owner)),
        family=family,
        ports=_slice_ports(obj.ports),
        endpoints=tuple(_endpoints(obj.endpoints, family)),
    )


def _slice_ports(ports: list[wire.EndpointPort] | None) -> tuple[SlicePort, ...]:
    return tuple([found for port in ports or () if (found := _slice_port(port.name, port.protocol, port.port))])


@lru_cache(maxsize=4096)
def _slice_port(name: str | None, protocol: str | None, number: int | None) -> SlicePort | None:
    """One object for the many slices of equal ports. A nil port means all ports, which no proxy can serve; a nil name
    is what the API server makes ""."""
    known = _PROTOCOLS.get(protocol or "")
    return SlicePort(name or "", known, number) if known is not None and _is_port(number) else None


def _endpoints(endpoints: list[wire.Endpoint] | None, family: Family) -> Iterable[Endpoint]:
    """Only the first address of each counts; one of another family than its slice's is left out."""
    is_ipv6 = family is Family.IPV6
    for endpoint in endpoints or ():
        found = address(endpoint.addresses[0]) if endpoint.addresses else None
        if found is None or (":" in found) is not is_ipv6:
            continue
        conditions, hints = endpoint.conditions or _ALL_NIL, endpoint.hints
        yield Endpoint(
            found,
            conditions.ready is not False,
            conditions.serving is not False,
            conditions.terminating is True,
            _one(endpoint.node_name or ""),
            _hint_names(hints.for_zones) if hints else _NOTHING,
            _hint_names(hints.for_nodes) if hints else _NOTHING,
        )


def _hint_names(hints: list[wire.ForName] | None) -> frozenset[str]:
    return _shared(tuple(each.name for each in hints if each.name)) if hints else _NOTHING


@lru_cache(maxsize=4096)
def _shared(names: tuple[str, ...]) -> frozenset[str]:
    """One set for the many endpoints that carry the same hints."""
    return frozenset(names)


# ---- Nodes ----


def node(obj: wire.Node) -> Node:
    """What a Node object says of its node; `addresses` stays empty, for only the kernel knows them all."""
    meta, spec, status = obj.metadata or wire.Meta(), obj.spec or wire.NodeSpec(), obj.status or wire.NodeStatus()
    first_of_each: dict[Family, Address] = {}
    for wanted in ("InternalIP", "ExternalIP"):
        for candidate in _addresses(each.address for each in status.addresses or () if each.type == wanted):
            first_of_each.setdefault(family_of(candidate), candidate)
    pod_cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    return Node(
        name=meta.name or "",
        primary=tuple(first_of_each.values()),
        zone=(meta.labels or {}).get(ZONE) or "",
        pod_cidrs=tuple(dict.fromkeys(found for text in pod_cidrs if (found := cidr(text)))),
        known=True,
        deleting=bool(meta.deletion_timestamp) or any(taint.key == TO_BE_DELETED for taint in spec.taints or ()),
    )
