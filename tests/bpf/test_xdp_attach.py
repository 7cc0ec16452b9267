"""XDP on real devices, in a network namespace of their own: who gets our program, in which mode, and what is left.

Rules of this file: links are made in the thread's own network namespace, so every pass over devices is made inside the
test's. Pins bear this process' number and are removed whatever happens. Waiting is for a condition, with a deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpflb import rtnetlink
from ebpflb.dataplane.bpf import assembly, map_calls, pins, program_calls, syscall, tcx
from ebpflb.dataplane.bpf.constants import DEVICE_REDIRECT, DEVICE_XDP, PROG_TYPE_XDP
from ebpflb.dataplane.bpf.device_rows import Rows, device_layout
from ebpflb.dataplane.bpf.devices import Devices, installed
from ebpflb.dataplane.bpf.facts import filesystem_of, has_xdp_frags
from ebpflb.dataplane.bpf.layouts import U32, VLAN_KEY
from ebpflb.dataplane.bpf.xdp import Xdp
from ebpflb.dataplane.bpf.xdp_choice import AUTO, GENERIC, NATIVE, OFF
from ebpflb.dataplane.bpf.xdp_features import Features
from ebpflb.dataplane.bpf.xdp_survey import survey
from ebpflb.rtnetlink import Netlink
from tests.bpf.namespaces import Namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

DEADLINE = 30.0
BOTH = DEVICE_XDP | DEVICE_REDIRECT
XDP = 37
SO_RCVBUFFORCE = 33
PASS = assembly.move(0, 2) + assembly.EXIT
_numbers = itertools.count()


def program(name: str, *, frags: bool = True) -> int:
    """An XDP program that passes everything up, and takes frames in several buffers where the kernel has that."""
    flags = program_calls.F_XDP_HAS_FRAGS if frags and has_xdp_frags() else 0
    return program_calls.prog_load(PROG_TYPE_XDP, PASS, name, XDP, flags=flags)


def drivers_tell() -> bool:
    """Whether this kernel tells what drivers can do (Linux 6.3)."""
    features = Features()
    try:
        return features.all() is not None
    finally:
        features.close()


class Node:
    """A network namespace with an uplink `eth0` (a veth) of 192.0.2.0/24, a pod, and what a daemon there keeps: a pin
    directory, tc programs and the map `devices`."""

    def __init__(self) -> None:
        self.namespace = Namespace()
        self.bpffs = Path("/sys/fs/bpf") / f"ebpflb-xdp-{os.getpid()}-{next(_numbers)}"
        pins.prepare(self.bpffs)
        self.layout = device_layout()
        self.map = map_calls.map_create(map_calls.MAP_HASH, 4, self.layout.size, 64, 0, "test_devices")
        self.vlans = map_calls.map_create(map_calls.MAP_HASH, 8, 4, 64, 0, "test_vlans")
        self.tc = [
            program_calls.prog_load(3, assembly.move(0, -1) + assembly.EXIT, name)
            for name in ("ebpflb_ingress", "ebpflb_egress")
        ]
        self.descriptors = [self.map, self.vlans, *self.tc]
        ip = self.namespace.ip
        ip("link set lo up")
        ip("link add eth0 type veth peer name wire")
        ip("link set wire up")
        ip("link set eth0 up")
        ip("addr add 192.0.2.1/24 dev eth0")
        ip("link add pod1 type veth peer name inside")
        ip("link set pod1 up")

    def own(self, fd: int) -> int:
        self.descriptors.append(fd)
        return fd

    @contextlib.contextmanager
    def running(self, mode: str, *patterns: str, program: int | None = None, unable: str = "") -> Iterator[Daemon]:
        with self.namespace.entered():
            if program is None and mode != OFF and not unable:
                program = self.own(globals()["program"]("ebpflb_xdp"))
            xdp = Xdp(mode, self.bpffs / pins.LINKS, program, unable)
            devices = Devices(
                self.tc[0],
                self.tc[1],
                self.map,
                self.layout,
                patterns,
                vlans=self.vlans,
                xdp=xdp,
                with_tcx=tcx.supported(),
            )
            try:
                yield Daemon(self, devices, program_calls.prog_info(program).id if program is not None else 0)
            finally:
                devices.close()

    def link(self, device: str) -> rtnetlink.Link:
        with self.namespace.entered():
            netlink = Netlink()
            try:
                return next(each for each in rtnetlink.links(netlink).values() if each.name == device)
            finally:
                netlink.close()

    def running_on(self, device: str) -> tuple[tuple[str, int], ...]:
        """(mode, program id) of what runs on a device."""
        modes = {rtnetlink.XDP_DRIVER: NATIVE, rtnetlink.XDP_GENERIC: GENERIC}
        return tuple((modes[place], number) for place, number in self.link(device).xdp)

    def runs_tc(self, device: str) -> bool:
        """Whether our tc programs run on a device."""
        with self.namespace.entered():
            found = "\n".join(installed())
        return all(f"ebpflb_{side} on {device} {side}" in found for side in ("ingress", "egress"))

    def bits(self, device: str) -> int:
        row = Rows(self.map, self.layout).get(self.link(device).ifindex)
        return row.flags & BOTH if row is not None else 0

    def pinned(self, device: str) -> int:
        """The id of the pinned link."""
        fd = syscall.obj_get(str(self.bpffs / pins.LINKS / f"xdp-{self.link(device).ifindex}"))
        try:
            return program_calls.link_info(fd).id
        finally:
            os.close(fd)

    def remove(self) -> None:
        pins.remove_all(self.bpffs)
        for fd in self.descriptors:
            os.close(fd)
        self.namespace.remove()


class Daemon:
    """What a running daemon has of devices, after its first pass."""

    def __init__(self, node: Node, devices: Devices, program: int) -> None:
        self.devices = devices
        self.program = program
        self.first = devices.sync()

    def told(self, device: str) -> tuple[str, str]:
        """(mode, reason) as `status` says it."""
        return next((each.mode, each.reason) for each in self.devices.told() if each.device == device)

    def problems(self) -> list[str]:
        return [problem.reason for problem in self.devices.problems()]

    def until(self, condition: Callable[[], bool], seen: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"not within {DEADLINE} s; last seen: {seen()}"
            if select.select([self.devices], [], [], min(left, 0.5))[0]:
                self.devices.handle()


@pytest.fixture
def node() -> Iterator[Node]:
    syscall.raise_memlock_limit()
    if filesystem_of(Path("/sys/fs/bpf")).type != "bpf":
        subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)
    made = Node()
    yield made
    made.remove()


@pytest.mark.parametrize("mode", [NATIVE, GENERIC])
def test_the_nodes_device_runs_our_program_and_a_pods_does_not(node: Node, mode: str) -> None:
    with node.running(mode) as daemon:
        assert node.running_on("eth0") == ((mode, daemon.program),)
        assert node.running_on("pod1") == node.running_on("wire") == ()
        assert daemon.told("eth0")[0] == mode
        assert [told.device for told in daemon.devices.told()] == ["eth0"]
        assert daemon.devices.audit() == 0
    # It outlives the daemon by its pin.
    assert node.running_on("eth0") == ((mode, daemon.program),)


def test_auto_leaves_a_veth_alone(node: Node) -> None:
    with node.running(AUTO) as daemon:
        assert node.running_on("eth0") == ()
        mode, reason = daemon.told("eth0")
        assert (mode, "auto takes no veth" in reason) == (OFF, True)
        assert daemon.problems() == []
        assert not list((node.bpffs / pins.LINKS).iterdir())


def test_a_veth_is_told_what_to_set(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with node.running(GENERIC) as daemon:
        daemon.devices.audit()
    said = [record.getMessage() for record in caplog.records if "ethtool" in record.getMessage()]
    assert len(said) == 1
    assert "ethtool -K DEVICE tx off" in said[0]


def test_a_native_veth_sends_only_once_its_other_end_takes_frames(node: Node) -> None:
    """Without a program or GRO there, what is sent back is dropped by the kernel: the row says so."""
    if not drivers_tell():
        pytest.skip("this kernel does not tell whether a veth's other end takes frames")
    with node.running(NATIVE) as daemon:
        assert node.bits("eth0") == 0
        assert "GRO" in daemon.told("eth0")[1]
        assert len(daemon.problems()) == 1
        wire = node.link("wire").ifindex
        other = node.own(program("foreign"))
        link = program_calls.link_create(other, wire, XDP, rtnetlink.XDP_FLAGS_DRV_MODE)
        daemon.until(lambda: node.bits("eth0") == BOTH, lambda: node.bits("eth0"))
        assert daemon.problems() == []
        os.close(link)
        daemon.until(lambda: node.bits("eth0") == 0, lambda: node.bits("eth0"))


def test_generic_sends_by_any_device(node: Node) -> None:
    with node.running(GENERIC):
        assert node.bits("eth0") == BOTH


@pytest.mark.parametrize("mode", [NATIVE, GENERIC])
def test_a_restart_replaces_the_program_in_its_link(node: Node, mode: str) -> None:
    with node.running(mode) as first:
        link = node.pinned("eth0")
    with node.running(mode) as second:
        assert second.program != first.program
        assert node.running_on("eth0") == ((mode, second.program),)
        assert node.pinned("eth0") == link


@pytest.mark.parametrize("mode", [NATIVE, GENERIC])
def test_a_restart_under_load_loses_no_frame(node: Node, mode: str) -> None:
    """Frames come in all the time, numbered, while one daemon follows another. No more are on their way at once than
    the kernel's queues hold, and frames from two CPUs may overtake each other."""
    experimental = 0x88B5
    with node.running(mode), node.namespace.entered():
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        receiver = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(experimental))
    with sender, receiver:
        sender.bind(("wire", experimental))
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        receiver.bind(("eth0", experimental))
        receiver.settimeout(DEADLINE)
        over = threading.Event()
        sent: list[int] = []
        came: list[int] = []

        def receive(flags: int = 0) -> None:
            came.append(int.from_bytes(receiver.recv(64, flags)[14:18], "big"))

        def send() -> None:
            while not over.wait(0.0001):
                with contextlib.suppress(BlockingIOError):
                    while len(came) < len(sent):
                        receive(socket.MSG_DONTWAIT)
                if len(sent) - len(came) < 100:
                    number = len(sent).to_bytes(4, "big")
                    sender.send(b"\xff" * 6 + bytes(6) + experimental.to_bytes(2, "big") + number)
                    sent.append(len(sent))

        thread = threading.Thread(target=send)
        thread.start()
        try:
            programs = set()
            for _ in range(5):
                with node.running(mode) as daemon:
                    programs.add(daemon.program)
                    assert node.running_on("eth0") == ((mode, daemon.program),)
        finally:
            over.set()
            thread.join()
        assert len(programs) == 5 and len(sent) > 10
        while len(came) < len(sent):
            receive()
        assert sorted(came) == sent


