"""The sender of Events: what it writes, how often, and what it does when it may not or cannot."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import pytest

from ebpflb.model import ServiceName
from ebpflb.source.kube import ApiError, Unreachable
from ebpflb.source.kube.event_objects import Notice, NoticeType
from ebpflb.source.kube.events import EventSender

EVENTS = "/apis/events.k8s.io/v1/namespaces/default/events"
NOON = 1_800_000_000.25


class Reply:
    """A body that is there already."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def read(self) -> bytes:
        return self._body

    def lines(self) -> Iterator[bytes]:
        yield from self._body.splitlines()

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class ApiServer:
    """A client of a server that notes what is written, and fails as a test asks."""

    def __init__(self) -> None:
        self.written: list[tuple[str, str, dict[str, Any]]] = []
        self.services = {"web": "uid-of-web"}
        self.fail: Callable[[str, str], Exception | None] = lambda method, path: None
        self.asked = 0
        self.wrote = threading.Event()

    def get(self, path: str, query: Mapping[str, str], *, timeout: float, stream: bool = False) -> Reply:
        error = self.fail("GET", path)
        if error is not None:
            raise error
        name = query["fieldSelector"].removeprefix("metadata.name=")
        items = [{"metadata": {"uid": self.services[name]}}] if name in self.services else []
        document = json.dumps({"kind": "ServiceList", "items": items}, ensure_ascii=False)
        return Reply(document.encode(errors="surrogateescape"))

    def send(self, method: str, path: str, body: bytes, *, content_type: str, timeout: float) -> bytes:
        self.asked += 1
        error = self.fail(method, path)
        if error is not None:
            raise error
        assert content_type == ("application/json" if method == "POST" else "application/merge-patch+json")
        self.written.append((method, path, json.loads(body)))
        self.wrote.set()
        return b"{}"

    def close(self) -> None:
        pass

    def notes(self) -> list[str]:
        return [body["note"] for method, _, body in self.written if method == "POST"]


class Desk:
    """A sender without its thread, and time."""

    def __init__(self, qps: float = 5.0, burst: int = 10) -> None:
        self.clock = 0.0
        self.server = ApiServer()
        self.sender = EventSender(
            self.server,
            "n1",
            qps=qps,
            burst=burst,
            clock=lambda: self.clock,
            now=lambda: NOON + self.clock,
            random=lambda: 0.0,
        )

    def work(self, seconds: float = 0.0) -> None:
        """What the thread does in so many seconds."""
        end = self.clock + seconds
        while (wait := self.sender.step()) is not None and self.clock + wait <= end:
            self.clock += wait
        self.clock = end


@pytest.fixture
def desk() -> Desk:
    return Desk()


def notice(note: str = "full", about: str = "web", *, everywhere: bool = False) -> Notice:
    service = ServiceName("default", about) if about else None
    return Notice(service, NoticeType.WARNING, "FailedToProgram", "Program", note, everywhere)


def refusal(status: int, reason: str = "", message: str = "no", retry_after: float | None = None) -> ApiError:
    return ApiError(status, reason, message, retry_after)


# ---- What is written ----


def test_an_event_about_a_service(desk: Desk) -> None:
    desk.sender.post(notice())
    desk.work()
    ((method, path, event),) = desk.server.written
    name = event["metadata"].pop("name")
    assert (method, path) == ("POST", EVENTS)
    assert name.startswith("web.")
    assert event == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": "default"},
        "eventTime": "2027-01-15T08:00:00.250000Z",
        "type": "Warning",
        "reason": "FailedToProgram",
        "action": "Program",
        "note": "full",
        "regarding": {
            "apiVersion": "v1",
            "kind": "Service",
            "namespace": "default",
            "name": "web",
            "uid": "uid-of-web",
        },
        "reportingController": "ebpflb",
        "reportingInstance": "ebpflb-n1",
    }


