"""The emulated machines themselves: what goes in and comes out, and what becomes of one that hangs or dies."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ARTIFACTS, CHECKOUT
from tests.vm.kernels import MATRIX, Missing, find
from tests.vm.machine import NO_MACHINE, TIMED_OUT

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

BOOT_SECONDS = 120.0  # it needs some ten, more on a busy machine


def machine(*command: str, seconds: float = BOOT_SECONDS) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "tests.vm.machine", "--timeout", str(seconds), "--", *command]
    return subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def ours() -> set[str]:
    """The processes that emulate a machine, by their numbers."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if words[0].endswith((b"qemu-system-x86_64", b"virtiofsd")):
            found.add(directory.name)
    return found


def until_gone(before: set[str]) -> None:
    """Until no process of ours is left but those of before; one that was ended takes a moment to go."""
    deadline = time.monotonic() + 30
    while left := ours() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_command_runs_as_root_on_another_kernel_and_its_words_and_status_come_out() -> None:
    mark = ARTIFACTS / "vm" / "mark"
    mark.unlink(missing_ok=True)
    host = Path("/usr/of-a-machine")
    script = f"id -u; uname -r; pwd; echo told >&2; touch {mark} {host}; ls /tmp; exit 7"
    done = machine("sh", "-c", script)
    assert (done.returncode, done.stdout.splitlines()) == (7, ["0", find("6.12").release, str(CHECKOUT), "told"])
    assert mark.exists()
    assert not host.exists()
    mark.unlink()


def test_a_machine_that_hangs_is_ended_and_its_console_shown() -> None:
    before = ours()
    for seconds in (60, BOOT_SECONDS):  # a busy machine may not have begun by then
        began = time.monotonic()
        done = machine("sh", "-c", "echo begun; sleep 1000", seconds=seconds)
        assert done.returncode == TIMED_OUT
        assert time.monotonic() - began < seconds + 60
        assert f"took longer than {seconds:.0f} s" in done.stderr
        if done.stdout:
            break
    assert done.stdout == "begun\n"
    assert "virtme-ng-init" in done.stderr
    until_gone(before)


def test_a_kernel_that_dies_is_told() -> None:
    before = ours()
    done = machine("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000")
    assert done.returncode == NO_MACHINE
    assert "Kernel panic" in done.stderr
    assert "ended without an answer" in done.stderr
    until_gone(before)


def test_a_kernel_that_is_in_no_matrix_is_named() -> None:
    with pytest.raises(Missing, match=f"no kernel '2.4' in the matrix: {MATRIX[0].name}, "):
        find("2.4")
