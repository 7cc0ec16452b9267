"""Flows of several packets through the tc programs: there and back again, as a node's devices see them.

Rules of this file: a story passes each packet through every hook that it would meet on a node, compares the whole
packet at each hook, and ends with what the client sees: the answer of whom it asked. The last packet of a story is
therefore always the exact reply of the first.
"""

from __future__ import annotations

import dataclasses
import socket
import struct
import time
from collections.abc import Callable

import pytest

from ebpflb.dataplane.bpf import facts, map_calls
from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.dataplane.bpf.constants import BACKEND_FREE, SOURCE_POD
from ebpflb.routes import BackendState, Masquerade
from tests.bpf.loaded import (
    CLOSING,
    DNAT,
    POD_DEVICE,
    SHOT,
    SIZES,
    SNAT,
    UNALLOCATED,
    UNDNAT,
    UNSNAT,
    UNSPEC,
    UPLINK,
    Device,
    Loaded,
    To,
)
from tests.packets import ETHERNET, Packet, address, assert_same, assert_sound, icmp_error, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_families = pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))
both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

HAIRPIN = Device(masquerade="node", pod=True)
LOW, HIGH = 32768, 60999
DEADLINE = 30.0


def _until(condition: Callable[[], bool], meanwhile: Callable[[], object] = facts.jiffies) -> None:
    """Do the one until the other holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s"
        meanwhile()


def _some_jiffies_later(since: int, jiffies: int = 3) -> None:
    """Wait until the programs' clock, of which the lower 32 bits are told, is so much later: another may run ahead."""
    _until(lambda: (facts.jiffies() - since) & 0xFFFFFFFF >= jiffies)


def _passes(node: Loaded, hook: str, packet: Packet, after: Packet, family: int, device: Device = UPLINK) -> None:
    """The packet passes the hook and becomes exactly `after`."""
    run = node.ingress if hook == "ingress" else node.egress
    result = run(packet.frame(family), family, device)
    assert result.verdict == UNSPEC, node.counters()
    assert_same(result.frame, after.frame(family), hook)
    if not packet.no_checksum:
        assert_sound(result.frame, hook)


@dataclasses.dataclass(frozen=True, slots=True)
class Masqueraded:
    """A flow outside -> node:30081 that a remote backend serves: as the client sees it, between the hooks (`inside`),
    and as it leaves (`beyond`)."""

    request: Packet
    inside: Packet
    beyond: Packet


def _masqueraded(node: Loaded, protocol: str, family: int, sport: int = 40000) -> Masqueraded:
    """The first packet of such a flow, passed through both hooks."""
    request = Packet("outside", sport, "node", 30081, protocol, payload=b"hello")
    inside = request.but(destination="remote", dport=8080)
    _passes(node, "ingress", request, inside, family)
    left = node.egress(inside.frame(family), family, UPLINK)
    assert left.verdict == UNSPEC, node.counters()
    parsed = parse(left.frame)
    assert parsed is not None and parsed.ports is not None
    port = parsed.ports[0]
    assert LOW <= port <= HIGH
    beyond = inside.but(source="uplink", sport=port)
    assert_same(left.frame, beyond.frame(family))
    assert_sound(left.frame)
    return Masqueraded(request, inside, beyond)


def _remote_nodeport(node: Loaded, protocol: str, family: int, *backends: tuple[str, int]) -> None:
    to = To(backends or (("remote", 8080),), masquerade=Masquerade.NOT_POD)
    node.put_frontend("node", 30081, protocol, family, to)


@both_families
@both_protocols
def test_nodeport_with_a_remote_backend_there_and_back(node: Loaded, protocol: str, family: int) -> None:
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    assert [row.action for row in node.flows()] == [DNAT, SNAT, UNSNAT, UNDNAT]
    assert not any(row.flags & UNALLOCATED for row in node.flows())

    _passes(node, "ingress", flow.beyond.reply(), flow.inside.reply(), family)
    _passes(node, "egress", flow.inside.reply(), flow.request.reply(), family)

    more = {"flags": "PA", "payload": b"and more"}
    for _ in range(3):
        _passes(node, "ingress", flow.request.but(**more), flow.inside.but(**more), family)
        _passes(node, "egress", flow.inside.but(**more), flow.beyond.but(**more), family)
        _passes(node, "ingress", flow.beyond.but(**more).reply(), flow.inside.but(**more).reply(), family)
        _passes(node, "egress", flow.inside.but(**more).reply(), flow.request.but(**more).reply(), family)
    assert node.counters() == {"PACKET_FORWARDED": 1}
    assert len(node.flows()) == 4


