"""Which devices run XDP, in which mode, and what is said of the others: as tables."""

from __future__ import annotations

import pytest

from ebpflb.dataplane.bpf.xdp_choice import (
    AUTO,
    GENERIC,
    NATIVE,
    OFF,
    Surroundings,
    Told,
    Wish,
    refused,
    running,
    vlans_of,
    wish,
)
from ebpflb.dataplane.bpf.xdp_features import BASIC, NDO_XMIT, REDIRECT, sends
from ebpflb.routes import packed
from ebpflb.rtnetlink import InterfaceAddress, Link

ETHER, UP, GLOBAL, LINK_LOCAL = 1, 1, 0, 253


def link(name: str, index: int = 2, kind: str = "", slave: str = "", master: int = 0, parent: int = 0) -> Link:
    return Link(index, name, kind, slave, master, ETHER, UP, mtu=1500, mac=bytes(6), parent=parent)


def address(text: str, index: int = 2, scope: int = GLOBAL) -> InterfaceAddress:
    plain, _, bits = text.partition("/")
    return InterfaceAddress(index, 6 if ":" in plain else 4, packed(plain), scope, 0, int(bits))


def around(
    *links: Link,
    addresses: tuple[InterfaceAddress, ...] = (),
    defaults: dict[int, int] | None = None,
    patterns: tuple[str, ...] = (),
    pods: str = "",
) -> Surroundings:
    return Surroundings({each.ifindex: each for each in links}, addresses, defaults, patterns, pods)


def wished(device: Link, mode: str, *texts: str, default: bool = False, patterns: tuple[str, ...] = ()) -> Wish:
    """The wish for `device`, alone on a node, with these addresses."""
    held = tuple(address(text, device.ifindex) for text in texts)
    routes = {4: device.ifindex} if default else {}
    return wish(device, around(device, addresses=held, defaults=routes, patterns=patterns), mode)


@pytest.mark.parametrize(
    ("device", "auto", "native", "generic"),
    [
        pytest.param(link("eth0"), NATIVE, NATIVE, GENERIC, id="hardware"),
        pytest.param(link("bond0", kind="bond"), OFF, OFF, GENERIC, id="bond"),
        pytest.param(link("eth0", kind="veth"), OFF, NATIVE, GENERIC, id="veth"),
        pytest.param(link("tap0", kind="tun"), OFF, NATIVE, GENERIC, id="tap"),
        pytest.param(link("mv0", kind="macvlan"), OFF, NATIVE, GENERIC, id="macvlan"),
        pytest.param(link("vx0", kind="vxlan"), OFF, OFF, OFF, id="vxlan"),
        pytest.param(link("gnv0", kind="geneve"), OFF, OFF, OFF, id="geneve"),
        pytest.param(link("eth0.7", kind="vlan"), OFF, OFF, OFF, id="vlan"),
        pytest.param(link("eth1", slave="bridge", master=9), OFF, OFF, OFF, id="bridge port"),
        pytest.param(link("eth1", slave="openvswitch", master=9), OFF, OFF, OFF, id="port of Open vSwitch"),
    ],
)
def test_kinds_of_devices(device: Link, auto: str, native: str, generic: str) -> None:
    """Each with an address of the node's network."""
    found = {mode: wished(device, mode, "192.0.2.1/24") for mode in (AUTO, NATIVE, GENERIC, OFF)}
    assert {mode: each.mode for mode, each in found.items()} == {AUTO: auto, NATIVE: native, GENERIC: generic, OFF: OFF}
    assert all(bool(each.reason) == (each.mode == OFF) for each in found.values())


@pytest.mark.parametrize(
    ("kind", "addresses", "default", "expected"),
    [
        ("", ("192.0.2.1/24",), False, NATIVE),
        ("", ("192.0.2.1/32",), False, NATIVE),
        ("", (), True, NATIVE),
        ("", (), False, OFF),
        ("veth", ("192.0.2.1/24",), False, NATIVE),
        ("veth", ("fd00::1/64",), False, NATIVE),
        ("veth", ("192.0.2.1/32", "fd00::1/128"), False, OFF),
        ("veth", ("192.0.2.1/32",), True, NATIVE),
        ("veth", (), False, OFF),
    ],
)
def test_outside_traffic_comes_where_addresses_and_routes_are(
    kind: str, addresses: tuple[str, ...], default: bool, expected: str
) -> None:
    assert wished(link("eth0", kind=kind), NATIVE, *addresses, default=default).mode == expected


def test_addresses_of_the_link_alone_say_nothing() -> None:
    device = link("eth0")
    assert wish(device, around(device, addresses=(address("fe80::1/64", scope=LINK_LOCAL),)), NATIVE).mode == OFF


def test_what_runs_is_not_ended_by_the_loss_of_an_address() -> None:
    device = link("eth0")
    assert wish(device, around(device), AUTO, runs=True) == Wish(NATIVE)
    assert wish(device, around(device, patterns=("ens*",)), AUTO, runs=True).mode == OFF
    port = link("eth0", slave="bridge", master=9)
    assert wish(port, around(port), AUTO, runs=True).mode == OFF


def test_an_address_on_a_vlan_is_its_parents() -> None:
    parent, vlan = link("eth0", 2), link("eth0.7", 3, kind="vlan", parent=2)
    both = around(parent, vlan, addresses=(address("192.0.2.1/24", 3),))
    assert wish(parent, both, AUTO) == Wish(NATIVE)
    assert wish(vlan, both, AUTO) == Wish(OFF, "a VLAN of eth0, where its frames are met")


