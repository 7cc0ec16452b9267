"""What is looked at in the loop for scrapes: the kernel's tables, the sources, what each Service carries."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from ebpflb.errors import ApplyError, UserError
from ebpflb.metrics.traffic import REST, Carried, Port, Traffic
from tests.fakes import both, routes
from tests.scraping import Bench


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


# ---- What is looked at in the loop


def test_the_kernel_is_looked_at_before_the_first_scrape(bench: Bench) -> None:
    bench.look()
    assert bench.metrics.sampler.due() is None
    assert not any(name.startswith("ebpflb_map_entries") for name in bench.scrape())
    bench.attempt(table=routes(*both("10.0.0.1", backends=("10.1.0.1", "10.1.0.2")), *both("10.0.0.2", name="db")))
    bench.look()
    values = bench.scrape()
    assert values['ebpflb_map_entries{map="frontends"}'] == 1
    assert values['ebpflb_map_entries_max{map="frontends"}'] == 10
    assert values['ebpflb_datapath_events_total{event="packet_forwarded"}'] == 5
    assert values['ebpflb_xdp_device_info{device="eth0",mode="native"}'] == 1
    assert values["ebpflb_kernel_read_timestamp_seconds"] == bench.wall()
    amounts = {what: values[f"ebpflb_{what}"] for what in ("services", "frontends", "routes", "backends")}
    assert amounts == {"services": 2, "frontends": 2, "routes": 4, "backends": 3}


def test_a_start_is_not_disturbed() -> None:
    bench = Bench(started=0.0)
    bench.attempt()
    bench.look()
    assert bench.dataplane.asked == []
    due = bench.metrics.sampler.due()
    assert due is not None
    assert 1 <= due - bench.clock.now <= 10
    bench.close()


def test_nobody_scrapes_nobody_looks(bench: Bench) -> None:
    bench.attempt()
    bench.look()
    bench.clock.advance(3600)
    assert bench.metrics.sampler.due() is None
    bench.scrape()
    due = bench.metrics.sampler.due()
    assert due is not None and due <= bench.clock.now


def test_many_scrapes_make_one_look_in_a_while(bench: Bench) -> None:
    bench.attempt()
    bench.look()
    looks = 0
    for _ in range(60):
        bench.clock.advance(1)
        bench.scrape()
        before = bench.value("ebpflb_kernel_read_timestamp_seconds")
        bench.look()
        looks += bench.value("ebpflb_kernel_read_timestamp_seconds") != before
    assert looks == 4


def test_a_look_that_takes_long_is_taken_less_often(bench: Bench) -> None:
    bench.dataplane.seconds = 0.5
    bench.attempt()
    bench.look()
    bench.scrape()
    due = bench.metrics.sampler.due()
    assert due is not None
    assert due - bench.clock.now == pytest.approx(150)


def test_changes_are_let_in_between_the_tables(bench: Bench) -> None:
    bench.attempt()
    bench.metrics.sampler.work()
    assert bench.dataplane.asked == ["counters"]
    assert bench.metrics.sampler.due() == bench.clock.now
    bench.metrics.sampler.work()
    assert bench.dataplane.asked == ["counters", "fill"]


def test_a_scrape_never_asks_the_dataplane_or_a_source(bench: Bench) -> None:
    bench.attempt()
    bench.scrape()
    assert (bench.dataplane.asked, bench.source.asked) == ([], 0)
    bench.look()
    assert (bench.dataplane.asked, bench.source.asked) == (["counters", "fill", "devices", "released"], 1)


def test_an_unchanged_table_is_not_counted_again(bench: Bench) -> None:
    bench.attempt(table=routes(*both("10.0.0.1")))
    bench.look()
    bench.attempt("audit")
    bench.clock.advance(60)
    bench.scrape()
    bench.look()
    assert len(bench.counted) == 1


@pytest.mark.parametrize("odd", ["refused", "strange"])
def test_a_table_that_cannot_be_read_is_counted_and_the_others_are_read(
    bench: Bench, caplog: pytest.LogCaptureFixture, odd: str
) -> None:
    bench.dataplane.rows["counters"] = [{"counter": "packet_forwarded", "value": "many"}]
    if odd == "refused":
        bench.dataplane.fails["counters"] = ApplyError("counters", "", 1, "map counters: Operation not permitted")
    bench.attempt()
    bench.look()
    values = bench.scrape()
    assert values["ebpflb_kernel_read_failures_total"] == 1
    assert values['ebpflb_map_entries{map="frontends"}'] == 1
    assert "metrics: the kernel's tables cannot be read: " in caplog.text


def test_a_dataplane_without_such_tables_is_no_failure(bench: Bench) -> None:
    bench.dataplane.rows.clear()
    with pytest.raises(UserError):
        bench.dataplane.tables("fill")
    bench.attempt()
    bench.look()
    assert bench.value("ebpflb_kernel_read_failures_total") == 0


def test_kernel_counters_never_go_backwards(bench: Bench) -> None:
    def forwarded(*rows: int) -> float:
        bench.dataplane.rows["counters"] = [{"counter": "packet_forwarded", "value": value} for value in rows]
        bench.clock.advance(60)
        bench.scrape()
        bench.look()
        return bench.value('ebpflb_datapath_events_total{event="packet_forwarded"}')

    bench.attempt()
    assert [forwarded(10), forwarded(15), forwarded(4), forwarded(), forwarded(6)] == [10, 15, 19, 19, 25]


def test_a_scrape_wakes_the_loop(bench: Bench) -> None:
    sampler = bench.metrics.sampler
    sampler.fileno()
    bench.scrape()
    bench.scrape()
    sampler.woken()
    with pytest.raises(BlockingIOError):
        sampler.woken()


def test_a_scrape_after_the_end_is_no_error(bench: Bench) -> None:
    bench.metrics.sampler.close()
    assert bench.get().status == 200
    bench.metrics.sampler.woken()
    with pytest.raises(ValueError, match="closed"):
        bench.metrics.sampler.fileno()


# ---- What each Service carries


def row(name: str, connections: int, port: str = "http") -> dict[str, object]:
    return {
        "service": {"namespace": "ns", "name": name, "port": port},
        "connections": connections,
        "packets": 10 * connections,
        "bytes": 1000 * connections,
        "id": 7,
    }


def series(bench: Bench, what: str = "connections") -> dict[str, float]:
    found = {}
    for name, value in bench.scrape().items():
        if name.startswith(f"ebpflb_service_{what}_total"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
            found[labels["service"] + (":" + labels["port"] if labels["port"] else "")] = value
    return found


def carry(bench: Bench, *rows: dict[str, object]) -> dict[str, float]:
    bench.dataplane.rows["traffic"] = list(rows)
    bench.clock.advance(60)
    bench.scrape()
    bench.look()
    return series(bench)


def test_what_a_service_carries_is_not_told_unless_asked_for(bench: Bench) -> None:
    bench.dataplane.rows["traffic"] = [row("web", 5)]
    bench.attempt()
    bench.look()
    assert "ebpflb_service_" not in bench.get().body.decode()


def test_the_busiest_have_series_and_the_rest_is_one(counting: Bench) -> None:
    counting.attempt()
    assert carry(counting, row("web", 50), row("web", 5, "admin"), row("db", 9), row("dns", 30), row("x", 0)) == {
        "web:http": 50,
        "web:admin": 5,
        "dns:http": 30,
        "": 9,
    }
    assert series(counting, "bytes")["dns:http"] == 30_000
    assert series(counting, "packets")[""] == 90


def test_whoever_becomes_busy_gets_the_seat_of_the_least_busy(counting: Bench) -> None:
    counting.attempt()
    carry(counting, row("web", 1000), row("dns", 900), row("db", 9))
    # A little busier than the others is not enough.
    assert carry(counting, row("web", 1100), row("dns", 1000), row("db", 120)).keys() == {"web:http", "dns:http", ""}
    after = carry(counting, row("web", 1100), row("dns", 1100), row("db", 9000))
    assert after == {"dns:http": 1100, "db:http": 8880, "": 120}


def test_series_of_a_service_that_is_gone_keep_their_totals_until_the_seat_is_needed(counting: Bench) -> None:
    counting.attempt()
    carry(counting, row("web", 100), row("dns", 90))
    assert carry(counting, row("web", 100)) == {"web:http": 100, "dns:http": 90, "": 0}
    assert carry(counting, row("web", 100), row("new", 3)) == {"web:http": 100, "new:http": 3, "": 0}


def test_a_number_that_the_kernel_gave_to_another_begins_anew(counting: Bench) -> None:
    counting.attempt()
    carry(counting, row("web", 100), row("dns", 90))
    assert carry(counting, row("web", 4), row("dns", 91)) == {"web:http": 104, "dns:http": 91, "": 0}


def test_no_series_falls_and_nothing_is_lost_or_counted_twice() -> None:
    chance = random.Random(7)
    traffic = Traffic(3)
    kernel = dict.fromkeys((f"web-{number}" for number in range(12)), 0)
    before: dict[Port, Carried] = {}
    shown_more = seats_given = 0
    for _ in range(300):
        for name in kernel:
            kernel[name] += chance.choice((0, 1, 10, 1000))
        shown = dict(traffic.take((("ns", name, "p"), Carried(value)) for name, value in kernel.items()))
        assert len(shown) <= 3 + 1
        for port, carried in shown.items():
            more = carried.connections - before.get(port, Carried()).connections
            assert more >= 0, port
            shown_more += more
        seats_given += len(shown.keys() - before.keys())
        before = shown
    assert seats_given > 20, "nobody ever lost a seat: this test tests nothing"
    assert shown_more == sum(kernel.values())
    assert before[REST].connections > 0
