"""The bytes of a manifest file to the objects in it: YAML, JSON, many documents, Lists, and one line for what is wrong.

Rules of this file: what is said is compared whole, for it is what a user reads.
"""

from __future__ import annotations

import json
from textwrap import dedent
from typing import Any

import pytest

from ebpflb.errors import SourceError
from ebpflb.model import Node, Service, ServiceName
from ebpflb.source import documents
from ebpflb.source.documents import Content, Key
from tests.json_objects import Json, service_object, slice_object

WEB = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 172.30.0.41
  ports:
  - port: 80
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.0.1.1]}]
"""
NODE = "{apiVersion: v1, kind: Node, metadata: {name: node1}}\n"

WEB_KEY = Key("Service", ServiceName("default", "web"))
SLICE_KEY = Key("EndpointSlice", ServiceName("default", "web-1"))
NODE_KEY = Key("Node", ServiceName("", "node1"))


def read(text: str | bytes, *, is_json: bool = False) -> Content:
    return documents.read(text if isinstance(text, bytes) else text.encode(), is_json=is_json)


def said(text: str | bytes, *, is_json: bool = False) -> list[str]:
    return [f"{remark.where}: {remark.reason}" for remark in read(text, is_json=is_json).remarks]


def service_of(content: Content) -> Service:
    value = content.entries[WEB_KEY].value
    assert isinstance(value, Service)
    return value


def dumped(*values: Any) -> str:
    return "".join(map(json.dumps, values))


SLICE_JSON = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **slice_object()}
SHOP = [Key("Service", ServiceName("shop", "web")), Key("EndpointSlice", ServiceName("shop", "web-abc"))]


def list_of(kind: str, *items: Json, version: str = "v1") -> Json:
    return {"apiVersion": version, "kind": kind, "metadata": {"resourceVersion": ""}, "items": list(items)}


def without_type(value: Json) -> Json:
    return {key: each for key, each in value.items() if key not in ("apiVersion", "kind")}


# ---- Forms ----

FORMS: dict[str, tuple[str, list[Key]]] = {
    "nothing": ("", []),
    "a comment": ("# to do\n", []),
    "one document": (WEB, [WEB_KEY]),
    "documents": (f"{WEB}---\n{SLICE}---\n{NODE}", [WEB_KEY, SLICE_KEY, NODE_KEY]),
    "empty documents between": (f"---\n---\n{WEB}---\n# nothing\n---\n{NODE}---\n", [WEB_KEY, NODE_KEY]),
    "an end marker": (f"{WEB}...\n---\n{NODE}...\n", [WEB_KEY, NODE_KEY]),
    "Windows' line ends": (WEB.replace("\n", "\r\n"), [WEB_KEY]),
    "a byte order mark": ("\ufeff" + WEB, [WEB_KEY]),
    "flow YAML that begins like JSON": (NODE, [NODE_KEY]),
    "JSON": (dumped(service_object()), SHOP[:1]),
    "JSON, indented": (json.dumps(service_object(), indent=4) + "\n", SHOP[:1]),
    "JSON after JSON": (dumped(service_object()) + "\n" + dumped(SLICE_JSON), SHOP),
    "JSON and YAML documents": (f"{dumped(service_object())}\n---\n{NODE}", [SHOP[0], NODE_KEY]),
    "a List": (dumped(list_of("List", service_object(), SLICE_JSON)), SHOP),
    "a List in YAML": (f"apiVersion: v1\nkind: List\nitems:\n- {NODE}", [NODE_KEY]),
    "a List in a List": (dumped(list_of("List", list_of("List", service_object()))), SHOP[:1]),
    "a ServiceList": (dumped(list_of("ServiceList", service_object())), SHOP[:1]),
    "a ServiceList as the API gives it": (dumped(list_of("ServiceList", without_type(service_object()))), SHOP[:1]),
    "an EndpointSliceList": (
        dumped(list_of("EndpointSliceList", without_type(SLICE_JSON), version="discovery.k8s.io/v1")),
        SHOP[1:],
    ),
    "an empty List": (dumped(list_of("List")), []),
    "an alias": (WEB.replace("80", "&p 80\n    targetPort: *p"), [WEB_KEY]),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms(case: str) -> None:
    text, keys = FORMS[case]
    content = read(text)
    assert content.remarks == ()
    assert list(content.entries) == keys


@pytest.mark.parametrize("text", [dumped(service_object()), dumped(service_object(), SLICE_JSON), ""])
def test_json_by_name(text: str) -> None:
    assert read(text, is_json=True) == read(text)


def test_json_and_yaml_say_the_same() -> None:
    in_yaml = read(f"{WEB}---\n{SLICE}---\n{NODE}")
    in_json = read(dumped(*documents._yaml_documents(f"{WEB}---\n{SLICE}---\n{NODE}".encode())))
    assert in_yaml == in_json


def test_what_is_not_ours_is_an_entry_without_value() -> None:
    content = read(WEB.replace("172.30.0.41", "None"))
    assert content.entries[WEB_KEY].value is None
    assert content.remarks == ()


# ---- YAML as Kubernetes reads it ----


def test_base_60_is_no_number() -> None:
    found = service_of(read(WEB.replace("172.30.0.41", "2001:10:20:30:40:50:51:52")))
    assert found.cluster_ips == ("2001:10:20:30:40:50:51:52",)


def test_a_timestamp_is_text() -> None:
    found = service_of(read(WEB.replace("{name: web}", "{name: web, creationTimestamp: 2024-05-01T10:00:00Z}")))
    assert found.created == "2024-05-01T10:00:00Z"


@pytest.mark.parametrize("number", ["80", "0x50", "0120", "0b1010000"])
def test_numbers(number: str) -> None:
    assert service_of(read(WEB.replace("80", number))).ports[0].port == 80


def test_a_number_where_a_string_belongs() -> None:
    assert said(WEB.replace("name: web", "name: 123")) == [
        "document 1: Service: metadata.name: expected a string, got an integer"
    ]


# ---- What is wrong with an object ----

WRONG: dict[str, tuple[str, list[str]]] = {
    "a typo": (
        WEB.replace("- port: 80", "- port: 80\n    protocl: UDP"),
        ['document 1: Service default/web: unknown field "spec.ports[0].protocl", did you mean "protocol"?'],
    ),
    "a typo that resembles nothing": (
        WEB + "xyzzy: 1\n",
        ['document 1: Service default/web: unknown field "xyzzy"'],
    ),
    "a field of the wrong type": (
        WEB.replace("port: 80", 'port: "80"'),
        ["document 1: Service default/web: spec.ports[0].port: expected an integer, got a string"],
    ),
    "a list expected": (
        WEB.replace("  - port", "    port"),
        ["document 1: Service default/web: spec.ports: expected a list, got an object"],
    ),
    "a float": (
        WEB.replace("port: 80", "port: 80.5"),
        ["document 1: Service default/web: spec.ports[0].port: expected an integer, got a float"],
    ),
    "a boolean label": (
        WEB.replace("{name: web}", "{name: web, labels: {a: yes}}"),
        ["document 1: Service default/web: metadata.labels[...]: expected a string, got a boolean"],
    ),
    "refused": (
        WEB.replace("80", "0"),
        [
            "document 1: Service default/web: spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, "
            "inclusive"
        ],
    ),
    "refused twice": (
        WEB.replace("80", "80\n    protocol: tcp\n  type: x"),
        [
            'document 1: Service default/web: spec.type: Unsupported value: "x": supported values: "ClusterIP", '
            '"ExternalName", "LoadBalancer", "NodePort"',
            'document 1: Service default/web: spec.ports[0].protocol: Unsupported value: "tcp": supported values: '
            '"SCTP", "TCP", "UDP"',
        ],
    ),
    "no cluster IP": (
        WEB.replace("clusterIP: 172.30.0.41", "type: ClusterIP"),
        [
            "document 1: Service default/web: spec.clusterIP: Required value: no API server is there to allocate one: "
            "a manifest must give it"
        ],
    ),
    "an unknown kind": (
        "apiVersion: v1\nkind: ConfigMap\n",
        ['document 1: no matches for kind "ConfigMap" in version "v1": it is not one that is read here'],
    ),
    "an old version": (
        SLICE.replace("k8s.io/v1", "k8s.io/v1beta1"),
        [
            'document 1: no matches for kind "EndpointSlice" in version "discovery.k8s.io/v1beta1": EndpointSlice is '
            "read in version discovery.k8s.io/v1"
        ],
    ),
    "somebody else's Service": (
        WEB.replace("v1", "serving.knative.dev/v1"),
        [
            'document 1: no matches for kind "Service" in version "serving.knative.dev/v1": Service is read in '
            "version v1"
        ],
    ),
    "no kind": ("apiVersion: v1\n", ["document 1: kind: Required value"]),
    "no version": ("kind: Service\n", ["document 1: apiVersion: Required value"]),
    "kind is no string": ("kind: [Service]\n", ["document 1: kind: expected a string, got a list"]),
    "no object": ("- 1\n", ["document 1: expected an object, got a list"]),
    "text": ("hello\n", ["document 1: expected an object, got a string"]),
    "a List without items": ("apiVersion: v1\nkind: List\nitem: []\n", ["document 1: items: Required value"]),
    "an item": (
        dumped(list_of("List", service_object(), service_object({"typ": 1}))),
        ['document 1 item 2: Service shop/web: unknown field "spec.typ", did you mean "type"?'],
    ),
    "an item that is no object": (
        dumped(list_of("List", service_object()))[:-2] + ",1]}",
        ["document 1 item 2: expected an object, got an integer"],
    ),
    "the third document": (
        f"{WEB}---\n{NODE}---\n{SLICE.replace('IPv4', 'IPv5')}",
        [
            'document 3: EndpointSlice default/web-1: addressType: Unsupported value: "IPv5": supported values: '
            '"FQDN", "IPv4", "IPv6"'
        ],
    ),
    "one object twice": (
        f"{WEB}---\n{WEB}",
        ["document 2: Service default/web is also in document 1, which counts: remove one of them"],
    ),
    "a Node twice": (
        f"{NODE}---\n{NODE}",
        ["document 2: Node node1 is also in document 1, which counts: remove one of them"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_objects(case: str) -> None:
    text, lines = WRONG[case]
    assert said(text) == lines


def test_the_rest_applies() -> None:
    content = read(f"{WEB.replace('80', '0')}---\n{SLICE}---\nkind: 5\n---\n{NODE}")
    assert list(content.entries) == [SLICE_KEY, NODE_KEY]


def test_a_refused_object_is_told_by_name() -> None:
    for text in (WEB.replace("80", "0"), WEB.replace("80", "x"), WEB + "typo: 1\n"):
        (remark,) = read(text).remarks
        assert remark.key == WEB_KEY


def test_a_remark_does_not_refuse() -> None:
    content = read(WEB.replace("80", "80\n  type: NodePort"))
    assert [remark.key for remark in content.remarks] == [None]
    assert service_of(content).cluster_ips == ("172.30.0.41",)


def test_the_first_of_two_counts() -> None:
    content = read(f"{WEB}---\n{WEB.replace('172.30.0.41', '172.30.0.42')}")
    assert service_of(content).cluster_ips == ("172.30.0.41",)


def test_node_fields_that_the_kubelet_adds() -> None:
    content = read("{apiVersion: v1, kind: Node, metadata: {name: node1}, status: {features: {}, nodeInfo: {}}}")
    assert isinstance(content.entries[NODE_KEY].value, Node)
    assert content.remarks == ()


# ---- Files that cannot be parsed ----

BROKEN: dict[str, tuple[bytes, str]] = {
    "indentation": (b"a:\n  b: 1\n c: 2\n", "line 3, column 2: not YAML: did not find expected key"),
    "two colons": (b"a: b: c\n", "line 1, column 5: not YAML: mapping values are not allowed in this context"),
    "a tab": (b"a:\n\tb: 1\n", "line 2, column 1: not YAML: found character that cannot start any token"),
    "one key twice": (
        dedent("""\
            kind: Service
            spec:
              ports: []
              ports: []
            """).encode(),
        'line 4, column 3: not YAML: key "ports" already set in map',
    ),
    "an unknown tag": (
        b"a: !secret x\n",
        "line 1, column 4: not YAML: could not determine a constructor for the tag '!secret'",
    ),
    "an unknown alias": (b"a: *b\n", "line 1, column 4: not YAML: found undefined alias"),
    "a template": (b"{{ if .Values.x }}\n", "line 1, column 2: not YAML: "),
    "the second document": (f"{WEB}---\na: b: c\n".encode(), "line 9, column 5: not YAML: "),
    "not UTF-8": (b"a: b\nc: \xff\n", "line 2: not text in UTF-8"),
    "half a JSON document": (
        b'{"apiVersion": "v1",\n "kind": ',
        "line 3, column 1: not YAML: did not find expected node content",
    ),
    "nested without end": (b"[" * 100_000, ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str) -> None:
    data, reason = BROKEN[case]
    with pytest.raises(SourceError) as caught:
        read(data)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


BROKEN_JSON = {
    "a comma too many": (
        b'{"a": 1,\n}',
        "line 2, column 1: not JSON: Expecting property name enclosed in double quotes",
    ),
    "YAML": (WEB.encode(), "line 1, column 1: not JSON: Expecting value"),
    "half": (b'{"a": [1,', "line 1, column 10: not JSON: Expecting value"),
    "nested without end": (b"[" * 100_000, "cannot be parsed"),
    "a bad second document": (b'{"a": 1}\n{"b"}', "line 2, column 5: not JSON: Expecting ':' delimiter"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_broken_json_files(case: str) -> None:
    data, reason = BROKEN_JSON[case]
    with pytest.raises(SourceError) as caught:
        read(data, is_json=True)
    assert str(caught.value).startswith(reason)
