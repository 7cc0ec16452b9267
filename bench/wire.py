"""Frames of TCP and UDP whose checksums are right, and where their fields lie.

Rules of this file: pure. Addresses are 16 bytes, as rows have them, IPv4 as ::ffff:a.b.c.d.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from bench.replay import Vary

TCP, UDP = 6, 17
SYN, ACK = 0x02, 0x10
ETHERNET = 14


class Tuple(NamedTuple):
    """From whom to whom."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int


def family(between: Tuple) -> int:
    """4 or 6."""
    return 4 if between.source[:12] == b"\0" * 10 + b"\xff\xff" else 6


def summed(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    words: tuple[int, ...] = struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(macs: bytes, between: Tuple, protocol: int, flags: int = ACK, hops: int = 64) -> bytes:
    """A frame without payload; `macs` are destination and source."""
    four = family(between) == 4
    cut = slice(12, 16) if four else slice(0, 16)
    addresses = between.source[cut] + between.destination[cut]
    ports = struct.pack("!HH", between.source_port, between.destination_port)
    if protocol == TCP:
        head = ports + struct.pack("!IIBBHHH", 1, 0, 5 << 4, flags, 65535, 0, 0)
        at = 16
    else:
        head = ports + struct.pack("!HH", 8 + 12, 0) + bytes(12)
        at = 6
    pseudo = addresses + (struct.pack("!HH", protocol, len(head)) if four else struct.pack("!II", len(head), protocol))
    checksum = summed(pseudo + head) or (0xFFFF if protocol == UDP else 0)
    transport = head[:at] + struct.pack("!H", checksum) + head[at + 2 :]
    if four:
        start = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(transport), 1, 0, hops, protocol, 0)
        start = start[:10] + struct.pack("!H", summed(start + addresses))
        return macs + b"\x08\x00" + start + addresses + transport
    return macs + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(transport), protocol, hops) + addresses + transport


class Offsets(NamedTuple):
    """Where the fields of such a frame begin. Each varying one is the last word of an address, or both ports."""

    source: int
    destination: int
    ports: int
    width: int
    fields: tuple[tuple[int, int], ...]

    def vary_source(self, first: bytes, fresh: bool = False) -> Vary:
        """Sources count from this address."""
        return Vary(self.source, int.from_bytes(first[12:], "big"), fresh, self.width)

    def vary_destination(self, first: bytes, fresh: bool = False) -> Vary:
        """Destinations count from this address."""
        return Vary(self.destination, int.from_bytes(first[12:], "big"), fresh, self.width)

    def vary_ports(self, source_port: int, first: int) -> Vary:
        """Destination ports count from `first`."""
        return Vary(self.ports, source_port << 16 | first)


def offsets(version: int, protocol: int) -> Offsets:
    """Of IPv4 or IPv6 and TCP or UDP. `fields` are all that a translation and a hop change."""
    macs = ((0, 4), (4, 4), (8, 4))
    l4 = ETHERNET + (20 if version == 4 else 40)
    checksum = l4 + (16 if protocol == TCP else 6)
    rest = ((l4, 4), (checksum, 2))
    if version == 4:
        return Offsets(26, 30, l4, 4, (*macs, (22, 1), (24, 2), (26, 4), (30, 4), *rest))
    halves = ((22, 8), (30, 8), (38, 8), (46, 8))
    return Offsets(34, 50, l4, 8, (*macs, (21, 1), *halves, *rest))
