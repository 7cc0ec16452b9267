"""What XDP leaves to the stack: frames that are passed up exactly as they came, and what tc then makes of them.

Rules of this file: the negative cases come first. A frame of a flow that XDP does not send is carried by tc with the
translation that the flow has under XDP, whoever began it, and the flow's other frames go on under XDP.
"""

from __future__ import annotations

import dataclasses
import struct

import pytest

from ebpflb.routes import Masquerade
from tests.bpf.loaded import DROP, REJECT, To
from tests.bpf.xdp_lab import VLAN, Lab, on_wire, sport_of, uplinks
from tests.packets import ETHERNET, Packet, arp, assert_same, assert_sound, icmp_error, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)


def put_services(lab: Lab, to: To = REMOTE) -> None:
    for protocol in ("tcp", "udp"):
        lab.node.put_frontend("lb", 80, protocol, lab.family, to)


# ---- Nobody's


def tagged(frame: bytes, *tags: int) -> bytes:
    """The frame with tags (ethertype and number in one word each) in front of its ethertype."""
    return frame[:12] + b"".join(struct.pack("!I", tag) for tag in tags) + frame[12:]


def encapsulated(family: int, protocol: int, inner: bytes) -> bytes:
    """A packet to our frontend in one to our frontend's address: that is a tunnel's end's business."""
    outer = Packet("outside", 0, "lb", 0, "echo", payload=inner[8:]).frame(family)
    at = ETHERNET + (9 if family == 4 else 6)
    start = ETHERNET + (20 if family == 4 else 40)
    return outer[:at] + bytes([protocol]) + outer[at + 1 : start] + inner


@pytest.mark.parametrize(
    "what",
    ("arp", "other-ethertype", "ethernet-only", "802.1ad", "two-tags", "unknown-vlan", "echo", "sctp", "wrong-version",
     "tunnelled-ipv4", "tunnelled-ipv6"),
)  # fmt: skip
def test_what_is_no_datagram_or_connection(lab: Lab, what: str) -> None:
    put_services(lab)
    request = Packet("outside", 40000, "lb", 80).frame(lab.family)
    frame = {
        "arp": arp(),
        "other-ethertype": request[:12] + b"\x88\xb5" + request[14:],
        "ethernet-only": request[:14],
        "802.1ad": tagged(request, 0x88A80000 | VLAN),
        "two-tags": tagged(request, 0x81000000 | VLAN, 0x81000000 | VLAN),
        "unknown-vlan": tagged(request, 0x81000000 | VLAN + 1),
        "echo": Packet("outside", 0, "lb", 0, "echo").frame(lab.family),
        "sctp": Packet("outside", 40000, "lb", 80, "sctp").frame(lab.family),
        "tunnelled-ipv4": encapsulated(lab.family, 4, Packet("outside", 40000, "lb", 80).inner(4)),
        "tunnelled-ipv6": encapsulated(lab.family, 41, Packet("outside", 40000, "lb", 80).inner(6)),
        "wrong-version": request[:14] + bytes([request[14] ^ 0x70]) + request[15:],
    }[what]
    lab.passed_up(frame)
    assert lab.node.flows() == []
    counters = lab.node.counters()
    assert not counters.keys() - {"XDP_OPTIONS", "PACKET_TOO_SHORT"}, counters


@pytest.mark.parametrize("lab", (4,), indirect=True)
def test_a_header_length_that_is_too_short(lab: Lab) -> None:
    put_services(lab)
    request = Packet("outside", 40000, "lb", 80).frame(4)
    lab.passed_up(request[:14] + b"\x44" + request[15:])
    assert lab.node.flows() == []


@both_protocols
@pytest.mark.parametrize("to", (("stranger", 80), ("lb", 81), ("remote", 8080), ("node", 22)))
def test_what_is_for_no_frontend(lab: Lab, protocol: str, to: tuple[str, int]) -> None:
    put_services(lab)
    lab.passed_up(Packet("outside", 40000, *to, protocol).frame(lab.family))
    assert lab.node.flows() == [] and lab.node.counters() == {}


@both_protocols
def test_another_protocol_of_a_frontend_is_nobodys(lab: Lab, protocol: str) -> None:
    other = "udp" if protocol == "tcp" else "tcp"
    lab.node.put_frontend("lb", 80, other, lab.family, REMOTE)
    lab.passed_up(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))
    assert lab.node.flows() == []


