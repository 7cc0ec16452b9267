"""What benchmarks of the packet programs share: where they run, their packets, and how a program is divided by an empty
one.

Rules of this file: a network namespace with one device, by which packets come and leave (XDP_TX); its way and its
neighbour are permanent, so that the FIB always answers. Every flow's first packet is checked byte by byte while it is
set up, and the last of each batch while it is measured. What makes packets new again (bench/replay.py) is measured
before an empty program, too, and taken off.
"""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

from bench import world as numbers
from bench.lab import Lab
from bench.replay import Bare, Packet, Replay, Variant, measure
from bench.wire import ACK, SYN, TCP, UDP, Tuple, frame, offsets
from bench.world import BACKEND_PORT, CLIENT_PORT, FIRST, GATEWAY, NODE, SERVICE_PORT, Device, World
from ebpflb.dataplane.bpf import program_calls
from ebpflb.dataplane.bpf.assembly import EXIT, assemble, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_XDP, XDP_HOOKS
from ebpflb.demo import namespaces
from ebpflb.errors import EbpflbError
from ebpflb.routes import packed

XDP_PASS, XDP_TX = 2, 3
Check = Callable[[program_calls.TestRun, int], None]
"""Sees the last packet of a batch and its flow's number; raises EbpflbError where it is not right."""

NEIGHBOUR = bytes((2, 0, 0, 0, 0, 0xFE))
KINDS = {"tcp4": (4, TCP), "tcp6": (6, TCP), "udp4": (4, UDP)}
_ATTACH = XDP_HOOKS["xdp_ingress"].attach_type


