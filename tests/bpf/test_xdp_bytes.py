"""Frames that end too early or lie about their lengths, through XDP and tc.

Rules of this file: whatever is no sound packet of a flow is passed, dropped by a verdict of its row, or translated in
nothing but addresses, ports, sums and the hop; the judges of the fuzz tests say so of every frame that is cut off.
"""

from __future__ import annotations

import errno
import struct

import pytest

from ebpflb.routes import Masquerade
from tests.bpf.fuzz import Judge
from tests.bpf.loaded import (
    DROP,
    PROTOCOLS,
    REDIRECT,
    REJECT,
    SHOT,
    UNSPEC,
    XDP_DROP,
    XDP_PASS,
    XDP_TX,
    To,
    gso_context,
)
from tests.bpf.test_xdp_fuzz import XdpJudge
from tests.bpf.xdp_lab import Lab, on_wire, sport_of
from tests.packets import ETHERNET, Packet, assert_same, icmp_error, packed

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))
REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)
ERRORS = ("too-big", "unreachable", "exceeded")


def put_services(lab: Lab) -> None:
    for protocol in ("tcp", "udp", "sctp"):
        lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
        lab.node.put_frontend("lb", 81, protocol, lab.family, REJECT)
        lab.node.put_frontend("lb", 82, protocol, lab.family, DROP)
    lab.node.put_owned("vip", lab.family)


def can_run(frame: bytes) -> bool:
    """Whether a test run takes it: the kernel wants a whole Ethernet header, and for tc a whole IP header that was
    announced."""
    return len(frame) > ETHERNET + (40 if frame[12:14] == b"\x86\xdd" else 20)


@both_protocols
@pytest.mark.parametrize("established", (False, True), ids=("new", "established"))
def test_a_frame_cut_off_at_every_length(lab: Lab, protocol: str, established: bool) -> None:
    """XDP touches none: such a frame is shorter than its IP header says."""
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, protocol, payload=b"payload")
    if established:
        lab.sent(whole.but(flags="S").frame(lab.family))
    frame = whole.frame(lab.family)
    for length in range(ETHERNET, len(frame)):
        lab.passed_up(frame[:length])
    lab.sent(frame)


def corpus(lab: Lab) -> dict[str, bytes]:
    """One of each kind that is told apart."""
    made = {
        "tcp": Packet("outside", 40000, "lb", 80, payload=b"payload"),
        "udp": Packet("outside", 40000, "lb", 80, "udp", payload=b"payload"),
        "sctp": Packet("outside", 40000, "lb", 80, "sctp"),
        "echo": Packet("outside", 0, "lb", 80, "echo"),
        "refused-tcp": Packet("outside", 40000, "lb", 81, tcp_options=(("MSS", 1460),)),
        "refused-udp": Packet("outside", 40000, "lb", 81, "udp", payload=b"payload"),
        "undefined": Packet("outside", 40000, "vip", 7, "udp"),
        "dropped": Packet("outside", 40000, "lb", 82, "udp"),
        "fragment": Packet("outside", 40000, "lb", 80, "udp", payload=bytes(64), fragment=(0, True)),
        "later-fragment": Packet("outside", 40000, "lb", 80, "udp", payload=bytes(64), fragment=(64, False)),
        "tagged": Packet("outside", 40000, "lb", 80, vlan=7),
    }
    if lab.family == 4:
        made["options"] = Packet("outside", 40000, "lb", 80, options=8)
    else:
        made["extensions"] = Packet("outside", 40000, "lb", 80, extensions=("hop", "dest", "route"))
    frames = {name: packet.frame(lab.family) for name, packet in made.items()}
    about = Packet("uplink", 40000, "remote", 8080, "udp")
    for kind in ERRORS:
        frames[kind] = icmp_error(kind, "router", "uplink", about, lab.family)
    return frames


