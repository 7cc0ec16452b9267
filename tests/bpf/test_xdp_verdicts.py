"""Verdicts under XDP: what rows refuse, drop, or allow to some only; and that tc says the same of the same frame.

Rules of this file: a refusal is tc's to answer, so that XDP passes the frame up as it came; silence is XDP's own.
"""

from __future__ import annotations

import pytest

from ebpflb.dataplane.bpf.constants import SOURCE_NODE, SOURCE_POD
from ebpflb.routes import Masquerade
from tests.bpf.loaded import DROP, REDIRECT, REJECT, SHOT, UNSPEC, XDP_DROP, XDP_PASS, To
from tests.bpf.xdp_lab import Lab
from tests.packets import Packet, address, assert_same, assert_sound, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)
SOME = To((("remote", 8080),), masquerade=Masquerade.ALWAYS, ranges=("203.0.113.5/32", "2001:db8:203::5/128"))
OTHERS = To((("remote", 8080),), masquerade=Masquerade.ALWAYS, ranges=("198.51.100.0/24",))


def answered(lab: Lab, packet: Packet) -> None:
    """XDP passes it up, and tc answers it: a connection by RST, a datagram by port unreachable."""
    frame = packet.frame(lab.family)
    lab.passed_up(frame)
    ran = lab.tc("tc_ingress", frame, "up0")
    assert ran.verdict == REDIRECT, (ran.verdict, lab.node.counters())
    assert_sound(ran.frame)
    answer = parse(ran.frame)
    assert answer and answer.protocol == (6 if packet.protocol == "tcp" else 1 if lab.family == 4 else 58)
    assert lab.node.flows() == []


def dropped(lab: Lab, packet: Packet, counted: str) -> None:
    """XDP drops it; tc would, too."""
    frame = packet.frame(lab.family)
    assert lab.xdp(frame).verdict == XDP_DROP, lab.node.counters()
    assert lab.node.counters() == {counted: 1, "XDP_DROPPED": 1}
    assert lab.tc("tc_ingress", frame, "up0").verdict == SHOT
    assert lab.node.counters() == {counted: 2, "XDP_DROPPED": 1}
    assert lab.node.flows() == []


@both_protocols
def test_no_endpoint(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, REJECT)
    answered(lab, Packet("outside", 40000, "lb", 80, protocol))


@both_protocols
def test_no_endpoint_on_this_node(lab: Lab, protocol: str) -> None:
    """externalTrafficPolicy Local: nodes without one say nothing."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE, DROP)
    dropped(lab, Packet("outside", 40000, "lb", 80, protocol), "PACKET_DROPPED")


@both_protocols
def test_a_tagged_frame_falls_under_the_same_verdict(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, DROP)
    assert lab.xdp(Packet("tagclient", 40000, "lb", 80, protocol, vlan=7).frame(lab.family)).verdict == XDP_DROP


@both_protocols
def test_the_scope_of_a_client(lab: Lab, protocol: str) -> None:
    """Pods and the node itself are inside, by their address, whatever device they come by; the latter is tc's, behind
    what the stack says of a packet from its own address."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE, DROP)
    bits = 32 if lab.family == 4 else 128
    lab.node.put_source(f"{address('outside', lab.family)}/{bits}", SOURCE_POD)
    lab.sent(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))
    lab.node.put_source(f"{address('outside', lab.family)}/{bits}", SOURCE_NODE)
    lab.by_both(Packet("outside", 40001, "lb", 80, protocol).frame(lab.family))
    assert lab.xdp(Packet("outside2", 40000, "lb", 80, protocol).frame(lab.family)).verdict == XDP_DROP


@both_protocols
def test_source_ranges(lab: Lab, protocol: str) -> None:
    """Who is in one is served, who is not gets no answer; not even where there is no endpoint."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, SOME)
    lab.node.put_frontend("vip", 80, protocol, lab.family, To(verdict=REJECT.verdict, ranges=SOME.ranges))
    lab.sent(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))
    answered_frame = Packet("outside", 40000, "vip", 80, protocol).frame(lab.family)
    lab.passed_up(answered_frame)
    assert lab.tc("tc_ingress", answered_frame, "up0").verdict == REDIRECT
    for role in ("lb", "vip"):
        frame = Packet("outside2", 40000, role, 80, protocol).frame(lab.family)
        assert lab.xdp(frame).verdict == XDP_DROP
        assert lab.tc("tc_ingress", frame, "up0").verdict == SHOT
    assert lab.node.counters()["PACKET_OUT_OF_RANGE"] == 4


@both_protocols
def test_source_ranges_of_the_other_family_only(lab: Lab, protocol: str) -> None:
    """Then nobody of this family is in one."""
    ranges = ("2001:db8::/32",) if lab.family == 4 else ("0.0.0.0/0",)
    to = To((("remote", 8080),), masquerade=Masquerade.ALWAYS, ranges=ranges)
    lab.node.put_frontend("lb", 80, protocol, lab.family, to)
    dropped(lab, Packet("outside", 40000, "lb", 80, protocol), "PACKET_OUT_OF_RANGE")


@both_protocols
def test_source_ranges_are_asked_of_new_flows_only(lab: Lab, protocol: str) -> None:
    """A Service whose ranges are narrowed keeps the flows that it has, on either path."""
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    lab.sent(request.frame(lab.family))
    lab.node.put_frontend("lb", 80, protocol, lab.family, OTHERS, service=service)
    lab.sent(request.but(flags="A").frame(lab.family))
    lab.by_stack(request.but(flags="A").frame(lab.family))
    assert lab.xdp(request.but(sport=40001).frame(lab.family)).verdict == XDP_DROP


@both_protocols
@pytest.mark.parametrize("broken", ("free", "absent"))
def test_a_route_whose_backend_is_not_there(lab: Lab, protocol: str, broken: str) -> None:
    """Counted once, by tc, and left alone."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, To(broken=broken, masquerade=Masquerade.ALWAYS))
    frame = Packet("outside", 40000, "lb", 80, protocol).frame(lab.family)
    lab.passed_up(frame)
    assert lab.node.counters() == {}
    assert_same(lab.entered(frame), frame)
    assert lab.node.counters() == {"PACKET_NO_BACKEND": 1}


