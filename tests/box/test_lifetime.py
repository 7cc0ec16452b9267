"""The daemon dies, returns, is updated under traffic, and goes for good."""

from __future__ import annotations

import random
import re
import time
from contextlib import ExitStack

import pytest

from ebpflb.routes import RouteTable
from tests.box.box import Box
from tests.box.clients import Target
from tests.box.footprint import footprint_of
from tests.box.services import TARGET, ServiceInBox, leaving
from tests.box.traffic import Traffic

pytestmark = pytest.mark.box


def kill(box: Box, node: str) -> None:
    daemon = box.cluster.nodes[node].daemon
    assert daemon is not None
    daemon.kill()


def last_sync(box: Box, node: str) -> str:
    """The daemon's line about its last sync."""
    lines = [line for line in box.cluster.log(node).read_text().splitlines() if "sync:" in line]
    return lines[-1]


def clients_of(web: ServiceInBox, family: str) -> dict[str, Target]:
    """Both paths and the way from outside."""
    return {"a1": web.cluster_ip(family), "sa": web.cluster_ip(family), "outside": web.node_port("node1", family)}


def test_killing_the_daemon_changes_nothing(own: Box, family: str) -> None:
    """Established TCP and UDP flows go on, new connections work, a restart writes nothing and disturbs nobody."""
    web = own.service("a2", "b1", kinds=["NodePort"])
    idle = own.service(kinds=["NodePort"])
    targets = clients_of(web, family)
    with ExitStack() as stack:
        traffic = [
            stack.enter_context(Traffic(own, client, to, protocol))
            for client, to in targets.items()
            for protocol in ("TCP", "UDP")
        ]
        conversations = [
            stack.enter_context(own.clients.converse(own.place(client), to, protocol))
            for client, to in targets.items()
            for protocol in ("TCP", "UDP")
        ]
        before = [conversation.ask() for conversation in conversations]

        kill(own, "node1")
        assert [conversation.ask() for conversation in conversations] == before
        for each in traffic:
            each.wait_for(20)
        for client, to in targets.items():
            own.expect(client, to=to).reaches("a2", "b1")
        own.expect("sa", to=idle.cluster_ip(family)).refused()
        own.check()

        own.cluster.start_daemons(["node1"])
        assert " 0 rows written, 0 removed, 0 failed" in last_sync(own, "node1")
        own.settle()
        assert [conversation.ask() for conversation in conversations] == before
        for each in traffic:
            each.wait_for(20)
    assert {each.what: dict(each.failures) for each in traffic if each.failures} == {}


def test_should_work_after_restarting_kube_proxy(own: Box, family: str, pod: str) -> None:
    """What changed meanwhile is applied on return, and nothing else is written."""
    others = [own.service("a2", "b1") for _ in range(5)]
    web = own.service("b1", kinds=["NodePort"])
    kill(own, "node1")
    web.backends = ("b2",)
    web.write()
    own.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    own.check()
    own.cluster.start_daemons(["node1"])
    own.settle(["node1"])
    own.expect(pod, to=web.cluster_ip(family)).reaches("b2")
    for other in others:
        own.expect(pod, to=other.cluster_ip(family)).reaches("a2", "b1")
    own.check()
    found = re.search(r"(\d+) rows written, (\d+) removed, 0 failed", last_sync(own, "node1"))
    assert found, last_sync(own, "node1")
    # In each of two families and protocols: a backend and its slot in and out, and the rows of some four frontends.
    assert 4 <= int(found[1]) <= 80, last_sync(own, "node1")


