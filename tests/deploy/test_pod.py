"""The DaemonSet's pod as processes of this machine: with what its specification gives it, it serves, with less not."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpflb.demo.cluster import Place
from tests.cli.place import until
from tests.deploy import base
from tests.deploy.stage import CLUSTER_IP, Running, endpoint_slice, service

pytestmark = [pytest.mark.root, pytest.mark.box]

NUMBERS = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_RESOURCE": 24}  # linux/capability.h

# Connects to the Service over UDP, says so, and then what becomes of the socket.
UDP_CLIENT = """
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.connect((sys.argv[1], 80))
print("connected", flush=True)
client.settimeout(60)
try:
    client.recv(1)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


def test_it_serves_on_both_paths_and_goes_on_without_its_daemon(running: Running) -> None:
    running.prepare()
    daemon = running.serve()
    assert running.stage.unanswered() == {}
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(60) == 0, daemon.words()
    assert running.stage.unanswered() == {}
    successor = running.serve()
    assert "0 rows written, 0 removed" in successor.words()


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_on_a_node_without_bpf_it_serves_by_iptables(running: Running, variant: str) -> None:
    """Its preparation makes the setting that the daemon may not: /proc/sys is read-only to it."""
    running.pod = copy.deepcopy(running.pod)
    for container in (*running.pod["initContainers"], *running.pod["containers"]):
        container["args"] += ["--dataplane=iptables", f"--iptables-variant={variant}"]
    running.prepare()
    daemon = running.serve()
    try:
        assert daemon.execute("cat", "/proc/sys/net/ipv4/conf/all/route_localnet").stdout == "1\n"
        assert "refused" not in daemon.words()
        assert running.stage.unanswered() == {}
        assert "dataplane iptables" in daemon.execute("ebpflb", "status").stdout
    finally:
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.wait(60)
        assert running.start("ebpflb", ["--cleanup"]).process.wait(60) == 0


def test_commands_in_the_pod_need_no_options(running: Running) -> None:
    running.prepare()
    daemon = running.serve()
    assert "default/web" in daemon.execute("ebpflb", "dump").stdout
    checked = daemon.execute("ebpflb", "check")
    assert checked.returncode == 0 and "/sys/fs/cgroup" in checked.stdout, checked
    trace = daemon.execute("ebpflb", "trace", "10.244.1.12", f"{CLUSTER_IP}:80/tcp")
    assert trace.returncode == 0, trace


def test_it_has_the_capabilities_that_are_named_and_no_others(running: Running) -> None:
    daemon = running.serve()
    added = base.container("ebpflb")["securityContext"]["capabilities"]["add"]
    named = sum(1 << NUMBERS[name] for name in added)
    # A machine may have taken some of its own away.
    assert _capabilities(daemon.process.pid) == named & _capabilities(os.getpid())


def _capabilities(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("CapEff")).split()[1], 16)


def test_it_writes_nowhere_but_in_its_volumes(running: Running) -> None:
    daemon = running.serve()
    places = ("/file", "/proc/sys/net/ipv4/ip_forward", "/var/lib/kube-proxy/file", "/lib/modules/file")
    for place in places:
        assert daemon.execute("sh", "-c", f"echo 1 >{place}").returncode != 0, place
    for place in ("/tmp", "/var/cache/ebpflb", "/var/lib/ebpflb"):
        assert daemon.execute("sh", "-c", f"echo 1 >{place}/file").returncode == 0, place


def test_a_node_without_a_bpf_file_system_gets_one_that_outlives_the_pod(
    running: Running,
) -> None:
    with running.stage.host(bpffs=False) as bare:
        running.host = bare
        assert not (bare.directory / "sys/fs/bpf").is_mount()
        running.prepare()
        assert (bare.directory / "sys/fs/bpf").is_mount()
        daemon = running.serve()
        daemon.process.kill()
        daemon.process.wait()
        assert (bare.directory / "sys/fs/bpf/ebpflb/maps/frontends").exists()
        assert running.stage.unanswered() == {}


@pytest.fixture
def resolver(running: Running) -> Iterator[subprocess.Popen[bytes]]:
    """A client in a pod that has connected a UDP socket to the Service. Depends on `running` for who serves."""
    running.serve()
    where: Place = running.stage.cluster.pods["client"]
    process = running.stage.cluster.spawn(
        where, [sys.executable, "-c", UDP_CLIENT, CLUSTER_IP], stdout=subprocess.PIPE
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"connected\n"
    yield process


def test_a_connected_udp_socket_in_a_pod_is_told_that_its_backend_has_gone(
    running: Running, resolver: subprocess.Popen[bytes]
) -> None:
    running.stage.tell(service("default"), endpoint_slice("default"))
    assert resolver.stdout is not None
    assert resolver.stdout.readline() == b"ConnectionAbortedError\n"


@pytest.mark.parametrize("capability", ["NET_ADMIN", "SYS_ADMIN"])
def test_without_one_of_them_it_says_what_it_lacks(running: Running, capability: str) -> None:
    running.pod = copy.deepcopy(running.pod)
    running.pod["containers"][0]["securityContext"]["capabilities"]["add"].remove(capability)
    daemon = running.start()
    assert daemon.process.wait(60) not in (0, -9)
    lines = [line for line in daemon.words().splitlines() if line.startswith("ebpflb: ")]
    assert len(lines) == 1 and "Traceback" not in daemon.words(), daemon.words()


def test_its_log_is_what_the_pod_says(running: Running) -> None:
    daemon = running.serve()
    until("the sync is logged", lambda: "INFO sync:" in daemon.words())
