"""What the daemon does for its dataplane between syncs: listens to what it listens to, and looks whether it is there.

Rules of this file: whatever is found wrong here is put right by an audit, which says so itself.
"""

from __future__ import annotations

import logging
import selectors

from ebpflb.config import Config
from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError
from ebpflb.parts import Parts, Watch
from ebpflb.reconcile import Reconciler

log = logging.getLogger("ebpflb.daemon")

# An audit of large tables comes more rarely than every `audit_period`; this look does not.
_MOST_SECONDS = 30.0


class Attend:
    """Listens to the dataplane's own descriptors as soon as it has been started."""

    def __init__(
        self, parts: Parts, dataplane: Dataplane, reconciler: Reconciler, selector: selectors.BaseSelector
    ) -> None:
        self._parts = parts
        self._dataplane = dataplane
        self._reconciler = reconciler
        self._selector = selector
        self._attending = False

    def due(self) -> float | None:
        return None

    def work(self) -> None:
        if self._attending or not self._reconciler.started:
            return
        self._attending = True
        for watch in self._parts.watches(self._dataplane):
            self._selector.register(watch.fd, selectors.EVENT_READ, lambda watch=watch: self._handle(watch))

    def _handle(self, watch: Watch) -> None:
        try:
            watch.handle()
        except (EbpflbError, OSError) as error:
            log.warning("%s: a change of devices: %s", self._dataplane.name, error)
            self._reconciler.check_now()


class Canary:
    """Notices that somebody flushed what was installed, long before the next audit would."""

    def __init__(self, config: Config, parts: Parts, dataplane: Dataplane, reconciler: Reconciler) -> None:
        self._clock = parts.clock
        self._dataplane = dataplane
        self._reconciler = reconciler
        self._period = min(config.audit_period, _MOST_SECONDS)
        self._at: float | None = None

    def due(self) -> float | None:
        return self._at

    def work(self) -> None:
        now = self._clock()
        if self._at is None:
            # Before the first complete sync there is nothing that could have been flushed.
            self._at = now + self._period if self._reconciler.first_sync else None
            return
        if now < self._at:
            return
        self._at = now + self._period
        try:
            there = self._dataplane.canary()
        except EbpflbError as error:
            log.warning("%s: whether all is still installed cannot be seen: %s", self._dataplane.name, error)
            there = False
        if not there:
            log.warning("%s: something of what was installed is gone; all is compared", self._dataplane.name)
            self._reconciler.check_now()
