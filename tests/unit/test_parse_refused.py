"""What the API server would refuse, with its words.

Rules of this file: every row changes one thing about an object that passes, and names all that is said about it.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ebpflb.source import validate, wire
from tests.json_objects import Json, decode, service_object, slice_object

RANGE = "must be between 1 and 65535, inclusive"
LABEL = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
NO_IP = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
NO_CIDR = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
LB_ONLY = "Forbidden: may only be used when `type` is 'LoadBalancer'"
NOBODY = "Required value: no API server is there to allocate one: a manifest must give it"
LB: Json = {"type": "LoadBalancer"}
TWO = [{"name": "a", "port": 80}, {"name": "b", "port": 81}]


def service(spec: Json | None = None, **more: Any) -> tuple[str, ...]:
    return validate.service(decode(wire.Service, service_object(spec, **more)))


def one_port(**port: Any) -> Json:
    return {"ports": [{"port": 80, **port}]}


# What is changed about a ClusterIP Service on port 80 -> what is said.
SERVICES: dict[str, tuple[Json, list[str]]] = {
    "nothing": ({}, []),
    # ports
    "no ports": ({"ports": []}, ["spec.ports: Required value"]),
    "headless without ports": ({"clusterIP": "None", "ports": None}, []),
    "port missing": ({"ports": [{}]}, [f"spec.ports[0].port: Invalid value: 0: {RANGE}"]),
    "port 0": (one_port(port=0), [f"spec.ports[0].port: Invalid value: 0: {RANGE}"]),
    "port 65536": (one_port(port=65536), [f"spec.ports[0].port: Invalid value: 65536: {RANGE}"]),
    "port negative": (one_port(port=-1), [f"spec.ports[0].port: Invalid value: -1: {RANGE}"]),
    "port 65535": (one_port(port=65535), []),
    "protocol in lower case": (
        one_port(protocol="tcp"),
        ['spec.ports[0].protocol: Unsupported value: "tcp": supported values: "SCTP", "TCP", "UDP"'],
    ),
    "SCTP": (one_port(protocol="SCTP"), []),
    "port name": (one_port(name="Http_1"), [f'spec.ports[0].name: Invalid value: "Http_1": {LABEL}']),
    "port name of 64 letters": (
        one_port(name="a" * 64),
        [f'spec.ports[0].name: Invalid value: "{"a" * 64}": must be no more than 63 characters'],
    ),
    "two ports, one unnamed": ({"ports": [TWO[0], {"port": 81}]}, ["spec.ports[1].name: Required value"]),
    "two ports of one name": (
        {"ports": [TWO[0], {"name": "a", "port": 81}]},
        ['spec.ports[1].name: Duplicate value: "a"'],
    ),
    "two ports of one number": (
        {"ports": [TWO[0], {"name": "b", "port": 80}]},
        ['spec.ports[1]: Duplicate value: {"protocol":"TCP","port":80}'],
    ),
    "two ports of one number in two protocols": ({"ports": [TWO[0], {"name": "b", "port": 80, "protocol": "UDP"}]}, []),
    "target port by name": (one_port(targetPort="http"), []),
    "target port 0": (one_port(targetPort=0), []),
    "target port 70000": (one_port(targetPort=70000), [f"spec.ports[0].targetPort: Invalid value: 70000: {RANGE}"]),
    "target port, a long name": (
        one_port(targetPort="a-very-long-name"),
        ['spec.ports[0].targetPort: Invalid value: "a-very-long-name": must be no more than 15 characters'],
    ),
    "target port, upper case": (
        one_port(targetPort="HTTP"),
        [
            'spec.ports[0].targetPort: Invalid value: "HTTP": must contain only alpha-numeric characters (a-z, 0-9), '
            "and hyphens (-)"
        ],
    ),
    "target port, digits in quotes": (
        one_port(targetPort="8080"),
        ['spec.ports[0].targetPort: Invalid value: "8080": must contain at least one letter (a-z)'],
    ),
    "target port, two hyphens": (
        one_port(targetPort="a--b"),
        ['spec.ports[0].targetPort: Invalid value: "a--b": must not contain consecutive hyphens'],
    ),
    "target port, hyphen at the end": (
        one_port(targetPort="a-"),
        ['spec.ports[0].targetPort: Invalid value: "a-": must not begin or end with a hyphen'],
    ),
    # node ports
    "node port of a ClusterIP": (
        one_port(nodePort=30007),
        ["spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"],
    ),
    "node port": ({"type": "NodePort", **one_port(nodePort=30007)}, []),
    "node port outside of the usual range": ({"type": "NodePort", **one_port(nodePort=80)}, []),
    "node port 65536": (
        {"type": "NodePort", **one_port(nodePort=65536)},
        [f"spec.ports[0].nodePort: Invalid value: 65536: {RANGE}"],
    ),
    "one node port twice": (
        {"type": "NodePort", "ports": [{**each, "nodePort": 30007} for each in TWO]},
        ["spec.ports[1].nodePort: Duplicate value: 30007"],
    ),
    "one node port in two protocols": (
        {
            "type": "NodePort",
            "ports": [{**TWO[0], "nodePort": 30007}, {**TWO[1], "nodePort": 30007, "protocol": "UDP"}],
        },
        [],
    ),
    "the kubelet's port to the outside": (
        {**LB, **one_port(port=10250)},
        ["spec.ports[0]: Invalid value: 10250: may not expose port 10250 externally since it is used by kubelet"],
    ),
    # type
    "unknown type": (
        {"type": "Nodeport"},
        [
            'spec.type: Unsupported value: "Nodeport": supported values: "ClusterIP", "ExternalName", "LoadBalancer", '
            '"NodePort"'
        ],
    ),
    "ExternalName": ({"clusterIP": None, "type": "ExternalName", "externalName": "example.com.", "ports": None}, []),
    "ExternalName without a name": (
        {"clusterIP": None, "type": "ExternalName"},
        ["spec.externalName: Required value"],
    ),
    "ExternalName with an address": (
        {"type": "ExternalName", "externalName": "example.com"},
        ["spec.clusterIPs: Forbidden: may not be set for ExternalName services"],
    ),
    "headless NodePort": (
        {"clusterIP": "None", "type": "NodePort"},
        ["spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services"],
    ),
    # cluster IPs
    "no cluster IP": ({"clusterIP": None}, [f"spec.clusterIP: {NOBODY}"]),
    "cluster IP is no address": ({"clusterIP": "10.0.0"}, [f'spec.clusterIPs[0]: Invalid value: "10.0.0": {NO_IP}']),
    "cluster IP with leading zeros": (
        {"clusterIP": "010.0.0.1"},
        ['spec.clusterIPs[0]: Invalid value: "010.0.0.1": must not have leading 0s'],
    ),
    "cluster IP, IPv4-mapped": (
        {"clusterIP": "::ffff:10.0.0.1"},
        ['spec.clusterIPs[0]: Invalid value: "::ffff:10.0.0.1": must not be an IPv4-mapped IPv6 address'],
    ),
    "cluster IP in upper case": ({"clusterIP": "FD00:0::1"}, []),
    "dual stack": ({"clusterIPs": ["172.30.0.41", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"]}, []),
    "plural only": (
        {"clusterIP": None, "clusterIPs": ["10.0.0.1"]},
        ['spec.clusterIPs: Invalid value: ["10.0.0.1"]: must be empty when `clusterIP` is not specified'],
    ),
    "singular differs": (
        {"clusterIPs": ["10.0.0.1"]},
        ['spec.clusterIPs: Invalid value: ["10.0.0.1"]: first value must match `clusterIP`'],
    ),
    "two of one family": (
        {"clusterIPs": ["172.30.0.41", "10.0.0.1"]},
        [
            'spec.clusterIPs: Invalid value: ["172.30.0.41","10.0.0.1"]: may specify no more than one IP for each '
            "IP family"
        ],
    ),
    "three": (
        {"clusterIPs": ["172.30.0.41", "fd00::1", "fd00::2"]},
        [
            'spec.clusterIPs: Invalid value: ["172.30.0.41","fd00::1","fd00::2"]: may only hold up to 2 values',
            'spec.clusterIPs: Invalid value: ["172.30.0.41","fd00::1","fd00::2"]: may specify no more than one IP for '
            "each IP family",
        ],
    ),
    "None and more": (
        {"clusterIP": "None", "clusterIPs": ["None", "fd00::1"]},
        ['spec.clusterIPs: Invalid value: ["None","fd00::1"]: \'None\' must be the first and only value'],
    ),
    "family differs": (
        {"ipFamilies": ["IPv6"]},
        ['spec.clusterIPs[0]: Invalid value: "172.30.0.41": expected an IPv6 value as indicated by `ipFamilies[0]`'],
    ),
    "unknown family": (
        {"clusterIP": "None", "ipFamilies": ["ipv4"]},
        ['spec.ipFamilies[0]: Unsupported value: "ipv4": supported values: "IPv4", "IPv6"'],
    ),
    "one family twice": ({"ipFamilies": ["IPv4", "IPv4"]}, ['spec.ipFamilies[1]: Duplicate value: "IPv4"']),
    "unknown family policy": (
        {"ipFamilyPolicy": "DualStack"},
        [
            'spec.ipFamilyPolicy: Unsupported value: "DualStack": supported values: "PreferDualStack", '
            '"RequireDualStack", "SingleStack"'
        ],
    ),
    # affinity
    "unknown affinity": (
        {"sessionAffinity": "clientIP"},
        ['spec.sessionAffinity: Unsupported value: "clientIP": supported values: "ClientIP", "None"'],
    ),
    "affinity of 0 s": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}},
        [
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 0: must be greater than 0 and less "
            "than 86400"
        ],
    ),
    "affinity of a day": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86400}}},
        [],
    ),
    "affinity of more than a day": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}},
        [
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 86401: must be greater than 0 and less "
            "than 86400"
        ],
    ),
    "config without affinity": (
        {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}},
        ["spec.sessionAffinityConfig: Forbidden: must not be set when session affinity is None"],
    ),
    # external IPs
    "external IPs": ({"externalIPs": ["192.168.99.11", "fd00::63"]}, []),
    "external IP is no address": ({"externalIPs": ["x"]}, [f'spec.externalIPs[0]: Invalid value: "x": {NO_IP}']),
    "external IP, loopback": (
        {"externalIPs": ["192.168.99.11", "127.0.0.1"]},
        ['spec.externalIPs[1]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)'],
    ),
    "external IP, IPv6 loopback": (
        {"externalIPs": ["::1"]},
        ['spec.externalIPs[0]: Invalid value: "::1": may not be in the loopback range (127.0.0.0/8, ::1/128)'],
    ),
    "external IP, link-local": (
        {"externalIPs": ["169.254.169.254", "fe80::1", "febf::1", "fec0::1"]},
        [
            f'spec.externalIPs[{index}]: Invalid value: "{ip}": '
            "may not be in the link-local range (169.254.0.0/16, fe80::/10)"
            for index, ip in enumerate(("169.254.169.254", "fe80::1", "febf::1"))
        ],
    ),
    "external IP, link-local multicast": (
        {"externalIPs": ["224.0.0.1", "ff02::1", "224.0.1.1"]},
        [
            f'spec.externalIPs[{index}]: Invalid value: "{ip}": '
            "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"
            for index, ip in enumerate(("224.0.0.1", "ff02::1"))
        ],
    ),
    "external IP, unspecified": (
        {"externalIPs": ["0.0.0.0", "::"]},
        [
            'spec.externalIPs[0]: Invalid value: "0.0.0.0": may not be unspecified (0.0.0.0)',
            'spec.externalIPs[1]: Invalid value: "::": may not be unspecified (::)',
        ],
    ),
    # load balancers
    "source ranges": ({**LB, "loadBalancerSourceRanges": ["203.0.113.0/24", " fd00::/64 "]}, []),
    "source ranges of a ClusterIP": (
        {"loadBalancerSourceRanges": ["203.0.113.0/24"]},
        [f"spec.loadBalancerSourceRanges: {LB_ONLY}"],
    ),
    "source range without length": (
        {**LB, "loadBalancerSourceRanges": ["203.0.113.0/24", "203.0.113.1"]},
        [f'spec.loadBalancerSourceRanges[1]: Invalid value: "203.0.113.1": {NO_CIDR}'],
    ),
    "source range with host bits": (
        {**LB, "loadBalancerSourceRanges": ["203.0.113.1/24", "fd00::1/64"]},
        [
            f'spec.loadBalancerSourceRanges[{index}]: Invalid value: "{text}": '
            "must not have bits set beyond the prefix length"
            for index, text in enumerate(("203.0.113.1/24", "fd00::1/64"))
        ],
    ),
    "source range with leading zeros": (
        {**LB, "loadBalancerSourceRanges": ["10.0.0.0/08", "010.0.0.0/8"]},
        [
            f'spec.loadBalancerSourceRanges[{index}]: Invalid value: "{text}": '
            "must not have leading 0s in IP or prefix length"
            for index, text in enumerate(("10.0.0.0/08", "010.0.0.0/8"))
        ],
    ),
    "source range, IPv4-mapped": (
        {**LB, "loadBalancerSourceRanges": ["::ffff:10.0.0.0/104"]},
        [
            'spec.loadBalancerSourceRanges[0]: Invalid value: "::ffff:10.0.0.0/104": '
            "must not have an IPv4-mapped IPv6 address"
        ],
    ),
    "everybody": ({**LB, "loadBalancerSourceRanges": ["0.0.0.0/0", "::/0"]}, []),
    "class of a ClusterIP": ({"loadBalancerClass": "a.b/c"}, [f"spec.loadBalancerClass: {LB_ONLY}"]),
    "node ports of a ClusterIP": (
        {"allocateLoadBalancerNodePorts": False},
        [f"spec.allocateLoadBalancerNodePorts: {LB_ONLY}"],
    ),
    # traffic
    "external policy": ({"type": "NodePort", "externalTrafficPolicy": "Local"}, []),
    "external policy of a ClusterIP": (
        {"externalTrafficPolicy": "Local"},
        ['spec.externalTrafficPolicy: Invalid value: "Local": may only be set for externally-accessible services'],
    ),
    "external policy with an external IP": ({"externalIPs": ["192.168.99.11"], "externalTrafficPolicy": "Local"}, []),
    "unknown external policy": (
        {**LB, "externalTrafficPolicy": "local"},
        ['spec.externalTrafficPolicy: Unsupported value: "local": supported values: "Cluster", "Local"'],
    ),
    "unknown internal policy": (
        {"internalTrafficPolicy": "Node"},
        ['spec.internalTrafficPolicy: Unsupported value: "Node": supported values: "Cluster", "Local"'],
    ),
    "health check node port": ({**LB, "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000}, []),
    "health check node port of policy Cluster": (
        {**LB, "healthCheckNodePort": 31000},
        [
            "spec.healthCheckNodePort: Invalid value: 31000: may only be set when `type` is 'LoadBalancer' and "
            "`externalTrafficPolicy` is 'Local'"
        ],
    ),
    "health check node port 70000": (
        {**LB, "externalTrafficPolicy": "Local", "healthCheckNodePort": 70000},
        [f"spec.healthCheckNodePort: Invalid value: 70000: {RANGE}"],
    ),
    "traffic distribution": ({"trafficDistribution": "PreferSameNode"}, []),
    "unknown traffic distribution": (
        {"trafficDistribution": "PreferNear"},
        [
            'spec.trafficDistribution: Unsupported value: "PreferNear": supported values: "PreferClose", '
            '"PreferSameNode", "PreferSameZone"'
        ],
    ),
    # several at once
    "several": (
        {"type": "x", "sessionAffinity": "y", **one_port(port=0)},
        [
            'spec.type: Unsupported value: "x": supported values: "ClusterIP", "ExternalName", "LoadBalancer", '
            '"NodePort"',
            f"spec.ports[0].port: Invalid value: 0: {RANGE}",
            'spec.sessionAffinity: Unsupported value: "y": supported values: "ClientIP", "None"',
        ],
    ),
}


@pytest.mark.parametrize("case", SERVICES)
def test_service(case: str) -> None:
    spec, said = SERVICES[case]
    assert list(service(spec)) == said


METADATA: dict[str, tuple[Json, list[str]]] = {
    "no name": ({"name": None}, ["metadata.name: Required value: name or generateName is required"]),
    "bad name": ({"name": "My Service"}, [f'metadata.name: Invalid value: "My Service": {LABEL}']),
    "name with a dot": ({"name": "a.b"}, [f'metadata.name: Invalid value: "a.b": {LABEL}']),
    "name that begins with a digit": ({"name": "1st"}, []),
    "bad namespace": ({"namespace": "a_b"}, [f'metadata.namespace: Invalid value: "a_b": {LABEL}']),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata(case: str) -> None:
    meta, said = METADATA[case]
    assert list(service(meta=meta)) == said


INGRESS: dict[str, tuple[Json, list[str]]] = {
    "an address": ({"ip": "1.2.3.4", "ipMode": "VIP"}, []),
    "a name": ({"hostname": "lb.example.com"}, []),
    "no address": ({"ip": "lb"}, [f'status.loadBalancer.ingress[0].ip: Invalid value: "lb": {NO_IP}']),
    "unknown mode": (
        {"ip": "1.2.3.4", "ipMode": "Vip"},
        ['status.loadBalancer.ingress[0].ipMode: Unsupported value: "Vip": supported values: "Proxy", "VIP"'],
    ),
    "mode of a name": (
        {"hostname": "lb", "ipMode": "VIP"},
        ["status.loadBalancer.ingress[0].ipMode: Forbidden: may not be specified when `ip` is not set"],
    ),
}


@pytest.mark.parametrize("case", INGRESS)
def test_ingress(case: str) -> None:
    ingress, said = INGRESS[case]
    assert list(service({"type": "LoadBalancer"}, status={"loadBalancer": {"ingress": [ingress]}})) == said


def test_node_ports_that_nobody_allocates() -> None:
    """Such a Service is acceptable, and served where it can be."""
    obj = decode(wire.Service, service_object({"type": "NodePort", "ports": [{**TWO[0], "nodePort": 30007}, TWO[1]]}))
    assert validate.service(obj) == ()
    assert validate.missing_service(obj) == (f"spec.ports[1].nodePort: {NOBODY}",)


@pytest.mark.parametrize("kind", ["ClusterIP", "LoadBalancer", "ExternalName"])
def test_node_ports_that_nobody_needs(kind: str) -> None:
    assert validate.missing_service(decode(wire.Service, service_object({"type": kind}))) == ()


# ---- EndpointSlices ----

SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)


def endpoint(**more: Any) -> Json:
    return {"endpoints": [{"addresses": ["10.0.1.1"], **more}]}


def at(*addresses: str) -> Json:
    return endpoint(addresses=list(addresses))


SLICES: dict[str, tuple[Json, list[str]]] = {
    "nothing": ({}, []),
    "no address type": ({"addressType": None}, ["addressType: Required value"]),
    "unknown address type": (
        {"addressType": "ipv4"},
        ['addressType: Unsupported value: "ipv4": supported values: "FQDN", "IPv4", "IPv6"'],
    ),
    "names": ({"addressType": "FQDN", **at("example.com")}, []),
    "no endpoints": ({"endpoints": None}, []),
    "no addresses": (at(), ["endpoints[0].addresses: Required value: must contain at least 1 address"]),
    "no address": (at("pod"), [f'endpoints[0].addresses[0]: Invalid value: "pod": {NO_IP}']),
    "leading zeros": (
        at("10.0.1.1", "10.0.01.2"),
        ['endpoints[0].addresses[1]: Invalid value: "10.0.01.2": must not have leading 0s'],
    ),
    "IPv6 among IPv4": (
        at("fd00::1"),
        ['endpoints[0].addresses[0]: Invalid value: "fd00::1": must be an IPv4 address'],
    ),
    "IPv4 among IPv6": (
        {"addressType": "IPv6", **at("10.0.1.1")},
        ['endpoints[0].addresses[0]: Invalid value: "10.0.1.1": must be an IPv6 address'],
    ),
    "IPv6": ({"addressType": "IPv6", **at("fd00::1")}, []),
    "loopback": (
        at("127.0.0.1"),
        [
            'endpoints[0].addresses[0]: Invalid value: "127.0.0.1": '
            "may not be in the loopback range (127.0.0.0/8, ::1/128)"
        ],
    ),
    "unspecified": (
        at("0.0.0.0"),
        ['endpoints[0].addresses[0]: Invalid value: "0.0.0.0": may not be unspecified (0.0.0.0)'],
    ),
    "0.0.0.0/8 otherwise": (at("0.0.0.1"), []),
    "101 addresses": (
        at(*(f"10.0.1.{number}" for number in range(101))),
        ["endpoints[0].addresses: Too many: 101: must have at most 100 items"],
    ),
    "1001 endpoints": (
        {"endpoints": [{"addresses": ["10.0.1.1"]}] * 1001},
        ["endpoints: Too many: 1001: must have at most 1000 items"],
    ),
    "node name": (
        endpoint(nodeName="Node 1"),
        [f'endpoints[0].nodeName: Invalid value: "Node 1": {SUBDOMAIN}'],
    ),
    "one hint twice": (
        endpoint(hints={"forZones": [{"name": "a"}, {"name": "a"}]}),
        ['endpoints[0].hints.forZones[1].name: Duplicate value: "a"'],
    ),
    "nine hints": (
        endpoint(hints={"forNodes": [{"name": f"node{number}"} for number in range(9)]}),
        ["endpoints[0].hints.forNodes: Too many: 9: must have at most 8 items"],
    ),
    "port without number": ({"ports": [{"name": "a"}]}, []),
    "port 65536": ({"ports": [{"port": 65536}]}, [f"ports[0].port: Invalid value: 65536: {RANGE}"]),
    "port name": ({"ports": [{"name": "A", "port": 1}]}, [f'ports[0].name: Invalid value: "A": {LABEL}']),
    "one port name twice": (
        {"ports": [{"port": 1}, {"port": 2, "protocol": "UDP"}]},
        ['ports[1].name: Duplicate value: ""'],
    ),
    "protocol": (
        {"ports": [{"port": 1, "protocol": "udp"}]},
        ['ports[0].protocol: Unsupported value: "udp": supported values: "SCTP", "TCP", "UDP"'],
    ),
}


@pytest.mark.parametrize("case", SLICES)
def test_slice(case: str) -> None:
    more, said = SLICES[case]
    assert list(validate.endpoint_slice(decode(wire.EndpointSlice, slice_object(**more)))) == said


def test_slice_name_may_have_dots() -> None:
    assert validate.endpoint_slice(decode(wire.EndpointSlice, slice_object(meta={"name": "web.1"}))) == ()


def test_a_slice_without_its_label() -> None:
    obj = decode(wire.EndpointSlice, slice_object(meta={"labels": {"app": "web"}}))
    assert validate.endpoint_slice(obj) == ()
    assert validate.missing_endpoint_slice(obj) == (
        'metadata.labels["kubernetes.io/service-name"]: Required value: without it the slice belongs to no Service',
    )


# ---- Nodes ----

NODES: dict[str, tuple[Json, list[str]]] = {
    "a name": ({"metadata": {"name": "node-1.example.com"}}, []),
    "no metadata": ({}, ["metadata.name: Required value: name or generateName is required"]),
    "bad name": ({"metadata": {"name": "Node"}}, [f'metadata.name: Invalid value: "Node": {SUBDOMAIN}']),
    "pod CIDR": (
        {"metadata": {"name": "n"}, "spec": {"podCIDRs": ["10.0.0.0/24", "10.0.1.0"]}},
        [f'spec.podCIDRs[1]: Invalid value: "10.0.1.0": {NO_CIDR}'],
    ),
    "addresses": (
        {
            "metadata": {"name": "n"},
            "status": {"addresses": [{"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "n"}]},
        },
        [f'status.addresses[1].address: Invalid value: "n": {NO_IP}'],
    ),
}


@pytest.mark.parametrize("case", NODES)
def test_node(case: str) -> None:
    value, said = NODES[case]
    assert list(validate.node(decode(wire.Node, value))) == said


# ---- Fields that the API does not know ----

FIELDS: dict[str, tuple[type[Any], Json, bool]] = {
    "all of a Service as kubectl prints it": (
        wire.Service,
        service_object(
            {"selector": {"a": "b"}, "publishNotReadyAddresses": True, "loadBalancerIP": "", "sessionAffinity": None},
            meta={
                "uid": "x",
                "managedFields": [{}],
                "ownerReferences": None,
                "creationTimestamp": None,
                "labels": None,
            },
            status={"loadBalancer": {}, "conditions": []},
        ),
        True,
    ),
    "all of a slice": (
        wire.EndpointSlice,
        slice_object(
            {"addresses": ["10.0.1.1"], "targetRef": {}, "zone": "a", "hostname": "h", "deprecatedTopology": {}}
        ),
        True,
    ),
    "a field of a port": (wire.Service, service_object({"ports": [{"port": 80, "appProtocol": "http"}]}), True),
    "a typo in a port": (wire.Service, service_object({"ports": [{"prot": 80}]}), False),
    "a typo in the affinity": (wire.Service, service_object({"sessionAffinityConfig": {"clientIp": {}}}), False),
    "wrong case": (wire.Service, service_object({"clusterIp": "10.0.0.1"}), False),
    "a typo in metadata": (wire.Service, service_object(meta={"label": {}}), False),
    "a typo at the top": (wire.Service, service_object(specs={}), False),
    "a typo in conditions": (wire.EndpointSlice, slice_object({"conditions": {"redy": True}}), False),
    "whatever a Node's status holds": (wire.Node, {"status": {"novelty": 1, "addresses": []}}, True),
    "a typo in a Node's spec": (wire.Node, {"spec": {"podCidrs": []}}, False),
}


@pytest.mark.parametrize("case", FIELDS)
def test_strict_types_know_the_api(case: str) -> None:
    type_, value, known = FIELDS[case]
    assert isinstance(decode(type_, value), type_), "a watch takes anything"
    if known:
        assert isinstance(decode(wire.strict(type_), value), type_)
    else:
        with pytest.raises(msgspec.ValidationError, match="unknown field"):
            decode(wire.strict(type_), value)
