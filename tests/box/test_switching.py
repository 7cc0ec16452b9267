"""One dataplane after the other on the same node: what clients notice (nothing), and what operators see (the same).

Rules of this file: a change of dataplane is a restart of node1's daemon with another `--dataplane`; the other node goes
on as it was.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ebpflb.commands.handover import PERIOD
from ebpflb.demo.network import Cni, Join
from tests.box.box import NODES, PROTOCOLS, SLO, Box
from tests.box.clients import Conversation, Target
from tests.box.conftest import OnFailure, tidied
from tests.box.modes import BPF, CLSACT, IPTABLES_LEGACY, IPTABLES_NFT, IPVS, Mode, kernel_has_ipvs
from tests.box.services import ServiceInBox, leaving
from tests.box.test_affinity import STICKY
from tests.box.test_interplay import served_soon
from tests.box.test_source_ranges import only
from tests.box.traffic import Traffic

# Daemons are restarted and commands run, some dozens a test: that takes its time where the machine has none.
pytestmark = [pytest.mark.box, pytest.mark.timeout(300)]

MODES: tuple[Mode, ...] = (BPF, IPTABLES_NFT, IPTABLES_LEGACY) + ((IPVS,) if kernel_has_ipvs() else ())
FAMILIES = ("ipv4", "ipv6")


@pytest.fixture(scope="module")
def standing_changing() -> Iterator[Box]:
    """A box whose node1 changes its mode."""
    with Box(BPF, Cni.ROUTED, Join.ROUTES, NODES[:2]) as found:
        yield found


@pytest.fixture
def changing(standing_changing: Box, on_failure: OnFailure) -> Iterator[Box]:
    """That box, in BPF's mode."""
    if standing_changing.modes["node1"] is not BPF:
        standing_changing.switch("node1", BPF)
    yield from tidied(standing_changing, on_failure)


def clients_of(web: ServiceInBox, family: str) -> dict[str, Target]:
    """A pod at its sockets, one by its packets, the node, and a client from outside."""
    return {
        "a1": web.cluster_ip(family),
        "sa": web.cluster_ip(family),
        "node1": web.cluster_ip(family),
        "outside": web.node_port("node1", family),
    }


def test_switching_under_load_loses_no_new_connection_and_no_established_flow(changing: Box, family: str) -> None:
    """BPF, iptables, BPF: clients connect all the time, and others keep the connections that they have."""
    web = changing.service("a2", "b1", kinds=["NodePort"])
    targets = clients_of(web, family)
    with ExitStack() as stack:
        traffic = [
            stack.enter_context(Traffic(changing, client, to, protocol))
            for client, to in targets.items()
            for protocol in PROTOCOLS
        ]

        def established() -> list[Conversation]:
            return [
                stack.enter_context(changing.clients.converse(changing.place(client), to, "TCP"))
                for client, to in targets.items()
            ]

        conversations = established()
        before = [conversation.ask() for conversation in conversations]
        for mode in (IPTABLES_NFT, BPF):
            changing.switch("node1", mode)
            for each in traffic:
                each.wait_for(20)
            assert [conversation.ask() for conversation in conversations] == before
            conversations += established()
            before = [conversation.ask() for conversation in conversations]
    assert {each.what: dict(each.failures) for each in traffic if each.failures} == {}


@pytest.fixture
def older(on_failure: OnFailure) -> Iterator[Box]:
    """A box whose packet programs are filters."""
    with Box(CLSACT, Cni.ROUTED, Join.ROUTES, NODES[:2]) as found:
        yield from tidied(found, on_failure)


def test_where_an_older_version_has_filters_a_newer_one_loses_nothing(older: Box) -> None:
    """It replaces their programs in place; what is new, a pod, has its own at tcx. A packet meets either, or both."""
    web = older.service("a2", "b1", kinds=["NodePort"])
    asked = [(client, to) for family in FAMILIES for client, to in clients_of(web, family).items()]
    with ExitStack() as stack:
        traffic = [
            stack.enter_context(Traffic(older, client, to, protocol)) for client, to in asked for protocol in PROTOCOLS
        ]
        conversations = [
            stack.enter_context(older.clients.converse(older.place(client), to, "TCP")) for client, to in asked
        ]
        before = [conversation.ask() for conversation in conversations]
        older.switch("node1", BPF)
        pod = older.cluster.add_pod("node1", "new", sandboxed=True)
        for each in traffic:
            each.wait_for(20)
        assert [conversation.ask() for conversation in conversations] == before
        served_soon(older, "new", web.cluster_ip("ipv4"))
        for family in FAMILIES:
            older.expect("new", to=web.cluster_ip(family)).reaches("a2", "b1").sees_source("new")
        older.check()
        older.cluster.remove_pod(pod.name)
    assert {each.what: dict(each.failures) for each in traffic if each.failures} == {}


