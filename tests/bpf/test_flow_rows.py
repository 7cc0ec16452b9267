"""Rows of flows that are not as they were left: evicted, written by another CPU, or of a client that has gone.

Rules of this file: what the kernel or time would do to rows is written into them; then packets pass, and both
directions are looked at, since half a flow is none. Nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ebpflb.dataplane.bpf import map_calls
from ebpflb.routes import Masquerade
from tests.bpf.loaded import (
    CLOSING,
    DNAT,
    SECOND,
    SHOT,
    SNAT,
    UNDNAT,
    UNSNAT,
    UNSPEC,
    XDP_DROP,
    XDP_PASS,
    XDP_TX,
    To,
)
from tests.bpf.test_xdp_flows import inside_of
from tests.bpf.xdp_lab import Lab, on_wire, sport_of
from tests.packets import Packet, assert_same, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))
both_paths = pytest.mark.parametrize("by", ("xdp", "tc"))

REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)
EITHER = To((("remote", 8080), ("remote", 8081)), masquerade=Masquerade.ALWAYS)
PLAIN = To((("local", 8080),))
MINUTE = 60 * SECOND
"""Jiffies, as rows of tests have them."""


def change(lab: Lab, *actions: int, ago: int | None = None, gone: bool = False, sport: int | None = None) -> None:
    """The rows of these actions (of all, without any) were used `ago` jiffies before now, or are gone. `sport` is the
    source port of the rows that are meant."""
    fd = lab.node.maps["flows"]
    key, value = lab.node.packer("flows", key=True), lab.node.packer("flows")
    seen = value.layout.field("seen")
    keys, values, count = map_calls.lookup_all(fd)
    for at in range(count):
        name = keys[at * key.layout.size : (at + 1) * key.layout.size]
        row = bytearray(values[at * value.layout.size : (at + 1) * value.layout.size])
        if actions and value.get(bytes(row), "action") not in actions:
            continue
        if sport is not None and key.get(name, "source_port") != sport:
            continue
        if gone:
            map_calls.delete(fd, name)
        if ago is not None:
            now = value.get(bytes(row), "seen")
            row[seen.offset : seen.offset + 8] = ((now - ago) % (1 << 64)).to_bytes(8, "little")
            map_calls.update(fd, name, bytes(row))


def way_of(lab: Lab, by: str) -> Callable[[bytes], bytes]:
    return lab.sent if by == "xdp" else lab.by_stack


def actions(lab: Lab) -> list[int]:
    return [row.action for row in lab.node.flows()]


# ---- Eviction: any row can go


@both_protocols
@both_paths
@pytest.mark.parametrize("begun", ("xdp", "tc"))
@pytest.mark.parametrize("gone", (DNAT, SNAT, UNSNAT, UNDNAT), ids=("enters", "leaves", "reply-enters", "reply-leaves"))
def test_the_next_request_makes_good_what_was_evicted(lab: Lab, protocol: str, begun: str, by: str, gone: int) -> None:
    """And nothing leaves half translated meanwhile; replies find back to the client, by either path."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    way_of(lab, begun)(request.frame(lab.family))
    change(lab, ago=3 * MINUTE)  # nothing has passed for a while
    change(lab, gone, gone=True)
    more = request.but(flags="A", payload=b"more")
    inside = inside_of(more, way_of(lab, by)(more.frame(lab.family)), "remote")
    assert inside.source == "uplink"
    for _ in range(2):
        wanted = on_wire(more.reply(), lab.family, "up0", "outside")
        assert_same(lab.sent(inside.reply().frame(lab.family)), wanted, "reply by XDP")
        assert_same(lab.by_stack(inside.reply().frame(lab.family)), more.reply().frame(lab.family), "reply by tc")
        assert_same(lab.by_stack(more.frame(lab.family)), inside.frame(lab.family), "request by tc")
        assert_same(lab.sent(more.frame(lab.family)), on_wire(inside, lab.family, "up0", "remote"), "request by XDP")


@both_protocols
def test_the_leaving_row_of_a_flow_without_masquerade_is_made_good(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, PLAIN)
    request = Packet("outside", 40000, "lb", 80, protocol)
    inside = request.but(destination="local", dport=8080)
    assert_same(lab.by_stack(request.frame(lab.family), by="pod0"), inside.frame(lab.family))
    change(lab, ago=3 * MINUTE)
    change(lab, UNDNAT, gone=True)
    lab.by_stack(request.but(flags="A").frame(lab.family), by="pod0")
    out = lab.by_stack(inside.reply().frame(lab.family), "pod0", "up0")
    assert_same(out, request.reply().frame(lab.family))


