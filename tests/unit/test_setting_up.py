"""`run --write-config-to`, `run --init-only` and a `--config` that everything else reads too, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ebpflb.cli import main
from ebpflb.errors import Unsupported
from ebpflb.model import Problem
from tests.fakes import FakeDataplane, World, both, routes

CONFIGURATION = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: /nowhere/kubeconfig.conf}
clusterCIDR: 10.0.0.0/8
portRange: 1-2
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.conf"
    path.write_text(CONFIGURATION)
    return path


def test_what_is_in_force_is_printed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine without the kubeconfig too: nobody is asked."""
    assert main(["run", "--config", str(path), "--masquerade-all", "--write-config-to", "-"], World().parts) == 0
    said = capsys.readouterr()
    document = yaml.safe_load(said.out)
    assert document["kind"] == "EbpflbConfiguration"
    assert document["clusterCIDR"] == "10.0.0.0/8"
    assert document["iptables"]["masqueradeAll"] is True
    assert "without meaning for ebpflb: portRange" in said.err


def test_what_is_in_force_is_written_and_reads_back(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = path.parent / "first.yaml", path.parent / "second.yaml"
    assert main(["run", "--config", str(path), "--write-config-to", str(first)], World().parts) == 0
    assert main(["run", "--config", str(first), "--write-config-to", str(second)], World().parts) == 0
    assert first.read_text() == second.read_text()
    assert f"wrote the configuration to {first}" in capsys.readouterr().err


def test_kube_proxys_options_for_the_node_go_before_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(CONFIGURATION + "conntrack: {maxPerCore: 5, min: 6}\n")
    words = [
        "--conntrack-max-per-core=0", "--conntrack-min=1", "--conntrack-tcp-timeout-established=1h30m",
        "--conntrack-tcp-timeout-close-wait", "0", "--conntrack-udp-timeout=10s", "--conntrack-udp-timeout-stream=20s",
        "--conntrack-tcp-be-liberal", "--bind-address-hard-fail=true", "--oom-score-adj=-998",
    ]  # fmt: skip
    assert main(["run", "--config", str(path), *words, "--write-config-to", "-"], World().parts) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    assert document["conntrack"] == {
        "maxPerCore": 0, "min": 1, "tcpEstablishedTimeout": "1h30m0s", "tcpCloseWaitTimeout": "0s",
        "udpTimeout": "10s", "udpStreamTimeout": "20s", "tcpBeLiberal": True,
    }  # fmt: skip
    assert (document["oomScoreAdj"], document["bindAddressHardFail"]) == (-998, True)


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("--conntrack-udp-timeout=30", '"30" is not a duration; did you mean "30s"?'),
        ("--conntrack-udp-timeout=-5s", "--conntrack-udp-timeout -5s: give at least 0s"),
        ("--oom-score-adj=2000", "2000 is not in the range -1000<=x<=1000"),
    ],
)
def test_a_wrong_option_for_the_node_is_one_line(capsys: pytest.CaptureFixture[str], word: str, want: str) -> None:
    assert main(["run", word, "--init-only"], World().parts) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert want in line


def test_where_nothing_can_be_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(path), "--write-config-to", "/nowhere/at/all"], World().parts) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "ebpflb: --write-config-to /nowhere/at/all: No such file or directory; give a file that can be written"
    )


@pytest.mark.parametrize("spelling", ["--init-only", "--init-only=true"])
def test_the_node_alone_is_set_up(path: Path, capsys: pytest.CaptureFixture[str], spelling: str) -> None:
    world = World(want=routes(*both()))
    world.node_problems = (Problem("nf_conntrack_max", "cannot be set"),)
    assert main(["run", "--config", str(path), spelling], world.parts) == 0
    said = capsys.readouterr()
    assert "node: nf_conntrack_max: cannot be set" in said.err
    assert "the node is set up" in said.err
    assert world.dataplane.calls == ["check"]


def test_the_settings_of_whoever_will_carry_services_are_made(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    world.others = [FakeDataplane(name="ipvs")]
    world.dataplane.raises["check"] = Unsupported("no bpf(2)")
    world.setting_problems["bpf"] = (Problem("bpf", "this is not asked"),)
    world.setting_problems["ipvs"] = (Problem("ipvs", "/proc/sys/net/ipv4/vs/conntrack cannot be set to 1"),)
    assert main(["run", "--config", str(path), "--init-only"], world.parts) == 0
    said = capsys.readouterr().err
    assert "dataplane ipvs can carry services here" in said
    assert "WARNING node: ipvs: /proc/sys/net/ipv4/vs/conntrack cannot be set to 1" in said
    assert "this is not asked" not in said


def test_the_node_is_set_up_by_root(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(path), "--init-only"], World().but(privileged=lambda: False)) == 2
    assert "sudo" in capsys.readouterr().err


def test_commands_that_look_find_the_daemons_pins_in_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("apiVersion: ebpflb/v1\nkind: EbpflbConfiguration\nbpffs: /sys/fs/bpf/other\n")
    world = World(held=routes(*both()))
    assert main(["dump", "--config", str(path)], world.parts) == 0
    (config,) = world.configs
    assert config.bpffs == "/sys/fs/bpf/other"


def test_a_wrong_configuration_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(CONFIGURATION.replace("clusterCIDR", "clusterCidr"))
    assert main(["run", "--config", str(path)], World().parts) == 2
    assert capsys.readouterr().err == (
        f'ebpflb: --config {path}: clusterCidr: unknown field, did you mean "clusterCIDR"?\n'
    )


def test_a_kubeconfig_that_is_not_there_is_one_line_at_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(path)], World().parts) == 2
    assert capsys.readouterr().err == (
        f"ebpflb: --config {path}: clientConnection.kubeconfig /nowhere/kubeconfig.conf: there is no such file\n"
    )
