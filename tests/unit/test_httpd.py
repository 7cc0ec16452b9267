"""One thread, many ports and clients of every kind."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from ebpflb.httpd import Handler, HttpServer, Limits, Request, Response
from ebpflb.model import Family
from tests.fakes import FakeClock

PATIENCE = 30.0
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def saying(text: str) -> Handler:
    return lambda request: Response(200, text.encode())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def server(clock: FakeClock) -> Iterator[HttpServer]:
    made = HttpServer(clock=clock, limits=Limits(connections=4))
    made.start()
    yield made
    made.stop()
    assert not made.alive


class Client:
    """A connection of our own making."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=PATIENCE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, request: bytes = GET) -> bytes:
        """The body of the answer."""
        self.socket.sendall(request)
        answer = http.client.HTTPResponse(self.socket)
        answer.begin()
        return answer.read()

    def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        found = b""
        try:
            while data := self.socket.recv(1 << 16):
                found += data
        except ConnectionResetError:
            pass
        return found


def ask(port: int, host: str = "127.0.0.1") -> bytes:
    """An answer on a connection of its own. The server is done by then with all that others had sent before."""
    with Client(port, host) as client:
        return client.ask()


# ---- Ports ----


def test_each_port_has_its_own_answer(server: HttpServer) -> None:
    ports = [server.listen("127.0.0.1", 0, saying(str(number))) for number in range(50)]
    for number, port in enumerate(ports):
        assert ask(port.port) == str(number).encode()


def test_ports_may_be_opened_before_the_start() -> None:
    made = HttpServer()
    port = made.listen("127.0.0.1", 0, saying("ok"))
    assert not made.alive
    made.start()
    try:
        assert ask(port.port) == b"ok"
        assert made.alive
    finally:
        made.stop()
    made.stop()


def test_a_server_that_never_starts_closes_its_ports() -> None:
    made = HttpServer()
    port = made.listen("127.0.0.1", 0, saying("ok"))
    made.stop()
    with pytest.raises(ConnectionRefusedError):
        ask(port.port)


def test_who_opens_a_port_hears_why_that_fails(server: HttpServer) -> None:
    port = server.listen("127.0.0.1", 0, saying("first"))
    for address, number, wanted in (
        ("127.0.0.1", port.port, errno.EADDRINUSE),
        ("", port.port, errno.EADDRINUSE),
        ("192.0.2.1", 0, errno.EADDRNOTAVAIL),
    ):
        with pytest.raises(OSError) as caught:
            server.listen(address, number, saying("second"))
        assert caught.value.errno == wanted
    assert ask(port.port) == b"first"


@pytest.mark.parametrize("address", ["", "0.0.0.0", "::"])
def test_every_address_is_of_both_families(server: HttpServer, address: str) -> None:
    """As Go listens, and so kube-proxy: the default 0.0.0.0:10256 is reached on a node with IPv6 alone."""
    port = server.listen(address, 0, saying("ok"))
    assert [ask(port.port, host) for host in ("127.0.0.1", "::1")] == [b"ok", b"ok"]


def test_families_apart(server: HttpServer) -> None:
    four = server.listen("", 0, saying("four"), family=Family.IPV4)
    six = server.listen("", four.port, saying("six"), family=Family.IPV6)
    assert six.port == four.port
    assert [ask(four.port, host) for host in ("127.0.0.1", "::1")] == [b"four", b"six"]
    server.close(four)
    with pytest.raises(ConnectionRefusedError):
        ask(four.port)
    assert ask(six.port, "::1") == b"six"


def test_one_address_only(server: HttpServer) -> None:
    port = server.listen("::1", 0, saying("ok"))
    assert (port.address, ask(port.port, "::1")) == ("::1", b"ok")
    with pytest.raises(ConnectionRefusedError):
        ask(port.port)


def test_a_port_can_change_hands_at_once(server: HttpServer) -> None:
    port = server.listen("127.0.0.1", 0, saying("0"))
    for number in range(1, 50):
        server.close(port)
        port = server.listen("127.0.0.1", port.port, saying(str(number)))
        assert ask(port.port) == str(number).encode()


