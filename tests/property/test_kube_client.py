"""Whatever a server answers, a list or a watch ends as an answer or as one line that says why not."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebpflb.errors import SourceError
from ebpflb.source.kube.access import Access, Address
from ebpflb.source.kube.client import HttpClient

PATIENCE_SECONDS = 30.0


STATUS = b'{"kind": "Status", "message": "no\\u0007", "reason": "Expired", "details": {"retryAfterSeconds": 1}}'
HEADS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 200\r\n",
        b"HTTP/1.1 410 Gone\r\n",
        b"HTTP/1.1 401 Unauthorized\r\n",
        b"HTTP/1.1 302 Found\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 204 No Content\r\n",
        b"HTTP/1.1 99999 What\r\n",
        b"HTTP/2 200\r\n",
    ]
)
HEADERS = st.lists(
    st.sampled_from(
        [
            b"Transfer-Encoding: chunked\r\n",
            b"Content-Encoding: gzip\r\n",
            b"Content-Length: 7\r\n",
            b"Content-Length: -1\r\n",
            b"Content-Length: x\r\n",
            b"Content-Type: text/html\r\n",
            b"Location: \x1b[2J\r\n",
            b"Retry-After: \xb2\r\n",
            b"Connection: close\r\n",
            b"X: " + b"y" * 70_000 + b"\r\n",
            b": \r\n",
            b"no colon\r\n",
        ]
    ),
    max_size=4,
)
BODIES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                STATUS,
                gzip.compress(STATUS),
                b"4\r\none\n\r\n",
                b"0\r\n\r\n",
                b"zz\r\n",
                b"-1\r\n",
                b"7fffffffffffffff\r\n",
            ]
        ),
        st.binary(max_size=40),
    ),
    max_size=5,
).map(b"".join)
ANSWERS = st.one_of(
    st.binary(max_size=100),
    st.builds(lambda head, headers, body: head + b"".join(headers) + b"\r\n" + body, HEADS, HEADERS, BODIES),
)


class Garbage:
    """A server that says `answer` on each connection, and hangs up."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.answer = b""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                try:
                    peer.settimeout(PATIENCE_SECONDS)
                    peer.recv(1 << 16)
                    peer.sendall(self.answer)
                except OSError:
                    pass  # the client had enough

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def garbage() -> Iterator[Garbage]:
    server = Garbage()
    yield server
    server.close()


class Known:
    """A resolver of one address."""

    def __init__(self, url: str) -> None:
        self._access = Access(addresses=(Address(url),), token="secret-token")

    def resolve(self) -> Access:
        return self._access

    def changed(self) -> bool:
        return False


@given(answer=ANSWERS, stream=st.booleans())
@example(answer=b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", stream=False)
@example(answer=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7fffffffffffffdf", stream=False)
@example(answer=b"HTTP/1.1 403 No\r\n\r\n\x1b[31m\xff\x00", stream=False)
def test_any_answer_is_read_or_refused_in_one_line(garbage: Garbage, answer: bytes, stream: bool) -> None:
    garbage.answer = answer
    client = HttpClient(Known(garbage.url))
    try:
        with client.get("/api/v1/services", {}, timeout=PATIENCE_SECONDS, stream=stream) as reply:
            if stream:
                assert all(b"\n" not in line for line in reply.lines())
            else:
                reply.read()
    except SourceError as error:
        assert str(error).isprintable()
        assert "secret-token" not in str(error)
    finally:
        client.close()
