"""Keeps the last good snapshot on disk up to date while the daemon runs.

Rules of this file: only what a live source says is saved, and only after something new was said. Saving happens in a
thread, on an immutable Snapshot; the loop asks `due` and calls `work`, neither of which blocks. It is an Observer for
being told of news, and does nothing else with what it is told.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ebpflb.errors import SourceError
from ebpflb.model import Problem, Snapshot
from ebpflb.source import Event
from ebpflb.source.kube import lastgood

log = logging.getLogger("ebpflb.kubernetes")


class Keeper:
    """Saves what `snapshot` gives to `path`, at most every `every` seconds, and not before news have had `settle`
    seconds for more to come. `live` is whether what is said is true now. `clock` counts seconds from anywhere, `now`
    since the epoch."""

    def __init__(
        self,
        path: str,
        *,
        snapshot: Callable[[], Snapshot],
        live: Callable[[], bool],
        clock: Callable[[], float],
        now: Callable[[], float],
        every: float = 30.0,
        settle: float = 5.0,
    ) -> None:
        self._path = path
        self._snapshot = snapshot
        self._live = live
        self._clock = clock
        self._now = now
        self._every = every
        self._settle = settle
        self._not_before = clock()
        self._news_at: float | None = None  # when the oldest news came that is not saved
        self._thread: threading.Thread | None = None
        self._wrong = ""  # why the last attempt to save failed

    # ---- What the loop calls ----

    def due(self) -> float | None:
        """When the next snapshot is to be saved; None before there are news."""
        return None if self._news_at is None else max(self._not_before, self._news_at + self._settle)

    def work(self) -> None:
        """Begin to save, if it is time."""
        due, now = self.due(), self._clock()
        if due is None or now < due:
            return
        self._not_before = now + self._every
        if self._live() and not self._is_busy():
            self._news_at = None
            self._thread = threading.Thread(target=self._save, args=self._taken(), name="snapshot", daemon=True)
            self._thread.start()

    def wrong(self) -> tuple[Problem, ...]:
        """Why what is served now would not be known after a start without the API server."""
        return (Problem("snapshot", self._wrong, "NotSaved"),) if self._wrong else ()

    def wait(self) -> None:
        """Wait for the end of what is being saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Save what is not saved yet. To be called while the source is still open, or it is not live any more."""
        self.wait()
        if self._news_at is not None and self._live():
            self._news_at = None
            self._save(*self._taken())
            if self._wrong:
                log.warning("%s", self._wrong)  # nobody will ask any more

    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _taken(self) -> tuple[Snapshot, float]:
        return self._snapshot(), self._now()

    def _save(self, snapshot: Snapshot, saved: float) -> None:
        try:
            lastgood.save(self._path, snapshot, saved=saved)
        except SourceError as error:
            self._wrong = f"{error}; a start without the API server would serve what was saved before, if anything was"
            if self._news_at is None:
                self._news_at = self._clock()  # what was not saved is news still
        else:
            self._wrong = ""

    # ---- What the reconciler tells ----

    def event(self, event: Event) -> None:
        """A source said something new."""
        if self._news_at is None:
            self._news_at = self._clock()

    def queued(self, at: float) -> None:
        """Nothing to do."""

    def attempted(self, attempt: object) -> None:
        """Nothing to do."""

    def problems(self, come: object, gone: object) -> None:
        """Nothing to do."""
