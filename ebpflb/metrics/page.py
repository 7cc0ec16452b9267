"""What the metrics port answers: /metrics, /proxyMode, /configz, /healthz.

Rules of this file: it runs in the server's thread, reads cells and constants only, and never raises for what was asked.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping

import msgspec
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ebpflb.httpd import Handler, Request, Response
from ebpflb.metrics.cells import Cell

_NO_SNIFFING = ("X-Content-Type-Options", "nosniff")
_CONFIG_GROUP = "kubeproxy.config.k8s.io"


class _Cells(Collector):
    """Our cells in the shape of the client library."""

    def __init__(self, cells: Callable[[], Iterable[Cell]], *, canonical: bool) -> None:
        self._cells = cells
        self._canonical = canonical

    def collect(self) -> Iterable[Metric]:
        return (cell.family(canonical=self._canonical) for cell in self._cells())


class Page:
    """/metrics: the text format that Prometheus has always read, or OpenMetrics for whoever accepts it; compressed for
    whoever accepts that. `scraped` is told of each."""

    def __init__(self, cells: Callable[[], Iterable[Cell]], scraped: Callable[[], None]) -> None:
        self._scraped = scraped
        self._registries = {canonical: self._registry(cells, canonical) for canonical in (False, True)}

    @staticmethod
    def _registry(cells: Callable[[], Iterable[Cell]], canonical: bool) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(_Cells(cells, canonical=canonical))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        return registry

    def __call__(self, request: Request) -> Response:
        self._scraped()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body = encode(self._registries[content_type.startswith("application/openmetrics-text")])
        headers = (("Content-Type", content_type), ("Vary", "Accept, Accept-Encoding"))
        if not _accepts_gzip(request.headers.get("accept-encoding", "")):
            return Response(200, body, headers)
        # The fastest level takes a tenth of the size already.
        return Response(200, gzip.compress(body, 1), (*headers, ("Content-Encoding", "gzip")))


def handlers(page: Handler, *, mode: str, document: Mapping[str, object], healthz: Handler) -> dict[str, Handler]:
    """What the metrics port answers, by path. `mode` is the dataplane's name; `document` the configuration in effect,
    without secrets."""
    proxy_mode = Response(200, mode.encode(), (("Content-Type", "text/plain; charset=utf-8"), _NO_SNIFFING))
    configuration = msgspec.json.encode({_CONFIG_GROUP: document})
    configz = Response(200, configuration, (("Content-Type", "application/json"), _NO_SNIFFING))
    return {
        "/metrics": page,
        "/proxyMode": lambda request: proxy_mode,
        "/configz": lambda request: configz,
        "/healthz": healthz,
    }


def _accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding allows gzip; a weight of 0 forbids."""
    for entry in header.lower().split(","):
        coding, *parameters = (part.strip().replace(" ", "") for part in entry.split(";"))
        if coding in ("gzip", "*"):
            return not any(parameter in ("q=0", "q=0.0", "q=0.00", "q=0.000") for parameter in parameters)
    return False
