"""What kube-proxy in mode ipvs leaves behind, where the kernel has IPVS: found and removed, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebpflb.dataplane.ipvs.messages import NEW_SERVICE, Operation
from ebpflb.dataplane.ipvs.netlink import NetlinkKernel
from ebpflb.dataplane.ipvs.table import Server, Settings, packed
from ebpflb.leftovers import kernel
from tests.unit.test_leftovers import Node

pytestmark = [pytest.mark.vm, pytest.mark.root]

CLUSTER_IP, CLUSTER_IP_6, NODE_IP, OPERATORS = "10.96.0.1", "fd00:10:96::1", "10.0.0.5", "10.9.0.9"


def server(address: str, port: int, protocol: int = 6) -> Operation:
    return Operation(
        NEW_SERVICE, Server(6 if ":" in address else 4, 0, protocol, packed(address), port), Settings("rr")
    )


@pytest.fixture
def node() -> Iterator[Node]:
    """With what kube-proxy left, and two virtual servers of an operator."""
    made = Node()
    try:
        made.run("ip", "link", "add", "kube-ipvs0", "type", "dummy")
        made.run("ip", "addr", "add", f"{CLUSTER_IP}/32", "dev", "kube-ipvs0")
        made.run("ip", "addr", "add", f"{CLUSTER_IP_6}/128", "dev", "kube-ipvs0", "nodad")
        made.run("ip", "addr", "add", f"{NODE_IP}/32", "dev", "lo")
        made.run("ipset", "create", "KUBE-NODE-PORT-TCP", "bitmap:port", "range", "0-65535")
        made.run("ipset", "add", "KUBE-NODE-PORT-TCP", "30080")
        made.run("ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
        servers = [
            server(CLUSTER_IP, 443), server(CLUSTER_IP, 53, 17), server(CLUSTER_IP_6, 443), server(NODE_IP, 30080),
            server(OPERATORS, 80), server(NODE_IP, 80),
        ]  # fmt: skip
        assert made.inside(lambda: NetlinkKernel().apply(servers)) == {}
        yield made
    finally:
        made.close()


def test_virtual_servers_of_kube_proxy_go_and_an_operators_stay(node: Node) -> None:
    assert node.present() == ("ipsets KUBE-*", "kube-ipvs0")
    assert set(node.inventory()) == {
        "virtual server 10.96.0.1:443/TCP", "virtual server 10.96.0.1:53/UDP", "virtual server 10.0.0.5:30080/TCP",
        "virtual server [fd00:10:96::1]:443/TCP", "device kube-ipvs0", "ipset KUBE-CLUSTER-IP",
        "ipset KUBE-NODE-PORT-TCP",
    }  # fmt: skip
    node.cleanup()
    assert node.present() == node.inventory() == ()
    assert {str(each) for each in node.inside(kernel.servers)} == {"10.9.0.9:80/TCP", "10.0.0.5:80/TCP"}
    assert "kube-ipvs0" not in node.run("ip", "link")


def test_beside_our_sets_they_are_ours(node: Node) -> None:
    node.run("ipset", "create", "EBPFLB-FRONTENDS", "hash:ip,port")
    assert node.present() == node.inventory() == ()
    node.cleanup()
    assert len(node.inside(kernel.servers)) == 6
    assert node.inside(kernel.device)
