"""`status`: the daemon's answer about itself, and how it is shown.

Rules of this file: the document is made in the daemon, where the facts are, and only formatted in the command; both
halves stand here, so that they cannot disagree.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping

import msgspec

from ebpflb import __version__
from ebpflb.commands import OK, REFUSED, Result
from ebpflb.commands.handover import Retiring
from ebpflb.control import ask
from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError, UserError
from ebpflb.output import Format, document, table
from ebpflb.overview import Counts, Overview, count
from ebpflb.parts import Parts
from ebpflb.problems import Found
from ebpflb.source import Condition

# So many problems stand in a table; `wide` has them all.
_FEW = 20


class Identity(msgspec.Struct, frozen=True):
    """Who answers: node, dataplane, since when (RFC 3339), and the better dataplanes that cannot be had, each with its
    reason; and what --xdp and --devices are."""

    node: str
    dataplane: str
    since: str
    passed: tuple[tuple[str, str], ...] = ()
    xdp: str = ""
    patterns: tuple[str, ...] = ()


class Passed(msgspec.Struct, frozen=True):
    """A dataplane that goes before the one at work, and why it cannot carry Services here."""

    dataplane: str
    reason: str


class Fill(msgspec.Struct, frozen=True):
    """One kernel table: rows in it, and how many it has room for."""

    name: str
    entries: int
    max: int


class DeviceStatus(msgspec.Struct, frozen=True):
    """A device of the node's that might carry outside traffic: how our XDP program runs there (`native`, `generic` or
    `off`), and why that is not native, or what it does not do there; "" for nothing to say. `problem`: whether that is
    not as it was asked for."""

    name: str
    xdp: str
    reason: str
    problem: bool = False


class SourceStatus(msgspec.Struct, frozen=True, rename="camel"):
    """How one source does: `state` is starting, live or stale, `since` RFC 3339 (null if it never changed), `failures`
    the attempts that failed since it last worked, `retry_in_seconds` null if none is planned."""

    name: str
    state: str
    since: str | None
    detail: str
    failures: int
    retry_in_seconds: float | None


class Status(msgspec.Struct, frozen=True, rename="camel"):
    """One item of kind Status. Ages in seconds, null for never. `remembered_since` is when what is served was saved,
    while it is what a source remembers of an earlier run (RFC 3339), else null. `retiring` are dataplanes that carried
    Services before, and are not gone yet. `xdp` and `device_patterns` are --xdp and --devices."""

    node: str
    dataplane: str
    passed: tuple[Passed, ...]
    retiring: tuple[Retiring, ...]
    version: str
    pid: int
    since: str
    healthy: bool
    sources_synced: bool
    remembered_since: str | None
    sources: tuple[SourceStatus, ...]
    first_sync: bool
    last_sync_seconds: float | None
    last_audit_seconds: float | None
    pending_seconds: float | None
    failed_attempts: int
    counts: Counts
    maps: tuple[Fill, ...]
    devices: tuple[DeviceStatus, ...]
    problems: tuple[Found, ...]
    xdp: str = ""
    device_patterns: tuple[str, ...] = ()


class _Envelope(msgspec.Struct, frozen=True):
    items: tuple[Status, ...]


def status_document(
    identity: Identity, dataplane: Dataplane, overview: Overview, retiring: tuple[Retiring, ...] = ()
) -> bytes:
    """The daemon's answer: a published document of one item."""
    troubles = list(overview.problems)
    fills: tuple[Fill, ...] = ()
    devices: tuple[DeviceStatus, ...] = ()
    try:
        fills = msgspec.convert(dataplane.tables("fill"), tuple[Fill, ...])
        devices = msgspec.convert(dataplane.tables("devices"), tuple[DeviceStatus, ...])
    except UserError:
        pass  # a dataplane without tables of a fixed size, or without XDP
    except EbpflbError as error:
        troubles.append(Found("status", dataplane.name, str(error)))
    status = Status(
        node=identity.node,
        dataplane=identity.dataplane,
        passed=tuple(Passed(*each) for each in identity.passed),
        retiring=retiring,
        version=__version__,
        pid=os.getpid(),
        since=identity.since,
        healthy=overview.healthy and not _ill(overview.problems),
        sources_synced=overview.synced_sources,
        remembered_since=_stamp(overview.remembered),
        sources=tuple(_source(name, condition) for name, condition in overview.sources.items()),
        first_sync=overview.first_sync,
        last_sync_seconds=_rounded(overview.last_sync_age),
        last_audit_seconds=_rounded(overview.last_audit_age),
        pending_seconds=_rounded(overview.pending_for),
        failed_attempts=overview.failures,
        counts=count(overview.routes),
        maps=fills,
        devices=devices,
        problems=tuple(troubles),
        xdp=identity.xdp,
        device_patterns=identity.patterns,
    )
    item: Mapping[str, object] = msgspec.to_builtins(status)
    return document("Status", [item], Format.JSON).encode()