def test_an_event_about_the_node_lies_in_default_and_bears_its_name_as_uid(desk: Desk) -> None:
    desk.sender.post(notice(about=""))
    desk.work()
    ((_, path, event),) = desk.server.written
    assert path == EVENTS
    assert event["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "n1"}


def test_a_service_that_is_gone_gets_no_event(desk: Desk) -> None:
    desk.sender.post(notice(about="gone"))
    desk.sender.post(notice())
    desk.work()
    assert [event["regarding"]["name"] for _, _, event in desk.server.written] == ["web"]


def test_a_uid_that_may_not_be_read_is_left_out(desk: Desk) -> None:
    desk.server.fail = lambda method, path: refusal(403) if method == "GET" else None
    desk.sender.post(notice())
    desk.work()
    assert "uid" not in desk.server.written[0][2]["regarding"]


def test_a_long_note_and_a_long_name_are_cut_to_what_the_server_allows(desk: Desk) -> None:
    server = desk.server
    sender = EventSender(server, "n" * 253, qps=5, burst=5, clock=lambda: 0.0, now=lambda: NOON)
    sender.post(notice("ä" * 1000, about=""))
    sender.step()
    event = server.written[0][2]
    assert len(event["note"].encode()) in (1023, 1024)
    assert event["note"].endswith("…")
    assert len(event["reportingInstance"]) == 128
    assert len(event["metadata"]["name"]) == 253


# ---- Repeats ----


def test_what_happens_again_becomes_a_series(desk: Desk) -> None:
    desk.sender.post(notice())
    desk.work()
    name = desk.server.written[0][2]["metadata"]["name"]
    for count in (2, 3):
        desk.clock += 60
        desk.sender.post(notice())
        desk.work()
        method, path, patch = desk.server.written[-1]
        assert (method, path) == ("PATCH", f"{EVENTS}/{name}")
        assert patch["series"]["count"] == count
    assert patch["series"]["lastObservedTime"] == "2027-01-15T08:02:00.250000Z"


def test_what_happens_again_while_it_waits_is_one_event(desk: Desk) -> None:
    for _ in range(3):
        desk.sender.post(notice())
        desk.clock += 1
    desk.work()
    ((method, _, event),) = desk.server.written
    assert (method, event["series"]) == ("POST", {"count": 3, "lastObservedTime": "2027-01-15T08:00:02.250000Z"})


def test_what_happens_while_it_is_being_written_is_not_lost(desk: Desk) -> None:
    def meanwhile(method: str, path: str) -> None:
        if method == "POST":
            desk.sender.post(notice())

    desk.server.fail = meanwhile
    desk.sender.post(notice())
    desk.work()
    assert [method for method, _, _ in desk.server.written] == ["POST", "PATCH"]
    assert desk.server.written[1][2]["series"]["count"] == 2


def test_an_event_that_has_expired_is_written_anew(desk: Desk) -> None:
    desk.sender.post(notice())
    desk.work()
    desk.clock += 7200
    desk.server.fail = lambda method, path: refusal(404) if method == "PATCH" else None
    desk.sender.post(notice())
    desk.work()
    (_, _, first), (method, _, second) = desk.server.written
    assert method == "POST"
    assert first["metadata"]["name"] != second["metadata"]["name"]


def test_what_every_node_says_is_one_event_of_one_name() -> None:
    first, second = Desk(), Desk()
    second.sender = EventSender(second.server, "n2", qps=5, burst=5, clock=lambda: 9.0, now=lambda: NOON + 5)
    for desk in (first, second):
        desk.sender.post(notice(everywhere=True))
        desk.work()
    names = {desk.server.written[0][2]["metadata"]["name"] for desk in (first, second)}
    assert len(names) == 1
    second.server.fail = lambda method, path: refusal(409, "AlreadyExists") if method == "POST" else None
    second.sender.post(notice(everywhere=True))
    second.work()
    assert (second.server.asked, second.sender.step()) == (2, None)


# ---- How often ----


def test_a_burst_is_written_at_once_and_the_rest_at_the_rate_given() -> None:
    desk = Desk(qps=2, burst=3)
    for number in range(10):
        desk.sender.post(notice(str(number)))
    desk.work()
    assert len(desk.server.written) == 3
    desk.work(2.0)
    assert len(desk.server.written) == 7
    desk.work(10.0)
    assert desk.server.notes() == [str(number) for number in range(10)]


def test_of_too_many_the_oldest_go_and_are_counted(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1003):
        desk.sender.post(notice(str(number), about=""))
    with caplog.at_level(logging.WARNING, logger="ebpflb"):
        desk.work(1000)
    assert desk.sender.dropped == 3
    assert desk.server.notes()[0] == "3"
    assert len(desk.server.notes()) == 1000
    assert len([record for record in caplog.records if "the oldest of 1000" in record.getMessage()]) == 1


# ---- When it cannot be written ----


def test_a_server_that_is_away_keeps_everything_waiting(desk: Desk) -> None:
    desk.server.fail = lambda method, path: Unreachable("away")
    desk.sender.post(notice("one", about=""))
    desk.sender.post(notice("two", about=""))
    desk.work(600)
    asked = desk.server.asked
    assert 10 <= asked <= 20
    desk.server.fail = lambda method, path: None
    desk.work(60)
    assert desk.server.notes() == ["one", "two"]


def test_an_attempt_whose_answer_was_lost_makes_no_second_event(desk: Desk) -> None:
    names: list[str] = []

    class Lossy(ApiServer):
        def send(self, method: str, path: str, body: bytes, *, content_type: str, timeout: float) -> bytes:
            names.append(json.loads(body)["metadata"]["name"])
            raise Unreachable("cut") if len(names) == 1 else refusal(409, "AlreadyExists")

    sender = EventSender(Lossy(), "n1", qps=5, burst=5, clock=lambda: desk.clock, now=lambda: NOON + desk.clock)
    sender.post(notice(about=""))
    wait = sender.step()
    assert wait
    desk.clock += wait
    sender.step()
    assert names[0] == names[1]
    assert sender.step() is None


def test_a_busy_server_says_when(desk: Desk) -> None:
    desk.server.fail = lambda method, path: refusal(429, "TooManyRequests", retry_after=7)
    desk.sender.post(notice(about=""))
    assert desk.sender.step() == 7


def test_no_permission_is_one_line_and_is_tried_again_rarely(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    words = 'events.events.k8s.io is forbidden: User "u" cannot create resource "events"'
    desk.server.fail = lambda method, path: refusal(403, "Forbidden", words) if method == "POST" else None
    with caplog.at_level(logging.INFO, logger="ebpflb"):
        for number in range(50):
            desk.sender.post(notice(str(number)))
        desk.work(3600)
        assert desk.server.asked <= 7
        assert [record.getMessage() for record in caplog.records] == [
            f"Events cannot be written, and are not tried again for a while: {words}"
        ]
        desk.server.fail = lambda method, path: None
        desk.work(660)
    assert len(desk.server.notes()) == 50
    assert caplog.records[-1].getMessage() == "Events can be written again"
    assert len(caplog.records) == 2


def test_a_namespace_that_is_going_is_no_lack_of_permission(desk: Desk) -> None:
    words = "unable to create new content in namespace x because it is being terminated"
    desk.server.fail = lambda method, path: refusal(403, "Forbidden", words) if method == "POST" else None
    desk.sender.post(notice())
    desk.work()
    assert (desk.sender.dropped, desk.sender.step()) == (1, None)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_the_server_will_never_take_is_left_out(desk: Desk, status: int) -> None:
    desk.server.fail = lambda method, path: refusal(status, "Invalid") if method == "POST" else None
    desk.sender.post(notice())
    desk.work()
    assert (desk.sender.dropped, desk.sender.step()) == (1, None)


# ---- The thread ----


def test_a_fault_in_writing_one_event_costs_that_one_only(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.server.fail = lambda method, path: RuntimeError("no idea") if method == "POST" else None
    desk.sender.post(notice("first"))
    with caplog.at_level(logging.WARNING, "ebpflb"):
        desk.work()
    assert desk.sender.dropped == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "an Event could not be written: unexpected RuntimeError: no idea"
    desk.server.fail = lambda method, path: None
    desk.sender.post(notice("second"))
    desk.work()
    assert desk.server.notes() == ["second"]


def test_a_list_that_is_no_text_gives_no_uid(desk: Desk) -> None:
    desk.server.services["web"] = "\udcff"
    desk.sender.post(notice())
    desk.work()
    ((_, _, event),) = desk.server.written
    assert "uid" not in event["regarding"]


def until_ended() -> None:
    """Closing waits for the thread only for a moment, and a busy machine may hold it for longer."""
    deadline = time.monotonic() + 10
    while "events" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < deadline, "the thread goes on"
        time.sleep(0.001)


def test_the_thread_writes_what_is_posted_and_ends_when_closed() -> None:
    server = ApiServer()
    sender = EventSender(server, "n1", qps=100, burst=100)
    sender.start()
    sender.post(notice())
    assert server.wrote.wait(10)
    sender.close()
    until_ended()
    sender.post(notice("late"))
    assert sender.step() is None


def test_close_ends_a_thread_that_waits_for_better_times() -> None:
    server = ApiServer()
    tried = threading.Event()

    def fail(method: str, path: str) -> Exception:
        tried.set()
        return refusal(403)

    server.fail = fail
    sender = EventSender(server, "n1", qps=100, burst=100)
    sender.post(notice(about=""))
    sender.start()
    assert tried.wait(10)
    sender.close()
    until_ended()
