"""How a list comes: streamed, or in pages.

Rules of this file: a list goes to the outbox as it comes, so that no more than a page of it is ever held; only its end
is told by returning. A list is streamed (a watch that begins with all that exists) where the server knows how, because
that costs the server least; else, and after a streaming list that failed, it comes in pages. What a server does not
know is not asked of it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from ebpflb.errors import SourceError
from ebpflb.source.kube import ApiError, Client, Reply, decode
from ebpflb.source.kube.decode import Kind, Said
from ebpflb.source.kube.outbox import Outbox

log = logging.getLogger("ebpflb.kubernetes")

_BAD_REQUEST, _GONE, _INVALID = 400, 410, 422

# Objects of a streaming list that leave together.
_TOGETHER = 200


class Timing(msgspec.Struct, frozen=True):
    """All in seconds but `page`, the objects in one page of a list.

    `answer` bounds each silence of a list; `silence` that of a watch, where a bookmark comes once a minute. The server
    is asked to end a watch after `watch_least` to `watch_most`, so that watches spread over servers again.
    A failed attempt is repeated after `retry_first`, then twice as long each time up to `retry_most`, each wait
    shortened at random by up to half; longer if the server asks for that, up to `retry_asked`. A watch that lived for
    `proven` has worked.
    """

    page: int = 500
    answer: float = 30.0
    silence: float = 130.0
    watch_least: float = 300.0
    watch_most: float = 600.0
    retry_first: float = 0.2
    retry_most: float = 30.0
    retry_asked: float = 60.0
    proven: float = 1.0


class Lists:
    """Lists of `kind`. `alive` is called for each sign of life that the server gives."""

    def __init__(
        self,
        kind: Kind,
        client: Client,
        outbox: Outbox,
        *,
        alive: Callable[[], None],
        random: Callable[[], float],
        timing: Timing,
    ) -> None:
        self._kind = kind
        self._client = client
        self._outbox = outbox
        self._alive = alive
        self._random = random
        self._timing = timing
        self._fields = kind.fields
        self._streams = True  # the server may know streaming lists
        self._in_pages = False  # the last streaming list failed

    def all(self) -> str:
        """All that exists goes to the outbox; the resourceVersion that this is complete at. Raises SourceError."""
        while True:
            streaming = self._streams and not self._in_pages
            self._outbox.begin(self._kind)
            self._in_pages = streaming  # until it has worked
            try:
                version = self._streamed() if streaming else self._paged()
            except ApiError as error:
                if not self._asked_too_much(error, streaming):
                    raise
                self._in_pages = False
            else:
                self._in_pages = False
                return version

    def version(self) -> str:
        """The resourceVersion that a list would have now. Raises SourceError."""
        return self._page(self.query(limit="1")).version

    def query(self, **more: str) -> dict[str, str]:
        """What to ask with: the selectors, as far as the server knows them, and `more`."""
        query = {"labelSelector": self._kind.labels, "fieldSelector": self._fields, **more}
        return {key: value for key, value in query.items() if value}

    def _asked_too_much(self, error: ApiError, streaming: bool) -> bool:
        """Give up what this server does not know: a field to select by, or streaming lists. Whether there was any."""
        if error.status not in (_BAD_REQUEST, _INVALID):
            return False
        has_field = self._kind.fields_optional and bool(self._fields)
        if has_field and ("field label" in str(error) or "field selector" in str(error)):
            self._fields = ""
        elif streaming:
            self._streams = False
        elif has_field and error.status == _BAD_REQUEST:
            self._fields = ""
        else:
            return False
        log.debug("%s: the server does not know all that it was asked for: %s", self._kind.resource, error)
        return True

    def _streamed(self) -> str:
        """A streaming list; the resourceVersion that it is complete at."""
        query = self.query(
            watch="true",
            sendInitialEvents="true",
            resourceVersionMatch="NotOlderThan",
            allowWatchBookmarks="true",
            timeoutSeconds=watch_seconds(self._timing, self._random),
        )
        batch: list[Said] = []
        with self._get(query, self._timing.answer, stream=True) as reply:
            for data in reply.lines():
                self._alive()
                match decode.line(self._kind, data):
                    case decode.Change(said=said):
                        batch.append(said)
                        if len(batch) == _TOGETHER:
                            self._outbox.put(self._kind, batch)
                            batch = []
                    case decode.Bookmark(version=version, initial=True):
                        self._outbox.put(self._kind, batch)
                        return version
                    case decode.Failure() as failure:
                        raise refusal(failure)
        raise SourceError(f"the streaming list of {self._kind.resource} ended before it was complete")

    def _paged(self) -> str:
        """A list in pages; its resourceVersion. Where its tokens expire twice, it is asked for in one piece."""
        token, version, expired = "", "", 0
        while True:
            query = self.query()
            if expired < 2:
                query["limit"] = str(self._timing.page)
            if token:
                query["continue"] = token
            try:
                page = self._page(query)
            except ApiError as error:
                if error.status != _GONE or not token:
                    raise
                token, version, expired = "", "", expired + 1
                self._outbox.begin(self._kind)
                continue
            self._outbox.put(self._kind, page.said)
            version = version or page.version
            if not version:
                raise SourceError(f"the list of {self._kind.resource} has no resourceVersion")
            if not page.more:
                return version
            token = page.more

    def _page(self, query: dict[str, str]) -> decode.Page:
        with self._get(query, self._timing.answer) as reply:
            data = reply.read()
        self._alive()
        return decode.page(self._kind, data)

    def _get(self, query: dict[str, str], timeout: float, *, stream: bool = False) -> Reply:
        return self._client.get(self._kind.path, query, timeout=timeout, stream=stream)


def watch_seconds(timing: Timing, random: Callable[[], float]) -> str:
    """How long to ask for a watch to last."""
    return str(int(timing.watch_least + (timing.watch_most - timing.watch_least) * random()))


def refusal(failure: decode.Failure) -> ApiError:
    """The error that a stream ended with, as if it had come in place of an answer."""
    return ApiError(failure.code, failure.reason, failure.message, failure.retry_after)
