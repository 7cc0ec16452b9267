"""What is printed: the published JSON, byte for byte, and tables that people can read."""

from __future__ import annotations

import json

import pytest
import yaml

from ebpflb.model import Protocol
from ebpflb.output import Format, cell, document, items_table, render, route_items, routes_table, select, table
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Frontend,
    Key,
    Kind,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
)

DNS = ServicePortName("kube-system", "kube-dns", "dns")
WEB = ServicePortName("default", "web", "")


def entry(
    service: ServicePortName,
    address: str,
    port: int,
    protocol: Protocol,
    scope: Scope,
    *backends: Backend,
    **more: object,
) -> tuple[Key, Route]:
    verdict = Verdict.FORWARD if backends else Verdict.REJECT
    fields: dict[str, object] = {"kind": Kind.CLUSTER_IP, "verdict": verdict, "backends": backends, **more}
    return (Frontend(address, port, protocol), scope), Route(service, **fields)  # type: ignore[arg-type]


EXAMPLE = entry(
    DNS, "10.96.0.10", 53, Protocol.UDP, Scope.INTERNAL, Backend("10.244.1.7", 53), masquerade=Masquerade.NOT_POD
)


def test_a_route_in_json_is_the_published_example() -> None:
    text = document("Route", route_items([EXAMPLE]), Format.JSON)
    published = {
        "frontend": {"address": "10.96.0.10", "port": 53, "protocol": "UDP"}, "scope": "INTERNAL",
        "service": {"namespace": "kube-system", "name": "kube-dns", "port": "dns"}, "kind": "ClusterIP",
        "verdict": "FORWARD", "masquerade": "NOT_POD", "affinitySeconds": 0, "algorithm": "random", "sourceRanges": [],
        "backends": [{"address": "10.244.1.7", "port": 53, "weight": 1, "state": "active"}],
    }  # fmt: skip
    parsed = json.loads(text)
    assert parsed == {"apiVersion": "ebpflb/v1", "kind": "Route", "items": [published]}
    assert json.dumps(parsed["items"][0]) == json.dumps(published), "in the published order of fields"
    assert text.endswith("]\n}\n")


def test_yaml_says_the_same_as_json() -> None:
    items = route_items([EXAMPLE])
    assert yaml.safe_load(document("Route", items, Format.YAML)) == json.loads(document("Route", items, Format.JSON))


@pytest.mark.parametrize("form", [Format.JSON, Format.YAML])
def test_no_items_are_an_empty_list(form: Format) -> None:
    assert yaml.safe_load(document("Route", [], form)) == {"apiVersion": "ebpflb/v1", "kind": "Route", "items": []}


def test_enumerations_are_in_the_published_spelling() -> None:
    _, route = EXAMPLE
    rows = [
        entry(
            WEB, "1.2.3.4", 80, Protocol.SCTP, Scope.EXTERNAL, Backend("10.0.0.1", 1, 5, BackendState.DRAINING),
            kind=Kind.LOAD_BALANCER, masquerade=Masquerade.ALWAYS, affinity_seconds=10800,
            source_ranges=("10.0.0.0/8",), algorithm=Algorithm.ROUND_ROBIN,
        ),
        entry(WEB, "1.2.3.4", 81, Protocol.TCP, Scope.EXTERNAL, kind=Kind.EXTERNAL_IP, verdict=Verdict.DROP),
        entry(WEB, "1.2.3.4", 82, Protocol.TCP, Scope.EXTERNAL, kind=Kind.NODE_PORT),
    ]  # fmt: skip
    first, second, third = route_items(rows)
    assert (first["kind"], second["kind"], third["kind"]) == ("LoadBalancer", "ExternalIP", "NodePort")
    assert (second["verdict"], third["verdict"]) == ("DROP", "REJECT")
    assert (first["masquerade"], second["masquerade"]) == ("ALWAYS", "NEVER")
    assert first["algorithm"] == "round-robin"
    assert first["affinitySeconds"] == 10800
    assert first["sourceRanges"] == ["10.0.0.0/8"]
    assert first["backends"] == [{"address": "10.0.0.1", "port": 1, "weight": 5, "state": "draining"}]
    assert route.backends[0].state is BackendState.ACTIVE


def some_table() -> RouteTable:
    web = Backend("10.0.0.1", 8080)
    rows = [
        entry(WEB, "fd00::1", 80, Protocol.TCP, Scope.EXTERNAL, Backend("fd01::1", 8080)),
        entry(WEB, "fd00::1", 80, Protocol.TCP, Scope.INTERNAL, Backend("fd01::1", 8080)),
        entry(WEB, "10.0.0.9", 80, Protocol.TCP, Scope.INTERNAL, web),
        entry(WEB, "10.0.0.10", 80, Protocol.TCP, Scope.INTERNAL, web),
        entry(WEB, "10.0.0.10", 79, Protocol.TCP, Scope.EXTERNAL, web),
        EXAMPLE,
        entry(DNS, "10.96.0.10", 53, Protocol.TCP, Scope.INTERNAL, Backend("10.244.1.7", 53)),
    ]
    return RouteTable(dict(reversed(rows)))


