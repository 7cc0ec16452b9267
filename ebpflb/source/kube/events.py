"""Notices written to the API server as Events (events.k8s.io/v1), by a thread of its own.

Rules of this file: posting never blocks and never fails. What waits is bounded: a Notice that waits already is counted
and not queued again, and where there are too many the oldest goes, and is counted. What is written is bounded by a
token bucket. One that was written becomes a series when it happens again. A server that cannot be reached keeps
everything waiting; one that forbids Events is asked again rarely, and the log has one line for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from random import random as real_random

import msgspec

from ebpflb.errors import SourceError
from ebpflb.model import ServiceName
from ebpflb.source.kube import ApiError, Client
from ebpflb.source.kube.event_objects import Notice, event_of, name_of, namespace_of, series_of

log = logging.getLogger("ebpflb.events")

_JSON = "application/json"
_MERGE_PATCH = "application/merge-patch+json"

_TIMEOUT = 10.0
_MOST_WAITING = 1000
_MOST_SERIES = 1000
_FIRST_RETRY = 1.0
_LONGEST_RETRY = 60.0
_FORBIDDEN_RETRY = 600.0
_JOIN_SECONDS = 0.25
_NO_TIME = 1e-6  # what sums of fractions differ by


class _Meta(msgspec.Struct):
    uid: str = ""


class _Object(msgspec.Struct):
    metadata: _Meta


class _List(msgspec.Struct):
    """A list of anything, as much as we read."""

    items: list[_Object] = []


class _Waiting:
    """A Notice that is to be written: how often it happened since it last was, and when (the time of day)."""

    __slots__ = ("count", "first", "last", "name")

    def __init__(self, now: float) -> None:
        self.count = 1
        self.first = self.last = now
        self.name = ""  # of its Event, once that has been tried: a repeated attempt must not make a second one


class _Series(msgspec.Struct, frozen=True):
    """An Event that has been written: its name, and how often it happened."""

    name: str
    count: int


class _Dropped(Exception):
    """This Notice will never be written."""


class Bucket:
    """A token bucket: `burst` at once, `qps` a second in the long run."""

    def __init__(self, qps: float, burst: int, now: float) -> None:
        self._qps = max(qps, 0.01)
        self._burst = max(float(burst), 1.0)
        self._tokens = self._burst
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 if there is one."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._qps)
        self._at = now
        return max(0.0, (1.0 - self._tokens) / self._qps)

    def take(self) -> None:
        self._tokens -= 1.0


class EventSender:
    """Writes Notices to the API server. `clock` counts seconds from anywhere, `now` is the time of day in seconds since
    the epoch, `random` gives [0, 1)."""

    def __init__(
        self,
        client: Client,
        node_name: str,
        *,
        qps: float,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        random: Callable[[], float] = real_random,
    ) -> None:
        self._client = client
        self._node = node_name
        self._clock = clock
        self._now = now
        self._random = random
        self._bucket = Bucket(qps, burst, clock())
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Notice, _Waiting] = OrderedDict()
        self._dropped = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        # Of the thread alone.
        self._series: OrderedDict[Notice, _Series] = OrderedDict()
        self._not_before = 0.0
        self._failures = 0
        self._forbidden = False
        self._overflowing = False
        self._refused = False

    # ---- Any thread ----

    @property
    def dropped(self) -> int:
        """How many Notices were never written, because too many waited or because the server refused them."""
        return self._dropped

    def post(self, notice: Notice) -> None:
        """Have it written, some time. Returns at once."""
        now = self._now()
        with self._changed:
            if self._closed:
                return
            waiting = self._waiting.get(notice)
            if waiting is not None:
                waiting.count += 1
                waiting.last = now
                return
            if len(self._waiting) >= _MOST_WAITING:
                self._waiting.popitem(last=False)
                self._dropped += 1
            self._waiting[notice] = _Waiting(now)
            self._changed.notify()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. What still waits is lost. A request under way ends with the client."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    # ---- The thread ----

    def _run(self) -> None:
        while not self._closed:
            self._rest(self.step())

    def _rest(self, wait: float | None) -> None:
        """Until it is time, or until something is posted if `wait` is None."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (wait is None and bool(self._waiting)), timeout=wait)

    def step(self) -> float | None:
        """Write what is due, one Event at most. Returns the seconds until there may be more to do, None for "not
        before something is posted"."""
        now = self._clock()
        with self._changed:
            if not self._waiting:
                self._overflowing = False
                return None
            notice, waiting = next(iter(self._waiting.items()))
            count, last = waiting.count, waiting.last
        self._tell_overflow()
        wait = max(self._not_before - now, self._bucket.wait(now))
        if wait > _NO_TIME:
            return wait
        self._bucket.take()
        try:
            self._write(notice, waiting, count, last)
        except _Dropped as reason:
            with self._changed:
                self._dropped += 1
            log.log(logging.DEBUG if self._refused else logging.WARNING, "an Event was not taken: %s", reason)
            self._refused = True
        except ApiError as error:
            return self._put_off(error, now)
        except SourceError as error:
            return self._back_off(str(error), now)
        except Exception as error:
            # A fault of ours in one Event must not end the thread for all others.
            with self._changed:
                self._dropped += 1
            log.error("an Event could not be written: unexpected %s: %s", type(error).__name__, error)
            log.debug("an Event could not be written", exc_info=True)
        self._settle(notice, waiting, count)
        return 0.0

    def _tell_overflow(self) -> None:
        full = len(self._waiting) >= _MOST_WAITING
        if full and not self._overflowing:
            self._overflowing = True
            log.warning("more Events than can be written: the oldest of %d are left out", _MOST_WAITING)

    def _settle(self, notice: Notice, waiting: _Waiting, count: int) -> None:
        """It is written, or never will be; what happened meanwhile waits on."""
        self._failures = 0
        if self._forbidden:
            self._forbidden = False
            log.info("Events can be written again")
        with self._changed:
            if self._waiting.get(notice) is not waiting:
                return  # it was pushed out
            waiting.count -= count
            waiting.name = ""
            if waiting.count:
                self._waiting.move_to_end(notice)
            else:
                del self._waiting[notice]

    def _put_off(self, error: ApiError, now: float) -> float:
        if error.status == 403:
            if not self._forbidden:
                self._forbidden = True
                log.warning("Events cannot be written, and are not tried again for a while: %s", error)
            return self._later(_FORBIDDEN_RETRY, now)
        if error.retry_after is not None:
            return self._later(min(error.retry_after, _LONGEST_RETRY), now)
        return self._back_off(str(error), now)

    def _back_off(self, reason: str, now: float) -> float:
        # The source says that the server is not there, for all of us.
        log.debug("an Event could not be written: %s", reason)
        wait = min(_LONGEST_RETRY, _FIRST_RETRY * 2 ** min(self._failures, 30)) * (1 - self._random() / 2)
        self._failures += 1
        return self._later(wait, now)

    def _later(self, wait: float, now: float) -> float:
        self._not_before = now + wait
        return wait

    # ---- One Event ----

    def _write(self, notice: Notice, waiting: _Waiting, count: int, last: float) -> None:
        """Raises _Dropped, ApiError, Unreachable."""
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace_of(notice)}/events"
        series = None if notice.everywhere else self._series.get(notice)
        if series is not None:
            total = series.count + count
            if self._patch(f"{path}/{series.name}", total, last):
                self._remember(notice, _Series(series.name, total))
                return
            del self._series[notice]
        waiting.name = waiting.name or name_of(notice, self._node, waiting.first)
        uid = self._uid(notice.about) if notice.about else ""
        self._create(path, event_of(notice, self._node, waiting.name, uid, count, waiting.first, last))
        if not notice.everywhere:
            self._remember(notice, _Series(waiting.name, count))

    def _remember(self, notice: Notice, series: _Series) -> None:
        self._series[notice] = series
        self._series.move_to_end(notice)
        if len(self._series) > _MOST_SERIES:
            self._series.popitem(last=False)

    def _patch(self, path: str, count: int, last: float) -> bool:
        """Whether the Event was still there."""
        body = msgspec.json.encode({"series": series_of(count, last)})
        try:
            self._client.send("PATCH", path, body, content_type=_MERGE_PATCH, timeout=_TIMEOUT)
        except ApiError as error:
            if error.status == 404:
                return False  # Events live for an hour or so
            _raise_if_final(error)
            raise
        return True

    def _create(self, path: str, event: dict[str, object]) -> None:
        try:
            self._client.send("POST", path, msgspec.json.encode(event), content_type=_JSON, timeout=_TIMEOUT)
        except ApiError as error:
            if error.status == 409:
                return  # an attempt of before had arrived after all, or another node said it
            if error.status == 404:
                raise _Dropped(f"its namespace is gone: {error}") from None
            _raise_if_final(error)
            raise

    def _uid(self, service: ServiceName) -> str:
        """By a list, since listing is what we are allowed. "" if it cannot be had."""
        try:
            # From the server's cache, which costs it little but may be behind.
            found = self._listed(service, {"resourceVersion": "0"}) or self._listed(service, {})
        except ValueError:  # a DecodeError or text that is not UTF-8
            return ""
        except ApiError as error:
            if error.status == 403:
                return ""
            raise
        if not found:
            raise _Dropped(f"Service {service} is gone")
        return found[0].metadata.uid

    def _listed(self, service: ServiceName, query: Mapping[str, str]) -> list[_Object]:
        path = f"/api/v1/namespaces/{service.namespace}/services"
        query = {"fieldSelector": f"metadata.name={service.name}", **query}
        with self._client.get(path, query, timeout=_TIMEOUT) as reply:
            return msgspec.json.decode(reply.read(), type=_List).items


def _raise_if_final(error: ApiError) -> None:
    """No later attempt can do better with these."""
    if error.status in (400, 413, 422) or (error.status == 403 and "being terminated" in str(error)):
        raise _Dropped(str(error)) from None
