"""Pastes our own headers into one C source, because BCC rewrites map methods in the main file only.

Rules of this file: pure; text in, text out. `#include "x.h"` is ours and is pasted once; `#include <…>` is left to the
compiler. `#line` markers keep the original file and line in every message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NUMBER = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+(0[xX][0-9a-fA-F]+|\d+)[ \t]*(?:/[*/].*)?$", re.MULTILINE)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"')


def flatten(name: str, files: Mapping[str, str], prefix: str = "bpf/") -> str:
    """The source `name` with every file of `files` that it includes pasted in its place, each once.

    `files` maps file names to texts. `prefix` stands before the names in the `#line` markers. Raises KeyError with
    the name of a file that is included and not given.
    """
    lines: list[str] = []
    _paste(name, files, prefix, set(), lines)
    return "\n".join(lines) + "\n"


def _paste(name: str, files: Mapping[str, str], prefix: str, seen: set[str], out: list[str]) -> None:
    seen.add(name)
    text = files[name]
    out.append(f'#line 1 "{prefix}{name}"')
    for number, line in enumerate(text.splitlines(), 1):
        match = _INCLUDE.match(line)
        if match is None:
            out.append(line)
            continue
        if match[1] in seen:
            out.append("")
            continue
        _paste(match[1], files, prefix, seen, out)
        out.append(f'#line {number + 1} "{prefix}{name}"')


def numbers(text: str) -> dict[str, int]:
    """Every `#define NAME number` of a C text."""
    return {name: int(value, 0) for name, value in _NUMBER.findall(text)}


def enumerators(text: str, enum: str) -> tuple[str, ...]:
    """The names of `enum enum { … }` in order, which has no explicit values; () if the text has no such enum."""
    match = re.search(rf"\benum\s+{enum}\s*\{{(.*?)\}}", text, re.DOTALL)
    if match is None:
        return ()
    body = re.sub(r"/\*.*?\*/", "", match[1], flags=re.DOTALL)
    return tuple(name.strip() for name in body.split(",") if name.strip())


def included(name: str, files: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the files that `flatten(name, files)` consists of, in order."""
    seen: dict[str, None] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen[current] = None
        waiting += [match[1] for line in files[current].splitlines() if (match := _INCLUDE.match(line))]
    return tuple(seen)
