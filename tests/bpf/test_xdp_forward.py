"""What XDP sends on: whole frames, both ways, against what is said here by roles.

Rules of this file: a frame that is wanted is built anew from its description; nothing of it is taken from the frame
that came but the masquerade's port, which is chosen at random.
"""

from __future__ import annotations

import dataclasses

import pytest

from ebpflb.routes import Masquerade
from tests.bpf.loaded import DNAT, MASQUERADED, SHORT, UNSNAT, WHOLE, XDP_REDIRECT, To
from tests.bpf.xdp_lab import VLAN, WIRES, Lab, on_wire, sport_of, uplinks
from tests.packets import ETHERNET, Packet, assert_same

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)
FARAWAY = To((("faraway", 8080),), masquerade=Masquerade.ALWAYS)


def by_mac(frame: bytes, device: str, sender: str) -> bytes:
    """The frame as it comes to a device from somebody behind it."""
    macs = WIRES[device].mac + WIRES[device].behind[sender]
    return bytes.fromhex(macs.replace(":", "")) + frame[12:]


@both_protocols
@pytest.mark.parametrize("role", ("node", "lb", "vip"), ids=("node-port", "load-balancer-ip", "cluster-ip"))
def test_a_remote_backend_behind_the_same_device(lab: Lab, protocol: str, role: str) -> None:
    lab.node.put_frontend(role, 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, role, 80, protocol, payload=b"hello", tos=0x28)
    out = lab.sent(request.frame(lab.family))
    port = sport_of(out)
    assert 32768 <= port <= 60999
    inside = request.but(source="uplink", sport=port, destination="remote", dport=8080)
    assert_same(out, on_wire(inside, lab.family, "up0", "remote"), "request")

    reply = by_mac(inside.reply(payload=b"welcome").frame(lab.family), "up0", "remote")
    out = lab.sent(reply)
    assert_same(out, on_wire(request.reply(payload=b"welcome"), lab.family, "up0", "outside"), "reply")

    more = request.but(flags="A", payload=b"x" * 999)
    wanted = on_wire(inside.but(flags="A", payload=b"x" * 999), lab.family, "up0", "remote")
    assert_same(lab.sent(more.frame(lab.family)), wanted, "the next request")
    assert lab.node.counters() == {"XDP_FORWARDED": 1, "XDP_SENT": 3}
    rows = [(row.action, row.flags) for row in lab.node.flows()]
    assert rows == [(DNAT, MASQUERADED | WHOLE | SHORT), (UNSNAT, MASQUERADED | WHOLE | SHORT)]


@both_protocols
def test_a_remote_backend_behind_another_device(lab: Lab, protocol: str) -> None:
    """The request leaves by up1 from that device's address, the reply comes by it."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, FARAWAY)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello")
    out = lab.sent(request.frame(lab.family), "up0", "up1")
    inside = request.but(source="uplink2", sport=sport_of(out), destination="faraway", dport=8080)
    assert_same(out, on_wire(inside, lab.family, "up1", "faraway"), "request")
    reply = by_mac(inside.reply().frame(lab.family), "up1", "faraway")
    assert_same(lab.sent(reply, "up1", "up0"), on_wire(request.reply(), lab.family, "up0", "outside"), "reply")


@both_protocols
def test_a_device_that_must_be_redirected_back_to(lab: Lab, protocol: str) -> None:
    """A veth whose other end has GRO and no program is not woken by XDP_TX. It is the same frame."""
    lab.put_device("up0", dataclasses.replace(uplinks()["up0"], back=True))
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello")
    for _ in range(2):
        ran = lab.xdp(request.frame(lab.family))
        assert ran.verdict == XDP_REDIRECT
        inside = request.but(source="uplink", sport=sport_of(ran.frame), destination="remote", dport=8080)
        assert_same(ran.frame, on_wire(inside, lab.family, "up0", "remote"))
    ran = lab.xdp(inside.reply().frame(lab.family))
    assert ran.verdict == XDP_REDIRECT
    assert_same(ran.frame, on_wire(request.reply(), lab.family, "up0", "outside"))


@both_protocols
def test_a_vlan_tag_is_kept(lab: Lab, protocol: str) -> None:
    """A tagged frame's FIB, address and MTU are those of the VLAN's device."""
    to = To((("tagremote", 8080),), masquerade=Masquerade.ALWAYS)
    lab.node.put_frontend("lb", 80, protocol, lab.family, to)
    request = Packet("tagclient", 40000, "lb", 80, protocol, payload=b"hello", vlan=VLAN)
    ran = lab.xdp(request.frame(lab.family))
    assert ran.verdict == 3, lab.node.counters()
    inside = request.but(source="tagged", sport=sport_of(ran.frame, tag=True), destination="tagremote", dport=8080)
    assert_same(ran.frame, on_wire(inside, lab.family, "tag7", "tagremote", VLAN), "request")
    reply = by_mac(inside.reply().frame(lab.family), "tag7", "tagremote")
    assert_same(lab.xdp(reply).frame, on_wire(request.reply(), lab.family, "tag7", "tagclient", VLAN), "reply")
    assert lab.node.counters() == {"XDP_FORWARDED": 1, "XDP_SENT": 2}


@both_protocols
def test_the_priority_in_a_tag_stays(lab: Lab, protocol: str) -> None:
    to = To((("tagremote", 8080),), masquerade=Masquerade.ALWAYS)
    lab.node.put_frontend("lb", 80, protocol, lab.family, to)
    frame = bytearray(Packet("tagclient", 40000, "lb", 80, protocol, vlan=VLAN).frame(lab.family))
    frame[14] |= 0xA0
    ran = lab.xdp(bytes(frame))
    assert ran.verdict == 3
    assert ran.frame[12:18] == frame[12:18]


@both_protocols
@pytest.mark.parametrize("size", (0, 1, 2, 7, 64, 1400))
def test_a_checksum_that_was_wrong_stays_as_wrong(lab: Lab, protocol: str, size: int) -> None:
    """What a network broke must be seen to be broken by who gets it."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=bytes(size))
    frame = bytearray(request.frame(lab.family))
    transport = ETHERNET + (20 if lab.family == 4 else 40)
    broken = transport + (4 if protocol == "tcp" else 8)  # a sequence number's first byte, or the payload's
    if broken == len(frame):
        broken = transport + 4  # the length that UDP says, which nobody looks at
    frame[broken] ^= 0x5A
    out = lab.sent(bytes(frame))
    inside = request.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
    wanted = bytearray(on_wire(inside, lab.family, "up0", "remote"))
    wanted[broken] ^= 0x5A
    assert_same(out, bytes(wanted))


