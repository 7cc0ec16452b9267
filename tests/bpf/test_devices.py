"""Devices in a network namespace of their own: who gets our programs and rows, when, beside whom, and what is left.

Rules of this file: nothing touches the machine's own devices. Waiting is for a condition, with a deadline. Programs run
at tcx and as filters of clsact in turn, but for what only one of the two has.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ebpflb.dataplane.bpf import assembly, clsact, map_calls, program_calls, syscall, tc, tcx
from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.dataplane.bpf.constants import DEVICE_CLSACT, DEVICE_PEER, DEVICE_POD, PROG_TYPE_SCHED_CLS
from ebpflb.dataplane.bpf.device_rows import Row, Rows
from ebpflb.dataplane.bpf.devices import Devices, installed
from ebpflb.routes import packed
from ebpflb.rtnetlink import Netlink
from tests.bpf.namespaces import Namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

DEADLINE = 30.0
NONE = bytes(16)


OURS = (("ingress", "ebpflb_ingress"), ("egress", "ebpflb_egress"))
TCX_INGRESS, TCX_EGRESS = 46, 47
SIDES = {"ingress": tc.INGRESS, "egress": tc.EGRESS}


class Loaded:
    """The two tc programs over maps of their own, which are to run at tcx or as filters."""

    def __init__(self, artifact: Artifact, with_tcx: bool) -> None:
        self.with_tcx = with_tcx
        self.clsact = 0 if with_tcx else DEVICE_CLSACT
        sizes = {"slots": 64, "backends": 64, "flows": 1024, "sockets": 64, "fragments": 64}
        self.artifact = artifact
        self.maps = {
            spec.name: map_calls.map_create(
                spec.type,
                spec.key.size,
                spec.value.size,
                sizes.get(spec.name, spec.max_entries),
                spec.flags,
                f"test_{spec.name}",
            )
            for spec in artifact.maps.values()
        }
        self.layout = artifact.maps["devices"].value
        self.ingress, self.egress = self.load("tc_ingress"), self.load("tc_egress")

    def load(self, name: str) -> int:
        program = self.artifact.programs[name]
        return program_calls.prog_load(program.type, program.patched(self.maps), program.kernel_name)

    def rows(self) -> Rows:
        return Rows(self.maps["devices"], self.layout)

    def devices(self, *patterns: str) -> Devices:
        return Devices(
            self.ingress, self.egress, self.maps["devices"], self.layout, patterns, with_tcx=self.with_tcx
        )  # fmt: skip

    def runs(self, namespace: Namespace, device: str) -> tuple[tuple[str, str], ...]:
        """Our programs on a device, each with its side."""
        index = namespace.index(device)
        if not self.with_tcx:
            shown = {side: namespace.filters(device, side) for side, _ in OURS}
            return tuple((side, name) for side, name in OURS if f"{name} direct-action" in shown[side])
        with namespace.entered():
            found = tcx.running(index)
        return tuple((side, each.name) for side in SIDES for each in found if each.side == SIDES[side])

    def close(self) -> None:
        for fd in (*self.maps.values(), self.ingress, self.egress):
            os.close(fd)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    made.ip("link set lo up")
    yield made
    made.remove()


def loaded_for(artifact: Artifact, with_tcx: bool) -> Iterator[Loaded]:
    if with_tcx and not tcx.supported():
        pytest.skip("this kernel has no tcx")
    syscall.raise_memlock_limit()
    made = Loaded(artifact, with_tcx)
    yield made
    made.close()


@pytest.fixture(params=["tcx", "clsact"])
def loaded(artifact: Artifact, request: pytest.FixtureRequest) -> Iterator[Loaded]:
    yield from loaded_for(artifact, request.param == "tcx")


@pytest.fixture
def filtering(artifact: Artifact) -> Iterator[Loaded]:
    yield from loaded_for(artifact, False)


@pytest.fixture
def modern(artifact: Artifact) -> Iterator[Loaded]:
    yield from loaded_for(artifact, True)


@contextlib.contextmanager
def running(namespace: Namespace, loaded: Loaded, *patterns: str) -> Iterator[Devices]:
    with namespace.entered():
        devices = loaded.devices(*patterns)
        try:
            devices.sync()
            yield devices
        finally:
            devices.close()


def until(devices: Devices, condition: Callable[[], bool], seen: Callable[[], object]) -> None:
    """Serve the devices' events until the condition holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        left = deadline - time.monotonic()
        assert left > 0, f"not within {DEADLINE} s; last seen: {seen()}"
        if select.select([devices], [], [], min(left, 0.5))[0]:
            devices.handle()


