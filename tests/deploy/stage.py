"""A cluster of one node on which the pod runs, with servers behind a Service, and clients on both paths.

    web1 web2   pods that serve            client    a pod whose sockets are served
    sandbox     a pod like a virtual machine: its packets are translated     outside   beyond the node

Rules of this file: a Service is `web` at CLUSTER_IP and NODE_PORT; the container is started by the pod's specification
alone. Only what the daemon's source is, a test may add.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from ebpflb.demo.cluster import Cluster, Pod
from tests.box.clients import Answer, Clients, Target
from tests.box.servers import Servers
from tests.box.sockets import Sockets
from tests.cli.place import until
from tests.deploy import base
from tests.deploy.base import Object
from tests.deploy.pod import Container, Host, Root

PORT = 8080
CLUSTER_IP = "10.96.0.80"
NODE_PORT = 30080
SERVERS = ("web1", "web2")
PROTOCOLS = ("TCP", "UDP")
MANIFESTS = "/manifests"
_numbers = itertools.count(1)


def service(namespace: str) -> Object:
    """The Service, TCP and UDP."""
    ports = [
        {"name": protocol.lower(), "protocol": protocol, "port": 80, "targetPort": PORT, "nodePort": NODE_PORT}
        for protocol in PROTOCOLS
    ]
    spec = {"type": "NodePort", "clusterIP": CLUSTER_IP, "clusterIPs": [CLUSTER_IP], "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": namespace}, "spec": spec}


def endpoint_slice(namespace: str, *pods: Pod) -> Object:
    """Its endpoints."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": name, "protocol": name.upper(), "port": PORT} for name in ("tcp", "udp")],
        "endpoints": [
            {"addresses": [pod.addresses.ipv4], "conditions": {"ready": True}, "nodeName": pod.node.name}
            for pod in pods
        ],
    }


class Stage:
    """See the top of this file."""

    def __init__(self) -> None:
        self.cluster = Cluster(("node1",))

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            stack.enter_context(self.cluster)
            self.sockets = stack.enter_context(Sockets(self.cluster))
            self.servers = stack.enter_context(Servers(self.sockets))
            self.clients = Clients(self.sockets)
            for name in SERVERS:
                self.servers.serve(self.cluster.add_pod("node1", name), PORT)
            self.cluster.add_pod("node1", "client")
            self.cluster.add_pod("node1", "sandbox", sandboxed=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def web(self) -> tuple[Pod, ...]:
        """The pods that serve."""
        return tuple(self.cluster.pods[name] for name in SERVERS)

    @contextmanager
    def host(self, *, bpffs: bool = True) -> Iterator[Host]:
        """A fresh node for the pod, of which nothing is left afterwards."""
        host = Host(self.cluster, self.cluster.nodes["node1"], self.cluster.directory / f"pod{next(_numbers)}")
        try:
            host.make(bpffs=bpffs)
            yield host
        finally:
            host.remove()

    def tell(self, *objects: Object) -> None:
        """What the manifests say from now on; the node is always there."""
        self.cluster.manifests.write("web", *objects)

    def unanswered(self, patience: float = 15.0) -> dict[str, object]:
        """Clients and protocols that the Service does not serve now, with what they got instead."""
        node = self.cluster.nodes["node1"].addresses.ipv4
        asked = [("client", Target(CLUSTER_IP, 80)), ("sandbox", Target(CLUSTER_IP, 80))]
        asked.append(("outside", Target(node, NODE_PORT)))
        found: dict[str, object] = {}
        for name, target in asked:
            place = self.cluster.outside if name == "outside" else self.cluster.pods[name]
            for protocol in PROTOCOLS:
                answer = self.clients.ask(place, target, protocol, patience=patience)
                if not isinstance(answer, Answer) or answer.server not in SERVERS:
                    found[f"{name} {protocol}"] = answer
        return found


def config_files(directory: Path, server: str) -> Path:
    """The ConfigMap's volume; `server` is where the API server is."""
    directory.mkdir(parents=True)
    for name, text in base.the("ConfigMap")["data"].items():
        (directory / name).write_text(str(text).replace("https://control-plane.invalid:6443", server))
    return directory


def fed_by_manifests(pod: Object) -> Object:
    """The pod with the stage's manifests as the daemon's source: one more argument, one more volume."""
    found = copy.deepcopy(pod)
    found["volumes"].append({"name": "manifests", "configMap": {"name": "manifests"}})
    for container in (*found["initContainers"], *found["containers"]):
        container["args"].append(f"--manifests={MANIFESTS}")
        container["volumeMounts"].append({"name": "manifests", "mountPath": MANIFESTS, "readOnly": True})
    return found


class Running:
    """The pod on a host of the stage: `prepare` to its end, then the daemon."""

    def __init__(self, stage: Stage, host: Host, root: Root, pod: Object, files: Mapping[str, Path]) -> None:
        self.stage, self.host, self.root, self.pod = stage, host, root, pod
        self.files = files
        self.token: Path | None = None

    def prepare(self) -> Container:
        """Run the first container; it ends well."""
        container = self.start("prepare")
        assert container.process.wait(60) == 0, container.words()
        return container

    def start(self, name: str = "ebpflb", extra: Sequence[str] = ()) -> Container:
        """Start one of the containers."""
        return Container(self.host, self.pod, name, self.root, files=self.files, token=self.token, extra=extra)

    def serve(self) -> Container:
        """Start the daemon, and wait until what it was told is in the kernel."""
        container = self.start()
        until(
            "it has synced or ended", lambda: "INFO sync:" in container.words() or container.process.poll() is not None
        )
        said = container.execute("ebpflb", "status", "--wait", "50")
        assert said.returncode == 0, (said, container.words())
        return container
