"""Devices that appear and vanish while the daemon runs."""

from __future__ import annotations

import time

import pytest

from tests.box.box import SLO, Box
from tests.box.clients import Answer
from tests.box.services import TARGET
from tests.pace import PACE

pytestmark = pytest.mark.box

SOON = 15.0 * PACE  # seconds; attaching takes milliseconds, and a daemon that is not told looks every 30 s


def test_a_pod_that_is_created_later_is_served_at_once(box: Box, family: str) -> None:
    web = box.service("b1")
    pod = box.cluster.add_pod("node1", "late", sandboxed=True)
    try:
        # The pod's own network first: a lost question for the gateway's MAC is repeated after a second only.
        for to, patience in ((box.direct("b1", family), SLO), (web.cluster_ip(family), SOON)):
            deadline = time.monotonic() + patience
            while not isinstance(got := box.clients.ask(pod, to, "UDP", patience=0.1), Answer):
                assert time.monotonic() < deadline, (to, got)
        box.expect("late", to=web.cluster_ip(family)).reaches("b1").sees_source("late")
        box.check()
    finally:
        box.cluster.remove_pod("late")


def test_a_pod_that_is_created_later_serves(box: Box, family: str, pod: str) -> None:
    late = box.cluster.add_pod("node3", "late", sandboxed=True)
    try:
        box.servers.serve(late, TARGET)
        web = box.service("late", kinds=["NodePort"])
        box.expect(pod, to=web.cluster_ip(family)).reaches("late").sees_source(pod)
        box.expect("outside", to=web.node_port("node3", family)).reaches("late").sees_source("node3")
        box.check()
    finally:
        box.servers.stop("late", TARGET)
        box.cluster.remove_pod("late")


@pytest.mark.dataplanes("bpf")
def test_pods_that_come_and_go_leave_nothing_on_the_node(box: Box) -> None:
    def inventory() -> set[str]:
        return set(box.kernel.inventory("node1"))

    before = inventory()
    for _ in range(10):
        box.cluster.add_pod("node1", "brief", sandboxed=True)
        deadline = time.monotonic() + SOON
        while inventory() == before:
            assert time.monotonic() < deadline, "nothing was attached to the new pod's device"
            time.sleep(0.005)
        box.cluster.remove_pod("brief")
        deadline = time.monotonic() + SOON
        while (left := inventory()) != before:
            assert time.monotonic() < deadline, left - before
            time.sleep(0.005)
