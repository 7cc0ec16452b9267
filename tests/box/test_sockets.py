"""What programs see of a Service at their sockets."""

from __future__ import annotations

import contextlib
import select
import socket

import pytest

from tests.box.box import Box
from tests.box.clients import PATIENCE, Target
from tests.box.sockets import family_of

pytestmark = pytest.mark.box


def peer(made: socket.socket) -> Target:
    return Target(*made.getpeername()[:2])


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_getpeername_shows_the_service(box: Box, family: str, pod: str, protocol: str) -> None:
    web = box.service("b1")
    with box.clients.converse(box.place(pod), web.cluster_ip(family), protocol) as conversation:
        assert conversation.ask().server == "b1"
        assert peer(conversation.socket) == web.cluster_ip(family)


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_an_ipv6_socket_may_use_the_ipv4_address_of_a_service(box: Box, pod: str, protocol: str) -> None:
    web = box.service("b1")
    address, port = web.cluster_ip("ipv4")
    made = box.sockets.make(box.place(pod), socket.AF_INET6, protocol)
    with contextlib.closing(made):
        made.settimeout(PATIENCE)
        made.connect((f"::ffff:{address}", port))
        made.send(b"who?\n")
        assert made.recv(4096).split()[0] == b"b1"
        assert peer(made) == Target(f"::ffff:{address}", port)


def test_an_unconnected_ipv6_socket_may_use_the_ipv4_address_of_a_service(box: Box, pod: str) -> None:
    web = box.service("b1")
    address, port = web.cluster_ip("ipv4")
    with contextlib.closing(box.sockets.make(box.place(pod), socket.AF_INET6, "UDP")) as made:
        made.settimeout(PATIENCE)
        made.sendto(b"who?", (f"::ffff:{address}", port))
        body, source = made.recvfrom(4096)
        assert body.split()[0] == b"b1"
        assert source[:2] == (f"::ffff:{address}", port)


@pytest.mark.dataplanes("bpf")
def test_the_socket_path_serves_pods_and_the_packet_path_what_it_cannot_see(box: Box, family: str) -> None:
    """A process outside of the node's cgroup is untouched by the socket programs, and served all the same."""
    web = box.service("b1")
    for client, at_socket in (("a1", True), ("node1", True), ("sa", False)):
        before = box.kernel.counters("node1")
        box.expect(client, to=web.cluster_ip(family)).reaches("b1")
        box.check()
        after = box.kernel.counters("node1")
        assert (after["socket_forwarded"] > before["socket_forwarded"]) is at_socket
        assert (after["packet_forwarded"] > before["packet_forwarded"]) is not at_socket


@pytest.mark.dataplanes("bpf")
def test_a_refusal_is_immediate_for_a_socket_that_does_not_wait(box: Box, family: str) -> None:
    web = box.service()
    made = box.sockets.make(box.place("a1"), family_of(web.cluster_ip(family).address), "TCP")
    with contextlib.closing(made):
        made.setblocking(False)
        with pytest.raises(ConnectionRefusedError):
            made.connect(web.cluster_ip(family))


def test_a_socket_that_does_not_wait_connects(box: Box, family: str, pod: str) -> None:
    web = box.service("b1")
    made = box.sockets.make(box.place(pod), family_of(web.cluster_ip(family).address), "TCP")
    with contextlib.closing(made):
        made.setblocking(False)
        with pytest.raises(BlockingIOError):
            made.connect(web.cluster_ip(family))
        _, writable, _ = select.select([], [made], [], PATIENCE)
        assert writable and made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert peer(made) == web.cluster_ip(family)


@pytest.mark.dataplanes("bpf")
def test_an_unconnected_datagram_to_nobody_is_refused(box: Box, family: str) -> None:
    web = box.service()
    made = box.sockets.make(box.place("a1"), family_of(web.cluster_ip(family).address), "UDP")
    with contextlib.closing(made), pytest.raises(ConnectionRefusedError):
        made.sendto(b"who?", web.cluster_ip(family))


@pytest.mark.dataplanes("bpf")
@pytest.mark.parametrize("client", ["a1", "sa", "node1", "outside"])
def test_sockets_with_other_peers_are_left_alone(box: Box, family: str, client: str) -> None:
    """Same addresses, other ports; same ports, other addresses."""
    web = box.service("b1")
    before = {node: box.kernel.counters(node)["socket_forwarded"] for node in box.cluster.nodes}
    address, _ = web.cluster_ip(family)
    box.expect(client, to=Target(address, 4711)).unanswered()
    box.expect(client, to=Target(box.address("node2", family), 80)).refused()
    box.check()
    assert {node: box.kernel.counters(node)["socket_forwarded"] for node in box.cluster.nodes} == before
