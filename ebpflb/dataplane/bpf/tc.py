"""tc in the few messages that the BPF dataplane needs: the clsact qdisc and the filters under it.

Rules of this file: it encodes and decodes on a socket of `rtnetlink`, and decides nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from ebpflb.rtnetlink import Netlink, attribute, attributes, number, text

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
EVENTS = (RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER, RTM_DELTFILTER)

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
"""A device's two sides, as parents of the filters there."""

ALL_PROTOCOLS = socket.htons(0x0003)
"""A filter's `protocol` (an EtherType in network order) that means every packet."""

_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_ACT_DIRECT = 1


class Hooked(NamedTuple):
    """A tc program for one side of a device, INGRESS or EGRESS: its descriptor, id and name."""

    side: int
    program: int
    id: int
    name: str


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


def index_of(message: bytes) -> int:
    """The device of a tc message."""
    return int(struct.unpack_from("=i", message, 4)[0])


def _tc(index: int, handle: int, parent: int, info: int = 0) -> bytes:
    return struct.pack("=BxxxiIII", 0, index, handle, parent, info)


def side_qdisc(netlink: Netlink, index: int) -> str:
    """The kind of the qdisc at ffff: of a device: "clsact", "ingress", or "" for none."""
    for message in netlink.dump(RTM_GETQDISC, _tc(0, 0, 0)):
        _, device, handle, _, _ = struct.unpack_from("=BxxxiIII", message)
        if device == index and handle == _CLSACT_HANDLE:
            return text(attributes(message[20:]).get(1))
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
            kind = text(has.get(1))
            options = attributes(has.get(2, b"")) if kind == "bpf" else {}
            found.append(
                Filter(parent, info >> 16, info & 0xFFFF, handle, kind, number(options.get(11)), text(options.get(7)))
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
    protocol: int = ALL_PROTOCOLS,
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
