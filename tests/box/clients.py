"""Clients: one question from somewhere to somewhere, and what came of it.

Rules of this file: every question ends within its patience; whatever the kernel says becomes a value, so that a test
compares values and prints them when they differ.
"""

from __future__ import annotations

import errno
import itertools
import socket
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from ebpflb.demo.cluster import Place
from tests.box.sockets import Sockets, family_of
from tests.pace import PACE

PATIENCE = 10.0 * PACE  # for an answer that is expected
_FRESH_PORTS = range(36_000, 61_000)  # above the node ports


class Target(NamedTuple):
    """Where a question goes."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Answer(NamedTuple):
    """A server's name, whom it saw asking, at which address of its own, and what else it said."""

    server: str
    source: str
    port: int
    own: str
    body: bytes = b""

    def __str__(self) -> str:
        return f"{self.server} (saw {self.source})"


class Nothing(NamedTuple):
    """No answer, and how that showed: `refused`, `silence`, `reset`, `not permitted`, or the kernel's word for it."""

    how: str

    def __str__(self) -> str:
        return self.how


_TOTAL_RETRANS = 100  # where tcp_info's tcpi_total_retrans is, of 32 bits


def _repetitions(made: socket.socket) -> int:
    """How often the kernel has sent a TCP segment of this socket again."""
    found: int = struct.unpack_from("=I", made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), _TOTAL_RETRANS)[0]
    return found


def about(line: bytes, body: bytes = b"") -> Answer:
    """What a server's line says."""
    server, source, port, own = line.decode().split()
    return Answer(server, source, int(port), own, body)


class Belated(ConnectionRefusedError):
    """Refused, but not the first time that the kernel asked."""


class Conversation:
    """A socket that has a peer: a TCP connection, or UDP with one partner. Errors are OSErrors."""

    def __init__(self, made: socket.socket, to: Target, patience: float = PATIENCE) -> None:
        self.socket = made
        made.settimeout(patience)
        self._buffer = b""
        self._stream = made.type == socket.SOCK_STREAM
        try:
            made.connect(to)
        except ConnectionRefusedError as error:
            with made:
                repeated = _repetitions(made) if self._stream else 0
            raise Belated(error.errno, f"refused when asked {repeated + 1} times") if repeated else error from None
        except BaseException:
            made.close()
            raise

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def ask(self, body: bytes = b"who?") -> Answer:
        """One question and its answer."""
        if not self._stream:
            self.socket.send(body)
            line, _, rest = self.socket.recv(65_535).partition(b"\n")
            return about(line, rest)
        self.socket.sendall(body + b"\n")
        return about(self._line(), self._line()[:-1])

    def send(self, body: bytes) -> tuple[Answer, str]:
        """Send these bytes; returns the server's line, and the SHA-256 of what it received."""
        self.socket.sendall(f"take {len(body)}\n".encode() + body)
        return about(self._line()), self._line().decode().strip()

    def fetch(self, size: int) -> bytes:
        """That many bytes of `pattern`."""
        self.socket.sendall(f"give {size}\n".encode())
        self._line()
        found = bytearray(self._buffer)
        self._buffer = b""
        while len(found) < size:
            piece = self.socket.recv(1 << 18)
            if not piece:
                raise ConnectionResetError("closed in the middle")
            found += piece
        return bytes(found)

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            piece = self.socket.recv(65_536)
            if not piece:
                raise ConnectionResetError("closed before its answer")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"


class Clients:
    """Asks from any place."""

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets
        self._ports: dict[str, Iterator[int]] = {}

    def fresh_port(self, place: Place) -> int:
        """A port that nothing of this place has used for long. A datagram from a port of its own is a flow of its own:
        the kernel's choice now and then repeats one, which then rightly goes on as it was before the last change."""
        return next(self._ports.setdefault(place.name, itertools.cycle(_FRESH_PORTS)))

    def converse(
        self, place: Place, to: Target, protocol: str, *, port: int = 0, patience: float = PATIENCE
    ) -> Conversation:
        """A conversation from `place` and its port `port`; 0: the kernel's choice, or a fresh one for UDP. A port whose
        last connection to the same peer is still closing is waited for, as long as `patience`: the kernel gives it out
        again when the peer has acknowledged the end. Raises OSError."""
        deadline = time.monotonic() + patience
        while True:
            made = self._bound(place, to, protocol, port)
            try:
                return Conversation(made, to, patience)
            except OSError as error:
                if not port or error.errno != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _bound(self, place: Place, to: Target, protocol: str, port: int) -> socket.socket:
        made = self.sockets.make(place, family_of(to.address), protocol)
        try:
            if port:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(("", port))
            elif protocol == "UDP":
                made.bind(("", self.fresh_port(place)))
        except BaseException:
            made.close()
            raise
        return made

    def ask(
        self, place: Place, to: Target, protocol: str, *, port: int = 0, patience: float = PATIENCE,
        body: bytes = b"who?",
    ) -> Answer | Nothing:  # fmt: skip
        """One question by a socket of its own; whatever comes of it."""
        try:
            with self.converse(place, to, protocol, port=port, patience=patience) as conversation:
                return conversation.ask(body)
        except OSError as error:
            return outcome(error)


def outcome(error: OSError) -> Nothing:
    """What an error says. A refusal counts only if it answers the first packet: a client that has to ask again has been
    kept waiting. (A clock would tell the machine's pauses, too.)"""
    if isinstance(error, Belated):
        return Nothing(str(error))
    if isinstance(error, ConnectionRefusedError):
        return Nothing("refused")
    if isinstance(error, TimeoutError):  # also ETIMEDOUT, which the socket path gives at once
        return Nothing("silence")
    if isinstance(error, PermissionError):
        return Nothing("not permitted")
    if isinstance(error, ConnectionResetError):
        return Nothing("reset")
    return Nothing(f"{type(error).__name__}: {error}")
