"""Kubernetes objects, as YAML would give them, with nothing that the API server would default."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

import msgspec

from ebpflb.demo.manifests import Manifest


class Port(msgspec.Struct, frozen=True):
    """A Service's port. `target` is where the endpoints listen; 0 means the same as `port`."""

    port: int
    protocol: str = "TCP"
    name: str = ""
    node_port: int = 0
    target: int = 0


class Member(msgspec.Struct, frozen=True):
    """An endpoint of a slice."""

    address: str
    node: str = ""
    ready: bool = True
    serving: bool | None = None
    terminating: bool = False
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


def service(
    name: str, ports: Iterable[Port], addresses: Iterable[str], spec: Mapping[str, object],
    annotations: Mapping[str, str] | None = None,
) -> Manifest:  # fmt: skip
    """A Service of the default namespace with these cluster IPs; `spec` has the other fields."""
    cluster_ips = list(addresses)
    body: Manifest = {"ports": [_service_port(port) for port in ports], **spec}
    if cluster_ips:
        families = [f"IPv{ipaddress.ip_address(address).version}" for address in cluster_ips]
        body |= {"clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ipFamilies": families}
    metadata: Manifest = {"name": name, "namespace": "default"}
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": body}


def _service_port(port: Port) -> Manifest:
    found: Manifest = {"port": port.port, "protocol": port.protocol}
    if port.name:
        found["name"] = port.name
    if port.node_port:
        found["nodePort"] = port.node_port
    if port.target:
        found["targetPort"] = port.target
    return found


def endpoint_slice(service: str, ports: Iterable[Port], members: Iterable[Member], *, suffix: str = "0") -> Manifest:
    """An EndpointSlice of a Service. Its family is that of its first member, IPv4 if it has none."""
    found = list(members)
    version = ipaddress.ip_address(found[0].address).version if found else 4
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-ipv{version}-{suffix}",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": f"IPv{version}",
        "ports": [{"name": port.name, "protocol": port.protocol, "port": port.target or port.port} for port in ports],
        "endpoints": [_endpoint(member) for member in found],
    }


def _endpoint(member: Member) -> Manifest:
    serving = member.ready if member.serving is None else member.serving
    found: Manifest = {
        "addresses": [member.address],
        "conditions": {"ready": member.ready, "serving": serving, "terminating": member.terminating},
    }
    if member.node:
        found["nodeName"] = member.node
    hints = {
        key: [{"name": name} for name in names]
        for key, names in (("forZones", member.zones), ("forNodes", member.nodes))
        if names
    }
    if hints:
        found["hints"] = hints
    return found
