"""Who goes along with the daemon that stays: the HTTP server with health, health checks and metrics, what is told to
the API server, and what is remembered for the next start.

Rules of this file: it puts them together, begins and ends them in order; each does its work in a file of its own.
Everything here may fail without a Service noticing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from ebpflb import __version__
from ebpflb.commands.daemon import release_memory
from ebpflb.config import Bind, Config
from ebpflb.errors import UserError
from ebpflb.health import Health, ping
from ebpflb.healthchecks import HealthChecks
from ebpflb.httpd import HttpServer, routed
from ebpflb.loop import Dispensable, Worker
from ebpflb.metrics import Metrics
from ebpflb.metrics.page import handlers
from ebpflb.model import Family
from ebpflb.notices import Notices
from ebpflb.observer import Observer, Observers
from ebpflb.overview import counting
from ebpflb.parts import Choice, Watch
from ebpflb.ports import Port, Ports
from ebpflb.problems import Found
from ebpflb.source import Source
from ebpflb.source.kube.events import EventSender
from ebpflb.source.kube.keeper import Keeper
from ebpflb.source.kube.source import HANGS_AFTER, NAME


class DaemonAttendants:
    """See `parts.Attendants`. `keeper` is None where nothing is to be remembered, `events` where nobody is to be told;
    `observers` are told of everything too; `clock` is the loop's."""

    def __init__(
        self,
        config: Config,
        choice: Choice,
        sources: Sequence[Source],
        *,
        keeper: Keeper | None,
        events: EventSender | None = None,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float],
    ) -> None:
        dataplane = choice.dataplane
        self._config = config
        self._choice = choice
        self._keeper = keeper
        self._events = events
        self._metrics = Metrics(
            dataplane,
            sources,
            counting,
            clock=clock,
            each_service=config.service_metrics,
            release=release_memory,
            passed=[name for name, _ in choice.passed],
        )
        self._health = Health(
            sources,
            families=families(),
            node_needed=config.api is not None,
            clock=clock,
            timeout=config.health_timeout,
            hangs_after=HANGS_AFTER,
            on_healthz=self._metrics.kube_proxy.healthz,
            on_livez=self._metrics.kube_proxy.livez,
        )
        self._server = HttpServer()
        self._ports: Ports[str] = Ports(self._server, clock)
        self._checks = HealthChecks(self._server, lambda: self._health.healthy, clock)
        self._pages = {
            "healthz": self._health.handlers(),
            "metrics": handlers(self._metrics.page, mode=dataplane.name, document=config.document, healthz=ping),
        }
        watching: list[Observer] = [self._metrics, self._health, self._checks, *observers]
        workers: list[Worker] = [self._health, self._checks, self._ports, self._metrics.sampler]
        if keeper is not None:
            watching.append(keeper)
            workers.append(keeper)
        self._notices = Notices(events.post, config.node_name) if events is not None else None
        if self._notices is not None:
            watching.append(self._notices)
        self.observer = Observers(watching)
        self.workers: Sequence[Worker] = tuple(Dispensable(worker, clock) for worker in workers)
        self.watches = (Watch(self._metrics.sampler.fileno(), self._metrics.sampler.woken),)

    def request(self, method: str, host: str, status: int | None, seconds: float | None) -> None:
        """A request to the API server ended, as `HttpClient.told` says it; from any thread."""
        self._metrics.kube_proxy.request(method, host, status, seconds)

    def begin(self) -> None:
        """Answer on the two ports, and tell that we are here. Raises UserError if a port cannot be had and
        `bind_hard_fail` is on."""
        self._server.start()
        for name, bind in (("healthz", self._config.healthz), ("metrics", self._config.metrics)):
            if bind is not None:
                self._ports.want(name, _port(bind), routed(self._pages[name]))
        if self._config.bind_hard_fail:
            for problem in self._ports.wrong():
                raise UserError(f"{problem.subject}: {problem.reason}")
        if self._events is not None and self._notices is not None:
            self._events.start()
            self._notices.starting(__version__, self._choice.dataplane.name, self._choice.passed)

    def problems(self) -> Iterator[Found]:
        """Ports that cannot be had, why the daemon calls itself unhealthy, and what is not remembered."""
        for part, problems in (
            ("http", self._ports.wrong()),
            ("health-check", self._checks.wrong()),
            ("health", self._health.wrong()),
            (NAME, self._keeper.wrong() if self._keeper is not None else ()),
        ):
            yield from (Found(part, *problem) for problem in problems)

    def close(self) -> None:
        """End the threads, save what is to be remembered."""
        self._metrics.sampler.close()
        self._server.stop()
        if self._events is not None:
            self._events.close()
        if self._keeper is not None:
            self._keeper.close()


def families() -> Sequence[Family]:
    """The families that this kernel speaks."""
    return (Family.IPV4, Family.IPV6) if os.path.exists("/proc/net/if_inet6") else (Family.IPV4,)


def _port(bind: Bind) -> Port:
    return Port(bind.address, bind.port)
