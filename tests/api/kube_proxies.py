"""Real kube-proxies in iptables mode, each on a node of its own, all of one cluster.

    the fabric    192.168.0.1   etcd, kube-apiserver
    each node     a namespace with the addresses of node1, node2 or node3, a way to the fabric, and nothing behind it

Rules of this file: a kube-proxy's options follow from the same ProxyOptions that the policy gets. What it has written
is read once it has everything: `saved` waits for that, and takes no time for granted. Nothing of the machine is touched
but namespaces of its own: kube-proxy is told to leave what all namespaces share (conntrack's size, its own OOM score).
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from ebpflb.demo import namespaces
from ebpflb.model import DetectLocal, ProxyOptions, Snapshot
from ebpflb.source.local import look
from tests.api.client import Object
from tests.api.control_plane import ADVERTISED, PATIENCE, ControlPlane, Program, until
from tests.api.follower import fresh
from tests.api.objects import node as node_object
from tests.api.objects import put_node
from tests.plan.worlds import BRIDGE_IP, SECOND_IP
from tests.world import NODE_IP, OTHER_NODE_IP, v6

THIRD_NODE_IP = "192.168.0.4"

# The Node objects: node3 has no IPv6 address as far as Kubernetes knows, and no zone.
NODES: dict[str, tuple[tuple[str, ...], str]] = {
    "node1": ((NODE_IP, v6(NODE_IP)), "zone-a"),
    "node2": ((OTHER_NODE_IP, v6(OTHER_NODE_IP)), "zone-b"),
    "node3": ((THIRD_NODE_IP,), ""),
}
_MORE = {"node1": (SECOND_IP, BRIDGE_IP)}  # what only the kernel knows of
_SENTINEL = "all-is-there"

# kube-proxy 1.36 asks for its node's labels before it has said who is to hear of them. Where the answer comes in
# between, nobody does, and it goes on without a zone for as long as it runs: then it is started again. Otherwise it
# takes some seconds from its first rules to those that heed its zone.
_UNAWARE_SECONDS = 30.0


class Proxy(NamedTuple):
    """One kube-proxy: `name` says what is special about it."""

    name: str
    node: str
    options: ProxyOptions


class KubeProxies:
    """See the top of this file. `programs` are paths by name."""

    def __init__(self, programs: dict[str, Path], proxies: Sequence[Proxy]) -> None:
        self._program = programs["kube-proxy"]
        self._prefix = f"kube-proxies-{os.getpid()}"
        self._fabric = f"{self._prefix}-fabric"
        control = {name: programs[name] for name in ("etcd", "kube-apiserver")}
        self.proxies = {proxy.name: proxy for proxy in proxies}
        self._make_control: Callable[[], ControlPlane] = lambda: ControlPlane(control, namespace=self._fabric)
        self._running: dict[str, Program] = {}

    def __enter__(self) -> KubeProxies:
        with ExitStack() as stack:
            stack.callback(self._remove)
            namespaces.create(self._fabric)
            namespaces.ip(self._fabric, [f"addr add {ADVERTISED}/32 dev lo"])
            for number, proxy in enumerate(self.proxies.values(), 1):
                self._make_node(number, proxy)
            self.control = stack.enter_context(self._make_control())
            for name, (addresses, zone) in NODES.items():
                made = node_object(name, *addresses, zone=zone)
                cidrs = [f"10.0.{name[-1]}.0/24", v6(f"10.0.{name[-1]}.0/24")]
                made["spec"] = {"podCIDR": cidrs[0], "podCIDRs": cidrs}
                put_node(self.control.api, made)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def load(self, services: Sequence[Object], slices: Sequence[Object]) -> None:
        """What the cluster has; and last of all something that shows when a kube-proxy has everything."""
        self.control.load("services/specs", [*services, _sentinel_service()])
        self.control.load("endpointslices", [*slices, *(_sentinel_slice(family) for family in ("IPv4", "IPv6"))])

    def start(self) -> None:
        """All of them."""
        kubeconfig = self.control.kubeconfig(self.control.directory / "kube-proxy.kubeconfig")
        for proxy in self.proxies.values():
            argv = [str(self._program), f"--kubeconfig={kubeconfig}", *arguments(proxy)]
            log = self.control.directory / f"kube-proxy-{proxy.name}.log"
            self._running[proxy.name] = Program("kube-proxy", argv, log, self._namespace(proxy))
            self._running[proxy.name].start()

    def saved(self, name: str) -> dict[bool, str]:
        """The rules of one that has everything, by whether they are IPv6."""
        proxy, program = self.proxies[name], self._running[name]
        found: dict[bool, str] = {}
        unaware: float | None = None  # since when it has everything but its own zone

        def probe() -> bool:
            nonlocal unaware
            assert program.running, f"kube-proxy {name} has ended:\n{program.tail(20)}"
            missing = []
            for version6 in (False, True):
                if version6 not in found:
                    text = self._save(proxy, version6)
                    if (endpoints := _sentinel_endpoints(text)) == (1 if NODES[proxy.node][1] else 2):
                        found[version6] = text
                    else:
                        missing.append(endpoints)
            if missing != [2, 2]:
                unaware = None
            elif unaware is None:
                unaware = time.monotonic()
            elif time.monotonic() - unaware > _UNAWARE_SECONDS:
                program.kill()
                program.start()
                unaware = None
            return len(found) == 2

        # All of them write thousands of rules at once, on the processors that there are.
        until(f"kube-proxy {name} has written everything", probe, 3 * PATIENCE)
        return found

    def snapshot(self, name: str) -> Snapshot:
        """What the same API server and the same kernel say to us on that node."""
        proxy = self.proxies[name]
        said = fresh(self.control.api, proxy.node)
        with namespaces.inside(self._namespace(proxy)):
            local = look()
        node = msgspec.structs.replace(said.node, addresses=local.addresses, primary=said.node.primary or local.primary)
        return Snapshot(said.services, said.slices, node)

    def log(self, name: str) -> str:
        """What one of them said last."""
        return self._running[name].tail() if name in self._running else ""

    def _namespace(self, proxy: Proxy) -> str:
        return f"{self._prefix}-{proxy.name}"

    def _save(self, proxy: Proxy, version6: bool) -> str:
        enter = ["nsenter", f"--net={namespaces.path_of(self._namespace(proxy))}"]
        command = "ip6tables-save" if version6 else "iptables-save"
        return subprocess.run([*enter, command], capture_output=True, text=True, check=True).stdout

    def _make_node(self, number: int, proxy: Proxy) -> None:
        namespace, way = self._namespace(proxy), f"172.31.{number}"
        namespaces.create(namespace)
        namespaces.ip(
            self._fabric,
            [
                f"link add to{number} type veth peer name uplink netns {namespace}",
                f"link set to{number} addrgenmode none up",
                f"addr add {way}.1/30 dev to{number}",
            ],
        )
        addresses = [*NODES[proxy.node][0], *_MORE.get(proxy.node, ())]
        addresses += [v6(each) for each in addresses if ":" not in each and v6(each) not in addresses]
        namespaces.ip(
            namespace,
            [
                "link set uplink addrgenmode none up",
                f"addr add {way}.2/30 dev uplink",
                f"route add {ADVERTISED} via {way}.1",
                "link add name node0 type bridge",
                "link set node0 addrgenmode none up",
                *(f"addr add {each}{'/128 nodad' if ':' in each else '/32'} dev node0" for each in addresses),
            ],
        )

    def _remove(self) -> None:
        for program in self._running.values():
            program.kill()
        for proxy in self.proxies.values():
            namespaces.delete(self._namespace(proxy))
        namespaces.delete(self._fabric)


def arguments(proxy: Proxy) -> list[str]:
    """The options of a kube-proxy that is to do what the policy does with the same ones."""
    options = proxy.options
    found = [
        "--proxy-mode=iptables", f"--hostname-override={proxy.node}",
        f"--masquerade-all={_bool(options.masquerade_all)}",
        f"--iptables-localhost-nodeports={_bool(options.localhost_nodeports)}",
        f"--detect-local-mode={options.detect_local.value}",
        "--iptables-min-sync-period=0s", "--healthz-bind-address=", "--oom-score-adj=0",
        "--conntrack-max-per-core=0", "--conntrack-min=0", "--conntrack-tcp-timeout-established=0s",
        "--conntrack-tcp-timeout-close-wait=0s", "--v=2",
    ]  # fmt: skip
    if options.cluster_cidrs:
        found.append(f"--cluster-cidr={','.join(options.cluster_cidrs)}")
    if options.detect_local is DetectLocal.BRIDGE_INTERFACE:
        found.append(f"--pod-bridge-interface={options.bridge_interface}")
    if options.detect_local is DetectLocal.INTERFACE_NAME_PREFIX:
        found.append(f"--pod-interface-name-prefix={options.interface_name_prefix}")
    addresses = "primary" if options.nodeport_primary else ",".join(options.nodeport_addresses)
    if addresses:
        found.append(f"--nodeport-addresses={addresses}")
    return found


def _bool(value: bool) -> str:
    return str(value).lower()


# ---- What shows that everything has arrived ----


def _sentinel_service() -> Object:
    spec = {
        "type": "ClusterIP",
        "ports": [{"protocol": "TCP", "port": 80, "targetPort": 80}],
        "clusterIP": "10.96.0.99",
        "clusterIPs": ["10.96.0.99", "fd00:10:96::99"],
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "RequireDualStack",
        "internalTrafficPolicy": "Cluster",
        "sessionAffinity": "None",
    }
    metadata = {"namespace": "default", "name": _SENTINEL}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": {"loadBalancer": {}}}


def _sentinel_slice(family: str) -> Object:
    """An endpoint for each zone: kube-proxy learns its own only after its first rules."""

    def endpoint(address: str, zone: str) -> Object:
        written = v6(address) if family == "IPv6" else address
        return {"addresses": [written], "conditions": {"ready": True}, "hints": {"forZones": [{"name": zone}]}}

    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default",
            "name": f"{_SENTINEL}-{family.lower()}",
            "labels": {"kubernetes.io/service-name": _SENTINEL},
        },
        "addressType": family,
        "endpoints": [endpoint("10.9.9.1", "zone-a"), endpoint("10.9.9.2", "zone-b")],
        "ports": [{"name": "", "protocol": "TCP", "port": 80}],
    }


def _sentinel_endpoints(text: str) -> int:
    """How many endpoints these rules have for the last Service of the list: those of all zones, or of one's own."""
    digest = hashlib.sha256(f"default/{_SENTINEL}tcp".encode()).digest()
    chain = f"-A KUBE-SVC-{base64.b32encode(digest).decode()[:16]} "
    return sum(line.startswith(chain) and "-j KUBE-SEP-" in line for line in text.splitlines())
