"""What it costs to turn what the API server sends into objects: ours against the official client's.

Rules of this file: each measurement has a process of its own, which has done nothing before but imports, and holds
what it made while its memory is looked at; its time is the processor's, the best of some laps. All are given the same
bytes, and the garbage collector as Python has it. `structs` goes as far as the official client does, to objects that
look like the API's; `model` is what the daemon does, which goes on from there to what a proxy works with.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec

from bench.apistate import slice_list
from bench.lab import CHECKOUT, Lab
from bench.report import Figure, spread
from ebpflb.errors import EbpflbError

SLICES, ENDPOINTS, PAGE, LAPS = 2000, 10, 500, 5
WHO = ("structs", "model", "official")


_Decode: TypeAlias = Callable[[bytes], tuple[object, int]]
"""What came of the bytes, and how many endpoints are in it."""


class _Cost(msgspec.Struct, frozen=True):
    """Seconds for all files, and the kilobytes that the process grew by in the first lap, at most."""

    seconds: float
    peak: int


def decoding(lab: Lab, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file."""
    files = []
    for start in range(0, SLICES, PAGE):
        file = lab.directory / f"slices-{start}.json"
        file.write_bytes(slice_list(range(start, start + PAGE), ENDPOINTS))
        files.append(file)
    costs: dict[str, list[_Cost]] = {who: [] for who in WHO}
    for number in range(rounds):
        say(f"decoding {number + 1}/{rounds}")
        for who, found in costs.items():
            found.append(_in_a_child(who, files))
    what = f"{SLICES:,} slices × {ENDPOINTS} endpoints"
    for who, words in (("structs", "decode"), ("model", "decode, and parse to our model,")):
        pairs = list(zip(costs[who], costs["official"], strict=True))
        ratios = [official.seconds / ours.seconds for ours, official in pairs]
        times = [
            f"{statistics.median(each.seconds * 1000 for each in costs[name]):.0f} ms" for name in (who, "official")
        ]
        note = f"{', '.join(times)}; {spread(ratios)}"
        yield Figure(
            f"decode.{who}",
            f"official client ÷ ours: {words} {what}",
            statistics.median(ratios),
            "",
            tuple(ratios),
            note,
        )
    pairs = list(zip(costs["model"], costs["official"], strict=True))
    ratios = [official.peak / ours.peak for ours, official in pairs]
    sizes = [f"{statistics.median(each.peak / 1024 for each in costs[name]):.1f} MB" for name in ("model", "official")]
    yield Figure(
        "decode.memory", "official client ÷ ours: memory for that, at most", statistics.median(ratios), "",
        tuple(ratios), ", ".join(sizes),
    )  # fmt: skip


def _in_a_child(who: str, files: list[Path]) -> _Cost:
    argv = [sys.executable, "-m", "bench.decoding", who, *map(str, files)]
    done = subprocess.run(argv, capture_output=True, cwd=CHECKOUT, check=False)
    if done.returncode:
        raise EbpflbError(f"decoding with {who} failed: {done.stderr.decode()}")
    return msgspec.json.decode(done.stdout, type=_Cost)


def _measure(decode: _Decode, files: list[str]) -> _Cost:
    """Decode each file, as pages come: one after the other, each gone before the next."""
    before = _memory("VmRSS")
    best, peak = math.inf, 0
    for _ in range(LAPS):
        seconds, found, kept = 0.0, 0, []
        for file in files:
            data = Path(file).read_bytes()
            begin = time.process_time()
            made, endpoints = decode(data)
            seconds += time.process_time() - begin
            kept.append(made)
            found += endpoints
            del data
        peak = peak or _memory("VmHWM") - before
        best = min(best, seconds)
        if found != SLICES * ENDPOINTS:  # nobody is fast by doing nothing
            raise EbpflbError(f"{found} endpoints of {SLICES * ENDPOINTS} were decoded")
    return _Cost(best, peak)


def _model() -> _Decode:
    from ebpflb.source import PutSlice
    from ebpflb.source.kube import decode

    def run(data: bytes) -> tuple[object, int]:
        said = decode.page(decode.SLICES, data).said
        return said, sum(len(each.event.slice.endpoints) for each in said if isinstance(each.event, PutSlice))

    return run


def _structs() -> _Decode:
    from ebpflb.source import wire
    from ebpflb.source.kube import decode

    def run(data: bytes) -> tuple[object, int]:
        items = msgspec.json.decode(data, type=wire.RawList).items or ()
        found = [decode.SLICES.decoder.decode(each) for each in items]
        return found, sum(len(each.endpoints) for each in found)

    return run


def _official() -> _Decode:
    from kubernetes.client import ApiClient

    client = ApiClient()

    def run(data: bytes) -> tuple[object, int]:
        found = client.deserialize(data.decode(), "V1EndpointSliceList", "application/json")
        return found, sum(len(each.endpoints) for each in found.items)

    return run


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


if __name__ == "__main__":
    who, *names = sys.argv[1:]
    make = {"structs": _structs, "model": _model, "official": _official}[who]
    sys.stdout.buffer.write(msgspec.json.encode(_measure(make(), names)))
