"""The cluster in a box: three nodes with pods, an outside client, echo servers everywhere, and Services to ask.

    node1 (zone a)  a1 a2 and sa         node2 (zone a)  b1 b2 and sb        node3 (zone b)  c1 and sc

Pods whose names begin with s are sandboxed: their sockets pass no socket program, so that their packets are translated
on the way; so are those of `outside`, and all where there are no socket programs. Every place serves on TARGET and
OTHER, over TCP and UDP.

Rules of this file: whatever changes Services waits until every node's kernel holds exactly what the policy makes of the
manifests; so nothing here or in a test sleeps, and an expectation holds at once or is wrong. Addresses follow
tests/world.py; the network brings 172.30.0.0/16, 192.168.99.0/24 and 1.2.3.0/24 to node1, 5.6.7.0/24 to node2 and
9.10.11.0/24 to node3, as routes to load balancers would.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import msgspec

from ebpflb.dataplane.limits import limited
from ebpflb.decide import Decision, Outcome, Packet, decide
from ebpflb.demo.cluster import Cluster, Node, Place
from ebpflb.demo.network import Cni, Join
from ebpflb.model import Protocol
from ebpflb.routes import RouteTable, in_cidr
from tests.box.clients import Clients, Target
from tests.box.expect import Expectation
from tests.box.kernel import Kernel
from tests.box.modes import BPF, Mode
from tests.box.objects import Member, Port
from tests.box.servers import Servers
from tests.box.services import (
    CLUSTER_IPS,
    EXTERNAL_IPS,
    LOAD_BALANCER_IPS,
    OTHER,
    TARGET,
    WEB,
    ServiceInBox,
)
from tests.box.sockets import Sockets
from tests.box.wires import answer_xdp
from tests.pace import PACE
from tests.world import v6

SLO = 30.0 * PACE  # seconds from a changed manifest to the kernels of all nodes; far more than it takes
START = 60.0 * PACE  # seconds until daemons are ready; where nothing is cached yet, three compile at once

PODS = {"node1": ("a1", "a2", "sa"), "node2": ("b1", "b2", "sb"), "node3": ("c1", "sc")}
NODES = ("node1:a", "node2:a", "node3:b")
PROTOCOLS = ("TCP", "UDP")
LOOPBACKS = ("127.0.0.1", "::1")


class Box:
    """See the top of this file."""

    def __init__(
        self, mode: Mode = BPF, cni: Cni = Cni.ROUTED, join: Join = Join.ROUTES, nodes: Sequence[str] = NODES,
        options: Sequence[str] = (), hairpin: bool = False,
    ) -> None:  # fmt: skip
        self.mode = mode
        options = (*mode.options, *options)
        self.cluster = Cluster(
            nodes, cni=cni, join=join, options=options, under=mode.under, hairpin=hairpin, whole_checksums=mode.xdp
        )
        self.modes = dict.fromkeys(self.cluster.nodes, mode)  # as each node's daemon was last started
        self.services: dict[str, ServiceInBox] = {}
        self.expectations: list[Expectation] = []
        self.wanted: dict[str, RouteTable] = {}  # by node, as of the last `settle`
        self._stack = ExitStack()
        self._numbers = 0
        self._client_ports = itertools.count(10_000)

    def __enter__(self) -> Box:
        with ExitStack() as stack:
            stack.enter_context(self.cluster)
            self.sockets = stack.enter_context(Sockets(self.cluster))
            self.servers = stack.enter_context(Servers(self.sockets))
            self.clients = Clients(self.sockets)
            self.kernel = stack.enter_context(Kernel(self.cluster, self.modes))
            for node in self.cluster.nodes:
                for name in PODS[node]:
                    self.cluster.add_pod(node, name, sandboxed=name.startswith("s"))
            for name in (*self.cluster.nodes, *self.cluster.pods, "outside"):
                for port in (TARGET, OTHER):
                    self.servers.serve(self.place(name), port)
            self._route()
            if self.mode.xdp:
                answer_xdp(self.cluster.fabric.namespace, len(self.cluster.nodes))
            self.cluster.start_daemons(seconds=START)
            self.settle()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _route(self) -> None:
        prefixes = [("node1", f"{CLUSTER_IPS}.0/24"), ("node1", f"{EXTERNAL_IPS}.0/24")]
        prefixes += [(node, f"{prefix}.0/24") for node, prefix in LOAD_BALANCER_IPS.items()]
        for node, cidr in prefixes:
            if node in self.cluster.nodes:
                self.cluster.route(node, cidr, v6(cidr.removesuffix("/24")) + "/64")

    # ---- Where things are ----

    def place(self, name: str) -> Place:
        """A node, a pod or the outside client."""
        if name == "outside":
            return self.cluster.outside
        return self.cluster.nodes.get(name) or self.cluster.pods[name]

    def address(self, name: str, family: str) -> str:
        """A place's address."""
        return self.place(name).addresses[family == "ipv6"]

    def name_of(self, address: str) -> str:
        """Of the place with this address; the address itself if there is none."""
        places = (self.cluster.outside, *self.cluster.nodes.values(), *self.cluster.pods.values())
        return next((place.name for place in places if address in place.addresses), address)

    def addresses_of(self, name: str) -> frozenset[str]:
        """Every address that a place has, in both families; of a node those of its bridge and overlay too."""
        place = self.place(name)
        return self.kernel.addresses(name) if isinstance(place, Node) else frozenset(place.addresses)

    def node_of(self, name: str) -> str:
        """The node that a place is on."""
        return name if name in self.cluster.nodes else self.cluster.pods[name].node.name

    def control(self, client: str, family: int) -> tuple[str, Target]:
        """A server that a client reaches without any Service."""
        server = "node2" if client != "node2" else "node1"
        return server, Target(self.address(server, f"ipv{family}"), OTHER)

    def client_port(self) -> int:
        """A port for a client to bind that no test before used: what is left of such flows is no concern of others."""
        return next(self._client_ports)

    def direct(self, name: str, family: str) -> Target:
        """A place's own server, by no Service."""
        return Target(self.address(name, family), OTHER)

    def drops(self, node: str) -> int:
        """How much a node has dropped so far by a verdict, at a socket or as a packet."""
        return self.kernel.drops(node)

    # ---- Services ----

    def service(
        self, *backends: str | Member, ports: Sequence[Port] = WEB, kinds: Iterable[str] = (), name: str = "",
        **spec: object,
    ) -> ServiceInBox:  # fmt: skip
        """A Service that is in force on all nodes. `kinds` of NodePort, LoadBalancer, ExternalIP, ExternalName; a
        ClusterIP it always has. `spec` has further fields by their Kubernetes names."""
        found = self.prepare(*backends, ports=ports, kinds=kinds, name=name, **spec)
        found.apply()
        return found

    def prepare(
        self, *backends: str | Member, ports: Sequence[Port] = WEB, kinds: Iterable[str] = (), name: str = "",
        **spec: object,
    ) -> ServiceInBox:  # fmt: skip
        """As `service`, but written nowhere yet."""
        self._numbers = self._numbers % 250 + 1
        name = name or f"svc{self._numbers}"
        found = ServiceInBox(self, self._numbers, name, ports, backends, frozenset(kinds), dict(spec))
        self.services[name] = found
        return found

    def settle(self, nodes: Iterable[str] | None = None, seconds: float = SLO) -> None:
        """Wait until these nodes' kernels (None: all) hold exactly what policy makes of the manifests, and no daemon is
        still at it."""
        deadline = time.monotonic() + seconds
        for node in self.cluster.nodes if nodes is None else nodes:
            wanted = self.wanted[node] = self.kernel.wanted(node)
            pause = 0.002  # longer each time: to read rules costs as much as the daemon needs to write them
            while (held := self.kernel.held(node)) != wanted:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{node} does not hold what it should:\n{_difference(wanted, held)}")
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            if self.daemon_runs(node):
                self.kernel.settled(node)

    @contextmanager
    def tidy(self) -> Iterator[None]:
        """What the block adds is removed after it; expectations that it did not check are an error."""
        try:
            yield
            unchecked, self.expectations = self.expectations, []
            assert not unchecked, "expectations were not checked: box.check() is missing"
        finally:
            self.expectations.clear()
            for name in self.services:
                self.cluster.manifests.remove(name)
            self.services.clear()
            self.settle(node for node in self.cluster.nodes if self.daemon_runs(node))

    def switch(self, node: str, mode: Mode) -> None:
        """End a node's daemon, and start another one that serves in this mode; returns when it does."""
        daemon = self.cluster.nodes[node].daemon
        assert daemon is not None and daemon.stop() == 0
        self.modes[node] = mode
        self.cluster.under = mode.under
        self.cluster.start_daemon(node, *mode.options).wait_ready(START)
        self.settle([node])

    def daemon_runs(self, node: str) -> bool:
        """Whether a node's daemon is there."""
        daemon = self.cluster.nodes[node].daemon
        return daemon is not None and daemon.running

    # ---- Expectations ----

    def expect(self, client: str, to: Target) -> Expectation:
        """See expect.py; nothing is tried before `check`."""
        self.expectations.append(Expectation(self, client, to, PROTOCOLS))
        return self.expectations[-1]

    def check(self) -> None:
        """Try all that is expected so far."""
        expectations, self.expectations = self.expectations, []
        assert expectations, "nothing is expected"
        lines = [line for expectation in expectations for line in expectation.run()]
        wrong = [line for line in lines if line.startswith("WRONG")]
        if wrong:
            raise AssertionError("\n".join(lines))

    def may_not_send(self, client: str, verdict: Outcome) -> bool:
        """Whether this client's own kernel fails what it sends in vain: a node's, where rules say so to its own."""
        if client not in self.cluster.nodes:
            return False
        dataplane = self.modes[client].dataplane
        return limited(dataplane, "own-datagrams") or (verdict is Outcome.DROP and limited(dataplane, "own-drops"))

    def first_decision(self, client: str, to: Target, protocol: str) -> Decision:
        """What the reference says at the node where this client's packet is first looked at."""
        node = self._entry(to.address) if client == "outside" else self.node_of(client)
        packet = Packet(self.place(client).addresses[":" in to.address], to.address, to.port, Protocol[protocol])
        if to.address in LOOPBACKS and client not in self.cluster.nodes:  # the pod's own
            packet = msgspec.structs.replace(packet, destination="0.0.0.0")
        return decide(self.wanted[node], packet)

    def _entry(self, address: str) -> str:
        """The node to which the network brings a packet from outside."""
        for name, node in self.cluster.nodes.items():
            if address in node.addresses:
                return name
        for name, prefix in LOAD_BALANCER_IPS.items():
            if in_cidr(address, f"{prefix}.0/24") or in_cidr(address, v6(f"{prefix}.0") + "/64"):
                return name
        return "node1"


def _difference(wanted: RouteTable, held: RouteTable) -> str:
    lines = []
    for key in sorted({*wanted, *held}, key=str):
        if wanted.get(key) != held.get(key):
            lines += [f"{key[0]} {key[1].name}", f"  wanted {wanted.get(key)}", f"  held   {held.get(key)}"]
    if wanted.locality != held.locality:
        lines += [f"  wanted {wanted.locality}", f"  held   {held.locality}"]
    return "\n".join(lines)
