"""Echo servers in pods and on nodes, over TCP and UDP, that say who they are and whom they see.

Rules of this file: all servers live in one thread of the test process; their sockets belong to their places. A server
binds one address, so that an answer from anywhere else would be noticed.

    UDP   any datagram           one line about it, then the datagram itself
    TCP   a line                 one line about it, then that line
          bye                    closed by the server
          take <n>\\n <n bytes>   one line about it, then their SHA-256
          give <n>\\n             one line about it, then n bytes of `pattern`

The line is "<server> <source address> <source port> <own address>".
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from types import TracebackType
from typing import Any

from ebpflb.demo.cluster import Place
from tests.box.sockets import Sockets, family_of

CHUNK = 1 << 18
PATIENCE = 60.0  # seconds; for our own thread to do what it is asked
# Room for what comes while this process waits for a processor. More than the machine's limit, as root may have it.
SO_RCVBUFFORCE, ROOM = 33, 4 << 20


def pattern(size: int) -> bytes:
    """Bytes that repeat at no power of two, so that a lost, doubled or swapped segment changes their hash."""
    period = b"".join(number.to_bytes(3, "big") for number in range(65_537))
    return (period * (size // len(period) + 1))[:size]


class Servers:
    """The thread; `serve` adds servers, `stop` takes one down. All end with this object."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="servers", daemon=True)
        self._stops: dict[tuple[str, int], list[Any]] = {}

    def __enter__(self) -> Servers:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def serve(self, place: Place, port: int, name: str | None = None) -> None:
        """Serve both protocols on all addresses of `place`, before this returns."""
        made = []
        for address in place.addresses:
            for protocol in ("TCP", "UDP"):
                listener = self._sockets.make(place, family_of(address), protocol)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setblocking(False)
                listener.bind((address, port))
                if protocol == "TCP":
                    listener.listen(512)
                else:
                    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
                made.append(listener)
        work = self._serve(name or place.name, made)
        stops = asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)
        self._stops.setdefault((place.name, port), []).extend(stops)

    def stop(self, place: str, port: int) -> None:
        """No more of this server: the port is closed and its connections are reset."""
        stops = self._stops.pop((place, port))
        asyncio.run_coroutine_threadsafe(self._close(stops), self._loop).result(PATIENCE)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _serve(self, name: str, listeners: list[socket.socket]) -> list[Any]:
        stops: list[Any] = []
        for listener in listeners:
            if listener.type == socket.SOCK_STREAM:
                stops.append(_Streams(name, listener))
            else:
                transport, _ = await self._loop.create_datagram_endpoint(lambda: _Datagrams(name), sock=listener)
                stops.append(transport)
        return stops

    async def _finish(self) -> None:
        for stops in self._stops.values():
            await self._close(stops)
        self._stops.clear()

    async def _close(self, stops: list[Any]) -> None:
        for stop in stops:
            if isinstance(stop, _Streams):
                await stop.aclose()
            else:
                stop.close()
        await asyncio.sleep(0)  # a transport closes its socket in the next round


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, name: str) -> None:
        self._name = name

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport
        self._own = transport.get_extra_info("sockname")[0]

    def datagram_received(self, data: bytes, source: tuple[Any, ...]) -> None:
        self._transport.sendto(_about(self._name, source, self._own) + data, source)

    def error_received(self, error: Exception) -> None:
        """A client has gone before its answer came: its own matter."""


class _Streams:
    """A listening socket, and a task for each connection."""

    def __init__(self, name: str, listener: socket.socket) -> None:
        self._name = name
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[socket.socket] = set()
        self._accepting = self._loop.create_task(self._accept())

    async def aclose(self) -> None:
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._open):  # whose task was cancelled before it began
            self._close(connection, reset=True)
        self._listener.close()

    async def _accept(self) -> None:
        while True:
            await self._readable(self._listener)
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the client has gone meanwhile
                continue
            connection.setblocking(False)
            self._open.add(connection)
            task = self._loop.create_task(self._answer(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: socket.socket) -> None:
        reset = True
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            about = _about(self._name, connection.getpeername(), connection.getsockname()[0])
            while line := await self._line(connection):
                verb, _, size = line.decode().strip().partition(" ")
                if verb == "bye":
                    break
                if verb == "take":
                    body = (await self._digest(connection, int(size))).encode() + b"\n"
                elif verb == "give":
                    body = pattern(int(size))
                else:
                    body = line
                await self._loop.sock_sendall(connection, about + body)
            reset = False
        except OSError:
            pass  # the client has gone: what it missed is its own to notice
        finally:
            self._close(connection, reset)

    def _close(self, connection: socket.socket, reset: bool) -> None:
        if reset:  # a server that dies under its connection resets it
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        self._open.discard(connection)

    async def _line(self, connection: socket.socket) -> bytes:
        """Up to the end of a line and no further: what follows may be the body of a `take`."""
        line = b""
        while not line.endswith(b"\n"):
            seen = await self._peek(connection)
            size = seen.find(b"\n") + 1 or len(seen)
            if not size:
                return b""
            line += connection.recv(size)
        return line

    async def _peek(self, connection: socket.socket) -> bytes:
        while True:
            try:
                return connection.recv(256, socket.MSG_PEEK)
            except BlockingIOError:
                await self._readable(connection)

    async def _readable(self, of: socket.socket) -> None:
        readable = self._loop.create_future()
        self._loop.add_reader(of, readable.set_result, None)
        try:
            await readable
        finally:
            self._loop.remove_reader(of)

    async def _digest(self, connection: socket.socket, size: int) -> str:
        digest = hashlib.sha256()
        while size:
            piece = await self._loop.sock_recv(connection, min(size, CHUNK))
            if not piece:
                raise ConnectionResetError
            digest.update(piece)
            size -= len(piece)
        return digest.hexdigest()


def _about(name: str, source: tuple[Any, ...], own: str) -> bytes:
    return f"{name} {source[0]} {source[1]} {own}\n".encode()
