"""Runs stages of the Makefile, some at once, and tells what they said as if they had run one after the other.

    python -m tests.stages lint test-pure test-box test-vm      two at once, or one where there is one processor
    python -m tests.stages --at-once 1 lint test-pure           one after the other

Rules of this file: stages begin in the order in which they are named, and each is told whole, in that order: the first
that is not over as it speaks, the others when it is their turn. Every stage runs, also after one that failed. To be
interrupted, ended or hung up on is passed on to all that run as Ctrl-C, so that tests tidy up; a second time ends them
by force. A stage is over when all that it runs has ended. Nothing but Python's own library.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

AT_ONCE = 2
INTERRUPTED = 130
STRAY_SECONDS = 60.0
"""How long what a stage has begun may go on when the stage itself has ended. An interrupted shell, for one, does not
wait for pytest, which tidies up."""
_ONE_SECONDS = 0.5
"""Signals that come within this time are one: whoever ends a make and all that it runs reaches us by both ways."""
_LOOK_SECONDS = 0.1

Tell = Callable[[bytes], None]


class Stage:
    """A stage that runs. `status` is what it ended with, None until then; `seconds` how long it took."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.status: int | None = None
        self.seconds = 0.0
        self._begun = time.monotonic()
        self._unsaid = bytearray()
        self._silent = False  # whether nobody can say more
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout.fileno()
        self.end = os.pidfd_open(self._process.pid)  # readable when it has ended
        os.set_blocking(self.output, False)

    def read(self) -> bool:
        """Take what it has said since; False where nobody can say more."""
        with contextlib.suppress(BlockingIOError):
            while some := os.read(self.output, 65536):
                self._unsaid += some
            self._silent = True
        return not self._silent

    def tell(self, tell: Tell) -> None:
        """Hand on what was taken and not told yet."""
        if self._unsaid:
            tell(bytes(self._unsaid))
            self._unsaid.clear()

    def signal(self, number: int) -> bool:
        """To it and to all that it runs; whether there was anyone. 0 only asks that."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def reap(self) -> None:
        """When it has ended."""
        self.status = self._process.wait()
        self.seconds = time.monotonic() - self._begun

    def over(self) -> bool:
        """Whether all that it runs has ended, too; what goes on for too long is ended here."""
        if self.status is None:
            return False
        if not self._silent and self.signal(0):
            if time.monotonic() - self._begun - self.seconds < STRAY_SECONDS:
                return False
            self.signal(signal.SIGKILL)
        return True

    def close(self) -> None:
        """When it is over: take its last words."""
        if not self._silent:
            self.read()
        assert self._process.stdout is not None
        self._process.stdout.close()
        os.close(self.end)


class Stages:
    """Stages by name with their commands, at most `at_once` at a time; `tell` is given what they say."""

    def __init__(self, commands: Mapping[str, Sequence[str]], at_once: int, tell: Tell) -> None:
        self._waiting = deque(commands.items())
        self._at_once = at_once
        self._tell = tell
        self._selector = selectors.DefaultSelector()
        self._running: list[Stage] = []
        self._untold: deque[Stage] = deque()
        self.interruptions: list[float] = []  # when they came; who handles signals does no more than append
        self._passed_on = 0
        self.done: list[Stage] = []

    def run(self) -> None:
        """All of them, to their end; if it is interrupted, those that run then."""
        try:
            while self._begin():
                self._hear()
                self._interrupt()
        finally:
            for stage in self._running:
                stage.signal(signal.SIGKILL)
                stage.reap()
                stage.close()
            self._selector.close()

    def _begin(self) -> bool:
        """Begin what may; whether any runs."""
        while self._waiting and len(self._running) < self._at_once and not self.interruptions:
            stage = Stage(*self._waiting.popleft())
            self._running.append(stage)
            self._untold.append(stage)
            self._selector.register(stage.output, selectors.EVENT_READ, stage)
            self._selector.register(stage.end, selectors.EVENT_READ, stage)
        return bool(self._running)

    def _interrupt(self) -> None:
        """Pass on what came since the last time."""
        come = self.interruptions[self._passed_on :]
        self._passed_on += len(come)
        for when in come:
            first = when == self.interruptions[0]
            if first or when - self.interruptions[0] > _ONE_SECONDS:
                for stage in self._running:
                    stage.signal(signal.SIGINT if first else signal.SIGKILL)

    def _hear(self) -> None:
        """Wait a moment for a stage to say something or to end, and tell what it is the turn of."""
        for key, _ in self._selector.select(_LOOK_SECONDS):
            stage: Stage = key.data
            if key.fd == stage.end:
                self._selector.unregister(stage.end)
                stage.reap()
            elif not stage.read():
                self._selector.unregister(stage.output)
        for stage in [stage for stage in self._running if stage.over()]:
            if stage.output in self._selector.get_map():
                self._selector.unregister(stage.output)
            stage.close()
            self._running.remove(stage)
        while self._untold:
            stage = self._untold[0]
            stage.tell(self._tell)
            if stage in self._running:
                break
            self._tell(f"== {stage.name}: {stage.seconds:.0f} s{', failed' if stage.status else ''}\n".encode())
            self.done.append(self._untold.popleft())


def run(commands: Mapping[str, Sequence[str]], at_once: int, tell: Tell) -> int:
    """See the top of this file; 0 if all succeeded, else 1, or INTERRUPTED. For a process that does nothing else."""
    begun = time.monotonic()
    stages = Stages(commands, at_once, tell)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: stages.interruptions.append(time.monotonic()))
    stages.run()
    failed = [stage.name for stage in stages.done if stage.status]
    took = ", ".join(f"{stage.name} {stage.seconds:.0f} s" for stage in stages.done)
    tell(f"== all: {time.monotonic() - begun:.0f} s; {took}\n".encode())
    if failed:
        tell(f"failed in: {' '.join(failed)}\n".encode())
    return INTERRUPTED if stages.interruptions else 1 if failed else 0


def _write(said: bytes) -> None:
    sys.stdout.buffer.write(said)
    sys.stdout.buffer.flush()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stages")
    parser.add_argument("--at-once", type=int, default=min(AT_ONCE, len(os.sched_getaffinity(0))), metavar="NUMBER")
    parser.add_argument("stages", nargs="+", metavar="STAGE", help="a target of the Makefile")
    asked = parser.parse_args(arguments)
    return run({name: ("make", "--no-print-directory", name) for name in asked.stages}, asked.at_once, _write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
