"""The client of the API server, against a real server on a loopback address: what an outage, a rotation or a mistake of
the operator's looks like from here."""

from __future__ import annotations

import contextlib
import gzip
import os
import queue
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from ebpflb.errors import SourceError
from ebpflb.source.kube import ApiError, Client, Unreachable
from ebpflb.source.kube.access import Access, Address
from ebpflb.source.kube.client import HttpClient
from ebpflb.source.kube.reach import Token
from tests.web import PATIENCE_SECONDS, Answer, Authority, Exchange, Web, authority, web

SERVICES = "/api/v1/services"


class Resolver:
    """Says what it was told to say."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.error: SourceError | None = None
        self.dirty = False
        self.asked = 0

    def resolve(self) -> Access:
        self.asked += 1
        self.dirty = False
        if self.error is not None:
            raise self.error
        return self.access

    def changed(self) -> bool:
        return self.dirty


class Setting:
    """What a test has: servers, a client of theirs, and time."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.now = 1000.0
        self.told: list[tuple[str, str, int | None, float | None]] = []
        self.resolver = Resolver(Access(addresses=()))

    def web(self, answer: Answer, **more: object) -> Web:
        return self._stack.enter_context(web(answer, **more))  # type: ignore[arg-type]

    def client(self, *urls: str | Address, **more: object) -> HttpClient:
        addresses = tuple(url if isinstance(url, Address) else Address(url) for url in urls)
        self.resolver = Resolver(Access(addresses=addresses, **more))  # type: ignore[arg-type]
        client = HttpClient(
            self.resolver,
            clock=lambda: self.now,
            now=lambda: 1_800_000_000.0,
            told=lambda *seen: self.told.append(seen),
        )
        self._stack.callback(client.close)
        return client

    def nobody(self) -> str:
        """A URL where nothing listens; its port stays taken, so that nobody else comes to listen there."""
        held = self._stack.enter_context(socket.socket())
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def setting() -> Iterator[Setting]:
    with ExitStack() as stack:
        yield Setting(stack)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("other"))


def ok(exchange: Exchange) -> None:
    exchange.json(200, {"kind": "ServiceList", "items": []})


def by_token(good: str) -> Answer:
    """A server that knows one token."""

    def answer(exchange: Exchange) -> None:
        if exchange.seen.headers.get("Authorization") == f"Bearer {good}":
            ok(exchange)
        else:
            exchange.status(401, "Unauthorized", "Unauthorized")

    return answer


def listed(client: Client, **query: str) -> object:
    with client.get(SERVICES, query, timeout=PATIENCE_SECONDS) as reply:
        return msgspec.json.decode(reply.read())


def refused(client: Client, timeout: float = PATIENCE_SECONDS) -> str:
    """How a list fails."""
    with pytest.raises(SourceError) as caught:
        client.get(SERVICES, {}, timeout=timeout)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- Lists and watches ----


def test_a_list_is_one_request_on_a_connection_that_is_kept(setting: Setting) -> None:
    server = setting.web(ok)
    client = setting.client(server.url)
    assert listed(client, labelSelector="!service.kubernetes.io/headless,a notin (b)") == {
        "kind": "ServiceList",
        "items": [],
    }
    listed(client)
    first, second = server.seen
    assert first.target == "/api/v1/services?labelSelector=%21service.kubernetes.io%2Fheadless%2Ca+notin+%28b%29"
    assert first.headers["Accept"] == "application/json"
    assert first.headers["User-Agent"].startswith("ebpflb/")
    assert second.target == SERVICES
    assert server.connections == 1


def test_a_gzip_list_is_decoded(setting: Setting) -> None:
    server = setting.web(lambda exchange: exchange.json(200, {"items": [1] * 1000}, Content_Encoding="gzip"))
    assert listed(setting.client(server.url)) == {"items": [1] * 1000}
    assert server.seen[0].headers["Accept-Encoding"] == "gzip"


