"""The API server as a source: its threads, its one stream of events, and how it says that it does.

Rules of this file: real threads and a model API server whose watches stay open; every wait is for a condition, on the
source's own descriptor, with a deadline. Only the clock is the test's.
"""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from ebpflb.errors import SourceError
from ebpflb.model import Node, ServiceName
from ebpflb.source import (
    DropNode,
    DropService,
    DropSlice,
    Event,
    PutNode,
    PutService,
    PutSlice,
    Remembered,
    SourceState,
    Synced,
)
from ebpflb.source.kube import decode
from ebpflb.source.kube.lastgood import Saved
from ebpflb.source.kube.lists import Timing
from ebpflb.source.kube.outbox import Outbox
from ebpflb.source.kube.source import KubeSource
from ebpflb.source.store import Store
from tests import world
from tests.kubeapi import ApiServer, Clock, Fault, ModelClient, node, service, slice_
from tests.unit.test_kube_listwatch import names

DEADLINE = 30.0

# Retries that a test can wait for.
QUICK = Timing(retry_first=0.001, retry_most=0.01)


class Running:
    """A source that runs, and what it said so far."""

    def __init__(self, server: ApiServer, **more: object) -> None:
        self.server = server
        self.clock = Clock()
        self.store = Store("node1", ["kubernetes"])
        self.said: list[Event] = []
        given: dict[str, object] = {"patience": 60.0, "timing": QUICK, **more}
        self.source = KubeSource(
            ModelClient(server, follow=True),
            "node1",
            clock=self.clock,
            now=lambda: self.clock() + 1e6,
            random=random.random,
            **given,  # type: ignore[arg-type]
        )

    def read(self) -> list[Event]:
        events = self.source.read()
        self.said += events
        for each in events:
            self.store.apply(each)
        return events

    def until(self, condition: Callable[[], object]) -> None:
        """Read whenever there is something to read, until `condition`."""
        deadline = time.monotonic() + DEADLINE
        self.read()
        while not condition():
            assert time.monotonic() < deadline, (names(self.said), self.source.problems(), self.source.condition())
            # What only threads tell one another wakes nobody here.
            select.select([self.source], [], [], 0.01)
            self.read()

    def synced(self) -> Running:
        self.until(lambda: self.store.synced)
        return self

    def down(self, times: int = 100_000) -> None:
        """Nobody answers any more, and what was open is cut."""
        for resource in self.server.faults:
            self.server.fault(resource, *[Fault("down")] * times)
        self.server.cut_all()

    def up(self) -> None:
        for faults in self.server.faults.values():
            faults.clear()


@pytest.fixture
def server() -> ApiServer:
    found = ApiServer()
    found.put("services", service("web"))
    found.put("endpointslices", slice_("web-1", "web", "10.0.1.1"))
    found.put("nodes", node())
    return found


@pytest.fixture
def running(server: ApiServer) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**more: object) -> Running:
        started.append(Running(server, **more))
        return started[-1]

    yield start
    for each in started:
        each.source.close()
    deadline = time.monotonic() + DEADLINE  # closing itself waits less for a thread that the machine holds
    while left := [each.name for each in threading.enumerate() if each.name.startswith("kubernetes-")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.001)


Start = Callable[..., Running]


def held_by(release: threading.Event) -> Callable[[], None]:
    """An answer that does not come before `release`."""

    def hold() -> None:
        assert release.wait(DEADLINE)

    return hold


# ---- Lists and changes ----


def test_it_is_synced_once_all_three_first_lists_are_complete(running: Start, server: ApiServer) -> None:
    server.fault("nodes", *[Fault("down")] * 5)
    run = running().synced()
    assert sorted(names(run.said[:-1])) == ["+node1", "+web", "+web-1"]
    assert run.said[-1] == Synced("kubernetes")


def test_a_cluster_without_anything_is_synced(running: Start, server: ApiServer) -> None:
    for resource, key in (("services", "ns/web"), ("endpointslices", "ns/web-1"), ("nodes", "node1")):
        server.delete(resource, key)
    assert running().synced().said == [Synced("kubernetes")]