@both_families
@both_protocols
@pytest.mark.parametrize("frontend", (("vip", 80), ("node", 30080), ("lb", 443)), ids=("cluster", "nodeport", "lb"))
def test_a_backend_on_this_node_sees_the_client(
    node: Loaded, frontend: tuple[str, int], protocol: str, family: int
) -> None:
    """No masquerade: the source is kept, and only the edge where the client is changes anything."""
    node.put_frontend(*frontend, protocol, family, To((("local", 8080),)))
    request = Packet("outside", 40000, *frontend, protocol, payload=b"hello")
    inside = request.but(destination="local", dport=8080)
    _passes(node, "ingress", request, inside, family, UPLINK)
    _passes(node, "egress", inside, inside, family, POD_DEVICE)
    _passes(node, "ingress", inside.reply(), inside.reply(), family, POD_DEVICE)
    _passes(node, "egress", inside.reply(), request.reply(), family, UPLINK)
    assert [row.action for row in node.flows()] == [DNAT, UNDNAT]


@both_families
@both_protocols
def test_from_pod_to_pod_of_this_node_by_cluster_ip(node: Loaded, protocol: str, family: int) -> None:
    """NOT_POD spares pods: told by the device or by the address alone."""
    to = To((("local", 8080),), masquerade=Masquerade.NOT_POD)
    node.put_frontend("vip", 80, protocol, family, to)
    node.put_source(f"{address('client', family)}/{32 if family == 4 else 128}", SOURCE_POD)
    for sport, device in ((40000, POD_DEVICE), (40001, UPLINK)):
        request = Packet("client", sport, "vip", 80, protocol, payload=b"hello")
        inside = request.but(destination="local", dport=8080)
        _passes(node, "ingress", request, inside, family, device)
        _passes(node, "egress", inside, inside, family, POD_DEVICE)
        _passes(node, "ingress", inside.reply(), inside.reply(), family, POD_DEVICE)
        _passes(node, "egress", inside.reply(), request.reply(), family, device)
    assert {row.action for row in node.flows()} == {DNAT, UNDNAT}


@both_families
@both_protocols
def test_a_pod_that_reaches_itself(node: Loaded, protocol: str, family: int) -> None:
    """Hairpin: masqueraded whatever the row says, or the pod would answer itself with no way through the node."""
    node.put_frontend("vip", 80, protocol, family, To((("local", 8080),), masquerade=Masquerade.NEVER))
    request = Packet("local", 40000, "vip", 80, protocol, payload=b"hello")
    inside = request.but(destination="local", dport=8080)
    _passes(node, "ingress", request, inside, family, HAIRPIN)
    left = node.egress(inside.frame(family), family, HAIRPIN)
    parsed = parse(left.frame)
    assert left.verdict == UNSPEC and parsed is not None and parsed.ports is not None
    beyond = inside.but(source="node", sport=parsed.ports[0])
    assert_same(left.frame, beyond.frame(family))
    _passes(node, "ingress", beyond.reply(), inside.reply(), family, HAIRPIN)
    _passes(node, "egress", inside.reply(), request.reply(), family, HAIRPIN)


@both_families
@pytest.mark.parametrize("masquerade", tuple(Masquerade), ids=lambda value: value.name)
@pytest.mark.parametrize("pod", (False, True), ids=("outside", "pod"))
def test_who_is_masqueraded(node: Loaded, family: int, masquerade: Masquerade, pod: bool) -> None:
    node.put_frontend("vip", 80, "tcp", family, To((("remote", 8080),), masquerade=masquerade))
    request = Packet("client" if pod else "outside", 40000, "vip", 80)
    node.ingress(request.frame(family), family, POD_DEVICE if pod else UPLINK)
    wanted = masquerade is Masquerade.ALWAYS or (masquerade is Masquerade.NOT_POD and not pod)
    assert any(row.action == SNAT for row in node.flows()) == wanted


@both_families
@both_protocols
def test_many_clients_get_ports_of_their_own(node: Loaded, protocol: str, family: int) -> None:
    _remote_nodeport(node, protocol, family)
    flows = [_masqueraded(node, protocol, family, sport) for sport in range(40000, 40200)]
    assert len({flow.beyond.sport for flow in flows}) == len(flows)
    for flow in flows:
        _passes(node, "ingress", flow.beyond.reply(), flow.inside.reply(), family)
        _passes(node, "egress", flow.inside.reply(), flow.request.reply(), family)


@both_families
@both_protocols
def test_no_free_port_is_a_drop_with_a_name(node: Loaded, protocol: str, family: int) -> None:
    _remote_nodeport(node, protocol, family)
    node.put_settings(snat_low=45000, snat_high=45000, refresh=1 << 20)
    request = Packet("outside", 40000, "node", 30081, protocol)
    first = node.ingress(request.frame(family), family)
    assert node.egress(first.frame, family).verdict == UNSPEC
    second = node.ingress(request.but(sport=40001).frame(family), family)
    assert node.egress(second.frame, family).verdict == SHOT
    assert node.counters()["PACKET_NO_PORT"] == 1
    # The first flow is as it was.
    assert node.egress(first.frame, family).verdict == UNSPEC


