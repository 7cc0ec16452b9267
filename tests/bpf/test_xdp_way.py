"""Where XDP sends to: the way that the stack would take, believed for a second, and the stack's part in it.

Rules of this file: the FIB, rules and neighbours are the kernel's, in the lab's namespace; time passes by what the rows
say of it.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ebpflb.dataplane.bpf import map_calls
from ebpflb.demo import namespaces
from ebpflb.routes import Masquerade
from tests.bpf.loaded import To
from tests.bpf.xdp_lab import WIRES, Lab, on_wire, sport_of
from tests.packets import Packet, address, assert_same

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

REMOTE = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)
REMOTE2 = To((("remote2", 8080),), masquerade=Masquerade.ALWAYS)

LONG = 1 << 20  # jiffies: no test takes as long


# ---- Rows, as time passes


def untils(lab: Lab, by: int | None) -> None:
    """Every flow's way is believed until `by` jiffies later; None: not any more."""
    fd = lab.node.maps["flows"]
    value, key_size = lab.node.packer("flows"), lab.node.packer("flows", key=True).layout.size
    way = value.layout.field("way")
    at_until = way.offset + next(each for each in way.fields if each.name == "until").offset
    keys, values, count = map_calls.lookup_all(fd)
    for at in range(count):
        row = bytearray(values[at * value.layout.size : (at + 1) * value.layout.size])
        (until,) = struct.unpack_from("=I", row, at_until)
        struct.pack_into("=I", row, at_until, 0 if by is None or not until else (until + by) % (1 << 32))
        map_calls.update(fd, keys[at * key_size : (at + 1) * key_size], bytes(row))


def neighbours(lab: Lab, by: int | None) -> None:
    """XDP left a packet to each neighbour to the stack `by` jiffies earlier than it did; None: it has sent to none."""
    fd, cells = lab.node.maps["neighbours"], lab.node.artifact.maps["neighbours"].max_entries
    _, values, _ = map_calls.lookup_all(fd)
    words = struct.unpack(f"={cells}I", values)
    changed = [(word - by) % (1 << 32) or 1 if word and by is not None else 0 for word in words]
    map_calls.update_batch(fd, struct.pack(f"={cells}I", *range(cells)), struct.pack(f"={cells}I", *changed), cells)


# ---- The kernel's tables


@contextmanager
def routed_by_source(lab: Lab, source: str, destination: str) -> Iterator[None]:
    """What `source` sends to `destination` leaves by up1, where another rule than everybody's says so."""
    who, there, mac = address(source, lab.family), address(destination, lab.family), WIRES["up1"].behind["faraway"]
    added = (
        f"rule {{}} from {who} lookup 77",
        f"route {{}} {there} dev up1 table 77",
        f"neigh {{}} {there} lladdr {mac} dev up1 nud permanent",
    )

    def each(verb: str) -> None:
        for words in added:
            argv = ["ip", "-n", lab.namespace, f"-{lab.family}", *words.format(verb).split()]
            subprocess.run(argv, check=True)

    each("add")
    try:
        yield
    finally:
        each("del")


@contextmanager
def link_layer_address(lab: Lab, role: str, mac: str) -> Iterator[None]:
    """The neighbour has another one now."""
    there = address(role, lab.family)
    namespaces.ip(lab.namespace, [f"neigh replace {there} lladdr {mac} dev up0 nud permanent"])
    try:
        yield
    finally:
        before = WIRES["up0"].behind[role]
        namespaces.ip(lab.namespace, [f"neigh replace {there} lladdr {before} dev up0 nud permanent"])


# ---- As the stack would route it


