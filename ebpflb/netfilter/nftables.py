"""What nf_tables says of itself over netlink: the chains' names, which iptables-nft lists in quadratic time.

Rules of this file: it reads, and knows nothing of rules, whose compatibility layer is iptables' own business. A kernel
without nf_tables has no chains.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import NamedTuple

from ebpflb.model import Family
from ebpflb.rtnetlink import Netlink, attribute, attributes, text

_NETLINK_NETFILTER = 12
_GET_CHAIN = 10 << 8 | 4  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN
_TABLE, _NAME, _HOOK, _USE = 1, 3, 4, 6
_FAMILIES = {Family.IPV4: int(socket.AF_INET), Family.IPV6: int(socket.AF_INET6)}
_ABSENT = (errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT)


class NftChain(NamedTuple):
    """A chain. `based`: it hangs on a hook; `uses`: how many rules it has and jumps there are to it."""

    table: str
    name: str
    based: bool
    uses: int


def chains(family: Family) -> list[NftChain]:
    """All chains of a family in the network namespace that the thread is in, of whatever tool's tables, in the kernel's
    order. Raises OSError."""
    try:
        with contextlib.closing(Netlink(protocol=_NETLINK_NETFILTER)) as netlink:
            messages = netlink.dump(_GET_CHAIN, struct.pack("=BBH", _FAMILIES[family], 0, 0))
    except OSError as error:
        if error.errno in _ABSENT:
            return []
        raise
    found = []
    for message in messages:
        has = attributes(message[4:])
        uses = int.from_bytes(has.get(_USE, b""), "big")
        found.append(NftChain(text(has.get(_TABLE)), text(has.get(_NAME)), _HOOK in has, uses))
    return found


def has_chain(family: Family, table: str, chain: str) -> bool:
    """Whether there is such a chain, by a look that costs the same however many there are. Raises OSError."""
    body = struct.pack("=BBH", _FAMILIES[family], 0, 0)
    body += attribute(_TABLE, table.encode() + b"\0") + attribute(_NAME, chain.encode() + b"\0")
    try:
        with contextlib.closing(Netlink(protocol=_NETLINK_NETFILTER)) as netlink:
            return bool(netlink.request(_GET_CHAIN, 0, body))
    except OSError as error:
        if error.errno in (*_ABSENT, errno.ENOENT):
            return False
        raise
