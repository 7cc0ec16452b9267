"""What the kernel says of this node: its addresses.

Rules of this file: rtnetlink, read only, in this process's network namespace; no other source of truth. The few
messages that are needed are read with `struct`: a netlink library costs 20 MB of memory and a hundred times the time.

IPv6 link-local addresses are left out. Every veth brings one, so that each pod's coming would change the node's
addresses and with them every NodePort; and no Service can be reached there, since a socket address names the link too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator

from ebpflb.errors import SourceError
from ebpflb.model import Problem
from ebpflb.source import Event, LocalAddresses, Synced

_ROUTE_PROTOCOL = 0
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_REQUEST, _DUMP = 0x1, 0x300
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_DADFAILED = 0x08
_RTA_DST, _RTA_PREFSRC = 1, 7
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
# RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE
_GROUPS = 0x10 | 0x40 | 0x100 | 0x400

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, destination bits, source bits, …
_ATTRIBUTE = struct.Struct("=HH")  # length, type

_BUFFER = 1 << 18

# Nothing is sent there. Nobody may use them and so nobody routes them: only a default route leads there.
_FAR_AWAY = {socket.AF_INET: "240.0.0.1", socket.AF_INET6: "2000::1"}


class LocalSource:
    """This node's addresses, followed as they change."""

    name = "local"

    def __init__(self) -> None:
        self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE_PROTOCOL)
        self._events.setblocking(False)
        # Deaf before the first look would be blind to what happens between the two.
        self._events.bind((0, _GROUPS))
        self._last: LocalAddresses | None = None

    def fileno(self) -> int:
        """Readable when addresses or routes changed."""
        return self._events.fileno()

    def close(self) -> None:
        """Release descriptors."""
        self._events.close()

    def problems(self) -> tuple[Problem, ...]:
        """None: what cannot be read is raised."""
        return ()

    def read(self) -> list[Event]:
        """LocalAddresses if they are new. Raises SourceError."""
        concerns_us = self._drain()
        if self._last is not None and not concerns_us:
            return []
        try:
            now = look()
        except OSError as error:
            raise SourceError(f"the kernel's addresses cannot be read: {error.strerror}") from error
        first, changed = self._last is None, now != self._last
        self._last = now
        return [*([now] if changed else []), *([Synced(self.name)] if first else [])]

    def _drain(self) -> bool:
        """Whether anything was said about addresses or default routes; other routes come and go with every pod."""
        found = False
        while True:
            try:
                data = self._events.recv(_BUFFER)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise SourceError(f"the kernel's events cannot be read: {error.strerror}") from error
                found = True  # some were lost
                continue
            found = found or any(_is_news(kind, body) for kind, body in _messages(data))


def _is_news(kind: int, body: bytes) -> bool:
    if kind in (_RTM_NEWROUTE, _RTM_DELROUTE):
        destination_bits: int = _ROUTE.unpack_from(body)[1]
        return destination_bits == 0
    return kind in (_RTM_NEWADDR, _RTM_DELADDR)


# ---- Asking ----


def look() -> LocalAddresses:
    """All addresses that the kernel calls its own, IPv4 first and by value, and its main one per family: the source
    that its default route prefers, else its first global address. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE_PROTOCOL) as kernel:
        kernel.bind((0, 0))
        found = list(_addresses(kernel))
        primary = []
        for family in (socket.AF_INET, socket.AF_INET6):
            in_order = [packed for scope, packed in found if scope == _SCOPE_UNIVERSE and _family(packed) == family]
            first = _preferred(kernel, family) or next(iter(in_order), None)
            # An address on loopback alone (a router's, say) is global, 127.0.0.1 is not.
            if first is not None and first in in_order:
                primary.append(first)
    own = sorted({packed for _, packed in found}, key=lambda packed: (len(packed), packed))
    return LocalAddresses(tuple(map(_text, own)), tuple(map(_text, primary)))


def _family(packed: bytes) -> socket.AddressFamily:
    return socket.AF_INET if len(packed) == 4 else socket.AF_INET6


def _text(packed: bytes) -> str:
    return socket.inet_ntop(_family(packed), packed)


def _addresses(kernel: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Scope and address of each, in the order in which the kernel lists them."""
    for body in _ask(kernel, _RTM_GETADDR, _DUMP, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        family, _, flags, scope, _ = _ADDRESS.unpack_from(body)
        if family not in _FAR_AWAY or scope == _SCOPE_LINK and family == socket.AF_INET6:
            continue
        said = dict(_attributes(body, _ADDRESS.size))
        if _IFA_FLAGS in said:
            flags = int.from_bytes(said[_IFA_FLAGS], "little" if struct.pack("=H", 1)[0] else "big")
        # On a point-to-point link IFA_ADDRESS is the peer's.
        packed = said.get(_IFA_LOCAL) or said.get(_IFA_ADDRESS)
        if packed and not flags & _IFA_F_DADFAILED:
            yield scope, packed


def _preferred(kernel: socket.socket, family: socket.AddressFamily) -> bytes | None:
    """The source address of a packet that goes far away; None if there is no way."""
    packed = socket.inet_pton(family, _FAR_AWAY[family])
    request = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    request += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    with contextlib.suppress(OSError):  # the kernel's way to say that there is no route
        for body in _ask(kernel, _RTM_GETROUTE, 0, request):
            return dict(_attributes(body, _ROUTE.size)).get(_RTA_PREFSRC)
    return None


def _ask(kernel: socket.socket, kind: int, flags: int, body: bytes) -> list[bytes]:
    """The bodies of all answers to one request. Raises OSError with the kernel's errno."""
    kernel.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0) + body)
    found: list[bytes] = []
    while True:
        for kind_of_answer, answer in _messages(kernel.recv(_BUFFER)):
            if kind_of_answer == _NLMSG_DONE:
                return found
            if kind_of_answer == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", answer)[0]
                raise OSError(code, os.strerror(code))
            found.append(answer)
        if not flags & _DUMP:
            return found


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each netlink message in a datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _attributes(body: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute behind a fixed part of `offset` bytes."""
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, body[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