@both_families
@both_protocols
def test_a_port_that_a_socket_of_the_node_has_is_not_given_out(node: Loaded, protocol: str, family: int) -> None:
    _remote_nodeport(node, protocol, family)
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    any_address = "0.0.0.0" if family == 4 else "::"
    with socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind) as taken:
        taken.bind((any_address, 0))
        if protocol == "tcp":
            taken.listen()
        port = taken.getsockname()[1]
        node.put_settings(snat_low=port, snat_high=port)
        inside = node.ingress(Packet("outside", 40000, "node", 30081, protocol).frame(family), family)
        assert node.egress(inside.frame, family).verdict == SHOT
        assert node.counters()["PACKET_NO_PORT"] == 1
    assert node.egress(inside.frame, family).verdict == UNSPEC


@both_families
def test_a_device_without_an_address_cannot_masquerade(node: Loaded, family: int) -> None:
    _remote_nodeport(node, "tcp", family)
    inside = node.ingress(Packet("outside", 40000, "node", 30081).frame(family), family)
    assert node.egress(inside.frame, family, Device()).verdict == SHOT
    assert node.counters()["PACKET_NO_ADDRESS"] == 1


@both_families
def test_a_port_is_taken_once_and_kept(node: Loaded, family: int) -> None:
    """A retransmitted SYN leaves from the same port."""
    _remote_nodeport(node, "tcp", family)
    flow = _masqueraded(node, "tcp", family)
    again = _masqueraded(node, "tcp", family)
    assert again == flow
    assert node.counters() == {"PACKET_FORWARDED": 1}


# ---- flows and their backends


def _backends(node: Loaded, protocol: str, family: int) -> int:
    """vip:80 with eight backends local:9000 …; returns the Service's id."""
    return node.put_frontend("vip", 80, protocol, family, To(tuple(("local", 9000 + n) for n in range(8))))


def _chosen(node: Loaded, packet: Packet, family: int) -> int:
    result = node.ingress(packet.frame(family), family)
    assert result.verdict == UNSPEC
    parsed = parse(result.frame)
    assert parsed is not None and parsed.ports is not None
    return parsed.ports[1]


def _replace(node: Loaded, port: int, service: int, family: int, state: int) -> None:
    """Another state for the backend local:`port` of `_backends`, whose ids are 1 to 8."""
    node.set_backend(1 + port - 9000, address("local", family), port, service, state)


@both_families
@both_protocols
def test_a_flow_stays_with_its_backend(node: Loaded, protocol: str, family: int) -> None:
    _backends(node, protocol, family)
    request = Packet("outside", 40000, "vip", 80, protocol)
    chosen = _chosen(node, request, family)
    later = request.but(flags="PA", payload=b"x")
    assert {_chosen(node, later, family) for _ in range(40)} == {chosen}
    assert node.counters() == {"PACKET_FORWARDED": 1}


@both_families
@both_protocols
def test_a_draining_backend_keeps_its_flows(node: Loaded, protocol: str, family: int) -> None:
    service = _backends(node, protocol, family)
    request = Packet("outside", 40000, "vip", 80, protocol)
    chosen = _chosen(node, request, family)
    _replace(node, chosen, service, family, BackendState.DRAINING)
    assert _chosen(node, request.but(flags="A"), family) == chosen
    assert "FLOW_STALE" not in node.counters()


@both_families
def test_a_connection_outlives_its_backends_row(node: Loaded, family: int) -> None:
    """An established TCP connection is nobody's to move: its packets still go where they went."""
    service = _backends(node, "tcp", family)
    request = Packet("outside", 40000, "vip", 80)
    chosen = _chosen(node, request, family)
    _replace(node, chosen, service, family, BACKEND_FREE)
    assert _chosen(node, request.but(flags="PA"), family) == chosen


@both_families
def test_a_datagram_flow_leaves_a_backend_that_is_gone(node: Loaded, family: int) -> None:
    """Upstream: "should be able to preserve UDP traffic when server pod cycles"."""
    service = node.put_frontend("vip", 80, "udp", family, To((("local", 9000), ("local", 9001))))
    request = Packet("outside", 40000, "vip", 80, "udp")
    chosen = _chosen(node, request, family)
    _replace(node, chosen, service, family, BACKEND_FREE)
    moved = None
    for _ in range(100):  # the free row may be drawn again: such a packet is let go as it is
        result = node.ingress(request.frame(family), family)
        if result.frame != request.frame(family):
            parsed = parse(result.frame)
            assert parsed is not None and parsed.ports is not None
            moved = parsed.ports[1]
            break
    assert moved == 18001 - chosen
    assert node.counters()["FLOW_STALE"] >= 1


@both_families
def test_a_backend_id_that_now_is_another_services_is_not_ours(node: Loaded, family: int) -> None:
    """Ids are used again: the flow must notice that its id has become somebody else's."""
    service = node.put_frontend("vip", 80, "udp", family, To((("local", 9000),)))
    request = Packet("outside", 40000, "vip", 80, "udp")
    assert _chosen(node, request, family) == 9000
    node.set_backend(1, address("local", family), 9000, service + 7)
    node.ingress(request.frame(family), family)
    assert node.counters()["FLOW_STALE"] == 1


