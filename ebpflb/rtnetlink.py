"""rtnetlink, as far as we need it: the kernel's account of a network namespace's devices, addresses and routes; and the
socket, on which other protocols of netlink are spoken too.

Rules of this file: it encodes, sends, reads and decodes, and decides nothing. A refusal is an OSError with the kernel's
own sentence where it gives one. Messages are read with `struct`: for the same questions pyroute2 0.9 takes 21 MB and
0.1 s of a daemon that may have 120 MB, this file 1.7 MB and 4 ms.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26

GROUP_LINK, GROUP_TC, GROUP_IPV4_ADDRESS, GROUP_IPV4_ROUTE, GROUP_IPV6_ADDRESS, GROUP_IPV6_ROUTE = 1, 4, 5, 7, 9, 11

LINK_EVENTS = (RTM_NEWLINK, RTM_DELLINK)
ADDRESS_EVENTS = (RTM_NEWADDR, RTM_DELADDR)
ROUTE_EVENTS = (RTM_NEWROUTE, RTM_DELROUTE)

IFF_UP = 1
IFF_LOOPBACK = 8
ARPHRD_ETHER = 1

IFA_F_SECONDARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
SCOPE_GLOBAL, SCOPE_LINK = 0, 253

XDP_DRIVER, XDP_GENERIC, XDP_HARDWARE = 5, 6, 7
"""Where an XDP program runs, by the attribute that tells of it."""
XDP_FLAGS_UPDATE_IF_NOEXIST, XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE, XDP_FLAGS_REPLACE = 1, 2, 4, 16

_REQUEST, _ACK, _DUMP = 0x001, 0x004, 0x300
_ERROR, _DONE = 2, 3
_INTERRUPTED = 0x10
_CAPPED, _ACK_TLVS = 0x100, 0x200
_SOL_NETLINK, _EXT_ACK, _ADD_MEMBERSHIP = 270, 11, 1
_TABLE_MAIN, _UNICAST = 254, 1
_SKIP_STATISTICS = 1 << 3
_NESTED = 0x8000
_TAG_8021Q = b"\x81\x00"
_RECEIVE = 1 << 18
_DUMP_TRIES = 5
_BATCH = 48 << 10  # bytes: refusals, which repeat the request, fit into what the socket can hold

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# Nothing is sent there. Nobody may use them and so nobody routes them: only a default route leads there.
_FAR_AWAY = {4: "240.0.0.1", 6: "2000::1"}
_MAPPED = bytes(10) + b"\xff\xff"


class Link(NamedTuple):
    """A network device. `kind` is its driver's word ("" for hardware), `slave_kind` its master's ("bridge", "bond", …,
    "" without one); `master` is the master's index or 0; `type` is ARPHRD_…; `flags` are IFF_…; `mtu` in bytes; `mac`
    is its own link-layer address. `parent` is the index of the device that it lies on, or of a veth's peer; 0 for none
    and for one in another network namespace, where `leads_away` is set. `vlan` is a VLAN's id where its tag is
    802.1Q's, else 0. `xdp` are the ids of the XDP programs that run on it, by XDP_DRIVER, XDP_GENERIC, XDP_HARDWARE."""

    ifindex: int
    name: str
    kind: str
    slave_kind: str
    master: int
    type: int
    flags: int
    mtu: int = 0
    mac: bytes = b""
    parent: int = 0
    vlan: int = 0
    xdp: tuple[tuple[int, int], ...] = ()
    leads_away: bool = False


class InterfaceAddress(NamedTuple):
    """An address of a device (on a point-to-point link its own, not the peer's), as 16 bytes (IPv4 as ::ffff:a.b.c.d);
    `flags` are IFA_F_…, `bits` the length of its prefix."""

    ifindex: int
    version: int
    address: bytes
    scope: int
    flags: int
    bits: int = 0


class Overrun(Exception):
    """The kernel had more events than the socket had room for: everything must be read anew."""


