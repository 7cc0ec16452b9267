"""What saved rules are read as: ours, whole rows only, whatever else somebody put beside them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from ebpflb.dataplane.iptables import inspect, reading
from ebpflb.model import Family, ServiceName, TrafficPolicy
from ebpflb.netfilter.ruleset import Ruleset, ruleset_of
from ebpflb.routes import Kind, Masquerade, RouteTable, Scope, Verdict
from tests.iptables import P80, WEB, WEB_PODS, table_of, written
from tests.world import (
    CLUSTER,
    LOCAL,
    NODE_IP,
    OTHER_NODE_IP,
    TCP,
    UDP,
    endpoint_slice,
    in_family,
    leaving,
    node,
    options,
    port,
    service,
)

FULL = service(
    "ns1/web",
    "172.30.0.41",
    port(80, "p80", TCP, 30080),
    external=["192.168.99.1"],
    lb=["1.2.3.4", "5.6.7.8"],
    external_policy=LOCAL,
    affinity=10800,
    ranges=["203.0.113.0/24", "192.168.0.0/24"],
    annotations=[("algorithm", "maglev"), ("forwarding", "dsr")],
)


def read(found: Ruleset, like: RouteTable) -> RouteTable:
    return reading.routes({Family.IPV4: found}, like.locality.node_addresses)


@pytest.mark.parametrize("policy", [CLUSTER, LOCAL])
@pytest.mark.parametrize(
    "pods",
    [[], ["10.0.1.1"], ["10.0.2.2"], ["10.0.1.1", leaving("10.0.1.3"), "10.0.2.2"], [leaving("10.0.2.2")]],
    ids=["none", "here", "elsewhere", "some leave", "all leave"],
)
def test_a_service_with_everything(policy: TrafficPolicy, pods: list[str]) -> None:
    web = msgspec.structs.replace(FULL, internal_policy=policy)
    table = table_of(web, *([endpoint_slice(*pods, of="ns1/web", ports=P80)] if pods else []))
    assert read(written(table), table) == table


@pytest.mark.parametrize("ranges", [(), ("203.0.113.0/24", "192.168.0.0/24")], ids=["open", "ranges"])
@pytest.mark.parametrize("policy", [CLUSTER, LOCAL])
@pytest.mark.parametrize("address", [NODE_IP, OTHER_NODE_IP], ids=["here", "elsewhere"])
def test_a_backend_in_its_frontends_own_place(address: str, policy: TrafficPolicy, ranges: tuple[str, ...]) -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=[address], external_policy=policy, ranges=ranges)
    table = table_of(web, endpoint_slice(address, of="ns1/web", ports=P80))
    assert len(table) == 4
    assert read(written(table), table) == table


def test_a_row_says_what_its_rules_say() -> None:
    """Read from text as a person would write it down, not from what `rules` made."""
    saved = """*filter
