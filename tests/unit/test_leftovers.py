"""What kube-proxy left behind: found, told apart from what is the kubelet's and ours, and removed; nothing else is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from ebpflb.errors import ApplyError, UserError
from ebpflb.leftovers import KubeProxyLeftovers
from ebpflb.leftovers.rules import commands, removals
from ebpflb.netfilter.ruleset import saved_chains

T = TypeVar("T")

# What kube-proxy in mode iptables leaves, beside what the kubelet and an operator have.
NAT = """\
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]
:OPERATOR - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -p tcp -m tcp --dport 8080 -j OPERATOR
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-SEP-AAAAAAAAAAAAAAAA -s 10.0.1.1/32 -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https" -j KUBE-SVC-BBBBBBBBBBBBBBBB
-A KUBE-SVC-BBBBBBBBBBBBBBBB -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A OPERATOR -j RETURN
COMMIT
"""
FILTER = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -p icmp -j ACCEPT
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
"""
MANGLE = """\
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"""
STAYS = {"KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "OPERATOR"}
MARK = "*filter\n:EBPFLB-LOCALITY - [0:0]\nCOMMIT\n"


def gone(*tables: str, ipvs_is_ours: bool = False) -> dict[str, set[str]]:
    saved = [chain for text in tables for chain in saved_chains(text.splitlines())]
    return {table: set(found.chains) for table, found in removals(saved, ipvs_is_ours=ipvs_is_ours).items()}


# ---- Which chains ----


def test_all_of_kube_proxys_goes_and_the_kubelets_stays() -> None:
    assert gone(NAT, FILTER, MANGLE) == {
        "nat": {
            "KUBE-MARK-MASQ", "KUBE-POSTROUTING", "KUBE-PROXY-CANARY", "KUBE-SEP-AAAAAAAAAAAAAAAA", "KUBE-SERVICES",
            "KUBE-SVC-BBBBBBBBBBBBBBBB",
        },
        "filter": {"KUBE-FORWARD", "KUBE-PROXY-CANARY", "KUBE-SERVICES"},
        "mangle": {"KUBE-PROXY-CANARY"},
    }  # fmt: skip


def test_jumps_from_built_in_chains_go_and_others_rules_stay() -> None:
    found = removals(saved_chains(NAT.splitlines()), ipvs_is_ours=False)["nat"]
    assert len(found.jumps) == 3
    assert all("KUBE-" in rule for rule in found.jumps)


@pytest.mark.parametrize("mark", ["EBPFLB-LOCALITY", "EBPFLB-IPVS"])
def test_beside_our_mark_it_is_ours(mark: str) -> None:
    marked = FILTER.replace(":KUBE-FIREWALL", f":{mark} - [0:0]\n:KUBE-FIREWALL")
    assert gone(NAT, marked, MANGLE) == {}


def test_beside_our_iptables_rules_kube_proxys_of_ipvs_are_none_of_ours() -> None:
    ipvs = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODE-PORT - [0:0]\n:KUBE-LOAD-BALANCER - [0:0]\nCOMMIT\n"
    assert gone(ipvs, MARK) == {"nat": {"KUBE-NODE-PORT", "KUBE-LOAD-BALANCER"}}
    assert gone(ipvs, MARK, ipvs_is_ours=True) == {}


def test_beside_our_ipvs_kube_proxys_of_iptables_are_none_of_ours() -> None:
    ours = NAT.replace("-j KUBE-SVC-BBBBBBBBBBBBBBBB", "-j ACCEPT")  # as our first sync has written it over
    assert gone(ours, MARK, ipvs_is_ours=True) == {"nat": {"KUBE-SEP-AAAAAAAAAAAAAAAA", "KUBE-SVC-BBBBBBBBBBBBBBBB"}}


def test_refusals_of_undefined_ports_are_ours_alone() -> None:
    text = "*filter\n:EBPFLB-LOCALITY - [0:0]\n:KUBE-CIP-REJECT - [0:0]\n:KUBE-CIP-CCCCCCCCCCCCCCCC - [0:0]\nCOMMIT\n"
    assert gone(text) == gone(text, ipvs_is_ours=True) == {}


def test_what_somebody_elses_chain_jumps_to_stays_with_all_that_it_leads_to() -> None:
    text = NAT.replace("-A OPERATOR -j RETURN", "-A OPERATOR -j KUBE-SVC-BBBBBBBBBBBBBBBB")
    found = removals(saved_chains(text.splitlines()), ipvs_is_ours=False)["nat"]
    assert found.kept == {
        "KUBE-SVC-BBBBBBBBBBBBBBBB": "OPERATOR",
        "KUBE-SEP-AAAAAAAAAAAAAAAA": "KUBE-SVC-BBBBBBBBBBBBBBBB",
        "KUBE-MARK-MASQ": "KUBE-SEP-AAAAAAAAAAAAAAAA",
    }
    assert found.chains == {"KUBE-POSTROUTING", "KUBE-PROXY-CANARY", "KUBE-SERVICES"}


def test_many_chains_are_emptied_before_one_is_deleted() -> None:
    """A transaction of thousands of chains takes iptables-nft minutes; between two, nothing may lead anywhere."""
    found = removals(saved_chains(NAT.splitlines()), ipvs_is_ours=False)
    lines = [line.split()[0] for line in commands(found, at_once=2) if line[0] == "-"]
    assert lines == ["-D"] * 3 + ["-F"] * 6 + ["-X"] * 6
    assert sum(line == "COMMIT\n" for line in commands(found, at_once=2)) == 7
    assert sum(line == "COMMIT\n" for line in commands(found)) == 1


# ---- On a node ----


class Node:
    """A network namespace, for as long as its one thread lives."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=_enter)

    def inside(self, act: Callable[[], T]) -> T:
        return self._thread.submit(act).result()

    def run(self, *words: str, given: str = "") -> str:
        done = self.inside(lambda: subprocess.run(words, input=given, capture_output=True, text=True, check=False))
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def rules(self, variant: str, family: str = "") -> str:
        """Without counters and comments of the tool."""
        said = self.run(f"ip{family}tables-{variant}-save")
        return "".join(line.partition(" [")[0] + "\n" for line in said.splitlines() if line[0] != "#")

    def present(self) -> tuple[str, ...]:
        return self.inside(KubeProxyLeftovers().present)

    def inventory(self) -> tuple[str, ...]:
        return self.inside(KubeProxyLeftovers().inventory)

    def cleanup(self) -> None:
        self.inside(KubeProxyLeftovers().cleanup)

    def close(self) -> None:
        self._thread.shutdown()


def _enter() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):
        raise OSError(ctypes.get_errno(), "unshare")


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


def restored(node: Node, variant: str, family: str, *tables: str) -> None:
    for text in tables:
        text = text.replace("10.0.1.1/32", "fd00::1/128").replace("10.96.0.1/32", "fd00::2/128") if family else text
        text = text.replace("-p icmp", "-p ipv6-icmp") if family else text
        node.run(f"ip{family}tables-{variant}-restore", "-w", "60", given=text)


@pytest.mark.root
def test_an_empty_node_has_nothing(node: Node) -> None:
    assert node.present() == node.inventory() == ()
    node.cleanup()


@pytest.mark.root
@pytest.mark.parametrize("family", ["", "6"], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_rules_are_found_and_removed_and_others_are_left_as_they_were(node: Node, variant: str, family: str) -> None:
    restored(node, variant, family, NAT, FILTER, MANGLE)
    assert node.present() == (f"iptables rules (IPv{family or 4}, {variant})",)
    inventory = node.inventory()
    assert f"chain KUBE-SERVICES of nat (IPv{family or 4}, {variant})" in inventory
    assert sum(line.startswith("rule of ") for line in inventory) == 5
    node.cleanup()
    assert node.present() == node.inventory() == ()
    left = node.rules(variant, family).splitlines()
    assert {line[1:].split()[0] for line in left if line.endswith(" -")} == STAYS
    rules = [rule for table in (MANGLE, NAT, FILTER) for rule in _others(table, family)]
    assert sorted(line for line in left if line.startswith("-A")) == sorted(rules)
    node.cleanup()


def _others(table: str, family: str) -> Sequence[str]:
    kept = [
        line for line in table.splitlines() if line.startswith("-A") and ("KUBE-" not in line or "FIREWALL" in line)
    ]
    return [line.replace("-p icmp", "-p ipv6-icmp") if family else line for line in kept]


@pytest.mark.root
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_rules_beside_our_mark_are_left_alone(node: Node, variant: str) -> None:
    restored(node, variant, "", NAT, FILTER.replace(":KUBE-FIREWALL", ":EBPFLB-LOCALITY - [0:0]\n:KUBE-FIREWALL"))
    before = node.rules(variant)
    assert node.present() == node.inventory() == ()
    node.cleanup()
    assert node.rules(variant) == before


@pytest.mark.root
def test_ipsets_and_the_rules_that_use_them(node: Node) -> None:
    """A set in use cannot be destroyed: the rules go first."""
    node.run("ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
    node.run("ipset", "create", "KUBE-6-CLUSTER-IP", "hash:ip,port", "family", "inet6")
    node.run("ipset", "create", "OPERATORS", "hash:ip")
    node.run("iptables-nft", "-t", "nat", "-N", "KUBE-SERVICES")
    rule = ["-m", "set", "--match-set", "KUBE-CLUSTER-IP", "dst,dst", "-j", "ACCEPT"]
    node.run("iptables-nft", "-t", "nat", "-A", "KUBE-SERVICES", *rule)
    assert node.present() == ("iptables rules (IPv4, nft)", "ipsets KUBE-*")
    assert {line for line in node.inventory() if line.startswith("ipset")} == {
        "ipset KUBE-6-CLUSTER-IP", "ipset KUBE-CLUSTER-IP"
    }  # fmt: skip
    node.cleanup()
    assert node.run("ipset", "list", "-n").split() == ["OPERATORS"]
    assert node.present() == node.inventory() == ()


@pytest.mark.root
def test_an_ipset_that_somebody_else_uses_is_named(node: Node) -> None:
    node.run("ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
    node.run("iptables-nft", "-N", "OPERATOR")
    rule = ["-m", "set", "--match-set", "KUBE-CLUSTER-IP", "dst,dst", "-j", "ACCEPT"]
    node.run("iptables-nft", "-A", "OPERATOR", *rule)
    with pytest.raises(ApplyError, match="ipset KUBE-CLUSTER-IP cannot be removed: a rule uses it"):
        node.cleanup()


@pytest.mark.root
def test_sets_and_the_device_beside_our_sets_are_ours(node: Node) -> None:
    for name in ("KUBE-CLUSTER-IP", "EBPFLB-FRONTENDS"):
        node.run("ipset", "create", name, "hash:ip,port")
    node.run("ip", "link", "add", "kube-ipvs0", "type", "bridge")
    assert node.present() == node.inventory() == ()
    node.cleanup()
    assert node.run("ipset", "list", "-n").split() == ["KUBE-CLUSTER-IP", "EBPFLB-FRONTENDS"]
    assert "kube-ipvs0" in node.run("ip", "link")


@pytest.mark.root
def test_the_device_goes_with_its_addresses(node: Node) -> None:
    node.run("ip", "link", "add", "kube-ipvs0", "type", "bridge")  # a dummy, if this kernel had any
    node.run("ip", "addr", "add", "10.96.0.1/32", "dev", "kube-ipvs0")
    assert node.present() == ("kube-ipvs0",)
    assert node.inventory() == ("device kube-ipvs0",)
    node.cleanup()
    assert "kube-ipvs0" not in node.run("ip", "link")
    assert node.present() == ()


@pytest.mark.root
def test_nftables_tables_of_both_families_go_and_others_stay(node: Node) -> None:
    for family in ("ip", "ip6"):
        node.run("nft", "add", "table", family, "kube-proxy")
        node.run("nft", "add", "chain", family, "kube-proxy", "services", "{ type filter hook input priority 0 ; }")
    node.run("nft", "add", "table", "ip", "operator")
    node.run("nft", "add", "table", "inet", "kube-proxy")  # a name that kube-proxy gives in two families only
    assert node.present() == ("nftables tables kube-proxy",)
    assert node.inventory() == ("nftables table ip kube-proxy", "nftables table ip6 kube-proxy")
    node.cleanup()
    assert node.run("nft", "list", "tables").splitlines() == ["table ip operator", "table inet kube-proxy"]
    assert node.present() == node.inventory() == ()


@pytest.mark.root
def test_a_kube_proxy_that_runs_would_write_it_again(node: Node, tmp_path: Path) -> None:
    """In another network namespace one may run."""
    program = tmp_path / "kube-proxy"
    program.symlink_to("/usr/bin/sleep")
    node.run("nft", "add", "table", "ip", "kube-proxy")

    def start() -> subprocess.Popen[bytes]:
        made = subprocess.Popen([program, "1000"])
        # It has its name a moment after Popen has returned, which waits for no more than a descriptor's end in exec.
        deadline = time.monotonic() + 30
        while Path("/proc", str(made.pid), "comm").read_text() != "kube-proxy\n":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return made

    elsewhere = start()
    here = node.inside(start)
    try:
        with pytest.raises(UserError, match=rf"kube-proxy runs here \(process {here.pid}\)"):
            node.cleanup()
        at_work = f"the process {here.pid}, which is a kube-proxy at work"
        assert node.present() == ("nftables tables kube-proxy", at_work)
        here.kill()
        here.wait()
        node.cleanup()
        assert node.present() == ()
        assert elsewhere.poll() is None
    finally:
        for process in (here, elsewhere):
            process.kill()
            process.wait()


@pytest.mark.root
def test_who_may_not_look_is_told(node: Node) -> None:
    """As a user without capabilities, in a network namespace that is another's."""

    def drop() -> str:
        child = os.fork()
        if child == 0:
            try:
                os.setresuid(65534, 65534, 65534)
                KubeProxyLeftovers().present()
                os._exit(1)
            except UserError:
                os._exit(0)
            except BaseException:
                os._exit(2)
        return str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    node.run("ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
    assert node.inside(drop) == "0"
