"""What is wrong, wherever it was found, and how it comes to the log.

Rules of this file: a problem is a state, not an event: it is logged when it comes and when it goes, never in between.
A map that is full is the problem of ten thousand Services at once: the log has some of them, `status` has all. One that
comes and goes is held back by `log`, as everything that repeats; its going too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

log = logging.getLogger("ebpflb.problems")

_MOST_LINES = 20


class Found(msgspec.Struct, frozen=True):
    """A problem, and which part of the daemon found it: a source's name, `policy`, `sync`, `audit`, `devices`, `node`
    (its settings), `hand-over` (from what carried Services before), `http` (our own ports), `health-check` (a Service's
    port), `health` (why /healthz says 503) or `status`."""

    part: str
    subject: str
    reason: str
    code: str = ""


def in_order(problems: Iterable[Found]) -> tuple[Found, ...]:
    """By part, subject and reason."""
    return tuple(sorted(problems, key=lambda problem: (problem.part, problem.subject, problem.reason)))


class ProblemLog:
    """Logs what has come and what has gone since it was last told."""

    def __init__(self) -> None:
        self._known: frozenset[Found] = frozenset()

    def tell(self, problems: Iterable[Found]) -> tuple[tuple[Found, ...], tuple[Found, ...]]:
        """`problems` are all that there are now. Returns what has come and what has gone."""
        now = frozenset(problems)
        come, gone = in_order(now - self._known), in_order(self._known - now)
        self._known = now
        for problem in come[:_MOST_LINES]:
            log.warning("%s: %s: %s", problem.part, problem.subject, problem.reason, extra=_fields("problem", problem))
        for problem in gone[:_MOST_LINES]:
            log.info(
                "%s: %s: resolved: %s", problem.part, problem.subject, problem.reason,
                extra={**_fields("resolved", problem), "limited": True},
            )  # fmt: skip
        for word, number in (("more problems", len(come)), ("more problems resolved", len(gone))):
            if number > _MOST_LINES:
                log.warning("%d %s: `ebpflb status -o wide` has them all", number - _MOST_LINES, word)
        return come, gone


def _fields(event: str, problem: Found) -> dict[str, object]:
    """A problem for machines that read the log."""
    return {"fields": {"event": event, **msgspec.structs.asdict(problem)}}
