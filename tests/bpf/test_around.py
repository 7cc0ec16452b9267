"""The way around the stack, by test runs: what goes straight from one pod to another, and what does not.

Rules of this file: programs are compiled with it; the lab's pod0 and up1 stand for two pods' devices, whose rows say
that the other end is in another namespace. A redirected packet's frame is that of the link it leaves by.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

import pytest

from ebpflb.dataplane.bpf.artifact import load_artifact
from ebpflb.dataplane.bpf.facts import has_set_retval, has_xdp_frags
from ebpflb.routes import Masquerade
from tests.bpf.loaded import REDIRECT, SHOT, UNSPEC, Device, To, gso_context
from tests.bpf.xdp_lab import IFINDEX_AT, WIRES, Lab, laboratory, on_wire, uplinks
from tests.packets import Packet, assert_same, icmp_error

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))
BEYOND = To((("faraway", 8080),))
AROUND = 64


@pytest.fixture(scope="module")
def lab_once() -> Iterator[Lab]:
    with laboratory(load_artifact(set_retval=has_set_retval(), go_around=True, xdp_frags=has_xdp_frags())) as made:
        yield made


def pods(lab: Lab, **changes: object) -> None:
    """Both devices are pods'."""
    for name in ("pod0", "up1"):
        row = Device(pod=True, peer=True, mac=WIRES[name].mac, masquerade="uplink")
        lab.put_device(name, dataclasses.replace(row, **changes))  # type: ignore[arg-type]


def to(device: str, packet: Packet, lab: Lab) -> bytes:
    """The packet as it comes to a device."""
    return bytes.fromhex(WIRES[device].mac.replace(":", "")) + packet.frame(lab.family)[6:]


def goes_around(lab: Lab, packet: Packet, device: str, wanted: bytes) -> None:
    ran = lab.tc("tc_ingress", to(device, packet, lab), device)
    assert ran.verdict == REDIRECT, (ran.verdict, lab.node.counters())
    assert_same(ran.frame, wanted)


@both_protocols
def test_both_directions_go_around(lab: Lab, protocol: str) -> None:
    pods(lab)
    lab.node.put_frontend("vip", 80, protocol, lab.family, BEYOND)
    request = Packet("local", 40000, "vip", 80, protocol, payload=b"hello")
    inside = request.but(destination="faraway", dport=8080)
    for flags in ("S", "A", "PA"):
        wanted = on_wire(inside.but(flags=flags), lab.family, "up1", "faraway")
        goes_around(lab, request.but(flags=flags), "pod0", wanted)
        reply = inside.but(flags=flags).reply()
        goes_around(lab, reply, "up1", on_wire(request.but(flags=flags).reply(), lab.family, "pod0", "local"))
    assert lab.node.counters() == {"PACKET_FORWARDED": 1, "AROUND_SENT": 6}


@both_protocols
def test_a_sum_of_no_datagram_stays_none(lab: Lab, protocol: str) -> None:
    pods(lab)
    lab.node.put_frontend("vip", 80, "udp", lab.family, BEYOND)
    request = Packet("local", 40000, "vip", 80, "udp", payload=b"hello", no_checksum=True)
    wanted = on_wire(request.but(destination="faraway", dport=8080), lab.family, "up1", "faraway")
    goes_around(lab, request, "pod0", wanted)


@both_protocols
@pytest.mark.parametrize("why", ("hops", "length", "fragment"))
def test_a_packet_that_cannot_goes_through_the_stack(lab: Lab, protocol: str, why: str) -> None:
    """With the same translation, in either direction; the others go on around."""
    pods(lab)
    lab.node.put_frontend("vip", 80, protocol, lab.family, BEYOND)
    request = Packet("local", 40000, "vip", 80, protocol)
    inside = request.but(destination="faraway", dport=8080)
    goes_around(lab, request, "pod0", on_wire(inside, lab.family, "up1", "faraway"))
    change: dict[str, object] = {
        "hops": {"hops": 1},
        "length": {"payload": bytes(1490)},
        "fragment": {"fragment": (0, True), "payload": bytes(64)},
    }[why]  # type: ignore[assignment]
    odd = request.but(flags="A", **change)
    between = lab.entered(to("pod0", odd, lab), "pod0")
    assert_same(between, to("pod0", odd.but(destination="faraway", dport=8080), lab))
    assert_same(lab.left(between, "up1"), between)
    back = inside.but(flags="A", **change).reply(**change)
    between = lab.entered(to("up1", back, lab), "up1")
    assert_same(between, to("up1", back, lab))
    wanted = to("up1", back.but(source="vip", sport=80), lab)
    assert_same(lab.left(between, "pod0"), wanted)
    goes_around(lab, request.but(flags="A"), "pod0", on_wire(inside.but(flags="A"), lab.family, "up1", "faraway"))


