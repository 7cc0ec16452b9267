"""kube-proxy's things that are no iptables rules: ipsets, kube-ipvs0, virtual servers, nftables tables; over netlink.

Rules of this file: no module is loaded by asking; where the kernel has no such thing, there is none of it. Refusals are
OSErrors. Messages are few, whatever there is, but for lists of names.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ebpflb import rtnetlink
from ebpflb.rtnetlink import Netlink, attribute, attributes, number, text

DEVICE = "kube-ipvs0"
TABLE = "kube-proxy"

_NETFILTER, _GENERIC = 12, 16
_TABLE_FAMILIES = {"ip": int(socket.AF_INET), "ip6": int(socket.AF_INET6)}
_ABSENT = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOENT)
_NESTED = 0x8000

# linux/netfilter/ipset/ip_set.h
_IPSET = 6 << 8
_SET_DESTROY, _SET_LIST = _IPSET | 3, _IPSET | 7
_SET_PROTOCOL, _SET_NAME, _SET_FLAGS, _SET_DATA, _SET_ENTRIES = 1, 2, 6, 7, 8
_ENTRY_PORT = 4
_SET_BUSY = 4100  # IPSET_ERR_BUSY: ipset has numbers of its own
_NAMES_ONLY = attribute(_SET_FLAGS | 0x4000, struct.pack("!I", 1 << 1))
_SPOKEN = attribute(_SET_PROTOCOL, bytes([6]))

# linux/ip_vs.h
_SERVERS = Path("/proc/thread-self/net/ip_vs")
_GET_SERVICE, _DEL_SERVICE = 4, 3
_AF, _PROTOCOL, _ADDRESS, _PORT, _MARK = 1, 2, 3, 4, 5

# linux/netfilter/nf_tables.h
_GET_TABLE, _DELETE_TABLE = 10 << 8 | 1, 10 << 8 | 2
_BATCH_BEGIN, _BATCH_END = 16, 17


class VirtualServer(NamedTuple):
    """A virtual server of IPVS: at an address and port, or at a firewall mark."""

    version: int
    protocol: int
    address: str
    port: int
    mark: int

    def __str__(self) -> str:
        name = {6: "TCP", 17: "UDP", 132: "SCTP"}.get(self.protocol, str(self.protocol))
        if self.mark:
            return f"mark {self.mark:#x}"
        host = f"[{self.address}]" if self.version == 6 else self.address
        return f"{host}:{self.port}/{name}"


# ---- ipsets ----


def ipsets() -> list[str]:
    """The names of all, sorted."""
    with contextlib.closing(Netlink(protocol=_NETFILTER)) as netlink:
        try:
            messages = netlink.dump(_SET_LIST, _header() + _SPOKEN + _NAMES_ONLY)
        except OSError as error:
            if error.errno in _ABSENT:
                return []
            raise
    return sorted(text(attributes(message[4:]).get(_SET_NAME)) for message in messages)


def ports(name: str) -> set[int]:
    """The ports in the entries of an ipset."""
    found = set()
    with contextlib.closing(Netlink(protocol=_NETFILTER)) as netlink:
        for message in netlink.dump(_SET_LIST, _header() + _SPOKEN + attribute(_SET_NAME, _name(name))):
            for entry in _entries(attributes(message[4:]).get(_SET_ENTRIES, b"")):
                found.add(int.from_bytes(attributes(entry).get(_ENTRY_PORT, b""), "big"))
    return found


def _entries(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 4 <= len(data):
        length, _ = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield data[at + 4 : at + length]
        at += (length + 3) & ~3


def remove_ipsets(names: Sequence[str]) -> None:
    """Those that are gone already are no error."""
    with contextlib.closing(Netlink(protocol=_NETFILTER)) as netlink:
        for name in names:
            try:
                netlink.request(_SET_DESTROY, 0, _header() + _SPOKEN + attribute(_SET_NAME, _name(name)))
            except FileNotFoundError:
                continue
            except OSError as error:
                words = "a rule uses it" if error.errno == _SET_BUSY else error.strerror
                raise OSError(error.errno, f"ipset {name} cannot be removed: {words}") from error


# ---- IPVS ----


def device() -> bool:
    """Whether there is kube-ipvs0."""
    return _index() is not None


def _index() -> int | None:
    with contextlib.closing(Netlink()) as netlink:
        return next((index for index, link in rtnetlink.links(netlink).items() if link.name == DEVICE), None)


def bound_addresses() -> frozenset[str]:
    """The addresses of kube-ipvs0."""
    index = _index()
    with contextlib.closing(Netlink()) as netlink:
        found = [each for each in rtnetlink.addresses(netlink) if each.ifindex == index]
    return frozenset(
        str(ipaddress.ip_address(each.address[12:] if each.version == 4 else each.address)) for each in found
    )


def remove_device() -> None:
    """With its addresses."""
    index = _index()
    if index is None:
        return
    with contextlib.closing(Netlink()) as netlink, contextlib.suppress(ProcessLookupError):
        netlink.request(rtnetlink.RTM_DELLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0))


def servers() -> list[VirtualServer]:
    """All virtual servers."""
    if not _SERVERS.exists():
        return []
    with contextlib.closing(Netlink(protocol=_GENERIC)) as netlink:
        messages = netlink.dump(_family(netlink), _generic(_GET_SERVICE))
        return [_server(attributes(attributes(message[4:])[1])) for message in messages]


def _server(has: dict[int, bytes]) -> VirtualServer:
    version = 6 if struct.unpack("=H", has[_AF])[0] == socket.AF_INET6 else 4
    mark = number(has.get(_MARK))
    if mark:
        return VirtualServer(version, 0, "", 0, mark)
    raw = has[_ADDRESS][: 16 if version == 6 else 4]
    (protocol,) = struct.unpack("=H", has[_PROTOCOL])
    return VirtualServer(version, protocol, str(ipaddress.ip_address(raw)), int.from_bytes(has[_PORT], "big"), 0)


def remove_servers(gone: Sequence[VirtualServer]) -> None:
    """Those that are gone already are no error."""
    if not gone:
        return
    with contextlib.closing(Netlink(protocol=_GENERIC)) as netlink:
        family = _family(netlink)
        for server in gone:
            with contextlib.suppress(ProcessLookupError):
                netlink.request(family, 0, _generic(_DEL_SERVICE) + _described(server))


def _described(server: VirtualServer) -> bytes:
    address = ipaddress.ip_address(server.address).packed
    family = socket.AF_INET6 if server.version == 6 else socket.AF_INET
    return attribute(
        1 | _NESTED,
        attribute(_AF, struct.pack("=H", family))
        + attribute(_PROTOCOL, struct.pack("=H", server.protocol))
        + attribute(_ADDRESS, address + bytes(16 - len(address)))
        + attribute(_PORT, struct.pack("!H", server.port)),
    )


def _family(netlink: Netlink) -> int:
    """The number that generic netlink has given to IPVS."""
    (message,) = netlink.request(_GENERIC, 0, struct.pack("=BBH", 3, 1, 0) + attribute(2, _name("IPVS")))
    return int(struct.unpack("=H", attributes(message[4:])[1])[0])


def _generic(command: int) -> bytes:
    return struct.pack("=BBH", command, 1, 0)


# ---- nftables ----


def tables() -> list[str]:
    """The families, as nft writes them, that have a table `kube-proxy`."""
    found = []
    with contextlib.closing(Netlink(protocol=_NETFILTER)) as netlink:
        for words, family in _TABLE_FAMILIES.items():
            try:
                messages = netlink.dump(_GET_TABLE, _header(family))
            except OSError as error:
                if error.errno in _ABSENT:
                    continue
                raise
            if any(text(attributes(message[4:]).get(1)) == TABLE for message in messages):
                found.append(words)
    return found


def remove_tables() -> None:
    """With all that is in them, each in a transaction of its own."""
    for family in tables():
        body = _header(_TABLE_FAMILIES[family]) + attribute(1, _name(TABLE))
        _transaction(_DELETE_TABLE, body)


def _transaction(type: int, body: bytes) -> None:
    """One change of nftables, between the messages that it must stand between. Raises OSError."""
    marker = struct.pack("=BB", 0, 0) + struct.pack("!H", 10)
    parts = ((_BATCH_BEGIN, 1, marker), (type, 1 | 4, body), (_BATCH_END, 1, marker))
    sent = b"".join(
        struct.pack("=IHHII", 16 + len(content), kind, flags, sequence, 0) + content
        for sequence, (kind, flags, content) in enumerate(parts, 1)
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER) as netlink:
        netlink.settimeout(10)
        netlink.bind((0, 0))
        netlink.send(sent)
        answer = netlink.recv(1 << 16)
    refusal = -struct.unpack_from("=i", answer, 16)[0]
    if refusal and refusal != errno.ENOENT:
        raise OSError(refusal, f"the nftables table {TABLE} cannot be removed")


def _header(family: int = socket.AF_UNSPEC) -> bytes:
    return struct.pack("=BBH", family, 0, 0)


def _name(words: str) -> bytes:
    return words.encode() + b"\0"
