"""A client that asks one URL again and again, each time by a new connection, and writes down what came back.

Rules of this file: run as a program (`python prober.py URL`) inside a pod or outside, so its imports are few and none
is ours. One line a request, at once: seconds on the monotonic clock when the answer was in, then `ok` and the body's
first word, or `failed` and why. It ends when it is told to.
"""

from __future__ import annotations

import socket
import sys
import time
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 2.0


def ask(host: str, port: int, path: str) -> str:
    """The body's first word."""
    with socket.create_connection((host, port), timeout=TIMEOUT_SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(4096):
            answer += part
    head, _, body = answer.decode().partition("\r\n\r\n")
    if " 200 " not in head.splitlines()[0]:
        raise OSError(head.splitlines()[0])
    return body.split()[0]


def main(url: str) -> None:
    parts = urlsplit(url)
    assert parts.hostname is not None
    while True:
        try:
            outcome = f"ok {ask(parts.hostname, parts.port or 80, parts.path or '/')}"
        except (OSError, IndexError) as error:
            outcome = f"failed {error}"
        print(f"{time.monotonic():.6f} {outcome}", flush=True)
        # A thousand connections a second would only fill the port range with TIME_WAIT.
        time.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1])
