"""The iptables dataplane among others: what somebody does to its rules is repaired, what is theirs is left alone, and
what cannot be done now is named and tried again."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebpflb.dataplane.iptables import names
from ebpflb.dataplane.iptables.dataplane import IptablesDataplane
from ebpflb.leftovers import KubeProxyLeftovers
from ebpflb.model import Family
from ebpflb.netfilter.iptables import Variant, detect
from tests.iptables import WEB, WEB_PODS, table_of
from tests.netfilter.conftest import Place, entered
from tests.netfilter.test_iptables_sync import WEB_SVC, holds, many, sep
from tests.netfilter.test_rules_as_saved import EVERYTHING
from tests.world import endpoint_slice, port, service

pytestmark = pytest.mark.root

FOREIGN = """\
*filter
:DOCKER - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A FORWARD -j KUBE-ROUTER-FORWARD
-A DOCKER -s 10.9.0.0/16 -j RETURN
COMMIT
*nat
:CNI-HOSTPORT-DNAT - [0:0]
-A PREROUTING -j CNI-HOSTPORT-DNAT
-A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE
COMMIT
"""

# What kube-proxy 1.36 leaves behind, in the parts that matter, and kubelet beside it.
KUBE_PROXY = """\
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" \
-j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" \
-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d 172.30.0.77/32 -p tcp -m comment --comment "ns/old cluster IP" -m tcp --dport 80 \
-j KUBE-SVC-BBBBBBBBBBBBBBBB
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" \
-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-BBBBBBBBBBBBBBBB -m comment --comment "ns/old -> 10.0.0.9:80" -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.0.0.9:80
COMMIT
"""


# ---- What somebody does to our rules


VANDALISM = {
    "a rule put into a chain of ours": ("-t", "nat", "-I", WEB_SVC, "-s", "203.0.113.7", "-j", "ACCEPT"),
    "a rule put into a shared chain": ("-t", "nat", "-A", names.SERVICES, "-j", "RETURN"),
    "a chain of ours emptied": ("-t", "nat", "-F", sep("10.0.1.1:8080")),
    "a line deleted": ("-t", "nat", "-D", names.SERVICES, "1"),
    "a jump deleted": ("-t", "nat", "-D", "PREROUTING", "1"),
    "a jump there twice": ("-t", "filter", "-A", "FORWARD", "-j", names.FORWARD),
    "a table flushed": ("-t", "nat", "-F"),
    "filter flushed": ("-t", "filter", "-F"),
    "the rules of undefined ports gone": ("-t", "filter", "-F", names.CIP_REJECT),
}


@pytest.mark.parametrize("deed", VANDALISM)
def test_an_audit_repairs(place: Place, deed: str) -> None:
    table = table_of(WEB, WEB_PODS)
    dataplane = place.dataplane()
    dataplane.sync(table)
    before = place.everything()
    assert dataplane.audit().written == 0
    place.iptables(*VANDALISM[deed])
    assert place.everything() != before
    report = dataplane.audit()
    assert report.complete and report.written + report.removed > 0
    assert place.everything() == before
    report = dataplane.audit()
    assert (report.written, report.removed) == (0, 0)


def test_an_audit_writes_only_what_differs() -> None:
    other = service("ns1/other", "172.30.0.99"), endpoint_slice("10.0.1.7", of="ns1/other")
    with entered("nft") as place:
        dataplane = place.dataplane()
        dataplane.sync(table_of(WEB, WEB_PODS, *other))
        before = place.handles()
        place.iptables("-t", "nat", "-I", WEB_SVC, "-s", "203.0.113.7", "-j", "ACCEPT")
        assert dataplane.audit().complete
        assert {chain for chain, rules in place.handles().items() if rules != before[chain]} == {WEB_SVC}


def test_a_flush_shows_in_the_canary(place: Place) -> None:
    table = table_of(WEB, WEB_PODS)
    dataplane = place.dataplane()
    dataplane.sync(table)
    assert dataplane.canary()
    for flushed in ("nat", "filter"):
        place.iptables("-t", flushed, "-F")
        assert not dataplane.canary()
        assert dataplane.audit().complete and dataplane.canary()
    place.iptables("-t", "mangle", "-X")
    assert not dataplane.canary()
    assert dataplane.audit().complete and dataplane.canary()
    assert holds(place, table)


def test_a_foreign_rule_that_comes_does_not_alarm_the_canary(place: Place) -> None:
    dataplane = place.dataplane()
    dataplane.sync(table_of(WEB, WEB_PODS))
    place.iptables("-t", "nat", "-I", "PREROUTING", "-d", "10.9.0.1", "-j", "ACCEPT")
    assert dataplane.canary()
    place.iptables("-t", "nat", "-D", "PREROUTING", "-d", "10.9.0.1", "-j", "ACCEPT")
    assert dataplane.canary() and dataplane.canary()


def test_a_change_onto_rules_that_were_flushed_writes_them_all(place: Place) -> None:
    dataplane = place.dataplane()
    dataplane.sync(table_of(*EVERYTHING))
    place.iptables("-t", "nat", "-F")
    place.iptables("-t", "nat", "-X")
    table = table_of(*EVERYTHING[:-2])
    assert dataplane.sync(table).complete
    assert dataplane.audit().complete and holds(place, table)


# ---- What is others'


def test_foreign_rules_stay_and_cleanup_leaves_what_it_found(place: Place) -> None:
    for family in Family:
        place.restore(FOREIGN if family is Family.IPV4 else FOREIGN.replace("10.9.0.0/16", "fd00:9::/32"), family)
    found = place.everything()
    dataplane = place.dataplane()
    dataplane.sync(table_of(*EVERYTHING))
    dataplane.sync(table_of(WEB, WEB_PODS))
    with_ours = place.saved()
    for table, chains in found[Family.IPV4].items():
        for chain, rules in chains.items():
            assert [rule for rule in with_ours[table][chain] if rule in rules] == list(rules)
    assert dataplane.inventory()
    dataplane.cleanup()
    assert place.everything() == found
    assert place.dataplane().inventory() == ()


def test_cleanup_without_anything_of_ours_touches_nothing(place: Place) -> None:
    place.restore(KUBE_PROXY)
    found = place.everything()
    dataplane = place.dataplane()
    assert dataplane.inventory() == () and len(dataplane.state()) == 0
    dataplane.cleanup()
    assert place.everything() == found


def test_the_chains_of_kube_proxy_are_taken_over(place: Place) -> None:
    place.restore(KUBE_PROXY)
    table = table_of(*EVERYTHING)
    dataplane = place.dataplane()
    assert dataplane.sync(table).complete
    assert holds(place, table)
    saved = place.saved()
    assert not {"KUBE-SVC-BBBBBBBBBBBBBBBB", "KUBE-SEP-AAAAAAAAAAAAAAAA"} & saved["nat"].keys()
    assert {"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} <= saved["mangle"].keys()
    assert (
        saved["filter"]["FORWARD"].count("".join(r for r in saved["filter"]["FORWARD"] if "-j KUBE-FORWARD" in r)) == 1
    )
    # The same rules as on a node that was empty, but for kubelet's.
    with entered(place.variant) as fresh:
        fresh.dataplane().sync(table)
        assert fresh.saved()["nat"] == saved["nat"]
    dataplane.cleanup()
    left = place.saved()
    assert {"KUBE-FIREWALL"} == {chain for chain in left["filter"] if chain.startswith("KUBE-")}
    assert len(left["filter"]["KUBE-FIREWALL"]) == 1


def test_what_ipvs_has_left_goes(place: Place) -> None:
    place.restore(
        "*filter\n:EBPFLB-LOCALITY - [0:0]\n:EBPFLB-IPVS - [0:0]\n:KUBE-IPVS-FILTER - [0:0]\n:KUBE-NODE-PORT - [0:0]\n"
        "-A INPUT -j KUBE-IPVS-FILTER\n-A INPUT -j KUBE-NODE-PORT\nCOMMIT\n"
        "*nat\n:KUBE-LOAD-BALANCER - [0:0]\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j KUBE-LOAD-BALANCER\n"
        "-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n"
    )
    dataplane = place.dataplane()
    assert dataplane.inventory() == ()  # not this dataplane's
    assert dataplane.sync(table_of(WEB, WEB_PODS)).complete
    with entered(place.variant) as fresh:
        fresh.dataplane().sync(table_of(WEB, WEB_PODS))
        assert place.everything() == fresh.everything()
    assert dataplane.inventory()


def test_a_chain_of_ours_that_others_use_is_left_empty(place: Place) -> None:
    dataplane = place.dataplane()
    dataplane.sync(table_of(WEB, WEB_PODS))
    place.restore(f"*nat\n:THEIRS - [0:0]\n-A THEIRS -j {names.MARK_MASQ}\nCOMMIT\n")
    dataplane.cleanup()
    saved = place.saved()["nat"]
    assert saved[names.MARK_MASQ] == () and saved["THEIRS"] == (f"-A THEIRS -j {names.MARK_MASQ}",)
    assert {chain for chain in saved if chain.startswith("KUBE-")} == {names.MARK_MASQ}


def test_node_ports_on_loopback_are_let_through_and_that_is_undone(place: Place) -> None:
    setting = Path("/proc/sys/net/ipv4/conf/all/route_localnet")
    before, routed = place.everything(), setting.read_text()
    assert routed.strip() == "0"
    pod = endpoint_slice("10.0.1.1", of="ns1/web")
    dataplane = place.dataplane()
    dataplane.sync(table_of(service("ns1/web", "172.30.0.41", port(80, "", node_port=30080)), pod))
    assert setting.read_text().strip() == "1"
    (rule,) = place.saved()["filter"][names.KUBELET_FIREWALL]
    assert "! -s 127.0.0.0/8 -d 127.0.0.0/8" in rule
    assert place.dataplane().sync(table_of(WEB, WEB_PODS)).complete
    place.dataplane().cleanup()
    assert setting.read_text() == routed
    assert place.everything() == before


# ---- What cannot be done now


def test_a_held_lock_is_named_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))  # iptables' own variable
    table = table_of(WEB, WEB_PODS)
    with entered("legacy") as place:
        dataplane = place.dataplane()
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            report = dataplane.sync(table)
            assert report.failed and report.written == 0
            (problem,) = report.problems
            assert "xtables lock" in problem.reason and f"(pid {os.getpid()})" in problem.reason
        assert dataplane.sync(table).complete
        assert holds(place, table)


def test_without_the_capability_it_says_so(place: Place) -> None:
    table = "from tests.iptables import *; table = table_of(WEB, WEB_PODS)"
    script = (
        f"{table}\nfrom ebpflb.dataplane.iptables.dataplane import IptablesDataplane\n"
        f"dataplane = IptablesDataplane(variant={place.variant!r}); dataplane.start()\n"
        "print(dataplane.sync(table).problems[0].reason)"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CAP_NET_ADMIN" in done.stdout
    assert place.everything() == {family: {} for family in Family}


# ---- Which variant


def test_kubelets_hint_decides_the_variant() -> None:
    for variant, other in ((Variant.NFT, Variant.LEGACY), (Variant.LEGACY, Variant.NFT)):
        with entered(variant) as place:
            place.restore("*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n")
            Place(other).restore("*filter\n" + "-A INPUT -j ACCEPT\n" * 20 + "COMMIT\n")
            assert detect() is variant


def test_without_a_hint_the_variant_with_more_rules_is_taken() -> None:
    for variant, other in ((Variant.NFT, Variant.LEGACY), (Variant.LEGACY, Variant.NFT)):
        with entered(variant) as place:
            place.restore("*filter\n" + "-A INPUT -j ACCEPT\n" * 5 + "COMMIT\n")
            Place(other).restore("*filter\n-A INPUT -j ACCEPT\nCOMMIT\n")
            assert detect() is variant


def test_rules_of_ours_are_found_in_whatever_variant_they_are() -> None:
    with entered("legacy") as place:
        table = many(3, 2)
        place.dataplane().sync(table)
        unnamed = IptablesDataplane()
        assert dict(unnamed.state()) == dict(table)
        unnamed.cleanup()
        assert place.dataplane().inventory() == ()


def test_a_change_of_variant_leaves_no_rules_in_the_other() -> None:
    table = many(3, 2)
    for variant, other in (("nft", "legacy"), ("legacy", "nft")):
        with entered(variant) as place:
            place.dataplane().sync(table)
            assert Place(other).dataplane().sync(table).complete
            assert place.everything() == {family: {} for family in Family}
            assert dict(IptablesDataplane().state()) == dict(table)


def test_a_held_lock_stops_no_check_and_no_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only reads needs no lock: neither an operator with `dump`, nor the start of another dataplane."""
    lock = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    with entered("legacy") as place:
        table = table_of(WEB, WEB_PODS)
        dataplane = place.dataplane()
        dataplane.sync(table)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            IptablesDataplane(variant="legacy").check()
            assert holds(place, table)
            assert dataplane.canary() and dataplane.inventory()
            for what in ("services", "counters", "sources", "affinity", "raw"):
                dataplane.tables(what)
            assert KubeProxyLeftovers().present() == ()
            assert detect() is Variant.LEGACY


