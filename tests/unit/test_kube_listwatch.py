"""One kind's list and watch against a model API server: what it asks for, what it says, how long it waits.

Rules of this file: no thread and no wait; each round is one call, on a clock that only the server and the waits move.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import pytest

from ebpflb.model import ServiceName
from ebpflb.source import DropNode, DropService, DropSlice, Event, PutNode, PutService, PutSlice, Synced
from ebpflb.source.kube import Unreachable, decode
from ebpflb.source.kube.decode import Kind
from ebpflb.source.kube.lists import Timing
from ebpflb.source.kube.listwatch import Doing, ListWatch
from ebpflb.source.kube.outbox import Outbox
from tests.kubeapi import RESTORED, ApiServer, Fault, ModelClient, node, service, slice_


class Open:
    """The source does not close until `closed` is set; waits are noted, and take their time."""

    def __init__(self, server: ApiServer, *, waits: int = 0) -> None:
        self.server = server
        self.left = waits
        self.waited: list[float] = []
        self.closed = False

    def wait(self, timeout: float) -> bool:
        self.waited.append(timeout)
        self.server.clock.now += timeout
        self.left -= 1
        return self.left <= 0

    def is_set(self) -> bool:
        return self.closed


class Follower:
    """One kind, followed."""

    def __init__(
        self, server: ApiServer, kind: Kind = decode.SERVICES, *, random: float = 0.0, page: int = 500
    ) -> None:
        self.server = server
        self.outbox = Outbox("kubernetes", [kind])
        self.stop = Open(server)
        self.client = ModelClient(server, page=page)
        self.watch = ListWatch(
            kind, self.client, self.outbox, stop=self.stop, clock=server.clock, random=lambda: random, born=100.0
        )

    def round(self) -> list[Event]:
        """One attempt and its wait; what was said."""
        pause = self.watch.attempt()
        self.server.clock.now += pause
        return self.outbox.take()

    def pauses(self, number: int) -> list[float]:
        """The waits after that many attempts."""
        found = []
        for _ in range(number):
            found.append(round(self.watch.attempt(), 3))
            self.server.clock.now += found[-1]
        return found

    def problem(self) -> str:
        problem = self.watch.doing.problem
        return problem.reason if problem else ""

    def asked(self) -> list[str]:
        """The verbs of all requests since the last call."""
        verbs = [each.verb for each in self.server.requests]
        self.server.requests.clear()
        return verbs


@pytest.fixture
def server() -> ApiServer:
    found = ApiServer()
    found.put("services", service("web"))
    return found


@pytest.fixture
def follower(server: ApiServer) -> Iterator[Follower]:
    found = Follower(server)
    yield found
    found.outbox.close()


def names(events: list[Event]) -> list[str]:
    """Events in short: + and - before the name; ! for Synced."""
    found = []
    for event in events:
        match event:
            case PutService(service=each):
                found.append(f"+{each.name.name}")
            case PutSlice(slice=one):
                found.append(f"+{one.name.name}")
            case DropService(name=name) | DropSlice(name=name):
                found.append(f"-{name.name}")
            case PutNode(node=this):
                found.append(f"+{this.name}")
            case DropNode():
                found.append("-node")
            case Synced():
                found.append("!")
    return found


# ---- Lists ----


def test_what_exists_is_said_and_then_that_it_was_all(follower: Follower) -> None:
    follower.server.put("services", service("api"))
    assert names(follower.round()) == ["+api", "+web", "!"]
    assert follower.asked() == ["stream", "watch"]


def test_an_empty_cluster_is_complete(follower: Follower) -> None:
    follower.server.delete("services", "ns/web")
    assert names(follower.round()) == ["!"]


def test_a_node_that_does_not_exist_is_an_empty_list(server: ApiServer) -> None:
    follower = Follower(server, decode.node("node1"))
    server.put("nodes", node("node2"))
    assert names(follower.round()) == ["!"]
    server.put("nodes", node("node1"))
    assert names(follower.round()) == ["+node1"]
    server.delete("nodes", "node1")
    assert names(follower.round()) == ["-node"]
    follower.outbox.close()


def test_it_asks_with_kube_proxys_selectors(server: ApiServer) -> None:
    asked = []
    for kind in (decode.SERVICES, decode.SLICES, decode.node("node1")):
        follower = Follower(server, kind)
        follower.round()
        follower.outbox.close()
        asked += [(each.query.get("labelSelector"), each.query.get("fieldSelector")) for each in server.requests]
        server.requests.clear()
    assert asked[::2] == asked[1::2] == [
        ("!service.kubernetes.io/service-proxy-name", "spec.clusterIP!=None"),
        ("!service.kubernetes.io/headless", None),
        (None, "metadata.name=node1"),
    ]  # fmt: skip


def test_a_server_without_streaming_lists_is_asked_once_and_then_for_pages(follower: Follower) -> None:
    follower.server.streams = False
    assert names(follower.round()) == ["+web", "!"]
    assert follower.asked() == ["stream", "list", "watch"]
    follower.server.fault("services", Fault("refuse", status=410))
    follower.round()
    follower.round()
    assert follower.asked() == ["watch", "list", "watch"]
    assert not follower.problem()


def test_a_server_that_cannot_select_by_cluster_ip_is_asked_without(follower: Follower) -> None:
    follower.server.fields = False
    follower.server.put("services", service("headless", "None"))
    assert names(follower.round()) == ["+web", "!"]
    assert follower.server.requests[-1].query.keys() >= {"labelSelector", "watch"}
    assert "fieldSelector" not in follower.server.requests[-1].query
    assert follower.asked() == ["stream", "stream", "watch"]  # it does know how to stream


def test_a_long_list_comes_in_pages_of_500(server: ApiServer) -> None:
    server.streams = False
    for number in range(1200):
        server.put("services", service(f"web-{number}"))
    follower = Follower(server)
    assert len(follower.round()) == 1202
    lists = [each for each in server.requests if each.verb == "list"]
    assert [each.query["limit"] for each in lists] == ["500"] * 3
    assert ["continue" in each.query for each in lists] == [False, True, True]
    follower.outbox.close()


def test_a_list_that_expires_between_pages_starts_again(server: ApiServer) -> None:
    server.streams = False
    for number in range(3):
        server.put("services", service(f"web-{number}"))
    follower = Follower(server, page=2)

    def delete_and_forget() -> None:
        server.delete("services", "ns/web-0")
        server.compact()

    # The first request is the one for a stream, which this server refuses.
    server.meanwhile.extend([lambda: None, lambda: None, delete_and_forget])
    said = names(follower.round())
    assert said[-1] == "!"
    assert {each for each in said if each.startswith("+")} - {"+web-0"} == {"+web", "+web-1", "+web-2"}
    assert said.count("-web-0") == said.count("+web-0")
    follower.outbox.close()


def test_a_list_that_expires_twice_is_asked_for_in_one_piece(server: ApiServer) -> None:
    server.streams = False
    server.put("services", service("api"))
    follower = Follower(server, page=1)
    server.meanwhile.extend([lambda: None, lambda: None, server.compact, lambda: None, server.compact])
    assert names(follower.round())[-1] == "!"
    lists = [each.query for each in server.requests if each.verb == "list"]
    assert [("limit" in each, "continue" in each) for each in lists] == [
        (True, False), (True, True), (True, False), (True, True), (False, False),
    ]  # fmt: skip
    follower.outbox.close()


def test_a_streaming_list_that_never_ends_is_followed_by_pages(follower: Follower) -> None:
    """As with servers that know the words and not the feature: silence after the objects."""
    follower.server.fault("services", Fault("hang", after=1))
    assert names(follower.round()) == []
    assert names(follower.round()) == ["+web", "!"]
    assert follower.asked() == ["stream", "list", "watch"]


@pytest.mark.parametrize("what", ["cut", "half", "garbage", "error", "end"])
def test_half_a_list_is_no_list(follower: Follower, what: str) -> None:
    follower.server.put("services", service("api"))
    follower.server.fault("services", Fault(what, after=1))
    assert "!" not in names(follower.round())
    assert follower.problem()
    assert names(follower.round()) == ["+api", "+web", "!"]
    assert not follower.problem()


def test_what_went_during_an_outage_is_dropped_by_the_next_list_and_nothing_else(follower: Follower) -> None:
    follower.server.put("services", service("api"))
    follower.round()
    follower.server.delete("services", "ns/api")
    follower.server.compact()
    follower.server.fault("services", Fault("down"), Fault("down"))
    for _ in range(2):
        assert names(follower.round()) == []
    assert names(follower.round()) == []  # 410
    assert names(follower.round()) == ["+web", "-api"]


# ---- Watches ----


def test_a_watch_goes_on_where_the_last_one_was(follower: Follower) -> None:
    follower.round()
    follower.server.put("services", service("api"))
    follower.server.fault("services", Fault("cut", after=1))
    assert names(follower.round()) == ["+api"]
    follower.server.delete("services", "ns/web")
    follower.asked()
    assert names(follower.round()) == ["-web"]
    assert follower.asked() == ["look", "watch"]


def test_a_bookmark_moves_the_place_to_go_on_from(follower: Follower) -> None:
    follower.round()
    for _ in range(3):
        follower.server.put("nodes", node("node2"))  # the revision is the store's, whatever was written
    follower.round()
    follower.server.compact()
    assert names(follower.round()) == []
    assert "stream" not in follower.asked()[1:]


def test_a_watch_asks_for_bookmarks_and_for_five_to_ten_minutes(server: ApiServer) -> None:
    for random, seconds in ((0.0, "300"), (0.5, "450"), (0.999, "599")):
        follower = Follower(server, random=random)
        follower.round()
        query = server.requests[-1].query
        assert (query["allowWatchBookmarks"], query["timeoutSeconds"]) == ("true", seconds)
        follower.outbox.close()


def test_a_service_that_turns_headless_or_into_an_external_name_goes(follower: Follower) -> None:
    follower.server.put("services", service("api"))
    follower.round()
    follower.server.put("services", service("web", "None"))
    follower.server.put("services", service("api", "", type="ExternalName", externalName="example.org"))
    assert names(follower.round()) == ["-web", "-api"]


def test_a_service_that_another_proxy_takes_goes(follower: Follower) -> None:
    follower.round()
    taken = service("web")
    taken["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
    follower.server.put("services", taken)
    assert names(follower.round()) == ["-web"]


@pytest.mark.parametrize("fault", [Fault("refuse", status=410, reason="Expired"), Fault("error", status=410)])
def test_gone_means_a_new_list_at_once(follower: Follower, fault: Fault) -> None:
    follower.round()
    follower.asked()
    follower.server.fault("services", fault)
    assert follower.pauses(1) == [0.0]
    assert not follower.problem()
    assert names(follower.round()) == ["+web"]
    assert follower.asked() == ["watch", "stream", "watch"]


def test_history_that_was_forgotten_during_an_outage_is_no_trouble(follower: Follower) -> None:
    follower.round()
    follower.server.fault("services", *[Fault("down")] * 6)
    while follower.server.faults["services"]:
        follower.round()
    assert "connection refused" in follower.problem()
    follower.server.fault("services", Fault(""), Fault("refuse", status=410, reason="Expired"))
    follower.round()
    assert not follower.problem()
    follower.server.fault("services", Fault(""), Fault("refuse", status=410, reason="Expired"))
    follower.round()
    assert "refused to watch services" in follower.problem()  # the list has not helped


def test_gone_again_and_again_is_waited_out(follower: Follower) -> None:
    follower.round()
    for _ in range(3):
        follower.server.fault("services", Fault("refuse", status=410), Fault(""))
    assert follower.pauses(3)[1:] != [0.0, 0.0]


def test_an_error_inside_a_watch_is_retried_from_there(follower: Follower) -> None:
    follower.round()
    follower.asked()
    follower.server.fault("services", Fault("error", status=500))
    assert follower.pauses(1) == [0.2]
    follower.round()
    assert follower.asked() == ["watch", "look", "watch"]


def test_answers_that_fail_three_times_lead_to_a_new_list(follower: Follower) -> None:
    follower.round()
    follower.server.fault("services", *[Fault("refuse", status=400)] * 3)
    follower.pauses(3)
    follower.asked()
    follower.round()
    assert follower.asked() == ["stream", "watch"]


def test_bytes_that_are_no_json_cost_a_watch_and_no_event(follower: Follower) -> None:
    follower.round()
    follower.server.put("services", service("api"))
    follower.server.fault("services", Fault("garbage", after=0))
    assert names(follower.round()) == []
    assert names(follower.round()) == ["+api"]


def test_a_line_that_breaks_off_is_asked_for_again(follower: Follower) -> None:
    follower.round()
    follower.server.put("services", service("api"))
    follower.server.fault("services", Fault("half", after=0))
    assert names(follower.round()) == []
    assert names(follower.round()) == ["+api"]


def test_an_object_that_cannot_be_read_costs_itself_only(follower: Follower) -> None:
    follower.round()
    broken = service("web")
    broken["spec"]["ports"] = "eighty"
    follower.server.put("services", broken)
    follower.server.put("services", service("api"))
    assert names(follower.round()) == ["+api"]
    (problem,) = follower.outbox.problems()
    assert problem.subject == "Service ns/web"
    assert "spec.ports: Expected `array | null`, got `str`" in problem.reason
    assert problem.reason.endswith("; what it was before stays in force")
    # A list that has it does not make it go.
    follower.server.fault("services", Fault("refuse", status=410))
    follower.round()
    assert names(follower.round()) == ["+api"]
    assert len(follower.outbox.problems()) == 1
    follower.server.put("services", service("web"))
    assert names(follower.round()) == ["+web"]
    assert follower.outbox.problems() == []


def test_an_object_that_cannot_be_read_and_then_goes_is_no_problem_any_more(follower: Follower) -> None:
    follower.round()
    broken = service("web")
    broken["spec"]["ports"] = "eighty"
    follower.server.put("services", broken)
    follower.round()
    follower.server.delete("services", "ns/web")
    assert names(follower.round()) == ["-web"]
    assert follower.outbox.problems() == []


def test_an_object_that_cannot_be_read_and_goes_during_an_outage_is_no_problem_any_more(follower: Follower) -> None:
    broken = service("broken")
    broken["spec"]["ports"] = "eighty"
    follower.server.put("services", broken)
    follower.round()
    assert [each.subject for each in follower.outbox.problems()] == ["Service ns/broken"]
    follower.server.delete("services", "ns/broken")
    follower.server.compact()
    follower.round()
    follower.round()
    assert follower.outbox.problems() == []


def test_a_slice_moves_to_another_service(server: ApiServer) -> None:
    server.put("endpointslices", slice_("web-1", "web", "10.0.1.1"))
    follower = Follower(server, decode.SLICES)
    follower.round()
    server.put("endpointslices", slice_("web-1", "api", "10.0.1.1"))
    (event,) = follower.round()
    assert isinstance(event, PutSlice)
    assert event.slice.service == ServiceName("ns", "api")
    server.put("endpointslices", slice_("web-1", "api", labels={"service.kubernetes.io/headless": ""}))
    assert names(follower.round()) == ["-web-1"]
    follower.outbox.close()


def test_when_pods_changed_is_known_of_watch_events_and_not_of_lists(server: ApiServer) -> None:
    old, new = "1970-01-01T00:01:39Z", "1970-01-01T00:01:41.5Z"
    for name, at in (("old", old), ("new", new)):
        annotations = {"endpoints.kubernetes.io/last-change-trigger-time": at}
        server.put("endpointslices", slice_(name, "web", annotations=annotations))
    follower = Follower(server, decode.SLICES)
    assert [event.triggered for event in follower.round() if isinstance(event, PutSlice)] == [0.0, 0.0]
    for name, at in (("old", old), ("new", new)):
        annotations = {"endpoints.kubernetes.io/last-change-trigger-time": at}
        server.put("endpointslices", slice_(name, "web", "10.0.1.1", annotations=annotations))
    assert [event.triggered for event in follower.round() if isinstance(event, PutSlice)] == [0.0, 101.5]
    follower.outbox.close()


# ---- A store that went back ----


def test_a_restored_store_is_noticed_after_a_cut_and_listed(follower: Follower) -> None:
    before = follower.server.objects["services"].copy()
    follower.round()
    follower.server.put("services", service("api"))
    follower.server.meanwhile.append(lambda: None)
    follower.server.meanwhile.append(lambda: follower.server.restore({**follower.server.objects, "services": before}))
    assert names(follower.round()) == []
    follower.asked()
    assert names(follower.round()) == ["+web"]
    assert follower.asked() == ["look", "stream", "watch"]


def test_a_restored_store_that_keeps_silent_is_noticed_by_its_silence(follower: Follower) -> None:
    follower.server.put("services", service("api"))
    before = follower.server.objects.copy()
    follower.round()
    follower.server.restore({**before, "services": {}})
    began = follower.server.clock()
    assert names(follower.round()) == []
    assert follower.server.clock() - began == pytest.approx(130, abs=1)
    # Even if by now it has come further than we were: what it did meanwhile was never said.
    follower.server.revision += 2 * RESTORED
    follower.asked()
    assert names(follower.round()) == ["-api", "-web"]
    assert follower.asked() == ["stream", "watch"]


def test_a_watch_that_goes_back_in_time_is_not_believed(follower: Follower) -> None:
    follower.round()
    follower.server.put("services", service("api"))
    follower.server.put("services", service("api", "172.30.0.9"))
    follower.server.fault("services", Fault("old", after=2))
    assert names(follower.round()) == ["+api", "+api"]
    assert names(follower.round()) == ["+api", "+web"]


def test_what_is_said_twice_is_no_reason_to_list(follower: Follower) -> None:
    follower.round()
    follower.server.put("services", service("api"))
    follower.server.fault("services", Fault("again", after=1))
    assert names(follower.round()) == ["+api", "+api"]
    follower.asked()
    follower.round()
    assert follower.asked() == ["watch"]


# ---- Waits ----


def test_the_first_retry_is_quick_and_the_later_ones_take_longer(follower: Follower) -> None:
    follower.server.fault("services", *[Fault("down")] * 12)
    pauses = follower.pauses(12)
    assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
    assert pauses[-3:] == [30.0] * 3


def test_retries_are_spread(server: ApiServer) -> None:
    server.fault("services", Fault("down"), Fault("down"))
    follower = Follower(server, random=0.5)
    assert follower.pauses(2) == [0.15, 0.3]
    follower.outbox.close()


def test_a_watch_that_has_lived_makes_the_next_retry_quick_again(follower: Follower) -> None:
    follower.server.fault("services", *[Fault("down")] * 6)
    follower.pauses(6)
    follower.server.fault("services", Fault(""), Fault("hang"))
    follower.round()
    assert follower.watch.doing.failures == 1
    assert follower.watch.doing.retry_at == pytest.approx(follower.server.clock())


def test_a_watch_that_says_something_and_is_cut_is_retried_quickly_each_time(follower: Follower) -> None:
    follower.round()
    for number in range(3):
        follower.server.put("services", service(f"web-{number}"))
    follower.server.fault("services", *[fault for _ in range(3) for fault in (Fault("cut", after=1), Fault(""))][:-1])
    assert follower.pauses(3) == [0.2] * 3


@pytest.mark.parametrize("asked, waited", [(7.0, 7.0), (0.1, 0.2), (3600.0, 60.0)])
def test_a_server_that_asks_for_time_gets_it(follower: Follower, asked: float, waited: float) -> None:
    fault = Fault("refuse", status=429, reason="TooManyRequests", retry_after=asked)
    follower.server.fault("services", fault)
    assert follower.pauses(1) == [waited]


def test_a_server_that_ends_each_watch_at_once_is_not_asked_all_the_time(follower: Follower) -> None:
    follower.round()
    follower.server.fault("services", Fault("end"), Fault(""), Fault("end"), Fault(""), Fault("end"))
    assert follower.pauses(3) == [0.2, 0.4, 0.8]
    assert follower.problem() == "the server ends each watch of services at once"


def test_closing_ends_the_wait(follower: Follower) -> None:
    follower.server.fault("services", *[Fault("down")] * 9)
    follower.stop.left = 3
    follower.watch.run()
    assert follower.stop.waited == [pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.8)]


def test_closing_in_the_middle_is_no_problem(follower: Follower) -> None:
    follower.round()

    def close() -> None:
        follower.stop.closed = True
        follower.client.close()

    follower.server.meanwhile.append(close)
    follower.watch.run()
    assert follower.watch.doing.failures == 0
    assert not follower.problem()


# ---- What is wrong, in words ----


REFUSALS = {
    "no permission": (
        Fault("refuse", status=403, reason="Forbidden", message="User cannot list"),
        "the API server refused to list services: User cannot list; give the ServiceAccount list and watch on services",
    ),
    "not who we say": (
        Fault("refuse", status=401, reason="Unauthorized", message="Unauthorized"),
        "Unauthorized",
    ),
    "something else listens": (
        Fault("refuse", status=404, reason="", message="not found"),
        "the API server refused to list services: not found; this server has no /api/v1/services: is it a Kubernetes "
        "API server?",
    ),
    "it is broken": (
        Fault("refuse", status=500, reason="InternalError", message="etcd is away"),
        "the API server refused to list services: etcd is away",
    ),
    "nobody there": (Fault("down"), "https://api:6443: connection refused"),
}


def test_a_refusal_reads_the_same_whichever_way_of_listing_meets_it(follower: Follower) -> None:
    """A real server says "watch" of a streaming list and "list" of one in pages, and these take turns."""
    for verb in ("watch", "list") * 3:
        words = f'User "x" cannot {verb} resource "services"'
        follower.server.fault("services", Fault("refuse", status=403, reason="Forbidden", message=words))
    said = set()
    for _ in range(6):
        follower.round()
        said.add(follower.problem())
    assert len(said) == 1 and 'User "x" cannot watch resource "services"' in said.pop()
    follower.server.fault("services", Fault("refuse", status=403, reason="Forbidden", message='User "y" cannot list'))
    follower.round()
    assert 'User "y"' in follower.problem()


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_that_does_not_change(follower: Follower, case: str) -> None:
    fault, words = REFUSALS[case]
    follower.server.fault("services", *[fault] * 5)
    for _ in range(5):
        follower.round()
        assert follower.problem() == words
    assert names(follower.round()) == ["+web", "!"]
    assert not follower.problem()


def test_a_missing_permission_on_slices_names_their_api_group(server: ApiServer) -> None:
    follower = Follower(server, decode.SLICES)
    server.fault("endpointslices", Fault("refuse", status=403, reason="Forbidden"))
    follower.round()
    assert follower.problem().endswith("list and watch on endpointslices in API group discovery.k8s.io")
    follower.outbox.close()


def test_one_cut_of_a_watch_is_no_problem_and_two_are(follower: Follower) -> None:
    follower.round()
    follower.server.fault("services", Fault("cut"), Fault("down"))
    follower.round()
    assert not follower.problem()
    assert follower.watch.doing.broken is not None
    follower.round()
    assert follower.problem() == "https://api:6443: connection refused"
    follower.round()
    assert not follower.problem()
    assert follower.watch.doing.broken is None


def test_it_is_broken_since_the_first_failure(follower: Follower) -> None:
    follower.round()
    began = follower.server.clock()
    follower.server.fault("services", *[Fault("down")] * 4)
    for _ in range(4):
        follower.round()
        assert follower.watch.doing.broken == began


def test_what_fails_inside_a_watch_stays_a_problem_until_a_watch_says_something(server: ApiServer) -> None:
    """Else it would come and go in the log with each attempt."""
    outbox = Outbox("kubernetes", [decode.SERVICES])
    seen: list[str] = []
    watch = ListWatch(
        decode.SERVICES, ModelClient(server), outbox, stop=Open(server), clock=server.clock, random=lambda: 0.0,
        told=lambda: seen.append(watch.doing.problem.reason if watch.doing.problem else ""),
    )  # fmt: skip
    watch.attempt()
    server.fault("services", *[fault for _ in range(4) for fault in (Fault("error", status=500), Fault(""))][:-1])
    for _ in range(5):
        watch.attempt()
    words = "the API server refused to watch services: it is broken"
    assert [each for each, before in zip(seen, ["", *seen], strict=False) if each != before] == [words, ""]
    outbox.close()


def test_a_watch_that_has_stood_for_a_while_ends_the_problem_of_the_last_one(server: ApiServer) -> None:
    """A quiet kind says nothing for a minute: `status` must not name an outage that has been over for as long."""
    outbox = Outbox("kubernetes", [decode.SERVICES])
    granted: list[Doing] = []
    watch = ListWatch(
        decode.SERVICES, ModelClient(server), outbox, stop=Open(server), clock=server.clock, random=lambda: 0.0,
        told=lambda: granted.append(watch.doing) if watch.doing.granted is not None else None,
    )  # fmt: skip
    watch.attempt()
    server.fault("services", *[fault for _ in range(3) for fault in (Fault("error", status=500), Fault(""))][:-1])
    for _ in range(4):
        watch.attempt()
    doing = next(each for each in granted if each.problem)
    assert doing.granted is not None
    assert doing.trouble(doing.granted + 0.5, 1.0) == doing.problem, "it may fail as well"
    assert doing.trouble(doing.granted + 1.0, 1.0) is None
    broken = msgspec.structs.replace(doing, granted=None)
    assert broken.trouble(doing.granted + 3600, 1.0) == doing.problem
    outbox.close()


def test_a_new_problem_wakes_the_loop(follower: Follower) -> None:
    follower.server.fault("services", Fault("down"))
    follower.watch.attempt()
    assert follower.outbox.take() == []
    follower.server.fault("services", Fault("down"))
    follower.watch.attempt()
    with pytest.raises(BlockingIOError):  # the same one again does not
        os.eventfd_read(follower.outbox.fileno())


def test_a_fault_of_ours_is_a_problem_and_not_the_end(server: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    follower = Follower(server)
    server.meanwhile.append(lambda: 1 / 0)  # type: ignore[arg-type]
    follower.round()
    assert follower.problem() == "unexpected ZeroDivisionError: division by zero"
    assert "services: unexpected ZeroDivisionError" in caplog.text
    assert names(follower.round()) == ["+web", "!"]
    follower.outbox.close()


def test_timing_of_another_choice(server: ApiServer) -> None:
    outbox = Outbox("kubernetes", [decode.SERVICES])
    watch = ListWatch(
        decode.SERVICES, ModelClient(server), outbox, stop=Open(server), clock=server.clock, random=lambda: 0.0,
        timing=Timing(page=7, answer=3.0, silence=9.0),
    )  # fmt: skip
    server.streams = False
    watch.attempt()
    assert [(each.verb, each.timeout) for each in server.requests] == [("stream", 3.0), ("list", 3.0), ("watch", 9.0)]
    assert server.requests[1].query["limit"] == "7"
    with pytest.raises(Unreachable):
        client = ModelClient(server)
        client.close()
        client.get("/api/v1/services", {}, timeout=1.0)
    outbox.close()
