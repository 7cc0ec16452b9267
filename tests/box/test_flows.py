"""What belongs to one flow stays together, and what is over does not linger."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ebpflb.demo import namespaces
from tests.box.box import SLO, Box
from tests.box.clients import PATIENCE, Answer, Target, about
from tests.box.objects import Port
from tests.box.services import TARGET, ServiceInBox, unready
from tests.box.sockets import family_of
from tests.pace import PACE

pytestmark = pytest.mark.box


class Sender:
    """An unconnected UDP socket with a port of its own, as a DNS resolver's or a syslog client's."""

    def __init__(self, box: Box, client: str, to: Target, port: int = 0) -> None:
        self.socket = box.sockets.make(box.place(client), family_of(to.address), "UDP")
        self.socket.bind(("", port))
        self.to = to

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, patience: float = PATIENCE, to: Target | None = None) -> tuple[Answer, Target]:
        """One datagram; who answered, and from where the answer seems to come. Raises OSError."""
        self.socket.settimeout(patience)
        self.socket.sendto(b"who?", to or self.to)
        body, source = self.socket.recvfrom(65_535)
        return about(body.partition(b"\n")[0]), Target(source[0], source[1])

    def ask_until(self, server: str) -> None:
        """Keep sending, as such clients do, until this server answers."""
        deadline = time.monotonic() + SLO
        seen: object = None
        while time.monotonic() < deadline:
            try:
                seen = self.ask(patience=0.2 * PACE)[0].server
            except OSError as error:
                seen = error
            if seen == server:
                return
        raise AssertionError(f"{server} never answered; last: {seen}")


def test_datagrams_of_one_socket_stay_with_one_backend(box: Box, family: str, pod: str) -> None:
    web = box.service("a2", "b1", "b2", "c1")
    with Sender(box, pod, web.cluster_ip(family)) as sender:
        answers = [sender.ask() for _ in range(50)]
    assert len({answer.server for answer, _ in answers}) == 1
    assert {source for _, source in answers} == {web.cluster_ip(family)}


def test_datagrams_from_outside_stay_with_one_backend(box: Box, family: str) -> None:
    web = box.service("a2", "b1", "b2", "c1", kinds=["NodePort"])
    with Sender(box, "outside", web.node_port("node1", family)) as sender:
        answers = [sender.ask() for _ in range(50)]
    assert len({(answer.server, answer.source, answer.port) for answer, _ in answers}) == 1
    assert {source for _, source in answers} == {web.node_port("node1", family)}


def test_one_socket_asks_two_services_and_sees_each_as_its_peer(box: Box, family: str, pod: str) -> None:
    first, second = box.service("b1"), box.service("c1")
    with Sender(box, pod, first.cluster_ip(family)) as sender:
        for web, server in ((first, "b1"), (second, "c1"), (first, "b1")):
            answer, source = sender.ask(to=web.cluster_ip(family))
            assert (answer.server, source) == (server, web.cluster_ip(family))


def test_one_socket_asks_two_services_with_the_same_backend(box: Box, family: str) -> None:
    """At a socket the two flows are one, and its answers can bear one name only; on the way of packets they are two."""
    first, second = box.service("b1"), box.service("b1")
    with Sender(box, "sa", first.cluster_ip(family)) as sender:
        for web in (first, second, first, second):
            answer, source = sender.ask(to=web.cluster_ip(family))
            assert (answer.server, source) == ("b1", web.cluster_ip(family))


def preserve_udp_traffic(box: Box, client: str, web: ServiceInBox, to: Target, first: str, second: str) -> None:
    """A client with one port keeps sending while its server pod cycles: the old flow must not outlive the pod."""
    with Sender(box, client, to, box.client_port()) as sender:
        web.endpoints(first)
        sender.ask_until(first)
        web.endpoints(unready(first))
        web.endpoints(second)
        sender.ask_until(second)
        web.endpoints(first)
        sender.ask_until(first)


def test_should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service(
    box: Box, family: str, pod: str
) -> None:
    web = box.service()
    preserve_udp_traffic(box, pod, web, web.cluster_ip(family), "b1", "c1")


def test_should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_node_port_service(
    box: Box, family: str, pod: str
) -> None:
    web = box.service(kinds=["NodePort"])
    preserve_udp_traffic(box, pod, web, web.node_port("node2", family), "b1", "c1")


def test_should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_and_client_is_host_network(
    box: Box, family: str
) -> None:
    web = box.service()
    preserve_udp_traffic(box, "node1", web, web.cluster_ip(family), "b1", "c1")


def test_should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_service_with_internal_policy_local(
    box: Box, family: str
) -> None:
    web = box.service(internalTrafficPolicy="Local")
    for client in ("a1", "sa"):
        web.endpoints()
        preserve_udp_traffic(box, client, web, web.cluster_ip(family), "a2", "node1")


@pytest.mark.parametrize("second", ["c1", "b2"], ids=["different_nodes", "the_same_nodes"])
def test_should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_load_balancer_service(
    box: Box, family: str, second: str
) -> None:
    web = box.service(kinds=["LoadBalancer"])
    preserve_udp_traffic(box, "outside", web, web.load_balancer(family), "b1", second)


def test_should_be_able_to_preserve_udp_traffic_when_initial_unready_endpoints_get_ready(
    box: Box, family: str, pod: str
) -> None:
    web = box.service(unready("b1"), kinds=["NodePort"])
    with (
        Sender(box, pod, web.cluster_ip(family), box.client_port()) as inside,
        Sender(box, "outside", web.node_port("node1", family), box.client_port()) as outside,
    ):
        for sender in (inside, outside):
            with pytest.raises(OSError):
                sender.ask(patience=0.2 * PACE)
        web.endpoints("b1")
        inside.ask_until("b1")
        outside.ask_until("b1")


def test_should_be_able_to_preserve_udp_traffic_through_a_new_socket_with_the_same_port(
    box: Box, family: str, pod: str
) -> None:
    web = box.service("b1")
    port = box.client_port()
    for server in ("b1", "c1", "b1"):
        web.endpoints(server)
        answer = box.clients.ask(box.place(pod), web.cluster_ip(family), "UDP", port=port)
        assert isinstance(answer, Answer) and answer.server == server, answer


def test_a_connected_datagram_socket_whose_backend_goes(box: Box, family: str, pod: str) -> None:
    """On the way of packets its flow moves on by itself. At a socket it is connected to the backend: where the daemon
    cannot end it (it looks in the namespaces of the cgroup's processes, and the process that asks here is in none), it
    is served for as long as that answers, hears of it when nobody listens there, and connects anew. Sockets that the
    daemon can end: tests/bpf/test_orphans.py."""
    web = box.service("b2")
    with box.clients.converse(box.place(pod), web.cluster_ip(family), "UDP") as conversation:
        assert conversation.ask().server == "b2"
        web.endpoints("c1")
        assert conversation.ask().server == ("b2" if pod == "a1" else "c1")
        box.servers.stop("b2", TARGET)
        try:
            if pod == "a1":
                with pytest.raises(ConnectionRefusedError):
                    conversation.ask()
                conversation.socket.connect(web.cluster_ip(family))
            assert conversation.ask().server == "c1"
        finally:
            box.servers.serve(box.place("b2"), TARGET)


def test_one_client_port_to_two_services_with_the_same_backend(box: Box, family: str) -> None:
    """The second flow gets another port behind the Service: otherwise the backend could not tell them apart."""
    first, second = box.service("b1"), box.service("b1")
    for protocol in ("TCP", "UDP"):
        place, port = box.place("sa"), box.client_port()
        with (
            box.clients.converse(place, first.cluster_ip(family), protocol, port=port) as one,
            box.clients.converse(place, second.cluster_ip(family), protocol, port=port) as two,
        ):
            answers = [one.ask(), two.ask(), one.ask(), two.ask()]
            assert {answer.server for answer in answers} == {"b1"}
            assert answers[0] == answers[2] and answers[1] == answers[3]
            assert answers[0].port == port != answers[1].port


def test_a_client_port_that_is_used_again_goes_to_a_backend_that_lives(box: Box, family: str) -> None:
    web = box.service("b1", kinds=["NodePort"])
    for client, to in (("sa", web.cluster_ip(family)), ("outside", web.node_port("node1", family))):
        port = box.client_port()
        for server in ("b1", "c1", "b1"):
            web.endpoints(server)
            answer = box.clients.ask(box.place(client), to, "TCP", port=port)
            assert isinstance(answer, Answer) and answer.server == server, answer


def test_connections_from_one_port_again_and_again(box: Box, family: str) -> None:
    """Whether the server closed it or the client reset it: the port is free for a new connection at once."""
    web = box.service("b1", "c1")
    port = box.client_port()
    for round in range(20):
        with box.clients.converse(box.place("sa"), web.cluster_ip(family), "TCP", port=port) as conversation:
            conversation.ask()
            if round % 2:
                conversation.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            else:
                conversation.socket.sendall(b"bye\n")
                assert conversation.socket.recv(1) == b""


def test_many_clients_behind_one_masquerading_node(box: Box, family: str) -> None:
    """Each gets a port of its own on the node: 300 connections at once, all with their own answers."""
    web = box.service("b1", kinds=["NodePort"])
    open_ones = []
    try:
        for _ in range(300):
            open_ones.append(box.clients.converse(box.place("outside"), web.node_port("node1", family), "TCP"))
        ports = [conversation.ask().port for conversation in open_ones]
        assert len(set(ports)) == 300
    finally:
        for conversation in open_ones:
            conversation.close()


@contextmanager
def ephemeral_ports(box: Box, node: str, low: int, high: int) -> Iterator[None]:
    """A node whose sockets take their ports there, and whose daemon has found it so."""

    def restarted_with(value: str) -> None:
        daemon = box.cluster.nodes[node].daemon
        assert daemon is not None and daemon.stop() == 0
        namespaces.sysctl(box.cluster.nodes[node].namespace, {"ipv4/ip_local_port_range": value})
        box.cluster.start_daemons([node])

    with namespaces.inside(box.cluster.nodes[node].namespace):
        before = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    restarted_with(f"{low} {high}")
    try:
        yield
    finally:
        restarted_with(before)


@pytest.mark.dataplanes("bpf")
def test_an_answer_is_not_taken_for_a_question_by_its_port(own: Box) -> None:
    """A third of the 4,096 ports by which node1 masquerades are node ports, to which its pods' answers would go."""
    with ephemeral_ports(own, "node1", 5120, 65535):
        for first in range(1024, 2224, 100):
            ports = [Port(port, "UDP", f"p{port}", port, TARGET) for port in range(first, first + 100)]
            own.prepare("b1", ports=ports, type="NodePort").write()
        web = own.service("a2", kinds=["NodePort"])
        for family in ("ipv4", "ipv6"):
            to = web.node_port("node1", family)
            answers = [own.clients.ask(own.place("outside"), to, "UDP") for _ in range(40)]
            assert {answer.server for answer in answers if isinstance(answer, Answer)} == {"a2"}
            assert [str(answer) for answer in answers if not isinstance(answer, Answer)] == []
            assert {answer.port for answer in answers if isinstance(answer, Answer)} <= {*range(2224, 5120)}
