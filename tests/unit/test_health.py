"""/healthz and /livez: what is healthy, and the words for it.

The bodies are those that kube-proxy 1.36.3's health server gave in the same situations, with times of our own in them.
"""

from __future__ import annotations

import pytest

from ebpflb.dataplane import Report
from ebpflb.errors import ApplyError
from ebpflb.health import Health, ping
from ebpflb.httpd import Request
from ebpflb.model import Family, Node
from ebpflb.observer import Attempt
from ebpflb.reconcile import Reconciler, Timing
from ebpflb.routes import RouteTable
from ebpflb.source import Condition, DropNode, PutNode, Remembered, SourceState, Synced
from tests.fakes import FakeClock, FakeDataplane, FakeDesired, FakeSource, both, routes

ASKED = Request("GET", "/healthz", "", {})
START = 1_795_265_100_938_429_616  # 2026-11-21T12:45:00.938429616Z
HEADERS = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))

GOOD = (
    b'{"lastUpdated":"NOW","currentTime":"NOW","nodeEligible":true,"healthy":true,"status":'
    b'{"IPv4":{"lastUpdated":"THEN","healthy":true},"IPv6":{"lastUpdated":"THEN","healthy":true}}}'
)
LIVE = (
    b'{"lastUpdated":"NOW","currentTime":"NOW","healthy":true,"status":'
    b'{"IPv4":{"lastUpdated":"THEN","healthy":true},"IPv6":{"lastUpdated":"THEN","healthy":true}}}'
)
LEAVING = (
    b'{"lastUpdated":"THEN","currentTime":"NOW","nodeEligible":false,"healthy":true,"status":'
    b'{"IPv4":{"lastUpdated":"THEN","healthy":true},"IPv6":{"lastUpdated":"THEN","healthy":true}}}'
)
LATE = (
    b'{"lastUpdated":"THEN","currentTime":"NOW","nodeEligible":true,"healthy":false,"status":'
    b'{"IPv4":{"lastUpdated":"THEN","healthy":false},"IPv6":{"lastUpdated":"THEN","healthy":false}}}'
)
DEAD = (
    b'{"lastUpdated":"THEN","currentTime":"NOW","healthy":false,"status":'
    b'{"IPv4":{"lastUpdated":"THEN","healthy":false},"IPv6":{"lastUpdated":"THEN","healthy":false}}}'
)
ONE_FAMILY = (
    b'{"lastUpdated":"NOW","currentTime":"NOW","nodeEligible":true,"healthy":true,"status":'
    b'{"IPv6":{"lastUpdated":"THEN","healthy":true}}}'
)
NO_FAMILY = b'{"lastUpdated":"NOW","currentTime":"NOW","nodeEligible":true,"healthy":true}'


class Place:
    """A Health that stands alone: what happens is told by the test."""

    def __init__(self, *families: Family, node_needed: bool = False) -> None:
        self.clock = FakeClock()
        self.wall = START
        self.source = FakeSource("kubernetes")
        self.counted: list[tuple[str, int]] = []
        self.health = Health(
            [self.source],
            families=families or tuple(Family),
            node_needed=node_needed,
            clock=self.clock,
            wall=lambda: self.wall,
            on_healthz=lambda code: self.counted.append(("healthz", code)),
            on_livez=lambda code: self.counted.append(("livez", code)),
        )

    def synced(self) -> None:
        self.health.event(Synced("kubernetes"))

    def node(self, *, deleting: bool = False) -> None:
        self.health.event(PutNode(Node("node1", known=True, deleting=deleting)))

    def attempt(self, what: str = "sync", *, queued: float | None = None, failed: int = 0) -> None:
        now = self.clock()
        self.health.attempted(Attempt(what, now, now, queued, RouteTable(), 0, Report(failed=failed)))
        if failed and queued is not None:
            self.health.queued(queued)

    def advance(self, seconds: float) -> None:
        """Time passes; the loop comes round every ten seconds of it."""
        while seconds > 0:
            step = min(seconds, 10.0)
            self.clock.advance(step)
            self.health.work()
            seconds -= step

    @property
    def codes(self) -> tuple[int, int]:
        return self.health.healthz(ASKED).status, self.health.livez(ASKED).status


def at(body: bytes, then: str, now: str) -> bytes:
    return body.replace(b"THEN", then.encode()).replace(b"NOW", now.encode())


THEN, NOW = "2026-11-21T12:45:00.938429616Z", "2026-11-21T12:45:30.93866Z"


@pytest.fixture
def place() -> Place:
    made = Place()
    made.synced()
    return made


# ---- The words ----


