"""Packets that no machine outside can have sent: XDP, which has no rp_filter behind it, sends none of them on.

Rules of this file: such a frame is passed up as it came and leaves nothing behind, for the stack to drop and to count.
"""

from __future__ import annotations

import pytest

from ebpflb.dataplane.bpf.constants import SOURCE_NODE
from ebpflb.routes import Masquerade
from tests.bpf.loaded import DROP, REJECT, UNSPEC, To
from tests.bpf.xdp_lab import Lab
from tests.packets import Packet, address, assert_same

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)

IMPOSSIBLE = {
    "unspecified": ("0.0.0.0", "::"),
    "this network": ("0.1.2.3", "::"),
    "loopback": ("127.0.0.1", "::1"),
    "loopback's network": ("127.8.9.10", "::1"),
    "multicast": ("224.0.0.251", "ff02::fb"),
    "all multicast": ("239.255.255.255", "ff0e::1"),
    "broadcast": ("255.255.255.255", "ff02::1"),
    "a link's own": ("255.255.255.255", "fe80::5"),
}
"""Sources that the kernel never takes from a wire or never forwards, IPv4 and IPv6."""


@both_protocols
@pytest.mark.parametrize("source", tuple(IMPOSSIBLE))
def test_a_source_that_nobody_has(lab: Lab, protocol: str, source: str) -> None:
    """A backend must not answer to it through this node, whose stack would take what XDP hands up for a neighbour's."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    frame = Packet(IMPOSSIBLE[source][lab.family == 6], 40000, "lb", 80, protocol).frame(lab.family)
    lab.passed_up(frame)
    assert lab.node.flows() == []
    assert lab.node.counters() == {}


@both_protocols
def test_a_source_that_is_this_nodes_own(lab: Lab, protocol: str) -> None:
    """Else the backend's answer would be handed to a socket of the node that never asked."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    lab.node.put_source(f"{address('node', lab.family)}/{32 if lab.family == 4 else 128}", SOURCE_NODE)
    lab.passed_up(Packet("node", 40000, "lb", 80, protocol).frame(lab.family))
    assert lab.node.flows() == []


@both_protocols
@pytest.mark.parametrize("source", ("unspecified", "loopback", "multicast", "broadcast"))
@pytest.mark.parametrize("to", (REJECT, DROP), ids=("reject", "drop"))
def test_what_nobody_has_sent_is_not_answered(lab: Lab, protocol: str, source: str, to: To) -> None:
    """RFC 1122, 3.2.2: no error about a datagram whose source is not a single host; nor a RST."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, to)
    frame = Packet(IMPOSSIBLE[source][lab.family == 6], 40000, "lb", 80, protocol).frame(lab.family)
    lab.passed_up(frame)
    ran = lab.tc("tc_ingress", frame, "up0")
    assert ran.verdict == UNSPEC, lab.node.counters()
    assert_same(ran.frame, frame, "left to the stack")


@both_protocols
@pytest.mark.parametrize("ends", ("destination", "both"))
def test_ipv4_addresses_in_an_ipv6_header(lab: Lab, protocol: str, ends: str) -> None:
    """::ffff:a.b.c.d is how rows write IPv4; on a wire it is nobody's (RFC 4291, 2.5.5.2), and no IPv4 flow's."""
    lab.clear(0)
    lab.node.put_frontend("lb", 80, protocol, 4, REMOTE)
    lab.node.put_frontend("lb", 81, protocol, 4, REJECT)
    source = "::ffff:" + address("outside", 4) if ends == "both" else "outside"
    mapped = Packet(source, 40000, "::ffff:" + address("lb", 4), 80, protocol)
    lab.sent(Packet("outside", 40000, "lb", 80, protocol).frame(4))
    rows = lab.node.flows()
    for packet in (mapped, mapped.but(flags="R"), mapped.but(dport=81)):
        lab.passed_up(packet.frame(6))
        assert_same(lab.entered(packet.frame(6)), packet.frame(6))
        assert_same(lab.left(packet.frame(6)), packet.frame(6))
    assert lab.node.flows() == rows
