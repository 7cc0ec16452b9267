"""The boxes that tests share: each is set up once for all tests that run in it, and tidied after each of them.

A test that takes `box` runs in every proxy mode, one that takes `rest` in the modes and topologies that the others do
without, `own` is for tests that take daemons down. Three markers say otherwise of a test or a file:

    @pytest.mark.dataplanes("bpf")        it is about these dataplanes only
    @pytest.mark.modes("bpf-clsact")      it is about these modes only
    @pytest.mark.needs("affinity")    it is left out where ebpflb/dataplane/limits.py has this limit, nowhere else
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from ebpflb.dataplane.limits import limited
from ebpflb.demo.network import Cni, Join
from tests.box.box import NODES, Box
from tests.box.clients import Answer
from tests.box.modes import (
    BPF,
    CLSACT,
    IPTABLES_LEGACY,
    IPTABLES_NFT,
    IPVS,
    KERNEL_WITHOUT_BPF,
    MACHINE_WITHOUT_BCC,
    XDP_GENERIC,
    XDP_NATIVE,
    Mode,
    kernel_has_ipvs,
)


class Setting(NamedTuple):
    """A mode, and how pods and nodes are tied together. On a bridge, what its netfilter turns around at once goes back
    to a pod that asks itself only with `hairpin`."""

    mode: Mode
    cni: Cni
    join: Join
    hairpin: bool = False

    def __str__(self) -> str:
        return f"{self.mode.name}-{self.cni.value}-{self.join.value}"


# Each way of tying pods to a node, and each way of joining nodes; the two others are in REST.
BOXES = [
    Setting(BPF, Cni.ROUTED, Join.ROUTES),
    Setting(BPF, Cni.BRIDGE, Join.VXLAN),
    Setting(IPTABLES_NFT, Cni.ROUTED, Join.ROUTES),
]
REST = [
    Setting(CLSACT, Cni.ROUTED, Join.VXLAN),
    Setting(BPF, Cni.BRIDGE, Join.ROUTES),
    Setting(XDP_NATIVE, Cni.BRIDGE, Join.VXLAN),
    Setting(IPTABLES_LEGACY, Cni.BRIDGE, Join.VXLAN, hairpin=True),
    Setting(KERNEL_WITHOUT_BPF, Cni.ROUTED, Join.ROUTES),
    Setting(MACHINE_WITHOUT_BCC, Cni.ROUTED, Join.ROUTES),
]
OWN = [
    Setting(BPF, Cni.BRIDGE, Join.ROUTES),
    Setting(XDP_NATIVE, Cni.ROUTED, Join.ROUTES),
    Setting(IPTABLES_NFT, Cni.BRIDGE, Join.ROUTES, hairpin=True),
]
if kernel_has_ipvs():
    BOXES.append(Setting(IPVS, Cni.ROUTED, Join.ROUTES))
    OWN.append(Setting(IPVS, Cni.ROUTED, Join.ROUTES))

XDP = [Setting(XDP_NATIVE, Cni.ROUTED, Join.ROUTES), Setting(XDP_GENERIC, Cni.ROUTED, Join.ROUTES)]

SETTINGS = {"standing_box": BOXES, "standing_rest": REST, "standing_own": OWN, "standing_xdp": XDP}

OnFailure = Callable[[str, Callable[[], str]], None]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, settings in SETTINGS.items():
        if fixture in metafunc.fixturenames:
            fitting = [each for each in settings if _concerns(metafunc.definition, each.mode)]
            scope = "module" if settings is OWN else "session"
            metafunc.parametrize(fixture, fitting, ids=str, indirect=True, scope=scope)  # type: ignore[arg-type]


def _concerns(test: pytest.Item, mode: Mode) -> bool:
    only = test.get_closest_marker("dataplanes")
    if only is not None and mode.dataplane not in only.args:
        return False
    named = test.get_closest_marker("modes")
    if named is not None and mode.name not in named.args:
        return False
    return not any(limited(mode.dataplane, code) for marker in test.iter_markers("needs") for code in marker.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A pod is asked from in every way that the mode has, and in no other."""
    without = [item for item in items if isinstance(item, pytest.Function) and not _has_way(item)]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def _has_way(item: pytest.Function) -> bool:
    values = getattr(item, "callspec", None)
    if values is None or "pod" not in values.params:
        return True
    settings = [value for value in values.params.values() if isinstance(value, Setting)]
    return all(WAYS[values.params["pod"]] in each.mode.ways for each in settings)


