"""The daemon's loop: whose faults end it, and whose do not."""

from __future__ import annotations

import logging

import pytest

from ebpflb.loop import Dispensable
from tests.fakes import FakeClock


class Worker:
    """Fails as long as it is `ill`."""

    def __init__(self) -> None:
        self.ill = True
        self.worked = 0

    def due(self) -> float | None:
        return 0.0

    def work(self) -> None:
        self.worked += 1
        if self.ill:
            raise RuntimeError("can't start new thread")


def test_a_fault_of_a_dispensable_worker_is_logged_and_does_not_keep_the_loop_busy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, worker = FakeClock(), Worker()
    dispensable = Dispensable(worker, clock, pause=5.0)
    with caplog.at_level(logging.ERROR, "ebpflb"):
        dispensable.work()
    assert [record.getMessage() for record in caplog.records] == [
        "Worker failed unexpectedly: RuntimeError: can't start new thread"
    ]
    assert dispensable.due() == clock.now + 5.0
    clock.advance(4.0)
    dispensable.work()
    assert worker.worked == 1
    clock.advance(1.0)
    worker.ill = False
    dispensable.work()
    assert (worker.worked, dispensable.due()) == (2, 0.0)


def test_being_asked_to_end_is_no_fault() -> None:
    class Ending(Worker):
        def work(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispensable(Ending(), FakeClock()).work()
