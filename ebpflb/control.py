"""The daemon's control socket: how `status` asks a running daemon, and how a second daemon is kept out.

Rules of this file: the socket is an abstract UNIX one, so it belongs to the network namespace as the daemon does, and
vanishes with the process; there are no pid, lock or status files. One connection carries one request (a JSON line
`{"wait": SECONDS}`) and one answer (a JSON document, then end of file). A client can make the daemon wait for nothing:
all is non-blocking, bounded in size, number and time.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Callable

import msgspec

from ebpflb.errors import EbpflbError, UserError

NAME = "ebpflb"
_MOST_CLIENTS = 64
_MOST_REQUEST = 4096
_REQUEST_SECONDS = 5.0
# A daemon that is compiling its programs answers late; a stopped one never does.
_PATIENCE_SECONDS = 10.0
_MOST_WAIT = 24 * 3600.0
_RETRY_SECONDS = 0.05


class NotRunning(EbpflbError):
    """No daemon listens in this network namespace."""


class Request(msgspec.Struct, frozen=True):
    """`wait`: seconds to hold the answer back for, unless the first complete sync comes earlier; 0 asks for it now."""

    wait: float = 0.0


def listen(name: str = NAME) -> socket.socket:
    """Take the one place of a daemon in this network namespace. Raises UserError if it is taken."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        server.bind(f"\0{name}")
        server.listen(_MOST_CLIENTS)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                "another ebpflb daemon runs in this network namespace; stop it first, or ask it with `ebpflb status`"
            ) from None
        raise UserError(f"the control socket @{name} cannot be opened: {error.strerror}") from None
    return server


class _Client:
    __slots__ = ("answer", "deadline", "received", "socket", "waiting")

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.socket = connection
        self.deadline = deadline
        self.received = b""
        self.waiting = False
        self.answer = b""


class Control:
    """The server's side, as a worker of the loop. `document` gives the answer; `ready` ends all waiting. `server` is
    closed by whoever opened it."""

    def __init__(
        self,
        server: socket.socket,
        selector: selectors.BaseSelector,
        clock: Callable[[], float],
        document: Callable[[], bytes],
        ready: Callable[[], bool],
    ) -> None:
        self._server = server
        self._selector = selector
        self._clock = clock
        self._document = document
        self._ready = ready
        self._clients: dict[int, _Client] = {}
        selector.register(server, selectors.EVENT_READ, self._accept)

    def due(self) -> float | None:
        return min((client.deadline for client in self._clients.values()), default=None)

    def work(self) -> None:
        """Answer who has waited for what now is, or for long enough; give up on who never asked or never reads."""
        now = self._clock()
        ready = self._ready()
        for client in list(self._clients.values()):
            if client.waiting and (ready or now >= client.deadline):
                self._reply(client)
            elif now >= client.deadline:
                self._drop(client)

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.unregister(self._server)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        if len(self._clients) >= _MOST_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        client = _Client(connection, self._clock() + _REQUEST_SECONDS)
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(client))

    def _receive(self, client: _Client) -> None:
        try:
            chunk = client.socket.recv(_MOST_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        client.received += chunk
        if not chunk or len(client.received) > _MOST_REQUEST or client.waiting:
            self._drop(client)
            return
        if b"\n" not in client.received:
            return
        try:
            request = msgspec.json.decode(client.received.split(b"\n", 1)[0], type=Request)
        except msgspec.MsgspecError:
            self._drop(client)
            return
        if request.wait > 0 and not self._ready():
            client.waiting = True
            client.deadline = self._clock() + min(request.wait, _MOST_WAIT)
        else:
            self._reply(client)

    def _reply(self, client: _Client) -> None:
        client.waiting = False
        client.answer = self._document()
        client.deadline = self._clock() + _REQUEST_SECONDS
        self._selector.modify(client.socket, selectors.EVENT_WRITE, lambda: self._send(client))
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            sent = client.socket.send(client.answer)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        client.answer = client.answer[sent:]
        if not client.answer:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._selector.unregister(client.socket)
        del self._clients[client.socket.fileno()]
        client.socket.close()


def ask(wait: float = 0.0, name: str = NAME, patience: float = _PATIENCE_SECONDS) -> bytes:
    """The status document of the daemon in this network namespace; with `wait`, as soon as its first complete sync is
    in, or after that many seconds. `patience` is how much longer a busy daemon may take. Raises NotRunning."""
    deadline = time.monotonic() + wait
    while True:
        remaining = max(0.0, deadline - time.monotonic())
        try:
            return _ask_once(remaining + patience, remaining, name)
        except TimeoutError:
            raise NotRunning(
                "the ebpflb daemon of this network namespace does not answer; see its log, or try `status --wait 60`"
            ) from None
        except OSError:
            # Not there yet, or on its way out: with `wait`, one may be starting.
            if time.monotonic() >= deadline:
                raise NotRunning(
                    "no ebpflb daemon runs in this network namespace; start it with `ebpflb run`"
                ) from None
        time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def _ask_once(timeout: float, wait: float, name: str) -> bytes:
    """One connection. Raises OSError if nobody listens or answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        client.settimeout(timeout)
        client.connect(f"\0{name}")
        client.sendall(msgspec.json.encode(Request(wait)) + b"\n")
        answer = b""
        while chunk := client.recv(1 << 16):
            answer += chunk
    if not answer:
        raise ConnectionResetError("the daemon closed the connection without an answer")
    return answer
