"""One node with two pods, and everything else in the world in one namespace beside it, for tests of a dataplane alone.

    node    192.168.0.2, and 10.0.1.254 towards its pods        pod   10.0.1.1, which serves
    world   192.168.0.1, and on its loopback whoever is         peer  10.0.1.9, a client
            outside: 203.0.113.5, pods of node2 (10.0.2.x)

Rules of this file: addresses are those of `tests.world`, in both families. A server says its own address and who asks.
Nothing runs in the node's namespace but what a test starts there.
"""

from __future__ import annotations

import itertools
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, TypeVar

from ebpflb.demo import namespaces
from ebpflb.model import Address, Protocol
from tests.pace import PACE
from tests.world import NODE_IP, OUTSIDE, REMOTE_POD, v6

T = TypeVar("T")

BRIDGE_IP = "10.0.1.254"
GATEWAY = "192.168.0.1"
POD, PEER = "10.0.1.1", "10.0.1.9"
REMOTES = ("10.0.2.1", "10.0.2.2")
PORTS = (80, 8080)
PATIENCE = 3.0 * PACE
SILENCE = 0.3 * PACE
_FRESH_PORTS = range(36_000, 61_000)  # above the node ports

_VIPS = ("172.30.0.0/16", "192.168.99.0/24", "1.2.3.0/24", "5.6.7.0/24")
_KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


class Answer(NamedTuple):
    """Who answered, and whom it saw."""

    server: Address
    client: Address


class Refused(Exception):
    """Told at once that nobody serves."""


