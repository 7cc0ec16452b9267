"""What the daemon does for its dataplane between syncs: above all, that a flush is noticed."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ebpflb.commands.attend import Canary
from ebpflb.config.options import Options, configure
from ebpflb.errors import ApplyError
from ebpflb.reconcile import Reconciler, Timing
from tests.fakes import World, both, routes

HOUR = 3600.0


class Daemon:
    """A reconciler that audits once an hour, as after an audit that took long, and a canary."""

    def __init__(self, **options: Any) -> None:
        self.world = World(want=routes(*both()))
        world = self.world
        self.reconciler = Reconciler(
            desired=world.desired,
            sources=(world.source,),
            dataplane=world.dataplane,
            clock=world.clock,
            random=lambda: 0.0,
            timing=Timing(audit_period=HOUR),
        )
        config = configure(Options(**options), hostname="node-1", need_source=False)
        self.canary = Canary(config, world.parts, world.dataplane, self.reconciler)
        self.reconciler.read_all()

    def turn(self, seconds: float = 0.0) -> list[str]:
        """Let time pass and the workers work; what the dataplane was called for."""
        self.world.clock.advance(seconds)
        self.world.dataplane.calls.clear()
        self.canary.work()
        self.reconciler.work()
        return list(self.world.dataplane.calls)


@pytest.fixture
def daemon() -> Daemon:
    made = Daemon()
    made.turn()
    made.turn()
    return made


def test_before_the_first_sync_there_is_nothing_to_look_for() -> None:
    made = Daemon()
    assert made.canary.due() is None
    assert "canary" not in made.turn()


def test_it_is_looked_at_every_period_and_found_there(daemon: Daemon) -> None:
    assert daemon.canary.due() == daemon.world.clock.now + 30
    assert daemon.turn(29) == []
    assert daemon.turn(1) == ["canary"]
    assert daemon.turn(30) == ["canary"]


def test_a_flush_is_repaired_within_a_period(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    daemon.world.dataplane.held = None
    with caplog.at_level(logging.WARNING):
        assert daemon.turn(30) == ["canary", "audit"]
    assert daemon.world.dataplane.held == daemon.world.desired.want
    assert "bpf: something of what was installed is gone" in caplog.text
    assert daemon.turn(30) == ["canary"]


def test_a_look_that_fails_asks_for_an_audit_that_says_why(daemon: Daemon) -> None:
    daemon.world.dataplane.raises["canary"] = ApplyError("nat", "", 0, "the xtables lock is held by process 7")
    assert daemon.turn(30) == ["canary", "audit"]


def test_who_wants_audits_more_often_wants_looks_more_often() -> None:
    made = Daemon(audit_period=5.0)
    made.turn()
    made.turn()
    assert made.turn(5) == ["canary"]
