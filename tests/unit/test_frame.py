"""The checkout as a whole: what the package installs, and that CI's arithmetic notices what it must."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_is_installed() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tree = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "ebpflb").rglob("__init__.py")}
    assert set(setup["packages"]) - set(setup["package-dir"]) == tree


def test_every_program_is_installed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for name, directory in (("ebpflb._bpf", "bpf"), ("ebpflb._deploy", "deploy")):
        shipped = {path for pattern in patterns[name] for path in (ROOT / directory).glob(pattern) if path.is_file()}
        sources = {path for path in (ROOT / directory).rglob("*") if path.suffix in {".c", ".h", ".yaml"}}
        assert sources <= shipped


CASE = '<testcase classname="a" name="{name}">{what}</testcase>'
SITUATIONS = {
    "all passed": (["", ""], 0, "2 passed, 0 failed, 0 skipped"),
    "one failed": (["", '<failure message="no"/>'], 1, "1 passed, 1 failed, 0 skipped"),
    "an error in a fixture": (["", '<error message="no"/>'], 1, "1 passed, 1 failed, 0 skipped"),
    "a skip that is no limit": (["", '<skipped message="felt like it"/>'], 1, "1 passed, 0 failed, 1 skipped"),
    "no test at all": ([], 1, "0 passed, 0 failed, 0 skipped"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_ci_adds_up(situation: str, tmp_path: Path) -> None:
    outcomes, status, closing = SITUATIONS[situation]
    cases = "".join(CASE.format(name=number, what=what) for number, what in enumerate(outcomes))
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    done = subprocess.run([sys.executable, ROOT / ".ci/summary", report], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == closing
