"""Random Services with EndpointSlices, as the API server stores them: many small worlds in one cluster.

Rules of this file: a world is a namespace, and shares no address and port with any other, so that each answers as if it
were alone. Pods and nodes follow `tests.world`. What the API server would default and no reading of it does stands here
in full; what may be missing is missing at times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from tests.api.client import Object
from tests.plan.worlds import some
from tests.world import NODE_IP, OTHER_NODE_IP, v6

MOST = 200
"""Worlds in one cluster: node ports are 30000 to 32767."""

_HOMES = {
    "10.0.1.1": "node1", "10.0.1.2": "node1", "10.0.2.1": "node2", "10.0.2.2": "node2", "10.0.3.1": "node3",
    NODE_IP: "node1", OTHER_NODE_IP: "node2",
}  # fmt: skip
_ZONES = ("zone-a", "zone-b")
_RANGES = ("203.0.113.0/24", "192.168.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "192.168.0.2/32", "127.0.0.0/8")
_FAMILIES = ("IPv4", "IPv6")
_PROTOCOLS = ("TCP", "UDP", "SCTP")
_STATES: tuple[Object, ...] = (
    {"ready": True},
    {},
    {"ready": True, "serving": True, "terminating": False},
    {"ready": False, "serving": True, "terminating": True},
    {"ready": False, "serving": False, "terminating": True},
    {"ready": False},
)


def namespace(number: int) -> str:
    """A world's."""
    return f"world-{number:03}"


def world(chance: Random, number: int) -> tuple[list[Object], list[Object]]:
    """The Services and the EndpointSlices of one world."""
    services: list[Object] = []
    slices: list[Object] = []
    for at in range(chance.randint(1, 3)):
        made = _service(chance, number, at)
        services.append(made)
        for family in made["spec"]["ipFamilies"]:
            slices += _slices(chance, made, family)
    return services, slices


def backend_at_a_refused_frontend(number: int) -> tuple[list[Object], list[Object]]:
    """A world that no chance makes: a pod in the host's network listens where another Service, which has no endpoints,
    has the node's address as its external IP."""
    chance = Random(0)
    port = {"protocol": "TCP", "port": 1000 + number * 8, "targetPort": 80}
    spec: Object = {
        "type": "ClusterIP",
        "ports": [port],
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        "internalTrafficPolicy": "Cluster",
        "sessionAffinity": "None",
    }
    found = []
    for at, more in enumerate(({}, {"externalIPs": [NODE_IP], "externalTrafficPolicy": "Cluster"})):
        ip = _cluster_ip(number, at, "IPv4")
        name = {"namespace": namespace(number), "name": f"svc-{at}"}
        own = {**spec, "clusterIP": ip, "clusterIPs": [ip], **more}
        status: Object = {"loadBalancer": {}}
        found.append({"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": own, "status": status})
    listening = _endpoint(chance, NODE_IP, "IPv4", True, False)
    listening["conditions"] = {"ready": True}
    ports = [{"name": "", "protocol": "TCP", "port": port["port"]}]
    return found, [_slice(found[0], "IPv4", 0, [listening], ports)]


