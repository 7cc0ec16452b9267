"""Whether the kernel holds what this process believes it does, without understanding it anew.

Rules of this file: pure. What an audit of large tables costs is to understand every row; where nobody has touched them,
it is enough that they are, byte by byte, what was written. An Image follows the writes to an array that succeeded, and
cannot be believed any more once one was refused; of everything else the Ledger knows the rows.
"""

from __future__ import annotations

from array import array

from ebpflb.dataplane.bpf.layouts import RANGE_KEY, U32, entries, rows_of
from ebpflb.dataplane.bpf.ledger import Ledger
from ebpflb.dataplane.bpf.reading import RawTables
from ebpflb.dataplane.bpf.tables import pack_frontend


class Image:
    """The rows of an array from index 0, each of `size` bytes, as they were read: `rows`."""

    def __init__(self, rows: bytes, size: int) -> None:
        self._rows = bytearray(rows)
        self._size = size
        self._believed = True

    def put(self, numbers: array[int], rows: bytes) -> None:
        """These rows, back to back, were written at these indexes."""
        size = self._size
        first, last = numbers[0], numbers[-1]
        end = (max(numbers) + 1) * size
        if end > len(self._rows):
            self._rows.extend(bytes(end - len(self._rows)))
        if last - first == len(numbers) - 1 and numbers == array("I", range(first, last + 1)):
            self._rows[first * size : end] = rows
            return
        for at, number in enumerate(numbers):
            self._rows[number * size : (number + 1) * size] = rows[at * size : (at + 1) * size]

    def doubt(self) -> None:
        """Something was refused: what the array holds is not known."""
        self._believed = False

    def shows(self, rows: bytes, *, all_there_are: bool = False) -> bool:
        """Whether `rows`, read from index 0, are what is believed. `all_there_are`: only zeros came behind them; else
        what comes behind is of no interest."""
        held = len(self._rows)
        if not self._believed or self._rows[: len(rows)] != rows[:held] or rows[held:].strip(b"\0"):
            return False
        return not (all_there_are and self._rows[len(rows) :].strip(b"\0"))


def accounts_for(ledger: Ledger, slots: Image, backends: Image, raw: RawTables) -> bool:
    """Whether what was read is what the ledger holds and the images show, and nothing is left to be tidied."""
    if not ledger.tidy or not slots.shows(raw.slots) or not backends.shows(raw.backends, all_there_are=True):
        return False
    names = dict(entries("names", *raw.names))
    if len(names) != ledger.services or any(names.get(U32.pack(id)) != row for id, row in ledger.names()):
        return False
    if set(rows_of(raw.ranges, RANGE_KEY.size)) != ledger.range_keys():
        return False
    if not ledger.shows(raw.tables, raw.members):
        return False
    rows = dict(entries("frontends", *raw.frontends))
    held = ledger.held
    return len(rows) == len(held) and all(rows.get(pack_frontend(each)) == row for each, row in held.items())
