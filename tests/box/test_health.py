"""healthCheckNodePort beside the traffic that it is about: a load balancer asks it which nodes to use."""

from __future__ import annotations

import http.client
import time
from typing import Any

import pytest

from ebpflb.demo import namespaces
from tests.box.box import SLO, Box
from tests.box.objects import Member
from tests.box.services import ServiceInBox, leaving

pytestmark = pytest.mark.box

SERVING, NOT_SERVING, CLOSED = 200, 503, 0


def checked(box: Box, *backends: str | Member, **spec: Any) -> tuple[ServiceInBox, int]:
    """A load balancer's Service with policy Local, and its health check's port."""
    port = 32_100 + box.client_port() % 600  # above all node ports, below what sockets are given
    web = box.service(
        *backends, kinds=["LoadBalancer"], externalTrafficPolicy="Local", healthCheckNodePort=port, **spec,
    )  # fmt: skip
    return web, port


def status(box: Box, node: str, family: str, port: int, client: str = "outside") -> int:
    """What `client` gets from a node's health check; 0 where nobody listens."""
    with namespaces.inside(box.place(client).namespace):
        connection = http.client.HTTPConnection(box.address(node, family), port, timeout=SLO)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status
        except ConnectionError:  # refused; or it was closed while it was being asked
            return CLOSED
        finally:
            connection.close()


def wait_for(box: Box, family: str, port: int, **wanted: int) -> None:
    """Until each node's health check says what it should."""
    deadline = time.monotonic() + SLO
    while (said := {node: status(box, node, family, port) for node in wanted}) != wanted:
        assert time.monotonic() < deadline, said
        time.sleep(0.01)


def test_should_fail_health_check_node_port_if_there_are_only_terminating_endpoints(box: Box, family: str) -> None:
    """The load balancer is turned away while those that still come are served."""
    web, port = checked(box, "a1")
    wait_for(box, family, port, node1=SERVING, node2=NOT_SERVING)
    box.expect("outside", to=web.load_balancer(family)).reaches("a1").sees_source("outside")
    box.check()
    web.endpoints(leaving("a1"))
    wait_for(box, family, port, node1=NOT_SERVING, node2=NOT_SERVING)
    box.expect("outside", to=web.load_balancer(family)).reaches("a1").sees_source("outside")
    box.check()


def test_should_implement_node_port_and_health_check_node_port_correctly_when_external_traffic_policy_changes(
    box: Box, family: str
) -> None:
    web, port = checked(box, "b1")
    for _ in range(2):
        wait_for(box, family, port, node1=NOT_SERVING, node2=SERVING, node3=NOT_SERVING)
        box.expect("outside", to=web.node_port("node1", family)).dropped(at="node1")
        box.expect("outside", to=web.node_port("node2", family)).reaches("b1").sees_source("outside")
        box.check()
        web.change(externalTrafficPolicy="Cluster", healthCheckNodePort=None)
        wait_for(box, family, port, node1=CLOSED, node2=CLOSED, node3=CLOSED)
        box.expect("outside", to=web.node_port("node1", family)).reaches("b1").sees_source("node1")
        box.expect("outside", to=web.node_port("node2", family)).reaches("b1").sees_source("node2")
        box.check()
        web.change(externalTrafficPolicy="Local", healthCheckNodePort=port)


def test_esipp_should_only_target_nodes_with_endpoints_as_health_checks_say(box: Box, family: str) -> None:
    nodes = {"node1": "a1", "node2": "b1", "node3": "c1"}
    web, port = checked(box)
    for home, pod in nodes.items():
        web.endpoints(pod)
        wait_for(box, family, port, **{node: SERVING if node == home else NOT_SERVING for node in nodes})
    web.change(kinds=(), externalTrafficPolicy=None, healthCheckNodePort=None)
    wait_for(box, family, port, node1=CLOSED, node2=CLOSED, node3=CLOSED)


@pytest.mark.dataplanes("iptables", "ipvs")
def test_a_health_check_is_answered_on_a_node_that_drops_what_it_does_not_know(box: Box, family: str) -> None:
    """The node's own firewall need not know the port: load balancers are let in."""
    _, port = checked(box, "a1")
    wait_for(box, family, port, node1=SERVING)
    command = f"{'ip6tables' if family == 'ipv6' else 'iptables'}-{box.mode.variant}"
    lo = ("-i", "lo", "-j", "ACCEPT")
    known = ("-p", "tcp", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
    neighbours = ("-p", "ipv6-icmp", "-j", "ACCEPT") if family == "ipv6" else ()
    ours = [rule for rule in (lo, known, neighbours) if rule]
    for rule in ours:
        box.kernel.said("node1", command, "-w", "-A", "INPUT", *rule)
    box.kernel.said("node1", command, "-w", "-P", "INPUT", "DROP")
    try:
        assert status(box, "node1", family, port) == SERVING
    finally:
        box.kernel.said("node1", command, "-w", "-P", "INPUT", "ACCEPT")
        for rule in ours:
            box.kernel.said("node1", command, "-w", "-D", "INPUT", *rule)
