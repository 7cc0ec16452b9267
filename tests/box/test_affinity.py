"""Session affinity by client address, through every kind of frontend.

Rules of this file: a client keeps the server that it was given, for as long as it goes on asking within the timeout;
nothing here says which server that is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.box.box import SLO, Box
from tests.box.clients import Answer, Target
from tests.box.services import ServiceInBox, unready
from tests.pace import PACE

pytestmark = [pytest.mark.box, pytest.mark.needs("affinity")]

STICKY: dict[str, Any] = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
LOOSE: dict[str, Any] = {"sessionAffinity": "None", "sessionAffinityConfig": None}
BRIEF = round(PACE)  # seconds
SERVERS = ("a1", "b1", "c1")

# Who asks, and where, for each kind of frontend.
Way = tuple[str, str, Callable[[ServiceInBox, str], Target]]
WAYS: dict[str, Way] = {
    "cluster_ip": ("ClusterIP", "sa", lambda web, family: web.cluster_ip(family)),
    "cluster_ip_at_a_pods_sockets": ("ClusterIP", "a1", lambda web, family: web.cluster_ip(family)),
    "cluster_ip_from_the_node": ("ClusterIP", "node1", lambda web, family: web.cluster_ip(family)),
    "node_port": ("NodePort", "outside", lambda web, family: web.node_port("node1", family)),
    "load_balancer": ("LoadBalancer", "outside", lambda web, family: web.load_balancer(family)),
    "external_ip": ("ExternalIP", "outside", lambda web, family: web.external_ip(family)),
}


@pytest.mark.parametrize("way", WAYS)
def test_should_have_session_affinity_work_for_service_with_type(box: Box, family: str, way: str) -> None:
    """TCP and UDP alike: a port's clients are its own."""
    kind, client, target = WAYS[way]
    web = box.service(*SERVERS, kinds=[kind], **STICKY)
    box.expect(client, to=target(web, family)).sticks_to_one_of(*SERVERS)
    box.check()


@pytest.mark.parametrize("way", ["cluster_ip", "node_port", "load_balancer"])
def test_should_be_able_to_switch_session_affinity_for_service_with_type(box: Box, family: str, way: str) -> None:
    kind, client, target = WAYS[way]
    web = box.service(*SERVERS, kinds=[kind], **STICKY)
    for _ in range(2):
        box.expect(client, to=target(web, family)).sticks_to_one_of(*SERVERS)
        box.check()
        web.change(**LOOSE)
        box.expect(client, to=target(web, family)).reaches(*SERVERS)
        box.check()
        web.change(**STICKY)
    box.expect(client, to=target(web, family)).sticks_to_one_of(*SERVERS)
    box.check()


@pytest.mark.parametrize("way", ["cluster_ip", "node_port", "load_balancer"])
def test_should_have_session_affinity_timeout_work_for_service_with_type(box: Box, family: str, way: str) -> None:
    """A client that asks often enough keeps its server beyond the timeout; one that was away may get another."""
    kind, client, target = WAYS[way]
    timeout: dict[str, Any] = {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": BRIEF}},
    }
    web = box.service(*SERVERS, kinds=[kind], **timeout)

    def asked() -> str:
        answer = box.clients.ask(box.place(client), target(web, family), "TCP")
        assert isinstance(answer, Answer), answer
        return answer.server

    first = keeps_asking(asked)
    # Each absence gives it one of three, so that it meets the same one 30 times by chance once in 10^14.
    for _ in range(30):
        wait_until_forgotten(box, web)
        if asked() != first:
            return
    pytest.fail(f"{client} always gets {first}")


def keeps_asking(asked: Callable[[], str]) -> str:
    """Ask without a pause for longer than the timeout, and get the same server all the time; returns that. A machine
    that stood still meanwhile has kept the client away: then it begins anew, whoever serves it then."""
    server = ""
    began = last = -math.inf  # of this row of questions, and of its last one
    deadline = time.monotonic() + SLO
    while (before := time.monotonic()) - began < 1.5 * BRIEF or not server:
        assert before < deadline, "this machine never asks for so long without a pause"
        got = asked()
        if time.monotonic() - last > 0.8 * BRIEF:
            server, began = got, before
        assert got == server
        last = before
    return server


