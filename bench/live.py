"""Real frames before the stack: how many our XDP program sends back in a second, divided by an empty one's.

Rules of this file: BPF_F_TEST_XDP_LIVE_FRAMES on a veth whose peer drops everything by a program of its own, which
counts. All happens on one processor, in the kernel's own time (as the kernel takes it: to put up such a run costs
milliseconds): batches are short, and the least of all counts. A batch of which not all arrived (the receiving half was
put off for other work, and the queue between is short) says nothing; if that is most of them, it is an error. What
makes frames new again (bench/replay.py) is measured before an empty program, too, and taken off.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from bench.frames import KINDS, XDP_TX, Bench, empty_program, wire
from bench.lab import Lab
from bench.replay import Packet, Replay
from bench.report import Figure, quartile_range
from bench.world import FIRST, LAST, World
from bench.xdp import established
from ebpflb.dataplane.bpf import map_calls, program_calls
from ebpflb.dataplane.bpf.artifact import load_artifact
from ebpflb.dataplane.bpf.assembly import EXIT, assemble, cell, instruction, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_XDP, XDP_HOOKS
from ebpflb.dataplane.bpf.facts import has_set_retval
from ebpflb.errors import EbpflbError

FLOWS = 10
BATCH = 20_000
CPU = 0
_ARRAY, _XDP_DROP, _NATIVE = 2, 1, 1 << 2


class Peer:
    """The other end of the wire, which drops and counts all that comes."""

    def __init__(self, stack: ExitStack, ifindex: int) -> None:
        self._count = map_calls.map_create(_ARRAY, 4, 8, 1, name="bench_count")
        stack.callback(os.close, self._count)
        attach_type = XDP_HOOKS["xdp_ingress"].attach_type
        code = assemble(
            cell(self._count),
            move(1, 1),
            instruction(0xDB, 0, 1),  # lock *(u64 *)r0 += r1
            move(0, _XDP_DROP),
            EXIT,
        )
        program = program_calls.prog_load(PROG_TYPE_XDP, code, "bench_drop", attach_type)
        stack.callback(os.close, program)
        stack.callback(os.close, program_calls.link_create(program, ifindex, attach_type, _NATIVE))

    def received(self) -> int:
        """Frames so far."""
        row = map_calls.lookup(self._count, bytes(4), 8)
        return int(struct.unpack("=Q", row)[0]) if row else 0


def _send(program: int, packet: Packet, peer: Peer) -> float | None:
    """Nanoseconds for each frame from the program to the peer; None if some were lost."""
    before = peer.received()
    result = program_calls.prog_test_run(
        program, packet.frame, context=packet.context, repeat=BATCH, flags=program_calls.TEST_LIVE_FRAMES, room=0
    )
    return float(result.duration) if peer.received() - before >= BATCH else None


def live(lab: Lab, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file. Raises EbpflbError if frames do not arrive, or are not our program's."""
    artifact = load_artifact(set_retval=has_set_retval())
    attach_type = XDP_HOOKS["xdp_ingress"].attach_type
    home = os.sched_getaffinity(0)
    with wire(lab) as device, ExitStack() as stack:
        os.sched_setaffinity(0, {CPU})
        stack.callback(os.sched_setaffinity, 0, home)
        peer = Peer(stack, device.peer)
        empty = empty_program(PROG_TYPE_XDP, XDP_TX)
        stack.callback(os.close, empty)
        for kind, (version, protocol) in KINDS.items():
            say(f"live frames {kind}")
            world = World(artifact, ["xdp_ingress"], FLOWS, family=version, protocol=protocol, device=device)
            stack.callback(world.close)
            request = established(Bench(world, device, version, protocol), FLOWS, "")[0]
            world.ports(FIRST, LAST)
            packet = request.packet
            ours = Replay(request.program, PROG_TYPE_XDP, packet, FLOWS, attach_type)
            stack.callback(ours.close)
            none = Replay(empty, PROG_TYPE_XDP, packet, FLOWS, attach_type)
            stack.callback(none.close)
            sent = world.counted()["XDP_SENT"]
            samples: dict[str, list[float]] = {"ours": [], "new": [], "empty": []}
            for number in range(rounds + 1):
                for name, program in (("ours", ours.program), ("new", none.program), ("empty", empty)):
                    took = _send(program, packet, peer)
                    if number and took is not None:
                        samples[name].append(took)
            if world.counted()["XDP_SENT"] - sent != (rounds + 1) * BATCH:
                raise EbpflbError("not all live frames were sent on by our program")
            if min(map(len, samples.values())) < rounds // 2:
                raise EbpflbError("most batches of live frames did not arrive")
            ours_least, new, plain = (min(samples[name]) for name in ("ours", "new", "empty"))
            whole = plain + max(ours_least - new, 0.0)
            if kind == "tcp4":
                yield Figure("live.empty", "empty XDP_TX, live frames", 1000 / plain, "Mpps", tuple(samples["empty"]))
            note = f"{1000 / whole:.1f} Mpps, IQR {quartile_range(samples['ours']):.0%}"
            what = f"XDP_TX of a known flow's request ÷ empty XDP_TX, live frames, {kind}"
            yield Figure(f"live.{kind}", what, plain / whole, "", tuple(samples["ours"]), note)
