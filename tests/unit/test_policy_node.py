"""The packet-flow table, part 4: what the node and the options make of it: NodePort addresses, who counts as a pod."""

from __future__ import annotations

import pytest

from ebpflb.facts import nodeport_addresses
from ebpflb.model import DetectLocal, Family
from tests.flows import Situation, check, every, situation
from tests.world import LOCAL, endpoint_slice, node, options, port, service

V4, V6 = (Family.IPV4,), (Family.IPV6,)
TWO = endpoint_slice("10.0.1.1", "10.0.2.1")
BOTH = "10.0.1.1:80 10.0.2.1:80"
MASQ_BOTH = f"masq {BOTH}"
NODE_PORT = service("ns1/svc1", "172.30.0.41", port(80, node_port=30080))
BALANCER = service(lb=["1.2.3.4"], external_policy=LOCAL)
THREE_ADDRESSES = node(addresses=["10.0.1.254", "127.0.0.1", "192.168.0.2", "198.51.100.2"])

NODE_PORTS = (
    situation(
        "node-port-on-every-node-address",
        NODE_PORT,
        TWO,
        node=THREE_ADDRESSES,
        wanted={
            "outside 192.168.0.2:30080": MASQ_BOTH,
            "outside 198.51.100.2:30080": MASQ_BOTH,
            "pod 10.0.1.254:30080": MASQ_BOTH,
            "outside 192.168.0.3:30080": "NOT_SERVICE",
        },
    ),
    situation(
        "node-port-outside-nodeport-addresses-is-not-ours",
        NODE_PORT,
        TWO,
        node=THREE_ADDRESSES,
        options=options(nodeport_addresses=["198.51.100.0/24"]),
        wanted={"outside 198.51.100.2:30080": MASQ_BOTH, "outside 192.168.0.2:30080": "NOT_SERVICE"},
    ),
    situation(
        "node-port-outside-nodeport-addresses-is-not-rejected-either",
        NODE_PORT,
        node=THREE_ADDRESSES,
        options=options(nodeport_addresses=["198.51.100.0/24"]),
        wanted={"outside 198.51.100.2:30080": "REJECT", "outside 192.168.0.2:30080": "NOT_SERVICE"},
    ),
    situation(
        "nodeport-addresses-primary",
        NODE_PORT,
        TWO,
        node=THREE_ADDRESSES,
        options=options(nodeport_primary=True),
        wanted={
            "outside 192.168.0.2:30080": MASQ_BOTH,
            "outside 198.51.100.2:30080": "NOT_SERVICE",
            "node 127.0.0.1:30080": "NOT_SERVICE",
        },
    ),
    situation(
        "node-port-on-ipv4-loopback",
        NODE_PORT,
        TWO,
        families=V4,
        wanted={"node 127.0.0.1:30080": MASQ_BOTH, "127.0.0.1 127.0.0.1:30080": MASQ_BOTH},
    ),
    situation(
        "node-port-never-on-ipv6-loopback",
        NODE_PORT,
        TWO,
        families=V6,
        wanted={"::1 ::1:30080": "NOT_SERVICE", "node ::1:30080": "NOT_SERVICE"},
    ),
    situation(
        "node-port-on-loopback-switched-off",
        NODE_PORT,
        TWO,
        options=options(localhost_nodeports=False),
        wanted={"127.0.0.1 127.0.0.1:30080": "NOT_SERVICE", "outside 192.168.0.2:30080": MASQ_BOTH},
    ),
    situation(
        "nodeport-addresses-without-loopback",
        NODE_PORT,
        TWO,
        options=options(nodeport_addresses=["192.168.0.0/24"]),
        wanted={"127.0.0.1 127.0.0.1:30080": "NOT_SERVICE", "outside 192.168.0.2:30080": MASQ_BOTH},
    ),
    situation(
        "nodeport-addresses-loopback-only",
        NODE_PORT,
        TWO,
        options=options(nodeport_addresses=["127.0.0.0/8"]),
        families=V4,
        wanted={"127.0.0.1 127.0.0.1:30080": MASQ_BOTH, "outside 192.168.0.2:30080": "NOT_SERVICE"},
    ),
)