def judges(lab: Lab) -> tuple[XdpJudge, Judge]:
    """Of XDP and of tc, who know the rows of `put_services`."""

    def ends(role: str, port: int) -> set[tuple[bytes, int, int]]:
        return {(packed(role, lab.family), port, int(number)) for number in PROTOCOLS.values()}

    forwarding, refusing, dropping = ends("lb", 80), ends("lb", 81) | ends("vip", 7), ends("lb", 82)
    own = {packed("uplink", lab.family)}
    return XdpJudge(forwarding, dropping, own), Judge(forwarding, refusing, dropping, ends("remote", 8080), own)


@pytest.mark.parametrize("known", (False, True), ids=("new", "known"))
def test_every_kind_of_packet_cut_off_at_every_length(lab: Lab, known: bool) -> None:
    """No verdict but those that rows speak of. What is passed is as it came; what tc translates is, as far as it goes,
    what the whole becomes. `known`: XDP has begun both flows, and the errors are about one of them."""
    lab.node.put_settings(snat_low=40000, snat_high=40000)
    put_services(lab)
    by_xdp, by_tc = judges(lab)
    frames = corpus(lab)
    seen: dict[tuple[str, int], set[str]] = {}

    def begin_anew() -> None:
        lab.node.forget("flows")
        for name in ("tcp", "udp") if known else ():
            lab.sent(frames[name])

    for name, frame in frames.items():
        begin_anew()
        whole = lab.tc("tc_ingress", frame, "up0").frame
        for length in range(ETHERNET, len(frame) + 1):
            piece = frame[:length]
            begin_anew()
            ran = lab.xdp(piece)
            complaint = by_xdp.complaint(piece, ran.verdict, ran.frame)
            assert not complaint, (name, length, complaint)
            assert ran.verdict != XDP_TX or piece == frame, (name, length)
            if ran.verdict != XDP_PASS:
                seen.setdefault(("xdp", ran.verdict), set()).add(name)
            if not can_run(piece):
                continue
            begin_anew()
            ran = lab.tc("tc_ingress", piece, "up0")
            complaint = by_tc.complaint(piece, ran.verdict, ran.frame, ingress=True)
            assert not complaint, (name, length, complaint)
            assert ran.verdict != UNSPEC or ran.frame in (piece, whole[:length]), (name, length)
            if ran.verdict != UNSPEC or ran.frame != piece:
                seen.setdefault(("tc", ran.verdict), set()).add(name)
    odd = {"fragment", "options" if lab.family == 4 else "extensions"}
    assert seen == {
        ("xdp", XDP_TX): {"tcp", "udp"},
        ("xdp", XDP_DROP): {"dropped"},
        ("tc", UNSPEC): {"tcp", "udp", *odd, *(("later-fragment", *ERRORS) if known else ())},
        ("tc", REDIRECT): {"refused-tcp", "refused-udp", "undefined"},
        ("tc", SHOT): {"refused-tcp", "dropped", "sctp"},
    }
    assert lab.node.counters()["PACKET_TOO_SHORT"] > 0


def saying(frame: bytes, length: int, family: int) -> bytes:
    """The frame with another length in its IP header: IPv4's whole one, IPv6's of the payload."""
    at = ETHERNET + (2 if family == 4 else 4)
    return frame[:at] + length.to_bytes(2) + frame[at + 2 :]


@both_protocols
@pytest.mark.parametrize("known", (False, True), ids=("new", "known"))
def test_a_packet_that_says_to_end_inside_its_headers(lab: Lab, protocol: str, known: bool) -> None:
    """The stack would cut it off there, between tc's two hooks: neither path translates it, or only half would be."""
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, protocol, payload=b"payload")
    inside = whole.but(source="uplink", destination="remote", dport=8080)
    if known:
        inside = inside.but(sport=sport_of(lab.by_stack(whole.frame(lab.family))))
    rows = lab.node.flows()
    header = 20 if lab.family == 4 else 0
    needed = header + (20 if protocol == "tcp" else 8)
    for packet in (whole, inside.reply(payload=b"payload")) if known else (whole,):
        for length in range(needed):
            frame = saying(packet.frame(lab.family), length, lab.family)
            lab.passed_up(frame)
            assert_same(lab.entered(frame), frame, f"{length} bytes")
    assert len(lab.node.flows()) == len(rows)
    assert lab.node.counters()["PACKET_TOO_SHORT"] == needed * (2 if known else 1), "once each"


