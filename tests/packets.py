"""Packets for tests: one description for both families, built by scapy, judged by arithmetic of our own.

Rules of this file: a description names roles ("client", "vip"), never addresses, so that IPv4 and IPv6 are the same
text; `frame(family)` makes the bytes. Checksums of what comes out of a program are recomputed here in plain Python from
the RFCs, sharing no line with scapy or with the C code: what builds a packet must not be what judges it.
"""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Mapping
from typing import Any

from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet as ScapyPacket
from scapy.packet import Raw

ROLES: Mapping[str, tuple[str, str]] = {
    "outside": ("203.0.113.5", "2001:db8:203::5"),
    "outside2": ("203.0.113.6", "2001:db8:203::6"),
    "router": ("203.0.113.1", "2001:db8:203::1"),
    "client": ("10.1.0.5", "fd00:10:1::5"),
    "local": ("10.1.0.10", "fd00:10:1::10"),
    "local2": ("10.1.0.11", "fd00:10:1::11"),
    "remote": ("10.2.0.20", "fd00:10:2::20"),
    "remote2": ("10.2.0.21", "fd00:10:2::21"),
    "faraway": ("10.3.0.30", "fd00:10:3::30"),
    "silent": ("10.4.0.40", "fd00:10:4::40"),
    "tunnelled": ("10.5.0.50", "fd00:10:5::50"),
    "narrow": ("10.6.0.60", "fd00:10:6::60"),
    "tagremote": ("10.7.0.70", "fd00:10:7::70"),
    "vip": ("172.30.0.41", "fd00:172:30::41"),
    "vip2": ("172.30.0.42", "fd00:172:30::42"),
    "node": ("192.168.0.2", "fd00:192:168::2"),
    "uplink": ("192.168.0.2", "fd00:192:168::2"),
    "uplink2": ("192.168.1.2", "fd00:192:168:1::2"),
    "tagged": ("192.168.7.2", "fd00:192:168:7::2"),
    "tagclient": ("192.168.7.5", "fd00:192:168:7::5"),
    "tunnel": ("192.168.5.2", "fd00:192:168:5::2"),
    "node2": ("192.168.0.3", "fd00:192:168::3"),
    "lb": ("1.2.3.4", "2001:db8:1::4"),
    "stranger": ("198.51.100.9", "2001:db8:100::9"),
}
"""Who stands for which address, IPv4 and IPv6: pods in 10/8, cluster IPs in 172.30/16, nodes in 192.168.0/24 ("node"
is this one, "uplink", "uplink2", "tagged" and "tunnel" the addresses that it masquerades to by one device or another),
clients outside in 203.0.113/24."""

MAC_CLIENT = "02:00:00:00:00:01"
MAC_NODE = "02:00:00:00:00:02"

ETHERNET = 14
EXTENSIONS = (0, 43, 60, 44)


def address(role: str, family: int) -> str:
    """The address of a role; a literal address stands for itself."""
    if role not in ROLES:
        return role
    return ROLES[role][family == 6]


