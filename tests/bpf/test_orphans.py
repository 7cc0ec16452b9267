"""Connected UDP sockets after their backend has gone: told so, in this namespace and in a pod's, and nobody else.

Rules of this file: clients are processes in the test's cgroup; what they see is asked of them over their pipes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.model import Protocol
from ebpflb.routes import Backend, Frontend, Key, Kind, Locality, Route, RouteTable, Scope, ServicePortName, Verdict
from tests.bpf.dataplanes import Node, own_node
from tests.bpf.namespaces import Namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

DNS = ServicePortName("kube-system", "dns", "dns")
ADDRESS = "172.30.0.10"
SECONDS = 30

# Connects; says so; waits until the socket ends, or until it is told to look.
CLIENT = """
import os, socket, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.connect((sys.argv[2], 53))
print("connected", flush=True)
if sys.argv[3] == "wait":
    client.settimeout(float(sys.argv[4]))
    try:
        client.recv(1)
    except OSError as error:
        print(error.errno, flush=True)
else:
    sys.stdin.readline()
    print(client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), client.getpeername()[0], flush=True)
"""


@pytest.fixture
def node() -> Iterator[Node]:
    with own_node() as made:
        yield made


@pytest.fixture
def namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """The node's and a pod's."""
    both = Namespace(), Namespace()
    for each in both:
        each.ip("link set lo up")
        each.ip("address add 10.180.0.0/16 dev lo")
    yield both
    for each in both:
        each.remove()


def routes(*backends: str) -> RouteTable:
    to = tuple(Backend(address, 5353) for address in backends)
    route = Route(DNS, Kind.CLUSTER_IP, Verdict.FORWARD, to)
    rows: dict[Key, Route] = {(Frontend(ADDRESS, 53, Protocol.UDP), scope): route for scope in Scope}
    return RouteTable(rows, Locality(pod_cidrs=("10.180.0.0/16",)))


def client(namespace: Namespace, cgroup: Path, address: str, what: str) -> subprocess.Popen[str]:
    """A client that has connected."""
    command = ["nsenter", f"--net=/run/netns/{namespace.name}", sys.executable, "-c", CLIENT]
    made = subprocess.Popen(
        [*command, str(cgroup), address, what, str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert made.stdout is not None
    assert made.stdout.readline() == "connected\n"
    return made


def answer(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate("look\n", timeout=SECONDS + 5)
    return out.strip()


def test_only_the_sockets_of_the_backend_that_went_are_ended(
    node: Node, namespaces: tuple[Namespace, Namespace]
) -> None:
    own, pod = namespaces
    with own.entered():
        dataplane = node.started()
    both = routes("10.180.0.1", "10.180.0.2")
    processes: list[subprocess.Popen[str]] = []
    try:
        dataplane.sync(routes("10.180.0.1"))
        waiting = [client(each, node.cgroup, ADDRESS, "wait") for each in namespaces]
        processes += waiting
        dataplane.sync(routes("10.180.0.2"))
        # ECONNABORTED: the socket has been ended.
        assert [answer(each) for each in waiting] == ["103", "103"]

        staying = [client(each, node.cgroup, ADDRESS, "look") for each in namespaces]
        direct = client(pod, node.cgroup, "10.180.0.1", "look")  # past the Service: none of our business
        processes += [*staying, direct]
        dataplane.sync(both)
        dataplane.sync(routes("10.180.0.2"))
        _until_idle(dataplane)
        assert [answer(each) for each in staying] == [f"0 {ADDRESS}"] * 2
        assert answer(direct) == "0 10.180.0.1"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        dataplane.close()


def _until_idle(dataplane: BpfDataplane) -> None:
    """Everything that has been asked for is done."""
    orphans = dataplane.orphans
    assert orphans is not None
    orphans.close()


def test_a_namespace_is_left_as_it_was(node: Node, namespaces: tuple[Namespace, Namespace]) -> None:
    """The thread enters namespaces alone: the rest of the process stays where it is."""
    own, _ = namespaces
    before = os.stat("/proc/self/ns/net").st_ino
    with own.entered():
        dataplane = node.started()
    dataplane.sync(routes("10.180.0.1"))
    process = client(own, node.cgroup, ADDRESS, "wait")
    try:
        dataplane.sync(routes("10.180.0.2"))
        assert answer(process) == "103"
    finally:
        process.kill()
        process.communicate()
    assert os.stat("/proc/self/ns/net").st_ino == before
