"""The records of the ledger: what is in use under which number, and what one sync is to write.

Rules of this file: pure data. Records hold no reference to what holds them: a ledger that is done with goes at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from ebpflb.dataplane.bpf.tables import by_slot
from ebpflb.model import Protocol
from ebpflb.routes import Backend, Frontend, ServicePortName

ServiceKey = tuple[ServicePortName, Protocol]

UNKNOWN = b""
"""The held row of a frontend that the kernel has in a form that refers to nothing sound."""


class Refused(Exception):
    """A route that no row can express."""


class Service:
    """A service port and its id; `refs` counts halves of rows, `keeping` those of them that have session affinity."""

    __slots__ = ("id", "keeping", "key", "refs", "sets")

    def __init__(self, key: ServiceKey, id: int) -> None:
        self.key = key
        self.id = id
        self.refs = 0
        self.keeping = 0
        self.sets: list[BackendSlots] = []


class Attachment:
    """Rows that a set of backends has beside its slots: `kind` says which, `refs` counts halves of rows that need them,
    `sums` tell their bytes apart, in order; () where that is not kept."""

    __slots__ = ("kind", "refs", "sums")

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.refs = 0
        self.sums: tuple[int, ...] = ()


class BackendSlots:
    """A slot range in use by the service of that id: `backends` as in the route, `ids` by slot (4 bytes each), active
    ones first. It does not hold the Service itself: without a cycle, a ledger that is done with goes at once."""

    __slots__ = ("backends", "count", "ids", "refs", "service", "start")

    def __init__(self, service: int, start: int, count: int, backends: tuple[Backend, ...], ids: bytes) -> None:
        self.service = service
        self.start = start
        self.count = count
        self.backends = backends
        self.ids = ids
        self.refs = 0

    @property
    def length(self) -> int:
        return len(self.backends)

    def numbers(self) -> array[int]:
        """The ids, by slot."""
        return array("I", self.ids)

    def by_slot(self) -> list[Backend]:
        """The backends, by slot."""
        return by_slot(self.backends)


class Ranges:
    """A set of source ranges in use."""

    __slots__ = ("cidrs", "id", "refs")

    def __init__(self, cidrs: tuple[str, ...], id: int) -> None:
        self.cidrs = cidrs
        self.id = id
        self.refs = 0


class Missing(NamedTuple):
    """Rows that could not be written: `sets`, `tables` and `members` by first slot, the others by id."""

    sets: AbstractSet[int]
    names: AbstractSet[int]
    ranges: AbstractSet[int]
    tables: AbstractSet[int]
    members: AbstractSet[int]


class Change:
    """What one sync is to write, before the frontends' rows: rows by id. `sets` are the new slot ranges, `tables` and
    `members` those that get such rows, by their first slot. `puts` are frontends' rows, `removals` frontends that go,
    `refused` those that cannot be had as wanted, each with service and reason."""

    __slots__ = ("backends", "members", "names", "puts", "ranges", "refused", "removals", "sets", "tables")

    def __init__(self) -> None:
        self.backends: dict[int, bytes] = {}
        self.sets: dict[int, BackendSlots] = {}
        self.tables: dict[int, BackendSlots] = {}
        self.members: dict[int, BackendSlots] = {}
        self.names: dict[int, bytes] = {}
        self.ranges: dict[int, list[bytes]] = {}
        self.puts: dict[Frontend, bytes] = {}
        self.removals: list[Frontend] = []
        self.refused: list[tuple[Frontend, ServicePortName, str]] = []
