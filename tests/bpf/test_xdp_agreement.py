"""XDP and tc do with every packet what `decide` says, with rows that the real writer has written into the kernel.

Rules of this file: worlds and packets are those of tests/plan, passed as frames. Two sets of programs share the rows of
desired state and the clients that affinity remembers, and nothing else: one has XDP before tc, the other tc alone.
Where chance has no say (one backend, a table, a client that is remembered), both must choose the same backend.

EBPFLB_FUZZ sets how many packets there are (an eighth of it; default: 125000), EBPFLB_FUZZ_SEED which.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import msgspec
import pytest

from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.dataplane.bpf.locality import NodeFacts
from ebpflb.dataplane.bpf.maps import KernelMaps
from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.decide import Decision, Outcome, Packet, decide
from ebpflb.demo import namespaces
from ebpflb.model import Protocol
from ebpflb.policy import routes
from ebpflb.routes import Algorithm, RouteTable, packed
from tests.bpf.fuzz import Runner
from tests.bpf.loaded import REDIRECT, SHOT, UNSPEC, XDP_DROP, XDP_PASS, XDP_TX, Loaded
from tests.bpf.xdp_lab import WIRES, Lab, laboratory, uplinks
from tests.packets import MAC_CLIENT, MAC_NODE, checksum, parse
from tests.plan.worlds import World, packets, random_world
from tests.world import NODE_IP, v6

pytestmark = [pytest.mark.root, pytest.mark.bpf_load, pytest.mark.fuzz, pytest.mark.slow, pytest.mark.timeout(3600)]

COUNT = max(500, int(os.environ.get("EBPFLB_FUZZ", "1000000")) // 8)
SEED = int(os.environ.get("EBPFLB_FUZZ_SEED", "20260101"))
LEAST = 40
"""The share of packets, as one in so many, that each verdict has at least."""

TRIED = {Outcome.FORWARD: 1.0, Outcome.DROP: 1.0, Outcome.REJECT: 0.4, Outcome.NOT_SERVICE: 0.2}
"""How many of the packets of each verdict: most of a grid are nobody's."""

OWN_STATE = ("flows", "fragments", "marks", "hops", "neighbours", "counters", "traffic", "sockets")
LOW, HIGH = 32768, 60999
FACTS = NodeFacts(netns=1, flow_idle=1 << 40, refresh=250, snat_low=LOW, snat_high=HIGH)
NODE = {False: packed(NODE_IP)[12:], True: packed(v6(NODE_IP))}
ETHERNET = {
    version6: bytes.fromhex((MAC_NODE + MAC_CLIENT).replace(":", "")) + (b"\x86\xdd" if version6 else b"\x08\x00")
    for version6 in (False, True)
}

MACS = {name: bytes.fromhex(wire.mac.replace(":", "")) for name, wire in WIRES.items()}


def short(address: str) -> bytes:
    """4 or 16 bytes."""
    return packed(address) if ":" in address else packed(address)[12:]


def frame_of(packet: Packet, sport: int, chance: Random) -> bytes:
    """The packet's frame, with all that decides nothing at random."""
    source, destination = short(packet.source), short(packet.destination)
    payload = chance.randbytes(chance.randrange(24))
    ports = struct.pack("!HH", sport, packet.port)
    number = int(packet.protocol)
    if packet.protocol is Protocol.TCP:
        flags = chance.choice((0x02, 0x02, 0x02, 0xC2, 0x10, 0x18))
        body = ports + struct.pack("!IIBBHHH", chance.getrandbits(32), 0, 0x50, flags, 8192, 0, 0) + payload
        at = 16
    elif packet.protocol is Protocol.UDP:
        body = ports + struct.pack("!HH", 8 + len(payload), 0) + payload
        at = 6
    else:
        body, at = ports + bytes(8), 0
    if at:
        pseudo = source + destination + struct.pack("!II", len(body), number)
        body = body[:at] + struct.pack("!H", checksum(pseudo + body) or 0xFFFF) + body[at + 2 :]
    hops, version6 = chance.randrange(3, 256), len(source) == 16  # the answers begin with one less
    if version6:
        header = struct.pack("!IHBB", 0x60000000 | chance.getrandbits(20), len(body), number, hops)
        return ETHERNET[True] + header + source + destination + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), chance.getrandbits(16), 0, hops, number, 0)
    header = header[:10] + struct.pack("!H", checksum(header + source + destination))
    return ETHERNET[False] + header + source + destination + body


class Became(NamedTuple):
    """What became of a packet: its tuple at the backend where it was forwarded."""

    verdict: Outcome
    source: str = ""
    sport: int = 0
    backend: tuple[str, int] = ("", 0)
    frame: bytes = b""


