"""Ends connected UDP sockets whose backend has gone: no packet of theirs passes a program that could choose anew.

A UDP socket that called connect(2) was given a backend once and for all. When that backend goes, its datagrams go
nowhere, silently. SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY) makes the next call on such a socket fail with ECONNABORTED,
upon which resolvers and clients connect again. Unconnected sockets and TCP need no help.

Rules of this file: a courtesy that never delays or fails anything. It works in a thread of its own, because looking at
other network namespaces means entering them, and only a thread can do so alone. Only sockets that the `sockets` map
names as ours, by the kernel's cookie, are ended. What goes wrong is logged for debugging and forgotten.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from ebpflb.dataplane.bpf import map_calls
from ebpflb.dataplane.bpf.layouts import SOCKET_KEY, SOCKET_VALUE
from ebpflb.model import Protocol
from ebpflb.rtnetlink import Netlink

log = logging.getLogger(__name__)

_REVERSE = 1

_NETLINK_SOCK_DIAG = 4
_DIAG_BY_FAMILY, _DESTROY = 20, 21
_ESTABLISHED = 1 << 1
_ID_AT, _ID_SIZE, _COOKIE_AT = 4, 48, 40
_TIMEOUT_SECONDS = 2.0
_CLONE_NEWNET = 0x40000000


class Orphans:
    """`map` is the descriptor of `sockets`, `cgroup` the directory whose processes' sockets are translated."""

    def __init__(self, map: int, cgroup: Path) -> None:
        self._map = map
        self._cgroup = cgroup
        self._gone: set[int] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def end(self, backends: Iterable[int]) -> None:
        """Have the sockets of these backends, by id, ended soon; returns at once."""
        with self._lock:
            self._gone.update(backends)
            if self._gone and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._work, name="orphans", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for what has been asked for; then the descriptor is no longer used."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                gone, self._gone = self._gone, set()
                if not gone:
                    self._thread = None
                    return
            try:
                cookies = self._cookies(gone)
                if cookies:
                    ended = sum(_end_in(namespace, cookies) for namespace in self._namespaces())
                    log.debug("ended %d connected UDP sockets of backends that have gone", ended)
            except (OSError, struct.error) as error:
                log.debug("connected UDP sockets of backends that have gone were left alone: %s", error)

    def _cookies(self, gone: set[int]) -> set[int]:
        """The sockets that were given one of these backends, as far as the map still knows."""
        keys, values, _ = map_calls.lookup_all(self._map)
        found = set()
        rows = zip(SOCKET_KEY.iter_unpack(keys), SOCKET_VALUE.iter_unpack(values), strict=True)
        for (cookie, _, _, protocol, direction), (_, _, _, backend, _) in rows:
            if direction == _REVERSE and protocol == Protocol.UDP and backend in gone:
                found.add(cookie)
        return found

    def _namespaces(self) -> Iterator[int]:
        """Descriptors of the network namespaces of the cgroup's processes, this thread's own first, each once."""
        seen: set[int] = set()
        for process in ("self", *self._processes()):
            try:
                fd = os.open(f"/proc/{process}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # it has ended
            try:
                inode = os.fstat(fd).st_ino
                if inode not in seen:
                    seen.add(inode)
                    yield fd
            finally:
                os.close(fd)

    def _processes(self) -> Iterator[str]:
        for directory, _, _ in os.walk(self._cgroup):
            try:
                yield from Path(directory, "cgroup.procs").read_text().split()
            except OSError:
                continue  # the cgroup has gone, or is threaded


def _end_in(namespace: int, cookies: set[int]) -> int:
    """End the sockets of these cookies in one network namespace, which this thread enters; how many."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    ended = 0
    with contextlib.closing(Netlink(protocol=_NETLINK_SOCK_DIAG, timeout=_TIMEOUT_SECONDS)) as diag:
        for family in (socket.AF_INET, socket.AF_INET6):
            for identity in _connected(diag, family):
                if int.from_bytes(identity[_COOKIE_AT:], "little") in cookies:
                    ended += _destroy(diag, family, identity)
    return ended


def _connected(diag: Netlink, family: int) -> list[bytes]:
    """The kernel's identities (`struct inet_diag_sockid`) of all connected UDP sockets here; none where it cannot tell
    of this family's."""
    try:
        found = diag.dump(_DIAG_BY_FAMILY, _request(family, bytes(_ID_SIZE)))
    except FileNotFoundError:
        return []
    return [body[_ID_AT : _ID_AT + _ID_SIZE] for body in found]


def _destroy(diag: Netlink, family: int, identity: bytes) -> bool:
    """End one socket; False where it has gone or the kernel cannot."""
    try:
        diag.request(_DESTROY, 0, _request(family, identity))
    except TimeoutError:
        raise
    except OSError as error:
        log.debug("a connected UDP socket cannot be ended: %s", error.strerror)
        return False
    return True


def _request(family: int, identity: bytes) -> bytes:
    """A `struct inet_diag_req_v2`."""
    return struct.pack("=BBBBI48s", family, socket.IPPROTO_UDP, 0, 0, _ESTABLISHED, identity)
