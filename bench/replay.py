"""One packet program many times, each time on a packet that is as good as new.

BPF_PROG_TEST_RUN repeats a program on what it left of the packet before. So a few instructions run first, write the
packet's changing fields anew (with another flow's addresses each time, where asked for), wait until they have left the
store buffer as what a device wrote would have, and go on to the program by a tail call: it is the very program that a
node runs. The same instructions before an empty program are what is taken off.

Rules of this file: variants are run in turn, round by round, and the least of all rounds counts, in processor time of
this thread: what others do on the machine can only add.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ebpflb.dataplane.bpf import map_calls, program_calls
from ebpflb.dataplane.bpf.assembly import EXIT, assemble, call, instruction, map_descriptor, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_XDP
from ebpflb.errors import EbpflbError

FAILED = 255
"""Verdict of a packet that is too short to be written."""

_ARRAY, _PROGRAM_ARRAY = 2, 3
_TAIL_CALL, _CLOCK = 12, 5
_CONTEXT, _CELL, _INDEX, _SERIAL = 6, 7, 8, 9  # registers that helpers keep
_STRIDE = 7919  # flows are not visited in the order in which their rows lie in memory


class Vary(NamedTuple):
    """Four bytes at `offset` are `first`, in network order, plus the flow's number; or plus the number of the run, so
    that no value is seen twice (`fresh`). They end a field of `width` bytes, which programs read as words of eight."""

    offset: int
    first: int
    fresh: bool = False
    width: int = 4


class Packet(NamedTuple):
    """A frame, the fields (offset, bytes) that a program may change, and what is another value in each run."""

    frame: bytes
    fields: tuple[tuple[int, int], ...]
    vary: tuple[Vary, ...] = ()
    context: bytes = b""


def _store(offset: int, data: bytes) -> bytes:
    """`data` into the packet (r2)."""
    if len(data) == 8:
        low, high = struct.unpack("<ii", data)
        return assemble(
            instruction(0x18, 1, immediate=low), instruction(0, immediate=high), instruction(0x7B, 2, 1, offset)
        )
    code = {1: 0x72, 2: 0x6A, 4: 0x62}[len(data)]
    return instruction(code, 2, offset=offset, immediate=int.from_bytes(data, "little", signed=True))


def _vary(frame: bytes, field: Vary) -> bytes:
    made = assemble(
        instruction(0xBC, 1, _SERIAL if field.fresh else _INDEX),  # w1 = w8 or w9
        instruction(0x04, 1, immediate=struct.unpack("<i", struct.pack("<I", field.first))[0]),
        instruction(0xDC, 1, immediate=32),  # to network order
    )
    if field.width == 4:
        return made + instruction(0x63, 2, 1, field.offset)
    before = frame[field.offset - 4 : field.offset]
    return assemble(
        made,
        instruction(0x67, 1, immediate=32),  # r1 <<= 32
        instruction(0xB4, 3, immediate=int.from_bytes(before, "little", signed=True)),  # w3 = the word before
        instruction(0x4F, 1, 3),  # r1 |= r3
        instruction(0x7B, 2, 1, field.offset - 4),
    )


def _before(xdp: bool, packet: Packet, flows: int, state: int, programs: int) -> bytes:
    """The instructions that make the packet new and go on to programs[0]."""
    varied = {field.offset + 4 - field.width + at for field in packet.vary for at in range(field.width)}
    stores = [
        _store(offset, packet.frame[offset : offset + size]) for offset, size in packet.fields if offset not in varied
    ]
    body = assemble(*stores, *(_vary(packet.frame, field) for field in packet.vary))
    data, end = (0, 4) if xdp else (76, 80)
    leave = assemble(
        call(_CLOCK),
        instruction(0xBF, 1, _CONTEXT),
        map_descriptor(2, programs),
        move(3, 0),
        call(_TAIL_CALL),
    )
    return assemble(
        instruction(0xBF, _CONTEXT, 1),
        instruction(0x18, _CELL, 2, immediate=state) + instruction(0),  # the array's first cell itself
        instruction(0x79, _INDEX, _CELL),
        instruction(0x07, _INDEX, immediate=_STRIDE % flows),
        instruction(0xA5, _INDEX, offset=1, immediate=flows),  # below `flows`: one on
        instruction(0x17, _INDEX, immediate=flows),
        instruction(0x7B, _CELL, _INDEX),
        instruction(0x79, _SERIAL, _CELL, 8),
        instruction(0x07, _SERIAL, immediate=1),
        instruction(0x7B, _CELL, _SERIAL, 8),
        instruction(0x61, 2, _CONTEXT, data),
        instruction(0x61, 3, _CONTEXT, end),
        instruction(0xBF, 4, 2),
        instruction(0x07, 4, immediate=len(packet.frame)),
        instruction(0x2D, 4, 3, len(body + leave) // 8),  # beyond the end: to the last two lines
        body,
        leave,
        move(0, FAILED),
        EXIT,
    )


class Replay:
    """A program with a packet before it. `program` is both, `flow` the number of the last run's flow. Close it."""

    def __init__(self, program: int, type: int, packet: Packet, flows: int = 1, attach_type: int = 0) -> None:
        """`program` is a descriptor; visits `flows` flows in turn."""
        self.packet = packet
        self._flows = flows
        self.flow = 0
        self._open: list[int] = []
        self._programs: int | None = None
        try:
            self._state = self._keep(map_calls.map_create(_ARRAY, 4, 16, 1, name="bench_state"))
            self._programs = self._keep(map_calls.map_create(_PROGRAM_ARRAY, 4, 4, 1, name="bench_programs"))
            code = _before(type == PROG_TYPE_XDP, packet, flows, self._state, self._programs)
            self.program = self._keep(program_calls.prog_load(type, code, "bench", attach_type))
            map_calls.update(self._programs, bytes(4), struct.pack("=I", program))
        except BaseException:
            self.close()
            raise

    def _keep(self, descriptor: int) -> int:
        self._open.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Let go of everything but the program itself.

        With an array's last descriptor the kernel begins to empty it in the background, waiting for all CPUs with each
        program in it; an array that somebody looks at meanwhile, as who lists all maps does, may stay for ever (the
        reference that prog_array_map_clear takes is lost where its work waits already; Linux 6.18). Of an empty one
        whose user has gone there is next to nothing to do, and no time for that.
        """
        if self._programs is not None:
            map_calls.delete(self._programs, bytes(4))
            self._programs = None
        for descriptor in reversed(self._open):
            os.close(descriptor)
        self._open = []

    def at(self, flow: int, serial: int = 0) -> None:
        """The next run is of the flow `flow`; of fresh ones, that with number `serial`."""
        before = (flow - _STRIDE) % self._flows
        map_calls.update(self._state, bytes(4), struct.pack("=Qq", before, serial - 1))
        self.flow = before

    def run(self, repeat: int) -> tuple[program_calls.TestRun, float]:
        """The last packet of `repeat`, and the nanoseconds for each."""
        result, spent = _timed(self.program, self.packet, repeat)
        self.flow = (self.flow + repeat * _STRIDE) % self._flows
        if result.verdict == FAILED:
            raise EbpflbError("a packet of the benchmark is shorter than what is written into it")
        return result, spent


class Bare:
    """A program that leaves a packet as it is."""

    flow = 0

    def __init__(self, program: int, packet: Packet) -> None:
        self._program, self._packet = program, packet

    def run(self, repeat: int) -> tuple[program_calls.TestRun, float]:
        """As Replay's."""
        return _timed(self._program, self._packet, repeat)


def _timed(program: int, packet: Packet, repeat: int) -> tuple[program_calls.TestRun, float]:
    before = time.thread_time_ns()
    result = program_calls.prog_test_run(program, packet.frame, repeat=repeat, context=packet.context)
    return result, (time.thread_time_ns() - before) / repeat


class Variant(NamedTuple):
    """What is measured. `check` sees the last packet of each batch and its flow's number, and raises EbpflbError where
    it is not right. `before` so many packets pass first in each round, unmeasured."""

    name: str
    replay: Replay | Bare
    repeat: int
    check: Callable[[program_calls.TestRun, int], None] = lambda run, flow: None
    before: int = 0


def measure(variants: Sequence[Variant], rounds: int) -> dict[str, list[float]]:
    """Nanoseconds of each variant by name, one for each round."""
    samples: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            if variant.before:
                variant.replay.run(variant.before)
            result, spent = variant.replay.run(variant.repeat)
            variant.check(result, variant.replay.flow)
            samples[variant.name].append(spent)
    return samples
