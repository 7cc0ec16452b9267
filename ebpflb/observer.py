"""Who watches the reconciler at work: health, metrics and notices are observers.

Rules of this file: the protocol and what is told, nothing that does something with it. An observer never raises, never
blocks and never answers: it is called in the daemon's one thread, between an event and the kernel. All times are of the
daemon's clock (seconds from anywhere) unless a field says otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

import msgspec

from ebpflb.dataplane import Report
from ebpflb.model import Family
from ebpflb.problems import Found
from ebpflb.routes import RouteTable
from ebpflb.source import Event

log = logging.getLogger("ebpflb.observer")


class Trigger(msgspec.Struct, frozen=True, gc=False):
    """A change of pods that the kernel now answers to: in which family, and when it happened (seconds since the
    epoch)."""

    family: Family
    at: float


class Attempt(msgspec.Struct, frozen=True):
    """A sync or an audit that ended. `queued` is when the oldest change came that it was to take in (None if there was
    none: a retry, an audit). `changed` are the routes that differ from those of the last attempt. `triggers` belong to
    the changes that this attempt was the first to bring into the kernel whole; () if it was not complete.
    `first`: it was the first complete one."""

    what: str
    began: float
    ended: float
    queued: float | None
    routes: RouteTable
    changed: int
    report: Report
    triggers: tuple[Trigger, ...] = ()
    first: bool = False

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Observer(Protocol):
    """Told of everything, in order."""

    def event(self, event: Event) -> None:
        """A source said something new."""

    def queued(self, at: float) -> None:
        """A change came, and none was waiting before it. Told again when a failed attempt leaves changes to retry."""

    def attempted(self, attempt: Attempt) -> None:
        """A sync (`what` is "sync") or an audit ("audit") ended."""

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        """Problems that are new, and problems that are no more; each may be empty, never both."""


class Observers:
    """Several as one. One that fails has a fault, which is logged; the others and the daemon go on."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._all = tuple(observers)

    def event(self, event: Event) -> None:
        for each in self._all:
            with _at_its_own_risk(each):
                each.event(event)

    def queued(self, at: float) -> None:
        for each in self._all:
            with _at_its_own_risk(each):
                each.queued(at)

    def attempted(self, attempt: Attempt) -> None:
        for each in self._all:
            with _at_its_own_risk(each):
                each.attempted(attempt)

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        for each in self._all:
            with _at_its_own_risk(each):
                each.problems(come, gone)


class _at_its_own_risk:  # noqa: N801  # reads as a statement; a generator's context manager costs three times as much
    """What is raised within is logged as a fault of the observer."""

    __slots__ = ("_observer",)

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error(
            "%s failed unexpectedly: %s: %s",
            type(self._observer).__name__,
            type(error).__name__,
            error,
            exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
        )
        return True
