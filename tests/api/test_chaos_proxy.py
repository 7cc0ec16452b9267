"""The proxy that spoils connections does what it is told, and only that."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.authority import Authority, Identity
from tests.api.chaos import ChaosProxy, answer_of
from tests.api.conftest import loopback_listener

pytestmark = pytest.mark.api

PATIENCE = 30.0


class Echo:
    """A TLS server that sends back what it gets, on any number of connections; `seen` is all that came."""

    def __init__(self, identity: Identity) -> None:
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(identity.certificate, identity.key)
        self._listener = loopback_listener()
        self.port: int = self._listener.getsockname()[1]
        self.seen = b""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Echo:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        answering = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            answering.append(threading.Thread(target=self._answer, args=(connection,), daemon=True))
            answering[-1].start()
        for thread in answering:
            thread.join()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with self._tls.wrap_socket(connection, server_side=True) as secured:
                while piece := secured.recv(65_536):
                    self.seen += piece
                    secured.sendall(piece)
        except OSError:
            connection.close()


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Authority(tmp_path_factory.mktemp("ca")).server("echo", ("127.0.0.1",))


@pytest.fixture
def echo(identity: Identity) -> Iterator[Echo]:
    with Echo(identity) as found:
        yield found


@pytest.fixture
def spoiler(echo: Echo, identity: Identity) -> Iterator[ChaosProxy]:
    with ChaosProxy(loopback_listener(), identity, echo.port) as found:
        yield found


def connect(proxy: ChaosProxy) -> ssl.SSLSocket:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return tls.wrap_socket(socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE))


def receive(connection: ssl.SSLSocket, size: int) -> bytes:
    found = b""
    while len(found) < size and (piece := connection.recv(size - len(found))):
        found += piece
    return found


def exchange(connection: ssl.SSLSocket, words: bytes) -> bytes:
    connection.sendall(words)
    return receive(connection, len(words))


def broken(connection: ssl.SSLSocket) -> bool:
    """Whether this connection has ended, in whatever way."""
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_everything_passes_both_ways(spoiler: ChaosProxy) -> None:
    words = bytes(range(256)) * 1000  # more than a piece, less than the buffers of the kernel
    with connect(spoiler) as connection:
        for _ in range(10):
            assert exchange(connection, words) == words


def test_a_cut_ends_every_connection_and_new_ones_work(spoiler: ChaosProxy) -> None:
    with connect(spoiler) as one, connect(spoiler) as two:
        assert exchange(one, b"a") == exchange(two, b"a") == b"a"
        spoiler.cut()
        assert broken(one) and broken(two)
    with connect(spoiler) as three:
        assert exchange(three, b"b") == b"b"


def test_new_connections_are_refused_while_old_ones_live(spoiler: ChaosProxy) -> None:
    with connect(spoiler) as old:
        assert exchange(old, b"a") == b"a"
        spoiler.refusing = True
        with connect(spoiler) as new:
            assert broken(new)
        assert exchange(old, b"b") == b"b"


def test_half_open_connections_neither_speak_nor_end(spoiler: ChaosProxy, echo: Echo) -> None:
    with connect(spoiler) as connection:
        assert exchange(connection, b"a") == b"a"
        spoiler.swallowing = True
        connection.sendall(b"lost")
        connection.settimeout(0.2)
        assert not broken(connection)
        assert echo.seen == b"a"
        spoiler.behave()
        connection.settimeout(PATIENCE)
        assert broken(connection)


def test_an_answer_is_cut_in_its_middle(spoiler: ChaosProxy) -> None:
    with connect(spoiler) as connection:
        assert exchange(connection, b"before") == b"before"
        spoiler.budget = 4
        connection.sendall(b"truncated")
        assert receive(connection, 4) == b"trun"
        assert broken(connection)


def test_requests_are_answered_by_the_proxy_and_then_again_by_the_server(spoiler: ChaosProxy, echo: Echo) -> None:
    answer = answer_of(429, {"Retry-After": "1"}, b"later")
    with connect(spoiler) as connection:
        spoiler.answer = answer
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert receive(connection, len(answer)) == answer
        assert answer == b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 5\r\nRetry-After: 1\r\n\r\nlater"
        assert (echo.seen, spoiler.requests) == (b"", 1)
        spoiler.behave()
        assert exchange(connection, b"a") == b"a"


def test_a_delay_holds_every_piece(spoiler: ChaosProxy) -> None:
    with connect(spoiler) as connection:
        spoiler.delay = 0.3
        began = time.monotonic()
        connection.sendall(b"slow")
        assert receive(connection, 4) == b"slow"
        assert time.monotonic() - began > 0.29


def test_where_no_server_is_the_connection_ends(identity: Identity, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with ChaosProxy(loopback_listener(), identity, unused.getsockname()[1]) as proxy, connect(proxy) as connection:
            assert broken(connection)
