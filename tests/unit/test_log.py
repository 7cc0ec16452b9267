"""How lines look, and which of those that repeat are written."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from ebpflb import log as logs
from ebpflb.config import LogFormat, LogLevel
from ebpflb.loop import run
from ebpflb.reconcile import Reconciler
from tests.fakes import FakeClock, FakeDataplane, FakeDesired, FakeSelector, FakeSource, both, routes

REFUSED = "%s: %d refused; trying again in %.1f s"


class Bench:
    """The package's log, to a place where it can be read, with time that a test moves."""

    def __init__(self, form: LogFormat = LogFormat.TEXT, level: LogLevel = LogLevel.INFO) -> None:
        self.clock = FakeClock()
        self.stream = io.StringIO()
        logs.set_up(form, level, self.stream)
        self.repeats = logs.hold_repeats(self.clock)
        self.log = logging.getLogger("ebpflb.some")

    def lines(self) -> list[str]:
        """What was written since the last call, without the time."""
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return [re.sub(r"^\S+Z ", "", line) for line in text.splitlines()]

    def after(self, seconds: float) -> list[str]:
        """What the loop writes by then."""
        end = self.clock.now + seconds
        while (due := self.repeats.due()) is not None and due <= end:
            self.clock.now = due
            self.repeats.work()
        self.clock.now = end
        return self.lines()


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    logger = logging.getLogger(logs.ROOT)
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    logging.captureWarnings(False)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_line_is_time_level_and_message(bench: Bench) -> None:
    bench.log.info("sync: %d of %d routes changed", 1, 2)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO sync: 1 of 2 routes changed\n", bench.stream.getvalue()
    )


def test_json_has_the_fields_beside_the_message() -> None:
    bench = Bench(LogFormat.JSON)
    bench.log.info("one", extra={"fields": {"event": "sync", "routes": 3}})
    document = json.loads(bench.stream.getvalue())
    assert document.pop("time").endswith("Z")
    assert document == {"level": "info", "message": "one", "event": "sync", "routes": 3}


def test_below_the_level_nothing_is_written() -> None:
    bench = Bench(level=LogLevel.ERROR)
    bench.log.warning("no")
    bench.log.error("yes")
    assert bench.lines() == ["ERROR yes"]


# ---- What repeats


def test_the_first_error_of_a_kind_is_written_at_once_and_its_repeats_are_counted(bench: Bench) -> None:
    bench.log.warning(REFUSED, "sync", 3, 0.1)
    assert bench.lines() == ["WARNING sync: 3 refused; trying again in 0.1 s"]
    for number in range(38):
        bench.clock.advance(1)
        bench.log.warning(REFUSED, "sync", number, 0.2)
    assert bench.lines() == []
    bench.clock.advance(30)
    bench.log.warning(REFUSED, "sync", 5, 30)
    assert bench.lines() == ["WARNING sync: 5 refused; trying again in 30.0 s (and 38 more like it)"]


def test_an_error_that_goes_on_is_a_line_a_minute(bench: Bench) -> None:
    written = []
    for _ in range(3600):
        bench.log.error("it hurts")
        written += bench.after(1)
    assert written[0] == "ERROR it hurts"
    assert set(written[1:]) <= {f"ERROR it hurts (and {number} more like it)" for number in (58, 59, 60)}
    assert 58 <= len(written) <= 61


def test_repeats_that_nothing_follows_are_told_after_a_minute(bench: Bench) -> None:
    for number in range(4):
        bench.log.warning(REFUSED, "sync", number, 0.1)
    assert bench.lines() == ["WARNING sync: 0 refused; trying again in 0.1 s"]
    assert bench.after(59) == []
    assert bench.after(1) == ["WARNING sync: 3 refused; trying again in 0.1 s (and 2 more like it)"]
    assert bench.repeats.due() is None


def test_what_is_held_back_is_told_at_the_end(bench: Bench) -> None:
    bench.log.warning("a")
    bench.log.warning("a")
    bench.lines()
    bench.repeats.tell_all()
    bench.repeats.tell_all()
    assert bench.lines() == ["WARNING a"]


def test_after_a_quiet_minute_an_error_is_new_again(bench: Bench) -> None:
    bench.log.warning("a")
    bench.clock.advance(61)
    bench.log.warning("a")
    assert bench.lines() == ["WARNING a", "WARNING a"]


def test_numbers_do_not_make_another_kind_but_names_do(bench: Bench) -> None:
    bench.log.warning(REFUSED, "sync", 1, 0.1)
    bench.log.warning(REFUSED, "sync", 2, 0.2)
    bench.log.warning(REFUSED, "audit", 2, 0.2)
    assert bench.lines() == [
        "WARNING sync: 1 refused; trying again in 0.1 s",
        "WARNING audit: 2 refused; trying again in 0.2 s",
    ]


def test_one_text_of_two_parts_is_two_kinds(bench: Bench) -> None:
    bench.log.warning("a")
    logging.getLogger("ebpflb.other").warning("a")
    assert bench.lines() == ["WARNING a", "WARNING a"]


