"""Services and endpoints that come, change and go while clients ask."""

from __future__ import annotations

import pytest

from tests.box.box import Box
from tests.box.objects import Port, endpoint_slice
from tests.box.services import OTHER, TARGET, dying, in_family, leaving, unready

pytestmark = pytest.mark.box


def test_should_serve_a_basic_endpoint_from_pods(box: Box, family: str, pod: str) -> None:
    web = box.service()
    for backends in (("b1",), ("b1", "c1"), ("c1",)):
        web.endpoints(*backends)
        box.expect(pod, to=web.cluster_ip(family)).reaches(*backends)
        box.check()
    web.endpoints()
    box.expect(pod, to=web.cluster_ip(family)).refused()
    box.check()


def test_should_serve_multiport_endpoints_from_pods(box: Box, family: str, pod: str) -> None:
    ports = (Port(80, "TCP", "portname1", target=TARGET), Port(81, "TCP", "portname2", target=OTHER))
    web = box.prepare(ports=ports)
    web.headless_slices = tuple(
        endpoint_slice(web.name, [each], [web.member(where)[version == 6]], suffix=each.name)
        for each, where in zip(ports, ("b1", "c1"), strict=True)
        for version in (4, 6)
    )
    web.apply()
    box.expect(pod, to=web.cluster_ip(family, 80)).reaches("b1").tcp_only()
    box.expect(pod, to=web.cluster_ip(family, 81)).reaches("c1").tcp_only()
    box.check()


def test_should_be_updated_after_adding_or_deleting_ports(box: Box, family: str, pod: str) -> None:
    first, second = Port(80, "TCP", "portname1", target=TARGET), Port(81, "TCP", "portname2", target=OTHER)
    web = box.service("b1", ports=[first])
    box.expect(pod, to=web.cluster_ip(family, 80)).reaches("b1").tcp_only()
    box.expect(pod, to=web.cluster_ip(family, 81)).unanswered().tcp_only()
    box.check()
    web.change(ports=[first, second])
    box.expect(pod, to=web.cluster_ip(family, 80)).reaches("b1").tcp_only()
    box.expect(pod, to=web.cluster_ip(family, 81)).reaches("b1").tcp_only()
    box.check()
    web.change(ports=[second])
    box.expect(pod, to=web.cluster_ip(family, 80)).unanswered().tcp_only()
    box.expect(pod, to=web.cluster_ip(family, 81)).reaches("b1").tcp_only()
    box.check()


def test_should_be_able_to_up_and_down_services(box: Box, family: str, pod: str) -> None:
    first, second = box.service("b1", "c1"), box.service("b1", "c1")
    for web in (first, second):
        box.expect(pod, to=web.cluster_ip(family)).reaches("b1", "c1")
    box.check()
    first.delete()
    third = box.service("a2")
    box.expect(pod, to=first.cluster_ip(family)).unanswered()
    box.expect(pod, to=second.cluster_ip(family)).reaches("b1", "c1")
    box.expect(pod, to=third.cluster_ip(family)).reaches("a2")
    box.check()


def test_should_work_after_the_service_has_been_recreated(box: Box, family: str, pod: str) -> None:
    web = box.service("b1")
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()
    web.delete()
    box.expect(pod, to=web.cluster_ip(family)).unanswered()
    box.check()
    web.apply()
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_should_be_able_to_change_the_type_from_external_name(box: Box, family: str, pod: str, kind: str) -> None:
    web = box.service("b1", kinds=["ExternalName"])
    box.expect(pod, to=web.cluster_ip(family)).unanswered()
    box.check()
    web.change(kinds=[kind])
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    if kind == "NodePort":
        box.expect("outside", to=web.node_port("node3", family)).reaches("b1").sees_source("node3")
    box.check()


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_should_be_able_to_change_the_type_to_external_name(box: Box, family: str, pod: str, kind: str) -> None:
    web = box.service("b1", kinds=[kind])
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()
    web.change(kinds=["ExternalName"])
    box.expect(pod, to=web.cluster_ip(family)).unanswered()
    if kind == "NodePort":
        box.expect("outside", to=web.node_port("node1", family)).refused()
    box.check()


