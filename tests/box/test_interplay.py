"""Others with BPF programs attached at the same hooks: both work."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ebpflb.dataplane.bpf import program_calls, syscall, tcx
from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Node
from tests.box.box import SLO, Box
from tests.box.clients import Answer, Target

pytestmark = [pytest.mark.box, pytest.mark.dataplanes("bpf")]

FORBIDDEN = 4711
PROG_TYPE_SCHED_CLS = 3
PROG_TYPE_CGROUP_SOCK_ADDR = 18
CGROUP_INET4_CONNECT = 10
TCX_INGRESS = 46


def forbid_a_port() -> bytes:
    """r0 = ctx->user_port != FORBIDDEN: a program of somebody else that refuses one port and lets all else be."""
    port = socket.htons(FORBIDDEN)
    instructions = (
        (0x61, 0x12, 24, 0),  # r2 = *(u32 *)(r1 + 24): user_port
        (0xB7, 0x00, 0, 1),  # r0 = 1
        (0x55, 0x02, 1, port),  # if r2 != port, leave it so
        (0xB7, 0x00, 0, 0),  # r0 = 0
        (0x95, 0x00, 0, 0),
    )
    return b"".join(struct.pack("<BBhi", *each) for each in instructions)


def drop_a_port(family: str) -> bytes:
    """A tc program of somebody else that drops what is sent to one port, and passes on all else."""
    offset = 14 + {"ipv4": 20, "ipv6": 40}[family] + 2
    instructions = (
        (0xBF, 0x16, 0, 0),  # r6 = r1
        (0x28, 0x00, 0, offset),  # r0 = ntohs(*(u16 *)(packet + offset)), or the program ends with 0
        (0x55, 0x00, 2, FORBIDDEN),  # if r0 != FORBIDDEN, on
        (0xB7, 0x00, 0, 2),  # r0 = TC_ACT_SHOT
        (0x95, 0x00, 0, 0),
        (0xB7, 0x00, 0, -1),  # r0 = TC_ACT_UNSPEC
        (0x95, 0x00, 0, 0),
    )
    return b"".join(struct.pack("<BBhi", *each) for each in instructions)


@contextmanager
def somebody_elses_program(node: Node) -> Iterator[None]:
    program = program_calls.prog_load(PROG_TYPE_CGROUP_SOCK_ADDR, forbid_a_port(), "somebody", CGROUP_INET4_CONNECT)
    cgroup = os.open(node.node_cgroup, os.O_RDONLY | os.O_DIRECTORY)
    link = program_calls.link_create(program, cgroup, CGROUP_INET4_CONNECT)
    try:
        yield
    finally:
        for descriptor in (link, cgroup, program):
            os.close(descriptor)


def test_another_cgroup_program(box: Box) -> None:
    web = box.service("b1")
    node = box.cluster.nodes["node1"]
    with somebody_elses_program(node):
        before = box.kernel.counters("node1")["socket_forwarded"]
        box.expect("a1", to=web.cluster_ip("ipv4")).reaches("b1")
        box.check()
        assert box.kernel.counters("node1")["socket_forwarded"] > before
        got = box.clients.ask(box.place("a1"), Target(box.address("b1", "ipv4"), FORBIDDEN), "TCP")
        assert str(got) == "not permitted", got
    got = box.clients.ask(box.place("a1"), Target(box.address("b1", "ipv4"), FORBIDDEN), "TCP")
    assert str(got) == "refused"


@contextmanager
def held_back(box: Box, node: str) -> Iterator[None]:
    """The daemon stands still within the block, and hears of everything after it."""
    daemon = box.cluster.nodes[node].daemon
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)  # to be sent a signal is not to have had it
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


@pytest.mark.parametrize("where", ["tcx", "clsact"])
@pytest.mark.parametrize("first", ["theirs_first", "ours_first"])
def test_another_packet_program(box: Box, family: str, first: str, where: str) -> None:
    """Theirs drops one port on its way in; ours serves the rest, whoever came first."""
    if where == "tcx" and not tcx.supported():
        where = "clsact"
    preference = 1 if first == "theirs_first" else 50_000
    web = box.service("b1")
    node = box.cluster.nodes["node1"]
    device = "veth-shared"
    pin = box.cluster.bpffs / "somebody"
    program = program_calls.prog_load(PROG_TYPE_SCHED_CLS, drop_a_port(family), "somebody")
    syscall.obj_pin(program, str(pin))

    def attach_theirs() -> None:
        if where == "tcx":
            with namespaces.inside(node.namespace):
                program_calls.prog_attach(program, socket.if_nametoindex(device), TCX_INGRESS)
            return
        # Where ours runs as a filter too, it has made the qdisc, unless theirs came first.
        box.cluster.run(node, ["tc", "qdisc", "add", "dev", device, "clsact"])
        place = ["dev", device, "ingress", "pref", str(preference)]
        done = box.cluster.run(node, ["tc", "filter", "add", *place, "bpf", "direct-action", "object-pinned", str(pin)])
        assert done.returncode == 0, done.stderr

    try:
        if first == "theirs_first":
            with held_back(box, "node1"):
                pod = box.cluster.add_pod("node1", "shared", sandboxed=True)
                attach_theirs()
        else:
            pod = box.cluster.add_pod("node1", "shared", sandboxed=True)
        served_soon(box, "shared", web.cluster_ip(family))
        if first == "ours_first":
            attach_theirs()
        box.expect("shared", to=web.cluster_ip(family)).reaches("b1").sees_source("shared")
        box.check()
        forbidden = box.direct("b1", family)._replace(port=FORBIDDEN)
        assert str(box.clients.ask(pod, forbidden, "UDP", patience=0.3)) == "silence"
        assert str(box.clients.ask(pod, forbidden._replace(port=FORBIDDEN + 1), "UDP")) == "refused"
    finally:
        box.cluster.remove_pod("shared")
        pin.unlink()
        os.close(program)


def served_soon(box: Box, client: str, to: Target) -> None:
    """Wait until a new device's packets are translated."""
    deadline = time.monotonic() + SLO
    while not isinstance(got := box.clients.ask(box.place(client), to, "UDP", patience=0.1), Answer):
        assert time.monotonic() < deadline, got
