"""The life of flows under XDP and tc together: whoever begins one, the other goes on with the same translation, and
both agree on when it is over.

Rules of this file: time is written into rows, nothing waits. "By tc" is a frame that XDP passes up (here: any, since a
test may simply not run XDP on it, as a node does whose XDP was switched off).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ebpflb.dataplane.bpf import facts, map_calls
from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.demo import namespaces
from ebpflb.routes import Masquerade
from tests.bpf.loaded import (
    CLOSING,
    DNAT,
    SHORT,
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
from tests.bpf.xdp_lab import WIRES, Lab, laboratory, on_wire, sport_of
from tests.packets import Packet, address, assert_same, icmp_error, packed, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)
ELSEWHERE = To((("remote2", 8080),), masquerade=Masquerade.ALWAYS)
LONG = 1 << 20
"""Jiffies: no test takes as long."""
EITHER = To((("remote", 8080), ("remote2", 8080)), masquerade=Masquerade.ALWAYS)


def inside_of(request: Packet, out: bytes, backend: str = "") -> Packet:
    """The request as its backend sees it: the port is that of the frame which left."""
    parsed = parse(out)
    assert parsed and parsed.ports
    role = backend or next(each for each in ("remote", "remote2") if parsed.destination == packed(each, parsed.family))
    return request.but(source="uplink", sport=parsed.ports[0], destination=role, dport=parsed.ports[1])


def rows(lab: Lab, action: int) -> list[tuple[str, int]]:
    return [(row.address, row.flags) for row in lab.node.flows() if row.action == action]


def age(lab: Lab, *actions: int) -> None:
    """The rows of these actions were used last when the machine was started."""
    fd = lab.node.maps["flows"]
    value = lab.node.packer("flows")
    seen = value.layout.field("seen")
    action = value.layout.field("action").offset
    keys, values, count = map_calls.lookup_all(fd)
    size, key_size = value.layout.size, lab.node.packer("flows", key=True).layout.size
    for at in range(count):
        row = bytearray(values[at * size : (at + 1) * size])
        if row[action] in actions:
            row[seen.offset : seen.offset + 8] = bytes(8)
            map_calls.update(fd, keys[at * key_size : (at + 1) * key_size], bytes(row))


# ---- Who begins, and who goes on


@both_protocols
def test_a_flow_that_tc_began_goes_on_under_xdp(lab: Lab, protocol: str) -> None:
    """XDP is switched on below a connection: same backend, same port, both ways."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, EITHER)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello")
    inside = inside_of(request, lab.by_stack(request.frame(lab.family)))
    for flags in ("S", "A", "PA"):
        more, beyond = request.but(flags=flags), inside.but(flags=flags)
        assert_same(lab.sent(more.frame(lab.family)), on_wire(beyond, lab.family, "up0", inside.destination))
        wanted = on_wire(more.reply(), lab.family, "up0", "outside")
        assert_same(lab.sent(beyond.reply().frame(lab.family)), wanted, "reply")
    assert lab.node.counters() == {"PACKET_FORWARDED": 1, "XDP_SENT": 6}


@both_protocols
@pytest.mark.parametrize("first", ("request", "reply"))
def test_a_flow_that_xdp_began_goes_on_under_tc(lab: Lab, protocol: str, first: str) -> None:
    """XDP is switched off below a connection, and whichever side speaks next is understood."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, EITHER)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello")
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    for what in (first, "request", "reply", "request", "reply"):
        if what == "request":
            out, wanted = lab.by_stack(request.but(flags="A").frame(lab.family)), inside.but(flags="A")
        else:
            out, wanted = lab.by_stack(inside.reply().frame(lab.family)), request.reply()
        assert_same(out, wanted.frame(lab.family), what)
    assert [row.action for row in lab.node.flows()] == [DNAT, SNAT, UNSNAT, UNDNAT]
    assert not any(row.flags & SHORT for row in lab.node.flows())
    lab.sent(request.but(flags="A").frame(lab.family))
    assert lab.node.counters()["XDP_FORWARDED"] == 1


@both_protocols
def test_frames_that_take_turns_between_xdp_and_tc(lab: Lab, protocol: str) -> None:
    """As with every other packet too long: each by its own way, all with one translation."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, EITHER)
    request = Packet("outside", 40000, "lb", 80, protocol)
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    for turn in range(4):
        again = request.but(flags="A", payload=b"x" * turn)
        if turn % 2:
            wanted = on_wire(inside.but(flags="A", payload=b"x" * turn), lab.family, "up0", inside.destination)
            assert_same(lab.sent(again.frame(lab.family)), wanted)
        else:
            wanted = inside.but(flags="A", payload=b"x" * turn).frame(lab.family)
            assert_same(lab.by_stack(again.frame(lab.family)), wanted)


