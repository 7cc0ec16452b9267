"""An API server that knows nothing but what this node's proxy asks for, and is never what is waited for.

Rules of this file: a process of its own (`python -m bench.apiserver`), driven by the Orders of `bench.orders`, one at a
time. Bytes are made before they are asked for. It speaks as kube-apiserver does
to an HTTP/1.1 client: TLS, each event of a watch in a chunk of its own, pages compressed, `continue` tokens, streaming
lists closed by the bookmark that ends them, 410 for what it has forgotten. What it does not do: selectors (all that it
has is meant for everybody), authentication, protobuf, consistency of pages under writes.

When a change was written is when its bytes were about to be handed to the kernel, on the clock that all processes of a
machine share (`time.monotonic`), so that no latency is measured too short.
"""

from __future__ import annotations

import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

import msgspec

from bench.apistate import Cluster, Resource
from bench.orders import Answer, Asked, Bookmark, Change, Churn, Forget, Order, Requests

# kube-apiserver's: what it writes to a connection at once, the body from which on it compresses, its chunks of that.
_RECORD, _COMPRESSED_FROM, _COMPRESSED_CHUNK = 4096, 128 * 1024, 2048

# ---- One connection ----


class _Connection(threading.Thread):
    """Requests of one client, one after the other. Once a watch has been granted, this thread only waits for its end:
    whoever changes the cluster writes to it."""

    def __init__(self, cluster: Cluster, plain: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(daemon=True)
        self._cluster = cluster
        self._socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self._socket.settimeout(60)
        self._read = b""

    def run(self) -> None:
        with suppress(OSError), self._socket:
            self._socket.do_handshake()
            while self._answer():
                pass

    def cut(self) -> None:
        """End it from another thread: not SSLSocket's own shutdown, which takes the state away from under us."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def chunk(self, *lines: bytes) -> None:
        """Each in a chunk of its own."""
        self._send(b"".join([b"%x\r\n%s\r\n" % (len(line), line) for line in lines]))

    def _send(self, data: bytes) -> None:
        with memoryview(data) as view:
            for start in range(0, len(data), _RECORD):
                self._socket.sendall(view[start : start + _RECORD])

    def _answer(self) -> bool:
        """Answer one request; whether there may be another."""
        while b"\r\n\r\n" not in self._read:
            data = self._socket.recv(65536)
            if not data:
                return False
            self._read += data
        at = time.monotonic()
        head, _, self._read = self._read.partition(b"\r\n\r\n")
        first, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        length = int(headers.get("content-length", "0"))
        while len(self._read) < length:
            self._read += self._socket.recv(65536)
        body, self._read = self._read[:length], self._read[length:]
        method, target, _ = first.split(" ")
        if method != "GET":
            self._whole(201, body)
            return True
        url = urlsplit(target)
        if url.path.startswith("/api/v1/nodes/"):
            self._whole(200, self._cluster.resources["/api/v1/nodes"].one())
            return True
        resource = self._cluster.resources.get(url.path)
        if resource is None:
            self._refuse(404, "NotFound")
            return True
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        return self._of(resource, query, "gzip" in headers.get("accept-encoding", ""), at)

    def _of(self, resource: Resource, query: dict[str, str], compressed: bool, at: float) -> bool:
        cluster = self._cluster
        if "watch" not in query:
            limit = int(query.get("limit", "0"))
            with cluster.lock:
                plain, small = resource.page(int(query.get("continue", "0")), limit, cluster.revision)
            verb = "look" if limit == 1 else "page" if "continue" in query else "list"
            if compressed and len(plain) >= _COMPRESSED_FROM:
                self._begin("Content-Encoding: gzip\r\n")
                parts = range(0, len(small), _COMPRESSED_CHUNK)
                self.chunk(*(small[start : start + _COMPRESSED_CHUNK] for start in parts))
                self._send(b"0\r\n\r\n")
            else:
                self._whole(200, plain)
        elif "sendInitialEvents" in query:
            if not cluster.streams:
                self._refuse(422, "Invalid")
                return True
            verb = "stream"
            with cluster.lock:
                lines, revision = resource.lines(), cluster.revision
            self._begin()
            for some in _batches(lines, 64):
                self.chunk(*some)
            self._watched(resource, revision, [resource.bookmark(revision, initial=True)])
        else:
            verb = "watch"
            revision = int(query["resourceVersion"])
            if revision < cluster.oldest:
                self._refuse(410, "Expired")
                return True
            self._begin()
            self._watched(resource, revision, [])
        cluster.asked.append(Asked(at, resource.name, verb, time.monotonic()))
        if verb in ("watch", "stream"):
            self._await_end(resource)
            return False
        return True

    def _watched(self, resource: Resource, revision: int, lines: list[bytes]) -> None:
        """From now on whoever changes the cluster writes here; what was changed since `revision` is said now."""
        with self._cluster.lock:
            lines += [line for each, line in resource.history if each > revision]
            if lines:
                self.chunk(*lines)
            resource.watches.add(self)

    def _await_end(self, resource: Resource) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLRDHUP)
        poll.poll()
        with self._cluster.lock:
            resource.watches.discard(self)

    def _begin(self, more: str = "") -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{more}Transfer-Encoding: chunked\r\n\r\n"
        self._send(head.encode())

    def _whole(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._send(head.encode() + body)

    def _refuse(self, status: int, reason: str) -> None:
        said = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason}
        self._whole(status, msgspec.json.encode({**said, "message": reason}))


def _batches(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- The process ----


def serve(cluster: Cluster, certificate: str, key: str) -> int:
    """Listen on a port of 127.0.0.1 for as long as the process lives."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Connection(cluster, accepted, context).start()

    threading.Thread(target=accept, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def obey(cluster: Cluster, order: Order) -> Answer:
    """Carry out an order."""
    match order:
        case Change(number=number, address=address):
            return Answer(cluster.change(number, address))
        case Churn():
            return Answer(cluster.churn(order))
        case Bookmark():
            cluster.bookmark()
        case Forget():
            cluster.forget()
        case Requests():
            asked, cluster.asked = cluster.asked, []
            return Answer(time.monotonic(), requests=tuple(asked))
    return Answer(time.monotonic())


def main() -> None:
    services, endpoints, streams, certificate, key = sys.argv[1:]
    cluster = Cluster(int(services), int(endpoints), streams == "streams")
    out = sys.stdout.buffer
    decoder: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)

    def say(answer: Answer) -> None:
        out.write(msgspec.json.encode(answer) + b"\n")
        out.flush()

    say(Answer(time.monotonic(), serve(cluster, certificate, key)))
    for line in sys.stdin.buffer:
        say(obey(cluster, decoder.decode(line)))


if __name__ == "__main__":
    main()
