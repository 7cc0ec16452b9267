"""A cluster of two nodes that is quick to make on an emulated machine, and Services of every protocol in it.

    node1: a1, and sa, which no socket program sees       node2: b1, which serves       and a client outside

Rules of this file: it is set up once and never changed. Servers say who asks, over TCP, UDP and SCTP.
"""

from __future__ import annotations

import itertools
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Cluster, Place
from ebpflb.demo.network import Cni, Join
from tests.box.modes import Mode
from tests.box.objects import Member, Port, endpoint_slice, service
from tests.box.sockets import Sockets
from tests.pace import PACE
from tests.world import v6

PROTOCOLS = {
    "TCP": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "UDP": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "SCTP": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
PORT, TARGET, NODE_PORT, MAPPED_NODE_PORT, EMPTY_NODE_PORT = 80, 8080, 30080, 30081, 30090
CLUSTER_IPS = {"web": "172.30.0.1", "doors": "172.30.0.2", "mapped": "172.30.0.3", "empty": "172.30.0.4"}
PATIENCE = 3.0 * PACE
SILENCE = 0.25 * PACE  # an answer takes less than one hundredth of that


class Refused(Exception):
    """The client was told at once that nobody serves."""


class Small:
    """The cluster in one proxy mode. `web` is served by b1 on the ClusterIP's own port, `doors` on the node port's own;
    `mapped` on another one than either; `empty` by nobody."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.cluster = Cluster(("node1", "node2"), cni=Cni.ROUTED, join=Join.ROUTES, options=mode.options)

    @contextmanager
    def running(self) -> Iterator[Small]:
        """With its daemons done with their first sync."""
        with self.cluster:
            self.cluster.add_pod("node1", "a1")
            self.cluster.add_pod("node1", "sa", sandboxed=True)
            server = self.cluster.add_pod("node2", "b1")
            with _serving(server, PORT, TARGET, NODE_PORT), Sockets(self.cluster) as self._sockets:
                self._write(server)
                self.cluster.start_daemons(seconds=30 * PACE)
                yield self

    def _write(self, server: Place) -> None:
        self._service("web", PORT, 0, server)
        self._service("doors", NODE_PORT, NODE_PORT, server)
        self._service("mapped", TARGET, MAPPED_NODE_PORT, server)
        self._service("empty", TARGET, EMPTY_NODE_PORT)

    def _service(self, name: str, target: int, node_port: int, *servers: Place) -> None:
        ports = [Port(PORT, protocol, protocol.lower(), node_port, target) for protocol in PROTOCOLS]
        addresses = [self.address(name, family) for family in FAMILIES]
        found = service(name, ports, addresses, {"type": "NodePort" if node_port else "ClusterIP"})
        slices = [
            endpoint_slice(name, ports, [Member(server.addresses[version], "node2") for server in servers])
            for version in (0, 1)
            if servers
        ]
        self.cluster.manifests.write(name, found, *slices)

    def place(self, name: str) -> Place:
        """A node, a pod or the outside client."""
        if name == "outside":
            return self.cluster.outside
        return self.cluster.nodes.get(name) or self.cluster.pods[name]

    def address(self, name: str, family: str) -> str:
        """Of a place; of a Service its ClusterIP."""
        if name in CLUSTER_IPS:
            return v6(CLUSTER_IPS[name]) if family == "ipv6" else CLUSTER_IPS[name]
        return self.place(name).addresses[family == "ipv6"]

    def ask(self, client: str, to: str, port: int, protocol: str, family: str, patience: float = PATIENCE) -> str:
        """Ask there; the name of the place whose address the server saw, or that address itself. Raises Refused, or
        TimeoutError if nothing came back."""
        with self._socket(self.place(client), protocol, FAMILIES[family]) as asking:
            asking.settimeout(patience)
            try:
                asking.connect((self.address(to, family), port))
                asking.send(b"who am I?")
                seen = asking.recv(100).decode()
            except (ConnectionRefusedError, ConnectionResetError):
                raise Refused from None
        return self._name_of(seen)

    def _socket(self, place: Place, protocol: str, family: socket.AddressFamily) -> socket.socket:
        if protocol != "SCTP":
            return self._sockets.make(place, family, protocol)
        with namespaces.inside(place.namespace):  # no program at any cgroup is asked about SCTP
            return socket.socket(family, *PROTOCOLS[protocol])

    def _name_of(self, seen: str) -> str:
        places = (*self.cluster.nodes.values(), *self.cluster.pods.values(), self.cluster.outside)
        return next((place.name for place in places if seen in place.addresses), seen)


@contextmanager
def _serving(place: Place, *ports: int) -> Iterator[None]:
    """Servers of every protocol and family at these ports of a place, in a thread of this process."""
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        everywhere = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))
        for protocol, (family, host), port in itertools.product(PROTOCOLS, everywhere, ports):
            with namespaces.inside(place.namespace):
                server = stack.enter_context(socket.socket(family, *PROTOCOLS[protocol]))
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind((host, port))
            if protocol != "UDP":
                server.listen(16)
            selector.register(server, selectors.EVENT_READ, protocol)
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        selector.register(stack.enter_context(theirs), selectors.EVENT_READ, "")
        thread = threading.Thread(target=_serve, args=(selector,))
        thread.start()
        try:
            yield
        finally:
            ours.close()
            thread.join()


def _serve(selector: selectors.BaseSelector) -> None:
    while True:
        for key, _ in selector.select():
            server = key.fileobj
            assert isinstance(server, socket.socket)
            if not key.data:
                return
            if key.data == "UDP":
                _, client = server.recvfrom(100)
                server.sendto(client[0].encode(), client)
            else:
                connection, client = server.accept()
                with connection:
                    connection.settimeout(PATIENCE)
                    with suppress(OSError):  # a client that gave up
                        connection.recv(100)
                        connection.send(client[0].encode())
