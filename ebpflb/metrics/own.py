"""What ebpflb measures of itself, under `ebpflb_…`.

Rules of this file: what the reconciler tells becomes numbers at once; what stands in the kernel or is asked of a source
comes from `sampler`, which knows when it may look. Nothing here asks anybody.
"""

from __future__ import annotations

import platform
from collections import Counter as Multiset
from collections.abc import Callable, Iterable, Iterator, Mapping

from ebpflb import __version__
from ebpflb.metrics.cells import Cell, Counter, Gauge, Histogram, doubling
from ebpflb.observer import Attempt
from ebpflb.problems import Found
from ebpflb.routes import RouteTable
from ebpflb.source import Condition, Event, SourceState

_KINDS = ("sync", "audit")
_PARTS = ("policy", "sync", "audit", "devices", "hand-over")
_BOUNDS = doubling(0.0005, 16)


class OwnMetrics:
    """An Observer, and the cells that `sampler` fills. `wall`: the time of day, in seconds since the epoch;
    `sources`: their names; `passed`: those of better dataplanes that cannot be had."""

    def __init__(
        self,
        wall: Callable[[], float],
        dataplane: str,
        sources: Iterable[str],
        *,
        each_service: bool,
        passed: Iterable[str] = (),
    ) -> None:
        names = tuple(sources)
        self.routes: RouteTable | None = None
        """What the last attempt was about; None before the first."""
        self._wall = wall
        self._each_service = each_service
        self._conditions: Mapping[str, Condition] = {}
        self._found: Multiset[str] = Multiset()
        self._failing: set[str] = set()
        self._lag = _Lag()
        self._failures = 0

        self._build = Gauge("ebpflb_build_info", "Always 1: the version that runs", ("version", "python_version"))
        self._build.set(1, __version__, platform.python_version())
        self._dataplane = Gauge(
            "ebpflb_dataplane_info",
            "Always 1: the dataplane that carries Services, and the better ones that cannot be had",
            ("dataplane", "passed"),
        )
        self._dataplane.set(1, dataplane, ",".join(passed))
        self._whole = Gauge("ebpflb_synced", "1 while the kernel holds all that it should, as far as is known; else 0")
        self._in_a_row = Gauge("ebpflb_consecutive_failures", "Failed syncs and audits since all was last well")
        self._attempts = Counter(
            "ebpflb_syncs_total",
            "Syncs and audits, by whether the kernel took everything",
            ("kind", "result"),
            tuple((kind, result) for kind in _KINDS for result in ("complete", "refused")),
        )
        self._retries = Counter("ebpflb_retries_total", "Syncs and audits that repeated a failed one")
        self._seconds = Histogram(
            "ebpflb_sync_duration_seconds",
            "How long syncs and audits took",
            _BOUNDS,
            ("kind",),
            tuple((kind,) for kind in _KINDS),
        )
        self._lags = Histogram(
            "ebpflb_event_lag_seconds",
            "From the arrival of a change to the kernel, of the oldest in each sync",
            _BOUNDS,
        )
        self._written = Counter("ebpflb_rows_written_total", "Rows written to the kernel's tables")
        self._removed = Counter("ebpflb_rows_removed_total", "Rows removed from the kernel's tables")
        self._refused = Counter("ebpflb_rows_refused_total", "Rows that the kernel refused, each time")
        self._repaired = Counter("ebpflb_rows_repaired_total", "Rows that an audit found wrong, and put right")
        self._problems = Gauge(
            "ebpflb_problems",
            "What is wrong now, by the part that found it; `ebpflb status` has the words",
            ("part",),
            tuple((part,) for part in (*_PARTS, *names)),
        )

        # For the sampler to fill.
        self.entries = Gauge("ebpflb_map_entries", "Rows in each of the kernel's tables", ("map",))
        self.room = Gauge("ebpflb_map_entries_max", "Rows for which each of the kernel's tables has room", ("map",))
        self.devices = Gauge(
            "ebpflb_xdp_device_info",
            "1 for the mode in which XDP runs on a device that may carry outside traffic: native, generic or off",
            ("device", "mode"),
        )
        self.datapath = Counter(
            "ebpflb_datapath_events_total",
            "What became of new flows and odd packets, counted in the kernel",
            ("event",),
        )
        self.amounts = {
            "services": Gauge("ebpflb_services", "Services that are served"),
            "frontends": Gauge("ebpflb_frontends", "Addresses and ports that are served"),
            "routes": Gauge("ebpflb_routes", "Routes: two for each frontend"),
            "backends": Gauge("ebpflb_backends", "Endpoints in use, each once per Service port"),
        }
        self.looked = Gauge(
            "ebpflb_kernel_read_timestamp_seconds", "When the kernel's tables were last read, since the epoch"
        )
        self.looking = Gauge("ebpflb_kernel_read_duration_seconds", "How long that took")
        self.unreadable = Counter(
            "ebpflb_kernel_read_failures_total", "Attempts to read the kernel's tables that failed"
        )
        labels = ("namespace", "service", "port")
        self.connections = Counter("ebpflb_service_connections_total", "New connections to a Service", labels)
        self.packets = Counter("ebpflb_service_packets_total", "Packets of a Service's flows, both ways", labels)
        self.bytes = Counter("ebpflb_service_bytes_total", "Bytes of these packets, from the link layer up", labels)

    def conditions(self, conditions: Mapping[str, Condition]) -> None:
        """How each source does now."""
        self._conditions = conditions

    # ---- As an observer ----

    def event(self, event: Event) -> None:
        """Counted under kube-proxy's name."""

    def queued(self, at: float) -> None:
        self._lag.queued(at)

    def attempted(self, attempt: Attempt) -> None:
        kind, report = attempt.what, attempt.report
        self.routes = attempt.routes
        if attempt.queued is None and kind in self._failing:
            self._retries.add(1)
        self._attempts.add(1, kind, "complete" if report.complete else "refused")
        self._seconds.observe(attempt.seconds, kind)
        self._written.add(report.written)
        self._removed.add(report.removed)
        self._refused.add(report.failed)
        if kind == "audit":
            self._repaired.add(report.written + report.removed)
        for lag in self._lag.ended(attempt):
            self._lags.observe(lag)
        if report.complete:
            self._failing -= {kind, "sync"} if kind == "audit" else {kind}
        else:
            self._failing.add(kind)
        self._failures = self._failures + (not report.complete) if self._failing else 0
        self._in_a_row.set(self._failures)
        self._whole.set(not self._failing)

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        self._found.update(found.part for found in come)
        self._found.subtract(found.part for found in gone)
        for part, number in self._found.items():
            self._problems.set(number, part)

    # ---- For a scrape ----

    def cells(self) -> Iterator[Cell]:
        """All of them."""
        yield from (self._build, self._dataplane, self._whole, self._in_a_row, self._attempts, self._retries)
        yield from (self._seconds, self._lags, self._written, self._removed, self._refused, self._repaired)
        yield from (self._problems, *self._of_sources(), *self.amounts.values())
        yield from (self.entries, self.room, self.devices, self.datapath, self.looked, self.looking, self.unreadable)
        if self._each_service:
            yield from (self.connections, self.packets, self.bytes)

    def _of_sources(self) -> Iterator[Cell]:
        state = Gauge(
            "ebpflb_source_state", "1 for the state that a source is in, 0 for the others", ("source", "state")
        )
        stale = Gauge(
            "ebpflb_source_stale_seconds", "For how long a source has said nothing new; 0 if it is live", ("source",)
        )
        failures = Gauge("ebpflb_source_failures", "Failed attempts since a source last worked", ("source",))
        for name, condition in self._conditions.items():
            for each in SourceState:
                state.set(condition.state is each, name, each.value)
            out_of_touch = condition.state is SourceState.STALE
            stale.set(max(0.0, self._wall() - condition.since) if out_of_touch else 0.0, name)
            failures.set(condition.failures, name)
        yield from (state, stale, failures)


class _Lag:
    """How long changes waited until the kernel held them. A failed sync has settled nothing: its changes go on waiting
    until a later sync, or an audit, is complete."""

    def __init__(self) -> None:
        self._waiting: float | None = None  # since when a change waits that no sync has taken in
        self._taken: float | None = None  # and one that a failed sync has taken in

    def queued(self, at: float) -> None:
        if self._waiting is None and at != self._taken:
            self._waiting = at

    def ended(self, attempt: Attempt) -> Iterator[float]:
        """The lag that this attempt put an end to, if any, in seconds."""
        if attempt.what == "sync":
            if self._taken is None:
                self._taken = self._waiting
            self._waiting = None
        if attempt.report.complete and self._taken is not None:
            yield attempt.ended - self._taken
            self._taken = None