def test_closing_a_port_cuts_its_clients_and_no_others(server: HttpServer) -> None:
    closing, staying = (server.listen("127.0.0.1", 0, saying("ok")) for _ in range(2))
    with Client(closing.port) as cut, Client(staying.port) as kept:
        assert (cut.ask(), kept.ask()) == (b"ok", b"ok")
        server.close(closing)
        server.close(closing)
        assert cut.rest() == b""
        assert kept.ask() == b"ok"


def test_ports_come_and_go_while_clients_ask(server: HttpServer) -> None:
    steady = server.listen("127.0.0.1", 0, saying("ok"))
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.extend(ask(steady.port) for _ in range(100)))
    asking.start()
    while asking.is_alive():
        port = server.listen("127.0.0.1", 0, saying("other"))
        assert ask(port.port) == b"other"
        server.close(port)
    asking.join()
    assert answers == [b"ok"] * 100


# ---- Clients ----


def test_a_client_that_asks_for_much_and_one_that_asks_for_little(server: HttpServer) -> None:
    port = server.listen("127.0.0.1", 0, saying("ok"))
    with Client(port.port) as greedy:
        greedy.socket.sendall(GET * 500)
        assert ask(port.port) == b"ok"
        greedy.socket.shutdown(socket.SHUT_WR)
        assert greedy.rest().count(b"HTTP/1.1 200 OK") == 500


def test_an_answer_that_the_kernel_does_not_take_at_once(server: HttpServer) -> None:
    body = bytes(range(256)) * 40_000
    port = server.listen("127.0.0.1", 0, lambda request: Response(200, body))
    with Client(port.port) as client:
        for _ in range(2):
            assert client.ask() == body


def test_a_bad_request_is_answered_before_the_connection_ends(server: HttpServer) -> None:
    """With bytes unread, closing at once would reset the connection and lose the answer."""
    port = server.listen("127.0.0.1", 0, saying("ok"))
    with Client(port.port) as client:
        client.socket.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000)
        assert client.rest().startswith(b"HTTP/1.1 413 ")


def test_a_client_that_sends_no_request_is_cut(server: HttpServer, clock: FakeClock) -> None:
    port = server.listen("127.0.0.1", 0, saying("ok"))
    with Client(port.port) as silent, Client(port.port) as slow:
        slow.socket.sendall(b"GET / HT")
        ask(port.port)
        clock.advance(Limits().request_seconds - 1)
        slow.socket.sendall(b"TP/1.1\r\n")  # buys no time
        ask(port.port)
        clock.advance(1)
        ask(port.port)
        assert (silent.rest(), slow.rest()) == (b"", b"")


def test_a_client_that_does_not_take_its_answer_is_cut(server: HttpServer, clock: FakeClock) -> None:
    body = b"x" * 50_000_000
    port = server.listen("127.0.0.1", 0, lambda request: Response(200, body))
    other = server.listen("127.0.0.1", 0, saying("ok"))
    with Client(port.port) as lazy:
        lazy.socket.sendall(GET)
        assert lazy.socket.recv(1) == b"H"  # it is on its way
        ask(other.port)
        clock.advance(Limits().request_seconds)
        ask(other.port)
        assert len(lazy.rest()) < len(body)


def test_a_prober_may_pause(server: HttpServer, clock: FakeClock) -> None:
    port = server.listen("127.0.0.1", 0, saying("ok"))
    with Client(port.port) as prober:
        for _ in range(3):
            assert prober.ask() == b"ok"
            ask(port.port)
            clock.advance(Limits().idle_seconds - 1)
            ask(port.port)
        assert prober.ask() == b"ok"
        ask(port.port)
        clock.advance(Limits().idle_seconds)
        ask(port.port)
        assert prober.rest() == b""


