"""The essence of all in the modes and topologies that the other tests leave out; also on a kernel without BPF and on a
machine without its compiler, where `--dataplane auto` falls to the next."""

from __future__ import annotations

import json
import socket
import time

import pytest

from ebpflb.dataplane.bpf import tc, tcx
from ebpflb.demo import namespaces
from tests.box.box import SLO, Box
from tests.box.modes import CLSACT
from tests.box.servers import pattern
from tests.box.test_affinity import STICKY
from tests.box.test_flows import preserve_udp_traffic
from tests.box.test_source_ranges import only
from tests.box.test_transfer import exchanged
from tests.pace import PACE

pytestmark = pytest.mark.box


def test_cluster_ips(rest: Box, family: str, pod: str) -> None:
    web = rest.service("a2", "b1", "sb", "node2")
    rest.expect(pod, to=web.cluster_ip(family)).reaches("a2", "b1", "sb", "node2")
    rest.expect("node1", to=web.cluster_ip(family)).reaches("a2", "b1", "sb", "node2").sees_source("node1")
    rest.expect("outside", to=web.cluster_ip(family)).reaches("a2", "b1", "sb", "node2").sees_source("node1")
    rest.check()
    web.endpoints("a2", "b1")
    rest.expect(pod, to=web.cluster_ip(family)).reaches("a2", "b1").sees_source(pod)
    rest.check()


def test_hairpin(rest: Box, family: str, pod: str) -> None:
    web = rest.service(pod)
    rest.expect(pod, to=web.cluster_ip(family)).reaches(pod).sees_source(pod if pod == "a1" else "node1")
    rest.check()


def test_node_ports(rest: Box, family: str) -> None:
    web = rest.service("a1", "b1", kinds=["NodePort"])
    for node in ("node1", "node2", "node3"):
        rest.expect("outside", to=web.node_port(node, family)).reaches("a1", "b1").sees_source(node)
    rest.check()


def test_external_traffic_policy_local(rest: Box, family: str, pod: str) -> None:
    web = rest.service("b1", kinds=["LoadBalancer"], externalTrafficPolicy="Local")
    rest.expect("outside", to=web.load_balancer(family, "node2")).reaches("b1").sees_source("outside")
    rest.expect("outside", to=web.load_balancer(family, "node1")).dropped(at="node1")
    rest.expect(pod, to=web.load_balancer(family, "node1")).reaches("b1").sees_source(pod)
    rest.check()


def test_no_endpoints(rest: Box, family: str, pod: str) -> None:
    web = rest.service(kinds=["NodePort"])
    for client in (pod, "outside"):
        rest.expect(client, to=web.cluster_ip(family)).refused()
    rest.expect("outside", to=web.node_port("node1", family)).refused()
    rest.check()


@pytest.mark.parametrize("server", ["a2", "b1"])
def test_large_datagrams_and_streams(rest: Box, family: str, pod: str, server: str) -> None:
    web = rest.service(server, kinds=["NodePort"])
    for client, to in ((pod, web.cluster_ip(family)), ("outside", web.node_port("node1", family))):
        with rest.clients.converse(rest.place(client), to, "UDP") as datagrams:
            assert exchanged(datagrams, 8000).server == server
        with rest.clients.converse(rest.place(client), to, "TCP", patience=10 * PACE) as stream:
            assert stream.fetch(1 << 20) == pattern(1 << 20)


@pytest.mark.needs("affinity")
def test_session_affinity(rest: Box, family: str) -> None:
    web = rest.service("a1", "b1", kinds=["NodePort"], **STICKY)
    rest.expect("sa", to=web.cluster_ip(family)).sticks_to_one_of("a1", "b1")
    rest.expect("outside", to=web.node_port("node1", family)).sticks_to_one_of("a1", "b1")
    rest.check()


@pytest.mark.needs("undefined-ports")
def test_a_port_that_a_cluster_ip_does_not_have(rest: Box, family: str) -> None:
    web = rest.service("b1")
    for client in ("sa", "node1", "outside"):
        rest.expect(client, to=web.cluster_ip(family, 4711)).refused()
    rest.check()