def _ill(problems: Iterable[Found]) -> str:
    """Why /healthz says 503, "" if it does not: `status` is not to say anything else."""
    return next((found.reason for found in problems if found.part == "health"), "")


def _source(name: str, condition: Condition) -> SourceStatus:
    return SourceStatus(
        name,
        condition.state.value,
        _stamp(condition.since or None),
        condition.detail,
        condition.failures,
        _rounded(condition.retry_in),
    )


def _stamp(at: float | None) -> str | None:
    """RFC 3339 of seconds since the epoch."""
    return None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ask_status(socket_name: str, wait: float = 0.0) -> Status:
    """What the daemon of this network namespace says of itself. Raises NotRunning, and UserError where it is of a
    version that says something else."""
    try:
        return msgspec.json.decode(ask(wait, socket_name), type=_Envelope).items[0]
    except (msgspec.DecodeError, IndexError) as error:
        raise UserError(f"the daemon that runs here is of another version than this command: {error}") from None


def show_status(parts: Parts, *, wait: float, form: Format) -> Result:
    """Ask the daemon of this network namespace."""
    status = ask_status(parts.socket_name, wait)
    exit_status = OK if status.healthy else REFUSED
    if form.structured:
        return Result(document("Status", [msgspec.to_builtins(status)], form), exit_status)
    return Result(_text(status, wide=form is Format.WIDE), exit_status)


def _text(status: Status, wide: bool) -> str:
    counts = status.counts
    lines = [
        f"{'healthy' if status.healthy else 'NOT HEALTHY'}: {_sentence(status)}",
        f"node {status.node}, dataplane {status.dataplane}, since {status.since} "
        f"(pid {status.pid}, version {status.version})",
        f"{counts.services} services, {counts.frontends} frontends, {counts.routes} routes, {counts.backends} backends",
    ]
    lines += [f"not {passed.dataplane}, which cannot carry services here: {passed.reason}" for passed in status.passed]
    lines += [f"{retiring.dataplane} {retiring.detail}" for retiring in status.retiring]
    lines += [_source_line(source) for source in status.sources if wide or source.state != "live"]
    text = "\n".join(lines) + "\n"
    fullest = [fill for fill in status.maps if wide or fill.entries]
    if fullest:
        rows = [(fill.name, str(fill.entries), str(fill.max), _percent(fill)) for fill in fullest]
        text += "\n" + table(("MAP", "ENTRIES", "MAX", "FILL"), rows)
    if status.devices:
        cells = [(device.name, device.xdp, device.reason) for device in status.devices]
        text += "\n" + table(("DEVICE", "XDP", "REASON"), cells)
    if status.problems:
        shown = status.problems if wide else status.problems[:_FEW]
        text += "\n" + table(
            ("FOUND-BY", "PROBLEM-WITH", "REASON"),
            [(problem.part, problem.subject, problem.reason) for problem in shown],
        )
        if len(shown) < len(status.problems):
            text += f"+{len(status.problems) - len(shown)} more (-o wide shows all)\n"
    return text


def _source_line(source: SourceStatus) -> str:
    """One source that is not simply live, or any for `wide`."""
    line = f"source {source.name}: {source.state}"
    if source.since:
        line += f" since {source.since}"
    if source.detail:
        line += f", {source.detail}"
    if source.failures:
        line += f" ({source.failures} failed attempts"
        line += f", next in {source.retry_in_seconds:.1f} s)" if source.retry_in_seconds is not None else ")"
    return line


def _sentence(status: Status) -> str:
    if not status.sources_synced and status.remembered_since is None:
        return "waiting for the sources' first lists"
    if not status.first_sync:
        return "no complete sync yet" + (f" after {status.failed_attempts} attempts" if status.failed_attempts else "")
    age = f"last sync {status.last_sync_seconds or 0:.1f} s ago"
    if status.last_audit_seconds is not None:
        age += f", compared with the kernel {status.last_audit_seconds:.1f} s ago"
    if status.remembered_since is not None:
        age += f"; serving what was remembered on {status.remembered_since}"
    if status.failed_attempts:
        age += f", {status.failed_attempts} failed attempts since"
    reason = _ill(status.problems)
    return f"{age}; {reason}" if reason else age


def _percent(fill: Fill) -> str:
    return f"{100 * fill.entries / fill.max:.1f}%" if fill.max else ""


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
