"""Service ports one at a time: which of them a change touches, and what is no shape that rules can have."""

from __future__ import annotations

import msgspec
import pytest

from ebpflb.dataplane.iptables.frame import Settings
from ebpflb.dataplane.iptables.layout import Index, PortKey
from ebpflb.dataplane.iptables.rules import port_rules, ruleset
from ebpflb.model import Family, Problem
from ebpflb.routes import Key, Masquerade, Route, RouteTable, Scope, ServicePortName
from tests.iptables import P80, WEB, WEB_PODS, absent, table_of
from tests.world import (
    LOCAL,
    NODE_IP,
    TCP,
    UDP,
    endpoint_slice,
    node,
    port,
    service,
)

# ---- Shapes that no policy makes ----


def crooked(table: RouteTable, scope: Scope, **change: object) -> RouteTable:
    """`table` with something else in the first row of a scope."""
    key: Key = min(key for key in table if key[1] is scope)
    return table.evolve({key: msgspec.structs.replace(table[key], **change)})


EXTERNAL = service("ns1/web", "172.30.0.41", port(80, "p80", TCP, 30080), lb=["1.2.3.4"], external_policy=LOCAL)


@pytest.mark.parametrize(
    ("change", "scope", "said"),
    [
        ({"affinity_seconds": 7}, Scope.EXTERNAL, "differ in more than their backends"),
        ({"masquerade": Masquerade.NOT_POD}, Scope.EXTERNAL, "other backends than another external frontend"),
        ({"backends": ()}, Scope.INTERNAL, "other backends than another external frontend"),
    ],
)
def test_routes_of_another_shape_are_a_problem_and_no_rule(change: dict[str, object], scope: Scope, said: str) -> None:
    table = crooked(table_of(EXTERNAL, WEB_PODS), scope, **change)
    found, (problem,) = ruleset(table, Family.IPV4, Settings())
    assert problem.subject == "ns1/web" and said in problem.reason and problem.code == "UnknownShape"
    assert absent(found, "nat", "KUBE-SVC-") and absent(found, "nat", "KUBE-EXT-")
    assert found["nat"]["KUBE-NODEPORTS"] == ()


def test_a_frontend_for_one_scope_only_is_a_problem() -> None:
    table = table_of(WEB, WEB_PODS)
    internal = {key: route for key, route in table.items() if key[1] is Scope.INTERNAL}
    _, problems = ruleset(RouteTable(internal, table.locality), Family.IPV4, Settings())
    assert [problem.subject for problem in problems] == ["ns1/web"]


def test_masquerading_by_pods_without_a_detector_is_a_problem() -> None:
    table = table_of(WEB, WEB_PODS)
    blind = table.evolve({}, locality=msgspec.structs.replace(table.locality, pod_cidrs=()))
    _, problems = ruleset(blind, Family.IPV4, Settings())
    assert [problem.code for problem in problems] == ["UnknownShape"]


def test_a_name_that_fits_no_comment_is_a_problem() -> None:
    def long_name(route: Route) -> Route:
        return msgspec.structs.replace(route, service=ServicePortName("n" * 63, "s" * 63, "p" * 63))

    table = table_of(WEB, WEB_PODS)
    _, problems = ruleset(
        RouteTable({key: long_name(route) for key, route in table.items()}, table.locality), Family.IPV4, Settings()
    )
    assert "too long" in problems[0].reason


def test_one_service_port_that_is_wrong_takes_no_other_with_it() -> None:
    good = service("ns1/good", "172.30.0.50", port(80))
    table = table_of(WEB, WEB_PODS, good, endpoint_slice("10.0.1.7", of="ns1/good"))
    found, problems = ruleset(crooked(table, Scope.EXTERNAL, affinity_seconds=7), Family.IPV4, Settings())
    assert [problem.subject for problem in problems] == ["ns1/web"]
    assert len(found["nat"]["KUBE-SERVICES"]) == 1


# ---- One service port at a time ----


def test_a_service_port_that_is_gone_has_no_rules() -> None:
    table = table_of(WEB, WEB_PODS)
    index = Index(table)
    key = PortKey(ServicePortName("ns1", "gone", ""), TCP, Family.IPV4)
    none: Problem | None = None
    assert port_rules(key, table, index, Settings()) == ({}, {}, none)


def test_another_endpoint_touches_one_service_port() -> None:
    dns = service("ns1/dns", "172.30.0.43", port(53, "dns", UDP))
    before = table_of(WEB, WEB_PODS, dns)
    index = Index(before)
    after = table_of(WEB, endpoint_slice("10.0.1.1", of="ns1/web", ports=P80), dns)
    touched = index.update(before, after, after.changed_from(before))
    assert touched == {PortKey(ServicePortName("ns1", "web", "p80"), TCP, Family.IPV4)}


def test_another_address_of_the_node_touches_node_ports_alone() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80", TCP, 30080))
    dns = service("ns1/dns", "172.30.0.43", port(53, "dns", UDP))
    before = table_of(web, WEB_PODS, dns)
    index = Index(before)
    after = table_of(web, WEB_PODS, dns, node=node(addresses=("127.0.0.1", NODE_IP, "192.168.0.9")))
    touched = index.update(before, after, after.changed_from(before))
    assert touched == {PortKey(ServicePortName("ns1", "web", "p80"), TCP, Family.IPV4)}
    assert index.nodeports(Family.IPV4) == {"127.0.0.1", NODE_IP, "192.168.0.9"}


def test_a_node_port_is_written_otherwise_when_another_one_goes() -> None:
    """ns1/web has lost one of two addresses to an external IP; once it alone has node ports, it has all that have."""
    first = service("ns1/first", "172.30.0.42", port(30080, "p"), external=[NODE_IP], created="2024-01-01T00:00:00Z")
    web = service("ns1/web", "172.30.0.41", port(80, "p80", TCP, 30080))
    before = table_of(first, web, WEB_PODS, service("ns1/dns", "172.30.0.43", port(53, "dns", UDP, 30053)))
    after = table_of(first, web, WEB_PODS)
    index = Index(before)
    key = PortKey(ServicePortName("ns1", "web", "p80"), TCP, Family.IPV4)
    lines = port_rules(key, before, index, Settings()).shared["nat"]["KUBE-NODEPORTS"]
    assert lines[0].startswith("-A KUBE-NODEPORTS -d 127.0.0.1/32 -p tcp ")
    assert key in index.update(before, after, after.changed_from(before))
    lines = port_rules(key, after, index, Settings()).shared["nat"]["KUBE-NODEPORTS"]
    assert lines[0].startswith("-A KUBE-NODEPORTS -p tcp ")


def test_other_pod_cidrs_touch_everything() -> None:
    before = table_of(WEB, WEB_PODS, service("ns1/none", "172.30.0.43"))
    index = Index(before)
    after = before.evolve({}, locality=msgspec.structs.replace(before.locality, pod_cidrs=("10.9.0.0/16",)))
    assert index.update(before, after, ()) == set(index.ports())