@both_protocols
def test_a_reply_that_no_flow_waits_for(lab: Lab, protocol: str) -> None:
    put_services(lab)
    lab.sent(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))
    lab.passed_up(Packet("remote", 8080, "uplink", 1, protocol, flags="SA").frame(lab.family))


@both_protocols
def test_before_the_control_plane_has_written_settings(lab: Lab, protocol: str) -> None:
    put_services(lab)
    frame = Packet("outside", 40000, "lb", 80, protocol).frame(lab.family)
    lab.node.drop_settings()
    lab.passed_up(frame)
    lab.node.put_settings(layout=1)
    lab.passed_up(frame)
    assert lab.node.flows() == [] and lab.node.counters() == {}


def test_pings_of_a_frontend_are_not_touched_by_tc_either(lab: Lab) -> None:
    put_services(lab)
    ping = Packet("outside", 0, "lb", 0, "echo").frame(lab.family)
    lab.passed_up(ping)
    assert_same(lab.by_stack(ping), ping)


# ---- Ours, and left to the stack


@dataclasses.dataclass(frozen=True, slots=True)
class Odd:
    """Packets of a flow that XDP does not send. `change` makes them of an ordinary one; `counted` is where they are
    counted."""

    change: dict[str, object]
    counted: str
    families: tuple[int, ...] = (4, 6)


ODD = {
    "first-fragment": Odd({"fragment": (0, True), "payload": bytes(64)}, "XDP_OPTIONS"),
    "options": Odd({"options": 4}, "XDP_OPTIONS", families=(4,)),
    "hop-by-hop": Odd({"extensions": ("hop",)}, "XDP_OPTIONS", families=(6,)),
    "routing-and-destination-options": Odd({"extensions": ("route", "dest")}, "XDP_OPTIONS", families=(6,)),
    "last-hop": Odd({"hops": 1}, "XDP_NO_HOPS"),
    "no-hop": Odd({"hops": 0}, "XDP_NO_HOPS"),
    "too-long": Odd({"payload": bytes(1490)}, "XDP_TOO_LONG"),
}

odd_ones = pytest.mark.parametrize(
    ("lab", "odd"),
    [pytest.param(family, odd, id=f"v{family}-{name}") for name, odd in ODD.items() for family in odd.families],
    indirect=["lab"],
)


def odd_packet(lab: Lab, odd: Odd, protocol: str) -> Packet:
    return Packet("outside", 40000, "lb", 80, protocol).but(**odd.change)


@both_protocols
@odd_ones
def test_an_odd_packet_in_the_middle_of_a_flow(lab: Lab, protocol: str, odd: Odd) -> None:
    """tc carries it with the port that XDP has given out, and XDP goes on with it."""
    strange = odd_packet(lab, odd, protocol)
    put_services(lab)
    plain = Packet("outside", 40000, "lb", 80, protocol)
    port = sport_of(lab.sent(plain.frame(lab.family)))
    if protocol == "tcp":
        strange = strange.but(flags="A")
    out = lab.by_both(strange.frame(lab.family))
    assert lab.node.counters()[odd.counted] == 1
    inside = strange.but(source="uplink", sport=port, destination="remote", dport=8080)
    assert_same(out, inside.frame(lab.family), "by tc")

    reply = odd_packet(lab, odd, protocol).but(source="remote", sport=8080, destination="uplink", dport=port, flags="A")
    out = lab.by_both(reply.frame(lab.family))
    assert_same(out, reply.but(source="lb", sport=80, destination="outside", dport=40000).frame(lab.family), "reply")

    again = plain.but(flags="A", payload=b"more")
    wanted = on_wire(
        again.but(source="uplink", sport=port, destination="remote", dport=8080), lab.family, "up0", "remote"
    )
    assert_same(lab.sent(again.frame(lab.family)), wanted, "by XDP again")
    counted = lab.node.counters()
    assert counted["XDP_FORWARDED"] == 1 and "PACKET_FORWARDED" not in counted


