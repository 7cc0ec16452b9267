"""What is measured: kube-proxy's metrics under their names, and ours.

Rules of this package: one object watches the reconciler (`Metrics`, an Observer), one looks at the kernel in the
daemon's loop (`Metrics.sampler`, a Worker), one writes the page in the thread of whoever scrapes (`page`). Numbers
cross threads in cells alone. The client library's global registry is not used: what it holds is not ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence

from ebpflb.dataplane import Dataplane
from ebpflb.metrics.cells import Cell
from ebpflb.metrics.kubeproxy import KubeProxyMetrics
from ebpflb.metrics.netfilter import NetfilterMetrics
from ebpflb.metrics.own import OwnMetrics
from ebpflb.metrics.page import Page
from ebpflb.metrics.sampler import PERIOD, Amounts, Sampler
from ebpflb.observer import Observers
from ebpflb.routes import RouteTable
from ebpflb.source import Event, Source


class Metrics(Observers):
    """All of it; an Observer itself.

    `kube_proxy.healthz`, `.livez` and `.request` are for those who answer probes and talk to the API server; `sampler`
    is a Worker for the loop, with a descriptor to wait on; `page` answers /metrics. `each_service` is how many Services
    may have series of their own. `release` gives memory back that was needed for a moment. `clock` is the loop's,
    `wall` gives seconds since the epoch.
    """

    def __init__(
        self,
        dataplane: Dataplane,
        sources: Sequence[Source],
        amounts: Callable[[RouteTable], Generator[None, None, Amounts]],
        *,
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
        each_service: int = 0,
        period: float = PERIOD,
        release: Callable[[], None] = lambda: None,
        passed: Sequence[str] = (),
    ) -> None:
        self.kube_proxy = KubeProxyMetrics(wall)
        self._netfilter = NetfilterMetrics(dataplane.name)
        self._own = OwnMetrics(
            wall, dataplane.name, [source.name for source in sources], each_service=each_service > 0, passed=passed
        )
        super().__init__((self.kube_proxy, self._netfilter, self._own))
        self.sampler = Sampler(
            self._own,
            dataplane,
            sources,
            amounts,
            clock=clock,
            wall=wall,
            seats=each_service,
            period=period,
            release=release,
        )
        self.page = Page(self.cells, self.sampler.scraped)

    def event(self, event: Event) -> None:
        self.kube_proxy.event(event)  # tens of thousands in a first list, and nobody else cares

    def cells(self) -> Iterator[Cell]:
        """Every metric of this package, as it is now."""
        yield from self.kube_proxy.cells()
        yield from self._netfilter.cells()
        yield from self._own.cells()
