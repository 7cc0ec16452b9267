"""What becomes an Event, and in which words."""

from __future__ import annotations

from ebpflb.model import ServiceName
from ebpflb.notices import Notice, Notices, NoticeType
from ebpflb.problems import Found

WEB = ServiceName("default", "web")


def told(*come: Found) -> list[Notice]:
    posted: list[Notice] = []
    Notices(posted.append, "n1").problems(come, ())
    return posted


def test_an_unknown_annotation_value_is_told_of_the_service() -> None:
    reason = "annotation ebpflb/algorithm: 'best' is unknown"
    assert told(Found("policy", "default/web", reason, "UnknownAnnotationValue")) == [
        Notice(WEB, NoticeType.WARNING, "UnknownAnnotationValue", "Route", reason, everywhere=True)
    ]


def test_a_frontend_that_belongs_to_another_service_is_told_of_the_loser() -> None:
    (notice,) = told(Found("policy", "default/web", "belongs to default/older", "FrontendTaken"))
    assert (notice.about, notice.reason) == (WEB, "FrontendTaken")


def test_a_service_that_cannot_be_programmed_is_told_once_though_sync_and_audit_say_it() -> None:
    reason = "frontends is full (65536)"
    assert told(Found("sync", "default/web", reason), Found("audit", "default/web:http", reason)) == [
        Notice(WEB, NoticeType.WARNING, "FailedToProgram", "Program", reason)
    ]


def test_what_concerns_no_service_is_told_of_the_node() -> None:
    assert told(Found("sync", "node", "the settings: no memory")) == [
        Notice(None, NoticeType.WARNING, "FailedToProgram", "Program", "node: the settings: no memory")
    ]
    (notice,) = told(Found("devices", "device eth0", "not attached: busy"))
    assert (notice.about, notice.note) == (None, "device eth0: not attached: busy")


def test_what_kube_proxy_left_behind_is_told_of_the_node() -> None:
    reason = "left behind: ipsets KUBE-*; `ebpflb cleanup --kube-proxy` removes it"
    assert told(Found("hand-over", "kube-proxy", reason, "LeftBehind")) == [
        Notice(None, NoticeType.WARNING, "LeftBehind", "HandOver", f"kube-proxy: {reason}")
    ]


def test_a_service_that_cannot_be_read_is_told_of_it() -> None:
    (notice,) = told(Found("api", "Service default/web", "cannot be read: port 0", "Unreadable"))
    assert (notice.about, notice.reason, notice.note) == (WEB, "Unreadable", "cannot be read: port 0")


def test_a_server_that_is_not_there_makes_no_event() -> None:
    assert told(
        Found("api", "API server", "the API server cannot be reached", "Unreachable"),
        Found("api", "EndpointSlice default/web-1", "cannot be read", "Unreadable"),
        Found("manifests", "web.yaml", "is not YAML"),
        Found("manifests", "/etc/web.yaml document 2", "is not YAML"),
    ) == []  # fmt: skip


def test_a_problem_that_is_over_makes_no_event() -> None:
    posted: list[Notice] = []
    Notices(posted.append, "n1").problems((), (Found("sync", "default/web", "full"),))
    assert posted == []


def test_the_start_names_the_dataplane_and_why_not_a_better_one() -> None:
    posted: list[Notice] = []
    Notices(posted.append, "n1").starting("1.2", "ipvs", (("bpf", "no cgroup2"),))
    assert posted == [
        Notice(None, NoticeType.NORMAL, "Starting", "Start", "ebpflb 1.2 carries Services with ipvs"),
        Notice(
            None,
            NoticeType.WARNING,
            "DataplaneUnavailable",
            "Start",
            "dataplane bpf cannot carry Services here, ipvs does instead: no cgroup2",
        ),
    ]


def test_ports_that_are_taken_have_kube_proxys_words() -> None:
    taken = "healthCheckNodePort 30123 cannot be answered on all addresses of IPv4: Address already in use"
    posted = told(
        Found("health-check", "default/web", taken, "FailedToStartServiceHealthcheck"),
        Found("http", "healthz", "cannot listen on 0.0.0.0:10256: Address already in use", "FailedToListen"),
        Found("http", "metrics", "cannot listen on 127.0.0.1:10249: Address already in use", "FailedToListen"),
    )
    assert [(each.about, each.reason, each.action) for each in posted] == [
        (WEB, "FailedToStartServiceHealthcheck", "Listen"),
        (None, "FailedToStartProxierHealthcheck", "Listen"),
        (None, "FailedToStartMetricServer", "Listen"),
    ]
    assert posted[0].note == f"node n1: {taken}"