def test_source_ranges(rest: Box, family: str, pod: str) -> None:
    web = rest.service("b1", kinds=["LoadBalancer"], loadBalancerSourceRanges=only(rest, "node1", "outside"))
    for client in ("node1", "outside"):
        rest.expect(client, to=web.load_balancer(family)).reaches("b1").sees_source("node1")
    rest.expect(pod, to=web.load_balancer(family)).dropped(at="node1")
    rest.check()


def test_udp_traffic_when_the_server_pod_cycles(rest: Box, family: str, pod: str) -> None:
    web = rest.service(kinds=["NodePort"])
    preserve_udp_traffic(rest, pod, web, web.cluster_ip(family), "b1", "c1")
    preserve_udp_traffic(rest, "outside", web, web.node_port("node1", family), "b1", "a1")


LADDER = ("bpf", "ipvs", "iptables")


def test_who_carries_services_is_told_and_why_no_better_dataplane_does(rest: Box) -> None:
    """By log, `status` and `check`; where a dataplane was asked for by name, there is no better one to tell of."""
    name = rest.mode.dataplane
    better = list(LADDER[: LADDER.index(name)]) if "auto" in rest.mode.options else []
    for node in rest.cluster.nodes:
        (status,) = json.loads(rest.cluster.ebpflb(node, "status", "-o", "json").stdout)["items"]
        assert status["dataplane"] == name
        assert [passed["dataplane"] for passed in status["passed"]] == better
        assert all(passed["reason"] for passed in status["passed"])
        warnings = [line for line in rest.cluster.log(node).read_text().splitlines() if " WARNING dataplane " in line]
        assert [line.split(" WARNING dataplane ")[1].split()[0] for line in warnings] == better
    check = rest.cluster.ebpflb("node1", "check", *rest.mode.options, *rest.cluster.target("node1"))
    assert check.returncode == 0, check.stdout + check.stderr
    assert f"{name} would carry services here" in check.stdout
    for passed in better:
        assert f"\nnot {passed}: " in check.stdout


def test_a_dataplane_asked_for_by_name_never_falls_back(rest: Box) -> None:
    """Who insists on BPF where it cannot be had is told why, and nothing is touched; elsewhere it could be had."""
    before = rest.kernel.inventory("node1")
    check = rest.cluster.ebpflb("node1", "check", "--dataplane", "bpf", *rest.cluster.target("node1"))
    if "auto" in rest.mode.options:
        assert (check.returncode, "bpf" in check.stdout + check.stderr) == (3, True)
    else:
        assert (check.returncode, "bpf would carry services here" in check.stdout) == (0, True)
    assert rest.kernel.inventory("node1") == before


@pytest.mark.dataplanes("bpf")
def test_packet_programs_run_where_the_kernel_has_them(rest: Box) -> None:
    """At tcx, or as filters on an older kernel; never as both, or a packet would pass twice."""
    node = rest.cluster.nodes["node1"]
    with namespaces.inside(node.namespace):
        at_tcx = {each.side for each in tcx.running(socket.if_nametoindex("eth0"))}
    filters = {
        side
        for side, name in ((tc.INGRESS, "ingress"), (tc.EGRESS, "egress"))
        if "ebpflb" in rest.cluster.run(node, ["tc", "filter", "show", "dev", "eth0", name]).stdout
    }
    both = {tc.INGRESS, tc.EGRESS}
    modern = tcx.supported() and rest.mode is not CLSACT
    assert (at_tcx, filters) == ((both, set()) if modern else (set(), both))


@pytest.mark.modes("bpf-clsact")
@pytest.mark.parametrize("damage", ["filter delete dev eth0 ingress", "qdisc delete dev eth0 clsact"])
def test_filters_that_somebody_removes_are_put_back_at_once(rest: Box, family: str, damage: str) -> None:
    web = rest.service("b1", kinds=["NodePort"])
    assert rest.cluster.run(rest.cluster.nodes["node1"], ["tc", *damage.split()]).returncode == 0
    deadline = time.monotonic() + SLO
    while str(got := rest.clients.ask(rest.place("outside"), web.node_port("node1", family), "UDP", patience=0.2)):
        if str(got).startswith("b1"):
            break
        assert time.monotonic() < deadline, got
    rest.expect("outside", to=web.node_port("node1", family)).reaches("b1").sees_source("node1")
    rest.check()
