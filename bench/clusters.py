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


def endpoint_slice(number: int, addresses: Sequence[str], revision: int = 0) -> dict[str, object]:
    """The slice of Service `number`; all its endpoints are ready. `revision` is its resourceVersion, 0 for any."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"service-{number}-abcde",
            "namespace": f"team-{number % 50}",
            "uid": f"7f1c2c1e-0000-4000-8000-{number:012d}",
            "resourceVersion": str(revision or 2000000 + number),
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


def node(number: int) -> dict[str, object]:
    """Node `number`, with as much in its status as a kubelet reports: 50 images and its conditions."""
    address = f"192.168.{number // 250}.{number % 250 + 2}"
    kinds = ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": f"node-{number}",
            "uid": f"9f1c2c1e-0000-4000-8000-{number:012d}",
            "resourceVersion": str(500000 + number),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "kubernetes.io/hostname": f"node-{number}",
                "kubernetes.io/os": "linux",
                "topology.kubernetes.io/region": "here",
                "topology.kubernetes.io/zone": "abc"[number % 3],
            },
        },
        "spec": {"podCIDR": f"10.{number % 250}.0.0/24", "podCIDRs": [f"10.{number % 250}.0.0/24"]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": address},
                {"type": "Hostname", "address": f"node-{number}"},
            ],
            "capacity": {"cpu": "8", "memory": "32Gi", "pods": "110"},
            "conditions": [
                {
                    "type": kind,
                    "status": "True" if kind == "Ready" else "False",
                    "lastHeartbeatTime": "2026-01-01T00:00:00Z",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                    "reason": f"Kubelet{kind}",
                    "message": f"kubelet says {kind}",
                }
                for kind in kinds
            ],
            "images": [
                {
                    "names": [f"registry.example/team-{image}/app@sha256:{image:064x}", f"registry.example/a:{image}"],
                    "sizeBytes": 50000000 + image,
                }
                for image in range(50)
            ],
        },
    }


def with_managed_fields(obj: dict[str, object]) -> dict[str, object]:
    """The object as the API server gives it out: with who wrote which of its fields, and, of a slice, who owns it."""
    metadata = obj["metadata"]
    assert isinstance(metadata, dict)
    labels: dict[str, object] = {".": {}, **{f"f:{name}": {} for name in metadata["labels"]}}
    about: dict[str, object] = {"f:labels": labels}
    match obj["kind"]:
        case "Service":
            ports: dict[str, object] = {".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}}
            port = f'k:{{"port":{PORT},"protocol":"TCP"}}'
            spec = {"f:internalTrafficPolicy": {}, "f:ports": {".": {}, port: ports}, "f:selector": {}}
            fields: dict[str, object] = {"f:spec": {**spec, "f:sessionAffinity": {}, "f:type": {}}}
            writer = "helm"
        case "EndpointSlice":
            owner = metadata["uid"].replace("7f", "6f", 1)
            name = metadata["labels"]["kubernetes.io/service-name"]
            metadata["ownerReferences"] = [
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "name": name,
                    "uid": owner,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ]
            about["f:annotations"] = {".": {}, **{f"f:{name}": {} for name in metadata.get("annotations", ())}}
            about["f:ownerReferences"] = {".": {}, f'k:{{"uid":"{owner}"}}': {}}
            fields = {"f:addressType": {}, "f:endpoints": {}, "f:ports": {}}
            writer = "kube-controller-manager"
        case _:
            fields = {"f:spec": {"f:podCIDR": {}, "f:podCIDRs": {".": {}, 'v:"10.0.0.0/24"': {}}}}
            writer = "kube-controller-manager"
    entry = {"manager": writer, "operation": "Update", "apiVersion": obj["apiVersion"], "time": "2026-01-01T00:00:00Z"}
    metadata["managedFields"] = [{**entry, "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": about, **fields}}]
    return obj


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
