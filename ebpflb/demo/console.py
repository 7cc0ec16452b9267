"""How the demo speaks: numbered steps, commands with what came back, checks, a closing table.

Rules of this file: everything shown goes through here, line by line and at once, so that whoever watches a slow machine
sees where it is. A check is a promise and whether it was kept; the exit status is made of checks alone.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from ebpflb.errors import EbpflbError

WIDTH = 100
MOST_LINES = 24


class Step:
    """One part of the story: its title and the checks made in it."""

    def __init__(self, number: int, title: str) -> None:
        self.number = number
        self.title = title
        self.kept: list[str] = []
        self.broken: list[str] = []
        self.seconds = 0.0


class Console:
    """Tells the story on `out`; bold and colours where that is a terminal."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._colours = out.isatty()
        self._steps: list[Step] = []

    @property
    def failed(self) -> bool:
        """Whether any promise was broken, or none was made."""
        return not self._steps or any(step.broken or not step.kept for step in self._steps)

    @contextmanager
    def step(self, title: str, why: str = "") -> Iterator[None]:
        """A part of the story. An error of ours inside is a broken promise, and the story goes on."""
        step = Step(len(self._steps) + 1, title)
        self._steps.append(step)
        self._line("")
        self._heading(f"{step.number}. {title}")
        if why:
            self.say(why)
        began = time.monotonic()
        try:
            yield
        except EbpflbError as error:
            self.check(False, str(error))
        finally:
            step.seconds = time.monotonic() - began

    def say(self, text: str) -> None:
        """A sentence or two, wrapped."""
        self._line(textwrap.fill(" ".join(text.split()), WIDTH))

    def detail(self, line: str) -> None:
        """A line as it is, indented."""
        self._line(f"    {line}")

    def command(self, where: str, argv: Sequence[str], output: str, least: str = "") -> None:
        """A command as a person would type it, and what came back; `least` replaces the command's words."""
        self._line("")
        self._line(self._paint("36", f"{where}$ {least or shlex.join(argv)}"))
        lines = output.rstrip("\n").splitlines()
        for line in lines[:MOST_LINES]:
            self._line(f"    {line}")
        if len(lines) > MOST_LINES:
            self._line(f"    … {len(lines) - MOST_LINES} more lines")

    def check(self, kept: bool, promise: str) -> None:
        """A promise, and whether it was kept."""
        step = self._steps[-1]
        (step.kept if kept else step.broken).append(promise)
        self._line(f"  {self._paint('32', 'ok') if kept else self._paint('31', 'FAILED')}  {promise}")

    def progress(self, text: str) -> None:
        """What is being waited for."""
        self._line(f"  … {text}")

    def summary(self, seconds: float) -> None:
        """The closing table."""
        self._line("")
        self._heading("Summary")
        for step in self._steps:
            good = step.kept and not step.broken
            mark = self._paint("32", "ok    ") if good else self._paint("31", "FAILED")
            checks = len(step.kept) + len(step.broken)
            noun = "check" if checks == 1 else "checks"
            self._line(f"  {mark}  {step.number:2}. {step.title:64} {checks:2} {noun:6} {step.seconds:6.1f} s")
            for promise in step.broken:
                self._line(f"              not as promised: {promise}")
        broken = sum(len(step.broken) for step in self._steps)
        kept = sum(len(step.kept) for step in self._steps)
        self._line(f"  {kept} promises kept, {broken} broken, in {seconds:.1f} s")

    def _heading(self, text: str) -> None:
        self._line(self._paint("1", f"── {text} ".ljust(WIDTH, "─")))

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text

    def _line(self, text: str) -> None:
        print(text, file=self._out, flush=True)
