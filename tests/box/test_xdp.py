"""XDP on the nodes' uplinks: what comes from outside for a backend elsewhere is sent on before the stack.

Rules of this file: what a client sees is the same whichever path carries it; who carried it is said by the node's
counters (see paths.py).
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable

import pytest

from ebpflb.demo.cluster import Place
from tests.box.box import SLO, Box
from tests.box.clients import Answer, Target
from tests.box.expect import TRIES
from tests.box.paths import Carried, carried
from tests.box.servers import pattern
from tests.box.services import TARGET, ServiceInBox
from tests.box.test_affinity import STICKY
from tests.box.test_source_ranges import only
from tests.box.test_transfer import DATAGRAM, LARGE, exchanged, narrow
from tests.pace import PACE

pytestmark = pytest.mark.box

# A frontend that the network brings to node1, and its target.
Frontend = tuple[str, Callable[[ServiceInBox, str], Target]]
FRONTENDS: dict[str, Frontend] = {
    "node_port": ("NodePort", lambda web, family: web.node_port("node1", family)),
    "load_balancer": ("LoadBalancer", lambda web, family: web.load_balancer(family)),
    "external_ip": ("ExternalIP", lambda web, family: web.external_ip(family)),
    "routed_cluster_ip": ("ClusterIP", lambda web, family: web.cluster_ip(family)),
}


# ---- Who carries what ----


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_client_outside_reaches_a_remote_backend(xdp: Box, family: str, frontend: str) -> None:
    """By XDP alone: each flow's backend is chosen there, and each packet, of requests and replies, sent on from there.
    The backend sees the node, the client the frontend."""
    kind, target = FRONTENDS[frontend]
    web = xdp.service("b1", kinds=[kind])
    with carried(xdp) as seen:
        xdp.expect("outside", to=target(web, family)).reaches("b1").sees_source("node1")
        xdp.check()
    flows = 2 * TRIES  # TCP and UDP
    assert (seen[0].xdp, seen[0].tc) == (flows, 0)
    # Of UDP two packets each; of TCP three to begin with, a question, an answer, and more.
    assert seen[0].sent >= TRIES * 2 + TRIES * 5


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_backend_on_this_node_is_the_stacks(xdp: Box, family: str, frontend: str) -> None:
    """Chosen once: of two backends each gets its half, the local one by the stack."""
    kind, target = FRONTENDS[frontend]
    web = xdp.service("a1", kinds=[kind])
    with carried(xdp) as seen:
        xdp.expect("outside", to=target(web, family)).reaches("a1").sees_source("node1")
        xdp.check()
    assert seen[0] == Carried(xdp=0, tc=2 * TRIES, sent=0)
    web.endpoints("a1", "b1")
    with carried(xdp) as seen:
        xdp.expect("outside", to=target(web, family)).reaches("a1", "b1").sees_source("node1")
        xdp.check()
    assert seen[0].xdp + seen[0].tc == 4 * TRIES
    assert min(seen[0].xdp, seen[0].tc) > TRIES / 2, seen


def test_backends_in_the_hosts_network(xdp: Box, family: str) -> None:
    web = xdp.service("node1", "node2", kinds=["NodePort"])
    with carried(xdp) as seen:
        xdp.expect("outside", to=web.node_port("node1", family)).reaches("node1", "node2")
        xdp.expect("outside", to=web.node_port("node3", family)).reaches("node1", "node2").sees_source("node3")
        xdp.check()
    assert seen[0].xdp and seen[0].tc, seen


@pytest.mark.parametrize("kind", ["NodePort", "LoadBalancer"])
def test_policy_local(xdp: Box, family: str, kind: str) -> None:
    """Nothing is for XDP where the backend is here, and its source is kept; where none is, XDP is silent at once."""
    web = xdp.service("b1", kinds=[kind], externalTrafficPolicy="Local")

    def at(node: str) -> Target:
        return web.node_port(node, family) if kind == "NodePort" else web.load_balancer(family, node)

    with carried(xdp, "node2") as seen:
        xdp.expect("outside", to=at("node2")).reaches("b1").sees_source("outside")
        xdp.check()
    assert seen[0] == Carried(xdp=0, tc=2 * TRIES, sent=0)
    before = xdp.kernel.counters("node1")["xdp_dropped"]
    xdp.expect("outside", to=at("node1")).dropped(at="node1")
    xdp.check()
    assert xdp.kernel.counters("node1")["xdp_dropped"] > before
    web.change(externalTrafficPolicy="Cluster")
    with carried(xdp) as seen:
        xdp.expect("outside", to=at("node1")).reaches("b1").sees_source("node1")
        xdp.check()
    assert (seen[0].xdp, seen[0].tc) == (2 * TRIES, 0)


def test_who_is_refused_is_answered(xdp: Box, family: str) -> None:
    """By the stack's side; whatever the frontend. So is a port that a cluster IP does not have."""
    web = xdp.service(kinds=["LoadBalancer", "ExternalIP"])
    for _, target in FRONTENDS.values():
        xdp.expect("outside", to=target(web, family)).refused()
    xdp.expect("outside", to=web.cluster_ip(family, 4711)).refused()
    xdp.check()


