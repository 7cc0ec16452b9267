"""What the API server would refuse, in its own words: the judgement over manifests.

Rules of this file: pure. Each function takes an object as it was written, before defaulting, and says what is wrong
with it, one sentence each, beginning with the field's path; () means that a server would take it. Text follows the API
server's, so that a search for it finds the same advice. What only a server could have filled in is said in the same
way: without a clusterIP there is nothing to serve, so that it is refused; the rest is what `missing_…` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_pton

import msgspec

from ebpflb.source import parse, wire

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_LABEL_WORDS = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    f"an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '{_LABEL.pattern}')"
)
_SUBDOMAIN_WORDS = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    f"end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_SUBDOMAIN.pattern}')"
)
_PORT_WORDS = "must be between 1 and 65535, inclusive"
_NOBODY = "no API server is there to allocate one: a manifest must give it"
_LB_ONLY = "may only be used when `type` is 'LoadBalancer'"

_PROTOCOLS = ("SCTP", "TCP", "UDP")
_TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
_POLICIES = ("Cluster", "Local")
_MAX_AFFINITY_SECONDS = 86400
_KUBELET_PORT = 10250
_MAX_ENDPOINTS, _MAX_ADDRESSES, _MAX_SLICE_PORTS, _MAX_HINTS = 1000, 100, 20000, 8

_SPECIAL_IPV4 = ("0.0.0.0", "127.", "169.254.", "224.0.0.")
_SPECIAL_RANGES = (
    (("127.0.0.0/8", "::1/128"), "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
    (("169.254.0.0/16", "fe80::/10"), "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
    (("224.0.0.0/24", "ff02::/16"), "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"),
)


# ---- The server's phrases ----


def _quoted(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _invalid(path: str, value: object, words: str) -> str:
    return f"{path}: Invalid value: {_quoted(value)}: {words}"


def _required(path: str, words: str = "") -> str:
    return f"{path}: Required value" + (f": {words}" if words else "")


def _unsupported(path: str, value: str, supported: Iterable[str]) -> str:
    return f"{path}: Unsupported value: {_quoted(value)}: supported values: {', '.join(map(_quoted, supported))}"


def _duplicate(path: str, value: object) -> str:
    return f"{path}: Duplicate value: {_quoted(value)}"


def _forbidden(path: str, words: str) -> str:
    return f"{path}: Forbidden: {words}"


def _too_many(path: str, count: int, most: int) -> str:
    return f"{path}: Too many: {count}: must have at most {most} items"


# ---- Names, numbers, addresses ----


@lru_cache(maxsize=1 << 14)
def _label(text: str) -> str:
    """What is wrong with a DNS label; "" if nothing."""
    if len(text) > 63:
        return "must be no more than 63 characters"
    return "" if _LABEL.fullmatch(text) else _LABEL_WORDS


@lru_cache(maxsize=1 << 14)
def _subdomain(text: str) -> str:
    """What is wrong with a DNS name; "" if nothing."""
    if len(text) > 253:
        return "must be no more than 253 characters"
    return "" if _SUBDOMAIN.fullmatch(text) else _SUBDOMAIN_WORDS


def _port_name(text: str) -> str:
    """What is wrong with an IANA service name; "" if nothing."""
    if len(text) > 15:
        return "must be no more than 15 characters"
    if not re.fullmatch(r"[-a-z0-9]+", text):
        return "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
    if not re.search(r"[a-z]", text):
        return "must contain at least one letter (a-z)"
    if "--" in text:
        return "must not contain consecutive hyphens"
    return "must not begin or end with a hyphen" if text[0] == "-" or text[-1] == "-" else ""


def _is_plain(address: str) -> bool:
    try:
        inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    except (OSError, ValueError):
        return False
    return True


def _ip(text: str) -> str:
    """What is wrong with an address; "" if nothing."""
    found = parse.address(text)
    if found == text:
        return ""
    if found is None:
        return "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
    if not _is_plain(text):
        return "must not have leading 0s"
    return "must not be an IPv4-mapped IPv6 address" if (":" in text) is not (":" in found) else ""


def _cidr(text: str) -> str:
    """What is wrong with a CIDR; "" if nothing."""
    found = parse.cidr(text)
    host, _, length = text.partition("/")
    if found is None:
        return "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
    if not _is_plain(host) or (len(length) > 1 and length[0] == "0"):
        return "must not have leading 0s in IP or prefix length"
    if (":" in host) is not (":" in (parse.address(host) or "")):
        return "must not have an IPv4-mapped IPv6 address"
    return "" if found.partition("/")[0] == parse.address(host) else "must not have bits set beyond the prefix length"


def _special(address: str) -> str:
    """Why a valid address cannot be one of an endpoint or an external IP; "" if it can."""
    found = parse.address(address) or ""
    if found in ("0.0.0.0", "::"):
        return f"may not be unspecified ({address})"
    if not found.startswith(("::", "fe", "ff") if ":" in found else _SPECIAL_IPV4):
        return ""  # nearly all
    packed = inet_pton(AF_INET6 if ":" in found else AF_INET, found)
    for ranges, words in _SPECIAL_RANGES:
        network, _, bits = ranges[":" in found].partition("/")
        unused = len(packed) * 8 - int(bits)
        own = inet_pton(AF_INET6 if ":" in found else AF_INET, network)
        if int.from_bytes(packed) >> unused == int.from_bytes(own) >> unused:
            return words
    return ""


def _meta(meta: wire.Meta | None, *, name_is_label: bool, namespaced: bool = True) -> Iterator[str]:
    name = (meta and meta.name) or ""
    if not name:
        yield _required("metadata.name", "name or generateName is required")
    elif words := (_label if name_is_label else _subdomain)(name):
        yield _invalid("metadata.name", name, words)
    namespace = (meta and meta.namespace) or ""
    if namespaced and namespace and (words := _label(namespace)):
        yield _invalid("metadata.namespace", namespace, words)


# ---- Services ----


def service(obj: wire.Service) -> tuple[str, ...]:
    """What a server would refuse in a Service that is created like this."""
    spec = obj.spec or wire.ServiceSpec()
    kind = spec.type or "ClusterIP"
    return (
        # Since 1.35 the name may begin with a digit.
        *_meta(obj.metadata, name_is_label=True),
        *_service_type(spec, kind),
        *_service_ports(spec.ports or [], kind),
        *_affinity(spec),
        *(() if kind == "ExternalName" else _cluster_ips(spec)),
        *_external_ips(spec.external_ips or []),
        *_load_balancer(spec, kind),
        *_traffic(spec, kind),
        *_ingress(obj.status),
    )


def _service_type(spec: wire.ServiceSpec, kind: str) -> Iterator[str]:
    headless = spec.cluster_ip == "None"
    if kind not in _TYPES:
        yield _unsupported("spec.type", kind, _TYPES)
    if kind == "ExternalName":
        if spec.cluster_ips or spec.cluster_ip:
            yield _forbidden("spec.clusterIPs", "may not be set for ExternalName services")
        if not (spec.external_name or "").removesuffix("."):
            yield _required("spec.externalName")
    elif not spec.ports and not headless:
        yield _required("spec.ports")
    if headless and kind in ("LoadBalancer", "NodePort"):
        yield _invalid("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {kind} services")


def _service_ports(ports: Sequence[wire.ServicePort], kind: str) -> Iterator[str]:
    names: set[str] = set()
    seen: set[tuple[str, int]] = set()
    seen_node: set[tuple[str, int]] = set()
    for index, port in enumerate(ports):
        path = f"spec.ports[{index}]"
        name, number, protocol = port.name or "", port.port or 0, port.protocol or "TCP"
        if name:
            if words := _label(name):
                yield _invalid(f"{path}.name", name, words)
            if name in names:
                yield _duplicate(f"{path}.name", name)
            names.add(name)
        elif len(ports) > 1:
            yield _required(f"{path}.name")
        if not 0 < number <= 65535:
            yield _invalid(f"{path}.port", number, _PORT_WORDS)
        elif kind == "LoadBalancer" and number == _KUBELET_PORT:
            yield _invalid(path, number, f"may not expose port {number} externally since it is used by kubelet")
        if protocol not in _PROTOCOLS:
            yield _unsupported(f"{path}.protocol", protocol, _PROTOCOLS)
        yield from _target_port(f"{path}.targetPort", port.target_port)
        if (protocol, number) in seen:
            yield _duplicate(path, {"protocol": protocol, "port": number})
        seen.add((protocol, number))
        if port.node_port:
            yield from _node_port(
                f"{path}.nodePort", port.node_port, kind, repeated=(protocol, port.node_port) in seen_node
            )
            seen_node.add((protocol, port.node_port))


def _target_port(path: str, target: int | str | None) -> Iterator[str]:
    # 0 and "" are what a decoder leaves where nothing was written: the port itself.
    if isinstance(target, str) and target and (words := _port_name(target)):
        yield _invalid(path, target, words)
    elif isinstance(target, int) and not 0 <= target <= 65535:
        yield _invalid(path, target, _PORT_WORDS)


def _node_port(path: str, number: int, kind: str, *, repeated: bool) -> Iterator[str]:
    if kind == "ClusterIP":
        yield _forbidden(path, "may not be used when `type` is 'ClusterIP'")
    if not 0 < number <= 65535:
        yield _invalid(path, number, _PORT_WORDS)
    elif repeated:
        yield _duplicate(path, number)


def _affinity(spec: wire.ServiceSpec) -> Iterator[str]:
    affinity, config = spec.session_affinity or "None", spec.session_affinity_config
    if affinity not in ("ClientIP", "None"):
        yield _unsupported("spec.sessionAffinity", affinity, ("ClientIP", "None"))
    elif affinity == "None" and config is not None:
        yield _forbidden("spec.sessionAffinityConfig", "must not be set when session affinity is None")
    elif config is not None and config.client_ip is not None:
        seconds = config.client_ip.timeout_seconds
        if seconds is not None and not 0 < seconds <= _MAX_AFFINITY_SECONDS:
            path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
            yield _invalid(path, seconds, f"must be greater than 0 and less than {_MAX_AFFINITY_SECONDS}")


def _cluster_ips(spec: wire.ServiceSpec) -> Iterator[str]:
    path, first = "spec.clusterIPs", spec.cluster_ip or ""
    ips, families = spec.cluster_ips or ([first] if first else []), spec.ip_families or []
    if not first and ips:
        yield _invalid(path, ips, "must be empty when `clusterIP` is not specified")
    elif not first:
        yield _required("spec.clusterIP", _NOBODY)
    elif ips and ips[0] != first:
        yield _invalid(path, ips, "first value must match `clusterIP`")
    for index, family in enumerate(families):
        if family not in ("IPv4", "IPv6"):
            yield _unsupported(f"spec.ipFamilies[{index}]", family, ("IPv4", "IPv6"))
        elif family in families[:index]:
            yield _duplicate(f"spec.ipFamilies[{index}]", family)
    policies = ("PreferDualStack", "RequireDualStack", "SingleStack")
    if spec.ip_family_policy and spec.ip_family_policy not in policies:
        yield _unsupported("spec.ipFamilyPolicy", spec.ip_family_policy, policies)
    if ips[:1] == ["None"]:
        if len(ips) > 1:
            yield _invalid(path, ips, "'None' must be the first and only value")
        return
    refused = [_invalid(f"{path}[{index}]", ip, words) for index, ip in enumerate(ips) if (words := _ip(ip))]
    yield from refused
    if len(ips) > 2:
        yield _invalid(path, ips, "may only hold up to 2 values")
    if refused:
        return
    if len({":" in ip for ip in ips}) != len(ips):
        yield _invalid(path, ips, "may specify no more than one IP for each IP family")
    for index, (ip, family) in enumerate(zip(ips, families, strict=False)):
        if (":" in ip) is not (family == "IPv6"):
            yield _invalid(f"{path}[{index}]", ip, f"expected an {family} value as indicated by `ipFamilies[{index}]`")


def _external_ips(ips: Sequence[str]) -> Iterator[str]:
    for index, ip in enumerate(ips):
        if words := _ip(ip) or _special(ip):
            yield _invalid(f"spec.externalIPs[{index}]", ip, words)


def _load_balancer(spec: wire.ServiceSpec, kind: str) -> Iterator[str]:
    if kind != "LoadBalancer":
        if spec.load_balancer_source_ranges:
            yield _forbidden("spec.loadBalancerSourceRanges", _LB_ONLY)
        if spec.allocate_load_balancer_node_ports is not None:
            yield _forbidden("spec.allocateLoadBalancerNodePorts", _LB_ONLY)
        if spec.load_balancer_class is not None:
            yield _forbidden("spec.loadBalancerClass", _LB_ONLY)
    for index, text in enumerate(spec.load_balancer_source_ranges or ()):
        if words := _cidr(text.strip()):
            yield _invalid(f"spec.loadBalancerSourceRanges[{index}]", text, words)


def _traffic(spec: wire.ServiceSpec, kind: str) -> Iterator[str]:
    external, internal = spec.external_traffic_policy or "", spec.internal_traffic_policy or "Cluster"
    reachable = kind in ("LoadBalancer", "NodePort") or (kind == "ClusterIP" and bool(spec.external_ips))
    if external and not reachable:
        words = "may only be set for externally-accessible services"
        yield _invalid("spec.externalTrafficPolicy", external, words)
    elif external and external not in _POLICIES:
        yield _unsupported("spec.externalTrafficPolicy", external, _POLICIES)
    if internal not in _POLICIES:
        yield _unsupported("spec.internalTrafficPolicy", internal, _POLICIES)
    health = spec.health_check_node_port or 0
    if health and not (kind == "LoadBalancer" and external == "Local"):
        words = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        yield _invalid("spec.healthCheckNodePort", health, words)
    elif not 0 <= health <= 65535:
        yield _invalid("spec.healthCheckNodePort", health, _PORT_WORDS)
    distributions = ("PreferClose", "PreferSameNode", "PreferSameZone")
    if spec.traffic_distribution and spec.traffic_distribution not in distributions:
        yield _unsupported("spec.trafficDistribution", spec.traffic_distribution, distributions)


def _ingress(status: wire.ServiceStatus | None) -> Iterator[str]:
    ingress = (status and status.load_balancer and status.load_balancer.ingress) or ()
    for index, each in enumerate(ingress):
        path = f"status.loadBalancer.ingress[{index}]"
        if each.ip and (words := _ip(each.ip)):
            yield _invalid(f"{path}.ip", each.ip, words)
        if each.ip_mode and not each.ip:
            yield _forbidden(f"{path}.ipMode", "may not be specified when `ip` is not set")
        elif each.ip_mode and each.ip_mode not in ("Proxy", "VIP"):
            yield _unsupported(f"{path}.ipMode", each.ip_mode, ("Proxy", "VIP"))


def missing_service(obj: wire.Service) -> tuple[str, ...]:
    """What an API server would have allocated for an acceptable Service; what needs it is not served."""
    spec = obj.spec or wire.ServiceSpec()
    kind = spec.type or "ClusterIP"
    if kind != "NodePort":
        return ()
    return tuple(
        _required(f"spec.ports[{index}].nodePort", _NOBODY)
        for index, port in enumerate(spec.ports or ())
        if not port.node_port
    )


# ---- EndpointSlices ----


def endpoint_slice(obj: wire.EndpointSlice) -> tuple[str, ...]:
    """What a server would refuse in an EndpointSlice that is created like this."""
    kind = obj.address_type or ""
    if not kind:
        found = _required("addressType")
    elif kind not in ("FQDN", "IPv4", "IPv6"):
        found = _unsupported("addressType", kind, ("FQDN", "IPv4", "IPv6"))
    else:
        found = ""
    return (
        *_meta(obj.metadata, name_is_label=False),
        *((found,) if found else ()),
        *_endpoints(obj.endpoints or [], kind),
        *_slice_ports(obj.ports or []),
    )


def _endpoints(endpoints: Sequence[wire.Endpoint], kind: str) -> Iterator[str]:
    if len(endpoints) > _MAX_ENDPOINTS:
        yield _too_many("endpoints", len(endpoints), _MAX_ENDPOINTS)
        return
    for index, endpoint in enumerate(endpoints):
        addresses = endpoint.addresses or ()
        if not addresses:
            yield _required(f"endpoints[{index}].addresses", "must contain at least 1 address")
        elif len(addresses) > _MAX_ADDRESSES:
            yield _too_many(f"endpoints[{index}].addresses", len(addresses), _MAX_ADDRESSES)
        if kind in ("IPv4", "IPv6"):
            for position, address in enumerate(addresses):
                if words := _endpoint_address(address, kind):
                    yield _invalid(f"endpoints[{index}].addresses[{position}]", address, words)
        if endpoint.node_name and (words := _subdomain(endpoint.node_name)):
            yield _invalid(f"endpoints[{index}].nodeName", endpoint.node_name, words)
        if endpoint.hints is not None:
            yield from _hints(f"endpoints[{index}].hints.forZones", endpoint.hints.for_zones or [])
            yield from _hints(f"endpoints[{index}].hints.forNodes", endpoint.hints.for_nodes or [])


def _endpoint_address(address: str, kind: str) -> str:
    """What is wrong with an endpoint's address; "" if nothing. Asked a hundred thousand times, so that most of them,
    which are canonical and ordinary, are told at a glance."""
    if kind == "IPv4" and not address.startswith(_SPECIAL_IPV4) and ":" not in address and _is_plain(address):
        return ""
    if words := _ip(address):
        return words
    if (":" in address) is not (kind == "IPv6"):
        return f"must be an {kind} address"
    return _special(address)


def _hints(path: str, hints: Sequence[wire.ForName]) -> Iterator[str]:
    if len(hints) > _MAX_HINTS:
        yield _too_many(path, len(hints), _MAX_HINTS)
        return
    names: set[str] = set()
    for index, hint in enumerate(hints):
        name = hint.name or ""
        if name in names:
            yield _duplicate(f"{path}[{index}].name", name)
        names.add(name)


def _slice_ports(ports: Sequence[wire.EndpointPort]) -> Iterator[str]:
    if len(ports) > _MAX_SLICE_PORTS:
        yield _too_many("ports", len(ports), _MAX_SLICE_PORTS)
        return
    names: set[str] = set()
    for index, port in enumerate(ports):
        path, name, protocol = f"ports[{index}]", port.name or "", port.protocol or "TCP"
        if name and (words := _label(name)):
            yield _invalid(f"{path}.name", name, words)
        if name in names:
            yield _duplicate(f"{path}.name", name)
        names.add(name)
        if protocol not in _PROTOCOLS:
            yield _unsupported(f"{path}.protocol", protocol, _PROTOCOLS)
        if port.port is not None and not 0 <= port.port <= 65535:
            yield _invalid(f"{path}.port", port.port, _PORT_WORDS)


def missing_endpoint_slice(obj: wire.EndpointSlice) -> tuple[str, ...]:
    """What an acceptable EndpointSlice lacks to be used at all."""
    labels = (obj.metadata and obj.metadata.labels) or {}
    if labels.get(parse.SERVICE_NAME):
        return ()
    path = f'metadata.labels["{parse.SERVICE_NAME}"]'
    return (_required(path, "without it the slice belongs to no Service"),)


# ---- Nodes ----


def node(obj: wire.Node) -> tuple[str, ...]:
    """What a server would refuse in what we read of a Node."""
    spec, status = obj.spec or wire.NodeSpec(), obj.status or wire.NodeStatus()
    pod_cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    return (
        *_meta(obj.metadata, name_is_label=False, namespaced=False),
        *(
            _invalid(f"spec.podCIDRs[{index}]", text, words)
            for index, text in enumerate(pod_cidrs)
            if (words := _cidr(text))
        ),
        *(
            _invalid(f"status.addresses[{index}].address", each.address, words)
            for index, each in enumerate(status.addresses or ())
            if each.type in ("InternalIP", "ExternalIP") and (words := _ip(each.address or ""))
        ),
    )
