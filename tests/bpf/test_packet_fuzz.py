"""Any bytes at all through the tc programs.

Invariant: whatever arrives, the verdict is one of three, what no row speaks of comes back byte-identical, what is
translated changes nothing but addresses, ports and checksums, and no counter moves that the rows make impossible.

EBPFLB_FUZZ sets how many packets there are, half of them in each family (default: a million), EBPFLB_FUZZ_SEED which.
"""

from __future__ import annotations

import os
import time

import pytest

from ebpflb.routes import Masquerade
from tests.bpf.fuzz import Judge, Runner, fuzz
from tests.bpf.loaded import DROP, PROTOCOLS, REDIRECT, REJECT, SHOT, UNSPEC, UPLINK, Loaded, To
from tests.packets import Packet, arp, icmp_error, packed

pytestmark = [pytest.mark.root, pytest.mark.bpf_load, pytest.mark.fuzz, pytest.mark.slow, pytest.mark.timeout(3600)]

COUNT = int(os.environ.get("EBPFLB_FUZZ", "1000000")) // 2
SEED = int(os.environ.get("EBPFLB_FUZZ_SEED", "20260101"))

IMPOSSIBLE = {
    "SOCKET_FORWARDED",
    "SOCKET_REJECTED",
    "SOCKET_DROPPED",
    "SOCKET_NO_BACKEND",
    "PACKET_NO_BACKEND",
    "PACKET_NO_ADDRESS",
    "PACKET_NO_ROOM",
    "PACKET_OUT_OF_RANGE",
}


def _world(node: Loaded, family: int) -> Judge:
    """A frontend of each kind for each protocol."""
    sets: dict[str, set[tuple[bytes, int, int]]] = {"forwarding": set(), "refusing": set(), "dropping": set()}
    serving: set[tuple[bytes, int, int]] = set()
    for protocol, number in PROTOCOLS.items():
        for role, port, to, kind in (
            ("vip", 80, To((("local", 80), ("local2", 80))), "forwarding"),
            ("node", 30080, To((("remote", 8080),), masquerade=Masquerade.ALWAYS), "forwarding"),
            ("vip", 81, REJECT, "refusing"),
            ("vip", 82, DROP, "dropping"),
        ):
            node.put_frontend(role, port, protocol, family, to)
            sets[kind].add((packed(role, family), port, int(number)))
            serving |= {(packed(backend, family), at, int(number)) for backend, at in to.backends}
    node.put_device(UPLINK, family)
    return Judge(**sets, serving=serving, own={packed("uplink", family)})


def _corpus(node: Loaded, family: int) -> list[bytes]:
    """One valid packet of each kind that the programs tell apart, and what becomes of it on its way."""
    frames = [arp(), Packet("outside", 1, "vip", 80, vlan=7).frame(family)]
    requests = []
    for protocol in PROTOCOLS:
        for role, port in (("vip", 80), ("node", 30080), ("vip", 81), ("vip", 82), ("vip2", 80)):
            requests.append(Packet("outside", 40000, role, port, protocol, payload=b"payload"))
    requests.append(Packet("outside", 40001, "vip", 81, tcp_options=(("MSS", 1460), ("Timestamp", (1, 2)))))
    requests.append(Packet("outside", 40002, "vip", 80, flags="FA"))
    requests.append(Packet("outside", 40003, "vip", 80, "echo"))
    if family == 4:
        requests.append(Packet("outside", 40004, "vip", 80, options=12))
        requests.append(Packet("outside", 40004, "vip", 81, options=12))
        requests.append(Packet("outside", 40005, "vip", 80, "udp", no_checksum=True))
    else:
        for headers in (("hop",), ("dest", "route"), ("hop", "dest", "route", "dest")):
            requests.append(Packet("outside", 40004, "vip", 80, extensions=headers))
    for fragment in ((0, True), (64, True), (128, False)):
        requests.append(Packet("outside", 40006, "vip", 80, "udp", payload=bytes(56), fragment=fragment))
        requests.append(Packet("outside", 40006, "node", 30080, "udp", payload=bytes(56), fragment=fragment))
    for request in requests:
        frames.append(request.frame(family))
        entered = node.ingress(frames[-1], family)
        if entered.verdict == UNSPEC and entered.frame != frames[-1]:
            frames += [entered.frame, node.egress(entered.frame, family).frame]
    for protocol in ("tcp", "udp"):
        for role, port in (("local", 80), ("remote", 8080)):
            inside = Packet("outside", 40000, role, port, protocol)
            frames.append(inside.reply().frame(family))
            for kind in ("too-big", "unreachable", "exceeded"):
                frames.append(icmp_error(kind, role, "outside", inside, family))
                frames.append(icmp_error(kind, "router", "vip", Packet("vip", 80, "outside", 40000), family))
    return frames


# Hardware's sums are for the packet tests: noise has none that could stay true.
@pytest.mark.parametrize("node", ("no-sum",), indirect=True)
@pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))
def test_any_bytes(node: Loaded, family: int) -> None:
    judge = _world(node, family)
    corpus = _corpus(node, family)
    runners = ((False, Runner(node.programs["tc_egress"])), (True, Runner(node.programs["tc_ingress"])))
    begin = time.perf_counter()
    verdicts = fuzz(runners, corpus, judge, COUNT, SEED + family, pytest.fail)
    seconds = time.perf_counter() - begin
    print(f"seed {SEED + family}: {COUNT} packets, {seconds / COUNT * 1e6:.2f} µs each, verdicts {verdicts}")
    assert sum(verdicts.values()) == COUNT
    assert all(verdicts[verdict] > COUNT // 1000 for verdict in (UNSPEC, SHOT, REDIRECT)), verdicts
    assert not IMPOSSIBLE & node.counters().keys(), node.counters()


def test_the_judge_notices(node: Loaded) -> None:
    """A judge that never complains would pass anything."""
    judge = _world(node, 4)
    ours, others = Packet("outside", 1, "vip", 80).frame(4), Packet("outside", 1, "vip2", 80).frame(4)
    local = Packet("outside", 1, "local", 80).frame(4)
    assert judge.complaint(ours, UNSPEC, local, True) == ""
    assert judge.complaint(ours, UNSPEC, local[:-1] + b"\1", True) != ""
    assert judge.complaint(ours, UNSPEC, local[:25] + b"\0" + local[26:], True) != ""
    payload = Packet("outside", 1, "vip", 80, payload=b"x").frame(4)
    assert judge.complaint(payload, UNSPEC, payload[:-1] + b"y", True) != ""
    assert judge.complaint(others, UNSPEC, local, True) != ""
    assert judge.complaint(others, SHOT, others, True) != ""
    assert judge.complaint(others, REDIRECT, others, True) != ""
    assert judge.complaint(ours, 0, ours, True) != ""
