"""A Notice, and how it looks as an Event object of events.k8s.io/v1.

Rules of this file: pure. What the API server demands is kept here: lengths, names, which fields a new Event needs.

An Event about a Service bears the Service's uid, because `kubectl describe` looks for that; an Event about a node bears
the node's name instead, by the custom of kubelet and kube-proxy, and lies in the namespace `default`.
"""

from __future__ import annotations

import datetime
import enum
import hashlib

import msgspec

from ebpflb.model import ServiceName

CONTROLLER = "ebpflb"
"""The Events' reportingController."""

# What the API server allows.
_MOST_NOTE = 1024  # bytes
_MOST_INSTANCE = 128
_MOST_NAME = 253


class NoticeType(enum.Enum):
    """An Event's `type`."""

    NORMAL = "Normal"
    WARNING = "Warning"


class Notice(msgspec.Struct, frozen=True):
    """Something to tell whoever looks at an object. `about` is a Service, or None for this node. `reason` and `action`
    are CamelCase words for machines: why, and what was done or failed. `note` is a sentence or two. `everywhere`:
    every node of the cluster comes to say the very same, so that one Event will do for all."""

    about: ServiceName | None
    type: NoticeType
    reason: str
    action: str
    note: str
    everywhere: bool = False


def namespace_of(notice: Notice) -> str:
    """Where its Event lies."""
    return notice.about.namespace if notice.about else "default"


def name_of(notice: Notice, node: str, first: float) -> str:
    """The name of its Event, which happened first at `first` (seconds since the epoch). Of one that every node would
    write it is the same on every node, so that the first one makes it."""
    who = "" if notice.everywhere else f"{node} {first}"
    text = "\0".join((who, notice.reason, notice.action, notice.note))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    subject = notice.about.name if notice.about else node
    return f"{subject[: _MOST_NAME - len(digest) - 1].rstrip('-.')}.{digest}"


def event_of(
    notice: Notice, node: str, name: str, uid: str, count: int, first: float, last: float
) -> dict[str, object]:
    """A new Event by the node `node`. `uid` is that of the Service that it is about ("" if unknown); it happened
    `count` times from `first` to `last` (seconds since the epoch)."""
    event: dict[str, object] = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": namespace_of(notice), "name": name},
        "eventTime": _micro_time(first),
        "type": notice.type.value,
        "reason": notice.reason,
        "action": notice.action,
        "note": _shortened(notice.note, _MOST_NOTE),
        "regarding": _regarding(notice.about, node, uid),
        "reportingController": CONTROLLER,
        "reportingInstance": f"{CONTROLLER}-{node}"[:_MOST_INSTANCE],
    }
    if count > 1 and not notice.everywhere:
        event["series"] = series_of(count, last)
    return event


def series_of(count: int, last: float) -> dict[str, object]:
    """What makes an Event a series; `count` is two at least."""
    return {"count": count, "lastObservedTime": _micro_time(last)}


def _regarding(service: ServiceName | None, node: str, uid: str) -> dict[str, str]:
    if service is None:
        return {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node}
    found = {"apiVersion": "v1", "kind": "Service", "namespace": service.namespace, "name": service.name}
    return {**found, "uid": uid} if uid else found


def _micro_time(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _shortened(text: str, most: int) -> str:
    """At most `most` bytes of UTF-8."""
    encoded = text.encode()
    if len(encoded) <= most:
        return text
    return encoded[: most - len("…".encode())].decode(errors="ignore") + "…"
