"""What is measured, as a scrape shows it."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from ebpflb.dataplane import Reconciled, RestoreFailure, TableRules
from ebpflb.httpd import Request, Response
from ebpflb.metrics.page import handlers
from ebpflb.model import EndpointSlice, Family, Protocol, Service, ServiceName, ServiceType
from ebpflb.observer import Trigger
from ebpflb.problems import Found
from ebpflb.routes import Frontend, Kind, Route, RouteTable, Scope, ServicePortName, Verdict
from ebpflb.source import Condition, DropService, DropSlice, PutService, PutSlice, SourceState
from tests.fakes import both, routes
from tests.scraping import Bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def counting() -> Iterator[Bench]:
    """Two Services may have series of their own."""
    made = Bench(each_service=2)
    yield made
    made.close()


def put_slice(name: str = "web-1") -> PutSlice:
    return PutSlice(EndpointSlice(ServiceName("ns", name), ServiceName("ns", "web"), Family.IPV4, (), ()))


def put_service(name: str = "web") -> PutService:
    return PutService(Service(ServiceName("ns", name), ServiceType.CLUSTER_IP, ("10.0.0.1",), ()))


# ---- kube-proxy's names


def test_names_types_labels_and_buckets_are_those_of_kube_proxy(bench: Bench) -> None:
    bench.metrics.kube_proxy.healthz(200)
    bench.metrics.kube_proxy.livez(200)
    bench.metrics.kube_proxy.request("GET", "h:1", 200, 0.1)
    bench.metrics.event(put_slice())
    bench.attempt()
    found = {}
    for family in plain(bench.get().body.decode()):
        if family.name.startswith(("kubeproxy_", "rest_client_")):
            labels = {name for sample in family.samples for name in sample.labels} - {"le"}
            bounds = sorted({float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels})
            found[family.name] = (
                family.type,
                labels,
                (bounds[0], bounds[1], bounds[-2], len(bounds)) if bounds else (),
            )
    family_label = {"ip_family"}
    sync = ("histogram", family_label, (0.001, 0.002, 16.384, 16))
    assert found == {
        "kubeproxy_sync_proxy_rules_duration_seconds": sync,
        "kubeproxy_sync_full_proxy_rules_duration_seconds": sync,
        "kubeproxy_sync_partial_proxy_rules_duration_seconds": sync,
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds": ("gauge", family_label, ()),
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": ("gauge", family_label, ()),
        "kubeproxy_network_programming_duration_seconds": ("histogram", family_label, (0.25, 0.5, 300.0, 81)),
        # The parser drops the `_total` of a counter, and a gauge keeps it.
        "kubeproxy_sync_proxy_rules_endpoint_changes": ("counter", set(), ()),
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending": ("gauge", set(), ()),
        "kubeproxy_sync_proxy_rules_service_changes": ("counter", set(), ()),
        "kubeproxy_sync_proxy_rules_service_changes_pending": ("gauge", set(), ()),
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total": ("gauge", {"ip_family", "traffic_policy"}, ()),
        "kubeproxy_proxy_healthz": ("counter", {"code"}, ()),
        "kubeproxy_proxy_livez": ("counter", {"code"}, ()),
        "rest_client_requests": ("counter", {"code", "method", "host"}, ()),
        "rest_client_request_duration_seconds": ("histogram", {"verb", "host"}, (0.005, 0.025, 60.0, 13)),
    }


SYNC, CONNTRACK = "kubeproxy_sync_proxy_rules_iptables", "kubeproxy_conntrack_reconciler"
OF_MODES: dict[str, set[str]] = {
    "bpf": set(),
    "ipvs": {
        f"{SYNC}_restore_failures_total", f"{CONNTRACK}_sync_duration_seconds", f"{CONNTRACK}_deleted_entries_total"
    },
    "iptables": {
        f"{SYNC}_total", f"{SYNC}_last", f"{SYNC}_restore_failures_total", f"{SYNC}_partial_restore_failures_total",
        f"{CONNTRACK}_sync_duration_seconds", f"{CONNTRACK}_deleted_entries_total",
    },
}  # fmt: skip
REPORT: dict[str, Any] = {
    "rules": (TableRules(Family.IPV4, "nat", 120, 7), TableRules(Family.IPV6, "filter", 12, 0)),
    "restore_failures": (RestoreFailure(Family.IPV4, True), RestoreFailure(Family.IPV4, False)),
    "reconciled": (Reconciled(Family.IPV4, 0.003, 500, 2), Reconciled(Family.IPV6, 0.5, 10, 0)),
}


@pytest.mark.parametrize("dataplane", OF_MODES)
def test_each_dataplane_has_the_metrics_of_kube_proxys_mode(dataplane: str) -> None:
    bench = Bench(dataplane=dataplane)
    bench.attempt(**REPORT)
    names = set(re.findall(r"^# TYPE (\S+)", bench.get().body.decode(), re.MULTILINE))
    assert {name for name in names if name.startswith((f"{SYNC}_", f"{CONNTRACK}_"))} == OF_MODES[dataplane]
    bench.close()


def test_what_a_dataplane_reports_of_rules_and_flows_adds_up() -> None:
    bench = Bench(dataplane="iptables")
    for _ in range(2):
        bench.attempt(**REPORT)
    values = bench.scrape()
    wanted = {
        f'{SYNC}_total{{table="nat",ip_family="IPv4"}}': 120,
        f'{SYNC}_last{{table="nat",ip_family="IPv4"}}': 7,
        f'{SYNC}_total{{table="filter",ip_family="IPv6"}}': 12,
        f'{SYNC}_restore_failures_total{{ip_family="IPv4"}}': 2,
        f'{SYNC}_restore_failures_total{{ip_family="IPv6"}}': 0,
        f'{SYNC}_partial_restore_failures_total{{ip_family="IPv4"}}': 2,
        f'{CONNTRACK}_deleted_entries_total{{ip_family="IPv4"}}': 4,
        f'{CONNTRACK}_deleted_entries_total{{ip_family="IPv6"}}': 0,
        f'{CONNTRACK}_sync_duration_seconds_count{{ip_family="IPv6"}}': 2,
        f'{CONNTRACK}_sync_duration_seconds_bucket{{ip_family="IPv4",le="0.002"}}': 0,
        f'{CONNTRACK}_sync_duration_seconds_bucket{{ip_family="IPv4",le="0.004"}}': 2,
    }
    assert {name: values.get(_in_any_order(name, values)) for name in wanted} == wanted
    bench.close()


def _in_any_order(sample: str, values: dict[str, float]) -> str:
    """How the page writes a sample's labels."""
    name, _, labels = sample.rstrip("}").partition("{")
    wanted = (name, sorted(labels.split(",")))
    return next(
        each
        for each in values
        if (each.partition("{")[0], sorted(each.rstrip("}").partition("{")[2].split(","))) == wanted
    )


