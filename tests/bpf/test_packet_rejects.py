"""Refused packets: what is sent back, byte by byte, and that it goes back where it came from.

Rules of this file: the expected answer is written here from the RFCs (RFC 9293 3.10.7.1 for RST, RFC 792 and RFC 4443
for port unreachable), never taken from the program.
"""

from __future__ import annotations

import struct

import pytest

from tests.bpf.loaded import DROP, POD_DEVICE, REDIRECT, REJECT, SHOT, UNSPEC, Loaded, To
from tests.packets import (
    ETHERNET,
    MAC_CLIENT,
    MAC_NODE,
    Packet,
    assert_same,
    assert_sound,
    checksum,
    packed,
    parse,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_families = pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))
CLIENT_MAC = bytes.fromhex(MAC_CLIENT.replace(":", ""))
NODE_MAC = bytes.fromhex(MAC_NODE.replace(":", ""))
OPTIONS = (("MSS", 1460), ("SAckOK", b""), ("Timestamp", (123456, 0)), ("NOP", None), ("WScale", 7))


def _refused(node: Loaded, packet: Packet, family: int) -> bytes:
    """The answer to the packet, sound and on its way back."""
    node.put_frontend("vip", 81, packet.protocol, family, REJECT)
    result = node.ingress(packet.frame(family), family)
    assert result.verdict == REDIRECT, node.counters()
    assert_sound(result.frame)
    assert result.frame[:6] == CLIENT_MAC
    assert result.frame[6:12] == NODE_MAC
    parsed = parse(result.frame)
    assert parsed is not None
    assert parsed.source == packed("vip", family)
    assert parsed.destination == packed(packet.source, family)
    assert parsed.hops == 64
    return result.frame


def _forget_sum(node: Loaded) -> None:
    """The answer is shorter than the datagram, and with the cut the kernel forgets hardware's sum (it sets
    CHECKSUM_NONE); the test run would compare with what is no longer kept."""
    node.flags = 0


def _segment(frame: bytes) -> tuple[int, int, int, int, int, int]:
    """Ports, sequence, acknowledgment, header length in bytes and flags."""
    parsed = parse(frame)
    assert parsed is not None
    sport, dport, seq, ack, length, flags = struct.unpack_from("!HHIIBB", frame, parsed.l4)
    return sport, dport, seq, ack, (length >> 4) * 4, flags


RST, ACK = 0x04, 0x10


@both_families
@pytest.mark.parametrize(
    ("flags", "payload", "wanted"),
    [
        pytest.param("S", b"", (0, 5001, RST | ACK), id="syn"),
        pytest.param("S", b"early data", (0, 5011, RST | ACK), id="syn-with-data"),
        pytest.param("A", b"", (7000, 0, RST), id="ack"),
        pytest.param("PA", b"request", (7000, 0, RST), id="data"),
        pytest.param("FA", b"", (7000, 0, RST), id="fin-ack"),
        pytest.param("SA", b"", (7000, 0, RST), id="syn-ack"),
        pytest.param("F", b"", (0, 5001, RST | ACK), id="fin"),
        pytest.param("", b"xyz", (0, 5003, RST | ACK), id="no-flags"),
    ],
)
@pytest.mark.parametrize("options", ((), OPTIONS, (("NOP", None),) * 40), ids=("plain", "options", "most-options"))
def test_tcp_is_answered_with_rst(
    node: Loaded,
    family: int,
    flags: str,
    payload: bytes,
    wanted: tuple[int, int, int],
    options: tuple[tuple[str, object], ...],
) -> None:
    packet = Packet(
        "outside", 40000, "vip", 81, flags=flags, seq=5000, ack=7000, payload=payload, tcp_options=options, hops=3
    )
    answer = _refused(node, packet, family)
    sport, dport, seq, ack, header, got = _segment(answer)
    assert (sport, dport) == (81, 40000)
    assert (seq, ack, got) == wanted
    assert len(answer) == len(packet.frame(family)), "the same length"
    parsed = parse(answer)
    assert parsed is not None
    assert set(answer[parsed.l4 + 20 : parsed.l4 + header]) <= {1}, "options are no-ops"
    assert node.counters() == {"PACKET_REJECTED_TCP": 1}
    assert node.flows() == []


