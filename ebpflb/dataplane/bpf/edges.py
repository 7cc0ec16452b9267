"""Which devices are the edges of a node, and what their rows say: pure.

Rules of this file: links and addresses in, decisions out. An edge is a device by which a packet enters or leaves this
network namespace as an Ethernet frame: hardware, veths, VXLAN, VLANs. Not an edge: loopback; a bridge (its ports are);
a slave of a bond, a team, a netvsc… (the master is); a port of Open vSwitch (the device by which the stack reaches it
is); devices that lead nowhere (dummy) or where packets pass that a real edge sees too (VRF): to a second edge on the
same way in, what the first has translated is a client's own to a backend, and leaves without masquerade. A device
without an Ethernet header cannot be one: the programs read Ethernet frames.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from ebpflb.rtnetlink import (
    ARPHRD_ETHER,
    IFA_F_DADFAILED,
    IFA_F_DEPRECATED,
    IFA_F_SECONDARY,
    IFA_F_TENTATIVE,
    IFF_LOOPBACK,
    IFF_UP,
    SCOPE_GLOBAL,
    InterfaceAddress,
    Link,
)

_NOT_EDGES = ("bridge", "dummy", "vrf", "ifb", "nlmon", "vcan")
_MASTERS_OF_EDGES = ("bridge", "vrf", "batadv")
"""Kinds of masters whose slaves are edges: pods on one bridge reach each other past its own device; a VRF has no frames
of its own; batman-adv takes from a slave only frames of its own protocol, which the programs pass by.

Any other master hands its slaves' frames in once more, as its own: bonds, teams, and those of drivers, which have no
kind (Azure's netvsc above its VF, net_failover). Open vSwitch, too, and there it could be the ports instead, as with a
bridge. But its rules go by what is on the wire (spoof guards, its own conntrack, policies, Services): a flow translated
at a port is a stranger's to them. Its CNIs (Antrea, Kube-OVN, OVN-Kubernetes) reckon with NAT where kube-proxy does it,
behind the device of kind "openvswitch" by which the stack reaches them; and whatever backend is behind it, on this node
or by a tunnel, answers to that device's address.
"""
OVERLAYS = frozenset(("vxlan", "geneve", "gretap", "ip6gretap", "erspan", "ip6erspan", "bareudp", "l2tp", "batadv"))
_PODS = OVERLAYS | {"veth", "netkit", "openvswitch"}
_NOWHERE = bytes(16)
_NO_MAC = bytes(6)


def is_edge(link: Link, patterns: tuple[str, ...] = ()) -> bool:
    """Whether our programs belong on `link`. `patterns` (shell-like, () for all) narrow the devices of outside traffic;
    those by which pods are reached, here and on other nodes, always belong: veths, bridge ports, overlays, Open
    vSwitch's. What was translated where it entered must be masqueraded where it leaves."""
    if link.type != ARPHRD_ETHER or link.flags & IFF_LOOPBACK or link.kind in _NOT_EDGES:
        return False
    if link.master and link.slave_kind not in _MASTERS_OF_EDGES:
        return False
    if not patterns or link.kind in _PODS or link.slave_kind == "bridge":
        return True
    return any(fnmatch.fnmatchcase(link.name, pattern) for pattern in patterns)


def is_out_of_reach(link: Link, patterns: tuple[str, ...] = ()) -> bool:
    """Whether Service traffic by `link` would go unserved: it is up, and has no Ethernet header."""
    if link.type == ARPHRD_ETHER or link.flags & IFF_LOOPBACK or not link.flags & IFF_UP:
        return False
    return not patterns or any(fnmatch.fnmatchcase(link.name, pattern) for pattern in patterns)


def is_pod_device(link: Link, links: Mapping[int, Link], pod_interface: str) -> bool:
    """Whether what enters by `link` is a local pod's: `pod_interface` (as in `routes.Locality`) names it or its
    bridge."""
    if not pod_interface:
        return False
    names = [link.name]
    if link.slave_kind == "bridge" and link.master in links:
        names.append(links[link.master].name)
    if pod_interface.endswith("*"):
        return any(name.startswith(pod_interface[:-1]) for name in names)
    return pod_interface in names


def leads_to_a_namespace(link: Link) -> bool:
    """Whether what leaves by `link` enters another network namespace, with nothing in between: a veth that is on no
    bridge, whose other end is there."""
    return link.kind == "veth" and link.leads_away and not link.master


def own_mac(link: Link) -> bytes:
    """The link-layer address of what is for this node among all that enters by `link`; zero for whatever enters: a
    bridge's port takes frames for the bridge or another port, and they are our business all the same."""
    if len(link.mac) != 6 or link.slave_kind == "bridge":
        return _NO_MAC
    return link.mac


def masquerade_addresses(
    link: Link, links: Mapping[int, Link], held: Iterable[InterfaceAddress], defaults: Mapping[int, int]
) -> tuple[bytes, bytes]:
    """What masquerade takes on `link`, (IPv4, IPv6), 16 zero bytes for none.

    The device's own first global address; of a bridge port or another slave, its master's; failing that, one of the
    node's, best of the device of the default route (`defaults`: by version). First is what has been there for longest,
    and not a single address beside one of a network: that may be a virtual one, which moves to another node with all
    that is answered to it. `held` is in the order in which the kernel lists addresses.
    """
    own = {link.ifindex, link.master} - {0}

    def rank(place: int, address: InterfaceAddress) -> tuple[bool | int, ...]:
        device = links.get(address.ifindex)
        idle = device is None or device.kind == "dummy" or bool(device.flags & IFF_LOOPBACK)
        poor = bool(address.flags & (IFA_F_DEPRECATED | IFA_F_TENTATIVE | IFA_F_SECONDARY))
        elsewhere = address.ifindex not in own
        away = elsewhere and address.ifindex != defaults.get(address.version)
        single = address.bits == (32 if address.version == 4 else 128)
        # A device's addresses are listed in the order in which they came, but those of IPv6 in reverse (as of 6.18).
        age = place if address.version == 4 else -place
        return (elsewhere, address.ifindex != link.ifindex, poor, away, idle, single, address.ifindex, age)

    def best(version: int) -> bytes:
        usable = [
            (rank(place, address), address.address)
            for place, address in enumerate(held)
            if address.version == version and address.scope == SCOPE_GLOBAL and not address.flags & IFA_F_DADFAILED
        ]
        return min(usable)[1] if usable else _NOWHERE

    return best(4), best(6)
