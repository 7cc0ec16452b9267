"""Whatever a client sends, in whatever pieces: it is answered or refused, never more, and nothing breaks."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.httpd import Request, Response
from ebpflb.httpd.exchange import Exchange

_STATUS_LINE = re.compile(rb"HTTP/1\.1 (200|400|405|413|431|501) [A-Z]")

_PARTS = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n", b"HEAD /a?b HTTP/1.1\r\n", b"PUT * HTTP/1.0\r\n", b"CONNECT a:1 HTTP/1.1\r\n",
        b"Host: x\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"\r\n", b"abc", b"3\r\nabc\r\n",
        b"0\r\n\r\n", b"\n", b" ", b"\0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
)  # fmt: skip
_REQUESTS = st.lists(
    st.sampled_from(
        [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
            b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ]
    ),
    min_size=1,
    max_size=6,
)


def _handler(request: Request) -> Response:
    return Response(200, f"{request.method} {request.path}".encode())


def _talk(pieces: list[bytes]) -> tuple[list[bytes], Exchange]:
    exchange = Exchange(_handler, lambda: "Sat, 21 Nov 2026 12:45:00 GMT")
    answers = []
    for piece in (*pieces, b""):
        exchange.receive(piece)
        while answer := exchange.answer():
            answers.append(answer)
        if exchange.ended:
            break
    return answers, exchange


@given(st.lists(_PARTS | st.binary(min_size=1, max_size=20), max_size=12).map(b"".join))
def test_anything_is_answered_or_refused(data: bytes) -> None:
    answers, exchange = _talk([data] if data else [])
    assert exchange.ended
    for answer in answers:
        assert _STATUS_LINE.match(answer), answer


@given(_REQUESTS, st.data())
def test_pieces_make_no_difference(requests: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(requests)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=8)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    answers, exchange = _talk(pieces)
    assert [answer.split()[1] for answer in answers] == [b"200"] * len(requests)
    assert answers == _talk([whole])[0]
    assert exchange.ended and not exchange.rude