@contextmanager
def wire(lab: Lab) -> Iterator[Device]:
    """Inside a namespace with one device, whose neighbour answers for everything."""
    place = lab.namespace("wire", "node")
    namespaces.create(place)
    try:
        namespaces.ip(
            place,
            [
                "link add wan type veth peer name beyond",
                "link set wan up",
                "link set beyond up",
                f"addr add {NODE[4]}/24 dev wan",
                f"addr add {NODE[6]}/64 dev wan nodad",
                *(f"neigh add {GATEWAY[n]} lladdr 02:00:00:00:00:fe dev wan nud permanent" for n in (4, 6)),
                *(f"route add default via {GATEWAY[n]} dev wan" for n in (4, 6)),
            ],
        )
        namespaces.sysctl(place, {"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1})
        said = subprocess.run(["ip", "-n", place, "-j", "link", "show"], capture_output=True, text=True, check=True)
        links = {link["ifname"]: link for link in json.loads(said.stdout)}
        mac = bytes.fromhex(links["wan"]["address"].replace(":", ""))
        with namespaces.inside(place):
            yield Device(links["wan"]["ifindex"], mac, links["beyond"]["ifindex"])
    finally:
        namespaces.delete(place)


class Bench(NamedTuple):
    """What a scenario needs to make packets of its kind."""

    world: World
    device: Device
    version: int
    protocol: int
    xdp: bool = True

    def context(self, size: int) -> bytes:
        """A `struct xdp_md` or `struct __sk_buff`: the packet passes the device."""
        if not self.xdp:
            return struct.pack("=40xI148x", self.device.number)
        return struct.pack("=IIIIII", 0, size, 0, self.device.number, 0, 0)

    def frame(self, between: Tuple, flags: int = ACK) -> bytes:
        """As it arrives from the neighbour."""
        return frame(self.device.mac + NEIGHBOUR, between, self.protocol, flags)

    def sent(self, between: Tuple, flags: int = ACK) -> bytes:
        """As it leaves to the neighbour, one hop further."""
        return frame(NEIGHBOUR + self.device.mac, between, self.protocol, flags, hops=63)

    def request(self, flow: int, service: int) -> Tuple:
        """Client `flow` asks a Service."""
        source, destination = numbers.client(flow, self.version), numbers.service(service, self.version)
        return Tuple(source, CLIENT_PORT, destination, SERVICE_PORT)

    def forwarded(self, flow: int, service: int) -> Tuple:
        """The same as its one backend sees it."""
        node = packed(NODE[self.version])
        return Tuple(node, FIRST + flow, numbers.backend(service, self.version), BACKEND_PORT)

    def begin(self, flow: int, service: int) -> None:
        """Send a flow's first packet and check what becomes of it."""
        self.world.ports(FIRST + flow, FIRST + flow)
        there = self.frame(self.request(flow, service), SYN)
        result = program_calls.prog_test_run(
            self.world.programs["xdp_ingress"], there, context=self.context(len(there))
        )
        if result.verdict != XDP_TX or result.data != self.sent(self.forwarded(flow, service), SYN):
            counted = {name: value for name, value in self.world.counted().items() if value}
            raise EbpflbError(f"flow {flow} was not sent on as it should be: verdict {result.verdict}, {counted}")

    def packet(self, between: Tuple, vary: Sequence[str], flags: int = ACK) -> Packet:
        """One that is as new in each run; `vary` names what follows the flow's number, "client!" that of the run."""
        where = offsets(self.version, self.protocol)
        made = {
            "client": lambda: where.vary_source(numbers.client(0, self.version)),
            "hot": lambda: where.vary_source(between.source),
            "client!": lambda: where.vary_source(numbers.client(0, self.version), fresh=True),
            "service": lambda: where.vary_destination(numbers.service(0, self.version)),
            "stranger": lambda: where.vary_destination(numbers.stranger(0, self.version)),
            "backend": lambda: where.vary_source(numbers.backend(0, self.version)),
            "to backend": lambda: where.vary_destination(numbers.backend(0, self.version)),
            "to client": lambda: where.vary_destination(numbers.client(0, self.version)),
            "port": lambda: where.vary_ports(BACKEND_PORT, FIRST),
        }
        there = self.frame(between, flags)
        return Packet(there, where.fields, tuple(made[name]() for name in vary), self.context(len(there)))


def turned(between: Tuple) -> Tuple:
    """The way back."""
    return Tuple(between.destination, between.destination_port, between.source, between.source_port)


def is_sent(bench: Bench, expected: Callable[[int], Tuple] | None) -> Check:
    """A check that a packet was sent on; with the tuple that a flow with this number gets, where that is known."""
    return becomes(bench, XDP_TX, NEIGHBOUR + bench.device.mac, expected)


def becomes(bench: Bench, verdict: int, macs: bytes, expected: Callable[[int], Tuple] | None) -> Check:
    """A check of a packet's verdict, its Ethernet addresses and its tuple."""
    where = offsets(bench.version, bench.protocol)

    def check(run: program_calls.TestRun, flow: int) -> None:
        right = run.verdict == verdict and run.data[:12] == macs
        if right and expected:
            there = frame(macs, expected(flow), bench.protocol)
            right = run.data[where.source : where.ports + 4] == there[where.source : where.ports + 4]
        if not right:
            raise EbpflbError(f"flow {flow}: a packet became something else, verdict {run.verdict}: {run.data.hex()}")

    return check


class Scenario(NamedTuple):
    """One kind of packet for one program. `name` is unique among those that are measured together."""

    name: str
    program: int
    packet: Packet
    flows: int
    check: Check
    fresh: bool = False


class Measured(NamedTuple):
    """Nanoseconds: the program's own share, and the empty program's whole."""

    net: float
    empty: float

    @property
    def whole(self) -> float:
        """What the program would take without what makes packets new."""
        return self.net + self.empty

    @property
    def ratio(self) -> float:
        """The program ÷ the empty one."""
        return self.whole / self.empty


class Effort(NamedTuple):
    """How often: rounds, and runs in each of them (of flows that begin: a tenth). `fill`: flows that begin before."""

    rounds: int
    repeat: int
    fill: int = 140_000


def take(scenarios: Sequence[Scenario], type: int, empty: int, effort: Effort) -> dict[str, Measured]:
    """Measure scenarios by name, all in turn, each beside the `empty` program of the same type."""
    attach_type = _ATTACH if type == PROG_TYPE_XDP else 0
    with ExitStack() as stack:

        def replay(program: int, of: Scenario) -> Replay:
            return stack.enter_context(closing(Replay(program, type, of.packet, of.flows, attach_type)))

        ours = [replay(each.program, each) for each in scenarios]
        none = [replay(empty, each) for each in scenarios]
        variants = []
        for each, mine, bare in zip(scenarios, ours, none, strict=True):
            repeat = effort.repeat // 10 if each.fresh else effort.repeat
            # Once a second of use a flow's other rows are looked at: not what a packet costs at this rate.
            before = 0 if each.fresh else each.flows
            variants.append(Variant(each.name, mine, repeat, each.check, before))
            variants.append(Variant(f"{each.name} empty", bare, effort.repeat))
        plain = Bare(empty, scenarios[0].packet)
        variants.append(Variant("empty", plain, effort.repeat))
        for variant in variants:  # once for nothing: what is cold, and maps that are not as full as they get
            variant.replay.run(effort.fill if variant.repeat < effort.repeat else variant.repeat)
        samples = measure(variants, effort.rounds)
    least = {name: min(values) for name, values in samples.items()}
    return {
        each.name: Measured(max(least[each.name] - least[f"{each.name} empty"], 0.0), least["empty"])
        for each in scenarios
    }


def empty_program(type: int, verdict: int) -> int:
    """A verdict and nothing else."""
    return program_calls.prog_load(
        type, assemble(move(0, verdict), EXIT), "empty", _ATTACH if type == PROG_TYPE_XDP else 0
    )