@both_protocols
def test_the_client_that_has_two_flows_to_one_backend_under_tc(lab: Lab, protocol: str) -> None:
    """XDP tells them by their masquerade's port; within the node tc needs two ports of the client's, too."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    lab.node.put_frontend("vip", 80, protocol, lab.family, REMOTE)
    flows = []
    for role in ("lb", "vip"):
        request = Packet("outside", 40000, role, 80, protocol)
        flows.append((request, inside_of(request, lab.sent(request.frame(lab.family)), "remote")))
    assert flows[0][1].sport != flows[1][1].sport
    for request, inside in flows * 2:
        out = lab.by_stack(request.but(flags="A").frame(lab.family))
        assert_same(out, inside.but(flags="A").frame(lab.family), "request by tc")
        assert_same(lab.by_stack(inside.reply().frame(lab.family)), request.reply().frame(lab.family), "reply by tc")
        lab.sent(request.but(flags="A").frame(lab.family))
        wanted = on_wire(request.reply(), lab.family, "up0", "outside")
        assert_same(lab.sent(inside.reply().frame(lab.family)), wanted, "reply by XDP")
    assert lab.node.counters()["PACKET_COLLISION"] == 1


@both_protocols
def test_two_flows_to_one_backend_of_which_each_has_begun_elsewhere(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    lab.node.put_frontend("vip", 80, protocol, lab.family, REMOTE)
    flows = []
    for role, begin in (("lb", lab.by_stack), ("vip", lab.sent)):
        request = Packet("outside", 40000, role, 80, protocol)
        flows.append((request, inside_of(request, begin(request.frame(lab.family)), "remote")))
    for request, inside in flows:
        assert_same(lab.by_stack(inside.reply().frame(lab.family)), request.reply().frame(lab.family))
        assert_same(lab.by_stack(request.but(flags="A").frame(lab.family)), inside.but(flags="A").frame(lab.family))
        wanted = on_wire(request.reply(), lab.family, "up0", "outside")
        assert_same(lab.sent(inside.reply().frame(lab.family)), wanted)


# ---- When a connection is over


@pytest.mark.parametrize("end", ("FA", "R", "RA"))
@pytest.mark.parametrize("by", ("client", "server"))
def test_a_closed_connection_is_begun_anew_by_the_next_syn(lab: Lab, end: str, by: str) -> None:
    """With the same tuple, and perhaps another backend; until then all goes on as it was."""
    service = lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80)
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    last = request.but(flags=end) if by == "client" else inside.reply().but(flags=end)
    lab.sent(last.frame(lab.family))
    assert all(row.flags & CLOSING for row in lab.node.flows())
    out = lab.sent(request.but(flags="A").frame(lab.family))
    assert_same(out, on_wire(inside.but(flags="A"), lab.family, "up0", "remote"))
    assert lab.sent(inside.reply().but(flags="FA").frame(lab.family))

    lab.node.put_frontend("lb", 80, "tcp", lab.family, ELSEWHERE, service=service)
    out = lab.sent(request.frame(lab.family))
    assert parse(out) == parse(on_wire(inside_of(request, out, "remote2"), lab.family, "up0", "remote2"))
    counters = lab.node.counters()
    assert counters["FLOW_STALE"] == 1 and counters["XDP_FORWARDED"] == 2


@pytest.mark.parametrize("ended", ("xdp", "tc"))
@pytest.mark.parametrize("begun", ("xdp", "tc"))
@pytest.mark.parametrize("by", ("client", "server"))
def test_an_end_that_one_path_sees_is_known_to_the_other(lab: Lab, begun: str, ended: str, by: str) -> None:
    lab.node.put_frontend("lb", 80, "tcp", lab.family, EITHER)
    request = Packet("outside", 40000, "lb", 80)
    ways = {"xdp": lab.sent, "tc": lab.by_stack}
    inside = inside_of(request, ways[begun](request.frame(lab.family)))
    last = request.but(flags="FA") if by == "client" else inside.reply().but(flags="FA")
    ways[ended](last.frame(lab.family))
    for way in ways.values():
        before = lab.node.counters().get("FLOW_STALE", 0)
        way(request.frame(lab.family))
        assert lab.node.counters()["FLOW_STALE"] == before + 1
        lab.sent(request.but(flags="FA").frame(lab.family))


def test_a_syn_that_is_sent_again_keeps_its_backend(lab: Lab) -> None:
    many = To(tuple(("remote", 8000 + number) for number in range(64)), masquerade=Masquerade.ALWAYS)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, many)
    request = Packet("outside", 40000, "lb", 80)
    frame = request.frame(lab.family)
    first = lab.sent(frame)
    assert_same(lab.sent(frame), first)
    assert_same(lab.by_stack(frame), inside_of(request, first).frame(lab.family), "by tc")


def test_a_connection_whose_backend_has_gone(lab: Lab) -> None:
    """Its packets go where they went, the next SYN elsewhere."""
    service = lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80)
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    lab.node.set_backend(1, "0.0.0.0", 0, 0, 255)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, ELSEWHERE, service=service)
    out = lab.sent(request.but(flags="A").frame(lab.family))
    assert_same(out, on_wire(inside.but(flags="A"), lab.family, "up0", "remote"))
    lab.sent(inside.reply().frame(lab.family))
    out = lab.sent(request.frame(lab.family))
    inside_of(request, out, "remote2")
    assert out[:6] == on_wire(inside.but(destination="remote2"), lab.family, "up0", "remote2")[:6]
    assert lab.node.counters()["FLOW_STALE"] == 1


@pytest.mark.parametrize("draining", (False, True), ids=("gone", "draining"))
def test_datagrams_whose_backend_goes(lab: Lab, draining: bool) -> None:
    """A draining one keeps the flows that it has; one that has gone loses them at once."""
    service = lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, "udp")
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    if draining:
        lab.node.set_backend(1, address("remote", lab.family), 8080, service, 1)
    else:
        lab.node.set_backend(1, "0.0.0.0", 0, 0, 255)
    lab.node.put_frontend("lb", 80, "udp", lab.family, ELSEWHERE, service=service)
    out = lab.sent(request.frame(lab.family))
    wanted = inside if draining else inside_of(request, out, "remote2")
    assert_same(out, on_wire(wanted, lab.family, "up0", wanted.destination))
    assert lab.node.counters().get("FLOW_STALE", 0) == (0 if draining else 1)


@pytest.mark.parametrize("quiet", ("both", "client", "server"))
@pytest.mark.parametrize("begun", ("xdp", "tc"))
def test_datagrams_after_a_long_silence(lab: Lab, quiet: str, begun: str) -> None:
    """A flow is over when nothing has passed for long; a server that streams keeps it."""
    lab.node.put_settings(flow_idle=LONG)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, "udp")
    frame = request.frame(lab.family)
    inside = inside_of(request, lab.sent(frame) if begun == "xdp" else lab.by_stack(frame))
    silent = {"both": (DNAT, SNAT, UNSNAT, UNDNAT), "client": (DNAT, SNAT), "server": (UNSNAT, UNDNAT)}[quiet]
    age(lab, *silent)
    out = lab.sent(frame)
    assert lab.node.counters().get("FLOW_STALE", 0) == (1 if quiet == "both" else 0)
    if quiet != "both":
        assert_same(out, on_wire(inside, lab.family, "up0", "remote"))


def test_use_is_written_down_for_both_directions(lab: Lab) -> None:
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, "udp")
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    age(lab, DNAT, UNSNAT)
    lab.sent(request.frame(lab.family))
    lab.sent(inside.reply().frame(lab.family))
    assert all(row.seen > 0 for row in lab.node.flows())


@both_protocols
def test_a_stale_flow_that_goes_on_by_tc_is_counted_once(lab: Lab, protocol: str) -> None:
    """Its next backend is on this node."""
    lab.node.put_settings(flow_idle=LONG)
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    lab.sent(request.frame(lab.family))
    lab.sent(request.but(flags="FA").frame(lab.family))
    age(lab, DNAT, UNSNAT)
    lab.node.put_frontend("lb", 80, protocol, lab.family, To((("local", 8080),)), service=service)
    out = parse(lab.by_both(request.frame(lab.family), by="pod0"))
    assert out and out.destination == packed("local", lab.family)
    counters = lab.node.counters()
    assert counters["FLOW_STALE"] == 1 and counters["PACKET_FORWARDED"] == 1


# ---- Ways


def forget_ways(lab: Lab, believed_until: int = 0) -> None:
    """What the FIB has said is no longer believed, as after a second; or until then (jiffies)."""
    fd = lab.node.maps["flows"]
    value, key_size = lab.node.packer("flows"), lab.node.packer("flows", key=True).layout.size
    way = value.layout.field("way")
    until = next(each for each in way.fields if each.name == "until")
    keys, values, count = map_calls.lookup_all(fd)
    size, at_until = value.layout.size, way.offset + until.offset
    for at in range(count):
        row = bytearray(values[at * size : (at + 1) * size])
        row[at_until : at_until + until.bytes] = believed_until.to_bytes(until.bytes, "little")
        map_calls.update(fd, keys[at * key_size : (at + 1) * key_size], bytes(row))


@both_protocols
def test_a_way_that_changes(lab: Lab, protocol: str) -> None:
    """A backend is routed another way: both directions follow, with the tuple that they have, within a second."""
    lab.node.put_settings(refresh=1 << 20)
    lab.node.put_frontend("lb", 80, protocol, lab.family, ELSEWHERE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    there = address("remote2", lab.family)
    mac = WIRES["up1"].behind["faraway"]
    try:
        namespaces.ip(lab.namespace, [
            f"neigh add {there} lladdr {mac} dev up1 nud permanent",
            f"route replace {there} dev up1",
        ])  # fmt: skip
        more = request.but(flags="A").frame(lab.family)
        lab.sent(more)
        forget_ways(lab)
        out = lab.sent(more, by="up1")
        assert_same(out, on_wire(inside.but(flags="A"), lab.family, "up1", "faraway"))
        lab.sent(more, by="up1")
        reply = inside.reply().frame(lab.family)
        by_up1 = bytes.fromhex(WIRES["up1"].mac.replace(":", "")) + reply[6:]
        assert_same(lab.sent(by_up1, "up1", "up0"), on_wire(request.reply(), lab.family, "up0", "outside"))
        lab.node.drop_device(lab.index["up1"])
        forget_ways(lab)
        lab.passed_up(more)
    finally:
        namespaces.ip(lab.namespace, [f"route replace {there} dev up0", f"neigh del {there} dev up1"])


@both_protocols
@pytest.mark.parametrize("late", (0, 1, 1000))
def test_what_the_fib_has_said_is_believed_for_its_time_only(lab: Lab, protocol: str, late: int) -> None:
    """Or a flow would go the old way for as long as it has packets."""
    lab.node.put_settings(refresh=1 << 20)
    lab.node.put_frontend("lb", 80, protocol, lab.family, ELSEWHERE)
    frame = Packet("outside", 40000, "lb", 80, protocol).frame(lab.family)
    first = lab.sent(frame)
    there, old = address("remote2", lab.family), WIRES["up0"].behind["remote2"]
    try:
        namespaces.ip(lab.namespace, [f"neigh replace {there} lladdr 02:00:00:00:99:99 dev up0 nud permanent"])
        assert_same(lab.sent(frame), first, "still believed")
        forget_ways(lab, (facts.jiffies() - late) & 0xFFFFFFFF)
        assert lab.sent(frame)[:6] == bytes.fromhex("020000009999")
        assert lab.sent(frame)[:6] == bytes.fromhex("020000009999"), "believed in its turn"
    finally:
        namespaces.ip(lab.namespace, [f"neigh replace {there} lladdr {old} dev up0 nud permanent"])


@both_protocols
def test_a_neighbour_that_becomes_known(lab: Lab, protocol: str) -> None:
    """Until then tc carries the flow, and the stack asks; XDP goes on with tc's port."""
    lab.node.put_settings(refresh=1 << 20)
    lab.node.put_frontend("lb", 80, protocol, lab.family, To((("silent", 8080),), masquerade=Masquerade.ALWAYS))
    request = Packet("outside", 40000, "lb", 80, protocol)
    more = request.but(flags="A")
    inside = inside_of(more, lab.by_both(request.frame(lab.family)), "silent")
    assert_same(lab.by_both(more.frame(lab.family)), inside.frame(lab.family), "not yet")
    there, mac = address("silent", lab.family), "02:00:00:00:98:98"
    try:
        namespaces.ip(lab.namespace, [f"neigh replace {there} lladdr {mac} dev up0 nud permanent"])
        macs = bytes.fromhex((mac + WIRES["up0"].mac).replace(":", ""))
        wanted = macs + inside.but(hops=inside.hops - 1).frame(lab.family)[12:]
        assert_same(lab.sent(more.frame(lab.family)), wanted, "request")
        wanted = on_wire(more.reply(), lab.family, "up0", "outside")
        assert_same(lab.sent(inside.reply().frame(lab.family)), wanted, "reply")
    finally:
        namespaces.ip(lab.namespace, [f"neigh del {there} dev up0"])


