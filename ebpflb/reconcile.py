"""Sources to store to policy to dataplane, again and again: when a sync happens, and what follows its failure.

Rules of this file: it knows the Source and Dataplane protocols and no concrete one. It holds no clock, descriptor or
thread of its own: the clock and the randomness are passed in, `loop` says when to call. Nothing reaches the dataplane
before every source has said that its first list is complete, or what it remembers; and as long as some of it is
remembered only, what the kernel holds stays as it is and is added to. Whatever a source or the kernel refuses is
reported and retried; only Unsupported and UserError, raised by `start`, leave here.

When a sync happens: the first change after a quiet time at once (a lone change waits for nothing), the next ones not
sooner than `min_interval` after the end of the last sync, so that a storm of changes costs a bounded number of syncs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from ebpflb.dataplane import Dataplane, Report
from ebpflb.errors import EbpflbError, SourceError, Unsupported, UserError
from ebpflb.model import Problem
from ebpflb.observer import Attempt, Observer, Observers, Trigger
from ebpflb.overview import Overview, found_in
from ebpflb.problems import Found, ProblemLog, in_order
from ebpflb.routes import RouteTable
from ebpflb.source import Event, PutSlice, Source

log = logging.getLogger("ebpflb.reconcile")

# An audit reads every row, and changes wait meanwhile: it may have a hundredth of the time, however large the tables.
_AUDIT_SHARE = 100

# Changes of pods whose latency is remembered while the kernel takes nothing: enough for a picture.
_MOST_TRIGGERS = 10_000


class Desired(Protocol):
    """What the sources' events come to: the store and the policy, behind what this file needs of them."""

    def apply(self, event: Event) -> bool:
        """Take one event in; whether it says anything new."""

    @property
    def synced(self) -> bool:
        """Whether every source has said that its first list is complete."""

    @property
    def ready(self) -> bool:
        """Whether every source has said all, or at least what it remembers of an earlier run."""

    @property
    def remembered(self) -> float | None:
        """When the oldest of what is remembered only was saved, in seconds since the epoch; None if nothing is."""

    def routes(self) -> RouteTable:
        """What this node must do, by all that was said so far; evolved from the table returned before."""


class Timing(msgspec.Struct, frozen=True):
    """All in seconds. A failed attempt is repeated after `retry_first`, then twice as long each time up to
    `retry_most`; each wait is shortened at random by up to half, so that nodes do not retry in step.
    A source that could not be read is tried again after `read_again`."""

    min_interval: float = 0.01
    audit_period: float = 30.0
    retry_first: float = 0.1
    retry_most: float = 30.0
    read_again: float = 1.0


class _Unread(msgspec.Struct, frozen=True):
    """A source that could not be read, and when it is tried again."""

    source: Source
    problem: Problem
    again: float


class _Retry(msgspec.Struct, frozen=True):
    at: float
    what: str


