"""What Vagrant does inside a machine of one node, done in this one: set-up, check, demo and some tests, as a user has
them. `make vm` is the same, to look at."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1500)]

CHECKOUT = Path(__file__).resolve().parents[2]


def test_one_node_is_provisioned(on_failure: Callable[[str, Callable[[], str]], None]) -> None:
    script = CHECKOUT / "deploy" / "vagrant" / "light.sh"
    environment = {**os.environ, "EBPFLB_VAGRANT_TESTS": "quick"}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    on_failure("provisioning.txt", lambda: done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " 0 broken" in done.stdout
    assert " passed" in done.stdout and " skipped" not in done.stdout
    assert done.stdout.rstrip().endswith(f"{CHECKOUT}/.venv/bin/ebpflb is ready")
