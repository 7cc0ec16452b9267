"""List and watch against a real API server: each way in which it can be interrupted, and that nothing is lost or kept.

Rules of this file: every test ends by comparing all that the source said with a fresh list. What the chaos proxy does
stands for networks and load balancers; what is done to the server is done to the real one.
"""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec.structs import replace

from ebpflb.model import Problem, ServiceName
from ebpflb.source import DropService, PutNode, PutService, PutSlice, SourceState, Synced
from tests.api.chaos import ChaosProxy, answer_of
from tests.api.client import Api, Object
from tests.api.control_plane import ADMIN, ControlPlane
from tests.api.follower import IMPATIENT, QUICK, Follower, access
from tests.api.objects import endpoint_slice, node, pod, put_node, put_pod, service, set_ready

pytestmark = pytest.mark.api


def follower(cluster: ControlPlane, proxy: ChaosProxy | None = None, **options: object) -> Follower:
    return Follower(access(cluster, ADMIN, *([proxy.port] if proxy else [])), **options)  # type: ignore[arg-type]


def relabelled(found: Object, of: str) -> Object:
    return {"metadata": {"labels": {**found["metadata"]["labels"], "kubernetes.io/service-name": of}}}


# ---- In good weather ----


def test_what_exists_and_then_every_change(cluster: ControlPlane, api: Api, namespace: str) -> None:
    api.create(service(namespace, "old"))
    with follower(cluster) as following:
        following.sync()
        assert following.has(namespace, "old") and following.has("default", "kubernetes")
        assert sum(isinstance(event, Synced) for event in following.said) == 1
        api.create(service(namespace, "new"))
        api.create(endpoint_slice(namespace, "new-1", "new", ["10.1.0.1", "10.1.0.2"]))
        following.until("a new Service", lambda: following.backends(namespace, "new") == ["10.1.0.1", "10.1.0.2"])
        api.delete("Service", namespace, "old")
        following.until("one less", lambda: not following.has(namespace, "old"))
        following.agrees(api)
        assert following.source.condition().state is SourceState.LIVE and not following.source.problems()


def test_what_is_not_ours_is_never_said(cluster: ControlPlane, api: Api, namespace: str) -> None:
    api.create(service(namespace, "headless", clusterIP="None"))
    api.create(service(namespace, "elsewhere", type="ExternalName", externalName="example.com"))
    found = service(namespace, "others")
    found["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "another"}
    api.create(found)
    with follower(cluster) as following:
        following.sync()
        api.create(service(namespace, "ours"))
        following.until("ours", lambda: following.has(namespace, "ours"))
        assert [name.name for name in following.snapshot.services if name.namespace == namespace] == ["ours"]
        following.agrees(api)


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "in-pages"])
def test_five_thousand_services_in_one_list(cluster: ControlPlane, api: Api, namespace: str, streaming: bool) -> None:
    made = api.create(service(namespace, "first"))
    objects = [many_of(made, number) for number in range(5000)]
    cluster.load("services/specs", objects)
    try:
        with follower(cluster, streaming=streaming) as following:
            following.sync()
            assert sum(name.namespace == namespace for name in following.snapshot.services) == 5001
            assert following.client.lists("services") == (1 if streaming else 2)  # the first of which was refused
            assert following.client.pages("services") == (0 if streaming else 10)
            following.agrees(api)
            cluster.unload("services/specs", namespace)
            following.until(
                "all gone", lambda: not any(name.namespace == namespace for name in following.snapshot.services)
            )
            following.agrees(api)
    finally:
        cluster.unload("services/specs", namespace)


def many_of(made: Object, number: int) -> Object:
    """Another Service like one that the server has completed, as etcd has them."""
    address = f"10.96.{128 + number // 200}.{number % 200 + 1}"
    metadata = {key: made["metadata"][key] for key in ("namespace", "creationTimestamp")}
    spec = {**made["spec"], "clusterIP": address, "clusterIPs": [address]}
    return {**made, "metadata": {**metadata, "name": f"many-{number:04}"}, "spec": spec}