def test_a_restart_with_the_same_program_changes_nothing(node: Node) -> None:
    ours = node.own(program("ebpflb_xdp"))
    with node.running(GENERIC, program=ours):
        pass
    with node.running(GENERIC, program=ours) as again:
        assert again.first == 0


def test_another_mode_takes_the_place_of_the_one_before(node: Node) -> None:
    for mode in (GENERIC, NATIVE, GENERIC):
        with node.running(mode) as daemon:
            assert node.running_on("eth0") == ((mode, daemon.program),)
    with node.running(OFF) as daemon:
        assert node.running_on("eth0") == ()
        assert node.bits("eth0") == 0
        assert daemon.told("eth0") == (OFF, "--xdp off")
        assert not list((node.bpffs / pins.LINKS).iterdir())


@pytest.mark.parametrize("mode", [NATIVE, GENERIC])
def test_somebody_elses_program_is_kept_until_it_goes(node: Node, mode: str) -> None:
    foreign = node.own(program("foreign"))
    number = program_calls.prog_info(foreign).id
    with node.namespace.entered():
        link = program_calls.link_create(foreign, node.link("eth0").ifindex, XDP, rtnetlink.XDP_FLAGS_DRV_MODE)
    with node.running(mode) as daemon:
        assert node.running_on("eth0") == ((NATIVE, number),)
        assert daemon.told("eth0") == (OFF, f"somebody else's XDP program runs there (foreign, id {number})")
        (problem,) = daemon.problems()
        assert problem.endswith("tc carries its packets")
        assert node.bits("eth0") == 0
        assert daemon.devices.audit() == 0
        assert node.runs_tc("eth0")
        program_calls.link_detach(link)
        os.close(link)
        daemon.devices.audit()
        assert node.running_on("eth0") == ((mode, daemon.program),)
        assert [said for said in daemon.problems() if "somebody" in said] == []


