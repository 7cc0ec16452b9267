"""HTTP to whoever asks for health and metrics: requests, responses and who answers them.

Rules of this file: it knows nothing of Services. A handler is a function from a Request to a Response; it runs in the
server's one thread, is quick, and reads only what is immutable or locked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias


class Request(NamedTuple):
    """What was asked: `path` as it came, without the query (what follows "?"), `headers` by lower-case name."""

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

NOT_FOUND = Response(
    404,
    b"404 page not found\n",
    (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")),
)
"""As kube-proxy's servers answer for a path that they do not know."""


def routed(handlers: Mapping[str, Handler]) -> Handler:
    """One handler made of several, each for one exact path; 404 for every other path."""
    table = dict(handlers)

    def dispatch(request: Request) -> Response:
        handler = table.get(request.path)
        return NOT_FOUND if handler is None else handler(request)

    return dispatch
