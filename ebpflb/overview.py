"""How the daemon is doing, in one immutable look: what `status`, health and metrics tell of.

Rules of this file: data and its gathering from what sources and routes say of themselves; nothing here decides when
anything happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from ebpflb.problems import Found
from ebpflb.routes import RouteTable
from ebpflb.source import Condition, Source


class Overview(msgspec.Struct, frozen=True):
    """How it goes. Ages are seconds, None for "never". `complete`: the kernel holds the whole of the last table;
    `sound`: the sources could be read, and hold nothing that was refused. `remembered`: while what is served is
    what a source remembers, when that was saved (seconds since the epoch)."""

    synced_sources: bool
    remembered: float | None
    first_sync: bool
    complete: bool
    sound: bool
    pending_for: float | None
    last_sync_age: float | None
    last_audit_age: float | None
    failures: int
    routes: RouteTable | None
    problems: tuple[Found, ...]
    sources: Mapping[str, Condition]

    @property
    def healthy(self) -> bool:
        return self.complete


def found_in(sources: Iterable[Source], routes: RouteTable | None) -> set[Found]:
    """What is wrong with what the sources say, and with what comes of it."""
    found = {Found(source.name, *problem) for source in sources for problem in source.problems()}
    if routes is not None:
        found.update(Found("policy", *problem) for remarks in routes.problems.values() for problem in remarks)
    return found
