"""Much data, both ways, compared by content: segmentation, fragments, checksums, path MTU."""

from __future__ import annotations

import errno
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ebpflb.demo import namespaces
from tests.box.box import Box
from tests.box.clients import Answer, Conversation, Target, about
from tests.box.servers import pattern
from tests.box.services import ServiceInBox
from tests.pace import PACE

pytestmark = pytest.mark.box

LARGE = 8 << 20
DATAGRAM = 8000
FRAGMENTS = 6  # of such a datagram

# From a pod to a pod on this node and on another, from a node, and from outside by a node with the backend and without.
WAYS = {
    "pod_to_this_node": ("a1", "a2", "node1"),
    "pod_to_other_node": ("a1", "b1", "node1"),
    "sandbox_to_this_node": ("sa", "a2", "node1"),
    "sandbox_to_other_node": ("sa", "sb", "node1"),
    "node_to_other_node": ("node1", "b1", "node1"),
    "outside_to_this_node": ("outside", "a1", "node1"),
    "outside_to_other_node": ("outside", "b1", "node1"),
    "outside_to_host_network": ("outside", "node1", "node1"),
    "sandbox_to_itself": ("sa", "sa", "node1"),
}


def target(web: ServiceInBox, client: str, node: str, family: str) -> Target:
    return web.node_port(node, family) if client == "outside" else web.cluster_ip(family)


@pytest.mark.parametrize("way", WAYS)
def test_should_be_able_to_handle_large_requests_tcp(box: Box, family: str, way: str) -> None:
    client, server, node = WAYS[way]
    web = box.service(server, kinds=["NodePort"])
    data = pattern(LARGE)
    digest = hashlib.sha256(data).hexdigest()
    with box.clients.converse(
        box.place(client), target(web, client, node, family), "TCP", patience=10 * PACE
    ) as conversation:
        about, received = conversation.send(data)
        assert (about.server, received) == (server, digest)
        assert hashlib.sha256(conversation.fetch(LARGE)).hexdigest() == digest


@pytest.mark.parametrize("way", WAYS)
def test_should_be_able_to_handle_large_requests_udp(box: Box, family: str, way: str) -> None:
    """Each datagram and its answer is cut into six fragments."""
    client, server, node = WAYS[way]
    web = box.service(server, kinds=["NodePort"])
    with box.clients.converse(box.place(client), target(web, client, node, family), "UDP") as conversation:
        for _ in range(6):
            assert exchanged(conversation, DATAGRAM).server == server


_exchanges = itertools.count(1)


def exchanged(conversation: Conversation, size: int) -> Answer:
    """The answer to a datagram of that size, which has come back whole. IPv6 loses the first one that is too big for
    the overlay, since fragments are made by the sender, and says so once for each fragment: now, or only when a later
    one is under way, whose answer comes all the same. So each datagram differs from all others."""
    for _ in range(FRAGMENTS + 1):
        number = next(_exchanges).to_bytes(8, "big")
        body = number + pattern(size)[len(number) :]
        try:
            conversation.socket.send(body)
            while True:
                line, _, rest = conversation.socket.recv(65_535).partition(b"\n")
                if rest[: len(number)] >= number:  # no answer to an earlier one
                    assert rest == body
                    return about(line, rest)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
    raise AssertionError(f"{size} bytes are too big each time")


@contextmanager
def narrow(box: Box, mtu: int) -> Iterator[None]:
    """The wire from the machines' network to the outside client carries less than both its ends believe."""
    fabric = box.cluster.fabric.namespace
    namespaces.ip(fabric, [f"link set outside mtu {mtu}"])
    try:
        yield
    finally:
        namespaces.ip(fabric, ["link set outside mtu 1500"])
        for place in (*box.cluster.pods.values(), *box.cluster.nodes.values()):  # what they have learnt lasts minutes
            for version in ("-4", "-6"):
                box.cluster.run(place, ["ip", version, "route", "flush", "cache"])


@pytest.mark.parametrize("server", ["a1", "b1", "sb"])
def test_a_smaller_mtu_in_the_middle_is_found_out(box: Box, family: str, server: str) -> None:
    """The router's "too big" names the Service's address; the backend must hear of it as about its own."""
    web = box.service(server, kinds=["NodePort"])
    with narrow(box, 1300):
        place, to = box.place("outside"), web.node_port("node1", family)
        with box.clients.converse(place, to, "TCP", patience=10 * PACE) as conversation:
            client = conversation.ask().source
            assert conversation.fetch(1 << 20) == pattern(1 << 20)
        learnt = box.cluster.run(box.place(server), ["ip", "route", "get", client]).stdout
        assert " mtu 1300 " in learnt


def test_a_backend_that_closed_its_port_is_heard_of(box: Box, family: str, pod: str) -> None:
    """A backend's own port unreachable, and its RST, come back as the Service's."""
    web = box.service("b2")
    box.servers.stop("b2", 8080)
    try:
        for protocol in ("TCP", "UDP"):
            got = box.clients.ask(box.place(pod), web.cluster_ip(family), protocol)
            assert str(got) == "refused", (protocol, got)
    finally:
        box.servers.serve(box.place("b2"), 8080)
    answer = box.clients.ask(box.place(pod), web.cluster_ip(family), "TCP")
    assert isinstance(answer, Answer)