@both_families
def test_sequence_numbers_wrap(node: Loaded, family: int) -> None:
    answer = _refused(node, Packet("outside", 40000, "vip", 81, seq=0xFFFFFFFF), family)
    assert _segment(answer)[2:4] == (0, 0)


@both_families
@pytest.mark.parametrize("protocol", ("tcp", "udp", "sctp"))
@pytest.mark.parametrize(
    "mac", ("ff" * 6, "01005e000001", "333300000001"), ids=("broadcast", "multicast4", "multicast6")
)
def test_what_was_sent_to_many_is_not_answered(node: Loaded, family: int, protocol: str, mac: str) -> None:
    """RFC 1122, 3.2.2: every node would, from a source that no frame may have."""
    node.put_frontend("vip", 80, protocol, family, REJECT)
    frame = bytes.fromhex(mac) + Packet("outside", 40000, "vip", 80, protocol).frame(family)[6:]
    assert node.ingress(frame, family).verdict == SHOT
    assert node.counters() == {"PACKET_REJECT_FAILED": 1}


@both_families
@pytest.mark.parametrize("flags", ("R", "RA"))
def test_rst_is_not_answered(node: Loaded, family: int, flags: str) -> None:
    """Or two hosts could go on for ever."""
    node.put_frontend("vip", 81, "tcp", family, REJECT)
    assert node.ingress(Packet("outside", 40000, "vip", 81, flags=flags).frame(family), family).verdict == SHOT


@both_families
def test_padding_of_a_short_frame_is_not_data(node: Loaded, family: int) -> None:
    """Ethernet pads to 60 bytes: the acknowledged length is IP's."""
    node.put_frontend("vip", 81, "tcp", family, REJECT)
    frame = Packet("outside", 40000, "vip", 81, seq=5000).frame(family) + bytes(6)
    result = node.ingress(frame, family)
    assert result.verdict == REDIRECT
    assert _segment(result.frame)[3] == 5001
    assert_sound(result.frame)


def test_tcp_with_ipv4_options_is_answered(node: Loaded) -> None:
    answer = _refused(node, Packet("outside", 40000, "vip", 81, seq=5000, options=8), 4)
    assert _segment(answer)[2:4] == (0, 5001)


def test_tcp_behind_extension_headers_is_answered(node: Loaded) -> None:
    answer = _refused(node, Packet("outside", 40000, "vip", 81, seq=5000, extensions=("hop", "dest")), 6)
    assert _segment(answer)[2:4] == (0, 5001)


@both_families
@pytest.mark.parametrize("payload", (b"", b"q", b"odd", b"a query of some length" * 20), ids=len)
@pytest.mark.parametrize("protocol", ("udp", "sctp"))
def test_datagrams_are_answered_with_port_unreachable(node: Loaded, family: int, payload: bytes, protocol: str) -> None:
    if payload or protocol == "sctp":
        _forget_sum(node)
    packet = Packet("outside", 40000, "vip", 81, protocol, payload=payload, hops=3)
    answer = _refused(node, packet, family)
    parsed = parse(answer)
    assert parsed is not None
    assert (parsed.protocol, answer[parsed.l4], answer[parsed.l4 + 1]) == ((1, 3, 3) if family == 4 else (58, 1, 4))
    assert answer[parsed.l4 + 4 : parsed.l4 + 8] == bytes(4)
    quoted = answer[parsed.l4 + 8 :]
    original = packet.frame(family)[ETHERNET:]
    header = 20 if family == 4 else 40
    assert len(quoted) >= header + 8, "RFC 792: the header and 64 bits of the datagram's data"
    assert quoted == original[: len(quoted)], "the datagram as it was sent"
    assert node.counters() == {"PACKET_REJECTED_ICMP": 1}
    assert node.flows() == []


def test_udp_without_checksum_is_answered(node: Loaded) -> None:
    _forget_sum(node)
    _refused(node, Packet("outside", 40000, "vip", 81, "udp", payload=b"query", no_checksum=True), 4)


