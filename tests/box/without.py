"""Runs a command on an older kernel, as far as that and its children can tell: bpf(2) answers ENOSYS, or knows nothing
of programs at devices (tcx).

    python without.py bpf COMMAND [ARGUMENT ...]
    python without.py tcx COMMAND [ARGUMENT ...]

By a seccomp filter, as root: no_new_privs is not needed then, so that nothing else is different.
"""

import ctypes
import os
import sys

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
# Of <linux/audit.h> and the architecture's table of system calls.
MACHINES = {"x86_64": (0xC000003E, 321), "aarch64": (0xC00000B7, 280)}
ALLOW, ERRNO, ENOSYS, EINVAL = 0x7FFF0000, 0x00050000, 38, 22
BPF_PROG_ATTACH, BPF_PROG_QUERY = 8, 16
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


def forbid(what: str) -> None:
    architecture, number = MACHINES[os.uname().machine]
    if what == "bpf":
        rest = [(RETURN, 0, 0, ERRNO | ENOSYS)]
    else:
        rest = [
            (LOAD, 0, 0, 16),  # seccomp_data.args[0]: the command
            (JUMP_IF_EQUAL, 1, 0, BPF_PROG_ATTACH),
            (JUMP_IF_EQUAL, 0, 1, BPF_PROG_QUERY),
            (RETURN, 0, 0, ERRNO | EINVAL),
        ]
    instructions = [
        (LOAD, 0, 0, 4),  # seccomp_data.arch
        (JUMP_IF_EQUAL, 0, len(rest) + 2, architecture),
        (LOAD, 0, 0, 0),  # seccomp_data.nr
        (JUMP_IF_EQUAL, 0, len(rest), number),
        *rest,
        (RETURN, 0, 0, ALLOW),
    ]
    code = (Instruction * len(instructions))(*(Instruction(*each) for each in instructions))
    program = Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


if __name__ == "__main__":
    forbid(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
