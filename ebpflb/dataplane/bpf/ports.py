"""Which ports masquerade may take: those that nothing else on this node is likely to.

Rules of this file: it only makes clashes rare; bpf/port.h finds them, one by one.
"""

from __future__ import annotations

from pathlib import Path

_LOWEST_PORT = 1024
_FEWEST_PORTS = 4096
_NODE_PORTS = (30000, 32767)
"""kube-apiserver's --service-node-port-range where nobody sets it, both inclusive."""


def snat_ports() -> tuple[int, int]:
    """The first and last port for masquerade: see `free_ports`; the ports of this network namespace's own sockets are
    those of net.ipv4.ip_local_port_range."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return free_ports(low, high)


def free_ports(low: int, high: int) -> tuple[int, int]:
    """The largest interval of 1024…65535 beside the ephemeral ports `low`…`high` and those that Kubernetes gives to
    node ports unless told otherwise: a Service that gets the port of a living flow gets its datagrams too (port.h).

    Where fewer than 4,096 are left there, the upper half of the ephemeral ports: a masqueraded flow and a socket of
    this node then collide only if both talk to the same backend by the same port.
    """
    free = [
        (first, last)
        for start, end in ((_LOWEST_PORT, low - 1), (high + 1, 65535))
        for first, last in ((start, min(end, _NODE_PORTS[0] - 1)), (max(start, _NODE_PORTS[1] + 1), end))
    ]
    first, last = max(free, key=lambda interval: interval[1] - interval[0])
    if last - first >= _FEWEST_PORTS - 1:
        return first, last
    return ((low + high + 1) // 2, high)
