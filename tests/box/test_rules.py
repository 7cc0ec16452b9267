"""Rules of ours among those of others: what somebody deletes or adds is mended, what is another's is left alone.

Rules of this file: node1's daemon audits as often as it may, and a test waits until rules and traffic are as they
should be.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from tests.box.box import Box
from tests.box.footprint import footprint_of
from tests.box.services import ServiceInBox
from tests.pace import PACE

pytestmark = [pytest.mark.box, pytest.mark.dataplanes("iptables", "ipvs"), pytest.mark.timeout(300)]

COMMANDS = {"ipv4": "iptables", "ipv6": "ip6tables"}
Rules = Callable[..., str]

# Seconds. An audit may have a hundredth of the time, and half a second on a busy machine makes that 50.
MENDED = 100.0 * PACE


def rules_of(box: Box, family: str) -> Rules:
    """`iptables` of this family and the box's variant, on node1."""
    command = f"{COMMANDS[family]}-{box.mode.variant}"
    return lambda *words: box.kernel.said("node1", command, "-w", *words)


def at_once(box: Box, family: str, *lines: str) -> None:
    """Change rules by lines of iptables-restore, each table's by one transaction: the daemon may mend them the next
    moment, and must not find a half of it."""
    restore = f"{COMMANDS[family]}-{box.mode.variant}-restore --noflush -w"
    box.kernel.said("node1", "sh", "-c", f"printf '%s\\n' \"$@\" | {restore}", "sh", *lines)


def dispatched(box: Box, family: str, web: ServiceInBox) -> str:
    """The rule of nat KUBE-SERVICES that a Service's ClusterIP is sent on by."""
    address = web.cluster_ip(family).address
    listed = rules_of(box, family)("-t", "nat", "-S", "KUBE-SERVICES").splitlines()
    return next(line for line in listed if f" {address}/" in line and " -p tcp " in line)


def expect_service(box: Box, family: str, web: ServiceInBox) -> None:
    box.expect("sa", to=web.cluster_ip(family)).reaches("b1").sees_source("sa")
    box.expect("outside", to=web.node_port("node1", family)).reaches("b1").sees_source("node1")
    box.check()


def test_should_recreate_its_iptables_rules_if_they_are_deleted(own: Box, family: str) -> None:
    web = own.service("b1", kinds=["NodePort"])
    expect_service(own, family, web)
    at_once(own, family, "*nat", "-F", "-X", "COMMIT", "*filter", "-F", "COMMIT", "*mangle", "-F", "COMMIT")
    own.settle(["node1"], MENDED)
    expect_service(own, family, web)


@pytest.mark.dataplanes("iptables")
def test_what_somebody_does_to_our_rules_is_mended(own: Box) -> None:
    """Who deletes a rule, flushes a chain, or puts a rule of his own into ours changes nothing for long: neither is
    what the manifests say."""
    web = own.service("b1", kinds=["NodePort"])
    whole = {family: rules_of(own, family)("-t", "nat", "-S") for family in COMMANDS}
    for family in COMMANDS:
        rules = rules_of(own, family)
        chain = dispatched(own, family, web).split()[-1]
        (endpoint,) = {line.split()[-1] for line in rules("-t", "nat", "-S", chain).splitlines() if "KUBE-SEP-" in line}
        damage = (
            "-D KUBE-SERVICES 1", "-D PREROUTING 1", f"-F {chain}", f"-F {endpoint}",
            "-I KUBE-POSTROUTING 1 -j RETURN",
        )  # fmt: skip
        at_once(own, family, "*nat", *damage, "COMMIT")
    deadline = time.monotonic() + MENDED
    for family, wanted in whole.items():
        while sorted((seen := rules_of(own, family)("-t", "nat", "-S")).splitlines()) != sorted(wanted.splitlines()):
            assert time.monotonic() < deadline, seen
            time.sleep(0.05)
        expect_service(own, family, web)


