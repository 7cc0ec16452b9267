"""Bodies and lines of an API server, as bytes, and what they come to."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from ebpflb.errors import SourceError
from ebpflb.model import ServiceName
from ebpflb.source import DropNode, DropService, DropSlice, PutNode, PutService, PutSlice
from ebpflb.source.kube import decode
from ebpflb.source.kube.decode import SERVICES, SLICES, Bookmark, Change, Failure, Kind, Said
from tests.kubeapi import event, node, service, slice_

NODE = decode.node("node1")
WEB = ServiceName("ns", "web")


def listed(*items: object, **meta: object) -> bytes:
    return msgspec.json.encode({"kind": "List", "metadata": {"resourceVersion": "7", **meta}, "items": items})


def said_of(kind: Kind, type_: str, obj: dict[str, Any], after: float = math.inf) -> Said:
    found = decode.line(kind, event(type_, obj), after=after)
    assert isinstance(found, Change)
    return found.said


# ---- Lists ----


def test_a_page_says_what_is_in_it_and_where_the_next_one_is() -> None:
    page = decode.page(SERVICES, listed(service("web"), service("api"), **{"continue": "abc"}))
    assert [each.name for each in page.said] == [WEB, ServiceName("ns", "api")]
    assert all(isinstance(each.event, PutService) for each in page.said)
    assert (page.version, page.more) == ("7", "abc")


@pytest.mark.parametrize("items", [b"null", b"[]"])
def test_a_list_of_nothing_is_a_list(items: bytes) -> None:
    page = decode.page(SERVICES, b'{"metadata":{"resourceVersion":"7","continue":null},"items":' + items + b"}")
    assert page == ((), "7", "")


def test_a_list_without_items_is_a_list() -> None:
    assert decode.page(SERVICES, b'{"metadata":{"resourceVersion":"7"}}').said == ()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b'{"items":7}', listed(service("web"))[:-9]])
def test_what_is_no_list_is_refused_in_one_line(body: bytes) -> None:
    with pytest.raises(SourceError, match="^the list of services cannot be read: [^\n]+$"):
        decode.page(SERVICES, body)


def test_json_that_is_no_list_is_not_taken_for_an_empty_one() -> None:
    with pytest.raises(SourceError, match="is this a Kubernetes API server"):
        decode.page(SERVICES, b'{"hello":"world"}')


def test_an_object_that_cannot_be_read_costs_itself_only() -> None:
    broken = service("broken")
    broken["spec"]["ports"] = [{"port": "eighty"}]
    page = decode.page(SERVICES, listed(broken, service("web")))
    assert page.said[0] == (ServiceName("ns", "broken"), None, "spec.ports[0].port: Expected `int | null`, got `str`")
    assert page.said[1].name == WEB


@pytest.mark.parametrize("item", [7, None, [], {"metadata": 7}, {"metadata": {"name": 7}}, {"metadata": {}}, {}])
def test_an_item_that_has_no_name_is_named_by_nothing(item: object) -> None:
    (said, good) = decode.page(SERVICES, listed(item, service("web"))).said
    assert (said.name, said.event) == (None, None)
    assert said.wrong
    assert good.name == WEB


def test_an_object_with_bytes_that_are_no_text_costs_itself_only() -> None:
    body = listed(service("web"), service("api")).replace(b'"ClusterIP"', b'"\xff\xfe"', 1)
    (said, good) = decode.page(SERVICES, body).said
    assert (said.name, said.event) == (WEB, None)
    assert "not text" in said.wrong or "utf-8" in said.wrong.lower()
    assert good.event is not None


def test_an_object_nested_without_end_costs_no_more_than_itself() -> None:
    deep = b'{"metadata":{"name":"deep","namespace":"ns"},"spec":' + b'{"ports":' * 9 + b"7" + b"}" * 9 + b"}"
    body = b'{"metadata":{"resourceVersion":"7"},"items":[' + deep + b"]}"
    assert decode.page(SERVICES, body).said[0].name == ServiceName("ns", "deep")


def test_fields_that_nobody_knows_and_null_lists_are_no_trouble() -> None:
    obj = slice_("web-1", "web")
    obj.update(endpoints=None, ports=None, futureField={"a": [1, {"b": None}]})
    said = said_of(SLICES, "ADDED", obj)
    assert isinstance(said.event, PutSlice)
    assert (said.event.slice.endpoints, said.event.slice.ports) == ((), ())


# ---- Lines ----


@pytest.mark.parametrize("type_", ["ADDED", "MODIFIED"])
def test_an_object_that_is_ours_is_put(type_: str) -> None:
    found = decode.line(SERVICES, event(type_, {**service("web"), "metadata": {**service("web")["metadata"],
                                                                              "resourceVersion": "9"}}))  # fmt: skip
    assert isinstance(found, Change)
    assert (found.version, found.said.name) == ("9", WEB)
    assert isinstance(found.said.event, PutService)


NOT_OURS: dict[str, tuple[Kind, dict[str, Any], object]] = {
    "headless": (SERVICES, service("web", "None"), DropService(WEB)),
    "an address is still missing": (SERVICES, service("web", ""), DropService(WEB)),
    "ExternalName": (SERVICES, service("web", "", type="ExternalName"), DropService(WEB)),
    "without a spec": (SERVICES, {"metadata": {"name": "web", "namespace": "ns"}}, DropService(WEB)),
    "another proxy's": (
        SERVICES,
        {**service("web"), "metadata": {"name": "web", "namespace": "ns",
                                        "labels": {"service.kubernetes.io/service-proxy-name": ""}}},
        DropService(WEB),
    ),
    "a slice of names": (SLICES, {**slice_("web", "x"), "addressType": "FQDN"}, DropSlice(WEB)),
    "a slice of a headless Service": (
        SLICES, slice_("web", "x", labels={"service.kubernetes.io/headless": ""}), DropSlice(WEB),
    ),
    "a slice of no Service": (SLICES, {**slice_("web", "x"), "metadata": {"name": "web", "namespace": "ns"}},
                              DropSlice(WEB)),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_OURS)
def test_an_object_that_is_not_ours_is_said_as_gone(case: str) -> None:
    kind, obj, drop = NOT_OURS[case]
    assert said_of(kind, "MODIFIED", obj) == (WEB, drop, "")


def test_a_deletion_needs_no_more_than_a_name() -> None:
    broken = {"metadata": {"name": "web", "namespace": "ns", "labels": 7}, "spec": "gone"}
    assert said_of(SERVICES, "DELETED", broken) == (WEB, DropService(WEB), "")
    assert said_of(SLICES, "DELETED", broken).event == DropSlice(WEB)
    assert said_of(SERVICES, "DELETED", {}).wrong == "the deletion of an object without a name"


def test_a_node_is_this_one_or_none() -> None:
    said = said_of(NODE, "MODIFIED", node("node1"))
    assert isinstance(said.event, PutNode)
    assert said.event.node.zone == "zone-a"
    assert said.name == ServiceName("", "node1")
    assert said_of(NODE, "DELETED", node("node1")) == (ServiceName("", "node1"), DropNode(), "")
    # Another's is not known, so that its going goes nowhere.
    assert said_of(NODE, "ADDED", node("node2")) == (ServiceName("", "node2"), DropNode(), "")


def test_a_bookmark_says_how_far_the_watch_is() -> None:
    line = b'{"type":"BOOKMARK","object":{"kind":"Service","metadata":{"resourceVersion":"12","labels":null}}}'
    assert decode.line(SERVICES, line) == Bookmark("12", initial=False)
    end = {"metadata": {"resourceVersion": "12", "annotations": {"k8s.io/initial-events-end": "true"}}}
    assert decode.line(SERVICES, event("BOOKMARK", end)) == Bookmark("12", initial=True)


def test_an_error_inside_a_stream_is_a_status() -> None:
    status = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Expired", "code": 410,
        "message": "too old resource version: 1\n(2)",
    }  # fmt: skip
    assert decode.line(SERVICES, event("ERROR", status)) == Failure(410, "Expired", "too old resource version: 1 (2)")
    wait = {**status, "code": 429, "details": {"retryAfterSeconds": 3}}
    assert decode.line(SERVICES, event("ERROR", wait)) == Failure(
        429, "Expired", "too old resource version: 1 (2)", 3.0
    )


@pytest.mark.parametrize("status", [{}, {"code": "x"}, {"message": None, "details": None}])
def test_an_error_that_says_nothing_is_an_error(status: dict[str, Any]) -> None:
    assert decode.line(SERVICES, event("ERROR", status)) == Failure(500, "", "an error without words")


NO_LINES = [
    b"", b"\x00", b"{", b"[]", b"null", b'{"type":"ADDED"', b"{}", b'{"type":"NEWS","object":{}}', b'{"type":7}',
    b'{"type":"BOOKMARK","object":{}}', b'{"type":"BOOKMARK","object":{"metadata":7}}', b'{"type":"BOOKMARK"}',
    event("ADDED", service("web"))[:-1],
]  # fmt: skip


@pytest.mark.parametrize("line", NO_LINES)
def test_what_is_no_line_of_a_watch_is_refused_in_one_line(line: bytes) -> None:
    with pytest.raises(SourceError, match="^the watch of services sent [^\n]+$"):
        decode.line(SERVICES, line)


def test_an_unreadable_object_still_says_how_far_the_watch_is() -> None:
    obj = {"metadata": {"name": "web", "namespace": "ns", "resourceVersion": "13"}, "spec": 7}
    found = decode.line(SERVICES, event("MODIFIED", obj))
    assert isinstance(found, Change)
    assert (found.version, found.said.name, found.said.event) == ("13", WEB, None)


# ---- When pods changed ----

TIMES = {
    "2026-01-02T03:04:05Z": 1767323045.0,
    "2026-01-02T03:04:05.123456789Z": 1767323045.123456,
    "2026-01-02T05:04:05.5+02:00": 1767323045.5,
    "2026-01-02T03:04:05": 0.0,  # of which place?
    "yesterday": 0.0,
    "": 0.0,
    "0001-01-01T00:00:00Z": 0.0,
}


@pytest.mark.parametrize("text", TIMES)
def test_when_the_pods_of_a_slice_changed(text: str) -> None:
    obj = slice_("web-1", "web", annotations={decode.TRIGGERED: text})
    said = said_of(SLICES, "MODIFIED", obj, after=1000.0)
    assert isinstance(said.event, PutSlice)
    assert said.event.triggered == pytest.approx(TIMES[text], abs=1e-6)


def test_pods_that_changed_before_the_source_started_are_nobodys_latency() -> None:
    obj = slice_("web-1", "web", annotations={decode.TRIGGERED: "2026-01-02T03:04:05Z"})
    for after, at in ((1767323044.0, 1767323045.0), (1767323045.0, 0.0), (math.inf, 0.0)):
        said = said_of(SLICES, "MODIFIED", obj, after=after)
        assert isinstance(said.event, PutSlice)
        assert said.event.triggered == at
