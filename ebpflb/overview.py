"""How the daemon is doing, in one immutable look: what `status`, health and metrics tell of.

Rules of this file: data and its gathering from what sources and routes say of themselves; nothing here decides when
anything happens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import cast

import msgspec

from ebpflb.model import Address, Protocol
from ebpflb.problems import Found
from ebpflb.routes import Backend, RouteTable, ServicePortName
from ebpflb.source import Condition, Source

# Routes that are counted at once.
_STEP = 2000


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


class Counts(msgspec.Struct, frozen=True):
    """How much a table holds."""

    services: int = 0
    frontends: int = 0
    routes: int = 0
    backends: int = 0


def count(routes: RouteTable | None) -> Counts:
    """How much there is. A backend counts once per Service port, in however many routes it stands."""
    steps = counting(routes)
    while True:
        try:
            next(steps)
        except StopIteration as over:
            return cast(Counts, over.value)


def counting(routes: RouteTable | None) -> Generator[None, None, Counts]:
    """The same in steps of a few milliseconds, for whom changes must not wait."""
    if routes is None:
        return Counts()
    # Both scopes, and all frontends of a Service port, mostly share one tuple. Only where they do not is it looked
    # into, for a set of all backends would cost more memory than the routes.
    shared: dict[tuple[ServicePortName, Protocol], tuple[Backend, ...]] = {}
    mixed: dict[tuple[ServicePortName, Protocol], set[tuple[Address, int]]] = {}
    for number, ((frontend, _scope), route) in enumerate(routes.items(), 1):
        port = (route.service, frontend.protocol)
        first = shared.setdefault(port, route.backends)
        if first is not route.backends and first != route.backends:
            places = mixed.setdefault(port, {(backend.address, backend.port) for backend in first})
            places.update((backend.address, backend.port) for backend in route.backends)
        if number % _STEP == 0:
            yield
    services = {name.service for name, _protocol in shared}
    yield
    backends = sum(len(mixed.get(port, first)) for port, first in shared.items())
    return Counts(len(services), len(routes) // 2, len(routes), backends)