class Netlink:
    """One netlink socket of the network namespace that the thread is in. Use one for requests and another, with
    `groups`, for events. `protocol` is NETLINK_…; an answer that takes longer than `timeout` seconds (None: it always
    comes) is a TimeoutError."""

    def __init__(self, *groups: int, protocol: int = socket.NETLINK_ROUTE, timeout: float | None = None) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(timeout)
        self._sequence = 0
        self._interrupted = False
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError:
            self._socket.close()
            raise
        if groups:
            self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    @property
    def port(self) -> int:
        """By which the kernel names this socket as the cause of an event."""
        return int(self._socket.getsockname()[0])

    def events(self, ignore: int = 0) -> list[tuple[int, bytes]]:
        """(message type, body) of all that has happened, but for what the socket of port `ignore` did; raises Overrun
        if some of it was lost, and then nothing is left to read."""
        found: list[tuple[int, bytes]] = []
        lost = False
        while True:
            try:
                data = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            found += [(type, body) for type, (_, _, cause), body in _messages(data) if cause != ignore or not cause]
        if lost:
            raise Overrun
        return found

    def request(self, type: int, flags: int, body: bytes) -> list[bytes]:
        """Ask and await the acknowledgement; the bodies of what came before it. Raises OSError."""
        return list(self._exchange(type, flags | _ACK, body))

    def batch(self, type: int, flags: int, bodies: Iterable[bytes]) -> dict[int, OSError]:
        """Many requests that answer nothing but whether they were done, many to a system call; the refusals, by the
        index of the request. Each request is carried out, whatever became of those before it."""
        refused: dict[int, OSError] = {}
        sent = bytearray()
        first = self._sequence + 1
        done = last = 0
        for index, body in enumerate(bodies):
            self._sequence += 1
            last = len(sent)
            sent += struct.pack("=IHHII", 16 + len(body), type, flags | _REQUEST, self._sequence, 0) + body
            sent += bytes(-len(body) % 4)
            if len(sent) >= _BATCH:
                self._finish(sent, last, first, refused, done)
                done, first = index + 1, self._sequence + 1
                sent = bytearray()
        if sent:
            self._finish(sent, last, first, refused, done)
        return refused

    def _finish(self, sent: bytearray, last: int, first: int, refused: dict[int, OSError], done: int) -> None:
        """Send what was gathered. The kernel works through it within the call and says what it refused; the last
        request, at `last`, asks to be acknowledged in any case."""
        (flags,) = struct.unpack_from("=H", sent, last + 6)
        struct.pack_into("=H", sent, last + 6, flags | _ACK)
        self._socket.send(sent)
        while True:
            for kind, (message_flags, sequence, _), content in _messages(self._socket.recv(_RECEIVE)):
                if kind != _ERROR or sequence < first:
                    continue
                try:
                    _raise_refusal(content, message_flags)
                except OSError as error:
                    refused[done + sequence - first] = error
                if sequence == self._sequence:
                    return

    def dump(self, type: int, body: bytes) -> list[bytes]:
        """The bodies of all objects; read anew if they changed meanwhile."""
        for _ in range(_DUMP_TRIES):
            self._interrupted = False
            found = list(self._exchange(type, _DUMP, body))
            if not self._interrupted:
                return found
        return found

    def stream(self, type: int, body: bytes) -> Iterator[bytes]:
        """As `dump`, one body at a time, however many there are: what changes meanwhile may be missed. It must
        be read to its end before the next request."""
        yield from self._exchange(type, _DUMP, body)

    def _exchange(self, type: int, flags: int, body: bytes) -> Iterator[bytes]:
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(body), type, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        while True:
            for kind, (message_flags, sequence, _), content in _messages(self._socket.recv(_RECEIVE)):
                if sequence != self._sequence:
                    continue
                if message_flags & _INTERRUPTED:
                    self._interrupted = True
                if kind == _ERROR:
                    _raise_refusal(content, message_flags)
                    return
                if kind == _DONE:
                    return
                yield content


def _raise_refusal(content: bytes, flags: int) -> None:
    """Raises OSError unless the message is an acknowledgement."""
    (number,) = struct.unpack_from("=i", content)
    if number == 0:
        return
    sentence = os.strerror(-number)
    if flags & _ACK_TLVS:
        # Capped or not, the attributes follow the copy of the request.
        length = struct.unpack_from("=I", content, 4)[0] if not flags & _CAPPED else 16
        said = attributes(content[4 + _aligned(length) :]).get(1)
        if said:
            sentence = f"{sentence} ({text(said)})"
    raise OSError(-number, sentence)


def _messages(data: bytes) -> Iterator[tuple[int, tuple[int, int, int], bytes]]:
    """(type, (flags, sequence, port), body) of each message."""
    at = 0
    while at + 16 <= len(data):
        length, type, flags, sequence, port = struct.unpack_from("=IHHII", data, at)
        if length < 16:
            return
        yield type, (flags, sequence, port), data[at + 16 : at + length]
        at += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


# ---- Attributes


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes by type, without the flags in it."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        length, type = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[type & 0x3FFF] = data[at + 4 : at + length]
        at += _aligned(length)
    return found


def attribute(type: int, value: bytes) -> bytes:
    """One attribute."""
    return struct.pack("=HH", len(value) + 4, type) + value + bytes(-len(value) % 4)


def text(value: bytes | None) -> str:
    """An attribute that is a C string; "" if it is absent."""
    return (value or b"").partition(b"\0")[0].decode(errors="replace")


def number(value: bytes | None) -> int:
    """An attribute that is a u32; 0 if it is absent."""
    return int(struct.unpack_from("=I", value)[0]) if value else 0


# ---- What there is


def links(netlink: Netlink) -> dict[int, Link]:
    """All devices by index."""
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(29, struct.pack("=I", _SKIP_STATISTICS))
    found = {}
    for message in netlink.dump(RTM_GETLINK, body):
        _, type, index, flags, _ = struct.unpack_from("=BxHiII", message)
        found[index] = _link(index, type, flags, attributes(message[16:]))
    return found


