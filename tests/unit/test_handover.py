"""From one dataplane to the next: in which order, what is said meanwhile, and what is left alone."""

from __future__ import annotations

import pytest

from ebpflb.commands.handover import LEFTOVERS_PERIOD, PERIOD, HandOver, Retiring
from ebpflb.errors import ApplyError, Unsupported
from ebpflb.problems import Found
from tests.fakes import FakeClock, FakeDataplane, FakeLeftovers, both, routes

SERVED = routes(*both())
KEEPS = "keeps the connections that it began; new ones are iptables's"


class RunningClock(FakeClock):
    """No two looks at it are at the same time."""

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Change:
    """bpf served, iptables is to."""

    def __init__(self) -> None:
        self.clock = RunningClock()
        self.old = FakeDataplane(SERVED, "bpf")
        self.new = FakeDataplane(name="iptables")
        self.idle = FakeDataplane(name="ipvs")
        self.leftovers = FakeLeftovers()
        self.complete = False
        self.hand_over = HandOver(
            (self.old, self.idle, self.new),
            self.new,
            self.leftovers,
            clock=self.clock,
            complete=lambda: self.complete,
        )

    def wait(self, seconds: float = PERIOD) -> None:
        self.clock.advance(seconds)
        self.hand_over.work()

    @property
    def said(self) -> list[Found]:
        return list(self.hand_over.problems())


@pytest.fixture
def change() -> Change:
    return Change()


def test_nobody_here_is_nothing_to_do(change: Change) -> None:
    change.old.held = None
    change.hand_over.begin()
    assert "take_over" not in change.new.calls
    change.complete = True
    assert change.hand_over.due() is None
    change.hand_over.work()
    assert change.old.calls == change.idle.calls == []
    assert (change.hand_over.retiring(), change.said) == ((), [])


def test_the_successor_knows_before_it_starts(change: Change) -> None:
    change.hand_over.begin()
    assert change.new.calls == ["take_over"]
    assert change.hand_over.retiring() == (Retiring("bpf", "holds what it held, until iptables is complete"),)


def test_nobodys_rows_go_before_the_successor_is_complete(change: Change) -> None:
    change.hand_over.begin()
    change.wait(1000)
    assert change.hand_over.due() is None
    assert change.old.calls == []
    change.complete = True
    due = change.hand_over.due()
    assert due is not None and due <= change.clock.now
    change.hand_over.work()
    assert change.old.calls == ["retire", "cleanup"]
    assert change.old.held is None
    assert (change.hand_over.retiring(), change.hand_over.due()) == ((), None)


def test_connections_that_are_kept_are_waited_for(change: Change, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    change.hand_over.begin()
    change.complete, change.old.keeps = True, 3
    change.hand_over.work()
    for _ in range(2):
        assert change.hand_over.retiring() == (Retiring("bpf", KEEPS),)
        assert change.hand_over.due() == pytest.approx(change.clock.now + PERIOD)
        change.wait(PERIOD - 1)
        change.wait(1)
    change.wait()
    assert change.old.calls == ["retire"] * 4 + ["cleanup"]
    assert [record.getMessage() for record in caplog.records] == [
        "bpf carried Services here until now: iptables takes over",
        f"hand-over: bpf {KEEPS}",
        "hand-over: bpf has nothing left to keep, and has been removed",
    ]


@pytest.mark.parametrize("what", ["retire", "cleanup"])
def test_a_step_that_is_refused_is_a_problem_and_tried_again(change: Change, what: str) -> None:
    change.hand_over.begin()
    change.complete = True
    change.old.raises[what] = ApplyError("frontends", "", 1, "frontends: Operation not permitted")
    change.hand_over.work()
    assert change.said == [
        Found(
            "hand-over",
            "bpf",
            "every 30 s it is tried to look at what it left, or to remove it: frontends: Operation not permitted",
        )
    ]
    change.wait()
    assert (change.said, change.old.held) == ([], None)


def test_one_that_cannot_be_asked_is_asked_again(change: Change) -> None:
    change.idle.raises["inventory"] = ApplyError("ipsets", "", 1, "ipsets cannot be read")
    change.old.held = None
    change.hand_over.begin()
    assert [found.subject for found in change.said] == ["ipvs"]
    change.complete = True
    change.hand_over.work()
    assert (change.said, change.hand_over.due()) == ([], None)
    assert "retire" not in change.idle.calls


def test_one_that_this_node_cannot_have_is_nobody(change: Change) -> None:
    change.old.held = None
    change.idle.raises["inventory"] = Unsupported("no iptables-restore is installed")
    change.hand_over.begin()
    assert (change.new.calls, change.said, change.hand_over.retiring()) == ([], [], ())


def test_one_whose_rules_were_written_over_is_over(change: Change) -> None:
    """iptables and IPVS share chains: the successor's first sync may have replaced them."""
    change.hand_over.begin()
    change.complete, change.old.held = True, None
    change.hand_over.work()
    assert change.old.calls == []
    assert change.hand_over.retiring() == ()


# ---- kube-proxy ----


def test_kube_proxys_leftovers_are_named_and_left_alone(change: Change) -> None:
    change.old.held = None
    change.leftovers.lines = ("chain KUBE-SERVICES", "ipset KUBE-CLUSTER-IP")
    change.hand_over.begin()
    assert change.new.calls == ["take_over"]
    change.complete = True
    change.hand_over.work()
    change.wait()
    assert change.said == [
        Found("hand-over", "kube-proxy",
              "left behind: chains, ipsets; `ebpflb cleanup --kube-proxy` removes it", "LeftBehind")
    ]  # fmt: skip
    assert len(change.leftovers.lines) == 2


def test_that_they_are_gone_is_noticed(change: Change) -> None:
    change.leftovers.lines = ("chain KUBE-SERVICES",)
    change.hand_over.begin()
    change.complete = True
    change.hand_over.work()
    change.leftovers.lines = ()
    change.wait(LEFTOVERS_PERIOD)
    assert (change.said, change.hand_over.due()) == ([], None)


def test_that_they_cannot_be_looked_for_is_a_problem(change: Change) -> None:
    change.old.held = None
    change.leftovers.raises = ApplyError("iptables", "", 0, "the xtables lock is held by process 7")
    change.hand_over.begin()
    assert [found.reason for found in change.said] == [
        "every 30 s it is tried to look at what it left, or to remove it: the xtables lock is held by process 7"
    ]
    change.complete = True
    change.hand_over.work()
    assert (change.said, change.hand_over.due()) == ([], None)
