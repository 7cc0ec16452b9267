"""Kubernetes objects as a test writes them: the least that the API server accepts.

Rules of this file: plain documents. A pod's status is a part of it, posted as a kubelet would; see `put_pod`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from tests.api.client import Api, ApiRefusal, Object


def service(
    namespace: str, name: str, *, app: str = "", ports: Sequence[int | Mapping[str, object]] = (80,), **spec: object
) -> Object:
    """A Service of the pods labelled app=`app`; with "" its EndpointSlices are the test's. `spec` has further fields by
    their Kubernetes names."""
    written = [{"port": port, "name": f"p{port}"} if isinstance(port, int) else dict(port) for port in ports]
    body: Object = {"ports": written, **spec}
    if app:
        body["selector"] = {"app": app}
    return _object("v1", "Service", namespace, name, spec=body)


def endpoint_slice(
    namespace: str, name: str, of: str, addresses: Iterable[str], *, ports: Sequence[int] = (80,),
    family: str = "IPv4", **conditions: bool,
) -> Object:  # fmt: skip
    """An EndpointSlice of the Service `of` whose endpoints are all alike; ready unless `conditions` say otherwise."""
    endpoints = [{"addresses": [each], "conditions": {"ready": True, **conditions}} for each in addresses]
    found = _object("discovery.k8s.io/v1", "EndpointSlice", namespace, name)
    found["metadata"]["labels"] = {"kubernetes.io/service-name": of}
    ports_written = [{"name": f"p{port}", "port": port, "protocol": "TCP"} for port in ports]
    return {**found, "addressType": family, "endpoints": endpoints, "ports": ports_written}


def node(name: str, *addresses: str, zone: str = "") -> Object:
    """A Node with these addresses, as a kubelet and a cloud would report it."""
    found = _object("v1", "Node", "", name)
    found["metadata"]["labels"] = {"kubernetes.io/hostname": name}
    if zone:
        found["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone
    found["status"] = {"addresses": [{"type": "InternalIP", "address": each} for each in addresses]}
    return found


def pod(namespace: str, name: str, app: str, node: str, *addresses: str, ready: bool = True) -> Object:
    """A pod that runs on `node` at these addresses."""
    found = _object("v1", "Pod", namespace, name)
    found["metadata"]["labels"] = {"app": app}
    found["spec"] = {
        "nodeName": node,
        "containers": [{"name": "main", "image": "none"}],
        "terminationGracePeriodSeconds": 3600,
    }
    found["status"] = {
        "phase": "Running",
        "podIP": addresses[0],
        "podIPs": [{"ip": each} for each in addresses],
        "conditions": [readiness(ready)],
    }
    return found


def readiness(ready: bool) -> Object:
    """The condition by which a kubelet says so, whose clock is a second ahead: these times have whole seconds, and a
    change of before the daemon's start would be nobody's latency."""
    changed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1))
    return {"type": "Ready", "status": str(ready), "lastTransitionTime": changed}


def put_pod(api: Api, found: Object) -> None:
    """Create a pod and post its status; EndpointSlices follow from that."""
    api.create(found)
    set_ready(api, found, found["status"]["conditions"][0]["status"] == "True")


def set_ready(api: Api, found: Object, ready: bool) -> None:
    """The kubelet's probe says so."""
    metadata = found["metadata"]
    status = {**found["status"], "conditions": [readiness(ready)]}
    api.patch("Pod", metadata["namespace"], metadata["name"], {"status": status}, "status")


def put_node(api: Api, found: Object) -> None:
    """Create a Node, or make it so."""
    try:
        api.create(found)
    except ApiRefusal as refusal:
        if refusal.status != 409:
            raise
        api.patch("Node", "", found["metadata"]["name"], {"metadata": found["metadata"]})
    api.patch("Node", "", found["metadata"]["name"], {"status": found["status"]}, "status")


def _object(version: str, kind: str, namespace: str, name: str, **parts: object) -> Object:
    metadata: Object = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **parts}
