"""Which addresses there may be rows of: a bit for each of many hash values, so that packets to all others look no
further.

Rules of this file: pure. A bit stands for every address that has its hash, and is set as long as any of them has a row
of `frontends` or `owned`; so rows are counted for each bit. A bit too many costs a look-up, one too few costs a
frontend: bits are set before rows are written, and cleared after the last one went.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable

from ebpflb.dataplane.bpf.layouts import KNOWN_CELLS

_HALVES = struct.Struct("=QQ")
_WORD = (1 << 64) - 1


def known_bit(address: bytes) -> int:
    """The number of an address' bit, as `is_known` in bpf/lookup.h finds it: 64 of them are a cell. `address`: its 16
    bytes, or a key that begins with them."""
    first, second = _HALVES.unpack_from(address)
    sum = (first * 0xD6E8FEB86659FD93 + second * 0x9E3779B97F4A7C15) & _WORD
    return int((sum ^ sum >> 32) * 0x94D049BB133111EB >> 44 & (KNOWN_CELLS * 64 - 1))


class Known:
    """The cells as the map holds them, and how many rows stand behind each bit. `cells`: the map as it was read."""

    def __init__(self, cells: bytes = bytes(KNOWN_CELLS * 8)) -> None:
        self._cells = array("Q", cells)
        self._rows: dict[int, int] = {}
        self._suspects: set[int] = set()

    @property
    def tidy(self) -> bool:
        """Whether no bit is set that may stand for nothing."""
        return not self._suspects

    def shows(self, cells: bytes) -> bool:
        """Whether this is what the map should hold."""
        return self.tidy and self._cells.tobytes() == cells

    def suspect_all(self) -> None:
        """Any bit that is set may stand for nothing: what was read is of unknown history."""
        for at, cell in enumerate(self._cells):
            while cell:
                lowest = cell & -cell
                self._suspects.add(at << 6 | lowest.bit_length() - 1)
                cell ^= lowest
        self._suspects.difference_update(self._rows)

    # ---- Rows that come and go

    def add(self, bit: int) -> None:
        """There is one more row behind the bit."""
        self._rows[bit] = self._rows.get(bit, 0) + 1

    def drop(self, bit: int) -> None:
        """There is one row less behind the bit."""
        left = self._rows[bit] - 1
        if left:
            self._rows[bit] = left
        else:
            del self._rows[bit]
            self._suspects.add(bit)

    # ---- What to write

    def needed(self, bits: Iterable[int]) -> dict[int, int]:
        """The cells to write before rows behind these bits are: {number: content}. Until such a row is there, the bit
        may stand for nothing."""
        cells: dict[int, int] = {}
        for bit in bits:
            at = bit >> 6
            cell = cells.get(at, self._cells[at])
            if not cell >> (bit & 63) & 1:
                cells[at] = cell | 1 << (bit & 63)
                self._suspects.add(bit)
        return cells

    def lost(self) -> dict[int, int]:
        """The cells to write because somebody else cleared bits of rows that are there."""
        return self.needed(self._rows)

    def surplus(self) -> dict[int, int]:
        """The cells to write once all rows are as they should be, so that no bit stands for nothing."""
        cells: dict[int, int] = {}
        for bit in self._suspects:
            if bit not in self._rows:
                at = bit >> 6
                cells[at] = cells.get(at, self._cells[at]) & ~(1 << (bit & 63))
        return {at: cell for at, cell in cells.items() if cell != self._cells[at]}

    def wrote(self, cells: dict[int, int], refused: Iterable[int] = ()) -> None:
        """These cells, but for the `refused` ones, are in the map."""
        kept = set(refused)
        for at, cell in cells.items():
            if at not in kept:
                self._cells[at] = cell

    def settle(self) -> None:
        """After `surplus` was written: forget suspicions that are resolved."""
        self._suspects = {
            bit for bit in self._suspects if bit not in self._rows and self._cells[bit >> 6] >> (bit & 63) & 1
        }
