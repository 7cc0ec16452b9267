"""Netlink messages of IPVS and of ipset entries, as bytes: `table`'s rows to the kernel's attributes and back.

Rules of this file: pure. These are the messages of which there are a hundred thousand; pyroute2, which makes all
others, takes 60 µs for one of them, this file 2 µs. Layouts are those of linux/ip_vs.h and linux/netfilter/ipset.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ebpflb.dataplane.ipvs.names import Set, SetType
from ebpflb.dataplane.ipvs.reading import Destination
from ebpflb.dataplane.ipvs.table import EntryValue, Server, Settings

# linux/ip_vs.h
GENERIC_VERSION = 1
NEW_SERVICE, SET_SERVICE, DEL_SERVICE, GET_SERVICE = 1, 2, 3, 4
NEW_DEST, SET_DEST, DEL_DEST, GET_DEST = 5, 6, 7, 8
SET_CONFIG, GET_CONFIG = 12, 13
GET_INFO = 15

HASHED = 0x2
"""IP_VS_SVC_F_HASHED: the kernel's own flag."""

LEAVING_THRESHOLD = 1
"""The upper threshold by which a destination that is kept for its connections only is told from one that drains; at
weight 0 it has no other effect."""

_AF = {4: 2, 6: 10}
_VERSIONS = {2: 4, 10: 6}
_NESTED = 0x8000
_BIG_ENDIAN = 0x4000
_EVERY_BIT = 0xFFFFFFFF

_HEADER = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_BY_ADDRESS = struct.Struct("=HH HHHxx HHHxx HH16s HH2sxx")  # nest, AF, PROTOCOL, ADDR, PORT
_BY_MARK = struct.Struct("=HH HHHxx HHI")  # nest, AF, FWMARK
_SERVICE_REST = struct.Struct("=HHII HHI HHI")  # FLAGS, TIMEOUT, NETMASK
_DEST = struct.Struct("=HH HH16s HH2sxx HHI HHI HHI HHI")  # nest, ADDR, PORT, FWD_METHOD, WEIGHT, U_THRESH, L_THRESH
_DEST_KEY = struct.Struct("=HH HH16s HH2sxx")
_U32 = struct.Struct("=I")


def generic(command: int, payload: bytes = b"") -> bytes:
    """The body of a generic netlink message to IPVS."""
    return _HEADER.pack(command, GENERIC_VERSION, 0) + payload


def service(command: int, server: Server, settings: Settings | None = None) -> bytes:
    """A message about a virtual server: NEW_SERVICE or SET_SERVICE with its settings, DEL_SERVICE without."""
    return _HEADER.pack(command, GENERIC_VERSION, 0) + _service(server, settings)


def destination(command: int, server: Server, place: bytes, weight: int = 1, *, leaving: bool = False) -> bytes:
    """A message about a destination: NEW_DEST, SET_DEST, or DEL_DEST, for which the place alone counts."""
    address, port = place[:-2], place[-2:]
    head = _HEADER.pack(command, GENERIC_VERSION, 0) + _service(server, None)
    if command == DEL_DEST:
        return head + _DEST_KEY.pack(_DEST_KEY.size, 2 | _NESTED, 20, 1, address, 6, 2, port)
    threshold = LEAVING_THRESHOLD if leaving else 0
    return head + _DEST.pack(
        *(_DEST.size, 2 | _NESTED, 20, 1, address, 6, 2, port),
        *(8, 3, 0, 8, 4, 0 if leaving else weight, 8, 5, threshold, 8, 6, 0),
    )


def destinations_of(server: Server) -> bytes:
    """The question for a virtual server's destinations, a dump."""
    return _HEADER.pack(GET_DEST, GENERIC_VERSION, 0) + _service(server, None)


def _service(server: Server, settings: Settings | None) -> bytes:
    rest = b""
    if settings is not None:
        name = settings.scheduler.encode() + b"\0"
        mask = 128 if server.version == 6 else _EVERY_BIT
        rest = _ATTRIBUTE.pack(4 + len(name), 6) + name + bytes(-len(name) % 4)
        rest += _SERVICE_REST.pack(12, 7, settings.flags, _EVERY_BIT, 8, 8, settings.timeout, 8, 9, mask)
    family = _AF[server.version]
    if server.mark:
        return _BY_MARK.pack(_BY_MARK.size + len(rest), 1 | _NESTED, 6, 1, family, 8, 5, server.mark) + rest
    port = struct.pack("!H", server.port)
    return (
        _BY_ADDRESS.pack(
            *(_BY_ADDRESS.size + len(rest), 1 | _NESTED, 6, 1, family, 6, 2, server.protocol),
            *(20, 3, server.address, 6, 4, port),
        )
        + rest
    )