@pytest.mark.parametrize("compressed", [False, True])
def test_the_lines_of_a_watch_come_one_by_one_however_they_are_cut_into_chunks(
    setting: Setting, compressed: bool
) -> None:
    large = b'{"large": "' + b"x" * 300_000 + b'"}'
    body = b'{"n": 1}\n{"n": 2}\n' + large + b"\n\n" + b'{"n": 3}'

    def answer(exchange: Exchange) -> None:
        coding = {"Content_Encoding": "gzip"} if compressed else {}
        exchange.head(200, Transfer_Encoding="chunked", **coding)
        sent = gzip.compress(body) if compressed else body
        for at in range(0, len(sent), 7001):
            exchange.chunk(sent[at : at + 7001])
        exchange.chunk(b"")

    client = setting.client(setting.web(answer).url)
    with client.get(SERVICES, {"watch": "1"}, timeout=PATIENCE_SECONDS, stream=True) as reply:
        assert list(reply.lines()) == [b'{"n": 1}', b'{"n": 2}', large, b'{"n": 3}']


def test_each_event_is_there_before_the_next_one_is_sent(setting: Setting) -> None:
    go_on = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.head(200, Transfer_Encoding="chunked")
        exchange.chunk(b"one\n")
        go_on.wait(PATIENCE_SECONDS)
        exchange.chunk(b"two\n")
        exchange.chunk(b"")

    client = setting.client(setting.web(answer).url)
    with client.get(SERVICES, {}, timeout=PATIENCE_SECONDS, stream=True) as reply:
        lines = reply.lines()
        assert next(lines) == b"one"
        go_on.set()
        assert list(lines) == [b"two"]


