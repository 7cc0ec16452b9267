"""The boxes that tests share: each is set up once for all tests that run in it, and tidied after each of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from ebpflb.demo.network import Cni, Join
from tests.box.box import Box

# Each way of tying pods to a node, and each way of joining nodes; the two others are in test_topologies.py.
TOPOLOGIES = ((Cni.ROUTED, Join.ROUTES), (Cni.BRIDGE, Join.VXLAN))
REST = ((Cni.ROUTED, Join.VXLAN), (Cni.BRIDGE, Join.ROUTES))

Topology = tuple[Cni, Join]
OnFailure = Callable[[str, Callable[[], str]], None]


@pytest.fixture(scope="session", autouse=True)
def being_ended_is_an_interruption() -> Iterator[None]:
    """SIGTERM, with which a CI job is cut short, takes boxes down as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def _name(topology: Topology) -> str:
    return f"{topology[0].value}-{topology[1].value}"


@pytest.fixture(scope="session", params=TOPOLOGIES, ids=_name)
def standing_box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A box of one topology, with its daemons running."""
    with Box(*request.param) as found:
        yield found


@pytest.fixture
def box(standing_box: Box, on_failure: OnFailure) -> Iterator[Box]:
    """A box without Services, for one test."""
    yield from tidied(standing_box, on_failure)


@pytest.fixture(scope="session", params=REST, ids=_name)
def standing_rest(request: pytest.FixtureRequest) -> Iterator[Box]:
    """As `standing_box`, in the topologies that most tests do not need."""
    with Box(*request.param) as found:
        yield found


@pytest.fixture
def rest(standing_rest: Box, on_failure: OnFailure) -> Iterator[Box]:
    """As `box`, in those topologies."""
    yield from tidied(standing_rest, on_failure)


def tidied(box: Box, on_failure: OnFailure) -> Iterator[Box]:
    """The box for one test, with what a failure should leave to read."""
    for node in box.cluster.nodes:
        on_failure(f"{node}.txt", lambda node=node: box.kernel.picture(node))  # type: ignore[misc]
        on_failure(f"{node}.log", lambda node=node: tail(box, node))  # type: ignore[misc]
    on_failure("manifests.yaml", lambda: manifests(box))
    with box.tidy():
        yield box


def tail(box: Box, node: str) -> str:
    """The last 200 lines of a node's daemon."""
    return "\n".join(box.cluster.log(node).read_text(errors="replace").splitlines()[-200:])


def manifests(box: Box) -> str:
    """All that the nodes are told."""
    return "\n---\n".join(path.read_text() for path in sorted(box.cluster.manifests.directory.iterdir()))


@pytest.fixture(params=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> str:
    """Every situation exists in both."""
    return str(request.param)


@pytest.fixture(params=["a1", "sa"], ids=["socket", "packet"])
def pod(request: pytest.FixtureRequest) -> str:
    """A client pod on node1: served at its sockets, or, being sandboxed, on the way of its packets."""
    return str(request.param)
