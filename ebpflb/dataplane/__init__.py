"""What every dataplane is: something that makes the kernel hold a RouteTable.

Rules of this file: the protocol and its answers, nothing that touches a kernel. A dataplane is level-triggered: each
`sync` says everything that it should be doing, and it works out the difference itself. Every method may be called
again after a failure. No dataplane knows Kubernetes, another dataplane, or who calls it.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from ebpflb.model import Family, Problem
from ebpflb.routes import RouteTable

NODE = "node"
"""The subject of problems that concern no Service."""


class Reconciled(msgspec.Struct, frozen=True, gc=False):
    """One comparison of conntrack's UDP entries with the routes, in one family: how long it took, how many entries
    there were, and how many were stale and have been deleted."""

    family: Family
    seconds: float
    entries: int
    deleted: int


class TableRules(msgspec.Struct, frozen=True, gc=False):
    """iptables rules of one family and table: how many of ours there are, and how many of them were written."""

    family: Family
    table: str
    held: int
    written: int


class RestoreFailure(msgspec.Struct, frozen=True, gc=False):
    """An iptables-restore that was refused; `partial`: it was to write what changed, and not a whole ruleset."""

    family: Family
    partial: bool


class Report(msgspec.Struct, frozen=True, gc=False):
    """What one `sync` did. `written` and `removed` count kernel rows, `failed` those that were refused (they are
    retried by the next sync), `seconds` is wall time, `problems` says in words what was refused. `reconciled` are the
    comparisons with conntrack that were due; `rules` and `restore_failures` are of dataplanes that write iptables
    rules, for each family and table that was looked at."""

    written: int = 0
    removed: int = 0
    failed: int = 0
    seconds: float = 0.0
    problems: tuple[Problem, ...] = ()
    reconciled: tuple[Reconciled, ...] = ()
    rules: tuple[TableRules, ...] = ()
    restore_failures: tuple[RestoreFailure, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the kernel now holds the whole table."""
        return self.failed == 0


class Requirement(msgspec.Struct, frozen=True, gc=False):
    """One thing that a dataplane needs of this node: whether it is there, and how to get it where it is not.

    `essential` is False for what only makes it better; its absence is said but stops nothing."""

    name: str
    found: bool
    detail: str
    remedy: str = ""
    essential: bool = True


class Dataplane(Protocol):
    """Makes the kernel hold a RouteTable. Every method may be called again after a failure."""

    @property
    def name(self) -> str:
        """`bpf`, `ipvs` or `iptables`."""

    def check(self) -> None:
        """Raises Unsupported, in words, before anything is touched."""

    def requirements(self) -> tuple[Requirement, ...]:
        """What `check` looks at, each with found or missing. Touches nothing that outlives the call."""

    def take_over(self) -> None:
        """Called before `start` where something else carried Services here until now: the flows that it began are not
        known here and stay as they are. Where nothing did, it is not called."""

    def start(self) -> None:
        """Load, attach, create chains; idempotent. Raises Unsupported, UserError or ApplyError."""

    def sync(self, routes: RouteTable) -> Report:
        """Make the kernel hold `routes`. Costs the change when `routes` evolved from the table of the last sync.
        Never raises for what the kernel refused: that is in the Report."""

    def audit(self) -> Report:
        """Read the kernel back, compare it with the last table given to `sync`, repair what differs."""

    def state(self) -> RouteTable:
        """What the kernel holds, read back as routes."""

    def tables(self, what: str) -> list[dict[str, object]]:
        """Rows of `dump WHAT` that are not routes (`services`, `backends`, `flows`, `counters`, `raw`, …), read from
        the kernel, in plain values ready for JSON, sorted. `fill`, which `status` asks for, has `name`, `entries` and
        `max` of each table of a fixed size; `devices` has `name`, `xdp`, `reason` and `problem` of each device
        that might run XDP. Raises UserError for a WHAT that this dataplane lacks."""

    def canary(self) -> bool:
        """Whether what was installed is still there, by a look that costs next to nothing whatever the number of rows:
        False asks for an audit at once. Raises ApplyError if the look fails."""

    def retire(self) -> bool:
        """Another dataplane is complete: leave new flows to it, and keep the established ones. Whether nothing is left
        to keep, so that `cleanup` breaks nothing; called again from time to time until that is so. Works without
        `start`. Raises UserError or ApplyError."""

    def inventory(self) -> tuple[str, ...]:
        """Everything of ours that is installed here, one line each, as `cleanup --dry-run` prints it; () if nothing
        is. Works without `start`."""

    def cleanup(self) -> None:
        """Leave no trace; works without `start`."""
