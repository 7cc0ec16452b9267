"""When a sync happens, and what follows its failure: the loop on a clock that only the test moves.

Rules of this file: nothing sleeps; a situation is a script of (seconds, what happens), and what is looked at are the
calls that reached the dataplane and when.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from ebpflb.dataplane import Report
from ebpflb.errors import ApplyError, SourceError, Unsupported, UserError
from ebpflb.loop import run, stop_on_signals
from ebpflb.model import Family, Problem, ServiceName
from ebpflb.observer import Attempt, Trigger
from ebpflb.problems import Found
from ebpflb.reconcile import Reconciler, Timing
from ebpflb.routes import HealthCheck, RouteTable
from ebpflb.source import DropService, Event, PutSlice, Remembered
from tests.fakes import FakeClock, FakeDataplane, FakeDesired, FakeSelector, FakeSource, both, routes, row
from tests.world import endpoint_slice

Step = tuple[float, Callable[[], object]]
TIMING = Timing(min_interval=0.01, audit_period=30.0, retry_first=0.1, retry_most=30.0)


class TimedDataplane(FakeDataplane):
    """Notes when it was called, and takes its time for it."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock
        self.takes = 0.0
        self.at: list[tuple[str, float]] = []

    def _called(self, what: str) -> None:
        self.at.append((what, round(self.clock.now - 1000.0, 4)))
        self.clock.advance(self.takes)
        super()._called(what)

    def times(self, what: str) -> list[float]:
        return [at for name, at in self.at if name == what]


