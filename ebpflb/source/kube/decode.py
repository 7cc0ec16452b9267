"""From the bytes that an API server sends to events: pages of lists, and lines of watches.

Rules of this file: pure. Bodies are decoded into the Structs of `wire` and from there into the model, one object at a
time, so that an object that cannot be read costs itself only and no list is ever held as objects of the API. What is
not ours to serve (headless, an ExternalName, another proxy's) is said as gone: it may have been ours before. Nothing
raises but for bytes that are no JSON, or no list and no watch at all: SourceError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

import msgspec

from ebpflb.errors import SourceError
from ebpflb.model import ServiceName
from ebpflb.source import DropNode, DropService, DropSlice, Event, PutNode, PutService, PutSlice, parse, wire

TRIGGERED = "endpoints.kubernetes.io/last-change-trigger-time"
INITIAL_EVENTS_END = "k8s.io/initial-events-end"

# Bytes that are JSON, and Structs that do not fit: what decoding an object may come to.
_UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)


class Said(NamedTuple):
    """What one object comes to. `event` is None if it cannot be read: `wrong` says why then, and what the object was
    before stays in force. `name` is None if not even that could be read; a Node's namespace is ""."""

    name: ServiceName | None
    event: Event | None
    wrong: str = ""


class Page(NamedTuple):
    """A list or a part of one. `version` is the list's resourceVersion, `more` the token of the next part or ""."""

    said: tuple[Said, ...]
    version: str
    more: str


class Change(NamedTuple):
    """A line of a watch about an object; `version` is its resourceVersion, "" if it could not be read."""

    said: Said
    version: str


class Bookmark(NamedTuple):
    """A line of a watch that says how far it is. `initial` marks the end of a streaming list."""

    version: str
    initial: bool


class Failure(NamedTuple):
    """A line of a watch that ends it: a Status. `code` is as of HTTP, `reason` its word for machines, `retry_after`
    seconds, None if it asks for no wait."""

    code: int
    reason: str
    message: str
    retry_after: float | None = None


Line: TypeAlias = Change | Bookmark | Failure


class Kind(NamedTuple):
    """A resource that is watched. `resource` is its plural as in paths and in rules of RBAC, `group` its API group (""
    for the core's). `labels` and `fields` are the selectors that kube-proxy asks with; `fields_optional`: a server may
    not know that field, and what it would have left out is left out here. `put` makes an event of what was decoded,
    None if that is not ours to serve."""

    kind: str
    resource: str
    group: str
    path: str
    labels: str
    fields: str
    fields_optional: bool
    decoder: msgspec.json.Decoder[Any]
    put: Callable[[Any, float], tuple[ServiceName, Event] | None]
    drop: Callable[[ServiceName], Event]
    namespaced: bool = True


_Put: TypeAlias = tuple[ServiceName, Event] | None


def _put_service(obj: wire.Service, _after: float) -> _Put:
    found = parse.service(obj)
    return None if found is None else (found.name, PutService(found))


def _put_slice(obj: wire.EndpointSlice, after: float) -> _Put:
    found = parse.endpoint_slice(obj)
    return None if found is None else (found.name, PutSlice(found, _triggered(obj.metadata, after)))


SERVICES = Kind(
    "Service", "services", "", "/api/v1/services", f"!{parse.SERVICE_PROXY_NAME}", "spec.clusterIP!=None", True,
    msgspec.json.Decoder(wire.Service), _put_service, DropService,
)  # fmt: skip

SLICES = Kind(
    "EndpointSlice", "endpointslices", "discovery.k8s.io", "/apis/discovery.k8s.io/v1/endpointslices",
    f"!{parse.HEADLESS}", "", False, msgspec.json.Decoder(wire.EndpointSlice), _put_slice, DropSlice,
)  # fmt: skip


def node(name: str) -> Kind:
    """The Node `name` alone."""

    def put(obj: wire.Node, _after: float) -> _Put:
        found = parse.node(obj)
        return (ServiceName("", name), PutNode(found)) if found.name == name else None

    return Kind(
        "Node", "nodes", "", "/api/v1/nodes", "", f"metadata.name={name}", False, msgspec.json.Decoder(wire.Node), put,
        lambda _: DropNode(), namespaced=False,
    )  # fmt: skip


# ---- Shapes ----


class _ListMeta(msgspec.Struct, rename="camel", frozen=True, gc=False):
    resource_version: str | None = None
    continue_: str | None = msgspec.field(default=None, name="continue")


class _List(msgspec.Struct, frozen=True, gc=False):
    metadata: _ListMeta | None = None
    items: list[msgspec.Raw] | None = None


class _Line(msgspec.Struct, frozen=True, gc=False):
    type: str | None = None
    object: msgspec.Raw = msgspec.Raw(b"{}")


class _Plain(msgspec.Struct, frozen=True, gc=False):
    """Any object's metadata, for when the rest does not matter or cannot be read."""

    metadata: wire.Meta | None = None


class _NameMeta(msgspec.Struct, rename="camel", frozen=True, gc=False):
    name: str | None = None
    namespace: str | None = None
    resource_version: str | None = None


class _Named(msgspec.Struct, frozen=True, gc=False):
    """The least that tells which object it is: what is left to try on one that cannot be read."""

    metadata: _NameMeta | None = None