@both_protocols
def test_a_neighbour_that_moves(lab: Lab, protocol: str) -> None:
    lab.node.put_settings(refresh=1 << 20)
    lab.node.put_frontend("lb", 80, protocol, lab.family, ELSEWHERE)
    frame = Packet("outside", 40000, "lb", 80, protocol).frame(lab.family)
    lab.sent(frame)
    there = address("remote2", lab.family)
    old = WIRES["up0"].behind["remote2"]
    try:
        namespaces.ip(lab.namespace, [f"neigh replace {there} lladdr 02:00:00:00:99:99 dev up0 nud permanent"])
        forget_ways(lab)
        assert lab.sent(frame)[:6] == bytes.fromhex("020000009999")
        namespaces.ip(lab.namespace, [f"neigh del {there} dev up0"])
        forget_ways(lab)
        lab.passed_up(frame)
    finally:
        namespaces.ip(lab.namespace, [f"neigh replace {there} lladdr {old} dev up0 nud permanent"])


def test_a_connection_that_enters_by_another_device(lab: Lab) -> None:
    """Asymmetric routing outside: its packets come by the other uplink now, and the answers go as the FIB says."""
    lab.node.put_settings(refresh=1 << 20)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80)
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    more = request.but(flags="A")
    by_up1 = bytes.fromhex(WIRES["up1"].mac.replace(":", "")) + more.frame(lab.family)[6:]
    for _ in range(2):
        assert_same(lab.sent(by_up1, "up1", "up0"), on_wire(inside.but(flags="A"), lab.family, "up0", "remote"))
        assert_same(lab.sent(more.frame(lab.family)), on_wire(inside.but(flags="A"), lab.family, "up0", "remote"))
    lab.passed_up(by_up1, "up0")
    lab.passed_up(more.frame(lab.family), "up1")


