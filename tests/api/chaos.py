"""A proxy between clients and the API server that spoils what passes.

Rules of this file: it ends TLS with a certificate of its own, so that it can also answer itself; tokens pass, client
certificates do not. What it does wrong is set from any thread and holds from the next byte on. All of it is one thread.

    cut()               every connection is reset now
    refusing = True     new connections are reset, too
    swallowing = True   half-open: what either side sends goes nowhere, and no connection ends
    delay = 0.2         seconds by which each piece of an answer is late
    budget = 1000       bytes of answers that each connection may still carry; it is reset in the middle of the next
    answer = answer_of(429, {"Retry-After": "1"})   each request is answered by this, and the server sees none of them
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from types import TracebackType

from tests.api.authority import Identity

PIECE = 65_536


def answer_of(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> bytes:
    """An HTTP answer."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Connection:
    """A client, the server's end of it, and how many bytes of answers it has carried."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client, self.server = client, server
        self.carried = 0

    def abort(self) -> None:
        for writer in (self.client, self.server):
            writer.transport.abort()


class ChaosProxy:
    """See the top of this file. `listener` is bound already, in whatever network namespace; it is closed with this
    object. `port` is the API server's on this machine's loopback. `requests` counts what it answered itself."""

    def __init__(self, listener: socket.socket, identity: Identity, port: int) -> None:
        self.refusing = False
        self.swallowing = False
        self.delay = 0.0
        self.answer: bytes | None = None
        self.requests = 0
        self.accepted = 0
        self.port: int = listener.getsockname()[1]
        self._budget: int | None = None
        self._listener = listener
        self._target = port
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(identity.certificate, identity.key)
        self._behind = ssl.create_default_context()
        self._behind.check_hostname = False  # whom it speaks to is not what is tested
        self._behind.verify_mode = ssl.CERT_NONE
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos proxy", daemon=True)

    def __enter__(self) -> ChaosProxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    # ---- What it does wrong ----

    @property
    def budget(self) -> int | None:
        return self._budget

    @budget.setter
    def budget(self, size: int | None) -> None:
        asyncio.run_coroutine_threadsafe(self._set_budget(size), self._loop).result(10)

    async def _set_budget(self, size: int | None) -> None:
        self._budget = size
        for connection in self._connections:
            connection.carried = 0

    def cut(self) -> None:
        """Reset every connection, before this returns."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    def behave(self) -> None:
        """Nothing is wrong any more. What was swallowed has left gaps, so connections of then are cut."""
        if self.swallowing:
            self.cut()
        self.refusing = self.swallowing = False
        self.delay, self.budget, self.answer = 0.0, None, None

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._connections)

    # ---- The thread ----

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._loop.set_exception_handler(lambda loop, context: None)  # connections die here, which is no news
        self._listener.setblocking(False)
        # Not a Server: one that closes forgets sockets that it has only just accepted or that are in their handshake.
        self._loop.add_reader(self._listener, self._accept)
        self._ready.set()
        await self._over.wait()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        await self._cut()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)  # transports close their sockets in the next rounds

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):  # the client went away again
            client, _ = self._listener.accept()
            client.setblocking(False)
            task = self._loop.create_task(self._connected(client))
            self._tasks.add(task)
            task.add_done_callback(partial(self._done, client))

    def _done(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        client.close()

    async def _cut(self) -> None:
        for connection in tuple(self._connections):
            connection.abort()

    async def _connected(self, client: socket.socket) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, client, ssl=self._tls)
        except OSError:
            return  # the client went away in its handshake
        self.accepted += 1
        try:
            if not self.refusing:
                await self._carry(reader, asyncio.StreamWriter(transport, protocol, reader, self._loop))
        finally:
            transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind, server = await asyncio.open_connection("127.0.0.1", self._target, ssl=self._behind)
        except OSError:
            return  # no server: the client's connection ends, too
        connection = _Connection(writer, server)
        if self.refusing:  # since a moment ago
            connection.abort()
            return
        self._connections.add(connection)
        ways = (
            self._loop.create_task(self._asks(reader, connection)),
            self._loop.create_task(self._answers(behind, connection)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._connections.discard(connection)
            connection.abort()

    async def _asks(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        with suppress(OSError):
            while piece := await reader.read(PIECE):
                if self.swallowing:
                    continue
                if self.answer is not None:  # nobody pipelines: what comes now is a request
                    self.requests += 1
                    connection.client.write(self.answer)
                    await connection.client.drain()
                    continue
                connection.server.write(piece)
                await connection.server.drain()

    async def _answers(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        with suppress(OSError):
            while piece := await reader.read(PIECE):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.swallowing:
                    continue
                left = None if self._budget is None else self._budget - connection.carried
                connection.carried += len(piece)
                connection.client.write(piece if left is None else piece[: max(left, 0)])
                await connection.client.drain()
                if left is not None and left < len(piece):
                    return
