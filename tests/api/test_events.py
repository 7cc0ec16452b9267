"""Events as the real API server takes them, written under the role that ebpflb ships."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from ebpflb.model import ServiceName
from ebpflb.notices import Notice, Notices, NoticeType
from ebpflb.source.kube.access import Access, Address
from ebpflb.source.kube.client import HttpClient
from ebpflb.source.kube.events import EventSender
from tests.api.accounts import deploy
from tests.api.client import Api, Object
from tests.api.control_plane import NOBODY, ControlPlane, User, until
from tests.api.objects import service

pytestmark = pytest.mark.api


class Known:
    """A resolver of an Access that never changes."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def resolve(self) -> Access:
        return self._access

    def changed(self) -> bool:
        return False


class Post:
    """Senders of several nodes, worked by hand."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._cluster = cluster
        self._clients: list[HttpClient] = []

    def sender(self, user: User, node: str) -> EventSender:
        access = Access(
            addresses=(Address(self._cluster.url),), ca=self._cluster.authority.bundle.read_text(), token=user.token
        )
        client = HttpClient(Known(access))
        self._clients.append(client)
        return EventSender(client, node, qps=1000, burst=1000)

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def post(cluster: ControlPlane) -> Iterator[Post]:
    made = Post(cluster)
    yield made
    made.close()


def work(sender: EventSender) -> None:
    """Write all that waits. A server that has just been started again may put things off."""
    until("all Events are written", lambda: sender.step() is None)


def described(api: Api, kind: str, namespace: str, name: str, uid: str) -> list[Object]:
    """What `kubectl describe` shows of an object, of us: the API server itself has something to say of a Service too,
    where it comes by at the moment in which that gets its address (ClusterIPNotAllocated)."""
    selector = f"involvedObject.kind={kind},involvedObject.name={name},involvedObject.uid={uid}"
    found = api.list("Event", namespace, {"fieldSelector": selector})
    return [event for event in found if event.get("reportingComponent") == "ebpflb"]


def failed(namespace: str, *, everywhere: bool = False) -> Notice:
    note = "frontends is full"
    return Notice(ServiceName(namespace, "web"), NoticeType.WARNING, "FailedToProgram", "Program", note, everywhere)


def test_an_event_about_a_service_is_seen_by_describe_and_becomes_a_series(
    api: Api, namespace: str, post: Post
) -> None:
    uid = api.create(service(namespace, "web"))["metadata"]["uid"]
    sender = post.sender(deploy(api), "n1")
    for _ in range(3):
        sender.post(failed(namespace))
        work(sender)
    (event,) = described(api, "Service", namespace, "web", uid)
    assert (event["reason"], event["message"], event["action"], event["type"]) == (
        "FailedToProgram", "frontends is full", "Program", "Warning",
    )  # fmt: skip
    assert event["reportingInstance"] == "ebpflb-n1"
    assert event["series"]["count"] == 3
    assert sender.dropped == 0


def test_what_two_nodes_say_alike_is_one_event(api: Api, namespace: str, post: Post) -> None:
    uid = api.create(service(namespace, "web"))["metadata"]["uid"]
    user = deploy(api)
    for node in ("n1", "n2"):
        sender = post.sender(user, node)
        sender.post(failed(namespace, everywhere=True))
        work(sender)
        assert sender.dropped == 0
    assert len(described(api, "Service", namespace, "web", uid)) == 1


def test_the_start_is_told_of_the_node(api: Api, namespace: str, post: Post) -> None:
    node = f"node-of-{namespace}"
    sender = post.sender(deploy(api), node)
    Notices(sender.post, node).starting("1", "ipvs", (("bpf", "no cgroup2"),))
    work(sender)
    events = described(api, "Node", "default", node, node)
    assert sorted((event["type"], event["reason"]) for event in events) == [
        ("Normal", "Starting"),
        ("Warning", "DataplaneUnavailable"),
    ]
    assert sender.dropped == 0


def test_the_longest_texts_are_taken(api: Api, post: Post) -> None:
    node = ".".join(["n" * 63] * 3 + ["n" * 61])
    sender = post.sender(deploy(api), node)
    sender.post(Notice(None, NoticeType.NORMAL, "Starting", "Start", "ä" * 2000))
    work(sender)
    (event,) = described(api, "Node", "default", node, node)
    assert event["message"].endswith("…")


def test_a_namespace_that_is_gone_takes_no_event_and_none_waits(api: Api, post: Post) -> None:
    sender = post.sender(deploy(api), "n1")
    sender.post(failed("never-was"))
    work(sender)
    assert sender.dropped == 1


def test_no_permission_is_one_line(api: Api, namespace: str, post: Post, caplog: pytest.LogCaptureFixture) -> None:
    api.create(service(namespace, "web"))
    sender = post.sender(NOBODY, "n1")
    with caplog.at_level(logging.INFO, logger="ebpflb.events"):
        sender.post(failed(namespace))
        waits = [sender.step() for _ in range(5)]
    assert min(wait for wait in waits if wait is not None) > 60
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ebpflb.events"]
    assert 'cannot create resource "events"' in line
