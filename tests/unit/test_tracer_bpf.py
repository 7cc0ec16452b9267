"""The tracer of BPF maps, on rows packed by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import ip_address
from socket import htons

import pytest

from ebpflb.dataplane.bpf.constants import BACKEND_FREE, SOURCE_NODE, SOURCE_POD
from ebpflb.dataplane.bpf.layouts import BACKEND, FRONTEND_KEY, LAYOUT, RANGE_KEY, ROUTE, SETTINGS, SOURCE_KEY, U32, U64
from ebpflb.decide import Outcome, Packet
from ebpflb.model import Protocol
from ebpflb.routes import Masquerade, Verdict
from tests.tracers import Traced
from tests.tracers.bpf import Tracer, bit_of

LOCAL = frozenset(("127.0.0.1", "192.168.0.2"))
VIP, NODE, POD, OUTSIDE = "172.30.0.41", "192.168.0.2", "10.0.1.9", "203.0.113.5"
BACKENDS = ("10.0.1.1", "10.0.2.1", "192.168.0.2")


def address(text: str) -> bytes:
    found = ip_address(text)
    return found.packed if found.version == 6 else bytes(10) + b"\xff\xff" + found.packed


def half(verdict: Verdict = Verdict.FORWARD, masquerade: Masquerade = Masquerade.NEVER, ranges: int = 0) -> bytes:
    count = len(BACKENDS) if verdict is Verdict.FORWARD else 0
    return ROUTE.pack(verdict, masquerade, 0, 0, 7, 20, count, 0, 0, ranges, 0, 0)


def maps(
    internal: bytes, external: bytes | None = None, interface: bytes = b"", prefix: bool = False
) -> dict[str, dict[bytes, bytes]]:
    """One frontend, 172.30.0.41:80/TCP; 10.0.0.0/8 are pods, and the range 5 is 203.0.113.0/24."""
    key = FRONTEND_KEY.pack(address(VIP), htons(80), Protocol.TCP)
    backends = {
        U32.pack(at): BACKEND.pack(address(each), htons(8080), 1, 0, 7) for at, each in enumerate(BACKENDS, 100)
    }
    sources = {"10.0.0.0": (104, SOURCE_POD), "192.168.0.2": (128, SOURCE_NODE), "10.0.1.254": (128, SOURCE_NODE)}
    cell, bit = divmod(bit_of(address(VIP)), 64)
    return {
        "known": {U32.pack(cell): U64.pack(1 << bit)},
        "owned": {},
        "frontends": {key: internal + (internal if external is None else external)},
        "names": {U32.pack(7): b""},
        "slots": {U32.pack(20 + at): number for at, number in enumerate(backends)},
        "backends": backends,
        "sources": {SOURCE_KEY.pack(bits, address(each)): U32.pack(flags) for each, (bits, flags) in sources.items()},
        "ranges": {RANGE_KEY.pack(32 + 96 + 24, 5, address("203.0.113.0")): U32.pack(1)},
        "settings": {U32.pack(0): SETTINGS.pack(0, 0, 0, LAYOUT, 0, 0, 0, 0, interface, prefix, False, False, 0)},
    }


def trace(tables: dict[str, dict[bytes, bytes]], source: str, port: int = 80, interface: str = "") -> Traced:
    return Tracer(tables, LOCAL).trace(Packet(source, VIP, port, Protocol.TCP, interface))


def masked(found: Traced) -> list[bool]:
    assert found.verdict is Outcome.FORWARD and found.evenly
    assert [place for place, _ in found.backends] == list(BACKENDS)
    return list(found.backends.values())


def test_what_has_no_row_is_no_services() -> None:
    assert trace(maps(half()), POD, port=81) == Traced(Outcome.NOT_SERVICE)


def test_a_port_that_a_cluster_ip_lacks_is_refused() -> None:
    tables = maps(half())
    tables["owned"][address(VIP)] = b""
    assert trace(tables, POD, port=81) == trace(tables, NODE, port=81) == Traced(Outcome.REJECT, "tcp-reset")
    assert trace(tables, POD).verdict is Outcome.FORWARD


def test_nobody_looks_for_an_address_that_is_not_known() -> None:
    tables = maps(half())
    tables["known"].clear()
    assert trace(tables, POD) == Traced(Outcome.NOT_SERVICE)


def test_the_scope_goes_by_the_source() -> None:
    tables = maps(half(Verdict.REJECT), half(Verdict.DROP))
    assert trace(tables, POD) == trace(tables, NODE) == Traced(Outcome.REJECT, "tcp-reset")
    assert trace(tables, OUTSIDE) == Traced(Outcome.DROP)


def test_of_two_prefixes_the_longer_one_counts() -> None:
    tables = maps(half(masquerade=Masquerade.NOT_POD))
    assert masked(trace(tables, POD)) == [False, False, False]
    assert masked(trace(tables, "10.0.1.254", interface="eth0")) == [True, True, False]  # the row lacks the pod's bit


@pytest.mark.parametrize(
    ("name", "prefix", "by", "pod"),
    [
        (b"cni0", False, "cni0", True),
        (b"cni0", False, "cni01", False),
        (b"veth", True, "veth1", True),
        (b"veth", True, "eth0", False),
        (b"", False, "eth0", False),
    ],
)
def test_the_scope_goes_by_the_device(name: bytes, prefix: bool, by: str, pod: bool) -> None:
    tables = maps(half(Verdict.REJECT), half(Verdict.DROP), name, prefix)
    assert trace(tables, OUTSIDE, interface=by).verdict is (Outcome.REJECT if pod else Outcome.DROP)


def test_masquerade() -> None:
    """A socket of the node has no source to replace, and what stays on the node leaves by no device."""
    assert masked(trace(maps(half(masquerade=Masquerade.ALWAYS)), POD)) == [True, True, False]
    assert masked(trace(maps(half(masquerade=Masquerade.ALWAYS)), NODE)) == [False, False, False]
    assert masked(trace(maps(half(masquerade=Masquerade.NOT_POD)), OUTSIDE)) == [True, True, False]
    assert masked(trace(maps(half()), "10.0.1.1")) == [True, False, False]  # to oneself


def test_source_ranges() -> None:
    tables = maps(half(ranges=5))
    assert trace(tables, OUTSIDE).verdict is Outcome.FORWARD
    assert trace(tables, POD) == Traced(Outcome.DROP)
    assert trace(tables, NODE) == Traced(Outcome.DROP)
    assert trace(maps(half(ranges=6)), OUTSIDE) == Traced(Outcome.DROP)  # another one's


def test_the_nodes_sockets_are_in_a_range_that_has_the_address_they_go_to() -> None:
    tables = maps(half(ranges=5))
    tables["ranges"][RANGE_KEY.pack(160, 5, address(VIP))] = U32.pack(1)
    assert trace(tables, NODE).verdict is Outcome.FORWARD
    assert trace(tables, POD) == Traced(Outcome.DROP)


def test_the_kernel_has_no_hook_for_sctp_sockets() -> None:
    key = FRONTEND_KEY.pack(address(VIP), htons(80), Protocol.SCTP)
    tables = maps(half())
    tables["frontends"][key] = 2 * half(Verdict.REJECT)
    under = Tracer(tables, LOCAL)
    assert under.trace(Packet(NODE, VIP, 80, Protocol.SCTP)) == Traced(Outcome.NOT_SERVICE)
    assert under.trace(Packet(POD, VIP, 80, Protocol.SCTP)).verdict is Outcome.REJECT


def test_the_packet_path_cannot_change_a_port_of_sctp() -> None:
    tables = maps(half())
    for port in (80, 8080):
        tables["frontends"][FRONTEND_KEY.pack(address(VIP), htons(port), Protocol.SCTP)] = 2 * half()
    under = Tracer(tables, LOCAL)
    assert under.trace(Packet(POD, VIP, 8080, Protocol.SCTP)).verdict is Outcome.FORWARD
    assert under.trace(Packet(POD, VIP, 80, Protocol.SCTP)) == Traced(Outcome.DROP)


def test_ipv6() -> None:
    tables = maps(half())
    tables["frontends"][FRONTEND_KEY.pack(address("fd00::41"), htons(80), Protocol.UDP)] = 2 * half(Verdict.REJECT)
    cell, bit = divmod(bit_of(address("fd00::41")), 64)
    tables["known"][U32.pack(cell)] = U64.pack(1 << bit)
    found = Tracer(tables, LOCAL).trace(Packet("fd00::9", "fd00::41", 80, Protocol.UDP))
    assert found == Traced(Outcome.REJECT, "icmp6-port-unreachable")


def broken_slot(tables: dict[str, dict[bytes, bytes]]) -> None:
    del tables["slots"][U32.pack(21)]


def broken_backend(tables: dict[str, dict[bytes, bytes]]) -> None:
    del tables["backends"][U32.pack(101)]


def freed_backend(tables: dict[str, dict[bytes, bytes]]) -> None:
    tables["backends"][U32.pack(101)] = BACKEND.pack(bytes(16), 0, 0, BACKEND_FREE, 0)


def somebody_elses_backend(tables: dict[str, dict[bytes, bytes]]) -> None:
    tables["backends"][U32.pack(101)] = BACKEND.pack(address(POD), htons(80), 1, 0, 8)


def no_name(tables: dict[str, dict[bytes, bytes]]) -> None:
    tables["names"].clear()


@pytest.mark.parametrize("broken", [broken_slot, broken_backend, freed_backend, somebody_elses_backend, no_name])
def test_a_row_that_leads_nowhere_is_an_error(broken: Callable[[dict[str, dict[bytes, bytes]]], None]) -> None:
    tables = maps(half())
    broken(tables)
    with pytest.raises((KeyError, AssertionError)):
        trace(tables, POD)


def test_settings_of_another_version_are_an_error() -> None:
    tables = maps(half())
    tables["settings"][U32.pack(0)] = struct.pack("=QQQI", 0, 0, 0, LAYOUT + 1).ljust(SETTINGS.size, b"\0")
    with pytest.raises(AssertionError, match="layout"):
        Tracer(tables, LOCAL)