def test_bodies_and_headers_are_kube_proxys(place: Place) -> None:
    place.node()
    place.wall = START + 30_000_230_384
    for response, body in ((place.health.healthz(ASKED), GOOD), (place.health.livez(ASKED), LIVE)):
        assert response == (200, at(body, THEN, NOW), HEADERS)
    place.node(deleting=True)
    assert place.health.healthz(ASKED) == (503, at(LEAVING, THEN, NOW), HEADERS)
    assert place.health.livez(ASKED) == (200, at(LIVE, THEN, NOW), HEADERS)
    place.node()
    place.health.queued(place.clock())
    place.advance(60)
    for response, body in ((place.health.healthz(ASKED), LATE), (place.health.livez(ASKED), DEAD)):
        assert response == (503, at(body, THEN, NOW), HEADERS)
    assert place.counted == [
        ("healthz", 200), ("livez", 200), ("healthz", 503), ("livez", 200), ("healthz", 503), ("livez", 503),
    ]  # fmt: skip


@pytest.mark.parametrize(("families", "body"), [((Family.IPV6,), ONE_FAMILY), ((), NO_FAMILY)], ids=["ipv6", "none"])
def test_only_the_families_that_are_served(families: tuple[Family, ...], body: bytes) -> None:
    health = Health([], families=families, node_needed=False, clock=FakeClock(), wall=lambda: START)
    assert health.healthz(ASKED).body == at(body, THEN, THEN)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_500_000_000, "1970-01-01T00:00:01.5Z"),
        (1_000_001_000, "1970-01-01T00:00:01.000001Z"),
        (1_123_456_789, "1970-01-01T00:00:01.123456789Z"),
        (1_000_000_120, "1970-01-01T00:00:01.00000012Z"),
        (1_700_000_000_000_000_000, "2023-11-14T22:13:20Z"),
    ],
)
def test_times_as_go_writes_them(nanoseconds: int, text: str) -> None:
    health = Health([], node_needed=False, clock=FakeClock(), wall=lambda: nanoseconds)
    assert f'"currentTime":"{text}"'.encode() in health.livez(ASKED).body


def test_the_metrics_port_says_ok() -> None:
    assert ping(ASKED)[:2] == (200, b"ok")


def test_what_is_answered_by_path(place: Place) -> None:
    assert {path: handler(ASKED).status for path, handler in place.health.handlers().items()} == {
        "/healthz": 200,
        "/livez": 200,
    }


# ---- Changes that come into the kernel, or do not ----


def test_healthy_with_nothing_to_do(place: Place) -> None:
    place.advance(7200)
    assert place.codes == (200, 200)


def test_healthy_while_starting_however_long_that_takes() -> None:
    """The first list of a large cluster, or an API server that answers half of it: kube-proxy waits too."""
    place = Place()
    place.health.queued(place.clock())
    place.advance(3600)
    assert place.codes == (200, 200)
    place.synced()
    place.advance(59)
    assert place.codes == (200, 200)
    place.advance(1)
    assert place.codes == (503, 503), "now there is enough to sync with, and no sync"


def test_what_is_remembered_is_enough_to_count_from() -> None:
    place = Place()
    place.health.queued(place.clock())
    place.health.event(Remembered("kubernetes", 0.0))
    place.advance(60)
    assert place.codes == (503, 503)


def test_a_change_that_is_not_applied_in_time(place: Place) -> None:
    place.health.queued(place.clock())
    place.advance(59.9)
    assert place.codes == (200, 200)
    place.advance(0.1)
    assert place.codes == (503, 503)
    place.attempt(queued=place.clock() - 60)
    assert place.codes == (200, 200)


def test_the_oldest_change_counts(place: Place) -> None:
    for _ in range(6):
        place.health.queued(place.clock())
        place.advance(10)
    assert place.codes == (503, 503)


def test_each_sync_takes_in_all_that_came_before_it(place: Place) -> None:
    for _ in range(100):
        place.health.queued(place.clock())
        place.advance(10)
        place.attempt(queued=place.clock() - 10)
    assert place.codes == (200, 200)


def test_a_sync_that_goes_on_failing(place: Place) -> None:
    began = place.clock()
    place.health.queued(began)
    place.attempt(queued=began, failed=1)
    for _ in range(5):
        place.advance(10)
        place.attempt(failed=1)  # a retry: nothing new
        assert place.codes == (200, 200)
    place.advance(10)
    assert place.codes == (503, 503)
    place.attempt()
    assert place.codes == (200, 200)


def test_new_changes_do_not_make_old_failures_younger(place: Place) -> None:
    for _ in range(6):
        place.health.queued(place.clock())
        place.attempt(queued=place.clock(), failed=1)
        place.advance(10)
    assert place.codes == (503, 503)


def test_an_audit_repairs_what_a_sync_failed_with(place: Place) -> None:
    """No sync follows then: nothing may go on waiting for one."""
    began = place.clock()
    place.health.queued(began)
    place.attempt(queued=began, failed=1)
    place.advance(30)
    place.attempt("audit")
    place.advance(3600)
    assert place.codes == (200, 200)


def test_an_audit_takes_in_no_changes(place: Place) -> None:
    place.health.queued(place.clock())
    place.advance(30)
    place.attempt("audit")
    place.advance(30)
    assert place.codes == (503, 503)


def test_an_audit_that_fails_delays_no_change(place: Place) -> None:
    place.attempt("audit", failed=1)
    place.advance(3600)
    assert place.codes == (200, 200)