def test_a_change_comes_through_as_it_happens(running: Start, server: ApiServer) -> None:
    run = running().synced()
    server.put("endpointslices", slice_("web-1", "web", "10.0.1.2"))
    run.until(lambda: len(run.said) == 5)
    assert isinstance(run.said[-1], PutSlice)
    server.delete("services", "ns/web")
    run.until(lambda: run.said[-1] == DropService(ServiceName("ns", "web")))


def test_a_burst_wakes_the_loop_and_loses_nothing(running: Start, server: ApiServer) -> None:
    run = running().synced()
    for number in range(1, 251):
        server.put("services", service("web", f"172.30.0.{number}"))
    run.until(lambda: run.store.snapshot().services[ServiceName("ns", "web")].cluster_ips == ("172.30.0.250",))
    assert names(run.said).count("+web") == 251


def test_an_outage_costs_what_changed(running: Start, server: ApiServer) -> None:
    server.put("services", service("api"))
    run = running().synced()
    run.down()
    server.delete("services", "ns/api")
    server.put("services", service("new"))
    server.compact()
    before = len(run.said)
    run.up()
    run.until(lambda: ServiceName("ns", "new") in run.store.snapshot().services)
    run.until(lambda: ServiceName("ns", "api") not in run.store.snapshot().services)
    assert not {"-web", "-node", "-web-1"} & set(names(run.said[before:]))


def test_closing_ends_the_threads_promptly_whatever_they_wait_for(running: Start, server: ApiServer) -> None:
    server.fault("nodes", *[Fault("down")] * 3)
    run = running(timing=Timing(retry_first=3600, retry_most=3600))
    run.until(lambda: server.objects and len(server.requests) >= 5)
    began = time.monotonic()
    run.source.close()
    assert time.monotonic() - began < DEADLINE  # and not an hour, which is when they would try again
    run.source.close()
    assert run.source.read() == []


def test_a_source_that_was_never_read_closes(running: Start) -> None:
    run = running()
    assert run.source.condition().state is SourceState.STARTING
    run.source.close()


# ---- How it does ----


def test_it_starts_it_lives_it_loses_the_server_and_finds_it_again(running: Start, server: ApiServer) -> None:
    run = running()
    assert run.source.condition().state is SourceState.STARTING
    assert run.source.condition().since == 1e6 + 1000
    run.clock.now += 2
    run.synced()
    condition = run.source.condition()
    assert (condition.state, condition.since, condition.failures) == (SourceState.LIVE, 1e6 + 1002, 0)
    assert condition.retry_in is None

    run.clock.now += 100
    run.down()
    # All three have noticed, and tried again, before time goes on.
    run.until(lambda: all(each.doing.failures > 1 for each in run.source._watches))
    assert len([each for each in run.source.problems() if each.code == "Unreachable"]) == 1
    run.clock.now += 4
    assert run.source.condition().state is SourceState.LIVE  # it may be back at once
    run.clock.now += 2
    condition = run.source.condition()
    assert (condition.state, condition.since) == (SourceState.STALE, 1e6 + 1102)
    assert condition.failures > 1
    assert condition.retry_in is not None
    assert "connection refused" in condition.detail

    run.clock.now += 60
    run.up()
    run.until(lambda: run.source.condition().state is SourceState.LIVE)
    assert run.source.condition().since == 1e6 + 1168
    run.until(lambda: not run.source.problems())
    assert run.source.condition().detail == ""


def test_the_same_trouble_of_all_three_is_one_problem(running: Start, server: ApiServer) -> None:
    run = running()
    run.down()
    run.until(lambda: all(each.failures > 1 for each in [run.source.condition()]))
    (problem,) = run.source.problems()
    assert problem == ("API server", "https://api:6443: connection refused", "Unreachable")


def test_a_missing_permission_is_said_of_each_kind(running: Start, server: ApiServer) -> None:
    for resource in server.faults:
        server.fault(resource, *[Fault("refuse", status=403, reason="Forbidden", message="User x cannot")] * 10_000)
    run = running()
    run.until(lambda: len(run.source.problems()) == 3)
    assert [each.subject for each in run.source.problems()] == ["services", "endpointslices", "nodes"]
    assert {each.code for each in run.source.problems()} == {"Forbidden"}


