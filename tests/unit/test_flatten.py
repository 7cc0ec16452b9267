"""Pasting our headers into one source: each once, each message still at its own file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpflb.dataplane.bpf.flatten import enumerators, flatten, included, numbers

FILES = {
    "main.c": '#include <linux/in.h>\n#include "a.h"\nint main_line_3;\n  # include "b.h"\nint main_line_5;\n',
    "a.h": '#include "b.h"\nint a_line_2;\n',
    "b.h": "int b_line_1;\n",
}


def positions(text: str) -> dict[str, tuple[str, int]]:
    """Where a compiler would say that each line is."""
    found: dict[str, tuple[str, int]] = {}
    name, number = "", 0
    for line in text.splitlines():
        if line.startswith("#line "):
            _, at, quoted = line.split()
            name, number = quoted.strip('"'), int(at)
            continue
        if line.strip():
            found[line.strip()] = (name, number)
        number += 1
    return found


def test_each_line_keeps_its_file_and_number() -> None:
    assert positions(flatten("main.c", FILES)) == {
        "#include <linux/in.h>": ("bpf/main.c", 1),
        "int b_line_1;": ("bpf/b.h", 1),
        "int a_line_2;": ("bpf/a.h", 2),
        "int main_line_3;": ("bpf/main.c", 3),
        "int main_line_5;": ("bpf/main.c", 5),
    }


def test_a_header_is_pasted_once() -> None:
    assert flatten("main.c", FILES).count("b_line_1") == 1


def test_headers_that_include_each_other_end() -> None:
    files = {"x.c": '#include "y.h"\n', "y.h": '#include "z.h"\nint y;\n', "z.h": '#include "y.h"\nint z;\n'}
    assert positions(flatten("x.c", files))["int y;"] == ("bpf/y.h", 2)


def test_a_missing_header_is_named() -> None:
    with pytest.raises(KeyError, match=r"gone\.h"):
        flatten("x.c", {"x.c": '#include "gone.h"\n'})


def test_included_names_what_a_source_consists_of() -> None:
    assert included("main.c", FILES) == ("main.c", "a.h", "b.h")
    assert included("b.h", FILES) == ("b.h",)


def test_numbers_are_plain_definitions_only() -> None:
    text = (
        '#define ONE 1\n #  define HEX 0x10 /* why */\n#define F(x) 3\n#define TEXT "4"\n#define S 1 + 2\n#define NO\n'
    )
    assert numbers(text) == {"ONE": 1, "HEX": 16}


def test_enumerators_are_in_order_without_their_comments() -> None:
    text = "enum other { X };\nenum counter {\n\tA, /* one, two */\n\tB,\n\tLAST\n};\n"
    assert enumerators(text, "counter") == ("A", "B", "LAST")
    assert enumerators(text, "none") == ()


@pytest.mark.parametrize("source", ["sock.c", "tc.c"])
def test_our_sources_are_complete(source: str) -> None:
    directory = Path(__file__).resolve().parents[2] / "bpf"
    files = {path.name: path.read_text() for path in directory.glob("*.[ch]")}
    text = flatten(source, files)
    assert '#include "' not in text
    # Every line of every file that it consists of is there, at its own place.
    found = positions(text)
    for name in included(source, files):
        for number, line in enumerate(files[name].splitlines(), 1):
            if "_Static_assert" in line:
                assert found[line.strip()] == (f"bpf/{name}", number)
