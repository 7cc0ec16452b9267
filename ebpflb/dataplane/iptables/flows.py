"""What the kernel remembers of clients: conntrack's entries of our frontends, and the lists of affinity.

Rules of this file: it reads. Of a flow's idleness conntrack only tells when it will be forgotten, which is shown.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ebpflb.dataplane.items import Item
from ebpflb.model import Address, Family, Protocol
from ebpflb.routes import Frontend
from ebpflb.rtnetlink import Netlink, attributes

_NETLINK_NETFILTER = 12
_GET = 0x101
_FAMILIES = {Family.IPV4: int(socket.AF_INET), Family.IPV6: int(socket.AF_INET6)}
_STATUS, _DST_NAT = 3, 1 << 5
_ORIGINAL, _REPLY, _PROTOINFO, _TIMEOUT, _TIMESTAMP = 1, 2, 4, 7, 20
_TCP_CLOSING = frozenset((4, 5, 6, 7, 8))  # FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE
_PROTOCOLS = {int(protocol): protocol for protocol in Protocol}
_RECENT = Path("/proc/thread-self/net/xt_recent")
_SEEN = re.compile(r"src=(\S+) ttl: \d+ last_seen: (\d+) ")


class Ends(NamedTuple):
    """One direction of a flow."""

    source: Address
    source_port: int
    destination: Address
    port: int


class Tracked(NamedTuple):
    """A flow as conntrack has it. `age` is None unless conntrack takes times (net.netfilter.nf_conntrack_timestamp).
    `translated`: to another destination, by whatever rule."""

    protocol: Protocol
    original: Ends
    reply: Ends
    closing: bool
    translated: bool
    seconds_left: int
    age: float | None

    @property
    def frontend(self) -> Frontend:
        """Where the client sends it."""
        return Frontend(self.original.destination, self.original.port, self.protocol)


def tracked(family: Family, wall: Callable[[], float] = time.time) -> Iterator[Tracked]:
    """All of conntrack's entries of TCP, UDP and SCTP. Raises OSError."""
    with contextlib.closing(Netlink(protocol=_NETLINK_NETFILTER)) as netlink:
        for message in netlink.stream(_GET, struct.pack("=BBH", _FAMILIES[family], 0, 0)):
            has = attributes(message[4:])
            original, protocol = _ends(has.get(_ORIGINAL, b""))
            reply, _ = _ends(has.get(_REPLY, b""))
            if protocol not in _PROTOCOLS or original is None or reply is None:
                continue
            tcp = attributes(attributes(has.get(_PROTOINFO, b"")).get(1, b""))
            began = int.from_bytes(attributes(has.get(_TIMESTAMP, b"")).get(1, b""), "big")
            yield Tracked(
                _PROTOCOLS[protocol],
                original,
                reply,
                tcp.get(1, b"\0")[0] in _TCP_CLOSING,
                bool(int.from_bytes(has.get(_STATUS, b""), "big") & _DST_NAT),
                int.from_bytes(has.get(_TIMEOUT, b""), "big"),
                round(wall() - began / 1e9, 1) if began else None,
            )


def _ends(raw: bytes) -> tuple[Ends | None, int]:
    has = attributes(raw)
    ip, ports = attributes(has.get(1, b"")), attributes(has.get(2, b""))
    source, destination = ip.get(1) or ip.get(3), ip.get(2) or ip.get(4)
    if source is None or destination is None or 1 not in ports:
        return None, 0
    kind = socket.AF_INET if len(source) == 4 else socket.AF_INET6
    numbers = (int.from_bytes(ports.get(each, b""), "big") for each in (2, 3))
    source_port, port = numbers
    return (
        Ends(socket.inet_ntop(kind, source), source_port, socket.inet_ntop(kind, destination), port),
        ports[1][0],
    )


def recent(chains: Mapping[str, tuple[Item, int]]) -> list[Item]:
    """Who is remembered for each backend: `chains` has, by KUBE-SEP-…, an item, which gets client and idle time, and
    for how many seconds a client is remembered. Raises OSError."""
    now, hertz = _jiffies()
    found = []
    for chain, (item, seconds) in chains.items():
        try:
            text = (_RECENT / chain).read_text()
        except FileNotFoundError:
            continue  # it comes with the rule, and the rule may have gone
        for client, idle in clients(text, now, seconds * hertz):
            found.append({**item, "client": client, "idleSeconds": round(idle / hertz, 1)})
    return found


def clients(text: str, now: int, timeout: int) -> Iterator[tuple[Address, int]]:
    """The clients of a list of xt_recent, and for how long they have been away, all in jiffies. Those who have for
    longer than the timeout stand there until the rule is asked again, and are left out: it matches up to the jiffy."""
    for seen in map(_SEEN.match, text.splitlines()):
        idle = (now - int(seen[2])) & 0xFFFFFFFF if seen else 0
        if seen and idle <= timeout:
            yield str(ipaddress.ip_address(seen[1])), idle  # of IPv6 it says every digit


def _jiffies() -> tuple[int, int]:
    """The kernel's count of now, and how many there are in a second: it began 300 seconds before it would wrap 32 bits.
    Raises OSError."""
    with open("/proc/timer_list") as file:
        now = next(int(line.split()[1]) for line in file if line.startswith("jiffies:"))
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    hertz = min((100, 250, 300, 1000), key=lambda each: abs((1 << 32) + each * (uptime - 300) - now))
    return now, hertz
