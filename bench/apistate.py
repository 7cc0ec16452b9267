"""What the API server of a benchmark holds, and how it changes.

Rules of this file: bytes are made when an object changes or, of lists, at the start, so that answering costs nothing
but sending. No I/O but through watchers, which are given away under the cluster's lock: what one has been told at its
start and what it is told later neither overlap nor leave a gap.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from bench.clusters import endpoint_ips, endpoint_slice, node, service, with_managed_fields
from bench.orders import LIVE, Asked, Churn, Written, churned

_HISTORY = 2000  # events that a watch may still ask for
_LEVEL = 1

_TRIGGERED = "endpoints.kubernetes.io/last-change-trigger-time"


class Watcher(Protocol):
    """A connection that a watch has been granted on."""

    def chunk(self, *lines: bytes) -> None:
        """Send lines. Raises OSError."""

    def cut(self) -> None:
        """Break the connection."""


class Resource:
    """All objects of one kind, as JSON without kind and apiVersion, by key."""

    def __init__(self, kind: str, version: str, name: str) -> None:
        self.name = name
        self._kind = kind
        self._version = version
        self._items: dict[str, bytes] = {}
        self._pages: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}
        self._prefix = f'{{"kind":"{kind}","apiVersion":"{version}",'.encode()
        self.history: deque[tuple[int, bytes]] = deque(maxlen=_HISTORY)
        self.watches: set[Watcher] = set()

    def put(self, key: str, obj: dict[str, object]) -> bytes:
        """Keep it; its line in a watch."""
        item = msgspec.json.encode({name: value for name, value in obj.items() if name not in ("kind", "apiVersion")})
        known = key in self._items
        self._items[key] = item
        self._pages.clear()
        return self._line("MODIFIED" if known else "ADDED", item)

    def bookmark(self, revision: int, *, initial: bool = False) -> bytes:
        notes = ',"annotations":{"k8s.io/initial-events-end":"true"}' if initial else ""
        return self._line("BOOKMARK", f'{{"metadata":{{"resourceVersion":"{revision}"{notes}}}}}'.encode())

    def one(self) -> bytes:
        """Of a resource that has one object, that object."""
        (item,) = self._items.values()
        return self._prefix + item[1:]

    def lines(self) -> Iterator[bytes]:
        """All of them, as a streaming list says them."""
        return (self._line("ADDED", item) for item in list(self._items.values()))

    def page(self, start: int, limit: int, revision: int) -> tuple[bytes, bytes]:
        """A list from the object number `start` on: plain and compressed."""
        key = (start, limit, revision)
        found = self._pages.get(key)
        if found is None:
            items = list(self._items.values())
            more = limit and start + limit < len(items)
            part = items[start : start + limit] if limit else items[start:]
            rest = f',"continue":"{start + limit}","remainingItemCount":{len(items) - start - limit}' if more else ""
            head = f'{{"kind":"{self._kind}List","apiVersion":"{self._version}","metadata":'
            head += f'{{"resourceVersion":"{revision}"{rest}}},"items":['
            plain = head.encode() + b",".join(part) + b"]}\n"
            compressor = zlib.compressobj(_LEVEL, wbits=31)
            found = plain, compressor.compress(plain) + compressor.flush()
            self._pages[key] = found
        return found

    def _line(self, type_: str, item: bytes) -> bytes:
        return b'{"type":"%s","object":%s%s}\n' % (type_.encode(), self._prefix, item[1:])


class Cluster:
    """The state, and who watches it. `lock` is held for whatever reads or changes both."""

    def __init__(self, services: int, endpoints: int, streams: bool) -> None:
        self.lock = threading.Lock()
        self.revision = 3_000_000
        self.oldest = self.revision
        self.streams = streams
        self.asked: list[Asked] = []
        self._endpoints = endpoints
        self._services = services
        self.slices = Resource("EndpointSlice", "discovery.k8s.io/v1", "endpointslices")
        self.resources = {
            "/api/v1/services": Resource("Service", "v1", "services"),
            "/apis/discovery.k8s.io/v1/endpointslices": self.slices,
            "/api/v1/nodes": Resource("Node", "v1", "nodes"),
            "/apis/networking.k8s.io/v1/servicecidrs": Resource("ServiceCIDR", "networking.k8s.io/v1", "servicecidrs"),
        }
        for number in range(services + 1):
            addresses = endpoint_ips(number, endpoints) if number < services else [LIVE[0]]
            self.resources["/api/v1/services"].put(str(number), with_managed_fields(service(number)))
            self.slices.put(str(number), _slice(number, addresses, self.revision))
        self.resources["/api/v1/nodes"].put("0", with_managed_fields(node(0)))
        for resource in self.resources.values():
            for start in range(0, services + 1, 500):
                resource.page(start, 500, self.revision)

    def _others(self, number: int) -> list[str]:
        """The endpoints that a Change of this Service keeps."""
        return endpoint_ips(number, self._endpoints)[:-1] if number < self._services else []

    def change(self, number: int, address: str) -> float:
        """Carry out a Change; when it was written."""
        with self.lock:
            self.revision += 1
            addresses = self._others(number) + [address]
            line = self.slices.put(str(number), _slice(number, addresses, self.revision))
            self.slices.history.append((self.revision, line))
            begin = time.monotonic()
            self._tell(self.slices, line)
            return begin

    def churn(self, order: Churn) -> float:
        """Carry out a Churn; when the last change was written."""
        with Written(order.file, order.count) as written:
            begin = time.monotonic()
            for turn in range(order.count):
                wait = begin + turn / order.rate - time.monotonic()
                if wait > 0:
                    time.sleep(wait)
                written[turn] = self.change(*churned(turn, self._services))
            return written[order.count - 1]

    def bookmark(self) -> None:
        """Carry out a Bookmark."""
        with self.lock:
            for resource in self.resources.values():
                self._tell(resource, resource.bookmark(self.revision))

    def forget(self) -> None:
        """Carry out a Forget."""
        with self.lock:
            self.revision += 1
            self.oldest = self.revision
            for resource in self.resources.values():
                resource.history.clear()
                for each in list(resource.watches):
                    each.cut()
                resource.watches.clear()

    def _tell(self, resource: Resource, line: bytes) -> None:
        for each in list(resource.watches):
            try:
                each.chunk(line)
            except OSError:
                each.cut()
                resource.watches.discard(each)


def slice_list(numbers: Iterable[int], endpoints: int) -> bytes:
    """The slices of these Services as one list."""
    found = Resource("EndpointSlice", "discovery.k8s.io/v1", "endpointslices")
    for number in numbers:
        found.put(str(number), _slice(number, endpoint_ips(number, endpoints), 0))
    return found.page(0, 0, 1)[0]


def _slice(number: int, addresses: list[str], revision: int) -> dict[str, object]:
    found = endpoint_slice(number, addresses, revision=revision)
    metadata = found["metadata"]
    assert isinstance(metadata, dict)
    metadata["annotations"] = {_TRIGGERED: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    return with_managed_fields(found)