def wait_until_forgotten(box: Box, web: ServiceInBox) -> None:
    """Until every client of this Service has been away from node1 for longer than the timeout."""
    deadline = time.monotonic() + SLO + BRIEF
    while rows := [row for row in box.kernel.table("node1", "affinity") if is_about(row, web)]:
        assert time.monotonic() < deadline, rows
        time.sleep(0.02)


def is_about(row: dict[str, object], web: ServiceInBox) -> bool:
    service = row["service"]
    return isinstance(service, dict) and service["name"] == web.name


def test_a_client_keeps_its_server_through_all_frontends_of_a_service(box: Box, family: str) -> None:
    web = box.service(*SERVERS, kinds=["LoadBalancer", "ExternalIP"], **STICKY)
    targets = (
        web.cluster_ip(family),
        web.external_ip(family),
        web.load_balancer(family),
        web.node_port("node1", family),
    )
    for protocol in ("TCP", "UDP"):
        answers = [box.clients.ask(box.place("sa"), to, protocol) for to in targets * 5]
        assert len({str(answer).split()[0] for answer in answers}) == 1, answers


def test_clients_of_different_addresses_are_spread(box: Box, family: str) -> None:
    """Each keeps its own; not all the same one. 12 clients meet one of two servers by chance once in 2000, and are
    then given another chance, up to four."""
    for _ in range(5):
        web = box.service("b1", "c1", **STICKY)
        servers = set()
        for number in range(12):
            client = box.cluster.add_pod("node1", f"t{number}")
            try:
                answers = [box.clients.ask(client, web.cluster_ip(family), "UDP") for _ in range(3)]
            finally:
                box.cluster.remove_pod(client.name)
            names = {str(answer).split()[0] for answer in answers}
            assert len(names) == 1, answers
            servers |= names
        if len(servers) > 1:
            return
    pytest.fail(f"all clients get {servers}")


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_esipp_session_affinity_with_external_traffic_policy(box: Box, family: str, policy: str) -> None:
    """A pod is not bound to this node's endpoints by policy Local, a client from outside is."""
    web = box.service("a1", "a2", "b1", kinds=["LoadBalancer"], externalTrafficPolicy=policy, **STICKY)
    outside = ("a1", "a2") if policy == "Local" else ("a1", "a2", "b1")
    box.expect("outside", to=web.load_balancer(family)).sticks_to_one_of(*outside)
    box.expect("sa", to=web.load_balancer(family)).sticks_to_one_of("a1", "a2", "b1")
    box.check()


def test_a_client_whose_server_goes_gets_another_and_keeps_that(box: Box, family: str) -> None:
    web = box.service("a1", "b1", "c1", **STICKY)
    answer = box.clients.ask(box.place("sa"), web.cluster_ip(family), "TCP")
    assert isinstance(answer, Answer)
    rest = tuple(name for name in ("a1", "b1", "c1") if name != answer.server)
    web.endpoints(unready(answer.server), *rest)
    box.expect("sa", to=web.cluster_ip(family)).sticks_to_one_of(*rest)
    box.check()


def test_affinity_outlives_a_change_of_other_endpoints(box: Box, family: str) -> None:
    web = box.service("b1", "c1", **STICKY)
    place, to = box.place("sa"), web.cluster_ip(family)
    first = str(box.clients.ask(place, to, "TCP"))
    server = first.split()[0]
    for others in (("a1", "b1", "c1", "node2"), ("b1", "c1"), (server,), ("a1", server)):
        web.endpoints(*others)
        assert {str(box.clients.ask(place, to, "TCP")).split()[0] for _ in range(10)} == {server}, others
