"""Taking Services over from a dataplane whose connections are conntrack's: its ports are not given out a second time.

Rules of this file: it works on the map of flows alone, before anything begins here. A connection that conntrack
masquerades has a port of this node to its backend. Were one of ours to get the same, the backend would take it for that
connection's, and the confusion ends both. So each such port has a row, by which its answers are left to the stack.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

from ebpflb.ctnetlink import Answer, End, conntrack_socket, masqueraded
from ebpflb.dataplane.bpf.layouts import FLOW, FLOW_KEY
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.remembered import FLOW_ELSEWHERE, HOOK_INGRESS
from ebpflb.model import Family

_IPV4 = bytes(10) + b"\xff\xff"  # as `routes.packed` has it
_ROW = FLOW.pack(bytes(16), 0, 0, FLOW_ELSEWHERE, 0, 0, 0, 0, 0, 0, b"", 0, 0)


def answers_elsewhere() -> Iterator[Answer]:
    """How answers come in to all that conntrack masquerades. Raises OSError."""
    with contextlib.closing(conntrack_socket()) as netlink:
        for family in Family:
            yield from masqueraded(netlink, family)


def spare_ports(maps: Maps, answers: Iterable[Answer], low: int, high: int) -> int:
    """Leave `answers` to the stack, and their ports alone, where they lie in `low` … `high`; how many these are. Raises
    OSError."""
    keys = [
        FLOW_KEY.pack(_place(source), _place(to), _port(source), _port(to), protocol, HOOK_INGRESS, 0)
        for protocol, source, to in answers
        if low <= int.from_bytes(to[-2:]) <= high
    ]
    return len(keys) - len(maps.put("flows", b"".join(keys), _ROW * len(keys)))


def _place(end: End) -> bytes:
    return _IPV4 + end[:4] if len(end) == 6 else end[:16]


def _port(end: End) -> int:
    """In the network's order, as a number of this machine."""
    return int.from_bytes(end[-2:], sys.byteorder)