@both_families
def test_the_next_syn_after_fin_is_a_new_connection(node: Loaded, family: int) -> None:
    _backends(node, "tcp", family)
    request = Packet("outside", 40000, "vip", 80)
    chosen = _chosen(node, request, family)
    assert _chosen(node, request.but(flags="FA"), family) == chosen
    assert any(row.flags & CLOSING for row in node.flows())
    assert _chosen(node, request.but(flags="A"), family) == chosen, "the last ACK belongs to the old connection"
    _chosen(node, request, family)
    assert node.counters() == {"PACKET_FORWARDED": 2, "FLOW_STALE": 1}


@both_families
@pytest.mark.parametrize("flags", ("R", "RA", "FA"))
def test_the_next_syn_after_the_backend_closed_is_a_new_connection(node: Loaded, family: int, flags: str) -> None:
    _backends(node, "tcp", family)
    request = Packet("outside", 40000, "vip", 80)
    chosen = _chosen(node, request, family)
    inside = request.but(destination="local", dport=chosen)
    answer = inside.reply().but(flags=flags)
    _passes(node, "egress", answer, request.reply().but(flags=flags), family)
    _chosen(node, request, family)
    assert node.counters() == {"PACKET_FORWARDED": 2, "FLOW_STALE": 1}


@both_families
def test_a_retransmitted_syn_stays_with_its_backend(node: Loaded, family: int) -> None:
    _backends(node, "tcp", family)
    request = Packet("outside", 40000, "vip", 80)
    assert len({_chosen(node, request, family) for _ in range(40)}) == 1


@both_families
def test_an_idle_datagram_flow_is_chosen_anew(node: Loaded, family: int) -> None:
    _backends(node, "udp", family)
    node.put_settings(flow_idle=0, refresh=1 << 40)
    request = Packet("outside", 40000, "vip", 80, "udp")
    _until(lambda: "FLOW_STALE" in node.counters(), lambda: _chosen(node, request, family))  # when a jiffy has passed


@both_families
def test_last_use_is_written_only_when_it_is_old(node: Loaded, family: int) -> None:
    _backends(node, "udp", family)
    node.put_settings(refresh=1 << 40)
    request = Packet("outside", 40000, "vip", 80, "udp")
    _chosen(node, request, family)
    first = [row.seen for row in node.flows()]
    _some_jiffies_later(first[0])
    for _ in range(3):
        _chosen(node, request, family)
    assert [row.seen for row in node.flows()] == first
    node.put_settings(refresh=0)
    _chosen(node, request, family)
    assert [row.seen for row in node.flows() if row.action == DNAT] > first[:1]


@both_families
@both_protocols
def test_two_frontends_one_backend_one_client_port(node: Loaded, protocol: str, family: int) -> None:
    """Two flows that would look the same to the backend: the later one gets another client port, both ways."""
    node.put_frontend("vip", 80, protocol, family, To((("local", 8080),)))
    node.put_frontend("vip2", 80, protocol, family, To((("local", 8080),)))
    one = Packet("outside", 40000, "vip", 80, protocol)
    two = one.but(destination="vip2")
    inside_one = one.but(destination="local", dport=8080)
    _passes(node, "ingress", one, inside_one, family)
    entered = node.ingress(two.frame(family), family)
    parsed = parse(entered.frame)
    assert parsed is not None and parsed.ports is not None and LOW <= parsed.ports[0] <= HIGH
    inside_two = inside_one.but(sport=parsed.ports[0])
    assert inside_two.sport != one.sport
    assert_same(entered.frame, inside_two.frame(family))
    assert_sound(entered.frame)
    assert node.counters()["PACKET_COLLISION"] == 1
    for _ in range(2):
        _passes(node, "egress", inside_two.reply(), two.reply(), family)
        _passes(node, "egress", inside_one.reply(), one.reply(), family)
        _passes(node, "ingress", two.but(flags="A"), inside_two.but(flags="A"), family)
        _passes(node, "ingress", one.but(flags="A"), inside_one.but(flags="A"), family)


@both_families
@both_protocols
def test_a_port_of_masquerade_that_a_socket_of_the_node_binds(node: Loaded, protocol: str, family: int) -> None:
    """It asks the same backend, or conntrack has given it that port: it gets another, and each has its own answers."""
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    _passes(node, "ingress", flow.request.but(flags="A"), flow.inside.but(flags="A"), family)
    own = flow.beyond.but(payload=b"mine")
    left = node.egress(own.frame(family), family, UPLINK)
    parsed = parse(left.frame)
    assert left.verdict == UNSPEC and parsed is not None and parsed.ports is not None
    port = parsed.ports[0]
    assert LOW <= port <= HIGH and port != own.sport
    beyond = own.but(sport=port)
    assert_same(left.frame, beyond.frame(family))
    assert_sound(left.frame)
    assert node.counters()["PACKET_COLLISION"] == 1
    more = {"flags": "PA", "payload": b"and more"}
    for _ in range(2):
        _passes(node, "ingress", beyond.reply(), own.reply(), family)
        _passes(node, "egress", own.but(**more), beyond.but(**more), family)
        _passes(node, "ingress", flow.beyond.reply(), flow.inside.reply(), family)
        _passes(node, "egress", flow.inside.but(**more), flow.beyond.but(**more), family)
    assert node.counters()["PACKET_COLLISION"] == 1