def test_a_mtu_that_only_several_buffers_hold(node: Node) -> None:
    """Without multi-buffer support (before Linux 5.18) the driver refuses a program where the frames of the other end
    can be longer than a page: it says so in its own words, and tc carries on."""
    node.namespace.ip("link set wire mtu 9000")
    old = node.own(program("ebpflb_xdp", frags=False))
    with node.running(NATIVE, program=old) as daemon:
        assert node.running_on("eth0") == ()
        mode, reason = daemon.told("eth0")
        assert (mode, "MTU is too large" in reason) == (OFF, True), reason
        assert len(daemon.problems()) == 1
        node.namespace.ip("link set wire mtu 1500")
        daemon.devices.audit()
        assert node.running_on("eth0") == ((NATIVE, daemon.program),)


def test_jumbo_frames_are_no_hindrance_where_a_program_takes_several_buffers(node: Node) -> None:
    if not has_xdp_frags():
        pytest.skip("this kernel has no XDP programs for frames in several buffers")
    node.namespace.ip("link set wire mtu 9000")
    with node.running(NATIVE) as daemon:
        assert node.running_on("eth0") == ((NATIVE, daemon.program),)


def test_a_device_that_appears_later_and_one_that_goes(node: Node) -> None:
    with node.running(GENERIC) as daemon:
        node.namespace.ip("link add eth1 type veth peer name wire1")
        node.namespace.ip("addr add 198.51.100.1/24 dev eth1")
        daemon.until(lambda: bool(node.running_on("eth1")), lambda: node.link("eth1"))
        daemon.until(lambda: node.bits("eth1") == BOTH, lambda: node.bits("eth1"))
        pin = node.bpffs / pins.LINKS / f"xdp-{node.link('eth1').ifindex}"
        assert pin.exists()
        node.namespace.ip("link set eth1 name renamed")
        node.namespace.ip("addr add 198.51.100.2/24 dev renamed")
        daemon.until(
            lambda: [told.device for told in daemon.devices.told()] == ["eth0", "renamed"], daemon.devices.told
        )
        assert node.running_on("renamed") == ((GENERIC, daemon.program),)
        node.namespace.ip("link del renamed")
        daemon.until(lambda: not pin.exists(), pin.parent.iterdir)
        assert [told.device for told in daemon.devices.told()] == ["eth0"]


