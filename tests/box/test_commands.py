"""The commands on a node that serves: they say what its traffic shows."""

from __future__ import annotations

import json
import subprocess

import pytest

from ebpflb.output import route_items
from tests.box.box import Box

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


def test_check_says_that_this_node_can_carry_services(box: Box) -> None:
    done = ebpflb(box, "node1", "check", *box.mode.options)
    name = box.mode.dataplane
    assert done.returncode == 0 and f"{name} would carry services here" in done.stdout, done.stdout + done.stderr
