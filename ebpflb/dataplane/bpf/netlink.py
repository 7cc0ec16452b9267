"""rtnetlink in the few messages that the BPF dataplane needs: links, addresses, default routes, qdiscs, bpf filters.

Rules of this file: it encodes, sends, reads and decodes, and decides nothing. A refusal is an OSError with the
kernel's own sentence where it gives one. (A general library would cost this daemon 20 MB and 0.1 s for these.)
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ebpflb.routes import packed

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

GROUP_LINK, GROUP_TC, GROUP_IPV4_ADDRESS, GROUP_IPV4_ROUTE, GROUP_IPV6_ADDRESS, GROUP_IPV6_ROUTE = 1, 4, 5, 7, 9, 11

IFF_UP = 1
IFF_LOOPBACK = 8
ARPHRD_ETHER = 1

IFA_F_SECONDARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
SCOPE_GLOBAL = 0

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
"""Parents of the filters on clsact's two sides."""
_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000

_REQUEST, _ACK, _DUMP = 0x001, 0x004, 0x300
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_ERROR, _DONE, _OVERRUN = 2, 3, 4
_INTERRUPTED = 0x10
_SOL_NETLINK, _EXT_ACK, _ADD_MEMBERSHIP = 270, 11, 1
_ALL_PROTOCOLS = socket.htons(0x0003)
_TABLE_MAIN = 254
_SKIP_STATISTICS = 1 << 3
_ACT_DIRECT = 1
_RECEIVE = 1 << 18
_DUMP_TRIES = 5


class Link(NamedTuple):
    """A network device. `kind` is its driver's word ("" for hardware), `slave_kind` its master's ("bridge", "bond", …,
    "" without one); `master` is the master's index or 0; `type` is ARPHRD_…; `flags` are IFF_…"""

    ifindex: int
    name: str
    kind: str
    slave_kind: str
    master: int
    type: int
    flags: int


class InterfaceAddress(NamedTuple):
    """An address of a device, as 16 bytes (IPv4 as ::ffff:a.b.c.d); `flags` are IFA_F_…"""

    ifindex: int
    version: int
    address: bytes
    scope: int
    flags: int


class Filter(NamedTuple):
    """A filter under clsact. `program` is the BPF program's id and `name` its name in the filter (0 and "" for filters
    of another kind)."""

    parent: int
    preference: int
    protocol: int
    handle: int
    kind: str
    program: int
    name: str


class Overrun(Exception):
    """The kernel had more events than the socket had room for: everything must be read anew."""


class Netlink:
    """One rtnetlink socket of the network namespace that the thread is in. Use one for requests and another, with
    `groups`, for events."""

    def __init__(self, *groups: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
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
        if some of it was lost."""
        found: list[tuple[int, bytes]] = []
        while True:
            try:
                data = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise Overrun from None
                raise
            found += [(type, body) for type, (_, _, cause), body in _messages(data) if cause != ignore or not cause]

    def request(self, type: int, flags: int, body: bytes) -> None:
        """Ask and await the acknowledgement; raises OSError."""
        for _ in self._exchange(type, flags | _ACK, body):
            pass

    def dump(self, type: int, body: bytes) -> list[bytes]:
        """The bodies of all objects; read anew if they changed meanwhile."""
        for _ in range(_DUMP_TRIES):
            self._interrupted = False
            found = list(self._exchange(type, _DUMP, body))
            if not self._interrupted:
                return found
        return found

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
    if flags & 0x200:  # NLM_F_ACK_TLVS
        # Capped or not, the attributes follow the copy of the request.
        length = struct.unpack_from("=I", content, 4)[0] if not flags & 0x100 else 16
        said = attributes(content[4 + _aligned(length) :]).get(1)
        if said:
            sentence = f"{sentence} ({said.rstrip(bytes(1)).decode(errors='replace')})"
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


def _text(value: bytes | None) -> str:
    return (value or b"").partition(b"\0")[0].decode(errors="replace")


def _number(value: bytes | None) -> int:
    return int(struct.unpack_from("=I", value)[0]) if value else 0


# ---- what there is


def links(netlink: Netlink) -> dict[int, Link]:
    """All devices by index."""
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(29, struct.pack("=I", _SKIP_STATISTICS))
    found = {}
    for message in netlink.dump(RTM_GETLINK, body):
        _, type, index, flags, _ = struct.unpack_from("=BxHiII", message)
        has = attributes(message[16:])
        info = attributes(has.get(18, b""))
        kind, slave_kind = _text(info.get(1)), _text(info.get(4))
        found[index] = Link(index, _text(has.get(3)), kind, slave_kind, _number(has.get(10)), type, flags)
    return found


def addresses(netlink: Netlink) -> tuple[InterfaceAddress, ...]:
    """All addresses, in the kernel's order: a device's primary ones first."""
    found = []
    for message in netlink.dump(RTM_GETADDR, struct.pack("=BBBBI", 0, 0, 0, 0, 0)):
        family, _, flags, scope, index = struct.unpack_from("=BBBBI", message)
        has = attributes(message[8:])
        raw = has.get(2) or has.get(1)
        if raw is None or family not in (socket.AF_INET, socket.AF_INET6):
            continue
        version, address = (4, packed("0.0.0.0")[:12] + raw) if family == socket.AF_INET else (6, raw)
        found.append(InterfaceAddress(index, version, address, scope, _number(has.get(8)) or flags))
    return tuple(found)


def default_devices(netlink: Netlink) -> dict[int, int]:
    """By IP version (4, 6): the index of the device of the main table's best default route."""
    best: dict[int, tuple[int, int]] = {}
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        for message in netlink.dump(RTM_GETROUTE, struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)):
            if not is_default_route(message):
                continue
            has = attributes(message[12:])
            hops = has.get(9, b"")
            device = _number(has.get(4)) or (struct.unpack_from("=HBBi", hops)[3] if hops else 0)
            candidate = (_number(has.get(6)), device)
            if device and candidate < best.get(version, (1 << 32, 0)):
                best[version] = candidate
    return {version: device for version, (_, device) in best.items()}