# ---- What an old flow leaves behind


@both_protocols
def test_a_late_packet_of_an_ended_flow_does_not_harm_its_successor(lab: Lab, protocol: str) -> None:
    """The client has used its port again and got another backend; the old one still says something, by way of tc."""
    lab.node.put_settings(flow_idle=LONG)
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    old = inside_of(request, lab.sent(request.frame(lab.family)))
    lab.sent(request.but(flags="R").frame(lab.family))
    age(lab, DNAT, UNSNAT)
    lab.node.put_frontend("lb", 80, protocol, lab.family, ELSEWHERE, service=service)
    if protocol == "udp":
        lab.node.set_backend(1, "0.0.0.0", 0, 0, 255)
    new = inside_of(request, lab.sent(request.frame(lab.family)), "remote2")

    lab.by_stack(icmp_error("unreachable", "remote", "uplink", old, lab.family))
    lab.by_stack(old.reply(payload=b"late").frame(lab.family))
    more = request.but(flags="A", payload=b"more")
    out = lab.by_stack(more.frame(lab.family))
    assert_same(out, new.but(flags="A", payload=b"more").frame(lab.family), "the new flow, by tc")
    assert_same(lab.by_stack(new.reply().frame(lab.family)), request.reply().frame(lab.family), "its reply")


