"""Problems come to the log when they come and when they go."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from ebpflb import log as logs
from ebpflb.config import LogFormat, LogLevel
from ebpflb.problems import Found, ProblemLog, in_order
from tests.fakes import FakeClock

TAKEN = Found("policy", "default/web", "port 80 belongs to default/other", "FrontendTaken")
BROKEN = Found("manifests", "web.yaml document 2", "is no YAML")


class Bench:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.stream = io.StringIO()
        logs.set_up(LogFormat.JSON, LogLevel.INFO, self.stream)
        self.repeats = logs.hold_repeats(self.clock)
        self.problems = ProblemLog()

    def said(self) -> list[tuple[str, str]]:
        """Event and message of what was written since the last call."""
        found = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        self.stream.seek(0)
        self.stream.truncate()
        return [(each.get("event", ""), each["message"]) for each in found]


@pytest.fixture
def bench() -> Iterator[Bench]:
    logger = logging.getLogger(logs.ROOT)
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield Bench()
    logger.handlers[:], logger.level, logger.propagate = before
    logging.captureWarnings(False)


def test_a_problem_is_said_when_it_comes_and_when_it_goes_and_not_in_between(bench: Bench) -> None:
    assert bench.problems.tell([TAKEN]) == ((TAKEN,), ())
    assert bench.said() == [("problem", "policy: default/web: port 80 belongs to default/other")]
    assert bench.problems.tell([TAKEN]) == ((), ())
    assert bench.said() == []
    assert bench.problems.tell([]) == ((), (TAKEN,))
    assert bench.said() == [("resolved", "policy: default/web: resolved: port 80 belongs to default/other")]


def test_machines_get_part_subject_reason_and_code(bench: Bench) -> None:
    bench.problems.tell([TAKEN])
    document = json.loads(bench.stream.getvalue())
    assert document["level"] == "warning"
    assert {name: document[name] for name in ("part", "subject", "reason", "code")} == {
        "part": "policy",
        "subject": "default/web",
        "reason": "port 80 belongs to default/other",
        "code": "FrontendTaken",
    }


def test_several_that_come_at_once_are_all_said_in_order(bench: Bench) -> None:
    come, _ = bench.problems.tell([TAKEN, BROKEN])
    assert come == in_order([BROKEN, TAKEN]) == (BROKEN, TAKEN)
    assert [message.partition(":")[0] for _, message in bench.said()] == ["manifests", "policy"]


def test_a_problem_that_comes_and_goes_all_the_time_is_two_lines_a_minute_and_ends_in_the_truth(bench: Bench) -> None:
    for _ in range(30):
        bench.problems.tell([TAKEN])
        bench.clock.advance(1)
        bench.problems.tell([])
        bench.clock.advance(0.5)
    bench.problems.tell([TAKEN])
    assert [event for event, _ in bench.said()] == ["problem", "resolved"]
    bench.clock.advance(60)
    bench.repeats.work()
    assert [event for event, _ in bench.said()] == ["resolved", "problem"]


def test_ten_thousand_problems_are_few_lines_that_say_where_the_rest_is(bench: Bench) -> None:
    many = [Found("sync", f"default/web-{number}", "no room (ENOSPC)") for number in range(10_000)]
    bench.problems.tell(many)
    said = bench.said()
    assert len(said) == 21
    assert said[-1][1] == "9980 more problems: `ebpflb status -o wide` has them all"
