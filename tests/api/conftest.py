"""What the tests with a real API server share: one control plane for all of them, a namespace for each.

Rules of this file: whatever a test makes lies in its own namespace (nodes bear its name), and goes with it. A test that
breaks the control plane mends it.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.binaries import CURRENT, ETCD, Missing, find
from tests.api.chaos import ChaosProxy
from tests.api.client import Api
from tests.api.control_plane import LOOPBACK, ControlPlane
from tests.api.nodes import Nodes

OnFailure = Callable[[str, Callable[[], "str | bytes"]], None]

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def being_ended_is_an_interruption() -> Iterator[None]:
    """SIGTERM, with which a CI job is cut short, takes everything down as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """Where the programs of the newest release are."""
    try:
        return {**find(ETCD), **find(CURRENT)}
    except Missing as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def standing_cluster(programs: dict[str, Path]) -> Iterator[ControlPlane]:
    """The control plane, as all tests share it."""
    with ControlPlane(programs) as found:
        yield found


@pytest.fixture
def cluster(standing_cluster: ControlPlane, on_failure: OnFailure) -> ControlPlane:
    """The control plane, and what its programs said if a test fails."""
    for program in standing_cluster.programs:
        on_failure(f"{program.name}.log", program.tail)
    return standing_cluster


@pytest.fixture
def api(cluster: ControlPlane) -> Api:
    """An administrator's client."""
    return cluster.api


@pytest.fixture
def namespace(cluster: ControlPlane) -> Iterator[str]:
    """A namespace of the test's own; all Services, EndpointSlices and Pods in it go with the test."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    cluster.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    for kind in ("Pod", "Service", "EndpointSlice", "Endpoints"):
        cluster.api.delete_all(kind, name)
    cluster.api.delete("Namespace", "", name)


@pytest.fixture
def proxy(cluster: ControlPlane) -> Iterator[ChaosProxy]:
    """A proxy on this machine's loopback."""
    with ChaosProxy(loopback_listener(), cluster.identity, cluster.port) as found:
        yield found


def loopback_listener() -> socket.socket:
    """Listens on a port of the kernel's choice."""
    return socket.create_server((LOOPBACK, 0), backlog=64)


@pytest.fixture(scope="session")
def standing_nodes(programs: dict[str, Path]) -> Iterator[Nodes]:
    """Two nodes, as all tests share them; their API server is another one than `cluster`'s."""
    with Nodes(programs) as found:
        yield found


@pytest.fixture
def nodes(standing_nodes: Nodes, on_failure: OnFailure) -> Nodes:
    """The two nodes, and what daemons and programs said if a test fails."""
    for at in standing_nodes.cluster.nodes:
        on_failure(f"{at}.log", lambda at=at: standing_nodes.log(at))  # type: ignore[misc]
        on_failure(f"{at}.json", lambda at=at: json.dumps(standing_nodes.status(at), indent=1))  # type: ignore[misc]
    for program in standing_nodes.control.programs:
        on_failure(f"{program.name}.log", program.tail)
    return standing_nodes


@pytest.fixture
def own(nodes: Nodes) -> Iterator[str]:
    """A namespace of the test's own, as `namespace` is, in the nodes' API server."""
    name = f"daemon-{os.getpid()}-{next(_numbers)}"
    nodes.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    for kind in ("Pod", "Service", "EndpointSlice"):
        nodes.api.delete_all(kind, name)
    nodes.api.delete("Namespace", "", name)
