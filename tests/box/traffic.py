"""Clients that never stop asking, while a test does something else.

Rules of this file: every answer is kept with its time, so that a test says afterwards what it tolerates.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from ebpflb.demo.cluster import Place
from tests.box.clients import PATIENCE, Answer, Clients, Nothing, Target
from tests.box.servers import ROOM, SO_RCVBUFFORCE
from tests.pace import PACE

PAUSE = 0.002  # seconds between two questions: many, but not all that this machine can do


class World(Protocol):
    """Whatever has places, and clients there."""

    clients: Clients

    def place(self, name: str) -> Place:
        """By its name."""


class Traffic:
    """New connections from one place to one target, one after the other, until the block ends."""

    def __init__(self, world: World, client: str, to: Target, protocol: str) -> None:
        self.what = f"{client} -> {to}/{protocol}"
        self.got: list[tuple[float, Answer | Nothing]] = []
        self._ask: Callable[[], Answer | Nothing] = lambda: world.clients.ask(world.place(client), to, protocol)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.what, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def wait_for(self, more: int, seconds: float = 3 * PATIENCE) -> None:
        """Until that many more questions have been answered or have failed."""
        enough = len(self.got) + more
        deadline = time.monotonic() + seconds
        while len(self.got) < enough:
            assert time.monotonic() < deadline, f"{self.what}: {len(self.got)} questions, waited for {enough}"
            time.sleep(0.001)

    @property
    def failures(self) -> Counter[str]:
        """What came instead of answers, and how often."""
        return Counter(str(got) for _, got in self.got if isinstance(got, Nothing))

    @property
    def success(self) -> float:
        """The part of all questions that was answered."""
        return 1 - sum(self.failures.values()) / len(self.got)

    def _run(self) -> None:
        while not self._over.wait(PAUSE):
            self.got.append((time.monotonic(), self._ask()))


class Stream:
    """Datagrams from one place at a steady pace, each answered by its backend; `lost` are those that were not."""

    def __init__(self, world: World, client: str, to: Target, pause: float = 0.001) -> None:
        self._conversation = world.clients.converse(world.place(client), to, "UDP")
        self._conversation.socket.settimeout(0.1 * PACE)
        self._conversation.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
        self._pause = pause
        self._over = threading.Event()
        self._all_sent = threading.Event()
        self._seen: set[int] = set()
        self.sent = 0
        self.servers: set[str] = set()
        self._sending = threading.Thread(target=self._send, daemon=True)
        self._receiving = threading.Thread(target=self._receive, daemon=True)

    def __enter__(self) -> Stream:
        self._sending.start()
        self._receiving.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sending.join()
        self._deadline = time.monotonic() + PATIENCE
        self._all_sent.set()  # not before: how many there are is known only now
        self._receiving.join()
        self._conversation.close()

    def wait_for(self, more: int) -> None:
        """Until that many more have been sent."""
        enough, deadline = self.sent + more, time.monotonic() + 3 * PATIENCE
        while self.sent < enough:
            assert time.monotonic() < deadline, f"{self.sent} sent, waited for {enough}"
            time.sleep(0.001)

    @property
    def lost(self) -> list[int]:
        """Their numbers; to be asked after the block."""
        return sorted(set(range(self.sent)) - self._seen)

    def _send(self) -> None:
        while not self._over.wait(self._pause):
            self._conversation.socket.send(b"%d" % self.sent)
            self.sent += 1

    def _receive(self) -> None:
        """Until every one has been answered, or those that are missing have had an answer's time."""
        while not self._all_sent.is_set() or (len(self._seen) < self.sent and time.monotonic() < self._deadline):
            try:
                line, _, number = self._conversation.socket.recv(2048).partition(b"\n")
            except TimeoutError:
                continue
            self._seen.add(int(number))
            self.servers.add(line.split()[0].decode())