@dataclasses.dataclass(frozen=True, slots=True)
class Packet:
    """A packet by roles. `protocol` is tcp, udp, sctp or echo (ICMP echo request).

    `options` puts NOPs into the IPv4 header; `extensions` names IPv6 extension headers in order (hop, dest, route);
    an IPv4 packet has none. `fragment` is (offset in bytes, more follow): at offset 0 the transport header is there,
    behind it `payload` is all there is. `no_checksum` is UDP's checksum 0.
    """

    source: str
    sport: int
    destination: str
    dport: int
    protocol: str = "tcp"
    flags: str = "S"
    seq: int = 1000
    ack: int = 0
    payload: bytes = b""
    hops: int = 64
    tos: int = 0
    options: int = 0
    extensions: tuple[str, ...] = ()
    fragment: tuple[int, bool] | None = None
    ident: int = 0x1234
    tcp_options: tuple[tuple[str, Any], ...] = ()
    no_checksum: bool = False
    vlan: int | None = None

    def but(self, **changes: Any) -> Packet:
        """The same packet with some fields changed."""
        return dataclasses.replace(self, **changes)

    def reply(self, **changes: Any) -> Packet:
        """The answer: both ends swapped, SYN+ACK for a SYN."""
        flags = "SA" if self.flags == "S" else "A"
        return self.but(
            source=self.destination,
            sport=self.dport,
            destination=self.source,
            dport=self.sport,
            flags=flags,
            **changes,
        )

    def inner(self, family: int) -> bytes:
        """From the IP header on."""
        return self.frame(family)[ETHERNET + (4 if self.vlan is not None else 0) :]

    def frame(self, family: int) -> bytes:
        """The Ethernet frame, from the client's side to the node."""
        body = _transport(self, family)
        ip: ScapyPacket
        if family == 4:
            offset, more = self.fragment or (0, False)
            ip = IP(
                src=address(self.source, 4),
                dst=address(self.destination, 4),
                ttl=self.hops,
                tos=self.tos,
                id=self.ident,
                flags="MF" if more else "",
                options=[IPOption_NOP()] * self.options,
            )
            whole = ip / body
            if self.fragment is not None:
                number = _NUMBERS[self.protocol][0]
                if offset:
                    whole = IP(**{**_fields(ip), "frag": offset // 8, "proto": number}) / Raw(self.payload)
        else:
            ip = IPv6(src=address(self.source, 6), dst=address(self.destination, 6), hlim=self.hops, tc=self.tos)
            headers = ip
            for name in self.extensions:
                headers = headers / _EXTENSIONS[name]()
            whole = headers / body
            if self.fragment is not None:
                offset, more = self.fragment
                upper = bytes(raw(whole))[len(raw(headers)) :]
                piece = IPv6ExtHdrFragment(
                    nh=_NUMBERS[self.protocol][1], offset=offset // 8, m=int(more), id=self.ident
                )
                whole = headers / piece / Raw(self.payload if offset else upper)
        ether: ScapyPacket = Ether(src=MAC_CLIENT, dst=MAC_NODE, type=0x0800 if family == 4 else 0x86DD)
        if self.vlan is not None:
            ether = Ether(src=MAC_CLIENT, dst=MAC_NODE) / Dot1Q(vlan=self.vlan, type=0x0800 if family == 4 else 0x86DD)
        return bytes(raw(ether / whole))


_NUMBERS = {"tcp": (6, 6), "udp": (17, 17), "sctp": (132, 132), "echo": (1, 58)}

_EXTENSIONS = {
    "hop": lambda: IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)]),
    "dest": lambda: IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 12)]),
    "route": lambda: IPv6ExtHdrRouting(type=0, segleft=0, addresses=[]),
}


def _fields(ip: ScapyPacket) -> dict[str, Any]:
    return {name: value for name, value in ip.fields.items() if name != "frag"}


def _transport(packet: Packet, family: int) -> ScapyPacket:
    if packet.protocol == "tcp":
        top: ScapyPacket = TCP(
            sport=packet.sport,
            dport=packet.dport,
            flags=packet.flags,
            seq=packet.seq,
            ack=packet.ack,
            options=list(packet.tcp_options),
        )
    elif packet.protocol == "udp":
        top = UDP(sport=packet.sport, dport=packet.dport)
        if packet.no_checksum:
            top.chksum = 0
    elif packet.protocol == "sctp":
        top = SCTP(sport=packet.sport, dport=packet.dport) / SCTPChunkInit(init_tag=7)
    elif packet.protocol == "echo":
        return _echo(packet, family)
    else:
        raise ValueError(packet.protocol)
    return top / Raw(packet.payload) if packet.payload else top


def _echo(packet: Packet, family: int) -> ScapyPacket:
    if family == 4:
        return ICMP(type=8, id=7, seq=1) / Raw(packet.payload or b"ping")
    from scapy.layers.inet6 import ICMPv6EchoRequest

    return ICMPv6EchoRequest(id=7, seq=1, data=packet.payload or b"ping")


