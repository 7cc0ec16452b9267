"""From the threads that watch to the loop that reads: a queue with a descriptor, and the names that were said.

Rules of this file: everything is done under one lock, which is held for as long as a page takes to append, never for
I/O or decoding. A name is known from its first Put until its Drop, so that a list can tell what vanished, whoever said
it: a watch, an earlier list, or what was remembered of an earlier run. Nothing remembered replaces what was said live.

What is kept of an object is its name alone: one entry of a dict, whose key the object itself shares.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress

from ebpflb.model import Problem, ServiceName
from ebpflb.source import DropNode, DropService, DropSlice, Event, Remembered, Synced
from ebpflb.source.kube.decode import Kind, Said

_DROPS = (DropService, DropSlice, DropNode)


class _Told:
    """What one kind has said. `names` has for each known object the number of the list that was last going on when it
    was named; `wrong` the same for objects that could not be read, and why."""

    __slots__ = ("complete", "kind", "listing", "names", "wrong")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.names: dict[ServiceName, int] = {}
        self.wrong: dict[ServiceName | None, tuple[int, str]] = {}
        self.listing = 0
        self.complete = False


class Outbox:
    """The queue of the source `source`, which watches `kinds`. Any thread may call any method."""

    def __init__(self, source: str, kinds: Iterable[Kind]) -> None:
        self._source = source
        self._told = {kind.resource: _Told(kind) for kind in kinds}
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._synced = False
        self._saved: float | None = None
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._awake = False
        self._closed = False

    # ---- The loop's side ----

    def fileno(self) -> int:
        """Readable when `take` has something to give, or `wake` was called."""
        return self._descriptor

    def take(self) -> list[Event]:
        """All that was said since the last call, in order."""
        with self._lock:
            if not self._closed:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._descriptor)
            events, self._events = self._events, []
            self._awake = False
        return events

    @property
    def synced(self) -> bool:
        """Whether the first lists of all kinds are complete."""
        return self._synced

    @property
    def remembered(self) -> float | None:
        """When what is said was saved (seconds since the epoch), if it is only remembered."""
        return None if self._synced else self._saved

    def problems(self) -> list[Problem]:
        """The objects that cannot be read now."""
        with self._lock:
            return [
                Problem(
                    f"{told.kind.kind} {_text(told.kind, name)}" if name else told.kind.resource,
                    f"cannot be read: {reason}" + ("; what it was before stays in force" if name in told.names else ""),
                    "Unreadable",
                )
                for told in self._told.values()
                for name, (_, reason) in told.wrong.items()
            ]

    def close(self) -> None:
        """Release the descriptor; what is said later goes nowhere."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._descriptor)

    # ---- The threads' side ----

    def wake(self) -> None:
        """Make the loop look, at problems for instance."""
        with self._lock:
            self._wake()

    def begin(self, kind: Kind) -> None:
        """A list of `kind` begins, from its first object."""
        with self._lock:
            self._told[kind.resource].listing += 1

    def put(self, kind: Kind, all_said: Iterable[Said]) -> None:
        """What a page or a line says. Objects that go without having been known are left out."""
        told = self._told[kind.resource]
        names, wrong, number = told.names, told.wrong, told.listing
        with self._lock:
            news = False
            for name, event, reason in all_said:
                if event is None or name is None:
                    wrong[name] = (number, reason)
                    if name in names:
                        names[name] = number
                    news = True
                    continue
                if name in wrong:
                    del wrong[name]
                    news = True
                if not isinstance(event, _DROPS):
                    names[name] = number
                elif names.pop(name, None) is None:
                    continue
                self._events.append(event)
                news = True
            if news:
                self._wake()

    def listed(self, kind: Kind) -> tuple[int, int]:
        """The list of `kind` that began last is complete: what it did not name is gone. How many objects there are,
        and how many have gone."""
        with self._lock:
            told = self._told[kind.resource]
            vanished = [name for name, number in told.names.items() if number != told.listing]
            for name in vanished:
                del told.names[name]
            self._events += map(kind.drop, vanished)
            told.wrong = {name: each for name, each in told.wrong.items() if each[0] == told.listing}
            told.complete = True
            if not self._synced and all(each.complete for each in self._told.values()):
                self._synced = True
                self._events.append(Synced(self._source))
            self._wake()
            return len(told.names), len(vanished)

    def remember(self, saved: float, events: Mapping[str, Iterable[tuple[ServiceName, Event]]]) -> bool:
        """Say what was saved at `saved`, by resource, of kinds whose first list is not complete; and then Remembered.
        Whether there was still a use for it."""
        with self._lock:
            if self._synced or self._closed:
                return False
            for resource, told in self._told.items():
                if told.complete:
                    continue
                for name, event in events.get(resource, ()):
                    if name not in told.names:
                        # One that is there and cannot be read stays what it is remembered to be.
                        told.names[name] = told.wrong[name][0] if name in told.wrong else 0
                        self._events.append(event)
            self._saved = saved
            self._events.append(Remembered(self._source, saved))
            self._wake()
            return True

    def _wake(self) -> None:
        if not self._awake and not self._closed:
            self._awake = True
            os.eventfd_write(self._descriptor, 1)


def _text(kind: Kind, name: ServiceName) -> str:
    return str(name) if kind.namespaced else name.name
