"""Where the truth comes from: sources turn files or watches into events, the store turns events into Snapshots.

Rules of this package: `parse` and `store` are pure; a source never sees policy or a dataplane, and never raises for
what it read: a bad object is a Problem and the rest still applies. Data leaves here as events only.
"""

from __future__ import annotations

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
    """An EndpointSlice is now this; it may have moved from another Service."""

    slice: EndpointSlice


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


Event: TypeAlias = PutService | DropService | PutSlice | DropSlice | PutNode | DropNode | LocalAddresses | Synced


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

    def close(self) -> None:
        """Release descriptors."""