@both_protocols
def test_the_row_of_a_changed_client_port_is_made_good(lab: Lab, protocol: str) -> None:
    """Two frontends with one backend, one client port: the second flow's replies lead to the port of the client."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, PLAIN)
    lab.node.put_frontend("vip", 80, protocol, lab.family, PLAIN)
    first, second = (Packet("outside", 40000, role, 80, protocol) for role in ("lb", "vip"))
    lab.by_stack(first.frame(lab.family), by="pod0")
    parsed = parse(lab.by_stack(second.frame(lab.family), by="pod0"))
    assert parsed and parsed.ports and parsed.ports[0] != 40000
    inside = second.but(destination="local", dport=8080, sport=parsed.ports[0])
    change(lab, ago=3 * MINUTE)
    change(lab, UNDNAT, gone=True)
    for request in (second, first):
        lab.by_stack(request.but(flags="A").frame(lab.family), by="pod0")
    out = lab.by_stack(inside.reply().frame(lab.family), "pod0", "up0")
    assert_same(out, second.reply().frame(lab.family))


@both_protocols
@both_paths
@pytest.mark.parametrize("port", (40000, 41000), ids=("same-port", "other-port"))
def test_a_port_that_has_become_anothers_while_its_row_was_gone(lab: Lab, protocol: str, by: str, port: int) -> None:
    """The older client does not go on into the newer one's connection, nor get its answers."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, refresh=SECOND)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    old = Packet("outside", 40000, "lb", 80, protocol)
    new = Packet("outside2", port, "lb", 80, protocol)
    way_of(lab, by)(old.frame(lab.family))
    change(lab, ago=3 * MINUTE)
    change(lab, UNSNAT, gone=True)
    inside = inside_of(new, lab.sent(new.frame(lab.family)), "remote")
    lab.node.put_settings(snat_low=50000, snat_high=50100)
    moved = way_of(lab, by)(old.but(flags="A").frame(lab.family))
    assert sport_of(moved) != 50000
    assert_same(lab.sent(inside.reply().frame(lab.family)), on_wire(new.reply(), lab.family, "up0", "outside2"))
    back = inside_of(old, moved, "remote")
    assert_same(lab.sent(back.reply().frame(lab.family)), on_wire(old.reply(), lab.family, "up0", "outside"))


