"""What kube-proxy measures of iptables and conntrack, under its names; of dataplanes that use them.

Rules of this file: names, types, labels and buckets are those of kube-proxy 1.36 (pkg/proxy/metrics/metrics.go), and so
is which of its modes has which of them. The numbers are what a dataplane says in its reports.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpflb.metrics.cells import Cell, Counter, Gauge, Histogram, doubling
from ebpflb.metrics.kubeproxy import FAMILIES
from ebpflb.observer import Attempt
from ebpflb.problems import Found
from ebpflb.source import Event

_EACH_FAMILY = tuple((family,) for family in FAMILIES.values())
_SYNC = "kubeproxy_sync_proxy_rules_iptables"
_CONNTRACK = "kubeproxy_conntrack_reconciler"


class NetfilterMetrics:
    """An Observer. `dataplane` is its name; bpf has none of these."""

    def __init__(self, dataplane: str) -> None:
        self._dataplane = dataplane
        labels = ("table", "ip_family")
        self._held = Gauge(f"{_SYNC}_total", "iptables rules of ours", labels)
        self._written = Gauge(f"{_SYNC}_last", "iptables rules that the last sync wrote", labels)
        self._failures = Counter(
            f"{_SYNC}_restore_failures_total", "Restores of whole rulesets that failed", ("ip_family",), _EACH_FAMILY
        )
        self._partial = Counter(
            f"{_SYNC}_partial_restore_failures_total", "Restores of what changed that failed", ("ip_family",),
            _EACH_FAMILY,
        )  # fmt: skip
        self._durations = Histogram(
            f"{_CONNTRACK}_sync_duration_seconds",
            "How long comparisons of conntrack's UDP entries with the routes took",
            doubling(0.001, 15),
            ("ip_family",),
            _EACH_FAMILY,
        )
        self._deleted = Counter(
            f"{_CONNTRACK}_deleted_entries_total", "Stale entries of conntrack that were deleted", ("ip_family",),
            _EACH_FAMILY,
        )  # fmt: skip

    # ---- As an observer ----

    def event(self, event: Event) -> None:
        """Not of its concern."""

    def queued(self, at: float) -> None:
        """Not of its concern."""

    def attempted(self, attempt: Attempt) -> None:
        report = attempt.report
        for rules in report.rules:
            self._held.set(rules.held, rules.table, FAMILIES[rules.family])
            self._written.set(rules.written, rules.table, FAMILIES[rules.family])
        for failure in report.restore_failures:
            (self._partial if failure.partial else self._failures).add(1, FAMILIES[failure.family])
        for each in report.reconciled:
            self._durations.observe(each.seconds, FAMILIES[each.family])
            self._deleted.add(each.deleted, FAMILIES[each.family])

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        """Not of its concern."""

    # ---- For a scrape ----

    def cells(self) -> Iterator[Cell]:
        """Those that say something about the dataplane."""
        if self._dataplane == "iptables":
            yield from (self._held, self._written, self._partial)
        if self._dataplane in ("iptables", "ipvs"):
            yield from (self._failures, self._durations, self._deleted)