class Operation(NamedTuple):
    """A write to IPVS: `command` is one of the above; `settings` are a virtual server's, the others a destination's."""

    command: int
    server: Server
    settings: Settings | None = None
    place: bytes = b""
    weight: int = 1
    leaving: bool = False

    def body(self) -> bytes:
        if self.place:
            return destination(self.command, self.server, self.place, self.weight, leaving=self.leaving)
        return service(self.command, self.server, self.settings)


def timeouts(tcp: int, tcp_fin: int, udp: int) -> bytes:
    """SET_CONFIG with seconds; 0 is left out, which leaves the kernel's."""
    payload = b"".join(
        struct.pack("=HHI", 8, attribute, seconds)
        for attribute, seconds in ((4, tcp), (5, tcp_fin), (6, udp))
        if seconds
    )
    return generic(SET_CONFIG, payload)


# ---- What IPVS says


def _attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type, first byte, end) of each attribute."""
    while at + 4 <= end:
        length, type = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield type & 0x3FFF, at + 4, at + length
        at += (length + 3) & ~3


def read_service(body: bytes) -> tuple[Server, Settings]:
    """A virtual server of the answer to GET_SERVICE."""
    values: dict[int, bytes] = {}
    for kind, start, end in _attributes(body, 4, len(body)):
        if kind == 1:
            for type, first, last in _attributes(body, start, end):
                if type == 10:  # statistics, which are long, and last
                    break
                values[type] = body[first:last]
    version = _VERSIONS[struct.unpack("=H", values[1])[0]]
    flags, timeout = struct.unpack_from("=I", values[7])[0], _U32.unpack(values[8])[0]
    settings = Settings(values[6].rstrip(b"\0").decode(), flags & ~HASHED, timeout if flags & 1 else 0)
    if 5 in values:
        return Server(version, _U32.unpack(values[5])[0]), settings
    width = 16 if version == 6 else 4
    (protocol,) = struct.unpack("=H", values[2])
    (port,) = struct.unpack("!H", values[4])
    return Server(version, 0, protocol, values[3][:width], port), settings


def read_destination(body: bytes, version: int) -> tuple[bytes, Destination]:
    """A destination of the answer to GET_DEST, of a virtual server of that IP version."""
    address = port = b""
    numbers = [0] * 10
    for kind, start, end in _attributes(body, 4, len(body)):
        if kind != 2:
            continue
        for type, first, last in _attributes(body, start, end):
            if type == 1:
                address = body[first:last]
            elif type == 2:
                port = body[first:last]
            elif type < 10:
                (numbers[type],) = _U32.unpack_from(body, first)
            elif type in (10, 12):
                break
    _, _, _, _, weight, upper, _, active, inactive, persistent = numbers
    leaving = weight == 0 and upper == LEAVING_THRESHOLD
    return address[: 16 if version == 6 else 4] + port, Destination(weight, leaving, active, inactive, persistent)


# ---- ipset entries

PROTOCOL = 6
"""Of ipset, which kernels since 2.6.39 speak."""

ADD, DELETE, LIST = 9, 10, 7
SUBSYSTEM = 6

_P_IP, _P_CIDR, _P_PORT, _P_PROTO = 1, 3, 4, 7
_P_IP2, _P_CIDR2, _P_COMMENT, _P_MARK = 20, 21, 26, 27


def set_message(name: str, payload: bytes = b"") -> bytes:
    """The body of a message about one ipset ("" for all)."""
    text = name.encode() + b"\0"
    named = _ATTRIBUTE.pack(4 + len(text), 2) + text + bytes(-len(text) % 4) if name else b""
    return bytes((2, 0, 0, 0)) + struct.pack("=HHBxxx", 5, 1, PROTOCOL) + named + payload


def entries_message(name: str, entries: bytes) -> bytes:
    """The body of ADD or DELETE of many entries, each as `entry` makes them."""
    line = struct.pack("=HHI", 8, 9, 1)
    return set_message(name, _ATTRIBUTE.pack(4 + len(entries), 8 | _NESTED) + entries + line)


def entry(type: SetType, version: int, key: bytes, value: EntryValue = None) -> bytes:
    """One entry of an ipset, with its comment or mark."""
    width = 16 if version == 6 else 4
    if type is SetType.PORT:
        data = struct.pack("=HH2sxx", 6, _P_PORT | _BIG_ENDIAN, key)
    else:
        data = _address(_P_IP, version, key[:width])
        if type is not SetType.IP:
            port, protocol = key[width : width + 2], key[width + 2]
            data += struct.pack("=HH2sxx HHBxxx", 6, _P_PORT | _BIG_ENDIAN, port, 5, _P_PROTO, protocol)
        if type is SetType.IP_PORT_IP:
            data += _address(_P_IP2, version, key[width + 3 :])
        elif type is SetType.IP_PORT_NET:
            data += _address(_P_IP2, version, key[width + 3 : -1]) + struct.pack("=HHBxxx", 5, _P_CIDR2, key[-1])
    if isinstance(value, str):
        text = value.encode() + b"\0"
        data += _ATTRIBUTE.pack(4 + len(text), _P_COMMENT) + text + bytes(-len(text) % 4)
    elif value is not None:
        data += struct.pack("=HH", 12, _P_MARK | _BIG_ENDIAN) + struct.pack("!II", value, _EVERY_BIT)
    return _ATTRIBUTE.pack(4 + len(data), 7 | _NESTED) + data


def _address(type: int, version: int, address: bytes) -> bytes:
    inner = _ATTRIBUTE.pack(4 + len(address), (1 if version == 4 else 2) | _BIG_ENDIAN) + address
    return _ATTRIBUTE.pack(4 + len(inner), type | _NESTED) + inner


class SetHeader(NamedTuple):
    """What an ipset is, as LIST says it. `version` is 0 where the type has no family."""

    name: str
    type: str
    version: int
    with_comment: bool
    with_mark: bool
    entries: int
    maximum: int


_WITH_COMMENT, _WITH_MARK = 1 << 4, 1 << 6


def read_set(body: bytes) -> SetHeader | None:
    """The header in a message of LIST; None if it has none, being the continuation of another."""
    name = type = ""
    family = 0
    found: dict[int, bytes] | None = None
    for kind, start, end in _attributes(body, 4, len(body)):
        if kind == 2:
            name = body[start : end - 1].decode()
        elif kind == 3:
            type = body[start : end - 1].decode()
        elif kind == 5:
            family = body[start]
        elif kind == 7:
            found = {each: body[first:last] for each, first, last in _attributes(body, start, end)}
    if found is None:
        return None
    flags = _big(found.get(8))
    maximum = _big(found.get(19)) or (1 << 16 if type == SetType.PORT else 0)
    return SetHeader(
        name,
        type,
        _VERSIONS.get(family, 0),
        bool(flags & _WITH_COMMENT),
        bool(flags & _WITH_MARK),
        _big(found.get(24)),
        maximum,
    )


def _big(value: bytes | None) -> int:
    return int.from_bytes(value, "big") if value else 0


def read_entries(body: bytes, each: Set) -> Iterator[tuple[bytes, EntryValue]]:
    """The entries in a message of LIST."""
    for kind, start, end in _attributes(body, 4, len(body)):
        if kind == 8:
            for type, first, last in _attributes(body, start, end):
                if type == 7:
                    yield _read_entry(body, first, last, each)


def _read_entry(body: bytes, start: int, end: int, each: Set) -> tuple[bytes, EntryValue]:
    address = port = protocol = second = bits = b""
    value: EntryValue = None
    for type, first, last in _attributes(body, start, end):
        if type == _P_IP:
            address = body[first + 4 : last]
        elif type == _P_PORT:
            port = body[first:last]
        elif type == _P_PROTO:
            protocol = body[first:last]
        elif type == _P_IP2:
            second = body[first + 4 : last]
        elif type == _P_CIDR2:
            bits = body[first:last]
        elif type == _P_COMMENT:
            value = body[first : last - 1].decode(errors="replace")
        elif type == _P_MARK and each.with_mark:
            value = int.from_bytes(body[first : first + 4], "big")
    if each.type is SetType.IP_PORT_NET and not bits:
        bits = bytes([len(second) * 8])
    return address + port + protocol + second + bits, value