def test_the_dataplanes_that_cannot_be_had_are_named() -> None:
    bench = Bench(dataplane="iptables", passed=("bpf", "ipvs"))
    assert bench.value('ebpflb_dataplane_info{dataplane="iptables",passed="bpf,ipvs"}') == 1
    bench.close()


def test_bounds_are_written_as_kube_proxy_writes_them(bench: Bench) -> None:
    found = re.findall(
        r'kubeproxy_network_programming_duration_seconds_bucket\{ip_family="IPv4",le="([^"]+)"\}',
        bench.get().body.decode(),
    )
    assert found[:4] == ["0.25", "0.5", "1", "2"]
    assert found[-9:] == ["115", "120", "150", "180", "210", "240", "270", "300", "+Inf"]


def test_a_first_sync_and_audits_are_full_and_changes_partial(bench: Bench) -> None:
    def counts() -> tuple[float, ...]:
        values = bench.scrape()
        return tuple(
            values[f'kubeproxy_sync_{kind}proxy_rules_duration_seconds_count{{ip_family="IPv6"}}']
            for kind in ("", "full_", "partial_")
        )

    bench.attempt(failed=1)
    assert counts() == (1, 1, 0)
    bench.attempt()
    assert counts() == (2, 2, 0)
    bench.attempt(took=0.25)
    assert counts() == (3, 2, 1)
    bench.attempt("audit")
    assert counts() == (4, 3, 1)
    assert bench.value('kubeproxy_sync_partial_proxy_rules_duration_seconds_sum{ip_family="IPv4"}') == 0.25
    assert bench.value('kubeproxy_sync_partial_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="0.128"}') == 0
    assert bench.value('kubeproxy_sync_partial_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="0.256"}') == 1