:EBPFLB-LOCALITY - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
-A EBPFLB-LOCALITY -s 10.0.0.0/8
-A KUBE-EXTERNAL-SERVICES -d 192.168.99.2/32 -p udp -m comment --comment "a/dns has no endpoints kind=ExternalIP affinity=60" -m udp --dport 53 -j REJECT --reject-with icmp-port-unreachable
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-B - [0:0]
:KUBE-SEP-C - [0:0]
-A KUBE-SERVICES -d 172.30.0.1/32 -p tcp -m comment --comment "a/web:http cluster IP algorithm=maglev" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A ! -s 10.0.0.0/8 -d 172.30.0.1/32 -p tcp -m comment --comment "a/web:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -m recent --rcheck --seconds 60 --reap --name KUBE-SEP-B --mask 255.255.255.255 --rsource -j KUBE-SEP-B
-A KUBE-SVC-A -m statistic --mode random --probability 0.00000000000 -j KUBE-SEP-C
-A KUBE-SVC-A -j KUBE-SEP-B
-A KUBE-SEP-B -s 10.0.0.2/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-B -p tcp -m recent --set --name KUBE-SEP-B --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.0.0.2:8080
-A KUBE-SEP-C -s 10.0.0.1/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-C -p tcp -m recent --set --name KUBE-SEP-C --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.0.0.1:8080
COMMIT
"""  # noqa: E501
    table = reading.routes({Family.IPV4: ruleset_of(saved.splitlines())}, [NODE_IP])
    assert table.locality.pod_cidrs == ("10.0.0.0/8",)
    assert table.locality.node_addresses == (NODE_IP,)
    rows = {(str(frontend), scope): route for (frontend, scope), route in table.items()}
    web = rows["172.30.0.1:80/TCP", Scope.INTERNAL]
    assert (str(web.service), web.kind.label, web.algorithm.label) == ("a/web:http", "ClusterIP", "maglev")
    assert (web.verdict, web.masquerade, web.affinity_seconds) == (Verdict.FORWARD, Masquerade.NOT_POD, 60)
    assert [(each.address, each.port, each.state.name) for each in web.backends] == [
        ("10.0.0.1", 8080, "DRAINING"),
        ("10.0.0.2", 8080, "ACTIVE"),
    ]
    assert rows["172.30.0.1:80/TCP", Scope.EXTERNAL].masquerade is Masquerade.ALWAYS
    dns = rows["192.168.99.2:53/UDP", Scope.EXTERNAL]
    assert (str(dns.service), dns.kind, dns.verdict, dns.affinity_seconds) == (
        "a/dns", Kind.EXTERNAL_IP, Verdict.REJECT, 60,
    )  # fmt: skip
    assert len(rows) == 4


def test_cluster_ips_are_known_by_what_refuses_their_other_ports() -> None:
    table = table_of(WEB, service("ns2/dns", "172.30.64.10", port(53, "dns", UDP)))
    back = read(written(table), table)
    assert dict(back.owned) == {
        "172.30.0.41": ServiceName("ns1", "web"),
        "172.30.64.10": ServiceName("ns2", "dns"),
    }


def test_both_families_make_one_table() -> None:
    chosen = options(cluster_cidrs=("10.0.0.0/8", "fd00:10::/32"))
    this = node(addresses=("127.0.0.1", NODE_IP, "::1", "fd00:192:168::2"), primary=(NODE_IP, "fd00:192:168::2"))
    web = service("ns1/web", ("172.30.0.41", "fd00:30::41"), port(80, "p80", TCP, 30080))
    table = table_of(web, WEB_PODS, in_family(WEB_PODS, Family.IPV6), options=chosen, node=this)
    rulesets = {family: written(table, family) for family in Family}
    assert reading.routes(rulesets, table.locality.node_addresses) == table
    assert {":" in frontend.address for frontend, _ in table} == {True, False}


def test_kube_proxys_rules_are_not_ours() -> None:
    found = written(table_of(WEB, WEB_PODS))
    del found["filter"]["EBPFLB-LOCALITY"]
    assert not reading.owned(found)
    assert len(reading.routes({Family.IPV4: found}, [NODE_IP])) == 0


def test_rules_of_ipvs_are_not_ours() -> None:
    found = written(table_of(WEB, WEB_PODS))
    assert reading.owned(found)
    marked = {**found, "filter": {**found["filter"], "EBPFLB-IPVS": ()}}
    assert not reading.owned(marked)
    asks = "-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT"
    assert not reading.owned({**found, "nat": {**found["nat"], "KUBE-SERVICES": (asks,)}})
    assert len(reading.routes({Family.IPV4: marked}, [NODE_IP])) == 0


def test_nothing_saved_is_no_route() -> None:
    assert len(reading.routes({Family.IPV4: {}, Family.IPV6: {}}, [])) == 0


@pytest.mark.parametrize(
    ("table", "chain", "rule"),
    [
        ("nat", "KUBE-SERVICES", "-s 203.0.113.9/32 -j RETURN"),
        (
            "nat",
            "KUBE-SERVICES",
            '-d 10.1.1.1/32 -p tcp -m comment --comment "by hand" -m tcp --dport 80 -j KUBE-SVC-X',
        ),
        ("nat", "KUBE-NODEPORTS", "-p tcp -m tcp --dport 22 -j ACCEPT"),
        ("nat", "KUBE-SVC-", "-s 203.0.113.9/32 -j DROP"),
        ("nat", "KUBE-SVC-", "-s 203.0.113.9/32 -j KUBE-SEP-AAAAAAAAAAAAAAAA"),
        ("nat", "KUBE-SEP-", "-j LOG"),
        ("nat", "KUBE-FW-", "-j LOG"),
        ("filter", "KUBE-SERVICES", "-m limit --limit 1/sec -j LOG"),
        ("filter", "KUBE-PROXY-FIREWALL", "-j ACCEPT"),
    ],
)
def test_a_rule_that_somebody_put_among_ours_is_passed_over(table: str, chain: str, rule: str) -> None:
    wanted = table_of(FULL, WEB_PODS)
    found = written(wanted)
    name = next(each for each in found[table] if each.startswith(chain))
    found[table][name] = (f"-A {name} {rule}", *found[table][name])
    assert read(found, wanted) == wanted


def _without_chain(prefix: str) -> Callable[[Ruleset], None]:
    def damage(found: Ruleset) -> None:
        del found["nat"][next(each for each in found["nat"] if each.startswith(prefix))]

    return damage


def _without_last(table: str, prefix: str) -> Callable[[Ruleset], None]:
    def damage(found: Ruleset) -> None:
        name = next(each for each in found[table] if each.startswith(prefix))
        found[table][name] = found[table][name][:-1]

    return damage


def _without_first(table: str, prefix: str) -> Callable[[Ruleset], None]:
    def damage(found: Ruleset) -> None:
        name = next(each for each in found[table] if each.startswith(prefix))
        found[table][name] = found[table][name][1:]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _without_chain("KUBE-SVC-"),
        _without_chain("KUBE-SEP-"),
        _without_chain("KUBE-EXT-"),
        _without_chain("KUBE-FW-"),
        _without_last("nat", "KUBE-SVC-"),
        _without_last("nat", "KUBE-SEP-"),
        _without_last("nat", "KUBE-EXT-"),
        _without_last("nat", "KUBE-SERVICES"),
        _without_last("nat", "KUBE-NODEPORTS"),
        _without_last("filter", "KUBE-PROXY-FIREWALL"),
        _without_last("filter", "EBPFLB-LOCALITY"),
        _without_first("nat", "KUBE-EXT-"),
        _without_first("nat", "KUBE-SEP-"),
    ],
    ids=[
        "SVC", "SEP", "EXT", "FW", "last of SVC", "last of SEP", "last of EXT", "an address of node ports",
        "a node port", "a firewall's drop", "a pod CIDR",
        "pods' way", "a hairpin",
    ],
)  # fmt: skip
def test_a_row_that_lacks_a_rule_is_not_that_row(damage: Callable[[Ruleset], None]) -> None:
    wanted = table_of(FULL, WEB_PODS)
    found = written(wanted)
    damage(found)
    back = read(found, wanted)
    assert back != wanted
    assert all(wanted.get(key) == route for key, route in back.items())


def test_consistent_hashing_is_nothing_that_rules_hold() -> None:
    """A Service may ask for it: backends are chosen at random all the same."""
    held = table_of(msgspec.structs.replace(WEB, annotations=(("algorithm", "maglev"),)), WEB_PODS)
    assert inspect.tables("maglev", (), lambda: held) == []
