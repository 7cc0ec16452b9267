"""Any bytes at all through XDP, with tc behind it.

Invariant: whatever arrives, XDP passes it up byte-identical, sends it with nothing changed but MACs, hop, addresses,
ports and checksums, or drops what a row says to drop; and a sum that was right stays right.

EBPFLB_FUZZ sets how many packets there are (half of it; default: half a million), EBPFLB_FUZZ_SEED which.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest

from ebpflb.routes import Masquerade
from tests.bpf.fuzz import Runner, mutated, tuples_of
from tests.bpf.loaded import DROP, PROTOCOLS, REJECT, XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX, To
from tests.bpf.xdp_lab import VLAN, WIRES, Lab, sport_of
from tests.packets import ETHERNET, Packet, arp, icmp_error, packed, problems_of

pytestmark = [pytest.mark.root, pytest.mark.bpf_load, pytest.mark.fuzz, pytest.mark.slow, pytest.mark.timeout(3600)]

COUNT = int(os.environ.get("EBPFLB_FUZZ", "1000000")) // 4
SEED = int(os.environ.get("EBPFLB_FUZZ_SEED", "20260101"))

IMPOSSIBLE = {"PACKET_NO_BACKEND", "PACKET_NO_ADDRESS", "PACKET_NO_ROOM", "PACKET_OUT_OF_RANGE", "SOCKET_FORWARDED"}


class XdpJudge:
    """What may become of a frame that enters by up0. `ends` are (address, port, protocol) by what rows say of them."""

    def __init__(
        self, forwarding: set[tuple[bytes, int, int]], dropping: set[tuple[bytes, int, int]], own: set[bytes]
    ) -> None:
        self.forwarding, self.dropping, self.own = forwarding, dropping, own

    def complaint(self, frame: bytes, verdict: int, out: bytes) -> str:
        """What is wrong with this outcome, "" if nothing is."""
        if verdict == XDP_PASS:
            return "" if out == frame else "passed up, but not as it came"
        plain = untagged(frame)
        ends = {(destination, dport, protocol) for _, destination, _, dport, protocol in tuples_of(plain)}
        if verdict == XDP_DROP:
            return "" if ends & (self.dropping | self.forwarding) else "dropped although no row speaks of it"
        if verdict not in (XDP_TX, XDP_REDIRECT):
            return f"verdict {verdict}"
        if not ends & self.forwarding and not any(destination in self.own for destination, _, _ in ends):
            return "sent although no row speaks of it"
        if len(out) != len(frame):
            return "another length"
        if frame[:6] != MAC:
            return "not for this device, but sent"
        tag = len(frame) - len(plain)
        ip = ETHERNET + tag
        v4 = frame[ip] >> 4 == 4
        l4 = ip + (20 if v4 else 40)
        protocol = frame[ip + (9 if v4 else 6)]
        if protocol not in (6, 17):
            return "neither TCP nor UDP"
        allowed = {*range(12), *((ip + 8, ip + 10, ip + 11) if v4 else (ip + 7,)), *range(l4, l4 + 4)}
        allowed |= {*range(ip + 12, ip + 20)} if v4 else {*range(ip + 8, ip + 40)}
        allowed |= {l4 + 16, l4 + 17} if protocol == 6 else {l4 + 6, l4 + 7}
        for at, (was, now) in enumerate(zip(frame, out, strict=True)):
            if was != now and at not in allowed:
                return f"byte {at} changed"
        hops = ip + (8 if v4 else 7)
        if out[hops] + 1 != frame[hops] or out[hops] == 0:
            return "the hop is wrong"
        if not problems_of(plain) and problems_of(untagged(out)):
            return "wrong " + ", ".join(problems_of(untagged(out)))
        return ""


MAC = bytes.fromhex(WIRES["up0"].mac.replace(":", ""))


def untagged(frame: bytes) -> bytes:
    """Without the tag of a VLAN, if it has one."""
    return frame[:12] + frame[16:] if frame[12:14] == b"\x81\x00" else frame


def _world(lab: Lab) -> XdpJudge:
    family = lab.family
    ends: dict[str, set[tuple[bytes, int, int]]] = {"forwarding": set(), "dropping": set()}
    for protocol, number in PROTOCOLS.items():
        for role, port, to, kind in (
            ("node", 30080, To((("remote", 8080), ("faraway", 8080)), masquerade=Masquerade.ALWAYS), "forwarding"),
            ("lb", 80, To((("remote", 80),), masquerade=Masquerade.ALWAYS, affinity=60, table=1), "forwarding"),
            ("lb", 83, To((("local", 80),)), "forwarding"),
            ("lb", 84, To((("tagremote", 80),), masquerade=Masquerade.ALWAYS), "forwarding"),
            ("vip", 81, REJECT, ""),
            ("vip", 82, DROP, "dropping"),
        ):
            lab.node.put_frontend(role, port, protocol, family, to)
            if kind:
                ends[kind].add((packed(role, family), port, int(number)))
    lab.node.put_owned("vip", family)
    lab.node.put_settings(refresh=1000)
    own = {packed(role, family) for role in ("uplink", "uplink2", "tagged")}
    return XdpJudge(**ends, own=own)


def _corpus(lab: Lab) -> list[bytes]:
    """One of each kind, and the answers to what was sent."""
    family = lab.family
    frames = [arp()]
    requests = [
        Packet("outside", 40000, role, port, protocol, payload=b"payload")
        for protocol in PROTOCOLS
        for role, port in (("node", 30080), ("lb", 80), ("lb", 83), ("vip", 81), ("vip", 82), ("vip", 7), ("vip2", 80))
    ]
    requests.append(Packet("outside", 40001, "lb", 80, tcp_options=(("MSS", 1460), ("Timestamp", (1, 2)))))
    requests.append(Packet("outside", 40002, "lb", 80, flags="FA"))
    requests.append(Packet("outside", 40003, "lb", 80, "echo"))
    requests += [Packet("tagclient", 40004, "lb", 84, protocol, vlan=VLAN) for protocol in ("tcp", "udp")]
    requests.append(Packet("outside", 40005, "lb", 80, "udp", no_checksum=True))
    requests.append(Packet("outside", 40006, "lb", 80, "udp", payload=bytes(56), fragment=(0, True)))
    requests.append(Packet("outside", 40006, "lb", 80, "udp", payload=bytes(56), fragment=(64, False)))
    if family == 4:
        requests.append(Packet("outside", 40007, "lb", 80, options=12))
    else:
        requests.append(Packet("outside", 40007, "lb", 80, extensions=("hop", "dest", "route")))
    for request in requests:
        frame = request.frame(family)
        frames.append(frame)
        ran = lab.xdp(frame)
        if ran.verdict == XDP_TX and request.vlan is None:
            inside = request.but(source="uplink", sport=sport_of(ran.frame), destination="remote", dport=80)
            frames.append(inside.reply().frame(family))
            frames += [icmp_error(kind, "router", "uplink", inside, family) for kind in ("too-big", "unreachable")]
    return frames


def test_any_bytes(lab: Lab) -> None:
    judge = _world(lab)
    corpus = _corpus(lab)
    xdp = Runner(lab.node.programs["xdp_ingress"], lab.index["up0"], xdp=True)
    verdicts: Counter[int] = Counter()
    begin = time.perf_counter()
    chance = random.Random(SEED + lab.family)
    for number, length in enumerate(mutated(xdp.frame, corpus, COUNT, chance)):
        verdict, written = xdp.run(length)
        verdicts[verdict] += 1
        if verdict == XDP_PASS and written == length and xdp.out[:length] == xdp.frame[:length]:
            continue
        before, after = bytes(xdp.frame[:length]), bytes(xdp.out[:written])
        complaint = judge.complaint(before, verdict, after)
        assert not complaint, f"packet {number} of seed {SEED + lab.family}: {complaint}\n{before.hex()}\n{after.hex()}"
    seconds = time.perf_counter() - begin
    print(f"seed {SEED + lab.family}: {COUNT} packets, {seconds / COUNT * 1e6:.2f} µs each, verdicts {dict(verdicts)}")
    assert min(verdicts[each] for each in (XDP_PASS, XDP_TX, XDP_DROP)) > COUNT // 1000, verdicts
    assert not IMPOSSIBLE & lab.node.counters().keys(), lab.node.counters()


def test_the_judge_notices(lab: Lab) -> None:
    """A judge that never complains would pass anything."""
    judge = _world(lab)
    frame = Packet("outside", 40000, "lb", 80, payload=b"payload").frame(lab.family)
    nobodys = Packet("outside", 40000, "vip2", 80, payload=b"payload").frame(lab.family)
    out = lab.sent(frame)
    assert judge.complaint(frame, XDP_TX, out) == ""
    assert judge.complaint(frame, XDP_PASS, frame) == ""
    wrong = out[:-1] + bytes([out[-1] ^ 1])
    at = ETHERNET + (8 if lab.family == 4 else 7)
    for verdict, was, now in (
        (XDP_TX, frame, wrong),
        (XDP_TX, frame, out[:-1]),
        (XDP_TX, frame, out[:at] + frame[at : at + 1] + out[at + 1 :]),
        (XDP_TX, nobodys, out),
        (XDP_DROP, nobodys, nobodys),
        (XDP_PASS, frame, out),
        (XDP_TX, frame[:5] + b"\x77" + frame[6:], out),
        (0, frame, frame),
    ):
        assert judge.complaint(was, verdict, now) != "", (verdict, now.hex())
