"""The daemon and its configuration file, as processes: what it takes from it, and that it ends when it changes."""

from __future__ import annotations

import json
import os

import pytest

from tests.cli.place import DEADLINE, Place
from tests.cli.test_processes import shop

pytestmark = [pytest.mark.root, pytest.mark.box]


def mount(place: Place, version: int, log_format: str) -> str:
    """Write a configuration as the kubelet does a ConfigMap: behind a link that is moved over. Returns its path."""
    directory = place.directory / "config"
    new = directory / f"..v{version}"
    new.mkdir(parents=True)
    (new / "config.conf").write_text(
        "apiVersion: ebpflb/v1\nkind: EbpflbConfiguration\nhealthzBindAddress: 'off'\n"
        f"oomScoreAdj: 5\nlogging: {{format: {log_format}}}\nportRange: 1-2\n"
    )
    link = directory / "..tmp"
    link.symlink_to(new.name)
    os.rename(link, directory / "..data")
    path = directory / "config.conf"
    if not path.is_symlink():
        path.symlink_to("..data/config.conf")
    return str(path)


def test_a_daemon_ends_well_when_its_config_map_changes(place: Place) -> None:
    """What it installed stays; whoever runs it starts it again, with what the file says now."""
    shop(place)
    path = mount(place, 1, log_format="text")
    daemon = place.start("--config", path)
    assert f"--config {path}: without meaning for ebpflb: portRange" in daemon.log
    with open(f"/proc/{daemon.process.pid}/oom_score_adj") as score:
        assert score.read() == "5\n"
    mount(place, 2, log_format="text")  # written anew, and nothing else
    assert place.ebpflb("status").status == 0
    mount(place, 3, log_format="json")
    assert daemon.process.wait(DEADLINE) == 0
    assert f"{path} has changed: ending" in daemon.log
    assert place.ebpflb("trace", "10.244.1.9", "10.96.0.80:80").status == 0
    again = place.start("--config", path)
    assert all(json.loads(line) for line in again.log.splitlines())
