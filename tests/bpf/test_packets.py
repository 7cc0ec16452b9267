"""Single packets through the tc programs: a row {name, packet, verdict, packet after} for each situation.

Rules of this file: every row runs in IPv4 and IPv6; what is not changed must come back byte-identical, and what is
changed is compared with the whole packet as scapy builds it, whose checksums are then recomputed independently.
Situations of several packets are in test_packet_flows.py, refusals in test_packet_rejects.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from ebpflb.dataplane.bpf.constants import SOURCE_NODE, SOURCE_POD
from ebpflb.routes import Masquerade
from tests.bpf.loaded import (
    DNAT,
    DROP,
    POD_DEVICE,
    REJECT,
    SHOT,
    UNSPEC,
    UPLINK,
    Device,
    Loaded,
    To,
    gso_context,
)
from tests.packets import ETHERNET, Packet, address, arp, assert_same, assert_sound, icmp_error

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

FAMILIES = (4, 6)
RANGES = ("203.0.113.0/30", "2001:db8:203::4/127", "10.0.0.0/8", "fd00:10::/32")


def world(node: Loaded, family: int) -> None:
    """The rows that the single packets meet: one frontend for each kind of row."""
    for protocol in ("tcp", "udp"):
        local = (("local", 8080),)
        node.put_frontend("vip", 80, protocol, family, To(local), To(local))
        node.put_frontend("node", 30080, protocol, family, To(local), To(local))
        node.put_frontend("vip", 81, protocol, family, REJECT)
        node.put_frontend("vip", 82, protocol, family, DROP)
        node.put_frontend("vip", 83, protocol, family, To(broken="free"))
        node.put_frontend("vip", 84, protocol, family, To(broken="absent"))
        node.put_frontend("vip", 85, protocol, family, To(()))
        node.put_frontend("vip", 86, protocol, family, To(local), DROP)
        node.put_frontend("lb", 80, protocol, family, To(local, ranges=RANGES))
        node.put_frontend("127.0.0.1" if family == 4 else "::1", 30080, protocol, family, To(local))
    node.put_frontend("vip", 9, "sctp", family, To((("local", 9),)))
    node.put_frontend("vip", 10, "sctp", family, To((("local", 11),)))
    node.put_source(f"{address('node', family)}/{32 if family == 4 else 128}", SOURCE_NODE)
    node.put_source("10.1.0.0/16" if family == 4 else "fd00:10:1::/48", SOURCE_POD)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """`after` None: byte-identical. `counts` is everything that is counted. `only` narrows to one family."""

    name: str
    packet: Packet
    verdict: int = UNSPEC
    after: Packet | None = None
    counts: tuple[str, ...] = ()
    device: Device = UPLINK
    only: int = 0


def _to_vip(protocol: str, port: int = 80, **changes: object) -> Packet:
    return Packet("outside", 40000, "vip", port, protocol, payload=b"some payload", **changes)  # type: ignore[arg-type]


def _forwarded(name: str, packet: Packet, device: Device = UPLINK, only: int = 0) -> Case:
    """A packet that becomes one to local:8080 and is otherwise the same."""
    counts: tuple[str, ...] = ("PACKET_FORWARDED",)
    if packet.protocol == "tcp" and packet.flags != "S":
        counts += ("PACKET_NOT_NEW",)
    return Case(name, packet, UNSPEC, packet.but(destination="local", dport=8080), counts, device, only)


def _cases() -> Iterator[Case]:
    for protocol in ("tcp", "udp"):
        yield Case(f"{protocol} to an address that is no Service", _to_vip(protocol).but(destination="stranger"))
        yield Case(f"{protocol} to the Service's address, another port", _to_vip(protocol, 8))
        yield Case(f"{protocol} to the Service's port, another address", _to_vip(protocol).but(destination="vip2"))
        yield Case(f"{protocol} from the Service's address", _to_vip(protocol).but(source="vip", destination="outside"))
        yield Case(f"{protocol} to the backend itself", _to_vip(protocol, 8080).but(destination="local"))
        yield Case(f"{protocol} with a VLAN tag", _to_vip(protocol, vlan=7))
        yield Case(
            f"{protocol} to a row whose backend is free",
            _to_vip(protocol, 83),
            counts=("PACKET_NO_BACKEND",),
        )
        yield Case(
            f"{protocol} to a row whose backend id is beyond the table",
            _to_vip(protocol, 84),
            counts=("PACKET_NO_BACKEND",),
        )
        yield Case(f"{protocol} to a row without slots", _to_vip(protocol, 85), counts=("PACKET_NO_BACKEND",))
        yield Case(f"{protocol} to a DROP row", _to_vip(protocol, 82), SHOT, counts=("PACKET_DROPPED",))
        yield Case(
            f"{protocol} to loopback from the wire",
            _to_vip(protocol, 30080).but(destination="loopback"),
        )
        yield _forwarded(f"{protocol} to a ClusterIP", _to_vip(protocol))
        yield _forwarded(f"{protocol} to a ClusterIP from a pod", _to_vip(protocol).but(source="client"), POD_DEVICE)
        yield _forwarded(f"{protocol} to a nodePort, backend here", _to_vip(protocol, 30080).but(destination="node"))
        yield _forwarded(f"{protocol} without payload", _to_vip(protocol).but(payload=b""))
        yield _forwarded(f"{protocol} of odd length", _to_vip(protocol).but(payload=b"odd"))
        yield _forwarded(f"{protocol} of 1400 bytes", _to_vip(protocol).but(payload=bytes(range(200)) * 7))
        yield _forwarded(f"{protocol} with traffic class", _to_vip(protocol, tos=0xB8))
        yield _forwarded(f"{protocol} with hop limit 1", _to_vip(protocol, hops=1))
        yield _forwarded(f"{protocol} with IPv4 options", _to_vip(protocol, options=7), only=4)
        yield _forwarded(f"{protocol} with the most IPv4 options", _to_vip(protocol, options=40), only=4)
        for headers in (("hop",), ("dest",), ("route",), ("hop", "dest", "route"), ("dest", "route", "dest")):
            yield _forwarded(
                f"{protocol} behind extension headers {'+'.join(headers)}",
                _to_vip(protocol, extensions=headers),
                only=6,
            )
        yield _forwarded(
            f"{protocol} to a scope's row that forwards, by pod device", _to_vip(protocol, 86), device=POD_DEVICE
        )
        yield _forwarded(
            f"{protocol} to a scope's row that forwards, by pod address", _to_vip(protocol, 86).but(source="client")
        )
        yield _forwarded(
            f"{protocol} to a scope's row that forwards, by node address", _to_vip(protocol, 86).but(source="node")
        )
        yield Case(
            f"{protocol} to a scope's row that drops, from outside",
            _to_vip(protocol, 86),
            SHOT,
            counts=("PACKET_DROPPED",),
        )
        yield Case(
            f"{protocol} from outside the source ranges",
            _to_vip(protocol).but(destination="lb", source="outside2"),
            SHOT,
            counts=("PACKET_OUT_OF_RANGE",),
        )
        yield _forwarded(
            f"{protocol} from inside the source ranges",
            _to_vip(protocol).but(destination="lb", source="router"),
            only=4,
        )
        yield _forwarded(
            f"{protocol} from inside the source ranges, longest prefix",
            _to_vip(protocol).but(destination="lb", source="outside"),
            only=6,
        )
    yield _forwarded("udp whose IPv4 checksum is 0", _to_vip("udp", no_checksum=True), only=4)
    for flags in ("A", "PA", "FA", "R", "RA", "SA"):
        yield _forwarded(f"tcp {flags} of a flow that began elsewhere", _to_vip("tcp", flags=flags))
    yield _forwarded("tcp with options", _to_vip("tcp", tcp_options=(("MSS", 1460), ("SAckOK", b""), ("WScale", 7))))
    yield Case("icmp echo to a ClusterIP", _to_vip("echo"))
    yield Case(
        "sctp whose port stays",
        Packet("outside", 40000, "vip", 9, "sctp"),
        after=Packet("outside", 40000, "local", 9, "sctp"),
        counts=("PACKET_FORWARDED",),
    )
    yield Case(
        "sctp whose port would change", Packet("outside", 40000, "vip", 10, "sctp"), SHOT, counts=("PACKET_SCTP_PORT",)
    )
    yield Case("sctp to a port that is only tcp's", Packet("outside", 40000, "vip", 80, "sctp"))


CASES = tuple(_cases())


@pytest.mark.parametrize(
    ("case", "family"),
    [
        pytest.param(case, family, id=f"{case.name.replace(' ', '-')}-v{family}")
        for case in CASES
        for family in FAMILIES
        if case.only in (0, family)
    ],
)
def test_packet(node: Loaded, case: Case, family: int) -> None:
    packet = case.packet
    if packet.destination == "loopback":
        packet = packet.but(destination="127.0.0.1" if family == 4 else "::1")
    world(node, family)
    frame = packet.frame(family)
    result = node.ingress(frame, family, case.device)
    assert result.verdict == case.verdict
    if case.verdict == UNSPEC:
        assert_same(result.frame, (case.after or packet).frame(family))
        if case.after is not None:
            assert_sound(result.frame)
    wanted = dict.fromkeys(case.counts, 1)
    assert node.counters() == wanted
    forwarded = "PACKET_FORWARDED" in wanted
    assert len([row for row in node.flows() if row.action == DNAT]) == int(forwarded)
    assert bool(node.flows()) == forwarded, "a packet that is not forwarded leaves no row"


def test_every_row_of_the_table_has_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_arp_is_untouched(node: Loaded) -> None:
    world(node, 4)
    for run in (node.ingress, node.egress):
        assert_same(run(arp()).frame, arp())
    assert node.counters() == {}


@pytest.mark.parametrize("ethertype", (0x88CC, 0x8863, 0x88A8, 0x8100, 0x0000, 0x05DC), ids=hex)
def test_frames_of_other_protocols_are_untouched(node: Loaded, ethertype: int) -> None:
    """A frame that carries the bytes of a packet to a Service, but says it is something else."""
    world(node, 4)
    frame = bytearray(_to_vip("tcp").frame(4))
    frame[12:14] = ethertype.to_bytes(2, "big")
    for run in (node.ingress, node.egress):
        result = run(bytes(frame))
        assert (result.verdict, result.frame) == (UNSPEC, bytes(frame))
    assert node.counters() == {}


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
@pytest.mark.parametrize("protocol", ("tcp", "udp", "echo", "sctp"))
def test_truncated_at_every_length(node: Loaded, family: int, protocol: str) -> None:
    """A packet that ends inside a header is untouched; one that ends behind it is translated, however short."""
    world(node, family)
    port = 9 if protocol == "sctp" else 80
    whole = Packet("outside", 40000, "vip", port, protocol, payload=bytes(100)).frame(family)
    header = ETHERNET + (20 if family == 4 else 40) + {"tcp": 14, "udp": 4, "sctp": 4, "echo": 0}[protocol]
    for length in range(ETHERNET, min(128, len(whole)) + 1):
        frame = whole[:length]
        try:
            result = node.ingress(frame, family)
        except OSError:
            # The kernel builds no test packet from a frame too short for the IP header that it announces.
            assert length < ETHERNET + (20 if family == 4 else 40)
            continue
        assert len(result.frame) == length
        if length < header or protocol == "echo":
            assert (result.verdict, result.frame) == (UNSPEC, frame), length
        else:
            assert result.verdict in (UNSPEC, SHOT), length
        if result.frame != frame:
            assert result.frame[:ETHERNET] == frame[:ETHERNET]


def test_too_many_extension_headers_are_untouched(node: Loaded) -> None:
    """The walk is bounded: what hides behind more than that is not translated, nor is it mistaken for something."""
    world(node, 6)
    packet = _to_vip("tcp", extensions=("dest",) * 12)
    result = node.ingress(packet.frame(6), 6)
    assert (result.verdict, result.frame) == (UNSPEC, packet.frame(6))
    assert "PACKET_FORWARDED" not in node.counters()


def test_wrong_ip_versions_and_header_lengths_are_untouched(node: Loaded) -> None:
    world(node, 4)
    frame = bytearray(_to_vip("tcp").frame(4))
    for first in (0x55, 0x65, 0x05, 0x44, 0x40, 0x41):
        frame[ETHERNET] = first
        for run in (node.ingress, node.egress):
            assert run(bytes(frame)).frame == bytes(frame)
    frame = bytearray(_to_vip("tcp").frame(6))
    for first in (0x40, 0x45, 0x00, 0x70):
        frame[ETHERNET] = first
        assert node.ingress(bytes(frame), 6).frame == bytes(frame)
    assert node.counters() == {}


@pytest.mark.parametrize("protocol", ("ipip", "ip6ip6", "gre"))
@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
def test_tunnels_to_a_service_address_are_untouched(node: Loaded, family: int, protocol: str) -> None:
    """What is inside a tunnel is its business, even where the inner packet is for a Service."""
    world(node, family)
    number = {"ipip": 4, "ip6ip6": 41, "gre": 47}[protocol]
    inner = _to_vip("tcp").inner(family)
    frame = bytearray(_to_vip("tcp").frame(family)[: ETHERNET + (20 if family == 4 else 40)] + inner)
    frame[ETHERNET + (9 if family == 4 else 6)] = number
    for run in (node.ingress, node.egress):
        result = run(bytes(frame), family)
        assert (result.verdict, result.frame) == (UNSPEC, bytes(frame))


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
@pytest.mark.parametrize("protocol", ("tcp", "udp"))
def test_a_checksum_that_was_wrong_stays_wrong(node: Loaded, family: int, protocol: str) -> None:
    """Translation must not heal what the network broke: the receiver has to notice."""
    world(node, family)
    frame = bytearray(_to_vip(protocol).frame(family))
    frame[-1] ^= 0x55
    result = node.ingress(bytes(frame), family)
    with pytest.raises(AssertionError, match="checksum"):
        assert_sound(result.frame)


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
def test_udp_checksum_that_comes_out_as_zero_is_written_as_ffff(node: Loaded, family: int) -> None:
    """0 means "no checksum" (RFC 768), and is forbidden in IPv6 (RFC 8200)."""
    world(node, family)
    start = ETHERNET + (20 if family == 4 else 40)
    after = _to_vip("udp").but(destination="local", dport=8080, payload=b"\0\0")
    was = int.from_bytes(after.frame(family)[start + 6 : start + 8], "big")
    payload = was.to_bytes(2, "big")
    result = node.ingress(_to_vip("udp").but(payload=payload).frame(family), family)
    assert result.frame[start + 6 : start + 8] == b"\xff\xff"
    assert_same(result.frame, after.but(payload=payload).frame(family))
    assert_sound(result.frame)


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
def test_a_gso_packet_is_translated_once(node: Loaded, family: int) -> None:
    world(node, family)
    packet = _to_vip("tcp", flags="A").but(payload=bytes(2000))
    node.put_device(UPLINK, family)
    result = node.run("tc_ingress", packet.frame(family), gso_context(2, 1000))
    assert result.verdict == UNSPEC
    assert_same(result.frame, packet.but(destination="local", dport=8080).frame(family))


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
def test_all_backends_are_chosen_about_evenly(node: Loaded, family: int) -> None:
    """4 backends, 2000 flows: each share is within 8 standard deviations of a quarter (6 would be exceeded by chance
    once in 3·10^7 runs)."""
    node.put_frontend("vip", 80, "tcp", family, To(tuple(("local", 9000 + number) for number in range(4))))
    seen: dict[bytes, int] = {}
    start = ETHERNET + (20 if family == 4 else 40)
    frame = bytearray(Packet("outside", 1, "vip", 80).frame(family))
    for port in range(2000):
        frame[start : start + 2] = (10000 + port).to_bytes(2, "big")
        result = node.ingress(bytes(frame), family)
        chosen = result.frame[start + 2 : start + 4]
        seen[chosen] = seen.get(chosen, 0) + 1
    assert len(seen) == 4
    assert all(abs(count - 500) < 8 * (2000 * 0.25 * 0.75) ** 0.5 for count in seen.values()), seen


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
def test_before_the_settings_are_written_nothing_is_touched(node: Loaded, family: int) -> None:
    """Settings of zero (a map that has just been made) must not lead to a packet with a port out of any range."""
    node.put_frontend("vip2", 80, "udp", family, To((("remote", 8080),), masquerade=Masquerade.ALWAYS))
    node.drop_settings()
    frame = _to_vip("udp").but(destination="vip2").frame(family)
    for run in (node.ingress, node.egress):
        result = run(frame, family)
        assert (result.verdict, result.frame) == (UNSPEC, frame)
    assert node.flows() == []


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
@pytest.mark.parametrize("kind", ("too-big", "unreachable", "exceeded"))
def test_icmp_error_about_a_stranger_is_untouched(node: Loaded, family: int, kind: str) -> None:
    world(node, family)
    about = Packet("stranger", 80, "outside", 40000)
    frame = icmp_error(kind, "router", "stranger", about, family)
    for run in (node.ingress, node.egress):
        result = run(frame, family)
        assert (result.verdict, result.frame) == (UNSPEC, frame)
    assert node.counters() == {}


@pytest.mark.parametrize("family", FAMILIES, ids=("v4", "v6"))
def test_icmp_error_about_an_unknown_flow_of_a_frontend_is_untouched(node: Loaded, family: int) -> None:
    """An error never begins a flow."""
    world(node, family)
    frame = icmp_error("unreachable", "outside", "vip", Packet("vip", 80, "outside", 40000), family)
    result = node.ingress(frame, family)
    assert (result.verdict, result.frame) == (UNSPEC, frame)
    assert node.counters() == {} and node.flows() == []
