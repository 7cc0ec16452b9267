"""What IPVS must hold for one frontend, situation by situation."""

from __future__ import annotations

import pytest

from ebpflb.dataplane.ipvs.names import SET_NAMES, Mark, Set
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.table import (
    MH_PORT,
    PERSISTENT,
    Refusal,
    Rows,
    Server,
    Settings,
    cidr_of,
    frontend_key,
    frontend_of,
    network,
    packed,
    place,
    placed,
    rows_of,
    server_of,
)
from ebpflb.model import Protocol
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Frontend,
    Kind,
    Masquerade,
    Route,
    Scope,
    ServicePortName,
    Verdict,
)

NAME = ServicePortName("default", "web", "http")
VIP = Frontend("172.30.0.41", 80, Protocol.TCP)
KEY = frontend_key(VIP)
NEAR, FAR = Backend("10.0.1.1", 8080), Backend("10.0.2.1", 8080)
NEVER, NOT_POD, ALWAYS = Masquerade.NEVER, Masquerade.NOT_POD, Masquerade.ALWAYS
MARKS = {Scope.INTERNAL: 0xCB600001, Scope.EXTERNAL: 0xCB600002}


def route(kind: Kind, masquerade: Masquerade, *backends: Backend, **more: object) -> Route:
    verdict = Verdict.FORWARD if backends else more.pop("verdict", Verdict.REJECT)
    return Route(NAME, kind, verdict, backends, masquerade if backends else NEVER, **more)  # type: ignore[arg-type]


def rows(internal: Route, external: Route, frontend: Frontend = VIP, scheduler: str = "rr") -> Rows:
    options = IpvsOptions(scheduler)
    return rows_of(frontend, internal, external, options, MARKS.__getitem__, ("127.0.0.1", "192.168.0.2"))


def sets_of(found: Rows) -> set[Set]:
    return {each for each, _, _ in found.entries}


def cluster_ip(*backends: Backend, **more: object) -> tuple[Route, Route]:
    return route(Kind.CLUSTER_IP, NOT_POD, *backends, **more), route(Kind.CLUSTER_IP, ALWAYS, *backends, **more)


def local(kind: Kind, **more: object) -> tuple[Route, Route]:
    """Policy Local: cluster-wide inside, this node's outside."""
    return route(kind, NOT_POD, NEAR, FAR, **more), route(kind, NEVER, NEAR, **more)


def test_a_cluster_ip_is_a_virtual_server_on_a_bound_address() -> None:
    found = rows(*cluster_ip(NEAR, FAR))
    assert found.servers == {server_of(VIP): (Settings("rr"), {place("10.0.1.1", 8080): 1, place("10.0.2.1", 8080): 1})}
    assert found.addresses == [packed("172.30.0.41")]
    assert sets_of(found) == {Set.CLUSTER_IP, Set.IPVS_IPS, Set.FRONTENDS, Set.LOOP_BACK}
    assert found.entries[Set.FRONTENDS, 4, KEY] == "default/web:http ClusterIP"


@pytest.mark.parametrize(
    ("pair", "extra"),
    [
        ((NOT_POD, ALWAYS), set()),
        ((ALWAYS, ALWAYS), {Set.MASQUERADE_ALL}),
        ((NEVER, NEVER), {Set.MASQUERADE_NONE}),
    ],
)
def test_who_is_masqueraded_to_a_cluster_ip(pair: tuple[Masquerade, Masquerade], extra: set[Set]) -> None:
    found = rows(route(Kind.CLUSTER_IP, pair[0], NEAR), route(Kind.CLUSTER_IP, pair[1], NEAR))
    assert sets_of(found) - {Set.IPVS_IPS, Set.FRONTENDS, Set.LOOP_BACK} == {Set.CLUSTER_IP} | extra


def test_without_endpoints_there_is_no_virtual_server_and_the_address_is_bound() -> None:
    found = rows(*cluster_ip())
    assert found.servers == {}
    assert found.addresses == [packed("172.30.0.41")]
    assert sets_of(found) == {Set.REJECT, Set.IPVS_IPS, Set.FRONTENDS}


def test_internal_policy_local_without_local_endpoints_drops() -> None:
    found = rows(*cluster_ip(verdict=Verdict.DROP))
    assert sets_of(found) == {Set.DROP, Set.IPVS_IPS, Set.FRONTENDS}