def test_a_sync_that_hangs_shows_as_queued_later_than_done(bench: Bench) -> None:
    queued = 'kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"}'
    done = 'kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}'
    assert not {queued, done} & bench.scrape().keys()
    bench.metrics.queued(bench.clock.now)
    bench.metrics.event(put_slice())
    began = bench.wall()
    bench.clock.advance(1)
    bench.attempt()
    assert (bench.value(queued), bench.value(done)) == (began, began + 1)
    bench.clock.advance(100)
    bench.metrics.event(put_slice())
    bench.attempt(failed=1)
    assert (bench.value(queued), bench.value(done)) == (began + 101, began + 1)


def test_programming_latency_is_from_the_change_of_the_pod_to_the_kernel(bench: Bench) -> None:
    name = "kubeproxy_network_programming_duration_seconds"
    bench.attempt(triggers=[Trigger(Family.IPV4, bench.wall() - 1.5), Trigger(Family.IPV4, bench.wall() - 0.1)])
    values = bench.scrape()
    assert values[f'{name}_bucket{{ip_family="IPv4",le="0.25"}}'] == 1
    assert values[f'{name}_bucket{{ip_family="IPv4",le="2"}}'] == 2
    assert values[f'{name}_sum{{ip_family="IPv4"}}'] == pytest.approx(1.6)
    assert values[f'{name}_count{{ip_family="IPv6"}}'] == 0


def test_a_control_plane_whose_clock_is_ahead_makes_no_sum_go_backwards(bench: Bench) -> None:
    bench.attempt(triggers=[Trigger(Family.IPV6, bench.wall() + 30)])
    assert bench.value('kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv6"}') == 0
    assert bench.value('kubeproxy_network_programming_duration_seconds_count{ip_family="IPv6"}') == 1


def test_changes_are_pending_until_a_sync_takes_them_in(bench: Bench) -> None:
    def changes() -> tuple[float, ...]:
        values = bench.scrape()
        return tuple(
            values[f"kubeproxy_sync_proxy_rules_{what}_changes_{how}"]
            for what in ("endpoint", "service")
            for how in ("pending", "total")
        )

    assert changes() == (0, 0, 0, 0)
    for event in (put_slice(), put_slice(), DropSlice(ServiceName("ns", "web-1")), put_service()):
        bench.metrics.event(event)
    bench.metrics.event(DropService(ServiceName("ns", "web")))
    assert changes() == (3, 3, 2, 2)
    bench.attempt("audit")
    assert changes() == (3, 3, 2, 2)
    bench.attempt()
    assert changes() == (0, 3, 0, 2)


def dropped(address: str, kind: Kind, scope: Scope, name: str = "web", port: str = "p") -> RouteTable:
    """One frontend that drops what comes from `scope`."""
    frontend = Frontend(address, 80, Protocol.TCP)
    service = ServicePortName("ns", name, port)
    verdict = {each: Verdict.DROP if each is scope else Verdict.REJECT for each in Scope}
    return RouteTable({(frontend, each): Route(service, kind, verdict[each]) for each in Scope})


def no_local(bench: Bench) -> dict[str, float]:
    found = {}
    for name, value in bench.scrape().items():
        if name.startswith("kubeproxy_sync_proxy_rules_no_local_endpoints_total") and value:
            found["/".join(re.findall(r'"(\w+)"', name))] = value
    return found


def test_ports_without_a_local_endpoint_are_counted_by_policy_and_family(bench: Bench) -> None:
    bench.attempt(table=RouteTable({
        **dropped("10.0.0.1", Kind.CLUSTER_IP, Scope.INTERNAL),
        **dropped("fd00::1", Kind.CLUSTER_IP, Scope.INTERNAL),
        **dropped("192.0.2.1", Kind.NODE_PORT, Scope.EXTERNAL),
        **dropped("192.0.2.2", Kind.LOAD_BALANCER, Scope.EXTERNAL),
        **dropped("192.0.2.3", Kind.LOAD_BALANCER, Scope.EXTERNAL, port="other"),
    }))  # fmt: skip
    assert no_local(bench) == {"IPv4/internal": 1, "IPv6/internal": 1, "IPv4/external": 2}


