"""Which devices are edges, which are pods', and what masquerade takes on each: as tables."""

from __future__ import annotations

import pytest

from ebpflb.dataplane.bpf.clsact import first_preference
from ebpflb.dataplane.bpf.device_rows import Row
from ebpflb.dataplane.bpf.edges import is_edge, is_out_of_reach, is_pod_device, masquerade_addresses, own_mac
from ebpflb.dataplane.bpf.ports import free_ports
from ebpflb.dataplane.bpf.tc import ALL_PROTOCOLS, INGRESS, Filter
from ebpflb.routes import packed
from ebpflb.rtnetlink import InterfaceAddress, Link

NONE = bytes(16)
ETHER, LOOPBACK, NO_HEADER = 1, 772, 65534
UP, IS_LOOPBACK = 1, 8


def link(name: str, index: int = 2, kind: str = "", slave: str = "", master: int = 0, type: int = ETHER) -> Link:
    return Link(index, name, kind, slave, master, type, UP | (IS_LOOPBACK if type == LOOPBACK else 0))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        pytest.param(link("eth0"), True, id="hardware"),
        pytest.param(link("veth1", kind="veth"), True, id="veth"),
        pytest.param(link("veth1", kind="veth", slave="bridge", master=9), True, id="bridge port"),
        pytest.param(link("vxlan0", kind="vxlan"), True, id="vxlan"),
        pytest.param(link("eth0.7", kind="vlan"), True, id="vlan"),
        pytest.param(link("bond0", kind="bond"), True, id="bond"),
        pytest.param(link("eth0", slave="vrf", master=9), True, id="in a vrf"),
        pytest.param(link("cni0", kind="bridge"), False, id="bridge"),
        pytest.param(link("eth0", slave="bond", master=9), False, id="slave of a bond"),
        pytest.param(link("eth0", slave="team", master=9), False, id="slave of a team"),
        pytest.param(link("enP1s1", master=2), False, id="VF below a netvsc: a master without a kind"),
        pytest.param(link("eth0", slave="other", master=9), False, id="slave of any other"),
        pytest.param(link("eth0", slave="batadv", master=9), True, id="beside batman-adv"),
        pytest.param(link("antrea-gw0", kind="openvswitch"), True, id="the stack's device of Open vSwitch"),
        pytest.param(link("eth0", slave="openvswitch", master=9), False, id="uplink of Open vSwitch"),
        pytest.param(link("genev_sys_6081", kind="geneve", slave="openvswitch", master=9), False, id="tunnel of it"),
        pytest.param(link("pod1", kind="veth", slave="openvswitch", master=9), False, id="pod on it"),
        pytest.param(link("kube-ipvs0", kind="dummy"), False, id="dummy"),
        pytest.param(link("red", kind="vrf"), False, id="vrf"),
        pytest.param(link("lo", type=LOOPBACK), False, id="loopback"),
        pytest.param(link("wg0", kind="wireguard", type=NO_HEADER), False, id="no ethernet header"),
    ],
)
def test_edges(device: Link, expected: bool) -> None:
    assert is_edge(device) is expected


@pytest.mark.parametrize(
    ("device", "patterns", "expected"),
    [
        (link("eth0"), ("eth*",), True),
        (link("ens3"), ("eth*",), False),
        (link("ens3"), ("eth*", "ens3"), True),
        (link("cali1", kind="veth"), ("eth*",), True),
        (link("tap1", slave="bridge", master=9), ("eth*",), True),
        (link("flannel.1", kind="vxlan"), ("eth*",), True),
        (link("cilium_geneve", kind="geneve"), ("eth*",), True),
        (link("antrea-gw0", kind="openvswitch"), ("eth*",), True),
        (link("pod1", kind="netkit"), ("eth*",), True),
        (link("eth1.7", kind="vlan"), ("eth0",), False),
        (link("cni0", kind="bridge"), ("cni0",), False),
    ],
)
def test_patterns_narrow_all_but_those_by_which_pods_are_reached(
    device: Link, patterns: tuple[str, ...], expected: bool
) -> None:
    assert is_edge(device, patterns) is expected