@pytest.mark.parametrize(
    ("device", "patterns", "expected"),
    [
        (link("eth0"), ("eth*",), NATIVE),
        (link("eth0"), ("ens*",), OFF),
        (link("uplink", kind="veth"), ("uplink",), NATIVE),
        (link("uplink", kind="veth"), ("eth0",), OFF),
        (link("eth1", slave="bridge", master=9), ("eth1",), OFF),
        (link("vx0", kind="vxlan"), ("vx0",), OFF),
    ],
)
def test_patterns_name_devices_and_leave_others_out(device: Link, patterns: tuple[str, ...], expected: str) -> None:
    assert wished(device, NATIVE, patterns=patterns).mode == expected


@pytest.mark.parametrize("mode", [AUTO, NATIVE, GENERIC])
def test_a_pods_device_never_and_status_does_not_name_it(mode: str) -> None:
    pod = link("cali1", kind="veth")
    place = around(pod, addresses=(address("192.0.2.1/24"),), patterns=("cali*",), pods="cali*")
    assert wish(pod, place, mode) == Wish(OFF, "a pod's device", told=False)
    bare = link("veth7", kind="veth")
    assert not wish(bare, around(bare), mode).told


@pytest.mark.parametrize(
    ("device", "patterns", "expected"),
    [
        pytest.param(link("bond0", kind="bond"), (), {NATIVE}, id="a bond that is the node's way out"),
        pytest.param(link("bond0", kind="bond"), ("bond0",), {NATIVE}, id="a bond by name"),
        pytest.param(link("vx0", kind="vxlan"), ("eth0", "vx0"), {NATIVE, GENERIC}, id="an overlay by name"),
        pytest.param(link("vx0", kind="vxlan"), (), set(), id="an overlay that nobody names"),
        pytest.param(link("eth0.7", kind="vlan", parent=9), ("eth0.7",), {NATIVE, GENERIC}, id="a VLAN alone by name"),
        pytest.param(link("eth0.7", kind="vlan", parent=9), ("eth0*",), set(), id="a VLAN with the device below"),
        pytest.param(link("eth0.7", kind="vlan", parent=9), (), set(), id="a VLAN that nobody names"),
        pytest.param(link("away.5", kind="vlan"), ("away.5",), {NATIVE, GENERIC}, id="a VLAN of another namespace"),
        pytest.param(link("ens1"), ("eth0",), set(), id="a device that --devices leave out"),
        pytest.param(link("cali1", kind="veth", slave="bridge", master=9), ("*",), set(), id="a pod's device"),
    ],
)
def test_what_was_asked_for_and_never_runs_is_a_problem(
    device: Link, patterns: tuple[str, ...], expected: set[str]
) -> None:
    """`auto` asks for nothing on any one device."""
    place = around(device, link("eth0", 9), addresses=(address("192.0.2.1/24"),), patterns=patterns)
    found = {mode: wish(device, place, mode) for mode in (AUTO, NATIVE, GENERIC, OFF)}
    assert {mode for mode, each in found.items() if each.problem} == expected
    assert all(found[mode].mode == OFF and found[mode].told for mode in expected)


@pytest.mark.parametrize(
    ("kind", "sends", "is_known", "reason", "problem"),
    [
        ("", True, True, "", False),
        ("veth", True, True, "", False),
        ("", False, True, "takes no frames from other devices", False),
        ("veth", False, True, "before its other end has GRO", True),
        ("veth", False, False, "this kernel does not tell", True),
        ("tun", False, False, "this kernel does not tell", True),
    ],
)
def test_a_device_that_runs_natively_is_told_with_what_keeps_it_from_sending(
    kind: str, sends: bool, is_known: bool, reason: str, problem: bool
) -> None:
    told = running(link("eth0", kind=kind), NATIVE, sends=sends, is_known=is_known)
    assert (told.mode, told.problem) == (NATIVE, problem)
    assert reason in told.reason and bool(told.reason) == bool(reason)


@pytest.mark.parametrize(("mode", "problem"), [(AUTO, False), (NATIVE, True), (GENERIC, True)])
def test_a_refusal_is_a_problem_for_who_asked(mode: str, problem: bool) -> None:
    assert refused(link("eth0"), mode, "no") == Told("eth0", OFF, "no", problem)
    assert refused(link("eth0")._replace(xdp=((5, 1),)), mode, "somebody else's").problem


def test_vlans_are_known_by_parent_and_id() -> None:
    devices = {
        2: link("eth0", 2),
        3: link("eth0.7", 3, kind="vlan", parent=2)._replace(vlan=7),
        4: link("eth0.8", 4, kind="vlan", parent=2)._replace(vlan=8),
        5: link("eth0.7.9", 5, kind="vlan", parent=3)._replace(vlan=9),
        6: link("eth0.6", 6, kind="vlan", parent=2),
        7: link("away.5", 7, kind="vlan", parent=0)._replace(vlan=5),
    }
    assert vlans_of(devices, devices) == {(2, 7): 3, (2, 8): 4}


@pytest.mark.parametrize(
    ("features", "driver", "expected"),
    [
        (BASIC | REDIRECT | NDO_XMIT, "anything", True),
        (BASIC | REDIRECT, "ixgbe", False),
        (None, "ixgbe", True),
        (None, "anything", False),
        (None, "veth", False),
        (None, "", False),
    ],
)
def test_who_takes_redirected_frames(features: int | None, driver: str, expected: bool) -> None:
    assert sends(features, driver) is expected