def test_a_packet_that_is_too_long_to_say_how_long(lab: Lab) -> None:
    """A length of zero is that of many segments in one (BIG TCP), which the stack believes of those only."""
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, payload=bytes(3000))
    frame = saying(whole.frame(lab.family), 0, lab.family)
    lab.passed_up(frame)
    wanted = saying(whole.but(destination="remote", dport=8080).frame(lab.family), 0, lab.family)
    context = bytearray(gso_context(3, 1000))
    struct.pack_into("=I", context, 40, lab.index["up0"])
    ran = lab.node.run("tc_ingress", frame, bytes(context))
    assert ran.verdict == UNSPEC
    skip = slice(ETHERNET + 10, ETHERNET + 12) if lab.family == 4 else slice(0, 0)  # as wrong as it came
    assert_same(ran.frame[: skip.start] + ran.frame[skip.stop :], wanted[: skip.start] + wanted[skip.stop :])


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_that_says_to_end_inside_what_it_quotes(lab: Lab, kind: str) -> None:
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, payload=b"payload")
    inside = whole.but(
        source="uplink", sport=sport_of(lab.sent(whole.frame(lab.family))), destination="remote", dport=8080
    )
    error = icmp_error(kind, "router", "uplink", inside, lab.family)
    for length in range((20 if lab.family == 4 else 0) + 8 + (20 if lab.family == 4 else 40) + 8):
        frame = saying(error, length, lab.family)
        lab.passed_up(frame)
        assert_same(lab.entered(frame), frame)


@both_protocols
@pytest.mark.parametrize("lie", ("less", "more", "most"))
def test_a_length_field_that_lies(lab: Lab, protocol: str, lie: str) -> None:
    """What says to be longer than it is goes to the stack, which drops it; what says to be shorter keeps its end, which
    is no more than padding. A long frame does not get past an MTU by calling itself short."""
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, protocol, payload=b"payload")
    lab.sent(whole.frame(lab.family))
    sound = whole.frame(lab.family)
    said = len(sound) - ETHERNET - (0 if lab.family == 4 else 40)
    value = {"less": said - 3, "more": said + 9, "most": 0xFFFF}[lie]
    frame = saying(sound, value, lab.family)
    if lie != "less":
        lab.passed_up(frame)
    else:
        out = lab.sent(frame)
        inside = whole.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
        assert_same(out, saying(on_wire(inside, lab.family, "up0", "remote"), value, lab.family))
    entered = saying(whole.but(destination="remote", dport=8080).frame(lab.family), value, lab.family)
    assert_same(lab.entered(frame), entered, "by tc")
    long = whole.but(payload=bytes(1600)).frame(lab.family)
    lab.passed_up(saying(long, 100, lab.family))


@pytest.mark.parametrize("offset", (0, 1, 4, 15))
def test_a_data_offset_that_lies(lab: Lab, offset: int) -> None:
    """TCP's: nobody here reads what it speaks of."""
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, payload=b"payload")
    sound = whole.frame(lab.family)
    at = ETHERNET + (20 if lab.family == 4 else 40) + 12
    frame = sound[:at] + bytes([offset << 4]) + sound[at + 1 :]
    ran = lab.xdp(frame)
    assert ran.verdict == XDP_TX
    inside = whole.but(source="uplink", sport=sport_of(ran.frame), destination="remote", dport=8080)
    wanted = on_wire(inside, lab.family, "up0", "remote")
    assert_same(ran.frame, wanted[:at] + bytes([offset << 4]) + wanted[at + 1 :])