def test_a_late_end_of_an_old_connection_does_not_close_its_successor(lab: Lab) -> None:
    """Or a SYN that is sent again would go to yet another backend."""
    lab.node.put_settings(snat_low=50000, snat_high=50000)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, EITHER)
    request = Packet("outside", 40000, "lb", 80)
    old = inside_of(request, lab.sent(request.frame(lab.family)))
    lab.sent(request.but(flags="FA").frame(lab.family))
    lab.node.put_settings(snat_low=50001, snat_high=50001)
    lab.sent(request.frame(lab.family))
    lab.sent(old.reply().but(flags="FA").frame(lab.family))
    assert [row.flags & CLOSING for row in lab.node.flows() if row.action == DNAT] == [0]


@pytest.mark.parametrize("by", ("xdp", "tc"))
def test_a_late_end_of_a_connection_whose_backend_has_gone(lab: Lab, by: str) -> None:
    """As above, where nobody had closed it before."""
    service = lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80)
    old = inside_of(request, lab.sent(request.frame(lab.family)))
    lab.node.set_backend(1, "0.0.0.0", 0, 0, 255)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, ELSEWHERE, service=service)
    lab.sent(request.frame(lab.family))
    late = old.reply().but(flags="FA").frame(lab.family)
    lab.sent(late) if by == "xdp" else lab.by_stack(late)
    assert [row.flags & CLOSING for row in lab.node.flows() if row.action == DNAT] == [0]


