"""Writes what is said of addresses as a whole: whose cluster IP each is, and that there may be rows of it.

Rules of this file: `owned` and `known` say which rows, this says in which order. The bit of an address is there before
any row of it, and goes after the last one. An address stops being owned before its frontends go, and begins after they
have come, so that none of its ports is refused meanwhile that should be served.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ebpflb.dataplane import NODE
from ebpflb.dataplane.bpf.known import Known, known_bit
from ebpflb.dataplane.bpf.layouts import U64, entries
from ebpflb.dataplane.bpf.owned import Owned, OwnedChange, unpack_owned
from ebpflb.dataplane.bpf.pen import Pen, Tally
from ebpflb.dataplane.bpf.reading import RawTables
from ebpflb.dataplane.bpf.tables import NAME_LIMIT, pack_address
from ebpflb.model import Address, ServiceName


class Addresses:
    """The maps `owned` and `known`."""

    def __init__(self, pen: Pen) -> None:
        self._pen = pen
        self._known = Known()
        self._owned = Owned()
        self._announced: dict[bytes, int] = {}  # the bits of rows that are about to come, by key
        self._mending = False
        self._change = OwnedChange()
        self.retry: set[Address] = set()
        """What could not be written or removed by the last sync."""

    @property
    def owned(self) -> Collection[Address]:
        """The addresses that have an owner in the map."""
        return self._owned.held.keys()

    def adopt(self, raw: RawTables, frontends: Iterable[bytes]) -> None:
        """Take over what was read; `frontends` are the keys of frontends' rows."""
        self._known = Known(raw.known)
        self._owned = Owned(unpack_owned(*raw.owned))
        for key in frontends:
            self._known.add(known_bit(key))
        for address in self._owned.held:
            self._known.add(known_bit(pack_address(address)))
        self._known.suspect_all()
        self._mending = True
        self.retry = set()

    def shows(self, raw: RawTables) -> bool:
        """Whether what was read is what was written, all of it."""
        if self.retry or self._mending or not self._known.shows(raw.known):
            return False
        return dict(entries("owned", *raw.owned)) == self._owned.rows()

    # ---- One sync, in this order

    def begin(self, want: Mapping[Address, ServiceName], addresses: Iterable[Address], tally: Tally) -> None:
        """Bits that are missing are set; `addresses` that have no owner any more lose theirs."""
        if self._mending:
            self._mending = bool(self._put_cells(self._known.lost(), tally))
            if self._mending:
                tally.refuse(NODE, "the map known could not be written")
        self.retry = set()
        self._change = self._owned.prepare(want, addresses)
        for address, owner in self._change.refused.items():
            self.retry.add(address)
            tally.refuse(f"{owner.namespace}/{owner.name}", f"a name has more than {NAME_LIMIT} bytes")
        removals = {pack_address(address): address for address in self._change.removals}
        refused = self._pen.remove("owned", removals, tally)
        for key, address in removals.items():
            if key not in refused:
                del self._owned.held[address]
                self._known.drop(known_bit(key))
            else:
                self.retry.add(address)
                tally.refuse(_text(self._owned.held[address]), self._pen.words("owned", refused[key]))

    def announce(self, keys: Iterable[bytes], tally: Tally) -> dict[bytes, int]:
        """Rows of these keys, which begin with an address, are about to come. Those that must not, with errno."""
        self._announced = bits = {key: known_bit(key) for key in keys}
        refused = self._put_cells(self._known.needed(bits.values()), tally)
        return {key: refused[bit >> 6] for key, bit in bits.items() if bit >> 6 in refused} if refused else {}

    def came(self, key: bytes) -> None:
        """There is a row of this key where there was none, as announced."""
        self._known.add(self._announced[key])

    def went(self, key: bytes) -> None:
        """There is no row of this key any more."""
        self._known.drop(known_bit(key))

    def end(self, tally: Tally) -> None:
        """Owners come, and bits go that stand for nothing."""
        puts = {pack_address(address): (address, *put) for address, put in self._change.puts.items()}
        new = [key for key, (address, _, _) in puts.items() if address not in self._owned.held]
        refused = {key: ("known", error) for key, error in self.announce(new, tally).items()}
        rows = {key: row for key, (_, _, row) in puts.items() if key not in refused}
        refused |= {key: ("owned", error) for key, error in self._pen.put("owned", rows, tally).items()}
        for key, (address, owner, _) in puts.items():
            if key not in refused:
                if address not in self._owned.held:
                    self.came(key)
                self._owned.held[address] = owner
            else:
                self.retry.add(address)
                tally.refuse(_text(owner), self._pen.words(*refused[key]))
        self._change, self._announced = OwnedChange(), {}
        self._pen.left(self._put_cells(self._known.surplus(), tally), "known", tally)
        self._known.settle()

    def _put_cells(self, cells: dict[int, int], tally: Tally) -> dict[int, int]:
        refused = self._pen.put_numbered("known", {at: U64.pack(cell) for at, cell in cells.items()}, tally)
        self._known.wrote(cells, refused)
        return refused


def _text(owner: ServiceName) -> str:
    return f"{owner.namespace}/{owner.name}"
