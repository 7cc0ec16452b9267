"""Connections as the node tracks them: what fits no connection, and how long a half-closed one lasts."""

from __future__ import annotations

import re
import time

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from tests.box.box import SLO, Box
from tests.box.wire import Wire, source_of

pytestmark = pytest.mark.box

FAR_AWAY = 1 << 30  # of sequence numbers: beyond any window


def out_of_window(frame: Ether) -> Ether:
    """A copy of a server's segment that lies in no window of its connection."""
    copy = Ether(bytes(frame))
    copy[TCP].seq = (copy[TCP].seq + FAR_AWAY) % (1 << 32)
    del copy[TCP].chksum
    return copy


def test_should_drop_invalid_conntrack_entries(box: Box, family: str) -> None:
    """A server's segment out of the window is nobody's reply: were it let through untranslated, the client would reset
    a connection that it has never heard of, which the server would take for its own."""
    web = box.service("b1")
    client, server, port = box.place("sa"), box.place("b1"), box.client_port()
    with (
        Wire(server) as at_server,
        Wire(client) as at_client,
        box.clients.converse(client, web.cluster_ip(family), "TCP", port=port) as conversation,
    ):
        assert conversation.ask().server == "b1"
        (answer, *_) = [
            frame
            for frame in at_server.segments()
            if source_of(frame) in server.addresses and frame[TCP].dport == port and frame[TCP].payload
        ]
        for _ in range(10):
            at_server.send(out_of_window(answer))
            assert conversation.ask().server == "b1"
        # Of this connection: one of a test before may not be over yet.
        seen = {source_of(frame) for frame in at_client.segments() if port in (frame[TCP].sport, frame[TCP].dport)}
        assert web.cluster_ip(family).address in seen
        assert not seen & set(server.addresses)


@pytest.mark.dataplanes("iptables", "ipvs")
def test_should_set_tcp_close_wait_timeout(box: Box, family: str) -> None:
    """A server that closes first leaves its connection half open: its client has an hour to finish, as the default of
    kube-proxy is, not the kernel's minute."""
    web = box.service("b1", kinds=["NodePort"])
    to, port = web.node_port("node1", family), box.client_port()
    with box.clients.converse(box.place("outside"), to, "TCP", port=port) as conversation:
        conversation.ask()
        conversation.socket.sendall(b"bye\n")
        assert conversation.socket.recv(1) == b""
        argv = (
            "conntrack",
            "-L",
            "-f",
            family,
            "-p",
            "tcp",
            "--orig-port-src",
            str(port),
            "--orig-port-dst",
            str(to.port),
        )
        deadline = time.monotonic() + SLO
        while not (found := re.search(r"(\d+) CLOSE_WAIT", said := box.kernel.said("node1", *argv))):
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
        assert 3540 <= int(found[1]) <= 3600
