"""Nanoseconds for each packet before the stack: our XDP program divided by an empty one.

Rules of this file: see bench/frames.py. Where Services are many, each has a flow, and all are visited in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from bench import world as numbers
from bench.frames import (
    KINDS,
    NEIGHBOUR,
    XDP_PASS,
    XDP_TX,
    Bench,
    Effort,
    Measured,
    Scenario,
    becomes,
    empty_program,
    is_sent,
    take,
    turned,
    wire,
)
from bench.lab import Lab
from bench.report import Figure
from bench.wire import SYN, Tuple
from bench.world import CLIENT_PORT, FIRST, LAST, SERVICE_PORT, World
from ebpflb.dataplane.bpf.artifact import load_artifact
from ebpflb.dataplane.bpf.constants import PROG_TYPE_XDP
from ebpflb.dataplane.bpf.facts import has_set_retval

HOT_FLOWS = 10
FAR = 20000
"""The first client of the hot Service's flows, behind all others."""


def established(bench: Bench, flows: int, name: str) -> list[Scenario]:
    """Packets of known flows, one of each Service's, which are begun here."""
    for flow in range(flows):
        bench.begin(flow, flow)
    bench.world.ports(FIRST, LAST)
    program = bench.world.programs["xdp_ingress"]
    there = bench.packet(bench.request(0, 0), ["client", "service"])
    back = bench.packet(turned(bench.forwarded(0, 0)), ["backend", "port"])
    return [
        Scenario(f"{name} request", program, there, flows, is_sent(bench, lambda flow: bench.forwarded(flow, flow))),
        Scenario(f"{name} reply", program, back, flows, is_sent(bench, lambda flow: turned(bench.request(flow, flow)))),
    ]


def new(bench: Bench, services: int, name: str) -> Scenario:
    """Packets which begin flows, to each of the first `services` Services in turn."""
    vary = ["client!", "service"] if services > 1 else ["client!"]
    packet = bench.packet(bench.request(0, 0), vary, SYN)
    program = bench.world.programs["xdp_ingress"]
    return Scenario(name, program, packet, services, is_sent(bench, None), fresh=True)


def nobodys(bench: Bench, strangers: int, name: str) -> Scenario:
    """Packets to addresses that have no Service."""
    source = numbers.client(0, bench.version)
    between = Tuple(source, CLIENT_PORT, numbers.stranger(0, bench.version), SERVICE_PORT)
    packet = bench.packet(between, ["client", "stranger"])

    def whither(flow: int) -> Tuple:
        source, stranger = numbers.client(flow, bench.version), numbers.stranger(flow, bench.version)
        return between._replace(source=source, destination=stranger)

    check = becomes(bench, XDP_PASS, bench.device.mac + NEIGHBOUR, whither)
    return Scenario(name, bench.world.programs["xdp_ingress"], packet, strangers, check)


def hot(bench: Bench, name: str) -> list[Scenario]:
    """Packets of some flows of one Service, whatever others there are."""
    for flow in range(HOT_FLOWS):
        bench.begin(FAR + flow, 0)
    bench.world.ports(FIRST, LAST)
    packet = bench.packet(bench.request(FAR, 0), ["hot"])
    check = is_sent(bench, lambda flow: bench.forwarded(FAR + flow, 0))
    return [Scenario(name, bench.world.programs["xdp_ingress"], packet, HOT_FLOWS, check)]