def test_a_slice_moves_between_services_by_its_label(cluster: ControlPlane, api: Api, namespace: str) -> None:
    for name in ("one", "two"):
        api.create(service(namespace, name))
    made = api.create(endpoint_slice(namespace, "slice", "one", ["10.1.0.1"]))
    with follower(cluster) as following:
        following.sync()
        assert following.backends(namespace, "one") == ["10.1.0.1"]
        api.patch("EndpointSlice", namespace, "slice", relabelled(made, "two"))
        following.until("moved", lambda: following.backends(namespace, "two") == ["10.1.0.1"])
        assert following.backends(namespace, "one") == []
        api.patch("EndpointSlice", namespace, "slice", relabelled(made, "one"))
        following.until("moved back", lambda: following.backends(namespace, "one") == ["10.1.0.1"])
        following.agrees(api)


def test_pods_come_and_go_become_ready_and_terminate(cluster: ControlPlane, api: Api, namespace: str) -> None:
    put_node(api, node("watch-node", "192.168.0.77"))
    api.create(service(namespace, "web", app="web"))
    with follower(cluster) as following:
        following.sync()
        # The times of pods are whole seconds, rounded down, and what was before the source's start does not count.
        synced = time.time()
        following.until("the next second", lambda: int(time.time()) > synced)
        pods = [pod(namespace, f"web-{number}", "web", "watch-node", f"10.1.0.{number}") for number in range(1, 4)]
        for each in pods:
            put_pod(api, each)
        following.until("three", lambda: len(following.backends(namespace, "web")) == 3)
        assert any(isinstance(event, PutSlice) and event.triggered > 0 for event in following.said)

        def conditions(address: str) -> tuple[bool, bool, bool] | None:
            slices = following.snapshot.slices[ServiceName(namespace, "web")]
            for endpoint in (endpoint for each in slices for endpoint in each.endpoints):
                if endpoint.address == address:
                    return endpoint.ready, endpoint.serving, endpoint.terminating
            return None

        set_ready(api, pods[0], False)
        following.until("not ready", lambda: conditions("10.1.0.1") == (False, False, False))
        api.delete("Pod", namespace, "web-2", grace=60)
        following.until("terminating", lambda: conditions("10.1.0.2") == (False, True, True))
        api.patch("Pod", namespace, "web-3", {"metadata": {"labels": {"app": "other"}}})
        following.until("taken out", lambda: conditions("10.1.0.3") is None)
        following.agrees(api)
    api.delete("Node", "", "watch-node")


def test_this_node_is_followed_and_no_other(cluster: ControlPlane, api: Api) -> None:
    put_node(api, node("my-node", "192.168.0.70", zone="a"))
    put_node(api, node("another-node", "192.168.0.71", zone="b"))
    try:
        with follower(cluster, node="my-node") as following:
            following.sync()
            assert following.snapshot.node.zone == "a"
            change = {"metadata": {"labels": {"topology.kubernetes.io/zone": "b"}}}
            api.patch("Node", "", "my-node", change)
            following.until("another zone", lambda: following.snapshot.node.zone == "b")
            nodes = {event.node.name for event in following.said if isinstance(event, PutNode)}
            assert nodes == {"my-node"}
            following.agrees(api)
    finally:
        for name in ("my-node", "another-node"):
            api.delete("Node", "", name)


# ---- Watches end ----


def test_watches_that_the_server_closes_every_second_miss_nothing(
    cluster: ControlPlane, api: Api, namespace: str
) -> None:
    timing = replace(QUICK, watch_least=1.0, watch_most=1.9)
    with follower(cluster, timing=timing) as following:
        following.sync()
        for number in range(40):
            api.create(service(namespace, f"s{number}"))
            following.read(0.1)
        following.until("several watches", lambda: following.client.watches("services") >= 4)
        following.agrees(api)
        assert following.client.lists("services") == 1, "a watch that ended properly was followed by a list"
        assert following.source.condition().state is SourceState.LIVE
        following.until("no problem", lambda: not following.source.problems())


