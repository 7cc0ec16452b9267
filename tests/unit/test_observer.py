"""Several observers as one: a fault of one is its own."""

from __future__ import annotations

import logging

import pytest

from ebpflb.model import ServiceName
from ebpflb.observer import Observers
from ebpflb.source import DropService
from tests.unit.test_reconcile import Watching

NEWS = DropService(ServiceName("ns", "web"))


class Faulty(Watching):
    def event(self, event: object) -> None:
        raise KeyError("web")

    def queued(self, at: float) -> None:
        raise KeyboardInterrupt


def test_a_fault_of_one_observer_is_logged_and_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    other = Watching()
    with caplog.at_level(logging.ERROR, "ebpflb"):
        Observers([Faulty(), other]).event(NEWS)
    assert other.events == [NEWS]
    assert [record.getMessage() for record in caplog.records] == ["Faulty failed unexpectedly: KeyError: 'web'"]


def test_what_is_no_fault_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        Observers([Faulty()]).queued(1.0)