def test_a_device_that_is_given_to_another_namespace_is_left_as_it_was(node: Node) -> None:
    other = Namespace()
    try:
        with node.running(NATIVE) as daemon:
            assert node.running_on("eth0")
            node.namespace.ip(f"link set eth0 netns {other.name}")
            daemon.until(lambda: "xdp" not in other.ip("link show eth0"), lambda: other.ip("link show eth0"))
            assert not list((node.bpffs / pins.LINKS).iterdir())
    finally:
        other.remove()


def test_a_tap_of_the_nodes_own_runs_natively_if_it_is_asked_for(node: Node) -> None:
    node.namespace.ip("tuntap add tap0 mode tap")
    node.namespace.ip("link set tap0 up")
    node.namespace.ip("addr add 198.51.100.1/24 dev tap0")
    with node.running(NATIVE) as daemon:
        assert node.running_on("tap0") == ((NATIVE, daemon.program),)
        assert node.bits("tap0") == BOTH
    with node.running(AUTO):
        assert node.running_on("tap0") == ()


def test_a_device_whose_driver_runs_no_programs_is_named(node: Node) -> None:
    node.namespace.ip("link add mv0 link eth0 type macvlan")
    node.namespace.ip("addr add 198.51.100.1/24 dev mv0")
    with node.running(NATIVE) as daemon:
        mode, reason = daemon.told("mv0")
        assert (mode, "not support" in reason) == (OFF, True), reason
        assert [said for said in daemon.problems() if reason in said]
    with node.namespace.entered():
        if drivers_tell():
            assert ("mv0", OFF, "its driver runs no XDP programs", True) in survey(NATIVE, ())