def test_the_count_without_local_endpoints_follows_changes(bench: Bench) -> None:
    local = dict(dropped("10.0.0.1", Kind.CLUSTER_IP, Scope.INTERNAL))
    web = routes(*both("10.0.0.2"))
    bench.attempt(table=web)
    assert no_local(bench) == {}
    bench.attempt(table=bench.table.evolve(local))
    assert no_local(bench) == {"IPv4/internal": 1}
    nodeport = dropped("192.0.2.1", Kind.NODE_PORT, Scope.EXTERNAL)
    bench.attempt(table=bench.table.evolve({**nodeport, **dropped("192.0.2.2", Kind.NODE_PORT, Scope.EXTERNAL)}))
    assert no_local(bench) == {"IPv4/internal": 1, "IPv4/external": 1}
    bench.attempt(table=bench.table.evolve({}, nodeport.keys()))
    assert no_local(bench) == {"IPv4/internal": 1, "IPv4/external": 1}
    bench.attempt(table=bench.table.evolve(dict(both("10.0.0.1"))))
    assert no_local(bench) == {"IPv4/external": 1}
    bench.attempt(table=RouteTable())
    assert no_local(bench) == {}


def test_a_service_without_any_endpoint_is_not_one_without_local_ones(bench: Bench) -> None:
    bench.attempt(table=routes(*both("10.0.0.1", backends=())))
    assert no_local(bench) == {}


def test_probes_are_counted_by_their_answer(bench: Bench) -> None:
    for code in (200, 200, 503):
        bench.metrics.kube_proxy.healthz(code)
    bench.metrics.kube_proxy.livez(200)
    values = bench.scrape()
    assert values['kubeproxy_proxy_healthz_total{code="200"}'] == 2
    assert values['kubeproxy_proxy_healthz_total{code="503"}'] == 1
    assert values['kubeproxy_proxy_livez_total{code="200"}'] == 1


def test_requests_to_the_api_server_are_counted_by_outcome(bench: Bench) -> None:
    request = bench.metrics.kube_proxy.request
    request("GET", "10.0.0.1:6443", 200, 0.02)
    request("GET", "10.0.0.1:6443", 200, None)
    request("POST", "10.0.0.1:6443", 403, 1.0)
    request("GET", "10.0.0.2:6443", None, 5.0)
    values = bench.scrape()
    assert values['rest_client_requests_total{code="200",host="10.0.0.1:6443",method="GET"}'] == 2
    assert values['rest_client_requests_total{code="<error>",host="10.0.0.2:6443",method="GET"}'] == 1
    latency = "rest_client_request_duration_seconds"
    assert values[f'{latency}_count{{host="10.0.0.1:6443",verb="GET"}}'] == 1
    assert values[f'{latency}_bucket{{host="10.0.0.1:6443",le="1",verb="POST"}}'] == 1


# ---- Ours


def test_rows_are_counted_and_repairs_apart(bench: Bench) -> None:
    bench.attempt(written=5, removed=2, failed=1)
    bench.attempt("audit", written=3, removed=1)
    values = bench.scrape()
    assert [values[f"ebpflb_rows_{what}_total"] for what in ("written", "removed", "refused", "repaired")] == [
        8,
        3,
        1,
        4,
    ]


def test_attempts_failures_and_retries(bench: Bench) -> None:
    def now() -> tuple[float, ...]:
        values = bench.scrape()
        return (
            values["ebpflb_synced"],
            values["ebpflb_consecutive_failures"],
            values["ebpflb_retries_total"],
            values['ebpflb_syncs_total{kind="sync",result="refused"}'],
        )

    assert now() == (0, 0, 0, 0)
    bench.attempt(queued=bench.clock.now)
    assert now() == (1, 0, 0, 0)
    bench.attempt(queued=bench.clock.now, failed=2)
    assert now() == (0, 1, 0, 1)
    bench.attempt(failed=2)
    assert now() == (0, 2, 1, 2)
    bench.attempt("audit")  # it has compared everything
    assert now() == (1, 0, 1, 2)
    assert bench.value('ebpflb_syncs_total{kind="audit",result="complete"}') == 1


def test_lag_is_from_the_arrival_of_a_change_to_the_kernel(bench: Bench) -> None:
    bench.metrics.queued(bench.clock.now)
    bench.clock.advance(0.02)
    bench.attempt(queued=bench.clock.now - 0.02)
    values = bench.scrape()
    assert values["ebpflb_event_lag_seconds_count"] == 1
    assert values["ebpflb_event_lag_seconds_sum"] == pytest.approx(0.02)