def test_being_killed_at_any_moment_of_a_storm_of_changes_disturbs_nobody(own: Box) -> None:
    web, churned = own.service("a2", "b1", kinds=["NodePort"]), own.service("a2")
    chance = random.Random(1)
    with ExitStack() as stack:
        traffic = [
            stack.enter_context(Traffic(own, client, to, "TCP")) for client, to in clients_of(web, "ipv4").items()
        ]
        for _ in range(5):
            daemon = own.cluster.start_daemon("node1")
            end = time.monotonic() + chance.uniform(0.2, 1.2)
            while time.monotonic() < end:
                churned.backends = tuple(chance.sample(("a1", "a2", "b1", "b2"), chance.randrange(4)))
                churned.write()
                traffic[0].wait_for(1)
            daemon.kill()
        own.cluster.start_daemons(["node1"])
        own.settle()
        for each in traffic:
            each.wait_for(20)
    assert {each.what: dict(each.failures) for each in traffic if each.failures} == {}


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_should_not_have_connectivity_disruption_during_rolling_update_with_external_traffic_policy(
    own: Box, family: str, policy: str
) -> None:
    """Five generations: new pods become ready, the old ones terminate, leave and are gone."""
    web = own.service("a2", "b2", kinds=["NodePort"], externalTrafficPolicy=policy)
    old: tuple[str, ...] = ()
    with ExitStack() as stack:
        traffic = [
            stack.enter_context(Traffic(own, client, to, protocol))
            for client, to in clients_of(web, family).items()
            for protocol in ("TCP", "UDP")
        ]
        for generation in range(5):
            new = (f"a-{family[3:]}{policy[0]}{generation}", f"b-{family[3:]}{policy[0]}{generation}")
            for node, name in zip(("node1", "node2"), new, strict=True):
                own.servers.serve(own.cluster.add_pod(node, name), TARGET)
            web.endpoints(*new)
            web.endpoints(*new, *map(leaving, old))
            traffic[0].wait_for(10)
            web.endpoints(*new)
            for each in traffic:
                each.wait_for(3)  # what was on its way to the old pods has arrived
            for name in old:
                own.servers.stop(name, TARGET)
                own.cluster.remove_pod(name)
            old = new
        for each in traffic:
            each.wait_for(20)
    web.endpoints()
    for name in old:
        own.servers.stop(name, TARGET)
        own.cluster.remove_pod(name)
    assert {each.what: dict(each.failures) for each in traffic if each.success < 0.99} == {}


def test_cleanup_leaves_no_trace_and_touches_no_other_instance(own: Box, family: str, pod: str) -> None:
    web = own.service("a2", "b1", kinds=["NodePort"])
    daemon = own.cluster.nodes["node1"].daemon
    assert daemon is not None
    neighbour = own.kernel.inventory("node2")
    assert neighbour and own.kernel.inventory("node1")
    assert daemon.stop() == 0
    planned = own.cluster.ebpflb("node1", "cleanup", "--dry-run", *own.cluster.target("node1"))
    assert planned.returncode == 0 and planned.stdout.strip()
    done = own.cluster.ebpflb("node1", "cleanup", *own.cluster.target("node1"))
    assert done.returncode == 0, done.stderr
    assert own.kernel.inventory("node1") == ()
    assert own.kernel.inventory("node2") == neighbour
    own.wanted["node1"] = RouteTable()  # without ebpflb a Service's address means nothing
    own.expect(pod, to=web.cluster_ip(family)).unanswered()
    own.expect("outside", to=web.node_port("node1", family)).refused()
    own.expect("b2", to=web.cluster_ip(family)).reaches("a2", "b1")
    own.expect("outside", to=web.node_port("node2", family)).reaches("a2", "b1").sees_source("node2")
    own.check()


def test_a_node_is_after_cleanup_what_it_was_before(own: Box) -> None:
    def clean(node: str) -> None:
        daemon = own.cluster.nodes[node].daemon
        assert daemon is not None
        daemon.stop()
        done = own.cluster.ebpflb(node, "cleanup", *own.cluster.target(node))
        assert done.returncode == 0, done.stderr

    clean("node2")
    before = footprint_of(own.cluster, "node2")
    own.cluster.start_daemons(["node2"])
    own.service("a2", "b1", kinds=["NodePort", "ExternalIP"])
    own.expect("b2", to=own.direct("a1", "ipv4")).reaches("a1")
    own.check()
    between = footprint_of(own.cluster, "node2")
    assert between != before
    clean("node2")
    assert footprint_of(own.cluster, "node2").differences(before) == []


def test_a_second_daemon_in_the_same_namespace_ends_before_it_touches_anything(own: Box) -> None:
    web = own.service("b1")
    options = (
        "--manifests",
        str(own.cluster.manifests.directory),
        "--node-name",
        "node1",
        *own.cluster.target("node1"),
    )
    before = own.kernel.inventory("node1")
    done = own.cluster.ebpflb("node1", "run", *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "another ebpflb daemon" in done.stderr
    assert own.kernel.inventory("node1") == before
    own.expect("sa", to=web.cluster_ip("ipv4")).reaches("b1")
    own.check()
