"""HTTP to the API server, wherever it is now, as whoever we are now.

Rules of this file: one request is one attempt at each address, in turn, beginning with the one that last worked; what
is repeated later, and when, is the caller's. An address is passed over when no connection comes about or when what
answers there is no API server; then nothing has been asked, so even a write may go on to the next. Anything later ends
the request, and only the next one begins elsewhere.

Credentials are looked at before each request and after a 401: a token's file is read once a minute and at once after a
401, everything else is resolved anew when its files have changed, shortly before it expires, and after a 401. Where
that fails, what there was stays in use.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

from urllib3.connection import HTTPConnection

from ebpflb import __version__
from ebpflb.errors import EbpflbError
from ebpflb.source.kube import ApiError, Unreachable
from ebpflb.source.kube.access import Address, Resolves
from ebpflb.source.kube.connections import Connections, Live
from ebpflb.source.kube.reach import Reach
from ebpflb.source.kube.reasons import Answer, not_an_api_server, refusal, unreachable, why
from ebpflb.source.kube.reply import BROKEN, CLOSED, HttpReply

log = logging.getLogger("ebpflb.api")

USER_AGENT = f"ebpflb/{__version__} (linux/{platform.machine()})"

_RENEW_SECONDS = 10.0
_BEFORE_EXPIRY = 30.0
_MOST_ERROR_BODY = 1 << 16


class _NotAsked(Exception):
    """No API server was asked at this address."""


class _Request(NamedTuple):
    """One request, as it is the same at every address."""

    method: str
    path: str
    query: str
    body: bytes | None
    headers: Mapping[str, str]
    timeout: float
    stream: bool


class _Stale(Exception):
    """A connection that had been kept turned out to be closed."""


class HttpClient:
    """A `Client`. `resolver` says how to reach the server and as whom; `clock` counts seconds from anywhere, `now` is
    the time of day in seconds since the epoch. `told` hears of every request at every address, from any thread: method,
    host, status (None if there was no answer), seconds until the answer began (None for a stream). Nothing is resolved
    or opened before the first request."""

    def __init__(
        self,
        resolver: Resolves,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        told: Callable[[str, str, int | None, float | None], None] = lambda method, host, status, seconds: None,
    ) -> None:
        self._resolver = resolver
        self._told = told
        self._clock = clock
        self._now = now
        self._live = Live()
        self._state: Reach | None = None
        self._resolving = threading.Lock()
        self._resolved_at = 0.0
        self._attempts = 0
        self._trouble = ""

    # ---- The protocol ----

    def get(self, path: str, query: Mapping[str, str], *, timeout: float, stream: bool = False) -> HttpReply:
        headers = {} if stream else {"Accept-Encoding": "gzip"}
        return self._request(_Request("GET", path, urlencode(query), None, headers, timeout, stream))

    def send(self, method: str, path: str, body: bytes, *, content_type: str, timeout: float) -> bytes:
        headers = {"Content-Type": content_type}
        with self._request(_Request(method, path, "", body, headers, timeout, False)) as reply:
            return reply.read()

    def close(self) -> None:
        self._live.end()
        state = self._state
        if state is not None:
            state.close()

    # ---- One request ----

    def _request(self, request: _Request) -> HttpReply:
        state = self._ready()
        token = state.token.text()
        try:
            return self._in_turn(state, request, token)
        except ApiError as error:
            if error.status != 401:
                raise
            renewed = self._after_401(state, token)
            if renewed is None:
                if self._trouble:
                    raise ApiError(401, error.reason, f"{error}; {self._trouble}") from None
                raise
        return self._in_turn(renewed, request, renewed.token.text())

    def _in_turn(self, state: Reach, request: _Request, token: str) -> HttpReply:
        reasons: list[tuple[Address, str]] = []
        for index, place in state.in_turn():
            if self._live.ended:
                raise Unreachable(CLOSED)
            try:
                reply = self._measured(state, place, request, token)
            except _NotAsked as error:
                reasons.append((place.address, str(error)))
                state.failed(index, at_once=True)
                continue
            except Unreachable:
                state.failed(index, at_once=True)
                raise
            except ApiError as error:
                if error.status >= 500:
                    state.failed(index, at_once=False)
                else:
                    state.worked(index)
                raise
            state.worked(index)
            return reply
        raise Unreachable(CLOSED if self._live.ended else unreachable(reasons))

    def _measured(self, state: Reach, place: Connections, request: _Request, token: str) -> HttpReply:
        """As `_ask`, for whoever wants to know how it went."""
        began = self._clock()
        status: int | None = None
        try:
            reply = self._ask(state, place, request, token)
            status = reply.status
            return reply
        except ApiError as error:
            status = error.status
            raise
        finally:
            host = urlsplit(place.address.url).netloc
            self._told(request.method, host, status, None if request.stream else self._clock() - began)

    def _ask(self, state: Reach, place: Connections, request: _Request, token: str) -> HttpReply:
        """The answer at one address. Raises _NotAsked, Unreachable, ApiError."""
        connection = place.idle()
        if connection is not None:
            try:
                return self._exchange(state, place, connection, request, token)
            except _Stale:
                pass
        try:
            connection = place.connect()
        except BROKEN as error:
            raise _NotAsked(why(error, place.address, state.access)) from None
        return self._exchange(state, place, connection, request, token, fresh=True)

    def _exchange(
        self,
        state: Reach,
        place: Connections,
        connection: HTTPConnection,
        request: _Request,
        token: str,
        *,
        fresh: bool = False,
    ) -> HttpReply:
        """Ask on this connection. Raises _Stale where the same may be asked again on a fresh one."""
        reply = HttpReply(place, connection, self._live, lambda error: why(error, place.address, state.access))
        try:
            connection.timeout = request.timeout
            connection.request(
                request.method,
                place.target(request.path, request.query),
                body=request.body,
                headers=self._headers(state, place, request, token),
                preload_content=False,
            )
            response = connection.getresponse()
        except BROKEN as error:
            reply.close()
            if not fresh and request.method == "GET" and not isinstance(error, TimeoutError):
                # It was closed by the server just as it was about to be used.
                raise _Stale from None
            raise self._broken(place.address, why(error, place.address, state.access)) from None
        except BaseException:
            reply.close()
            raise
        reply.begin(response)
        if 200 <= response.status < 300 and not response.headers.get("Content-Type", "").startswith("text/html"):
            return reply
        with reply:
            answer = Answer(response.status, response.headers, reply.some(_MOST_ERROR_BODY))
        misplaced = not_an_api_server(answer, place.address)
        if misplaced is not None:
            raise _NotAsked(misplaced)
        raise refusal(answer, state.access, token, self._now())

    def _broken(self, address: Address, reason: str) -> Unreachable:
        return Unreachable(CLOSED if self._live.ended else unreachable([(address, reason)]))

    def _headers(self, state: Reach, place: Connections, request: _Request, token: str) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": USER_AGENT, **place.headers(), **request.headers}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        elif state.access.authorization:
            headers["Authorization"] = state.access.authorization
        return headers

    # ---- Who we are ----

    def _ready(self) -> Reach:
        """How things are, resolved anew if that is due."""
        if self._live.ended:
            raise Unreachable(CLOSED)
        state = self._state
        if state is None or self._is_due(state):
            return self._resolve(state)
        return state

    def _is_due(self, state: Reach) -> bool:
        if self._clock() - self._resolved_at < _RENEW_SECONDS:
            return False
        access = state.access
        if access.renewable and access.expires is not None and self._now() >= access.expires - _BEFORE_EXPIRY:
            return True
        return self._resolver.changed()

    def _after_401(self, state: Reach, token: str) -> Reach | None:
        """What to try once more with; None if there is nothing else."""
        if self._state is not state and self._state is not None:
            return self._state  # another thread had the same answer before
        if state.access.token_file:
            state.token.read()
        if state.token.text() != token:
            return state
        if state.access.anonymous or self._clock() - self._resolved_at < _RENEW_SECONDS:
            return None
        renewed = self._resolve(state)
        return renewed if renewed is not state else None

    def _resolve(self, state: Reach | None) -> Reach:
        """Resolve anew, one thread at a time; whoever has something to go on with does not wait for it. Those who
        waited have the answer that they waited for, be it a failure."""
        attempts = self._attempts
        if not self._resolving.acquire(blocking=state is None):
            assert state is not None
            return state
        try:
            if self._state is not state and self._state is not None:
                return self._state
            if self._attempts == attempts:
                self._attempt(state)
            if self._state is None:
                raise Unreachable(self._trouble)
            return self._state
        finally:
            self._resolving.release()

    def _attempt(self, state: Reach | None) -> None:
        """One look at how things are; what cannot be had is `_trouble`."""
        trouble = ""
        try:
            access = self._resolver.resolve()
            if state is None or access != state.access:
                self._replace(state, Reach(access, self._live, self._clock))
        except EbpflbError as error:
            trouble = str(error)
            if state is not None and trouble != self._trouble:
                log.warning("%s; what there was before stays in use", trouble)
        self._attempts += 1
        self._resolved_at = self._clock()
        self._trouble = trouble

    def _replace(self, old: Reach | None, new: Reach) -> None:
        self._state = new
        if old is not None:
            new.prefer(old.current)
            old.close()
        if not new.access.verify:
            log.warning("the API server's certificate is not verified, as the kubeconfig demands")
        if self._live.ended:
            new.close()
