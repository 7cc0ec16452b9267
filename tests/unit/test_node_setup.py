"""The node's settings beside Services: kube-proxy's values, written where they differ, and what cannot be had."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ebpflb.config import Config, Conntrack
from ebpflb.config.options import Options, configure
from ebpflb.model import Problem
from ebpflb.node_setup import Files, most_tracked, set_up

ESTABLISHED, CLOSE_WAIT = "nf_conntrack_tcp_timeout_established", "nf_conntrack_tcp_timeout_close_wait"
KERNELS = {
    "nf_conntrack_max": 65536,
    ESTABLISHED: 432000,
    CLOSE_WAIT: 60,
    "nf_conntrack_tcp_be_liberal": 0,
    "nf_conntrack_udp_timeout": 30,
    "nf_conntrack_udp_timeout_stream": 120,
}


class Kernel:
    """A directory that looks like the kernel's."""

    def __init__(self, root: Path) -> None:
        self.files = Files(root / "netfilter", root / "hashsize", root / "oom_score_adj")
        self.files.netfilter.mkdir()
        for name, value in KERNELS.items():
            (self.files.netfilter / name).write_text(f"{value}\n")
        self.files.hashsize.write_text("16384\n")
        self.files.oom_score_adj.write_text("0\n")

    def set_up(self, conntrack: Conntrack | None = None, oom_score_adj: int | None = None) -> tuple[Problem, ...]:
        config = msgspec.structs.replace(BARE, conntrack=conntrack, oom_score_adj=oom_score_adj)
        return set_up(config, files=self.files, cpus=8)

    def changed(self) -> dict[str, int]:
        """What is not as it was."""
        now = {name: int((self.files.netfilter / name).read_text()) for name in KERNELS}
        now |= {"hashsize": int(self.files.hashsize.read_text()), "oom": int(self.files.oom_score_adj.read_text())}
        return {name: value for name, value in now.items() if value != {**KERNELS, "hashsize": 16384, "oom": 0}[name]}


BARE: Config = configure(Options(), hostname="node-1", need_source=False)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_kube_proxys_defaults_on_eight_cpus(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert kernel.set_up(Conntrack(), -999) == ()
    assert kernel.changed() == {
        "nf_conntrack_max": 262144, "hashsize": 65536, ESTABLISHED: 86400, CLOSE_WAIT: 3600, "oom": -999,
    }  # fmt: skip
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "262144, was 65536 (conntrack.maxPerCore)",
        "65536, was 16384 (conntrack.maxPerCore)",
        "86400, was 432000 (conntrack.tcpEstablishedTimeout)",
        "3600, was 60 (conntrack.tcpCloseWaitTimeout)",
        "-999, was 0 (oomScoreAdj)",
    ]


def test_every_setting_has_its_file(kernel: Kernel) -> None:
    conntrack = Conntrack(
        max_per_core=1, least=7, tcp_established=1, tcp_close_wait=2, tcp_be_liberal=True, udp=3, udp_stream=4
    )
    assert kernel.set_up(conntrack) == ()
    assert kernel.changed() == {
        "nf_conntrack_max": 8,
        ESTABLISHED: 1,
        CLOSE_WAIT: 2,
        "nf_conntrack_tcp_be_liberal": 1,
        "nf_conntrack_udp_timeout": 3,
        "nf_conntrack_udp_timeout_stream": 4,
    }


def test_nothing_is_asked_for(kernel: Kernel) -> None:
    assert kernel.set_up() == ()
    assert kernel.set_up(Conntrack(max_per_core=0, tcp_established=None, tcp_close_wait=None)) == ()
    assert kernel.changed() == {}


