"""Services change hands: from another dataplane to this one, and from this one to another.

Rules of this file: connections are real ones through the programs; who is not to break them is asked for each packet.
"""

from __future__ import annotations

import pytest

from ebpflb.ctnetlink import Answer, end
from ebpflb.dataplane.bpf import map_calls
from ebpflb.dataplane.bpf.maps import KernelMaps
from ebpflb.dataplane.bpf.retiring import flows_kept, leave
from ebpflb.dataplane.bpf.succeeding import spare_ports
from ebpflb.model import Protocol
from ebpflb.routes import Masquerade
from tests.bpf.loaded import SHOT, UNSNAT, UNSPEC, UPLINK, XDP_DROP, Loaded, To
from tests.bpf.xdp_lab import Lab, on_wire, sport_of
from tests.packets import Packet, address, assert_same, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_families = pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))
HOUR = 3600 * 1000  # jiffies, at most


def _maps(node: Loaded) -> KernelMaps:
    return KernelMaps({name: node.maps[name] for name in ("frontends", "owned", "known", "flows", "settings")})


def _nodeport(node: Loaded, protocol: str, family: int) -> Packet:
    node.put_frontend("node", 30081, protocol, family, To((("remote", 8080),), masquerade=Masquerade.NOT_POD))
    return Packet("outside", 40000, "node", 30081, protocol)


def _enters(node: Loaded, packet: Packet, after: Packet, family: int) -> None:
    result = node.ingress(packet.frame(family), family, UPLINK)
    assert result.verdict == UNSPEC, node.counters()
    assert_same(result.frame, after.frame(family))


def _now(node: Loaded) -> int:
    """Jiffies, as the last flow has seen them."""
    return max(row.seen for row in node.flows())


@both_families
def test_a_connection_that_another_dataplane_began_is_left_to_the_stack(node: Loaded, family: int) -> None:
    node.put_settings(flows_elsewhere=1)
    request = _nodeport(node, "tcp", family)
    for flags in ("PA", "A", "FA", "R"):
        packet = request.but(flags=flags, sport=40001)
        _enters(node, packet, packet, family)
    assert not node.flows()
    assert node.counters() == {"PACKET_NOT_NEW": 4}


@both_families
def test_new_connections_begin_here_from_the_first_syn_on(node: Loaded, family: int) -> None:
    node.put_settings(flows_elsewhere=1)
    request = _nodeport(node, "tcp", family)
    inside = {"destination": "remote", "dport": 8080}
    _enters(node, request, request.but(**inside), family)
    _enters(node, request.but(flags="PA"), request.but(flags="PA", **inside), family)


@both_families
def test_with_nobody_before_us_a_connection_that_is_not_known_gets_a_backend(node: Loaded, family: int) -> None:
    """Its row may have been evicted: with one backend it goes on, with several a refusal ends it at once."""
    request = _nodeport(node, "tcp", family).but(flags="PA")
    _enters(node, request, request.but(destination="remote", dport=8080), family)


def _conntracks(family: int, port: int) -> list[Answer]:
    """A connection to the backend that conntrack masquerades by one of our ports."""
    backend, node = (end(address(role, family), number) for role, number in (("remote", 8080), ("uplink", port)))
    return [Answer(Protocol.TCP, backend, node)]


@both_families
def test_a_port_that_conntrack_masquerades_by_is_not_given_out(node: Loaded, family: int) -> None:
    """Or the backend would take the new connection for the old one, which both would not survive."""
    settings = {"flows_elsewhere": 1, "refresh": 1 << 20}
    node.put_settings(snat_low=45000, snat_high=45000, **settings)
    assert spare_ports(_maps(node), _conntracks(family, 45000) + _conntracks(family, 44999), 45000, 45001) == 1
    request = _nodeport(node, "tcp", family)
    inside = request.but(destination="remote", dport=8080)
    _enters(node, request, inside, family)
    assert node.egress(inside.frame(family), family, UPLINK).verdict == SHOT
    node.put_settings(snat_low=45001, snat_high=45001, **settings)
    left = parse(node.egress(inside.frame(family), family, UPLINK).frame)
    assert left is not None and left.ports == (45001, 8080)
    second = inside.but(sport=40001)
    _enters(node, request.but(sport=40001), second, family)
    assert node.egress(second.frame(family), family, UPLINK).verdict == SHOT
    assert node.counters()["PACKET_NO_PORT"] == 2


