"""What `rules` writes is, letter for letter, what either iptables prints once it holds it: audits compare text.

Each restore has a network namespace to itself, which ends with the command.
"""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import HealthCheck, given, settings

from ebpflb.dataplane.iptables import frame
from ebpflb.dataplane.iptables.frame import Settings
from ebpflb.dataplane.iptables.layout import Index
from ebpflb.model import DetectLocal, EndpointSlice, Family, Node, ProxyOptions, Service
from ebpflb.netfilter.ruleset import Ruleset, quoted, restore_input, ruleset_of
from ebpflb.policy import routes
from ebpflb.routes import RouteTable
from tests.iptables import P80, WEB_PODS, table_of, written
from tests.property.clusters import choices_for_rules, nodes, things, world
from tests.world import LOCAL, SCTP, TCP, UDP, endpoint_slice, leaving, options, port, service, slice_port

pytestmark = pytest.mark.root

TOOLS = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
EVERYTHING = (
    service(
        "ns1/web",
        "172.30.0.41",
        port(80, "p80", TCP, 30080),
        external=["192.168.99.1"],
        lb=["1.2.3.4", "5.6.7.8"],
        external_policy=LOCAL,
        affinity=10800,
        ranges=["203.0.113.0/24", "192.168.0.0/24"],
        health_port=32000,
        annotations=[("algorithm", "maglev"), ("forwarding", "dsr")],
    ),
    endpoint_slice(*[f"10.0.1.{last}" for last in range(1, 8)], leaving("10.0.2.1"), of="ns1/web", ports=P80),
    service("ns1/none", "172.30.0.42", port(53, "dns", UDP, 30053), lb=["9.10.11.12"], ranges=["203.0.113.0/24"]),
    service("ns1/refused", "172.30.0.43", port(80, "", TCP, 30081), external=["192.168.99.2"]),
    service("ns1/sctp", "172.30.0.44", port(80, "s", SCTP), external=["192.168.99.3"], internal_policy=LOCAL),
    endpoint_slice("10.0.2.1", of="ns1/sctp", ports=[slice_port(80, "s", SCTP)]),
    service("ns1/dns", "172.30.0.45", port(53, "dns", UDP)),
    endpoint_slice("10.0.2.1", of="ns1/dns", ports=[slice_port(53, "dns", UDP)]),
    service("ns1/host", "172.30.0.46", port(80), lb=["192.168.0.3"], external_policy=LOCAL, ranges=["203.0.113.0/24"]),
    endpoint_slice("192.168.0.3", of="ns1/host"),
)


def through_the_kernel(variant: str, family: Family, text: str) -> Ruleset:
    """What is saved after `text` was restored in a namespace of its own."""
    tool = f"{TOOLS[family]}-{variant}"
    # As one process tree: the namespace is gone when it ends.
    done = subprocess.run(
        ["unshare", "-n", "sh", "-ec", f"{tool}-restore --noflush --counters; {tool}-save"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ruleset_of(done.stdout.splitlines())


def check(table: RouteTable, variant: str, chosen: Settings) -> None:
    """All rules of a table, those in chains of others included."""
    for family in Family:
        wanted = written(table, family, chosen)
        for name, chains in frame.guests(Index(table).nodeports(family)).items():
            wanted[name].update(chains)
        builtin = {"INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"}
        own = {
            name: {chain: rules for chain, rules in chains.items() if chain not in builtin}
            for name, chains in wanted.items()
        }
        jumps = {
            name: [rule for chain, rules in chains.items() if chain in builtin for rule in rules]
            for name, chains in wanted.items()
        }
        found = through_the_kernel(variant, family, "".join(restore_input(own, jumps)))
        assert found.keys() == wanted.keys()
        for name, chains in wanted.items():
            assert {chain: rules for chain, rules in found[name].items() if rules or chain not in builtin} == {
                chain: rules for chain, rules in chains.items() if rules or chain not in builtin
            }


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("comments", [True, False])
@pytest.mark.parametrize("family", Family)
def test_a_cluster_with_everything(variant: str, comments: bool, family: Family) -> None:
    check(table_of(*EVERYTHING, family=family), variant, Settings(comments=comments))


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize(
    "chosen",
    [
        options(cluster_cidrs=("10.0.0.0/9", "10.128.0.0/9")),
        options(cluster_cidrs=("0.0.0.0/0",)),
        options(cluster_cidrs=(), masquerade_all=True),
        options(detect_local=DetectLocal.BRIDGE_INTERFACE, bridge_interface="cni0"),
        options(detect_local=DetectLocal.INTERFACE_NAME_PREFIX, interface_name_prefix="veth"),
        options(detect_local=DetectLocal.INTERFACE_NAME_PREFIX, interface_name_prefix="fifteen-letters"),
    ],
    ids=["two pod CIDRs", "all are pods", "masquerade all", "bridge", "prefix", "full prefix"],
)
def test_what_tells_pods(variant: str, chosen: ProxyOptions) -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4"], external_policy=LOCAL)
    check(table_of(web, WEB_PODS, options=chosen), variant, Settings(mark=1 << 31, random_fully=False))


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@given(said=things, node=nodes, chosen=choices_for_rules)
@settings(max_examples=8, suppress_health_check=list(HealthCheck), deadline=None)
def test_random_clusters(variant: str, said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions) -> None:
    """Invariant: so it is for every table that the policy makes."""
    check(routes(world(said, node), chosen), variant, Settings())


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("text", ["plain", "two words", "ns/a:b", 'say "hi"', "it's", "back\\slash", "a=b"])
def test_comments_are_quoted_as_they_are_printed(variant: str, text: str) -> None:
    rule = f"-A KUBE-TEST -m comment --comment {quoted(text)}"
    found = through_the_kernel(variant, Family.IPV4, "".join(restore_input({"filter": {"KUBE-TEST": (rule,)}})))
    assert found["filter"]["KUBE-TEST"] == (rule,)