def test_what_is_as_it_should_be_is_not_written(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    kernel.set_up(Conntrack(), -999)
    for path in (*kernel.files.netfilter.iterdir(), kernel.files.hashsize, kernel.files.oom_score_adj):
        os.utime(path, (1, 1))
    with caplog.at_level(logging.INFO):
        assert kernel.set_up(Conntrack(), -999) == ()
    assert {path.stat().st_mtime for path in kernel.files.netfilter.iterdir()} == {1.0}
    assert not caplog.records


def test_a_table_that_is_large_enough_stays(kernel: Kernel) -> None:
    kernel.files.hashsize.write_text("1000000\n")
    kernel.set_up(Conntrack())
    assert kernel.files.hashsize.read_text() == "1000000\n"


@pytest.mark.parametrize(
    ("conntrack", "cpus", "want"),
    [
        (Conntrack(), 1, 131072),
        (Conntrack(), 4, 131072),
        (Conntrack(), 8, 262144),
        (Conntrack(), 32, 1048576),
        (Conntrack(), 128, 1048576),
        (Conntrack(max_per_core=0), 8, 0),
        (Conntrack(max_per_core=100, least=0), 8, 800),
        # kube-proxy's cap goes before its least number
        (Conntrack(max_per_core=2_000_000, least=5_000_000), 1, 1048576),
    ],
)
def test_how_many_connections_are_tracked(conntrack: Conntrack, cpus: int, want: int) -> None:
    assert most_tracked(conntrack, cpus) == want


def test_a_kernel_that_tracks_no_connections_is_one_remark(kernel: Kernel) -> None:
    for path in kernel.files.netfilter.iterdir():
        path.unlink()
    (problem,) = kernel.set_up(Conntrack(), -999)
    assert problem.subject == "conntrack"
    assert "load the module nf_conntrack" in problem.reason
    assert kernel.files.oom_score_adj.read_text() == "-999"


def test_a_file_that_is_missing_does_not_keep_the_others_from_being_written(kernel: Kernel) -> None:
    kernel.files.hashsize.unlink()
    (kernel.files.netfilter / ESTABLISHED).unlink()
    first, second = kernel.set_up(Conntrack())
    assert first == Problem(
        "hashsize",
        f"there is no {kernel.files.hashsize}; conntrack.maxPerCore asks for 65536: set it on the node",
    )
    assert second.subject == ESTABLISHED
    assert (kernel.files.netfilter / CLOSE_WAIT).read_text() == "3600"


def test_what_is_no_number_is_left_alone(kernel: Kernel) -> None:
    (kernel.files.netfilter / CLOSE_WAIT).write_text("soon\n")
    (problem,) = kernel.set_up(Conntrack())
    assert problem.reason == "is no number; conntrack.tcpCloseWaitTimeout asks for 3600: set it on the node"
    assert (kernel.files.netfilter / CLOSE_WAIT).read_text() == "soon\n"


def test_the_problems_are_the_same_each_time(kernel: Kernel) -> None:
    kernel.files.hashsize.unlink()
    assert kernel.set_up(Conntrack()) == kernel.set_up(Conntrack()) != ()


# ---- The kernel itself ----

SCRIPT = """
import json, sys
from pathlib import Path
import msgspec
from ebpflb.config import Conntrack
from ebpflb.node_setup import set_up
from ebpflb.config.options import Options, configure
bare = configure(Options(), hostname="node-1", need_source=False)
conntrack = Conntrack(
    max_per_core=1, least=54321, tcp_established=4242, tcp_close_wait=43, tcp_be_liberal=True, udp=44, udp_stream=45
)
problems = set_up(msgspec.structs.replace(bare, conntrack=conntrack, oom_score_adj=17))
files = Path("/proc/sys/net/netfilter")
names = ("tcp_timeout_established", "tcp_timeout_close_wait", "tcp_be_liberal", "udp_timeout", "udp_timeout_stream")
print(json.dumps({
    "problems": problems,
    "values": [int((files / f"nf_conntrack_{name}").read_text()) for name in names],
    "oom": int(Path("/proc/self/oom_score_adj").read_text()),
}))
"""


@pytest.mark.root
def test_a_namespaces_own_settings_are_written_and_the_machines_limit_is_not() -> None:
    """In a network namespace the timeouts are its own; the limit is the machine's, and cannot be set from there."""
    here = Path("/proc/sys/net/netfilter")
    if not (here / "nf_conntrack_max").exists():
        pytest.skip("this kernel tracks no connections")
    hashsize = Path("/sys/module/nf_conntrack/parameters/hashsize")
    machine = {path: path.read_text() for path in (here / "nf_conntrack_max", here / ESTABLISHED, hashsize)}
    name = f"ebpflb-setup-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{name}", sys.executable, "-c", SCRIPT],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["ip", "netns", "del", name], check=True)
    said = json.loads(done.stdout)
    assert said["values"] == [4242, 43, 1, 44, 45]
    assert said["oom"] == 17
    ((subject, reason, _),) = said["problems"]
    assert subject == "nf_conntrack_max"
    assert "Permission denied" in reason
    assert {path: path.read_text() for path in machine} == machine