@both_protocols
@both_paths
def test_who_has_retired_does_not_take_back_a_port(lab: Lab, protocol: str, by: str) -> None:
    """It has given way to the successor's conntrack, and the client's next packet is the successor's, too."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    way_of(lab, by)(request.frame(lab.family))
    lab.node.put_settings(retired=1)
    lab.node.forget("frontends")
    change(lab, ago=3 * MINUTE)
    change(lab, UNSNAT, gone=True)
    late = request.but(flags="A").frame(lab.family)
    assert_same(lab.by_both(late) if by == "xdp" else lab.by_stack(late), late)
    assert UNSNAT not in actions(lab)


def test_a_flow_in_use_is_not_looked_after_with_every_packet(lab: Lab) -> None:
    """Once a `refresh` is enough: a missing row is not noticed before."""
    lab.node.put_settings(refresh=1 << 20)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, "udp")
    lab.sent(request.frame(lab.family))
    change(lab, UNSNAT, gone=True)
    lab.sent(request.frame(lab.family))
    assert actions(lab) == [DNAT]


# ---- Use by one path, as the other sees it


def test_a_datagram_flow_that_xdp_carries_keeps_its_place_under_tc(lab: Lab) -> None:
    """tc began it, XDP has carried it since. Another frontend's flow from the same client port, to the same backend,
    must not take the row by which tc sends its replies back."""
    lab.node.put_settings(flow_idle=MINUTE)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    lab.node.put_frontend("vip", 80, "udp", lab.family, REMOTE)
    first, second = (Packet("outside", 40000, role, 80, "udp") for role in ("lb", "vip"))
    inside = inside_of(first, lab.by_stack(first.frame(lab.family)), "remote")
    for _ in range(3):
        change(lab, ago=MINUTE // 2)
        assert_same(lab.sent(first.frame(lab.family)), on_wire(inside, lab.family, "up0", "remote"))
        assert_same(lab.sent(inside.reply().frame(lab.family)), on_wire(first.reply(), lab.family, "up0", "outside"))

    other = inside_of(second, lab.by_stack(second.frame(lab.family)), "remote")
    for request, beyond in ((first, inside), (second, other)):
        assert_same(lab.by_stack(request.frame(lab.family)), beyond.frame(lab.family), "request")
        assert_same(lab.by_stack(beyond.reply().frame(lab.family)), request.reply().frame(lab.family), "reply")


def test_datagrams_that_only_the_server_sends_by_xdp_keep_their_place(lab: Lab) -> None:
    lab.node.put_settings(flow_idle=MINUTE)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    lab.node.put_frontend("vip", 80, "udp", lab.family, REMOTE)
    first, second = (Packet("outside", 40000, role, 80, "udp") for role in ("lb", "vip"))
    inside = inside_of(first, lab.by_stack(first.frame(lab.family)), "remote")
    for _ in range(3):
        change(lab, ago=MINUTE // 2)
        lab.sent(inside.reply().frame(lab.family))
    lab.by_stack(second.frame(lab.family))
    assert_same(lab.by_stack(inside.reply().frame(lab.family)), first.reply().frame(lab.family), "reply")


@both_paths
def test_a_direct_datagram_beside_a_flow_that_nobody_answers(lab: Lab, by: str) -> None:
    """Logs to a Service and to one of its backends, from one socket: the first ones go on masqueraded."""
    lab.node.put_settings(flow_idle=MINUTE)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, "udp")
    inside = inside_of(request, lab.by_stack(request.frame(lab.family)), "remote")
    for _ in range(3):
        change(lab, ago=MINUTE // 2)
        way_of(lab, by)(request.frame(lab.family))
    direct = Packet("outside", 40000, "remote", 8080, "udp")
    lab.by_stack(direct.frame(lab.family))
    assert_same(lab.by_stack(request.frame(lab.family)), inside.frame(lab.family), "still masqueraded")


def test_the_servers_end_is_known_where_replies_leave(lab: Lab) -> None:
    """Seen by XDP, of a connection that tc began: the client may use its port for another frontend of that backend."""
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80)
    inside = inside_of(request, lab.by_stack(request.frame(lab.family)), "remote")
    lab.sent(inside.reply().but(flags="FA").frame(lab.family))
    lab.sent(request.but(flags="FA").frame(lab.family))
    assert {row.action for row in lab.node.flows() if row.flags & CLOSING} >= {DNAT, UNSNAT, UNDNAT}


# ---- Clocks: another CPU has read a later time


@both_paths
def test_a_row_that_was_used_later_than_now_is_in_use(lab: Lab, by: str) -> None:
    """`now` is read before the row: another CPU may have written the next jiffy into it since."""
    lab.node.put_settings(flow_idle=MINUTE)
    lab.node.put_frontend("lb", 80, "udp", lab.family, EITHER)
    request = Packet("outside", 40000, "lb", 80, "udp")
    out = way_of(lab, by)(request.frame(lab.family))
    for _ in range(20):
        change(lab, ago=-MINUTE)
        assert_same(way_of(lab, by)(request.frame(lab.family)), out)
    assert "FLOW_STALE" not in lab.node.counters()


@both_paths
def test_a_port_that_was_used_later_than_now_is_not_free(lab: Lab, by: str) -> None:
    lab.node.put_settings(snat_low=50000, snat_high=50000, flow_idle=MINUTE)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    lab.sent(Packet("outside", 40000, "lb", 80, "udp").frame(lab.family))
    change(lab, ago=-MINUTE)
    frame = Packet("outside2", 41000, "lb", 80, "udp").frame(lab.family)
    verdict = lab.xdp(frame).verdict if by == "xdp" else lab.tc("tc_egress", lab.entered(frame), "up0").verdict
    assert verdict == (XDP_DROP if by == "xdp" else SHOT)


@both_protocols
def test_a_client_that_was_kept_later_than_now_is_kept(lab: Lab, protocol: str) -> None:
    """Two connections of a client at once, on two CPUs."""
    many = To(tuple(("remote", 8000 + number) for number in range(16)), masquerade=Masquerade.ALWAYS, affinity=60)
    lab.node.put_frontend("lb", 80, protocol, lab.family, many)
    chosen = set()
    for number in range(12):
        out = parse(lab.sent(Packet("outside", 40000 + number, "lb", 80, protocol).frame(lab.family)))
        assert out and out.ports
        chosen.add(out.ports[1])
        lab.node.age_clients(-1)
    assert len(chosen) == 1


# ---- A port that somebody else of the node has taken meanwhile


@both_protocols
def test_a_masqueraded_packet_that_leaves_by_two_devices_is_masqueraded_once(lab: Lab, protocol: str) -> None:
    """As by a macvlan and the device under it, which has another address: it is no stranger with the flow's port."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    for flags in ("S", "A"):
        out = lab.by_stack(request.but(flags=flags).frame(lab.family))
        assert_same(lab.left(out, "up1"), out, "at the second device")
    inside = inside_of(request, out, "remote")
    assert_same(lab.by_stack(inside.reply().frame(lab.family)), request.reply().frame(lab.family))


