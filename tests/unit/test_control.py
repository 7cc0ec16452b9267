"""The control socket: one daemon a namespace, and clients that cannot make it wait."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import socket
import threading
from collections.abc import Iterator

import pytest

from ebpflb.commands.handover import Retiring
from ebpflb.commands.status import Identity, show_status, status_document
from ebpflb.control import Control, NotRunning, ask, listen
from ebpflb.errors import UserError
from ebpflb.loop import run
from ebpflb.output import Format
from ebpflb.overview import Overview, count
from ebpflb.problems import Found
from ebpflb.routes import RouteTable
from ebpflb.source import LIVE, Condition, SourceState
from tests.fakes import FakeClock, FakeDataplane, World, both, routes, row

_numbers = itertools.count()


@pytest.fixture
def name() -> str:
    return f"ebpflb-test-{os.getpid()}-{next(_numbers)}"


class Server:
    """A Control in a loop of its own, on a clock that stands still until it is moved."""

    def __init__(self, name: str) -> None:
        self.clock = FakeClock()
        self.ready = True
        self.selector = selectors.DefaultSelector()
        self._server = listen(name)
        self.control = Control(self._server, self.selector, self.clock, lambda: b'{"an": "answer"}', lambda: self.ready)
        self._wake, self._woken = socket.socketpair()
        self.selector.register(self._woken, selectors.EVENT_READ, lambda: self._woken.recv(1))
        self._ended = False
        self._thread = threading.Thread(
            target=run, args=(self.selector, [self.control], lambda: float("inf"), lambda: self._ended)
        )

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.send(b"\0")

    def end(self) -> None:
        self._ended = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(10)
        self.control.close()
        self._server.close()
        self.selector.close()
        self._wake.close()
        self._woken.close()

    def turn(self) -> None:
        """Serve whatever is readable now, then what is due."""
        while ready := self.selector.select(0):
            for key, _ in ready:
                key.data()
        self.control.work()


@pytest.fixture
def server(name: str) -> Iterator[Server]:
    made = Server(name)
    yield made
    made.end()


def connect(name: str, request: bytes = b'{"wait": 0}\n') -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(f"\0{name}")
    client.sendall(request)
    return client


def test_a_second_daemon_finds_the_place_taken(name: str) -> None:
    with listen(name), pytest.raises(UserError, match="another ebpflb daemon"):
        listen(name)
    listen(name).close()


def test_asking_a_daemon(server: Server, name: str) -> None:
    server.start()
    assert ask(0, name) == b'{"an": "answer"}'


def test_asking_where_there_is_none(name: str) -> None:
    with pytest.raises(NotRunning, match="ebpflb run"):
        ask(0, name)


def test_asking_a_daemon_that_hangs(name: str) -> None:
    with listen(name), pytest.raises(NotRunning, match="does not answer"):
        ask(0, name, patience=0.01)


def test_waiting_for_a_daemon_that_is_not_there_yet(name: str) -> None:
    answers: list[bytes] = []
    client = threading.Thread(target=lambda: answers.append(ask(20, name)))
    client.start()
    server = Server(name)
    server.start()
    client.join(20)
    server.end()
    assert answers == [b'{"an": "answer"}']


def test_an_answer_is_held_back_until_the_first_complete_sync(server: Server, name: str) -> None:
    server.ready = False
    with connect(name, b'{"wait": 60}\n') as client:
        server.turn()
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(100)
        server.ready = True
        server.turn()
        assert client.recv(100) == b'{"an": "answer"}'


def test_a_wait_ends_with_its_time(server: Server, name: str) -> None:
    server.ready = False
    with connect(name, b'{"wait": 3}\n') as client:
        server.turn()
        assert server.control.due() == pytest.approx(server.clock.now + 3)
        server.clock.advance(3.1)
        server.turn()
        assert client.recv(100) == b'{"an": "answer"}'


@pytest.mark.parametrize("request_", [b"no json\n", b'{"wait": "long"}\n', b"x" * 5000, b"[]\n"])
def test_nonsense_is_hung_up_on(server: Server, name: str, request_: bytes) -> None:
    with connect(name, request_) as client:
        server.turn()
        with contextlib.suppress(ConnectionResetError):  # where the rest of what was sent had not been read
            assert client.recv(100) == b""


def test_who_waits_and_still_talks_is_hung_up_on(server: Server, name: str) -> None:
    server.ready = False
    with connect(name, b'{"wait": 60}\n') as client:
        server.turn()
        client.sendall(b"{}\n")
        server.turn()
        assert client.recv(100) == b""


def test_a_client_that_never_asks_is_dropped(server: Server, name: str) -> None:
    with connect(name, b"") as client:
        server.turn()
        assert server.control.due() is not None
        server.clock.advance(5.1)
        server.turn()
        assert client.recv(100) == b""
        assert server.control.due() is None


def test_a_client_that_goes_away_is_forgotten(server: Server, name: str) -> None:
    server.ready = False
    connect(name, b'{"wait": 60}\n').close()
    server.turn()
    assert server.control.due() is None


def test_clients_are_bounded_in_number(server: Server, name: str) -> None:
    """The 65th is hung up on; the first 64 are served."""
    server.ready = False
    clients = []
    for _ in range(65):
        clients.append(connect(name, b""))
        server.turn()
    assert clients[64].recv(1) == b""
    clients[0].sendall(b"{}\n")
    server.turn()
    assert clients[0].recv(100) == b'{"an": "answer"}'
    for client in clients:
        client.close()


# ---- The document ----


def overview(**changes: object) -> Overview:
    fields: dict[str, object] = {
        "synced_sources": True,
        "remembered": None,
        "first_sync": True,
        "complete": True,
        "sound": True,
        "pending_for": None,
        "last_sync_age": 1.23456,
        "last_audit_age": None,
        "failures": 0,
        "routes": routes(*both(), *both("172.30.0.42"), *both("fd00::1", name="other", backends=("fd00:10::1",))),
        "problems": (),
        "sources": {},
        **changes,
    }
    return Overview(**fields)  # type: ignore[arg-type]


def document(found: Overview) -> bytes:
    return status_document(Identity("node-1", "bpf", "2026-01-31T12:00:00Z"), FakeDataplane(), found)


def shown(found: Overview, form: Format, name: str, answer: bytes | None = None) -> tuple[str, int]:
    """What `status` makes of a daemon's answer."""
    said = document(found) if answer is None else answer
    server = listen(name)

    def serve() -> None:
        server.setblocking(True)
        connection, _ = server.accept()
        connection.recv(100)
        connection.sendall(said)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    result = show_status(World().but(socket_name=name), wait=0, form=form)
    thread.join(10)
    server.close()
    return result.text, result.status


