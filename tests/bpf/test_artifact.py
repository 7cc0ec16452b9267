"""The compiler and its cache: what is compiled when, what goes wrong in words, and that the daemon needs neither."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf import artifact as module
from ebpflb.dataplane.bpf.artifact import compiler_version, load_artifact, source_directory
from ebpflb.dataplane.bpf.constants import Sizes
from ebpflb.errors import Unsupported, UserError

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

CHECKOUT = Path(__file__).resolve().parents[2]
COMPILING = "compiling one.c"

ONE = """\
#include <uapi/linux/bpf.h>
#include "shared.h"
int tc_one(struct __sk_buff *skb)
{
	u32 key = 0;
	struct row *row = rows.lookup(&key);

	return row ? row->pairs[1].b : -1;
}
"""
SHARED = """\
struct pair {
	u16 a;
	u16 b;
};
struct row {
	struct pair pairs[3];
	char text[8];
	u64 number;
	s32 signed_one;
};
BPF_TABLE("array", u32, struct row, rows, 4);
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A directory with one small program."""
    directory = tmp_path / "bpf"
    directory.mkdir()
    (directory / "one.c").write_text(ONE)
    (directory / "shared.h").write_text(SHARED)
    (directory / "kernel").symlink_to(source_directory() / "kernel")
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(sources: Path, cache: Path, sizes: Sizes | None = None) -> module.Artifact:
    return load_artifact(sizes, cache, sources=("one.c",), directory=sources)


def test_layouts_and_relocations(sources: Path, cache: Path) -> None:
    made = load(sources, cache)
    row = made.maps["rows"].value
    assert (row.name, row.size) == ("row", 40)
    assert [(field.name, field.offset, field.size, field.count, field.type) for field in row.fields] == [
        ("pairs", 0, 4, 3, "pair"),
        ("text", 12, 1, 8, "char"),
        ("number", 24, 8, 0, "u64"),
        ("signed_one", 32, 4, 0, "s32"),
    ]
    assert [(field.name, field.offset) for field in row.field("pairs").fields] == [("a", 0), ("b", 2)]
    program = made.programs["tc_one"]
    (relocation,) = program.relocations
    assert relocation.map == "rows"
    patched = program.patched({"rows": 0x1234})
    assert patched[relocation.index * 8 + 4 : relocation.index * 8 + 8] == (0x1234).to_bytes(4, "little")
    assert made.compiler == compiler_version() != ""


def test_second_load_compiles_nothing(sources: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = load(sources, cache)
    assert caplog.text.count(COMPILING) == 1
    assert load(sources, cache) == first
    assert caplog.text.count(COMPILING) == 1


@pytest.mark.parametrize("change", ["source", "header", "constant"])
def test_any_change_compiles_anew(sources: Path, cache: Path, caplog: pytest.LogCaptureFixture, change: str) -> None:
    caplog.set_level(logging.INFO)
    first = load(sources, cache)
    sizes = Sizes()
    if change == "source":
        (sources / "one.c").write_text(ONE.replace(": -1", ": -2"))
    elif change == "header":
        (sources / "shared.h").write_text(SHARED.replace("rows, 4", "rows, 5"))
    else:
        sizes = Sizes(flows=77)
    second = load(sources, cache, sizes)
    assert caplog.text.count(COMPILING) == 2
    # A constant that no source uses changes nothing in what comes out.
    assert (second.digest == first.digest) is (change == "constant")
    # Both are kept: the old one serves whoever goes back.
    (sources / "one.c").write_text(ONE)
    (sources / "shared.h").write_text(SHARED)
    assert load(sources, cache) == first
    assert caplog.text.count(COMPILING) == 2


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_damaged_cache_is_compiled_anew(
    sources: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    first = load(sources, cache)
    (file,) = cache.glob("*.artifact")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage is None else damage)
    assert load(sources, cache) == first
    assert f"{file} is damaged" in caplog.text
    assert file.read_bytes() == whole


def test_cache_does_not_grow_for_ever(sources: Path, cache: Path) -> None:
    cache.mkdir()
    for number in range(20):
        old = cache / f"{number}.artifact"
        old.write_bytes(b"old")
        os.utime(old, (number, number))
    load(sources, cache)
    names = {path.name for path in cache.iterdir()}
    assert len(names) == 16
    assert "0.artifact" not in names and "19.artifact" in names
    assert len([name for name in names if len(name) > 20]) == 1


def test_unwritable_cache_costs_time_only(sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    made = load(sources, tmp_path / "file" / "cache")
    assert "tc_one" in made.programs
    assert "compiled programs are not cached" in caplog.text
    assert "EBPFLB_CACHE" in caplog.text


def test_errors_are_at_the_original_line(sources: Path, cache: Path) -> None:
    (sources / "one.c").write_text(ONE.replace("return row", "return nowhere"))
    with pytest.raises(Unsupported, match=r"bpf/one\.c:8:9: error: use of undeclared identifier 'nowhere'"):
        load(sources, cache)
    (sources / "one.c").write_text(ONE)
    (sources / "shared.h").write_text(SHARED.replace("u64 number", "u65 number"))
    with pytest.raises(Unsupported, match=r"bpf/shared\.h:8:2: error: unknown type name 'u65'"):
        load(sources, cache)
    assert not list(cache.glob("*"))


def test_function_that_is_no_hook_is_named(sources: Path, cache: Path) -> None:
    (sources / "one.c").write_text(ONE + "int helper(struct __sk_buff *skb)\n{\n\treturn 0;\n}\n")
    with pytest.raises(Unsupported, match=r"bpf/one\.c: helper\(\) is no hook: make it static inline"):
        load(sources, cache)


def test_missing_source_is_named(sources: Path, cache: Path) -> None:
    (sources / "one.c").unlink()
    with pytest.raises(UserError, match=r"one\.c does not exist"):
        load(sources, cache)


# Python without the directory that has bcc in it, as in a container image that brings its cache along.
WITHOUT_BCC = """
import sys
sys.path = [entry for entry in sys.path if "dist-packages" not in entry]
from pathlib import Path
from ebpflb.dataplane.bpf.artifact import load_artifact
from ebpflb.errors import Unsupported
try:
    made = load_artifact(cache=Path(sys.argv[1]), sources=("one.c",), directory=Path(sys.argv[2]))
    print(made.digest)