@pytest.mark.parametrize("what", ["sync", "audit"])
def test_a_change_that_was_refused_lags_until_it_is_in(bench: Bench, what: str) -> None:
    came = bench.clock.now
    bench.metrics.queued(came)
    bench.attempt(queued=came, failed=1)
    bench.metrics.queued(came)  # the reconciler says that it goes on waiting
    assert bench.value("ebpflb_event_lag_seconds_count") == 0
    bench.clock.advance(7)
    bench.attempt(what)
    assert bench.value("ebpflb_event_lag_seconds_sum") == pytest.approx(7)
    bench.attempt("sync")
    bench.attempt("audit")
    assert bench.value("ebpflb_event_lag_seconds_count") == 1


def test_an_audit_is_no_end_of_waiting_for_a_change_that_came_meanwhile(bench: Bench) -> None:
    bench.metrics.queued(bench.clock.now)
    bench.attempt("audit")
    assert bench.value("ebpflb_event_lag_seconds_count") == 0
    bench.attempt("sync", queued=bench.clock.now)
    assert bench.value("ebpflb_event_lag_seconds_count") == 1


def test_problems_are_counted_by_the_part_that_found_them(bench: Bench) -> None:
    one, other = Found("policy", "ns/web", "odd"), Found("policy", "ns/db", "odd")
    bench.metrics.problems((one, other, Found("node", "n", "x")), ())
    assert bench.value('ebpflb_problems{part="policy"}') == 2
    bench.metrics.problems((), (one,))
    values = bench.scrape()
    assert values['ebpflb_problems{part="policy"}'] == 1
    assert values['ebpflb_problems{part="node"}'] == 1
    assert values['ebpflb_problems{part="manifests"}'] == 0


def test_a_source_that_is_out_of_reach_is_stale_for_longer_and_longer(bench: Bench) -> None:
    bench.look()
    assert bench.value('ebpflb_source_state{source="manifests",state="live"}') == 1
    assert bench.value('ebpflb_source_stale_seconds{source="manifests"}') == 0
    bench.source.state = Condition(SourceState.STALE, since=bench.wall(), failures=3)
    bench.clock.advance(2)
    bench.look()
    bench.clock.advance(40)
    values = bench.scrape()
    assert values['ebpflb_source_state{source="manifests",state="live"}'] == 0
    assert values['ebpflb_source_state{source="manifests",state="stale"}'] == 1
    assert values['ebpflb_source_stale_seconds{source="manifests"}'] == 42
    assert values['ebpflb_source_failures{source="manifests"}'] == 3


def test_who_runs_is_said(bench: Bench) -> None:
    values = bench.scrape()
    assert values['ebpflb_dataplane_info{dataplane="bpf",passed=""}'] == 1
    assert [name for name in values if name.startswith("ebpflb_build_info{")] != []
    assert values["process_resident_memory_bytes"] > 1e6


# ---- How it is served