def test_out_of_reach_is_what_is_up_and_wanted_and_has_no_ethernet_header() -> None:
    tunnel = link("wg0", kind="wireguard", type=NO_HEADER)
    assert is_out_of_reach(tunnel)
    assert not is_out_of_reach(tunnel._replace(flags=0))
    assert not is_out_of_reach(tunnel, ("eth*",))
    assert is_out_of_reach(tunnel, ("wg*",))
    assert not is_out_of_reach(link("lo", type=LOOPBACK))
    assert not is_out_of_reach(link("eth0"))


BRIDGE = link("cni0", 9, kind="bridge")
PORT = link("veth1", 3, kind="veth", slave="bridge", master=9)
NODE = link("eth0", 2)
_ALL = (link("lo", 1, type=LOOPBACK), NODE, PORT, BRIDGE, link("idle", 8, kind="dummy"))
LINKS = {each.ifindex: each for each in _ALL}


@pytest.mark.parametrize(
    ("device", "name", "expected"),
    [
        (PORT, "", False),
        (PORT, "veth1", True),
        (PORT, "veth", False),
        (PORT, "veth*", True),
        (PORT, "cni0", True),
        (PORT, "cni*", True),
        (NODE, "cni0", False),
        (NODE, "veth*", False),
    ],
)
def test_pod_devices(device: Link, name: str, expected: bool) -> None:
    assert is_pod_device(device, LINKS, name) is expected


MAC = bytes.fromhex("020000000007")


@pytest.mark.parametrize(
    ("device", "mac", "expected"),
    [
        pytest.param(NODE, MAC, MAC, id="hardware"),
        pytest.param(link("eth0", slave="vrf", master=9), MAC, MAC, id="in a vrf"),
        pytest.param(PORT, MAC, bytes(6), id="bridge port"),
        pytest.param(link("ib0"), bytes(20), bytes(6), id="an address of another length"),
    ],
)
def test_frames_are_for_the_devices_own_address_unless_it_takes_them_for_others(
    device: Link, mac: bytes, expected: bytes
) -> None:
    assert own_mac(device._replace(mac=mac)) == expected


def at(index: int, address: str, scope: int = 0, flags: int = 0, bits: int = 24) -> InterfaceAddress:
    return InterfaceAddress(index, 6 if ":" in address else 4, packed(address), scope, flags, bits)


SECONDARY, DADFAILED, DEPRECATED, TENTATIVE = 0x01, 0x08, 0x20, 0x40
HOST, LINK = 254, 253