def test_should_be_able_to_change_the_type_and_ports_of_a_service(box: Box, family: str) -> None:
    """ClusterIP, NodePort, load balancer, scaled to nothing and back, and ClusterIP again; TCP and UDP alike."""
    web = box.service("a1", "b1")
    for kinds in (["NodePort"], ["LoadBalancer"]):
        web.change(kinds=kinds)
        box.expect("outside", to=web.node_port("node1", family)).reaches("a1", "b1").sees_source("node1")
    box.expect("outside", to=web.load_balancer(family)).reaches("a1", "b1").sees_source("node1")
    box.check()
    web.change(ports=[Port(port.port + 1, port.protocol, port.name, target=port.target) for port in web.ports])
    assert web.cluster_ip(family).port == 81
    box.expect("outside", to=web.load_balancer(family)).reaches("a1", "b1").sees_source("node1")
    box.check()
    web.endpoints()
    box.expect("outside", to=web.load_balancer(family)).refused()
    box.expect("outside", to=web.node_port("node1", family)).refused()
    box.check()
    web.endpoints("a1", "b1")
    web.change(kinds=())
    box.expect("a2", to=web.cluster_ip(family)).reaches("a1", "b1")
    box.expect("outside", to=web.node_port("node1", family)).refused()
    box.expect("outside", to=web.load_balancer(family)).unanswered()
    box.check()


def test_should_be_able_to_create_load_balancer_service_without_node_port_and_change_it(box: Box, family: str) -> None:
    web = box.prepare("b1", kinds=["LoadBalancer"], allocateLoadBalancerNodePorts=False)
    bare = web.manifest()
    for port in bare["spec"]["ports"]:  # type: ignore[index]
        del port["nodePort"]
    box.cluster.manifests.write(web.name, bare, *web.slices())
    box.settle()
    box.expect("outside", to=web.load_balancer(family)).reaches("b1").sees_source("node1")
    box.expect("outside", to=web.node_port("node1", family)).refused()
    box.check()
    web.change(allocateLoadBalancerNodePorts=True)
    box.expect("outside", to=web.load_balancer(family)).reaches("b1").sees_source("node1")
    box.expect("outside", to=web.node_port("node1", family)).reaches("b1").sees_source("node1")
    box.check()


def test_should_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_true(
    box: Box, family: str, pod: str
) -> None:
    """The slice controller then calls every endpoint ready, whatever else is true of it."""
    web = box.service("b1", "c1", publishNotReadyAddresses=True)
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1", "c1")
    box.check()


def test_should_not_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_false(
    box: Box, family: str, pod: str
) -> None:
    web = box.service(unready("b1"), dying("c1"), kinds=["NodePort"])
    box.expect(pod, to=web.cluster_ip(family)).refused()
    box.expect("outside", to=web.node_port("node2", family)).refused()
    box.check()


def test_should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_policy_cluster(
    box: Box, family: str, pod: str
) -> None:
    web = box.service(leaving("b1"), leaving("c1"), unready("a2"))
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1", "c1").sees_source(pod)
    box.check()
    web.endpoints(leaving("b1"), leaving("c1"), "a2")
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2").sees_source(pod)
    box.check()


