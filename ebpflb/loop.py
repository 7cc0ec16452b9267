"""The daemon's one loop: waits on descriptors and on time, and calls whoever is concerned.

Rules of this file: it knows nothing of Services. Everything that it calls runs in this one thread, so that nothing of
it needs a lock; what other threads have to say wakes a descriptor. All that is readable is read before any work is
done, so that what came together is done together. The selector and the clock are passed in.
"""

from __future__ import annotations

import logging
import selectors
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

log = logging.getLogger("ebpflb.loop")

# Reading goes before working, but an endless talker must not keep the work from being done.
_MOST_ROUNDS = 64


class Worker(Protocol):
    """Something that has work to do at certain times."""

    def due(self) -> float | None:
        """When `work` should next be called, in the clock's time; None for "not before an event"."""

    def work(self) -> object:
        """Do what is due, if anything is."""


class Dispensable:
    """A Worker whose faults are its own: one is logged, and it is left alone for `pause` seconds."""

    def __init__(self, worker: Worker, clock: Callable[[], float], pause: float = 5.0) -> None:
        self._worker = worker
        self._clock = clock
        self._pause = pause
        self._not_before: float | None = None

    def due(self) -> float | None:
        return self._worker.due() if self._not_before is None else self._not_before

    def work(self) -> None:
        if self._not_before is not None and self._clock() < self._not_before:
            return
        self._not_before = None
        try:
            self._worker.work()
        except Exception as error:
            self._not_before = self._clock() + self._pause
            log.error("%s failed unexpectedly: %s: %s", type(self._worker).__name__, type(error).__name__, error)
            log.debug("%s failed", type(self._worker).__name__, exc_info=True)


class Stop:
    """Whether the daemon has been asked to end; becomes readable when it is, so that a wait ends at once."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.asked = False

    def fileno(self) -> int:
        return self._reader.fileno()

    def ask(self, *_: object) -> None:
        """End the loop after what it is doing now. Safe in a signal handler."""
        self.asked = True
        with suppress(BlockingIOError):  # it is readable already
            self._writer.send(b"\0")

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


@contextmanager
def stop_on_signals(*numbers: signal.Signals) -> Iterator[Stop]:
    """A Stop that these signals ask for, within the block; afterwards they do what they did before."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.close()


def run(
    selector: selectors.BaseSelector,
    workers: Sequence[Worker],
    clock: Callable[[], float],
    stopped: Callable[[], bool],
) -> None:
    """Until `stopped`: read what is readable, then let each worker work, then wait.

    Each descriptor in `selector` has as its data a function without arguments that reads it.
    """
    while not stopped():
        for worker in workers:
            worker.work()
        if stopped():
            return
        wait = _until(workers, clock)
        for _ in range(_MOST_ROUNDS):
            ready = selector.select(wait)
            if not ready:
                break
            for key, _events in ready:
                key.data()
            if stopped():
                return
            wait = 0.0


def _until(workers: Sequence[Worker], clock: Callable[[], float]) -> float | None:
    """Seconds to the first worker's next work, None for ever."""
    times = [time for worker in workers if (time := worker.due()) is not None]
    return max(0.0, min(times) - clock()) if times else None
