"""The Kubernetes API as a source: what its parts ask of each other.

Rules of this package: `access` and `credentials` know who we are and how the server is to be believed, `client` speaks
HTTP, `listwatch` and `source` turn lists and watches into events, `events` writes Kubernetes Events. The official
`kubernetes` package is imported by `credentials` alone, which runs as a child process: it costs 30 MB.

This file: the protocols between them and their errors; nothing here does I/O. Every text of an error is one line and
stable: it holds no counter, no time and no port of ours, because each change of a text is a line in the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Protocol, Self

from ebpflb.errors import SourceError


class ApiError(SourceError):
    """An API server answered, and the answer is no.

    `status` is the HTTP status (of a Status object inside a stream, its `code`), `reason` the Status' reason in
    Kubernetes' CamelCase ("Expired", "Forbidden", "Gone"; "" if the answer was no Status), `retry_after` seconds that
    the server asks us to wait, None if it asks for none.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


class Unreachable(SourceError):
    """No API server answered, at none of the addresses, or the connection broke; names each address and why."""


class Reply(Protocol):
    """An answer whose status was 2xx; a context manager that closes itself. For one thread, except `Client.close`."""

    def read(self) -> bytes:
        """The whole body, decompressed. Raises Unreachable if it is cut."""

    def lines(self) -> Iterator[bytes]:
        """The body's lines as they arrive, without their ends, empty ones left out. Ends normally where the server
        ends the body properly. Raises Unreachable on a cut, when nothing came for `timeout` seconds, and once the
        client is closed."""

    def close(self) -> None:
        """Give the connection back, or close it if the body has not been read to its end. May be called again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Client(Protocol):
    """Requests to the API server, wherever it is now. Any thread may call any method."""

    def get(self, path: str, query: Mapping[str, str], *, timeout: float, stream: bool = False) -> Reply:
        """GET `path` ("/api/v1/services"), with `query` to be encoded. `timeout` bounds, in seconds, the wait for the
        answer and each silence inside the body; `stream` says that the body is to be read as it arrives (a watch).
        Raises ApiError, Unreachable."""

    def send(self, method: str, path: str, body: bytes, *, content_type: str, timeout: float) -> bytes:
        """A request that writes, and the body of its answer. Raises ApiError, Unreachable. It is repeated at another
        address only where the first cannot have seen it."""

    def close(self) -> None:
        """End every read in progress promptly: it raises Unreachable. Every later request does so at once."""