class Reconciler:
    """The state between events. `read` and `work` are called by the loop; `due` says when `work` has something."""

    def __init__(
        self,
        *,
        desired: Desired,
        sources: Sequence[Source],
        dataplane: Dataplane,
        clock: Callable[[], float],
        random: Callable[[], float],
        timing: Timing | None = None,
        other_problems: Callable[[], Iterable[Found]] = tuple,
        after_whole_tables: Callable[[], None] = lambda: None,
        observer: Observer | None = None,
    ) -> None:
        self._desired = desired
        self._sources = tuple(sources)
        self._dataplane = dataplane
        self._clock = clock
        self._random = random
        self._timing = timing or Timing()
        self._other_problems = other_problems
        self._after_whole_tables = after_whole_tables
        self._observer = observer or Observers()
        self._started = False
        self._routes: RouteTable | None = None
        self._held: RouteTable | None = None  # what the kernel held when we began with what is remembered
        self._queued_at: float | None = None  # of the attempt that is going on
        self._triggers: deque[Trigger] = deque(maxlen=_MOST_TRIGGERS)  # of changes not yet whole in the kernel
        self._changed = 0
        self._changed_at: float | None = None  # when the oldest change came that no sync has seen
        self._not_before = clock()
        self._retry: _Retry | None = None
        self._failures = 0
        self._audit_at: float | None = None
        self._audit_took = 0.0
        self._failing: set[str] = set()
        self._first_sync = False
        self._settled = False
        self._has_synced = False
        self._last_sync: float | None = None
        self._last_audit: float | None = None
        self._unread: dict[str, _Unread] = {}
        self._wrong: dict[str, tuple[Problem, ...]] = {}
        self._refused: dict[str, tuple[Problem, ...]] = {}
        self._problem_log = ProblemLog()

    # ---- What the loop calls ----

    def read(self, source: Source) -> None:
        """Take in all that `source` has to say."""
        try:
            faults = [fault for event in source.read() if (fault := self._take_in(source, event))]
            news = self._unread.pop(source.name, None) is not None
            if faults:
                news = self._read_again(source, faults[-1])
        except SourceError as error:
            news = self._read_again(source, str(error))
        except Exception as error:
            log.debug("reading %s failed", source.name, exc_info=True)
            news = self._read_again(source, _unexpected(error))
        wrong = source.problems()
        if news or wrong != self._wrong.get(source.name):
            self._wrong[source.name] = wrong
            self._log_problems()

    def _take_in(self, source: Source, event: Event) -> str:
        """A fault of ours in doing so, "" for none: what came with it must not be lost for it, since it is not said
        again."""
        try:
            if self._desired.apply(event):
                self._note(event)
        except Exception as error:
            fault = _unexpected(error)
            log.error("%s: %s was not taken in: %s", source.name, type(event).__name__, fault)
            log.debug("%s was not taken in", event, exc_info=True)
            return fault
        return ""

    def _note(self, event: Event) -> None:
        """Something new: a sync is due, and whoever watches is told."""
        if self._changed_at is None:
            self._changed_at = self._clock()
            self._observer.queued(self._changed_at)
        if isinstance(event, PutSlice) and event.triggered:
            self._triggers.append(Trigger(event.slice.family, event.triggered))
        self._observer.event(event)

    def _read_again(self, source: Source, reason: str) -> bool:
        # Its descriptor may have been drained by the attempt: nothing else would wake us.
        again = self._clock() + self._timing.read_again
        self._unread[source.name] = _Unread(source, Problem(source.name, reason), again)
        return True

    def read_all(self) -> None:
        """Read every source once: the first lists."""
        for source in self._sources:
            self.read(source)

    @property
    def started(self) -> bool:
        """Whether the dataplane has been started."""
        return self._started

    @property
    def attempted(self) -> bool:
        """Whether a first sync has been tried, with whatever success."""
        return self._first_sync or self._failures > 0

    @property
    def first_sync(self) -> bool:
        """Whether a complete sync has been in the kernel."""
        return self._first_sync

    @property
    def settled(self) -> bool:
        """Whether a complete sync of what every source said now, and not of what is remembered, has been in the
        kernel."""
        return self._settled

    def due(self) -> float | None:
        """The clock's time at which `work` next has something to do; None if it only waits for events."""
        times = [unread.again for unread in self._unread.values()]
        if not self._desired.ready:
            return min(times, default=None)
        if self._changed_at is not None:
            times.append(self._not_before)
        if self._retry is not None:
            times.append(self._retry.at)
        elif self._audit_at is not None:
            times.append(self._audit_at)
        return min(times, default=None)

    def work(self) -> None:
        """Do what is due, if anything is. Raises Unsupported or UserError where this node can never work."""
        now = self._clock()
        for unread in list(self._unread.values()):
            if now >= unread.again:
                self.read(unread.source)
        if not self._desired.ready:
            return
        if self._changed_at is not None and now >= self._not_before:
            self._attempt("sync")
        elif self._retry is not None:
            if now >= self._retry.at:
                what, self._retry = self._retry.what, None
                self._attempt(what)
        elif self._audit_at is not None and now >= self._audit_at:
            self._attempt("audit")

    def check_now(self) -> None:
        """Something else touched what the dataplane installed: make the next audit due at once."""
        if self._audit_at is not None:
            self._audit_at = self._clock()

    # ---- One attempt ----

    def _attempt(self, what: str) -> None:
        """Run a `sync` or an `audit`; whatever goes wrong becomes a problem and a time to try again."""
        began = self._clock()
        self._queued_at, self._changed = None, 0
        obstacle = self._start()
        act = self._sync if what == "sync" else self._audit
        try:
            report = self._refusal(obstacle) if obstacle else act()
        except EbpflbError as error:
            log.debug("%s failed", what, exc_info=True)
            report = self._refusal(str(error))
        except Exception as error:
            # A fault of ours must not take the node's Services down with it: the kernel goes on with what it holds.
            log.error("%s failed unexpectedly: %s", what, error, exc_info=log.isEnabledFor(logging.DEBUG))
            report = self._refusal(_unexpected(error))
        first = not self._first_sync
        self._settle(what, report)
        self._tell(what, began, report, first and self._first_sync)
        self._log_problems()
        if what == "audit" or not self._has_synced:
            self._has_synced = True
            self._after_whole_tables()

    def _tell(self, what: str, began: float, report: Report, first: bool) -> None:
        """Tell whoever watches how an attempt went. Triggers go on waiting where it failed, or where it was an audit
        while changes waited for their sync."""
        triggers: tuple[Trigger, ...] = ()
        if report.complete and self._changed_at is None:
            triggers = tuple(self._triggers)
            self._triggers.clear()
        routes = RouteTable() if self._routes is None else self._routes
        self._observer.attempted(
            Attempt(what, began, self._clock(), self._queued_at, routes, self._changed, report, triggers, first)
        )
        if not report.complete and self._queued_at is not None:
            self._observer.queued(self._queued_at)

    def _start(self) -> str:
        """Start the dataplane, once; why it could not be this time, "" if it runs. Lets Unsupported and UserError
        through: no later attempt can do better."""
        if self._started:
            return ""
        try:
            self._dataplane.start()
        except (Unsupported, UserError):
            raise
        except EbpflbError as error:
            log.debug("start failed", exc_info=True)
            self._queued_at = self._changed_at  # which goes on waiting
            return str(error)
        self._started = True
        return ""

    def _refusal(self, reason: str) -> Report:
        return Report(failed=1, problems=(Problem(self._dataplane.name, reason),))

    def _settle(self, what: str, report: Report) -> None:
        now = self._clock()
        self._not_before = now + self._timing.min_interval
        self._refused[what] = report.problems
        if report.complete:
            # An audit has compared the whole kernel with the whole table; a sync speaks for itself only.
            self._failing -= {what, "sync"} if what == "audit" else {what}
            if what == "audit":
                self._refused["sync"] = ()
            else:
                self._first_sync = True
                self._settled |= self._desired.synced
            if not self._failing:
                self._retry = None
                self._failures = 0
            if what == "audit" or self._audit_at is None:
                period = max(self._timing.audit_period, _AUDIT_SHARE * self._audit_took)
                self._audit_at = now + period
        else:
            self._failing.add(what)
            if self._retry is None:  # a change in between brings no new wait, or a storm would make it endless
                wait = min(self._timing.retry_most, self._timing.retry_first * 2 ** min(self._failures, 30))
                wait *= 1 - self._random() / 2
                self._failures += 1
                self._retry = _Retry(now + wait, what)
                log.warning("%s: %d refused; trying again in %.1f s", what, report.failed, wait)

    def _sync(self) -> Report:
        began = self._clock()
        self._queued_at, self._changed_at = self._changed_at, None
        routes = self._with_held(self._desired.routes())
        older, self._routes = self._routes, routes
        report = self._dataplane.sync(routes)
        ended = self._clock()
        if report.complete:
            self._last_sync = ended
        changed = self._changed = len(routes) if older is None else len(routes.changed_from(older))
        log.info(
            "sync: %d of %d routes changed; %d rows written, %d removed, %d failed; %.1f ms",
            changed, len(routes), report.written, report.removed, report.failed, (ended - began) * 1e3,
            extra={"fields": {
                "event": "sync", "changed": changed, "routes": len(routes), "written": report.written,
                "removed": report.removed, "failed": report.failed, "seconds": round(ended - began, 6),
            }},
        )  # fmt: skip
        return report

    def _with_held(self, routes: RouteTable) -> RouteTable:
        """Until all is live, what the kernel held at the start stands: it is at least as new as what is remembered, and
        what is remembered may lack what was made since."""
        if self._desired.synced:
            self._held = None
            return routes
        if self._held is None:
            self._held = self._dataplane.state()
        return routes.evolve({key: route for key, route in self._held.items() if routes.get(key) != route})

    def _audit(self) -> Report:
        began = self._clock()
        report = self._dataplane.audit()
        ended = self._clock()
        self._audit_took = ended - began
        if report.complete:
            self._last_audit = ended
        level = logging.WARNING if report.written or report.removed else logging.DEBUG
        log.log(
            level,
            "audit: the kernel %s; %d rows written, %d removed, %d failed; %.1f ms",
            "differed and was repaired" if level == logging.WARNING else "holds what it should",
            report.written, report.removed, report.failed, (ended - began) * 1e3,
            extra={"fields": {
                "event": "audit", "written": report.written, "removed": report.removed, "failed": report.failed,
                "seconds": round(ended - began, 6),
            }},
        )  # fmt: skip
        return report

    # ---- What is wrong ----

    def problems(self) -> tuple[Found, ...]:
        """Everything that is wrong now, in a stable order."""
        found = found_in(self._sources, self._routes)
        found.update(Found(name, *unread.problem) for name, unread in self._unread.items())
        for what, refused in self._refused.items():
            found.update(Found(what, *problem) for problem in refused)
        found.update(self._other_problems())
        return in_order(found)

    def _log_problems(self) -> None:
        come, gone = self._problem_log.tell(self.problems())
        if come or gone:
            self._observer.problems(come, gone)

    def overview(self) -> Overview:
        """How it goes, now."""
        now = self._clock()
        pending = None if self._changed_at is None else now - self._changed_at
        return Overview(
            synced_sources=self._desired.synced,
            remembered=self._desired.remembered,
            first_sync=self._first_sync,
            complete=self._first_sync and not self._failing,
            sound=not self._unread and not any(source.problems() for source in self._sources),
            pending_for=pending,
            last_sync_age=None if self._last_sync is None else now - self._last_sync,
            last_audit_age=None if self._last_audit is None else now - self._last_audit,
            failures=self._failures,
            routes=self._routes,
            problems=self.problems(),
            sources={source.name: source.condition() for source in self._sources},
        )


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {error}".replace("\n", " ").strip()
