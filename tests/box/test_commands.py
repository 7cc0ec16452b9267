"""The commands on a node that serves: they say what its traffic shows."""

from __future__ import annotations

import json
import subprocess

import pytest

from ebpflb.output import route_items
from tests.box.box import Box
from tests.box.clients import Answer, Target
from tests.box.services import TARGET
from tests.box.test_affinity import STICKY, is_about

pytestmark = pytest.mark.box


def ebpflb(box: Box, node: str, *words: str) -> subprocess.CompletedProcess[str]:
    return box.cluster.ebpflb(node, *words, *box.cluster.target(node))


def test_dump_says_what_the_manifests_ask_for(box: Box) -> None:
    box.service("a1", "b1", kinds=["LoadBalancer"], externalTrafficPolicy="Local")
    box.service(kinds=["NodePort", "ExternalIP"])
    for node in box.cluster.nodes:
        done = ebpflb(box, node, "dump", "-o", "json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["apiVersion"] == "ebpflb/v1"
        assert said["items"] == json.loads(json.dumps(route_items(box.wanted[node].ordered())))
        assert len(said["items"]) > 40


def test_plan_has_nothing_to_do_where_the_daemon_is_done(box: Box) -> None:
    box.service("a1", "b1", kinds=["NodePort"])
    source = ("--manifests", str(box.cluster.manifests.directory), "--node-name", "node1")
    cidrs = ("--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48")
    done = ebpflb(box, "node1", "plan", *source, *cidrs)
    assert (done.returncode, done.stdout.count("nothing to do")) == (0, 1), done.stdout + done.stderr


def test_status_is_healthy(box: Box) -> None:
    done = box.cluster.ebpflb("node1", "status", "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["items"][0]["problems"] == []


@pytest.mark.parametrize(("situation", "status"), [("served", 0), ("refused", 6), ("dropped", 6), ("nobody", 7)])
def test_trace_says_what_happens(box: Box, family: str, situation: str, status: int) -> None:
    served = box.service("b1", kinds=["LoadBalancer"], externalTrafficPolicy="Local")
    refused = box.service()
    to = {
        "served": served.cluster_ip(family),
        "refused": refused.cluster_ip(family),
        "dropped": served.load_balancer(family),
        "nobody": served.external_ip(family),
    }[situation]
    client = "outside" if situation == "dropped" else "sa"
    done = ebpflb(box, "node1", "trace", box.address(client, family), str(to))
    assert done.returncode == status, done.stdout + done.stderr
    expected = box.expect(client, to=to)
    if situation == "served":
        assert box.address("b1", family) in done.stdout
        expected.reaches("b1").sees_source("sa")
    elif situation == "refused":
        expected.refused()
    elif situation == "dropped":
        expected.dropped(at="node1")
    else:
        expected.unanswered()
    box.check()


@pytest.mark.needs("undefined-ports")
def test_trace_says_that_a_cluster_ip_has_no_such_port(box: Box, family: str) -> None:
    to = box.service("b1").cluster_ip(family, 4711)
    done = ebpflb(box, "node1", "trace", box.address("sa", family), str(to))
    assert done.returncode == 6 and "no such port" in done.stdout, done.stdout + done.stderr
    box.expect("sa", to=to).refused()
    box.check()


@pytest.mark.dataplanes("bpf", "iptables")
def test_trace_says_where_a_client_with_session_affinity_goes(box: Box, family: str) -> None:
    """Chosen anew as long as it is not remembered; then where it has been. `dump affinity` shows whom each Service
    remembers."""
    web = box.service("a1", "b1", kinds=["NodePort"], **STICKY)
    client, to = box.address("outside", family), web.node_port("node1", family)

    def traced() -> tuple[str, list[str]]:
        done = ebpflb(box, "node1", "trace", client, str(to), "-o", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        (item,) = json.loads(done.stdout)["items"]
        return item["steps"][-1], [box.name_of(each["address"]) for each in item["candidates"]]

    assert traced() == (f"{client} is not remembered: chosen anew, and remembered then", ["a1", "b1"])
    answer = box.clients.ask(box.place("outside"), to, "TCP")
    assert isinstance(answer, Answer), answer
    backend = str(Target(box.address(answer.server, family), TARGET))
    assert traced() == (f"{client} is remembered: it goes to {backend}, as before", [answer.server])
    dumped = ebpflb(box, "node1", "dump", "affinity", "--service", f"default/{web.name}", "-o", "json")
    assert [(row["client"], row["backend"]) for row in json.loads(dumped.stdout)["items"]] == [(client, backend)]
    web.endpoints("b1" if answer.server == "a1" else "a1")
    assert traced()[0] in (
        f"{client} is not remembered: chosen anew, and remembered then",
        f"{client} is remembered, but {backend} takes no new flows: chosen anew",
        f"{client} is remembered, but where it went takes no new flows: chosen anew",
    )


@pytest.mark.dataplanes("bpf")
def test_dump_says_whom_sockets_are_remembered_as(box: Box, family: str) -> None:
    """A client of the socket path is a network namespace: the pod's, and one for all that runs in the node's own."""
    web = box.service("a1", "b1", **STICKY)
    for client in ("a2", "node1", "node1"):
        box.clients.ask(box.place(client), web.cluster_ip(family), "TCP")
    rows = [row for row in box.kernel.table("node1", "affinity") if is_about(row, web)]
    assert len(rows) == 2 and all(str(row["client"]).startswith("netns:") for row in rows), rows
    backends = {str(Target(box.address(name, family), TARGET)) for name in ("a1", "b1")}
    assert {row["backend"] for row in rows} <= backends


@pytest.mark.dataplanes("bpf")
def test_dump_maglev_says_each_backends_share(box: Box) -> None:
    """Shares are even, and every place of a table is somebody's."""
    web = box.prepare("a1", "a2", "b1", "c1")
    web.annotate(algorithm="maglev")
    done = ebpflb(box, "node1", "dump", "maglev", "--service", f"default/{web.name}", "-o", "json")
    items = json.loads(done.stdout)["items"]
    assert len(items) == 4  # TCP and UDP in two families
    for item in items:
        shares = [each["share"] for each in item["backends"]]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=0.001)
        assert max(shares) / min(shares) <= 1.02
    trace = ebpflb(box, "node1", "trace", box.address("sa", "ipv4"), str(web.cluster_ip("ipv4")))
    assert "4 of 4 backends take new flows, chosen by maglev" in trace.stdout, trace.stdout
    web.annotate(algorithm=None)
    done = ebpflb(box, "node1", "dump", "maglev", "--service", f"default/{web.name}", "-o", "json")
    assert json.loads(done.stdout)["items"] == []


def test_check_says_that_this_node_can_carry_services(box: Box) -> None:
    done = ebpflb(box, "node1", "check", *box.mode.options)
    name = box.mode.dataplane
    assert done.returncode == 0 and f"{name} would carry services here" in done.stdout, done.stdout + done.stderr