@both_families
@both_protocols
def test_a_port_of_masquerade_is_a_sockets_when_its_flow_has_ended(node: Loaded, protocol: str, family: int) -> None:
    node.put_settings(flow_idle=1, refresh=0)
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    if protocol == "tcp":
        _passes(node, "ingress", flow.request.but(flags="FA"), flow.inside.but(flags="FA"), family)
        _passes(node, "ingress", flow.beyond.but(flags="FA").reply(), flow.inside.but(flags="FA").reply(), family)
    _some_jiffies_later(max(row.seen for row in node.flows()))
    _passes(node, "egress", flow.beyond, flow.beyond, family)
    _passes(node, "ingress", flow.beyond.reply(), flow.beyond.reply(), family)


@both_families
@both_protocols
def test_what_leaves_by_a_free_port_of_masquerade_is_left_alone(node: Loaded, protocol: str, family: int) -> None:
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    for own in (
        flow.beyond.but(sport=flow.beyond.sport % (HIGH - LOW) + LOW + 1),  # another port
        flow.beyond.but(dport=8081),  # to somebody else
        flow.beyond.but(source="outside"),  # forwarded
    ):
        _passes(node, "egress", own, own, family)
    if protocol == "tcp":  # it goes on, and has had its port for longer
        _passes(node, "egress", flow.beyond.but(flags="A"), flow.beyond.but(flags="A"), family)
    assert "PACKET_COLLISION" not in node.counters()
    _passes(node, "ingress", flow.beyond.reply(), flow.inside.reply(), family)


@both_families
def test_sctp_collision_is_a_drop_with_a_name(node: Loaded, family: int) -> None:
    """The CRC of SCTP covers the ports, so that none can be changed."""
    node.put_frontend("vip", 9, "sctp", family, To((("local", 9),)))
    node.put_frontend("vip2", 9, "sctp", family, To((("local", 9),)))
    one = Packet("outside", 40000, "vip", 9, "sctp")
    assert node.ingress(one.frame(family), family).verdict == UNSPEC
    assert node.ingress(one.but(destination="vip2").frame(family), family).verdict == SHOT
    assert node.counters()["PACKET_SCTP_PORT"] == 1


@both_families
def test_sctp_there_and_back_with_masquerade_keeps_its_port(node: Loaded, family: int) -> None:
    node.put_frontend("node", 30132, "sctp", family, To((("remote", 30132),), masquerade=Masquerade.ALWAYS))
    request = Packet("outside", 40000, "node", 30132, "sctp")
    inside = request.but(destination="remote")
    beyond = inside.but(source="uplink")
    _passes(node, "ingress", request, inside, family)
    _passes(node, "egress", inside, beyond, family)
    _passes(node, "ingress", beyond.reply(), inside.reply(), family)
    _passes(node, "egress", inside.reply(), request.reply(), family)


@both_families
def test_a_full_flow_table_still_forwards_new_flows(artifact: Artifact, family: int) -> None:
    """LRU: the oldest flows go, nothing is refused."""
    loaded = Loaded(artifact, {**SIZES, "flows": 512}, ("tc_ingress", "tc_egress"))
    try:
        loaded.clear()
        _remote_nodeport(loaded, "tcp", family)
        for sport in range(20000, 23000):
            _passes(
                loaded,
                "ingress",
                Packet("outside", 0, "node", 30081).but(sport=sport),
                Packet("outside", 0, "remote", 8080).but(sport=sport),
                family,
            )
        assert loaded.counters() == {"PACKET_FORWARDED": 3000}
        assert len(loaded.flows()) <= 512
        flow = _masqueraded(loaded, "tcp", family)
        _passes(loaded, "ingress", flow.beyond.reply(), flow.inside.reply(), family)
        _passes(loaded, "egress", flow.inside.reply(), flow.request.reply(), family)
    finally:
        loaded.close()


@both_families
@both_protocols
def test_a_reply_whose_row_has_gone_is_untouched(node: Loaded, protocol: str, family: int) -> None:
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    keys, _, count = map_calls.lookup_all(node.maps["flows"])
    map_calls.delete_batch(node.maps["flows"], keys, count)
    _passes(node, "ingress", flow.beyond.reply(), flow.beyond.reply(), family)
    _passes(node, "egress", flow.inside.reply(), flow.inside.reply(), family)
    # The client's next packet makes all rows anew.
    again = _masqueraded(node, protocol, family)
    _passes(node, "ingress", again.beyond.reply(), flow.inside.reply(), family)
    _passes(node, "egress", flow.inside.reply(), flow.request.reply(), family)