def test_source_ranges(xdp: Box, family: str) -> None:
    web = xdp.service("b1", kinds=["LoadBalancer"], loadBalancerSourceRanges=only(xdp, "sa"))
    before = xdp.kernel.counters("node1")["xdp_dropped"]
    xdp.expect("outside", to=web.load_balancer(family)).dropped(at="node1")
    xdp.check()
    assert xdp.kernel.counters("node1")["xdp_dropped"] > before
    web.change(loadBalancerSourceRanges=only(xdp, "outside"))
    with carried(xdp) as seen:
        xdp.expect("outside", to=web.load_balancer(family)).reaches("b1").sees_source("node1")
        xdp.check()
    assert (seen[0].xdp, seen[0].tc) == (2 * TRIES, 0)


def test_session_affinity_is_the_clients_on_either_path(xdp: Box, family: str) -> None:
    """A client outside goes where it went before, whichever frontend it asks; also where that leads to this node."""
    for _ in range(8):  # its place is here or elsewhere by chance
        web = xdp.service("a1", "b1", kinds=["LoadBalancer", "ExternalIP"], **STICKY)
        for protocol in ("TCP", "UDP"):
            targets = [target(web, family) for _, target in FRONTENDS.values()]
            answers = [xdp.clients.ask(xdp.place("outside"), to, protocol) for to in targets * 3]
            assert len({str(answer) for answer in answers}) == 1, answers


def looked_at(box: Box) -> dict[str, dict[str, int]]:
    """What the nodes have counted, but for packets with headers that XDP does not read: a device whose addresses are
    new tells its neighbours of its groups by such (MLD), more than once within some seconds."""
    found = {node: box.kernel.counters(node) for node in box.cluster.nodes}
    for counters in found.values():
        del counters["xdp_options"]
    return found


def test_what_is_no_service_is_left_alone(xdp: Box, family: str) -> None:
    xdp.service("b1")
    before = looked_at(xdp)
    for server in ("node1", "node2"):
        xdp.expect("outside", to=xdp.direct(server, family)).reaches(server).sees_source("outside")
    for server in ("a1", "b1"):
        xdp.expect("node3", to=xdp.direct(server, family)).reaches(server).sees_source("node3")
    xdp.check()
    assert looked_at(xdp) == before


def test_pods_and_nodes_are_served_as_ever(xdp: Box, family: str, pod: str) -> None:
    web = xdp.service("a2", "b1", kinds=["NodePort"])
    xdp.expect(pod, to=web.cluster_ip(family)).reaches("a2", "b1").sees_source(pod)
    xdp.expect("node1", to=web.cluster_ip(family)).reaches("a2", "b1").sees_source("node1")
    xdp.expect(pod, to=web.node_port("node2", family)).reaches("a2", "b1")
    xdp.check()


# ---- Much, and what does not fit ----


def test_large_transfers(xdp: Box, family: str) -> None:
    """8 MB each way, compared by content, without the stack of node1."""
    web = xdp.service("b1", kinds=["NodePort"])
    data = pattern(LARGE)
    digest = hashlib.sha256(data).hexdigest()
    with (
        carried(xdp) as seen,
        xdp.clients.converse(
            xdp.place("outside"), web.node_port("node1", family), "TCP", patience=10 * PACE
        ) as conversation,
    ):
        about, received = conversation.send(data)
        assert (about.server, received) == ("b1", digest)
        assert hashlib.sha256(conversation.fetch(LARGE)).hexdigest() == digest
    assert (seen[0].xdp, seen[0].tc) == (1, 0)
    assert seen[0].sent >= 2 * LARGE // 1500


def test_many_connections_at_once(xdp: Box, family: str) -> None:
    """300 clients behind one node, each with a port of its own and its own answers."""
    web = xdp.service("b1", kinds=["NodePort"])
    open_ones = []
    try:
        for _ in range(300):
            open_ones.append(xdp.clients.converse(xdp.place("outside"), web.node_port("node1", family), "TCP"))
        assert len({conversation.ask().port for conversation in open_ones}) == 300
    finally:
        for conversation in open_ones:
            conversation.close()


def test_fragments_in_the_middle_of_a_flow(xdp: Box, family: str) -> None:
    """What is cut into fragments is the stack's; it goes to the same backend, from the same port, and the flow goes on
    before the stack after it."""
    web = xdp.service("b1", "b2", "c1", kinds=["NodePort"])

    def left() -> int:
        """To the stack by its turn, of which each neighbour has one every few seconds, however long this test takes."""
        return xdp.kernel.counters("node1")["xdp_by_stack"]

    whole = 0
    for _ in range(5):
        with xdp.clients.converse(xdp.place("outside"), web.node_port("node1", family), "UDP") as conversation:
            first = conversation.ask()
            for _ in range(5):
                answer = exchanged(conversation, DATAGRAM)
                assert (answer.server, answer.source, answer.port) == (first.server, first.source, first.port)
                before = left()
                with carried(xdp) as seen:
                    answer = conversation.ask()
                assert (answer.server, answer.source, answer.port) == (first.server, first.source, first.port)
                assert (seen[0].xdp, seen[0].tc) == (0, 0)
                whole += seen[0].sent + left() - before
    assert whole >= 2 * 25