def test_the_one_that_has_been_idle_longest_makes_room(server: HttpServer) -> None:
    port = server.listen("127.0.0.1", 0, saying("ok"))
    clients = [Client(port.port) for _ in range(4)]  # as many as there may be
    for client in (clients[2], clients[1], clients[3], clients[0], clients[1]):
        assert client.ask() == b"ok"
    with Client(port.port) as fifth, Client(port.port) as sixth:
        assert (fifth.ask(), sixth.ask()) == (b"ok", b"ok")
        assert (clients[2].rest(), clients[3].rest()) == (b"", b"")
        assert (clients[0].ask(), clients[1].ask()) == (b"ok", b"ok")
    for client in clients:
        client.socket.close()


def test_clients_that_never_ask_keep_no_prober_out(server: HttpServer) -> None:
    port = server.listen("127.0.0.1", 0, saying("ok"))
    idlers = [Client(port.port) for _ in range(20)]
    assert ask(port.port) == b"ok"
    for client in idlers:
        client.socket.close()


def test_clients_that_vanish(server: HttpServer) -> None:
    port = server.listen("127.0.0.1", 0, saying("x" * 1_000_000))
    for _ in range(20):
        with Client(port.port) as client:
            client.socket.sendall(GET)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    assert len(ask(port.port)) == 1_000_000


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Within the block, this process can only open what it has closed there."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fillers = [os.dup(0)]
    while fillers[-1] <= highest:
        fillers.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for filler in fillers:
            os.close(filler)


def test_without_descriptors_an_idle_client_makes_room(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    port = server.listen("127.0.0.1", 0, saying("ok"))
    with Client(port.port) as idle, socket.socket() as prober:
        assert idle.ask() == b"ok"
        with no_descriptors_left():
            prober.settimeout(PATIENCE)
            prober.connect(("127.0.0.1", port.port))
            prober.sendall(GET)
            assert prober.recv(9) == b"HTTP/1.1 "
        assert idle.rest() == b""
    assert [record.getMessage() for record in caplog.records] == [
        "a client cannot be answered: Too many open files; raise the limit of open files"
    ]


def test_without_descriptors_a_prober_waits_for_who_is_busy(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log has one line of it, however long that lasts."""
    port = server.listen("127.0.0.1", 0, saying("ok"))
    with Client(port.port) as busy, socket.socket() as prober:
        assert busy.ask() == b"ok"
        busy.socket.sendall(GET[:5])
        prober.settimeout(PATIENCE)
        with no_descriptors_left():
            prober.connect(("127.0.0.1", port.port))
            prober.sendall(GET)
            assert busy.ask(GET[5:]) == b"ok"
            assert prober.recv(9) == b"HTTP/1.1 "
        assert busy.rest() == b""
    assert len(caplog.records) == 1


# ---- The thread ----


def test_signals_are_the_main_threads(server: HttpServer) -> None:
    blocked: set[int] = set()

    def handler(request: Request) -> Response:
        blocked.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return Response(200, b"")

    ask(server.listen("127.0.0.1", 0, handler).port)
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD} <= blocked


def test_handlers_run_in_the_servers_thread(server: HttpServer) -> None:
    names: list[str] = []

    def handler(request: Request) -> Response:
        names.append(threading.current_thread().name)
        return Response(200, b"")

    ask(server.listen("127.0.0.1", 0, handler).port)
    assert names == ["http"]


def test_the_threads_death_does_not_go_unnoticed(caplog: pytest.LogCaptureFixture) -> None:
    time = iter([0.0, 1.0, 2.0])  # and then an error, as a fault of ours would be
    made = HttpServer(clock=lambda: next(time))
    port = made.listen("127.0.0.1", 0, saying("ok"))
    made.start()
    with caplog.at_level("INFO", logger="ebpflb.http"), Client(port.port) as client:
        client.rest()  # to the end, which is that of the server
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    assert (made.alive, made.failure) == (False, "the HTTP server ended: StopIteration: ")
    with pytest.raises(ConnectionRefusedError):
        ask(port.port)
    with pytest.raises(OSError, match="the HTTP server has ended"):
        made.listen("127.0.0.1", 0, saying("ok"))
    made.close(port)
    made.stop()
