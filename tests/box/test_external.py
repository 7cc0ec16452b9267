"""External IPs, load balancer addresses, and the traffic policies."""

from __future__ import annotations

import pytest

from tests.box.box import Box
from tests.box.services import leaving

pytestmark = pytest.mark.box


def test_should_be_possible_to_connect_to_a_service_via_external_ip_when_the_external_ip_is_not_assigned_to_a_node(
    box: Box, family: str, pod: str
) -> None:
    web = box.service("a2", "b1", kinds=["ExternalIP"])
    box.expect("outside", to=web.external_ip(family)).reaches("a2", "b1").sees_source("node1")
    box.expect(pod, to=web.external_ip(family)).reaches("a2", "b1")
    box.expect("node1", to=web.external_ip(family)).reaches("a2", "b1").sees_source("node1")
    box.check()


def test_should_serve_a_load_balancer_address_on_every_node(box: Box, family: str) -> None:
    web = box.service("a1", "b1", kinds=["LoadBalancer"])
    for node in ("node1", "node2", "node3"):
        box.expect("outside", to=web.load_balancer(family, node)).reaches("a1", "b1").sees_source(node)
    box.check()


def test_should_serve_endpoints_on_same_port_and_different_protocol_for_internal_traffic_on_type_load_balancer(
    box: Box, family: str, pod: str
) -> None:
    web = box.service("a2", "b1", kinds=["LoadBalancer"])
    box.expect(pod, to=web.load_balancer(family)).reaches("a2", "b1")
    box.expect("node1", to=web.load_balancer(family)).reaches("a2", "b1").sees_source("node1")
    box.check()


def test_esipp_should_work_for_type_load_balancer(box: Box, family: str) -> None:
    web = box.service("b1", "c1", kinds=["LoadBalancer"], externalTrafficPolicy="Local")
    box.expect("outside", to=web.load_balancer(family, "node2")).reaches("b1").sees_source("outside")
    box.expect("outside", to=web.load_balancer(family, "node3")).reaches("c1").sees_source("outside")
    box.expect("outside", to=web.load_balancer(family, "node1")).dropped(at="node1")
    box.check()


def test_esipp_should_work_for_type_node_port(box: Box, family: str) -> None:
    web = box.service("b1", "c1", kinds=["NodePort"], externalTrafficPolicy="Local")
    box.expect("outside", to=web.node_port("node2", family)).reaches("b1").sees_source("outside")
    box.expect("outside", to=web.node_port("node3", family)).reaches("c1").sees_source("outside")
    box.check()


def test_esipp_should_only_target_nodes_with_endpoints(box: Box, family: str) -> None:
    web = box.service("a1", kinds=["LoadBalancer"], externalTrafficPolicy="Local")
    for node, pod in (("node1", "a1"), ("node2", "b1"), ("node3", "c1")):
        web.endpoints(pod)
        for each in ("node1", "node2", "node3"):
            expected = box.expect("outside", to=web.load_balancer(family, each))
            if each == node:
                expected.reaches(pod).sees_source("outside")
            else:
                expected.dropped(at=each)
        box.check()


def test_esipp_should_work_from_pods(box: Box, family: str, pod: str) -> None:
    """Pods and nodes go straight to any endpoint, on whatever node; the source is the pod's."""
    web = box.service("b1", "c1", kinds=["LoadBalancer"], externalTrafficPolicy="Local")
    box.expect(pod, to=web.load_balancer(family)).reaches("b1", "c1").sees_source(pod)
    box.expect("node1", to=web.load_balancer(family)).reaches("b1", "c1").sees_source("node1")
    box.check()


def test_esipp_should_handle_updates_to_external_traffic_policy_field(box: Box, family: str) -> None:
    web = box.service("b1", kinds=["LoadBalancer"], externalTrafficPolicy="Local")
    box.expect("outside", to=web.load_balancer(family, "node1")).dropped(at="node1")
    box.expect("outside", to=web.load_balancer(family, "node2")).reaches("b1").sees_source("outside")
    box.check()
    web.change(externalTrafficPolicy="Cluster")
    box.expect("outside", to=web.load_balancer(family, "node1")).reaches("b1").sees_source("node1")
    box.expect("outside", to=web.load_balancer(family, "node2")).reaches("b1").sees_source("node2")
    box.check()
    web.change(externalTrafficPolicy="Local")
    box.expect("outside", to=web.load_balancer(family, "node1")).dropped(at="node1")
    box.expect("outside", to=web.load_balancer(family, "node2")).reaches("b1").sees_source("outside")
    box.check()


def test_should_respect_internal_traffic_policy_local_pod_to_pod(box: Box, family: str, pod: str) -> None:
    web = box.service("a2", "b1", internalTrafficPolicy="Local")
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2").sees_source(pod)
    box.check()
    web.endpoints("b1")
    box.expect(pod, to=web.cluster_ip(family)).dropped(at="node1")
    box.expect("b2", to=web.cluster_ip(family)).reaches("b1").sees_source("b2")
    box.check()


def test_should_respect_internal_traffic_policy_local_pod_host_network_true_to_pod(box: Box, family: str) -> None:
    web = box.service("a1", "b1", internalTrafficPolicy="Local")
    box.expect("node1", to=web.cluster_ip(family)).reaches("a1").sees_source("node1")
    box.expect("node3", to=web.cluster_ip(family)).dropped(at="node3")
    box.check()


def test_should_respect_internal_traffic_policy_local_pod_and_node_to_pod_host_network_true(
    box: Box, family: str, pod: str
) -> None:
    web = box.service("node1", "node2", internalTrafficPolicy="Local")
    box.expect(pod, to=web.cluster_ip(family)).reaches("node1")
    box.expect("node1", to=web.cluster_ip(family)).reaches("node1")
    box.expect("node3", to=web.cluster_ip(family)).dropped(at="node3")
    box.check()


def test_should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_policy_local(
    box: Box, family: str, pod: str
) -> None:
    web = box.service(leaving("a2"), "b1", internalTrafficPolicy="Local")
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2").sees_source(pod)
    box.check()


def test_should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_policy_cluster(
    box: Box, family: str
) -> None:
    web = box.service(leaving("a1"), leaving("b1"), kinds=["NodePort"])
    box.expect("outside", to=web.node_port("node3", family)).reaches("a1", "b1").sees_source("node3")
    box.check()


def test_should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_policy_local(
    box: Box, family: str
) -> None:
    web = box.service(leaving("a1"), "b1", kinds=["NodePort"], externalTrafficPolicy="Local")
    box.expect("outside", to=web.node_port("node1", family)).reaches("a1").sees_source("outside")
    box.expect("outside", to=web.node_port("node3", family)).dropped(at="node3")
    box.check()
