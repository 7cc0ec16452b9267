"""healthCheckNodePort: one answer for each Service and family, and ports that cannot be had.

The bodies are those that kube-proxy 1.36.3's Service health server gave.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
from collections.abc import Iterator

import pytest

from ebpflb.dataplane import Report
from ebpflb.health import Health
from ebpflb.healthchecks import FAILED, HealthChecks
from ebpflb.httpd import Handler, HttpServer, Listening, Request, Response
from ebpflb.model import Address, Family, Problem, ServiceName
from ebpflb.observer import Attempt
from ebpflb.policy import routes
from ebpflb.ports import Port, Ports
from ebpflb.routes import HealthCheck, HealthKey, RouteTable
from tests.fakes import FakeClock
from tests.world import LOCAL, endpoint_slice, leaving, options, service, snapshot

WEB, API = ServiceName("default", "web"), ServiceName("default", "api")
V4, V6 = Family

SERVED = (
    b'{\n\t"service": {\n\t\t"namespace": "default",\n\t\t"name": "web"\n\t},\n'
    b'\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
)
EMPTY = (
    b'{\n\t"service": {\n\t\t"namespace": "default",\n\t\t"name": "web"\n\t},\n'
    b'\t"localEndpoints": 0,\n\t"serviceProxyHealthy": true\n}'
)
UNHEALTHY = (
    b'{\n\t"service": {\n\t\t"namespace": "default",\n\t\t"name": "web"\n\t},\n'
    b'\t"localEndpoints": 2,\n\t"serviceProxyHealthy": false\n}'
)


def check(
    name: ServiceName = WEB, count: int = 1, *, family: Family = V4, port: int = 32000, addresses: tuple[str, ...] = ()
) -> HealthCheck:
    return HealthCheck(name, family, port, addresses, count)


def table(*checks: HealthCheck) -> dict[HealthKey, HealthCheck]:
    return {(each.service, each.family): each for each in checks}


class Node:
    """The ports of a node: `taken` ones and `missing` addresses are refused, as the kernel does."""

    def __init__(self) -> None:
        self.open: dict[Port, Handler] = {}
        self.taken: set[int] = set()
        self.missing: set[str] = set()
        self.families: set[Family] = set(Family)
        self.calls: list[str] = []
        self.failure = ""
        self._ports: dict[int, Port] = {}

    def listen(self, address: Address, port: int, handler: Handler, *, family: Family | None = None) -> Listening:
        asked = Port(address, port, family)
        self.calls.append(f"open {asked}")
        number = 0
        if family not in self.families:
            number = errno.EAFNOSUPPORT
        elif address in self.missing:
            number = errno.EADDRNOTAVAIL
        elif port in self.taken or any(self._clash(asked, other) for other in self.open):
            number = errno.EADDRINUSE
        if number:
            raise OSError(number, os.strerror(number))
        with socket.socket() as sock:
            listening = Listening(sock, handler)
        self.open[asked] = handler
        self._ports[id(listening)] = asked
        return listening

    @staticmethod
    def _clash(one: Port, other: Port) -> bool:
        return one[1:] == other[1:] and (one.address == other.address or "" in (one.address, other.address))

    def close(self, listening: Listening) -> None:
        port = self._ports.pop(id(listening))
        self.calls.append(f"close {port}")
        del self.open[port]

    def ask(self, port: int = 32000, address: str = "", family: Family = V4) -> Response:
        return self.open[Port(address, port, family)](Request("GET", "/", "", {}))

    def counts(self) -> dict[int, int]:
        """What each open port says."""
        return {port.port: int(dict(self.ask(*port[1::-1], port.family or V4).headers)[WEIGHT]) for port in self.open}

    def did(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


WEIGHT = "X-Load-Balancing-Endpoint-Weight"


class Place:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.node = Node()
        self.healthy = True
        self.checks = HealthChecks(self.node, lambda: self.healthy, self.clock)

    def have(self, *checks: HealthCheck) -> list[str]:
        """These and no others from now on; what that did to ports."""
        self.checks.update(table(*checks))
        return self.node.did()

    def wait(self) -> list[str]:
        """Until something is due; what was done then."""
        due = self.checks.due()
        assert due is not None
        self.clock.now = max(due, self.clock.now)
        self.checks.work()
        return self.node.did()


@pytest.fixture
def place() -> Place:
    return Place()


# ---- Answers ----


def test_status_headers_and_body_are_kube_proxys(place: Place) -> None:
    place.have(check(count=2))
    for healthy, count, status, body in (
        (True, 2, 200, SERVED),
        (True, 0, 503, EMPTY),
        (False, 2, 503, UNHEALTHY),
    ):
        place.healthy = healthy
        place.have(check(count=count))
        headers = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"), (WEIGHT, str(count)))
        assert place.node.ask() == (status, body, headers)


def test_each_family_has_its_own_count(place: Place) -> None:
    place.have(check(count=3), check(count=0, family=V6))
    assert place.node.ask().status == 200
    assert place.node.ask(family=V6).status == 503


def test_a_new_count_touches_no_port(place: Place) -> None:
    place.have(check(count=0), check(API, port=32001))
    for count in range(20):
        assert place.have(check(count=count), check(API, port=32001)) == []
        assert place.node.counts() == {32000: count, 32001: 1}


def test_the_same_table_again_costs_nothing(place: Place) -> None:
    same = table(check())
    place.checks.update(same)
    place.node.did()
    place.checks.update(same)
    assert place.node.did() == []


def test_a_service_that_is_gone_is_not_answered(place: Place) -> None:
    """ESIPP: a Service whose type or policy changes leaks no health check."""
    place.have(check(), check(API, port=32001))
    assert place.have(check(API, port=32001)) == ["close :32000"]
    assert place.node.counts() == {32001: 1}
    assert place.have() == ["close :32001"]
    assert place.have(check()) == ["open :32000"]


def test_a_service_that_changes_its_port(place: Place) -> None:
    place.have(check())
    assert place.have(check(port=32005, count=4)) == ["close :32000", "open :32005"]
    assert place.node.counts() == {32005: 4}


def test_a_port_changes_hands_in_one_sync(place: Place) -> None:
    place.have(check(WEB, 1), check(API, 2, port=32001))
    place.have(check(WEB, 1, port=32001), check(API, 2, port=32000))
    assert place.node.counts() == {32000: 2, 32001: 1}
    assert place.checks.wrong() == ()


def test_node_port_addresses(place: Place) -> None:
    place.have(check(addresses=("10.0.0.1", "10.0.0.2")))
    assert set(place.node.open) == {Port("10.0.0.1", 32000, V4), Port("10.0.0.2", 32000, V4)}
    assert place.have(check(addresses=("10.0.0.1", "10.0.0.3"))) == ["close 10.0.0.2:32000", "open 10.0.0.3:32000"]
    assert sorted(place.have(check())) == ["close 10.0.0.1:32000", "close 10.0.0.3:32000", "open :32000"]
    assert place.node.ask().status == 200


# ---- What cannot be had ----


def test_a_port_that_another_process_has(place: Place) -> None:
    place.node.taken = {32000}
    place.have(check(), check(API, port=32001))
    reason = (
        "healthCheckNodePort 32000 cannot be answered on all addresses of IPv4: Address already in use; "
        "stop what else listens there"
    )
    assert place.checks.wrong() == (Problem("default/web", reason, FAILED),)
    assert place.node.counts() == {32001: 1}, "the others are not concerned"
    for _ in range(10):
        assert place.wait() == ["open :32000"]
    place.have(check(count=7), check(API, port=32001))
    assert place.checks.wrong() == (Problem("default/web", reason, FAILED),), "the same words: said once"
    place.node.taken.clear()
    place.wait()
    assert place.node.counts() == {32000: 7, 32001: 1}
    assert (place.checks.wrong(), place.checks.due()) == ((), None)
    place.node.taken = {32000}
    assert place.have(check(count=7), check(API, port=32001)) == []


def test_it_is_tried_again_every_five_seconds(place: Place) -> None:
    place.node.taken = {32000}
    place.have(check())
    for after in (5, 10, 15):
        assert place.checks.due() == 1000 + after
        place.wait()
    place.checks.work()
    assert place.node.did() == [], "it is not due"


def test_two_services_with_one_port(place: Place) -> None:
    place.have(check(WEB, 1))
    place.have(check(WEB, 1), check(API, 2))
    reason = "healthCheckNodePort 32000 is that of default/web too, which has it; give one of them another"
    assert place.checks.wrong() == (Problem("default/api", reason, FAILED),)
    assert place.node.counts() == {32000: 1}
    place.have(check(API, 2))
    assert place.node.counts() == {32000: 2}, "it is free at once"
    assert place.checks.wrong() == ()


def test_who_waits_goes_before_who_comes(place: Place) -> None:
    third = ServiceName("a", "a")
    place.have(check(WEB, 1))
    place.have(check(WEB, 1), check(API, 2))
    place.have(check(API, 2), check(third, 3))
    assert place.node.counts() == {32000: 2}


def test_a_service_that_goes_while_its_port_is_taken(place: Place) -> None:
    place.node.taken = {32000}
    place.have(check())
    place.have()
    assert (place.checks.wrong(), place.checks.due()) == ((), None)


def test_an_address_vanishes_and_returns(place: Place) -> None:
    place.node.missing = {"10.0.0.2"}
    place.have(check(addresses=("10.0.0.1", "10.0.0.2")))
    assert [problem.reason for problem in place.checks.wrong()] == [
        "healthCheckNodePort 32000 cannot be answered on 10.0.0.2: Cannot assign requested address"
    ]
    assert place.node.ask(address="10.0.0.1").status == 200
    place.node.missing.clear()
    assert place.wait() == ["open 10.0.0.2:32000"]
    assert place.node.ask(address="10.0.0.2").status == 200
    assert place.checks.wrong() == ()


def test_a_kernel_without_ipv6_is_nobodys_fault(place: Place) -> None:
    place.node.families = {V4}
    place.have(check(), check(family=V6))
    assert place.checks.wrong() == ()
    assert place.node.ask().status == 200


# ---- With the rest ----


def test_from_services_and_endpoints(place: Place) -> None:
    """Rolling update: what terminates serves on, and the load balancer is told to go elsewhere."""
    web = service("default/web", lb=["1.2.3.4"], external_policy=LOCAL, health_port=32000)

    def sync(*endpoints: object, report: Report | None = None) -> None:
        made = routes(snapshot(web, endpoint_slice(*endpoints, of="default/web")), options())  # type: ignore[arg-type]
        place.checks.attempted(Attempt("sync", 0.0, 0.0, None, made, 0, report or Report()))

    sync("10.0.1.1", "10.0.1.2", "10.0.2.1")
    assert place.node.ask()[:2] == (200, SERVED)
    sync(leaving("10.0.1.1"), "10.0.2.1")
    assert place.node.ask()[:2] == (503, EMPTY)
    sync("10.0.1.1", report=Report(failed=1))
    assert place.node.counts() == {32000: 1}, "whatever the kernel refused"
    place.checks.attempted(Attempt("sync", 0.0, 0.0, None, RouteTable(), 0, Report()))
    assert place.node.open == {}


def test_a_server_that_has_ended_is_a_problem(place: Place) -> None:
    server = HttpServer()
    checks = HealthChecks(server, lambda: True, place.clock)
    checks.update(table(check(addresses=("127.0.0.1",), port=0)))
    server.stop()
    checks.update(table(check(addresses=("127.0.0.1",), port=0), check(API, addresses=("127.0.0.2",), port=0)))
    assert [(problem.subject, problem.code) for problem in checks.wrong()] == [("default/api", FAILED)]


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = HttpServer()
    made.start()
    yield made
    made.stop()


def test_over_the_wire(server: HttpServer) -> None:
    """Any path, any method, both families on one port, unhealthy for want of syncs."""
    clock = FakeClock()
    health = Health([], node_needed=True, clock=clock)
    checks = HealthChecks(server, lambda: health.healthy, clock)
    port = free_port()
    checks.update(table(check(count=2, port=port), check(count=0, family=V6, port=port)))
    for method in ("GET", "POST", "DELETE"):
        for path in ("/", "/healthz", "/a/b?c"):
            assert ask("127.0.0.1", port, method, path) == (200, SERVED)
            assert ask("::1", port, method, path) == (503, EMPTY)
    assert ask("127.0.0.1", port, "HEAD", "/") == (200, b"")
    health.queued(clock())
    clock.advance(60)
    assert ask("127.0.0.1", port, "GET", "/") == (503, UNHEALTHY)


def free_port() -> int:
    """A port that was free a moment ago, in both families."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        return int(sock.getsockname()[1])


def ask(host: str, port: int, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        return response.status, response.read()
    finally:
        connection.close()


# ---- Ports of the daemon's own ----


def test_the_daemons_own_ports_are_kept_trying_for() -> None:
    node, clock = Node(), FakeClock()
    node.families.add(None)  # type: ignore[arg-type]  # both at once
    node.taken = {10256}
    ports: Ports[str] = Ports(node, clock)
    ports.want("healthz", Port("0.0.0.0", 10256), lambda request: Response(200, b"ok"))
    ports.want("metrics", Port("127.0.0.1", 10249), lambda request: Response(200, b"ok"))
    assert [problem[:2] for problem in ports.wrong()] == [
        ("healthz", "cannot listen on 0.0.0.0:10256: Address already in use; free it or give another")
    ]
    assert [owner for owner, _, _ in ports.opened()] == ["metrics"]
    node.taken.clear()
    assert not ports.work()
    clock.advance(5)
    assert ports.work()
    assert (ports.wrong(), ports.due()) == ((), None)
    node.failure = "the HTTP server ended: KeyError: 7"
    assert [problem[:2] for problem in ports.wrong()] == [
        ("server", "the HTTP server ended: KeyError: 7; restart the daemon")
    ]
