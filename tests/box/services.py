"""Services of the box: where they are, what they are, and what they become.

Rules of this file: a change is in force on all nodes when it returns (`write` and `prepare` excepted). Addresses follow
tests/world.py and end in the Service's number; backends are named by their places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from ebpflb.demo.cluster import Cluster, Place
from ebpflb.demo.manifests import Manifest
from tests.box.clients import Target
from tests.box.objects import Member, Port, endpoint_slice, service
from tests.world import v6

TARGET = 8080
OTHER = 8081
# Prefixes of virtual addresses, and the node that the network brings them to.
CLUSTER_IPS, EXTERNAL_IPS = "172.30.0", "192.168.99"
LOAD_BALANCER_IPS = {"node1": "1.2.3", "node2": "5.6.7", "node3": "9.10.11"}
NODE_PORTS = 30_000

WEB = (Port(80, "TCP", "http", target=TARGET), Port(80, "UDP", "http-udp", target=TARGET))


class Home(Protocol):
    """What a Service needs of its box."""

    cluster: Cluster

    def settle(self) -> None:
        """Wait until all nodes hold what the manifests say."""

    def address(self, name: str, family: str) -> str:
        """A place's address."""

    def place(self, name: str) -> Place:
        """By its name."""

    def node_of(self, name: str) -> str:
        """The node that a place is on."""


def in_family(address: str, family: str) -> str:
    """An address of the convention, in `ipv4` or `ipv6`."""
    return v6(address) if family == "ipv6" else address


class ServiceInBox:
    """One Service with its endpoints, dual-stack. Each change is in force on all nodes when it returns."""

    def __init__(
        self, box: Home, number: int, name: str, ports: Sequence[Port], backends: Iterable[str | Member],
        kinds: frozenset[str], spec: dict[str, object],
    ) -> None:  # fmt: skip
        self.name = name
        self.number = number
        self.ports = tuple(ports)
        self.kinds = kinds
        self.spec = spec
        self.annotations: dict[str, str] = {}
        self.backends = tuple(backends)
        self.headless_slices: tuple[Manifest, ...] = ()
        self._box = box

    # ---- Where it is ----

    def cluster_ip(self, family: str, port: int | None = None) -> Target:
        """Its ClusterIP at its first port, or at `port`."""
        return Target(in_family(f"{CLUSTER_IPS}.{self.number}", family), port or self.ports[0].port)

    def external_ip(self, family: str) -> Target:
        """Its external IP, which the network brings to node1."""
        return Target(in_family(f"{EXTERNAL_IPS}.{self.number}", family), self.ports[0].port)

    def load_balancer(self, family: str, node: str = "node1") -> Target:
        """Its load balancer address that the network brings to `node`."""
        return Target(in_family(f"{LOAD_BALANCER_IPS[node]}.{self.number}", family), self.ports[0].port)

    def node_port(self, node: str, family: str, index: int = 0) -> Target:
        """A node's address, at the node port of its first port, or of that with this index."""
        return Target(self._box.address(node, family), self.node_port_number(index))

    def node_port_number(self, index: int = 0) -> int:
        """The node port of the port with this index; ports of one number and several protocols share theirs."""
        first = next(i for i, port in enumerate(self.ports) if port.port == self.ports[index].port)
        return NODE_PORTS + self.number * 8 + first

    # ---- What it is ----

    def endpoints(self, *backends: str | Member) -> None:
        """Its endpoints are now these: names of places, or members of a slice."""
        self.backends = backends
        self.apply()

    def change(self, kinds: Iterable[str] | None = None, ports: Sequence[Port] | None = None, **spec: object) -> None:
        """Change its kinds, ports or fields of its spec; None removes a field."""
        self.kinds = self.kinds if kinds is None else frozenset(kinds)
        self.ports = self.ports if ports is None else tuple(ports)
        self.spec = {key: value for key, value in {**self.spec, **spec}.items() if value is not None}
        self.apply()

    def annotate(self, **annotations: str | None) -> None:
        """Change its annotations below `ebpflb/`; None removes one."""
        changed = {**self.annotations, **{f"ebpflb/{name}": value for name, value in annotations.items()}}
        self.annotations = {name: value for name, value in changed.items() if value is not None}
        self.apply()

    def apply(self) -> None:
        """Write it and its endpoints, and wait until all nodes are so."""
        self.write()
        self._box.settle()

    def delete(self) -> None:
        """Remove it and its endpoints, and wait until all nodes are so."""
        self._box.cluster.manifests.remove(self.name)
        self._box.settle()

    def write(self) -> None:
        """Write it without waiting."""
        self._box.cluster.manifests.write(self.name, self.manifest(), *self.slices())

    def manifest(self) -> Manifest:
        """The Service."""
        spec: dict[str, object] = {"type": "ClusterIP", **self.spec}
        ports = self.ports
        if self.kinds & {"NodePort", "LoadBalancer"}:
            spec["type"] = "LoadBalancer" if "LoadBalancer" in self.kinds else "NodePort"
            ports = tuple(
                Port(port.port, port.protocol, port.name, self.node_port_number(index), port.target)
                for index, port in enumerate(self.ports)
            )
        if "ExternalIP" in self.kinds:
            spec["externalIPs"] = [self.external_ip(family).address for family in ("ipv4", "ipv6")]
        if "ExternalName" in self.kinds:
            return service(self.name, (), (), {"type": "ExternalName", "externalName": "example.com"})
        addresses = [self.cluster_ip(family).address for family in ("ipv4", "ipv6")]
        found = service(self.name, ports, addresses, spec, self.annotations)
        if "LoadBalancer" in self.kinds:
            ingress = [
                {"ip": self.load_balancer(family, node).address}
                for node in LOAD_BALANCER_IPS
                for family in ("ipv4", "ipv6")
            ]
            found["status"] = {"loadBalancer": {"ingress": ingress}}
        return found

    def slices(self) -> tuple[Manifest, ...]:
        """Its EndpointSlices, one for each family."""
        if self.headless_slices:
            return self.headless_slices
        members = [self.member(backend) for backend in self.backends]
        return tuple(
            endpoint_slice(self.name, self.ports, found)
            for version in (4, 6)
            if (found := [each[version == 6] for each in members])
        )

    def member(self, backend: str | Member) -> tuple[Member, Member]:
        """A backend in both families."""
        if isinstance(backend, str):
            backend = ready(backend)
        place = self._box.place(backend.address)
        node = self._box.node_of(backend.address)
        found = [msgspec.structs.replace(backend, address=address, node=node) for address in place.addresses]
        return found[0], found[1]


def ready(place: str, *, zones: tuple[str, ...] = (), nodes: tuple[str, ...] = ()) -> Member:
    """An endpoint that serves; the box turns the place's name into its addresses."""
    return Member(place, zones=zones, nodes=nodes)


def unready(place: str) -> Member:
    """An endpoint whose probe fails."""
    return Member(place, ready=False)


def leaving(place: str) -> Member:
    """An endpoint that terminates and still serves."""
    return Member(place, ready=False, serving=True, terminating=True)


def dying(place: str) -> Member:
    """An endpoint that terminates and serves no more."""
    return Member(place, ready=False, serving=False, terminating=True)
