"""Whether this node's Services are kept up to date: /healthz and /livez, in kube-proxy's words.

Rules of this file: the daemon's thread says what happens (Health is an Observer and a Worker of the loop), the HTTP
server's thread asks; what is between them is one immutable state, replaced whole. Ages are of the monotonic clock, so
that a clock that is set neither breaks nor hides anything; the time of day is only shown.

Healthy is who has nothing to do, and who is starting (kube-proxy counts from the moment when it knows enough to sync).
Unhealthy is who has not brought a change into the kernel for `timeout` seconds, or hangs: the loop has not come round,
or a source has shown no life, for `hangs_after` seconds. A server that is out of reach is neither.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from ebpflb.httpd import Handler, Request, Response
from ebpflb.model import Family, Problem
from ebpflb.observer import Attempt
from ebpflb.problems import Found
from ebpflb.source import Event, PutNode, Remembered, Source, Synced

log = logging.getLogger("ebpflb.health")

_HEADERS = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))
_LOOK_SECONDS = 10.0
_LABELS = {Family.IPV4: "IPv4", Family.IPV6: "IPv6"}


class _State(NamedTuple):
    """`updated`: time of day of the last complete sync, or of the start, in nanoseconds. `waiting`: since when a change
    waits for a sync; `failed`: since when one waits that a sync has failed with. `ready`: when there was enough to
    sync with. `idle`: of the source that has shown no life for longest, as it was at `looked`."""

    updated: int
    eligible: bool
    looked: float
    ready: float | None = None
    waiting: float | None = None
    failed: float | None = None
    idle: float = 0.0
    idle_source: str = ""


class Health:
    """The state, and what is answered of it.

    `families` are those in which Services are served. `node_needed`: whether somebody will say what the Node object is,
    so that this node is not eligible for load balancers' traffic before; kube-proxy asks the same of the API server.
    `clock` counts seconds from anywhere, `wall` nanoseconds since the epoch. `on_healthz` and `on_livez` are called
    with the status of each answer, in the server's thread.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        families: Sequence[Family] = (Family.IPV4, Family.IPV6),
        node_needed: bool,
        clock: Callable[[], float],
        wall: Callable[[], int] = time.time_ns,
        timeout: float = 60.0,
        hangs_after: float = 300.0,
        on_healthz: Callable[[int], None] = lambda status: None,
        on_livez: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._sources = tuple(sources)
        self._families = tuple(sorted(families))
        self._clock = clock
        self._wall = wall
        self._timeout = timeout
        self._hangs_after = hangs_after
        self._on_healthz = on_healthz
        self._on_livez = on_livez
        self._silent = {source.name for source in self._sources}  # those without which nothing is served
        self._look_at = clock()
        self._retold: float | None = None
        self._said = ""
        self._state = _State(wall(), not node_needed, clock(), None if self._silent else clock())

    # ---- What the reconciler says ----

    def event(self, event: Event) -> None:
        match event:
            case PutNode(node=node):
                # As kube-proxy: a Node object that is gone was eligible if the last word of it was.
                self._state = self._state._replace(eligible=not node.deleting)
            case Synced(source=source) | Remembered(source=source):
                self._silent.discard(source)
                if not self._silent and self._state.ready is None:
                    self._state = self._state._replace(ready=self._clock())

    def queued(self, at: float) -> None:
        if at != self._retold and self._state.waiting is None:
            self._state = self._state._replace(waiting=at)

    def attempted(self, attempt: Attempt) -> None:
        state = self._state
        if attempt.report.complete:
            # An audit repairs what failed; what came since then has not been looked at.
            waiting = None if attempt.what == "sync" else state.waiting
            self._state = state._replace(updated=self._wall(), waiting=waiting, failed=None)
        elif attempt.queued is not None:
            failed = attempt.queued if state.failed is None else min(state.failed, attempt.queued)
            self._state = state._replace(waiting=None, failed=failed)
            self._retold = attempt.queued

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        """Which problems there are says nothing of health: one Service's is not the node's."""

    # ---- What the loop calls ----

    def due(self) -> float | None:
        """When `work` should next be called, in the clock's time."""
        return self._look_at

    def work(self) -> None:
        """Look whether the sources live; that it is called at all shows that the loop does."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        idle, name = max(((source.condition().idle, source.name) for source in self._sources), default=(0.0, ""))
        self._state = self._state._replace(looked=now, idle=idle, idle_source=name)
        self._say(self.reason())

    def _say(self, reason: str) -> None:
        if reason and not self._said:
            log.error("unhealthy: %s; /healthz and /livez answer 503", reason)
        elif self._said and not reason:
            log.info("healthy again")
        self._said = reason

    def wrong(self) -> tuple[Problem, ...]:
        """Why it is unhealthy, as it was when `work` last looked; () if it was not."""
        return (Problem("health", self._said, "Unhealthy"),) if self._said else ()

    # ---- For any thread ----

    @property
    def healthy(self) -> bool:
        """What health checks of Services mean by it: whatever becomes of the node."""
        return not self.reason()

    def reason(self) -> str:
        """Why it is unhealthy, in one line that stays the same while it is; "" if it is healthy."""
        return self._reason(self._state, self._clock())

    def _reason(self, state: _State, now: float) -> str:
        oldest = min((at for at in (state.waiting, state.failed) if at is not None), default=None)
        if state.ready is not None and oldest is not None and now - max(oldest, state.ready) >= self._timeout:
            return f"changes have not come into the kernel for {self._timeout:g} s"
        if now - state.looked > self._hangs_after:
            return f"the daemon's loop has not come round for {self._hangs_after:g} s"
        if state.idle + now - state.looked > self._hangs_after:
            return f"the source {state.idle_source} has shown no life for {self._hangs_after:g} s"
        return ""

    def healthz(self, request: Request) -> Response:
        """Whether load balancers may send traffic to this node."""
        state = self._state
        response = self._response(state, state.eligible)
        self._on_healthz(response.status)
        return response

    def livez(self, request: Request) -> Response:
        """Whether the daemon works: the same, whatever becomes of the node."""
        response = self._response(self._state, None)
        self._on_livez(response.status)
        return response

    def handlers(self) -> dict[str, Handler]:
        """What the healthz port answers, by path."""
        return {"/healthz": self.healthz, "/livez": self.livez}

    def _response(self, state: _State, eligible: bool | None) -> Response:
        healthy = not self._reason(state, self._clock())
        good = healthy and eligible is not False
        now, updated = _go_time(self._wall()), _go_time(state.updated)
        # Who is well was "updated" just now: so it was before there were any other times in it.
        body: dict[str, object] = {"lastUpdated": now if good else updated, "currentTime": now}
        if eligible is not None:
            body["nodeEligible"] = eligible
        body["healthy"] = healthy
        if self._families:
            body["status"] = {_LABELS[each]: {"lastUpdated": updated, "healthy": healthy} for each in self._families}
        return Response(200 if good else 503, msgspec.json.encode(body), _HEADERS)


def ping(request: Request) -> Response:
    """/healthz of the metrics port: that there is somebody."""
    return Response(200, b"ok", (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")))


def _go_time(nanoseconds: int) -> str:
    """As Go writes a time in JSON: RFC 3339, with as many digits as the fraction needs."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    digits = f".{fraction:09d}".rstrip("0").rstrip(".")
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + digits + "Z"