def test_a_complete_sync_is_the_last_update(place: Place) -> None:
    place.node()
    place.wall += 10_000_000_000
    place.attempt()
    place.node(deleting=True)
    place.wall += 10_000_000_000
    then, now = "2026-11-21T12:45:10.938429616Z", "2026-11-21T12:45:20.938429616Z"
    assert place.health.healthz(ASKED).body == at(LEAVING, then, now)
    place.attempt(failed=1)
    assert place.health.healthz(ASKED).body == at(LEAVING, then, now)


def test_the_time_of_day_is_set_back_and_forth(place: Place) -> None:
    place.health.queued(place.clock())
    place.wall += 3600 * 1_000_000_000
    place.advance(59)
    assert place.codes == (200, 200)
    place.wall = 0
    place.advance(1)
    assert place.codes == (503, 503)


# ---- The node ----


def test_no_node_yet() -> None:
    """As kube-proxy: a node that nobody knows gets no traffic from load balancers."""
    place = Place(node_needed=True)
    place.synced()
    assert place.codes == (503, 200)
    assert place.health.healthy
    place.node()
    assert place.codes == (200, 200)


def test_manifests_need_no_node(place: Place) -> None:
    assert place.codes == (200, 200)


def test_a_node_that_is_being_deleted_and_one_that_stays_after_all(place: Place) -> None:
    place.node(deleting=True)
    assert place.codes == (503, 200)
    assert place.health.healthy, "health checks of Services do not ask for the node"
    place.node()
    assert place.codes == (200, 200)


def test_a_node_object_that_is_gone_was_what_it_was(place: Place) -> None:
    """As kube-proxy: `kubectl delete node` by mistake takes nothing off the load balancers."""
    place.node()
    place.health.event(DropNode())
    assert place.codes == (200, 200)
    place.node(deleting=True)
    place.health.event(DropNode())
    assert place.codes == (503, 200)


# ---- What hangs ----


def test_a_source_that_hangs(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ebpflb.health")
    place.source.state = Condition(SourceState.LIVE, idle=295.0)
    place.advance(10)
    assert place.codes == (200, 200)
    assert place.health.wrong() == ()
    place.source.state = Condition(SourceState.LIVE, idle=305.0)
    place.advance(10)
    assert place.codes == (503, 503)
    assert [problem.reason for problem in place.health.wrong()] == ["the source kubernetes has shown no life for 300 s"]
    place.advance(100)
    place.source.state = Condition(SourceState.LIVE)
    place.advance(10)
    assert place.codes == (200, 200)
    assert place.health.wrong() == ()
    assert [record.getMessage() for record in caplog.records] == [
        "unhealthy: the source kubernetes has shown no life for 300 s; /healthz and /livez answer 503",
        "healthy again",
    ]


def test_a_server_that_is_out_of_reach_is_no_fault_of_ours(place: Place) -> None:
    place.source.state = Condition(
        SourceState.STALE, detail="no server answers", failures=100, retry_in=30.0, idle=20.0
    )
    place.advance(3600)
    assert place.codes == (200, 200)


def test_a_loop_that_hangs(place: Place) -> None:
    place.health.work()
    place.clock.advance(300)
    assert place.codes == (200, 200)
    place.clock.advance(1)
    assert place.codes == (503, 503)
    place.health.work()
    assert place.codes == (200, 200)


def test_the_loop_need_not_come_round_more_often_than_every_ten_seconds(place: Place) -> None:
    now = place.clock()
    assert place.health.due() == now
    place.health.work()
    assert place.health.due() == now + 10


# ---- With the real reconciler ----


def test_as_the_reconciler_tells_it() -> None:
    clock, dataplane, source = FakeClock(), FakeDataplane(), FakeSource()
    health = Health([source], node_needed=False, clock=clock, wall=lambda: START)
    desired = FakeDesired(routes(*both("172.30.0.41")))
    reconciler = Reconciler(
        desired=desired, sources=[source], dataplane=dataplane, clock=clock, random=lambda: 0.0,
        timing=Timing(), observer=health,
    )  # fmt: skip

    def go(seconds: float) -> None:
        until = clock() + seconds
        while clock() < until:
            reconciler.read(source)
            reconciler.work()
            health.work()
            due = [at for at in (reconciler.due(), health.due()) if at is not None]
            clock.now = max(clock.now, min([*due, until]))

    source.change()
    go(100)
    assert health.healthy, "the first list is not complete"
    dataplane.raises["start"] = ApplyError("frontends", "", 12, "no memory")
    source.synced()
    go(1)
    assert dataplane.calls.count("start") == 2 and health.healthy
    dataplane.fail_next = 1000
    source.change()
    go(59)
    assert health.healthy
    go(2)
    assert not health.healthy
    dataplane.fail_next = 0
    go(31)
    assert health.healthy
    dataplane.fail_next = 1
    source.change()
    go(3600)
    assert health.healthy, "one failure, and audits ever since"
