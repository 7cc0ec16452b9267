"""Runs a command on a kernel without BPF, as far as that can tell: bpf(2) answers ENOSYS, to it and its children.

    python without_bpf.py COMMAND [ARGUMENT ...]

By a seccomp filter, as root: no_new_privs is not needed then, so that nothing else is different.
"""

import ctypes
import os
import sys

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
# Of <linux/audit.h> and the architecture's table of system calls.
MACHINES = {"x86_64": (0xC000003E, 321), "aarch64": (0xC00000B7, 280)}
ALLOW, ERRNO, ENOSYS = 0x7FFF0000, 0x00050000, 38
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


def forbid() -> None:
    architecture, number = MACHINES[os.uname().machine]
    instructions = (
        (LOAD, 0, 0, 4),  # seccomp_data.arch
        (JUMP_IF_EQUAL, 0, 3, architecture),
        (LOAD, 0, 0, 0),  # seccomp_data.nr
        (JUMP_IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, ERRNO | ENOSYS),
        (RETURN, 0, 0, ALLOW),
    )
    code = (Instruction * len(instructions))(*(Instruction(*each) for each in instructions))
    program = Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