@both_protocols
@odd_ones
def test_a_flow_that_begins_with_an_odd_packet(lab: Lab, protocol: str, odd: Odd) -> None:
    """tc carries it, and XDP goes on with tc's port."""
    strange = odd_packet(lab, odd, protocol)
    put_services(lab)
    out = lab.by_both(strange.frame(lab.family))
    parsed = parse(out)
    assert parsed and parsed.ports
    inside = strange.but(source="uplink", sport=parsed.ports[0], destination="remote", dport=8080)
    assert_same(out, inside.frame(lab.family), "by tc")

    plain = Packet("outside", 40000, "lb", 80, protocol, flags="A")
    inside = plain.but(source="uplink", sport=parsed.ports[0], destination="remote", dport=8080)
    assert_same(lab.sent(plain.frame(lab.family)), on_wire(inside, lab.family, "up0", "remote"), "by XDP")
    wanted = on_wire(plain.reply(), lab.family, "up0", "outside")
    assert_same(lab.sent(inside.reply().frame(lab.family)), wanted, "reply by XDP")
    counted = lab.node.counters()
    assert counted["PACKET_FORWARDED"] == 1 and "XDP_FORWARDED" not in counted


def test_all_fragments_of_a_datagram_are_carried_by_tc(lab: Lab) -> None:
    """In the middle of a flow of XDP's; a later one is known by the first."""
    put_services(lab)
    plain = Packet("outside", 40000, "lb", 80, "udp", payload=b"hello")
    port = sport_of(lab.sent(plain.frame(lab.family)))
    for fragment in ((0, True), (64, True), (128, False)):
        piece = plain.but(payload=bytes(56 if fragment[0] == 0 else 64), fragment=fragment)
        out = lab.by_both(piece.frame(lab.family))
        inside = piece.but(source="uplink", sport=port, destination="remote", dport=8080)
        assert_same(out, inside.frame(lab.family), f"fragment {fragment}")
    lab.sent(plain.frame(lab.family))


def test_a_later_fragment_without_its_first_is_left_alone(lab: Lab) -> None:
    put_services(lab)
    frame = Packet("outside", 40000, "lb", 80, "udp", payload=bytes(64), fragment=(64, False)).frame(lab.family)
    lab.passed_up(frame)
    assert_same(lab.by_stack(frame), frame)
    assert lab.node.flows() == []


@pytest.mark.parametrize("lab", (6,), indirect=True)
def test_an_ipv6_fragment_that_is_whole(lab: Lab) -> None:
    """RFC 8200 calls it atomic: a fragment header, but all is there."""
    put_services(lab)
    piece = Packet("outside", 40000, "lb", 80, "udp", payload=b"hello", fragment=(0, False))
    out = lab.by_both(piece.frame(6))
    parsed = parse(out)
    assert parsed and parsed.ports
    inside = piece.but(source="uplink", sport=parsed.ports[0], destination="remote", dport=8080)
    assert_same(out, inside.frame(6))


# ---- Backends that XDP has no way to


@both_protocols
@pytest.mark.parametrize(
    ("role", "by", "counted"),
    (("silent", "up0", "XDP_NO_NEIGHBOUR"), ("tunnelled", "ov0", "XDP_LOCAL"), ("local", "pod0", "XDP_LOCAL")),
    ids=("no-neighbour", "overlay", "pod-of-this-node"),
)
def test_a_backend_that_xdp_does_not_send_to(lab: Lab, protocol: str, role: str, by: str, counted: str) -> None:
    """XDP chooses, and tc carries out that choice, each time."""
    choices = tuple((role, 8000 + number) for number in range(16))
    put_services(lab, To(choices, masquerade=Masquerade.ALWAYS))
    address = {"up0": "uplink", "ov0": "tunnel", "pod0": "uplink"}[by]
    if by == "pod0":
        lab.put_device("pod0", dataclasses.replace(uplinks()["pod0"], masquerade="uplink"))
    request = Packet("outside", 40000, "lb", 80, protocol)
    for turn in range(3):
        frame = request.but(flags="A" if turn else "S").frame(lab.family)
        lab.passed_up(frame)
        (begun,) = (row for row in lab.node.flows() if row.action == 0)
        out = lab.by_stack(frame, by=by)
        parsed = parse(out)
        assert parsed and parsed.ports
        inside = request.but(source=address, sport=parsed.ports[0], destination=role, dport=begun.port,
                             flags="A" if turn else "S")  # fmt: skip
        assert_same(out, inside.frame(lab.family))
    counters = lab.node.counters()
    assert counters["PACKET_FORWARDED"] == 1 and counters[counted] >= 1
    assert "XDP_SENT" not in counters


