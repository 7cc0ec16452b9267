"""The Vagrantfile as Vagrant reads it, without a hypervisor; and every shell script of the checkout as shellcheck does.

Rules of this file: no machine is made here. What is done inside of one is done in an emulated machine, by
tests/vm/test_provisioning.py; the cluster of `kubeadm` needs a network and several machines, and is not done by any
test.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
# Also what other tests may be writing just now.
NOT_OURS = {".git", ".hypothesis", ".venv", "__pycache__", "build", "artifacts", "node_modules"}
SHELL = re.compile(rb"#! ?(/usr)?/bin/(env )?(ba|da)?sh\b")

# All that Vagrant asks VirtualBox for before there is a machine.
PRETENDED = '#!/bin/sh\n[ "$1" != --version ] || echo 7.0.20r163906\n'

Ask = Callable[..., "subprocess.CompletedProcess[str]"]


def shell_scripts() -> list[str]:
    """By their first line."""
    found = []
    for where, directories, files in os.walk(CHECKOUT):
        directories[:] = [each for each in directories if each not in NOT_OURS and not each.endswith("_cache")]
        for name in files:
            path = Path(where, name)
            with path.open("rb") as file:
                if SHELL.match(file.readline(80)):
                    found.append(str(path.relative_to(CHECKOUT)))
    return sorted(found)


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = shell_scripts()
    assert {"scripts/setup", ".ci/run", "deploy/build-image", "deploy/vagrant/provision.sh"} <= set(scripts)
    done = subprocess.run(["shellcheck", *scripts], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_something(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("#!/bin/sh\ncd $1\n")
    done = subprocess.run(["shellcheck", str(tmp_path / "bad")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "SC2086" in done.stdout


@pytest.fixture
def vagrant(tmp_path: Path) -> Ask:
    """`vagrant(*words, workers=…, virtualbox=…, directory=…)` in a home of its own."""
    pretended = tmp_path / "bin" / "VBoxManage"
    pretended.parent.mkdir()
    pretended.write_text(PRETENDED)
    pretended.chmod(0o755)

    def ask(
        *words: str, workers: str = "0", virtualbox: bool = False, directory: Path = CHECKOUT
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{pretended.parent}:{os.environ['PATH']}" if virtualbox else os.environ["PATH"],
            "HOME": str(tmp_path),
            "VAGRANT_HOME": str(tmp_path / "home"),
            "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
            "VAGRANT_CWD": str(directory),
            "EBPFLB_VAGRANT_WORKERS": workers,
        }
        return subprocess.run(["vagrant", *words], env=environment, capture_output=True, text=True, check=False)

    return ask


@pytest.mark.vagrant
@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_vagrantfile_is_valid(vagrant: Ask, workers: str) -> None:
    done = vagrant("validate", workers=workers, virtualbox=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validated successfully" in done.stdout


@pytest.mark.vagrant
@pytest.mark.slow
def test_workers_come_beside_a_control_plane(vagrant: Ask) -> None:
    done = vagrant("status", "--machine-readable", workers="2", virtualbox=True)
    found = [line.split(",")[1] for line in done.stdout.splitlines() if ",state,not_created" in line]
    assert found == ["control-plane", "worker-1", "worker-2"]


@pytest.mark.vagrant
@pytest.mark.slow
def test_a_mistake_would_be_found(vagrant: Ask, tmp_path: Path) -> None:
    text = (CHECKOUT / "Vagrantfile").read_text()
    assert "virtualbox.memory" in text
    (tmp_path / "Vagrantfile").write_text(text.replace("virtualbox.memory", "virtualbox.memery"))
    done = vagrant("validate", virtualbox=True, directory=tmp_path)
    assert done.returncode == 1
    assert "memery" in done.stdout + done.stderr
    assert "provision.sh" in done.stdout + done.stderr  # which is not there either


@pytest.mark.vagrant
@pytest.mark.slow
@pytest.mark.parametrize("workers", ["10", "two"])
def test_a_number_of_workers_that_is_none_is_refused(vagrant: Ask, workers: str) -> None:
    done = vagrant("validate", "--ignore-provider", workers=workers)
    assert done.returncode != 0
    assert workers in done.stdout + done.stderr


PROVISION = CHECKOUT / "deploy" / "vagrant" / "provision.sh"


@pytest.mark.parametrize(
    ("role", "variables", "said"),
    [
        ("node", {"EBPFLB_CHECKOUT": "/nonexistent"}, "/nonexistent is no checkout of ebpflb"),
        ("node", {"EBPFLB_VAGRANT_TESTS": "some"}, "EBPFLB_VAGRANT_TESTS=some: write all, quick or none"),
        ("master", {}, "master is no role"),
    ],
)
def test_provisioning_refuses_what_it_does_not_know(role: str, variables: dict[str, str], said: str) -> None:
    environment = {"PATH": os.environ["PATH"], "EBPFLB_CHECKOUT": str(CHECKOUT), **variables}
    done = subprocess.run([PROVISION, role], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr


def test_every_variable_is_told_of() -> None:
    """Where a user looks: at the top of the file that reads it, and in the documentation."""
    read = set(re.findall(r"EBPFLB_VAGRANT_[A-Z]+", (CHECKOUT / "Vagrantfile").read_text()))
    page = (CHECKOUT / "docs" / "vagrant.md").read_text()
    internal = {"EBPFLB_VAGRANT_NUMBER", "EBPFLB_VAGRANT_NETWORK"}
    assert {name for name in read - internal if name not in page} == set()
