"""The addresses and the wiring of a small cluster, as commands of `ip`.

Rules of this file: pure text; nothing here touches the machine. An address tells its role, in either family:

    nodes      192.168.0.2, .3 …       fd00:192:168::2 …       (the fabric that joins them is .1)
    pods       10.244.<node>.10 …      fd00:10:244:<node>::10 …
    outside    203.0.113.10            fd00:203:0:113::10

The fabric is a bridge to the nodes and a router to the outside client. It stands for the network between machines, and
so it knows no pod: the nodes route those among themselves, plainly or over VXLAN.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

POD_CIDRS = ("10.244.0.0/16", "fd00:10:244::/48")
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"
GATEWAYS = ("169.254.1.1", "fe80::ecee:eeff:feee:eeee")  # the latter is what the MAC above gives
VXLAN_OVERHEAD = 50


class Join(enum.Enum):
    """How one node's pods reach another's."""

    ROUTES = "routes"
    VXLAN = "vxlan"


class Cni(enum.Enum):
    """How a pod is tied to its node. ROUTED: a veth without an address and a route of one host. BRIDGE: a port of
    cni0, as the CNI bridge plugin makes it."""

    ROUTED = "routed"
    BRIDGE = "bridge"


class Addresses(NamedTuple):
    """One address in each family."""

    ipv4: str
    ipv6: str


FABRIC = Addresses("192.168.0.1", "fd00:192:168::1")
OUTSIDE_GATEWAY = Addresses("203.0.113.1", "fd00:203:0:113::1")
OUTSIDE = Addresses("203.0.113.10", "fd00:203:0:113::10")

# Strict reverse path filtering: a packet whose source would not be routed back where it came from is dropped.
NODE_SYSCTLS = {
    "ipv4/ip_forward": 1,
    "ipv4/conf/all/rp_filter": 1,
    "ipv4/conf/default/rp_filter": 1,
    "ipv6/conf/all/forwarding": 1,
}
FABRIC_SYSCTLS = {
    "ipv4/ip_forward": 1,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
    "ipv6/conf/all/forwarding": 1,
}
# No waiting for duplicate addresses, no router advertisements: addresses work as soon as they are there. And no limit
# on how often a closed port is told of.
ALL_SYSCTLS = {
    "ipv6/conf/all/disable_ipv6": 0,
    "ipv6/conf/default/disable_ipv6": 0,
    "ipv6/conf/all/accept_dad": 0,
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/all/accept_ra": 0,
    "ipv6/conf/default/accept_ra": 0,
    "ipv4/icmp_ratemask": 0,
    "ipv6/icmp/ratelimit": 0,
}


def node_addresses(index: int) -> Addresses:
    """Of the node with this number, counted from 1."""
    return Addresses(f"192.168.0.{index + 1}", f"fd00:192:168::{index + 1:x}")


def pod_addresses(node: int, index: int) -> Addresses:
    """Of pod number `index` (from 0) on a node."""
    return Addresses(f"10.244.{node}.{index + 10}", f"fd00:10:244:{node:x}::{index + 0x10:x}")


def pod_cidrs(node: int) -> Addresses:
    """Where the addresses of a node's pods lie."""
    return Addresses(f"10.244.{node}.0/24", f"fd00:10:244:{node:x}::/64")


def fabric(client: str) -> list[str]:
    """In the fabric: its bridge, and the wire to the namespace of the outside client."""
    return [
        "link add br0 type bridge",
        f"address add {FABRIC.ipv4}/24 dev br0",
        f"address add {FABRIC.ipv6}/64 dev br0 nodad",
        "link set br0 up",
        f"link add outside type veth peer name eth0 netns {client}",
        f"address add {OUTSIDE_GATEWAY.ipv4}/24 dev outside",
        f"address add {OUTSIDE_GATEWAY.ipv6}/64 dev outside nodad",
        "link set outside up",
    ]


def outside() -> list[str]:
    """In the namespace of the outside client."""
    return [*_addressed("eth0", OUTSIDE, 24, 64), *_defaults("eth0", OUTSIDE_GATEWAY)]


def port(node: int) -> str:
    """The fabric's end of the wire to a node."""
    return f"node{node}"


def plug(node: int, namespace: str) -> list[str]:
    """In the fabric: the wire to a node."""
    name = port(node)
    return [f"link add {name} type veth peer name eth0 netns {namespace}", f"link set {name} master br0 up"]


def node(index: int) -> list[str]:
    """In a node: its device, before its peers are known."""
    return [*_addressed("eth0", node_addresses(index), 24, 64), *_defaults("eth0", FABRIC)]