except Unsupported as error:
    print(error)
print([name for name in ("bcc", "pyroute2", "kubernetes") if name in sys.modules])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmRSS"].split()[0]))
"""


def without_bcc(cache: Path, sources: Path) -> tuple[str, str, int]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BCC, str(cache), str(sources)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        check=True,
    )
    said, imported, kilobytes = done.stdout.splitlines()
    return said, imported, int(kilobytes)


def test_cached_programs_need_no_compiler_and_little_memory(sources: Path, cache: Path) -> None:
    digest = load(sources, cache).digest
    said, imported, kilobytes = without_bcc(cache, sources)
    assert said == digest
    assert imported == "[]"
    assert kilobytes < 40_000


def test_missing_compiler_is_named_with_its_package(sources: Path, cache: Path) -> None:
    said, imported, _ = without_bcc(cache, sources)
    assert said == "the compiler bcc is not installed: apt-get install python3-bpfcc linux-libc-dev"
    assert imported == "[]"


def test_missing_headers_are_named_with_their_package(sources: Path, cache: Path) -> None:
    """In a mount namespace where /usr/include is empty."""
    script = (
        "mount -t tmpfs none /usr/include && exec "
        f"{sys.executable} -c 'import sys; from pathlib import Path; "
        "from ebpflb.dataplane.bpf.artifact import load_artifact\n"
        'try: load_artifact(cache=Path(sys.argv[1]), sources=("one.c",), directory=Path(sys.argv[2]))\n'
        'except Exception as error: print(type(error).__name__, error)\' "$@"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(cache), str(sources)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        check=True,
    )
    assert done.stdout.startswith("Unsupported the UAPI headers are not installed"), done.stderr
    assert "apt-get install python3-bpfcc linux-libc-dev" in done.stdout
