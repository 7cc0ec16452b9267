"""Where health is answered on a real node: its families, its addresses, its other processes; in a network namespace of
the test's own."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from ebpflb.demo.namespaces import inside
from ebpflb.healthchecks import HealthChecks
from ebpflb.httpd import HttpServer, Request, Response
from ebpflb.model import Family, ServiceName
from ebpflb.ports import Port, Ports
from ebpflb.routes import HealthCheck
from tests.fakes import FakeClock

pytestmark = pytest.mark.root

PATIENCE = 30.0
PORT = 32000
WEB = ServiceName("default", "web")
NODE_V4, NODE_V6 = "192.168.0.2", "fd00::2"


def prefixed(address: str) -> str:
    return f"{address}/{64 if ':' in address else 24}"


class Node:
    """A network namespace; ports are opened, and asked, in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = FakeClock()
        self.server = HttpServer()
        self.checks = HealthChecks(self.server, lambda: True, self.clock)

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, timeout=PATIENCE)

    def add(self, address: str) -> None:
        """Give eth0 an address. An IPv6 one is there at once and is led to a moment later, even without detection."""
        self.ip("address", "add", prefixed(address), "dev", "eth0", *(["nodad"] if ":" in address else []))
        deadline = time.monotonic() + PATIENCE
        while not (said := self._way_to(address)).startswith("local"):
            assert time.monotonic() < deadline, said

    def _way_to(self, address: str) -> str:
        words = ["ip", "-n", self.name, "route", "get", address]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout

    def remove(self, address: str) -> None:
        self.ip("address", "del", prefixed(address), "dev", "eth0")

    def sysctl(self, *settings: str) -> None:
        net = f"--net=/run/netns/{self.name}"
        subprocess.run(["nsenter", net, "sysctl", "-qw", *settings], check=True, timeout=PATIENCE)

    def have(self, *addresses: str, families: tuple[Family, ...] = tuple(Family)) -> None:
        checks = {
            (WEB, family): HealthCheck(
                WEB, family, PORT, tuple(each for each in addresses if (":" in each) == (family is Family.IPV6)), 1
            )
            for family in families
        }
        with inside(self.name):
            self.checks.update(checks)

    def try_again(self) -> None:
        self.clock.advance(5)
        with inside(self.name):
            self.checks.work()

    def ask(self, host: str, port: int = PORT) -> int:
        """The status, or 0 if nobody listens there."""
        with inside(self.name):
            connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
            try:
                connection.request("GET", "/healthz")
                return connection.getresponse().status
            except ConnectionRefusedError:
                return 0
            finally:
                connection.close()


@pytest.fixture
def node() -> Iterator[Node]:
    name = f"ebpflb-health-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=PATIENCE)
    try:
        made = Node(name)
        made.ip("link", "set", "lo", "up")
        made.ip("link", "add", "eth0", "type", "veth", "peer", "name", "fabric")
        for device in ("eth0", "fabric"):
            made.ip("link", "set", device, "up")
        for address in (NODE_V4, NODE_V6):
            made.add(address)
        made.server.start()
        yield made
        made.server.stop()
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=PATIENCE)


def ok(request: Request) -> Response:
    return Response(200, b"ok")


def test_each_family_on_all_addresses(node: Node) -> None:
    node.have()
    assert [node.ask(host) for host in ("127.0.0.1", NODE_V4, "::1", NODE_V6)] == [200, 200, 200, 200]
    node.have(families=(Family.IPV6,))
    assert [node.ask(host) for host in ("127.0.0.1", NODE_V4, "::1", NODE_V6)] == [0, 0, 200, 200]


def test_only_on_the_node_port_addresses(node: Node) -> None:
    node.have(NODE_V4, NODE_V6)
    assert [node.ask(host) for host in ("127.0.0.1", NODE_V4, "::1", NODE_V6)] == [0, 200, 0, 200]


@pytest.mark.parametrize("address", [NODE_V4, NODE_V6])
def test_an_address_vanishes_and_returns(node: Node, address: str) -> None:
    node.remove(address)
    node.have(NODE_V4, NODE_V6)
    other = NODE_V6 if address == NODE_V4 else NODE_V4
    assert node.ask(other) == 200
    assert [problem.reason for problem in node.checks.wrong()] == [
        f"healthCheckNodePort {PORT} cannot be answered on {address}: Cannot assign requested address"
    ]
    node.add(address)
    node.try_again()
    assert (node.ask(address), node.checks.wrong()) == (200, ())
    node.remove(address)
    node.add(address)
    assert node.ask(address) == 200, "the port that was open goes on"


@pytest.mark.parametrize("family", Family)
def test_another_process_has_the_port_in_one_family(node: Node, family: Family) -> None:
    kind, host = (socket.AF_INET, "127.0.0.1") if family is Family.IPV4 else (socket.AF_INET6, "::1")
    with inside(node.name):
        other = socket.create_server((host, PORT), family=kind)
    with other:
        node.have()
        assert len(node.checks.wrong()) == 1
        assert node.ask(NODE_V6 if family is Family.IPV4 else NODE_V4) == 200
    node.try_again()
    assert [node.ask(NODE_V4), node.ask(NODE_V6)] == [200, 200]
    assert node.checks.wrong() == ()


def test_the_default_address_reaches_nodes_of_either_family(node: Node) -> None:
    """0.0.0.0:10256, as kube-proxy and everybody's probes have it."""
    ports: Ports[str] = Ports(node.server, node.clock)
    with inside(node.name):
        ports.want("healthz", Port("0.0.0.0", 10256), ok)
    assert [node.ask(host, 10256) for host in (NODE_V4, NODE_V6)] == [200, 200]
    node.remove(NODE_V4)
    assert node.ask(NODE_V6, 10256) == 200


def test_a_node_whose_ipv6_is_off(node: Node) -> None:
    node.sysctl("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6=1")
    ports: Ports[str] = Ports(node.server, node.clock)
    with inside(node.name):
        ports.want("healthz", Port("0.0.0.0", 10256), ok)
    node.have()
    assert [node.ask(NODE_V4, port) for port in (10256, PORT)] == [200, 200]
    assert (node.checks.wrong(), ports.wrong()) == ((), ())
