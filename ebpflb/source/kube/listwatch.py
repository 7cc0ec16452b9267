"""List and watch of one kind: what exists, then every change of it, for ever.

Rules of this file: `attempt` is one round, a list where one is needed and then one watch until it ends; `run` repeats
it, and waits as long as it says. What is said goes to the outbox. It holds no clock of its own: clock, randomness and
the wait are passed in, and every wait ends when the source closes. Nothing is raised for what a server does.

When a list is needed, and when a watch goes on where the last one was:

* A list is the truth, whatever its resourceVersion: what it does not name is gone.
* A watch that ends properly, or is cut, goes on at the last resourceVersion that it has seen (a bookmark's, mostly).
* 410, in place of an answer or inside a stream: that version is history; list again.
* A resourceVersion that goes back: the cluster's store was restored. A watch from a version that is yet to come is
  silent until it has come, so that after a watch that ended before its time the version of now is looked up (a list of
  one object), and a watch that is silent for longer than bookmarks ever are is followed by a list.
* Three failures in a row that are answers, no cuts: list again, in case it is what we ask for that is wrong.

How a list comes is the matter of `lists`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from ebpflb.errors import SourceError
from ebpflb.model import Problem
from ebpflb.source.kube import ApiError, Client, Reply, Unreachable, decode
from ebpflb.source.kube.decode import Kind
from ebpflb.source.kube.lists import Lists, Timing, refusal, watch_seconds
from ebpflb.source.kube.outbox import Outbox

log = logging.getLogger("ebpflb.kubernetes")

_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _GONE = 401, 403, 404, 410

# Answers in a row after which what we ask for is thought to be at fault.
_STUBBORN = 3


class Stop(Protocol):
    """Whether the source closes; a threading.Event is one."""

    def wait(self, timeout: float) -> bool:
        """Wait that many seconds, or until it closes; whether it does."""

    def is_set(self) -> bool: ...


class Doing(msgspec.Struct, frozen=True):
    """How a kind's list and watch is doing. `broken` is since when nothing has come in (the clock's time; None while a
    watch stands), `failures` the attempts since that failed, `retry_at` the time of the next one. `granted` is since
    when a watch stands: its predecessor's problem stays until this one has said something, or has proved itself by
    standing."""

    listed: bool = False
    broken: float | None = None
    failures: int = 0
    retry_at: float | None = None
    problem: Problem | None = None
    granted: float | None = None

    def trouble(self, now: float, proven: float) -> Problem | None:
        """The problem that there is now; a watch that has stood for `proven` seconds has none."""
        return None if self.granted is not None and now - self.granted >= proven else self.problem


class ListWatch:
    """One kind's list and watch. `born` is when the source started, in seconds since the epoch: changes of pods before
    that are nobody's latency. `told` is called when `doing` has changed."""

    def __init__(
        self,
        kind: Kind,
        client: Client,
        outbox: Outbox,
        *,
        stop: Stop,
        clock: Callable[[], float],
        random: Callable[[], float],
        born: float = 0.0,
        timing: Timing | None = None,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self.kind = kind
        self.doing = Doing()
        self.alive = clock()  # when it last showed life
        self._client = client
        self._outbox = outbox
        self._stop = stop
        self._clock = clock
        self._random = random
        self._born = born
        self._timing = timing or Timing()
        self._told = told
        self._lists = Lists(kind, client, outbox, alive=self._lives, random=random, timing=self._timing)
        self._version: str | None = None  # to watch from; None: list first
        self._unsure = False  # the last watch did not end properly
        self._failures = 0
        self._inside = False  # a watch was granted, and has not ended
        self._failed_inside = False  # the last failure was inside a watch
        self._expired = False  # the last failure was that our version is history
        self._doing_what = "list"

    def run(self) -> None:
        """Until the source closes. For a thread of its own."""
        while not self._stop.is_set():
            pause = self.attempt()
            self.alive = self._clock()
            if pause and self._stop.wait(pause):
                return

    def attempt(self) -> float:
        """List if need be, then watch until that ends; seconds to wait before the next attempt."""
        self._lives()
        self._inside = False
        try:
            if self._version is not None and self._unsure:
                self._look_back()
            if self._version is None:
                self._list()
            self._watch()
        except SourceError as error:
            return self._failed(error)
        except Exception as error:
            # A fault of ours in one kind must not end the others, nor this one for good.
            if not self._stop.is_set():
                log.error("%s: unexpected %s: %s", self.kind.resource, type(error).__name__, error)
                log.debug("%s failed", self.kind.resource, exc_info=True)
            return self._failed(SourceError(f"unexpected {type(error).__name__}: {error}".replace("\n", " ")))
        return 0.0

    def _lives(self) -> None:
        self.alive = self._clock()

    # ---- Lists ----

    def _list(self) -> None:
        """All that exists. Raises SourceError."""
        self._doing_what, began = "list", self._clock()
        self._version, self._unsure = self._lists.all(), False
        known, gone = self._outbox.listed(self.kind)
        log.info(
            "%s: %d listed%s in %.2f s", self.kind.resource, known, f", {gone} gone" if gone else "",
            self._clock() - began,
        )  # fmt: skip
        self._note(msgspec.structs.replace(self.doing, listed=True))

    def _look_back(self) -> None:
        """Whether the version to go on from is still of the past; else a list is needed."""
        self._doing_what = "list"
        now = self._lists.version()
        if _is_before(now, self._version):
            self._went_back(now)

    def _went_back(self, version: str) -> None:
        log.warning(
            "%s: the resourceVersion went back from %s to %s, as after a restore: listing all again",
            self.kind.resource, self._version, version,
        )  # fmt: skip
        self._version = None

    # ---- Watches ----

    def _watch(self) -> None:
        """Every change from the version on, until the server ends the watch. Raises SourceError."""
        self._doing_what = "watch"
        asked = watch_seconds(self._timing, self._random)
        query = self._lists.query(
            watch="true", resourceVersion=self._version or "", allowWatchBookmarks="true", timeoutSeconds=asked
        )
        self._unsure = True
        with self._client.get(self.kind.path, query, timeout=self._timing.silence, stream=True) as reply:
            began = self._established()
            try:
                said = self._follow(reply)
            except Unreachable:
                if self._clock() - self.alive >= 0.9 * self._timing.silence:  # our clock is not the client's
                    self._version = None
                raise
            finally:
                if self._clock() - began >= self._timing.proven:
                    self._failures = 0
        lived = self._clock() - began
        # A server that shuts down ends its watches properly, but sooner than it was asked to.
        self._unsure = lived < 0.9 * float(asked)
        if not said and lived < self._timing.proven:
            raise SourceError(f"the server ends each watch of {self.kind.resource} at once")

    def _follow(self, reply: Reply) -> bool:
        """Take in lines until they end; whether any came."""
        said = False
        for data in reply.lines():
            self.alive = self._clock()
            line = decode.line(self.kind, data, after=self._born)
            if isinstance(line, decode.Failure):
                raise refusal(line)
            if _is_before(line.version, self._version):
                self._went_back(line.version)
                raise SourceError(f"the watch of {self.kind.resource} went back in time")
            if isinstance(line, decode.Change):
                self._outbox.put(self.kind, (line.said,))
            self._version = line.version or self._version
            if not said:
                said = True
                self._failures = 0
                self._note(msgspec.structs.replace(self.doing, failures=0, problem=None))
        return said

    def _established(self) -> float:
        """The server has granted the watch; when."""
        self.alive = self._clock()
        # Where one was granted and then failed, the next one may, too: else a problem would come and go.
        problem = self.doing.problem if self._failed_inside else None
        failures = self._failures if problem else 0
        self._note(Doing(listed=True, failures=failures, problem=problem, granted=self.alive))
        self._inside = True
        return self.alive

    # ---- Failures ----

    def _failed(self, error: SourceError) -> float:
        """Take note of a failed attempt; seconds until the next one."""
        if self._stop.is_set():
            return 0.0
        now = self._clock()
        gone = isinstance(error, ApiError) and error.status == _GONE
        self._failures += 1
        self._failed_inside = self._inside
        log.debug("%s: attempt %d to %s: %s", self.kind.resource, self._failures, self._doing_what, error)
        again, self._expired = self._expired, gone and self._version is not None
        if self._expired:
            log.info("%s: the history that the watch was at is gone: listing all again", self.kind.resource)
        if gone or (self._failures >= _STUBBORN and not isinstance(error, Unreachable)):
            self._version = None
        pause = 0.0 if gone and self._failures == 1 else self._pause(error)
        # One cut is what becomes of every stream; who comes back at once has not been away. Nor is it trouble that
        # history was forgotten during an outage, unless the list that follows does not help.
        silent = self.doing.listed and (self._failures < 2 or (self._expired and not again))
        self._note(
            Doing(
                listed=self.doing.listed,
                broken=now if self.doing.broken is None else self.doing.broken,
                failures=self._failures,
                retry_at=now + pause,
                problem=None if silent else self._problem(error),
            )
        )
        return pause

    def _pause(self, error: SourceError) -> float:
        timing, random = self._timing, self._random()
        pause = min(timing.retry_most, timing.retry_first * 2.0 ** min(self._failures - 1, 30)) * (1 - random / 2)
        asked = error.retry_after if isinstance(error, ApiError) else None
        # Who was asked to come back later comes a little later still, not all at once.
        return max(pause, min(asked, timing.retry_asked) + random) if asked else pause

    def _problem(self, error: SourceError) -> Problem:
        """What `error` is called; as the one that there is, where they differ in no more than whether a list (in pages,
        or streamed, which is a watch) or a watch was refused: a problem that lasts is one, whatever is tried next."""
        found, known = self._named(error), self.doing.problem
        return known if known is not None and _alike(found, known) else found

    def _named(self, error: SourceError) -> Problem:
        if isinstance(error, Unreachable):
            return Problem("API server", str(error), "Unreachable")
        if isinstance(error, ApiError) and error.status == _UNAUTHORIZED:
            return Problem("API server", str(error), error.reason or "Unauthorized")  # of no kind more than of another
        resource, doing = self.kind.resource, self._doing_what
        if isinstance(error, ApiError):
            advice = _advice(error, self.kind)
            code = error.reason or "Refused"
            return Problem(resource, f"the API server refused to {doing} {resource}: {error}{advice}", code)
        return Problem(resource, str(error), "BrokenWatch" if doing == "watch" else "BrokenList")

    def _note(self, doing: Doing) -> None:
        if doing != self.doing:
            new_problem = doing.problem != self.doing.problem
            self.doing = doing
            self._told()
            if new_problem:
                self._outbox.wake()


def _is_before(version: str, other: str | None) -> bool:
    """Whether one resourceVersion is older than the other; False where they are no numbers."""
    if not other or not (version.isascii() and version.isdigit() and other.isascii() and other.isdigit()):
        return False
    return int(version) < int(other)


def _alike(one: Problem, other: Problem) -> bool:
    """Whether they say the same but for the verb, of the same thing."""
    return one.subject == other.subject and one.reason.replace("watch", "list") == other.reason.replace("watch", "list")


def _advice(error: ApiError, kind: Kind) -> str:
    """What to do about it, if anything can be done on this side."""
    if error.status == _FORBIDDEN:
        group = f" in API group {kind.group}" if kind.group else ""
        return f"; give the ServiceAccount list and watch on {kind.resource}{group}"
    if error.status == _NOT_FOUND:
        return f"; this server has no {kind.path}: is it a Kubernetes API server?"
    return ""
