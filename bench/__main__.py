"""`python -m bench [--quick] [--only GROUP,…] [--output FILE]`: measure, print a table, write JSON."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench.api import Effort, api
from bench.beside import beside
from bench.daemon import daemon
from bench.decoding import decoding
from bench.edges import edges
from bench.frames import Effort as Repeats
from bench.iptables import iptables
from bench.lab import CHECKOUT, Lab, ahead, lab
from bench.live import live
from bench.maglev import tables
from bench.paths import paths
from bench.plane import plane
from bench.report import TARGETS, Figure, Report, table
from bench.xdp import xdp
from ebpflb.errors import EbpflbError
from tests.api import binaries

GROUPS = ("xdp", "live", "edges", "plane", "daemon", "decode", "maglev", "api", "beside", "iptables", "paths")


def machine() -> dict[str, str]:
    """Where this runs."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    mitigations = []
    for file in sorted(Path("/sys/devices/system/cpu/vulnerabilities").glob("*")):
        said = file.read_text().strip()
        if said.startswith("Mitigation"):
            mitigations.append(f"{file.name}: {said.removeprefix('Mitigation: ')}")
    revision = subprocess.run(
        ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "kernel": platform.release(),
        "processor": f"{os.cpu_count()} × {model}",
        "mitigations": " | ".join(mitigations) or "none",
        "revision": revision or "?",
        "load": f"{os.getloadavg()[0]:.2f}",
    }


def _kube_proxy() -> Path | None:
    """The one that the tests have built, if they have."""
    try:
        return binaries.find(binaries.CURRENT)["kube-proxy"]
    except binaries.Missing as missing:
        print(f"\nkube-proxy is not measured: {missing}", file=sys.stderr)
        return None


def measure(groups: list[str], quick: bool, say: Callable[[str], None]) -> Iterator[Figure]:
    """The figures of the groups asked for."""
    with lab() as place, ahead(0):
        sizes = (10, 1000) if quick else (10, 1000, 10000)
        repeats = Repeats(3, 20_000) if quick else Repeats(15, 100_000)
        runs: dict[str, Callable[[Lab], Iterator[Figure]]] = {
            "xdp": lambda here: xdp(here, (10, sizes[-1], 10 * sizes[-1]), repeats, say),
            "live": lambda here: live(here, 10 if quick else 200, say),
            "edges": lambda here: edges(here, (10, sizes[-1]), repeats, say),
            "plane": lambda here: plane(
                here, sizes[1:], (sizes[0], sizes[-1]), 2 if quick else 5, 100 if quick else 1000, say
            ),
            "daemon": lambda here: daemon(here, (sizes[0], sizes[-1]), 2 if quick else 4, 20 if quick else 200, say),
            "decode": lambda here: decoding(here, 2 if quick else 5, say),
            "maglev": lambda here: tables(2 if quick else 10, say),
            "api": lambda here: api(
                here,
                (sizes[0], sizes[-1]),
                Effort(2, 50, 2000, 500, 4.0, 1.0) if quick else Effort(5, 1000, 30_000, 1000, 60.0),
                say,
            ),
            "beside": lambda here: beside(here, 100 if quick else 1000, 2 if quick else 10, _kube_proxy(), say),
            "iptables": lambda here: iptables(here, sizes[1] if quick else sizes[-1], 3 if quick else 7, say),
            "paths": lambda here: paths(here, 4 if quick else 12, say),
        }
        for group in groups:
            say(group)
            yield from runs[group](place)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure ebpflb on this machine (root).")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it works, not how fast")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: artifacts/bench.json)")
    arguments = parser.parse_args()
    groups = [group for group in arguments.only.split(",") if group]
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"--only: no such group: {', '.join(sorted(unknown))}")
    if os.geteuid():
        parser.error("namespaces and programs are root's: use sudo")
    output = arguments.output or CHECKOUT / "artifacts" / "bench.json"

    def say(what: str) -> None:
        print(f"\r\x1b[K{time.monotonic() - begin:5.0f} s  {what}", end="", file=sys.stderr, flush=True)

    begin = time.monotonic()
    figures: list[Figure] = []
    try:
        for figure in measure(groups, arguments.quick, say):
            figures.append(figure)
    except EbpflbError as error:
        print(f"\nbench: {error}", file=sys.stderr)
        return error.exit_status
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    report = Report(machine(), time.monotonic() - begin, arguments.quick, tuple(figures), TARGETS)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    print(table(report))
    print(f"samples: {output}")
    if report.missed:
        print(f"missed: {', '.join(report.missed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