def test_a_message_about_very_many_objects_is_some_lines_and_a_number(bench: Bench) -> None:
    for number in range(1000):
        bench.log.warning("%s cannot be read", f"default/web-{number}")
    assert len(bench.lines()) == 21
    assert bench.after(60) == ["WARNING default/web-999 cannot be read (and 978 more like it)"]


def test_information_is_never_held_back(bench: Bench) -> None:
    for _ in range(3):
        bench.log.info("sync: %d rows written", 1)
    assert len(bench.lines()) == 3


def test_json_has_the_number_as_a_field() -> None:
    bench = Bench(LogFormat.JSON)
    for _ in range(6):
        bench.log.warning("a", extra={"fields": {"event": "x"}})
    first = json.loads(bench.stream.getvalue())
    assert "repeated" not in first
    bench.lines()
    [line] = bench.after(60)
    second = json.loads(line)
    assert (second["message"], second["event"], second["repeated"]) == ("a", "x", 4)


def test_kinds_that_are_over_are_forgotten(bench: Bench) -> None:
    for number in range(1_000):
        bench.log.warning("%s is gone", f"name-{number}")
        bench.clock.advance(10)
    assert len(bench.lines()) == 1_000
    assert len(bench.repeats._held) < 10  # memory is what this test is about


def test_threads_may_log_at_once(bench: Bench) -> None:
    def hammer(name: str) -> None:
        for number in range(200):
            bench.log.warning("%s: %d", name, number)

    threads = [threading.Thread(target=hammer, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line[:10] for line in bench.lines()) == [f"WARNING {name}:"[:10] for name in "abcd"]
    assert sorted(bench.after(60)) == [f"WARNING {name}: 199 (and 198 more like it)" for name in "abcd"]


def test_a_kernel_that_refuses_for_an_hour_is_a_line_a_minute(bench: Bench) -> None:
    """In the loop of the daemon, with what the reconciler really logs."""
    dataplane, source = FakeDataplane(), FakeSource()
    dataplane.fail_next = 1_000_000
    source.synced()
    reconciler = Reconciler(
        desired=FakeDesired(routes(*both())),
        sources=[source],
        dataplane=dataplane,
        clock=bench.clock,
        random=lambda: 0.0,
    )
    reconciler.read_all()
    end = bench.clock.now + 3600
    with FakeSelector(bench.clock, [(3600, lambda: None)]) as selector:
        run(selector, [reconciler, bench.repeats], bench.clock, stopped=lambda: bench.clock.now >= end)
    refused = [line for line in bench.lines() if "refused; trying again" in line]
    assert refused[0] == "WARNING sync: 1 refused; trying again in 0.1 s"
    assert refused[-1].endswith("trying again in 30.0 s (and 1 more like it)")
    assert 55 <= len(refused) <= 62
    assert dataplane.calls.count("sync") > 2 * 55


# ---- What others log


def _stderr_of(code: str) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stderr


def test_libraries_do_not_write_to_stderr() -> None:
    code = """
import logging, warnings
from ebpflb import log
from ebpflb.config import LogFormat, LogLevel
log.set_up(LogFormat.JSON, LogLevel.DEBUG)
import urllib3, prometheus_client
logging.getLogger("urllib3.connectionpool").warning("Retrying (Retry(total=2)) after connection broken")
logging.getLogger("never.heard.of").error("what nobody handles")
warnings.warn("Unverified HTTPS request")
logging.getLogger("ebpflb.some").warning("ours")
"""
    [line] = _stderr_of(code).splitlines()
    assert json.loads(line)["message"] == "ours"


def test_set_up_again_replaces_what_was_there() -> None:
    first, second = Bench(), Bench()
    second.log.warning("a")
    assert (first.lines(), second.lines()) == ([], ["WARNING a"])


def test_a_command_that_ends_at_once_holds_nothing_back() -> None:
    stream = io.StringIO()
    logs.set_up(LogFormat.TEXT, LogLevel.INFO, stream)
    for _ in range(3):
        logging.getLogger("ebpflb.look").warning("a")
    assert stream.getvalue().count("WARNING a\n") == 3


def test_once_closed_it_holds_nothing_back(bench: Bench) -> None:
    for _ in range(3):
        bench.log.warning("a")
    bench.repeats.close()
    assert bench.lines() == ["WARNING a", "WARNING a (and 1 more like it)"]
    for _ in range(3):
        bench.log.warning("a")
    assert bench.lines() == ["WARNING a"] * 3


def test_as_a_worker_it_has_nothing_to_do_while_nothing_repeats(bench: Bench) -> None:
    workers: list[Callable[[], object]] = [bench.repeats.work, bench.repeats.tell_all]
    bench.log.warning("a")
    bench.lines()
    for work in workers:
        work()
    assert bench.repeats.due() is None
    assert bench.lines() == []
