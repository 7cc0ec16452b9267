"""Real sockets under the socket programs, attached to a cgroup that holds nothing but them.

Rules of this file: two network namespaces of our own, the node's and a pod's, with every address on loopback, so that
no packet leaves either. A socket belongs for good to the cgroup and namespace it was made in: `tests/box/giver.py`
makes them inside, and the test uses them as its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf import program_calls
from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.dataplane.bpf.constants import CGROUP_HOOKS
from ebpflb.dataplane.bpf.facts import netns_cookie
from ebpflb.demo import namespaces
from tests.bpf.loaded import SIZES, Loaded
from tests.conftest import cgroup2
from tests.packets import ROLES, address

GIVER = Path(__file__).parents[1] / "box" / "giver.py"
ON_LOOPBACK = ("local", "local2", "node")
PATIENCE = 30.0


class Place:
    """One network namespace; `socket` makes a socket there, in the cgroup or outside of it."""

    def __init__(self, namespace: str, channel: socket.socket) -> None:
        self.namespace = namespace
        self._channel = channel

    def socket(self, family: int, protocol: str, *, in_cgroup: bool = True) -> socket.socket:
        """A fresh TCP or UDP socket with a time limit."""
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        domain = socket.AF_INET if family == 4 else socket.AF_INET6
        if in_cgroup:
            self._channel.send(f"{namespaces.path_of(self.namespace)} {int(domain)} {int(kind)}".encode())
            _, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
            assert self._channel.recv(1), "the helper that makes sockets has died"
            made = socket.socket(fileno=descriptors[0])
        else:
            with namespaces.inside(self.namespace):
                made = socket.socket(domain, kind)
        made.settimeout(PATIENCE)
        return made


class Lab:
    """Both namespaces, the cgroup, and the programs attached to it. Sockets made by `client` and `server` are closed
    by `close_sockets`."""

    def __init__(self, loaded: Loaded, node: Place, pod: Place, cgroup: int) -> None:
        self.loaded, self.node, self.pod, self.cgroup = loaded, node, pod, cgroup
        self._open: list[socket.socket] = []

    def put_settings(self, **values: int) -> None:
        """The settings of a node whose namespace is `node`."""
        with namespaces.inside(self.node.namespace):
            cookie = netns_cookie()
        assert cookie is not None, "this kernel has no namespace cookies (Linux 5.14)"
        self.loaded.put_settings(netns=cookie, **values)

    def close_sockets(self) -> None:
        for each in self._open:
            each.close()
        self._open = []

    def client(
        self, family: int, protocol: str, place: Place | None = None, *, in_cgroup: bool = True
    ) -> socket.socket:
        """A socket that will ask."""
        made = (place or self.node).socket(family, protocol, in_cgroup=in_cgroup)
        self._open.append(made)
        return made

    def server(self, role: str, port: int, family: int, protocol: str, place: Place | None = None) -> socket.socket:
        """A bound (and listening) socket."""
        made = self.client(family, protocol, place)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address(role, family), port))
        if protocol == "tcp":
            made.listen()
        return made

    def reached(self, server: socket.socket, client: socket.socket) -> bool:
        """Whether the server hears what the client, which has connected, says."""
        client.send(b"hello")
        if server.type == socket.SOCK_DGRAM:
            return server.recv(100) == b"hello"
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE)
            return connection.recv(100) == b"hello"

    def heard(self, servers: Sequence[socket.socket], count: int) -> list[socket.socket]:
        """Who of the servers, which are datagram sockets, has heard `count` datagrams: each once for each. What was
        sent may be on its way for a moment, also on loopback."""
        heard: list[socket.socket] = []
        while len(heard) < count:
            ready, _, _ = select.select(servers, [], [], PATIENCE)
            assert ready, f"{len(heard)} of {count} datagrams were heard"
            for server in ready:
                server.recv(100)
            heard += ready
        assert not select.select(servers, [], [], 0)[0], "more was heard than was said"
        return heard


@contextlib.contextmanager
def sockets_laboratory(artifact: Artifact) -> Iterator[Lab]:
    """The namespaces, the cgroup and the programs, all gone at the end; skips where there is no cgroup2."""
    hierarchy = cgroup2()
    if hierarchy is None:
        pytest.skip("no cgroup2 hierarchy is mounted")
    name = f"eb-sock-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        for namespace in (f"{name}-node", f"{name}-pod"):
            namespaces.create(namespace)
            stack.callback(namespaces.delete, namespace)
            lines = []
            for role in ON_LOOPBACK:
                v4, v6 = ROLES[role]
                lines += [f"addr add {v4}/32 dev lo", f"addr add {v6}/128 dev lo nodad"]
            namespaces.ip(namespace, lines)
        directory = hierarchy / name
        directory.mkdir()
        stack.callback(directory.rmdir)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(ours.close)
        with theirs:
            command = 'echo 0 >"$0/cgroup.procs" && exec "$@"'
            argv = ["sh", "-c", command, str(directory), sys.executable, "-S", "-E", str(GIVER), str(theirs.fileno())]
            giver = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
        stack.callback(giver.wait, PATIENCE)
        stack.callback(ours.shutdown, socket.SHUT_RDWR)
        cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, cgroup)
        loaded = Loaded(artifact, {**SIZES, "sockets": 4096}, CGROUP_HOOKS)
        stack.callback(loaded.close)
        stack.enter_context(attached(loaded, cgroup))
        yield Lab(loaded, Place(f"{name}-node", ours), Place(f"{name}-pod", ours), cgroup)


@contextlib.contextmanager
def attached(loaded: Loaded, cgroup: int) -> Iterator[None]:
    """All socket programs at the cgroup, until the block ends."""
    links = []
    try:
        for name, hook in CGROUP_HOOKS.items():
            links.append(program_calls.link_create(loaded.programs[name], cgroup, hook.attach_type))
        yield
    finally:
        for link in links:
            os.close(link)
