"""Where API servers listen: how to reach one when the Service that fronts them is not served yet.

Rules of this file: what is remembered counts until the first slice of that Service comes, and what is current from then
on. It is told in the loop's thread and asked in the threads of the lists, so what is between them is one tuple.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from ebpflb.errors import SourceError
from ebpflb.model import Address, EndpointSlice, ServiceName
from ebpflb.source import DropSlice, Event, PutSlice
from ebpflb.source.kube.lastgood import API_SERVER, Saved, kubernetes_endpoints

log = logging.getLogger("ebpflb.kubernetes")


class ApiServers:
    """The endpoints of the Service `default/kubernetes`, each as "IP:port" with IPv6 in brackets, ready ones first.
    `recall` gives what was saved of an earlier run; it is asked once, when somebody first wants to know."""

    def __init__(self, recall: Callable[[], Saved | None]) -> None:
        self._recall = recall
        self._lock = threading.Lock()
        self._known: tuple[str, ...] | None = None
        self._slices: dict[ServiceName, EndpointSlice] = {}

    def __call__(self) -> Sequence[str]:
        """As far as they are known. May read a file, the first time."""
        with self._lock:
            if self._known is None:
                self._known = self._remembered()
            return self._known

    def _remembered(self) -> tuple[str, ...]:
        try:
            saved = self._recall()
        except SourceError as error:
            log.debug("no addresses of API servers: %s", error)  # who serves from the snapshot says so aloud
            return ()
        return _texts(kubernetes_endpoints(saved.events)) if saved else ()

    # ---- An Observer ----

    def event(self, event: Event) -> None:
        """Take in where they are now."""
        match event:
            case PutSlice(slice=found) if found.service == API_SERVER or found.name in self._slices:
                self._slices[found.name] = found
            case DropSlice(name=name) if name in self._slices:
                del self._slices[name]
            case _:
                return
        found_now = _texts(kubernetes_endpoints(map(PutSlice, self._slices.values())))
        with self._lock:
            # None at all is a mistake of somebody's, not a place to go to.
            self._known = found_now or self._known

    def queued(self, at: float) -> None:
        """Nothing to do."""

    def attempted(self, attempt: object) -> None:
        """Nothing to do."""

    def problems(self, come: object, gone: object) -> None:
        """Nothing to do."""


def _texts(endpoints: Sequence[tuple[Address, int]]) -> tuple[str, ...]:
    return tuple(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address, port in endpoints)