def test_a_smaller_mtu_in_the_middle_is_found_out(xdp: Box, family: str) -> None:
    """The router's "too big" is about a flow that only XDP has seen so far."""
    web = xdp.service("b1", kinds=["NodePort"])
    with narrow(xdp, 1300):
        place, to = xdp.place("outside"), web.node_port("node1", family)
        with xdp.clients.converse(place, to, "TCP", patience=10 * PACE) as conversation:
            source = conversation.ask().source
            assert conversation.fetch(1 << 20) == pattern(1 << 20)
        learnt = xdp.cluster.run(xdp.place("b1"), ["ip", "route", "get", source]).stdout
        assert " mtu 1300 " in learnt


def test_a_backend_that_closed_its_port_is_heard_of(xdp: Box, family: str) -> None:
    web = xdp.service("b2", kinds=["NodePort"])
    xdp.servers.stop("b2", TARGET)
    try:
        for protocol in ("TCP", "UDP"):
            got = xdp.clients.ask(xdp.place("outside"), web.node_port("node1", family), protocol)
            assert str(got) == "refused", (protocol, got)
    finally:
        xdp.servers.serve(xdp.place("b2"), TARGET)
    xdp.expect("outside", to=web.node_port("node1", family)).reaches("b2").sees_source("node1")
    xdp.check()


def test_a_neighbour_that_has_another_link_layer_address_now(xdp: Box, family: str) -> None:
    """And has told nobody: node2 was replaced. What the stack knows of it is old, which it finds out by asking anew
    when it sends there; XDP sends in its place, and must see to that."""
    web = xdp.service("b1", kinds=["NodePort"])
    node1, node2 = xdp.place("node1"), xdp.place("node2")
    of_node1, of_node2 = xdp.address("node1", family), xdp.address("node2", family)
    (link,) = json.loads(xdp.cluster.run(node1, ["ip", "-json", "link", "show", "eth0"]).stdout)

    def neighbour(where: Place, *words: str) -> str:
        done = xdp.cluster.run(where, ["ip", "neigh", *words, "dev", "eth0"])
        assert done.returncode == 0, done.stderr
        return done.stdout

    neighbour(node2, "replace", of_node1, "lladdr", link["address"], "nud", "permanent")  # it asks nobody
    neighbour(node1, "replace", of_node2, "lladdr", "02:00:00:00:99:99", "nud", "stale")
    try:
        deadline = time.monotonic() + SLO
        while True:
            answer = xdp.clients.ask(xdp.place("outside"), web.node_port("node1", family), "UDP", patience=0.5 * PACE)
            if isinstance(answer, Answer):
                break
            assert time.monotonic() < deadline, neighbour(node1, "show", of_node2)
        assert answer.server == "b1"
    finally:
        neighbour(node1, "del", of_node2)
        neighbour(node2, "del", of_node1)


def test_a_client_port_that_is_used_again_goes_to_a_backend_that_lives(xdp: Box, family: str) -> None:
    web = xdp.service("b1", kinds=["NodePort"])
    for protocol in ("TCP", "UDP"):
        port = xdp.client_port()
        for server in ("b1", "c1", "a1", "b1"):
            web.endpoints(server)
            deadline = time.monotonic() + SLO
            while True:
                answer = xdp.clients.ask(
                    xdp.place("outside"), web.node_port("node1", family), protocol, port=port, patience=0.5 * PACE
                )
                if isinstance(answer, Answer) and answer.server == server:
                    break
                assert time.monotonic() < deadline, (protocol, server, answer)


def test_connections_from_one_port_again_and_again(xdp: Box, family: str) -> None:
    """Whether the server closed it or the client reset it: the port is free for a new connection at once."""
    web = xdp.service("b1", "c1", kinds=["NodePort"])
    port = xdp.client_port()
    for round in range(20):
        with xdp.clients.converse(
            xdp.place("outside"), web.node_port("node1", family), "TCP", port=port
        ) as conversation:
            conversation.ask()
            if round % 2:
                conversation.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            else:
                conversation.socket.sendall(b"bye\n")
                assert conversation.socket.recv(1) == b""


def test_dump_flows_shows_the_whole_translation(xdp: Box, family: str) -> None:
    web = xdp.service("b1", kinds=["NodePort"])
    with xdp.clients.converse(xdp.place("outside"), web.node_port("node1", family), "TCP") as conversation:
        answer = conversation.ask()
        client = Target(*conversation.socket.getsockname()[:2])
        to = str(web.node_port("node1", family))
        rows = xdp.kernel.table("node1", "flows")
        (row,) = [row for row in rows if (row["client"], row["frontend"]) == (str(client), to)]
    assert row["backend"] == str(Target(xdp.address("b1", family), TARGET))
    assert row["source"] == str(Target(answer.source, answer.port))
    assert row["state"] == "open"
