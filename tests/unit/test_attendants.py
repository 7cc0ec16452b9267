"""What goes along with the daemon, put together: asked over HTTP on this machine's loopback, as its users ask."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest

from ebpflb.attendants import DaemonAttendants
from ebpflb.config import Bind, Config
from ebpflb.config.options import Options, configure
from ebpflb.dataplane import Report
from ebpflb.errors import UserError
from ebpflb.model import Family, Node, Problem, ServiceName
from ebpflb.observer import Attempt
from ebpflb.parts import Choice
from ebpflb.routes import HealthCheck, RouteTable
from ebpflb.source import PutNode, Synced
from tests.fakes import FakeClock, FakeDataplane, FakeSource

LOOPBACK = "127.0.0.1"
SERVICE = ServiceName("ns", "web")


def free_ports(count: int) -> list[int]:
    """Ports that are free, and no two the same: all are held until the last one is found."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def config(tmp_path: object, **more: object) -> Config:
    made = configure(Options(manifests=str(tmp_path)), hostname="node-1")
    ports = {name: Bind(LOOPBACK, port) for name, port in zip(("healthz", "metrics"), free_ports(2), strict=True)}
    return msgspec.structs.replace(made, **{**ports, **more})  # type: ignore[arg-type, unused-ignore]


class Place:
    """Attendants, the world they attend to, and a client."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clock = FakeClock()
        self.source = FakeSource()
        self.attendants = DaemonAttendants(
            config, Choice(FakeDataplane(), ()), [self.source], keeper=None, clock=self.clock
        )

    def work(self) -> None:
        for worker in self.attendants.workers:
            worker.work()

    def synced(self, table: RouteTable | None = None, failed: int = 0) -> None:
        """An attempt has ended."""
        self.attendants.observer.attempted(
            Attempt(
                "sync",
                self.clock.now,
                self.clock.now,
                self.clock.now,
                RouteTable() if table is None else table,
                0,
                Report(failed=failed),
            )
        )

    def get(self, bind: Bind | None, path: str) -> tuple[int, bytes]:
        assert bind is not None
        connection = http.client.HTTPConnection(bind.address, bind.port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def healthz(self, path: str = "/healthz") -> tuple[int, dict[str, object]]:
        status, body = self.get(self.config.healthz, path)
        return status, json.loads(body)


@pytest.fixture
def place(tmp_path: object) -> Iterator[Place]:
    made = Place(config(tmp_path))
    made.attendants.begin()
    yield made
    made.attendants.close()
    made.source.close()


def test_should_check_kube_proxy_urls(place: Place) -> None:
    """The e2e test's two: /healthz is 200 and says when, /proxyMode is the mode."""
    status, body = place.healthz()
    assert status == 200 and body["lastUpdated"]
    assert place.get(place.config.metrics, "/proxyMode") == (200, b"bpf")


def test_the_metrics_port_has_metrics_and_the_configuration(place: Place) -> None:
    status, page = place.get(place.config.metrics, "/metrics")
    assert status == 200 and b"kubeproxy_sync_proxy_rules_duration_seconds_bucket" in page
    status, configuration = place.get(place.config.metrics, "/configz")
    assert status == 200 and list(json.loads(configuration)) == ["kubeproxy.config.k8s.io"]
    assert place.get(place.config.metrics, "/healthz")[0] == 200
    assert place.get(place.config.metrics, "/nothing")[0] == 404


def test_a_change_that_does_not_come_into_the_kernel_is_no_health(place: Place) -> None:
    """And every probe is counted, by its answer."""
    place.attendants.observer.event(Synced("manifests"))
    place.attendants.observer.queued(place.clock.now)
    assert place.healthz()[0] == 200
    place.clock.advance(61.0)
    assert place.healthz()[0] == 503
    assert place.healthz("/livez")[0] == 503
    place.synced()
    assert place.healthz("/livez")[0] == 200
    page = place.get(place.config.metrics, "/metrics")[1].decode()
    assert 'kubeproxy_proxy_healthz_total{code="200"} 1.0' in page
    assert 'kubeproxy_proxy_healthz_total{code="503"} 1.0' in page


def test_a_node_that_is_leaving_gets_no_traffic_but_is_not_killed(place: Place) -> None:
    place.attendants.observer.event(PutNode(Node("node-1", known=True, deleting=True)))
    assert place.healthz()[0] == 503
    assert place.healthz("/livez")[0] == 200


def test_health_checks_of_services_are_answered_and_follow_health(place: Place) -> None:
    (port,) = free_ports(1)
    check = HealthCheck(SERVICE, Family.IPV4, port, (LOOPBACK,), 2)
    place.attendants.observer.event(Synced("manifests"))
    place.synced(RouteTable(health={(SERVICE, Family.IPV4): check}))
    status, body = place.get(Bind(LOOPBACK, port), "/any/path")
    assert status == 200 and json.loads(body)["localEndpoints"] == 2
    place.attendants.observer.queued(place.clock.now)
    place.clock.advance(61.0)
    status, body = place.get(Bind(LOOPBACK, port), "/")
    assert status == 503 and json.loads(body)["serviceProxyHealthy"] is False
    place.synced(RouteTable())
    with pytest.raises(ConnectionRefusedError):
        place.get(Bind(LOOPBACK, port), "/")


def test_a_taken_health_check_port_is_a_problem_of_that_service(place: Place) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        check = HealthCheck(SERVICE, Family.IPV4, port, (LOOPBACK,), 1)
        place.synced(RouteTable(health={(SERVICE, Family.IPV4): check}))
        (problem,) = place.attendants.problems()
        assert (problem.part, problem.subject, problem.code) == (
            "health-check",
            "ns/web",
            "FailedToStartServiceHealthcheck",
        )
    place.clock.advance(60.0)
    place.work()
    assert list(place.attendants.problems()) == []
    assert place.get(Bind(LOOPBACK, port), "/")[0] == 200


def test_a_taken_port_is_a_problem_until_it_is_free(tmp_path: object) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        busy = config(tmp_path, metrics=Bind(LOOPBACK, taken.getsockname()[1]))
        place = Place(busy)
        place.attendants.begin()
        (problem,) = place.attendants.problems()
        assert problem.subject == "metrics" and "Address already in use" in problem.reason
    place.clock.advance(60.0)
    place.work()
    assert place.get(busy.metrics, "/proxyMode") == (200, b"bpf")
    place.attendants.close()


def test_a_taken_port_is_fatal_to_those_who_asked_for_it(tmp_path: object) -> None:
    """bindAddressHardFail."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        place = Place(config(tmp_path, healthz=Bind(LOOPBACK, taken.getsockname()[1]), bind_hard_fail=True))
        with pytest.raises(UserError, match="healthz: cannot listen on 127.0.0.1"):
            place.attendants.begin()
        place.attendants.close()


def test_problems_of_the_sources_do_not_make_it_ill(place: Place) -> None:
    place.source.wrong = (Problem("API server", "cannot be reached"),)
    place.attendants.observer.event(Synced("manifests"))
    place.clock.advance(600.0)
    place.work()
    assert place.healthz()[0] == 200