def test_the_status_document() -> None:
    answer = json.loads(document(overview(problems=(Found("manifests", "web.yaml", "a typo"),))))
    assert (answer["apiVersion"], answer["kind"]) == ("ebpflb/v1", "Status")
    (item,) = answer["items"]
    assert item["node"] == "node-1"
    assert item["healthy"] is True
    assert item["firstSync"] is True
    assert item["lastSyncSeconds"] == 1.235
    assert item["lastAuditSeconds"] is None
    assert item["counts"] == {"services": 2, "frontends": 3, "routes": 6, "backends": 2}
    assert item["maps"] == [{"name": "frontends", "entries": 1, "max": 10}]
    assert item["problems"] == [{"part": "manifests", "subject": "web.yaml", "reason": "a typo", "code": ""}]


def test_a_backend_counts_once_per_service_port() -> None:
    """In both scopes, and at another frontend with some more."""
    more = both("172.30.0.42", backends=("10.180.0.1", "10.180.0.2"))
    assert count(routes(*both(), *more)).backends == 2
    assert count(routes(*both(), *both("172.30.0.42", name="other"))).backends == 2
    assert count(routes(*both(), row("172.30.0.43", backends=()))).backends == 1


def test_counts_of_nothing() -> None:
    assert count(None) == count(RouteTable())