def test_a_connection_serves_again_after_a_watch_that_ended_properly(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.head(200, Transfer_Encoding="chunked")
        exchange.chunk(b"one\n")
        exchange.chunk(b"")

    server = setting.web(answer)
    client = setting.client(server.url)
    for _ in range(2):
        with client.get(SERVICES, {}, timeout=PATIENCE_SECONDS, stream=True) as reply:
            assert list(reply.lines()) == [b"one"]
    assert server.connections == 1


def test_a_watch_of_http_1_0_ends_with_its_connection(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.head(200, Connection="close")
        exchange.raw(b"one\ntwo\n")
        exchange.cut()

    client = setting.client(setting.web(answer).url)
    with client.get(SERVICES, {}, timeout=PATIENCE_SECONDS, stream=True) as reply:
        assert list(reply.lines()) == [b"one", b"two"]


def test_a_stream_cut_in_the_middle_is_said(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.head(200, Transfer_Encoding="chunked")
        exchange.chunk(b"one\n")
        exchange.raw(b"ff\r\nhalf of")
        exchange.cut()

    server = setting.web(answer)
    client = setting.client(server.url)
    with client.get(SERVICES, {}, timeout=PATIENCE_SECONDS, stream=True) as reply:
        lines = reply.lines()
        assert next(lines) == b"one"
        with pytest.raises(Unreachable, match=f"{server.url}: the connection was cut"):
            list(lines)


def test_a_list_cut_in_the_middle_is_said(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.head(200, Content_Length="1000")
        exchange.raw(b'{"items": [')
        exchange.cut()

    client = setting.client(setting.web(answer).url)
    with (
        client.get(SERVICES, {}, timeout=PATIENCE_SECONDS) as reply,
        pytest.raises(Unreachable, match="the connection was cut"),
    ):
        reply.read()


def test_a_half_open_connection_is_noticed(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.head(200, Transfer_Encoding="chunked")
        exchange.chunk(b"one\n")
        exchange.until_over()

    client = setting.client(setting.web(answer).url)
    with client.get(SERVICES, {}, timeout=PATIENCE_SECONDS, stream=True) as reply:
        lines = reply.lines()
        assert next(lines) == b"one"
        assert reply._socket.gettimeout() == PATIENCE_SECONDS
        reply._socket.settimeout(0.05)  # only from now on: the first line may be late on a busy machine
        with pytest.raises(Unreachable, match="nothing came for too long: the connection is dead"):
            next(lines)


def test_a_server_that_says_nothing_is_no_answer_in_time(setting: Setting) -> None:
    assert "no answer in time" in refused(setting.client(setting.web(Exchange.until_over).url), timeout=0.05)


def test_the_kernel_probes_connections(setting: Setting) -> None:
    client = setting.client(setting.web(ok).url)
    with client.get(SERVICES, {}, timeout=PATIENCE_SECONDS) as reply:
        found = reply._socket
        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 45_000


def test_a_connection_that_the_server_closed_in_between_is_replaced(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        ok(exchange)
        exchange.cut()  # without saying so

    server = setting.web(answer)
    client = setting.client(server.url)
    for _ in range(3):
        listed(client)
    assert server.connections == 3


# ---- Closing ----


def test_close_ends_a_blocked_read(setting: Setting) -> None:
    begun = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.head(200, Transfer_Encoding="chunked")
        exchange.chunk(b"one\n")
        exchange.until_over()

    client = setting.client(setting.web(answer).url)
    caught: list[str] = []

    def read() -> None:
        with client.get(SERVICES, {}, timeout=PATIENCE_SECONDS, stream=True) as reply:
            try:
                for _ in reply.lines():
                    begun.set()
            except Unreachable as error:
                caught.append(str(error))

    _ended_by_close(client, read, begun)
    assert caught == ["the connection to the API server was closed by us"]
    assert refused(client) == caught[0]


def test_close_ends_the_wait_for_an_answer_over_tls(setting: Setting, ca: Authority) -> None:
    begun = threading.Event()

    def answer(exchange: Exchange) -> None:
        begun.set()
        exchange.until_over()

    server = setting.web(answer, context=ca.server())
    client = setting.client(server.url, ca=ca.pem)
    caught: list[str] = []
    _ended_by_close(client, lambda: caught.append(refused(client)), begun)
    assert caught == ["the connection to the API server was closed by us"]


def test_close_ends_a_handshake_that_the_server_does_not_take_up(setting: Setting) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_SECONDS)
        client = setting.client(f"https://127.0.0.1:{listener.getsockname()[1]}")
        begun = threading.Event()
        caught: list[str] = []

        def shake() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1)
                begun.set()
                with contextlib.suppress(ConnectionResetError):
                    while peer.recv(4096):
                        pass

        server = threading.Thread(target=shake)
        server.start()
        _ended_by_close(client, lambda: caught.append(refused(client)), begun)
        server.join()
    assert caught == ["the connection to the API server was closed by us"]


def test_close_ends_a_connection_that_is_not_answered(setting: Setting) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        # A full queue of those who wait to be accepted has the kernel drop what else comes.
        waiting = [socket.socket() for _ in range(2)]
        try:
            for each in waiting:
                each.setblocking(False)
                each.connect_ex(listener.getsockname())
            client = setting.client(f"http://127.0.0.1:{listener.getsockname()[1]}")
            caught: list[str] = []
            thread = threading.Thread(target=lambda: caught.append(refused(client)), daemon=True)
            thread.start()
            port = listener.getsockname()[1]
            deadline = time.monotonic() + PATIENCE_SECONDS
            while syn_sent(port) < 2:  # one of those who wait, and the client
                assert time.monotonic() < deadline
            client.close()
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
        finally:
            for each in waiting:
                each.close()
    assert caught == ["the connection to the API server was closed by us"]


def syn_sent(port: int) -> int:
    """How many connections to this port have had no answer yet."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "02" for line in lines)


def _ended_by_close(client: Client, act: Callable[[], object], begun: threading.Event) -> None:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    assert begun.wait(PATIENCE_SECONDS)
    client.close()
    thread.join(PATIENCE_SECONDS / 2)
    assert not thread.is_alive()


# ---- Several addresses ----


def test_the_second_address_serves_when_the_first_is_down(setting: Setting) -> None:
    server = setting.web(ok)
    client = setting.client(setting.nobody(), server.url)
    listed(client)
    listed(client)
    assert server.connections == 1


def test_the_address_that_works_is_kept(setting: Setting) -> None:
    first, second = setting.web(ok), setting.web(ok)
    client = setting.client(setting.nobody(), second.url, first.url)
    for _ in range(3):
        listed(client)
    assert (len(first.seen), len(second.seen)) == (0, 3)


def test_each_address_is_named_with_its_reason_when_none_answers(setting: Setting) -> None:
    down = setting.nobody()
    assert refused(setting.client(down, "http://name.invalid:1")) == (
        f"the API server cannot be reached: {down}: connection refused; "
        "http://name.invalid:1: its name cannot be resolved"
    )


def test_an_address_that_hangs_is_left_for_the_next_request(setting: Setting) -> None:
    hung, server = setting.web(Exchange.until_over), setting.web(ok)
    client = setting.client(hung.url, server.url)
    assert "no answer in time" in refused(client, timeout=0.05)
    listed(client)


def test_an_address_that_keeps_failing_is_left(setting: Setting) -> None:
    ill = setting.web(lambda exchange: exchange.status(500, "InternalError", "etcd is gone"))
    server = setting.web(ok)
    client = setting.client(ill.url, server.url)
    for _ in range(3):
        assert refused(client) == "etcd is gone"
    listed(client)


def test_a_server_that_is_busy_is_not_left(setting: Setting) -> None:
    busy = setting.web(lambda exchange: exchange.status(429, "TooManyRequests", "slow", retryAfterSeconds=2))
    client = setting.client(busy.url, setting.nobody())
    for _ in range(4):
        with pytest.raises(ApiError) as caught:
            listed(client)
        assert (caught.value.status, caught.value.reason, caught.value.retry_after) == (429, "TooManyRequests", 2.0)


def test_a_url_with_a_path_is_kept_before_each_request(setting: Setting) -> None:
    server = setting.web(ok)
    listed(setting.client(server.url + "/k8s/clusters/c-1"))
    assert server.seen[0].target == "/k8s/clusters/c-1/api/v1/services"


# ---- Writing ----


def test_an_event_is_written_with_its_content_type(setting: Setting) -> None:
    server = setting.web(lambda exchange: exchange.json(201, {"kind": "Event"}))
    client = setting.client(setting.nobody(), server.url)
    path = "/apis/events.k8s.io/v1/namespaces/default/events"
    assert client.send("POST", path, b"{}", content_type="application/json", timeout=PATIENCE_SECONDS)
    (seen,) = server.seen
    assert (seen.method, seen.target, seen.body, seen.headers["Content-Type"]) == (
        "POST", path, b"{}", "application/json",
    )  # fmt: skip


def test_a_write_that_may_have_arrived_is_not_repeated(setting: Setting) -> None:
    cut, other = setting.web(Exchange.cut), setting.web(ok)
    client = setting.client(cut.url, other.url)
    with pytest.raises(Unreachable, match="the connection was cut"):
        client.send("POST", "/x", b"{}", content_type="application/json", timeout=PATIENCE_SECONDS)
    assert (len(cut.seen), len(other.seen)) == (1, 0)


# ---- Who we are ----


def test_the_token_file_is_rotated(setting: Setting, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    server = setting.web(ok)
    client = setting.client(server.url, token_file=str(token))
    listed(client)
    token.write_text("second\n")
    listed(client)
    setting.now += 61
    listed(client)
    assert [seen.headers["Authorization"] for seen in server.seen] == [
        "Bearer first",
        "Bearer first",
        "Bearer second",
    ]


def test_a_401_rereads_the_token_at_once(setting: Setting, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    server = setting.web(by_token("old"))
    client = setting.client(server.url, token_file=str(token))
    listed(client)
    token.write_text("new")
    server.answer = by_token("new")
    listed(client)
    assert len(server.seen) == 3


def test_a_token_file_that_is_gone_for_a_moment_changes_nothing(setting: Setting, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("good")
    client = setting.client(setting.web(by_token("good")).url, token_file=str(token))
    listed(client)
    token.unlink()
    setting.now += 61
    listed(client)


def test_whoever_comes_while_the_token_is_read_for_the_first_time_waits_for_it(tmp_path: Path) -> None:
    """Three lists begin at once. A request without a token would be one of system:anonymous, and forbidden."""
    path = tmp_path / "token"
    os.mkfifo(path)
    access = Access(addresses=(Address("http://127.0.0.1:1"),), token_file=str(path))
    token, said = Token(access, time.monotonic), queue.SimpleQueue[str]()
    threads = [threading.Thread(target=lambda: said.put(token.text()), daemon=True) for _ in range(2)]
    threads[0].start()
    with open(path, "w") as file:  # once the first one is there to read
        threads[1].start()
        threads[1].join(0.05)
        file.write("good")
    assert [said.get(timeout=PATIENCE_SECONDS) for _ in threads] == ["good", "good"]
    for thread in threads:
        thread.join()


def test_a_token_file_that_never_was_is_one_line(setting: Setting, tmp_path: Path) -> None:
    client = setting.client(setting.web(ok).url, token_file=str(tmp_path / "token"))
    assert refused(client) == f"the token file {tmp_path}/token cannot be read: No such file or directory"


def test_a_token_file_with_garbage_is_one_line_without_it(setting: Setting, tmp_path: Path) -> None:
    token = tmp_path / "token"
    client = setting.client(setting.web(ok).url, token_file=str(token), identity="the token of k")
    for garbage in ("hid\nden", "hid\x00den", "hiddän"):
        token.write_text(garbage)
        setting.now += 61
        assert refused(client) == "the token of k cannot be sent: it holds characters that no token has"
    token.write_text("good")
    setting.now += 61
    listed(client)


def test_a_401_renews_credentials_that_a_plugin_gave(setting: Setting) -> None:
    server = setting.web(by_token("old"))
    client = setting.client(server.url, token="old", renewable=True)
    listed(client)
    server.answer = by_token("new")
    setting.now += 60
    setting.resolver.access = msgspec.structs.replace(setting.resolver.access, token="new")
    listed(client)
    assert setting.resolver.asked == 2


def test_credentials_of_a_plugin_are_renewed_before_they_expire(setting: Setting) -> None:
    server = setting.web(ok)
    client = setting.client(server.url, token="old", renewable=True, expires=1_800_000_020.0)
    listed(client)
    setting.resolver.access = msgspec.structs.replace(setting.resolver.access, token="new", expires=1_800_003_600.0)
    setting.now += 60
    listed(client)
    listed(client)
    assert [seen.headers["Authorization"] for seen in server.seen][1:] == ["Bearer new"] * 2
    assert setting.resolver.asked == 2


def test_a_renewal_that_fails_leaves_what_there_was_and_is_named_after_a_401(setting: Setting) -> None:
    server = setting.web(ok)
    client = setting.client(server.url, token="old", identity="the token of k")
    listed(client)
    setting.now += 60
    setting.resolver.error = SourceError("kubeconfig k is not YAML")
    setting.resolver.dirty = True
    listed(client)
    server.answer = by_token("new")
    setting.now += 60
    assert refused(client) == (
        "the API server does not accept our credentials: the token of k has expired, was revoked or is for another "
        "cluster; kubeconfig k is not YAML"
    )


def test_a_changed_kubeconfig_is_followed_at_the_next_request(setting: Setting) -> None:
    first, second = setting.web(ok), setting.web(ok)
    client = setting.client(first.url)
    listed(client)
    setting.now += 60
    setting.resolver.access = Access(addresses=(Address(second.url),))
    setting.resolver.dirty = True
    listed(client)
    assert (len(first.seen), len(second.seen)) == (1, 1)


def test_an_access_that_cannot_be_had_is_tried_again_with_each_request(setting: Setting) -> None:
    client = setting.client(setting.web(ok).url)
    setting.resolver.error = SourceError("kubeconfig k: there is no such file")
    assert refused(client) == "kubeconfig k: there is no such file"
    setting.resolver.error = None
    listed(client)


def test_threads_that_begin_together_ask_for_credentials_once() -> None:
    """One minute of a plugin that hangs is enough for all."""
    go_on = threading.Event()
    texts: list[str] = []

    class Slow(Resolver):
        def resolve(self) -> Access:
            self.asked += 1
            go_on.wait(PATIENCE_SECONDS)
            raise SourceError("the exec plugin hangs")

    slow = Slow(Access(addresses=()))
    client = HttpClient(slow)
    threads = [threading.Thread(target=lambda: texts.append(refused(client))) for _ in range(3)]
    for thread in threads:
        thread.start()

    def waiting() -> int:
        frames = sys._current_frames()
        found = [frames[thread.ident] for thread in threads if thread.ident in frames]
        return sum(frame.f_code.co_name == "_resolve" and "attempts" in frame.f_locals for frame in found)

    deadline = time.monotonic() + PATIENCE_SECONDS
    while waiting() < 2:
        assert time.monotonic() < deadline
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert texts == ["the exec plugin hangs"] * 3
    assert slow.asked == 1
    assert refused(client) == "the exec plugin hangs"
    assert slow.asked == 2


def test_a_token_that_expired_is_named_with_its_time(setting: Setting) -> None:
    # {"exp": 1767225600}
    token = "e30.eyJleHAiOiAxNzY3MjI1NjAwfQ.x"
    client = setting.client(setting.web(by_token("other")).url, token=token, identity="the token of k")
    assert refused(client) == (
        "the API server does not accept our credentials: the token of k expired on 2026-01-01T00:00:00Z"
    )


def test_nobody_in_particular_is_told_to_say_who_he_is(setting: Setting) -> None:
    assert refused(setting.client(setting.web(by_token("x")).url)).endswith(
        "it wants to know who we are: give --kubeconfig FILE"
    )


# ---- TLS ----


def test_tls_with_a_client_certificate_that_is_given_inline(setting: Setting, ca: Authority) -> None:
    context = ca.server()
    context.load_verify_locations(ca.path)
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = ca.issue("node")
    client = setting.client(
        setting.web(ok, context=context).url, ca=ca.pem, certificate=certificate.read_text(), key=key.read_text()
    )
    listed(client)


def test_a_wrong_ca_is_one_clear_line(setting: Setting, ca: Authority, other_ca: Authority) -> None:
    server = setting.web(ok, context=ca.server())
    assert refused(setting.client(server.url, ca=other_ca.pem, ca_from="kubeconfig k")) == (
        f"the API server cannot be reached: {server.url}: the server's certificate is not signed by the CA of "
        "kubeconfig k: is this the right cluster?"
    )


def test_a_certificate_for_another_name_is_one_clear_line(setting: Setting, ca: Authority) -> None:
    server = setting.web(ok, context=ca.server("DNS:kubernetes"))
    assert "the server's certificate is not for 127.0.0.1" in refused(setting.client(server.url, ca=ca.pem))


@pytest.mark.parametrize("name", ["kubernetes", "10.96.0.1"])
def test_an_address_is_verified_by_the_name_it_stands_for(setting: Setting, ca: Authority, name: str) -> None:
    server = setting.web(ok, context=ca.server("DNS:kubernetes,IP:10.96.0.1"))
    listed(setting.client(Address(server.url, server_name=name), ca=ca.pem))


def test_an_expired_server_certificate_is_one_clear_line(setting: Setting, ca: Authority) -> None:
    server = setting.web(ok, context=ca.server(days=-1))
    assert "has expired (or this node's clock is wrong)" in refused(setting.client(server.url, ca=ca.pem))


def test_an_expired_client_certificate_is_named_with_its_time(setting: Setting, ca: Authority) -> None:
    server = setting.web(by_token("x"), context=ca.server())
    certificate, key = ca.issue("late", days=-1)
    client = HttpClient(
        Resolver(
            Access(
                addresses=(Address(server.url),),
                ca=ca.pem,
                certificate=certificate.read_text(),
                key=key.read_text(),
                identity="the client certificate of k",
            )
        )
    )
    text = refused(client)
    client.close()
    assert "the client certificate of k expired on 20" in text


def test_no_verification_where_the_kubeconfig_says_so(setting: Setting, ca: Authority) -> None:
    listed(setting.client(setting.web(ok, context=ca.server("DNS:x")).url, verify=False))


def test_the_next_address_serves_when_the_first_cannot_be_believed(
    setting: Setting, ca: Authority, other_ca: Authority
) -> None:
    false, true = setting.web(ok, context=other_ca.server()), setting.web(ok, context=ca.server())
    listed(setting.client(false.url, true.url, ca=ca.pem))
    assert (len(false.seen), len(true.seen)) == (0, 1)


# ---- Not an API server ----


def test_http_spoken_to_a_tls_port(setting: Setting) -> None:
    def as_go_does(exchange: Exchange) -> None:
        exchange.answer(400, b"Client sent an HTTP request to an HTTPS server.\n", content_type="")

    assert refused(setting.client(setting.web(as_go_does).url)).endswith("it speaks TLS: write https://")


def test_tls_spoken_to_an_http_port(setting: Setting, ca: Authority) -> None:
    server = setting.web(ok)
    url = server.url.replace("http:", "https:")
    assert refused(setting.client(url, ca=ca.pem)).endswith("it does not speak TLS: is it http://?")


@pytest.mark.parametrize("status", [200, 404, 502])
def test_a_web_page_is_no_api_server(setting: Setting, status: int) -> None:
    page = setting.web(lambda exchange: exchange.answer(status, b"<html>", content_type="text/html"))
    assert refused(setting.client(page.url)).endswith(
        f"it answers with a web page (HTTP {status}): this is no API server"
    )


def test_a_redirect_is_not_followed(setting: Setting) -> None:
    server = setting.web(lambda exchange: exchange.answer(302, Location="https://sso.example/"))
    assert refused(setting.client(server.url)).endswith("it redirects to https://sso.example/, which is not followed")
    assert len(server.seen) == 1


def test_something_that_does_not_speak_http(setting: Setting) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"220 mail.example ESMTP\r\n")
                peer.recv(4096)

        thread = threading.Thread(target=talk)
        thread.start()
        text = refused(setting.client(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join()
    assert text.endswith("it does not speak HTTP: write https://")


# ---- Refusals ----


def test_a_403_keeps_the_servers_words(setting: Setting) -> None:
    words = 'services is forbidden: User "u" cannot list resource "services" in API group "" at the cluster scope'
    server = setting.web(lambda exchange: exchange.status(403, "Forbidden", words))
    with pytest.raises(ApiError) as caught:
        listed(setting.client(server.url))
    assert (caught.value.status, caught.value.reason, str(caught.value)) == (403, "Forbidden", words)


def test_an_expired_resource_version_has_its_reason(setting: Setting) -> None:
    server = setting.web(lambda exchange: exchange.status(410, "Expired", "too old resource version"))
    with pytest.raises(ApiError) as caught:
        listed(setting.client(server.url))
    assert (caught.value.status, caught.value.reason, caught.value.retry_after) == (410, "Expired", None)


def test_an_answer_that_is_no_status_is_told_on_one_line(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.answer(503, b"no\nhealthy\nupstream", content_type="text/plain", Retry_After="7")

    with pytest.raises(ApiError) as caught:
        listed(setting.client(setting.web(answer).url))
    assert str(caught.value) == "the API server answers HTTP 503 Service Unavailable: no healthy upstream"
    assert caught.value.retry_after == 7.0


# ---- Proxies ----


def test_a_server_behind_a_proxy_that_wants_a_password(setting: Setting) -> None:
    proxy = setting.web(ok)
    through = proxy.url.replace("http://", "http://user:secret@")
    listed(setting.client(Address("http://api.example:8080/k", proxy=through)))
    (seen,) = proxy.seen
    assert seen.target == "http://api.example:8080/k/api/v1/services"
    assert seen.headers["Proxy-Authorization"] == "Basic dXNlcjpzZWNyZXQ="
    assert seen.headers["Host"] == "api.example:8080"


def test_tls_goes_through_a_proxy_to_the_server_itself(setting: Setting, ca: Authority) -> None:
    server = setting.web(ok, context=ca.server("DNS:api.example"))
    proxy = setting.web(lambda exchange: exchange.tunnel(server.port))
    through = proxy.url.replace("http://", "http://user:secret@")
    client = setting.client(Address("https://api.example:6443", proxy=through), ca=ca.pem, token="t")
    listed(client)
    listed(client)
    (seen,) = proxy.seen
    assert (seen.method, seen.target) == ("CONNECT", "api.example:6443")
    assert seen.headers["Proxy-Authorization"] == "Basic dXNlcjpzZWNyZXQ="
    assert "Authorization" not in seen.headers
    assert server.seen[0].headers["Authorization"] == "Bearer t"


def test_a_proxy_that_refuses_is_named_without_its_password(setting: Setting) -> None:
    proxy = setting.web(lambda exchange: exchange.answer(403))
    through = proxy.url.replace("http://", "http://user:secret@")
    text = refused(setting.client(Address("https://api.example:6443", proxy=through)))
    assert text == (
        "the API server cannot be reached: https://api.example:6443: "
        f"the proxy {proxy.url} refuses to connect: 403 Forbidden"
    )
    assert proxy.seen[0].target == "api.example:6443"


# ---- Who wants to know


def test_every_request_is_told_with_its_outcome_and_a_watch_without_its_length(setting: Setting) -> None:
    def answer(exchange: Exchange) -> None:
        setting.now += 0.25
        ok(exchange) if exchange.seen.method == "GET" else exchange.status(403, "Forbidden", "no")

    server, dead = setting.web(answer), setting.nobody()
    host = server.url.removeprefix("http://")
    client = setting.client(dead, server.url)
    listed(client)
    client.get(SERVICES, {}, timeout=PATIENCE_SECONDS, stream=True).close()
    with pytest.raises(ApiError):
        client.send("POST", SERVICES, b"{}", content_type="application/json", timeout=PATIENCE_SECONDS)
    assert setting.told == [
        ("GET", dead.removeprefix("http://"), None, 0.0),
        ("GET", host, 200, 0.25),
        ("GET", host, 200, None),
        ("POST", host, 403, 0.25),
    ]
