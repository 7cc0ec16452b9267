"""How a benchmark drives the API server of `bench.apiserver`, which is another process.

Rules of this file: one JSON document a line through its stdin and stdout, an Order in and an Answer out; what both must
agree on stands here. Times are of `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import msgspec

from bench.lab import CHECKOUT
from ebpflb.demo import namespaces
from ebpflb.errors import EbpflbError

LIVE = ("10.200.1.10", "10.200.1.11")
"""Where the one backend of the Service after the last may be: addresses that somebody can listen on."""


class Change(msgspec.Struct, frozen=True, tag=True):
    """Replace the last endpoint of the slice of Service `number` by one at `address`; the Service after the last has no
    other."""

    number: int
    address: str


class Churn(msgspec.Struct, frozen=True, tag=True):
    """Make changes 0 to `count` of `churned`, `rate` a second, and note in `file` (8 bytes for each: a double) when
    each was written."""

    file: str
    count: int
    rate: int


class Bookmark(msgspec.Struct, frozen=True, tag=True):
    """Send one to every watch."""


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Cut every connection and forget all history, as a server that was away for long."""


class Requests(msgspec.Struct, frozen=True, tag=True):
    """Tell what was asked since this was last ordered."""


Order: TypeAlias = Change | Churn | Bookmark | Forget | Requests


class Asked(msgspec.Struct, frozen=True):
    """One request: when (`time.monotonic`), of which resource, and `list`, `page`, `stream`, `watch` or `look`; when
    it was answered in full (a watch: granted)."""

    at: float
    resource: str
    verb: str
    done: float


class Answer(msgspec.Struct, frozen=True):
    """`at` is when what was ordered was written; `port` is said once, at the start."""

    at: float = 0.0
    port: int = 0
    requests: tuple[Asked, ...] = ()


def churned(turn: int, services: int, spread: int = 10_000) -> tuple[int, str]:
    """Which Service a churn's change `turn` is about, and its new address. Each of `spread` Services has its turn
    before the first has its next, and none has the same address twice in a row. One change in a hundred is about the
    Service that comes after all the others, whose one backend takes turns among LIVE."""
    if turn % 100 == 99:
        return services, LIVE[turn // 100 % len(LIVE)]
    return turn % spread * 7919 % services, f"10.254.{turn // spread % 250 + 1}.{turn % 250 + 1}"


class Written:
    """When each of a churn's `count` changes was written, 0.0 before: a file that both processes see as memory."""

    def __init__(self, file: str, count: int) -> None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(descriptor, 8 * count)
            self._memory = mmap.mmap(descriptor, 8 * count)
        finally:
            os.close(descriptor)
        self._times = memoryview(self._memory).cast("d")

    def __getitem__(self, turn: int) -> float:
        return self._times[turn]

    def __setitem__(self, turn: int, at: float) -> None:
        self._times[turn] = at

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._times.release()
        self._memory.close()


class ApiServer:
    """The server as a process in a network namespace. `kubeconfig` is what a client needs to reach it there."""

    def __init__(self, namespace: str, directory: Path, services: int, endpoints: int, *, streams: bool = True) -> None:
        certificate, key = directory / "apiserver.crt", directory / "apiserver.key"
        if not key.exists():
            _certify(certificate, key)
        how = "streams" if streams else "pages"
        argv = [sys.executable, "-m", "bench.apiserver", str(services), str(endpoints), how, str(certificate), str(key)]
        self._process = namespaces.spawn(
            namespace, None, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT
        )
        port = self._answer().port
        self.kubeconfig = directory / f"kubeconfig-{port}"
        self.kubeconfig.write_text(_kubeconfig(port, certificate.read_bytes()))

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, order: Order) -> Answer:
        """Have an order carried out."""
        self.begin(order)
        return self.end()

    def begin(self, order: Order) -> None:
        """Give an order, and do not wait: `end` does."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()

    def end(self) -> Answer:
        """The answer to the order that was begun."""
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EbpflbError(f"the API server ended with status {self._process.wait()}")
        return msgspec.json.decode(line, type=Answer)

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _certify(certificate: Path, key: Path) -> None:
    """A certificate for 127.0.0.1 that is its own authority."""
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    argv += ["-subj", "/CN=apiserver", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*argv, "-out", str(certificate), "-keyout", str(key)], check=True, capture_output=True)


def _kubeconfig(port: int, authority: bytes) -> str:
    cluster = {
        "server": f"https://127.0.0.1:{port}",
        "certificate-authority-data": base64.b64encode(authority).decode(),
    }
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": cluster}],
            "users": [{"name": "bench", "user": {"token": "of-nobody"}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
            "current-context": "bench",
        }
    )
