"""Whole stories with two nodes and a real API server, under load that never stops.

Rules of this file: every client asks all the time, each question on a connection of its own; at the end it is counted
how many were answered, and that nobody answered who should not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.api.nodes import TARGET, Nodes
from tests.api.objects import service, set_ready
from tests.box.clients import Answer, Target
from tests.box.traffic import Traffic

pytestmark = [pytest.mark.api, pytest.mark.root, pytest.mark.box]

CLIENTS = ("a1", "sa", "outside")
GENERATIONS = (("a2", "b1"), ("b2", "sb"), ("a2", "b1"), ("b2", "sb"), ("a2", "b1"))
LEAST = 0.99


@contextmanager
def load(nodes: Nodes, own: str, *, least: float = LEAST) -> Iterator[list[Traffic]]:
    """Clients of every kind ask the Service web as long as the block lasts; at its end all is counted."""
    with ExitStack() as stack:
        running = [stack.enter_context(Traffic(nodes, client, to, "TCP")) for client, to in targets(nodes, own)]
        for each in running:
            each.wait_for(20)
        yield running
        for each in running:
            each.wait_for(20)
    allowed = {name for generation in GENERATIONS for name in generation}
    for each in running:
        wrong = {got.server for _, got in each.got if isinstance(got, Answer)} - allowed
        assert not wrong, f"{each.what}: answered by {wrong}"
        assert each.success >= least, f"{each.what}: {each.success:.4f} of {len(each.got)}: {each.failures}"


def targets(nodes: Nodes, own: str) -> Iterator[tuple[str, Target]]:
    for client in CLIENTS:
        yield client, nodes.node_port(own, "web", "node1") if client == "outside" else nodes.cluster_ip(own, "web")


def start(nodes: Nodes, own: str) -> None:
    """The first generation serves."""
    ports = [{"name": "http", "port": 80, "targetPort": TARGET}]
    nodes.api.create(service(own, "web", app="web", ports=ports, type="NodePort"))
    for name in GENERATIONS[0]:
        nodes.pod(own, name)
    for client, to in targets(nodes, own):
        nodes.until_reaches(client, to, *GENERATIONS[0])


def roll(nodes: Nodes, own: str, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """A Deployment's rolling update, pod by pod: the new one becomes ready, the old one terminates; its server ends
    once nobody is sent there any more, as a preStop hook has it."""
    for leaving, coming in zip(old, new, strict=True):
        made = nodes.pod(own, coming, ready=False)
        set_ready(nodes.api, made, True)
        nodes.until_all(targets(nodes, own), coming, answers=True)
        nodes.api.delete("Pod", own, leaving, grace=600)
        nodes.until_all(targets(nodes, own), leaving, answers=False)
        nodes.servers.stop(leaving, TARGET)
        nodes.api.delete("Pod", own, leaving)
        nodes.servers.serve(nodes.place(leaving), TARGET)


def through_all(nodes: Nodes, own: str, between: Callable[[int], None] = lambda number: None) -> None:
    for number, (old, new) in enumerate(zip(GENERATIONS, GENERATIONS[1:], strict=False)):
        between(number)
        roll(nodes, own, old, new)


def test_a_rolling_update_under_load(nodes: Nodes, own: str) -> None:
    start(nodes, own)
    with load(nodes, own):
        through_all(nodes, own)


def test_a_rolling_update_while_the_api_server_is_restarted(nodes: Nodes, own: str) -> None:
    start(nodes, own)

    def restart(number: int) -> None:
        if number == 1:
            nodes.control.apiserver.kill()
            nodes.control.start_apiserver()

    with nodes.mended(), load(nodes, own):
        through_all(nodes, own, restart)


def test_a_daemon_that_is_restarted_during_an_outage(nodes: Nodes, own: str) -> None:
    start(nodes, own)
    with nodes.mended(), load(nodes, own, least=1.0) as clients:
        nodes.control.apiserver.kill()
        daemon = nodes.cluster.nodes["node1"].daemon
        assert daemon is not None
        daemon.kill()
        nodes.cluster.start_daemon("node1")
        nodes.until_source("node1", "stale")
        for each in clients:
            each.wait_for(50)
        nodes.control.start_apiserver()
        nodes.until_source("node1", "live")
        roll(nodes, own, GENERATIONS[0], GENERATIONS[1])