def test_a_thread_that_hangs_is_seen(running: Start, server: ApiServer) -> None:
    release = threading.Event()
    run = running().synced()
    assert run.source.condition().idle == 0
    server.meanwhile.append(held_by(release))
    server.put("services", service("api"))
    server.put("nodes", node(zone="zone-b"))
    run.until(lambda: not server.meanwhile)
    run.clock.now += 500  # for one that hangs by now
    assert run.source.condition().idle >= 500
    release.set()
    server.put("services", service("web", "172.30.0.9"))
    server.put("endpointslices", slice_("web-1", "web", "10.0.1.9"))
    server.put("nodes", node(zone="zone-c"))
    run.until(lambda: run.source.condition().idle == 0)


# ---- What is remembered ----


REMEMBERED = world.service("ns/old", "172.30.0.77")


def memory(*more: Event) -> Saved:
    old_web = world.service("ns/web", "172.30.0.66")
    return Saved(123.0, (PutService(REMEMBERED), PutService(old_web), PutNode(Node("node1", known=True)), *more))


def test_without_a_server_it_says_what_was_saved_as_soon_as_an_attempt_has_failed(
    running: Start, server: ApiServer
) -> None:
    run = running(recall=memory)
    run.down()
    run.until(lambda: run.store.ready)
    assert names(run.said[:-1]) == ["+old", "+web", "+node1"]
    assert run.said[-1] == Remembered("kubernetes", 123.0)
    assert run.source.condition().state is SourceState.STALE
    run.up()
    run.synced()
    assert Synced("kubernetes") in run.said
    assert DropService(ServiceName("ns", "old")) in run.said
    assert set(run.store.snapshot().services) == {ServiceName("ns", "web")}
    assert run.store.snapshot().services[ServiceName("ns", "web")].cluster_ips == ("172.30.0.1",)


def test_a_server_that_is_slow_is_waited_for_only_so_long(running: Start, server: ApiServer) -> None:
    release = threading.Event()
    server.meanwhile.extend([held_by(release)] * 3)
    run = running(recall=memory, patience=0.01)
    run.until(lambda: run.store.ready)
    assert not run.store.synced
    release.set()
    run.synced()


def test_with_a_server_nobody_asks_for_what_was_saved(running: Start) -> None:
    asked: list[bool] = []

    def recall() -> Saved:
        asked.append(True)
        return memory()

    run = running(recall=recall).synced()
    run.source.close()
    assert not asked


def test_a_server_that_takes_its_time_is_given_it(running: Start, server: ApiServer) -> None:
    asked: list[bool] = []

    def recall() -> Saved:
        asked.append(True)
        return memory()

    release = threading.Event()
    server.meanwhile.extend([held_by(release)] * 3)
    run = running(recall=recall)
    run.until(lambda: len(server.requests) == 3)
    assert run.said == []
    release.set()
    run.synced()
    assert not asked


def test_a_snapshot_that_is_of_no_use_is_a_problem_until_the_lists_are_there(running: Start) -> None:
    def recall() -> Saved:
        raise SourceError("the snapshot x is not used: it is damaged or cut off")

    run = running(recall=recall)
    run.down()
    run.until(lambda: any(each.code == "NoSnapshot" for each in run.source.problems()))
    assert not run.store.ready
    assert run.source.condition().state is SourceState.STARTING
    run.up()
    run.synced()
    run.until(lambda: not run.source.problems())


def test_without_a_snapshot_it_waits(running: Start) -> None:
    run = running(recall=lambda: None)
    run.down()
    run.until(lambda: run.source.condition().failures > 3)
    assert run.said == []
    assert run.source.condition().state is SourceState.STARTING


# ---- The outbox, by hand ----


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    found = Outbox("kubernetes", [decode.SERVICES, decode.SLICES, decode.node("node1")])
    yield found
    found.close()


