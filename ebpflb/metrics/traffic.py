"""What each Service carries, for as many Services as may have series of their own.

Rules of this file: pure. Whatever the kernel counts is counted here exactly once: for the Service if it has a seat,
else for the rest together, whose labels are all "". A seat is kept until its Service is gone or another is twice as
busy, so that series do not come and go; a Service that lost its seat begins at 0 should it get one again, which is what
a reset of a counter looks like. No series ever falls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

Owner: TypeAlias = tuple[str, str]
"""Namespace and name of a Service."""

Port: TypeAlias = tuple[str, str, str]
"""Namespace, name of the Service, name of its port: the labels of a series."""

REST: Port = ("", "", "")

# How much of what was busy before counts beside what is busy now, from one look to the next.
_MEMORY = 0.8
# Below it a Service that was busy once is forgotten.
_IDLE = 1.0
_CLEARLY_BUSIER = 2


class Carried(NamedTuple):
    """Amounts that only grow."""

    connections: int = 0
    packets: int = 0
    bytes: int = 0

    def plus(self, other: Carried) -> Carried:
        return Carried(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def since(self, before: Carried) -> Carried:
        """What was added; all of it where the count has begun anew."""
        grown = Carried(*(now - then for now, then in zip(self, before, strict=True)))
        return self if min(grown) < 0 else grown


class Traffic:
    """`seats`: how many Services may have series of their own."""

    def __init__(self, seats: int) -> None:
        self._most = seats
        self._seated: set[Owner] = set()
        self._last: dict[Port, Carried] = {}
        self._busy: dict[Owner, float] = {}
        self._totals: dict[Port, Carried] = {REST: Carried()}

    def take(self, counted: Iterable[tuple[Port, Carried]]) -> Mapping[Port, Carried]:
        """The series, given all that the kernel counts now. A port may be named twice: it counts as one."""
        now: dict[Port, Carried] = {}
        for port, carried in counted:
            now[port] = now[port].plus(carried) if port in now else carried
        grown = {port: carried.since(self._last.get(port, Carried())) for port, carried in now.items()}
        self._last = now
        self._weigh(grown)
        self._seat({port[:2] for port in now})
        for port, more in grown.items():
            series = port if port[:2] in self._seated else REST
            self._totals[series] = self._totals.get(series, Carried()).plus(more)
        return self._totals

    def _weigh(self, grown: Mapping[Port, Carried]) -> None:
        busy: Counter[Owner] = Counter()
        for port, more in grown.items():
            busy[port[:2]] += more.connections + more.packets
        weights = {owner: weight * _MEMORY for owner, weight in self._busy.items()}
        for owner, number in busy.items():
            weights[owner] = weights.get(owner, 0.0) + number
        self._busy = {owner: weight for owner, weight in weights.items() if weight >= _IDLE}

    def _seat(self, there: set[Owner]) -> None:
        """Give seats to the busiest who have none: the free ones, those of Services that are gone, and those of others
        that are clearly less busy."""
        weight = {owner: self._busy.get(owner, 0.0) if owner in there else -1.0 for owner in self._seated}
        leaving = sorted(self._seated, key=lambda owner: (weight[owner], owner), reverse=True)
        standing = sorted(
            (owner for owner in self._busy if owner in there and owner not in self._seated),
            key=lambda owner: (-self._busy[owner], owner),
        )
        for owner in standing[: self._most]:
            if len(self._seated) >= self._most:
                if not leaving or self._busy[owner] <= _CLEARLY_BUSIER * weight[leaving[-1]]:
                    return
                self._give_up(leaving.pop())
            self._seated.add(owner)

    def _give_up(self, owner: Owner) -> None:
        self._seated.discard(owner)
        self._totals = {port: carried for port, carried in self._totals.items() if port[:2] != owner}