def test_policy_local_has_a_virtual_server_by_mark_for_clients_outside() -> None:
    found = rows(*local(Kind.LOAD_BALANCER))
    assert found.servers == {
        server_of(VIP): (Settings("rr"), {place("10.0.1.1", 8080): 1, place("10.0.2.1", 8080): 1}),
        Server(4, MARKS[Scope.EXTERNAL]): (Settings("rr"), {place("10.0.1.1", 8080): 1}),
    }
    assert found.entries[Set.MARKS, 4, KEY] == MARKS[Scope.EXTERNAL]
    assert {Set.LOAD_BALANCER, Set.LOAD_BALANCER_LOCAL} <= sets_of(found)
    assert found.entries[Set.FRONTENDS, 4, KEY] == "default/web:http LoadBalancer masquerade=not-pod"


def test_policy_local_where_all_endpoints_are_here_needs_no_mark() -> None:
    found = rows(route(Kind.EXTERNAL_IP, NOT_POD, NEAR), route(Kind.EXTERNAL_IP, NEVER, NEAR))
    assert list(found.servers) == [server_of(VIP)]
    assert Set.MARKS not in sets_of(found)
    assert Set.EXTERNAL_IP_LOCAL in sets_of(found)


def test_policy_local_without_local_endpoints_drops_outside_only() -> None:
    outside = route(Kind.EXTERNAL_IP, NEVER, verdict=Verdict.DROP)
    found = rows(route(Kind.EXTERNAL_IP, NOT_POD, FAR), outside)
    assert list(found.servers) == [server_of(VIP)]
    assert {Set.DROP_EXTERNAL, Set.EXTERNAL_IP_LOCAL} <= sets_of(found)


def test_an_address_that_the_node_has_is_not_bound() -> None:
    frontend = Frontend("192.168.0.2", 80, Protocol.TCP)
    same = route(Kind.EXTERNAL_IP, ALWAYS, NEAR)
    found = rows(same, same, frontend)
    assert found.addresses == []
    assert Set.IPVS_IPS not in sets_of(found)


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [(Protocol.TCP, Set.NODE_PORT_TCP), (Protocol.UDP, Set.NODE_PORT_UDP), (Protocol.SCTP, Set.NODE_PORT_SCTP)],
)
def test_a_node_port_is_not_bound_and_known_by_port(protocol: Protocol, expected: Set) -> None:
    frontend = Frontend("192.168.0.2", 30080, protocol)
    same = route(Kind.NODE_PORT, ALWAYS, NEAR)
    found = rows(same, same, frontend)
    assert found.addresses == []
    key = frontend_key(frontend) if protocol is Protocol.SCTP else (30080).to_bytes(2, "big")
    assert (expected, 4, key) in found.entries
    assert (Set.NODE_IPS, 4, packed("192.168.0.2")) in found.entries
    assert Set.LOOP_BACK not in sets_of(found), "everybody is masqueraded"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_a_node_port_on_loopback_is_parked(address: str) -> None:
    """IPVS forwards nothing from there; a connection is refused and not left to time out."""
    frontend = Frontend(address, 30080, Protocol.TCP)
    backend = Backend("fd00:10:0:1::1", 80) if ":" in address else NEAR
    same = route(Kind.NODE_PORT, ALWAYS, backend)
    found = rows(same, same, frontend)
    version = 6 if ":" in address else 4
    assert list(found.servers) == [Server(version, MARKS[Scope.INTERNAL])]
    assert found.entries[Set.FRONTENDS, version, frontend_key(frontend)] == (
        "default/web:http NodePort parked=0xcb600001"
    )


def test_source_ranges_are_entries_and_the_address_itself_is_a_source() -> None:
    same = route(Kind.LOAD_BALANCER, ALWAYS, NEAR, source_ranges=("172.30.0.41/32", "203.0.113.0/24"))
    found = rows(same, same)
    assert (Set.LOAD_BALANCER_FW, 4, KEY) in found.entries
    assert (Set.SOURCE_CIDR, 4, KEY + network("203.0.113.0/24")) in found.entries
    assert (Set.SOURCE_IP, 4, KEY + packed("172.30.0.41")) in found.entries


def test_affinity_is_persistence() -> None:
    found = rows(*cluster_ip(NEAR, affinity_seconds=10800))
    assert found.servers[server_of(VIP)][0] == Settings("rr", PERSISTENT, 10800)
    assert found.entries[Set.FRONTENDS, 4, KEY] == "default/web:http ClusterIP affinity=10800"


