"""Connections to one address of the API server, each reused once its answer has been read.

Rules of this file: sockets and TLS, no HTTP semantics and no retry. A connection that dies in silence is noticed by the
kernel (keep-alive probes while it is idle, a limit on what stays unacknowledged while it is not) and by a deadline for
each read. Keys never touch a disk: OpenSSL reads them from a file in memory.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
from contextlib import suppress

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection, ProxyConfig
from urllib3.util import parse_url

from ebpflb.errors import UserError
from ebpflb.source.kube.access import Access, Address

CONNECT_SECONDS = 5.0
"""How long a connection and, again, its TLS handshake may take."""

# A peer that is gone is noticed after some 45 s, whether the connection is idle or has data on its way.
_IDLE_SECONDS = 15
_PROBE_SECONDS = 10
_PROBES = 3
_UNACKNOWLEDGED_MS = 45_000

SOCKET_OPTIONS: list[tuple[int, int, int | bytes]] = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS),
]

_MOST_IDLE = 4


def tls_context(access: Access) -> ssl.SSLContext:
    """How to speak TLS by `access`. Raises UserError for certificates that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not access.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif access.ca:
        try:
            context.load_verify_locations(cadata=access.ca)
        except (ssl.SSLError, ValueError):
            raise UserError(f"the CA of {access.ca_from} holds no certificate in PEM") from None
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if access.certificate:
        _load_pair(context, access)
    return context


def _load_pair(context: ssl.SSLContext, access: Access) -> None:
    memory = os.memfd_create("certificate")
    try:
        os.write(memory, f"{access.certificate}\n{access.key}".encode())
        # Without a password of its own, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(f"/proc/self/fd/{memory}", password=lambda: "")
    except (ssl.SSLError, OSError):
        raise UserError(f"{access.identity} and its key are not a pair in PEM") from None
    finally:
        os.close(memory)


class Live:
    """The sockets whose answers are being waited for or read, so that another thread can end them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    def add(self, each: socket.socket) -> None:
        with self._lock:
            self._sockets.add(each)
            if self._ended:
                _shut(each)

    def discard(self, each: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(each)

    def end(self) -> None:
        """Every read and write on them ends now, and so will it on all that are added later."""
        with self._lock:
            self._ended = True
            for each in self._sockets:
                _shut(each)


class _Opening:
    """A connection that is coming about: its socket may be ended before there is a connection that has one."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._handle: socket.socket | None = None

    def socket_to(self, host: str, port: int, timeout: float) -> socket.socket:
        """Connected to the first of the host's addresses that lets us. Raises OSError."""
        refused: OSError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if self._live.ended:
                break
            found = socket.socket(family, kind, protocol)
            try:
                self._hold(found)
                for option in SOCKET_OPTIONS:
                    found.setsockopt(*option)
                found.settimeout(timeout)
                found.connect(where)
                return found
            except OSError as error:
                refused = error
                found.close()
        raise refused

    def _hold(self, each: socket.socket) -> None:
        self.over()
        # A second descriptor, since TLS takes the first one over and shows it only once it has shaken hands.
        self._handle = each.dup()
        self._live.add(self._handle)

    def over(self) -> None:
        """It has come about, or never will."""
        if self._handle is not None:
            self._live.discard(self._handle)
            self._handle.close()
            self._handle = None


class _Plain(HTTPConnection):
    opening: _Opening

    def _new_conn(self) -> socket.socket:
        return self.opening.socket_to(self._dns_host, self.port, CONNECT_SECONDS)


class _Tls(HTTPSConnection):
    opening: _Opening

    def _new_conn(self) -> socket.socket:
        return self.opening.socket_to(self._dns_host, self.port, CONNECT_SECONDS)


def _shut(each: socket.socket) -> None:
    # Not SSLSocket's own, which takes the TLS state away from under the reading thread.
    with suppress(OSError):
        socket.socket.shutdown(each, socket.SHUT_RDWR)


class Connections:
    """Those to one address. Any thread may call any method."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, live: Live) -> None:
        self.address = address
        self._context = context
        self._live = live
        self._lock = threading.Lock()
        self._idle: list[HTTPConnection] = []
        self._closed = False
        parts = parse_url(address.url)
        self._host = (parts.host or "").strip("[]")
        self._port = parts.port or (443 if address.tls else 80)
        self._path = (parts.path or "").rstrip("/")

    def idle(self) -> HTTPConnection | None:
        """One that is connected and still good as far as can be seen."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                found = self._idle.pop()
            if found.is_connected:
                return found
            found.close()

    def connect(self) -> HTTPConnection:
        """A new one, connected. Raises what urllib3 and ssl raise."""
        connection = self._new()
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        finally:
            connection.opening.over()
        return connection

    def keep(self, connection: HTTPConnection) -> None:
        """Take back one whose answer has been read to its end."""
        with self._lock:
            if connection.sock is not None and not self._closed and len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """No idle one is left, and none is kept any more."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()

    def target(self, path: str, query: str) -> str:
        """What stands in the request line."""
        target = self._path + path + (f"?{query}" if query else "")
        if self.address.proxy and not self.address.tls:
            origin = self.address.url.removesuffix(self._path) if self._path else self.address.url
            return origin + target
        return target

    def headers(self) -> dict[str, str]:
        """Those that only this address needs."""
        if self.address.proxy and not self.address.tls:
            return _proxy_headers(self.address.proxy)
        return {}

    def _new(self) -> _Plain | _Tls:
        connection = self._made()
        connection.opening = _Opening(self._live)
        return connection

    def _made(self) -> _Plain | _Tls:
        proxy = parse_url(self.address.proxy) if self.address.proxy else None
        host, port = self._host, self._port
        if proxy is not None:
            host, port = (proxy.host or "").strip("[]"), proxy.port or (443 if proxy.scheme == "https" else 80)
        if self._context is None:
            return _Plain(host, port, timeout=CONNECT_SECONDS)
        trust = ssl.create_default_context() if proxy is not None and proxy.scheme == "https" else None
        connection = _Tls(
            host,
            port,
            timeout=CONNECT_SECONDS,
            ssl_context=self._context,
            server_hostname=self.address.server_name or None,
            proxy=proxy,
            proxy_config=ProxyConfig(trust, False, None, None) if proxy is not None else None,
        )
        if proxy is not None:
            headers = _proxy_headers(self.address.proxy)
            connection.set_tunnel(self._host, self._port, headers=headers, scheme=proxy.scheme or "http")
        return connection


def _proxy_headers(proxy: str) -> dict[str, str]:
    auth = parse_url(proxy).auth
    if not auth:
        return {}
    return {str(name): str(value) for name, value in urllib3.make_headers(proxy_basic_auth=auth).items()}
