"""What stands around the rules of Services: fixed chains, jumps, undefined ports."""

from __future__ import annotations

import pytest

from ebpflb.dataplane.iptables import frame
from ebpflb.dataplane.iptables.frame import Settings
from ebpflb.model import Family, ServiceName
from ebpflb.routes import RouteTable
from tests.iptables import WEB, WEB_PODS, rules_of
from tests.world import (
    LOCAL,
    NODE_IP,
    port,
    service,
)


def test_undefined_ports_of_a_cluster_ip_are_refused() -> None:
    found = rules_of(WEB, WEB_PODS, service("ns1/far", "172.30.99.1"))
    jumps = found["filter"]["KUBE-SERVICES"][-2:]
    assert [jump.split(" ")[3] for jump in jumps] == ["172.30.0.0/20", "172.30.96.0/20"]
    near = jumps[0].rpartition(" ")[2]
    assert found["filter"][near] == (f'-A {near} -d 172.30.0.41/32 -m comment --comment "ns1/web" -j KUBE-CIP-REJECT',)
    assert found["filter"]["KUBE-CIP-REJECT"] == (
        "-A KUBE-CIP-REJECT -p tcp -j REJECT --reject-with tcp-reset",
        "-A KUBE-CIP-REJECT -j REJECT --reject-with icmp-port-unreachable",
    )


def test_the_blocks_of_ipv6_cluster_ips() -> None:
    owned = {
        "fd00::1:2fff": ServiceName("a", "b"),
        "fd00::1:3000": ServiceName("a", "c"),
        "1.2.3.4": ServiceName("", ""),
    }
    jumps = frame.tails(owned, (), Family.IPV6)["filter"]["KUBE-SERVICES"]
    assert [jump.split(" ")[3] for jump in jumps] == ["fd00::1:2000/116", "fd00::1:3000/116"]
    assert len(frame.blocks(owned, Family.IPV6)["filter"]) == 2


def test_the_health_check_port_is_let_in() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4"], external_policy=LOCAL, health_port=32000)
    assert rules_of(web)["filter"]["KUBE-NODEPORTS"] == (
        '-A KUBE-NODEPORTS -p tcp -m comment --comment "ns1/web health check node port" -m tcp --dport 32000 -j ACCEPT',
    )


@pytest.mark.parametrize(
    ("settings", "fully", "drops", "mark"),
    [
        (Settings(), " --random-fully", True, "0x4000"),
        (Settings(mark=1, random_fully=False, drop_invalid=False), "", False, "0x1"),
        (Settings(mark=1 << 31), " --random-fully", True, "0x80000000"),
    ],
)
def test_the_masquerade_mark(settings: Settings, fully: str, drops: bool, mark: str) -> None:
    found = frame.fixed(RouteTable(), Family.IPV4, settings)
    assert found["nat"]["KUBE-MARK-MASQ"] == (f"-A KUBE-MARK-MASQ -j MARK --set-xmark {mark}/{mark}",)
    assert found["nat"]["KUBE-POSTROUTING"] == (
        f"-A KUBE-POSTROUTING -m mark ! --mark {mark}/{mark} -j RETURN",
        f"-A KUBE-POSTROUTING -j MARK --set-xmark {mark}/0x0",
        f'-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE{fully}',
    )
    assert found["filter"]["KUBE-FORWARD"][-2:] == (
        f'-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark {mark}/{mark} -j ACCEPT',
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule"'
        " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )
    assert (found["filter"]["KUBE-FORWARD"][0] == "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP") is drops


def test_canaries_stand_in_each_table() -> None:
    found = frame.fixed(RouteTable(), Family.IPV6, Settings())
    assert [table for table, chains in found.items() if chains["KUBE-PROXY-CANARY"] == ()] == [
        "mangle",
        "nat",
        "filter",
    ]


def test_the_jumps() -> None:
    found = frame.guests([NODE_IP])
    order = {chain: [rule.rpartition(" ")[2] for rule in rules] for chain, rules in found["filter"].items()}
    assert order == {
        "INPUT": ["KUBE-PROXY-FIREWALL", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES", "KUBE-SERVICES"],
        "FORWARD": ["KUBE-PROXY-FIREWALL", "KUBE-FORWARD", "KUBE-EXTERNAL-SERVICES", "KUBE-SERVICES"],
        "OUTPUT": ["KUBE-PROXY-FIREWALL", "KUBE-EXTERNAL-SERVICES", "KUBE-SERVICES"],
    }
    only_new = {
        rule.rpartition(" ")[2] for rules in found["filter"].values() for rule in rules if "--ctstate NEW" in rule
    }
    assert only_new == {"KUBE-PROXY-FIREWALL", "KUBE-EXTERNAL-SERVICES", "KUBE-SERVICES"}
    untranslated = [rule for rules in found["filter"].values() for rule in rules if "! --ctstate DNAT" in rule]
    assert {rule.rpartition(" ")[2] for rule in untranslated} == only_new
    assert found["nat"] == {
        "PREROUTING": ('-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',),
        "OUTPUT": ('-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',),
        "POSTROUTING": ('-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',),
    }


def test_martians_are_dropped_where_node_ports_are_on_loopback() -> None:
    found = frame.guests(["127.0.0.1", NODE_IP])["filter"]
    assert found["KUBE-FIREWALL"] == (
        '-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"'
        " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
    )
    assert found["INPUT"][0] == "-A INPUT -j KUBE-FIREWALL"
    assert found["OUTPUT"][0] == "-A OUTPUT -j KUBE-FIREWALL"
    assert "KUBE-FIREWALL" not in frame.guests([NODE_IP, "fd00::1"])["filter"]
