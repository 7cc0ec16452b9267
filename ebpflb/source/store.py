"""Merges what the sources say into Snapshots.

Rules of this file: pure, and level-triggered: the end state depends on the last event about each object, never on the
order among objects. Taking the next Snapshot costs the change since the last one. Nothing is given out before every
source that was named at the start has said that its first list is complete, or that what it said is what it remembers.
"""

from __future__ import annotations

from collections.abc import Iterable

import immutables
import msgspec

from ebpflb.model import EndpointSlice, Node, Service, ServiceName, Snapshot
from ebpflb.source import (
    DropNode,
    DropService,
    DropSlice,
    Event,
    LocalAddresses,
    PutNode,
    PutService,
    PutSlice,
    Remembered,
    Synced,
)


class Change(msgspec.Struct, frozen=True):
    """A Snapshot, and the Services whose routes may differ from those of the one before (a superset of those that do).
    `touched` is None if all may: in the first Snapshot, and when the node itself changed."""

    snapshot: Snapshot
    touched: frozenset[ServiceName] | None


class Store:
    """What was said so far. `node_name` is this node; `sources` are the names to hear `Synced` from."""

    def __init__(self, node_name: str, sources: Iterable[str]) -> None:
        # The maps of the next Snapshot, still open: many events between two Snapshots change them in place.
        self._services = immutables.Map[ServiceName, Service]().mutate()
        self._slices = immutables.Map[ServiceName, tuple[EndpointSlice, ...]]().mutate()
        self._by_name: dict[ServiceName, EndpointSlice] = {}
        self._waiting = set(sources)
        self._remembered: dict[str, float] = {}
        self._said: Node | None = None
        self._local = LocalAddresses((), ())
        self._node = Node(node_name)
        self._touched: set[ServiceName] | None = None
        self._changed = True

    @property
    def synced(self) -> bool:
        """Whether every source has said that its first list is complete."""
        return not self._waiting

    @property
    def ready(self) -> bool:
        """Whether there is something to serve: every source has said all, or at least what it remembers."""
        return self._waiting <= self._remembered.keys()

    @property
    def remembered(self) -> float | None:
        """While something of what is given out is remembered only: when the oldest of it was saved (seconds since the
        epoch)."""
        return min((self._remembered[source] for source in self._waiting & self._remembered.keys()), default=None)

    def apply(self, event: Event) -> bool:
        """Take one event in; whether it says anything new."""
        match event:
            case PutSlice(slice=found):
                return self._set_slice(found.name, found)
            case PutService(service=service):
                return self._set_service(service.name, service)
            case DropSlice(name=name):
                return self._set_slice(name, None)
            case DropService(name=name):
                return self._set_service(name, None)
            case PutNode(node=node):
                return node.name == self._node.name and self._set_node(node, self._local)
            case DropNode():
                return self._set_node(None, self._local)
            case LocalAddresses():
                return self._set_node(self._said, event)
            case Remembered(source=source, saved=saved):
                news = source in self._waiting and source not in self._remembered
                self._remembered.setdefault(source, saved)
                return news
            case Synced(source=source):
                # The last one changes what `take` answers, even where nothing exists.
                news = source in self._waiting
                self._waiting.discard(source)
                return news

    def snapshot(self) -> Snapshot:
        """All that was said so far, complete or not."""
        services, slices = self._services.finish(), self._slices.finish()
        self._services, self._slices = services.mutate(), slices.mutate()
        return Snapshot(services, slices, self._node)

    def take(self) -> Change | None:
        """What is new since the last call; None if nothing is, or before there is something to serve."""
        if not self.ready or not self._changed:
            return None
        change = Change(self.snapshot(), None if self._touched is None else frozenset(self._touched))
        self._touched = set()
        self._changed = False
        return change

    # ---- One object ----

    def _set_service(self, name: ServiceName, service: Service | None) -> bool:
        if self._services.get(name) == service:
            return False
        if service is None:
            del self._services[name]
        else:
            self._services[name] = service
        self._touch(name)
        return True

    def _set_slice(self, name: ServiceName, found: EndpointSlice | None) -> bool:
        old = self._by_name.get(name)
        if old == found:
            return False
        if found is None:
            del self._by_name[name]
        else:
            self._by_name[name] = found
        if old is not None and (found is None or found.service != old.service):
            self._replace(old.service, name, None)
        if found is not None:
            self._replace(found.service, name, found)
        return True

    def _replace(self, service: ServiceName, name: ServiceName, found: EndpointSlice | None) -> None:
        """Put or remove one slice among those of a Service, which stay sorted by name."""
        kept = [each for each in self._slices.get(service, ()) if each.name != name]
        if found is not None:
            kept.append(found)
            if len(kept) > 1:
                kept.sort(key=lambda each: each.name)
        if kept:
            self._slices[service] = tuple(kept)
        else:
            del self._slices[service]
        self._touch(service)

    def _set_node(self, said: Node | None, local: LocalAddresses) -> bool:
        """The kernel says which addresses there are; the Node object, if there is one, says which are the main ones."""
        self._said, self._local = said, local
        old = self._node
        base = said or Node(old.name)
        node = msgspec.structs.replace(base, addresses=local.addresses, primary=base.primary or local.primary)
        if node == old:
            return False
        self._node = node
        self._changed = True
        if msgspec.structs.replace(node, known=old.known, deleting=old.deleting) != old:
            self._touched = None  # every route may look at the rest
        return True

    def _touch(self, name: ServiceName) -> None:
        self._changed = True
        if self._touched is not None:
            self._touched.add(name)