@both_protocols
@pytest.mark.parametrize("lab", (4,), indirect=True)
def test_wrong_checksum_of_the_ipv4_header_stays_as_wrong(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, 4, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    frame = bytearray(request.frame(4))
    frame[ETHERNET + 5] ^= 0x21  # the identification
    out = lab.sent(bytes(frame))
    inside = request.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
    wanted = bytearray(on_wire(inside, 4, "up0", "remote"))
    wanted[ETHERNET + 5] ^= 0x21
    assert_same(out, bytes(wanted))


def test_a_datagram_without_checksum_gets_none(lab: Lab) -> None:
    """IPv4 allows it; in IPv6 such a datagram is broken, and stays so."""
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, "udp", payload=b"hello", no_checksum=True)
    out = lab.sent(request.frame(lab.family))
    inside = request.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
    assert_same(out, on_wire(inside, lab.family, "up0", "remote"))
    reply = inside.reply(no_checksum=True)
    assert_same(lab.sent(reply.frame(lab.family)), on_wire(request.reply(), lab.family, "up0", "outside"))


def test_a_sum_of_zero_is_written_as_ones(lab: Lab) -> None:
    """RFC 768: zero means none. Among many sums some become zero."""
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    at = ETHERNET + (20 if lab.family == 4 else 40) + 6
    request = Packet("outside", 40000, "lb", 80, "udp", payload=b"\0\0")
    out = lab.sent(request.frame(lab.family))
    inside = request.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
    rest = int.from_bytes(out[at : at + 2])  # what the payload must add up to for the sum to be zero
    payload = rest.to_bytes(2)
    wanted = on_wire(inside.but(payload=payload), lab.family, "up0", "remote")
    assert wanted[at : at + 2] in (b"\xff\xff", b"\0\0")
    assert_same(lab.sent(request.but(payload=payload).frame(lab.family)), wanted[:at] + b"\xff\xff" + wanted[at + 2 :])


@both_protocols
def test_two_hops_are_enough(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol, hops=2)
    out = lab.sent(request.frame(lab.family))
    assert out[ETHERNET + (8 if lab.family == 4 else 7)] == 1


@both_protocols
def test_a_frame_as_long_as_the_mtu(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    headers = (20 if lab.family == 4 else 40) + (20 if protocol == "tcp" else 8)
    full = Packet("outside", 40000, "lb", 80, protocol, payload=bytes(1500 - headers))
    lab.sent(full.frame(lab.family))
    lab.passed_up(full.but(payload=bytes(1501 - headers)).frame(lab.family))
    assert lab.node.counters() == {"XDP_FORWARDED": 1, "XDP_SENT": 1, "XDP_TOO_LONG": 1}


@both_protocols
def test_two_clients_of_two_frontends_with_one_backend(lab: Lab, protocol: str) -> None:
    """Each of four flows has a port of its own, and its replies go where they belong."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    lab.node.put_frontend("vip", 443, protocol, lab.family, REMOTE)
    asked = [
        Packet(client, 40000, role, port, protocol)
        for client in ("outside", "outside2")
        for role, port in (("lb", 80), ("vip", 443))
    ]
    ports = [sport_of(lab.sent(request.frame(lab.family))) for request in asked]
    assert len(set(ports)) == 4
    for request, port in zip(asked, ports, strict=True):
        reply = request.but(source="uplink", sport=port, destination="remote", dport=8080).reply()
        wanted = on_wire(request.reply(), lab.family, "up0", request.source)
        assert_same(lab.sent(reply.frame(lab.family)), wanted)


def test_datagram_and_connection_of_one_tuple_are_two_flows(lab: Lab) -> None:
    for protocol, backend in (("tcp", "remote"), ("udp", "remote2")):
        lab.node.put_frontend("lb", 80, protocol, lab.family, To(((backend, 80),), masquerade=Masquerade.ALWAYS))
    for protocol, backend in (("tcp", "remote"), ("udp", "remote2")):
        request = Packet("outside", 40000, "lb", 80, protocol)
        out = lab.sent(request.frame(lab.family))
        inside = request.but(source="uplink", sport=sport_of(out), destination=backend)
        assert_same(out, on_wire(inside, lab.family, "up0", backend))