def xdp(lab: Lab, sizes: tuple[int, int, int], effort: Effort, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file, at few, many and very many Services. Raises EbpflbError if a packet became something
    else than it should."""
    artifact = load_artifact(set_retval=has_set_retval())
    few, many, most = sizes
    with wire(lab) as device, ExitStack() as stack:
        empty = empty_program(PROG_TYPE_XDP, XDP_TX)
        stack.callback(os.close, empty)
        for kind, (version, protocol) in KINDS.items():
            say(f"XDP {kind}")

            def bench(services: int, backends: int) -> Bench:
                world = World(
                    artifact,
                    ["xdp_ingress"],
                    services,
                    family=version,  # noqa: B023
                    protocol=protocol,  # noqa: B023
                    backends=backends,
                    device=device,
                )
                return Bench(world, device, version, protocol)  # noqa: B023

            yield from _known(bench, kind, (few, many), empty, effort)
            yield from _new(bench, kind, (few, many), empty, effort)
            if kind == "tcp4":
                yield from _hot(bench, (few, most), empty, effort)


def _figure(id: str, what: str, measured: Measured) -> Figure:
    return Figure(id, f"XDP ÷ empty: {what}", measured.ratio, "", (measured.whole,), f"{measured.whole:.0f} ns")


def _known(
    bench: Callable[[int, int], Bench], kind: str, sizes: tuple[int, int], empty: int, effort: Effort
) -> Iterator[Figure]:
    few, many = sizes
    benches = [bench(size, 1) for size in sizes]
    try:
        scenarios = [
            each for size, one in zip(sizes, benches, strict=True) for each in established(one, size, str(size))
        ]
        scenarios.append(nobodys(benches[1], many, "nobodys"))
        found = take(scenarios, PROG_TYPE_XDP, empty, effort)
    finally:
        for one in benches:
            one.world.close()
    if kind == "tcp4":
        least = found["nobodys"].empty
        yield Figure("xdp.empty", "ns/packet: empty XDP program", least, "ns", (least,))
    for size in sizes:
        for way in ("request", "reply"):
            what = f"a known flow's {way}, {kind}, {size:,} flows to as many Services"
            yield _figure(f"xdp.established.{kind}.{way}.{size}", what, found[f"{size} {way}"])
    yield _figure(f"xdp.not-ours.{kind}", f"nobody's packet, {kind}, beside {many:,} Services", found["nobodys"])
    ratio = found[f"{many} request"].whole / found[f"{few} request"].whole
    yield Figure(f"xdp.uniform.established.{kind}", f"XDP: a known flow, {kind}, {many:,} ÷ {few} Services", ratio, "")


def _new(
    bench: Callable[[int, int], Bench], kind: str, sizes: tuple[int, int], empty: int, effort: Effort
) -> Iterator[Figure]:
    few, many = sizes
    benches = [bench(size, 10) for size in sizes]
    try:
        scenarios = [new(one, size, str(size)) for size, one in zip(sizes, benches, strict=True)]
        found = take(scenarios, PROG_TYPE_XDP, empty, effort)
    finally:
        for one in benches:
            one.world.close()
    for size in sizes:
        what = f"a new flow, {kind}, {size:,} Services × 10 in turn, `flows` being full"
        yield _figure(f"xdp.new.{kind}.{size}", what, found[str(size)])
    ratio = found[str(many)].whole / found[str(few)].whole
    yield Figure(f"xdp.uniform.new.{kind}", f"XDP: a new flow, {kind}, {many:,} ÷ {few} Services", ratio, "")


def _hot(bench: Callable[[int, int], Bench], sizes: tuple[int, int], empty: int, effort: Effort) -> Iterator[Figure]:
    few, most = sizes
    benches = [bench(size, 1) for size in sizes]
    try:
        known = [each for size, one in zip(sizes, benches, strict=True) for each in hot(one, str(size))]
        first = take(known, PROG_TYPE_XDP, empty, effort)
        fresh = [new(one, 1, str(size)) for size, one in zip(sizes, benches, strict=True)]
        # Not many: this node has some 28,000 ports towards one backend, and finding a free one is not what counts.
        second = take(fresh, PROG_TYPE_XDP, empty, Effort(effort.rounds, 10_000, 1000))
    finally:
        for one in benches:
            one.world.close()
    for name, what, found in (("established", "a known flow", first), ("new", "a new flow", second)):
        ratio = found[str(most)].whole / found[str(few)].whole
        yield Figure(f"xdp.hot.{name}", f"XDP: {what} of one Service, among {most:,} ÷ among {few}", ratio, "")
