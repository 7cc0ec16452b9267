"""Which tests run on which kernel: the stages `make test-vm` and `make test-vm-matrix`.

    python -m tests.vm.stage                the default kernel, in some ten minutes
    python -m tests.vm.stage --matrix       every kernel, and more on each: some hours
    python -m tests.vm.stage --matrix 5.10  more on this one

Rules of this file: a kernel is booted once for a whole list of pytest runs. What each finds goes to
artifacts/vm-<kernel>-<run>.xml, where .ci/summary counts it like any other; a run that said nothing has failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from ebpflb.dataplane.bpf.artifact import load_artifact
from tests.vm.kernels import DEFAULT, MATRIX, Kernel, Missing, fetch
from tests.vm.machine import ARTIFACTS, CACHE, CHECKOUT, run

PYTHON = CHECKOUT / ".venv" / "bin" / "python"
STAGE_SECONDS = 30 * 60  # far more than it takes on a machine that does nothing else
MATRIX_SECONDS = 4 * 3600
TEST_SECONDS = 900


class Run(NamedTuple):
    """One pytest run: a word for it, and what to give pytest."""

    name: str
    words: tuple[str, ...]


# Each dataplane with every protocol, and IPVS at length.
KERNEL = Run("kernel", ("-m", "vm", "-k", "not provisioned and not legacy", "tests/vm"))
# A cluster of namespaces with IPVS, as other stages have it with the other dataplanes. Both families take too long, and
# so do those that say least about IPVS: how evenly its schedulers spread, and what they have no part in.
BOX_WORDS = "ipvs and not ipv6 and not evenly and not same_selector and not no_service"
BOX = Run("box", ("-m", "box", "-k", BOX_WORDS, "tests/box/test_cluster_ip.py"))
# What this machine's kernel may lack: see .ci/limits.txt. Without VLANs a veth stands for one in the tests of frames.
LACKING = Run(
    "lacking",
    ("-m", "bpf_load", "-k", "vlan or in_a_tag", "tests/bpf/test_xdp_attach.py", "tests/bpf/test_xdp_forward.py"),
)
DEFAULT_RUNS = (KERNEL, LACKING, BOX)

# What takes too long for each day: what `make vm` does, iptables' old variant, everything that the box has.
EVERYTHING = Run("kernel", ("-m", "vm", "tests/vm"))
# A kernel pretends that hardware has summed a packet since 6.16: older ones would skip these.
PROGRAMS = Run("programs", ("-m", "bpf_load", "-k", "not hardware-sum", "tests/bpf"))
BOXES = Run("boxes", ("-m", "box", "tests/box"))
MATRIX_RUNS = (EVERYTHING, PROGRAMS, BOXES)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm.stage")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(source.name for source in MATRIX))
    parser.add_argument("--matrix", action="store_true")
    asked = parser.parse_args(arguments)
    names = asked.kernels or ([source.name for source in MATRIX] if asked.matrix else [DEFAULT])
    runs, seconds = (MATRIX_RUNS, MATRIX_SECONDS) if asked.matrix else (DEFAULT_RUNS, STAGE_SECONDS)
    status = 0
    for name in names:
        try:
            kernel = fetch(name)
            if not asked.matrix:
                # As its daemons would; in seconds instead of minutes. The matrix shows that it can be done in there.
                load_artifact(cache=CACHE, set_retval=True, xdp_frags=True, release=kernel.release)
            status |= _on(kernel, runs, seconds)
        except Missing as error:
            print(f"vm: {error}", file=sys.stderr)
            status = 1
    return status


def _on(kernel: Kernel, runs: Sequence[Run], seconds: float) -> int:
    print(f"== {kernel.name}: {kernel.release}", flush=True)
    reports = {each: ARTIFACTS / f"vm-{kernel.name}-{each.name}.xml" for each in runs}
    for report in reports.values():
        report.unlink(missing_ok=True)
    begun = time.monotonic()
    commands = [
        shlex.join([
            *(str(PYTHON), "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}", "--durations=5"),
            *(f"--junitxml={report}", *each.words),
        ])
        for each, report in reports.items()
    ]  # fmt: skip
    status = run(
        kernel,
        ["sh", "-c", f"status=0; {' '.join(f'{one} || status=1;' for one in commands)} exit $status"],
        timeout=seconds,
    )
    for each, report in reports.items():
        if not report.exists():
            print(f"vm: {each.name} on {kernel.release} has come to no end", file=sys.stderr)
            status = 1
    print(f"== {kernel.name}: {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
