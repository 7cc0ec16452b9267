"""Stages that run at once are told as if they had run one after the other, and are interrupted together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30.0

_RUN = """
import sys
from tests.stages import run, _write
at_once, *words = sys.argv[1:]
stages = {name: ("sh", "-c", script) for name, script in zip(words[::2], words[1::2])}
sys.exit(run(stages, int(at_once), _write))
"""


@contextmanager
def running(stages: Mapping[str, str], at_once: int = 2) -> Iterator[subprocess.Popen[str]]:
    """Scripts of a shell by the names of their stages."""
    words = [word for both in stages.items() for word in both]
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, str(at_once), *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> list[str]:
    """What is said to the end, without how long it took."""
    said, _ = process.communicate(timeout=SECONDS)
    return [line.partition(":")[0] if line.startswith("== ") else line for line in said.splitlines()]


def until_there(path: Path) -> str:
    """What a file says, as soon as it says something."""
    deadline = time.monotonic() + SECONDS
    while not path.exists() or not (said := path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.01)
    return said


def test_two_at_once_are_told_in_order(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # The first one goes on only when the second one has spoken.
    stages = {"first": f"echo 1; read line <{fifo}; echo $line", "second": f"echo 2; echo met >{fifo}; echo 3"}
    with running(stages) as process:
        assert told(process) == ["1", "met", "== first", "2", "3", "== second", "== all"]
        assert process.returncode == 0


def test_what_it_is_the_turn_of_is_told_as_it_speaks(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with running({"first": f"echo begun; read line <{fifo}", "second": "echo 2"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        fifo.write_text("on\n")
        assert told(process) == ["== first", "2", "== second", "== all"]


def test_every_stage_runs_also_after_one_that_failed() -> None:
    with running({"first": "exit 3", "second": "echo 2", "third": "false"}, at_once=1) as process:
        said = told(process)
    assert said == ["== first", "2", "== second", "== third", "== all", "failed in: first third"]
    assert process.returncode == 1


def test_no_more_than_that_at_once(tmp_path: Path) -> None:
    alone = f"mkdir {tmp_path}/here && rmdir {tmp_path}/here"
    with running(dict.fromkeys("abcdefgh", alone), at_once=1) as process:
        told(process)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_to_be_interrupted_reaches_all_that_run_and_lets_them_tidy_up(tmp_path: Path, number: signal.Signals) -> None:
    tidy = textwrap.dedent("""
        import sys, time
        try:
            open(sys.argv[1] + ".begun", "w").write("begun")
            time.sleep(1000)
        finally:
            print("tidied", sys.argv[1][-1], flush=True)
    """)
    script = f"{sys.executable} -c '{tidy}' {tmp_path}/%s 2>/dev/null; echo went on"
    with running({"a": script % "a", "b": script % "b", "c": "echo never"}) as process:
        for name in "ab":
            until_there(tmp_path / f"{name}.begun")
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)  # as by make, when all that it runs is told, too
        said = told(process)
    assert [line for line in said if line != "went on"] == [
        "tidied a",
        "== a",
        "tidied b",
        "== b",
        "== all",
        "failed in: a b",
    ]
    assert process.returncode == 130


def test_to_insist_ends_by_force(tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    deaf = f"trap '' INT; echo begun >{mark}; while :; do sleep 0.05; done"
    with running({"deaf": deaf}) as process:
        until_there(mark)
        deadline = time.monotonic() + SECONDS
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            assert time.monotonic() < deadline
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert told(process) == ["== deaf", "== all", "failed in: deaf"]


def test_what_a_stage_leaves_elsewhere_is_not_waited_for(tmp_path: Path) -> None:
    mark = tmp_path / "number"
    stray = f"setsid sh -c 'echo $$ >{mark}; exec sleep 1000' & until [ -s {mark} ]; do sleep 0.01; done; echo left"
    with running({"one": stray}) as process:
        said = told(process)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    assert said == ["left", "== one", "== all"]
