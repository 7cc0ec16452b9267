"""Every constant that Python and C share, named once: `bpf/config.h` refuses to compile without each of them.

Rules of this file: pure; values come from `ebpflb.routes` where there is an enum, and are named here otherwise. What is
not in `definitions` does not reach the C code.
"""

from __future__ import annotations

import dataclasses

from ebpflb.routes import BackendState, Masquerade, Scope, Verdict

SOURCE_POD = 1
"""Bit of a `sources` row: the address is a local pod's."""
SOURCE_NODE = 2
"""Bit of a `sources` row: the address is this node's own."""

DEVICE_POD = 1
"""Bit of a `devices` row: what enters by the device is a local pod's."""
DEVICE_CLSACT = 2
"""Bit of a `devices` row that only the control plane reads: we made the device's clsact qdisc."""
DEVICE_XDP = 4
"""Bit of a `devices` row: our XDP program runs there, and may send back by it."""
DEVICE_REDIRECT = 8
"""Bit of a `devices` row: XDP of another device may send by it."""
DEVICE_BACK = 32
"""Bit of a `devices` row: what XDP sends back by the device it redirects there. On a veth whose other end has GRO but
no program, frames of XDP_TX wait for somebody else to wake that end (Linux' veth_xdp_flush)."""
DEVICE_PEER = 16
"""Bit of a `devices` row: a veth whose other end is another network namespace's, and on no bridge."""

POD_SOCKETS_IPV4 = 1
"""Bit of `settings.pod_sockets`: IPv4 sockets of other network namespaces count as pods'."""
POD_SOCKETS_IPV6 = 2
"""As POD_SOCKETS_IPV4, for IPv6."""

BACKEND_FREE = 255
"""State of a `backends` row that belongs to nobody; beside the values of `routes.BackendState`."""

PREFIX = "ebpflb_"
"""How the kernel's names of our programs and maps begin."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Capacities of the maps, in entries."""

    frontends: int = 65536
    backends: int = 262144
    slots: int = 1048576
    flows: int = 262144
    sockets: int = 65536
    fragments: int = 8192
    services: int = 65536
    sources: int = 4096
    ranges: int = 65536
    devices: int = 4096
    owned: int = 65536
    tables: int = 65536
    clients: int = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class Hook:
    """Where a program runs. `type` and `attach_type` are the kernel's BPF_PROG_TYPE_… and BPF_… attach type (0 where
    the type has none); `kernel_name` is what bpftool shows, at most 15 characters."""

    type: int
    attach_type: int
    kernel_name: str


PROG_TYPE_SCHED_CLS = 3
PROG_TYPE_XDP = 6
PROG_TYPE_CGROUP_SOCK_ADDR = 18

CGROUP_HOOKS: dict[str, Hook] = {
    "connect4": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 10, PREFIX + "connect4"),
    "connect6": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 11, PREFIX + "connect6"),
    "sendmsg4": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 14, PREFIX + "sendmsg4"),
    "sendmsg6": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 15, PREFIX + "sendmsg6"),
    "recvmsg4": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 19, PREFIX + "recvmsg4"),
    "recvmsg6": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 20, PREFIX + "recvmsg6"),
    "getpeername4": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 29, PREFIX + "getpeer4"),
    "getpeername6": Hook(PROG_TYPE_CGROUP_SOCK_ADDR, 30, PREFIX + "getpeer6"),
}
"""Our cgroup programs, by the name of their C function."""

TC_HOOKS: dict[str, Hook] = {
    "tc_ingress": Hook(PROG_TYPE_SCHED_CLS, 0, PREFIX + "ingress"),
    "tc_egress": Hook(PROG_TYPE_SCHED_CLS, 0, PREFIX + "egress"),
}
"""Our tc programs, by the name of their C function."""

XDP_HOOKS: dict[str, Hook] = {"xdp_ingress": Hook(PROG_TYPE_XDP, 37, PREFIX + "xdp")}
"""Our XDP program, by the name of its C function."""


def hook(function: str) -> Hook:
    """Where the C function `function` runs, told by its name: one of ours, or any `tc_…` or `xdp_…`.

    Raises KeyError for another name.
    """
    known = CGROUP_HOOKS.get(function) or TC_HOOKS.get(function) or XDP_HOOKS.get(function)
    if known:
        return known
    if function.startswith("tc_"):
        return Hook(PROG_TYPE_SCHED_CLS, 0, (PREFIX + function[3:])[:15])
    if function.startswith("xdp_"):
        return Hook(PROG_TYPE_XDP, 0, (PREFIX + function)[:15])
    raise KeyError(function)


def definitions(
    sizes: Sizes, *, set_retval: bool, count_traffic: bool = False, go_around: bool = False, xdp_frags: bool = False
) -> dict[str, int]:
    """Everything that `bpf/config.h` asks for, in its order.

    `set_retval`: the kernel has bpf_set_retval for sock_addr programs. `count_traffic`: what each Service carries is
    counted, which costs a look-up for each packet. `go_around`: flows between pods of this node go around the stack.
    `xdp_frags`: the kernel has XDP programs for packets of several buffers.
    """
    made = {f"MAX_{field.name.upper()}": getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    made |= {f"VERDICT_{verdict.name}": int(verdict) for verdict in Verdict}
    made |= {f"MASQUERADE_{masquerade.name}": int(masquerade) for masquerade in Masquerade}
    made |= {f"SCOPE_{scope.name}": int(scope) for scope in Scope}
    made |= {"SOURCE_POD": SOURCE_POD, "SOURCE_NODE": SOURCE_NODE}
    made |= {"DEVICE_POD": DEVICE_POD, "DEVICE_XDP": DEVICE_XDP, "DEVICE_REDIRECT": DEVICE_REDIRECT}
    made |= {"DEVICE_BACK": DEVICE_BACK}
    made |= {"DEVICE_PEER": DEVICE_PEER}
    made |= {"POD_SOCKETS_IPV4": POD_SOCKETS_IPV4, "POD_SOCKETS_IPV6": POD_SOCKETS_IPV6}
    made |= {f"BACKEND_{state.name}": int(state) for state in BackendState}
    made |= {"BACKEND_FREE": BACKEND_FREE, "HAVE_SET_RETVAL": int(set_retval), "COUNT_TRAFFIC": int(count_traffic)}
    made |= {"GO_AROUND": int(go_around), "HAVE_XDP_FRAGS": int(xdp_frags)}
    return made
