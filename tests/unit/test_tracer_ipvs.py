"""The IPVS tracer, on a kernel small enough to be followed by eye."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import ip_address

import pytest

from ebpflb.decide import Outcome, Packet
from ebpflb.model import Protocol
from tests.tracers import Traced
from tests.tracers.ipvs import Held, ServerKey, Tracer
from tests.tracers.ruleset import Unknown

LOCAL = frozenset(("127.0.0.1", "192.168.0.2"))
VIP, NODE, POD, OUTSIDE = "172.30.0.41", "192.168.0.2", "10.0.1.9", "203.0.113.5"
TCP = int(Protocol.TCP)

RULES = """
*mangle
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
{mangle}
COMMIT
*filter
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
{filter}
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:MASQ - [0:0]
-A MASQ -j MARK --set-xmark 0x4000/0x4000
{nat}
-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
COMMIT
"""


def address(text: str) -> bytes:
    return ip_address(text).packed


def at(text: str, port: int) -> bytes:
    return address(text) + struct.pack("!H", port)


def element(text: str, port: int = 80, protocol: int = TCP) -> bytes:
    return address(text) + struct.pack("!HB", port, protocol)


def server(text: str = VIP, port: int = 80, mark: int = 0) -> ServerKey:
    return (4, mark, 0, b"", 0) if mark else (4, 0, TCP, address(text), port)


Sets = Mapping[str, tuple[str, Mapping[bytes, object]]]
BACKENDS = {at("10.0.1.1", 8080): 1, at("10.0.2.1", 8080): 1, at("10.0.2.2", 8080): 0}


def trace(
    source: str,
    to: str = VIP,
    port: int = 80,
    *,
    servers: Mapping[ServerKey, Mapping[bytes, int]] | None = None,
    sets: Sets | None = None,
    bound: tuple[str, ...] = (VIP,),
    **rules: str,
) -> Traced:
    text = RULES.format(**{"mangle": "", "filter": "", "nat": "", **rules})
    held = Held(
        {False: text}, sets or {}, {server(): BACKENDS} if servers is None else servers, frozenset(map(address, bound))
    )
    packet = Packet(source, to, port, Protocol.TCP, "" if source in {*LOCAL, *bound} else "eth0")
    return Tracer(held, LOCAL).trace(packet)


def places(found: Traced) -> dict[str, bool]:
    assert found.verdict is Outcome.FORWARD and found.evenly
    return {f"{address}:{port}": masked for (address, port), masked in found.backends.items()}


@pytest.mark.parametrize("client", [POD, OUTSIDE, NODE, VIP])
def test_a_virtual_server_picks_whoever_has_a_weight(client: str) -> None:
    assert places(trace(client)) == {"10.0.1.1:8080": False, "10.0.2.1:8080": False}


def test_what_is_no_virtual_servers_is_let_go() -> None:
    assert trace(POD, port=81) == trace(NODE, port=81) == Traced(Outcome.NOT_SERVICE)


def test_from_elsewhere_ipvs_sees_what_is_for_this_node_only() -> None:
    assert trace(POD, bound=()) == Traced(Outcome.NOT_SERVICE)
    assert trace(NODE, bound=()).verdict is Outcome.FORWARD  # OUTPUT is asked wherever a packet goes


def test_a_virtual_server_of_a_mark_comes_first() -> None:
    by_mark = {server(): BACKENDS, server(mark=7): {at("10.0.1.2", 80): 1}}
    sets: Sets = {"MARKS": ("hash:ip,port", {element(VIP): 7})}
    mangle = (
        "-A PREROUTING -m set ! --match-set MARKS dst,dst -j RETURN\n"
        "-A PREROUTING -m addrtype --src-type LOCAL -j RETURN\n"
        "-A PREROUTING -j SET --map-set MARKS dst,dst --map-mark"
    )
    assert list(places(trace(OUTSIDE, servers=by_mark, sets=sets, mangle=mangle))) == ["10.0.1.2:80"]
    assert len(places(trace(NODE, servers=by_mark, sets=sets, mangle=mangle))) == 2
    other: Sets = {"MARKS": ("hash:ip,port", {element(VIP): 8})}
    assert len(places(trace(OUTSIDE, servers=by_mark, sets=other, mangle=mangle))) == 2


def test_masquerade_by_the_mark_on_the_way_out() -> None:
    nat = "-A PREROUTING ! -s 10.0.0.0/8 -j MASQ"
    assert set(places(trace(OUTSIDE, nat=nat)).values()) == {True}
    assert set(places(trace(POD, nat=nat)).values()) == {False}
    here = {server(): {at(NODE, 8080): 1}}
    assert places(trace(OUTSIDE, nat=nat, servers=here)) == {
        "192.168.0.2:8080": False
    }  # what stays here has no way out


def test_who_reaches_itself_is_told_by_a_set() -> None:
    loops: Sets = {"LOOP": ("hash:ip,port,ip", {element("10.0.1.1", 8080) + address("10.0.1.1"): None})}
    nat = "-A POSTROUTING -m set --match-set LOOP dst,dst,src -j MASQUERADE"
    assert places(trace("10.0.1.1", nat=nat, sets=loops)) == {"10.0.1.1:8080": True, "10.0.2.1:8080": False}


def test_input_is_asked_before_ipvs_and_output_after_it() -> None:
    refused: Sets = {"REFUSED": ("hash:ip,port", {element(VIP): None})}
    rule = "-m set --match-set REFUSED dst,dst -j REJECT --reject-with icmp-port-unreachable"
    wanted = Traced(Outcome.REJECT, "icmp-port-unreachable")
    assert trace(POD, sets=refused, filter=f"-A INPUT {rule}") == wanted
    assert trace(POD, sets=refused, filter=f"-A OUTPUT {rule}").verdict is Outcome.FORWARD
    assert trace(NODE, sets=refused, filter=f"-A OUTPUT {rule}").verdict is Outcome.FORWARD
    assert trace(NODE, sets=refused, filter=f"-A INPUT {rule}", servers={}) == wanted  # by way of lo


def test_what_ipvs_sends_away_goes_through_output() -> None:
    rule = "-A OUTPUT -d 10.0.0.0/8 -j DROP"
    assert trace(POD, filter=rule) == trace(NODE, mangle=rule) == Traced(Outcome.DROP)
    spared = f"-A OUTPUT -m ipvs --ipvs -j ACCEPT\n{rule}"
    assert trace(POD, filter=spared).verdict is Outcome.FORWARD


@pytest.mark.parametrize(
    ("kind", "directions", "found", "other"),
    [
        ("hash:ip", "dst", address(VIP), address(POD)),
        ("hash:ip", "src", address(POD), address(VIP)),
        ("hash:ip,port", "dst,dst", element(VIP), element(VIP, protocol=17)),
        ("hash:ip,port,ip", "dst,dst,src", element(VIP) + address(POD), element(VIP) + address(VIP)),
        ("bitmap:port", "dst", struct.pack("!H", 80), struct.pack("!H", 81)),
        (
            "hash:ip,port,net",
            "dst,dst,src",
            element(VIP) + address("10.0.0.0") + b"\x08",
            element(VIP) + address("10.0.0.0") + b"\x10",
        ),
    ],
)
def test_ipsets(kind: str, directions: str, found: bytes, other: bytes) -> None:
    rule = f"-A INPUT -m set --match-set SOME {directions} -j DROP"
    assert trace(POD, filter=rule, sets={"SOME": (kind, {found: None})}) == Traced(Outcome.DROP)
    if kind != "hash:ip,port,net":
        assert trace(POD, filter=rule, sets={"SOME": (kind, {other: None})}).verdict is Outcome.FORWARD
    else:
        assert trace("10.1.0.1", filter=rule, sets={"SOME": (kind, {other: None})}).verdict is Outcome.FORWARD


def test_a_set_that_is_not_there_is_an_error() -> None:
    with pytest.raises(Unknown, match="no such ipset"):
        trace(POD, filter="-A INPUT -m set --match-set NOWHERE dst,dst -j DROP")


def test_a_set_of_an_unknown_type_is_an_error() -> None:
    with pytest.raises(KeyError):
        trace(POD, sets={"SOME": ("list:set", {})})


def test_a_virtual_server_without_a_destination_is_an_error() -> None:
    with pytest.raises(AssertionError, match="without a destination"):
        trace(POD, servers={server(): {at("10.0.2.2", 8080): 0}})
