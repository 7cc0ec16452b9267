"""Properties of decoding: whatever a server sends, an object costs no more than itself, and a body no more than a
SourceError of one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpflb.errors import SourceError
from ebpflb.model import ServiceName
from ebpflb.source.kube import decode
from ebpflb.source.kube.decode import Kind
from tests.kubeapi import bookmark, event, node, service, slice_

many = settings(max_examples=20_000)

NODE = decode.node("node1")
KINDS = [decode.SERVICES, decode.SLICES, NODE]
WHOLE: dict[str, dict[str, Any]] = {
    "services": service(
        "web", type="LoadBalancer", externalIPs=["192.168.99.1"], sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 5}}, loadBalancerSourceRanges=["10.0.0.0/8"],
        externalTrafficPolicy="Local", healthCheckNodePort=30000, internalTrafficPolicy="Local",
    ),
    "endpointslices": slice_("web-1", "web", "10.0.1.1", annotations={decode.TRIGGERED: "2026-01-02T03:04:05Z"}),
    "nodes": node(),
}  # fmt: skip
WHOLE["endpointslices"]["endpoints"][0]["hints"] = {"forZones": [{"name": "a"}], "forNodes": [{"name": "b"}]}
WHOLE["nodes"]["spec"] = {"podCIDR": "10.0.1.0/24", "podCIDRs": ["10.0.1.0/24"], "taints": [{"key": "x"}]}

json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from(["10.0.0.1", "::1", "10.0.0.0/8", "TCP", "None", "Local", "IPv6", "ExternalName", "2026-01-01"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += places(each, (*path, key))
    return found


@st.composite
def bent(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """An object in which something is something else."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(found) or [("metadata",)]))
        at: Any = found
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = draw(json)
    return found


kinds = st.sampled_from(KINDS)
objects: st.SearchStrategy[tuple[Kind, dict[str, Any]]] = kinds.flatmap(
    lambda kind: st.tuples(st.just(kind), bent(WHOLE[kind.resource]))
)


def check_an_object(kind: Kind, obj: dict[str, Any]) -> None:
    body = msgspec.json.encode({"metadata": {"resourceVersion": "7"}, "items": [obj, WHOLE[kind.resource]]})
    bad, fine = decode.page(kind, body).said
    assert fine.event is not None
    for type_ in ("ADDED", "DELETED"):
        found = decode.line(kind, event(type_, obj), after=0.0)
        assert isinstance(found, decode.Change)
        said = found.said
        assert (said.event is None) == bool(said.wrong)
        assert said.event is None or isinstance(said.name, ServiceName)
        assert "\n" not in said.wrong
    assert (bad.event is None) == bool(bad.wrong)


@given(objects)
def test_an_object_costs_no_more_than_itself(found: tuple[Kind, dict[str, Any]]) -> None:
    check_an_object(*found)


@pytest.mark.fuzz
@many
@given(objects)
def test_any_object_costs_no_more_than_itself(found: tuple[Kind, dict[str, Any]]) -> None:
    check_an_object(*found)


LINES = [
    event("ADDED", WHOLE["services"]), event("MODIFIED", WHOLE["endpointslices"]), event("DELETED", WHOLE["nodes"]),
    event("BOOKMARK", bookmark(7, initial=True)),
    event("ERROR", {"code": 410, "reason": "Expired", "message": "old", "details": {"retryAfterSeconds": 1}}),
    msgspec.json.encode({"metadata": {"resourceVersion": "7", "continue": "x"}, "items": [WHOLE["services"]]}),
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Bytes that were JSON."""
    data = bytearray(draw(st.sampled_from(LINES)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        length = draw(st.integers(0, 4))
        data[at : at + length] = draw(st.binary(max_size=4))
        if not data:
            break
    return bytes(data)


def check_bytes(kind: Kind, data: bytes) -> None:
    readers: list[Callable[[], object]] = [lambda: decode.page(kind, data), lambda: decode.line(kind, data, after=0.0)]
    for read in readers:
        try:
            read()
        except SourceError as error:
            assert "\n" not in str(error)


@given(kinds, damaged() | st.binary(max_size=50))
def test_bytes_cost_no_more_than_a_source_error(kind: Kind, data: bytes) -> None:
    check_bytes(kind, data)


@pytest.mark.fuzz
@many
@given(kinds, damaged() | st.binary(max_size=50))
def test_any_bytes_cost_no_more_than_a_source_error(kind: Kind, data: bytes) -> None:
    check_bytes(kind, data)
