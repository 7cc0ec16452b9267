"""Lengths of time as Kubernetes writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpflb.config.durations import Duration, parse_duration


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0s", 0), ("0", 0), ("-0", 0), ("30s", 30 * 10**9), ("1h2m3.5s", 3_723_500_000_000), ("250ms", 250_000_000),
        ("1.5h", 5400 * 10**9), (".5s", 500_000_000), ("1.s", 10**9), ("5us", 5000), ("5µs", 5000), ("5μs", 5000),
        ("7ns", 7), ("-10s", -(10**10)), ("+10s", 10**10), ("1s1s", 2 * 10**9), ("24h0m0s", 86400 * 10**9),
    ],
)  # fmt: skip
def test_what_go_reads(text: str, nanoseconds: int) -> None:
    assert parse_duration(text).nanoseconds == nanoseconds


@pytest.mark.parametrize(
    "text", ["", "30", "s", "1 s", "1d", "1h 2m", "one", "1e3s", "--1s", "1s ", "٣s", "1.2.3s", "0x1s", ".s"]
)
def test_what_go_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_longer_than_go_counts() -> None:
    with pytest.raises(ValueError, match="292 years"):
        parse_duration("3000000h")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (86400, "24h0m0s"), (90, "1m30s"), (0.25, "250ms"), (1.5, "1.5s"), (3723.5, "1h2m3.5s"),
        (-5, "-5s"), (0.0000015, "1.5µs"), (0.000000007, "7ns"), (60, "1m0s"), (0.01, "10ms"),
    ],
)  # fmt: skip
def test_what_go_writes(seconds: float, text: str) -> None:
    assert str(Duration.of(seconds)) == text


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_what_is_written_reads_back_as_the_same(nanoseconds: int) -> None:
    assert parse_duration(str(Duration(nanoseconds))) == Duration(nanoseconds)
