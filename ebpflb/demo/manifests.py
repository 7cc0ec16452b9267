"""Manifests by the file: a directory that stands for the cluster's API.

Rules of this file: builders return plain objects as YAML would give them, with nothing that the API server would
default; a file is replaced by rename, so that whoever watches sees it whole.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

Manifest: TypeAlias = dict[str, object]


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


def service(
    name: str, ports: Iterable[Port], addresses: Iterable[str], *, namespace: str = "default", **spec: object
) -> Manifest:
    """A Service with these cluster IPs; other fields of its spec by their Kubernetes names."""
    cluster_ips = list(addresses)
    body: Manifest = {"ports": [_service_port(port) for port in ports], **spec}
    if cluster_ips:
        families = [f"IPv{ipaddress.ip_address(address).version}" for address in cluster_ips]
        body |= {"clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ipFamilies": families}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": body}


def _service_port(port: Port) -> Manifest:
    found: Manifest = {"port": port.port, "protocol": port.protocol}
    if port.name:
        found["name"] = port.name
    if port.node_port:
        found["nodePort"] = port.node_port
    if port.target:
        found["targetPort"] = port.target
    return found


def endpoint_slice(
    service: str, ports: Iterable[Port], members: Iterable[Member], *, namespace: str = "default", suffix: str = "0"
) -> Manifest:
    """An EndpointSlice of a Service. Its family is that of its first member, IPv4 if it has none."""
    found = list(members)
    version = ipaddress.ip_address(found[0].address).version if found else 4
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-ipv{version}-{suffix}",
            "namespace": namespace,
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
    if member.zones:
        found["hints"] = {"forZones": [{"name": zone} for zone in member.zones]}
    return found


def node(name: str, addresses: Iterable[str], zone: str, pod_cidrs: Iterable[str]) -> Manifest:
    """A Node."""
    labels = {"kubernetes.io/hostname": name, **({"topology.kubernetes.io/zone": zone} if zone else {})}
    cidrs = list(pod_cidrs)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }


class Manifests:
    """A directory of manifests. Each file holds what one `write` gave it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, file: str, *objects: Mapping[str, object]) -> Path:
        """Put these objects, and only these, into `file` (a name without its ending)."""
        text = "---\n".join(json.dumps(item, indent=1) + "\n" for item in objects)
        return self.write_text(f"{file}.yaml", text)  # JSON is YAML, and many documents may share a file

    def write_text(self, file: str, text: str) -> Path:
        """Put this text into `file`."""
        path = self.directory / file
        fresh = self.directory / f".{file}.new"
        fresh.write_text(text)
        os.replace(fresh, path)
        return path

    def remove(self, file: str) -> None:
        """Remove what `write` put there; removing what is not there is no error."""
        (self.directory / f"{file}.yaml").unlink(missing_ok=True)