@both_families
@both_protocols
def test_traffic_of_others_between_the_same_hosts_is_untouched(node: Loaded, protocol: str, family: int) -> None:
    """Only the flow's own tuple is translated: neighbours that differ in one part pass as they are."""
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    reply = flow.beyond.reply()
    for stranger in (
        reply.but(sport=8081),
        reply.but(dport=reply.dport ^ 1),
        reply.but(source="node2"),
        reply.but(destination="node2"),
        reply.but(protocol="udp" if protocol == "tcp" else "tcp"),
    ):
        _passes(node, "ingress", stranger, stranger, family)
        _passes(node, "egress", stranger, stranger, family)
    assert node.counters() == {"PACKET_FORWARDED": 1}


@both_families
@pytest.mark.parametrize("flags", ("R", "RA", "FA"))
@pytest.mark.parametrize("closed_by", ("client", "backend"))
def test_a_direct_connection_after_a_closed_one_from_the_same_port(
    node: Loaded, family: int, flags: str, closed_by: str
) -> None:
    """A client asks a Service, closes, and later reaches the very backend by itself: ephemeral ports come round."""
    node.put_frontend("vip", 80, "tcp", family, To((("local", 8080),)))
    request = Packet("outside", 40000, "vip", 80)
    inside = request.but(destination="local", dport=8080)
    _passes(node, "ingress", request, inside, family)
    _passes(node, "egress", inside.reply(), request.reply(), family)
    if closed_by == "client":
        _passes(node, "ingress", request.but(flags=flags), inside.but(flags=flags), family)
    else:
        _passes(node, "egress", inside.reply().but(flags=flags), request.reply().but(flags=flags), family)
    for packet, hook in ((inside, "ingress"), (inside, "egress"), (inside.reply(), "ingress")):
        _passes(node, hook, packet, packet, family)
    _passes(node, "egress", inside.reply(), inside.reply(), family)
    _passes(node, "egress", inside.reply().but(flags="RA"), inside.reply().but(flags="RA"), family)


@both_families
def test_a_direct_connection_after_a_masqueraded_one_from_the_same_port(node: Loaded, family: int) -> None:
    _remote_nodeport(node, "tcp", family)
    flow = _masqueraded(node, "tcp", family)
    closing = {"flags": "R"}
    _passes(node, "ingress", flow.request.but(**closing), flow.inside.but(**closing), family)
    _passes(node, "egress", flow.inside.but(**closing), flow.beyond.but(**closing), family)
    direct = flow.inside
    for packet, hook in (
        (direct, "ingress"),
        (direct, "egress"),
        (direct.reply(), "ingress"),
        (direct.reply(), "egress"),
    ):
        _passes(node, hook, packet, packet, family)


@both_families
@both_protocols
def test_a_direct_flow_beside_a_living_one_from_the_same_port(node: Loaded, protocol: str, family: int) -> None:
    """To the backend both would look the same: the direct one gets another client port, and both go on."""
    node.put_frontend("vip", 80, protocol, family, To((("local", 8080),)))
    request = Packet("outside", 40000, "vip", 80, protocol)
    inside = request.but(destination="local", dport=8080)
    _passes(node, "ingress", request, inside, family)
    entered = node.ingress(inside.frame(family), family)
    assert entered.verdict == UNSPEC
    parsed = parse(entered.frame)
    assert parsed is not None and parsed.ports is not None and LOW <= parsed.ports[0] <= HIGH
    direct = inside.but(sport=parsed.ports[0])
    assert direct.sport != inside.sport
    assert_same(entered.frame, direct.frame(family))
    assert_sound(entered.frame)
    for _ in range(2):
        _passes(node, "egress", direct.reply(), inside.reply(), family)
        _passes(node, "egress", inside.reply(), request.reply(), family)
        _passes(node, "ingress", inside.but(flags="A"), direct.but(flags="A"), family)
        _passes(node, "ingress", request.but(flags="A"), inside.but(flags="A"), family)


@both_families
def test_a_direct_datagram_after_an_idle_flow_from_the_same_port(node: Loaded, family: int) -> None:
    node.put_frontend("vip", 53, "udp", family, To((("local", 5353),)))
    request = Packet("outside", 40000, "vip", 53, "udp")
    inside = request.but(destination="local", dport=5353)
    _passes(node, "ingress", request, inside, family)
    _passes(node, "egress", inside.reply(), request.reply(), family)
    node.put_settings(flow_idle=0, refresh=1 << 40)
    _some_jiffies_later(max(row.seen for row in node.flows()))
    _passes(node, "ingress", inside, inside, family)
    _passes(node, "egress", inside.reply(), inside.reply(), family)


# ---- fragments


def _fragments(packet: Packet) -> tuple[Packet, Packet, Packet]:
    """A datagram in three pieces."""
    return (
        packet.but(payload=b"a" * 64, fragment=(0, True)),
        packet.but(payload=b"b" * 64, fragment=(72, True)),
        packet.but(payload=b"c" * 10, fragment=(136, False)),
    )