class Watching:
    """An observer that notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.queues: list[float] = []
        self.attempts: list[Attempt] = []
        self.found: list[tuple[tuple[Found, ...], tuple[Found, ...]]] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def queued(self, at: float) -> None:
        self.queues.append(at - 1000.0)

    def attempted(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        self.found.append((come, gone))


class Bench:
    """A reconciler among fakes, with its loop."""

    def __init__(self, random: float = 0.0, sources: tuple[str, ...] = ("manifests",)) -> None:
        self.clock = FakeClock()
        self.dataplane = TimedDataplane(self.clock)
        self.sources = [FakeSource(name) for name in sources]
        self.source = self.sources[0]
        self.desired = FakeDesired(routes(*both()), sources)
        self.device_problems: tuple[Problem, ...] = ()
        self.released: list[float] = []
        self.watching = Watching()
        self.reconciler = Reconciler(
            desired=self.desired,
            sources=self.sources,
            dataplane=self.dataplane,
            clock=self.clock,
            random=lambda: random,
            timing=TIMING,
            other_problems=lambda: [Found("devices", *problem) for problem in self.device_problems],
            after_whole_tables=lambda: self.released.append(self.clock.now - 1000.0),
            observer=self.watching,
        )

    def run(self, *script: Step, until: float) -> None:
        """The loop, through `script`, to the time `until`."""
        end = self.clock.now + until
        with FakeSelector(self.clock, [*script, (until, lambda: None)]) as selector:
            for source in self.sources:
                selector.register(source, 1, lambda source=source: self.reconciler.read(source))
            self.reconciler.read_all()
            run(selector, [self.reconciler], self.clock, stopped=lambda: self.clock.now >= end)

    def close(self) -> None:
        for source in self.sources:
            source.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def ready(bench: Bench) -> None:
    bench.source.change()
    bench.source.synced()


def test_nothing_reaches_the_dataplane_before_every_source_has_synced() -> None:
    bench = Bench(sources=("manifests", "addresses"))
    manifests, addresses = bench.sources
    bench.run((0.0, manifests.change), (1.0, manifests.synced), (5.0, addresses.synced), until=6.0)
    assert bench.dataplane.at == [("start", 5.0), ("sync", 5.0)]
    bench.close()


def test_a_source_without_objects_still_leads_to_a_sync(bench: Bench) -> None:
    """What an earlier process left in the kernel must go."""
    bench.run((0.0, bench.source.synced), until=1.0)
    assert bench.dataplane.times("sync") == [0.0]


def test_events_that_say_nothing_new_cost_no_sync(bench: Bench) -> None:
    ready(bench)

    def repeat() -> None:
        bench.desired.news = False
        bench.source.change()

    bench.run((1.0, repeat), until=2.0)
    assert bench.dataplane.times("sync") == [0.0]


def test_a_change_after_a_quiet_time_is_synced_at_once(bench: Bench) -> None:
    ready(bench)
    bench.run((3.0, bench.source.change), until=4.0)
    assert bench.dataplane.times("sync") == [0.0, 3.0]


def test_a_change_just_after_a_sync_waits_for_the_interval(bench: Bench) -> None:
    ready(bench)
    bench.run((3.0, bench.source.change), (3.004, bench.source.change), (3.006, bench.source.change), until=4.0)
    assert bench.dataplane.times("sync") == [0.0, 3.0, 3.01]


def test_the_interval_counts_from_the_end_of_a_sync(bench: Bench) -> None:
    ready(bench)
    bench.dataplane.takes = 0.05
    bench.run((3.0, bench.source.change), (3.02, bench.source.change), until=4.0)
    start_takes = 0.05
    assert bench.dataplane.times("sync") == [start_takes, 3.0, 3.06]


def test_a_thousand_changes_a_second_cost_a_hundred_syncs(bench: Bench) -> None:
    ready(bench)
    storm = [(1.0 + number / 1000, bench.source.change) for number in range(1000)]
    bench.run(*storm, until=3.0)
    assert 95 <= len(bench.dataplane.times("sync")) <= 102
    assert len(bench.desired.events) == 1002


def test_what_is_readable_together_is_synced_together() -> None:
    bench = Bench(sources=("manifests", "addresses"))

    def both_speak() -> None:
        for source in bench.sources:
            source.change()

    for source in bench.sources:
        source.synced()
    bench.run((1.0, both_speak), until=2.0)
    assert bench.dataplane.times("sync") == [0.0, 1.0]
    bench.close()


def test_the_dataplane_is_given_the_whole_table(bench: Bench) -> None:
    ready(bench)
    bench.run(until=1.0)
    assert bench.dataplane.state() == bench.desired.want


@pytest.mark.parametrize(("random", "waits"), [(0.0, (0.1, 0.2, 0.4)), (1.0, (0.05, 0.1, 0.2))])
def test_a_refused_sync_is_tried_again_ever_later(random: float, waits: tuple[float, ...]) -> None:
    bench = Bench(random)
    ready(bench)
    bench.dataplane.fail_next = 3
    bench.run(until=2.0)
    first, second, third = waits
    expected = [0.0, first, first + second, first + second + third]
    assert bench.dataplane.times("sync") == pytest.approx(expected, abs=1e-3)
    assert bench.reconciler.overview().healthy
    bench.close()


def test_the_wait_has_an_upper_bound(bench: Bench) -> None:
    ready(bench)
    bench.dataplane.fail_next = 10**6
    bench.run(until=600.0)
    times = bench.dataplane.times("sync")
    assert max(late - early for early, late in zip(times, times[1:], strict=False)) == pytest.approx(30.0, abs=1e-3)
    assert len(times) >= 600 / 30


def test_a_storm_while_the_kernel_refuses_neither_hurries_nor_stretches_the_retry(bench: Bench) -> None:
    ready(bench)
    bench.dataplane.fail_next = 10**6
    bench.run(*[(0.001 * number, bench.source.change) for number in range(1, 50)], until=0.15)
    overview = bench.reconciler.overview()
    assert overview.failures == 2, "one for the first sync, one for the retry 0.1 s later"
    assert not overview.healthy


def test_changes_are_synced_while_a_retry_is_waited_for(bench: Bench) -> None:
    """One refused row must not hold back the others."""
    ready(bench)
    bench.dataplane.fail_next = 10
    bench.run((10.0, bench.source.change), until=10.005)
    assert 10.0 in bench.dataplane.times("sync")


def test_success_forgets_the_failures(bench: Bench) -> None:
    ready(bench)
    bench.dataplane.fail_next = 3

    def fail_once_more() -> None:
        bench.dataplane.fail_next = 1
        bench.source.change()

    bench.run((5.0, fail_once_more), until=6.0)
    assert bench.dataplane.times("sync")[-2:] == pytest.approx([5.0, 5.1], abs=1e-3)


def test_the_kernel_is_compared_with_the_table_every_period(bench: Bench) -> None:
    ready(bench)
    bench.run(until=91.0)
    assert bench.dataplane.times("audit") == [30.0, 60.0, 90.0]


def test_a_long_audit_comes_seldom(bench: Bench) -> None:
    """At most a hundredth of the time goes to audits."""
    ready(bench)
    bench.dataplane.takes = 0.5
    bench.run(until=200.0)
    first, *later = bench.dataplane.times("audit")
    assert first == pytest.approx(31.0)
    assert later == pytest.approx([31.0 + 0.5 + 50, 31.0 + 2 * 50.5, 31.0 + 3 * 50.5])


def test_memory_is_given_back_when_whole_tables_have_been_handled() -> None:
    """After the first sync and after audits, not after each change."""
    bench = Bench()
    ready(bench)
    bench.run((1.0, bench.source.change), (2.0, bench.source.change), until=31.0)
    assert bench.released == [0.0, 30.0]
    bench.close()


def test_changes_do_not_put_off_the_audit(bench: Bench) -> None:
    ready(bench)
    bench.run(*[(float(second), bench.source.change) for second in range(1, 60)], until=61.0)
    assert bench.dataplane.times("audit") == pytest.approx([30.01, 60.01], abs=0.02)


def test_an_audit_repairs_what_somebody_else_did(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    ready(bench)

    def somebody_else() -> None:
        bench.dataplane.held = RouteTable()

    with caplog.at_level(logging.WARNING, "ebpflb"):
        bench.run((10.0, somebody_else), until=31.0)
    assert bench.dataplane.state() == bench.desired.want
    assert "audit: the kernel differed and was repaired; 2 rows written" in caplog.text


def test_an_audit_that_was_refused_is_not_forgotten_over_a_good_sync(bench: Bench) -> None:
    ready(bench)

    def refuse_the_audit() -> None:
        bench.dataplane.fail_next = 1

    bench.run((29.0, refuse_the_audit), (30.05, bench.source.change), until=30.07)
    assert not bench.reconciler.overview().healthy
    bench.run(until=1.0)
    assert bench.reconciler.overview().healthy


def test_check_now_brings_the_audit_forward(bench: Bench) -> None:
    ready(bench)
    bench.run((7.0, bench.reconciler.check_now), until=8.0)
    assert bench.dataplane.times("audit") == [7.0]


@pytest.mark.parametrize("error", [ApplyError("frontends", "", 28, "frontends: no room"), OSError(5, "I/O error")])
def test_an_error_of_the_dataplane_is_reported_and_retried(bench: Bench, error: Exception) -> None:
    ready(bench)
    bench.dataplane.raises["sync"] = error
    bench.run(until=0.05)
    overview = bench.reconciler.overview()
    assert [problem.part for problem in overview.problems] == ["sync"]
    assert not overview.healthy
    assert overview.first_sync is False
    bench.run(until=0.2)
    assert bench.reconciler.overview().healthy
    assert bench.reconciler.overview().problems == ()


def test_a_fault_in_the_policy_keeps_the_last_good_state(bench: Bench) -> None:
    ready(bench)

    def fault() -> None:
        bench.desired.raises = KeyError("oops")
        bench.source.change()

    bench.run((1.0, fault), until=1.05)
    assert "unexpected KeyError" in bench.reconciler.overview().problems[0].reason
    assert bench.dataplane.held == bench.desired.want
    bench.run(until=1.0)
    assert bench.reconciler.overview().healthy


def test_start_is_retried_when_the_kernel_refuses_it_for_now(bench: Bench) -> None:
    ready(bench)
    bench.dataplane.raises["start"] = ApplyError("programs", "", 11, "loading: try again")
    bench.run(until=1.0)
    assert [name for name, _ in bench.dataplane.at] == ["start", "start", "sync"]


@pytest.mark.parametrize("error", [Unsupported("no BPF here"), UserError("mount it")])
def test_what_can_never_work_ends_the_daemon(bench: Bench, error: Exception) -> None:
    ready(bench)
    bench.dataplane.raises["start"] = error
    with pytest.raises(type(error)):
        bench.run(until=1.0)


def test_once_started_nothing_ends_the_daemon(bench: Bench) -> None:
    ready(bench)

    def vanish() -> None:
        bench.dataplane.raises["sync"] = UserError("the bpf file system has gone")
        bench.source.change()

    bench.run((1.0, vanish), until=2.0)
    assert bench.reconciler.overview().healthy


@pytest.mark.parametrize("error", [SourceError("the directory has gone"), ValueError("a bug")])
def test_a_source_that_cannot_be_read_is_a_problem_until_it_can(bench: Bench, error: Exception) -> None:
    ready(bench)

    def break_it() -> None:
        bench.source.raises = error
        bench.source.change()

    bench.run((1.0, break_it), until=1.5)
    (problem,) = bench.reconciler.overview().problems
    assert problem.part == "manifests" and str(error) in problem.reason
    assert bench.reconciler.overview().healthy, "the last good content is served"
    bench.run(until=1.1)
    assert bench.reconciler.overview().problems == (), "it was read again without having asked for it"


def test_an_object_that_we_stumble_over_takes_no_other_with_it(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A source says each of them once."""
    bad = DropService(ServiceName("ns", "bad"))
    bench.desired.stumbles_over = bad
    bench.source.say(bad)
    bench.source.change()
    bench.source.synced()
    with caplog.at_level(logging.ERROR, "ebpflb"):
        bench.run(until=0.5)
    assert bench.dataplane.times("sync") == [0.0]
    (problem,) = bench.reconciler.overview().problems
    assert problem == Found("manifests", "manifests", "unexpected KeyError: 'a fault of ours'")
    assert [record.getMessage() for record in caplog.records] == [
        "manifests: DropService was not taken in: unexpected KeyError: 'a fault of ours'"
    ]


