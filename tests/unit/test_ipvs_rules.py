"""The rules of IPVS mode as text."""

from __future__ import annotations

import pytest

from ebpflb.dataplane.ipvs.names import LOCALITY, SET_NAMES, Mark
from ebpflb.dataplane.ipvs.rules import guests, pod_cidrs, ruleset
from ebpflb.netfilter.ruleset import target_of
from ebpflb.routes import Locality

PODS = Locality((), ("10.0.1.0/24", "fd00:10:0:1::/64"), "veth*")
TARGETS = {"", "RETURN", "ACCEPT", "DROP", "REJECT", "MARK", "MASQUERADE", "SET"}


@pytest.mark.parametrize("version", [4, 6])
def test_every_jump_and_every_set_is_there(version: int) -> None:
    found = ruleset(PODS, version, Mark())
    for table, chains in found.items():
        for rule in [rule for rules in (*chains.values(), *guests()[table].values()) for rule in rules]:
            assert target_of(rule) in TARGETS | set(chains), rule
            words = rule.split(" ")
            for at, word in enumerate(words):
                if word in ("--match-set", "--map-set"):
                    assert SET_NAMES[words[at + 1]][1] == version, rule


@pytest.mark.parametrize(
    ("interface", "match"),
    [
        ("cni0", "-i cni0"),
        ("veth*", "-i veth+"),
        ("fifteen-letters*", "-i fifteen-letters"),
    ],
)
def test_the_locality_is_read_back(interface: str, match: str) -> None:
    found = ruleset(Locality((), ("10.0.1.0/24",), interface), 4, Mark())
    assert pod_cidrs(found["filter"][LOCALITY]) == (("10.0.1.0/24",), interface)
    assert f"-A EBPFLB-NOT-POD {match} -j RETURN" in found["nat"]["EBPFLB-NOT-POD"]


def test_the_masquerade_bit_is_the_operators() -> None:
    found = ruleset(Locality(), 4, Mark(20))
    assert found["nat"]["KUBE-MARK-MASQ"] == ("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x100000/0x100000",)
    assert "--mark 0xcb600000/0xfff00000" in found["mangle"]["EBPFLB-UNMARK"][0]


def test_tcp_is_refused_by_a_reset() -> None:
    found = ruleset(Locality(), 6, Mark())["filter"]["KUBE-IPVS-FILTER"]
    refusals = [rule for rule in found if "REJECT --reject" in rule]
    assert len(refusals) == 6
    assert all(("-p tcp" in rule) == rule.endswith("tcp-reset") for rule in refusals)
    assert all(rule.endswith(("tcp-reset", "icmp6-port-unreachable")) for rule in refusals)