def put(outbox: Outbox, obj: dict[str, object]) -> None:
    found = decode.line(decode.SERVICES, msgspec.json.encode({"type": "ADDED", "object": obj}))
    assert isinstance(found, decode.Change)
    outbox.put(decode.SERVICES, [found.said])


def saved_services(*names_of: str) -> dict[str, list[tuple[ServiceName, Event]]]:
    found = [world.service(f"ns/{each}", "172.30.0.88") for each in names_of]
    return {"services": [(each.name, PutService(each)) for each in found]}


def test_what_is_remembered_replaces_nothing_that_was_said_live(outbox: Outbox) -> None:
    outbox.begin(decode.SERVICES)
    put(outbox, service("web"))
    assert outbox.remember(1.0, saved_services("web", "old"))
    assert names(outbox.take()[:-1]) == ["+web", "+old"]
    outbox.listed(decode.SERVICES)
    assert names(outbox.take()) == ["-old"]


def test_a_kind_that_is_listed_is_not_remembered(outbox: Outbox) -> None:
    outbox.begin(decode.SERVICES)
    outbox.listed(decode.SERVICES)
    assert outbox.remember(1.0, saved_services("old"))
    assert outbox.take() == [Remembered("kubernetes", 1.0)]


def test_once_all_is_listed_nothing_is_remembered(outbox: Outbox) -> None:
    for kind in (decode.SERVICES, decode.SLICES, decode.node("node1")):
        outbox.begin(kind)
        outbox.listed(kind)
    assert not outbox.remember(1.0, saved_services("old"))
    assert outbox.take() == [Synced("kubernetes")]


def test_an_object_that_cannot_be_read_stays_what_it_is_remembered_to_be(outbox: Outbox) -> None:
    outbox.begin(decode.SERVICES)
    put(outbox, {"metadata": {"name": "web", "namespace": "ns"}, "spec": 7})
    assert outbox.remember(1.0, saved_services("web"))
    outbox.listed(decode.SERVICES)
    assert names(outbox.take()[:-1]) == ["+web"]


def test_what_was_deleted_live_is_not_brought_back_by_memory(outbox: Outbox) -> None:
    """It was never said, so that its going goes nowhere; the list that is complete then drops it."""
    outbox.begin(decode.SERVICES)
    outbox.put(decode.SERVICES, [decode.Said(ServiceName("ns", "web"), DropService(ServiceName("ns", "web")))])
    outbox.remember(1.0, saved_services("web"))
    outbox.listed(decode.SERVICES)
    assert outbox.take()[-1] == DropService(ServiceName("ns", "web"))


def test_what_goes_without_having_been_known_says_nothing(outbox: Outbox) -> None:
    name = ServiceName("ns", "web")
    outbox.put(decode.SLICES, [decode.Said(name, DropSlice(name))])
    outbox.put(decode.node("node1"), [decode.Said(ServiceName("", "node2"), DropNode())])
    assert outbox.take() == []
    assert not select.select([outbox], [], [], 0)[0]


def test_it_is_readable_while_there_is_something_to_take(outbox: Outbox) -> None:
    def readable() -> bool:
        return bool(select.select([outbox], [], [], 0)[0])

    assert not readable()
    for _ in range(2):
        put(outbox, service("web"))
        put(outbox, service("api"))
        assert readable()
        assert len(outbox.take()) == 2
        assert not readable()
        outbox.wake()
        assert readable()
        assert outbox.take() == []


def test_after_closing_nothing_is_said_and_nobody_is_woken(outbox: Outbox) -> None:
    outbox.close()
    outbox.wake()
    outbox.begin(decode.SERVICES)
    put(outbox, service("web"))
    outbox.listed(decode.SERVICES)
    assert not outbox.remember(1.0, {})


def test_slices_of_memory_are_told_by_their_own_name(running: Start) -> None:
    found = world.endpoint_slice("10.0.1.7", of="ns/web", name="web-9")
    run = running(recall=lambda: memory(PutSlice(found)))
    run.down()
    run.until(lambda: run.store.ready)
    run.up()
    run.synced()
    assert DropSlice(found.name) in run.said
