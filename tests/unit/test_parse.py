"""API objects to the model: defaults, skips, and the odd texts that an API server still hands out.

Rules of this file: objects are written as the JSON that arrives, decoded as a watch decodes it; one table per question.
"""

from __future__ import annotations

from typing import Any

import pytest

from ebpflb import model
from ebpflb.model import Endpoint, Family, Protocol, ServiceName, ServicePort, ServiceType, SlicePort, TrafficPolicy
from ebpflb.source import parse, wire
from tests.json_objects import Json, decode, service_object, slice_object


def service(spec: Json | None = None, **more: Any) -> model.Service | None:
    return parse.service(decode(wire.Service, service_object(spec, **more)))


def served(spec: Json | None = None, **more: Any) -> model.Service:
    found = service(spec, **more)
    assert found is not None
    return found


def sliced(*endpoints: Json, **more: Any) -> model.EndpointSlice | None:
    return parse.endpoint_slice(decode(wire.EndpointSlice, slice_object(*endpoints, **more)))


def endpoints_of(*endpoints: Json, **more: Any) -> tuple[Endpoint, ...]:
    found = sliced(*endpoints, **more)
    assert found is not None
    return found.endpoints


# ---- Addresses ----

ADDRESSES = {
    "plain IPv4": ("10.0.0.1", "10.0.0.1"),
    "leading zeros are decimal": ("010.020.003.09", "10.20.3.9"),
    "many leading zeros": ("000000001.2.3.4", "1.2.3.4"),
    "octet too big": ("256.0.0.1", None),
    "octet too big with zeros": ("0256.0.0.1", None),
    "three octets": ("10.0.1", None),
    "five octets": ("10.0.0.0.1", None),
    "hexadecimal": ("0x0a.0.0.1", None),
    "one number": ("167772161", None),
    "space before": (" 10.0.0.1", None),
    "newline after": ("10.0.0.1\n", None),
    "empty": ("", None),
    "a name": ("localhost", None),
    "None": ("None", None),
    "digits of another script": ("١٠.0.0.1", None),
    "a NUL in it": ("10.0.0.1\0", None),
    "plain IPv6": ("fd00::1", "fd00::1"),
    "upper case": ("FD00::ABCD", "fd00::abcd"),
    "zeros written out": ("fd00:0:0:0:0:0:0:1", "fd00::1"),
    "leading zeros in groups": ("fd00:00a0::0001", "fd00:a0::1"),
    "IPv4-mapped": ("::ffff:10.0.0.1", "10.0.0.1"),
    "IPv4-mapped in hexadecimal": ("::ffff:a00:1", "10.0.0.1"),
    "IPv4-mapped with leading zeros": ("::ffff:010.0.0.1", "10.0.0.1"),
    "translated": ("64:ff9b::10.0.0.1", "64:ff9b::a00:1"),
    "translated with leading zeros": ("64:ff9b::010.0.0.01", "64:ff9b::a00:1"),
    "with a zone": ("fe80::1%eth0", None),
    "in brackets": ("[fd00::1]", None),
    "too many groups": ("1:2:3:4:5:6:7:8:9", None),
    "two gaps": ("fd00::1::2", None),
    "loopback": ("::1", "::1"),
    "unspecified": ("::", "::"),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_address(case: str) -> None:
    text, expected = ADDRESSES[case]
    assert parse.address(text) == expected


CIDRS = {
    "plain": ("10.0.0.0/8", "10.0.0.0/8"),
    "host bits are masked": ("10.1.2.3/8", "10.0.0.0/8"),
    "a single address": ("10.1.2.3/32", "10.1.2.3/32"),
    "everything": ("1.2.3.4/0", "0.0.0.0/0"),
    "leading zeros": ("010.01.2.3/08", "10.0.0.0/8"),
    "IPv6": ("FD00::1/64", "fd00::/64"),
    "IPv6 everything": ("::/0", "::/0"),
    "IPv6, odd length": ("ffff::/3", "e000::/3"),
    "IPv4-mapped": ("::ffff:10.1.0.0/104", "10.0.0.0/8"),
    "IPv4-mapped, masked below": ("::ffff:10.0.0.0/80", "::/80"),
    "no length": ("10.0.0.0", None),
    "empty length": ("10.0.0.0/", None),
    "too long": ("10.0.0.0/33", None),
    "too long in IPv6": ("fd00::/129", None),
    "negative": ("10.0.0.0/-1", None),
    "a mask": ("10.0.0.0/255.0.0.0", None),
    "two slashes": ("10.0.0.0/8/8", None),
    "length with a sign": ("10.0.0.0/+8", None),
    "length of another script": ("10.0.0.0/٨", None),
    "space inside": ("10.0.0.0 /8", None),
    "empty": ("", None),
}


@pytest.mark.parametrize("case", CIDRS)
def test_cidr(case: str) -> None:
    text, expected = CIDRS[case]
    assert parse.cidr(text) == expected


# ---- Services ----


def test_service_defaults() -> None:
    """What the API server would have filled in, and what no field says."""
    assert service() == model.Service(
        name=ServiceName("shop", "web"),
        type=ServiceType.CLUSTER_IP,
        cluster_ips=("172.30.0.41",),
        ports=(ServicePort("", Protocol.TCP, 80, 0),),
        external_ips=(),
        load_balancer_ips=(),
        internal_policy=TrafficPolicy.CLUSTER,
        external_policy=TrafficPolicy.CLUSTER,
        affinity_seconds=0,
        source_ranges=(),
        health_check_node_port=0,
        created="",
        annotations=(),
    )


CLIENT_IP = {"sessionAffinity": "ClientIP"}
LOCAL_LB = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000}
INGRESS = [
    {"ip": "1.2.3.4"},
    {"ip": "5.6.7.8", "ipMode": "VIP"},
    {"ip": "9.10.11.12", "ipMode": "Proxy"},
    {"hostname": "lb.example.com"},
    {"ip": "0001.2.3.4"},
]