@both_protocols
def test_a_local_backend_without_masquerade(lab: Lab, protocol: str) -> None:
    """externalTrafficPolicy Local: tc translates once, and the client is seen."""
    put_services(lab, To((("local", 8080),), masquerade=Masquerade.NEVER))
    request = Packet("outside", 40000, "lb", 80, protocol)
    out = lab.by_both(request.frame(lab.family), by="pod0")
    inside = request.but(destination="local", dport=8080)
    assert_same(out, inside.frame(lab.family))
    out = lab.by_both(inside.reply().frame(lab.family), "pod0", "up0")
    assert_same(out, request.reply().frame(lab.family))
    assert lab.node.counters() == {"PACKET_FORWARDED": 1}


@both_protocols
@pytest.mark.parametrize("flags", ((False, False), (True, False), (False, True)), ids=("neither", "xdp", "redirect"))
def test_another_device_must_take_redirected_frames(lab: Lab, protocol: str, flags: tuple[bool, bool]) -> None:
    put_services(lab, To((("faraway", 8080),), masquerade=Masquerade.ALWAYS))
    lab.put_device("up1", dataclasses.replace(uplinks()["up1"], xdp=flags[0], redirect=flags[1]))
    request = Packet("outside", 40000, "lb", 80, protocol)
    out = lab.by_both(request.frame(lab.family), by="up1")
    inside = request.but(source="uplink2", sport=sport_of(out), destination="faraway", dport=8080)
    assert_same(out, inside.frame(lab.family))
    lab.passed_up(request.but(flags="A").frame(lab.family))


@both_protocols
def test_a_device_without_xdp_of_ours_sends_nothing_back(lab: Lab, protocol: str) -> None:
    """Where frames sent back would be lost, its row says so."""
    put_services(lab)
    lab.put_device("up0", dataclasses.replace(uplinks()["up0"], xdp=False, redirect=False))
    lab.by_both(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))


@both_protocols
def test_a_device_that_has_no_row(lab: Lab, protocol: str) -> None:
    lab.node.drop_device(lab.index["up0"])
    put_services(lab)
    lab.passed_up(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))


@both_protocols
def test_a_way_with_a_smaller_mtu(lab: Lab, protocol: str) -> None:
    """The route says 1400, and that this is not to be found out; the device says 1500."""
    put_services(lab, To((("narrow", 8080),), masquerade=Masquerade.ALWAYS))
    headers = (20 if lab.family == 4 else 40) + (20 if protocol == "tcp" else 8)
    request = Packet("outside", 40000, "lb", 80, protocol)
    port = sport_of(lab.sent(request.frame(lab.family)))
    lab.sent(request.but(flags="A", payload=bytes(1400 - headers)).frame(lab.family))
    long = request.but(flags="A", payload=bytes(1401 - headers))
    out = lab.by_both(long.frame(lab.family))
    inside = long.but(source="uplink", sport=port, destination="narrow", dport=8080)
    assert_same(out, inside.frame(lab.family))


@both_protocols
def test_a_device_with_a_smaller_mtu(lab: Lab, protocol: str) -> None:
    lab.put_device("up1", dataclasses.replace(uplinks()["up1"], mtu=1300))
    put_services(lab, To((("faraway", 8080),), masquerade=Masquerade.ALWAYS))
    headers = (20 if lab.family == 4 else 40) + (20 if protocol == "tcp" else 8)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=bytes(1300 - headers))
    lab.sent(request.frame(lab.family), by="up1")
    lab.by_both(request.but(flags="A", payload=bytes(1301 - headers)).frame(lab.family), by="up1")


@both_protocols
@pytest.mark.parametrize("mac", ("02:00:00:00:00:99", "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"))
def test_frames_for_another_machine(lab: Lab, protocol: str, mac: str) -> None:
    """A switch that has forgotten floods them; neither path answers for somebody else, nor drops what is his."""
    put_services(lab)
    lab.node.put_frontend("lb", 81, protocol, lab.family, DROP)
    lab.node.put_frontend("lb", 82, protocol, lab.family, REJECT)
    other = bytes.fromhex(mac.replace(":", ""))
    request = Packet("outside", 40000, "lb", 80, protocol)
    for port in (80, 81, 82):
        frame = other + request.but(dport=port).frame(lab.family)[6:]
        lab.passed_up(frame)
        if not other[0] & 1:  # not for all or many, which the stack takes
            assert_same(lab.entered(frame), frame)
    assert lab.node.flows() == []
    lab.sent(request.frame(lab.family))
    lab.passed_up(other + request.but(flags="A").frame(lab.family)[6:])