class Lab:
    """The namespaces, while it is open. Clients are named by their IPv4 address; "" is the node, by no address."""

    def __init__(self) -> None:
        self.name = f"ebpflb-lab-{os.getpid()}"
        self._places = {
            "": "node",
            NODE_IP: "node",
            POD: "pod",
            PEER: "peer",
            OUTSIDE: "world",
            REMOTE_POD: "world",
            **dict.fromkeys(REMOTES, "world"),
        }
        # Datagrams from a port that the kernel gives out again belong to a flow that has its backend already.
        self._fresh_ports = itertools.cycle(_FRESH_PORTS)

    def namespace(self, place: str) -> str:
        return f"{self.name}-{place}"

    @contextmanager
    def open(self) -> Iterator[Lab]:
        with ExitStack() as stack:
            for place in ("node", "pod", "peer", "world"):
                stack.callback(namespaces.delete, self.namespace(place))
                namespaces.create(self.namespace(place))
            self._wire()
            stack.enter_context(self._serving("pod", (POD,)))
            stack.enter_context(self._serving("world", REMOTES))
            yield self

    def _wire(self) -> None:
        node = self.namespace("node")
        for place in ("node", "pod", "peer", "world"):
            every = {"ipv6/conf/all/accept_dad": 0, "ipv6/conf/default/accept_dad": 0}
            namespaces.sysctl(self.namespace(place), every)
        namespaces.sysctl(node, {"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1})
        # Who is refused more often than some times a second is not told each time.
        namespaces.sysctl(node, {"ipv4/icmp_ratelimit": 0, "ipv6/icmp/ratelimit": 0})
        self._join("world", GATEWAY, "eth0", NODE_IP, 24)
        for place, address in (("pod", POD), ("peer", PEER)):
            self._join(place, address, f"v{place}", BRIDGE_IP, 32)
        world = self.namespace("world")
        namespaces.ip(
            world, [f"addr add {both} dev lo" for each in (OUTSIDE, REMOTE_POD, *REMOTES) for both in (each, v6(each))]
        )
        for cidr in _VIPS:
            namespaces.ip(world, [f"route add {cidr} via {NODE_IP}", f"route add {v6(cidr)} via {v6(NODE_IP)}"])
        namespaces.ip(
            world, [f"route add 10.0.1.0/24 via {NODE_IP}", f"route add {v6('10.0.1.0/24')} via {v6(NODE_IP)}"]
        )
        namespaces.ip(node, [f"route add default via {GATEWAY}", f"route add default via {v6(GATEWAY)}"])

    def _join(self, place: str, address: Address, device: str, node_address: Address, bits: int) -> None:
        """A cable between a place and the node; with 32 bits the place reaches all by the node."""
        there, node = self.namespace(place), self.namespace("node")
        namespaces.ip(there, [f"link add eth0 type veth peer name {device} netns {node}", "link set eth0 up"])
        namespaces.ip(node, [f"link set {device} up"])
        wide = 64 if bits == 24 else 128
        namespaces.ip(node, [f"addr add {node_address}/{bits} dev {device}"])
        namespaces.ip(node, [f"addr add {v6(node_address)}/{wide} dev {device} nodad"])
        namespaces.ip(there, [f"addr add {address}/{bits} dev eth0", f"addr add {v6(address)}/{wide} dev eth0 nodad"])
        if bits == 32:
            namespaces.ip(node, [f"route add {address} dev {device}", f"route add {v6(address)} dev {device}"])
            for gateway in (node_address, v6(node_address)):
                namespaces.ip(there, [f"route add {gateway} dev eth0", f"route add default via {gateway}"])

    def on_node(self, call: Callable[[], T]) -> T:
        """Call in the node's namespace."""
        with namespaces.inside(self.namespace("node")):
            return call()

    def connected(
        self, client: Address, to: Address, port: int, protocol: Protocol = Protocol.TCP, patience: float = PATIENCE
    ) -> socket.socket:
        """A socket of `client`, an address or "", connected there. Raises Refused, or TimeoutError."""
        version6 = ":" in to
        family = socket.AF_INET6 if version6 else socket.AF_INET
        with namespaces.inside(self.namespace(self._places[client])):
            made = socket.socket(family, _KINDS[protocol])
        try:
            made.settimeout(patience)
            own = next(self._fresh_ports) if protocol is Protocol.UDP else 0
            if client or own:
                made.bind((v6(client) if client and version6 else client, own))
            made.connect((to, port))
        except (ConnectionRefusedError, ConnectionResetError):
            made.close()
            raise Refused from None
        except BaseException:
            made.close()
            raise
        return made

    def ask(
        self, client: Address, to: Address, port: int, protocol: Protocol = Protocol.TCP, patience: float = PATIENCE
    ) -> Answer:
        """Who answers there, and whom it sees. Raises Refused, or TimeoutError."""
        with self.connected(client, to, port, protocol, patience) as made:
            return asked(made)

    @contextmanager
    def _serving(self, place: str, addresses: tuple[Address, ...]) -> Iterator[None]:
        with ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            for address in addresses:
                for port in PORTS:
                    for protocol, kind in _KINDS.items():
                        for family, own in ((socket.AF_INET, address), (socket.AF_INET6, v6(address))):
                            with namespaces.inside(self.namespace(place)):
                                server = stack.enter_context(socket.socket(family, kind))
                            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                            server.bind((own, port))
                            if protocol is Protocol.TCP:
                                server.listen(64)
                            selector.register(
                                server, selectors.EVENT_READ, "accept" if protocol is Protocol.TCP else ""
                            )
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            selector.register(stack.enter_context(theirs), selectors.EVENT_READ, "end")
            thread = threading.Thread(target=_serve, args=(selector,))
            thread.start()
            try:
                yield
            finally:
                ours.close()
                thread.join()


def asked(made: socket.socket) -> Answer:
    """Ask over a socket that is connected. Raises Refused, or TimeoutError."""
    try:
        made.send(b"?")
        said = made.recv(200)
    except (ConnectionRefusedError, ConnectionResetError):
        raise Refused from None
    if not said:
        raise Refused
    return Answer(*said.decode().split())


def _serve(selector: selectors.BaseSelector) -> None:
    """Answers each question with the server's address and the client's, as often as it is asked."""
    open_: list[socket.socket] = []
    while True:
        for key, _ in selector.select():
            server = key.fileobj
            assert isinstance(server, socket.socket)
            if key.data == "end":
                for each in open_:
                    each.close()
                return
            if key.data == "accept":
                made, _ = server.accept()
                open_.append(made)
                selector.register(made, selectors.EVENT_READ, "talk")
                continue
            own = server.getsockname()[0]
            if key.data == "talk":
                question = b""
                with suppress(OSError):
                    question = server.recv(100)
                if not question:
                    selector.unregister(server)
                    open_.remove(server)
                    server.close()
                    continue
                with suppress(OSError):
                    server.send(f"{own} {server.getpeername()[0]}".encode())
            else:
                _, client = server.recvfrom(100)
                server.sendto(f"{own} {client[0]}".encode(), client)
