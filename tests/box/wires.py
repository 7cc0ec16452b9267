"""What the wires of a box need before XDP may run on a node's end of them.

A veth sends back what XDP gives it (XDP_TX) only to a peer that takes frames as XDP does: it runs a program itself, if
only one that passes everything. Checksums: see `Cluster`.
"""

from __future__ import annotations

import os

from ebpflb import rtnetlink
from ebpflb.dataplane.bpf import program_calls
from ebpflb.dataplane.bpf.assembly import EXIT, assemble, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_XDP
from ebpflb.demo import namespaces
from ebpflb.demo.network import port
from ebpflb.rtnetlink import XDP_FLAGS_DRV_MODE, Netlink, device_index, set_xdp

_ATTACH_TYPE = 37
_XDP_PASS = assemble(move(0, 2), EXIT)


def pass_everything(namespace: str, device: str, flags: int = XDP_FLAGS_DRV_MODE) -> None:
    """Run an XDP program on a device that lets every frame go on to the stack. It goes with the device, or by
    `run_nothing`. Raises OSError where another one runs."""
    program = program_calls.prog_load(
        PROG_TYPE_XDP, _XDP_PASS, "pass_everything", _ATTACH_TYPE, flags=program_calls.F_XDP_HAS_FRAGS
    )
    try:
        _set(namespace, device, program, flags | rtnetlink.XDP_FLAGS_UPDATE_IF_NOEXIST)
    finally:
        os.close(program)


def run_nothing(namespace: str, device: str, flags: int = XDP_FLAGS_DRV_MODE) -> None:
    """Take a device's XDP program away."""
    _set(namespace, device, -1, flags)


def programs_on(namespace: str, device: str) -> dict[int, int]:
    """The ids of the XDP programs that run on a device, by the way in which they do (XDP_DRIVER …)."""
    with namespaces.inside(namespace):
        netlink = Netlink()
        try:
            links = rtnetlink.links(netlink).values()
        finally:
            netlink.close()
    return dict(next(link.xdp for link in links if link.name == device))


def _set(namespace: str, device: str, program: int, flags: int) -> None:
    with namespaces.inside(namespace):
        netlink = Netlink()
        try:
            index = device_index(netlink, device)
            assert index is not None, device
            set_xdp(netlink, index, program, flags)
        finally:
            netlink.close()


def answer_xdp(fabric: str, nodes: int) -> None:
    """Let the fabric's ports take what XDP on the nodes sends back."""
    for number in range(1, nodes + 1):
        pass_everything(fabric, port(number))
