"""XDP programs as devices run them: whose they are, by which link, and how ours end.

Rules of this file: it knows no wishes and no pins. Ours is what bears our name, whoever attached it and wherever its
link is pinned; nothing else is ever touched.
"""

from __future__ import annotations

import os

from ebpflb import rtnetlink
from ebpflb.dataplane.bpf import program_calls
from ebpflb.dataplane.bpf.constants import PREFIX
from ebpflb.rtnetlink import Link, Netlink

FLAGS = {rtnetlink.XDP_DRIVER: rtnetlink.XDP_FLAGS_DRV_MODE, rtnetlink.XDP_GENERIC: rtnetlink.XDP_FLAGS_SKB_MODE}
"""What asks for each place of `Link.xdp`."""


def is_ours(link: Link) -> bool:
    """Whether what a device runs is ours."""
    return bool(link.xdp) and all(program_calls.program_name(program).startswith(PREFIX) for _, program in link.xdp)


def foreign(link: Link) -> str:
    """What stands in our way on a device, for an operator."""
    programs = ", ".join(f"{program_calls.program_name(program) or 'unnamed'}, id {program}" for _, program in link.xdp)
    return f"somebody else's XDP program runs there ({programs})"


def runs_on(fd: int, link: Link) -> bool:
    """Whether `fd` is a link by which a device runs a program."""
    info = program_calls.link_info(fd)
    return info.type == program_calls.LINK_XDP and info.device == link.ifindex


def find(link: Link) -> int | None:
    """A descriptor of the link by which a device runs its program, wherever that is pinned; None without one. A link
    tells its device's number, which other namespaces have too, and so it must tell the same program."""
    programs = {program for _, program in link.xdp}
    for number in program_calls.link_ids():
        try:
            fd = program_calls.link_by_id(number)
        except OSError:
            continue  # it has gone meanwhile
        if runs_on(fd, link) and program_calls.link_info(fd).program in programs:
            return fd
        os.close(fd)
    return None


def remove(netlink: Netlink, link: Link) -> None:
    """What a device runs ends. Raises OSError."""
    fd = find(link)
    if fd is not None:
        try:
            program_calls.link_detach(fd)
        finally:
            os.close(fd)
        return
    for place, program in link.xdp:
        expected = program_calls.program_by_id(program)
        try:
            flags = FLAGS.get(place, 0) | rtnetlink.XDP_FLAGS_REPLACE
            rtnetlink.set_xdp(netlink, link.ifindex, -1, flags, expected)
        finally:
            os.close(expected)


def namespace() -> tuple[int, int]:
    """Which network namespace this thread is in: the system call that makes a link takes that one."""
    found = os.stat("/proc/thread-self/ns/net")
    return found.st_dev, found.st_ino