def _service(chance: Random, number: int, at: int) -> Object:
    families = chance.choice((["IPv4"], ["IPv6"], ["IPv4", "IPv6"], ["IPv6", "IPv4"]))
    kind = chance.choice(("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"))
    outside = f"198.18.{number}.{at + 1}"
    own = number * 8 + at * 2
    ports = []
    for index, protocol in enumerate(some(chance, _PROTOCOLS, 2, 1)):
        # No port is that of an endpoint, nor another Service's: an address of the node can be an external IP of all.
        port: Object = {"protocol": protocol, "port": 1000 + own + index, "targetPort": 80}
        if index or chance.random() < 0.5:
            port["name"] = ("main", "more")[index]
        if kind == "NodePort" or (kind == "LoadBalancer" and chance.random() < 0.8):
            port["nodePort"] = 30000 + own + index
        ports.append(port)
    if len(ports) > 1:
        ports[0]["name"] = "main"
    spec: Object = {
        "type": kind,
        "ports": ports,
        "ipFamilies": families,
        "ipFamilyPolicy": "SingleStack" if len(families) == 1 else "RequireDualStack",
        "clusterIPs": [_cluster_ip(number, at, family) for family in families],
        "internalTrafficPolicy": chance.choice(("Cluster", "Cluster", "Local")),
        "sessionAffinity": "None",
    }
    spec["clusterIP"] = spec["clusterIPs"][0]
    if chance.random() < 0.3:
        spec["sessionAffinity"] = "ClientIP"
        spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": 60}}
    external = []
    if chance.random() < 0.5:
        external = _in(chance, families, some(chance, (outside, NODE_IP, "192.168.1.2"), 2, 1))
        spec["externalIPs"] = external
    if kind != "ClusterIP" or external:
        spec["externalTrafficPolicy"] = chance.choice(("Cluster", "Local"))
    status: Object = {"loadBalancer": {}}
    if kind == "LoadBalancer":
        balancers = _in(chance, families, some(chance, (f"198.19.{number}.{at + 1}", outside, OTHER_NODE_IP), 2))
        status["loadBalancer"]["ingress"] = [{"ip": each, **_mode(chance)} for each in balancers]
        if chance.random() < 0.5:
            spec["loadBalancerSourceRanges"] = _in(chance, families, some(chance, _RANGES, 2, 1))
        if spec["externalTrafficPolicy"] == "Local":
            spec["healthCheckNodePort"] = 32000 + number * 3 + at
    name = {"namespace": namespace(number), "name": f"svc-{at}"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": spec, "status": status}


def _cluster_ip(number: int, at: int, family: str) -> str:
    return f"10.96.{number + 1}.{at + 1}" if family == "IPv4" else f"fd00:10:96::{number + 1:x}{at + 1:02x}"


def _mode(chance: Random) -> Object:
    """How an address is announced; one that is a proxy's is nobody's business here."""
    return chance.choice(({}, {"ipMode": "VIP"}, {"ipMode": "VIP"}, {"ipMode": "Proxy"}))


def _in(chance: Random, families: Sequence[str], values: Sequence[str]) -> list[str]:
    return [v6(each) if chance.choice(families) == "IPv6" else each for each in values]


def _slices(chance: Random, of: Object, family: str) -> Iterator[Object]:
    """One or two slices of a Service: mostly of ready endpoints, at times of none."""
    spec = of["spec"]
    # Where a packet goes to is no frontend: kube-proxy's refusals and ours meet packets after translation.
    inside = spec["type"] == "ClusterIP" and "externalIPs" not in spec
    most_ready = chance.random() < 0.7
    hinted = chance.random() < 0.3
    ports = [
        {
            "name": port.get("name", ""),
            "protocol": port["protocol"],
            "port": chance.choice((80, 8080, port["port"] if inside else 80)),
        }
        for port in spec["ports"]
        if chance.random() < 0.95
    ]
    chosen = some(chance, tuple(_HOMES), 5, chance.choice((0, 1, 2)))
    endpoints = [_endpoint(chance, each, family, most_ready, hinted) for each in chosen]
    cut = chance.randint(0, len(endpoints))
    parts = [endpoints[:cut], endpoints[cut:]]
    if parts[0] and not parts[0][0]["conditions"].get("terminating") and chance.random() < 0.2:
        # Said once more, while it moves from slice to slice: whoever does not terminate is right.
        moved = {**parts[0][0], "conditions": {"ready": False, "serving": True, "terminating": True}}
        parts[1].append(moved)
    for number, part in enumerate(parts):
        yield _slice(of, family, number, part, ports)


def _slice(of: Object, family: str, number: int, endpoints: list[Object], ports: list[Object]) -> Object:
    metadata = {
        "namespace": of["metadata"]["namespace"],
        "name": f"{of['metadata']['name']}-{family.lower()}-{number}",
        "labels": {"kubernetes.io/service-name": of["metadata"]["name"]},
    }
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports,
    }


def _endpoint(chance: Random, address: str, family: str, most_ready: bool, hinted: bool) -> Object:
    found: Object = {
        "addresses": [v6(address) if family == "IPv6" else address],
        "conditions": _STATES[0] if most_ready and chance.random() < 0.7 else chance.choice(_STATES),
        "nodeName": _HOMES[address],
    }
    if hinted:
        found["hints"] = {"forZones": [{"name": each} for each in some(chance, _ZONES, 2, 1)]}
        if chance.random() < 0.3:
            found["hints"]["forNodes"] = [{"name": _HOMES[address]}]
    return found
