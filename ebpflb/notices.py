"""What is worth a Kubernetes Event: problems and happenings as Notices about a Service or about this node.

Rules of this file: a pure mapping, no API and no I/O; who sends a Notice is handed in as a function, which must not
block. A problem is noticed when it comes; that it is gone is in the log and in `status`, as for kube-proxy's own.
Problems of the source itself make no Notice: a server that cannot be reached takes none.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import msgspec

from ebpflb.model import ServiceName
from ebpflb.observer import Attempt
from ebpflb.problems import Found
from ebpflb.source import Event


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


_PROGRAM = "Program"
_ROUTE = "Route"
_READ = "Read"
_START = "Start"
_LISTEN = "Listen"

_FAILED_TO_PROGRAM = "FailedToProgram"
# semantics: kube-proxy's words for a healthCheckNodePort that cannot be had.
_FAILED_TO_LISTEN = "FailedToStartServiceHealthcheck"

_SERVICE = "Service "


class Notices:
    """An Observer that posts a Notice for each problem that comes, and for what its other methods are told."""

    def __init__(self, post: Callable[[Notice], None]) -> None:
        self._post = post

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
            notice = notice_of(found)
            if notice is not None:
                told[notice] = None  # a sync and an audit may find the same
        for notice in told:
            self._post(notice)

    # ---- Others ----

    def starting(self, version: str, dataplane: str, passed: Sequence[tuple[str, str]]) -> None:
        """The daemon starts with `dataplane`; `passed` are those before it on the ladder, each with its reason."""
        self._post(
            Notice(None, NoticeType.NORMAL, "Starting", _START, f"ebpflb {version} carries Services with {dataplane}")
        )
        for name, reason in passed:
            note = f"dataplane {name} cannot carry Services here, {dataplane} does instead: {reason}"
            self._post(Notice(None, NoticeType.WARNING, "DataplaneUnavailable", _START, note))

    def health_check_not_served(self, service: ServiceName, node: str, port: int, reason: str) -> None:
        """The healthCheckNodePort of `service` cannot be listened on."""
        note = f"node {node} does not answer on healthCheckNodePort {port}: {reason}"
        self._post(Notice(service, NoticeType.WARNING, _FAILED_TO_LISTEN, _LISTEN, note))

    def server_not_started(self, what: str, reason: str) -> None:
        """A server of the daemon's own (`what`: "healthz", "metrics") does not listen."""
        code = {"healthz": "FailedToStartProxierHealthcheck", "metrics": "FailedToStartMetricServer"}
        self._post(
            Notice(None, NoticeType.WARNING, code.get(what, "FailedToStartServer"), _LISTEN, f"{what}: {reason}")
        )


def notice_of(found: Found) -> Notice | None:
    """What to tell of a problem; None if it is not for Events."""
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
    if found.part == "devices":
        note = f"{found.subject}: {found.reason}"
        return Notice(None, NoticeType.WARNING, found.code or "DeviceNotServed", _PROGRAM, note)
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
