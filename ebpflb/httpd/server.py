"""The ports that are answered on, and the one thread that answers on all of them.

Rules of this file: ports are opened in the caller's thread, where it hears of a failure, and can be opened again when
`close` returns; all else happens in the server's thread, which is told by a queue and an eventfd. That thread ends when
it is asked to; should it end otherwise, `failure` has the reason.

What an address means is Go's net.Listen, which kube-proxy's users know: "", "0.0.0.0" and "::" are all the same
without a family, namely every address of both (a node with IPv6 alone is reached at the default 0.0.0.0:10256), and
with a family every address of that one.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ebpflb.httpd.clients import Client, Clients, Limits
from ebpflb.httpd.exchange import Handler
from ebpflb.model import Address, Family

log = logging.getLogger("ebpflb.http")

_BACKLOG = 1024
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_DESCRIPTORS_SECONDS = 0.05
_QUIET_SECONDS = 60.0
_JOIN_SECONDS = 5.0
_WILDCARDS = ("", "0.0.0.0", "::")


class Listening:
    """An open port; `address` and `port` as the kernel says them."""

    __slots__ = ("address", "handler", "port", "socket")

    def __init__(self, sock: socket.socket, handler: Handler) -> None:
        self.socket = sock
        self.handler = handler
        name = sock.getsockname()
        self.address: Address = name[0]
        self.port: int = name[1]


class HttpServer:
    """Answers on any number of ports. `listen` and `close` may be called from any thread, before `start` too.

    `clock` counts seconds from anywhere and is never set back. Should the thread end unasked, `failure` says why, and
    its ports are closed, so that a prober is refused rather than kept waiting.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        limits: Limits | None = None,
    ) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._clients = Clients(self._selector, clock, limits or Limits())
        self._open: set[Listening] = set()
        self._failure = ""
        self._quiet_until = clock()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._lock = threading.Lock()  # of what follows
        self._asked: deque[tuple[Callable[[Listening], None], Listening]] = deque()
        self._stopping = False
        self._ended = False

    # ---- For any thread ----

    def start(self) -> None:
        """Begin to answer. Once."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._ended

    @property
    def failure(self) -> str:
        """Why it answers no more though nobody asked it to stop, in one line; "" while all is well."""
        return self._failure

    def listen(self, address: Address, port: int, handler: Handler, *, family: Family | None = None) -> Listening:
        """Answer on a port (0 for any free one) of `address`; for every address (see the top of this file), of
        `family` alone if that is given. Raises OSError: EADDRINUSE, EADDRNOTAVAIL, EACCES, EAFNOSUPPORT, …"""
        listening = Listening(_listening_socket(address, port, family), handler)
        if not self._ask(self._admit, listening):
            listening.socket.close()
            raise OSError(errno.ESHUTDOWN, "the HTTP server has ended")
        return listening

    def close(self, listening: Listening) -> None:
        """Stop answering on a port and cut its connections. May be called again."""
        with suppress(OSError):
            # The port is free with this; the descriptor is left to the thread, which may just be using it.
            listening.socket.shutdown(socket.SHUT_RDWR)
        if not self._ask(self._forget, listening):
            listening.socket.close()

    def stop(self) -> None:
        """Close everything and end the thread. May be called again, and without `start`."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            if not self._ended:
                os.eventfd_write(self._wake, 1)
        if self._thread.ident is None:
            self._end()
        else:
            self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._selector.close()
            os.close(self._wake)

    def _ask(self, act: Callable[[Listening], None], listening: Listening) -> bool:
        with self._lock:
            if self._ended:
                return False
            self._asked.append((act, listening))
            os.eventfd_write(self._wake, 1)
            return True

    # ---- The thread ----

    def _run(self) -> None:
        # The main thread's select is to end by a signal, not this one's.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:
            reason = f"the HTTP server ended: {type(error).__name__}: {error}".replace("\n", " ")
            log.critical("%s; health and metrics are not answered any more", reason)
            log.debug("the HTTP server ended", exc_info=True)
            self._failure = reason
            self._end()
        else:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            left = {listening for _, listening in self._asked}
            self._asked.clear()
        for listening in left | self._open:
            listening.socket.close()
        self._open.clear()
        self._clients.drop_all()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._clients.patience()):
            if isinstance(key.data, Client):
                self._clients.attend(key.data, events)
            elif isinstance(key.data, Listening):
                self._accept(key.data)
            else:
                os.eventfd_read(self._wake)
                self._do_what_was_asked()
        self._clients.expire()

    def _do_what_was_asked(self) -> None:
        while True:
            with self._lock:
                if not self._asked:
                    return
                act, listening = self._asked.popleft()
            act(listening)

    def _admit(self, listening: Listening) -> None:
        self._open.add(listening)
        self._selector.register(listening.socket, selectors.EVENT_READ, listening)

    def _forget(self, listening: Listening) -> None:
        if listening in self._open:
            self._open.remove(listening)
            self._selector.unregister(listening.socket)
            listening.socket.close()
            self._clients.drop_of(listening)

    def _accept(self, listening: Listening) -> None:
        # One at a time, because the port is readable: the kernel wants a descriptor before it says that nobody waits.
        try:
            sock, _address = listening.socket.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._make_room(error)
            # Else it was the client's fault (ECONNABORTED), or the port has just been closed (EINVAL, EBADF).
            return
        sock.setblocking(False)
        self._clients.take(sock, listening, listening.handler)

    def _make_room(self, error: OSError) -> None:
        now = self._clock()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_SECONDS
            log.error("a client cannot be answered: %s; raise the limit of open files", error.strerror)
        if not self._clients.drop_idlest():
            time.sleep(_NO_DESCRIPTORS_SECONDS)  # the port stays readable: this would be a busy loop


def _listening_socket(address: Address, port: int, family: Family | None) -> socket.socket:
    if address not in _WILDCARDS:
        return _bound(socket.AF_INET6 if ":" in address else socket.AF_INET, address, port)
    if family is Family.IPV4:
        return _bound(socket.AF_INET, "0.0.0.0", port)
    if family is Family.IPV6:
        return _bound(socket.AF_INET6, "::", port)
    try:
        return _bound(socket.AF_INET6, "::", port, both=True)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return _bound(socket.AF_INET, "0.0.0.0", port)  # a kernel without IPv6


def _bound(family: socket.AddressFamily, address: Address, port: int, *, both: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