def test_every_refused_ipv4_header_gets_a_right_checksum(node: Loaded) -> None:
    """The sums that come out as zero or carry twice are among these."""
    _forget_sum(node)
    node.put_frontend("vip", 81, "udp", 4, REJECT)
    for ident in range(0, 0x10000, 61):
        packet = Packet("outside", 40000, "vip", 81, "udp", payload=b"q", ident=0x1234)
        frame = bytearray(packet.frame(4))
        struct.pack_into("!H", frame, ETHERNET + 4, ident)
        struct.pack_into("!H", frame, ETHERNET + 10, 0)
        struct.pack_into("!H", frame, ETHERNET + 10, checksum(bytes(frame[ETHERNET : ETHERNET + 20])))
        result = node.ingress(bytes(frame))
        assert result.verdict == REDIRECT
        assert_sound(result.frame)


@pytest.mark.parametrize("protocol", ("udp", "sctp"))
@pytest.mark.parametrize(
    ("packet", "family"),
    [
        pytest.param({"options": 4}, 4, id="ipv4-options"),
        pytest.param({"extensions": ("dest",)}, 6, id="ipv6-extension-header"),
    ],
)
def test_a_datagram_that_cannot_be_answered_is_dropped_and_counted(
    node: Loaded, packet: dict[str, object], family: int, protocol: str
) -> None:
    node.put_frontend("vip", 81, protocol, family, REJECT)
    result = node.ingress(Packet("outside", 1, "vip", 81, protocol).but(**packet).frame(family), family)
    assert result.verdict == SHOT
    assert node.counters() == {"PACKET_REJECT_FAILED": 1}


@both_families
def test_a_segment_cut_off_inside_its_options_is_dropped_and_counted(node: Loaded, family: int) -> None:
    node.flags = 0  # of a packet that goes nowhere the sum may be anything
    node.put_frontend("vip", 81, "tcp", family, REJECT)
    packet = Packet("outside", 40000, "vip", 81, tcp_options=OPTIONS)
    frame = packet.frame(family)[:-4]
    result = node.ingress(frame, family)
    assert result.verdict == SHOT
    assert node.counters() == {"PACKET_REJECT_FAILED": 1}


@both_families
@pytest.mark.parametrize("words", (0, 1, 4))
def test_a_segment_with_an_impossible_header_length_is_dropped(node: Loaded, family: int, words: int) -> None:
    node.put_frontend("vip", 81, "tcp", family, REJECT)
    frame = bytearray(Packet("outside", 40000, "vip", 81).frame(family))
    frame[ETHERNET + (20 if family == 4 else 40) + 12] = words << 4
    assert node.ingress(bytes(frame), family).verdict == SHOT
    assert node.counters() == {"PACKET_REJECT_FAILED": 1}


@both_families
@pytest.mark.parametrize("protocol", ("tcp", "udp", "sctp"))
def test_drop_is_silent(node: Loaded, family: int, protocol: str) -> None:
    node.put_frontend("vip", 82, protocol, family, DROP)
    assert node.ingress(Packet("outside", 40000, "vip", 82, protocol).frame(family), family).verdict == SHOT
    assert node.counters() == {"PACKET_DROPPED": 1}


@both_families
def test_a_route_that_becomes_a_refusal_keeps_its_connections(node: Loaded, family: int) -> None:
    """REJECT and DROP are for new flows."""
    node.put_frontend("vip", 80, "tcp", family, To((("local", 8080),)))
    packet = Packet("outside", 40000, "vip", 80)
    assert node.ingress(packet.frame(family), family).verdict == UNSPEC
    node.put_frontend("vip", 80, "tcp", family, REJECT)
    after = node.ingress(packet.but(flags="A").frame(family), family)
    assert_same(after.frame, packet.but(flags="A", destination="local", dport=8080).frame(family))
    assert node.ingress(packet.but(sport=40001).frame(family), family).verdict == REDIRECT


@both_families
def test_refusals_look_the_same_to_a_pod(node: Loaded, family: int) -> None:
    node.put_frontend("vip", 81, "tcp", family, REJECT)
    packet = Packet("client", 40000, "vip", 81)
    result = node.ingress(packet.frame(family), family, POD_DEVICE)
    assert result.verdict == REDIRECT
    assert_sound(result.frame)


@both_families
def test_a_refusing_row_says_nothing_about_packets_that_leave(node: Loaded, family: int) -> None:
    """Only what enters is a request; the same tuple at egress is somebody else's packet."""
    node.put_frontend("vip", 81, "tcp", family, REJECT)
    frame = Packet("outside", 40000, "vip", 81).frame(family)
    result = node.egress(frame, family)
    assert (result.verdict, result.frame) == (UNSPEC, frame)