@both_protocols
def test_a_late_packet_to_the_same_backend(lab: Lab, protocol: str) -> None:
    """The new flow has the old one's backend and another port, which it keeps under tc."""
    lab.node.put_settings(flow_idle=LONG, snat_low=50000, snat_high=50000)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    old = inside_of(request, lab.sent(request.frame(lab.family)))
    lab.sent(request.but(flags="R").frame(lab.family))
    age(lab, DNAT, UNSNAT)
    lab.node.put_settings(flow_idle=LONG, snat_low=50001, snat_high=50001)  # else the old one's might come round
    new = inside_of(request, lab.sent(request.frame(lab.family)))
    assert new.sport != old.sport
    more = request.but(flags="A")
    assert_same(lab.by_stack(more.frame(lab.family)), new.but(flags="A").frame(lab.family), "before")
    lab.by_stack(old.reply().frame(lab.family))
    assert_same(lab.by_stack(more.frame(lab.family)), new.but(flags="A").frame(lab.family), "after")
    assert_same(lab.by_stack(new.reply().frame(lab.family)), request.reply().frame(lab.family), "reply")


@both_protocols
def test_a_port_that_was_given_out_again(lab: Lab, protocol: str) -> None:
    """The replies' row of a flow was evicted, its port has gone to another client's; tc completes the older flow
    without touching the other one, before its next look after all rows shows that the port has gone."""
    lab.node.put_settings(snat_low=40001, snat_high=40001, refresh=1 << 20)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    first = Packet("outside", 40000, "lb", 80, protocol)
    second = Packet("outside2", 41000, "lb", 80, protocol)
    lab.sent(first.frame(lab.family))
    evict(lab, UNSNAT)
    inside = inside_of(second, lab.sent(second.frame(lab.family)))
    lab.by_stack(first.but(flags="A").frame(lab.family))
    assert_same(lab.by_stack(inside.reply().frame(lab.family)), second.reply().frame(lab.family), "a reply by tc")
    out = lab.by_stack(second.but(flags="A").frame(lab.family))
    assert_same(out, inside.but(flags="A").frame(lab.family), "the second client's, by tc")


def evict(lab: Lab, action: int) -> None:
    """Rows of an action are gone, as a full table's are."""
    fd = lab.node.maps["flows"]
    value, size = lab.node.packer("flows"), lab.node.packer("flows", key=True).layout.size
    keys, values, count = map_calls.lookup_all(fd)
    for at in range(count):
        row = values[at * value.layout.size : (at + 1) * value.layout.size]
        if value.get(row, "action") == action:
            map_calls.delete(fd, keys[at * size : (at + 1) * size])


