"""What the compiler made of `bpf/`: layouts of rows, specifications of maps, and programs that await their maps.

Rules of this file: an Artifact is plain data that outlives the compiler. It comes from the cache directory if what it
was made of has not changed, else from a child process (`compile.py`): neither bcc nor LLVM is ever in this process. A
cache that is absent, unwritable or damaged costs time only, and says so.

The cache is keyed by source text, flags, kernel release and machine. The compiler's version is inside the file: it
decides only where bcc is installed, so that a cache which came with an image works without any compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ebpflb.dataplane.bpf.constants import Sizes, definitions
from ebpflb.dataplane.bpf.flatten import included
from ebpflb.errors import Unsupported, UserError

log = logging.getLogger(__name__)

SOURCES = ("sock.c", "tc.c", "xdp.c")
"""The C files of this dataplane, each compiled by itself."""

CACHE_ENVIRONMENT = "EBPFLB_CACHE"
DEFAULT_CACHE = Path("/var/cache/ebpflb")
_FORMAT = 2
"""Of the cache's files: another one for each change of the classes below."""
_KEPT = 16
"""How many files the cache keeps."""
_COMPILE_SECONDS = 300
_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1


class Field(msgspec.Struct, frozen=True, gc=False):
    """One member of a row. `size` is that of one element in bytes, `count` the elements (0: not an array).
    `type` is the C type: `u8` … `u64`, `char`, or the name of a struct, whose members are then in `fields`."""

    name: str
    offset: int
    size: int
    count: int
    type: str
    fields: tuple[Field, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the whole member."""
        return self.size * (self.count or 1)


class Layout(msgspec.Struct, frozen=True, gc=False):
    """The bytes of a key or value. `fields` is () for a plain number. Padding that the compiler added has no field."""

    name: str
    size: int
    fields: tuple[Field, ...] = ()

    def field(self, name: str) -> Field:
        """The member `name`; raises KeyError."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(f"{self.name}.{name}")


class MapSpec(msgspec.Struct, frozen=True, gc=False):
    """A map as `bpf/maps.h` declares it. `type` and `flags` are the kernel's numbers; sizes in bytes."""

    name: str
    type: int
    max_entries: int
    flags: int
    key: Layout
    value: Layout


class Relocation(msgspec.Struct, frozen=True, gc=False):
    """The instruction `index` loads the descriptor of `map`."""

    index: int
    map: str


class Program(msgspec.Struct, frozen=True, gc=False):
    """One program, ready to load once its maps' descriptors are patched in. `name` is its C function's, `kernel_name`
    what the kernel calls it; `type` and `attach_type` are the kernel's numbers."""

    name: str
    kernel_name: str
    type: int
    attach_type: int
    source: str
    code: bytes
    relocations: tuple[Relocation, ...]

    @property
    def instructions(self) -> int:
        """Number of 8-byte instructions."""
        return len(self.code) // 8

    def patched(self, descriptors: Mapping[str, int]) -> bytes:
        """The code with each map's descriptor in its place; raises KeyError for a map that is not in `descriptors`."""
        code = bytearray(self.code)
        for relocation in self.relocations:
            at = relocation.index * 8
            registers = code[at + 1] & 0x0F | _PSEUDO_MAP_FD << 4
            struct.pack_into("<BBhi", code, at, _LD_IMM64, registers, 0, descriptors[relocation.map])
        return bytes(code)


class Artifact(msgspec.Struct, frozen=True):
    """Everything that the C sources say, compiled. `digest` names the content (layouts, maps and programs): two
    artifacts with the same digest are interchangeable. `compiler` is bcc's version. `numbers` are the plain
    `#define NAME number` of our headers (`LAYOUT`, …); `counters` the names of `enum counter`, by index."""

    maps: dict[str, MapSpec]
    programs: dict[str, Program]
    compiler: str
    numbers: dict[str, int] = {}
    counters: tuple[str, ...] = ()
    digest: str = ""

    @property
    def layouts(self) -> dict[str, Layout]:
        """All key and value layouts by name of their C type."""
        return {layout.name: layout for spec in self.maps.values() for layout in (spec.key, spec.value)}


class Request(msgspec.Struct, frozen=True):
    """What `compile.py` is asked to do: the sources to compile, the directory they are in, and the constants."""

    directory: str
    sources: tuple[str, ...]
    definitions: dict[str, int]


def source_directory() -> Path:
    """Where `bpf/` is: inside the installed package as `_bpf`, or beside it in a checkout. Raises UserError."""
    package = Path(__file__).resolve().parents[2]
    candidates = (package / "_bpf", package.parent / "bpf")
    for candidate in candidates:
        if (candidate / "maps.h").is_file():
            return candidate
    raise UserError(f"the BPF sources are neither in {candidates[0]} nor in {candidates[1]}: reinstall ebpflb")


def cache_directory() -> Path:
    """Where compiled programs are kept: EBPFLB_CACHE, or /var/cache/ebpflb."""
    return Path(os.environ.get(CACHE_ENVIRONMENT) or DEFAULT_CACHE)


def compiler_version() -> str:
    """The version of the installed bcc, found without importing it; "" if there is none."""
    try:
        found = importlib.util.find_spec("bcc")
    except (ImportError, ValueError):
        return ""
    if found is None or not found.origin:
        return ""
    try:
        return (Path(found.origin).parent / "version.py").read_text().partition("'")[2].partition("'")[0]
    except OSError:
        return ""


def load_artifact(
    sizes: Sizes | None = None,
    cache: Path | None = None,
    *,
    set_retval: bool = True,
    count_traffic: bool = False,
    go_around: bool = False,
    xdp_frags: bool = False,
    sources: tuple[str, ...] = SOURCES,
    directory: Path | None = None,
    release: str = "",
) -> Artifact:
    """The compiled `sources` of `directory` (ours by default), from `cache` (default: `cache_directory()`) or fresh.

    `set_retval`, `count_traffic`, `go_around`, `xdp_frags`: see `constants.definitions`. `release`: that of the kernel
    for which the cache is to have it (default: this one). Raises Unsupported where nothing can be compiled, with the
    reason.
    """
    directory = directory or source_directory()
    cache = cache or cache_directory()
    request = Request(
        str(directory),
        sources,
        definitions(
            sizes or Sizes(),
            set_retval=set_retval,
            count_traffic=count_traffic,
            go_around=go_around,
            xdp_frags=xdp_frags,
        ),
    )
    path = cache / f"{_key(request, release or os.uname().release)}.artifact"
    installed = compiler_version()
    cached = _read(path)
    if cached is not None and (not installed or cached.compiler == installed):
        return cached
    artifact = _compile(request, installed)
    _write(path, artifact)
    return artifact


def _key(request: Request, release: str) -> str:
    """Hash of everything that decides what the compiler makes."""
    directory = Path(request.directory)
    digest = hashlib.sha256()

    def add(text: str) -> None:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    files = read_sources(directory)
    add(f"{_FORMAT} {release} {os.uname().machine}")
    add(repr(sorted(request.definitions.items())))
    for source in request.sources:
        if source not in files:
            raise UserError(f"{directory / source} does not exist: reinstall ebpflb")
        for name in included(source, files):
            add(name)
            add(files[name])
    for shim in sorted((directory / "kernel").rglob("*.h")):
        add(str(shim.relative_to(directory)))
        add(shim.read_text())
    return digest.hexdigest()[:32]


def read_sources(directory: Path) -> dict[str, str]:
    """The C files and headers of `directory` by name."""
    return {path.name: path.read_text() for path in sorted(directory.iterdir()) if path.suffix in (".c", ".h")}


def _read(path: Path) -> Artifact | None:
    """The cached artifact, or None if there is none that is whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("the compile cache %s cannot be read (%s): compiling", path, error.strerror)
        return None
    checksum, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != checksum:
        log.warning("the compile cache %s is damaged: compiling", path)
        return None
    try:
        return msgspec.msgpack.decode(body, type=Artifact)
    except msgspec.DecodeError:
        log.warning("the compile cache %s is of another version: compiling", path)
        return None


def _write(path: Path, artifact: Artifact) -> None:
    """Keep `artifact`; a reader sees the whole file or none."""
    body = msgspec.msgpack.encode(artifact)
    temporary = None
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".artifact-", delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
        _prune(path.parent)
    except OSError as error:
        log.warning(
            "compiled programs are not cached: %s: %s (set %s to a directory that can be written)",
            path.parent,
            error.strerror,
            CACHE_ENVIRONMENT,
        )
        if temporary is not None:
            with contextlib.suppress(OSError):  # the same trouble, of which one line is enough
                os.unlink(temporary)


def _prune(cache: Path) -> None:
    """Keep the newest files only: each change of the sources, the options or the kernel leaves one behind."""
    files = sorted(cache.glob("*.artifact"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in files[_KEPT:]:
        path.unlink(missing_ok=True)


def _compile(request: Request, installed: str) -> Artifact:
    """Run the compiler as a child; what it prints on stderr is the compiler's own complaint."""
    if not installed:
        raise Unsupported("the compiler bcc is not installed: apt-get install python3-bpfcc linux-libc-dev")
    log.info("compiling %s", ", ".join(request.sources))
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryDirectory(prefix="ebpflb-compile-") as scratch:
        out = Path(scratch) / "artifact"
        command = [sys.executable, "-m", "ebpflb.dataplane.bpf.compile", str(out)]
        try:
            done = subprocess.run(
                command,
                input=msgspec.json.encode(request),
                capture_output=True,
                env=environment,
                timeout=_COMPILE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unsupported(f"compiling the BPF programs took more than {_COMPILE_SECONDS} s") from None
        complaint = done.stderr.decode(errors="replace").strip()
        if done.returncode:
            raise Unsupported(_summary(complaint) or f"the BPF compiler ended with status {done.returncode}")
        if complaint:
            log.debug("compiler: %s", complaint)
        artifact = msgspec.msgpack.decode(out.read_bytes(), type=Artifact)
    return msgspec.structs.replace(artifact, digest=_digest(artifact))


def _summary(complaint: str) -> str:
    """The line of the compiler's output that an operator wants; the whole goes to the log."""
    lines = complaint.splitlines()
    if len(lines) > 1:
        log.error("%s", complaint)
    errors = [line for line in lines if " error: " in line]
    if errors:
        return "the BPF programs do not compile: " + errors[0]
    return lines[-1] if lines else ""


def _digest(artifact: Artifact) -> str:
    body = msgspec.msgpack.encode(msgspec.structs.replace(artifact, digest=""), order="sorted")
    return hashlib.sha256(body).hexdigest()[:16]