def test_a_watch_that_is_cut_goes_on_where_it_was(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str
) -> None:
    with follower(cluster, proxy) as following:
        following.sync()
        for number in range(5):
            api.create(service(namespace, f"s{number}"))
            proxy.cut()
            api.create(endpoint_slice(namespace, f"s{number}", f"s{number}", ["10.1.0.1"]))
            following.until("both", lambda n=number: following.backends(namespace, f"s{n}") == ["10.1.0.1"])  # type: ignore[misc]
        following.agrees(api)
        assert following.client.lists("services") == following.client.lists("endpointslices") == 1


def test_a_watch_that_is_cut_in_the_middle_of_an_event_gets_it_again(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str
) -> None:
    with follower(cluster, proxy) as following:
        following.sync()
        for size in (1, 40, 300, 700):
            proxy.budget = size
            api.create(service(namespace, f"cut-{size}"))
            following.until("cut", lambda: following.source.condition().failures > 0)
            proxy.budget = None
            following.until("whole", lambda n=size: following.has(namespace, f"cut-{n}"))  # type: ignore[misc]
        following.agrees(api)


def test_an_object_deleted_while_the_watch_was_down_goes(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str
) -> None:
    for name in ("kept", "deleted"):
        api.create(service(namespace, name))
    with follower(cluster, proxy) as following:
        following.sync()
        proxy.refusing = True
        proxy.cut()
        api.delete("Service", namespace, "deleted")
        following.until("lost", lambda: following.source.condition().state is SourceState.STALE)
        assert following.has(namespace, "deleted"), "what was there stays while nothing is known"
        proxy.behave()
        following.until("gone", lambda: not following.has(namespace, "deleted"))
        following.agrees(api)


def test_after_a_compaction_a_list_finds_what_has_gone(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str
) -> None:
    for name in ("kept", "deleted"):
        api.create(service(namespace, name))
    with follower(cluster, proxy) as following:
        following.sync()
        proxy.refusing = True
        proxy.cut()
        api.delete("Service", namespace, "deleted")
        api.create(service(namespace, "made"))
        cluster.compact()
        cluster.apiserver.kill()
        cluster.start_apiserver()
        said = len(following.said)
        proxy.behave()
        following.until("made", lambda: following.has(namespace, "made"))
        following.until("gone", lambda: not following.has(namespace, "deleted"))
        following.agrees(api)
        # The first one may find that the server has only begun to fill its cache.
        assert following.client.lists("services") >= 2
        assert DropService(ServiceName(namespace, "deleted")) in following.said[said:]
        api.create(service(namespace, "last"))
        following.until("no problem", lambda: not following.source.problems())


def test_a_proxied_answer_of_410_is_followed_by_a_list(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str
) -> None:
    gone = b'{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410,"message":"too old"}'
    with follower(cluster, proxy) as following:
        following.sync()
        proxy.answer = answer_of(410, {"Content-Type": "application/json"}, gone)
        proxy.cut()
        following.until("asked", lambda: proxy.requests >= 3)
        proxy.behave()
        following.until("listed again", lambda: following.client.lists("services") >= 2)
        following.agrees(api)


# ---- The server goes away ----


def only_refusals(following: Follower) -> tuple[Problem, ...]:
    """The problems, if all are that nobody is there."""
    problems = following.source.problems()
    return problems if all("refused" in problem.reason for problem in problems) else ()


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["shorter", "longer"])
def test_a_killed_api_server_comes_back(cluster: ControlPlane, api: Api, namespace: str, seconds: float) -> None:
    """Shorter and longer than the back-off takes to reach its cap."""
    api.create(service(namespace, "before"))
    with follower(cluster) as following:
        following.sync()
        cluster.apiserver.kill()
        down = time.monotonic()
        following.until("stale", lambda: following.source.condition().state is SourceState.STALE)
        following.until("long enough", lambda: time.monotonic() - down > seconds)
        # One for all three kinds: what each of them says first is that its connection was cut.
        (problem,) = following.until("one problem", lambda: only_refusals(following))
        assert problem.reason.count("\n") == 0, problem
        condition = following.source.condition()
        assert condition.failures > 0 and condition.retry_in is not None and condition.retry_in <= QUICK.retry_most
        assert following.has(namespace, "before")
        cluster.start_apiserver()
        api.create(service(namespace, "after"))
        following.until("after", lambda: following.has(namespace, "after"))
        following.until("live", lambda: following.source.condition().state is SourceState.LIVE)
        following.until("no problem", lambda: not following.source.problems())
        following.agrees(api)