def icmp_error(
    kind: str, source: str, destination: str, about: Packet, family: int, *, full: bool = False, hops: int = 64
) -> bytes:
    """An ICMP error frame about the packet `about` as its sender's router saw it.

    `kind`: too-big (frag-needed in IPv4), unreachable (port), exceeded (hop limit). Quotes the IP header and 8 bytes
    behind it, or all with `full`.
    """
    quoted = about.inner(family)
    header = 20 + 4 * ((about.options + 3) // 4) if family == 4 else 40
    if not full:
        quoted = quoted[: header + 8]
    if family == 4:
        number, code, rest = {
            "too-big": (3, 4, struct.pack("!HH", 0, 1400)),
            "unreachable": (3, 3, bytes(4)),
            "exceeded": (11, 0, bytes(4)),
        }[kind]
        protocol = 1
        pseudo = b""
    else:
        number, code, rest = {
            "too-big": (2, 0, struct.pack("!I", 1400)),
            "unreachable": (1, 4, bytes(4)),
            "exceeded": (3, 0, bytes(4)),
        }[kind]
        protocol = 58
        size = 8 + len(quoted)
        pseudo = packed(source, 6) + packed(destination, 6) + struct.pack("!II", size, 58)
    message = struct.pack("!BBH", number, code, 0) + rest + quoted
    message = message[:2] + struct.pack("!H", checksum(pseudo + message)) + message[4:]
    if family == 4:
        ip = IP(src=address(source, 4), dst=address(destination, 4), ttl=hops, proto=protocol, id=1)
        kind_of_frame = 0x0800
    else:
        ip = IPv6(src=address(source, 6), dst=address(destination, 6), hlim=hops, nh=protocol)
        kind_of_frame = 0x86DD
    return bytes(raw(Ether(src=MAC_CLIENT, dst=MAC_NODE, type=kind_of_frame) / ip / Raw(message)))


def arp() -> bytes:
    """An ARP request."""
    return bytes(raw(Ether(src=MAC_CLIENT, dst="ff:ff:ff:ff:ff:ff") / ARP(psrc="203.0.113.5", pdst="203.0.113.1")))


def packed(role: str, family: int) -> bytes:
    """A role's address as 4 or 16 bytes."""
    return socket.inet_pton(socket.AF_INET if family == 4 else socket.AF_INET6, address(role, family))


# ---- Judging ----


def checksum(data: bytes) -> int:
    """RFC 1071: the one's complement of the one's complement sum of 16-bit words."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclasses.dataclass(frozen=True, slots=True)
class Parsed:
    """Where things lie in a frame and what they are, as far as they can be told. `ports` is None for what has none;
    `problems` names every checksum or length that is wrong, in words."""

    family: int
    source: bytes
    destination: bytes
    protocol: int
    ports: tuple[int, int] | None
    l3: int
    l4: int
    fragment: tuple[int, bool] | None
    hops: int
    problems: tuple[str, ...]


def parse(frame: bytes) -> Parsed | None:
    """What a whole frame says, or None if it is not IPv4 or IPv6, or ends inside a header."""
    if len(frame) < ETHERNET:
        return None
    ethertype = struct.unpack_from("!H", frame, 12)[0]
    if ethertype == 0x0800:
        return _parse4(frame, ETHERNET)
    if ethertype == 0x86DD:
        return _parse6(frame, ETHERNET)
    return None


def _parse4(data: bytes, l3: int) -> Parsed | None:
    if len(data) < l3 + 20 or data[l3] >> 4 != 4:
        return None
    length = (data[l3] & 15) * 4
    total = struct.unpack_from("!H", data, l3 + 2)[0]
    if length < 20 or len(data) < l3 + length:
        return None
    problems = []
    if checksum(data[l3 : l3 + length]):
        problems.append("IPv4 header checksum")
    if total < length or l3 + total > len(data):
        problems.append("IPv4 total length")
    frag = struct.unpack_from("!H", data, l3 + 6)[0]
    fragment = ((frag & 0x1FFF) * 8, bool(frag & 0x2000)) if frag & 0x3FFF else None
    protocol = data[l3 + 9]
    source, destination = data[l3 + 12 : l3 + 16], data[l3 + 16 : l3 + 20]
    l4 = l3 + length
    payload = data[l4 : l3 + total]
    pseudo = source + destination + struct.pack("!BBH", 0, protocol, len(payload))
    ports, more = _parse_transport(payload, protocol, pseudo, 4, fragment)
    return Parsed(4, source, destination, protocol, ports, l3, l4, fragment, data[l3 + 8], (*problems, *more))


def _parse6(data: bytes, l3: int) -> Parsed | None:
    if len(data) < l3 + 40 or data[l3] >> 4 != 6:
        return None
    length = struct.unpack_from("!H", data, l3 + 4)[0]
    problems = []
    if l3 + 40 + length > len(data):
        problems.append("IPv6 payload length")
    source, destination = data[l3 + 8 : l3 + 24], data[l3 + 24 : l3 + 40]
    following = data[l3 + 6]
    l4 = l3 + 40
    fragment = None
    while following in EXTENSIONS:
        if len(data) < l4 + 8:
            return None
        if following == 44:
            field = struct.unpack_from("!H", data, l4 + 2)[0]
            if field & 0xFFF9:
                fragment = (field & 0xFFF8, bool(field & 1))
            following, l4 = data[l4], l4 + 8
            if fragment and fragment[0]:
                break
        else:
            following, l4 = data[l4], l4 + (data[l4 + 1] + 1) * 8
    payload = data[l4 : l3 + 40 + length]
    pseudo = source + destination + struct.pack("!II", len(payload), following)
    ports, more = _parse_transport(payload, following, pseudo, 6, fragment)
    return Parsed(6, source, destination, following, ports, l3, l4, fragment, data[l3 + 7], (*problems, *more))


def _parse_transport(
    payload: bytes, protocol: int, pseudo: bytes, family: int, fragment: tuple[int, bool] | None
) -> tuple[tuple[int, int] | None, list[str]]:
    """Ports, and what is wrong with the checksum; that of a fragment covers more than is here."""
    if fragment and fragment[0]:
        return None, []
    problems: list[str] = []
    ports = None
    whole = fragment is None
    if protocol in (6, 17, 132):
        if len(payload) < (20 if protocol == 6 else 8):
            return None, ["transport header cut off"]
        ports = struct.unpack_from("!HH", payload)
    if protocol == 6 and whole and checksum(pseudo + payload):
        problems.append("TCP checksum")
    if protocol == 17:
        length, value = struct.unpack_from("!HH", payload, 4)
        if value == 0 and family == 6:
            problems.append("UDP over IPv6 without checksum")
        if whole and length != len(payload):
            problems.append("UDP length")
        if whole and value and checksum(pseudo + payload):
            problems.append("UDP checksum")
    if protocol == 1 and family == 4 and whole:
        if checksum(payload):
            problems.append("ICMP checksum")
        if len(payload) >= 28 and payload[0] in (3, 11, 12):
            inner = payload[8:]
            header = (inner[0] & 15) * 4
            if checksum(inner[:header]):
                problems.append("IPv4 header checksum inside ICMP")
    if protocol == 58 and whole and checksum(pseudo + payload):
        problems.append("ICMPv6 checksum")
    return (ports[0], ports[1]) if ports else None, problems


def problems_of(frame: bytes) -> tuple[str, ...]:
    """Every wrong checksum and length of a frame, in words; a frame that is not IP has none."""
    parsed = parse(frame)
    return parsed.problems if parsed else ()


def describe(frame: bytes) -> str:
    """A frame for people: one line of headers and the bytes."""
    return f"{Ether(frame).summary()}  [{len(frame)} bytes]\n    {frame.hex(' ', 4)}"


def difference(got: bytes, want: bytes) -> str:
    """Where two frames differ, for people; "" where they do not."""
    if got == want:
        return ""
    first = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    return f"first difference at byte {first}\n  got  {describe(got)}\n  want {describe(want)}"


def assert_same(got: bytes, want: bytes, what: str = "packet") -> None:
    """Fails, in words, unless both frames are the same bytes."""
    assert got == want, f"{what}: {difference(got, want)}"


def assert_sound(frame: bytes, what: str = "packet") -> None:
    """Fails unless every length and checksum of the frame is right."""
    problems = problems_of(frame)
    assert not problems, f"{what}: wrong {', '.join(problems)}\n  {describe(frame)}"