def test_edges_are_attached_and_nothing_else(namespace: Namespace, loaded: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    namespace.ip("link add cni0 type bridge")
    namespace.ip("link add pod1 type veth peer name pod1-in")
    namespace.ip("link set pod1 master cni0")
    namespace.ip("link add vx type vxlan id 7 dstport 4789 remote 192.0.2.1 dev eth0")
    with running(namespace, loaded) as devices:
        assert devices.attached() == ("eth0", "far", "pod1", "pod1-in", "vx")
        assert devices.problems() == ()
        for name in devices.attached():
            assert loaded.runs(namespace, name) == OURS
        assert loaded.runs(namespace, "cni0") == ()


def test_patterns_narrow_the_nodes_devices_only(namespace: Namespace, loaded: Loaded) -> None:
    """Pods are reached by all others: on other nodes by the overlay, where masquerade has its place."""
    namespace.ip("tuntap add data mode tap")
    namespace.ip("tuntap add office mode tap")
    namespace.ip("link add pod1 type veth peer name pod1-in")
    namespace.ip("link add flannel.1 type vxlan id 1 dstport 8472 dev data")
    with running(namespace, loaded, "data", "eth*") as devices:
        assert devices.attached() == ("data", "flannel.1", "pod1", "pod1-in")


@pytest.mark.parametrize("rows_survive", [True, False])
def test_what_an_earlier_daemon_attached_goes_where_it_does_not_belong_any_more(
    namespace: Namespace, artifact: Artifact, loaded: Loaded, rows_survive: bool
) -> None:
    """Beside its master's or another edge's, a packet would meet our programs twice. An upgrade may come with maps of
    another layout, which are empty then."""
    namespace.ip("tuntap add data mode tap")
    namespace.ip("tuntap add office mode tap")
    before = namespace.qdiscs()
    with running(namespace, loaded) as earlier:
        assert earlier.attached() == ("data", "office")
    with contextlib.closing(Loaded(artifact, loaded.with_tcx)) as upgraded:
        later = loaded if rows_survive else upgraded
        with running(namespace, later, "data") as devices:
            assert devices.attached() == ("data",)
            assert devices.problems() == ()
            assert (later.runs(namespace, "data"), later.runs(namespace, "office")) == (OURS, ())
            assert devices.audit() == 0
        with running(namespace, later, "office"):
            assert (later.runs(namespace, "data"), later.runs(namespace, "office")) == ((), OURS)
        with namespace.entered():
            installed(later.rows(), remove=True)
    assert namespace.qdiscs() == before


def test_audit_removes_what_somebody_attached_where_it_does_not_belong(namespace: Namespace, loaded: Loaded) -> None:
    """An older version that has run meanwhile takes other devices for edges."""
    namespace.ip("tuntap add data mode tap")
    namespace.ip("tuntap add office mode tap")
    with running(namespace, loaded, "data") as devices:
        with running(namespace, loaded):
            assert loaded.runs(namespace, "office") == OURS
        assert devices.audit() >= len(OURS)
        assert (loaded.runs(namespace, "data"), loaded.runs(namespace, "office")) == (OURS, ())
        assert devices.audit() == 0


def test_a_foreign_program_stays_where_ours_do_not_belong(namespace: Namespace, modern: Loaded) -> None:
    namespace.ip("tuntap add office mode tap")
    index = namespace.index("office")
    foreign = program_calls.prog_load(PROG_TYPE_SCHED_CLS, assembly.move(0, 0) + assembly.EXIT, "foreign")
    try:
        with namespace.entered():
            program_calls.prog_attach(foreign, index, TCX_INGRESS)
        namespace.tc("qdisc add dev office clsact")
        namespace.tc("filter add dev office egress pref 9 protocol ip u32 match u32 0 0")
        before = (namespace.qdiscs(), namespace.filters("office", "egress"))
        with running(namespace, modern, "data"), namespace.entered():
            assert program_calls.prog_query(index, TCX_INGRESS)[1] == (program_calls.prog_info(foreign).id,)
        assert (namespace.qdiscs(), namespace.filters("office", "egress")) == before
    finally:
        os.close(foreign)


def test_a_device_from_which_our_programs_do_not_go_is_a_problem_until_they_do(
    namespace: Namespace, modern: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.ip("tuntap add office mode tap")
    with running(namespace, modern):
        pass

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as refused:
        refused.setattr(program_calls, "prog_detach", refuse)
        with namespace.entered():
            devices = modern.devices("office?")
            devices.sync()
    with contextlib.closing(devices), namespace.entered():
        assert [(each.subject, each.reason.partition(":")[0]) for each in devices.problems()] == [
            ("device office", "not detached"),
            ("--devices", "no device here is called office?"),
        ]
        devices.sync()
        assert [each.subject for each in devices.problems()] == ["--devices"]
        assert modern.runs(namespace, "office") == ()


def test_device_that_appears_later_is_attached_at_once_and_forgotten_when_gone(
    namespace: Namespace, loaded: Loaded
) -> None:
    with running(namespace, loaded) as devices:
        assert devices.attached() == ()
        namespace.ip("link add late type veth peer name late-in")
        until(devices, lambda: devices.attached() == ("late", "late-in"), devices.attached)
        index = namespace.index("late")
        assert loaded.rows().get(index) == Row(NONE, NONE, loaded.clsact, 1500, namespace.mac("late"))
        namespace.ip("link del late")
        until(devices, lambda: devices.attached() == (), devices.attached)
        assert loaded.rows().get(index) is None
        assert devices.problems() == ()


def test_rows_follow_addresses(namespace: Namespace, loaded: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    namespace.ip("link add cni0 type bridge")
    namespace.ip("link add pod1 type veth peer name pod1-in")
    namespace.ip("link set pod1 master cni0")
    for device in ("eth0", "far", "cni0", "pod1"):
        namespace.ip(f"link set {device} up")
    namespace.ip("addr add 192.168.0.2/24 dev eth0")
    namespace.ip("addr add 192.168.0.3/24 dev eth0")
    namespace.ip("addr add fd00::2/64 dev eth0 nodad")
    namespace.ip("addr add 10.1.0.1/24 dev cni0")
    namespace.ip("route add default via 192.168.0.1")

    def row(device: str) -> tuple[bytes, bytes, int] | None:
        found = loaded.rows().get(namespace.index(device))
        return found and found[:3]

    with running(namespace, loaded) as devices:
        assert row("eth0") == (packed("192.168.0.2"), packed("fd00::2"), loaded.clsact)
        # A bridge's port has the bridge's address, and where it has none, one of the node's.
        assert row("pod1") == (packed("10.1.0.1"), packed("fd00::2"), loaded.clsact)
        assert row("far") == (packed("192.168.0.2"), packed("fd00::2"), loaded.clsact)
        namespace.ip("addr del 192.168.0.2/24 dev eth0")
        namespace.ip("addr add 192.168.9.9/24 dev eth0")
        wanted = (packed("192.168.9.9"), packed("fd00::2"), loaded.clsact)
        until(devices, lambda: row("eth0") == wanted, lambda: row("eth0"))


def test_masquerade_does_not_take_a_virtual_address_that_comes(namespace: Namespace, loaded: Loaded) -> None:
    """It leaves for another node again, and the answers with it: as keepalived and kube-vip add one, or plainly."""
    namespace.ip("link add eth0 type veth peer name far")
    namespace.ip("link set eth0 up")
    namespace.ip("addr add 192.168.0.2/24 dev eth0")
    namespace.ip("addr add fd00::2/64 dev eth0 nodad")
    with running(namespace, loaded) as devices:
        for virtual in ("192.168.0.100/32", "fd00::100/128 nodad", "fd00::101/64 nodad"):
            namespace.ip(f"addr add {virtual.split()[0]} dev eth0 {virtual.partition(' ')[2]}")
        namespace.ip("link set eth0 mtu 1400")  # seen when all before it has been
        wanted = Row(packed("192.168.0.2"), packed("fd00::2"), loaded.clsact, 1400, namespace.mac("eth0"))
        index = namespace.index("eth0")
        until(devices, lambda: loaded.rows().get(index) == wanted, lambda: loaded.rows().get(index))


def test_rows_follow_mtu_and_mac(namespace: Namespace, loaded: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    index = namespace.index("eth0")
    with running(namespace, loaded) as devices:
        assert loaded.rows().get(index) == Row(NONE, NONE, loaded.clsact, 1500, namespace.mac("eth0"))
        namespace.ip("link set eth0 mtu 1400 address 02:00:00:00:00:07")
        wanted = Row(NONE, NONE, loaded.clsact, 1400, bytes.fromhex("020000000007"))
        until(devices, lambda: loaded.rows().get(index) == wanted, lambda: loaded.rows().get(index))


def test_a_bridges_port_has_frames_for_anybody(namespace: Namespace, loaded: Loaded) -> None:
    """What is for the bridge, and for whoever is behind its other ports: the row names no address of its own."""
    namespace.ip("link add cni0 type bridge")
    namespace.ip("link add pod1 type veth peer name pod1-in")
    namespace.ip("link set pod1 master cni0")
    with running(namespace, loaded):
        rows = {name: loaded.rows().get(namespace.index(name)) for name in ("pod1", "pod1-in")}
        assert {name: row and row.mac for name, row in rows.items()} == {
            "pod1": bytes(6),
            "pod1-in": namespace.mac("pod1-in"),
        }


def test_a_veth_into_another_namespace_is_marked_unless_it_is_on_a_bridge(namespace: Namespace, loaded: Loaded) -> None:
    other = Namespace()
    try:
        namespace.ip("link add cni0 type bridge")
        for device in ("routed", "bridged"):
            namespace.ip(f"link add {device} type veth peer name {device}-in netns {other.name}")
        namespace.ip("link set bridged master cni0")
        namespace.ip("link add here type veth peer name there")
        with running(namespace, loaded) as devices:

            def marked() -> set[str]:
                rows = loaded.rows()
                found = {name: rows.get(namespace.index(name)) for name in devices.attached()}
                return {name for name, row in found.items() if row is not None and row.flags & DEVICE_PEER}

            assert marked() == {"routed"}
            namespace.ip("link set bridged nomaster")
            until(devices, lambda: marked() == {"routed", "bridged"}, marked)
    finally:
        other.remove()


def test_pod_devices_are_marked(namespace: Namespace, loaded: Loaded) -> None:
    namespace.ip("link add cni0 type bridge")
    namespace.ip("link add pod1 type veth peer name pod1-in")
    namespace.ip("link set pod1 master cni0")
    namespace.ip("link add veth9 type veth peer name eth0")
    with running(namespace, loaded) as devices:

        def pods() -> list[str]:
            rows = loaded.rows()
            names = ("pod1", "pod1-in", "veth9", "eth0")
            return [
                name for name in names if (rows.get(namespace.index(name)) or Row(NONE, NONE, 0)).flags & DEVICE_POD
            ]

        assert pods() == []
        devices.set_pod_interface("cni0")
        assert pods() == ["pod1"]
        devices.set_pod_interface("veth*")
        assert pods() == ["veth9"]
        devices.set_pod_interface("pod1")
        assert pods() == ["pod1"]
        devices.set_pod_interface("")
        assert pods() == []


def counting_program(map: int) -> int:
    """A tc program that counts packets in cell 0 of an array of u64 and lets the next filter decide."""
    code = (
        assembly.cell(map)
        + assembly.move(1, 1)
        + assembly.instruction(0xDB, 0, 1)  # lock *(u64 *)r0 += r1
        + assembly.move(0, -1)
        + assembly.EXIT
    )
    return program_calls.prog_load(PROG_TYPE_SCHED_CLS, code, "foreign")


def test_foreign_filter_is_kept_and_works(namespace: Namespace, filtering: Loaded) -> None:
    """Somebody counts IPv4 packets at preference 1, which ours cannot share: it stands behind, and both see them."""
    namespace.ip("link add eth0 type veth peer name far")
    namespace.ip("link set eth0 up")
    namespace.ip("link set far up")
    index = namespace.index("eth0")
    cells = map_calls.map_create(map_calls.MAP_ARRAY, 4, 8, 1)
    foreign = counting_program(cells)
    ipv4 = socket.htons(0x0800)
    with namespace.entered():
        other = Netlink()
    try:
        assert tc.add_clsact(other, index)
        tc.put_filter(other, index, tc.INGRESS, 1, 1, foreign, "foreign", replace=False, protocol=ipv4)
        before = (namespace.qdiscs(), namespace.filters("eth0", "ingress"), namespace.filters("eth0", "egress"))
        with running(namespace, filtering) as devices:
            side = [each for each in tc.filters(other, index) if each.parent == tc.INGRESS]
            assert [(each.preference, each.name) for each in side] == [(1, "foreign"), (2, "ebpflb_ingress")]
            assert devices.audit() == 0
            # An IPv4 packet that says TCP and ends there: our program counts it as too short.
            packet = b"\xff" * 12 + b"\x08\x00" + bytes.fromhex("4500001400000000400600000a0000010a000002")
            with namespace.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                sender.bind(("far", 0))
                sender.send(packet)
            counter = struct.pack("=I", filtering.artifact.counters.index("PACKET_TOO_SHORT"))

            def seen() -> tuple[bool, bool]:
                ours = map_calls.lookup(filtering.maps["counters"], counter, map_calls.percpu_size(8))
                return any(map_calls.lookup(cells, bytes(4), 8) or b""), any(ours or b"")

            until(devices, lambda: seen() == (True, True), seen)
        with namespace.entered():
            installed(filtering.rows(), remove=True)
        after = (namespace.qdiscs(), namespace.filters("eth0", "ingress"), namespace.filters("eth0", "egress"))
        assert after == before
    finally:
        other.close()
        os.close(foreign)
        os.close(cells)


def test_our_filter_runs_before_a_foreign_bpf_filter(namespace: Namespace, filtering: Loaded) -> None:
    """Another bpf filter holds preference 1 and ends processing: ours shares the preference and comes first."""
    namespace.ip("link add eth0 type veth peer name far")
    terminal = program_calls.prog_load(PROG_TYPE_SCHED_CLS, assembly.move(0, 0) + assembly.EXIT, "foreign")
    with namespace.entered():
        other = Netlink()
    try:
        index = namespace.index("eth0")
        assert tc.add_clsact(other, index)
        tc.put_filter(other, index, tc.INGRESS, 1, 1, terminal, "foreign", replace=False)
        with running(namespace, filtering):
            names = [each.name for each in tc.filters(other, index) if each.parent == tc.INGRESS]
            assert names == ["ebpflb_ingress", "foreign"]
        with namespace.entered():
            installed(filtering.rows(), remove=True)
        assert [each.name for each in tc.filters(other, index)] == ["foreign"]
    finally:
        other.close()
        os.close(terminal)


def test_restart_with_the_same_programs_writes_nothing(namespace: Namespace, loaded: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    with running(namespace, loaded):
        pass
    with namespace.entered():
        again = loaded.devices()
        try:
            assert again.sync() == 0
            assert again.attached() == ("eth0", "far")
            assert again.intact()
        finally:
            again.close()


def test_changed_program_is_replaced_in_place(namespace: Namespace, loaded: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    with running(namespace, loaded):
        pass
    os.close(loaded.ingress)
    loaded.ingress = loaded.load("tc_ingress")
    with running(namespace, loaded) as devices:
        assert loaded.runs(namespace, "eth0") == OURS
        assert devices.intact()
        if not loaded.with_tcx:
            assert "pref 1 bpf chain 0 handle 0xeb ebpflb_ingress" in namespace.filters("eth0", "ingress")


@pytest.mark.parametrize("damage", ["filter del dev eth0 ingress pref 1", "qdisc del dev eth0 clsact"])
def test_filters_that_somebody_removes_come_back_at_once(namespace: Namespace, filtering: Loaded, damage: str) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    with running(namespace, filtering) as devices:
        namespace.tc(damage)
        assert filtering.runs(namespace, "eth0") != OURS
        until(
            devices,
            lambda: filtering.runs(namespace, "eth0") == OURS,
            lambda: filtering.runs(namespace, "eth0"),
        )


def test_a_program_that_somebody_detached_is_noticed_and_comes_back(namespace: Namespace, modern: Loaded) -> None:
    """The kernel tells nobody of it."""
    namespace.ip("link add eth0 type veth peer name far")
    with running(namespace, modern) as devices:
        assert devices.intact()
        program_calls.prog_detach(modern.egress, namespace.index("eth0"), TCX_EGRESS)
        assert not devices.intact()
        assert devices.audit() == 1
        assert devices.intact()
        assert modern.runs(namespace, "eth0") == OURS


def test_our_program_runs_before_a_foreign_one_which_runs_too(namespace: Namespace, modern: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    index = namespace.index("eth0")
    terminal = program_calls.prog_load(PROG_TYPE_SCHED_CLS, assembly.move(0, 0) + assembly.EXIT, "foreign")
    number = program_calls.prog_info(terminal).id
    try:
        with running(namespace, modern):
            pass
        with namespace.entered():
            installed(remove=True)
            program_calls.prog_attach(terminal, index, TCX_INGRESS)
        with running(namespace, modern) as devices:
            ours = program_calls.prog_info(modern.ingress).id
            assert program_calls.prog_query(index, TCX_INGRESS)[1] == (ours, number)
            assert devices.audit() == 0
        with namespace.entered():
            installed(remove=True)
            assert program_calls.prog_query(index, TCX_INGRESS)[1] == (number,)
    finally:
        os.close(terminal)


def test_filters_of_an_older_version_stay_until_they_go(namespace: Namespace, modern: Loaded) -> None:
    """The change would cost packets; new devices have their programs at tcx. Never both: a packet would pass twice."""
    namespace.ip("link add eth0 type veth peer name far")
    before = namespace.qdiscs()

    def where(device: str) -> tuple[bool, bool]:
        with namespace.entered():
            at_tcx = bool(tcx.running(namespace.index(device)))
        return at_tcx, "ebpflb_ingress" in namespace.filters(device, "ingress")

    modern.with_tcx = False
    with running(namespace, modern):
        assert (where("eth0"), where("far")) == ((False, True), (False, True))
    modern.with_tcx = True
    os.close(modern.ingress)
    modern.ingress = modern.load("tc_ingress")
    with running(namespace, modern) as devices:
        assert (where("eth0"), where("far")) == ((False, True), (False, True))
        assert devices.audit() == 0
        namespace.ip("link add late type veth peer name late-in")
        until(devices, lambda: where("late") == (True, False), lambda: where("late"))
        namespace.tc("qdisc del dev far clsact")
        until(devices, lambda: where("far") == (True, False), lambda: where("far"))
        assert devices.audit() == 0
        assert devices.intact()
    with namespace.entered():
        promised = installed(modern.rows())
        assert "qdisc clsact on eth0" in promised
        assert installed(modern.rows(), remove=True) == promised
        assert installed(modern.rows()) == ()
    namespace.ip("link del late")
    assert namespace.qdiscs() == before


def test_filters_beside_programs_at_tcx_go(namespace: Namespace, modern: Loaded) -> None:
    """An older version has run after a newer one, and knew of filters only."""
    namespace.ip("link add eth0 type veth peer name far")
    with running(namespace, modern):
        pass
    with namespace.entered():
        netlink = Netlink()
    with contextlib.closing(netlink):
        older = tc.Hooked(tc.INGRESS, modern.ingress, program_calls.prog_info(modern.ingress).id, "ebpflb_ingress")
        clsact.keep(netlink, namespace.index("eth0"), [older], None)
    assert "ebpflb_ingress" in namespace.filters("eth0", "ingress")
    with running(namespace, modern):
        assert modern.runs(namespace, "eth0") == OURS
        assert namespace.filters("eth0", "ingress") == ""


def test_a_thread_in_another_namespace_touches_nothing(namespace: Namespace, modern: Loaded) -> None:
    """The system calls would mean the device that has the same number there."""
    namespace.ip("link add eth0 type veth peer name far")
    with namespace.entered():
        devices = modern.devices()
    try:
        devices.sync()
        assert devices.attached() == ()
        assert "another network namespace" in str(devices.problems())
        with namespace.entered():
            devices.sync()
            assert devices.problems() == ()
            assert devices.attached() == ("eth0", "far")
    finally:
        devices.close()


def test_programs_come_and_go_without_a_datagram_lost(namespace: Namespace, modern: Loaded) -> None:
    """A clsact qdisc that comes or goes has the kernel drop what leaves by the device meanwhile."""
    other = Namespace()
    try:
        namespace.ip(f"link add eth0 type veth peer name far netns {other.name}")
        for side, device, address in ((namespace, "eth0", "192.0.2.1"), (other, "far", "192.0.2.2")):
            side.ip(f"addr add {address}/24 dev {device}")
            side.ip(f"link set {device} up")
        with other.entered():
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with namespace.entered():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with receiver, sender:
            receiver.bind(("192.0.2.2", 4000))
            receiver.settimeout(DEADLINE)
            sender.connect(("192.0.2.2", 4000))
            sender.send(b"neighbours know each other then")
            receiver.recv(64)
            ended = threading.Event()
            missed: list[int] = []

            def ask() -> None:
                for number in itertools.count():
                    sender.send(number.to_bytes(8))
                    try:
                        while int.from_bytes(receiver.recv(64)) != number:
                            pass
                    except TimeoutError:
                        missed.append(number)
                    if ended.is_set():
                        return

            asking = threading.Thread(target=ask)
            asking.start()
            try:
                for _ in range(20):
                    with running(namespace, modern):
                        assert modern.runs(namespace, "eth0") == OURS
                    with namespace.entered():
                        installed(modern.rows(), remove=True)
            finally:
                ended.set()
                asking.join()
            assert missed == []
    finally:
        other.remove()


def test_device_with_an_ingress_qdisc_is_a_problem_until_it_goes(namespace: Namespace, filtering: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    namespace.tc("qdisc add dev eth0 ingress")
    with running(namespace, filtering) as devices:
        assert devices.attached() == ("far",)
        (problem,) = devices.problems()
        assert problem.subject == "device eth0"
        assert "ingress qdisc" in problem.reason
        namespace.tc("qdisc del dev eth0 ingress")
        devices.sync()
        assert devices.problems() == ()
        assert devices.attached() == ("eth0", "far")


def test_device_without_ethernet_header_is_named(namespace: Namespace, loaded: Loaded) -> None:
    namespace.ip("tuntap add tun7 mode tun")
    namespace.ip("link set tun7 up")
    with running(namespace, loaded) as devices:
        assert devices.attached() == ()
        assert [problem.subject for problem in devices.problems()] == ["device tun7"]


@pytest.mark.parametrize("rows_survive", [True, False])
def test_cleanup_leaves_qdiscs_as_before(namespace: Namespace, filtering: Loaded, rows_survive: bool) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    namespace.ip("link add used type veth peer name used-in")
    namespace.tc("qdisc add dev used clsact")
    namespace.tc("filter add dev used egress pref 9 protocol ip u32 match u32 0 0")
    before = namespace.qdiscs()
    with running(namespace, filtering):
        pass
    with namespace.entered():
        rows = filtering.rows() if rows_survive else None
        promised = installed(rows)
        assert installed(rows, remove=True) == promised
        assert "qdisc clsact on eth0" in promised
        assert "qdisc clsact on used" not in promised
        assert installed(rows) == ()
    assert namespace.qdiscs() == before


def test_cleanup_after_an_upgrade_with_empty_maps_leaves_qdiscs_as_before(
    namespace: Namespace, artifact: Artifact, filtering: Loaded
) -> None:
    """Whose the qdisc is stood in a row of the old maps."""
    namespace.ip("link add eth0 type veth peer name far")
    namespace.ip("link add used type veth peer name used-in")
    namespace.tc("qdisc add dev used clsact")
    namespace.tc("filter add dev used egress pref 9 protocol ip u32 match u32 0 0")
    before = namespace.qdiscs()
    with running(namespace, filtering):
        pass
    with contextlib.closing(Loaded(artifact, False)) as upgraded:
        with running(namespace, upgraded):
            pass
        with namespace.entered():
            installed(upgraded.rows(), remove=True)
    assert namespace.qdiscs() == before


def test_empty_clsact_of_somebody_else_stays(namespace: Namespace, filtering: Loaded) -> None:
    namespace.ip("link add eth0 type veth peer name far")
    namespace.tc("qdisc add dev eth0 clsact")
    before = namespace.qdiscs()
    with running(namespace, filtering):
        pass
    with running(namespace, filtering):  # a restart still knows
        pass
    with namespace.entered():
        installed(filtering.rows(), remove=True)
    assert namespace.qdiscs() == before
