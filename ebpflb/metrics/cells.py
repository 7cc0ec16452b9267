"""The numbers behind the metrics, each with its name, type and meaning.

Rules of this file: nothing here knows what is measured. A cell is written by one thread and read by another, under its
own lock, never for longer than a copy takes. Names stand as dashboards have them: a gauge may be called `…_total` where
kube-proxy calls one so, which is why these cells make the client library's families and not its instruments.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

Labels: TypeAlias = tuple[str, ...]
"""Values, in the order of the cell's label names."""


class Cell(Protocol):
    """One metric."""

    def family(self, *, canonical: bool) -> Metric:
        """What it says now. `canonical`: bounds of buckets are written as OpenMetrics wants them ("1.0") and not as
        kube-proxy writes them ("1")."""


class _Numbers:
    def __init__(self, name: str, meaning: str, labels: Sequence[str] = (), first: Iterable[Labels] = ()) -> None:
        """`first`: label values that are there, with 0, from the beginning; a cell without labels always is."""
        self.name = name
        self._meaning = meaning
        self._labels = tuple(labels)
        self._values: dict[Labels, float] = dict.fromkeys(first if labels else ((),), 0.0)
        self._lock = threading.Lock()

    def replace(self, values: Mapping[Labels, float]) -> None:
        """All of it anew: label values that are not named are gone."""
        copy = dict(values)
        with self._lock:
            self._values = copy

    def _copy(self) -> list[tuple[Labels, float]]:
        with self._lock:
            return list(self._values.items())


class Counter(_Numbers):
    """Only grows. `name` ends in `_total`."""

    def add(self, amount: float, *labels: str) -> None:
        with self._lock:
            self._values[labels] = self._values.get(labels, 0.0) + amount

    def family(self, *, canonical: bool) -> Metric:
        family = CounterMetricFamily(self.name, self._meaning, labels=self._labels)
        for labels, value in self._copy():
            family.add_metric(labels, value)
        return family


class Gauge(_Numbers):
    """Is what it was last set to."""

    def set(self, value: float, *labels: str) -> None:
        with self._lock:
            self._values[labels] = value

    def family(self, *, canonical: bool) -> Metric:
        family = GaugeMetricFamily(self.name, self._meaning, labels=self._labels)
        for labels, value in self._copy():
            family.add_metric(labels, value)
        return family


class Histogram:
    """Counts observations up to each of `bounds` (ascending), and sums them."""

    def __init__(
        self,
        name: str,
        meaning: str,
        bounds: Sequence[float],
        labels: Sequence[str] = (),
        first: Iterable[Labels] = (),
    ) -> None:
        self.name = name
        self._meaning = meaning
        self._bounds = tuple(bounds)
        self._labels = tuple(labels)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        self._lock = threading.Lock()
        for values in first if labels else ((),):
            self._begin(values)

    def _begin(self, labels: Labels) -> list[int]:
        self._sums[labels] = 0.0
        counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
        return counts

    def observe(self, value: float, *labels: str) -> None:
        with self._lock:
            counts = self._counts.get(labels) or self._begin(labels)
            counts[bisect_left(self._bounds, value)] += 1
            self._sums[labels] += value

    def family(self, *, canonical: bool) -> Metric:
        with self._lock:
            copies = [(labels, list(counts), self._sums[labels]) for labels, counts in self._counts.items()]
        names = [*map(repr if canonical else _plain, map(float, self._bounds)), "+Inf"]
        family = HistogramMetricFamily(self.name, self._meaning, labels=self._labels)
        for labels, counts, total in copies:
            running = 0
            buckets: list[tuple[str, float]] = []
            for name, count in zip(names, counts, strict=True):
                running += count
                buckets.append((name, running))
            family.add_metric(labels, buckets, total)
        return family


def _plain(bound: float) -> str:
    """As Go writes a number: "1", "0.25", "16.384"."""
    return repr(bound).removesuffix(".0")


def doubling(first: float, count: int) -> tuple[float, ...]:
    """`count` bounds, each twice the one before."""
    return tuple(first * 2**power for power in range(count))


class Rising:
    """Totals that only grow, of counters that may begin again at 0 (a map was made anew) or be gone (a row was
    removed)."""

    def __init__(self) -> None:
        self._last: dict[Labels, float] = {}
        self._totals: dict[Labels, float] = {}

    def take(self, values: Mapping[Labels, float]) -> Mapping[Labels, float]:
        """The totals, given what the counters say now."""
        for labels, value in values.items():
            before = self._last.get(labels, 0.0)
            grown = value - before if value >= before else value
            self._totals[labels] = self._totals.get(labels, 0.0) + grown
        self._last = dict(values)
        return self._totals
