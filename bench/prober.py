"""Connects to one Service again and again: `python -m bench.prober tally|follow ADDRESS PORT BACKEND…`.

Rules of this file: a process of its own, to be started where the Service is served. It listens on the backends'
addresses by itself, so that whatever fails is the way there, and each backend says its name. It ends with its stdin.
`tally` counts what fails, and says so at the end (a Tally); `follow` says whenever another backend answers than before
(a Reached each).
"""

from __future__ import annotations

import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

import msgspec

from bench.clusters import TARGET_PORT

_PAUSE, _PATIENCE = 0.005, 1.0

# Where nothing answers yet, nothing ever answers this attempt.
_FOLLOW_PAUSE, _FOLLOW_PATIENCE = 0.0005, 0.02


class Tally(msgspec.Struct, frozen=True):
    """Connections that came about, those that did not, and the first of the reasons."""

    made: int
    failed: int
    reason: str


class Reached(msgspec.Struct, frozen=True):
    """From when on (`time.monotonic`) this backend has answered."""

    at: float
    backend: str


def _accept(listeners: list[socket.socket]) -> None:
    selector = selectors.DefaultSelector()
    for listener in listeners:
        selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            with suppress(OSError):  # whoever gave up waiting
                accepted, _ = key.fileobj.accept()
                accepted.send(accepted.getsockname()[0].encode())
                accepted.close()


def _asked(address: str, port: int, patience: float) -> str:
    """Which backend answers. Raises OSError."""
    with socket.create_connection((address, port), patience) as connection:
        backend = connection.recv(64).decode()
    if not backend:
        raise OSError("a connection without an answer")
    return backend


def _tally(address: str, port: int, backends: list[str], ended: threading.Event) -> Tally:
    made, failed, reason = 0, 0, ""
    while not ended.wait(_PAUSE):
        try:
            if _asked(address, port, _PATIENCE) not in backends:
                raise OSError("an answer that is nobody's")
            made += 1
        except OSError as error:
            failed += 1
            reason = reason or str(error)
    return Tally(made, failed, reason)


def _follow(address: str, port: int, ended: threading.Event) -> None:
    last = ""
    while not ended.wait(_FOLLOW_PAUSE):
        try:
            backend = _asked(address, port, _FOLLOW_PATIENCE)
        except OSError:
            continue
        if backend != last:
            last = backend
            print(msgspec.json.encode(Reached(time.monotonic(), backend)).decode(), flush=True)


def _await_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def main() -> None:
    what, address, port, *backends = sys.argv[1:]
    listeners = [socket.create_server((backend, TARGET_PORT), backlog=128) for backend in backends]
    threading.Thread(target=_accept, args=(listeners,), daemon=True).start()
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(ended,), daemon=True).start()
    print("listening", flush=True)
    if what == "follow":
        _follow(address, int(port), ended)
    else:
        print(msgspec.json.encode(_tally(address, int(port), backends, ended)).decode(), flush=True)


if __name__ == "__main__":
    main()
