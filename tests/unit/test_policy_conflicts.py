"""Two claims to one frontend: one deterministic winner, and a Problem for the loser, who takes over afterwards."""

from __future__ import annotations

import itertools

import pytest

from ebpflb.decide import decide
from ebpflb.model import EndpointSlice, Family, Problem, Service, ServiceName
from ebpflb.policy import Router, routes
from ebpflb.routes import Kind, RouteTable
from tests.flows import Situation, every, expected, outcome, packet, situation, table_of
from tests.world import UDP, endpoint_slice, in_family, name_of, node, options, port, service, slice_port, snapshot


def pair(first: Service, second: Service) -> tuple[Service | EndpointSlice, ...]:
    """Two Services, the first with backend 10.0.1.1 and the second with 10.0.1.2."""
    return (
        first,
        second,
        endpoint_slice("10.0.1.1", of=str(first.name)),
        endpoint_slice("10.0.1.2", of=str(second.name)),
    )


OLD, YOUNG = "2024-01-01T00:00:00Z", "2024-06-01T00:00:00Z"
FIRST, SECOND = "masq 10.0.1.1:80", "masq 10.0.1.2:80"


def a(created: str = "", *ports: object, **more: object) -> Service:
    return service("ns1/a", "172.30.0.1", *ports, created=created, **more)  # type: ignore[arg-type]


def b(created: str = "", *ports: object, **more: object) -> Service:
    return service("ns1/b", "172.30.0.2", *ports, created=created, **more)  # type: ignore[arg-type]


NP, NP_UDP = port(80, node_port=30080), port(80, "", UDP, 30080)

ROWS: tuple[Situation, ...] = (
    situation(
        "should-prevent-nodeport-collisions-the-older-wins",
        *pair(a(YOUNG, NP), b(OLD, NP)),
        wanted={"outside 192.168.0.2:30080": SECOND, "pod 172.30.0.1:80": "10.0.1.1:80"},
    ),
    situation(
        "same-node-port-same-age-by-name",
        *pair(a(OLD, NP), b(OLD, NP)),
        wanted={"outside 192.168.0.2:30080": FIRST},
    ),
    situation(
        "same-node-port-unknown-age-is-youngest",
        *pair(a("", NP), b(YOUNG, NP)),
        wanted={"outside 192.168.0.2:30080": SECOND},
    ),
    situation(
        "same-node-port-of-different-protocols-is-no-conflict",
        a(OLD, NP),
        b(OLD, NP_UDP),
        endpoint_slice("10.0.1.1", of="ns1/a"),
        endpoint_slice("10.0.1.2", of="ns1/b", ports=[slice_port(80, "", UDP)]),
        wanted={"outside 192.168.0.2:30080": FIRST, "outside 192.168.0.2:30080/UDP": SECOND},
    ),
    situation(
        "same-cluster-ip-and-port-in-two-services",
        *pair(service("ns1/a", "172.30.0.9", created=YOUNG), service("ns1/b", "172.30.0.9", created=OLD)),
        wanted={"pod 172.30.0.9:80": "10.0.1.2:80"},
    ),
    situation(
        "same-cluster-ip-other-port-is-no-conflict",
        service("ns1/a", "172.30.0.9", port(80)),
        service("ns1/b", "172.30.0.9", port(81)),
        endpoint_slice("10.0.1.1", of="ns1/a"),
        endpoint_slice("10.0.1.2", of="ns1/b"),
        wanted={"pod 172.30.0.9:80": "10.0.1.1:80", "pod 172.30.0.9:81": "10.0.1.2:80"},
    ),
    situation(
        "same-external-ip",
        *pair(a(YOUNG, external=["192.168.99.1"]), b(OLD, external=["192.168.99.1"])),
        wanted={"outside 192.168.99.1:80": SECOND},
    ),
    situation(
        "same-load-balancer-ip",
        *pair(a(OLD, lb=["1.2.3.4"]), b(YOUNG, lb=["1.2.3.4"])),
        wanted={"outside 1.2.3.4:80": FIRST},
    ),
    situation(
        "shared-load-balancer-ip-other-port-is-no-conflict",
        *pair(a(OLD, port(80), lb=["1.2.3.4"]), b(YOUNG, port(81), lb=["1.2.3.4"])),
        wanted={"outside 1.2.3.4:80": FIRST, "outside 1.2.3.4:81": SECOND},
    ),
    situation(
        "external-ip-that-is-an-older-services-cluster-ip",
        *pair(a(OLD), b(YOUNG, external=["172.30.0.1"])),
        wanted={"pod 172.30.0.1:80": "10.0.1.1:80"},
    ),
    situation(
        "external-ip-that-is-a-node-address-with-anothers-node-port",
        *pair(a(OLD, NP), b(YOUNG, port(30080), external=["192.168.0.2"])),
        wanted={"outside 192.168.0.2:30080": FIRST},
    ),
    situation(
        "the-winner-without-endpoints-still-wins",
        a(OLD, NP),
        b(YOUNG, NP),
        endpoint_slice("10.0.1.2", of="ns1/b"),
        wanted={"outside 192.168.0.2:30080": "REJECT"},
    ),
)