def test_items_are_sorted_by_family_address_port_protocol_scope() -> None:
    found = [f"{frontend} {scope.name}" for (frontend, scope), _ in select(some_table(), None)]
    assert found == [
        "10.0.0.9:80/TCP INTERNAL",
        "10.0.0.10:79/TCP EXTERNAL",
        "10.0.0.10:80/TCP INTERNAL",
        "10.96.0.10:53/TCP INTERNAL",
        "10.96.0.10:53/UDP INTERNAL",
        "[fd00::1]:80/TCP INTERNAL",
        "[fd00::1]:80/TCP EXTERNAL",
    ]


def test_a_service_narrows() -> None:
    found = select(some_table(), ("kube-system", "kube-dns"))
    assert [str(key[0]) for key, _ in found] == ["10.96.0.10:53/TCP", "10.96.0.10:53/UDP"]
    assert select(some_table(), ("default", "kube-dns")) == []


def test_the_table_is_by_service_and_joins_equal_scopes() -> None:
    backends = tuple(Backend(f"10.0.0.{number}", 8080) for number in range(1, 6))
    rows = [
        entry(WEB, "10.96.0.1", 80, Protocol.TCP, Scope.INTERNAL, *backends),
        entry(WEB, "10.96.0.1", 80, Protocol.TCP, Scope.EXTERNAL, *backends),
        EXAMPLE,
        (((EXAMPLE[0][0]), Scope.EXTERNAL), Route(DNS, Kind.CLUSTER_IP, Verdict.REJECT)),
    ]
    assert routes_table(rows, wide=False) == (
        "SERVICE                   KIND       FRONTEND           SCOPE     VERDICT  BACKENDS\n"
        "default/web               ClusterIP  10.96.0.1:80/TCP   any       FORWARD  "
        "10.0.0.1:8080,10.0.0.2:8080,10.0.0.3:8080,+2 more\n"
        "kube-system/kube-dns:dns  ClusterIP  10.96.0.10:53/UDP  internal  FORWARD  10.244.1.7:53\n"
        "kube-system/kube-dns:dns  ClusterIP  10.96.0.10:53/UDP  external  REJECT   -\n"
    )


def test_wide_has_everything() -> None:
    row = entry(
        WEB, "1.2.3.4", 80, Protocol.TCP, Scope.INTERNAL,
        *(Backend(f"10.0.0.{number}", 8080, number, BackendState(number == 5)) for number in range(1, 6)),
        kind=Kind.LOAD_BALANCER, masquerade=Masquerade.ALWAYS, affinity_seconds=60, source_ranges=("10.0.0.0/8",),
    )  # fmt: skip
    text = routes_table([row], wide=True)
    for part in ("MASQUERADE", "ALWAYS", "60s", "random", "10.0.0.0/8"):
        assert part in text
    assert "10.0.0.4:8080 x4,10.0.0.5:8080 (draining) x5" in text
    assert "more" not in text


def test_columns_are_aligned_without_trailing_blanks() -> None:
    text = table(("A", "LONG"), [("x" * 5, ""), ("y", "z")])
    assert text == "A      LONG\nxxxxx  -\ny      z\n"


def test_a_table_of_nothing_is_its_header() -> None:
    assert routes_table([], wide=False) == "SERVICE  KIND  FRONTEND  SCOPE  VERDICT  BACKENDS\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("", ""),
        (0, "0"),
        (True, "yes"),
        (False, "no"),
        ({"address": "10.0.0.1", "port": 80}, "10.0.0.1:80"),
        ({"address": "fd00::1", "port": 80, "protocol": "TCP"}, "[fd00::1]:80/TCP"),
        ({"namespace": "ns", "name": "web", "port": "http"}, "ns/web:http"),
        ({"namespace": "ns", "name": "web"}, "ns/web"),
        ([{"address": "10.0.0.1", "port": 80}, "x"], "10.0.0.1:80,x"),
        ({"a": 1, "b": [2, 3], "c": ""}, "a=1 b=2,3 c=-"),
        ({"address": "10.0.0.1", "port": 80, "weight": 1}, "address=10.0.0.1 port=80 weight=1"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert cell(value) == text


def test_any_items_become_a_table() -> None:
    items = [{"name": "flows", "maxEntries": 10}, {"name": "x", "other": True}]
    assert items_table(items) == "NAME   MAX-ENTRIES  OTHER\nflows  10           -\nx      -            yes\n"
    assert render("Raw", items, Format.TABLE) == items_table(items)
    assert json.loads(render("Raw", items, Format.JSON))["items"] == items
