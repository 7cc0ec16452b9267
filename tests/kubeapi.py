"""A model of an API server, in memory: objects, history, lists, watches, and every way in which they go wrong.

Rules of this file: it answers as a kube-apiserver does, as far as a client that lists and watches can tell: one
revision for all writes, selectors by which objects enter and leave a watch, pages that are of one revision and expire,
410 for what was compacted, silence for a version that is yet to come. What goes wrong is asked for, one Fault a
request. Objects are dicts as the API has them.

A stream ends when there is nothing more to say (`follow=False`: no test waits), or stays open until it is cut.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from ebpflb.source.kube import ApiError, Unreachable

Object = dict[str, Any]

PATHS = {
    "/api/v1/services": "services",
    "/apis/discovery.k8s.io/v1/endpointslices": "endpointslices",
    "/api/v1/nodes": "nodes",
}

# A restored store goes back by more than any test writes.
RESTORED = 10_000


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request, and after how many lines (of a watch).

    `what`: "down" (no server), "refuse" (`status`, `reason`, `retry_after`), "cut" (the connection breaks), "half" (it
    breaks within a line or body), "garbage" (bytes that are no JSON), "error" (an ERROR event of `status`), "hang"
    (nothing comes any more), "end" (it ends properly, and early), "again" (what was said last is said once more), "old"
    (what was said first is), "odd" (an object that cannot be read).
    """

    what: str
    after: int = 0
    status: int = 500
    reason: str = "InternalError"
    message: str = "it is broken"
    retry_after: float | None = None


class _Write(NamedTuple):
    revision: int
    resource: str
    before: Object | None
    after: Object | None


@dataclass
class Request:
    """What was asked, for tests to look at."""

    resource: str
    query: dict[str, str]
    timeout: float
    stream: bool

    @property
    def verb(self) -> str:
        if "sendInitialEvents" in self.query:
            return "stream"
        return "watch" if "watch" in self.query else "look" if self.query.get("limit") == "1" else "list"


@dataclass
class ApiServer:
    """The cluster's state. `streams`: it knows streaming lists; `fields`: it can select Services by clusterIP."""

    clock: Clock = field(default_factory=Clock)
    streams: bool = True
    fields: bool = True
    revision: int = 100_000
    compacted: int = 0
    objects: dict[str, dict[str, Object]] = field(default_factory=lambda: {each: {} for each in PATHS.values()})
    history: list[_Write] = field(default_factory=list)
    tokens: dict[str, tuple[list[Object], int]] = field(default_factory=dict)
    faults: dict[str, deque[Fault]] = field(default_factory=lambda: {each: deque() for each in PATHS.values()})
    # What happens before each answer and between lines: writes in the middle of things.
    meanwhile: deque[Callable[[], None]] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    generation: int = 0  # of connections: cut_all raises it

    # ---- Writing ----

    def put(self, resource: str, obj: Object) -> None:
        """Create or replace."""
        with self.changed:
            self.revision += 1
            obj = copy.deepcopy(obj)
            obj.setdefault("metadata", {})["resourceVersion"] = str(self.revision)
            key = key_of(obj)
            self._write(resource, key, obj)

    def delete(self, resource: str, key: str) -> None:
        """Delete, if it is there."""
        with self.changed:
            if key in self.objects[resource]:
                self.revision += 1
                self._write(resource, key, None)

    def _write(self, resource: str, key: str, obj: Object | None) -> None:
        before = self.objects[resource].get(key)
        if obj is None:
            del self.objects[resource][key]
        else:
            self.objects[resource][key] = obj
        self.history.append(_Write(self.revision, resource, before, obj))
        self.changed.notify_all()

    def compact(self) -> None:
        """Forget all history, and what the pages of lists were read from."""
        self.compacted = self.revision
        self.tokens.clear()

    def restore(self, objects: dict[str, dict[str, Object]]) -> None:
        """Bring back an old store: its objects, and a revision of long ago."""
        with self.changed:
            self.objects = copy.deepcopy(objects)
            self.revision -= RESTORED
            self.compacted = self.revision
            self.history.clear()
            self.tokens.clear()
            self.generation += 1
            self.changed.notify_all()

    def cut_all(self) -> None:
        """Break every connection."""
        with self.changed:
            self.generation += 1
            self.changed.notify_all()

    # ---- Reading ----

    def fault(self, resource: str, *faults: Fault) -> None:
        """What goes wrong with the next requests."""
        self.faults[resource].extend(faults)

    def matching(self, resource: str, query: Mapping[str, str]) -> list[Object]:
        return [each for _, each in sorted(self.objects[resource].items()) if self.matches(each, query)]

    def matches(self, obj: Object | None, query: Mapping[str, str]) -> bool:
        if obj is None:
            return False
        meta = obj["metadata"]
        label = query.get("labelSelector", "")
        if label and label.removeprefix("!") in (meta.get("labels") or {}):
            return False
        select = query.get("fieldSelector", "")
        if select.startswith("metadata.name="):
            return bool(meta["name"] == select.partition("=")[2])
        return not (select == "spec.clusterIP!=None" and obj["spec"].get("clusterIP") == "None")

    def happen(self) -> None:
        """One of the things that happen meanwhile."""
        if self.meanwhile:
            self.meanwhile.popleft()()