SERVICE_FIELDS: dict[str, tuple[Json, str, object]] = {
    "type NodePort": ({"type": "NodePort"}, "type", ServiceType.NODE_PORT),
    "type empty": ({"type": ""}, "type", ServiceType.CLUSTER_IP),
    "dual stack": (
        {"clusterIPs": ["172.30.0.41", "FD00:172:30::29"], "ipFamilies": ["IPv4", "IPv6"]},
        "cluster_ips",
        ("172.30.0.41", "fd00:172:30::29"),
    ),
    "dual stack, IPv6 first": (
        {"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "172.30.0.41"]},
        "cluster_ips",
        ("fd00::1", "172.30.0.41"),
    ),
    "two of one family: the first": ({"clusterIPs": ["172.30.0.41", "172.30.0.42"]}, "cluster_ips", ("172.30.0.41",)),
    "an old object without clusterIPs": ({"clusterIPs": None}, "cluster_ips", ("172.30.0.41",)),
    "a sloppy clusterIP": ({"clusterIP": "172.030.000.041"}, "cluster_ips", ("172.30.0.41",)),
    "protocols": (
        {"ports": [{"name": p, "port": 53, "protocol": p} for p in ("UDP", "TCP", "SCTP")]},
        "ports",
        tuple(ServicePort(p, Protocol[p], 53) for p in ("UDP", "TCP", "SCTP")),
    ),
    "unknown protocol": (
        {"ports": [{"port": 1, "protocol": "DCCP"}, {"port": 2}]},
        "ports",
        (ServicePort("", Protocol.TCP, 2),),
    ),
    "protocol in lower case is unknown": ({"ports": [{"port": 1, "protocol": "tcp"}]}, "ports", ()),
    "protocol null": ({"ports": [{"port": 80, "protocol": None}]}, "ports", (ServicePort("", Protocol.TCP, 80),)),
    "port missing": ({"ports": [{"name": "a"}, {"port": 2}]}, "ports", (ServicePort("", Protocol.TCP, 2),)),
    "port out of range": ({"ports": [{"port": 65536}, {"port": -1}, {"port": 0}]}, "ports", ()),
    "ports null": ({"ports": None}, "ports", ()),
    "port name null": ({"ports": [{"name": None, "port": 80}]}, "ports", (ServicePort("", Protocol.TCP, 80),)),
    "node port": ({"ports": [{"port": 80, "nodePort": 30007}]}, "ports", (ServicePort("", Protocol.TCP, 80, 30007),)),
    "node port out of range": (
        {"ports": [{"port": 80, "nodePort": 70000}]},
        "ports",
        (ServicePort("", Protocol.TCP, 80),),
    ),
    "affinity of 3 hours": (CLIENT_IP, "affinity_seconds", 10800),
    "affinity with an empty config": (
        {**CLIENT_IP, "sessionAffinityConfig": {"clientIP": {}}},
        "affinity_seconds",
        10800,
    ),
    "affinity of a minute": (
        {**CLIENT_IP, "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}},
        "affinity_seconds",
        60,
    ),
    "affinity None ignores its config": (
        {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}},
        "affinity_seconds",
        0,
    ),
    "internal policy": ({"internalTrafficPolicy": "Local"}, "internal_policy", TrafficPolicy.LOCAL),
    "external policy": (LOCAL_LB, "external_policy", TrafficPolicy.LOCAL),
    "health check node port": (LOCAL_LB, "health_check_node_port", 31000),
    "health check node port with policy Cluster": (
        {**LOCAL_LB, "externalTrafficPolicy": "Cluster"},
        "health_check_node_port",
        0,
    ),
    "health check node port of a NodePort": ({**LOCAL_LB, "type": "NodePort"}, "health_check_node_port", 0),
    "external IPs": (
        {"externalIPs": ["192.168.99.11", "bad", "192.168.99.011", "FD00::63"]},
        "external_ips",
        ("192.168.99.11", "fd00::63"),
    ),
    "source ranges": (
        {"loadBalancerSourceRanges": [" 203.0.113.77/24 ", "fd00::1/64", "203.0.113.0/24", "nonsense"]},
        "source_ranges",
        ("203.0.113.0/24", "fd00::/64"),
    ),
}


@pytest.mark.parametrize("case", SERVICE_FIELDS)
def test_service_field(case: str) -> None:
    spec, field, expected = SERVICE_FIELDS[case]
    assert getattr(served(spec), field) == expected


def test_load_balancer_ips_are_those_of_mode_vip() -> None:
    found = served(status={"loadBalancer": {"ingress": INGRESS}})
    assert found.load_balancer_ips == ("1.2.3.4", "5.6.7.8")


def test_metadata_of_a_service() -> None:
    found = served(
        meta={
            "creationTimestamp": "2024-05-01T10:00:00Z",
            "annotations": {
                "ebpflb/forwarding": "dsr",
                "other/x": "y",
                "ebpflb/algorithm": "maglev",
                "ebpflb/drain": None,
            },
        }
    )
    assert found.created == "2024-05-01T10:00:00Z"
    assert found.annotations == (("algorithm", "maglev"), ("drain", ""), ("forwarding", "dsr"))


def test_namespace_defaults() -> None:
    assert served(meta={"namespace": None}).name == ServiceName("default", "web")


NOT_SERVED: dict[str, Json] = {
    "headless": service_object({"clusterIP": "None"}),
    "no clusterIP": service_object({"clusterIP": None}),
    "clusterIP empty": service_object({"clusterIP": ""}),
    "clusterIP is no address": service_object({"clusterIP": "10.0.0"}),
    "ExternalName": service_object({"type": "ExternalName", "externalName": "example.com"}),
    "unknown type": service_object({"type": "Cloud"}),
    "another proxy's": service_object(meta={"labels": {"service.kubernetes.io/service-proxy-name": "other"}}),
    "another proxy's, its name empty": service_object(
        meta={"labels": {"service.kubernetes.io/service-proxy-name": ""}}
    ),
    "no spec": {"metadata": {"name": "web", "namespace": "shop"}},
}


@pytest.mark.parametrize("case", NOT_SERVED)
def test_not_served(case: str) -> None:
    assert parse.service(decode(wire.Service, NOT_SERVED[case])) is None


def test_the_headless_label_is_the_slices_business() -> None:
    """kube-proxy still watches a Service with that label: it loses its endpoints, not its address."""
    found = decode(wire.Service, service_object(meta={"labels": {"service.kubernetes.io/headless": ""}}))
    assert parse.service(found) is not None


def test_unknown_fields_and_bodies_do_not_matter() -> None:
    """A newer server says more."""
    found = service({"novelty": {"a": [1]}}, meta={"managedFields": [{"manager": "x"}]}, status={"conditions": []})
    assert found == service()


# ---- EndpointSlices ----


def test_slice_defaults() -> None:
    assert sliced() == model.EndpointSlice(
        name=ServiceName("shop", "web-abc"),
        service=ServiceName("shop", "web"),
        family=Family.IPV4,
        ports=(SlicePort("", Protocol.TCP, 8080),),
        endpoints=(Endpoint("10.0.1.1", True, True, False, "", frozenset(), frozenset()),),
    )


# ready, serving, terminating as written; as understood
CONDITIONS = {
    "all nil": (None, None, None, True, True, False),
    "ready": (True, True, False, True, True, False),
    "not ready": (False, False, False, False, False, False),
    "not ready, serving nil": (False, None, None, False, True, False),
    "terminating and serving": (False, True, True, False, True, True),
    "terminating, serving nil": (False, None, True, False, True, True),
    "published though not ready": (True, False, True, True, False, True),
}


@pytest.mark.parametrize("case", CONDITIONS)
def test_conditions(case: str) -> None:
    ready, serving, terminating, *expected = CONDITIONS[case]
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    (found,) = endpoints_of({"addresses": ["10.0.1.1"], "conditions": conditions})
    assert [found.ready, found.serving, found.terminating] == expected


def test_conditions_null() -> None:
    assert endpoints_of({"addresses": ["10.0.1.1"], "conditions": None}) == (Endpoint("10.0.1.1"),)


SLICE_PORTS = {
    "name null": ([{"name": None, "port": 80}], (SlicePort("", Protocol.TCP, 80),)),
    "name missing": ([{"port": 80}], (SlicePort("", Protocol.TCP, 80),)),
    "port null": ([{"name": "a", "port": None}, {"name": "b", "port": 80}], (SlicePort("b", Protocol.TCP, 80),)),
    "port 0": ([{"name": "a", "port": 0}], ()),
    "port out of range": ([{"name": "a", "port": 65536}], ()),
    "unknown protocol": ([{"name": "a", "port": 80, "protocol": "DCCP"}], ()),
    "UDP": ([{"name": "dns", "port": 53, "protocol": "UDP"}], (SlicePort("dns", Protocol.UDP, 53),)),
    "null": (None, ()),
}


@pytest.mark.parametrize("case", SLICE_PORTS)
def test_slice_ports(case: str) -> None:
    ports, expected = SLICE_PORTS[case]
    found = sliced(ports=ports)
    assert found is not None and found.ports == expected


def test_hints_and_node() -> None:
    (found,) = endpoints_of(
        {
            "addresses": ["10.0.1.1"],
            "nodeName": "node1",
            "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "node1"}]},
        }
    )
    assert found.node == "node1"
    assert found.zone_hints == frozenset({"a", "b"})
    assert found.node_hints == frozenset({"node1"})


@pytest.mark.parametrize("hints", [None, {}, {"forZones": None}, {"forZones": []}, {"forZones": [{"name": ""}]}])
def test_no_hints(hints: Json | None) -> None:
    (found,) = endpoints_of({"addresses": ["10.0.1.1"], "hints": hints})
    assert found.zone_hints == found.node_hints == frozenset()


SLICE_ADDRESSES: dict[str, tuple[str, list[list[str] | None], list[str]]] = {
    "only the first counts": ("IPv4", [["10.0.1.1", "10.0.1.2"]], ["10.0.1.1"]),
    "sloppy": ("IPv4", [["010.0.1.1"]], ["10.0.1.1"]),
    "none": ("IPv4", [[], None, ["10.0.1.2"]], ["10.0.1.2"]),
    "no address": ("IPv4", [["pod-1"], ["10.0.1.2"]], ["10.0.1.2"]),
    "IPv6 in an IPv4 slice": ("IPv4", [["fd00::1"], ["10.0.1.2"]], ["10.0.1.2"]),
    "IPv4 in an IPv6 slice": ("IPv6", [["10.0.1.2"], ["FD00::1"]], ["fd00::1"]),
    "IPv4-mapped in an IPv6 slice": ("IPv6", [["::ffff:10.0.1.2"]], []),
}


@pytest.mark.parametrize("case", SLICE_ADDRESSES)
def test_slice_addresses(case: str) -> None:
    kind, addresses, expected = SLICE_ADDRESSES[case]
    found = endpoints_of(*({"addresses": each} for each in addresses), addressType=kind)
    assert [each.address for each in found] == expected


NO_SLICE: dict[str, Json] = {
    "names instead of addresses": slice_object({"addresses": ["example.com"]}, addressType="FQDN"),
    "no address type": slice_object(addressType=None),
    "of no Service": slice_object(meta={"labels": {}}),
    "labels null": slice_object(meta={"labels": None}),
    "of a Service with an empty name": slice_object(meta={"labels": {"kubernetes.io/service-name": ""}}),
    "headless": slice_object(
        meta={"labels": {"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""}},
    ),
}


@pytest.mark.parametrize("case", NO_SLICE)
def test_no_slice(case: str) -> None:
    assert parse.endpoint_slice(decode(wire.EndpointSlice, NO_SLICE[case])) is None


def test_a_foreign_proxys_label_on_a_slice_does_not_matter() -> None:
    labels = {"kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "other"}
    assert parse.endpoint_slice(decode(wire.EndpointSlice, slice_object(meta={"labels": labels}))) is not None


# ---- Nodes ----


def node(value: Json) -> model.Node:
    return parse.node(decode(wire.Node, value))


def test_node() -> None:
    found = node(
        {
            "metadata": {"name": "node1", "labels": {"topology.kubernetes.io/zone": "zone-a", "x": None}},
            "spec": {
                "podCIDR": "10.0.1.0/24",
                "podCIDRs": ["10.0.1.0/24", "FD00:10:0:1::/64"],
                "taints": [{"key": "a"}],
            },
            "status": {
                "addresses": [
                    {"type": "Hostname", "address": "node1"},
                    {"type": "ExternalIP", "address": "203.0.113.2"},
                    {"type": "InternalIP", "address": "192.168.0.2"},
                    {"type": "InternalIP", "address": "192.168.0.3"},
                    {"type": "ExternalIP", "address": "FD00::2"},
                ],
                "images": [{}],
            },
        }
    )
    assert found == model.Node(
        name="node1",
        addresses=(),
        primary=("192.168.0.2", "fd00::2"),
        zone="zone-a",
        pod_cidrs=("10.0.1.0/24", "fd00:10:0:1::/64"),
        known=True,
        deleting=False,
    )


def test_node_with_only_the_old_field() -> None:
    assert node({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.0.1.0/24"}}).pod_cidrs == ("10.0.1.0/24",)


LEAVING: dict[str, tuple[Json, bool]] = {
    "nothing": ({"metadata": {"name": "n"}}, False),
    "deletion timestamp": ({"metadata": {"name": "n", "deletionTimestamp": "2024-01-01T00:00:00Z"}}, True),
    "autoscaler's taint": (
        {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}},
        True,
    ),
    "another taint": ({"spec": {"taints": [{"key": "DeletionCandidateOfClusterAutoscaler"}]}}, False),
}


@pytest.mark.parametrize("case", LEAVING)
def test_node_leaving(case: str) -> None:
    value, expected = LEAVING[case]
    assert node(value).deleting is expected
