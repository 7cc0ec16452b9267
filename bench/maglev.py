"""Tables of consistent hashing: what one costs to fill, beside plain Python, and what it is worth.

Rules of this file: no kernel; times are the processor's. Plain Python goes the paper's own way (NSDI 2016, section 3.4)
in as few words as it takes: there that is three times as fast as ours would be.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bench.report import Figure, middle, spread
from ebpflb.dataplane.bpf import maglev
from ebpflb.dataplane.bpf.maglev import SIZES, positions, size_code
from ebpflb.errors import EbpflbError
from ebpflb.routes import Backend

CODE, BACKENDS = 5, 100
"""What the promise is about: 16381 places."""


def tables(rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file."""
    if missing := maglev.missing():
        raise EbpflbError(f"{missing}: run make setup")
    say("filling tables of consistent hashing")
    backends = _pods(0)
    what = f"Maglev table of {SIZES[CODE]} places, {BACKENDS} backends"
    ours, textbook = partial(positions, backends, CODE), partial(_textbook, backends, SIZES[CODE])
    pairs = [(_milliseconds(ours, 50), _milliseconds(textbook, 2)) for _ in range(2 * rounds)]
    yield middle("maglev.fill", f"fill a {what}", [compiled for compiled, _ in pairs], "ms")
    ratios = [plain / compiled for compiled, plain in pairs]
    note = f"{statistics.median(plain for _, plain in pairs):.1f} ms; {spread(ratios)}"
    yield Figure("maglev.python", f"plain Python ÷ ours: {what}", statistics.median(ratios), "", tuple(ratios), note)
    for code, count in ((1, 10), (size_code(BACKENDS, SIZES[8]), BACKENDS), (8, 1310)):
        few = _pods(0, count)
        samples = [_milliseconds(partial(positions, few, code), 5) for _ in range(2 * rounds)]
        yield middle(f"maglev.fill.{count}", f"the same of {SIZES[code]} places, {count} backends", samples, "ms")
    say("what moves when a backend leaves")
    code = size_code(BACKENDS, SIZES[8])
    moved = [_moved(_pods(number), code, number % BACKENDS) for number in range(20 * rounds)]
    note = f"{statistics.median(moved):.2f} % in the middle of {len(moved)} sets"
    yield Figure(
        "maglev.moved", "most of the others' places moved when one of 100 leaves", max(moved), "%", tuple(moved), note
    )
    found = Counter(array("H", positions(backends, code)))
    shares = max(found.values()) / min(found.values())
    yield Figure("maglev.shares", f"greatest share ÷ least, of {BACKENDS}", shares, "", (shares,))


def _pods(number: int, count: int = BACKENDS) -> list[Backend]:
    """A set of backends, another one for each number."""
    return [Backend(f"10.{number % 250}.{each >> 8}.{each & 255}", 8080 + number // 250) for each in range(count)]


def _milliseconds(act: Callable[[], object], times: int) -> float:
    """Of the processor, each time."""
    begin = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - begin) / times * 1000


def _textbook(backends: Sequence[Backend], size: int) -> list[int]:
    walks = []
    for index, backend in enumerate(backends):
        digest = hashlib.blake2b(f"{backend.address} {backend.port}".encode(), digest_size=16).digest()
        offset, skip = int.from_bytes(digest[:8]) % size, int.from_bytes(digest[8:]) % (size - 1) + 1
        walks.append([index, offset, skip])
    places = [-1] * size
    left = size
    while True:
        for walk in walks:
            index, place, skip = walk
            while places[place] >= 0:
                place = (place + skip) % size
            places[place] = index
            walk[1] = place
            left -= 1
            if not left:
                return places


def _moved(backends: list[Backend], code: int, gone: int) -> float:
    """Per cent of the others' places."""
    before = array("H", positions(backends, code))
    after = array("H", positions(backends[:gone] + backends[gone + 1 :], code))
    others = [(old, new + (new >= gone)) for old, new in zip(before, after, strict=True) if old != gone]
    return 100 * sum(old != new for old, new in others) / len(others)
