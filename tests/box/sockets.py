"""Sockets of any place of a cluster, for use in this process.

Rules of this file: a socket made here is in its place's namespace and cgroup (see giver.py), so that a test reads as
plain socket code and thousands of connections cost no process each.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType

from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Cluster, Place

_KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}


def family_of(address: str) -> socket.AddressFamily:
    """Of an address."""
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


class Sockets:
    """Makes them; one helper process for each cgroup, which ends with this object."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._channels: dict[Path, socket.socket] = {}

    def __enter__(self) -> Sockets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels.values():
            channel.close()

    def make(self, place: Place, family: socket.AddressFamily, protocol: str) -> socket.socket:
        """A fresh TCP or UDP socket of `place`."""
        if place.cgroup is None:
            with namespaces.inside(place.namespace):
                return socket.socket(family, _KINDS[protocol])
        with self._lock:
            channel = self._channels.get(place.cgroup) or self._start(place)
            words = (namespaces.path_of(place.namespace), int(family), int(_KINDS[protocol]))
            channel.send(" ".join(map(str, words)).encode())
            _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
            alone = channel.recv(1)
        if not alone:
            raise RuntimeError(f"the socket helper of {place.cgroup} has died")
        return socket.socket(fileno=descriptors[0])

    def _start(self, place: Place) -> socket.socket:
        assert place.cgroup is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).with_name("giver.py")
        argv = [sys.executable, "-S", "-E", str(script), str(theirs.fileno())]
        node = next(node for node in self._cluster.nodes.values() if node.node_cgroup == place.cgroup)
        self._cluster.spawn(node, argv, pass_fds=[theirs.fileno()])
        theirs.close()
        self._channels[place.cgroup] = ours
        return ours
