"""The cluster itself: where programs run, and that it goes without a trace however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Cluster
from ebpflb.demo.network import Cni, Join
from ebpflb.errors import UserError

pytestmark = pytest.mark.box

SECONDS = 2.0  # five times what it takes
TRIES = 5  # the machine stands still now and then


@pytest.mark.parametrize("join", Join)
@pytest.mark.parametrize("cni", Cni)
def test_two_nodes_are_up_in_no_time_and_gone_without_a_trace(cni: Cni, join: Join) -> None:
    took: list[float] = []
    while not took or took[-1] > SECONDS:
        assert len(took) < TRIES, took
        began = time.monotonic()
        with Cluster(("node1", "node2"), cni=cni, join=join) as cluster:
            cluster.add_pod("node1", "a")
            cluster.add_pod("node2", "b")
            took.append(time.monotonic() - began)
            assert cluster.leftovers()
        assert cluster.leftovers() == ()


def test_nothing_appears_in_this_machines_own_network() -> None:
    """Which stands for the network in which it is made: here one of its own, in which nobody else makes devices."""
    own = f"ebpflb-own-{os.getpid()}"
    namespaces.create(own)
    try:
        with namespaces.inside(own), Cluster(("node1",)) as cluster:
            cluster.add_pod("node1", "a")
            assert [name for _, name in socket.if_nameindex()] == ["lo"]
    finally:
        namespaces.delete(own)


def test_programs_run_in_the_namespace_and_the_cgroup_of_their_place() -> None:
    with Cluster(("node1",)) as cluster:
        pod, sandbox = cluster.add_pod("node1", "a"), cluster.add_pod("node1", "s", sandboxed=True)
        for place, inside in ((cluster.nodes["node1"], True), (pod, True), (sandbox, False), (cluster.outside, False)):
            done = cluster.run(place, ["sh", "-c", "cat /proc/self/cgroup; readlink /proc/self/ns/net"])
            cgroup, net = done.stdout.splitlines()[-2:]
            assert cgroup.endswith(f"/{cluster.name}/node1") is inside
            assert net == f"net:[{namespaces.path_of(place.namespace).stat().st_ino}]"
            assert place.addresses.ipv4 in cluster.run(place, ["ip", "address"]).stdout


def test_processes_that_were_forgotten_do_not_keep_it() -> None:
    with Cluster(("node1",)) as cluster:
        pod = cluster.add_pod("node1", "a", sandboxed=True)
        for place in (pod, cluster.nodes["node1"], cluster.outside):
            cluster.spawn(place, ["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"])
    assert cluster.leftovers() == ()


def test_a_set_up_that_fails_half_way_leaves_nothing() -> None:
    broken = Cluster(("node1", "node.with.a.name.that.no.file.can.have." + "x" * 250))
    with pytest.raises(UserError, match="cannot set up"):
        broken.__enter__()
    assert broken.leftovers() == ()


def test_a_name_that_is_taken_is_left_alone() -> None:
    with Cluster(("node1",)) as cluster:
        before = cluster.leftovers()
        with pytest.raises(UserError, match="exists already"):
            Cluster(("node1",), name=cluster.name).__enter__()
        assert cluster.leftovers() == before


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_an_interruption_at_any_moment_leaves_nothing(moment: float) -> None:
    name = f"ebpflb-interrupted-{os.getpid()}"
    program = (
        "import signal, time; from ebpflb.demo.cluster import Cluster\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job\n"
        "print(flush=True)\n"
        f"with Cluster(('node1', 'node2', 'node3'), name={name!r}) as cluster:\n"
        " for number in range(20): cluster.add_pod('node2', f'p{number}')\n"
        " time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    assert namespaces.leftovers(name) == ()


def test_what_a_killed_process_left_is_removed_by_name() -> None:
    name = f"ebpflb-killed-{os.getpid()}"
    program = (
        "import os, signal; from ebpflb.demo.cluster import Cluster\n"
        f"cluster = Cluster(('node1',), name={name!r}).__enter__()\n"
        "argv = ['sh', '-c', 'echo; exec sleep 1000']\n"
        "cluster.spawn(cluster.add_pod('node1', 'a'), argv, stdout=-1).stdout.readline()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    try:
        found = namespaces.leftovers(name)
        assert any(line.startswith("process") for line in found) and any(line.startswith("cgroup") for line in found)
    finally:
        assert namespaces.remove(name) == ()
