"""What is worth a Kubernetes Event: problems and happenings as Notices about a Service or about this node.

Rules of this file: a pure mapping, no API and no I/O; who sends a Notice is handed in as a function, which must not
block. A problem is noticed when it comes; that it is gone is in the log and in `status`, as for kube-proxy's own.
Problems of the source itself make no Notice: a server that cannot be reached takes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ebpflb.model import ServiceName
from ebpflb.observer import Attempt
from ebpflb.problems import Found
from ebpflb.source import Event
from ebpflb.source.kube.event_objects import Notice, NoticeType

__all__ = ["Notice", "NoticeType", "Notices", "notice_of"]


_PROGRAM = "Program"
_ROUTE = "Route"
_READ = "Read"
_START = "Start"
_LISTEN = "Listen"
_HAND_OVER = "HandOver"

_FAILED_TO_PROGRAM = "FailedToProgram"

# kube-proxy's words for ports of its own that cannot be had.
_SERVERS = {"healthz": "FailedToStartProxierHealthcheck", "metrics": "FailedToStartMetricServer"}

_SERVICE = "Service "


class Notices:
    """An Observer of the node `node` that posts a Notice for each problem that comes, and one of its own start."""

    def __init__(self, post: Callable[[Notice], None], node: str) -> None:
        self._post = post
        self._node = node

    # ---- Observer ----

    def event(self, event: Event) -> None:
        """Nothing to tell."""

    def queued(self, at: float) -> None:
        """Nothing to tell."""

    def attempted(self, attempt: Attempt) -> None:
        """Nothing to tell: what it was refused comes as problems."""

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        told: dict[Notice, None] = {}
        for found in come:
            notice = notice_of(found, self._node)
            if notice is not None:
                told[notice] = None  # a sync and an audit may find the same
        for notice in told:
            self._post(notice)

    def starting(self, version: str, dataplane: str, passed: Sequence[tuple[str, str]]) -> None:
        """The daemon starts with `dataplane`; `passed` are those before it on the ladder, each with its reason."""
        self._post(
            Notice(None, NoticeType.NORMAL, "Starting", _START, f"ebpflb {version} carries Services with {dataplane}")
        )
        for name, reason in passed:
            note = f"dataplane {name} cannot carry Services here, {dataplane} does instead: {reason}"
            self._post(Notice(None, NoticeType.WARNING, "DataplaneUnavailable", _START, note))


def notice_of(found: Found, node: str) -> Notice | None:
    """What to tell of a problem of the node `node`; None if it is not for Events."""
    if found.part == "policy":
        service = _service(found.subject)
        if service is None:
            return None
        # Policy sees the same objects everywhere; what depends on the node is rare enough to be told once, too.
        return Notice(service, NoticeType.WARNING, found.code or "Misconfigured", _ROUTE, found.reason, everywhere=True)
    if found.part in ("sync", "audit"):
        service = _service(found.subject)
        note = found.reason if service else f"{found.subject}: {found.reason}"
        return Notice(service, NoticeType.WARNING, found.code or _FAILED_TO_PROGRAM, _PROGRAM, note)
    if found.part == "health-check":
        note = f"node {node}: {found.reason}"
        return Notice(_service(found.subject), NoticeType.WARNING, found.code, _LISTEN, note)
    if found.part == "http":
        code = _SERVERS.get(found.subject, "FailedToStartServer")
        return Notice(None, NoticeType.WARNING, code, _LISTEN, f"{found.subject}: {found.reason}")
    if found.part == "devices":
        note = f"{found.subject}: {found.reason}"
        return Notice(None, NoticeType.WARNING, found.code or "DeviceNotServed", _PROGRAM, note)
    if found.part == "hand-over":
        note = f"{found.subject}: {found.reason}"
        return Notice(None, NoticeType.WARNING, found.code or "HandOverFailed", _HAND_OVER, note)
    if found.subject.startswith(_SERVICE) and found.code:
        service = _service(found.subject.removeprefix(_SERVICE))
        if service is not None:
            return Notice(service, NoticeType.WARNING, found.code, _READ, found.reason, everywhere=True)
    return None


def _service(subject: str) -> ServiceName | None:
    """`namespace/name`, or `namespace/name:port` as a Service's port is called."""
    namespace, slash, name = subject.partition("/")
    name = name.partition(":")[0]
    if not slash or not namespace or not name or "/" in name or " " in subject:
        return None
    return ServiceName(namespace, name)
