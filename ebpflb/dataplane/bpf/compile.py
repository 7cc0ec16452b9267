"""Child process: compiles C sources with BCC and writes what came of it as an Artifact. The only importer of bcc.

    python -m ebpflb.dataplane.bpf.compile OUTFILE < request.json

Rules of this file: it runs, writes OUTFILE and ends; whatever it loads into the kernel while compiling ends with it.
stdin is an `artifact.Request` in JSON. Errors go to stderr, compiler messages with file and line of the original
source, and the exit status is 1.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ebpflb.dataplane.bpf import map_calls, syscall
from ebpflb.dataplane.bpf.artifact import Artifact, Field, Layout, MapSpec, Program, Relocation, Request, read_sources
from ebpflb.dataplane.bpf.constants import hook
from ebpflb.dataplane.bpf.flatten import enumerators, flatten, numbers

_UAPI = Path("/usr/include")
_PACKAGES = "apt-get install python3-bpfcc linux-libc-dev"
_LD_IMM64 = 0x18


class CompileError(Exception):
    """What stderr is told, in one line."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m ebpflb.dataplane.bpf.compile OUTFILE < request.json", file=sys.stderr)
        return 2
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        artifact = compile_sources(request)
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    Path(arguments[0]).write_bytes(msgspec.msgpack.encode(artifact))
    return 0


def compile_sources(request: Request) -> Artifact:
    """All of `request.sources`, with their maps merged by name. Raises CompileError."""
    directory = Path(request.directory)
    files = read_sources(directory)
    maps: dict[str, MapSpec] = {}
    programs: dict[str, Program] = {}
    syscall.raise_memlock_limit()
    with tempfile.TemporaryDirectory(prefix="ebpflb-kernel-") as tree:
        assemble_kernel_tree(directory / "kernel", Path(tree))
        # BCC reads it while its library initialises.
        os.environ["BCC_KERNEL_SOURCE"] = tree
        try:
            import bcc
        except ImportError as error:
            raise CompileError(f"the compiler bcc cannot be imported ({error}): {_PACKAGES}") from None
        for source in request.sources:
            compiled = Compiled(bcc, source, flatten(source, files), request.definitions)
            for spec in compiled.maps():
                if maps.setdefault(spec.name, spec) != spec:
                    raise CompileError(f"{source}: the map {spec.name} differs from the other sources' one")
            for program in compiled.programs():
                if other := programs.get(program.name):
                    raise CompileError(f"{source}: the program {program.name} is in {other.source} too")
                programs[program.name] = program
        headers = "\n".join(text for name, text in files.items() if name.endswith(".h"))
        # The last one is their number, by the habit of C.
        counters = enumerators(headers, "counter")[:-1]
        return Artifact(maps, programs, str(bcc.__version__), numbers(headers), counters)