def test_a_report_counts_the_rules_of_each_table(place: Place) -> None:
    dataplane = place.dataplane()
    dataplane.sync(table_of(WEB))
    for table in (table_of(WEB, WEB_PODS), table_of(*EVERYTHING), table_of(*EVERYTHING[:-2])):
        report = dataplane.sync(table)
        counted = {(each.family, each.table): each.held for each in dataplane.audit().rules}
        assert {(each.family, each.table): each.held for each in report.rules} == counted
        assert report.written == sum(each.written for each in report.rules)
        for family, ruleset in place.everything().items():
            for name, chains in ruleset.items():
                assert counted[family, name] == sum(map(len, chains.values()))


def test_the_requirements_of_this_machine_are_met(place: Place) -> None:
    dataplane = IptablesDataplane(variant=place.variant)
    found = {each.name: each for each in dataplane.requirements()}
    assert found["nat"].found and found["filter for IPv6"].found and found["recent"].found
    dataplane.check()
    assert place.everything() == {family: {} for family in Family}


def test_somebodys_nft_rules_in_a_table_of_ours_are_named() -> None:
    rules = (
        "add table ip nat; add chain ip nat PREROUTING { type nat hook prerouting priority -100; };"
        " add rule ip nat PREROUTING ip saddr 10.9.0.1 ct mark set 7 dnat to 10.9.0.2"
    )
    with entered("nft") as place:
        subprocess.run(["nft", rules], check=True)
        report = place.dataplane().sync(table_of(WEB, WEB_PODS))
        assert report.failed
        assert "table nat" in report.problems[0].reason and "made by nft" in report.problems[0].reason
