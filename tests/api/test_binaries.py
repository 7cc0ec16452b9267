"""The pins of the real programs, and where they are looked for; nothing is built here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.api.binaries import CURRENT, ETCD, MODULES, OLDER, Build, Missing, find

BUILDS = (ETCD, CURRENT, *OLDER)


def ids(build: Build) -> str:
    return build.name


@pytest.mark.parametrize("build", BUILDS, ids=ids)
def test_every_program_is_a_tool_of_its_module(build: Build) -> None:
    text = (MODULES / build.name / "go.mod").read_text()
    assert all(re.search(rf"^(tool)?\s+{re.escape(package)}$", text, re.M) for package in build.packages.values())


@pytest.mark.parametrize("build", (CURRENT, *OLDER), ids=ids)
def test_all_of_kubernetes_is_of_one_version(build: Build) -> None:
    text = (MODULES / build.name / "go.mod").read_text()
    assert re.search(rf"k8s\.io/kubernetes {re.escape(build.version)}\b", text)
    replaced = re.findall(r"^\t(k8s\.io/\S+) => (\S+) (\S+)$", text, re.M)
    assert len(replaced) > 20
    assert {(there, version) for _, there, version in replaced} == {
        (module, build.version.replace("v1.", "v0.")) for module, _, _ in replaced
    }


def test_the_etcd_is_the_one_that_the_newest_api_server_speaks_to() -> None:
    versions = {
        build.name: re.search(r"go\.etcd\.io/etcd/client/v3 (\S+)", (MODULES / build.name / "go.mod").read_text())
        for build in (ETCD, CURRENT)
    }
    assert versions["etcd"] and versions["v1.36"] and versions["etcd"][1] == versions["v1.36"][1]


def test_programs_that_the_user_names_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etcd").touch(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert find(ETCD) == {"etcd": tmp_path / "etcd"}


def test_what_is_not_built_yet_is_said_with_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("EBPFLB_CACHE", str(tmp_path))
    with pytest.raises(Missing, match=r"^etcd \(etcd\) has not been built yet; run: \S+ -m tests\.api\.binaries$"):
        find(ETCD)
    assert list(tmp_path.iterdir()) == []
