"""Which path of a node carries what, by its counters.

Rules of this file: a flow is counted once, by the path that gave it its backend; a packet that XDP sends on is counted
there, whoever began its flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.box.box import Box
from tests.box.modes import Mode


class Carried(NamedTuple):
    """New flows that XDP and that tc gave a backend, and packets that XDP sent on."""

    xdp: int
    tc: int
    sent: int


def carried_so_far(box: Box, node: str = "node1") -> Carried:
    """By the counters of a node."""
    counters = box.kernel.counters(node)
    return Carried(counters["xdp_forwarded"], counters["packet_forwarded"], counters["xdp_sent"])


@contextmanager
def carried(box: Box, node: str = "node1") -> Iterator[list[Carried]]:
    """What each path of a node carried within the block: one item, there after it."""
    found: list[Carried] = []
    before = carried_so_far(box, node)
    yield found
    now = carried_so_far(box, node)
    found.append(Carried(*(after - began for began, after in zip(before, now, strict=True))))


def new_flows_are(mode: Mode, number: int) -> tuple[int, int]:
    """`xdp` and `tc` of what so many flows from outside to backends elsewhere make in a mode."""
    return (number, 0) if mode.xdp else (0, number)