def key_of(obj: Object) -> str:
    meta = obj["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if meta.get("namespace") else str(meta["name"])


class ModelClient:
    """A Client of `server`. With `follow`, a watch stays open until it is cut."""

    def __init__(self, server: ApiServer, *, follow: bool = False, page: int | None = None) -> None:
        self.server = server
        self.follow = follow
        self.page = page  # the most objects that the server puts in a page, whatever it was asked for
        self.closed = False

    def get(self, path: str, query: Mapping[str, str], *, timeout: float, stream: bool = False) -> ModelReply:
        server = self.server
        resource = PATHS[path]
        if self.closed:
            raise Unreachable("the client is closed")
        request = Request(resource, dict(query), timeout, stream)
        server.requests.append(request)
        server.happen()
        fault = server.faults[resource].popleft() if server.faults[resource] else None
        if fault is not None and fault.what == "down":
            raise Unreachable("https://api:6443: connection refused")
        if fault is not None and fault.what == "refuse":
            raise ApiError(fault.status, fault.reason, fault.message, fault.retry_after)
        if query.get("fieldSelector", "").startswith("spec.") and not server.fields:
            raise ApiError(400, "BadRequest", 'field label not supported: "spec.clusterIP"')
        if "sendInitialEvents" in query and not server.streams:
            raise ApiError(422, "Invalid", "sendInitialEvents: Forbidden: unless the feature gate is enabled")
        if "watch" not in query:
            return ModelReply(self, request, fault, body=self._list(resource, query))
        if "sendInitialEvents" in query:
            assert query["resourceVersionMatch"] == "NotOlderThan"
        elif int(query["resourceVersion"]) < server.compacted:
            raise ApiError(410, "Expired", "too old resource version")
        return ModelReply(self, request, fault)

    def send(self, method: str, path: str, body: bytes, *, content_type: str, timeout: float) -> bytes:
        raise AssertionError("nothing is written here")

    def close(self) -> None:
        with self.server.changed:
            self.closed = True
            self.server.changed.notify_all()

    def _list(self, resource: str, query: Mapping[str, str]) -> bytes:
        server = self.server
        token = query.get("continue", "")
        if token and token not in server.tokens:
            raise ApiError(410, "Expired", "the provided continue parameter is too old")
        objects, revision = server.tokens.get(token) or (server.matching(resource, query), server.revision)
        limit = int(query.get("limit", "0")) or len(objects)
        limit = min(limit, self.page) if self.page and "limit" in query else limit
        meta: Object = {"resourceVersion": str(revision)}
        if len(objects) > limit:
            meta["continue"] = f"token-{len(server.requests)}"
            server.tokens[meta["continue"]] = (objects[limit:], revision)
        return msgspec.json.encode({"kind": "List", "metadata": meta, "items": objects[:limit] or None})


class ModelReply:
    """One answer: a body or a stream, and what goes wrong with it."""

    def __init__(self, client: ModelClient, request: Request, fault: Fault | None, *, body: bytes = b"") -> None:
        self._client = client
        self._server = client.server
        self._request = request
        self._fault = fault or Fault("")
        self._body = body
        self._generation = client.server.generation

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        pass

    def read(self) -> bytes:
        match self._fault.what:
            case "cut" | "hang":
                self._server.clock.now += self._request.timeout if self._fault.what == "hang" else 0.0
                raise Unreachable("https://api:6443: the connection broke")
            case "half":
                return self._body[: len(self._body) // 2]
            case "garbage":
                return b"<html>bad gateway</html>"
        return self._body

    def lines(self) -> Iterator[bytes]:
        fault, said = self._fault, list[bytes]()
        for data in self._events():
            self._server.happen()
            self._check_connection()
            if fault.what and len(said) >= fault.after:
                yield from self._wrong(data, said)
                if fault.what not in ("garbage", "again", "old", "odd"):
                    return
                fault = Fault("")
            yield data
            said.append(data)
        if fault.what:
            yield from self._wrong(b'{"type":"ADDED"}', said)

    def _check_connection(self) -> None:
        if self._client.closed or self._server.generation != self._generation:
            raise Unreachable("https://api:6443: the connection broke")

    def _wrong(self, data: bytes, said: list[bytes]) -> Iterator[bytes]:
        match self._fault.what:
            case "cut":
                raise Unreachable("https://api:6443: the connection broke")
            case "half":
                yield data[: len(data) // 2]
                raise Unreachable("https://api:6443: the connection broke")
            case "hang":
                self._server.clock.now += self._request.timeout
                raise Unreachable("https://api:6443: nothing came")
            case "garbage":
                yield b"\x00 garbage"
            case "error":
                status = {"kind": "Status", "code": self._fault.status, "reason": self._fault.reason,
                          "message": self._fault.message, "metadata": {}, "status": "Failure"}  # fmt: skip
                yield msgspec.json.encode({"type": "ERROR", "object": status})
            case "again":
                yield from said[-1:]
            case "old":
                yield from said[:1]
            case "odd":
                yield b'{"type":"MODIFIED","object":{"metadata":{"name":"odd","namespace":"x"},"spec":7,"ports":7}}'

    def _events(self) -> Iterator[bytes]:
        server, query, resource = self._server, self._request.query, self._request.resource
        if "sendInitialEvents" in query:
            at, found = server.revision, server.matching(resource, query)
            yield from (event("ADDED", each) for each in found[:1])
            yield event("BOOKMARK", bookmark(at))  # what is no end is no end
            yield from (event("ADDED", each) for each in found[1:])
            yield event("BOOKMARK", bookmark(at, initial=True))
        else:
            at = int(query["resourceVersion"])
        if at > server.revision:  # of a store that was restored since
            server.clock.now += self._request.timeout
            raise Unreachable("https://api:6443: nothing came")
        while True:
            news = [each for each in list(server.history) if each.revision > at]
            for write in news:
                at = write.revision
                if write.resource == resource:
                    yield from self._event_of(write)
            if self._client.follow and not news:
                self._wait(at)
            elif not news:
                yield event("BOOKMARK", bookmark(at))
                if not any(each.revision > at for each in server.history):
                    server.clock.now += int(query["timeoutSeconds"])
                    return

    def _wait(self, at: int) -> None:
        server = self._server
        with server.changed:
            while server.revision <= at and not self._client.closed and server.generation == self._generation:
                server.changed.wait()
        self._check_connection()

    def _event_of(self, write: _Write) -> Iterator[bytes]:
        was, is_ = (self._server.matches(each, self._request.query) for each in (write.before, write.after))
        if is_ and write.after is not None:
            yield event("MODIFIED" if was else "ADDED", write.after)
        elif was and write.before is not None:
            gone = {**write.before, "metadata": {**write.before["metadata"], "resourceVersion": str(write.revision)}}
            yield event("DELETED", gone)


def event(type_: str, obj: Object) -> bytes:
    """A line of a watch."""
    return msgspec.json.encode({"type": type_, "object": obj})


def bookmark(revision: int, *, initial: bool = False) -> Object:
    """The object of a bookmark."""
    meta: Object = {"resourceVersion": str(revision)}
    if initial:
        meta["annotations"] = {"k8s.io/initial-events-end": "true"}
    return {"kind": "Any", "apiVersion": "v1", "metadata": meta}


# ---- Objects ----


def service(name: str, ip: str = "172.30.0.1", *, namespace: str = "ns", **spec: object) -> Object:
    """A Service with one port."""
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
        "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip],
                 "ports": [{"port": 80, "protocol": "TCP", "targetPort": 8080}], **spec},
    }  # fmt: skip


def slice_(name: str, owner: str, *pods: str, namespace: str = "ns", **meta: Any) -> Object:
    """An EndpointSlice of one port."""
    labels = {"kubernetes.io/service-name": owner, **meta.pop("labels", {})}
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": namespace, "labels": labels, **meta},
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [each], "conditions": {"ready": True}, "nodeName": "node1"} for each in pods],
    }  # fmt: skip


def node(name: str = "node1", zone: str = "zone-a") -> Object:
    """A Node."""
    return {
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.2"}]},
    }  # fmt: skip