def test_affinity_by_mark_and_other_ports_is_by_hash() -> None:
    """IPVS sends what is persistent by a mark to the port that the client asked for."""
    found = rows(*local(Kind.EXTERNAL_IP, affinity_seconds=60))
    assert found.servers[Server(4, MARKS[Scope.EXTERNAL])][0] == Settings("mh")
    same_port = Frontend("172.30.0.41", 8080, Protocol.TCP)
    found = rows(*local(Kind.EXTERNAL_IP, affinity_seconds=60), same_port)
    assert found.servers[Server(4, MARKS[Scope.EXTERNAL])][0] == Settings("rr", PERSISTENT, 60)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (Algorithm.RANDOM, Settings("sed")),
        (Algorithm.ROUND_ROBIN, Settings("rr")),
        (Algorithm.LEAST_CONNECTIONS, Settings("lc")),
        (Algorithm.MAGLEV, Settings("mh", MH_PORT)),
    ],
)
def test_the_scheduler_is_the_services_or_the_operators(algorithm: Algorithm, expected: Settings) -> None:
    found = rows(*cluster_ip(NEAR, algorithm=algorithm), scheduler="sed")
    assert found.servers[server_of(VIP)][0] == expected


def test_a_backend_that_drains_has_weight_0() -> None:
    draining = Backend("10.0.2.1", 8080, state=BackendState.DRAINING)
    found = rows(*cluster_ip(Backend("10.0.1.1", 8080, weight=3), draining))
    assert found.servers[server_of(VIP)][1] == {place("10.0.1.1", 8080): 3, place("10.0.2.1", 8080): 0}


@pytest.mark.parametrize(
    "pair",
    [
        (route(Kind.CLUSTER_IP, NEVER, NEAR), route(Kind.CLUSTER_IP, ALWAYS, NEAR)),
        (route(Kind.CLUSTER_IP, NOT_POD, NEAR), route(Kind.CLUSTER_IP, ALWAYS, FAR)),
        (route(Kind.EXTERNAL_IP, ALWAYS, NEAR), route(Kind.EXTERNAL_IP, ALWAYS, FAR)),
        (route(Kind.EXTERNAL_IP, NEVER, NEAR), route(Kind.EXTERNAL_IP, NEVER, NEAR)),
        (route(Kind.EXTERNAL_IP, NOT_POD, NEAR), route(Kind.EXTERNAL_IP, NEVER, verdict=Verdict.REJECT)),
        (route(Kind.EXTERNAL_IP, NOT_POD, NEAR), route(Kind.EXTERNAL_IP, NEVER, NEAR, affinity_seconds=1)),
        (route(Kind.EXTERNAL_IP, NOT_POD, NEAR), route(Kind.EXTERNAL_IP, NEVER, NEAR, algorithm=Algorithm.MAGLEV)),
        (route(Kind.EXTERNAL_IP, ALWAYS, NEAR), route(Kind.LOAD_BALANCER, ALWAYS, NEAR)),
    ],
)
def test_pairs_that_no_policy_makes_are_refused_as_a_whole(pair: tuple[Route, Route]) -> None:
    with pytest.raises(Refusal):
        rows(*pair)


@pytest.mark.parametrize("frontend", [VIP, Frontend("fd00:172:30::41", 443, Protocol.SCTP)])
def test_keys_come_back(frontend: Frontend) -> None:
    assert frontend_of(frontend_key(frontend)) == frontend
    assert placed(place(frontend.address, 8080)) == (frontend.address, 8080)
    for cidr in ("10.0.0.0/8", "fd00::/16", "::1/128"):
        assert cidr_of(network(cidr)) == cidr


# ---- Names


def test_names_of_sets_fit_and_are_kube_proxys() -> None:
    assert all(len(name) <= 31 for name in SET_NAMES)
    assert len(SET_NAMES) == 2 * len(Set)
    assert Set.SOURCE_CIDR.named(6) == "KUBE-6-LOAD-BALANCER-SOURCE-CID"
    assert Set.FRONTENDS.named(6) == "EBPFLB-6-FRONTENDS"


@pytest.mark.parametrize("bit", range(32))
def test_marks_spare_the_masquerade_bit_and_come_back(bit: int) -> None:
    mark = Mark(bit)
    base, mask = (int(part, 16) for part in mark.range.split("/"))
    for number in (0, 1, 0x4321, 0xFFFFF):
        found = mark.of(number)
        assert found < 1 << 32 and not found >> bit & 1
        assert mark.number(found) == number
        assert found & mask == base
        assert mark.number(found | 1 << bit) is None
    for foreign in (0, 1, 1 << bit, 0x10000, 0xFFFF0000):
        assert mark.number(foreign) is None
