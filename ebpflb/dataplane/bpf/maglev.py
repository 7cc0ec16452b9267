"""Tables of consistent hashing: which backend is at each place of a table (Maglev, NSDI 2016).

Rules of this file: functions of their arguments, and nothing else. Which backend is where depends on the backends'
addresses, ports and weights only, not on their order nor on the node; places then say where it is in the sequence that
was given. `maglev.c` fills tables; where it has not been built, `filled_slowly` does, the same to the byte.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct
from array import array
from collections.abc import Callable, Sequence
from socket import htons
from typing import TypeAlias

from ebpflb.dataplane.bpf.tables import pack_address
from ebpflb.routes import Backend

SIZES = {1: 1021, 2: 2039, 3: 4093, 4: 8191, 5: 16381, 6: 32749, 7: 65521, 8: 131071}
"""Positions of a table by the code that a route's row has for it, as `table_size` of bpf/maglev.h."""

MOST_BACKENDS = 0xFFFF
"""How many backends a table can tell apart; those behind them in the sequence have no place."""

Fill: TypeAlias = Callable[[bytes, int], bytes]
"""From records of backends and a number of places to the places."""

MODULE = "ebpflb.dataplane.bpf._maglev"
"""As what maglev.c is built: no module, but Python finds it by this name."""

_MANY = 50
_STEPS = (1, 3, 5, 7)
_FREE = 0xFFFF
_RECORD = struct.Struct("=16sHH")
_REST = struct.Struct("=HH")


def size_code(backends: int, cap: int) -> int:
    """The code of the smallest table that is fair and steady enough for so many backends, with at most `cap` positions
    (the least table, if that is less than any has).

    A hundred positions for each keep shares within 1 % of one another. What moves among the others when one backend
    leaves does not matter beside what has to move as long as there are few; from fifty on, a table of two hundred for
    each keeps it near 1 %. Another size leads nearly every flow elsewhere, so there are few steps: about four times the
    places each, behind 10, 40, 81 and 327 backends.
    """
    wanted = backends * (100 if backends < _MANY else 200)
    largest = max((code for code, size in SIZES.items() if size <= cap), default=1)
    return next((code for code in _STEPS if code < largest and SIZES[code] >= wanted), largest)


def positions(backends: Sequence[Backend], code: int, fill: Fill | None = None) -> bytes:
    """For each place of a table of the size `code`, a u16 in the machine's order: the index in `backends`, which are
    the active ones of a route, at least one.

    Shares are in proportion to weights, and even where all weights are 0. Where there are more backends than places,
    the same ones are left out on every node. `fill` is None for the fastest there is; all fill alike.
    """
    return (fill or built() or filled_slowly)(_records(backends[:MOST_BACKENDS]), SIZES[code])


def _records(backends: Sequence[Backend]) -> bytes:
    """What goes to the fill. Most backends differ from their neighbour in the address alone."""
    weighed = any([backend.weight for backend in backends])
    records = []
    rest, port, weight = b"", -1, -1
    for backend in backends:
        if backend.port != port or backend.weight != weight:
            port, weight = backend.port, backend.weight
            rest = _REST.pack(htons(port), weight if weighed else 1)
        records.append(pack_address(backend.address) + rest)
    return b"".join(records)


# ---- The compiled one


def missing() -> str:
    """Why tables are filled slowly, in one line; "" where they are not."""
    if built() is not None:
        return ""
    return "maglev.c has not been built for this Python: tables of consistent hashing are filled a hundred times slower"


@functools.cache
def built(module: str = MODULE) -> Fill | None:
    """What has been built by that name; None if nothing has, for this Python on this machine."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return None
    try:
        function = ctypes.CDLL(found.origin).ebpflb_maglev_fill
    except (OSError, AttributeError):  # of another machine, or of another version
        return None
    function.argtypes = (ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_char_p)
    function.restype = ctypes.c_int

    def fill(records: bytes, size: int) -> bytes:
        places = ctypes.create_string_buffer(2 << size.bit_length())
        if function(records, len(records) // _RECORD.size, size, places):
            raise MemoryError("no memory for a table of consistent hashing")
        return places.raw[: 2 * size]

    return fill


# ---- The same in Python


def filled_slowly(records: bytes, size: int) -> bytes:
    """What `ebpflb_maglev_fill` of maglev.c does."""
    bits = size.bit_length()
    mask, half = (1 << bits) - 1, (bits + 1) // 2
    turns = []
    for index, (address, port, weight) in enumerate(_RECORD.iter_unpack(records)):
        identity = address + struct.pack("=H", port)
        one, other = _hashed(0x243F6A8885A308D3, identity), _hashed(0x13198A2E03707344, identity)
        turns.append([one, index, one & mask, (other | 1) & mask, (other >> 32 | 1) & mask, weight, 0])
    turns.sort(key=lambda turn: turn[:2])
    heaviest = max(turn[5] for turn in turns)
    places = array("H", [_FREE] * size + [0] * (mask + 1 - size))
    left = size
    while True:
        for turn in turns:
            _, index, at, step, factor, weight, credit = turn
            turn[6] = credit = credit + weight
            if credit < heaviest:
                continue
            turn[6] -= heaviest
            while True:
                at = at + step & mask
                place = (at ^ at >> half) * factor & mask
                if places[place] == _FREE:
                    break
            turn[2] = at
            places[place] = index
            left -= 1
            if not left:
                return places[:size].tobytes()


def _hashed(hash: int, identity: bytes) -> int:
    for start, end in ((0, 8), (8, 16), (16, 18)):
        hash = _mixed(hash ^ int.from_bytes(identity[start:end], "little"))
    return hash


def _mixed(hash: int) -> int:
    hash = (hash ^ hash >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    hash = (hash ^ hash >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return hash ^ hash >> 31