@pytest.fixture(scope="session", autouse=True)
def being_ended_is_an_interruption() -> Iterator[None]:
    """SIGTERM, with which a CI job is cut short, takes boxes down as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session", autouse=True)
def a_lock_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nodes share no xtables lock with this machine, whatever holds that for how long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTABLES_LOCKFILE", str(tmp_path_factory.mktemp("box") / "xtables.lock"))
        yield


# The kernel settings that a daemon makes which has an API server, as far as tests are about them.
AS_IN_A_CLUSTER = ("--conntrack-tcp-timeout-close-wait", "1h")


def _standing(setting: Setting) -> Iterator[Box]:
    with Box(setting.mode, setting.cni, setting.join, options=AS_IN_A_CLUSTER, hairpin=setting.hairpin) as found:
        yield found


@pytest.fixture(scope="session")
def standing_box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A box of one setting, with its daemons running."""
    yield from _standing(request.param)


@pytest.fixture
def box(standing_box: Box, on_failure: OnFailure) -> Iterator[Box]:
    """A box without Services, for one test."""
    yield from tidied(standing_box, on_failure)


@pytest.fixture(scope="session")
def standing_rest(request: pytest.FixtureRequest) -> Iterator[Box]:
    """As `standing_box`, in the settings that most tests do not need."""
    yield from _standing(request.param)


@pytest.fixture
def rest(standing_rest: Box, on_failure: OnFailure) -> Iterator[Box]:
    """As `box`, in those settings."""
    yield from tidied(standing_rest, on_failure)


@pytest.fixture(scope="module")
def standing_own(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A box of two nodes for tests that take its daemons down."""
    mode, cni, join, hairpin = request.param
    with Box(mode, cni, join, NODES[:2], options=("--audit-period", "1"), hairpin=hairpin) as found:
        yield found


@pytest.fixture
def own(standing_own: Box, on_failure: OnFailure) -> Iterator[Box]:
    """That box, with all its daemons running again afterwards."""
    try:
        yield from tidied(standing_own, on_failure)
    finally:
        standing_own.cluster.start_daemons(
            node for node in standing_own.cluster.nodes if not standing_own.daemon_runs(node)
        )


@pytest.fixture(scope="session")
def standing_xdp(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A box whose nodes run XDP on their uplinks."""
    yield from _standing(request.param)


@pytest.fixture
def xdp(standing_xdp: Box, on_failure: OnFailure) -> Iterator[Box]:
    """That box. Its nodes know the link-layer addresses around them: what must wait for one is the stack's to send."""
    know_each_other(standing_xdp)
    yield from tidied(standing_xdp, on_failure)


def know_each_other(box: Box) -> None:
    """Let each node and the outside client hear from each node, in both families."""
    for family in ("ipv4", "ipv6"):
        for node in box.cluster.nodes:
            for other in ({*box.cluster.nodes} | {"outside"}) - {node}:
                assert isinstance(box.clients.ask(box.place(other), box.direct(node, family), "UDP"), Answer)


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


# Client pods on node1, by the way in which they are served: at their sockets, or, being sandboxed, on the way of their
# packets.
PODS = {"socket": "a1", "packet": "sa"}
WAYS = {pod: way for way, pod in PODS.items()}


@pytest.fixture(params=[*PODS.values()], ids=[*PODS])
def pod(request: pytest.FixtureRequest) -> str:
    """A client pod on node1, in each way that the box's mode has."""
    return str(request.param)
