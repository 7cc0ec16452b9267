"""One connection's HTTP/1.1 without the connection: bytes in, answers out.

Rules of this file: no sockets, no clock but the Date header's, no knowledge of Services. h11 does the protocol; here it
is decided what is refused, and what happens between requests. One answer at a time is made, when the one before it has
been sent, so that a client that asks for much at once and reads nothing costs one answer. A request's body is read and
dropped: nothing here has a use for one.
"""

from __future__ import annotations

import http
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote

import h11

log = logging.getLogger("ebpflb.http")

_MOST_HEAD = 16 * 1024
_MOST_BODY = 64 * 1024
_PLAIN = (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff"))


class Request(NamedTuple):
    """What was asked: `path` with %xx decoded, `query` (what follows "?") as it came, `headers` by lower-case name."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


class Response(NamedTuple):
    """What is answered. Date, Content-Length and Connection are the server's to add; the answer to HEAD is that to GET,
    whose body the server leaves out."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


Handler: TypeAlias = Callable[[Request], Response]

NOT_FOUND = Response(404, b"404 page not found\n", _PLAIN)
"""As kube-proxy's servers answer for a path that they do not know."""


def routed(handlers: Mapping[str, Handler]) -> Handler:
    """One handler made of several, each for one exact path; 404 for every other path."""
    table = dict(handlers)

    def dispatch(request: Request) -> Response:
        handler = table.get(request.path)
        return NOT_FOUND if handler is None else handler(request)

    return dispatch


class Exchange:
    """The server's side of one connection. `date` gives the Date header's value.

    `receive` takes what came, `answer` gives what is to be sent, until it has nothing more. `ended`: when what
    `answer` gave has been sent, the connection is over; `rude`: and then the client may still be sending.
    """

    __slots__ = ("_body", "_connection", "_date", "_handler", "_request", "ended", "rude")

    def __init__(self, handler: Handler, date: Callable[[], str]) -> None:
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD)
        self._handler = handler
        self._date = date
        self._request: h11.Request | None = None
        self._body = 0
        self.ended = False
        self.rude = False

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has come yet."""
        return self._request is None and not self._connection.trailing_data[0]

    def receive(self, data: bytes) -> None:
        """Take in bytes; b"" is the end of what the client sends."""
        self._connection.receive_data(data)

    def answer(self) -> bytes:
        """The answer to the next request that is whole; b"" if there is none yet, or the connection has ended."""
        if self.ended:
            return b""
        try:
            return self._next()
        except h11.RemoteProtocolError as error:
            return self._refuse(error.error_status_hint)

    def _next(self) -> bytes:
        while True:
            event = self._connection.next_event()
            if isinstance(event, h11.Request):
                self._request, self._body = event, 0
                if event.method == b"CONNECT":
                    return self._refuse(405)
                if self._connection.they_are_waiting_for_100_continue:
                    return self._respond(event, over=True)  # whose body would be dropped
            elif isinstance(event, h11.Data):
                self._body += len(event.data)
                if self._body > _MOST_BODY:
                    return self._refuse(413)
            elif isinstance(event, h11.EndOfMessage):
                assert self._request is not None  # h11's order of events
                return self._respond(self._request)
            else:
                self.ended = isinstance(event, h11.ConnectionClosed)
                return b""

    def _respond(self, asked: h11.Request, *, over: bool = False) -> bytes:
        try:
            response = self._handler(_request(asked))
        except Exception as error:
            response = _failed(asked, error)
        try:
            sent = self._written(response, asked.method == b"HEAD", over)
        except Exception as error:  # it cannot be written as HTTP
            _failed(asked, error)
            return self._refuse(500)
        self._request = None
        if self._connection.our_state is h11.DONE and self._connection.their_state is h11.DONE:
            self._connection.start_next_cycle()
        else:
            self.ended = True
            self.rude = over or not self.idle
        return sent

    def _refuse(self, status: int) -> bytes:
        """An answer after which nothing more is understood."""
        self.ended = self.rude = True
        if self._connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        return self._written(_plain(status), self._asked_head(), over=True)

    def _asked_head(self) -> bool:
        return self._request is not None and self._request.method == b"HEAD"

    def _written(self, response: Response, head_only: bool, over: bool) -> bytes:
        headers = [*response.headers, ("Date", self._date())]
        bodiless = response.status in (204, 304)
        if not bodiless:
            headers.append(("Content-Length", str(len(response.body))))
        if over:
            headers.append(("Connection", "close"))
        # All of it is made before any of it counts: h11 has no way back from half an answer.
        reason = http.HTTPStatus(response.status).phrase
        event = h11.Response(status_code=response.status, headers=headers, reason=reason)
        parts = [self._connection.send(event)]
        if not head_only and not bodiless:
            parts.append(self._connection.send(h11.Data(data=response.body)))
        parts.append(self._connection.send(h11.EndOfMessage()))
        return b"".join(part for part in parts if part)


def _plain(status: int) -> Response:
    return Response(status, f"{status} {http.HTTPStatus(status).phrase}\n".encode(), _PLAIN)


def _failed(asked: h11.Request, error: Exception) -> Response:
    """A fault of ours in answering: a line for the operator, and as little as possible for the client."""
    target = asked.target.decode("latin-1")
    log.error("answering %s failed: %s: %s", target, type(error).__name__, str(error).replace("\n", " "))
    log.debug("answering %s failed", target, exc_info=True)
    return _plain(500)


def _request(event: h11.Request) -> Request:
    target = event.target.decode("latin-1")
    if not target.startswith("/") and "://" in target:
        # A proxy's form, with the server's name in front.
        target = "/" + target.split("://", 1)[1].partition("/")[2]
    path, _, query = target.partition("?")
    headers: dict[str, str] = {}
    for name, value in event.headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return Request(event.method.decode("latin-1"), unquote(path), query, headers)
