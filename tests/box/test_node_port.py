"""Node ports, from outside, from pods and from the nodes themselves."""

from __future__ import annotations

import errno
import itertools
import socket
from contextlib import ExitStack

import pytest

from tests.box.box import Box
from tests.box.clients import Answer, Target
from tests.box.objects import Port
from tests.box.services import OTHER, TARGET
from tests.box.sockets import family_of

pytestmark = pytest.mark.box


def test_should_be_able_to_create_a_functioning_node_port_service(box: Box, family: str) -> None:
    """Each node serves it, wherever the backends are: here, elsewhere, on both."""
    web = box.service("a1", "b1", kinds=["NodePort"])
    for node in ("node1", "node2", "node3"):
        box.expect("outside", to=web.node_port(node, family)).reaches("a1", "b1").sees_source(node)
    box.check()


def test_a_node_port_with_a_backend_on_this_node_only(box: Box, family: str) -> None:
    web = box.service("sa", kinds=["NodePort"])
    box.expect("outside", to=web.node_port("node1", family)).reaches("sa").sees_source("node1")
    box.check()


def test_a_node_port_with_backends_in_the_hosts_network(box: Box, family: str) -> None:
    web = box.service("node1", "node2", kinds=["NodePort"])
    box.expect("outside", to=web.node_port("node1", family)).reaches("node1", "node2")
    box.expect("outside", to=web.node_port("node3", family)).reaches("node1", "node2").sees_source("node3")
    box.check()
    # A packet for this node itself never leaves it: like MASQUERADE, ours has no occasion to replace its source.
    web.endpoints("node1")
    box.expect("outside", to=web.node_port("node1", family)).reaches("node1").sees_source("outside")
    box.check()


def test_node_ports_from_pods(box: Box, family: str, pod: str) -> None:
    web = box.service("a2", "b1", kinds=["NodePort"])
    box.expect(pod, to=web.node_port("node1", family)).reaches("a2", "b1")
    box.expect(pod, to=web.node_port("node2", family)).reaches("a2", "b1")
    box.check()


def test_node_ports_from_nodes(box: Box, family: str) -> None:
    web = box.service("a1", "b1", kinds=["NodePort"])
    box.expect("node1", to=web.node_port("node1", family)).reaches("a1", "b1").sees_source("node1")
    box.expect("node1", to=web.node_port("node2", family)).reaches("a1", "b1").sees_source("node2")
    box.check()


def test_node_ports_on_the_nodes_loopback(box: Box) -> None:
    """IPv4 only, as kube-proxy has it; and a pod's own loopback is the pod's."""
    web = box.service("a1", "b1", kinds=["NodePort"])
    number = web.node_port_number()
    box.expect("node1", to=Target("127.0.0.1", number)).reaches("a1", "b1").sees_source("node1")
    box.expect("node1", to=Target("::1", number)).refused()
    box.expect("a1", to=Target("127.0.0.1", number)).refused()
    box.expect("sa", to=Target("127.0.0.1", number)).refused()
    box.check()


def test_should_be_able_to_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols(
    box: Box, family: str
) -> None:
    ports = (Port(80, "TCP", "tcp", target=TARGET), Port(80, "UDP", "udp", target=OTHER))
    web = box.service("b1", ports=ports)
    assert web.node_port_number(0) == web.node_port_number(1)
    web.change(kinds=["NodePort"])
    box.expect("outside", to=web.node_port("node1", family)).reaches("b1")
    box.check()


def test_should_support_external_traffic_policy_local_for_type_node_port(box: Box, family: str, pod: str) -> None:
    web = box.service("b1", "sb", kinds=["NodePort"], externalTrafficPolicy="Local")
    box.expect("outside", to=web.node_port("node2", family)).reaches("b1", "sb").sees_source("outside")
    box.expect("outside", to=web.node_port("node1", family)).dropped(at="node1")
    # A pod or node that asks its own node is inside the cluster: it is not told where the endpoints are.
    box.expect(pod, to=web.node_port("node1", family)).reaches("b1", "sb").sees_source(pod)
    box.expect("node1", to=web.node_port("node1", family)).reaches("b1", "sb").sees_source("node1")
    box.check()


def test_a_process_that_listens_on_a_node_port_does_not_keep_the_service_from_being_served(
    box: Box, family: str
) -> None:
    web = box.service("b1", kinds=["NodePort"])
    box.servers.serve(box.place("node1"), web.node_port_number(), name="squatter")
    try:
        box.expect("outside", to=web.node_port("node1", family)).reaches("b1")
        box.expect("node1", to=web.node_port("node1", family)).reaches("b1")
        box.check()
    finally:
        box.servers.stop("node1", web.node_port_number())


def test_node_ports_are_released(box: Box, family: str) -> None:
    web = box.service("b1", kinds=["NodePort"])
    box.expect("outside", to=web.node_port("node1", family)).reaches("b1")
    box.check()
    web.change(kinds=())
    box.expect("outside", to=web.node_port("node1", family)).refused()
    box.expect("a1", to=web.cluster_ip(family)).reaches("b1")
    box.check()


def is_free(box: Box, name: str, to: Target, protocol: str, port: int) -> bool:
    """Whether a client there could bind this port. Rules masquerade by any port, that of a server on the node, too."""
    with box.sockets.make(box.place(name), family_of(to.address), protocol) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_port_that_stands_for_a_client_can_be_bound_on_the_node(box: Box, family: str, protocol: str) -> None:
    """A client from outside is led to its backend by a port of the node. A program there that has bound the same one
    asks the same backend: each gets its own answers."""
    web = box.service("b1", kinds=["NodePort"])
    place = box.place("outside")
    with ExitStack() as stack:
        for tries in itertools.count(1):
            conversation = stack.enter_context(box.clients.converse(place, web.node_port("node1", family), protocol))
            port = conversation.ask().port
            if is_free(box, "node1", web.cluster_ip(family), protocol, port):
                break
            assert tries < 10
        for body in (b"mine", b"mine too"):
            own = box.clients.ask(box.place("node1"), web.cluster_ip(family), protocol, port=port, body=body)
            assert isinstance(own, Answer) and own.body == body, own
            assert conversation.ask(b"still here").port == port
