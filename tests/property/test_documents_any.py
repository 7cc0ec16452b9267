"""Properties of reading manifests: whatever the bytes are, what comes back is content, remarks, or one SourceError.

Random bytes seldom get past the parser: most inputs here are manifests in which a value was replaced by a strange one.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from ebpflb.errors import SourceError
from ebpflb.source import documents, parse
from tests.json_objects import service_object
from tests.unit.test_documents import SLICE_JSON

LOADED: dict[str, Any] = service_object(
    {
        "type": "LoadBalancer",
        "clusterIPs": ["172.30.0.41", "fd00::1"],
        "ipFamilies": ["IPv4", "IPv6"],
        "externalIPs": ["192.168.99.11"],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "loadBalancerSourceRanges": ["203.0.113.0/24"],
        "ports": [{"name": "a", "port": 80, "targetPort": "http", "nodePort": 30007, "protocol": "TCP"}],
    },
    meta={"labels": {"a": "b"}, "annotations": {"ebpflb/algorithm": "maglev"}},
    status={"loadBalancer": {"ingress": [{"ip": "1.2.3.4", "ipMode": "VIP"}]}},
)
HINTED: dict[str, Any] = {
    **SLICE_JSON,
    "endpoints": [
        {
            "addresses": ["10.0.1.1"],
            "conditions": {"ready": True},
            "nodeName": "node1",
            "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "node1"}]},
        }
    ],
}
NODE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node1"},
    "spec": {"podCIDRs": ["10.0.1.0/24"], "taints": [{"key": "a"}]},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.2"}]},
}

strange = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["None", "::", "1.2.3", "0.0.0.0/0", "fe80::1%lo", "a" * 300, "\ud800", "\0", "0" * 30 + ".1.1.1"]),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key or index at which something stands."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = [(value, key) for key, _ in items]
    for _, child in items:
        found += places(child)
    return found


@st.composite
def bent(draw: st.DrawFn) -> Any:
    """A good object with a few values replaced."""
    value = copy.deepcopy(draw(st.sampled_from([LOADED, HINTED, NODE])))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(value)))
        container[key] = draw(strange)
    return value


def read(data: bytes, *, is_json: bool = False) -> documents.Content | None:
    try:
        content = documents.read(data, is_json=is_json)
    except SourceError as error:
        assert "\n" not in str(error)
        return None
    for entry in content.entries.values():
        assert entry.where
    return content


@given(bent())
@example({**LOADED, "spec": {"clusterIP": "1.2.3.4", "ports": [{"port": 10**25}]}})
@example({**NODE, "status": {"addresses": [{"type": float("inf")}]}})
def test_strange_values(value: Any) -> None:
    """Invariant: a strange value costs its object, and JSON and YAML say the same about it."""
    text = json.dumps(value)
    in_json = read(text.encode(), is_json=True)
    in_yaml = read(b"---\n" + text.encode())
    if in_json is not None and in_yaml is not None:
        assert in_json.entries == in_yaml.entries
        assert bool(in_json.entries) or bool(in_json.remarks)


@given(bent())
def test_what_is_accepted_is_canonical(value: Any) -> None:
    """Invariant: no address and no CIDR leaves here in another than its canonical form, and no port out of range."""
    content = read(json.dumps(value).encode(), is_json=True)
    for entry in content.entries.values() if content else ():
        found: Any = entry.value
        for field in ("cluster_ips", "external_ips", "load_balancer_ips", "primary"):
            for address in getattr(found, field, ()):
                assert parse.address(address) == address
        for field in ("source_ranges", "pod_cidrs"):
            for cidr in getattr(found, field, ()):
                assert parse.cidr(cidr) == cidr
        for endpoint in getattr(found, "endpoints", ()):
            assert parse.address(endpoint.address) == endpoint.address
        for port in getattr(found, "ports", ()):
            assert 0 < port.port <= 65535


@given(
    st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))),
    st.booleans(),
)
def test_any_bytes(data: bytes, is_json: bool) -> None:
    """Invariant: any bytes are content or one SourceError."""
    read(data, is_json=is_json)


@given(st.text(":-?{}[]&*!|>'\"%@#, \n\tab1~<", max_size=30))
@example("a: &a [*a]")
@example("? {a: b}\n: c")
@example("<<: a")
@example("&a {a: *a, kind: Service, apiVersion: v1}")
@example("!!binary x")
@example("!!int x")
@example("0b")
@example("0x_")
@example("%YAML 9.9\n---\na")
def test_any_yaml(text: str) -> None:
    """Invariant: any arrangement of YAML's punctuation is content or one SourceError."""
    read(text.encode())
