"""Where the truth comes from: sources turn files or watches into events, the store turns events into Snapshots.

Rules of this package: `parse` and `store` are pure; a source never sees policy or a dataplane, and never raises for
what it read: a bad object is a Problem and the rest still applies. Data leaves here as events only.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Protocol, TypeAlias

import msgspec

from ebpflb.model import EndpointSlice, Node, Problem, Service, ServiceName


class PutService(msgspec.Struct, frozen=True, gc=False):
    """A Service is now this."""

    service: Service


class DropService(msgspec.Struct, frozen=True, gc=False):
    """A Service is gone, or is no longer ours to serve (headless, ExternalName, another proxy's)."""

    name: ServiceName


class PutSlice(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice is now this; it may have moved from another Service. `triggered` is when the change of a pod
    happened that led to it, in seconds since the epoch, by the annotation
    endpoints.kubernetes.io/last-change-trigger-time; 0 where that is unknown or long past, as in a first list."""

    slice: EndpointSlice
    triggered: float = 0.0


class DropSlice(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice is gone; `name` is its own namespace and name."""

    name: ServiceName


class PutNode(msgspec.Struct, frozen=True, gc=False):
    """What a Node object says of this node: its `addresses` are empty, the kernel's are added by the store."""

    node: Node


class DropNode(msgspec.Struct, frozen=True, gc=False):
    """This node's Node object is gone."""


class LocalAddresses(msgspec.Struct, frozen=True, gc=False):
    """All addresses that the kernel calls local, and the one per family that its default route prefers."""

    addresses: tuple[str, ...]
    primary: tuple[str, ...]


class Synced(msgspec.Struct, frozen=True, gc=False):
    """The source `source` has said everything that existed when it began; nothing is written before all have."""

    source: str


class Remembered(msgspec.Struct, frozen=True, gc=False):
    """What the source `source` has said so far is what it remembers of an earlier run, saved at `saved` (seconds since
    the epoch). It may be served, but nothing may be taken away for not being in it, until `Synced` follows."""

    source: str
    saved: float


Event: TypeAlias = (
    PutService | DropService | PutSlice | DropSlice | PutNode | DropNode | LocalAddresses | Remembered | Synced
)


class SourceState(enum.Enum):
    """`STARTING`: no list is complete yet; `LIVE`: what it says is true now; `STALE`: it serves what it knew while it
    cannot be reached."""

    STARTING = "starting"
    LIVE = "live"
    STALE = "stale"


class Condition(msgspec.Struct, frozen=True):
    """How a source is doing. `detail` is one sentence ("" if there is nothing to say), `since` when it came into
    this state (seconds since the epoch), `failures` the attempts that failed since it last worked, `retry_in` seconds
    until the next one (None if none is planned), `idle` seconds since it last showed life of its own: a number that
    grows past all its deadlines means that it hangs."""

    state: SourceState
    since: float = 0.0
    detail: str = ""
    failures: int = 0
    retry_in: float | None = None
    idle: float = 0.0


LIVE = Condition(SourceState.LIVE)
"""What a source says that cannot be out of reach."""


class Source(Protocol):
    """A stream of events with a descriptor to wait on. Reading never blocks."""

    @property
    def name(self) -> str:
        """As in `Synced.source`."""

    def fileno(self) -> int:
        """Readable when `read` has something to say."""

    def read(self) -> Iterable[Event]:
        """All that is new. The first call gives everything that exists, closed by `Synced` once that is complete."""

    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with the source's content now (not a history)."""

    def condition(self) -> Condition:
        """How it is doing now."""

    def close(self) -> None:
        """Release descriptors."""