class Path:
    """One set of programs, on the devices."""

    def __init__(self, node: Loaded, lab: Lab) -> None:
        self.node = node
        up, pod = lab.index["up0"], lab.index["pod0"]
        self.xdp = Runner(node.programs["xdp_ingress"], up, xdp=True)
        self.enter = {"up0": Runner(node.programs["tc_ingress"], up), "pod0": Runner(node.programs["tc_ingress"], pod)}
        self.leave = {"up0": Runner(node.programs["tc_egress"], up), "pod0": Runner(node.programs["tc_egress"], pod)}

    def by_tc(self, frame: bytes, device: str, locals: frozenset[str], itself: bool) -> Became:
        """Through the stack: it leads to this node itself, by the pods' device, or out. `itself`: the frontend may be
        its own backend (an external IP that is the node's), where only the flow's row tells."""
        verdict, out = self.enter[device].passed(frame)
        if verdict == SHOT:
            return Became(Outcome.DROP)
        if verdict == REDIRECT:
            found = parse(out)
            assert found and not found.problems, found
            return Became(Outcome.REJECT)
        assert verdict == UNSPEC, verdict
        found = parse(out)
        assert found
        if out == frame and not (itself and self.knows(text(found.source), found.ports)):
            return Became(Outcome.NOT_SERVICE)
        backend = text(found.destination)
        if backend not in locals:
            verdict, out = self.leave[way(backend)].passed(out)
            assert verdict == UNSPEC, (verdict, self.node.counters())
        return forwarded(out)

    def knows(self, source: str, ports: tuple[int, int] | None) -> bool:
        """Whether a client's flow has rows."""
        return any((row.source, row.sport, row.dport) == (source, *(ports or ())) for row in self.node.flows())

    def by_xdp(self, frame: bytes) -> Became | None:
        """Before the stack; None if it is passed up."""
        verdict, out = self.xdp.passed(frame)
        if verdict == XDP_PASS:
            assert out == frame, "passed up, and not as it came"
            return None
        if verdict == XDP_DROP:
            return Became(Outcome.DROP)
        assert verdict == XDP_TX, (verdict, self.node.counters())
        return forwarded(out)


def text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(address) == 16 else socket.AF_INET, address)


def way(backend: str) -> str:
    """By which device the lab's routes lead there."""
    return "pod0" if backend.startswith(("10.0.1.", "fd00:10:0:1:")) else "up0"


def forwarded(out: bytes) -> Became:
    found = parse(out)
    assert found and found.ports and not found.problems, (found, out.hex())
    sport, dport = found.ports
    return Became(Outcome.FORWARD, text(found.source), sport, (text(found.destination), dport), out)


@pytest.fixture(scope="module")
def lab(artifact: Artifact) -> Iterator[Lab]:
    """Everything outside is behind a gateway, this node's pods are behind pod0."""
    with laboratory(artifact) as made:
        lines = [
            "route add default via 192.168.0.1 dev up0 onlink",
            "route add default via fd00:192:168::1 dev up0 onlink",
        ]
        lines += [
            f"neigh add {each} lladdr {MAC_CLIENT} dev up0 nud permanent" for each in ("192.168.0.1", "fd00:192:168::1")
        ]
        for cidr in ("10.0.1.0/24", "fd00:10:0:1::/64"):
            lines.append(f"route add {cidr} dev pod0")
        namespaces.ip(made.namespace, lines)
        yield made


def limited(packet: Packet, decision: Decision) -> bool:
    """Whether ebpflb.dataplane.limits has a limit of bpf's for it: SCTP's ports cannot be changed."""
    return packet.protocol is Protocol.SCTP and any(each.backend.port != packet.port for each in decision.candidates)


def table_of(world: World, chance: Random) -> RouteTable:
    """By Maglev as often as by chance."""
    if chance.random() < 0.5:
        return routes(*world)
    label = Algorithm.MAGLEV.label
    return routes(world.snapshot, msgspec.structs.replace(world.options, default_algorithm=label))


def is_pods(table: RouteTable, interface: str) -> bool:
    name = table.locality.pod_interface
    return name != "" and (interface.startswith(name[:-1]) if name.endswith("*") else interface == name)


def reply_to(request: bytes, became: Became) -> bytes:
    """The backend's answer to the frame that reached it."""
    out = became.frame
    at = 14
    if out[12:14] == b"\x08\x00":
        l4 = at + 20
        swapped = out[26:30], out[30:34]
        body = out[:26] + swapped[1] + swapped[0] + out[34:]
    else:
        l4 = at + 40
        body = out[:22] + out[38:54] + out[22:38] + out[54:]
    body = body[:l4] + body[l4 + 2 : l4 + 4] + body[l4 : l4 + 2] + body[l4 + 4 :]
    return request[:12] + body[12:]