@pytest.mark.parametrize("segments", (0, 3), ids=("not-counted", "counted"))
def test_segments_that_are_still_one_packet_go_around(lab: Lab, segments: int) -> None:
    """Also where nobody has counted them yet, as behind a tap."""
    pods(lab)
    lab.node.put_frontend("vip", 80, "tcp", lab.family, BEYOND)
    request = Packet("local", 40000, "vip", 80)
    inside = request.but(destination="faraway", dport=8080)
    goes_around(lab, request, "pod0", on_wire(inside, lab.family, "up1", "faraway"))
    context = bytearray(gso_context(segments, 1000))
    struct.pack_into("=I", context, IFINDEX_AT, lab.index["pod0"])
    frame = to("pod0", request.but(flags="A", payload=bytes(3000)), lab)
    assert lab.node.run("tc_ingress", frame, bytes(context)).verdict == REDIRECT
    assert lab.node.counters()["AROUND_SENT"] == 2


@both_protocols
@pytest.mark.parametrize("device", ("pod0", "up1"))
def test_a_device_whose_other_end_is_not_elsewhere(lab: Lab, protocol: str, device: str) -> None:
    """Then the flow goes through the stack for good, both ways: conntrack must not see half of it."""
    pods(lab)
    lab.put_device(device, dataclasses.replace(uplinks()[device], pod=True, xdp=False, redirect=False))
    lab.node.put_frontend("vip", 80, protocol, lab.family, BEYOND)
    request = Packet("local", 40000, "vip", 80, protocol)
    inside = request.but(destination="faraway", dport=8080)
    out = lab.by_stack(to("pod0", request, lab), "pod0", "up1")
    assert_same(out, to("pod0", inside, lab))
    pods(lab)
    out = lab.by_stack(to("pod0", request.but(flags="A"), lab), "pod0", "up1")
    assert_same(out, to("pod0", inside.but(flags="A"), lab))
    out = lab.by_stack(to("up1", inside.reply(), lab), "up1", "pod0")
    assert_same(out, to("up1", request.reply(), lab))
    assert "AROUND_SENT" not in lab.node.counters()


@both_protocols
def test_a_masqueraded_flow_goes_through_the_stack(lab: Lab, protocol: str) -> None:
    pods(lab)
    lab.node.put_frontend("vip", 80, protocol, lab.family, To(BEYOND.backends, masquerade=Masquerade.ALWAYS))
    request = Packet("local", 40000, "vip", 80, protocol)
    assert lab.tc("tc_ingress", to("pod0", request, lab), "pod0").verdict == UNSPEC
    assert "AROUND_SENT" not in lab.node.counters()


@both_protocols
def test_a_flow_that_is_no_services(lab: Lab, protocol: str) -> None:
    """Pods that speak directly are none of our business."""
    pods(lab)
    lab.node.put_frontend("vip", 80, protocol, lab.family, BEYOND)
    direct = to("pod0", Packet("local", 40000, "faraway", 8080, protocol), lab)
    assert_same(lab.by_stack(direct, "pod0", "up1"), direct)


@both_protocols
@pytest.mark.parametrize("kind", ("too-big", "unreachable"))
def test_an_error_about_a_flow_around_goes_through_the_stack(lab: Lab, protocol: str, kind: str) -> None:
    pods(lab)
    lab.node.put_frontend("vip", 80, protocol, lab.family, BEYOND)
    request = Packet("local", 40000, "vip", 80, protocol)
    inside = request.but(destination="faraway", dport=8080)
    goes_around(lab, request, "pod0", on_wire(inside, lab.family, "up1", "faraway"))
    error = icmp_error(kind, "faraway", "local", inside, lab.family)
    error = bytes.fromhex(WIRES["up1"].mac.replace(":", "")) + error[6:]
    out = lab.by_stack(error, "up1", "pod0")
    wanted = icmp_error(kind, "vip", "local", request, lab.family)
    if protocol == "tcp":
        assert_same(out[14:], wanted[14:])
    assert lab.node.counters()["ICMP_TRANSLATED"] == 1


def test_a_closed_connection_around_is_begun_anew(lab: Lab) -> None:
    pods(lab)
    service = lab.node.put_frontend("vip", 80, "tcp", lab.family, BEYOND)
    request = Packet("local", 40000, "vip", 80)
    inside = request.but(destination="faraway", dport=8080)
    goes_around(lab, request, "pod0", on_wire(inside, lab.family, "up1", "faraway"))
    goes_around(
        lab,
        inside.reply().but(flags="FA"),
        "up1",
        on_wire(request.reply().but(flags="FA"), lab.family, "pod0", "local"),
    )
    lab.node.put_frontend("vip", 80, "tcp", lab.family, To((("local2", 8080),)), service=service)
    ran = lab.tc("tc_ingress", to("pod0", request, lab), "pod0")
    assert ran.verdict != SHOT and lab.node.counters()["FLOW_STALE"] == 1