@pytest.mark.parametrize(
    ("device", "held", "defaults", "expected"),
    [
        pytest.param(NODE, [], {}, "", id="none at all"),
        pytest.param(NODE, [at(2, "192.0.2.1"), at(2, "192.0.2.2")], {}, "192.0.2.1", id="the first"),
        pytest.param(
            NODE, [at(2, "fd00::2"), at(2, "fd00::1")], {}, "fd00::1", id="the first, of IPv6 the last listed"
        ),
        pytest.param(NODE, [at(2, "192.0.2.9", bits=32), at(2, "192.0.2.1")], {}, "192.0.2.1", id="no virtual one"),
        pytest.param(NODE, [at(2, "fd00::1", bits=64), at(2, "fd00::9", bits=128)], {}, "fd00::1", id="nor of IPv6"),
        pytest.param(NODE, [at(2, "192.0.2.1", bits=32)], {}, "192.0.2.1", id="a single one, if there is no other"),
        pytest.param(
            PORT,
            [at(2, "192.0.2.1", bits=32), at(5, "10.0.0.1")],
            {4: 2},
            "192.0.2.1",
            id="a single one of the default route's device",
        ),
        pytest.param(
            NODE, [at(2, "192.0.2.9", flags=SECONDARY), at(2, "192.0.2.1")], {}, "192.0.2.1", id="not secondary"
        ),
        pytest.param(
            NODE, [at(2, "192.0.2.9", flags=SECONDARY)], {}, "192.0.2.9", id="secondary, if it is the only one"
        ),
        pytest.param(PORT, [at(2, "192.0.2.1"), at(9, "10.0.0.1")], {4: 2}, "10.0.0.1", id="a port takes its bridge's"),
        pytest.param(PORT, [at(9, "10.0.0.1"), at(3, "10.0.0.3")], {}, "10.0.0.3", id="its own goes first"),
        pytest.param(PORT, [at(8, "10.9.9.9"), at(2, "192.0.2.1")], {}, "192.0.2.1", id="the node's, not a dummy's"),
        pytest.param(
            PORT, [at(1, "10.9.9.9"), at(8, "10.8.8.8")], {}, "10.9.9.9", id="an idle one, if there is no other"
        ),
        pytest.param(
            NODE,
            [at(4, "198.51.100.1"), at(5, "192.0.2.1")],
            {4: 5},
            "192.0.2.1",
            id="the default route's device",
        ),
        pytest.param(
            NODE, [at(2, "169.254.0.1", scope=LINK), at(1, "127.0.0.1", scope=HOST)], {}, "", id="only global ones"
        ),
        pytest.param(NODE, [at(2, "fd00::9", flags=DEPRECATED), at(2, "fd00::1")], {}, "fd00::1", id="not deprecated"),
        pytest.param(NODE, [at(2, "fd00::9", flags=TENTATIVE), at(2, "fd00::1")], {}, "fd00::1", id="not tentative"),
        pytest.param(NODE, [at(2, "fd00::9", flags=DADFAILED)], {}, "", id="not a duplicate"),
        pytest.param(NODE, [at(2, "fe80::1", scope=LINK), at(5, "fd00::5")], {}, "fd00::5", id="not link-local"),
    ],
)
def test_masquerade_address(
    device: Link, held: list[InterfaceAddress], defaults: dict[int, int], expected: str
) -> None:
    known = LINKS | {4: link("eth4", 4), 5: link("eth5", 5)}
    ipv4, ipv6 = masquerade_addresses(device, known, held, defaults)
    wanted = packed(expected) if expected else NONE
    assert (ipv4, ipv6) == ((NONE, wanted) if ":" in expected else (wanted, NONE))


def bpf(preference: int, handle: int = 1, protocol: int = ALL_PROTOCOLS, kind: str = "bpf") -> Filter:
    return Filter(INGRESS, preference, protocol, handle, kind, 5, "foreign")


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        pytest.param([], 1, id="nobody"),
        pytest.param([bpf(49152)], 1, id="somebody behind"),
        pytest.param([bpf(1)], 1, id="beside a bpf filter"),
        pytest.param([bpf(1, handle=0xEB)], 2, id="our handle is taken"),
        pytest.param([bpf(1, protocol=8)], 2, id="one protocol only"),
        pytest.param([bpf(1, kind="u32"), bpf(2, kind="u32")], 3, id="other kinds"),
    ],
)
def test_preference(side: list[Filter], expected: int) -> None:
    assert first_preference(side) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        pytest.param(32768, 60999, (1024, 29999), id="as usual"),
        pytest.param(1024, 20000, (32768, 65535), id="above, and above the node ports"),
        pytest.param(30100, 65535, (1024, 29999), id="from within the node ports"),
        pytest.param(2048, 31000, (32768, 65535), id="up to within the node ports"),
        pytest.param(29000, 33000, (33001, 65535), id="around the node ports"),
        pytest.param(1024, 60000, (60001, 65535), id="nothing below, enough above"),
        pytest.param(2000, 65535, (33768, 65535), id="too few below"),
        pytest.param(1024, 65535, (33280, 65535), id="nothing at all"),
        pytest.param(100, 65535, (32818, 65535), id="nothing at all, from below 1024"),
    ],
)
def test_ports_for_masquerade(low: int, high: int, expected: tuple[int, int]) -> None:
    assert free_ports(low, high) == expected


def test_row_knows_who_made_the_qdisc() -> None:
    assert Row(NONE, NONE, 2).made
    assert not Row(NONE, NONE, 1).made
