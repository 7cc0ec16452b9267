"""Clusters of any size, as the API server would write them.

Rules of this file: pure; text out. Service `number` has the cluster IP 172.16.0.0 + number + 1 on port 80, and its
endpoints listen on port 8080 in 10.0.0.0/8. Lengths of names and number of fields are those of real objects, since
decoding them is part of what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

PORT, TARGET_PORT = 80, 8080


def ipv4(base: int, number: int) -> str:
    """The address `number` after base."""
    value = base + number
    return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"


def cluster_ip(number: int) -> str:
    """Of Service `number`."""
    return ipv4(0xAC100000, number + 1)


def endpoint_ips(number: int, count: int) -> list[str]:
    """Of Service `number`."""
    return [ipv4(0x0A000000, number * count + each + 1) for each in range(count)]


def service(number: int) -> dict[str, object]:
    """A ClusterIP Service."""
    address = cluster_ip(number)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": f"service-{number}",
            "namespace": f"team-{number % 50}",
            "uid": f"6f1c2c1e-0000-4000-8000-{number:012d}",
            "resourceVersion": str(1000000 + number),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": f"service-{number}", "app.kubernetes.io/managed-by": "Helm"},
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "selector": {"app": f"service-{number}"},
            "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": TARGET_PORT}],
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(number: int, addresses: Sequence[str]) -> dict[str, object]:
    """The slice of Service `number`; all its endpoints are ready."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"service-{number}-abcde",
            "namespace": f"team-{number % 50}",
            "uid": f"7f1c2c1e-0000-4000-8000-{number:012d}",
            "resourceVersion": str(2000000 + number),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "generateName": f"service-{number}-",
            "labels": {
                "kubernetes.io/service-name": f"service-{number}",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": TARGET_PORT}],
        "endpoints": [
            {
                "addresses": [address],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": f"node-{index % 7}",
                "zone": "abc"[index % 3],
                "targetRef": {
                    "kind": "Pod",
                    "namespace": f"team-{number % 50}",
                    "name": f"service-{number}-5d4f8c7b9-{index:05d}",
                    "uid": f"8f1c2c1e-0000-4000-8000-{index:012d}",
                },
            }
            for index, address in enumerate(addresses)
        ],
    }


def bytes_of(value: object) -> bytes:
    """As the API server writes it."""
    return json.dumps(value, separators=(",", ":")).encode()


def lists(services: int, endpoints: int) -> tuple[bytes, bytes]:
    """What a cold start is answered: the ServiceList and the EndpointSliceList."""
    return (
        _list("v1", "ServiceList", (service(number) for number in range(services))),
        _list(
            "discovery.k8s.io/v1",
            "EndpointSliceList",
            (endpoint_slice(number, endpoint_ips(number, endpoints)) for number in range(services)),
        ),
    )


def _list(version: str, kind: str, items: Iterable[dict[str, object]]) -> bytes:
    return bytes_of(
        {"apiVersion": version, "kind": kind, "metadata": {"resourceVersion": "3000000"}, "items": [*items]}
    )


def manifest_files(services: int, endpoints: int, per_file: int = 100) -> Iterable[tuple[str, bytes]]:
    """The same as manifests: (file name, content), some Services with their slices to a file."""
    for start in range(0, services, per_file):
        items: list[dict[str, object]] = []
        for number in range(start, min(start + per_file, services)):
            items += [service(number), endpoint_slice(number, endpoint_ips(number, endpoints))]
        yield f"services-{start:06d}.json", bytes_of({"apiVersion": "v1", "kind": "List", "items": items})