@both_protocols
@pytest.mark.parametrize("gone", (DNAT, UNSNAT, SNAT, UNDNAT), ids=("request", "reply", "leaving", "leaving-reply"))
def test_any_row_of_a_flow_may_be_evicted(lab: Lab, protocol: str, gone: int) -> None:
    """The next request makes a flow of it again, or goes on; nothing is sent half translated."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    lab.sent(request.frame(lab.family))
    lab.by_stack(request.but(flags="A").frame(lab.family))
    evict(lab, gone)
    inside = inside_of(request, lab.sent(request.frame(lab.family)))
    wanted = on_wire(inside, lab.family, "up0", "remote")
    assert_same(lab.sent(request.frame(lab.family)), wanted)


# ---- Ports


@both_protocols
def test_xdp_and_tc_never_give_out_one_port_twice(lab: Lab, protocol: str) -> None:
    """A range of 16 ports, from which both take in turn, until there is none."""
    lab.node.put_settings(snat_low=50000, snat_high=50015, refresh=1 << 20)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    given: list[int] = []
    refused = 0
    for number in range(60):
        frame = Packet("outside", 30000 + number, "lb", 80, protocol).frame(lab.family)
        if number % 2:
            ran = lab.xdp(frame)
            assert ran.verdict in (XDP_TX, XDP_DROP)
            if ran.verdict == XDP_TX:
                given.append(sport_of(ran.frame))
        else:
            ran = lab.tc("tc_egress", lab.entered(frame), "up0")
            if ran.verdict != 2:
                given.append(sport_of(ran.frame))
        refused += ran.verdict in (XDP_DROP, 2) and len(given) + refused < number + 1
    assert len(set(given)) == len(given) and set(given) <= set(range(50000, 50016))
    assert len(given) >= 12 and lab.node.counters()["PACKET_NO_PORT"] == 60 - len(given)


@pytest.mark.parametrize("by", ("xdp", "tc"))
def test_a_port_at_which_the_node_serves_datagrams_is_not_given_out(lab: Lab, by: str) -> None:
    """A backend answers by a socket without a peer: on this node, an answer to a node port goes to that Service."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, refresh=1 << 20)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    lab.node.put_frontend("node", 50000, "udp", lab.family, REMOTE)
    way = lab.sent if by == "xdp" else lab.by_stack
    first = Packet("outside", 40000, "lb", 80, "udp")
    frame = first.frame(lab.family)
    if by == "xdp":
        assert lab.xdp(frame).verdict == XDP_DROP
    else:
        assert lab.tc("tc_egress", lab.entered(frame), "up0").verdict == SHOT
    assert lab.node.counters()["PACKET_NO_PORT"] == 1
    lab.node.put_settings(snat_low=50001, snat_high=50001, refresh=1 << 20)
    assert inside_of(first, way(frame)).sport == 50001
    second = lab.xdp(Packet("outside", 40001, "lb", 80, "udp").frame(lab.family))
    assert second.verdict == XDP_DROP and lab.node.counters()["PACKET_NO_PORT"] == 2


@both_protocols
@pytest.mark.parametrize("after", ("xdp", "tc"))
@pytest.mark.parametrize("before", ("xdp", "tc"))
def test_a_port_of_an_ended_flow_is_given_out_again(lab: Lab, protocol: str, before: str, after: str) -> None:
    """Not before its end; and then nothing of the old flow leads out by it, or into it, any more."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, flow_idle=LONG, refresh=1 << 20)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    ways = {"xdp": lab.sent, "tc": lab.by_stack}
    old = Packet("outside", 40000, "lb", 80, protocol)
    new = Packet("outside2", 41000, "lb", 80, protocol)
    inside_of(old, ways[before](old.frame(lab.family)))
    assert lab.xdp(new.frame(lab.family)).verdict == XDP_DROP
    assert lab.node.counters()["PACKET_NO_PORT"] == 1

    ways[before](old.but(flags="FA").frame(lab.family))
    age(lab, DNAT, SNAT, UNSNAT, UNDNAT)
    inside = inside_of(new, ways[after](new.frame(lab.family)))
    assert inside.sport == 50000
    for way in (lab.sent, lab.by_stack):
        out = parse(way(inside.reply().frame(lab.family)))
        assert out and out.destination == packed("outside2", lab.family) and out.ports == (80, 41000)
        out = parse(way(new.but(flags="A").frame(lab.family)))
        assert out and out.ports == (50000, 8080)
    late = old.but(flags="A").frame(lab.family)
    assert lab.xdp(late).verdict in (XDP_DROP, XDP_PASS)
    entered = lab.tc("tc_ingress", late, "up0")
    if entered.verdict == UNSPEC:
        left = lab.tc("tc_egress", entered.frame, "up0")
        out = parse(left.frame)
        assert left.verdict == SHOT or (out and out.ports != (50000, 8080)), "into the other client's connection"


def test_a_port_of_a_connection_that_has_just_ended_is_not_given_out(lab: Lab) -> None:
    """Or one that is closed on one side only, and still in use on the other."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, refresh=1 << 20)
    lab.node.put_frontend("lb", 80, "tcp", lab.family, REMOTE)
    old = Packet("outside", 40000, "lb", 80)
    inside = inside_of(old, lab.sent(old.frame(lab.family)))
    lab.sent(old.but(flags="FA").frame(lab.family))
    for way in ("xdp", "tc"):
        frame = Packet("outside2", 41000, "lb", 80).frame(lab.family)
        if way == "xdp":
            assert lab.xdp(frame).verdict == XDP_DROP
        else:
            assert lab.tc("tc_egress", lab.entered(frame), "up0").verdict == SHOT
        wanted = on_wire(old.reply().but(payload=b"more"), lab.family, "up0", "outside")
        assert_same(lab.sent(inside.reply().but(payload=b"more").frame(lab.family)), wanted)


