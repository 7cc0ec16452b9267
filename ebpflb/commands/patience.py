"""How long somebody at a terminal waits, and who may ask at all.

Rules of this file: what commands that read sources share; nothing here knows a dataplane.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpflb.errors import SourceError, UserError
from ebpflb.parts import Parts
from ebpflb.source import Source, SourceState


def require_privilege(parts: Parts) -> None:
    if not parts.privileged():
        raise UserError("this needs root (CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN); run it with sudo")


def unheard(sources: Sequence[Source], parts: Parts) -> SourceError:
    """That one of `sources` has not said everything in time, in its own words."""
    waiting = next((source for source in sources if source.condition().state is not SourceState.LIVE), sources[0])
    detail = waiting.condition().detail or f"it goes on being written after {parts.patience:g} s"
    return SourceError(f"{waiting.name} has not said everything: {detail}; try again")


class Patience:
    """How long somebody at a terminal waits for sources: `parts.patience` seconds from now, or until one has failed
    again and again. As a Worker, it has the loop come round to look at that."""

    _ENOUGH = 3
    _GLANCE = 0.2

    def __init__(self, sources: Sequence[Source], parts: Parts) -> None:
        self._sources = sources
        self._clock = parts.clock
        self._until = parts.clock() + parts.patience

    def is_over(self) -> bool:
        return self.left() <= 0

    def left(self) -> float:
        """Seconds until it is worth looking again; 0 when it is over."""
        if any(source.condition().failures >= self._ENOUGH for source in self._sources):
            return 0.0
        return max(0.0, min(self._until - self._clock(), self._GLANCE))

    def due(self) -> float | None:
        return self._clock() + self.left()

    def work(self) -> None:
        """The loop's own condition looks."""
