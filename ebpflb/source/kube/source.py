"""The API server as a source: three lists and watches in threads, and one stream of events out of them.

Rules of this file: the loop's thread calls `read`, `problems` and `condition`, which never block; everything else runs
in threads of its own, which end when the source closes. `Synced` is said once, when the first lists of all kinds are
complete. Where they are not in time, what was saved of an earlier run is said first, closed by `Remembered`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from ebpflb.errors import SourceError
from ebpflb.model import Problem, ServiceName
from ebpflb.source import Condition, Event, PutNode, PutService, PutSlice, SourceState
from ebpflb.source.kube import Client, decode
from ebpflb.source.kube.lastgood import Saved
from ebpflb.source.kube.lists import Timing
from ebpflb.source.kube.listwatch import ListWatch
from ebpflb.source.kube.outbox import Outbox

log = logging.getLogger("ebpflb.kubernetes")

NAME = "kubernetes"

HANGS_AFTER = 300.0
"""Seconds of `Condition.idle` after which a thread hangs: twice what a watch or a wait may be silent, and some."""

# Seconds that closing waits for all the threads, which are daemons: who hangs is left behind.
_GOODBYE = 2.0


def _no_memory() -> Saved | None:
    return None


class KubeSource:
    """Services, EndpointSlices and the Node `node_name`, as `client` gives them; it closes the client with itself.

    `clock` counts seconds from anywhere, `now` since the epoch, `random` gives [0, 1). `recall` gives what was saved of
    an earlier run (None if there is nothing; raises SourceError if it is of no use); it is asked if the first lists are
    not complete after `patience` seconds, or as soon as an attempt has failed. A source that has lost the server for
    longer than `grace` seconds is stale.
    """

    name = NAME

    def __init__(
        self,
        client: Client,
        node_name: str,
        *,
        clock: Callable[[], float],
        now: Callable[[], float],
        random: Callable[[], float],
        recall: Callable[[], Saved | None] = _no_memory,
        patience: float = 3.0,
        grace: float = 5.0,
        timing: Timing | None = None,
    ) -> None:
        self._client = client
        self._clock = clock
        self._now = now
        self._recall = recall
        self._patience = patience
        self._grace = grace
        self._proven = (timing or Timing()).proven
        kinds = (decode.SERVICES, decode.SLICES, decode.node(node_name))
        self._outbox = Outbox(NAME, kinds)
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._watches = [
            ListWatch(
                kind, client, self._outbox, stop=self._stop, clock=clock, random=random, born=now(), timing=timing,
                told=self._look,
            )
            for kind in kinds
        ]  # fmt: skip
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # of the next three
        self._state = SourceState.STARTING
        self._since = now()
        self._no_recall = ""

    # ---- What the loop calls ----

    def fileno(self) -> int:
        """Readable when `read` has something to say, or `problems` has."""
        return self._outbox.fileno()

    def read(self) -> list[Event]:
        """All that is new. The first call starts the lists."""
        if not self._threads and not self._stop.is_set():
            self._start()
        return self._outbox.take()

    def problems(self) -> tuple[Problem, ...]:
        """Why the server cannot be read, and which of its objects cannot."""
        problems = dict.fromkeys(self._troubles())
        if self._no_recall and not self._outbox.synced:
            problems[Problem("snapshot", self._no_recall, "NoSnapshot")] = None
        return (*problems, *self._outbox.problems())

    def _troubles(self) -> list[Problem]:
        """What is wrong with each kind's list or watch now."""
        now = self._clock()
        found = [each.doing.trouble(now, self._proven) for each in self._watches]
        return [each for each in found if each is not None]

    def condition(self) -> Condition:
        """How the worst of the three is doing."""
        self._look()
        now = self._clock()
        all_doing = [each.doing for each in self._watches]
        broken = [each for each in all_doing if each.broken is not None or not each.listed]
        times = [each.retry_at for each in broken if each.retry_at is not None]
        with self._lock:
            state, since = self._state, self._since
        return Condition(
            state,
            since,
            next((each.reason for each in self._troubles()), ""),
            max((each.failures for each in broken), default=0),
            max(0.0, min(times) - now) if times else None,
            max(0.0, now - min(each.alive for each in self._watches)) if self._threads else 0.0,
        )

    def close(self) -> None:
        """End the threads, and close the client."""
        self._stop.set()
        self._hurry.set()
        self._client.close()
        latest = time.monotonic() + _GOODBYE
        for thread in self._threads:
            thread.join(max(0.0, latest - time.monotonic()))
        self._outbox.close()

    # ---- Threads ----

    def _start(self) -> None:
        now = self._clock()
        for watch in self._watches:
            watch.alive = now
            self._spawn(watch.kind.resource, watch.run)
        self._spawn("recall", self._remember)

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"{NAME}-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _look(self) -> None:
        """Take note of the state that we are in now, and of what hurries the memory. Any thread calls this."""
        all_doing = [each.doing for each in self._watches]
        if self._outbox.synced or any(each.failures for each in all_doing):
            self._hurry.set()
        now = self._clock()
        times = [each.broken for each in all_doing if each.broken is not None]
        lost = now - min(times) if times else 0.0
        if not self._outbox.synced:
            state = SourceState.STARTING if self._outbox.remembered is None else SourceState.STALE
        else:
            state = SourceState.STALE if lost > self._grace else SourceState.LIVE
        with self._lock:
            if state is not self._state:
                self._state = state
                # Being lost is found out only when it has lasted.
                self._since = self._now() - (lost if self._outbox.synced else 0.0)

    def _remember(self) -> None:
        """Say what was saved of an earlier run, if the lists are not complete in time."""
        self._hurry.wait(self._patience)
        if self._outbox.synced or self._stop.is_set():
            return
        try:
            saved = self._recall()
        except SourceError as error:
            with self._lock:
                self._no_recall = str(error)
            self._outbox.wake()
            return
        if saved is not None and self._outbox.remember(saved.saved, _by_resource(saved.events)):
            log.warning("the API server has not told all yet: serving what was saved of an earlier run")
            self._look()


def _by_resource(events: Iterable[Event]) -> dict[str, list[tuple[ServiceName, Event]]]:
    """Events that were saved, with the names of their objects."""
    found: dict[str, list[tuple[ServiceName, Event]]] = {}
    for event in events:
        match event:
            case PutService(service=service):
                found.setdefault("services", []).append((service.name, event))
            case PutSlice(slice=each):
                found.setdefault("endpointslices", []).append((each.name, event))
            case PutNode(node=node):
                found.setdefault("nodes", []).append((ServiceName("", node.name), event))
    return found
