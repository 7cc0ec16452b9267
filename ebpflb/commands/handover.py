"""Hand-over: from what carried Services here until now to the dataplane that does from now on.

Rules of this file: nobody's rows go before the successor has been complete, by what every source says now and not by
what is remembered. A predecessor then leaves new flows to it (`retire`), is asked again from time to time until nothing
is left that its removal would break, and is removed. What kube-proxy left behind is told and left alone: whose node it
is must say so (`cleanup --kube-proxy`). Each step is in the log; what is not over is in `status`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import msgspec

from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError
from ebpflb.parts import Leftovers, installed
from ebpflb.problems import Found

log = logging.getLogger("ebpflb.handover")

PERIOD = 30.0
"""Seconds between two questions whether a predecessor has something left to keep."""

LEFTOVERS_PERIOD = 300.0
"""Seconds between two looks whether what kube-proxy left is gone: with iptables-legacy one reads all of it."""

PART = "hand-over"
KUBE_PROXY = "kube-proxy"

_WAITS = "holds what it held, until {successor} is complete"
_KEEPS = "keeps the connections that it began; new ones are {successor}'s"


class Retiring(msgspec.Struct, frozen=True):
    """A predecessor that is still here, and what it is at."""

    dataplane: str
    detail: str


class HandOver:
    """A Worker. `ladder` are all dataplanes, `successor` the one that carries Services from now on; `complete` is
    whether it holds all that it should by now."""

    def __init__(
        self,
        ladder: Sequence[Dataplane],
        successor: Dataplane,
        leftovers: Leftovers,
        *,
        clock: Callable[[], float],
        complete: Callable[[], bool],
    ) -> None:
        self._others = {dataplane.name: dataplane for dataplane in ladder if dataplane.name != successor.name}
        self._successor = successor
        self._leftovers = leftovers
        self._clock = clock
        self._complete = complete
        self._details: dict[str, str] = {}  # of predecessors that are not gone, and what the last look came to
        self._failures: dict[str, str] = {}
        self._of_kube_proxy: tuple[str, ...] = ()
        self._not_before = self._look_at = clock()

    def begin(self) -> None:
        """Before the successor starts: see who is here, and have it know. Raises what its `take_over` raises."""
        for name, other in self._others.items():
            try:
                if installed(other):
                    self._details[name] = _WAITS.format(successor=self._successor.name)
            except EbpflbError as error:
                self._fail(name, error)
        self._look_for_leftovers()
        if self._details or self._of_kube_proxy:
            log.info(
                "%s carried Services here until now: %s takes over",
                " and ".join((*self._details, *((KUBE_PROXY,) if self._of_kube_proxy else ()))),
                self._successor.name,
            )
            self._successor.take_over()

    def _look_for_leftovers(self) -> None:
        try:
            self._of_kube_proxy = self._leftovers.present()
            self._failures.pop(KUBE_PROXY, None)
        except EbpflbError as error:
            self._failures[KUBE_PROXY] = str(error)

    # ---- As a worker ----

    def due(self) -> float | None:
        # Until the successor is complete there is nothing to do, and the loop comes round when it is.
        if not self._complete():
            return None
        times = []
        if self._details or self._failures.keys() - {KUBE_PROXY}:
            times.append(self._not_before)
        if self._of_kube_proxy or KUBE_PROXY in self._failures:
            times.append(self._look_at)
        return min(times, default=None)

    def work(self) -> None:
        now, due = self._clock(), self.due()
        if due is None or now < due:
            return
        if now >= self._not_before:
            self._not_before = now + PERIOD
            for name in dict.fromkeys((*self._details, *self._failures)):
                if name in self._others:
                    self._move_on(name, self._others[name])
        if now >= self._look_at and (self._of_kube_proxy or KUBE_PROXY in self._failures):
            self._look_at = now + (PERIOD if KUBE_PROXY in self._failures else LEFTOVERS_PERIOD)
            self._look_for_leftovers()

    def _move_on(self, name: str, other: Dataplane) -> None:
        """One step: retire it, and remove it when nothing is left to keep."""
        try:
            if not installed(other):  # it could not be asked before, or what it had was written over
                if self._details.pop(name, None):
                    log.info("hand-over: nothing of %s is left", name)
            elif other.retire():
                other.cleanup()
                log.info("hand-over: %s has nothing left to keep, and has been removed", name)
                self._details.pop(name, None)
            else:
                detail = _KEEPS.format(successor=self._successor.name)
                if self._details.get(name) != detail:
                    log.info("hand-over: %s %s", name, detail)
                self._details[name] = detail
            self._failures.pop(name, None)
        except EbpflbError as error:
            self._fail(name, error)

    def _fail(self, name: str, error: EbpflbError) -> None:
        self._failures[name] = str(error)
        log.debug("hand-over from %s", name, exc_info=True)

    # ---- What is not over ----

    def retiring(self) -> tuple[Retiring, ...]:
        """The predecessors that are still here."""
        return tuple(Retiring(name, detail) for name, detail in self._details.items())

    def problems(self) -> Iterator[Found]:
        """What stands in the way of an end."""
        for name, reason in self._failures.items():
            yield Found(
                PART, name, f"every {PERIOD:g} s it is tried to look at what it left, or to remove it: {reason}"
            )
        if self._of_kube_proxy:
            yield Found(
                PART,
                KUBE_PROXY,
                f"left behind: {', '.join(self._of_kube_proxy)}; `ebpflb cleanup --kube-proxy` removes it",
                "LeftBehind",
            )
