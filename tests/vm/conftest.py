"""Tests that need another kernel than this machine's: they run in an emulated machine, which has it.

Rules of this file: nobody skips these. On a machine that is not one of ours they fail and say how to run them.
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def emulated_machine() -> str:
    """The name of its kernel."""
    kernel = os.environ.get("EBPFLB_VM")
    if not kernel:
        pytest.fail("runs in an emulated machine: make test-vm, or python -m tests.vm.machine -- …", pytrace=False)
    return kernel
