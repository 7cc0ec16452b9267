"""Connects to one Service again and again, and counts what fails: `python -m bench.prober ADDRESS PORT BACKEND…`.

Rules of this file: a process of its own, to be started inside the cgroup that is served. It listens on the backends'
addresses by itself, so that whatever fails is the way there. It ends with its stdin, and prints a Tally.
"""

from __future__ import annotations

import selectors
import socket
import sys
import threading
import time

import msgspec

from bench.clusters import TARGET_PORT

_PAUSE, _PATIENCE = 0.005, 1.0


class Tally(msgspec.Struct, frozen=True):
    """Connections that came about, those that did not, and the first of the reasons."""

    made: int
    failed: int
    reason: str


def _accept(listeners: list[socket.socket]) -> None:
    selector = selectors.DefaultSelector()
    for listener in listeners:
        selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            accepted, _ = key.fileobj.accept()
            accepted.send(b"x")
            accepted.close()


def _tally(address: str, port: int, ended: threading.Event) -> Tally:
    made, failed, reason = 0, 0, ""
    while not ended.wait(_PAUSE):
        try:
            with socket.create_connection((address, port), _PATIENCE) as connection:
                if connection.recv(1) != b"x":
                    raise OSError("an answer that is nobody's")
            made += 1
        except OSError as error:
            failed += 1
            reason = reason or f"{time.monotonic():.3f}: {error}"
    return Tally(made, failed, reason)


def _await_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def main() -> None:
    address, port, *backends = sys.argv[1:]
    listeners = [socket.create_server((backend, TARGET_PORT), backlog=128) for backend in backends]
    threading.Thread(target=_accept, args=(listeners,), daemon=True).start()
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(ended,), daemon=True).start()
    print("listening", flush=True)
    print(msgspec.json.encode(_tally(address, int(port), ended)).decode(), flush=True)


if __name__ == "__main__":
    main()