def foreign_rules(box: Box, family: str) -> Rules:
    """Rules as a firewall, a CNI plugin and kubelet have them on node1."""
    rules = rules_of(box, family)
    reject = "icmp6-port-unreachable" if family == "ipv6" else "icmp-port-unreachable"
    for chain in ("FIREWALL", "KUBE-FIREWALL", "KUBE-ROUTER-INPUT"):
        rules("-N", chain)
    for line in (
        "-I INPUT 1 -j FIREWALL",
        "-A FIREWALL -p tcp --dport 4711 -j REJECT --reject-with " + reject,
        "-A INPUT -p tcp --dport 4712 -j DROP",
        "-A KUBE-ROUTER-INPUT -p udp --dport 4713 -j ACCEPT",
        "-A FORWARD -p tcp --dport 4714 -m comment --comment KUBE-SERVICES -j ACCEPT",
        "-t nat -N CNI-MASQUERADE",
        "-t nat -A POSTROUTING -j CNI-MASQUERADE",
        "-t nat -A CNI-MASQUERADE -p tcp --dport 4715 -j MASQUERADE",
        "-t nat -I PREROUTING 1 -p tcp --dport 4716 -j REDIRECT --to-ports 4717",
        "-t mangle -N KUBE-IPTABLES-HINT",
        "-t mangle -A PREROUTING -p tcp --dport 4718 -j MARK --set-mark 0x1/0x1",
        "-t raw -A PREROUTING -p udp --dport 4719 -j NOTRACK",
    ):
        rules(*line.split())
    if family == "ipv4":  # as kubelet has it, which we need as well and leave to it
        for chain in ("INPUT", "OUTPUT"):
            rules("-I", chain, "1", "-j", "KUBE-FIREWALL")
        addresses = ("!", "-s", "127.0.0.0/8", "-d", "127.0.0.0/8")
        comment = ("-m", "comment", "--comment", "block incoming localnet connections")
        known = ("-m", "conntrack", "!", "--ctstate", "RELATED,ESTABLISHED,DNAT")
        rules("-A", "KUBE-FIREWALL", *addresses, *comment, *known, "-j", "DROP")
    return rules


def saved(box: Box, family: str) -> list[str]:
    """What `iptables-save` says on node1 without counters and dates."""
    said = box.kernel.said("node1", f"{COMMANDS[family]}-{box.mode.variant}-save")
    return [re.sub(r"\[\d+:\d+\]", "", line) for line in said.splitlines() if not line.startswith("#")]


def theirs(lines: list[str]) -> list[str]:
    """Without what bears a name of ours."""
    return [line for line in lines if not re.search(r"KUBE-(?!ROUTER|IPTABLES-HINT)|EBPFLB", line)]


def test_rules_of_others_outlive_changes_repairs_and_cleanup(own: Box) -> None:
    """In their order; and after `cleanup` the rules are, to the byte, what they were before."""

    def clean() -> None:
        daemon = own.cluster.nodes["node1"].daemon
        assert daemon is not None
        daemon.stop()
        done = own.cluster.ebpflb("node1", "cleanup", *own.cluster.target("node1"))
        assert done.returncode == 0, done.stderr

    clean()
    everything = {family: foreign_rules(own, family) for family in COMMANDS}
    before = footprint_of(own.cluster, "node1")
    found = {family: saved(own, family) for family in COMMANDS}
    try:
        own.cluster.start_daemons(["node1"])
        web = own.service("b1", kinds=["NodePort", "LoadBalancer", "ExternalIP"], externalTrafficPolicy="Local")
        web.endpoints("a1", "b1")
        for family, rules in everything.items():
            assert theirs(saved(own, family)) == theirs(found[family])
            own.expect("sa", to=web.cluster_ip(family)).reaches("a1", "b1")
            own.check()
            # With the jump to it, which is missed at once: an audit comes as rarely as the last one was slow.
            (jump,) = (line for line in rules("-t", "nat", "-S", "PREROUTING").splitlines() if "KUBE-SERVICES" in line)
            at_once(own, family, "*nat", "-F KUBE-SERVICES", jump.replace("-A", "-D", 1), "COMMIT")
        own.settle(["node1"], MENDED)
        for family in COMMANDS:
            assert theirs(saved(own, family)) == theirs(found[family])
        clean()
        for family in COMMANDS:
            assert saved(own, family) == found[family]
        assert footprint_of(own.cluster, "node1").differences(before) == []
    finally:
        for rules in everything.values():
            for table in ("nat", "filter", "mangle", "raw"):
                rules("-t", table, "-F")
                rules("-t", table, "-X")