@both_families
@both_protocols
def test_fragments_follow_the_first_one_through_all_hooks(node: Loaded, protocol: str, family: int) -> None:
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    ways = (
        ("ingress", flow.request, flow.inside),
        ("egress", flow.inside, flow.beyond),
        ("ingress", flow.beyond.reply(), flow.inside.reply()),
        ("egress", flow.inside.reply(), flow.request.reply()),
    )
    for hook, before, after in ways:
        for piece, wanted in zip(_fragments(before), _fragments(after), strict=True):
            run = node.ingress if hook == "ingress" else node.egress
            result = run(piece.frame(family), family)
            assert result.verdict == UNSPEC
            assert_same(result.frame, wanted.frame(family), hook)
    assert node.counters() == {"PACKET_FORWARDED": 1}


@both_families
def test_a_flow_may_begin_with_a_fragment(node: Loaded, family: int) -> None:
    node.put_frontend("vip", 53, "udp", family, To((("local", 5353),)))
    request = Packet("outside", 40000, "vip", 53, "udp")
    inside = request.but(destination="local", dport=5353)
    for piece, wanted in zip(_fragments(request), _fragments(inside), strict=True):
        _passes(node, "ingress", piece, wanted, family)


@both_families
def test_a_later_fragment_without_its_first_is_untouched(node: Loaded, family: int) -> None:
    node.put_frontend("vip", 53, "udp", family, To((("local", 5353),)))
    piece = _fragments(Packet("outside", 40000, "vip", 53, "udp"))[1]
    _passes(node, "ingress", piece, piece, family)
    assert node.counters() == {"FRAGMENT_UNKNOWN": 1}


@both_families
def test_fragments_of_two_datagrams_are_kept_apart(node: Loaded, family: int) -> None:
    """By their identification: the pieces of two datagrams to two backends arrive mixed."""
    backends = {53: "local", 54: "local2"}
    for port, role in backends.items():
        node.put_frontend("vip", port, "udp", family, To(((role, 5353),)))
    datagrams = {
        port: _fragments(Packet("outside", 40000, "vip", port, "udp", ident=0x1000 + port)) for port in backends
    }
    for number in range(3):
        for port, role in backends.items():
            piece = datagrams[port][number]
            _passes(node, "ingress", piece, piece.but(destination=role, dport=5353), family)


@both_families
def test_an_identification_that_comes_round(node: Loaded, family: int) -> None:
    """IPv4 has 65536 of them: the pieces of a datagram that is no Service's do not follow an older one that was."""
    node.put_frontend("vip", 53, "udp", family, To((("local", 5353),)))
    ours = Packet("outside", 40000, "vip", 53, "udp")
    for piece in _fragments(ours):
        _passes(node, "ingress", piece, piece.but(destination="local", dport=5353), family)
    for piece in _fragments(ours.but(dport=54)):
        _passes(node, "ingress", piece, piece, family)
    inside = ours.but(destination="local", dport=5353)
    for piece, after in zip(_fragments(inside.reply()), _fragments(ours.reply()), strict=True):
        _passes(node, "egress", piece, after, family)
    for piece in _fragments(inside.reply().but(sport=5354)):
        _passes(node, "egress", piece, piece, family)


@both_families
def test_a_whole_packet_in_a_fragment_header_is_a_whole_packet(node: Loaded, family: int) -> None:
    """An atomic fragment (RFC 6946): offset 0 and no more to come."""
    node.put_frontend("vip", 53, "udp", family, To((("local", 5353),)))
    request = Packet("outside", 40000, "vip", 53, "udp", payload=b"x" * 16, fragment=(0, False))
    _passes(node, "ingress", request, request.but(destination="local", dport=5353), family)


# ---- ICMP errors about known flows


def _translated_error(
    node: Loaded,
    hook: str,
    kind: str,
    before: tuple[str, str, Packet],
    after: tuple[str, str, Packet],
    family: int,
    full: bool,
) -> None:
    """The error (outer source, outer destination, packet it is about) passes the hook and becomes the other one."""
    run = node.ingress if hook == "ingress" else node.egress
    frame = icmp_error(kind, *before, family, full=full)
    result = run(frame, family)
    assert result.verdict == UNSPEC
    wanted = icmp_error(kind, *after, family, full=full)
    assert_sound(result.frame, hook)
    if before[2].protocol == "tcp" and not full:
        assert_same(result.frame, wanted, hook)
        return
    # The quoted packet's own transport checksum is nobody's to verify: it is left as it was quoted.
    ip = 20 if family == 4 else 40
    inner = ETHERNET + ip + 8
    offset = inner + ip + (16 if before[2].protocol == "tcp" else 6)
    icmp = ETHERNET + ip + 2

    def blank(data: bytes) -> bytes:
        return data[:icmp] + b"\0\0" + data[icmp + 2 : offset] + b"\0\0" + data[offset + 2 :]

    assert_same(blank(result.frame), blank(wanted), hook)