def test_a_stopped_api_server_is_noticed_and_what_follows_is_not_missed(
    cluster: ControlPlane, api: Api, namespace: str
) -> None:
    """As after a cable is pulled: connections stay open and say nothing."""
    with follower(cluster, timing=IMPATIENT) as following:
        following.sync()
        cluster.apiserver.signal(signal.SIGSTOP)
        try:
            following.until("stale", lambda: following.source.condition().state is SourceState.STALE)
            problems = following.until("said why", following.source.problems)
            assert all("\n" not in problem.reason for problem in problems)
        finally:
            cluster.apiserver.signal(signal.SIGCONT)
        api.create(service(namespace, "after"))
        following.until("after", lambda: following.has(namespace, "after"))
        following.agrees(api)


def test_half_open_connections_are_given_up(cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str) -> None:
    with follower(cluster, proxy, timing=IMPATIENT) as following:
        following.sync()
        proxy.swallowing = True
        api.create(service(namespace, "unheard"))
        following.until("noticed", lambda: following.source.condition().state is SourceState.STALE)
        assert not following.has(namespace, "unheard")
        proxy.behave()
        following.until("heard", lambda: following.has(namespace, "unheard"))
        following.agrees(api)


def test_a_restored_etcd_takes_back_what_was_made_since(cluster: ControlPlane, api: Api, namespace: str) -> None:
    """Resource versions go back: a watch from one that is yet to come would be silent until it has come."""
    api.create(service(namespace, "old"))
    saved = cluster.save()
    with follower(cluster) as following:
        following.sync()
        with ThreadPoolExecutor(4) as writers:  # more than the server writes by itself when it starts
            list(writers.map(lambda number: api.create(service(namespace, f"new-{number}")), range(300)))
        following.until("the last", lambda: following.has(namespace, "new-299"))
        cluster.restore(saved)
        following.until("taken back", lambda: not following.has(namespace, "new-299"))
        assert following.has(namespace, "old")
        following.agrees(api)
        api.create(service(namespace, "another"))
        following.until("another", lambda: following.has(namespace, "another"))


# ---- The server says no ----


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again_but_not_at_once(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str, status: int
) -> None:
    with follower(cluster, proxy) as following:
        following.sync()
        headers = {"Retry-After": "1"} if status == 429 else {}
        proxy.answer = answer_of(status, headers, b"in trouble")
        began = time.monotonic()
        proxy.cut()
        api.create(service(namespace, "meanwhile"))
        following.until("three failures", lambda: following.source.condition().failures >= 3)
        took, asked = time.monotonic() - began, proxy.requests
        if status == 429:
            assert took > 0.9, "Retry-After was not heeded"
        assert any(str(status) in problem.reason for problem in following.source.problems())
        assert asked <= 30 * max(1.0, took)  # three kinds, each a few times a second
        proxy.behave()
        following.until("meanwhile", lambda: following.has(namespace, "meanwhile"))
        following.agrees(api)


def test_nothing_is_said_to_be_synced_while_one_kind_cannot_be_listed(cluster: ControlPlane, proxy: ChaosProxy) -> None:
    proxy.answer = answer_of(500)
    with follower(cluster, proxy) as following:
        following.until("tried", lambda: following.source.condition().failures >= 2)
        assert not following.said and following.source.condition().state is SourceState.STARTING
        proxy.behave()
        following.sync()


def test_a_slow_network_only_takes_longer(cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str) -> None:
    proxy.delay = 0.2
    with follower(cluster, proxy) as following:
        following.sync()
        with ThreadPoolExecutor(4) as writers:
            list(writers.map(lambda number: api.create(service(namespace, f"s{number}")), range(20)))
        following.agrees(api)
        assert sum(isinstance(event, PutService) for event in following.said) >= 20
        assert following.source.condition().failures == 0
