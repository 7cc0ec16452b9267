"""Ports that are to be answered on, whatever stands in the way: opened as soon as they can be.

Rules of this file: it knows an HTTP server and no Service. A port that cannot be opened is tried again every few
seconds, and at once when one of ours is closed, whose place it may want; who has waited longest goes first. No port's
trouble concerns another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from ebpflb.httpd import Handler, Listening
from ebpflb.model import Address, Family, Problem

RETRY_SECONDS = 5.0
"""As often as kube-proxy tries again to open its own."""


class Opener(Protocol):
    """What opens ports: `HttpServer`, whose meaning and errors these have."""

    @property
    def failure(self) -> str: ...

    def listen(self, address: Address, port: int, handler: Handler, *, family: Family | None = None) -> Listening: ...

    def close(self, listening: Listening) -> None: ...


class Port(NamedTuple):
    """Where to listen: "" for every address, of `family` alone unless that is None."""

    address: Address
    port: int
    family: Family | None = None

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


Owner = TypeVar("Owner", bound=Hashable)


class _Refused(NamedTuple):
    handler: Handler
    error: OSError


class Ports(Generic[Owner]):
    """The ports that several owners want, each by its name. For the loop's thread, of which it is a Worker."""

    def __init__(self, server: Opener, clock: Callable[[], float], retry: float = RETRY_SECONDS) -> None:
        self._server = server
        self._clock = clock
        self._retry = retry
        self._open: dict[tuple[Owner, Port], Listening] = {}
        self._refused: dict[tuple[Owner, Port], _Refused] = {}  # in the order of asking
        self._again = 0.0
        self._freed = False

    def want(self, owner: Owner, port: Port, handler: Handler) -> None:
        """Answer on `port` from now on, or from when it can be opened. Once for each owner and port."""
        self._try(owner, port, handler)

    def unwant(self, owner: Owner, port: Port) -> None:
        """Answer no more."""
        self._refused.pop((owner, port), None)
        listening = self._open.pop((owner, port), None)
        if listening is not None:
            self._server.close(listening)
            self._freed = True

    def settle(self) -> None:
        """After some `unwant`, before the next `want`: what they have freed goes to who waits."""
        if self._freed and self._refused:
            self._try_again()
        self._freed = False

    def opened(self) -> Iterator[tuple[Owner, Port, Listening]]:
        """What is answered on."""
        for (owner, port), listening in self._open.items():
            yield owner, port, listening

    def refused(self) -> Iterator[tuple[Owner, Port, OSError]]:
        """What cannot be opened, and why."""
        for (owner, port), refusal in self._refused.items():
            yield owner, port, refusal.error

    def wrong(self) -> tuple[Problem, ...]:
        """The same as problems of their owners; and of all of them together, that nobody answers."""
        refused = [
            Problem(str(owner), f"cannot listen on {port}: {error.strerror}; free it or give another", "FailedToListen")
            for owner, port, error in self.refused()
        ]
        failure = self._server.failure
        if failure:
            refused.append(Problem("server", f"{failure}; restart the daemon", "FailedToListen"))
        return tuple(refused)

    def due(self) -> float | None:
        """When `work` should next be called, in the clock's time; None if nothing waits."""
        return self._again if self._refused else None

    def work(self) -> bool:
        """Try again what is due; whether anything was tried."""
        if not self._refused or self._clock() < self._again:
            return False
        self._try_again()
        return True

    def _try_again(self) -> None:
        waiting, self._refused = self._refused, {}
        for (owner, port), refusal in waiting.items():
            self._try(owner, port, refusal.handler)

    def _try(self, owner: Owner, port: Port, handler: Handler) -> None:
        try:
            listening = self._server.listen(port.address, port.port, handler, family=port.family)
        except OSError as error:
            if not self._refused:
                self._again = self._clock() + self._retry
            self._refused[owner, port] = _Refused(handler, error)
        else:
            self._open[owner, port] = listening