class Compiled:
    """One source, compiled; BCC has made its maps."""

    def __init__(self, bcc: Any, source: str, text: str, definitions: dict[str, int]) -> None:
        self._source = source
        self._lib = bcc.lib
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        try:
            self._bpf = bcc.BPF(text=text.encode(), cflags=flags)
        except Exception as error:  # BCC raises bare Exceptions; clang has said the rest on stderr.
            raise CompileError(f"bpf/{source}: BCC: {error}") from None
        self._tables = {name: self._bpf[name] for name in self._table_names()}

    def _table_names(self) -> Iterator[str]:
        self._lib.bpf_num_tables.restype = ctypes.c_size_t
        self._lib.bpf_num_tables.argtypes = [ctypes.c_void_p]
        self._lib.bpf_table_name.restype = ctypes.c_char_p
        self._lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        for number in range(self._lib.bpf_num_tables(self._bpf.module)):
            yield self._lib.bpf_table_name(self._bpf.module, number).decode()

    def maps(self) -> Iterator[MapSpec]:
        """Specifications of the source's maps, as the kernel has made them."""
        for name, table in self._tables.items():
            made = map_calls.map_info(table.map_fd)
            # Of a per-CPU table, Leaf is one value for each CPU and sLeaf the value.
            key, value = layout_of(table.Key), layout_of(getattr(table, "sLeaf", table.Leaf))
            if (key.size, value.size) != (made.key_size, made.value_size):
                raise CompileError(
                    f"bpf/{self._source}: BCC describes rows of {name} as {key.size} + {value.size} bytes, "
                    f"but they are {made.key_size} + {made.value_size}"
                )
            yield MapSpec(name, made.type, made.max_entries, made.flags, key, value)

    def programs(self) -> Iterator[Program]:
        """The source's programs: every function that is not static."""
        by_descriptor = {table.map_fd: name for name, table in self._tables.items()}
        for number in range(self._lib.bpf_num_functions(self._bpf.module)):
            name = self._lib.bpf_function_name(self._bpf.module, number).decode()
            try:
                where = hook(name)
            except KeyError:
                raise CompileError(f"bpf/{self._source}: {name}() is no hook: make it static inline") from None
            code = self._bpf.dump_func(name)
            try:
                relocations = tuple(relocations_of(code, by_descriptor))
            except KeyError as error:
                raise CompileError(f"bpf/{self._source}: {name}() uses descriptor {error}, which is no map") from None
            yield Program(name, where.kernel_name, where.type, where.attach_type, self._source, code, relocations)


def relocations_of(code: bytes, by_descriptor: dict[int, str]) -> Iterator[Relocation]:
    """Where `code` loads map descriptors; raises KeyError for one that is not in `by_descriptor`."""
    wide = False
    for index, (operation, registers, _, immediate) in enumerate(struct.iter_unpack("<BBhi", code)):
        if wide:
            wide = False
            continue
        if operation == _LD_IMM64:
            wide = True
            if registers >> 4:
                yield Relocation(index, by_descriptor[immediate])


def layout_of(kind: Any) -> Layout:
    """The layout of a ctypes class that BCC made for a key or value."""
    if not hasattr(kind, "_fields_"):
        return Layout(_scalar(kind), ctypes.sizeof(kind))
    return Layout(kind.__name__, ctypes.sizeof(kind), tuple(_fields(kind)))


def _fields(kind: Any) -> Iterator[Field]:
    for entry in kind._fields_:
        name, member = entry[0], entry[1]
        if name.startswith("__pad_"):
            continue  # BCC's word for the compiler's padding
        count = getattr(member, "_length_", 0)
        element = member._type_ if count else member
        nested = tuple(_fields(element)) if hasattr(element, "_fields_") else ()
        spelled = element.__name__ if nested else _scalar(element)
        yield Field(name, getattr(kind, name).offset, ctypes.sizeof(element), count, spelled, nested)


def _scalar(kind: Any) -> str:
    if kind is ctypes.c_char:
        return "char"
    signed = kind._type_ in "bhilq"
    return f"{'s' if signed else 'u'}{ctypes.sizeof(kind) * 8}"


def assemble_kernel_tree(shim: Path, tree: Path) -> None:
    """Make `tree` look like a kernel tree: links to our shim, and to the machine's UAPI headers for the rest.

    Raises CompileError where linux-libc-dev is not installed.
    """
    machine = _UAPI / f"{os.uname().machine}-linux-gnu" / "asm"
    places = {
        "include/linux": (),
        "include/asm": (),
        "include/uapi/linux": (_UAPI / "linux",),
        "include/uapi/asm": (machine, _UAPI / "asm"),
        "include/uapi/asm-generic": (_UAPI / "asm-generic",),
    }
    for place, candidates in places.items():
        target = tree / place
        target.mkdir(parents=True)
        for path in (shim / place).iterdir() if (shim / place).is_dir() else ():
            (target / path.name).symlink_to(path.resolve())
        if not candidates:
            continue
        headers = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if headers is None or not (_UAPI / "linux/in.h").exists():
            raise CompileError(f"the UAPI headers are not installed ({candidates[0]} is missing): {_PACKAGES}")
        for path in headers.iterdir():
            if not (target / path.name).exists():
                (target / path.name).symlink_to(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
