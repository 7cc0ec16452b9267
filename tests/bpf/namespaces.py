"""A network namespace of a test's own, for devices.

Rules of this file: nothing of the machine's own network is touched, and whatever is in the namespace goes with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace; `ip` and `tc` run inside, and `entered` puts this thread there."""

    def __init__(self) -> None:
        self.name = f"ebpflb-dev-{os.getpid()}-{next(_numbers)}"
        subprocess.run(["ip", "netns", "add", self.name], check=True)

    def ip(self, command: str) -> str:
        return self._run("ip", "-n", self.name, *command.split())

    def tc(self, command: str) -> str:
        return self._run("tc", "-n", self.name, *command.split())

    @staticmethod
    def _run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def index(self, device: str) -> int:
        found: list[dict[str, Any]] = json.loads(self._run("ip", "-j", "-n", self.name, "link", "show", device))
        return int(found[0]["ifindex"])

    def mac(self, device: str) -> bytes:
        found: list[dict[str, Any]] = json.loads(self._run("ip", "-j", "-n", self.name, "link", "show", device))
        return bytes.fromhex(found[0]["address"].replace(":", ""))

    def qdiscs(self) -> str:
        return "\n".join(sorted(self.tc("qdisc show").splitlines()))

    def filters(self, device: str, side: str) -> str:
        return self.tc(f"filter show dev {device} {side}")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        target = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            assert _libc.setns(target, 0) == 0
            yield
        finally:
            assert _libc.setns(home, 0) == 0
            os.close(home)
            os.close(target)

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True)
