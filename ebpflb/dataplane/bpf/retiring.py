"""Leaving Services to another dataplane: nothing new begins here, what began here goes on to its end.

Rules of this file: it works on the maps alone, with no program loaded and no ledger. Without frontends the programs
give no packet and no socket a backend; the flows that they know they go on translating.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping

from ebpflb.dataplane.bpf.layouts import FLOW, FLOW_KEY, SIZES
from ebpflb.dataplane.bpf.locality import ONLY, retired, unpack_facts
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.remembered import FLOW_CLOSING, FLOW_DNAT
from ebpflb.errors import ApplyError
from ebpflb.model import Protocol

KEPT_SECONDS = 3600
"""A connection without a packet for so long is taken for dead: whoever still has it finds out at its next packet."""

_LOW = (1 << 32) - 1


def leave(maps: Maps) -> int:
    """Have the programs give way to the successor, and remove every frontend's row; how many there were. No address is
    ours any more before its frontends go, or their ports would be refused. Raises ApplyError, OSError."""
    settings = maps.read_array("settings", 0, 1)
    facts, layout = unpack_facts(settings)
    if layout and not facts.retired:
        _require("settings", maps.put("settings", ONLY, retired(settings)))
    owned, _ = maps.read("owned")
    _require("owned", maps.remove("owned", owned))
    keys, _ = maps.read("frontends")
    _require("frontends", maps.remove("frontends", keys))
    if owned or keys:  # nobody need look for them
        cells = array("I", range(maps.capacity["known"]))
        _require("known", maps.put("known", cells.tobytes(), bytes(len(cells) * SIZES["known"][1])))
    return len(keys) // SIZES["frontends"][0]


def _require(table: str, refused: Mapping[int, int]) -> None:
    if refused:
        number = next(iter(refused.values()))
        raise ApplyError(table, "", number, f"{len(refused)} rows of {table} cannot be written: {os.strerror(number)}")


def flows_kept(maps: Maps, jiffies: int, patience: int) -> int:
    """How many connections were used within the last `patience` jiffies and have not been closed. Datagrams do not
    count: without a frontend their next one finds another backend. `jiffies` are now's lower 32 bits at least; what
    has been used since they were asked for counts."""
    keys, values = maps.read("flows")
    kept = 0
    for key, flow in zip(FLOW_KEY.iter_unpack(keys), FLOW.iter_unpack(values), strict=True):
        protocol, action, flags, seen = key[4], flow[3], flow[4], flow[8]
        if protocol == Protocol.UDP or action != FLOW_DNAT or flags & FLOW_CLOSING:
            continue
        kept += (jiffies - seen + patience) & _LOW <= 2 * patience
    return kept