def test_a_source_that_fails_at_first_is_read_again_before_anything_else() -> None:
    bench = Bench(sources=("manifests", "addresses"))
    manifests, addresses = bench.sources
    manifests.synced()
    addresses.synced()
    addresses.raises = SourceError("netlink: no buffer")
    bench.run(until=3.0)
    assert bench.dataplane.times("sync") == [1.0]
    bench.close()


def test_problems_of_all_parts_are_told(bench: Bench) -> None:
    ready(bench)
    bench.source.wrong = (Problem("web.yaml document 2", "spec.ports: none"),)
    bench.device_problems = (Problem("eth0", "no address"),)
    remark = Problem("ns/web", "port 80 is older ns/other's")
    bench.desired.want = routes(*both(), problems={ServiceName("ns", "web"): (remark,)})
    bench.run(until=1.0)
    assert bench.reconciler.overview().problems == (
        Found("devices", "eth0", "no address"),
        Found("manifests", "web.yaml document 2", "spec.ports: none"),
        Found("policy", "ns/web", "port 80 is older ns/other's"),
    )


def test_a_problem_is_logged_when_it_comes_and_when_it_goes(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    ready(bench)

    def typo() -> None:
        bench.source.wrong = (Problem("web.yaml", "unknown kind Servise"),)
        bench.source.change()

    def corrected() -> None:
        bench.source.wrong = ()
        bench.source.change()

    with caplog.at_level(logging.INFO, "ebpflb"):
        bench.run((1.0, typo), (2.0, bench.source.change), (3.0, corrected), until=4.0)
    lines = [record.getMessage() for record in caplog.records if "Servise" in record.getMessage()]
    assert lines == [
        "manifests: web.yaml: unknown kind Servise",
        "manifests: web.yaml: resolved: unknown kind Servise",
    ]


def test_ten_thousand_problems_are_few_lines(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    ready(bench)
    bench.source.wrong = tuple(Problem(f"ns/s{number}", "the map is full") for number in range(10_000))
    with caplog.at_level(logging.INFO, "ebpflb"):
        bench.run(until=1.0)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 21
    assert lines[-1] == "9980 more problems: `ebpflb status -o wide` has them all"
    assert len(bench.reconciler.overview().problems) == 10_000


def test_a_sync_is_one_line_with_counts_and_duration(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    ready(bench)

    def another() -> None:
        put = dict(both("172.30.0.42", name="other"))
        bench.desired.want = bench.desired.want.evolve(put, [row()[0]])
        bench.source.change()

    with caplog.at_level(logging.INFO, "ebpflb"):
        bench.run((1.0, another), until=2.0)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("sync:")]
    assert lines == [
        "sync: 2 of 2 routes changed; 2 rows written, 0 removed, 0 failed; 0.0 ms",
        "sync: 3 of 3 routes changed; 2 rows written, 1 removed, 0 failed; 0.0 ms",
    ]


def test_ages_are_told(bench: Bench) -> None:
    ready(bench)
    bench.run(until=35.0)
    overview = bench.reconciler.overview()
    assert overview.last_sync_age == pytest.approx(35.0)
    assert overview.last_audit_age == pytest.approx(5.0)
    assert overview.pending_for is None


def test_an_endless_talker_does_not_keep_its_own_news_from_being_synced(bench: Bench) -> None:
    ready(bench)
    reads = 0

    def read_and_go_on() -> None:
        nonlocal reads
        reads += 1
        assert reads < 1000, "nothing but reading"
        bench.clock.advance(0.001)
        bench.reconciler.read(bench.source)
        bench.source.change()

    with FakeSelector(bench.clock) as selector:
        selector.register(bench.source, 1, read_and_go_on)
        bench.reconciler.read_all()
        bench.source.change()
        run(selector, [bench.reconciler], bench.clock, stopped=lambda: len(bench.dataplane.times("sync")) >= 3)
    assert reads >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_loop(bench: Bench, number: signal.Signals) -> None:
    ready(bench)
    before = signal.getsignal(number)
    with stop_on_signals(signal.SIGTERM, signal.SIGINT) as stop:
        script = [(1.0, lambda: os.kill(os.getpid(), number))]
        with FakeSelector(bench.clock, script) as selector:
            selector.register(stop, 1, lambda: None)
            bench.reconciler.read_all()
            run(selector, [bench.reconciler], bench.clock, stopped=lambda: stop.asked)
    assert bench.dataplane.times("sync") == [0.0]
    assert signal.getsignal(number) == before


def test_a_report_knows_whether_it_is_complete() -> None:
    assert Report(written=3).complete
    assert not Report(written=3, failed=1).complete


# ---- What is remembered of an earlier run ----

OLD, NEW = both("172.30.0.41"), both("172.30.0.42", name="new")


def remember(bench: Bench) -> None:
    bench.source.say(Remembered("manifests", 900.0))


def test_a_node_that_boots_without_its_source_serves_what_is_remembered(bench: Bench) -> None:
    bench.run((1.0, lambda: remember(bench)), until=2.0)
    assert bench.dataplane.held == bench.desired.want
    overview = bench.reconciler.overview()
    assert overview.healthy and overview.remembered == 900.0 and not overview.synced_sources


def test_nothing_held_is_taken_away_for_not_being_remembered(bench: Bench) -> None:
    """The kernel outlived the daemon, and knows of a Service that was made after the last saving."""
    bench.dataplane.held = routes(*NEW)
    bench.desired.want = routes(*OLD)
    bench.run((1.0, lambda: remember(bench)), until=2.0)
    assert bench.dataplane.held == routes(*OLD, *NEW)


def test_what_is_held_is_newer_than_what_is_remembered(bench: Bench) -> None:
    held = both("172.30.0.41", backends=("10.180.0.7",))
    bench.dataplane.held = routes(*held)
    bench.desired.want = routes(*OLD)
    bench.run((1.0, lambda: remember(bench)), until=2.0)
    assert bench.dataplane.held == routes(*held)


def test_what_is_held_goes_when_the_truth_lacks_it(bench: Bench) -> None:
    bench.dataplane.held = routes(*NEW)
    bench.desired.want = routes(*OLD)
    bench.run((1.0, lambda: remember(bench)), (5.0, bench.source.synced), until=6.0)
    assert bench.dataplane.held == routes(*OLD)
    assert bench.reconciler.overview().remembered is None


def test_an_audit_meanwhile_takes_nothing_away_either(bench: Bench) -> None:
    bench.dataplane.held = routes(*NEW)
    bench.desired.want = routes(*OLD)
    bench.run((1.0, lambda: remember(bench)), until=70.0)
    assert bench.dataplane.times("audit")
    assert bench.dataplane.held == routes(*OLD, *NEW)


# ---- Who watches ----


def trigger(at: float) -> PutSlice:
    return PutSlice(endpoint_slice("10.0.1.1"), at)


def test_watchers_hear_of_what_is_new_and_of_each_attempt(bench: Bench) -> None:
    bench.source.synced()
    bench.run((3.0, bench.source.change), until=4.0)
    told = bench.watching
    assert [type(event).__name__ for event in told.events] == ["Synced", "DropService"]
    assert told.queues == [0.0, 3.0]
    first, second = told.attempts
    assert (first.what, first.first, first.queued, first.changed) == ("sync", True, 1000.0, 2)
    assert (second.what, second.first, second.queued, second.changed) == ("sync", False, 1003.0, 0)
    assert first.routes == bench.desired.want


def test_a_table_of_nothing_but_health_checks_is_told_too(bench: Bench) -> None:
    """It is empty only as a mapping."""
    check = HealthCheck(ServiceName("ns", "web"), Family.IPV4, 30000, (), 0)
    bench.desired.want = RouteTable(health={(check.service, check.family): check})
    ready(bench)
    bench.run(until=1.0)
    assert bench.watching.attempts[0].routes is bench.desired.want


def test_news_that_says_nothing_is_not_told(bench: Bench) -> None:
    bench.desired.news = False
    bench.source.change()
    bench.run(until=1.0)
    assert bench.watching.events == [] and bench.watching.queues == []


def test_a_pods_change_is_over_when_the_kernel_holds_it(bench: Bench) -> None:
    """A refused sync settles nothing; the one that succeeds settles all that waited."""
    ready(bench)

    def refused() -> None:
        bench.dataplane.fail_next = 2
        bench.source.say(trigger(500.0))

    bench.run((1.0, refused), (1.05, lambda: bench.source.say(trigger(501.0))), until=2.0)
    settled = [attempt.triggers for attempt in bench.watching.attempts]
    assert settled[:3] == [(), (), ()]
    assert settled[3] == (Trigger(Family.IPV4, 500.0), Trigger(Family.IPV4, 501.0))
    assert not any(settled[4:])


def test_an_audit_settles_no_change_that_waits_for_its_sync(bench: Bench) -> None:
    ready(bench)
    bench.run((29.995, bench.source.change), (29.998, lambda: bench.source.say(trigger(500.0))), until=30.1)
    _, _, audit, sync = bench.watching.attempts
    assert (audit.what, audit.triggers) == ("audit", ())
    assert (sync.what, sync.triggers) == ("sync", (Trigger(Family.IPV4, 500.0),))


def test_a_refused_change_goes_on_waiting(bench: Bench) -> None:
    """Health must not think that all is applied."""
    ready(bench)

    def refused() -> None:
        bench.dataplane.fail_next = 1
        bench.source.change()

    bench.run((1.0, refused), until=1.01)
    assert [attempt.report.complete for attempt in bench.watching.attempts] == [True, False]
    assert bench.watching.queues == [0.0, 1.0, 1.0]


def test_a_start_that_fails_is_told_like_any_refusal(bench: Bench) -> None:
    """Health must know that nothing has come into the kernel yet."""
    ready(bench)
    bench.dataplane.raises["start"] = ApplyError("programs", "", 11, "loading: try again")
    bench.run(until=1.0)
    assert [attempt.report.complete for attempt in bench.watching.attempts] == [False, True]
    assert bench.watching.attempts[0].queued == 1000.0


def test_an_audit_is_told_as_such(bench: Bench) -> None:
    ready(bench)
    bench.run(until=31.0)
    audit = bench.watching.attempts[-1]
    assert (audit.what, audit.queued, audit.first) == ("audit", None, False)


def test_problems_are_told_as_they_come_and_go(bench: Bench) -> None:
    ready(bench)
    typo = Found("manifests", "web.yaml", "a typo", "")

    def wrong() -> None:
        bench.source.wrong = (Problem("web.yaml", "a typo"),)
        bench.source.change()

    def right() -> None:
        bench.source.wrong = ()
        bench.source.change()

    bench.run((1.0, wrong), (2.0, bench.source.change), (3.0, right), until=4.0)
    assert bench.watching.found == [((typo,), ()), ((), (typo,))]