@every(ROWS)
def test_one_winner(row: Situation, family: Family) -> None:
    table = table_of(row, family)
    for text, then in row.wanted.items():
        assert outcome(decide(table, packet(text, family))) == expected(then, family), text


def reasons(table: RouteTable, name: str) -> str:
    return " | ".join(problem.reason for problem in table.problems.get(name_of(name), ()))


def test_the_loser_has_a_problem_that_names_the_winner() -> None:
    table = routes(snapshot(*pair(a(YOUNG, NP), b(OLD, NP))), options())
    assert set(table.problems) == {name_of("ns1/a")}
    (problem,) = table.problems[name_of("ns1/a")]
    assert problem.subject == "ns1/a"
    assert "NodePort port 30080/TCP on 127.0.0.1, 192.168.0.2 belongs to ns1/b" in problem.reason


def test_no_conflict_no_problem() -> None:
    assert not routes(snapshot(*pair(a(OLD, NP), b(OLD, NP_UDP))), options()).problems


@pytest.mark.parametrize("family", Family)
def test_the_loser_takes_over_and_yields_again(family: Family) -> None:
    router = Router()
    first, second, first_slice, second_slice = pair(a(OLD, NP), b(YOUNG, NP))
    chosen = in_family(options(), family)

    def update(*objects: Service | EndpointSlice) -> tuple[object, dict[ServiceName, tuple[Problem, ...]]]:
        table = router.update(in_family(snapshot(*objects), family), frozenset([first.name]), chosen)
        return outcome(decide(table, packet("outside 192.168.0.2:30080", family))), dict(table.problems)

    both = (first, second, first_slice, second_slice)
    router.update(in_family(snapshot(*both), family), None, chosen)
    got, problems = update(*both)
    assert got == expected(FIRST, family) and set(problems) == {second.name}
    got, problems = update(second, first_slice, second_slice)
    assert got == expected(SECOND, family) and problems == {}
    got, problems = update(*both)
    assert got == expected(FIRST, family) and set(problems) == {second.name}
    got, problems = update(a("2025-01-01T00:00:00Z", NP), second, first_slice, second_slice)  # deleted and made anew
    assert got == expected(SECOND, family) and set(problems) == {first.name}
    got, problems = update(a(OLD), second, first_slice, second_slice)  # released its node port
    assert got == expected(SECOND, family) and problems == {}


def test_three_claims_in_every_order_of_arrival() -> None:
    c = service("ns1/c", "172.30.0.3", NP, created="2024-03-01T00:00:00Z")
    objects = {each.name: each for each in (a(YOUNG, NP), b(OLD, NP), c)}
    wanted = routes(snapshot(*objects.values()), options())
    assert wanted[next(key for key in wanted if key[0].port == 30080)].service.name == "b"
    for order in itertools.permutations(objects):
        router, there = Router(), []
        for name in order:
            there.append(objects[name])
            table = router.update(snapshot(*there), frozenset([name]), options())
        assert table == wanted and table.problems == wanted.problems
        gone = router.update(snapshot(objects[name_of("ns1/a")], c), frozenset([name_of("ns1/b")]), options())
        assert {route.service.name for (frontend, _), route in gone.items() if frontend.port == 30080} == {"c"}


def test_problem_follows_when_the_winner_changes() -> None:
    c = service("ns1/c", "172.30.0.3", NP)
    router = Router()
    before = router.update(snapshot(a(YOUNG, NP), b(OLD, NP), c), None, options())
    assert "belongs to ns1/b" in reasons(before, "ns1/c")
    after = router.update(snapshot(a(YOUNG, NP), c), frozenset([name_of("ns1/b")]), options())
    assert "belongs to ns1/a" in reasons(after, "ns1/c") and not reasons(after, "ns1/a")


def test_two_ports_of_one_service_claim_one_frontend() -> None:
    """An external IP that is a node address, and a node port of the same number: node ports are looked at last."""
    both = service(
        "ns1/a", "172.30.0.1", port(80, "web", node_port=30080), port(30080, "admin"), external=["192.168.0.2"]
    )
    table = routes(snapshot(both, node=node(addresses=["192.168.0.2"])), options())
    (route,) = {
        route for (frontend, _), route in table.items() if frontend.address == "192.168.0.2" and frontend.port == 30080
    }
    assert (route.kind, route.service.port) == (Kind.EXTERNAL_IP, "admin")
    assert "claimed twice: ExternalIP of its port 'admin' is served, NodePort of its port 'web' is not" in reasons(
        table, "ns1/a"
    )


def test_one_port_by_two_kinds_is_no_problem() -> None:
    table = routes(snapshot(service("ns1/a", external=["1.2.3.4"], lb=["1.2.3.4"])), options())
    assert {route.kind for (frontend, _), route in table.items() if frontend.address == "1.2.3.4"} == {
        Kind.LOAD_BALANCER
    }
    assert not table.problems