@both_protocols
def test_the_nodes_own_loopback_asked_from_outside(lab: Lab, protocol: str) -> None:
    """A martian: the stack drops it."""
    loopback = "127.0.0.1" if lab.family == 4 else "::1"
    lab.node.put_frontend(loopback, 80, protocol, lab.family, REMOTE)
    lab.passed_up(Packet("outside", 40000, loopback, 80, protocol).frame(lab.family))
    assert lab.node.flows() == []


def test_a_connection_that_nobody_knows(lab: Lab) -> None:
    """No SYN, no row: after a table was lost it is given a backend again; beside another dataplane it is left alone."""
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    middle = Packet("outside", 40000, "lb", 80, flags="A")
    lab.node.put_settings(flows_elsewhere=1)
    lab.passed_up(middle.frame(lab.family))
    assert_same(lab.entered(middle.frame(lab.family)), middle.frame(lab.family))
    assert lab.node.counters() == {"PACKET_NOT_NEW": 1} and lab.node.flows() == []
    lab.node.put_settings()
    lab.sent(middle.frame(lab.family))


def test_a_connection_that_closes_as_it_is_dropped(lab: Lab) -> None:
    """Its verdict has become silence: the old flow does not lead what comes after a SYN."""
    service = lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80)
    lab.sent(request.frame(lab.family))
    lab.sent(request.but(flags="FA").frame(lab.family))
    lab.node.put_frontend("lb", 80, "tcp", lab.family, DROP, service=service)
    assert lab.xdp(request.frame(lab.family)).verdict == XDP_DROP
    assert lab.xdp(request.but(flags="A").frame(lab.family)).verdict == XDP_DROP


def test_a_closed_connection_that_is_refused(lab: Lab) -> None:
    service = lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80)
    lab.sent(request.frame(lab.family))
    lab.sent(request.but(flags="FA").frame(lab.family))
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REJECT, service=service)
    for flags in ("S", "A"):
        frame = request.but(flags=flags).frame(lab.family)
        lab.passed_up(frame)
        assert lab.tc("tc_ingress", frame, "up0").verdict == REDIRECT


@both_protocols
def test_masquerade_is_not_for_pods(lab: Lab, protocol: str) -> None:
    """Where routes spare pods, XDP leaves their packets to tc, which keeps their source."""
    to = To((("remote", 8080),), masquerade=Masquerade.NOT_POD)
    lab.node.put_frontend("lb", 80, protocol, lab.family, to)
    bits = 32 if lab.family == 4 else 128
    lab.node.put_source(f"{address('outside2', lab.family)}/{bits}", SOURCE_POD)
    lab.sent(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))
    request = Packet("outside2", 40000, "lb", 80, protocol)
    out = lab.by_both(request.frame(lab.family))
    assert_same(out, request.but(destination="remote", dport=8080).frame(lab.family))


@both_protocols
def test_a_backend_outside_that_asks_for_itself(lab: Lab, protocol: str) -> None:
    """Hairpin: it is masqueraded whatever the route says, or the reply would never come back."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, To((("remote", 8080),)))
    request = Packet("remote", 40000, "lb", 80, protocol)
    out = lab.sent(request.frame(lab.family))
    parsed = parse(out)
    assert parsed and parsed.ports and parsed.ports[1] == 8080
    inside = request.but(source="uplink", sport=parsed.ports[0], destination="remote", dport=8080)
    back = lab.sent(inside.reply().frame(lab.family))
    wanted = parse(request.reply(hops=63).frame(lab.family))
    assert parse(back) == wanted


def test_what_tc_would_say_of_a_frame_without_xdp(lab: Lab) -> None:
    """UNSPEC of all that is nobody's: the two paths' ways of saying so."""
    frame = Packet("outside", 1, "stranger", 80).frame(lab.family)
    assert lab.xdp(frame).verdict == XDP_PASS and lab.tc("tc_ingress", frame, "up0").verdict == UNSPEC