@both_families
@both_protocols
@pytest.mark.parametrize("kind", ("too-big", "unreachable", "exceeded"))
@pytest.mark.parametrize("full", (False, True), ids=("8-bytes", "all"))
def test_icmp_error_about_a_request_reaches_the_client(
    node: Loaded, protocol: str, family: int, kind: str, full: bool
) -> None:
    """From the backend (port unreachable) or a router before it: the client sees an error about what it sent, from
    whom it asked (as conntrack does: a router's own address could be one that the client cannot have heard from)."""
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    for sender in ("remote", "node2"):
        _translated_error(
            node, "ingress", kind, (sender, "uplink", flow.beyond), (sender, "outside", flow.inside), family, full
        )
        _translated_error(
            node, "egress", kind, (sender, "outside", flow.inside), ("node", "outside", flow.request), family, full
        )
    assert node.counters() == {"PACKET_FORWARDED": 1, "ICMP_TRANSLATED": 4}


@both_families
@both_protocols
@pytest.mark.parametrize("kind", ("too-big", "unreachable", "exceeded"))
@pytest.mark.parametrize("full", (False, True), ids=("8-bytes", "all"))
def test_icmp_error_about_a_reply_reaches_the_backend(
    node: Loaded, protocol: str, family: int, kind: str, full: bool
) -> None:
    """Path MTU discovery of the answers: without it, downloads hang. The backend sees it from this node, since a
    router's address could fail its rp_filter."""
    _remote_nodeport(node, protocol, family)
    flow = _masqueraded(node, protocol, family)
    for sender in ("outside", "router"):
        _translated_error(
            node,
            "ingress",
            kind,
            (sender, "node", flow.request.reply()),
            (sender, "remote", flow.inside.reply()),
            family,
            full,
        )
        _translated_error(
            node,
            "egress",
            kind,
            (sender, "remote", flow.inside.reply()),
            ("uplink", "remote", flow.beyond.reply()),
            family,
            full,
        )
    assert node.counters() == {"PACKET_FORWARDED": 1, "ICMP_TRANSLATED": 4}


@both_families
@pytest.mark.parametrize("kind", ("too-big", "exceeded"))
def test_icmp_error_about_the_first_piece_of_a_reply(node: Loaded, family: int, kind: str) -> None:
    """A server that fragments by itself learns that its pieces are too long."""
    _remote_nodeport(node, "udp", family)
    flow = _masqueraded(node, "udp", family)
    ways = {
        "ingress": (("router", "node", flow.request.reply()), ("router", "remote", flow.inside.reply())),
        "egress": (("router", "remote", flow.inside.reply()), ("uplink", "remote", flow.beyond.reply())),
    }
    for hook, (before, after) in ways.items():
        pieces = [(*each[:2], _fragments(each[2])[0]) for each in (before, after)]
        run = node.ingress if hook == "ingress" else node.egress
        result = run(icmp_error(kind, *pieces[0], family, full=True), family)
        assert_sound(result.frame, hook)
        wanted = icmp_error(kind, *pieces[1], family, full=True)
        ip = 20 if family == 4 else 40
        inner = ETHERNET + ip + 8
        end = inner + ip + (8 if family == 6 else 0) + 4
        assert_same(result.frame[inner:end], wanted[inner:end], hook)
        assert_same(result.frame[: ETHERNET + ip], wanted[: ETHERNET + ip], hook)
    assert node.counters()["ICMP_TRANSLATED"] == 2


@both_families
def test_icmp_error_about_a_flow_without_masquerade(node: Loaded, family: int) -> None:
    node.put_frontend("vip", 53, "udp", family, To((("local", 5353),)))
    request = Packet("outside", 40000, "vip", 53, "udp", payload=b"query")
    inside = request.but(destination="local", dport=5353)
    _passes(node, "ingress", request, inside, family)
    error = icmp_error("unreachable", "local", "outside", inside, family)
    assert node.ingress(error, family).frame == error
    _translated_error(
        node, "egress", "unreachable", ("local", "outside", inside), ("vip", "outside", request), family, False
    )


@both_families
def test_a_cut_off_icmp_error_is_untouched(node: Loaded, family: int) -> None:
    """Fewer quoted bytes than the ports need."""
    node.put_frontend("vip", 53, "udp", family, To((("local", 5353),)))
    request = Packet("outside", 40000, "vip", 53, "udp", payload=b"query")
    inside = request.but(destination="local", dport=5353)
    _passes(node, "ingress", request, inside, family)
    ip = 20 if family == 4 else 40
    whole = icmp_error("unreachable", "local", "outside", inside, family)
    assert node.egress(whole, family).frame != whole
    for length in range(ip + 4):
        frame = bytearray(whole[: ETHERNET + ip + 8 + length])
        where = (ETHERNET + 2, ip + 8 + length) if family == 4 else (ETHERNET + 4, 8 + length)
        struct.pack_into("!H", frame, *where)
        result = node.egress(bytes(frame), family)
        assert (result.verdict, result.frame) == (UNSPEC, bytes(frame)), length