def test_xdp_and_tc_and_decide_agree(lab: Lab, artifact: Artifact) -> None:
    """Invariant: for every first packet that enters, XDP with tc behind it, tc alone, and `decide` agree about verdict,
    backend and tuple; what is no Service's comes back as it was; replies find back."""
    chance = Random(SEED)
    counted: Counter[str] = Counter()
    begin = time.process_time()
    lab.clear(0)
    shared = {name: fd for name, fd in lab.node.maps.items() if name not in OWN_STATE}
    alone = Loaded(artifact, programs=("tc_ingress", "tc_egress", "xdp_ingress"), shared=shared)
    try:
        with namespaces.inside(lab.namespace):
            both, tc = Path(lab.node, lab), Path(alone, lab)
            writer = Writer(KernelMaps(lab.node.maps), FACTS, time.monotonic)
            while counted["compared"] < COUNT:
                world = random_world(chance)
                table = table_of(world, chance)
                assert writer.sync(table).complete
                for path in (both, tc):
                    path.node.forget("flows", "affinity")
                compare(world, table, lab, both, tc, chance, counted)
    finally:
        alone.close()
    seconds = time.process_time() - begin
    print(f"seed {SEED}: {dict(counted)}, {seconds / counted['compared'] * 1e6:.0f} µs each")
    assert all(counted[each.name] * LEAST > counted["compared"] for each in Outcome), counted
    assert counted["sent by XDP"] * LEAST > counted["compared"], counted
    assert counted["the same backend of several"] * LEAST > counted["compared"], counted


def compare(
    world: World, table: RouteTable, lab: Lab, both: Path, tc: Path, chance: Random, counted: Counter[str]
) -> None:
    """The whole grid of one world."""
    local = frozenset(table.locality.node_addresses)
    asked = sorted(packets(table), key=lambda each: each[0].interface)
    interface = ""
    for client, packet in asked:
        if not client.interface:
            continue  # the node's own packets do not enter
        if client.interface != interface:
            interface = client.interface
            if interface != "eth0":
                row = dataclasses.replace(uplinks()["pod0"], masquerade="uplink", pod=is_pods(table, interface))
                lab.put_device("pod0", row)
        if interface != "eth0" and chance.random() < 0.6:
            continue
        decision = decide(table, packet)
        if limited(packet, decision) or chance.random() > TRIED[decision.verdict]:
            continue
        sport = chance.randrange(1024, 65536)
        device = "up0" if interface == "eth0" else "pod0"
        frame = MACS[device] + frame_of(packet, sport, chance)[6:]
        found = both.by_xdp(frame) if device == "up0" else None
        sent = found is not None and found.verdict is Outcome.FORWARD
        candidates = {(each.backend.address, each.backend.port): each.masquerade for each in decision.candidates}
        itself = (packet.destination, packet.port) in candidates
        other = tc.by_tc(frame, device, local, itself)
        if found is None:
            found = both.by_tc(frame, device, local, itself)
        where = (SEED, world, packet, decision, found, other, lab.node.counters())
        assert found.verdict is other.verdict is decision.verdict, where
        counted["compared"] += 1
        counted[decision.verdict.name] += 1
        if decision.verdict is not Outcome.FORWARD:
            continue
        for became in (found, other):
            assert became.backend in candidates, where
            masquerade = candidates[became.backend]
            port_holds = LOW <= became.sport <= HIGH if packet.protocol is not Protocol.SCTP else became.sport == sport
            if masquerade:
                assert became.source == text(NODE[":" in packet.source]) and port_holds, where
            else:
                assert (became.source, became.sport) == (packet.source, sport), where
        plain = device == "up0" and packet.protocol is not Protocol.SCTP
        wanted = (
            plain and candidates[found.backend] and way(found.backend[0]) == "up0" and found.backend[0] not in local
        )
        assert sent == wanted, where
        counted["sent by XDP"] += sent
        route = decision.route
        assert route is not None
        if len(candidates) == 1 or route.affinity_seconds or route.algorithm is Algorithm.MAGLEV:
            assert found.backend == other.backend, where
            counted["the same backend of several"] += len(candidates) > 1
        if chance.random() < 0.25 and found.backend[0] not in local and packet.protocol is not Protocol.SCTP:
            answer(both, tc, found, other, frame, packet, sport, local, sent)
            counted["replies"] += 1


def answer(
    both: Path, tc: Path, found: Became, other: Became, frame: bytes, packet: Packet, sport: int,
    local: frozenset[str], sent: bool,
) -> None:  # fmt: skip
    """Both backends' answers come to the client from the frontend."""
    for path, became in ((both, found), (tc, other)):
        enters = way(became.backend[0])
        reply = MACS[enters] + reply_to(frame, became)[6:]
        out = path.by_xdp(reply) if path is both and enters == "up0" else None
        assert not sent or path is tc or out is not None, "XDP sends replies of what it has sent"
        if out is None:
            verdict, between = path.enter[enters].passed(reply)
            assert verdict == UNSPEC
            verdict, after = path.leave[way(packet.source)].passed(between)
            assert verdict == UNSPEC
            out = forwarded(after)
        assert (out.source, out.sport, *out.backend) == (packet.destination, packet.port, packet.source, sport)
