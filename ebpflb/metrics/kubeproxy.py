"""What kube-proxy measures, under its names: what dashboards and alerts select on.

Rules of this file: names, types, labels and buckets are those of kube-proxy 1.36 (pkg/proxy/metrics/metrics.go), and of
the client library of Kubernetes for `rest_client_…`; help texts are ours. Where one sync serves both families, both
labels tell of the same sync. A metric of kube-proxy that says nothing here is not there: docs/metrics.md names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ebpflb.metrics.cells import Cell, Counter, Gauge, Histogram, doubling
from ebpflb.model import Family, Protocol
from ebpflb.observer import Attempt
from ebpflb.problems import Found
from ebpflb.routes import Key, Kind, Route, RouteTable, Scope, ServicePortName, Verdict
from ebpflb.source import DropService, DropSlice, Event, PutService, PutSlice

FAMILIES = {Family.IPV4: "IPv4", Family.IPV6: "IPv6"}
"""The values of the label `ip_family`."""

_EACH_FAMILY = tuple((family,) for family in FAMILIES.values())
_SYNC_BOUNDS = doubling(0.001, 15)
_PROGRAMMING_BOUNDS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
_REQUEST_BOUNDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_NO_ANSWER = "<error>"


class KubeProxyMetrics:
    """An Observer. `wall`: the time of day, in seconds since the epoch."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._no_local = NoLocalEndpoints()
        self._whole = False  # a complete attempt has been
        # Plain numbers: a first list is tens of thousands of events.
        self._slices = self._slices_waiting = self._services = self._services_waiting = 0
        self._queued_at: float | None = None

        def durations(name: str, meaning: str) -> Histogram:
            return Histogram(f"kubeproxy_{name}", meaning, _SYNC_BOUNDS, ("ip_family",), _EACH_FAMILY)

        self._all = durations("sync_proxy_rules_duration_seconds", "How long syncs took, whole and partial ones")
        self._full = durations(
            "sync_full_proxy_rules_duration_seconds", "How long syncs took that looked at every row: the first, audits"
        )
        self._partial = durations(
            "sync_partial_proxy_rules_duration_seconds", "How long syncs took that looked at what changed"
        )
        self._last = Gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When the kernel last held everything, since the epoch",
            ("ip_family",),
        )
        self._queued = Gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "When a sync was last asked for, since the epoch",
            ("ip_family",),
        )
        self._programming = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of a pod, as its EndpointSlice dates it, to the kernel",
            _PROGRAMMING_BOUNDS,
            ("ip_family",),
            _EACH_FAMILY,
        )
        self._without_local = Gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Service ports that have endpoints, but none that their traffic policy Local allows on this node",
            ("traffic_policy", "ip_family"),
            tuple((policy, family) for policy in ("internal", "external") for family in FAMILIES.values()),
        )
        self._healthz = Counter("kubeproxy_proxy_healthz_total", "Answers of /healthz by status", ("code",))
        self._livez = Counter("kubeproxy_proxy_livez_total", "Answers of /livez by status", ("code",))
        self._requests = Counter(
            "rest_client_requests_total", "Requests to the API server by outcome", ("code", "method", "host")
        )
        self._latency = Histogram(
            "rest_client_request_duration_seconds",
            "How long requests to the API server took, watches not counted",
            _REQUEST_BOUNDS,
            ("verb", "host"),
        )

    # ---- What others tell ----

    def healthz(self, code: int) -> None:
        """/healthz was answered."""
        self._healthz.add(1, str(code))

    def livez(self, code: int) -> None:
        """/livez was answered."""
        self._livez.add(1, str(code))

    def request(self, method: str, host: str, code: int | None, seconds: float | None) -> None:
        """A request to the API server ended; from any thread. `host` is host:port, `code` None if nobody answered,
        `seconds` None for a watch, whose length says nothing."""
        self._requests.add(1, _NO_ANSWER if code is None else str(code), method, host)
        if seconds is not None:
            self._latency.observe(seconds, method, host)

    # ---- As an observer ----

    def event(self, event: Event) -> None:
        kind = type(event)
        if kind is PutSlice or kind is DropSlice:
            self._slices += 1
            self._slices_waiting += 1
        elif kind is PutService or kind is DropService:
            self._services += 1
            self._services_waiting += 1
        self._queued_at = self._wall()

    def queued(self, at: float) -> None:
        if self._queued_at is None:
            self._queued_at = self._wall()

    def attempted(self, attempt: Attempt) -> None:
        wall = self._wall()
        full = attempt.what == "audit" or not self._whole
        for label in FAMILIES.values():
            self._all.observe(attempt.seconds, label)
            (self._full if full else self._partial).observe(attempt.seconds, label)
        if attempt.what != "audit":
            self._slices_waiting = self._services_waiting = 0
        if not attempt.report.complete:
            return
        self._whole = True
        for label in FAMILIES.values():
            self._last.set(wall, label)
        for trigger in attempt.triggers:
            # The clock of whoever wrote the annotation may be ahead of ours.
            self._programming.observe(max(0.0, wall - trigger.at), FAMILIES[trigger.family])
        self._no_local.update(attempt.routes)
        for (policy, family), number in self._no_local.ports.items():
            self._without_local.set(number, policy, FAMILIES[family])

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        """Not of kube-proxy's concern."""

    # ---- For a scrape ----

    def cells(self) -> Iterator[Cell]:
        """All of them."""
        if self._queued_at is not None:
            for label in FAMILIES.values():
                self._queued.set(self._queued_at, label)
        yield from (self._all, self._full, self._partial, self._last, self._queued, self._programming)
        for what, total, waiting in (
            ("endpoint", self._slices, self._slices_waiting),
            ("service", self._services, self._services_waiting),
        ):
            subject = "EndpointSlices" if what == "endpoint" else "Services"
            counter = Counter(f"kubeproxy_sync_proxy_rules_{what}_changes_total", f"Changes of {subject} so far")
            gauge = Gauge(f"kubeproxy_sync_proxy_rules_{what}_changes_pending", f"Changes of {subject} not yet synced")
            counter.add(total)
            gauge.set(waiting)
            yield from (counter, gauge)
        yield from (self._without_local, self._healthz, self._livez, self._requests, self._latency)


