"""What is answered on one connection, byte for byte, and what is refused."""

from __future__ import annotations

import pytest

from ebpflb.httpd import Request, Response, routed
from ebpflb.httpd.exchange import Exchange

DATE = "Sat, 21 Nov 2026 12:45:00 GMT"
PLAIN = (("Content-Type", "text/plain"),)
HOST = b"Host: node1:10256\r\n"


class Asked:
    """A handler that remembers what it was asked."""

    def __init__(self, *answers: Response) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Response:
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else Response(200, b"ok", PLAIN)


def exchange(handler: Asked | None = None) -> Exchange:
    return Exchange(handler or Asked(), lambda: DATE)


def answers(talk: Exchange, data: bytes) -> list[bytes]:
    """All that is answered to `data`."""
    talk.receive(data)
    found = []
    while answer := talk.answer():
        found.append(answer)
    return found


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_an_answer_as_go_writes_it() -> None:
    (answer,) = answers(exchange(), b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
        b"Date: Sat, 21 Nov 2026 12:45:00 GMT\r\nContent-Length: 2\r\n\r\nok"
    )


def test_what_a_handler_is_told() -> None:
    handler = Asked()
    answers(
        exchange(handler),
        b"POST /healthz?verbose=1&x HTTP/1.1\r\n" + HOST + b"Accept: a\r\nACCEPT: b\r\nContent-Length: 4\r\n\r\nbody",
    )
    headers = {"host": "node1:10256", "accept": "a, b", "content-length": "4"}
    assert handler.requests == [Request("POST", "/healthz", "verbose=1&x", headers)]


def test_a_proxys_way_of_asking() -> None:
    handler = Asked()
    answers(exchange(handler), b"GET http://node1:10256/healthz?a HTTP/1.1\r\n" + HOST + b"\r\n")
    assert handler.requests[0][:3] == ("GET", "/healthz", "a")


def test_a_path_that_needs_decoding() -> None:
    handler = Asked()
    answers(exchange(handler), b"GET /%68ealthz?%61 HTTP/1.1\r\n" + HOST + b"\r\n")
    assert handler.requests[0][:3] == ("GET", "/healthz", "%61")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"])
def test_any_method(method: str) -> None:
    handler = Asked()
    (answer,) = answers(exchange(handler), f"{method} / HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    assert (status(answer), handler.requests[0].method) == (200, method)


def test_head_has_the_headers_of_get_and_no_body() -> None:
    talk = exchange()
    head, get = answers(talk, b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert head + b"ok" == get
    assert not talk.ended


def test_an_unknown_path_is_answered_as_kube_proxy_does() -> None:
    handler = routed({"/healthz": Asked()})
    talk = Exchange(handler, lambda: DATE)
    for path in ("/", "/healthz/", "/livez", "/healthzz"):
        (answer,) = answers(talk, f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
        assert status(answer) == 404
        assert answer.endswith(b"\r\n\r\n404 page not found\n")
        assert b"Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n" in answer
    (answer,) = answers(talk, b"GET /healthz?x HTTP/1.1\r\n" + HOST + b"\r\n")
    assert status(answer) == 200


def test_a_connection_is_kept() -> None:
    talk = exchange()
    for _ in range(3):
        (answer,) = answers(talk, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert b"Connection" not in answer
        assert talk.idle and not talk.ended
    assert answers(talk, b"") == []
    assert talk.ended and not talk.rude


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", id="asked-to"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", id="http-1.0"),
    ],
)
def test_a_connection_is_closed(request_: bytes) -> None:
    talk = exchange()
    (answer,) = answers(talk, request_)
    assert status(answer) == 200
    assert b"\r\nConnection: close\r\n" in answer
    assert talk.ended and not talk.rude


def test_requests_that_come_in_pieces() -> None:
    talk = exchange()
    data = b"PUT / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    found = [answer for byte in data for answer in answers(talk, bytes([byte]))]
    assert [status(answer) for answer in found] == [200]
    assert talk.idle


def test_requests_that_come_together_are_answered_in_order_one_at_a_time() -> None:
    handler = Asked(*(Response(200, str(number).encode()) for number in range(3)))
    talk = exchange(handler)
    talk.receive((b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") * 3)
    for number in range(3):
        assert len(handler.requests) == number, "answered before the client took the answer before"
        assert not talk.idle
        assert talk.answer().endswith(b"\r\n\r\n" + str(number).encode())
    assert talk.answer() == b""
    assert talk.idle


def test_half_closed_after_the_request() -> None:
    """As `printf … | nc` does."""
    talk = exchange()
    talk.receive(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
    talk.receive(b"")
    assert status(talk.answer()) == 200
    assert talk.answer() == b""
    assert talk.ended


def test_who_would_send_a_body_only_when_told_to_is_answered_at_once() -> None:
    talk = exchange()
    asks = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    (answer,) = answers(talk, asks)
    assert status(answer) == 200
    assert b"\r\nConnection: close\r\n" in answer
    assert talk.ended and talk.rude


REFUSED = {
    "no-http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "no-version": (b"GET /\r\n\r\n", 400),
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two-hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "two-lengths": (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "length-below-zero": (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
    "unknown-encoding": (b"GET / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "blank-in-a-name": (b"GET / HTTP/1.1\r\n" + HOST + b"a b: c\r\n\r\n", 400),
    "long-line": (b"GET /" + b"x" * 20000, 431),
    "long-headers": (b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 5000, 431),
    "long-body": (b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n" + b"x" * 100000, 413),
    "a-tunnel": (b"CONNECT 10.0.0.1:22 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "cut-in-the-middle": (b"GET / HTTP/1.1\r\nHost:", 400),
}


@pytest.mark.parametrize(("sent", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(sent: bytes, expected: int) -> None:
    handler = Asked()
    talk = exchange(handler)
    found = answers(talk, sent)
    if not found:
        found = answers(talk, b"")
    (answer,) = found
    assert status(answer) == expected
    assert b"\r\nConnection: close\r\n" in answer
    assert talk.ended and talk.rude
    assert talk.answer() == b""
    assert not handler.requests


def test_a_good_request_before_a_bad_one_is_answered() -> None:
    talk = exchange()
    good, bad = answers(talk, b"GET / HTTP/1.1\r\n" + HOST + b"\r\nBAD\r\n\r\n")
    assert (status(good), status(bad)) == (200, 400)


def test_a_fault_of_ours_is_an_answer_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Request) -> Response:
        raise KeyError("what\never")

    talk = Exchange(broken, lambda: DATE)
    with caplog.at_level("INFO", logger="ebpflb.http"):
        (answer,) = answers(talk, b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
    assert status(answer) == 500
    assert b"ever" not in answer
    assert [record.getMessage() for record in caplog.records] == ["answering /healthz failed: KeyError: 'what\\never'"]
    assert not talk.ended, "the next request may go well"


def test_a_response_that_is_no_http_is_a_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    talk = exchange(Asked(Response(200, b"", (("X", "a\r\nb"),))))
    (answer,) = answers(talk, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert status(answer) == 500
    assert talk.ended
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


def test_an_answer_without_a_body() -> None:
    talk = exchange(Asked(Response(204, b"")))
    (answer,) = answers(talk, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer == f"HTTP/1.1 204 No Content\r\nDate: {DATE}\r\n\r\n".encode()
    assert talk.idle