@both_protocols
def test_a_device_without_an_address_in_this_family(lab: Lab, protocol: str) -> None:
    """There is nothing to masquerade to: tc drops and counts it, as without XDP."""
    lab.put_device("up0", dataclasses.replace(uplinks()["up0"], masquerade=""))
    put_services(lab)
    frame = Packet("outside", 40000, "lb", 80, protocol).frame(lab.family)
    lab.passed_up(frame)
    inside = lab.entered(frame)
    assert lab.tc("tc_egress", inside, "up0").verdict == 2
    assert lab.node.counters()["PACKET_NO_ADDRESS"] == 1


@both_protocols
def test_a_pod_that_asks_by_its_own_device(lab: Lab, protocol: str) -> None:
    """A pod's request is tc's as ever, and so are replies to it: the pod has no XDP."""
    put_services(lab)
    request = Packet("local2", 40000, "lb", 80, protocol)
    pods = bytes.fromhex("020000000060") + request.frame(lab.family)[6:]
    out = lab.by_stack(pods, "pod0", "up0")
    port = sport_of(out)
    inside = request.but(source="uplink", sport=port, destination="remote", dport=8080)
    assert_same(out, pods[:14] + inside.frame(lab.family)[14:])
    reply = inside.reply()
    assert_same(lab.by_both(reply.frame(lab.family), "up0", "pod0"), request.reply().frame(lab.family))


# ---- ICMP errors about XDP's flows


def assert_same_error(lab: Lab, protocol: str, got: bytes, wanted: bytes) -> None:
    """Both frames are the same, but for what a datagram that is quoted says its sum is: nobody verifies that, and it
    is left as it was quoted."""
    assert_sound(got)
    if protocol == "udp":
        ip = 20 if lab.family == 4 else 40
        got, wanted = (
            frame[: ETHERNET + ip + 2] + frame[ETHERNET + ip + 4 : ETHERNET + 2 * ip + 14] for frame in (got, wanted)
        )
    assert_same(got, wanted)


@both_protocols
@pytest.mark.parametrize("kind", ("too-big", "unreachable", "exceeded"))
@pytest.mark.parametrize("teller", ("remote", "router"))
def test_an_error_about_a_request_of_xdps(lab: Lab, protocol: str, kind: str, teller: str) -> None:
    """It quotes what left for the backend, and the client must see what it sent."""
    put_services(lab)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello world")
    port = sport_of(lab.sent(request.frame(lab.family)))
    inside = request.but(source="uplink", sport=port, destination="remote", dport=8080)
    out = lab.by_both(icmp_error(kind, teller, "uplink", inside, lab.family))
    assert_same_error(lab, protocol, out, icmp_error(kind, "lb", "outside", request, lab.family))
    assert lab.node.counters()["ICMP_TRANSLATED"] == 2
    lab.sent(inside.reply().frame(lab.family))


@both_protocols
@pytest.mark.parametrize("kind", ("too-big", "unreachable", "exceeded"))
@pytest.mark.parametrize("teller", ("outside", "router"))
def test_an_error_about_a_reply_of_xdps(lab: Lab, protocol: str, kind: str, teller: str) -> None:
    """It quotes what left for the client, and the backend must see what it sent."""
    put_services(lab)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello world")
    port = sport_of(lab.sent(request.frame(lab.family)))
    inside = request.but(source="uplink", sport=port, destination="remote", dport=8080)
    lab.sent(inside.reply().frame(lab.family))
    out = lab.by_both(icmp_error(kind, teller, "lb", request.reply(), lab.family))
    assert_same_error(lab, protocol, out, icmp_error(kind, "uplink", "remote", inside.reply(), lab.family))
    lab.sent(request.but(flags="A").frame(lab.family))


@pytest.mark.parametrize("kind", ("too-big", "unreachable", "exceeded"))
def test_an_error_about_nobodys_packet(lab: Lab, kind: str) -> None:
    put_services(lab)
    lab.sent(Packet("outside", 40000, "lb", 80).frame(lab.family))
    frame = icmp_error(kind, "router", "uplink", Packet("uplink", 7, "remote", 8080), lab.family)
    lab.passed_up(frame)
    assert_same(lab.by_stack(frame), frame)
