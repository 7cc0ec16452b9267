"""Nanoseconds for each packet in the tc programs, divided by an empty program's.

Rules of this file: BPF_PROG_TEST_RUN repeats a program on what it left of the packet before. So every Service's backend
is the next Service's frontend, round in a ring: each repeat is a translation with all that belongs to it, and the
packet visits all Services evenly. A lap that starts from a port that was never used begins a flow at each Service.
Packets that are nobody's stay as they are by themselves.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.clusters import cluster_ip
from bench.lab import Lab
from bench.report import Figure
from ebpflb.dataplane.bpf import syscall
from ebpflb.dataplane.bpf.assembly import assemble, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_SCHED_CLS
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.errors import EbpflbError
from ebpflb.model import Protocol
from ebpflb.routes import Backend, Frontend, Key, Kind, Locality, Route, RouteTable, Scope, ServicePortName, Verdict

UNSPEC = 0xFFFFFFFF
EXIT = bytes((0x95, 0, 0, 0, 0, 0, 0, 0))
CLIENT = "203.0.113.5"
BEST_OF = 5
SYN, ACK = 0x02, 0x10


def frame(source: str, sport: int, destination: str, dport: int, flags: int = ACK) -> bytes:
    """A TCP segment without options; its checksums are nobody's concern here."""
    tcp = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 5 << 4, flags, 65535, 0, 0)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0)
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    return bytes((2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0)) + header + addresses + tcp


def _stranger(flags: int) -> bytes:
    """To an address that is no Service."""
    return frame(CLIENT, 40000, "198.51.100.9", 80, flags)


def ring(services: int) -> RouteTable:
    """Service n at port 1000 + n % 7, whose one backend is Service n + 1."""
    ends = [(cluster_ip(number), 1000 + number % 7) for number in range(services)]
    rows: dict[Key, Route] = {}
    for number, (address, port) in enumerate(ends):
        target, target_port = ends[(number + 1) % services]
        route = Route(
            ServicePortName("default", f"service-{number}", ""),
            Kind.CLUSTER_IP,
            Verdict.FORWARD,
            (Backend(target, target_port),),
        )
        for scope in Scope:
            rows[Frontend(address, port, Protocol.TCP), scope] = route
    return RouteTable(rows, Locality())


def programs(lab: Lab, sizes: tuple[int, ...], repeat: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file. Raises EbpflbError if a program did something else than what is measured."""
    empty_fd = syscall.prog_load(PROG_TYPE_SCHED_CLS, assemble(move(0, -1), EXIT), "empty")
    try:
        stranger = _stranger(ACK)
        empty = _best(empty_fd, stranger, repeat)
        yield Figure("program.empty", "ns/packet: empty tc program", empty, "ns")
        for services in sizes:
            say(f"programs at {services} Services")
            bpffs = lab.bpffs()
            dataplane = BpfDataplane(bpffs, lab.cgroup)
            with namespaces.inside(lab.namespace("plain", "client")):
                dataplane.start()
            try:
                report = dataplane.sync(ring(services))
                if not report.complete:
                    raise EbpflbError(f"{services} Services were not written: {report.problems}")
                yield from _at(bpffs, services, repeat, empty, stranger)
            finally:
                with namespaces.inside(lab.namespace("plain", "client")):
                    dataplane.cleanup()
    finally:
        os.close(empty_fd)


def _at(bpffs: Path, services: int, repeat: int, empty: float, stranger: bytes) -> Iterator[Figure]:
    ingress = syscall.obj_get(str(bpffs / "programs" / "tc_ingress"))
    egress = syscall.obj_get(str(bpffs / "programs" / "tc_egress"))
    try:
        new = _new(ingress, services, repeat)
        start = frame(CLIENT, 39999, cluster_ip(0), 1000)
        _run(ingress, frame(CLIENT, 39999, cluster_ip(0), 1000, SYN), services)  # every Service now has the flow
        answer = frame(cluster_ip(0), 1000, CLIENT, 39999)
        measured = {
            "established": ("a known flow's request, all Services evenly", _best(ingress, start, repeat)),
            "reply": ("a known flow's reply, all Services evenly", _best(egress, answer, repeat)),
            "new": ("a new flow, all Services evenly", new),
            "not-ours": ("nobody's packet, entering", _best(ingress, stranger, repeat)),
            "not-ours-syn": ("nobody's SYN, entering", _best(ingress, _stranger(SYN), repeat)),
            "not-ours-egress": ("nobody's packet, leaving", _best(egress, stranger, repeat)),
        }
        for name, (what, nanoseconds) in measured.items():
            yield Figure(
                f"program.{name}.{services}",
                f"tc ÷ empty: {what}, {services:,} Services",
                nanoseconds / empty,
                "",
                (nanoseconds,),
                f"{nanoseconds:.0f} ns",
            )
    finally:
        os.close(ingress)
        os.close(egress)


def _run(program: int, packet: bytes, repeat: int) -> tuple[bytes, float]:
    """The packet after, and nanoseconds for each run."""
    result = syscall.prog_test_run(program, packet, repeat=repeat)
    if result.verdict != UNSPEC:
        raise EbpflbError(f"a packet that should pass has verdict {result.verdict}")
    return result.data, float(result.duration)


def _best(program: int, packet: bytes, repeat: int) -> float:
    return min(_run(program, packet, repeat)[1] for _ in range(BEST_OF))


def _new(program: int, services: int, repeat: int) -> float:
    """Nanoseconds to begin a flow: laps from ports that were never used, the best of some batches."""
    laps = max(1, min(repeat // 10, 20000) // services)
    port = 10000
    best = float("inf")
    for _ in range(BEST_OF):
        total = 0.0
        for _ in range(laps):
            packet = frame(CLIENT, port, cluster_ip(0), 1000, SYN)
            after, nanoseconds = _run(program, packet, services)
            if after != packet:
                raise EbpflbError("a lap over all Services did not come back to the first")
            total += nanoseconds
            port += 1
        best = min(best, total / laps)
    return best
