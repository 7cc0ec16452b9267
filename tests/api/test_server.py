"""What the real API server does that the source relies on, and that the test bed itself works.

Rules of this file: nothing here uses the package under test; a failure means that Kubernetes or the test bed is not as
the other tests take it to be.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.chaos import ChaosProxy, answer_of
from tests.api.client import Api, ApiRefusal, Object, path_of
from tests.api.control_plane import KUBERNETES_IP, NOBODY, ControlPlane, until
from tests.api.objects import endpoint_slice, node, pod, put_node, put_pod, service, set_ready

pytestmark = pytest.mark.api

END_OF_LIST = "k8s.io/initial-events-end"


@pytest.fixture
def home(api: Api) -> Iterator[str]:
    """A Node for pods."""
    put_node(api, node("server-node", "192.168.0.77", zone="a"))
    yield "server-node"
    api.delete("Node", "", "server-node")


def slices_of(api: Api, namespace: str, name: str) -> list[Object]:
    return api.list("EndpointSlice", namespace, {"labelSelector": f"kubernetes.io/service-name={name}"})


def endpoints_of(api: Api, namespace: str, name: str) -> dict[str, tuple[bool, bool, bool]]:
    """Address: ready, serving, terminating."""
    found = {}
    for each in slices_of(api, namespace, name):
        for endpoint in each["endpoints"] or ():
            conditions = endpoint["conditions"]
            found[endpoint["addresses"][0]] = tuple(conditions[key] for key in ("ready", "serving", "terminating"))
    return found


# ---- The test bed ----


def test_pods_with_a_posted_status_make_endpoint_slices(api: Api, namespace: str, home: str) -> None:
    api.create(service(namespace, "web", app="web"))
    one = pod(namespace, "one", "web", home, "10.1.0.1")
    put_pod(api, one)
    put_pod(api, pod(namespace, "two", "web", home, "10.1.0.2", ready=False))
    both = {"10.1.0.1": (True, True, False), "10.1.0.2": (False, False, False)}
    until("both endpoints", lambda: endpoints_of(api, namespace, "web") == both)
    (made,) = slices_of(api, namespace, "web")
    assert made["endpoints"][0]["nodeName"] == home and made["endpoints"][0]["zone"] == "a"
    set_ready(api, one, False)
    until("not ready", lambda: endpoints_of(api, namespace, "web")["10.1.0.1"] == (False, False, False))
    set_ready(api, one, True)
    api.delete("Pod", namespace, "one", grace=30)
    until("terminating", lambda: endpoints_of(api, namespace, "web")["10.1.0.1"] == (False, True, True))
    api.delete("Pod", namespace, "one")
    until("gone", lambda: "10.1.0.1" not in endpoints_of(api, namespace, "web"))


def test_endpoints_without_slices_are_mirrored(api: Api, namespace: str) -> None:
    api.create(service(namespace, "custom"))
    subset = {"addresses": [{"ip": "10.1.0.9"}], "ports": [{"name": "p80", "port": 80}]}
    metadata = {"name": "custom", "namespace": namespace}
    api.create({"apiVersion": "v1", "kind": "Endpoints", "metadata": metadata, "subsets": [subset]})
    (made,) = until("a mirrored slice", lambda: slices_of(api, namespace, "custom"))
    assert made["endpoints"][0]["addresses"] == ["10.1.0.9"]


def test_services_are_dual_stack_and_the_first_is_kubernetes(api: Api, namespace: str) -> None:
    found = api.create(service(namespace, "both", ipFamilyPolicy="RequireDualStack"))
    assert [":" in each for each in found["spec"]["clusterIPs"]] == [False, True]
    assert api.get("Service", "default", "kubernetes")["spec"]["clusterIP"] == KUBERNETES_IP
    (made,) = until("its slice", lambda: slices_of(api, "default", "kubernetes"))
    assert made["endpoints"][0]["addresses"] == ["192.168.0.1"]


def test_a_killed_api_server_comes_back_as_it_was(cluster: ControlPlane, api: Api, namespace: str) -> None:
    before = api.create(service(namespace, "kept"))
    cluster.apiserver.kill()
    with pytest.raises(OSError):
        api.raw("GET", "/readyz")
    cluster.start_apiserver()
    assert api.get("Service", namespace, "kept")["spec"] == before["spec"]


def test_a_restored_etcd_has_forgotten_what_came_since(cluster: ControlPlane, api: Api, namespace: str) -> None:
    api.create(service(namespace, "old"))
    saved = cluster.save()
    for number in range(30):
        api.create(service(namespace, f"new-{number}"))
    before = cluster.revision()
    assert cluster.restore(saved) < before
    assert [each["metadata"]["name"] for each in api.list("Service", namespace)] == ["old"]


def test_objects_stored_by_the_thousand_are_like_others(cluster: ControlPlane, api: Api, namespace: str) -> None:
    slices = [endpoint_slice(namespace, f"many-{number}", "many", ["10.1.0.1"]) for number in range(1000)]
    cluster.load("endpointslices", slices)
    until("all of them", lambda: len(slices_of(api, namespace, "many")) == 1000)
    api.patch("EndpointSlice", namespace, "many-7", {"metadata": {"labels": {"kubernetes.io/service-name": "few"}}})
    assert len(slices_of(api, namespace, "few")) == 1
    cluster.unload("endpointslices", namespace)
    until("none of them", lambda: not api.list("EndpointSlice", namespace))


def test_one_who_may_nothing_hears_why(cluster: ControlPlane) -> None:
    with cluster.api_of(NOBODY) as stranger:
        answer = stranger.raw("GET", path_of("Service"))
    assert answer.status == 403 and answer.document["reason"] == "Forbidden"
    assert 'User "nobody" cannot list resource "services"' in answer.document["message"]


def test_a_proxy_lets_everything_pass_until_it_is_told_not_to(cluster: ControlPlane, proxy: ChaosProxy) -> None:
    with cluster.api_of(NOBODY, port=proxy.port) as stranger:
        assert stranger.raw("GET", "/readyz").body == b"ok"
        proxy.answer = answer_of(429, {"Retry-After": "1"})
        assert stranger.raw("GET", "/readyz").headers["retry-after"] == "1"
        proxy.behave()
        assert stranger.raw("GET", "/readyz").body == b"ok"


# ---- What the source relies on ----


def test_a_streamed_list_ends_with_a_marked_bookmark(api: Api, namespace: str) -> None:
    for number in range(3):
        api.create(service(namespace, f"s{number}"))
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
    kinds = []
    for event in api.watch(path_of("Service", namespace), {**query, "timeoutSeconds": "10"}):
        kinds.append(event["type"])
        metadata = event["object"]["metadata"]
        if event["type"] == "BOOKMARK":
            assert metadata["annotations"] == {END_OF_LIST: "true"} and int(metadata["resourceVersion"]) > 0
            break
        assert "annotations" not in metadata
    assert kinds == ["ADDED"] * 3 + ["BOOKMARK"]


def test_a_list_comes_in_pages_of_one_moment(api: Api, namespace: str) -> None:
    for number in range(7):
        api.create(service(namespace, f"s{number}"))
    found, token, versions = [], "", set()
    while True:
        query = {"limit": "3", **({"continue": token} if token else {})}
        page = api.ask("GET", path_of("Service", namespace), query)
        found += [each["metadata"]["name"] for each in page["items"]]
        versions.add(page["metadata"]["resourceVersion"])
        if len(found) == 3:
            api.delete("Service", namespace, "s6")  # too late to be missing from this list
        token = page["metadata"].get("continue", "")
        if not token:
            break
    assert found == [f"s{number}" for number in range(7)] and len(versions) == 1


def test_a_page_from_before_a_compaction_is_refused_with_a_way_on(
    cluster: ControlPlane, api: Api, namespace: str
) -> None:
    for number in range(5):
        api.create(service(namespace, f"s{number}"))
    page = api.ask("GET", path_of("Service", namespace), {"limit": "2"})
    api.create(service(namespace, "later"))
    cluster.compact()
    cluster.apiserver.kill()
    cluster.start_apiserver()  # a server that still has the list in its cache goes on with it
    with pytest.raises(ApiRefusal) as refusal:
        api.ask("GET", path_of("Service", namespace), {"limit": "2", "continue": page["metadata"]["continue"]})
    said = refusal.value.answer.document
    assert (said["code"], said["reason"]) == (410, "Expired")
    rest = api.ask("GET", path_of("Service", namespace), {"limit": "10", "continue": said["metadata"]["continue"]})
    assert [each["metadata"]["name"] for each in rest["items"]] == ["s2", "s3", "s4"]  # those of now, from there on


def test_a_watch_from_before_a_compaction_is_told_so_inside_the_stream(
    cluster: ControlPlane, api: Api, namespace: str
) -> None:
    version = api.create(service(namespace, "old"))["metadata"]["resourceVersion"]
    for number in range(3):
        api.create(service(namespace, f"s{number}"))
    cluster.compact()
    cluster.apiserver.kill()
    cluster.start_apiserver()  # its watch cache begins now
    watched = api.watch(path_of("Service", namespace), {"resourceVersion": version, "timeoutSeconds": "5"})
    event = next(watched)
    assert event["type"] == "ERROR"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")
    assert list(watched) == []


def test_a_watch_without_news_gives_bookmarks_near_its_end_and_ends_in_good_order(api: Api, namespace: str) -> None:
    version = api.create(service(namespace, "one"))["metadata"]["resourceVersion"]
    api.create(service("default", namespace))
    api.delete("Service", "default", namespace)
    query = {"resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": "8"}
    # A server that a busy machine holds in the last two seconds of a watch sends none.
    events = until("bookmarks", lambda: list(api.watch(path_of("Service", namespace), query)))
    assert {event["type"] for event in events} == {"BOOKMARK"}
    assert int(events[-1]["object"]["metadata"]["resourceVersion"]) > int(version)


def test_headless_services_can_be_left_out_by_the_server(api: Api, namespace: str) -> None:
    api.create(service(namespace, "headless", clusterIP="None"))
    api.create(service(namespace, "plain"))
    api.create(service(namespace, "elsewhere", type="ExternalName", externalName="example.com"))
    found = api.list("Service", namespace, {"fieldSelector": "spec.clusterIP!=None"})
    assert [each["metadata"]["name"] for each in found] == ["elsewhere", "plain"]


def test_a_service_that_leaves_the_selection_is_deleted_for_the_watcher(api: Api, namespace: str) -> None:
    version = api.create(service(namespace, "web"))["metadata"]["resourceVersion"]
    selection = "!service.kubernetes.io/service-proxy-name"
    query = {"labelSelector": selection, "resourceVersion": version, "timeoutSeconds": "10"}
    watched = api.watch(path_of("Service", namespace), query)
    api.patch("Service", namespace, "web", {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "x"}}})
    assert next(watched)["type"] == "DELETED"
    api.patch("Service", namespace, "web", {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": None}}})
    assert next(watched)["type"] == "ADDED"


def test_large_answers_are_compressed_for_those_who_ask(cluster: ControlPlane, api: Api, namespace: str) -> None:
    slices = [endpoint_slice(namespace, f"wide-{number}", "wide", [f"10.1.{number}.{n}" for n in range(100)])
              for number in range(40)]  # fmt: skip
    cluster.load("endpointslices", slices)
    until("all of them", lambda: len(api.list("EndpointSlice", namespace)) == 40)
    answer = api.raw("GET", path_of("EndpointSlice", namespace), more={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