@pytest.mark.parametrize("by", ("xdp", "tc"))
def test_datagrams_that_nobody_answers_keep_their_port(lab: Lab, by: str) -> None:
    """Logs and metrics: nothing has come back for long, and the flow is in use all the same."""
    lab.node.put_settings(snat_low=50000, snat_high=50000, flow_idle=LONG)
    lab.node.put_frontend("lb", 80, "udp", lab.family, REMOTE)
    ways = {"xdp": lab.sent, "tc": lab.by_stack}
    quiet = Packet("outside", 40000, "lb", 80, "udp")
    inside = inside_of(quiet, ways[by](quiet.frame(lab.family)))
    age(lab, UNSNAT, UNDNAT)
    assert lab.xdp(Packet("outside2", 41000, "lb", 80, "udp").frame(lab.family)).verdict == XDP_DROP
    assert lab.node.counters()["PACKET_NO_PORT"] == 1
    assert inside_of(quiet, ways[by](quiet.frame(lab.family))) == inside


@both_protocols
def test_one_port_for_flows_to_different_backends(lab: Lab, protocol: str) -> None:
    """Replies tell them apart by whom they come from."""
    lab.node.put_settings(snat_low=50000, snat_high=50000)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    lab.node.put_frontend("lb", 81, protocol, lab.family, ELSEWHERE)
    for port, backend in ((80, "remote"), (81, "remote2")):
        request = Packet("outside", 40000, "lb", port, protocol)
        inside = inside_of(request, lab.sent(request.frame(lab.family)), backend)
        assert inside.sport == 50000
        wanted = on_wire(request.reply(), lab.family, "up0", "outside")
        assert_same(lab.sent(inside.reply().frame(lab.family)), wanted)


@both_protocols
def test_a_port_that_a_socket_of_the_node_has(lab: Lab, protocol: str) -> None:
    """Its replies would be the socket's."""
    lab.node.put_settings(snat_low=50000, snat_high=50000)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    frame = Packet("outside", 40000, "lb", 80, protocol).frame(lab.family)
    with socket.socket(socket.AF_INET if lab.family == 4 else socket.AF_INET6, kind) as made:
        made.bind((address("uplink", lab.family), 50000))
        if protocol == "tcp":
            made.listen()
        assert lab.xdp(frame).verdict == XDP_DROP
        assert lab.node.counters() == {"PACKET_NO_PORT": 1}
    lab.sent(frame)


# ---- A full table


@pytest.fixture(scope="module")
def small_lab(artifact: Artifact) -> Iterator[Lab]:
    with laboratory(artifact, {"flows": 256}) as made:
        yield made


@both_protocols
@pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))
def test_more_flows_than_there_is_room_for(small_lab: Lab, protocol: str, family: int) -> None:
    """New ones are served, old ones are evicted and come again."""
    lab = small_lab
    with namespaces.inside(lab.namespace):
        lab.clear(family)
        lab.node.put_frontend("lb", 80, protocol, family, REMOTE)
        for number in range(600):
            request = Packet("outside", 20000 + number, "lb", 80, protocol)
            inside = inside_of(request, lab.sent(request.frame(family)))
            wanted = on_wire(request.reply(), family, "up0", "outside")
            assert_same(lab.sent(inside.reply().frame(family)), wanted)
        assert lab.node.counters() == {"XDP_FORWARDED": 600, "XDP_SENT": 1200}
        assert len(lab.node.flows()) <= 256
        lab.sent(Packet("outside", 20000, "lb", 80, protocol).frame(family))
