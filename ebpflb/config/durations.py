"""Lengths of time as Kubernetes writes them: "1h2m3.5s", "250ms", "0s".

Rules of this file: the spelling only, and exact: a Duration is whole nanoseconds. Which ones make sense is for whoever
reads them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,  # the Greek letter beside the sign
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_UNITS = "|".join(sorted(_NANOSECONDS, key=len, reverse=True))
_PART = re.compile(rf"([0-9]+\.?[0-9]*|\.[0-9]+)({_UNITS})")
_WHOLE = re.compile(rf"[-+]?(?:{_PART.pattern})+")
_MOST = 2**63 - 1


class Duration:
    """A length of time, which may be negative."""

    __slots__ = ("nanoseconds",)

    def __init__(self, nanoseconds: int) -> None:
        self.nanoseconds = nanoseconds

    @classmethod
    def of(cls, seconds: float) -> Duration:
        return cls(round(seconds * _NANOSECONDS["s"]))

    @property
    def seconds(self) -> float:
        return self.nanoseconds / _NANOSECONDS["s"]

    def __bool__(self) -> bool:
        return self.nanoseconds != 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and other.nanoseconds == self.nanoseconds

    def __hash__(self) -> int:
        return hash(self.nanoseconds)

    def __repr__(self) -> str:
        return f"Duration({self})"

    def __str__(self) -> str:
        """As Go writes it: "24h0m0s", "1.5s", "250ms"."""
        size = abs(self.nanoseconds)
        sign = "-" if self.nanoseconds < 0 else ""
        if size == 0:
            return "0s"
        for unit in ("ns", "µs", "ms"):
            if size < _NANOSECONDS[unit] * 1000:
                return f"{sign}{_decimal(size, _NANOSECONDS[unit])}{unit}"
        minutes, rest = divmod(size, _NANOSECONDS["m"])
        hours, minutes = divmod(minutes, 60)
        parts = _Parts(hours, minutes, _decimal(rest, _NANOSECONDS["s"]))
        return sign + parts.text()


class _Parts(NamedTuple):
    hours: int
    minutes: int
    seconds: str

    def text(self) -> str:
        if self.hours:
            return f"{self.hours}h{self.minutes}m{self.seconds}s"
        return f"{self.minutes}m{self.seconds}s" if self.minutes else f"{self.seconds}s"


def _decimal(number: int, unit: int) -> str:
    whole, rest = divmod(number, unit)
    if not rest:
        return str(whole)
    return f"{whole}.{rest:0{len(str(unit)) - 1}d}".rstrip("0")


def parse_duration(text: str) -> Duration:
    """Raises ValueError in words, with what was most likely meant."""
    if text in ("0", "+0", "-0"):
        return Duration(0)
    if not _WHOLE.fullmatch(text):
        meant = f"{text}s" if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else ""
        hint = f'did you mean "{meant}"?' if meant else 'write such as "30s", "1h30m" or "250ms"'
        raise ValueError(f'"{text}" is not a duration; {hint}')
    total = 0
    for number, unit in _PART.findall(text):
        whole, _, fraction = number.partition(".")
        total += int(whole or 0) * _NANOSECONDS[unit]
        if fraction:
            total += int(fraction) * _NANOSECONDS[unit] // 10 ** len(fraction)
    if total > _MOST:
        raise ValueError(f'"{text}" is longer than 292 years; write such as "24h"')
    return Duration(-total if text.startswith("-") else total)