def test_should_implement_service_kubernetes_io_service_proxy_name(box: Box, family: str, pod: str) -> None:
    web = box.service("b1")
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()
    foreign = web.manifest()
    foreign["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "another"}  # type: ignore[index]
    box.cluster.manifests.write(web.name, foreign, *web.slices())
    box.settle()
    box.expect(pod, to=web.cluster_ip(family)).unanswered()
    box.check()
    web.apply()
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()


def test_should_implement_service_kubernetes_io_headless(box: Box, family: str, pod: str) -> None:
    """The slice controller copies the label to the slices, so that the Service loses its endpoints."""
    web = box.service("b1")
    slices = web.slices()
    for each in slices:
        each["metadata"]["labels"]["service.kubernetes.io/headless"] = ""  # type: ignore[index]
    box.cluster.manifests.write(web.name, web.manifest(), *slices)
    box.settle()
    box.expect(pod, to=web.cluster_ip(family)).refused()
    box.check()
    web.apply()
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()


def test_should_support_a_service_with_multiple_endpoint_ips_specified_in_multiple_endpoint_slices(
    box: Box, family: str, pod: str
) -> None:
    web = box.prepare()
    web.headless_slices = tuple(
        endpoint_slice(web.name, web.ports, [web.member(where)[version == 6]], suffix=where)
        for where in ("b1", "c1")
        for version in (4, 6)
    )
    web.apply()
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1", "c1").sees_source(pod)
    box.check()


def test_should_support_a_service_with_multiple_ports_specified_in_multiple_endpoint_slices(
    box: Box, family: str, pod: str
) -> None:
    ports = (Port(80, "TCP", "first", target=TARGET), Port(81, "TCP", "second", target=OTHER))
    web = box.prepare(ports=ports)
    web.headless_slices = tuple(
        endpoint_slice(web.name, [port], [web.member(where)[version == 6]], suffix=f"{port.name}-{where}")
        for port in ports
        for where in ("b1", "c1")
        for version in (4, 6)
    )
    web.apply()
    for number in (80, 81):
        box.expect(pod, to=web.cluster_ip(family, number)).reaches("b1", "c1").tcp_only()
    box.check()


def test_should_support_named_target_ports_that_resolve_to_different_ports_on_different_endpoints(
    box: Box, family: str, pod: str
) -> None:
    web = box.prepare()
    web.headless_slices = tuple(
        endpoint_slice(
            web.name,
            [Port(port.port, port.protocol, port.name, target=target) for port in web.ports],
            [web.member(where)[version == 6]],
            suffix=where,
        )
        for where, target in (("b1", TARGET), ("c1", OTHER))
        for version in (4, 6)
    )
    web.apply()
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1", "c1").sees_source(pod)
    box.check()


def test_should_create_services_and_serve_on_different_service_cidrs(box: Box, family: str, pod: str) -> None:
    """Nothing depends on where cluster IPs lie: an external IP's prefix does as well for one."""
    web = box.prepare("b1")
    manifest = web.manifest()
    elsewhere = [in_family("172.31.255.7", each) for each in ("ipv4", "ipv6")]
    manifest["spec"] |= {"clusterIP": elsewhere[0], "clusterIPs": elsewhere}  # type: ignore[operator]
    box.cluster.manifests.write(web.name, manifest, *web.slices())
    box.settle()
    to = web.cluster_ip(family)._replace(address=elsewhere[family == "ipv6"])
    box.expect(pod, to=to).reaches("b1").sees_source(pod)
    box.check()


@pytest.mark.parametrize("only", ["ipv4", "ipv6"])
def test_should_create_a_single_stack_service(box: Box, only: str, pod: str) -> None:
    web = box.prepare("b1", kinds=["NodePort"])
    manifest = web.manifest()
    address = web.cluster_ip(only).address
    manifest["spec"] |= {  # type: ignore[operator]
        "clusterIP": address, "clusterIPs": [address], "ipFamilies": [only.replace("ipv", "IPv")],
    }  # fmt: skip
    box.cluster.manifests.write(web.name, manifest, *web.slices())
    box.settle()
    other = {"ipv4": "ipv6", "ipv6": "ipv4"}[only]
    box.expect(pod, to=web.cluster_ip(only)).reaches("b1").sees_source(pod)
    box.expect("outside", to=web.node_port("node1", only)).reaches("b1").sees_source("node1")
    box.expect(pod, to=web.cluster_ip(other)).unanswered()
    box.expect("outside", to=web.node_port("node1", other)).refused()
    box.check()


def test_a_backend_that_is_removed_keeps_the_connections_it_has(box: Box, family: str, pod: str) -> None:
    web = box.service("b1")
    with box.clients.converse(box.place(pod), web.cluster_ip(family), "TCP") as conversation:
        assert conversation.ask().server == "b1"
        web.endpoints("c1")
        assert conversation.ask().server == "b1"
        box.expect(pod, to=web.cluster_ip(family)).reaches("c1")
        box.check()
        web.endpoints()
        assert conversation.ask().server == "b1"
        web.delete()
        assert conversation.ask().server == "b1"