def test_a_device_that_loses_its_address_keeps_xdp_until_the_next_start(node: Node) -> None:
    """Many drivers drop the carrier when a program comes or goes, at which a network manager may take the address."""
    with node.running(GENERIC) as daemon:
        node.namespace.ip("addr del 192.0.2.1/24 dev eth0")
        assert daemon.devices.handle()
        assert daemon.devices.audit() == 0
        assert node.running_on("eth0") == ((GENERIC, daemon.program),)
    with node.running(GENERIC) as daemon:
        assert node.running_on("eth0") == ()
        assert node.bits("eth0") == 0
        node.namespace.ip("addr add 192.0.2.9/24 dev eth0")
        daemon.until(lambda: node.bits("eth0") == BOTH, lambda: node.bits("eth0"))


def add_vlan(node: Node) -> None:
    """eth0.7; the test is skipped where the kernel has none."""
    made = ["ip", "-n", node.namespace.name, "link", "add", "link", "eth0", "name", "eth0.7", "type", "vlan", "id", "7"]
    if subprocess.run(made, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("this kernel has no VLANs")


def test_a_device_with_vlans_shows_their_tags_to_xdp_or_runs_none(node: Node) -> None:
    """Tags that the device takes off are invisible: a VLAN's frame would be taken for its parent's."""
    with node.running(GENERIC) as daemon:
        add_vlan(node)
        daemon.until(lambda: not node.running_on("eth0"), lambda: node.running_on("eth0"))
        assert "rxvlan off" in daemon.told("eth0")[1]
        assert daemon.told("eth0.7") == (OFF, "a VLAN of eth0, where its frames are met")
        subprocess.run(
            ["ip", "netns", "exec", node.namespace.name, "ethtool", "-K", "eth0", "rxvlan", "off"], check=True
        )
        daemon.until(lambda: bool(node.running_on("eth0")), lambda: daemon.told("eth0"))
        key = VLAN_KEY.pack(node.link("eth0").ifindex, 7)
        assert map_calls.lookup(node.vlans, key, 4) == U32.pack(node.link("eth0.7").ifindex)
        assert node.bits("eth0.7") == 0
        node.namespace.ip("link del eth0.7")
        daemon.until(lambda: map_calls.lookup(node.vlans, key, 4) is None, lambda: map_calls.lookup(node.vlans, key, 4))


def test_a_device_that_joins_a_bridge_loses_xdp_at_once(node: Node) -> None:
    with node.running(GENERIC) as daemon:
        node.namespace.ip("link add br0 type bridge")
        node.namespace.ip("link set eth0 master br0")
        daemon.until(lambda: not node.running_on("eth0"), lambda: node.running_on("eth0"))
        assert node.bits("eth0") == 0


def test_patterns_name_devices_without_an_address_and_leave_others_out(node: Node) -> None:
    with node.running(GENERIC, "wire") as daemon:
        assert node.running_on("wire") == ((GENERIC, daemon.program),)
        assert node.running_on("eth0") == ()


def test_a_link_that_somebody_detached_or_unpinned_is_noticed_and_made_again(node: Node) -> None:
    with node.running(GENERIC) as daemon:
        assert daemon.devices.intact()
        path = node.bpffs / pins.LINKS / f"xdp-{node.link('eth0').ifindex}"
        link = syscall.obj_get(str(path))
        before = program_calls.link_info(link).id
        program_calls.link_detach(link)
        os.close(link)
        assert not daemon.devices.intact()
        assert daemon.devices.audit() > 0
        assert node.running_on("eth0") == ((GENERIC, daemon.program),)
        assert node.pinned("eth0") != before
        path.unlink()
        assert not daemon.devices.intact()
        assert daemon.devices.audit() == 1
        assert daemon.devices.intact()
        assert node.running_on("eth0") == ((GENERIC, daemon.program),)


def test_what_another_instance_left_behind_is_taken_over(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Its daemon is gone (a second one cannot run here), its pins are somewhere else: two never run on one device. It
    is said whose place ours has taken."""
    older = node.own(program("ebpflb_xdp"))
    with node.running(GENERIC, program=older) as first:
        pins.put(older, node.bpffs / pins.PROGRAMS / "xdp_ingress")
    elsewhere = node.bpffs
    node.bpffs = Path(f"{elsewhere}-other")
    pins.prepare(node.bpffs)
    try:
        with node.running(GENERIC) as second:
            assert second.program != first.program
            assert node.running_on("eth0") == ((GENERIC, second.program),)
            assert second.devices.intact()
            second.devices.audit()
        said = [record.getMessage() for record in caplog.records if "replaced the XDP" in record.getMessage()]
        assert said == [
            f"device eth0: replaced the XDP program of the ebpflb with --bpffs {elsewhere}, whose daemon is gone"
        ]
    finally:
        pins.remove_all(elsewhere)


def test_a_program_that_the_kernel_refuses_leaves_tc(node: Node) -> None:
    with node.running(NATIVE, unable="the kernel refuses the program xdp_ingress: no") as daemon:
        assert node.running_on("eth0") == ()
        assert daemon.told("eth0") == (OFF, "the kernel refuses the program xdp_ingress: no")
        assert len(daemon.problems()) == 1
        assert node.runs_tc("eth0")


@pytest.mark.parametrize("pin_survives", [True, False])
def test_cleanup_removes_ours_and_leaves_a_foreign_one(node: Node, pin_survives: bool) -> None:
    node.namespace.ip("link add eth1 type veth peer name wire1")
    node.namespace.ip("addr add 198.51.100.1/24 dev eth1")
    foreign = node.own(program("foreign"))
    number = program_calls.prog_info(foreign).id
    with node.namespace.entered():
        link = program_calls.link_create(foreign, node.link("eth1").ifindex, XDP, rtnetlink.XDP_FLAGS_SKB_MODE)
    with node.running(GENERIC) as daemon:
        assert node.running_on("eth0") == ((GENERIC, daemon.program),)
        if not pin_survives:
            (node.bpffs / pins.LINKS / f"xdp-{node.link('eth0').ifindex}").unlink()
        promised = installed()
        assert "xdp program on eth0" in promised
        assert not [line for line in promised if line.startswith("xdp") and "eth1" in line]
        assert any("links/xdp-" in line for line in pins.inventory(node.bpffs)) == pin_survives
        assert installed(remove=True) == promised
        pins.remove_all(node.bpffs)
        assert node.running_on("eth0") == ()
        assert node.running_on("eth1") == ((GENERIC, number),)
        assert installed() == ()
    os.close(link)


def test_check_says_beforehand_what_would_be_and_then_what_is(node: Node) -> None:
    with node.namespace.entered():
        assert [(told.mode, told.reason) for told in survey(GENERIC, ())] == [(GENERIC, "would be tried")]
        assert [told.mode for told in survey(AUTO, ())] == [OFF]
    with node.running(NATIVE):
        assert [(told.device, told.mode) for told in survey(NATIVE, ())] == [("eth0", NATIVE)]


@pytest.mark.parametrize("mode", [AUTO, NATIVE, GENERIC])
def test_check_says_beside_a_daemon_what_status_says(node: Node, mode: str) -> None:
    """Also that a veth whose other end takes no frames sends nothing: "native" alone would be taken for all is well."""
    with node.running(mode) as daemon:
        assert survey(mode, ()) == daemon.devices.told()


def test_check_says_beforehand_that_a_device_takes_vlan_tags_off(node: Node) -> None:
    """It is known without a try, and no XDP runs there."""
    add_vlan(node)
    with node.namespace.entered():
        (told,) = (each for each in survey(GENERIC, ()) if each.device == "eth0")
        assert told.mode == OFF and "rxvlan off" in told.reason


def test_a_device_that_is_named_and_never_runs_xdp_is_a_problem(node: Node) -> None:
    """`--devices vx0 --xdp native`: it is not as it was asked for."""
    node.namespace.ip("link add vx0 type vxlan id 7 dstport 4789 remote 192.0.2.9 dev eth0")
    node.namespace.ip("link set vx0 up")
    with node.running(NATIVE, "vx0") as daemon:
        assert daemon.told("vx0") == (OFF, "an overlay: its frames come inside another device's")
        assert [said for said in daemon.problems() if "an overlay" in said]


def test_a_link_is_never_made_in_another_namespace(node: Node) -> None:
    """The system call takes the thread's namespace, whatever the devices were read from."""
    with node.running(GENERIC) as daemon:
        node.namespace.ip("link add eth1 type veth peer name wire1")
        node.namespace.ip("addr add 198.51.100.1/24 dev eth1")
        other = Namespace()
        try:
            with other.entered():
                daemon.devices.sync()
            assert node.running_on("eth1") == ()
            assert "another network namespace" in daemon.told("eth1")[1]
        finally:
            other.remove()