def _link(index: int, type: int, flags: int, has: dict[int, bytes]) -> Link:
    info = attributes(has.get(18, b""))
    kind = text(info.get(1))
    data = attributes(info.get(2, b"")) if kind == "vlan" else {}
    tagged = kind == "vlan" and data.get(5, _TAG_8021Q) == _TAG_8021Q
    away = 37 in has  # IFLA_LINK_NETNSID
    xdp = attributes(has.get(43, b""))
    return Link(
        index,
        text(has.get(3)),
        kind,
        text(info.get(4)),
        number(has.get(10)),
        type,
        flags,
        mtu=number(has.get(4)),
        mac=has.get(1, b""),
        parent=0 if away else number(has.get(5)),
        vlan=struct.unpack_from("=H", data[1])[0] if tagged and 1 in data else 0,
        xdp=tuple((mode, number(xdp[mode])) for mode in (XDP_DRIVER, XDP_GENERIC, XDP_HARDWARE) if mode in xdp),
        leads_away=away,
    )


def set_xdp(netlink: Netlink, index: int, program: int, flags: int, expected: int = -1) -> None:
    """Run an XDP program on a device, by descriptor, or none (-1). `flags` are XDP_FLAGS_…; with XDP_FLAGS_REPLACE only
    in place of the program whose descriptor is `expected`. Raises OSError, with the driver's own sentence."""
    options = attribute(1, struct.pack("=i", program)) + attribute(3, struct.pack("=I", flags))
    if flags & XDP_FLAGS_REPLACE:
        options += attribute(8, struct.pack("=i", expected))
    netlink.request(RTM_SETLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0) + attribute(43 | _NESTED, options))


def device_index(netlink: Netlink, name: str) -> int | None:
    """The index of the device of that name; None if there is none."""
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(3, name.encode() + b"\0")
    try:
        (answer,) = netlink.request(RTM_GETLINK, 0, body)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    return int(struct.unpack_from("=BxHiII", answer)[2])


def addresses(netlink: Netlink) -> tuple[InterfaceAddress, ...]:
    """All addresses, in the kernel's order: a device's primary ones first."""
    found = []
    for message in netlink.dump(RTM_GETADDR, struct.pack("=BBBBI", 0, 0, 0, 0, 0)):
        family, bits, flags, scope, index = struct.unpack_from("=BBBBI", message)
        has = attributes(message[8:])
        raw = has.get(2) or has.get(1)  # IFA_LOCAL, else IFA_ADDRESS: on a point-to-point link that is the peer's
        if raw is None or family not in (socket.AF_INET, socket.AF_INET6):
            continue
        version, address = (4, _MAPPED + raw) if family == socket.AF_INET else (6, raw)
        found.append(InterfaceAddress(index, version, address, scope, number(has.get(8)) or flags, bits))
    return tuple(found)


def ifindex_of_address(message: bytes) -> int:
    """The device that an address message is about."""
    return int(struct.unpack_from("=BBBBI", message)[4])


def default_devices(netlink: Netlink) -> dict[int, int]:
    """By IP version (4, 6): the index of the device of the main table's best default route."""
    best: dict[int, tuple[int, int]] = {}
    for version, family in _FAMILIES.items():
        for message in netlink.dump(RTM_GETROUTE, _route(family)):
            if not is_default_route(message) or not _is_unicast_of_main(message):
                continue
            has = attributes(message[12:])
            hops = has.get(9, b"")
            device = number(has.get(4)) or (struct.unpack_from("=HBBi", hops)[3] if hops else 0)
            candidate = (number(has.get(6)), device)
            if device and candidate < best.get(version, (1 << 32, 0)):
                best[version] = candidate
    return {version: device for version, (_, device) in best.items()}


def preferred_source(netlink: Netlink, version: int) -> bytes | None:
    """The address, 16 bytes, by which this node would talk to one far away, by whatever rules and tables; None if there
    is no way there."""
    family = _FAMILIES[version]
    far = socket.inet_pton(family, _FAR_AWAY[version])
    try:
        (answer,) = netlink.request(RTM_GETROUTE, 0, _route(family, len(far) * 8) + attribute(1, far))
    except OSError:
        return None  # no route, a blackhole, no IPv6: the kernel has a number for each
    source = attributes(answer[12:]).get(7)
    return source and (_MAPPED + source if version == 4 else source)


def _route(family: int, bits: int = 0) -> bytes:
    return struct.pack("=BBBBBBBBI", family, bits, 0, 0, 0, 0, 0, 0, 0)


def is_default_route(message: bytes) -> bool:
    """Whether a route message is about a default route, of whatever table and kind."""
    family, bits = struct.unpack_from("=BB", message)
    return family in (socket.AF_INET, socket.AF_INET6) and bits == 0


def _is_unicast_of_main(message: bytes) -> bool:
    table, _, _, kind = struct.unpack_from("=BBBB", message, 4)
    return (table, kind) == (_TABLE_MAIN, _UNICAST)