def is_default_route(message: bytes) -> bool:
    """Whether a route message is about a default route of the main table."""
    family, length, _, _, table, _, _, type = struct.unpack_from("=BBBBBBBB", message)
    unicast = type == 1
    return family in (socket.AF_INET, socket.AF_INET6) and length == 0 and table == _TABLE_MAIN and unicast


def index_of(message: bytes) -> int:
    """The device of a tc message."""
    return int(struct.unpack_from("=i", message, 4)[0])


# ---- clsact and its filters


def _tc(index: int, handle: int, parent: int, info: int = 0) -> bytes:
    return struct.pack("=BxxxiIII", 0, index, handle, parent, info)


def side_qdisc(netlink: Netlink, index: int) -> str:
    """The kind of the qdisc at ffff: of a device: "clsact", "ingress", or "" for none."""
    for message in netlink.dump(RTM_GETQDISC, _tc(0, 0, 0)):
        _, device, handle, _, _ = struct.unpack_from("=BxxxiIII", message)
        if device == index and handle == _CLSACT_HANDLE:
            return _text(attributes(message[20:]).get(1))
    return ""


def add_clsact(netlink: Netlink, index: int) -> bool:
    """Make the clsact qdisc; False if something is at ffff: already."""
    body = _tc(index, _CLSACT_HANDLE, _CLSACT_PARENT) + attribute(1, b"clsact\0")
    try:
        netlink.request(RTM_NEWQDISC, _CREATE | _EXCLUSIVE, body)
    except FileExistsError:
        return False
    return True


def remove_clsact(netlink: Netlink, index: int) -> None:
    """Remove the clsact qdisc and all that is under it."""
    netlink.request(RTM_DELQDISC, 0, _tc(index, _CLSACT_HANDLE, _CLSACT_PARENT) + attribute(1, b"clsact\0"))


def filters(netlink: Netlink, index: int) -> tuple[Filter, ...]:
    """All filters on both sides of a device's clsact; () without one."""
    found = []
    for parent in (INGRESS, EGRESS):
        try:
            messages = netlink.dump(RTM_GETTFILTER, _tc(index, 0, parent))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
                continue
            raise
        for message in messages:
            _, device, handle, _, info = struct.unpack_from("=BxxxiIII", message)
            if device != index or handle == 0:
                continue  # the head of a preference, which says nothing that its filters do not
            has = attributes(message[20:])
            kind = _text(has.get(1))
            options = attributes(has.get(2, b"")) if kind == "bpf" else {}
            found.append(
                Filter(parent, info >> 16, info & 0xFFFF, handle, kind, _number(options.get(11)), _text(options.get(7)))
            )
    return tuple(found)


def put_filter(
    netlink: Netlink,
    index: int,
    parent: int,
    preference: int,
    handle: int,
    program: int,
    name: str,
    *,
    replace: bool,
    protocol: int = _ALL_PROTOCOLS,
) -> None:
    """Make a direct-action bpf filter, or replace the one of that handle in one step. `program` is a descriptor,
    `protocol` an EtherType in network order."""
    options = attribute(6, struct.pack("=I", program)) + attribute(7, name.encode() + b"\0")
    options += attribute(8, struct.pack("=I", _ACT_DIRECT))
    body = _tc(index, handle, parent, preference << 16 | protocol)
    body += attribute(1, b"bpf\0") + attribute(2 | 0x8000, options)
    netlink.request(RTM_NEWTFILTER, _CREATE | (_REPLACE if replace else _EXCLUSIVE), body)


def remove_filter(netlink: Netlink, index: int, found: Filter) -> None:
    """Remove one filter; that it has gone already is no error."""
    body = _tc(index, found.handle, found.parent, found.preference << 16 | found.protocol)
    try:
        netlink.request(RTM_DELTFILTER, 0, body + attribute(1, found.kind.encode() + b"\0"))
    except FileNotFoundError:
        return


ALL_PROTOCOLS = _ALL_PROTOCOLS