@both_families
@pytest.mark.parametrize("flags", ("SA", "A", "PA", "FA", "R"))
def test_answers_to_such_a_port_are_left_to_conntrack(node: Loaded, family: int, flags: str) -> None:
    node.put_settings(flows_elsewhere=1, snat_low=45000, snat_high=45001)
    spare_ports(_maps(node), _conntracks(family, 45000), 45000, 45001)
    request = _nodeport(node, "tcp", family)
    _enters(node, request, request.but(destination="remote", dport=8080), family)
    node.egress(request.but(destination="remote", dport=8080).frame(family), family, UPLINK)
    answer = Packet("remote", 8080, "uplink", 45000, "tcp", flags=flags)
    _enters(node, answer, answer, family)


@both_families
def test_a_retired_dataplane_keeps_its_connections_and_begins_none(node: Loaded, family: int) -> None:
    request = _nodeport(node, "tcp", family)
    inside = {"destination": "remote", "dport": 8080}
    _enters(node, request, request.but(**inside), family)

    assert leave(_maps(node)) == 1
    assert leave(_maps(node)) == 0
    _enters(node, request.but(flags="PA"), request.but(flags="PA", **inside), family)
    other = request.but(sport=40002)
    _enters(node, other, other, family)
    assert flows_kept(_maps(node), _now(node), HOUR) == 1


@both_families
def test_a_connection_is_kept_until_it_is_closed(node: Loaded, family: int) -> None:
    request = _nodeport(node, "tcp", family)
    inside = {"destination": "remote", "dport": 8080}
    _enters(node, request, request.but(**inside), family)
    leave(_maps(node))
    _enters(node, request.but(flags="FA"), request.but(flags="FA", **inside), family)
    assert flows_kept(_maps(node), _now(node), HOUR) == 0


def test_a_connection_that_nobody_has_used_for_long_is_not_kept(node: Loaded) -> None:
    request = _nodeport(node, "tcp", 4)
    _enters(node, request, request.but(destination="remote", dport=8080), 4)
    now = _now(node)
    assert flows_kept(_maps(node), now + HOUR, HOUR) == 1
    assert flows_kept(_maps(node), now + HOUR + 1, HOUR) == 0
    assert flows_kept(_maps(node), (now + HOUR) & 0xFFFFFFFF, HOUR) == 1, "a count that has wrapped round"
    assert flows_kept(_maps(node), now - 1, HOUR) == 1, "a packet has come since the time was asked for"


def test_datagrams_do_not_keep_a_retired_dataplane(node: Loaded) -> None:
    """Their next one finds a backend by the successor."""
    request = _nodeport(node, "udp", 4)
    _enters(node, request, request.but(destination="remote", dport=8080), 4)
    leave(_maps(node))
    assert flows_kept(_maps(node), _now(node), HOUR) == 0
    assert map_calls.lookup_all(node.maps["frontends"])[2] == 0


def _masqueraded(node: Loaded, request: Packet, family: int) -> tuple[Packet, Packet]:
    """The request as it leaves, and its answer as it leaves to the client; both have passed."""
    inside = request.but(destination="remote", dport=8080)
    _enters(node, request, inside, family)
    left = node.egress(inside.frame(family), family, UPLINK)
    parsed = parse(left.frame)
    assert left.verdict == UNSPEC and parsed is not None and parsed.ports is not None
    return inside.but(source="uplink", sport=parsed.ports[0]), inside.reply()


def _leaves(node: Loaded, packet: Packet, family: int) -> None:
    """A packet that is not ours leaves as it came."""
    result = node.egress(packet.frame(family), family, UPLINK)
    assert result.verdict == UNSPEC
    assert_same(result.frame, packet.frame(family))


@both_families
def test_a_port_that_the_successor_gives_out_is_no_longer_that_of_an_ended_flow(node: Loaded, family: int) -> None:
    """conntrack knows nothing of our ports; its answers would go to whoever had the port before."""
    for protocol in ("tcp", "udp"):
        request = _nodeport(node, protocol, family)
        beyond, answer = _masqueraded(node, request, family)
        _enters(node, beyond.reply(), answer, family)
        if protocol == "tcp":
            _enters(node, request.but(flags="FA"), request.but(flags="FA", destination="remote", dport=8080), family)
        leave(_maps(node))
        _leaves(node, beyond, family)  # by conntrack's choice, of the same port
        _enters(node, beyond.reply(), beyond.reply(), family)
        assert not [row for row in node.flows() if row.action == UNSNAT]