@both_protocols
def test_a_rule_for_what_clients_send_holds_for_requests(lab: Lab, protocol: str) -> None:
    """Behind tc the stack routes the client's packet to the backend: masquerade comes where it leaves."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    with routed_by_source(lab, "outside", "remote"):
        request = Packet("outside", 40000, "lb", 80, protocol)
        for flags in ("S", "A"):
            out = lab.sent(request.but(flags=flags).frame(lab.family), "up0", "up1")
            inside = request.but(flags=flags, source="uplink2", sport=sport_of(out), destination="remote", dport=8080)
            assert_same(out, on_wire(inside, lab.family, "up1", "faraway"))
            untils(lab, None)
        lab.sent(Packet("outside2", 40000, "lb", 80, protocol).frame(lab.family))


@both_protocols
def test_a_rule_for_what_backends_send_holds_for_replies(lab: Lab, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    out = lab.sent(request.frame(lab.family))
    inside = request.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
    macs = WIRES["up0"].mac + WIRES["up0"].behind["remote"]
    reply = bytes.fromhex(macs.replace(":", "")) + inside.reply().frame(lab.family)[12:]
    assert_same(lab.sent(reply), on_wire(request.reply(), lab.family, "up0", "outside"))
    with routed_by_source(lab, "remote", "outside"):
        untils(lab, None)
        assert_same(lab.sent(reply, "up0", "up1"), on_wire(request.reply(), lab.family, "up1", "faraway"))


# ---- Time


@both_protocols
def test_a_way_from_before_the_clock_came_round_is_not_believed(lab: Lab, protocol: str) -> None:
    """Its 32 bits do so in some weeks, for which tc may have carried the flow."""
    lab.node.put_settings(refresh=LONG)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    lab.sent(request.frame(lab.family))
    more = request.but(flags="A").frame(lab.family)
    with link_layer_address(lab, "remote", "02:00:00:00:99:99"):
        old = bytes.fromhex(WIRES["up0"].behind["remote"].replace(":", ""))
        assert lab.sent(more)[:6] == old, "it is believed for now"
        untils(lab, 1 << 30)
        assert lab.sent(more)[:6] == bytes.fromhex("020000009999")


# ---- The stack's turn


@both_protocols
def test_the_stack_gets_a_packet_to_a_neighbour_now_and_then(lab: Lab, protocol: str) -> None:
    """Or it would never ask whether the neighbour is still there. The flow goes on, with its tuple, and so does XDP."""
    lab.node.put_settings(refresh=LONG, by_stack=LONG)
    neighbours(lab, None)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    request = Packet("outside", 40000, "lb", 80, protocol)
    port = sport_of(lab.sent(request.frame(lab.family)))
    more = request.but(flags="A")
    inside = more.but(source="uplink", sport=port, destination="remote", dport=8080)
    untils(lab, None)
    lab.sent(more.frame(lab.family))

    neighbours(lab, LONG)
    untils(lab, None)
    by_stack = lab.by_both(more.frame(lab.family))
    assert_same(by_stack[14:], inside.frame(lab.family)[14:], "by the stack, with the same tuple")
    untils(lab, None)
    assert_same(lab.sent(more.frame(lab.family)), on_wire(inside, lab.family, "up0", "remote"), "its turn is over")
    counters = lab.node.counters()
    assert (counters["XDP_FORWARDED"], counters["XDP_SENT"], counters["XDP_BY_STACK"]) == (1, 3, 1)
    assert "PACKET_FORWARDED" not in counters


@both_protocols
def test_a_new_flow_can_be_the_one_that_the_stack_gets(lab: Lab, protocol: str) -> None:
    """Clients that ask once each are all that some neighbours ever see. Its backend and port are chosen by XDP."""
    lab.node.put_settings(refresh=LONG, by_stack=LONG)
    neighbours(lab, None)
    lab.node.put_frontend("lb", 80, protocol, lab.family, REMOTE)
    lab.sent(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family))
    neighbours(lab, LONG)
    lab.node.put_frontend("lb", 81, protocol, lab.family, REMOTE2)
    lab.sent(Packet("outside", 40001, "lb", 81, protocol).frame(lab.family))  # another neighbour

    request = Packet("outside", 40002, "lb", 80, protocol)
    out = lab.by_both(request.frame(lab.family))
    inside = request.but(source="uplink", sport=sport_of(out), destination="remote", dport=8080)
    assert_same(out[14:], inside.frame(lab.family)[14:])
    more, inside = request.but(flags="A"), inside.but(flags="A")
    assert_same(lab.sent(more.frame(lab.family)), on_wire(inside, lab.family, "up0", "remote"))
    counters = lab.node.counters()
    assert (counters["XDP_FORWARDED"], counters["XDP_SENT"], counters["XDP_BY_STACK"]) == (3, 3, 1)
    assert "PACKET_FORWARDED" not in counters
