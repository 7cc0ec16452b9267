"""An answer's body: whole, or line by line as it arrives.

Rules of this file: everything that can go wrong while a body is read is Unreachable, in words. A body that was read to
its end gives its connection back; any other ends its connection.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import urllib3
from urllib3.connection import HTTPConnection

from ebpflb.source.kube import Unreachable
from ebpflb.source.kube.connections import Connections, Live
from ebpflb.source.kube.reasons import unreachable

# Errors of the libraries below us, besides those of the system. A ValueError is what they make of garbage.
BROKEN = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError)

CLOSED = "the connection to the API server was closed by us"

_CHUNK = 1 << 16


class HttpReply:
    """A `Reply`."""

    def __init__(
        self,
        place: Connections,
        connection: HTTPConnection,
        live: Live,
        words: Callable[[BaseException], str],
    ) -> None:
        self._place = place
        self._connection = connection
        self._live = live
        self._words = words
        self._response: urllib3.HTTPResponse | None = None
        self._socket = connection.sock
        self._whole = False
        self._closed = False
        live.add(self._socket)

    def begin(self, response: urllib3.HTTPResponse) -> None:
        """The head has been read."""
        self._response = response

    @property
    def status(self) -> int | None:
        """Of the answer; None before it has begun."""
        return None if self._response is None else self._response.status

    def read(self) -> bytes:
        # In pieces, because a length that the other side claims is no reason to take so much memory.
        return b"".join(self._pieces())

    def some(self, most: int) -> bytes:
        """The beginning of the body, at most `most` bytes, as far as it can be had."""
        response = self._body()
        try:
            body = response.read(most)
            self._whole = len(body) < most
            return body
        except BROKEN:
            return b""

    def lines(self) -> Iterator[bytes]:
        held: list[bytes] = []
        for data in self._pieces():
            first, *more = data.split(b"\n")
            held.append(first)
            if not more:
                continue
            if line := b"".join(held):
                yield line
            for line in more[:-1]:
                if line:
                    yield line
            held = [more[-1]]
        if line := b"".join(held):
            yield line

    def _pieces(self) -> Iterator[bytes]:
        """The body as it arrives."""
        response = self._body()
        try:
            if response.chunked and response.supports_chunked_reads():
                yield from response.read_chunked(_CHUNK, decode_content=True)
            else:
                while data := response.read1(_CHUNK, decode_content=True):
                    yield data
        except BROKEN as error:
            raise self._broken(error) from None
        if self._live.ended:
            # What was shut looks like an end where nothing marks the end.
            raise Unreachable(CLOSED)
        self._whole = True

    def _body(self) -> urllib3.HTTPResponse:
        if self._response is None or self._closed:
            raise Unreachable(CLOSED)
        return self._response

    def _broken(self, error: BaseException) -> Unreachable:
        if self._live.ended:
            return Unreachable(CLOSED)
        timed_out = isinstance(error, urllib3.exceptions.ReadTimeoutError)
        reason = "nothing came for too long: the connection is dead" if timed_out else self._words(error)
        return Unreachable(unreachable([(self._place.address, reason)]))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._live.discard(self._socket)
        if self._response is not None:
            self._response.close()
        if self._whole:
            self._place.keep(self._connection)
        else:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