def test_text_is_what_an_old_prometheus_gets(bench: Bench) -> None:
    answer = bench.get()
    assert answer.status == 200
    assert dict(answer.headers)["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert len(list(plain(answer.body.decode()))) > 30


def test_openmetrics_is_for_whoever_accepts_it(bench: Bench) -> None:
    bench.metrics.event(put_slice())
    bench.attempt(triggers=[Trigger(Family.IPV4, bench.wall())])
    bench.look()
    answer = bench.get(accept="application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5")
    assert dict(answer.headers)["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    text = answer.body.decode()
    assert text.endswith("# EOF\n")
    read = openmetrics(text)  # type: ignore[no-untyped-call]
    families = {family.name: family.type for family in read}
    assert families["kubeproxy_sync_proxy_rules_no_local_endpoints_total"] == "gauge"
    assert families["kubeproxy_sync_proxy_rules_endpoint_changes"] == "counter"
    assert 'le="1.0"' in text


@pytest.mark.parametrize("asked", ["gzip", "deflate, GZIP;q=0.5", "*"])
def test_a_page_is_compressed_if_asked_for(bench: Bench, asked: str) -> None:
    answer = bench.get(accept_encoding=asked)
    assert dict(answer.headers)["Content-Encoding"] == "gzip"
    assert b"# TYPE ebpflb_synced gauge" in gzip.decompress(answer.body)


@pytest.mark.parametrize("asked", ["", "identity", "gzip;q=0", "gzip; q=0.0", "br"])
def test_a_page_is_not_compressed_for_whoever_cannot_read_that(bench: Bench, asked: str) -> None:
    answer = bench.get(accept_encoding=asked)
    assert "Content-Encoding" not in dict(answer.headers)
    assert answer.body.startswith(b"# HELP")


def test_no_metric_is_there_twice(counting: Bench) -> None:
    names = re.findall(r"^# TYPE (\S+)", counting.get().body.decode(), re.MULTILINE)
    assert len(names) == len(set(names))


def test_scrapes_while_everything_changes(counting: Bench) -> None:
    """Of two threads one writes and one reads; every page is whole, and no counter falls."""
    pages: list[dict[str, float]] = []
    failures: list[BaseException] = []

    def read() -> None:
        try:
            pages.extend(counting.scrape() for _ in range(12))
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    number = 0
    while reader.is_alive():
        number += 1
        counting.metrics.kube_proxy.request("GET", f"host-{number % 50}:1", 200 + number % 7, 0.1)
        counting.metrics.kube_proxy.healthz(200 + number % 3)
        counting.metrics.problems((Found(f"part-{number % 9}", "s", str(number)),), ())
        counting.attempt(written=1)
    reader.join()
    assert failures == []
    written = [page["ebpflb_rows_written_total"] for page in pages]
    assert written == sorted(written)


def _ok(request: Request) -> Response:
    return Response(200, b"ok")


def test_the_metrics_port_answers_as_that_of_kube_proxy(bench: Bench) -> None:
    document = {"kind": "KubeProxyConfiguration", "mode": "", "clusterCIDR": "10.0.0.0/8"}
    table = handlers(bench.metrics.page, mode="bpf", document=document, healthz=_ok)
    assert sorted(table) == ["/configz", "/healthz", "/metrics", "/proxyMode"]

    def get(path: str) -> Response:
        return table[path](Request("GET", path, "", {}))

    assert get("/proxyMode").body == b"bpf"
    assert dict(get("/proxyMode").headers) == {
        "Content-Type": "text/plain; charset=utf-8",
        "X-Content-Type-Options": "nosniff",
    }
    assert json.loads(get("/configz").body) == {"kubeproxy.config.k8s.io": document}
    assert dict(get("/configz").headers)["Content-Type"] == "application/json"
    assert get("/healthz").body == b"ok"
    assert get("/metrics").status == 200


# ---- What is documented

DOCUMENT = ROOT / "docs/metrics.md"


def exposed(bench: Bench) -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels of every metric."""
    service = {"namespace": "ns", "name": "web", "port": "http"}
    bench.dataplane.rows["traffic"] = [{"service": service, "connections": 1, "packets": 2, "bytes": 3, "id": 1}]
    bench.metrics.kube_proxy.healthz(200)
    bench.metrics.kube_proxy.livez(200)
    bench.metrics.kube_proxy.request("GET", "h:1", 200, 0.1)
    bench.metrics.event(put_slice())
    bench.attempt()
    bench.look()
    text = bench.get().body.decode()
    found = {}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        labels = re.findall(rf"^{name}(?:_bucket|_sum|_count)?\{{([^}}]*)\}}", text, re.MULTILINE)
        names = {label for each in labels for label in re.findall(r'(\w+)="', each)} - {"le"}
        found[name] = (kind, frozenset(names))
    return found


def test_every_metric_is_documented_and_every_documented_metric_is_there(counting: Bench) -> None:
    iptables = Bench(dataplane="iptables")
    iptables.attempt(**REPORT)
    there = {**exposed(iptables), **exposed(counting)}
    iptables.close()
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \|([^|]*)\|", DOCUMENT.read_text(), re.MULTILINE)
    documented = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(documented) == len(rows)
    assert documented == there


def test_every_event_of_the_kernels_programs_is_documented() -> None:
    header = (ROOT / "bpf/maps.h").read_text()
    body = re.search(r"enum counter \{(.*?)\};", header, re.DOTALL)
    assert body
    names = re.findall(r"^\s*([A-Z_]+),", body[1], re.MULTILINE)
    assert len(names) > 10
    documented = re.findall(r"^\| `([a-z_]+)` \| [^|]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert [name.lower() for name in names] == documented


def test_what_kube_proxy_has_and_we_have_not_is_named() -> None:
    text = DOCUMENT.read_text()
    absent = text[text.index("## What is not there") :]
    for name in (
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
        "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
        "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
        "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
    ):
        assert f"`{name}`" in absent, name