DETECT = (
    situation(
        "detect-local-cluster-cidr-counts-pods-of-other-nodes",
        BALANCER,
        TWO,
        wanted={"pod 1.2.3.4:80": BOTH, "remote-pod 1.2.3.4:80": BOTH, "outside 1.2.3.4:80": "10.0.1.1:80"},
    ),
    situation(
        "detect-local-node-cidr",
        BALANCER,
        TWO,
        options=options(detect_local=DetectLocal.NODE_CIDR, cluster_cidrs=()),
        wanted={
            "pod 1.2.3.4:80": BOTH,
            "remote-pod 1.2.3.4:80": "10.0.1.1:80",
            "pod 172.30.0.41:80": BOTH,
            "remote-pod 172.30.0.41:80": MASQ_BOTH,
        },
    ),
    situation(
        "detect-local-node-cidr-before-the-node-has-one",
        BALANCER,
        TWO,
        node=node(pod_cidrs=()),
        options=options(detect_local=DetectLocal.NODE_CIDR),
        wanted={"pod 1.2.3.4:80": "10.0.1.1:80", "outside 172.30.0.41:80": BOTH},
    ),
    situation(
        "detect-local-bridge-interface",
        BALANCER,
        TWO,
        options=options(detect_local=DetectLocal.BRIDGE_INTERFACE, bridge_interface="cni0"),
        wanted={
            "pod@cni0 1.2.3.4:80": BOTH,
            "pod@cni01 1.2.3.4:80": "10.0.1.1:80",
            "pod 1.2.3.4:80": "10.0.1.1:80",
            "outside@eth0 1.2.3.4:80": "10.0.1.1:80",
            "pod@cni0 172.30.0.41:80": BOTH,
            "outside@eth0 172.30.0.41:80": MASQ_BOTH,
            "node 172.30.0.41:80": MASQ_BOTH,
        },
    ),
    situation(
        "detect-local-interface-name-prefix",
        BALANCER,
        TWO,
        options=options(detect_local=DetectLocal.INTERFACE_NAME_PREFIX, interface_name_prefix="veth"),
        wanted={
            "pod@veth1234 1.2.3.4:80": BOTH,
            "pod@veth 1.2.3.4:80": BOTH,
            "pod@eth0 1.2.3.4:80": "10.0.1.1:80",
            "pod@xveth 172.30.0.41:80": MASQ_BOTH,
        },
    ),
    situation(
        "detect-local-interface-modes-ignore-cidrs",
        BALANCER,
        TWO,
        options=options(detect_local=DetectLocal.BRIDGE_INTERFACE, bridge_interface="cni0"),
        wanted={"pod 172.30.0.41:80": MASQ_BOTH},
    ),
    situation(
        "detect-local-mode-without-its-input-detects-nothing",
        BALANCER,
        TWO,
        options=options(detect_local=DetectLocal.INTERFACE_NAME_PREFIX),
        wanted={"pod@veth0 1.2.3.4:80": "10.0.1.1:80", "outside@eth0 172.30.0.41:80": BOTH},
    ),
    situation(
        "cluster-cidr-of-the-other-family-detects-nothing-here",
        BALANCER,
        TWO,
        options=options(cluster_cidrs=["fd01::/64"]),
        wanted={"pod 1.2.3.4:80": "10.0.1.1:80", "outside 172.30.0.41:80": BOTH},
        families=V4,
    ),
    situation(
        "two-cluster-cidrs-of-one-family",
        BALANCER,
        TWO,
        options=options(cluster_cidrs=["10.0.2.0/24", "10.0.1.0/24"]),
        wanted={"pod 1.2.3.4:80": BOTH, "remote-pod 1.2.3.4:80": BOTH, "10.0.3.1 1.2.3.4:80": "10.0.1.1:80"},
    ),
    situation(
        "node-address-on-its-own-pod-bridge-is-a-pod-too",
        BALANCER,
        TWO,
        node=THREE_ADDRESSES,
        wanted={"10.0.1.254 172.30.0.41:80": BOTH, "10.0.1.254 1.2.3.4:80": BOTH},
    ),
    situation(
        "every-local-address-is-the-node",
        BALANCER,
        TWO,
        node=THREE_ADDRESSES,
        options=options(cluster_cidrs=()),
        wanted={
            "198.51.100.2 1.2.3.4:80": MASQ_BOTH,
            "127.0.0.1 1.2.3.4:80": MASQ_BOTH,
            "10.0.1.254 1.2.3.4:80": MASQ_BOTH,
        },
    ),
    situation(
        "node-without-address-of-the-family-stands-for-loopback-in-source-ranges",
        service(lb=["1.2.3.4"], ranges=["127.0.0.0/8"]),
        TWO,
        node=node(addresses=["127.0.0.1"], primary=[]),
        families=V4,
        wanted={"1.2.3.4 1.2.3.4:80": MASQ_BOTH, "127.0.0.1 1.2.3.4:80": MASQ_BOTH, "outside 1.2.3.4:80": "DROP"},
    ),
)

ROWS: tuple[Situation, ...] = NODE_PORTS + DETECT


@every(ROWS)
def test_flow(row: Situation, family: Family) -> None:
    check(row, family)


ADDRESSES = ("10.0.1.254", "127.0.0.1", "127.0.0.53", "169.254.20.10", "192.168.0.2", "::1", "fd00::2", "fe80::2")


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        pytest.param(options(), "10.0.1.254 127.0.0.1 169.254.20.10 192.168.0.2 fd00::2", id="all-local-addresses"),
        pytest.param(
            options(localhost_nodeports=False), "10.0.1.254 169.254.20.10 192.168.0.2 fd00::2", id="without-loopback"
        ),
        pytest.param(
            options(nodeport_addresses=["192.168.0.0/24"]), "192.168.0.2 fd00::2", id="one-family-leaves-other-open"
        ),
        pytest.param(
            options(nodeport_addresses=["fd00::/64"]),
            "10.0.1.254 127.0.0.1 169.254.20.10 192.168.0.2 fd00::2",
            id="ipv6-only-leaves-ipv4-open",
        ),
        pytest.param(
            options(nodeport_addresses=["192.168.0.0/24", "fe80::/64", "::1/128"]), "192.168.0.2", id="never-link-local"
        ),
        pytest.param(
            options(nodeport_addresses=["0.0.0.0/0", "::/0"]),
            "10.0.1.254 127.0.0.1 169.254.20.10 192.168.0.2 fd00::2",
            id="zero-cidrs-are-all",
        ),
        pytest.param(options(nodeport_primary=True), "192.168.0.2 fd00::2", id="primary"),
    ],
)
def test_nodeport_addresses(chosen: object, wanted: str) -> None:
    this = node(addresses=ADDRESSES, primary=["192.168.0.2", "fd00::2", "192.168.0.99"])
    assert nodeport_addresses(this, chosen) == tuple(wanted.split())  # type: ignore[arg-type]