def test_the_port_that_a_stranger_got_comes_back(lab: Lab) -> None:
    """When its conversation is over in both directions, and not before."""
    lab.node.put_settings(snat_low=50000, snat_high=50001, refresh=SECOND)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    inside = inside_of(OLD, lab.by_stack(OLD.frame(lab.family)), "remote")
    lab.by_stack(OLD.but(flags="A").frame(lab.family))
    stranger = inside.but(flags="S", payload=b"mine")
    for _ in range(50):  # a packet's random tries miss the free one of two ports once in some thousand
        ran = lab.tc("tc_egress", stranger.frame(lab.family), "up0")
        if ran.verdict == UNSPEC:
            break
    other = stranger.but(sport=sport_of(ran.frame))
    assert other.sport == 100001 - inside.sport
    change(lab, ago=2 * MINUTE)
    assert not given(lab, "xdp", NEXT)
    lab.left(stranger.but(flags="FA").frame(lab.family))
    lab.entered(other.reply().but(flags="FA").frame(lab.family))
    assert not given(lab, "xdp", NEXT)
    change(lab, ago=2 * MINUTE)
    lab.node.put_settings(snat_low=other.sport, snat_high=other.sport, refresh=SECOND)
    assert given(lab, "xdp", NEXT.but(sport=41001))


# ---- Ports of clients that have gone


def given(lab: Lab, by: str, packet: Packet) -> bool:
    """Whether a new flow gets a port."""
    frame = packet.frame(lab.family)
    if by == "xdp":
        verdict = lab.xdp(frame).verdict
        assert verdict in (XDP_TX, XDP_DROP, XDP_PASS)
        return verdict == XDP_TX
    return lab.tc("tc_egress", lab.entered(frame), "up0").verdict == UNSPEC


NEXT = Packet("outside2", 41000, "lb", 80)
OLD = Packet("outside", 40000, "lb", 80)
HOURS = 124 * MINUTE
"""RFC 5382, REQ-5: what an idle connection has at least."""


@both_paths
@pytest.mark.parametrize("answered", (False, True), ids=("no-answer", "answered"))
def test_a_port_of_a_connection_that_never_came_about_is_given_out_again(lab: Lab, by: str, answered: bool) -> None:
    """Or some ten thousand forged SYNs would take every port to a backend for good."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, refresh=SECOND)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    way = way_of(lab, by)
    inside = inside_of(OLD, way(OLD.frame(lab.family)), "remote")
    if answered:
        way(inside.reply().frame(lab.family))
    assert not given(lab, by, NEXT)
    change(lab, ago=2 * MINUTE)
    assert given(lab, by, NEXT.but(sport=41001))


@both_paths
def test_a_port_of_a_connection_that_has_come_about_is_kept_for_two_hours(lab: Lab, by: str) -> None:
    """A client that has vanished says no FIN; one that sleeps neither."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, refresh=SECOND)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    way = way_of(lab, by)
    inside = inside_of(OLD, way(OLD.frame(lab.family)), "remote")
    way(inside.reply().frame(lab.family))
    way(OLD.but(flags="A").frame(lab.family))
    change(lab, ago=HOURS - MINUTE)
    assert not given(lab, by, NEXT)
    change(lab, ago=2 * MINUTE)
    assert given(lab, by, NEXT.but(sport=41001))


@both_paths
@pytest.mark.parametrize("used", (DNAT, UNSNAT), ids=("requests", "replies"))
def test_a_connection_that_is_used_in_one_direction_keeps_its_port(lab: Lab, by: str, used: int) -> None:
    lab.node.put_settings(snat_low=50000, snat_high=50000, refresh=SECOND)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    way = way_of(lab, by)
    way(OLD.frame(lab.family))
    way(OLD.but(flags="A").frame(lab.family))
    change(lab, *({DNAT, SNAT, UNSNAT, UNDNAT} - {used}), ago=2 * HOURS)
    assert not given(lab, by, NEXT)


@both_paths
def test_where_ports_are_scarce_datagrams_keep_theirs_for_half_a_minute(lab: Lab, by: str) -> None:
    """And not for two: a node would serve some 240 clients a second only, each with one question for one backend."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, flow_idle=2 * MINUTE)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    way_of(lab, by)(OLD.but(protocol="udp").frame(lab.family))
    change(lab, ago=MINUTE // 2 - 5 * SECOND)
    assert not given(lab, by, NEXT.but(protocol="udp"))
    change(lab, ago=10 * SECOND)
    assert given(lab, by, NEXT.but(protocol="udp", sport=41001))