class _Details(msgspec.Struct, rename="camel", frozen=True, gc=False):
    retry_after_seconds: float | None = None


class Status(msgspec.Struct, frozen=True, gc=False):
    """v1 Status: how the API says no, in place of an answer or inside a watch."""

    kind: str | None = None
    code: int | None = None
    reason: str | None = None
    message: str | None = None
    details: _Details | None = None


_LIST = msgspec.json.Decoder(_List)
_LINE = msgspec.json.Decoder(_Line)
_PLAIN = msgspec.json.Decoder(_Plain)
_NAMED = msgspec.json.Decoder(_Named)
_STATUS = msgspec.json.Decoder(Status)


# ---- Lists and lines ----


def page(kind: Kind, data: bytes) -> Page:
    """What a list's body says. Raises SourceError if it is no list."""
    try:
        found = _LIST.decode(data)
    except _UNREADABLE as error:
        raise SourceError(f"the list of {kind.resource} cannot be read: {_words(error)}") from error
    meta = found.metadata
    if meta is None:
        raise SourceError(f"the list of {kind.resource} has no metadata: is this a Kubernetes API server?")
    said = tuple([_object(kind, raw, math.inf)[0] for raw in found.items or ()])
    return Page(said, meta.resource_version or "", meta.continue_ or "")


def line(kind: Kind, data: bytes, *, after: float = math.inf) -> Line:
    """What a line of a watch says. When pods changed is taken note of if that was later than `after` (seconds since the
    epoch); never in a streaming list. Raises SourceError if it is no line of a watch."""
    try:
        found = _LINE.decode(data)
    except _UNREADABLE as error:
        raise SourceError(f"the watch of {kind.resource} sent what cannot be read: {_words(error)}") from error
    match found.type:
        case "ADDED" | "MODIFIED":
            return Change(*_object(kind, found.object, after))
        case "DELETED":
            return _deleted(kind, found.object)
        case "BOOKMARK":
            return _bookmark(kind, found.object)
        case "ERROR":
            return _failure(found.object)
    raise SourceError(f"the watch of {kind.resource} sent a line that is no event")


def _object(kind: Kind, raw: msgspec.Raw, after: float) -> tuple[Said, str]:
    """An object that exists, and its resourceVersion."""
    try:
        obj = kind.decoder.decode(raw)
        put = kind.put(obj, after)
    except _UNREADABLE as error:
        name, version = _named(kind, raw)
        return Said(name, None, _words(error)), version
    meta: wire.Meta | None = obj.metadata
    version = (meta and meta.resource_version) or ""
    if put is not None and put[0].name:
        return Said(*put), version
    found = _name(kind, meta)
    if found is None:
        return Said(None, None, "an object without a name"), version
    return Said(found, kind.drop(found)), version


def _deleted(kind: Kind, raw: msgspec.Raw) -> Change:
    """An object that is gone: nothing but its name matters."""
    name, version = _named(kind, raw)
    if name is None:
        return Change(Said(None, None, "the deletion of an object without a name"), version)
    return Change(Said(name, kind.drop(name)), version)


def _named(kind: Kind, raw: msgspec.Raw) -> tuple[ServiceName | None, str]:
    """Name and resourceVersion of an object, as far as they can be read."""
    try:
        meta = _NAMED.decode(raw).metadata
    except _UNREADABLE:
        return None, ""
    return _name(kind, meta), (meta and meta.resource_version) or ""


def _name(kind: Kind, meta: wire.Meta | _NameMeta | None) -> ServiceName | None:
    if meta is None or not meta.name:
        return None
    return ServiceName((meta.namespace or "default") if kind.namespaced else "", meta.name)


def _bookmark(kind: Kind, raw: msgspec.Raw) -> Bookmark:
    try:
        meta = _PLAIN.decode(raw).metadata
    except _UNREADABLE as error:
        raise SourceError(f"the watch of {kind.resource} sent what cannot be read: {_words(error)}") from error
    if meta is None or not meta.resource_version:
        raise SourceError(f"the watch of {kind.resource} sent a bookmark without a resourceVersion")
    return Bookmark(meta.resource_version, (meta.annotations or {}).get(INITIAL_EVENTS_END) == "true")


def _failure(raw: msgspec.Raw) -> Failure:
    try:
        status = _STATUS.decode(raw)
    except _UNREADABLE:
        status = Status()
    wait = status.details.retry_after_seconds if status.details else None
    message = " ".join((status.message or "").split()) or "an error without words"
    return Failure(status.code or 500, status.reason or "", message, wait or None)


# ---- Details ----


def _triggered(meta: wire.Meta | None, after: float) -> float:
    """When the pods changed that this slice is about, if it says so and that was later than `after`; else 0."""
    text = meta.annotations.get(TRIGGERED) if meta and meta.annotations else None
    if not text or after == math.inf:
        return 0.0
    try:
        at = datetime.fromisoformat(text)
        seconds = at.timestamp() if at.tzinfo is not None else 0.0
    except (ValueError, OverflowError, OSError):
        return 0.0
    return seconds if seconds > after else 0.0


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said, _, at = str(error).partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    said = " ".join(said.split())
    return f"{path}: {said}" if path else said