@both_families
def test_a_connection_that_goes_on_keeps_its_port(node: Loaded, family: int) -> None:
    request = _nodeport(node, "tcp", family)
    beyond, answer = _masqueraded(node, request, family)
    leave(_maps(node))
    _leaves(node, beyond, family)
    _enters(node, beyond.reply(), answer, family)


@both_families
def test_a_port_that_a_client_uses_again_is_the_successors_from_the_syn_on(node: Loaded, family: int) -> None:
    request = _nodeport(node, "tcp", family)
    inside = {"destination": "remote", "dport": 8080}
    _enters(node, request, request.but(**inside), family)
    _enters(node, request.but(flags="FA"), request.but(flags="FA", **inside), family)
    leave(_maps(node))
    for flags in ("S", "A", "PA"):
        _enters(node, request.but(flags=flags), request.but(flags=flags), family)


# ---- With XDP before tc


def _sent_by_xdp(lab: Lab, protocol: str) -> tuple[Packet, Packet]:
    """A request that XDP has sent, and what its backend sees."""
    request = _nodeport(lab.node, protocol, lab.family)
    out = lab.sent(request.frame(lab.family))
    return request, request.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)


def test_xdp_gives_out_no_port_that_conntrack_masquerades_by(lab: Lab) -> None:
    settings = {"flows_elsewhere": 1, "refresh": 1 << 20}
    lab.node.put_settings(snat_low=45000, snat_high=45000, **settings)
    assert spare_ports(_maps(lab.node), _conntracks(lab.family, 45000), 45000, 45001) == 1
    assert lab.xdp(_nodeport(lab.node, "tcp", lab.family).frame(lab.family)).verdict == XDP_DROP
    lab.node.put_settings(snat_low=45001, snat_high=45001, **settings)
    request, inside = _sent_by_xdp(lab, "tcp")
    assert inside.sport == 45001
    assert lab.xdp(request.but(sport=40001).frame(lab.family)).verdict == XDP_DROP
    lab.passed_up(Packet("remote", 8080, "uplink", 45000, flags="SA").frame(lab.family))


def test_a_connection_that_another_dataplane_began_is_passed_up(lab: Lab) -> None:
    lab.node.put_settings(flows_elsewhere=1)
    request = _nodeport(lab.node, "tcp", lab.family)
    for flags in ("PA", "A", "FA", "R"):
        lab.passed_up(request.but(flags=flags).frame(lab.family))
    assert not lab.node.flows()


def test_connections_of_xdps_outlive_a_retirement(lab: Lab) -> None:
    """By XDP, and by tc alone once XDP is gone; new ones are the successor's."""
    request, inside = _sent_by_xdp(lab, "tcp")
    assert leave(_maps(lab.node)) == 1
    assert flows_kept(_maps(lab.node), _now(lab.node), HOUR) == 1
    more = request.but(flags="PA")
    assert_same(lab.sent(more.frame(lab.family))[34:], inside.but(flags="PA", hops=63).frame(lab.family)[34:])
    assert_same(lab.by_stack(more.frame(lab.family)), inside.but(flags="PA").frame(lab.family))
    assert_same(lab.by_stack(inside.reply().frame(lab.family)), request.reply().frame(lab.family))
    other = request.but(sport=40002).frame(lab.family)
    assert_same(lab.by_both(other), other)
    lab.sent(request.but(flags="FA").frame(lab.family))
    assert flows_kept(_maps(lab.node), _now(lab.node), HOUR) == 0
    again = request.frame(lab.family)
    assert_same(lab.by_both(again), again)


def test_a_living_connection_of_xdps_keeps_its_port(lab: Lab) -> None:
    """The successor's conntrack happens on the same one for a new connection."""
    request, inside = _sent_by_xdp(lab, "tcp")
    leave(_maps(lab.node))
    assert_same(lab.left(inside.frame(lab.family)), inside.frame(lab.family))
    wanted = on_wire(request.reply(), lab.family, "up0", "outside")
    assert_same(lab.sent(inside.reply().frame(lab.family)), wanted)
    lab.sent(request.but(flags="FA").frame(lab.family))
    assert_same(lab.left(inside.frame(lab.family)), inside.frame(lab.family))
    lab.passed_up(inside.reply().frame(lab.family))