def test_a_dataplane_that_took_over_follows_changes(changing: Box, family: str, pod: str) -> None:
    """What the one before still has of the Service is not asked any more."""
    web = changing.service("a2", "b1", kinds=["NodePort"])
    for mode, backends in ((IPTABLES_NFT, ("b1",)), (BPF, ("a2",)), (IPTABLES_NFT, ("a2", "b2"))):
        changing.switch("node1", mode)
        web.endpoints(*backends)
        changing.expect(pod, to=web.cluster_ip(family)).reaches(*backends)
        changing.expect("node1", to=web.cluster_ip(family)).reaches(*backends)
        changing.expect("outside", to=web.node_port("node1", family)).reaches(*backends).sees_source("node1")
        changing.check()
        web.endpoints()
        for client, to in clients_of(web, family).items():
            changing.expect(client, to=to).refused()
        changing.check()


def everything(box: Box) -> tuple[Target, ...]:
    """Services of all sorts; addresses to ask about, in both families."""
    services = (
        box.service("a2", "b1", kinds=["NodePort"], **STICKY),
        box.service("b1", kinds=["LoadBalancer", "ExternalIP"], externalTrafficPolicy="Local"),
        box.service("a1", "node2", kinds=["LoadBalancer"], loadBalancerSourceRanges=only(box, "sa", "outside")),
        box.service("a1", leaving("b1"), leaving("b2"), kinds=["NodePort"], internalTrafficPolicy="Local"),
        box.service("b1", internalTrafficPolicy="Local"),
        box.service(leaving("b1"), kinds=["ExternalIP"]),
        box.service(kinds=["LoadBalancer", "ExternalIP"], loadBalancerSourceRanges=["198.51.100.0/24"]),
    )
    return tuple(
        to
        for web in services
        for family in FAMILIES
        for to in (
            web.cluster_ip(family),
            web.node_port("node1", family),
            web.load_balancer(family),
            web.external_ip(family),
        )
    )


def said(box: Box, *words: str) -> tuple[int, str]:
    done = box.cluster.ebpflb("node1", *words, *box.cluster.target("node1"))
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_dump_says_the_same_of_every_dataplane(changing: Box) -> None:
    """Byte for byte, for the same manifests."""
    everything(changing)
    dumps = {}
    for mode in MODES:
        if changing.modes["node1"] is not mode:
            changing.switch("node1", mode)
        dumps[mode.name] = said(changing, "dump", "routes", "-o", "json")
    assert len(dumps["bpf"][1].splitlines()) > 500
    assert dumps == dict.fromkeys(dumps, dumps["bpf"])


def test_trace_explains_alike_on_every_dataplane(changing: Box) -> None:
    targets = everything(changing)
    clients = ("sa", "node1", "outside", "b1")
    # Some targets, each by one client: a trace is a process.
    questions = [
        (changing.address(client, "ipv6" if ":" in to.address else "ipv4"), str(to))
        for client, to in zip(itertools.cycle(clients), targets[::5], strict=False)
    ]
    traces = {}
    for mode in (BPF, IPTABLES_NFT):
        if changing.modes["node1"] is not mode:
            changing.switch("node1", mode)
        traces[mode.name] = [said(changing, "trace", *question) for question in questions]
    assert {status for status, _ in traces["bpf"]} >= {0, 6}
    assert traces["iptables-nft"] == traces["bpf"]


def test_what_is_not_needed_any_more_goes(changing: Box) -> None:
    """iptables has nothing to keep once BPF carries everything: its rules go by themselves. It is asked again after a
    while where a connection of an earlier test was still closing."""
    changing.service("b1", kinds=["NodePort"])
    changing.switch("node1", IPTABLES_NFT)
    assert "KUBE-SVC-" in changing.kernel.said("node1", "iptables-nft-save")
    changing.switch("node1", BPF)
    deadline = time.monotonic() + PERIOD + SLO
    while "KUBE-" in (rules := changing.kernel.said("node1", "iptables-nft-save")):
        assert time.monotonic() < deadline, rules
        time.sleep(0.05)
