"""Interprets the rows of maps for one new packet, as bpf/sock.c and bpf/tc.c do.

    the node's own TCP and UDP    the socket path: nothing is masqueraded, since the socket has no other address yet
    all else                      the packet path, where a packet enters

Rules of this file: from the bytes alone, with nothing of the code that wrote them but their layout. It knows what the
programs know: longest prefixes, a range of slots, flags of an address and of the device. A row that another one names
and that is not there is an error.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address
from socket import htons, ntohs

from ebpflb.dataplane.bpf.constants import BACKEND_FREE, SOURCE_NODE, SOURCE_POD
from ebpflb.dataplane.bpf.layouts import BACKEND, FRONTEND_KEY, LAYOUT, RANGE_KEY, ROUTE, SETTINGS, SOURCE_KEY, U32, U64
from ebpflb.decide import Outcome, Packet
from ebpflb.model import Address, Protocol
from ebpflb.routes import Masquerade, Scope, Verdict
from tests.tracers import Path, Traced, is_local, refusal, summary

Rows = Mapping[bytes, bytes]

_SOCKETS = (Protocol.TCP, Protocol.UDP)  # the kernel has no hook for those of SCTP


class Tracer:
    """`tables` are the maps' rows by map; `local` are the node's addresses."""

    def __init__(self, tables: Mapping[str, Rows], local: frozenset[Address]) -> None:
        self._tables = tables
        self._local = local
        *_, layout, _, _, _, _, interface, prefix, _, _, _ = SETTINGS.unpack(tables["settings"][U32.pack(0)])
        assert layout == LAYOUT, f"settings of layout {layout}"
        self._interface = interface.rstrip(b"\0").decode()
        self._is_prefix = bool(prefix)
        self._sources = _prefixes(tables["sources"], SOURCE_KEY.size)
        self._ranges = _prefixes(tables["ranges"], RANGE_KEY.size)

    def trace(self, packet: Packet) -> Traced:
        """What becomes of the packet."""
        return summary(self.paths(packet))

    def paths(self, packet: Packet) -> list[Path]:
        """Everything that may become of the packet."""
        to = _bytes(packet.destination)
        own = not packet.interface and is_local(packet.source, self._local)
        if not is_known(self._tables["known"], to) or own and packet.protocol not in _SOCKETS:
            return [Path(1.0, Outcome.NOT_SERVICE)]
        frontend = self._tables["frontends"].get(FRONTEND_KEY.pack(to, htons(packet.port), packet.protocol))
        if frontend is None and to in self._tables["owned"]:
            return [Path(1.0, Outcome.REJECT, refusal(packet))]
        if frontend is None:
            return [Path(1.0, Outcome.NOT_SERVICE)]
        flags = SOURCE_NODE if own else self._flags(packet)
        scope = Scope.INTERNAL if flags else Scope.EXTERNAL
        fields = ROUTE.unpack_from(frontend, scope * ROUTE.size)
        verdict, masquerade, _, _, service, slots, count, _, _, ranges, *_ = fields
        assert U32.pack(service) in self._tables["names"], f"service {service} has no name"
        # The node comes to such an address from that address, so to say: its sockets have none yet.
        if ranges and not self._in_ranges(ranges, packet.destination if own else packet.source):
            return [Path(1.0, Outcome.DROP)]
        if verdict == Verdict.DROP:
            return [Path(1.0, Outcome.DROP)]
        if verdict == Verdict.REJECT:
            return [Path(1.0, Outcome.REJECT, refusal(packet))]
        assert verdict == Verdict.FORWARD and count, f"a verdict {verdict} with {count} backends"
        found = []
        for slot in range(slots, slots + count):
            backend = self._tables["backends"][self._tables["slots"][U32.pack(slot)]]
            address, port, _, state, owner = BACKEND.unpack(backend)
            assert (owner, state != BACKEND_FREE) == (service, True), f"slot {slot} of service {service}: {backend!r}"
            place = (_text(address), ntohs(port))
            if packet.protocol is Protocol.SCTP and place[1] != packet.port:
                found.append(Path(1 / count, Outcome.DROP))  # its checksum covers the ports
                continue
            masked = place[0] == packet.source or masquerade == Masquerade.ALWAYS
            masked = masked or masquerade == Masquerade.NOT_POD and not flags & SOURCE_POD
            if own or is_local(place[0], self._local):
                masked = False  # by the socket; and what stays here leaves by no device
            found.append(Path(1 / count, Outcome.FORWARD, "", place, masked))
        return found

    def _flags(self, packet: Packet) -> int:
        """What the packet path knows of a client: by its address, and by the device that it enters by."""
        flags = _longest(self._sources, _number(packet.source), 128) or 0
        name = self._interface
        if name or self._is_prefix:
            fits = packet.interface.startswith(name) if self._is_prefix else packet.interface == name
            flags |= SOURCE_POD if packet.interface and fits else 0
        return flags & (SOURCE_POD | SOURCE_NODE)

    def _in_ranges(self, ranges: int, address: Address) -> bool:
        return _longest(self._ranges, ranges << 128 | _number(address), 160) is not None


def bit_of(address: bytes) -> int:
    """The number of an address' bit in `known`, 64 to a cell: as `is_known` of bpf/lookup.h has it."""
    first, second = struct.unpack("=2Q", address[:16])
    sum = (first * 0xD6E8FEB86659FD93 + second * 0x9E3779B97F4A7C15) % 2**64
    return int((sum ^ sum >> 32) * 0x94D049BB133111EB % 2**64 >> 44)


def is_known(known: Rows, address: bytes) -> bool:
    """Whether a program looks for rows of an address."""
    cell, bit = divmod(bit_of(address), 64)
    return bool(U64.unpack(known.get(U32.pack(cell), bytes(8)))[0] >> bit & 1)


def _bytes(address: Address) -> bytes:
    found = ip_address(address)
    return (found if isinstance(found, IPv6Address) else IPv6Address(f"::ffff:{found}")).packed


def _text(address: bytes) -> Address:
    found = IPv6Address(address)
    return str(found.ipv4_mapped or found)


def _number(address: Address) -> int:
    return int.from_bytes(_bytes(address))


Prefixes = dict[int, dict[int, int]]
"""The rows of a trie by prefix length, the longest first: the bits before it -> the first word of the value."""


def _prefixes(rows: Rows, width: int) -> Prefixes:
    """A trie's keys begin with their length in bits; what follows is compared from its first bit on."""
    found: Prefixes = {}
    whole = (width - 4) * 8
    for key, value in rows.items():
        assert len(key) == width
        (bits,) = U32.unpack(key[:4])
        found.setdefault(bits, {})[int.from_bytes(_in_order(key[4:])) >> (whole - bits)] = U32.unpack(value)[0]
    return dict(sorted(found.items(), reverse=True))


def _in_order(key: bytes) -> bytes:
    """A key whose number of a set of ranges, if it has one, is as its value says and not as this machine stores it."""
    return key if len(key) == 16 else U32.unpack(key[:4])[0].to_bytes(4) + key[4:]


def _longest(rows: Prefixes, key: int, whole: int) -> int | None:
    for bits, prefixes in rows.items():
        if (found := prefixes.get(key >> (whole - bits))) is not None:
            return found
    return None
