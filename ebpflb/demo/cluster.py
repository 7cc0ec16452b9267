"""A small cluster on this machine: nodes, pods and an outside client as network namespaces, each node with its daemon.

Rules of this file: nothing appears in this machine's own network; every name begins with the cluster's, so that
`remove` needs none of the objects here. A Cluster is used as a context manager: whatever was made is removed on the way
out, also when making it failed half-way or was interrupted.

    with Cluster(("node1", "node2")) as cluster:
        web = cluster.add_pod("node1", "web")
        server = cluster.spawn(web, ["nginx", ...])
        cluster.manifests.write("web", service(...), endpoint_slice(...))
        cluster.start_daemons()
        cluster.run(cluster.outside, ["curl", ...])
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ebpflb.demo import namespaces, network
from ebpflb.demo.daemon import Daemon, environment
from ebpflb.demo.manifests import Manifests
from ebpflb.demo.manifests import node as node_manifest
from ebpflb.demo.network import Addresses, Cni, Join
from ebpflb.errors import UserError

MTU = 1500
_numbers = itertools.count(1)


class Place:
    """Somewhere a program can run: a network namespace, the cgroup that its programs belong to (None: that of
    whoever starts them) and its addresses."""

    def __init__(self, name: str, namespace: str, cgroup: Path | None, addresses: Addresses) -> None:
        self.name = name
        self.namespace = namespace
        self.cgroup = cgroup
        self.addresses = addresses

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.addresses.ipv4} {self.addresses.ipv6}>"


class Pod(Place):
    """A pod; a `sandboxed` one is like a virtual machine: no socket of it passes the node's socket programs.
    `device` is its end in the node."""

    def __init__(self, name: str, namespace: str, cgroup: Path | None, addresses: Addresses, node: Node) -> None:
        super().__init__(name, namespace, cgroup, addresses)
        self.node = node
        self.device = f"veth-{name}"

    @property
    def sandboxed(self) -> bool:
        return self.cgroup is None


class Node(Place):
    """A node, with the daemon that serves it. `index` counts from 1."""

    def __init__(self, name: str, namespace: str, cgroup: Path, index: int, zone: str) -> None:
        super().__init__(name, namespace, cgroup, network.node_addresses(index))
        self.index = index
        self.zone = zone
        self.node_cgroup = cgroup
        self.pods: dict[str, Pod] = {}
        self.pods_made = 0
        self.daemon: Daemon | None = None


class Cluster:
    """See the top of this file. `nodes` are names, with the zone after a colon if they have one ("node1:a").

    `directory` holds `manifests/`, `log/` and the mounted `bpf/`. `under` is a program with its arguments, under which
    every ebpflb of the cluster runs: one that becomes the command that it is given. With `name` given, it must be
    unused so far. `whole_checksums`: what passes the wires is as on a real network, as XDP must have it.
    """

    def __init__(
        self,
        nodes: Sequence[str] = ("node1", "node2"),
        *,
        join: Join = Join.ROUTES,
        cni: Cni = Cni.ROUTED,
        hairpin: bool = False,
        options: Sequence[str] = (),
        under: Sequence[str] = (),
        name: str | None = None,
        whole_checksums: bool = False,
    ) -> None:
        self.name = name or f"ebpflb-{os.getpid()}-{next(_numbers)}"
        self.join = join
        self.cni = cni
        self.hairpin = hairpin  # the bridge plugin's default
        self.options = tuple(options)
        self.under = tuple(under)
        self.whole_checksums = whole_checksums
        self.directory = namespaces.STATE / self.name
        self.bpffs = self.directory / "bpf"
        self.logs = self.directory / "log"
        self.manifests = Manifests(self.directory / "manifests")
        self.cgroup = namespaces.cgroup_root() / self.name
        self.nodes: dict[str, Node] = {}
        self.fabric = Place("fabric", f"{self.name}-fabric", None, network.FABRIC)
        self.outside = Place("outside", f"{self.name}-outside", None, network.OUTSIDE)
        self._processes: list[subprocess.Popen[bytes]] = []
        for index, words in enumerate(nodes, 1):
            node, _, zone = words.partition(":")
            self.nodes[node] = Node(node, f"{self.name}-{node}", self.cgroup / node, index, zone)

    # ---- Life ----

    def __enter__(self) -> Cluster:
        if os.geteuid():
            raise UserError("a cluster of network namespaces can be made by root only: use sudo")
        if found := namespaces.leftovers(self.name):
            raise UserError(f"{self.name} exists already ({found[0]}); remove it first")
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self.remove()
        if left and error is None:
            raise UserError(f"could not remove {'; '.join(left)}")

    def remove(self) -> tuple[str, ...]:
        """Stop every process and remove everything; returns what would not go, one line each."""
        for node in self.nodes.values():
            if node.daemon is not None:
                node.daemon.kill()
        for process in self._processes:
            with suppress(ProcessLookupError):  # gone by itself
                process.kill()
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._processes.clear()
        return namespaces.remove(self.name)

    def leftovers(self) -> tuple[str, ...]:
        """Everything of this cluster that exists, one line each."""
        return namespaces.leftovers(self.name)

    def _make(self) -> None:
        for directory in (self.manifests.directory, self.logs):
            directory.mkdir(parents=True)
        namespaces.mount_bpffs(self.bpffs)
        for place in (self.fabric, self.outside, *self.nodes.values()):
            namespaces.create(place.namespace)
            namespaces.sysctl(place.namespace, network.ALL_SYSCTLS)
        namespaces.sysctl(self.fabric.namespace, network.FABRIC_SYSCTLS)
        namespaces.ip(self.fabric.namespace, network.fabric(self.outside.namespace))
        namespaces.ip(self.outside.namespace, network.outside())
        self._wired(self.outside, "outside")
        for node in self.nodes.values():
            self._make_node(node)
        self.manifests.write(
            "nodes",
            *(
                node_manifest(node.name, node.addresses, node.zone, network.pod_cidrs(node.index))
                for node in self.nodes.values()
            ),
        )

    def _make_node(self, node: Node) -> None:
        node.node_cgroup.mkdir(parents=True)
        namespaces.sysctl(node.namespace, network.NODE_SYSCTLS)
        namespaces.ip(self.fabric.namespace, network.plug(node.index, node.namespace))
        self._wired(node, network.port(node.index))
        lines = network.node(node.index)
        peers = [peer.index for peer in self.nodes.values()]
        if self.cni is Cni.BRIDGE:
            lines += network.cni0(node.index, self.pod_mtu)
        if self.join is Join.VXLAN:
            lines += network.vxlan(node.index, peers, self.pod_mtu)
        else:
            lines += network.plain_routes(node.index, peers)
        namespaces.ip(node.namespace, lines)
        if self.join is Join.VXLAN:
            namespaces.bridge(node.namespace, network.vxlan_forwarding(node.index, peers))
            namespaces.nft(node.namespace, network.masquerade())

    def _wired(self, place: Place, port: str) -> None:
        """A wire is there from `place` to this port of the fabric."""
        if self.whole_checksums:
            namespaces.whole_checksums(place.namespace, "eth0")
            namespaces.whole_checksums(self.fabric.namespace, port)

    # ---- Pods ----

    @property
    def pod_mtu(self) -> int:
        """What fits between two nodes."""
        return MTU - (network.VXLAN_OVERHEAD if self.join is Join.VXLAN else 0)

    @property
    def pods(self) -> Mapping[str, Pod]:
        """All pods by name."""
        return {pod.name: pod for node in self.nodes.values() for pod in node.pods.values()}

    def add_pod(self, node: str, name: str, *, sandboxed: bool = False) -> Pod:
        """A new pod, reachable at once. Names are unique in the cluster, at most 10 characters long."""
        if name in self.pods or len(name) > 10:
            raise UserError(f"pod {name}: the name is taken or longer than 10 characters")
        home = self.nodes[node]
        addresses = network.pod_addresses(home.index, home.pods_made)
        home.pods_made += 1
        namespace = f"{self.name}-pod-{name}"
        pod = Pod(name, namespace, None if sandboxed else home.node_cgroup, addresses, home)
        namespaces.create(namespace)
        namespaces.sysctl(namespace, network.ALL_SYSCTLS)
        if self.cni is Cni.ROUTED:
            namespaces.ip(home.namespace, network.routed_pod(pod.device, namespace, addresses, self.pod_mtu))
            namespaces.sysctl(home.namespace, network.routed_pod_sysctls(pod.device))
            namespaces.ip(namespace, network.routed_pod_inside(addresses))
        else:
            namespaces.ip(home.namespace, network.bridged_pod(pod.device, namespace, self.pod_mtu, self.hairpin))
            namespaces.ip(namespace, network.bridged_pod_inside(home.index, addresses))
        if self.whole_checksums:
            namespaces.whole_checksums(namespace, "eth0")
        home.pods[name] = pod
        return pod

    def remove_pod(self, name: str) -> None:
        """A pod goes, with its wire and whatever runs in it."""
        pod = self.pods[name]
        del pod.node.pods[name]
        namespaces.ip(pod.node.namespace, [f"link delete {pod.device}"])
        namespaces.delete(pod.namespace)

    def route(self, node: str, *cidrs: str) -> None:
        """Let the network between the machines bring these addresses to a node, as a load balancer would."""
        addresses = self.nodes[node].addresses
        lines = [f"route replace {cidr} via {addresses[':' in cidr]}" for cidr in cidrs]
        namespaces.ip(self.fabric.namespace, lines)

    # ---- Programs ----

    def spawn(self, where: Place, argv: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a program somewhere; `options` are Popen's. It ends with the cluster at the latest."""
        process = namespaces.spawn(where.namespace, where.cgroup, argv, **options)
        self._processes.append(process)
        return process

    def run(
        self, where: Place, argv: Sequence[str], timeout: float = 30, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program somewhere to its end, at most `timeout` seconds long; its output is text."""
        with namespaces.spawn(
            where.namespace, where.cgroup, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(argv, process.returncode, output.decode(), errors.decode())

    # ---- Daemons ----

    def pins(self, node: str) -> Path:
        """Where a node's daemon pins what it loads."""
        return self.bpffs / node

    def log(self, node: str) -> Path:
        """What a node's daemons have written so far, one after the other."""
        return self.logs / f"{node}.log"

    def target(self, node: str) -> tuple[str, ...]:
        """The options by which a command speaks of a node's dataplane."""
        home = self.nodes[node]
        return ("--cgroup", str(home.node_cgroup), "--bpffs", str(self.pins(node)))

    def ebpflb(self, node: str, *words: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run an `ebpflb` command on a node."""
        argv = [*self.under, sys.executable, "-m", "ebpflb", *words]
        return self.run(self.nodes[node], argv, timeout, environment())

    def daemon_options(self, node: str) -> tuple[str, ...]:
        """The options by which a node's daemon runs; `plan` and `verify` take those that routes are made by."""
        return (
            *("--manifests", str(self.manifests.directory), "--node-name", node, *self.target(node)),
            *("--cluster-cidr", ",".join(network.POD_CIDRS), *self.options),
        )

    def start_daemon(self, node: str, *options: str) -> Daemon:
        """Start a node's daemon; does not wait for it. `options` go before those that it always has."""
        home = self.nodes[node]
        if home.daemon is not None:
            home.daemon.kill()
        argv = (*self.daemon_options(node), *options)
        home.daemon = Daemon(home.namespace, home.node_cgroup, argv, self.log(node), self.under)
        return home.daemon

    def start_daemons(self, names: Iterable[str] | None = None, seconds: float = 30) -> None:
        """Start the daemons of these nodes (None: of all), and wait until each carries what the manifests say."""
        daemons = [self.start_daemon(name) for name in (self.nodes if names is None else names)]
        deadline = time.monotonic() + seconds
        for daemon in daemons:
            daemon.wait_ready(max(0.1, deadline - time.monotonic()))
