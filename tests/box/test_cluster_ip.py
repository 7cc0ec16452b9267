"""ClusterIPs, from pods, nodes and outside."""

from __future__ import annotations

import pytest

from tests.box.box import Box
from tests.box.objects import Port
from tests.box.services import OTHER, TARGET

pytestmark = pytest.mark.box


def test_should_preserve_source_pod_ip_for_traffic_thru_service_cluster_ip(box: Box, family: str, pod: str) -> None:
    web = box.service("a2", "b1", "c1")
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2", "b1", "c1").sees_source(pod)
    box.check()


def test_should_function_for_pod_service_of_a_sandboxed_backend(box: Box, family: str, pod: str) -> None:
    web = box.service("sb")
    box.expect(pod, to=web.cluster_ip(family)).reaches("sb").sees_source(pod)
    box.check()


def test_should_function_for_node_service(box: Box, family: str) -> None:
    web = box.service("a1", "b1")
    box.expect("node1", to=web.cluster_ip(family)).reaches("a1", "b1").sees_source("node1")
    box.expect("node3", to=web.cluster_ip(family)).reaches("a1", "b1").sees_source("node3")
    box.check()


def test_should_function_for_endpoint_service(box: Box, family: str, pod: str) -> None:
    web = box.service(pod, "b1")
    box.expect(pod, to=web.cluster_ip(family)).reaches(pod, "b1")
    box.check()


def test_should_allow_pods_to_hairpin_back_to_themselves_through_services(box: Box, family: str, pod: str) -> None:
    web = box.service(pod)
    # At the socket the pod talks to its own address; on the way its packets must come back through the node.
    seen = pod if pod == "a1" else "node1"
    box.expect(pod, to=web.cluster_ip(family)).reaches(pod).sees_source(seen)
    box.check()


def test_should_function_for_service_endpoints_using_host_network(box: Box, family: str, pod: str) -> None:
    web = box.service("node1", "node2")
    box.expect(pod, to=web.cluster_ip(family)).reaches("node1", "node2")
    box.expect("node1", to=web.cluster_ip(family)).reaches("node1", "node2").sees_source("node1")
    box.check()


def test_a_routed_cluster_ip_from_outside_is_masqueraded(box: Box, family: str) -> None:
    web = box.service("a1", "b1")
    box.expect("outside", to=web.cluster_ip(family)).reaches("a1", "b1").sees_source("node1")
    box.check()


def test_should_function_for_multiple_endpoint_services_with_same_selector(box: Box, family: str, pod: str) -> None:
    first, second = box.service("b1", "c1"), box.service("b1", "c1")
    for web in (first, second):
        box.expect(pod, to=web.cluster_ip(family)).reaches("b1", "c1").sees_source(pod)
    box.check()


def test_should_serve_endpoints_on_same_port_and_different_protocols(box: Box, family: str, pod: str) -> None:
    ports = (Port(80, "TCP", "tcp", target=TARGET), Port(80, "UDP", "udp", target=OTHER))
    web = box.service("b1", ports=ports)
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()
    web.change(ports=ports[:1])
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1").tcp_only()
    box.expect(pod, to=web.cluster_ip(family)).unanswered().udp_only()
    box.check()


def test_should_be_rejected_when_no_endpoints_exist(box: Box, family: str, pod: str) -> None:
    web = box.service(kinds=("NodePort", "LoadBalancer", "ExternalIP"))
    targets = (web.cluster_ip(family), web.external_ip(family), web.load_balancer(family))
    for to in (*targets, web.node_port("node1", family)):
        for client in (pod, "node1", "outside"):
            box.expect(client, to=to).refused()
    box.check()


def test_should_be_rejected_for_evicted_pods(box: Box, family: str, pod: str) -> None:
    web = box.service("b1")
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()
    web.endpoints()
    box.expect(pod, to=web.cluster_ip(family)).refused()
    box.check()


def test_connections_spread_evenly(box: Box, pod: str) -> None:
    """Each of 4 backends is the choice of one in four: of 400 connections one of them has less than 36 or more than 169
    by chance once in 10^13."""
    web = box.service("a1", "b1", "b2", "c1")
    place, to = box.place(pod), web.cluster_ip("ipv4")
    names = [str(box.clients.ask(place, to, "TCP")).split()[0] for _ in range(400)]
    counts = {name: names.count(name) for name in names}
    assert sorted(counts) == ["a1", "b1", "b2", "c1"]
    assert all(35 < count < 170 for count in counts.values()), counts


def test_what_is_no_service_is_left_alone(box: Box, family: str, pod: str) -> None:
    """Should be able to send traffic between Pods without SNAT; and the node, and outside."""
    box.service("b1")
    before = {node: box.kernel.translations(node) for node in box.cluster.nodes}
    for client in (pod, "node1"):
        for server in ("a2", "b1", "sb", "c1"):
            box.expect(client, to=box.direct(server, family)).reaches(server).sees_source(client)
    box.expect("outside", to=box.direct("node1", family)).reaches("node1").sees_source("outside")
    box.check()
    assert {node: box.kernel.translations(node) for node in box.cluster.nodes} == before


@pytest.mark.needs("undefined-ports")
def test_a_port_that_a_cluster_ip_does_not_have_is_refused(box: Box, family: str) -> None:
    """Rather than sent out of the cluster, to wherever the default route leads; until the Service goes."""
    web = box.service("b1")
    undefined = web.cluster_ip(family, 4711)
    for client in ("sa", "node1", "outside"):
        box.expect(client, to=undefined).refused()
        box.expect(client, to=web.cluster_ip(family)).reaches("b1")
    box.check()
    web.endpoints()
    box.expect("sa", to=undefined).refused()
    box.check()
    web.delete()
    box.expect("sa", to=undefined).unanswered()
    box.check()
