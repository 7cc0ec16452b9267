"""What a command that is no daemon says of XDP: what is known beforehand, and what a daemon beside it has found out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from ebpflb import control, rtnetlink
from ebpflb.commands.status import Identity, ask_status, status_document
from ebpflb.config.options import Options, configure
from ebpflb.dataplane import Requirement
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.dataplane.bpf.xdp_choice import AUTO, GENERIC, NATIVE, OFF, Told
from ebpflb.dataplane.bpf.xdp_features import BASIC, Features
from ebpflb.dataplane.bpf.xdp_survey import survey
from ebpflb.errors import UserError
from ebpflb.rtnetlink import Link
from ebpflb.wiring import real_parts
from tests.fakes import FakeDataplane
from tests.unit.test_control import overview

UPLINK = Link(2, "eth0", "", "", 0, rtnetlink.ARPHRD_ETHER, rtnetlink.IFF_UP, mtu=1500, mac=bytes(6))
VLAN = UPLINK._replace(ifindex=3, name="eth0.7", kind="vlan", parent=2, vlan=7)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> dict[int, Link]:
    """Its devices: `eth0` with the default route, whose driver runs programs and takes tags off."""
    devices = {2: UPLINK}
    monkeypatch.setattr(rtnetlink, "links", lambda netlink: dict(devices))
    monkeypatch.setattr(rtnetlink, "addresses", lambda netlink: ())
    monkeypatch.setattr(rtnetlink, "default_devices", lambda netlink: {4: 2})
    monkeypatch.setattr(Features, "all", lambda features: {2: BASIC})
    monkeypatch.setattr(Features, "strips_tags", lambda features, name: name == "eth0")
    return devices


@pytest.mark.parametrize(("mode", "problem"), [(AUTO, False), (NATIVE, True), (GENERIC, True)])
def test_that_a_device_takes_vlan_tags_off_is_known_beforehand(node: dict[int, Link], mode: str, problem: bool) -> None:
    expected = GENERIC if mode == GENERIC else NATIVE
    assert survey(mode, ()) == (Told("eth0", expected, "would be tried", False),)
    node[3] = VLAN
    told, vlan = survey(mode, ())
    assert (told.device, told.mode, told.problem) == ("eth0", OFF, problem)
    assert "ethtool -K eth0 rxvlan off" in told.reason
    assert vlan == Told("eth0.7", OFF, "a VLAN of eth0, where its frames are met", False)


def test_a_bond_that_is_asked_to_run_natively_is_told_as_a_problem_beforehand(node: dict[int, Link]) -> None:
    node[2] = UPLINK._replace(name="bond0", kind="bond")
    assert [(told.mode, told.problem) for told in survey(NATIVE, ())] == [(OFF, True)]
    assert [(told.mode, told.problem) for told in survey(AUTO, ())] == [(OFF, False)]


# ---- Beside a daemon ----

DEFAULTS = Options()
TOLD = {"name": "eth0", "xdp": OFF, "reason": "too few queues", "problem": True}


def daemon(
    monkeypatch: pytest.MonkeyPatch, *devices: dict[str, object], xdp: str = NATIVE
) -> AbstractContextManager[None]:
    """One that has these devices, started with this --xdp."""
    dataplane = FakeDataplane()
    dataplane.rows["devices"] = list(devices)
    identity = Identity("node1", "bpf", "2026-01-31T12:00:00Z", xdp=xdp)
    return answering(monkeypatch, status_document(identity, dataplane, overview()))


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> Iterator[None]:
    """A daemon that says this of itself."""
    monkeypatch.setattr(control, "NAME", f"ebpflb-test-survey-{threading.get_native_id()}")
    with control.listen(control.NAME) as server:
        server.setblocking(True)

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    if not connection.recv(100):
                        return
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(f"\0{control.NAME}")
            thread.join()


def checked(tmp_path: Path, typed: Options = DEFAULTS) -> list[Requirement]:
    """What `check` finds of XDP."""
    config = configure(replace(typed, bpffs=str(tmp_path)), hostname="node1", need_source=False)
    bpf, *_ = real_parts().dataplanes(config)
    assert isinstance(bpf, BpfDataplane)
    return [each for each in bpf.requirements() if each.name.startswith("XDP")]


@pytest.mark.parametrize("typed", [DEFAULTS, Options(xdp=NATIVE)], ids=["auto", "native"])
def test_check_says_what_the_daemon_was_refused(
    node: dict[int, Link], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: Options
) -> None:
    """Nobody knows beforehand: only the driver says it, once it is asked."""
    with daemon(monkeypatch, TOLD):
        (said,) = checked(tmp_path, typed)
    assert said == Requirement("XDP on eth0", False, "off: too few queues", essential=False)
    (said,) = checked(tmp_path, typed)
    assert (said.found, said.detail) == (True, "native: would be tried")


@pytest.mark.parametrize(
    "typed", [Options(xdp=GENERIC), Options(xdp=NATIVE, devices=("eth0",))], ids=["mode", "devices"]
)
def test_check_says_what_would_be_tried_where_the_daemon_was_asked_for_something_else(
    node: dict[int, Link], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: Options
) -> None:
    with daemon(monkeypatch, TOLD):
        (said,) = checked(tmp_path, typed)
    assert said.detail == f"{typed.xdp}: would be tried"


def test_check_beside_a_daemon_of_another_dataplane_says_what_would_be_tried(
    node: dict[int, Link], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with daemon(monkeypatch):
        (said,) = checked(tmp_path)
    assert said.detail == "native: would be tried"


@pytest.mark.parametrize("answer", [b'{"items": [{"node": "node1"}]}', b'{"items": []}', b"not at all"])
def test_check_beside_a_daemon_of_another_version_says_what_would_be_tried(
    node: dict[int, Link], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bytes
) -> None:
    with answering(monkeypatch, answer):
        (said,) = checked(tmp_path)
        with pytest.raises(UserError, match="of another version"):
            ask_status(control.NAME)
    assert said.detail == "native: would be tried"


def test_what_runs_and_is_not_as_it_was_asked_for_is_not_found(
    node: dict[int, Link], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with daemon(monkeypatch, {**TOLD, "xdp": NATIVE, "reason": "nothing is sent by it"}):
        (said,) = checked(tmp_path)
    assert said == Requirement("XDP on eth0", False, "native: nothing is sent by it", essential=False)
