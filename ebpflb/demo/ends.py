"""How the demo begins and ends: kept, cleaned, interrupted, and with which exit status.

Rules of this file: whatever way it ends, what was made is removed, unless `keep` asked for it to stand. Ctrl-C, SIGTERM
and a closed terminal are one kind of interruption.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ebpflb.demo import namespaces, servers
from ebpflb.demo.cluster import Cluster
from ebpflb.demo.console import Console
from ebpflb.demo.stage import NAME, Stage
from ebpflb.demo.story import Story
from ebpflb.errors import UserError


def tell(keep: bool, patience: float = 1.0) -> int:
    """The whole of it; 0 if every promise was kept, 130 if it was interrupted. Raises UserError if it cannot begin."""
    # Debian keeps servers where an unprivileged user's PATH does not look, and `su` keeps that PATH.
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:{servers.SYSTEM_PATH}"
    servers.check_installed()
    if namespaces.leftovers(NAME):
        raise UserError("a demo is standing already: look around in it, or remove it with `ebpflb demo --clean`")
    console = Console()
    began = time.monotonic()
    with _signals_as_interrupts():
        try:
            return _tell(keep, patience, console, began)
        except KeyboardInterrupt:
            left = namespaces.leftovers(NAME)
            console.say(f"Interrupted. {'Left behind: ' + '; '.join(left) if left else 'Everything is removed.'}")
            return 130


def _tell(keep: bool, patience: float, console: Console, began: float) -> int:
    cluster = Cluster(("node1", "node2"), name=NAME)
    cluster.__enter__()
    left: tuple[str, ...] = ()
    standing = False
    try:
        Story(Stage(cluster, patience), console).tell()
        standing = keep
    finally:
        if not standing:
            left = cluster.remove()
    if not standing:
        with console.step("Nothing is left behind", "Processes, namespaces, cgroups, mounts, pins, files."):
            console.check(not left, f"all of it is gone{', but ' + '; '.join(left) if left else ''}")
    console.summary(time.monotonic() - began)
    if standing:
        _how_to_look_around(console, cluster)
    return int(console.failed)


def remove_kept() -> int:
    """Remove a demo that was kept."""
    if not namespaces.leftovers(NAME):
        print("no demo is standing")
        return 0
    left = namespaces.remove(NAME)
    print(f"could not remove {'; '.join(left)}" if left else "the demo is removed")
    return int(bool(left))


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_look_around(console: Console, cluster: Cluster) -> None:
    ebpflb = Path(sys.executable).with_name("ebpflb")
    enter = "nsenter --net=/run/netns/"
    node1 = f"{enter}{cluster.nodes['node1'].namespace} {ebpflb}"
    console.say("")
    console.say("The cluster is left standing. Be its client, look into it, change it:")
    for line in (
        f"{enter}{cluster.outside.namespace} curl http://192.168.0.2:30007/    # from outside",
        f"{node1} dump {' '.join(cluster.target('node1'))}",
        f"{node1} status",
        f"{cluster.manifests.directory}/my-service.yaml    # edit it: the daemons follow",
        f"tail -f {cluster.log('node1')}",
        f"{ebpflb} demo --clean    # removes everything",
    ):
        console.detail(line)