@pytest.mark.parametrize("length", (0, 7, 8, 0xFFFF))
def test_a_datagrams_own_length_that_lies(lab: Lab, length: int) -> None:
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, "udp", payload=b"payload")
    sound = whole.frame(lab.family)
    at = ETHERNET + (20 if lab.family == 4 else 40) + 4
    frame = sound[:at] + length.to_bytes(2) + sound[at + 2 :]
    ran = lab.xdp(frame)
    assert ran.verdict == XDP_TX
    inside = whole.but(source="uplink", sport=sport_of(ran.frame), destination="remote", dport=8080)
    wanted = on_wire(inside, lab.family, "up0", "remote")
    assert_same(ran.frame, wanted[:at] + length.to_bytes(2) + wanted[at + 2 :])


@pytest.mark.parametrize("lab", (4,), indirect=True)
@pytest.mark.parametrize("words", (6, 10, 15))
def test_an_ipv4_header_length_beyond_the_frame(lab: Lab, words: int) -> None:
    put_services(lab)
    frame = Packet("outside", 40000, "lb", 80, "udp").frame(4)
    frame = frame[:ETHERNET] + bytes([0x40 | words]) + frame[ETHERNET + 1 :]
    lab.passed_up(frame)
    assert_same(lab.entered(frame), frame)


@pytest.mark.parametrize("lab", (6,), indirect=True)
@pytest.mark.parametrize("length", (0, 1, 20, 255))
def test_an_extension_header_beyond_the_frame(lab: Lab, length: int) -> None:
    put_services(lab)
    frame = Packet("outside", 40000, "lb", 80, "udp", extensions=("dest",)).frame(6)
    at = ETHERNET + 40 + 1
    frame = frame[:at] + bytes([length]) + frame[at + 1 :]
    lab.passed_up(frame)
    ran = lab.tc("tc_ingress", frame, "up0")
    assert ran.verdict == UNSPEC and not judges(lab)[1].complaint(frame, ran.verdict, ran.frame, ingress=True)
    assert (ran.frame != frame) == (length == 1), "the true one"


def test_padding_behind_a_short_packet_stays(lab: Lab) -> None:
    """Ethernet's shortest frame is 60 bytes."""
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, "udp")
    frame = whole.frame(lab.family)
    padding = b"\xaa" * max(60 - len(frame), 6)
    out = lab.sent(frame + padding)
    inside = whole.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
    assert_same(out, on_wire(inside, lab.family, "up0", "remote") + padding)


@both_protocols
def test_a_frame_in_several_buffers(lab: Lab, protocol: str) -> None:
    """As jumbo frames come: what is not in the first buffer cannot be read; where that holds all headers, the frame is
    sent, and where it does not, passed up whole."""
    put_services(lab)
    whole = Packet("outside", 40000, "lb", 80, protocol, payload=bytes(range(256)) * 4)
    frame = whole.frame(lab.family)
    headers = ETHERNET + (20 if lab.family == 4 else 40) + (18 if protocol == "tcp" else 8)
    for linear in (*range(ETHERNET, headers + 9), len(frame) - 1):
        try:
            ran = lab.xdp(frame, linear=linear)
        except OSError as error:
            assert error.errno == errno.EINVAL
            pytest.skip("this kernel's test run makes no frames of several buffers")
        if linear < headers:
            assert ran.verdict == XDP_PASS
            assert_same(ran.frame, frame, f"{linear} bytes in the first buffer")
            continue
        assert ran.verdict == XDP_TX, linear
        inside = whole.but(source="uplink", sport=sport_of(ran.frame), destination="remote", dport=8080)
        assert_same(ran.frame, on_wire(inside, lab.family, "up0", "remote"), f"{linear} bytes in the first buffer")
