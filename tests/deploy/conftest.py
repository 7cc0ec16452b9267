"""The stage that the tests of the pod share, and what a failure there leaves to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Collect
from tests.deploy import base
from tests.deploy.pod import Root, machine_root
from tests.deploy.stage import Running, Stage, config_files, endpoint_slice, fed_by_manifests, service

NOWHERE = "https://127.0.0.1:1"


@pytest.fixture(scope="session")
def standing_stage() -> Iterator[Stage]:
    """One cluster for all of them."""
    with Stage() as found:
        yield found


@pytest.fixture
def stage(standing_stage: Stage, on_failure: Callable[[str, Collect], None]) -> Stage:
    """The cluster, with what containers said if a test fails."""
    logs = standing_stage.cluster.logs
    on_failure("containers.log", lambda: "\n".join(path.read_text() for path in sorted(logs.iterdir())))
    return standing_stage


@pytest.fixture
def root() -> Root:
    """What containers run: this checkout, on this machine's root file system."""
    return machine_root(base.installed())


@pytest.fixture
def running(stage: Stage, root: Root, tmp_path: Path) -> Iterator[Running]:
    """The pod, not started yet, on a node of its own; manifests are its source, and they have the Service."""
    stage.tell(service("default"), endpoint_slice("default", *stage.web))
    files = {"config": config_files(tmp_path / "config", NOWHERE), "manifests": stage.cluster.manifests.directory}
    with stage.host() as host:
        yield Running(stage, host, root, fed_by_manifests(base.pod()), files)
