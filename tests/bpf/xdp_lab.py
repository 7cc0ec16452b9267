"""A node's packet programs, XDP included, on devices of their own: what a test run says an `xdp_md` came by is a real
device, whose namespace has the routes and neighbours that the FIB is asked for.

Rules of this file: one network namespace with one end of some veth pairs, nothing is ever sent by them. Packets pass
by test run; what the stack would do between tc's two programs, choosing the leaving device, is said by the test.

  up0    the uplink: clients outside, and the remote pods of `remote`
  tag7   the device of up0's frames with the tag 7; a veth stands for it where the kernel has no VLANs
  up1    another uplink: the remote pods of `faraway`
  pod0   the local pods
  ov0    an overlay, without any flag: the remote pods of `tunnelled`
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator, Mapping

import pytest

from ebpflb.dataplane.bpf import map_calls, program_calls
from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.dataplane.bpf.assembly import EXIT, assemble, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_XDP
from ebpflb.demo import namespaces
from ebpflb.errors import UserError
from tests.bpf.loaded import SIZES, UNSPEC, XDP_PASS, XDP_REDIRECT, XDP_TX, Device, Loaded, Ran
from tests.packets import ETHERNET, MAC_CLIENT, MAC_NODE, Packet, address, assert_same, assert_sound

VLAN = 7
_numbers = itertools.count()
_XDP_ATTACH, _IN_THE_DRIVER = 37, 1 << 2
IFINDEX_AT = 40
"""Where `ifindex` lies in a `struct __sk_buff`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """A device of the node: whose masquerade address it has, its MAC, and who is behind it, by their MACs."""

    address: str
    mac: str
    behind: Mapping[str, str]
    flags: str = "xdp redirect"


WIRES: Mapping[str, Wire] = {
    "up0": Wire(
        "uplink",
        MAC_NODE,
        {
            "outside": MAC_CLIENT,
            "outside2": "02:00:00:00:01:06",
            "remote": "02:00:00:00:01:20",
            "remote2": "02:00:00:00:01:21",
            "narrow": "02:00:00:00:01:60",
        },
    ),
    "up1": Wire("uplink2", "02:00:00:00:00:12", {"faraway": "02:00:00:00:02:30"}),
    "tag7": Wire("tagged", MAC_NODE, {"tagclient": "02:00:00:00:07:05", "tagremote": "02:00:00:00:07:70"}, ""),
    "ov0": Wire("tunnel", "02:00:00:00:00:50", {"tunnelled": "02:00:00:00:05:50"}, ""),
    "pod0": Wire("", "02:00:00:00:00:60", {"local": "02:00:00:00:06:10", "local2": "02:00:00:00:06:11"}, "pod"),
}

WAY = {role: name for name, wire in WIRES.items() for role in wire.behind} | {"silent": "up0"}
"""By which device a role is reached; nobody knows the MAC of `silent`."""


def uplinks(**changes: Device) -> dict[str, Device]:
    """The rows of all devices, some of them changed."""
    rows = {
        name: Device(wire.address, pod="pod" in wire.flags, xdp="xdp" in wire.flags, redirect="redirect" in wire.flags,
                     mac=wire.mac)
        for name, wire in WIRES.items()
    }  # fmt: skip
    return rows | changes


class Lab:
    """The programs and the devices. `family` is that of the test; programs run where the thread is in `namespace`."""

    def __init__(self, node: Loaded, namespace: str, index: Mapping[str, int]) -> None:
        self.node, self.namespace, self.index = node, namespace, index
        self.family = 4

    def clear(self, family: int, **devices: Device) -> None:
        """As new, with the rows of all devices."""
        self.family = family
        self.node.clear()
        for name in ("hops", "marks"):
            spec = self.node.artifact.maps[name]
            width = map_calls.percpu_size(spec.value.size) if name == "hops" else spec.value.size
            keys = struct.pack(f"={spec.max_entries}I", *range(spec.max_entries))
            map_calls.update_batch(self.node.maps[name], keys, bytes(width * spec.max_entries), spec.max_entries)
        for name, device in uplinks(**devices).items():
            self.put_device(name, device)
        self.node.put_vlan(self.index["up0"], VLAN, self.index["tag7"])

    def put_device(self, name: str, device: Device) -> None:
        self.node.put_device(device, self.family, self.index[name])

    # ---- One program

    def xdp(self, frame: bytes, device: str = "up0", linear: int = 0) -> Ran:
        """A frame that enters by a device; with `linear` only so much of it lies in its first buffer."""
        context = struct.pack("=6I", 0, linear or len(frame), 0, self.index[device], 0, 0)
        return self.node.run("xdp_ingress", frame, context)

    def tc(self, program: str, frame: bytes, device: str) -> Ran:
        """A packet that passes a device's hook, as the stack has it: without a tag."""
        context = bytearray(192)
        struct.pack_into("=I", context, IFINDEX_AT, self.index[device])
        return self.node.run(program, frame, bytes(context))

    # ---- A packet's way

    def sent(self, frame: bytes, device: str = "up0", by: str = "up0") -> bytes:
        """What XDP makes of a frame that it sends on."""
        ran = self.xdp(frame, device)
        wanted = XDP_TX if by == device else XDP_REDIRECT
        assert ran.verdict == wanted, (ran.verdict, self.node.counters())
        return ran.frame

    def passed_up(self, frame: bytes, device: str = "up0") -> None:
        """XDP leaves the frame to the stack, exactly as it came."""
        ran = self.xdp(frame, device)
        assert ran.verdict == XDP_PASS, (ran.verdict, self.node.counters())
        assert_same(ran.frame, frame, "passed up")

    def entered(self, frame: bytes, device: str = "up0") -> bytes:
        """What tc makes of a packet that enters, and lets go on."""
        ran = self.tc("tc_ingress", frame, device)
        assert ran.verdict == UNSPEC, (ran.verdict, self.node.counters())
        return ran.frame

    def left(self, frame: bytes, device: str = "up0") -> bytes:
        """What tc makes of a packet that leaves."""
        ran = self.tc("tc_egress", frame, device)
        assert ran.verdict == UNSPEC, (ran.verdict, self.node.counters())
        return ran.frame

    def by_stack(self, frame: bytes, device: str = "up0", by: str = "up0") -> bytes:
        """What tc makes of a frame on its whole way; the stack between takes no hop off here."""
        return self.left(self.entered(frame, device), by)

    def by_both(self, frame: bytes, device: str = "up0", by: str = "up0") -> bytes:
        """XDP passes the frame up, and tc carries it."""
        self.passed_up(frame, device)
        return self.by_stack(frame, device, by)


