"""The connections of clients: what is read, what is sent, and who has to go.

Rules of this file: one thread, non-blocking sockets, the selector and the clock passed in. Everything that a client can
make grow is bounded: how many connections there are (the one that has been idle longest goes first, so that a prober
gets in whatever others do), how long a request may take to come and its answer to be taken, how much of either is held.
No client's fault, and no fault of ours in answering one, concerns another.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable, Hashable
from email.utils import formatdate
from typing import NamedTuple

from ebpflb.httpd.exchange import Exchange, Handler

log = logging.getLogger("ebpflb.http")

_PIECE = 16 * 1024
_ANSWERS_A_TURN = 8


class Limits(NamedTuple):
    """`connections`: at most so many at once. `request_seconds`: for a request to come, from when it could, and again
    for its answer to be taken. `idle_seconds`: between requests; longer than probers pause."""

    connections: int = 512
    request_seconds: float = 10.0
    idle_seconds: float = 180.0


class Client:
    """One connection. `unsent` is what the kernel did not take yet of the answer that is going out."""

    __slots__ = ("draining", "events", "exchange", "owner", "socket", "unsent")

    def __init__(self, sock: socket.socket, owner: Hashable, exchange: Exchange) -> None:
        self.socket = sock
        self.owner = owner
        self.exchange = exchange
        self.unsent: bytes | memoryview = b""
        self.draining = False
        self.events = selectors.EVENT_READ


class Clients:
    """All connections. Each is in `selector` with its Client as data: call `attend` when it is ready, and `expire` at
    the latest after `patience` seconds."""

    def __init__(self, selector: selectors.BaseSelector, clock: Callable[[], float], limits: Limits) -> None:
        self._selector = selector
        self._clock = clock
        self._limits = limits
        # By deadline, the first to pass first: each of the two has one patience for all.
        self._busy: dict[Client, float] = {}
        self._idle: dict[Client, float] = {}
        self._date_at = 0
        self._date_text = ""

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle)

    def take(self, sock: socket.socket, owner: Hashable, handler: Handler) -> None:
        """A new connection, non-blocking; whoever is too many goes for it."""
        if len(self) >= self._limits.connections:
            self._drop(next(iter(self._idle or self._busy)))
        client = Client(sock, owner, Exchange(handler, self._date))
        self._selector.register(sock, client.events, client)
        self._busy[client] = self._clock() + self._limits.request_seconds

    def drop_idlest(self) -> bool:
        """Make room by one that nobody is waiting for; False if there is none."""
        if not self._idle:
            return False
        self._drop(next(iter(self._idle)))
        return True

    def drop_of(self, owner: Hashable) -> None:
        """End all connections of `owner`."""
        for client in [client for client in (*self._busy, *self._idle) if client.owner == owner]:
            self._drop(client)

    def drop_all(self) -> None:
        """End them all."""
        for client in [*self._busy, *self._idle]:
            self._drop(client)

    def patience(self) -> float | None:
        """Seconds to the first deadline; None if there is none."""
        firsts = [next(iter(waiting.values())) for waiting in (self._busy, self._idle) if waiting]
        return max(0.0, min(firsts) - self._clock()) if firsts else None

    def expire(self) -> None:
        """End those whose time is up."""
        now = self._clock()
        for waiting in (self._busy, self._idle):
            while waiting:
                client, deadline = next(iter(waiting.items()))
                if deadline > now:
                    break
                self._drop(client)

    def attend(self, client: Client, events: int) -> None:
        """Do what can be done now that the socket is ready."""
        if client.socket.fileno() < 0:
            return  # it was dropped since the selector said so
        try:
            if events & selectors.EVENT_READ:
                self._read(client)
            elif client.unsent:
                self._send(client, client.unsent)
            self._answer(client)
        except OSError:
            self._drop(client)  # the client went away
        except Exception as error:
            log.error("a client was not answered: %s: %s", type(error).__name__, str(error).replace("\n", " "))
            log.debug("a client was not answered", exc_info=True)
            self._drop(client)

    def _read(self, client: Client) -> None:
        try:
            data = client.socket.recv(_PIECE)
        except BlockingIOError:
            return
        if client.draining:
            if not data:
                raise ConnectionResetError
            return
        if data and client in self._idle:
            self._busy_from_now(client)
        client.exchange.receive(data)

    def _answer(self, client: Client) -> None:
        """Answer what can be answered now, and say what is waited for then."""
        answered = 0
        while not client.unsent and not client.draining and answered < _ANSWERS_A_TURN:
            answer = client.exchange.answer()
            if not answer:
                break
            answered += 1
            self._send(client, answer)
        if client.unsent or answered == _ANSWERS_A_TURN:
            # In the second case it is writable: its turn comes again after everybody else's.
            self._await(client, selectors.EVENT_WRITE)
        elif client.exchange.ended:
            self._finish(client)
            return
        else:
            self._await(client, selectors.EVENT_READ)
        if answered:
            self._rest(client)

    def _send(self, client: Client, data: bytes | memoryview) -> None:
        try:
            sent = client.socket.send(data)
        except BlockingIOError:
            sent = 0
        client.unsent = memoryview(data)[sent:] if sent < len(data) else b""

    def _rest(self, client: Client) -> None:
        """An answer is made: what comes next has its own time."""
        if client.unsent or not client.exchange.idle:
            self._busy_from_now(client)
        else:
            self._busy.pop(client, None)
            self._idle.pop(client, None)
            self._idle[client] = self._clock() + self._limits.idle_seconds

    def _busy_from_now(self, client: Client) -> None:
        self._busy.pop(client, None)
        self._idle.pop(client, None)
        self._busy[client] = self._clock() + self._limits.request_seconds

    def _finish(self, client: Client) -> None:
        if client.draining:
            return
        if not client.exchange.rude:
            self._drop(client)
            return
        # Closed with bytes unread, the kernel would send a reset, which can overtake our answer.
        client.draining = True
        client.socket.shutdown(socket.SHUT_WR)
        self._await(client, selectors.EVENT_READ)

    def _await(self, client: Client, events: int) -> None:
        if client.events != events:
            client.events = events
            self._selector.modify(client.socket, events, client)

    def _drop(self, client: Client) -> None:
        self._busy.pop(client, None)
        self._idle.pop(client, None)
        self._selector.unregister(client.socket)
        client.socket.close()

    def _date(self) -> str:
        now = int(time.time())
        if now != self._date_at:
            self._date_at, self._date_text = now, formatdate(now, usegmt=True)
        return self._date_text