def cni0(node: int, mtu: int) -> list[str]:
    """In a node: the bridge for its pods, with a MAC of its own, as the plugin sets it: else it has its ports' lowest,
    and whenever that changes, pods talk to a gateway that is gone."""
    address = Addresses(f"10.244.{node}.1", f"fd00:10:244:{node:x}::1")
    return [f"link add cni0 address {_bridge_mac(node)} mtu {mtu} type bridge", *_addressed("cni0", address, 24, 64)]


def plain_routes(index: int, peers: Sequence[int]) -> list[str]:
    """In a node: the pods of the others are behind them."""
    return [
        f"route add {cidr} via {address}"
        for peer in peers
        if peer != index
        for cidr, address in zip(pod_cidrs(peer), node_addresses(peer), strict=True)
    ]


def vxlan(index: int, peers: Sequence[int], mtu: int) -> list[str]:
    """In a node: an overlay device with an address of its own, and routes over it."""
    lines = [
        f"link add vxlan0 address {_vtep_mac(index)} mtu {mtu} type vxlan id 1 dev eth0 "
        f"local {node_addresses(index).ipv4} dstport 8472 nolearning",
        *_addressed("vxlan0", _vtep(index), 32, 128),
    ]
    for peer in peers:
        if peer != index:
            for cidr, address in zip(pod_cidrs(peer), _vtep(peer), strict=True):
                lines.append(f"neighbour add {address} lladdr {_vtep_mac(peer)} dev vxlan0 nud permanent")
                lines.append(f"route add {cidr} via {address} dev vxlan0 onlink")
    return lines


def vxlan_forwarding(index: int, peers: Sequence[int]) -> list[str]:
    """In a node, for `bridge`: which node has which overlay device."""
    return [
        f"fdb append {_vtep_mac(peer)} dev vxlan0 dst {node_addresses(peer).ipv4}" for peer in peers if peer != index
    ]


def masquerade() -> list[str]:
    """In a node, for `nft`: what pods send to anything but pods leaves with the node's address, as overlay CNIs do
    it; the answer would find no way back into the overlay. A node's own conntrack then sees every flow."""
    return [
        "table inet cni {",
        " chain leaving {",
        "  type nat hook postrouting priority srcnat;",
        f"  ip saddr {POD_CIDRS[0]} ip daddr != {POD_CIDRS[0]} masquerade",
        f"  ip6 saddr {POD_CIDRS[1]} ip6 daddr != {POD_CIDRS[1]} masquerade",
        " }",
        "}",
    ]


def routed_pod(device: str, namespace: str, addresses: Addresses, mtu: int) -> list[str]:
    """In a node: a pod's wire without an address of its own, and the route to that one pod."""
    return [
        f"link add {device} mtu {mtu} address {GATEWAY_MAC} type veth peer name eth0 mtu {mtu} netns {namespace}",
        f"link set {device} up",
        f"route add {addresses.ipv4}/32 dev {device}",
        f"route add {addresses.ipv6}/128 dev {device}",
    ]


def routed_pod_inside(addresses: Addresses) -> list[str]:
    """In such a pod: a gateway that is nobody's address; the node answers for it."""
    return [
        *_addressed("eth0", addresses, 32, 128),
        f"route add {GATEWAYS[0]} dev eth0 scope link",
        *_defaults("eth0", Addresses(*GATEWAYS)),
    ]


def routed_pod_sysctls(device: str) -> dict[str, int]:
    """In a node: answer for the gateway at once."""
    return {f"ipv4/conf/{device}/proxy_arp": 1, f"ipv4/neigh/{device}/proxy_delay": 0}


def bridged_pod(device: str, namespace: str, mtu: int, hairpin: bool) -> list[str]:
    """In a node: a pod's wire as a port of cni0."""
    return [
        f"link add {device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {namespace}",
        f"link set {device} master cni0 up",
        f"link set {device} type bridge_slave hairpin {'on' if hairpin else 'off'}",
    ]


def bridged_pod_inside(node: int, addresses: Addresses) -> list[str]:
    """In such a pod."""
    gateway = Addresses(f"10.244.{node}.1", f"fd00:10:244:{node:x}::1")
    return [*_addressed("eth0", addresses, 24, 64), *_defaults("eth0", gateway)]


def _addressed(device: str, addresses: Addresses, bits4: int, bits6: int) -> list[str]:
    return [
        f"address add {addresses.ipv4}/{bits4} dev {device}",
        f"address add {addresses.ipv6}/{bits6} dev {device} nodad",
        f"link set {device} up",
    ]


def _defaults(device: str, gateway: Addresses) -> list[str]:
    return [f"route add default via {address} dev {device}" for address in gateway]


def _vtep(node: int) -> Addresses:
    return Addresses(f"10.244.{node}.0", f"fd00:10:244:{node:x}::e")


def _bridge_mac(node: int) -> str:
    return f"02:eb:00:00:01:{node:02x}"


def _vtep_mac(node: int) -> str:
    return f"02:eb:00:00:00:{node:02x}"
