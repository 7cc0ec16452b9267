"""Consistent hashing on the packet paths: a flow's place in a table is that of its tuple, by tc and XDP alike.

Rules of this file: tables are written by hand, going round the backends, so that a place tells its backend; how they
are filled is another's test. Which place a tuple has is computed here anew, from the words of bpf/maglev.h.
"""

from __future__ import annotations

import struct

import pytest

from ebpflb.routes import Masquerade, packed
from tests.bpf.loaded import PROTOCOLS, TABLE_SIZES, To
from tests.bpf.xdp_lab import Lab
from tests.packets import Packet, address, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))
BACKENDS = tuple(("remote", 8000 + number) for number in range(7))
LOW = 0xFFFFFFFF


def hashed(packet: Packet, family: int, affinity: bool = False) -> int:
    """The hash of a flow's tuple: its protocol, addresses and ports, each word mixed in; with affinity of its protocol
    and the client's address only."""

    def mixed(hash: int, word: int) -> int:
        hash = (hash ^ word) * 0x85EBCA6B & LOW
        return hash ^ hash >> 15

    words = struct.unpack("<4I", packed(address(packet.source, family)))
    if not affinity:
        sport, dport = (int.from_bytes(port.to_bytes(2), "little") for port in (packet.sport, packet.dport))
        words += (*struct.unpack("<4I", packed(address(packet.destination, family))), dport << 16 | sport)
    hash = int(PROTOCOLS[packet.protocol])
    for word in words:
        hash = mixed(hash, word)
    hash = hash * 0xC2B2AE35 & LOW
    return hash ^ hash >> 16


def maglev(table: int, **more: object) -> To:
    return To(BACKENDS, masquerade=Masquerade.ALWAYS, table=table, **more)  # type: ignore[arg-type]


def wanted(packet: Packet, family: int, table: int, affinity: bool = False) -> int:
    """The port of the backend at the tuple's place."""
    return 8000 + (hashed(packet, family, affinity) * TABLE_SIZES[table] >> 32) % len(BACKENDS)


def went(frame: bytes) -> int:
    parsed = parse(frame)
    assert parsed and parsed.ports
    return parsed.ports[1]


@both_protocols
@pytest.mark.parametrize("table", range(1, 9))
def test_a_flow_goes_to_the_backend_at_its_place(lab: Lab, protocol: str, table: int) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, maglev(table))
    seen = set()
    for number in range(60):
        packet = Packet("outside", 20000 + 611 * number % 40000, "lb", 80, protocol)
        out = lab.sent(packet.frame(lab.family)) if number % 2 else lab.by_stack(packet.frame(lab.family))
        assert went(out) == wanted(packet, lab.family, table)
        seen.add(went(out))
    assert len(seen) == len(BACKENDS)


@both_protocols
def test_the_same_tuple_has_the_same_backend_on_either_path(lab: Lab, protocol: str) -> None:
    """Also when the flow has been forgotten, and on another node: nothing but the tuple and the table counts."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, maglev(5))
    packets = [Packet("outside", 30000 + number, "lb", 80, protocol) for number in range(20)]
    by_xdp = [went(lab.sent(packet.frame(lab.family))) for packet in packets]
    lab.clear(lab.family)
    lab.node.put_frontend("vip", 80, protocol, lab.family, To(BACKENDS, masquerade=Masquerade.ALWAYS))
    lab.node.put_frontend("lb", 80, protocol, lab.family, maglev(5))
    by_tc = [went(lab.by_stack(packet.frame(lab.family))) for packet in packets]
    assert by_xdp == by_tc and len(set(by_tc)) > 1


@both_protocols
def test_with_affinity_nothing_counts_but_the_client(lab: Lab, protocol: str) -> None:
    """So that it goes the same way by every node, frontend and port, also where none remembers it."""
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, maglev(5, affinity=60))
    lab.node.put_frontend("node", 30080, protocol, lab.family, maglev(5, affinity=60), service=service)
    prefix = "203.0.113." if lab.family == 4 else "2001:db8:203::"
    seen = set()
    for host in range(1, 41):
        for sport, role, port in ((30000, "lb", 80), (30001, "lb", 80), (30000, "node", 30080)):
            packet = Packet(f"{prefix}{host}", sport, role, port, protocol)
            assert went(lab.by_stack(packet.frame(lab.family))) == wanted(packet, lab.family, 5, affinity=True)
            lab.node.age_clients(61)
        seen.add(wanted(packet, lab.family, 5, affinity=True))
    assert len(seen) > 4


@both_protocols
def test_what_affinity_remembers_comes_before_the_table(lab: Lab, protocol: str) -> None:
    """A client stays where it is when the table changes."""
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, maglev(1, affinity=60))
    first = went(lab.sent(Packet("outside", 40000, "lb", 80, protocol).frame(lab.family)))
    other = To(BACKENDS[::-1], masquerade=Masquerade.ALWAYS, table=1, affinity=60)
    lab.node.put_frontend("lb", 80, protocol, lab.family, other, service=service)
    for sport in range(40001, 40010):
        assert went(lab.sent(Packet("outside", sport, "lb", 80, protocol).frame(lab.family))) == first


@both_protocols
@pytest.mark.parametrize("table", (1, 8, 9, 255), ids=("missing", "missing-too", "unknown-size", "unknown-size-too"))
def test_a_table_that_is_not_there(lab: Lab, protocol: str, table: int) -> None:
    """A row race, or rows of a later version: backends are chosen evenly, and nothing is lost."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, maglev(table, broken="table"))
    count = [0] * len(BACKENDS)  # 40 of the 100 that each should have: by chance in one run of 10^10
    for number in range(700):
        frame = Packet("outside", 20000 + number, "lb", 80, protocol).frame(lab.family)
        count[went(lab.sent(frame) if number % 2 else lab.by_stack(frame)) - 8000] += 1
    assert min(count) > 40, count


@both_protocols
def test_a_table_that_names_more_backends_than_there_are(lab: Lab, protocol: str) -> None:
    """One that is not this set's: places behind its end are chosen anew."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, maglev(1, broken="table"))
    lab.node.put_table(1, 1, 1000)
    seen = set()
    for number in range(250):  # one of 7 is missed by chance in one run of 10^15
        frame = Packet("outside", 20000 + number, "lb", 80, protocol).frame(lab.family)
        seen.add(went(lab.sent(frame)))
    assert seen == {port for _, port in BACKENDS}


@both_protocols
def test_a_switch_of_the_algorithm_moves_no_flow(lab: Lab, protocol: str) -> None:
    """Random to Maglev and back, live: established flows stay, on either path."""
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, To(BACKENDS, masquerade=Masquerade.ALWAYS))
    packets = [Packet("outside", 30000 + number, "lb", 80, protocol) for number in range(20)]
    first = [lab.sent(packet.frame(lab.family)) for packet in packets]
    for to in (maglev(1), To(BACKENDS, masquerade=Masquerade.ALWAYS), maglev(3)):
        lab.node.put_frontend("lb", 80, protocol, lab.family, to, service=service)
        assert [lab.sent(packet.frame(lab.family)) for packet in packets] == first
        by_tc = [went(lab.by_stack(packet.but(flags="A").frame(lab.family))) for packet in packets]
        assert by_tc == [went(out) for out in first]
