"""One node's daemon as a child process.

Rules of this file: it runs the same command as a person would, in the node's network namespace and cgroup, and knows
nothing of what that command does. Its log goes to a file, which outlives it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ebpflb
from ebpflb.demo import namespaces
from ebpflb.errors import EbpflbError


def environment() -> dict[str, str]:
    """In which `python -m ebpflb` is this very ebpflb, also in a checkout that nobody installed."""
    return {**os.environ, "PYTHONPATH": str(Path(ebpflb.__file__).resolve().parents[1])}


class Daemon:
    """`ebpflb run`, from the moment it is started; `under`: see Cluster."""

    def __init__(
        self, namespace: str, cgroup: Path, options: Sequence[str], log: Path, under: Sequence[str] = ()
    ) -> None:
        self.log = log
        self._namespace = namespace
        self._cgroup = cgroup
        with log.open("ab") as file:
            argv = [*under, sys.executable, "-m", "ebpflb", "run", *options]
            self._process = namespaces.spawn(namespace, cgroup, argv, stdout=file, stderr=file, env=environment())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, seconds: float) -> None:
        """Return as soon as the first complete sync is in the kernel. Raises EbpflbError with the last words of the
        daemon if that takes longer or it has ended."""
        argv = [sys.executable, "-m", "ebpflb", "status", "--wait", f"{seconds:.1f}"]
        with namespaces.spawn(
            self._namespace, self._cgroup, argv,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(),
        ) as status:  # fmt: skip
            while True:
                try:
                    output, _ = status.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if not self.running:  # then nothing will ever answer
                        status.kill()
                except BaseException:
                    status.kill()
                    raise
        if status.returncode:
            words = filter(None, (output.decode().strip(), self.last_words()))
            raise EbpflbError("the daemon is not ready: " + "\n".join(words))

    def kill(self) -> None:
        """As a crash would end it: nothing is tidied up."""
        if self.running:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self, seconds: float = 10) -> int:
        """Ask it to end, and return its exit status."""
        if self.running:
            self._process.terminate()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def last_words(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
