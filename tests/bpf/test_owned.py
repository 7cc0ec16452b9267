"""Ports that a cluster IP does not have: refused on the packet paths, where nothing else would ever answer.

Rules of this file: an answer is judged by what a client's stack would make of it.
"""

from __future__ import annotations

import pytest

from tests.bpf.loaded import REDIRECT, UNSPEC, To
from tests.bpf.xdp_lab import WIRES, Lab
from tests.packets import ETHERNET, Packet, assert_same, assert_sound, icmp_error, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))


def refused(lab: Lab, packet: Packet, device: str = "up0") -> bytes:
    """XDP passes the packet up, tc answers it; the answer."""
    frame = bytes.fromhex(WIRES[device].mac.replace(":", "")) + packet.frame(lab.family)[6:]
    lab.passed_up(frame)
    ran = lab.tc("tc_ingress", frame, device)
    assert ran.verdict == REDIRECT, (ran.verdict, lab.node.counters())
    assert_sound(ran.frame)
    assert lab.node.flows() == []
    return ran.frame


def test_a_connection_gets_a_reset(lab: Lab) -> None:
    lab.node.put_owned("vip", lab.family)
    request = Packet("outside", 40000, "vip", 81, seq=7000)
    answer = parse(refused(lab, request))
    wanted = parse(request.reply().frame(lab.family))
    assert answer and wanted
    assert (answer.source, answer.destination, answer.ports) == (wanted.source, wanted.destination, wanted.ports)
    assert answer.protocol == 6
    assert lab.node.counters() == {"PACKET_UNDEFINED": 1, "PACKET_REJECTED_TCP": 1}


def test_a_datagram_gets_port_unreachable(lab: Lab) -> None:
    lab.node.put_owned("vip", lab.family)
    request = Packet("outside", 40000, "vip", 53, "udp", payload=b"who?")
    frame = refused(lab, request)
    answer = parse(frame)
    assert answer and answer.protocol == (1 if lab.family == 4 else 58)
    at = ETHERNET + (20 if lab.family == 4 else 40)
    assert tuple(frame[at : at + 2]) == ((3, 3) if lab.family == 4 else (1, 4))
    assert frame[at + 8 :] == request.inner(lab.family)[: len(frame) - at - 8]
    assert lab.node.counters() == {"PACKET_UNDEFINED": 1, "PACKET_REJECTED_ICMP": 1}


@both_protocols
def test_ports_that_it_has_are_served(lab: Lab, protocol: str) -> None:
    lab.node.put_owned("vip", lab.family)
    lab.node.put_frontend("vip", 80, protocol, lab.family, To((("local", 8080),)))
    frame = Packet("outside", 40000, "vip", 80, protocol).frame(lab.family)
    out = parse(lab.by_both(frame, by="pod0"))
    assert out and out.ports == (40000, 8080)
    refused_by = "udp" if protocol == "tcp" else "tcp"
    ran = lab.tc("tc_ingress", Packet("outside", 40000, "vip", 80, refused_by).frame(lab.family), "up0")
    assert ran.verdict == REDIRECT, "the same port of the other protocol"


@both_protocols
def test_a_pod_is_refused_too(lab: Lab, protocol: str) -> None:
    lab.node.put_owned("vip", lab.family)
    refused(lab, Packet("local", 40000, "vip", 81, protocol), "pod0")


@both_protocols
@pytest.mark.parametrize("role", ("lb", "node", "vip2"))
def test_other_addresses_are_left_alone(lab: Lab, protocol: str, role: str) -> None:
    """Load balancers' addresses and the node's own may have ports that are not ours."""
    lab.node.put_owned("vip", lab.family)
    lab.node.put_frontend("lb", 80, protocol, lab.family, To((("local", 8080),)))
    lab.node.put_frontend("node", 30080, protocol, lab.family, To((("local", 8080),)))
    frame = Packet("outside", 40000, role, 81, protocol).frame(lab.family)
    assert_same(lab.by_both(frame), frame)
    assert lab.node.counters() == {}


def test_a_connection_that_nobody_knows_is_refused_as_well(lab: Lab) -> None:
    """As a closed port would: any packet but a RST is answered by one."""
    lab.node.put_owned("vip", lab.family)
    refused(lab, Packet("outside", 40000, "vip", 81, flags="A", ack=5))


def test_beside_another_dataplane_its_connections_are_left_alone(lab: Lab) -> None:
    """What it carried is known to it alone; a new connection is refused."""
    lab.node.put_settings(flows_elsewhere=1)
    lab.node.put_owned("vip", lab.family)
    frame = Packet("outside", 40000, "vip", 81, flags="A").frame(lab.family)
    assert_same(lab.by_both(frame), frame)
    assert lab.node.counters() == {"PACKET_NOT_NEW": 1}
    ran = lab.tc("tc_ingress", Packet("outside", 40000, "vip", 81).frame(lab.family), "up0")
    assert ran.verdict == REDIRECT


def test_a_reset_is_not_answered(lab: Lab) -> None:
    """RFC 9293: or two of them would go on for ever."""
    lab.node.put_owned("vip", lab.family)
    frame = Packet("outside", 40000, "vip", 81, flags="R").frame(lab.family)
    lab.passed_up(frame)
    ran = lab.tc("tc_ingress", frame, "up0")
    assert ran.verdict != REDIRECT


def test_pings_and_errors_are_left_alone(lab: Lab) -> None:
    lab.node.put_owned("vip", lab.family)
    about = Packet("vip", 81, "outside", 40000)
    for frame in (
        Packet("outside", 0, "vip", 0, "echo").frame(lab.family),
        icmp_error("unreachable", "router", "vip", about, lab.family),
    ):
        assert_same(lab.by_both(frame), frame)


def test_a_later_fragment_is_left_alone(lab: Lab) -> None:
    """It has no port that could be asked for."""
    lab.node.put_owned("vip", lab.family)
    frame = Packet("outside", 40000, "vip", 53, "udp", payload=bytes(64), fragment=(64, False)).frame(lab.family)
    lab.passed_up(frame)
    ran = lab.tc("tc_ingress", frame, "up0")
    assert ran.verdict == UNSPEC
    assert_same(ran.frame, frame)


@both_protocols
def test_without_the_bit_of_known_addresses_nothing_is_looked_up(lab: Lab, protocol: str) -> None:
    """The control plane sets it before the first row and clears it after the last: programs go by it."""
    lab.node.put_owned("vip", lab.family)
    lab.node.put_frontend("lb", 80, protocol, lab.family, To((("local", 8080),)))
    lab.node.forget_known()
    for role, port in (("vip", 81), ("lb", 80)):
        frame = Packet("outside", 40000, role, port, protocol).frame(lab.family)
        assert_same(lab.by_both(frame), frame)
    assert lab.node.counters() == {}