def on_wire(packet: Packet, family: int, by: str, to: str, tag: int | None = None) -> bytes:
    """The packet as it leaves by a device for a role behind it, one hop later."""
    frame = packet.but(hops=packet.hops - 1, vlan=tag).frame(family)
    macs = WIRES[by].behind[to] + WIRES[by].mac
    frame = bytes.fromhex(macs.replace(":", "")) + frame[12:]
    if not packet.no_checksum:
        assert_sound(frame, "what is wanted")
    return frame


def sport_of(frame: bytes, tag: bool = False) -> int:
    """The source port of a frame with plain headers."""
    ip = ETHERNET + 4 * tag
    at = ip + (20 if frame[ip] >> 4 == 4 else 40)
    return int.from_bytes(frame[at : at + 2])


@contextlib.contextmanager
def devices() -> Iterator[str]:
    """A namespace with the devices; its name."""
    name = f"ebpflb-xdp-{os.getpid()}-{next(_numbers)}"
    namespaces.create(name)
    try:
        namespaces.sysctl(name, {"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1})
        for wire in WIRES:
            _make(name, wire)
        namespaces.ip(name, list(_set_up()))
        yield name
    finally:
        namespaces.delete(name)


def _make(namespace: str, name: str) -> None:
    """A device, and its other end if it has one."""
    if name == "tag7" and _is_vlan(namespace, name):
        return
    lines = [f"link add {name} address {WIRES[name].mac} type veth peer name {name}-peer"]
    namespaces.ip(namespace, [*lines, f"link set {name}-peer up", f"link set {name} up"])


def _is_vlan(namespace: str, name: str) -> bool:
    """Make it one of up0; whether this kernel has VLANs."""
    try:
        namespaces.ip(namespace, [f"link add link up0 name {name} type vlan id {VLAN}", f"link set {name} up"])
    except UserError as error:
        if "Unknown device type" not in str(error) and "not supported" not in str(error):
            raise
        return False
    return True


def _set_up() -> Iterator[str]:
    for name, wire in WIRES.items():
        if wire.address:
            yield f"addr add {address(wire.address, 4)}/32 dev {name}"
            yield f"addr add {address(wire.address, 6)}/128 dev {name} nodad"
    for role, name in WAY.items():
        option = " mtu lock 1400" if role == "narrow" else ""
        for family in (4, 6):
            yield f"route add {address(role, family)} dev {name}{option}"
            if role in WIRES[name].behind:
                yield f"neigh add {address(role, family)} lladdr {WIRES[name].behind[role]} dev {name} nud permanent"


@contextlib.contextmanager
def laboratory(artifact: Artifact, sizes: Mapping[str, int] | None = None) -> Iterator[Lab]:
    """The programs and the devices; skips where this kernel's test run of XDP programs knows no devices."""
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(devices())
        node = Loaded(artifact, {**SIZES, **(sizes or {})}, programs=("tc_ingress", "tc_egress", "xdp_ingress"))
        stack.callback(node.close)
        with namespaces.inside(namespace):
            lab = Lab(node, namespace, {name: socket.if_nametoindex(name) for name in WIRES})
            # A veth's receive queue can be named once it has an XDP program: any but ours, which would count.
            code = assemble(move(0, XDP_PASS), EXIT)
            passing = program_calls.prog_load(PROG_TYPE_XDP, code, "passing", _XDP_ATTACH)
            stack.callback(os.close, passing)
            for name, index in lab.index.items():
                if name == "tag7":
                    continue  # its frames come by up0
                link = program_calls.link_create(passing, index, _XDP_ATTACH, _IN_THE_DRIVER)
                stack.callback(os.close, link)
            try:
                lab.xdp(bytes(64))
            except OSError as error:
                assert error.errno == errno.EINVAL
                pytest.skip("this kernel's test run of XDP programs takes no device")
        yield lab
