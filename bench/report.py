"""What was measured, what was promised, and how both are shown.

Rules of this file: pure. A target is written down once, in TARGETS; a figure without a target is for orientation.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """One measured number. `id` names it for good; `samples` are what it is the middle of, in the same unit."""

    id: str
    what: str
    value: float
    unit: str
    samples: tuple[float, ...] = ()
    note: str = ""


class Target(msgspec.Struct, frozen=True):
    """`least` or `most` must hold; `aim` is what would be better still, in words."""

    least: float | None = None
    most: float | None = None
    aim: str = ""

    def met_by(self, value: float) -> bool:
        """Whether the number keeps the promise."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        words = [f"≥ {self.least:g}"] if self.least is not None else []
        words += [f"≤ {self.most:g}"] if self.most is not None else []
        return " and ".join(words) + (f" (aim {self.aim})" if self.aim else "")


TARGETS: dict[str, Target] = {
    "control.crr": Target(least=0.985, most=1.015),
    "socket.crr": Target(least=0.975, aim="0.985"),
    "socket.rr": Target(least=0.99),
    "packet.crr": Target(least=0.93, aim="0.945"),
    "packet.rr": Target(least=0.95),
    **{
        f"{hook}.established.{kind}.{leg}.{flows}": Target(most=3.5 if hook == "xdp" else 4.0, aim="3")
        for hook, legs in (
            ("xdp", ("request", "reply")),
            ("tc", ("request-in", "request-out", "reply-in", "reply-out")),
        )
        for kind in ("tcp4", "tcp6", "udp4")
        for leg in legs
        for flows in (10, 10000)
    },
    **{f"xdp.new.{kind}.10000": Target(most=15.0, aim="13") for kind in ("tcp4", "tcp6", "udp4")},
    **{f"xdp.not-ours.{kind}": Target(most=2.5, aim="2.2") for kind in ("tcp4", "tcp6", "udp4")},
    **{f"xdp.uniform.established.{kind}": Target(most=1.15, aim="1.06") for kind in ("tcp4", "tcp6", "udp4")},
    **{f"xdp.uniform.new.{kind}": Target(most=1.3, aim="1.17") for kind in ("tcp4", "tcp6", "udp4")},
    "xdp.hot.established": Target(most=1.05, aim="1.02"),
    "xdp.hot.new": Target(most=1.05, aim="1.02"),
    **{f"live.{kind}": Target(least=0.70, aim="0.78") for kind in ("tcp4", "tcp6", "udp4")},
    "cold.10000": Target(most=0.6, aim="0.35"),
    "cold.10000.maglev": Target(most=1.2, aim="0.8"),
    "packet-around.crr": Target(least=1.02, aim="1.05"),
    "change.10.p50": Target(most=1.0, aim="0.3"),
    "change.10.p99": Target(most=5.0, aim="2"),
    "change.10000.p50": Target(most=1.0, aim="0.3"),
    "change.10000.p99": Target(most=5.0, aim="2"),
    "change.flatness": Target(most=1.2, aim="1.05"),
    "change.spread": Target(most=1.2, aim="1.05"),
    "daemon.follow.10.p99": Target(most=20.0),
    "daemon.follow.10000.p99": Target(most=20.0),
    "daemon.rss": Target(most=120.0, aim="80"),
    "daemon.peak": Target(most=200.0, aim="140"),
    "daemon.ready.10": Target(most=2.0, aim="1.2"),
    "daemon.ready.10000": Target(most=2.0, aim="1.2"),
    "iptables.nft.cold.ratio": Target(most=1.0),
    "iptables.nft.change.ratio": Target(most=0.7),
    "iptables.legacy.cold.ratio": Target(most=1.0),
    "iptables.legacy.change.ratio": Target(most=0.7),
    "decode.structs": Target(least=30.0, aim="60"),
    "decode.memory": Target(least=8.0),
    "maglev.fill": Target(most=0.3),
    "maglev.python": Target(least=25.0),
    "maglev.moved": Target(most=1.5),
    "maglev.shares": Target(most=1.02),
    "api.ready.10": Target(most=2.0, aim="1.2"),
    "api.ready.10000": Target(most=2.0, aim="1.2"),
    "api.ready.10000.pages": Target(most=2.0, aim="1.2"),
    "api.rss": Target(most=120.0, aim="80"),
    "api.peak": Target(most=200.0, aim="140"),
    "api.peak.pages": Target(most=200.0, aim="140"),
    "api.idle.10": Target(most=5.0, aim="1"),
    "api.idle.10000": Target(most=5.0, aim="1"),
    "api.relist.rows": Target(most=0.0),
    "api.follow.10.p99": Target(most=20.0),
    "api.follow.10000.p99": Target(most=20.0),
    "api.flatness": Target(most=1.2, aim="1.05"),
    "api.churn.p99": Target(most=50.0),
    "api.churn.cpu": Target(most=35.0),
    "api.churn.errors": Target(most=0.0),
}
"""By id of the figure."""


class Report(msgspec.Struct, frozen=True):
    """A whole run. `machine` says where: kernel, processor, mitigations, revision."""

    machine: dict[str, str]
    seconds: float
    quick: bool
    figures: tuple[Figure, ...]
    targets: dict[str, Target]

    @property
    def missed(self) -> tuple[str, ...]:
        """Ids of the figures that miss their targets."""
        return tuple(each.id for each in self.figures if each.id in TARGETS and not TARGETS[each.id].met_by(each.value))


def middle(id: str, what: str, samples: Sequence[float], unit: str, note: str = "") -> Figure:
    """The median of samples, with their spread in the note."""
    value = statistics.median(samples)
    return Figure(id, what, value, unit, tuple(samples), note or spread(samples))


def spread(samples: Sequence[float]) -> str:
    """The interquartile range relative to the median, in words."""
    return f"IQR {quartile_range(samples):.1%} of {len(samples)}" if len(samples) > 3 else ""


def quartile_range(samples: Sequence[float]) -> float:
    """(Q3 - Q1) ÷ median."""
    first, second, third = statistics.quantiles(samples, n=4)
    return (third - first) / second if second else 0.0


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def table(report: Report) -> str:
    """The report for people."""
    rows = [("", "measured", "", "target", "")]
    for figure in report.figures:
        target = TARGETS.get(figure.id)
        mark = "" if target is None else "met" if target.met_by(figure.value) else "MISSED"
        rows.append(
            (figure.what, f"{_number(figure.value)} {figure.unit}".strip(), mark, str(target or ""), figure.note)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3].ljust(widths[3])))
        + (f"  {row[4]}" if row[4] else "")
        for row in rows
    ]
    where = ", ".join(f"{key} {value}" for key, value in report.machine.items())
    return "\n".join([*(line.rstrip() for line in lines), "", where, f"{report.seconds:.0f} s in all"])


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
