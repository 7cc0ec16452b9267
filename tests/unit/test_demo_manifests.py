"""The demo's manifests mean what the demo's story tells: read by the real source, judged by the real policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ebpflb.demo.stage import PODS, dns_records
from ebpflb.model import Protocol, ProxyOptions
from ebpflb.policy import routes
from ebpflb.routes import Frontend, RouteTable, Scope, Verdict
from ebpflb.source import LocalAddresses
from ebpflb.source.manifests import ManifestSource
from ebpflb.source.store import Store

MANIFESTS = Path(__file__).resolve().parents[2] / "deploy/demo"
NODE = ("192.168.0.2", "fd00:192:168::2")


@pytest.fixture
def table() -> Iterator[RouteTable]:
    source = ManifestSource(str(MANIFESTS))
    store = Store("node1", [source.name])
    for event in source.read():
        store.apply(event)
    store.apply(LocalAddresses(NODE, NODE))
    assert source.problems() == ()
    found = routes(store.snapshot(), ProxyOptions())
    assert not found.problems
    yield found
    source.close()


def backends(table: RouteTable, address: str, port: int, protocol: Protocol = Protocol.TCP) -> list[tuple[str, int]]:
    route = table[Frontend(address, port, protocol), Scope.EXTERNAL]
    assert route.verdict is Verdict.FORWARD
    return [(backend.address, backend.port) for backend in route.backends]


def test_what_is_asked_for_is_routed(table: RouteTable) -> None:
    web = [("10.244.1.10", 80), ("10.244.2.10", 80)]
    assert backends(table, "10.96.0.80", 80) == backends(table, NODE[0], 30007) == web
    web6 = [("fd00:10:244:1::10", 80), ("fd00:10:244:2::10", 80)]
    assert backends(table, "fd00:10:96::80", 80) == backends(table, NODE[1], 30007) == web6
    assert backends(table, "10.96.0.33", 3360) == backends(table, NODE[0], 30008) == [("10.244.2.11", 3306)]
    for protocol in (Protocol.TCP, Protocol.UDP):
        assert backends(table, "10.96.0.10", 53, protocol) == [("10.244.1.11", 53)]


def test_nobody_home_is_refused(table: RouteTable) -> None:
    for address, port in (("10.96.0.99", 80), (NODE[0], 30009)):
        assert table[Frontend(address, port, Protocol.TCP), Scope.EXTERNAL].verdict is Verdict.REJECT


def test_a_headless_service_has_no_route(table: RouteTable) -> None:
    assert not [route for route in table.values() if route.service.name == "my-pods"]


def test_dns_knows_every_service_and_the_pods_of_the_headless_one() -> None:
    documents = [item for path in MANIFESTS.glob("*.yaml") for item in yaml.safe_load_all(path.read_text())]
    assert dns_records(documents) == {
        "kube-dns.kube-system.svc.cluster.local": ("10.96.0.10",),
        "my-pods.default.svc.cluster.local": ("10.244.1.10", "10.244.2.10"),
        "my-service.default.svc.cluster.local": ("10.96.0.80", "fd00:10:96::80"),
        "mysql.default.svc.cluster.local": ("10.96.0.33",),
        "nobody-home.default.svc.cluster.local": ("10.96.0.99",),
    }


def test_every_endpoint_is_on_a_node_of_the_demo() -> None:
    nodes = {node for node, _ in PODS}
    for path in MANIFESTS.glob("*.yaml"):
        for item in yaml.safe_load_all(path.read_text()):
            assert {endpoint["nodeName"] for endpoint in item.get("endpoints", ())} <= nodes
