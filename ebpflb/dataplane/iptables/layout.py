"""Rows grouped by service port, as the chains are, and which chain carries which backends.

Rules of this file: pure; it knows the shapes of pairs of routes that policy makes (listed at the top of `claims`), and
refuses any other in words, so that `rules` never has to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ebpflb.model import Family, Protocol
from ebpflb.routes import Frontend, Key, RouteTable, ServicePortName


class PortKey(NamedTuple):
    """Whose chains: one port of a Service in one family."""

    service: ServicePortName
    protocol: Protocol
    family: Family


class Index:
    """The frontends of each service port of a table. Kept up to date at the cost of a change, since a change names
    frontends and chains go by service port."""

    def __init__(self, routes: RouteTable) -> None:
        raise NotImplementedError

    def ports(self) -> Iterable[PortKey]:
        """Every service port that has a frontend."""
        raise NotImplementedError

    def frontends(self, key: PortKey) -> tuple[Frontend, ...]:
        """The frontends of a service port, sorted; () if it has none."""
        raise NotImplementedError

    def update(self, before: RouteTable, after: RouteTable, changed: Iterable[Key]) -> set[PortKey]:
        """Follow the step from `before` to `after`; the service ports whose rules may differ by it."""
        raise NotImplementedError
