"""`--pod-path redirect`: from one pod of a node to another around the stack, for those that no socket program serves.

Rules of this file: what goes around is told by the counter of packets that did. The semantics are those of every other
path; only what must be seen here is asked: both directions go around or none, and what cannot go around is carried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from ebpflb.demo.network import Cni, Join
from tests.box.box import NODES, Box
from tests.box.clients import Answer, Conversation
from tests.box.conftest import OnFailure, tidied
from tests.box.modes import AROUND, BPF
from tests.box.servers import pattern
from tests.pace import PACE

pytestmark = pytest.mark.box

LARGE = 4 << 20
DATAGRAM = 4000


@pytest.fixture(scope="module")
def standing() -> Iterator[Box]:
    with Box(AROUND, Cni.ROUTED, Join.ROUTES, NODES[:2]) as found:
        yield found


@pytest.fixture
def box(standing: Box, on_failure: OnFailure) -> Iterator[Box]:
    yield from tidied(standing, on_failure)


# Packets by which the last connections of the test before may still end. What is asked here is 40 at least.
STRAYS = 10


def gone_around(box: Box) -> int:
    """Packets that node1 has sent around its stack so far."""
    return box.kernel.counters("node1")["around_sent"]


def asked_by_packets(box: Box, conversation: Conversation, body: bytes, number: int) -> Answer:
    """The answer to a datagram, for which so many packets went around. Others may, too, while it is asked: so it is
    asked again where that was so."""
    seen = []
    for _ in range(3):
        before = gone_around(box)
        answer = conversation.ask(body)
        seen.append(gone_around(box) - before)
        if seen[-1] == number:
            return answer
    raise AssertionError(f"{number} packets were to go around each time: {seen}")


def test_pod_to_pod_of_one_node_goes_around(box: Box, family: str) -> None:
    """Requests and replies, with the pod's own address as the source."""
    web = box.service("a2")
    before = gone_around(box)
    box.expect("sa", to=web.cluster_ip(family)).reaches("a2").sees_source("sa")
    box.check()
    assert gone_around(box) - before >= 10


def test_the_stack_sees_nothing_of_it(box: Box, family: str) -> None:
    """Which is what one gives up: a rule that would drop every packet between pods is never asked."""
    web = box.service("a2")
    iptables = "iptables" if family == "ipv4" else "ip6tables"
    rule = ("FORWARD", "-p", "tcp", "--dport", "80", "-j", "DROP")
    box.kernel.said("node1", iptables, "-I", *rule)
    try:
        box.expect("sa", to=web.cluster_ip(family)).reaches("a2")
        box.check()
    finally:
        box.kernel.said("node1", iptables, "-D", *rule)


def test_a_backend_of_another_node_is_reached_through_the_stack(box: Box, family: str) -> None:
    web = box.service("b1")
    before = gone_around(box)
    box.expect("sa", to=web.cluster_ip(family)).reaches("b1").sees_source("sa")
    box.check()
    assert gone_around(box) - before < STRAYS


def test_a_pod_that_is_sent_to_itself_goes_through_the_stack(box: Box, family: str) -> None:
    """It is masqueraded there."""
    web = box.service("sa")
    before = gone_around(box)
    box.expect("sa", to=web.cluster_ip(family)).reaches("sa").sees_source("node1")
    box.check()
    assert gone_around(box) - before < STRAYS


def test_much_data_both_ways(box: Box, family: str) -> None:
    """Segments that are cut by nobody in between, and their checksums."""
    web = box.service("a2")
    data = pattern(LARGE)
    digest = hashlib.sha256(data).hexdigest()
    before = gone_around(box)
    with box.clients.converse(box.place("sa"), web.cluster_ip(family), "TCP", patience=10 * PACE) as conversation:
        assert conversation.send(data)[1] == digest
        assert hashlib.sha256(conversation.fetch(LARGE)).hexdigest() == digest
    assert gone_around(box) - before > 100


def test_fragments_go_through_the_stack_with_the_same_backend(box: Box, family: str) -> None:
    web = box.service("a1", "a2")
    with box.clients.converse(box.place("sa"), web.cluster_ip(family), "UDP", patience=10 * PACE) as conversation:
        first = conversation.ask()
        answer = asked_by_packets(box, conversation, pattern(DATAGRAM), 0)
        assert (answer.server, answer.body) == (first.server, pattern(DATAGRAM))
        assert asked_by_packets(box, conversation, b"who?", 2).server == first.server


def test_connections_go_on_when_the_way_is_given_up_and_taken_again(box: Box, family: str) -> None:
    web = box.service("a1", "a2")
    conversations = [
        box.clients.converse(box.place("sa"), web.cluster_ip(family), protocol)
        for protocol in ("TCP", "UDP")
        for _ in range(3)
    ]
    try:
        before = [conversation.ask() for conversation in conversations]
        for mode in (BPF, AROUND):
            box.switch("node1", mode)
            assert [conversation.ask() for conversation in conversations] == before, mode.name
            box.expect("sa", to=web.cluster_ip(family)).reaches("a1", "a2").sees_source("sa")
            box.check()
    finally:
        for conversation in conversations:
            conversation.close()
        if box.modes["node1"] is not AROUND:
            box.switch("node1", AROUND)
