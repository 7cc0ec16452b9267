"""Metrics of a real dataplane: what its tables say is what a scrape shows."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from ebpflb.dataplane.bpf.artifact import load_artifact
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.dataplane.bpf.facts import has_set_retval
from ebpflb.httpd import Request
from ebpflb.metrics import Metrics
from ebpflb.observer import Attempt
from ebpflb.overview import counting
from ebpflb.routes import RouteTable
from tests.bpf.dataplanes import SIZES, Node, carried, own_namespace, own_node, table
from tests.fakes import FakeClock

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]


@pytest.fixture
def node() -> Iterator[Node]:
    with own_namespace(), own_node() as made:
        yield made


class Shown:
    """What scrapes of a dataplane show."""

    def __init__(self, dataplane: BpfDataplane, each_service: int = 0) -> None:
        self._clock = FakeClock()
        self._dataplane = dataplane
        self.metrics = Metrics(dataplane, (), counting, clock=self._clock, each_service=each_service)

    def after(self, routes: RouteTable) -> dict[str, float]:
        """By sample, when `routes` have been synced and all was looked at."""
        report = self._dataplane.sync(routes)
        assert report.complete
        self.metrics.attempted(Attempt("sync", 0.0, 0.0, 0.0, routes, len(routes), report))
        self._clock.advance(60)
        self.metrics.sampler.scraped()
        while self.metrics.sampler.due() is not None:
            self.metrics.sampler.work()
        page = self.metrics.page(Request("GET", "/metrics", "", {})).body.decode()
        return {name: float(value) for name, value in re.findall(r"^([a-z].*) (\S+)$", page, re.MULTILINE)}


def test_tables_and_counters_are_those_of_the_kernel(node: Node) -> None:
    shown = Shown(node.started())
    values = shown.after(table(6))
    shown.metrics.sampler.close()
    assert values["ebpflb_kernel_read_failures_total"] == 0
    entries = {map: values[f'ebpflb_map_entries{{map="{map}"}}'] for map in ("frontends", "names", "backends", "slots")}
    assert entries == {"frontends": 6, "names": 6, "backends": 12, "slots": 12}
    assert values['ebpflb_map_entries_max{map="frontends"}'] == SIZES.frontends
    amounts = {what: values[f"ebpflb_{what}"] for what in ("services", "frontends", "routes", "backends")}
    assert amounts == {"services": 6, "frontends": 6, "routes": 12, "backends": 12}
    events = {name for name in values if name.startswith("ebpflb_datapath_events_total")}
    known = load_artifact(SIZES, set_retval=has_set_retval()).counters
    assert events == {f'ebpflb_datapath_events_total{{event="{name.lower()}"}}' for name in known}


def test_what_a_service_carries_is_shown_under_its_name(node: Node) -> None:
    dataplane = BpfDataplane(node.bpffs, node.cgroup, sizes=SIZES, count_traffic=True)
    node.made.append(dataplane)
    dataplane.start()
    shown = Shown(dataplane, each_service=1)
    shown.after(table(2))
    ids = {row["service"]["name"]: row["id"] for row in dataplane.tables("services")}  # type: ignore[index]
    carried(node, int(ids["s0"]), 3, 30, 3000)  # type: ignore[call-overload]
    carried(node, int(ids["s1"]), 1, 10, 1000)  # type: ignore[call-overload]
    values = shown.after(table(2))
    shown.metrics.sampler.close()
    assert {name: value for name, value in values.items() if name.startswith("ebpflb_service_connections")} == {
        'ebpflb_service_connections_total{namespace="default",port="http",service="s0"}': 3,
        'ebpflb_service_connections_total{namespace="",port="",service=""}': 1,
    }
