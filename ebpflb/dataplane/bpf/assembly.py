"""BPF instructions by hand, for programs of a few lines: probes, and questions that only a program can ask.

Rules of this file: pure; bytes out. Registers are numbers; r1 is the context when a program begins, r10 its stack.
"""

from __future__ import annotations

import struct


def instruction(code: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """One BPF instruction."""
    return struct.pack("<BBhi", code, source << 4 | destination, offset, immediate)


def call(helper: int) -> bytes:
    """Call a helper by its number."""
    return instruction(0x85, immediate=helper)


def move(register: int, value: int) -> bytes:
    """Set a register."""
    return instruction(0xB7, register, immediate=value)


EXIT = instruction(0x95)


def assemble(*instructions: bytes) -> bytes:
    """The instructions as one program."""
    return b"".join(instructions)


def map_descriptor(register: int, fd: int) -> bytes:
    """Set a register to a map, by its descriptor (two instructions)."""
    return instruction(0x18, register, 1, immediate=fd) + instruction(0)


def cell(map: int) -> bytes:
    """Set r0 to the address of cell 0 of an array, or end the program with r0 = 0 where there is none. r1 to r5 go."""
    return assemble(
        instruction(0x62, 10, offset=-4),  # *(u32 *)(r10 - 4) = 0
        instruction(0xBF, 2, 10),  # r2 = r10
        instruction(0x07, 2, immediate=-4),  # r2 += -4
        map_descriptor(1, map),
        call(1),  # bpf_map_lookup_elem
        instruction(0x55, 0, offset=1),  # if r0 != 0 go on
        EXIT,
    )
