"""A web server on a loopback address that answers as a test says, and certificates for it.

Rules of this file: nothing of the package under test. Each test says what is answered as a function of the exchange;
all requests are noted. A server has a port of its own choice and is gone with the block that it was made for; answers
that wait, wait on `Exchange.until_over`.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One request; the names of headers are written in Title-Case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Exchange:
    """One request and the means to answer it."""

    def __init__(self, handler: _Handler, seen: Seen) -> None:
        self._handler = handler
        self.seen = seen

    def answer(self, status: int, body: bytes = b"", content_type: str = "application/json", **headers: str) -> None:
        """A whole answer."""
        self.head(status, content_type, Content_Length=str(len(body)), **headers)
        self.raw(body)

    def json(self, status: int, document: object, **headers: str) -> None:
        body = json.dumps(document).encode()
        if headers.get("Content_Encoding") == "gzip":
            body = gzip.compress(body)
        self.answer(status, body, **headers)

    def status(self, code: int, reason: str, message: str, **details: object) -> None:
        """A Status object, as the API server refuses with."""
        self.json(
            code,
            {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details},
        )

    def head(self, status: int, content_type: str = "application/json", **headers: str) -> None:
        """The beginning of an answer; underscores in names are dashes."""
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()

    def chunk(self, data: bytes) -> None:
        """One chunk of a body that was begun with Transfer_Encoding="chunked"; an empty one ends it."""
        self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def raw(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self._handler.wfile.flush()

    def cut(self) -> None:
        """The connection ends after what has been written."""
        self._handler.close_connection = True

    def tunnel(self, port: int) -> None:
        """As a proxy: everything from now on goes to and fro between the client and another server."""
        self.raw(b"HTTP/1.1 200 Connection established\r\n\r\n")
        client = self._handler.connection
        with socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS) as server:
            other = {client: server, server: client}
            while True:
                for ready in select.select(list(other), (), (), PATIENCE_SECONDS)[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return self.cut()
                    other[ready].sendall(data)

    def until_over(self) -> None:
        """Say nothing more until the test is over."""
        self._handler.web.over.wait(PATIENCE_SECONDS)
        self.cut()


Answer: TypeAlias = Callable[[Exchange], None]


@dataclass
class Web:
    """A server at work."""

    url: str
    answer: Answer
    context: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    connections: int = 0

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    web: Web

    def setup(self) -> None:
        self.web.connections += 1
        self.request.settimeout(PATIENCE_SECONDS)
        if self.web.context is not None:
            self.request = self.web.context.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        # The server closes the socket that it accepted, which TLS has taken over from.
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = Seen(self.command, self.path, {name.title(): value for name, value in self.headers.items()}, body)
        self.web.seen.append(seen)
        self.web.answer(Exchange(self, seen))

    do_GET = do_POST = do_PATCH = do_CONNECT = _serve

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is what many tests are about


@contextlib.contextmanager
def web(answer: Answer, context: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> Iterator[Web]:
    """A server for the block."""
    handler = type("Handler", (_Handler,), {})
    server = _Server((address, 0), handler)
    scheme = "http" if context is None else "https"
    found = Web(f"{scheme}://{address}:{server.server_address[1]}", answer, context)
    handler.web = found  # type: ignore[attr-defined]
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


# ---- Certificates ----


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA of a test's own, in a directory of its own."""

    directory: Path
    name: str

    @property
    def path(self) -> Path:
        return self.directory / f"{self.name}.crt"

    @property
    def pem(self) -> str:
        return self.path.read_text()

    def issue(self, name: str, alternatives: str = "", *, days: int = 30) -> tuple[Path, Path]:
        """A certificate and its key, for the subject `name` and the names in `alternatives` ("IP:127.0.0.1,DNS:x").
        With -1 `days` it ended yesterday."""
        certificate, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternatives}\n" if alternatives else "")
        _openssl("req", "-newkey", *_EC, "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}/O=system")
        signed_by = ("-CA", self.path, "-CAkey", self.directory / f"{self.name}.key", "-set_serial", "2")
        _openssl(
            "x509", "-req", "-in", request, *signed_by, "-out", certificate, "-days", days, "-extfile", extensions
        )  # fmt: skip
        return certificate, key

    def server(self, alternatives: str = "IP:127.0.0.1", **more: int) -> ssl.SSLContext:
        """What a server by these names speaks TLS with."""
        certificate, key = self.issue("server", alternatives, **more)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context


_EC = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def authority(directory: Path, name: str = "ca") -> Authority:
    made = Authority(directory, name)
    _openssl(
        "req", "-x509", "-newkey", *_EC, "-nodes", "-keyout", directory / f"{name}.key", "-out", made.path, "-days", 30,
        "-subj", f"/CN={name}",
    )  # fmt: skip
    return made


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=PATIENCE_SECONDS)