def test_a_healthy_daemon(name: str) -> None:
    text, status = shown(overview(), Format.TABLE, name)
    assert status == 0
    assert text.startswith("healthy: last sync 1.2 s ago\n")
    assert "2 services, 3 frontends, 6 routes, 2 backends" in text
    assert "10.0%" in text


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (overview(synced_sources=False, first_sync=False, complete=False), "waiting for the sources' first lists"),
        (overview(first_sync=False, complete=False, failures=3), "no complete sync yet after 3 attempts"),
        (overview(complete=False, failures=2), "last sync 1.2 s ago, 2 failed attempts since"),
        (overview(problems=(Found("health", "health", "a source hangs"),)), "last sync 1.2 s ago; a source hangs"),
    ],
)
def test_a_daemon_in_trouble(found: Overview, sentence: str, name: str) -> None:
    text, status = shown(found, Format.TABLE, name)
    assert status == 1
    assert text.startswith(f"NOT HEALTHY: {sentence}\n")


def test_problems_of_others_do_not_make_the_daemon_unhealthy(name: str) -> None:
    text, status = shown(overview(problems=(Found("manifests", "web.yaml", "a typo"),)), Format.TABLE, name)
    assert status == 0
    assert "manifests  web.yaml      a typo" in text


STALE = Condition(SourceState.STALE, 1767225600.0, "https://10.0.0.1:6443: connection refused", 12, 8.5)


def test_a_source_that_lost_its_server_is_said_with_its_retries(name: str) -> None:
    text, status = shown(overview(sources={"kubernetes": STALE, "local": LIVE}), Format.TABLE, name)
    assert status == 0, "what it knew is served"
    assert (
        "source kubernetes: stale since 2026-01-01T00:00:00Z, https://10.0.0.1:6443: connection refused "
        "(12 failed attempts, next in 8.5 s)\n"
    ) in text
    assert "local" not in text
    assert "source local: live\n" in shown(overview(sources={"local": LIVE}), Format.WIDE, name)[0]


def test_what_is_remembered_is_said_to_be_so(name: str) -> None:
    found = overview(synced_sources=False, remembered=1767225600.0, sources={"kubernetes": STALE})
    text, status = shown(found, Format.TABLE, name)
    assert status == 0
    assert text.startswith("healthy: last sync 1.2 s ago; serving what was remembered on 2026-01-01T00:00:00Z\n")
    (item,) = json.loads(document(found))["items"]
    assert item["rememberedSince"] == "2026-01-01T00:00:00Z"
    assert item["sources"] == [
        {
            "name": "kubernetes",
            "state": "stale",
            "since": "2026-01-01T00:00:00Z",
            "detail": "https://10.0.0.1:6443: connection refused",
            "failures": 12,
            "retryInSeconds": 8.5,
        }
    ]


def test_many_problems_are_cut_short_for_people_only(name: str) -> None:
    found = overview(problems=tuple(Found("sync", f"ns/s{number}", "full") for number in range(30)))
    text, _ = shown(found, Format.TABLE, name)
    assert text.endswith("+10 more (-o wide shows all)\n")
    assert "more" not in shown(found, Format.WIDE, name)[0]
    assert len(json.loads(shown(found, Format.JSON, name)[0])["items"][0]["problems"]) == 30


def test_the_better_dataplanes_and_the_one_before_are_shown(name: str) -> None:
    identity = Identity("node-1", "iptables", "2026-01-31T12:00:00Z", (("bpf", "no bcc"), ("ipvs", "no ip_vs")))
    retiring = (Retiring("bpf", "keeps the connections that it began; new ones are iptables's"),)
    answer = status_document(identity, FakeDataplane(name="iptables"), overview(), retiring)
    text, _ = shown(overview(), Format.TABLE, name, answer)
    assert "node node-1, dataplane iptables, since" in text
    assert (
        "not bpf, which cannot carry services here: no bcc\nnot ipvs, which cannot carry services here: no ip_vs\n"
        in text
    )
    assert "bpf keeps the connections that it began; new ones are iptables's\n" in text
    (item,) = json.loads(answer)["items"]
    assert item["passed"] == [{"dataplane": "bpf", "reason": "no bcc"}, {"dataplane": "ipvs", "reason": "no ip_vs"}]
    assert item["retiring"] == [{"dataplane": "bpf", "detail": retiring[0].detail}]


def test_status_in_json(name: str) -> None:
    found = overview()
    text, _ = shown(found, Format.JSON, name)
    assert json.loads(text) == json.loads(document(found))
