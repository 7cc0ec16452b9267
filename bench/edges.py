"""Nanoseconds for each packet in the tc programs, divided by an empty program's.

Rules of this file: see bench/frames.py. A flow that is masqueraded meets a program four times, and each is measured by
itself. Where Services are many, each has a flow, and all are visited in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

from bench import world as numbers
from bench.frames import (
    KINDS,
    NEIGHBOUR,
    Bench,
    Check,
    Effort,
    Scenario,
    becomes,
    empty_program,
    take,
    turned,
    wire,
)
from bench.lab import Lab
from bench.report import Figure
from bench.wire import ACK, SYN, Tuple
from bench.world import BACKEND_PORT, CLIENT_PORT, FIRST, LAST, SERVICE_PORT, World
from ebpflb.dataplane.bpf import program_calls
from ebpflb.dataplane.bpf.artifact import load_artifact
from ebpflb.dataplane.bpf.constants import PROG_TYPE_SCHED_CLS
from ebpflb.dataplane.bpf.facts import has_set_retval
from ebpflb.errors import EbpflbError
from ebpflb.routes import Masquerade

UNSPEC = 0xFFFFFFFF
PROGRAMS = ("tc_ingress", "tc_egress")


class Leg(NamedTuple):
    """One of the four meetings: `before` and `after` are a flow's tuples by its number, `vary` as for Bench.packet."""

    name: str
    program: str
    before: Callable[[int], Tuple]
    after: Callable[[int], Tuple]
    vary: tuple[str, ...]


def legs(bench: Bench) -> tuple[Leg, ...]:
    """In the order in which a flow's packets meet them."""

    def request(flow: int) -> Tuple:
        return bench.request(flow, flow)

    def inside(flow: int) -> Tuple:
        there = numbers.backend(flow, bench.version)
        return request(flow)._replace(destination=there, destination_port=BACKEND_PORT)

    def forwarded(flow: int) -> Tuple:
        return bench.forwarded(flow, flow)

    def reply(flow: int) -> Tuple:
        return turned(inside(flow))

    return (
        Leg("request in", "tc_ingress", request, inside, ("client", "service")),
        Leg("request out", "tc_egress", inside, forwarded, ("client", "to backend")),
        Leg("reply in", "tc_ingress", lambda flow: turned(forwarded(flow)), reply, ("backend", "port")),
        Leg(
            "reply out",
            "tc_egress",
            lambda n: turned(inside(n)),
            lambda n: turned(request(n)),
            ("backend", "to client"),
        ),
    )


def _passed(bench: Bench, expected: Callable[[int], Tuple] | None) -> Check:
    return becomes(bench, UNSPEC, bench.device.mac + NEIGHBOUR, expected)


def _begin(bench: Bench, flows: int) -> None:
    """The first packets of as many flows, each checked byte by byte at each leg."""
    for flow in range(flows):
        bench.world.ports(FIRST + flow, FIRST + flow)
        for leg in legs(bench):
            flags = SYN if "request" in leg.name else SYN | ACK
            there = bench.frame(leg.before(flow), flags)
            result = program_calls.prog_test_run(bench.world.programs[leg.program], there, bench.context(len(there)))
            if result.verdict != UNSPEC or result.data != bench.frame(leg.after(flow), flags):
                raise EbpflbError(f"flow {flow}: {leg.name} went wrong: verdict {result.verdict}")
    bench.world.ports(FIRST, LAST)


def _known(bench: Bench, flows: int) -> list[Scenario]:
    _begin(bench, flows)
    return [
        Scenario(
            f"{leg.name} {flows}",
            bench.world.programs[leg.program],
            bench.packet(leg.before(0), leg.vary),
            flows,
            _passed(bench, leg.after),
        )
        for leg in legs(bench)
    ]


def _others(bench: Bench, services: int) -> list[Scenario]:
    """What is nobody's, and what begins."""
    source, stranger = numbers.client(0, bench.version), numbers.stranger(0, bench.version)
    between = Tuple(source, CLIENT_PORT, stranger, SERVICE_PORT)
    ingress, egress = (bench.world.programs[name] for name in PROGRAMS)

    def whither(flow: int) -> Tuple:
        source, stranger = numbers.client(flow, bench.version), numbers.stranger(flow, bench.version)
        return between._replace(source=source, destination=stranger)

    check = _passed(bench, whither)
    packet, first = (bench.packet(between, ["client", "stranger"], flags) for flags in (ACK, SYN))
    new = bench.packet(bench.request(0, 0), ["client!", "service"], SYN)
    return [
        Scenario("not-ours", ingress, packet, services, check),
        Scenario("not-ours-syn", ingress, first, services, check),
        Scenario("not-ours-egress", egress, packet, services, check),
        Scenario("new", ingress, new, services, _passed(bench, None), fresh=True),
    ]


WORDS = {
    "not-ours": "nobody's packet, entering",
    "not-ours-syn": "nobody's SYN, entering",
    "not-ours-egress": "nobody's packet, leaving",
    "new": "a new flow, entering, `flows` being full",
}


def edges(lab: Lab, sizes: tuple[int, int], effort: Effort, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file, at few and many Services. Raises EbpflbError if a packet became something else than it
    should."""
    artifact = load_artifact(set_retval=has_set_retval())
    with wire(lab) as device, ExitStack() as stack:
        empty = empty_program(PROG_TYPE_SCHED_CLS, -1)
        stack.callback(os.close, empty)
        for kind, (version, protocol) in KINDS.items():
            say(f"tc {kind}")
            with ExitStack() as worlds:

                def bench(services: int, backends: int, masquerade: Masquerade) -> Bench:
                    world = World(
                        artifact,
                        PROGRAMS,
                        services,
                        family=version,  # noqa: B023
                        protocol=protocol,  # noqa: B023
                        backends=backends,
                        masquerade=masquerade,
                        device=device,
                    )
                    worlds.callback(world.close)  # noqa: B023
                    return Bench(world, device, version, protocol, xdp=False)  # noqa: B023

                known = [each for size in sizes for each in _known(bench(size, 1, Masquerade.ALWAYS), size)]
                others = _others(bench(sizes[1], 10, Masquerade.NEVER), sizes[1])
                found = take(known, PROG_TYPE_SCHED_CLS, empty, effort)
                found |= take(others, PROG_TYPE_SCHED_CLS, empty, effort)
            if kind == "tcp4":
                least = found["new"].empty
                yield Figure("tc.empty", "ns/packet: empty tc program", least, "ns", (least,))
            for name, one in found.items():
                leg, _, size = name.rpartition(" ")
                what = f"a known flow's {leg}, {kind}, {int(size):,} flows to as many Services" if leg else WORDS[name]
                what = what if leg else f"{what}, {kind}, {sizes[1]:,} Services"
                id = f"tc.established.{kind}.{leg.replace(' ', '-')}.{size}" if leg else f"tc.{name}.{kind}"
                yield Figure(id, f"tc ÷ empty: {what}", one.ratio, "", (one.whole,), f"{one.whole:.0f} ns")