class NoLocalEndpoints:
    """Service ports that a traffic policy Local leaves without an endpoint here: their verdict is DROP. Kept up to date
    at the cost of what changed."""

    def __init__(self) -> None:
        self.ports = {(policy, family): 0 for policy in ("internal", "external") for family in Family}
        self._frontends: dict[tuple[str, Family, ServicePortName, Protocol], int] = {}
        self._routes = RouteTable()

    def update(self, routes: RouteTable) -> None:
        """`routes` is what the kernel holds now."""
        older, self._routes = self._routes, routes
        if not older:  # no need for a set of all keys
            for key, route in routes.items():
                self._count(key, route, 1)
            return
        for key in routes.changed_from(older):
            self._count(key, older.get(key), -1)
            self._count(key, routes.get(key), 1)

    def _count(self, key: Key, route: Route | None, step: int) -> None:
        if route is None or route.verdict is not Verdict.DROP:
            return
        frontend, scope = key
        # A cluster IP has one policy in both scopes; the others obey theirs where clients are external.
        policy, counted = (
            ("internal", Scope.INTERNAL) if route.kind is Kind.CLUSTER_IP else ("external", Scope.EXTERNAL)
        )
        if scope is not counted:
            return
        family = Family.IPV6 if ":" in frontend.address else Family.IPV4
        port = (policy, family, route.service, frontend.protocol)
        before = self._frontends.pop(port, 0)
        if before + step:
            self._frontends[port] = before + step
        self.ports[policy, family] += bool(before + step) - bool(before)
