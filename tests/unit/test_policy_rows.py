"""What stands in a route besides who gets a packet: canonical masquerade, affinity, ranges, draining, annotations."""

from __future__ import annotations

import pytest

from ebpflb.model import Family, Service
from ebpflb.policy import routes
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Forwarding,
    Frontend,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
)
from tests.world import (
    LOCAL,
    TCP,
    UDP,
    dying,
    endpoint_slice,
    in_family,
    leaving,
    name_of,
    node,
    options,
    port,
    ready,
    service,
    slice_port,
    snapshot,
    unready,
)

INTERNAL, EXTERNAL = Scope
NEVER, NOT_POD, ALWAYS = Masquerade
DRAINING = BackendState.DRAINING
NO_DETECTOR = options(cluster_cidrs=())
TWO = endpoint_slice("10.0.1.1", "10.0.2.1")


def everything(**more: object) -> Service:
    ports = port(80, node_port=30080)
    return service("ns1/svc1", "172.30.0.41", ports, external=["192.168.99.1"], lb=["1.2.3.4"], **more)  # type: ignore[arg-type]


def both(table: RouteTable, address: str, number: int = 80) -> tuple[Route, Route]:
    frontend = Frontend(address, number, TCP)
    return table[frontend, INTERNAL], table[frontend, EXTERNAL]


def test_the_example_of_interface_md() -> None:
    dns = service("kube-system/kube-dns", "10.96.0.10", port(53, "dns", UDP))
    backends = endpoint_slice(ready("10.244.1.7"), of="kube-system/kube-dns", ports=[slice_port(53, "dns", UDP)])
    table = routes(snapshot(dns, backends), options(cluster_cidrs=["10.244.0.0/16"]))
    assert table[Frontend("10.96.0.10", 53, UDP), INTERNAL] == Route(
        service=ServicePortName("kube-system", "kube-dns", "dns"),
        kind=Kind.CLUSTER_IP,
        verdict=Verdict.FORWARD,
        backends=(Backend("10.244.1.7", 53, 1, BackendState.ACTIVE),),
        masquerade=NOT_POD,
        affinity_seconds=0,
        source_ranges=(),
        algorithm=Algorithm.RANDOM,
        forwarding=Forwarding.SNAT,
    )


@pytest.mark.parametrize("family", Family, ids=["ipv4", "ipv6"])
def test_a_frontend_of_each_kind_in_both_scopes(family: Family) -> None:
    table = routes(in_family(snapshot(everything(), TWO), family), in_family(options(), family))
    wanted = {
        (in_family("172.30.0.41", family), 80): Kind.CLUSTER_IP,
        (in_family("192.168.99.1", family), 80): Kind.EXTERNAL_IP,
        (in_family("1.2.3.4", family), 80): Kind.LOAD_BALANCER,
        (in_family("192.168.0.2", family), 30080): Kind.NODE_PORT,
    }
    if family is Family.IPV4:
        wanted["127.0.0.1", 30080] = Kind.NODE_PORT
    assert {((frontend.address, frontend.port), scope): route.kind for (frontend, scope), route in table.items()} == {
        (where, scope): kind for where, kind in wanted.items() for scope in Scope
    }


MASQUERADE = {
    "cluster-ip": (everything(), options(), "172.30.0.41", (NOT_POD, ALWAYS)),
    "cluster-ip-no-detector": (everything(), NO_DETECTOR, "172.30.0.41", (NEVER, NEVER)),
    "cluster-ip-all": (everything(), options(masquerade_all=True), "172.30.0.41", (ALWAYS, ALWAYS)),
    "cluster-ip-local": (everything(internal_policy=LOCAL), options(), "172.30.0.41", (NOT_POD, ALWAYS)),
    "external-cluster": (everything(), options(), "192.168.99.1", (ALWAYS, ALWAYS)),
    "external-cluster-no-detector": (everything(), NO_DETECTOR, "1.2.3.4", (ALWAYS, ALWAYS)),
    "external-local": (everything(external_policy=LOCAL), options(), "1.2.3.4", (NOT_POD, NEVER)),
    "external-local-no-detector": (everything(external_policy=LOCAL), NO_DETECTOR, "1.2.3.4", (ALWAYS, NEVER)),
    "external-local-all": (
        everything(external_policy=LOCAL),
        options(masquerade_all=True),
        "1.2.3.4",
        (NOT_POD, NEVER),
    ),
}


@pytest.mark.parametrize(("what", "chosen", "address", "wanted"), MASQUERADE.values(), ids=MASQUERADE)
def test_masquerade_is_canonical(
    what: Service, chosen: object, address: str, wanted: tuple[Masquerade, Masquerade]
) -> None:
    table = routes(snapshot(what, TWO), chosen)  # type: ignore[arg-type]
    assert tuple(route.masquerade for route in both(table, address)) == wanted


def test_masquerade_is_never_without_forward() -> None:
    table = routes(snapshot(everything(external_policy=LOCAL), endpoint_slice("10.0.2.1")), options())
    assert both(table, "1.2.3.4")[EXTERNAL].verdict is Verdict.DROP
    for route in (*table.values(), *routes(snapshot(everything()), options(masquerade_all=True)).values()):
        assert route.verdict is Verdict.FORWARD or (route.masquerade, route.backends) == (NEVER, ())


@pytest.mark.parametrize("address", ["172.30.0.41", "192.168.99.1", "1.2.3.4"])
def test_session_affinity_stands_in_every_frontend(address: str) -> None:
    table = routes(snapshot(everything(affinity=10800, external_policy=LOCAL), TWO), options())
    assert [route.affinity_seconds for route in both(table, address)] == [10800, 10800]
    assert [route.affinity_seconds for route in both(table, "192.168.0.2", 30080)] == [10800, 10800]


def test_no_affinity_is_zero() -> None:
    assert {route.affinity_seconds for route in routes(snapshot(everything(), TWO), options()).values()} == {0}


RANGES = {
    "none": ((), ()),
    "sorted-by-value": (("9.0.0.0/8", "10.0.0.0/8"), ("9.0.0.0/8", "10.0.0.0/8")),
    "shorter-first": (("10.0.0.0/16", "10.0.0.0/8"), ("10.0.0.0/8", "10.0.0.0/16")),
    "twice": (("10.0.0.0/8", "10.0.0.0/8"), ("10.0.0.0/8",)),
    "any-zero": (("10.0.0.0/8", "0.0.0.0/0"), ()),
    "other-family-only": (("2001:db8::/32",), ()),
    "other-familys-zero": (("10.0.0.0/8", "::/0"), ("10.0.0.0/8",)),
    "with-the-node": (("192.168.0.0/24",), ("1.2.3.4/32", "192.168.0.0/24")),
    "with-another-node-only": (("192.168.0.3/32",), ("192.168.0.3/32",)),
}


@pytest.mark.parametrize(("given", "wanted"), RANGES.values(), ids=RANGES)
def test_source_ranges(given: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    table = routes(snapshot(everything(ranges=given), TWO), options())
    assert [route.source_ranges for route in both(table, "1.2.3.4")] == [wanted, wanted]
    elsewhere = {route.source_ranges for (frontend, _), route in table.items() if frontend.address != "1.2.3.4"}
    assert elsewhere == {()}


def test_source_ranges_in_ipv6_with_the_node() -> None:
    six = in_family(snapshot(everything(ranges=["192.168.0.0/24"]), TWO), Family.IPV6)
    table = routes(six, in_family(options(), Family.IPV6))
    assert both(table, "fd00:1:2:3::4")[EXTERNAL].source_ranges == ("fd00:1:2:3::4/128", "fd00:192:168::/64")


DRAIN = {
    "beside-ready-ones": (["10.0.1.1", leaving("10.0.2.1")], {"10.0.1.1": 0, "10.0.2.1": 1}, {"10.0.1.1": 0}),
    "here-too": (
        ["10.0.1.1", leaving("10.0.1.2")],
        {"10.0.1.1": 0, "10.0.1.2": 1},
        {"10.0.1.1": 0, "10.0.1.2": 1},
    ),
    "nobody-ready": (
        [leaving("10.0.1.1"), leaving("10.0.2.1")],
        {"10.0.1.1": 0, "10.0.2.1": 0},
        {"10.0.1.1": 0},
    ),
    "nobody-ready-here": ([leaving("10.0.1.1"), "10.0.2.1"], {"10.0.1.1": 1, "10.0.2.1": 0}, {"10.0.1.1": 0}),
    "not-serving": (["10.0.1.1", dying("10.0.1.2"), unready("10.0.1.3")], {"10.0.1.1": 0}, {"10.0.1.1": 0}),
    "out-of-reach-by-hints": (
        [ready("10.0.1.1", zones=["zone-a"]), ready("10.0.2.1", zones=["zone-b"]), leaving("10.0.3.1")],
        {"10.0.1.1": 0, "10.0.3.1": 1},
        {"10.0.1.1": 0},
    ),
}


@pytest.mark.parametrize(("endpoints", "cluster", "local"), DRAIN.values(), ids=DRAIN)
def test_draining(endpoints: list[object], cluster: dict[str, int], local: dict[str, int]) -> None:
    items = endpoint_slice(*endpoints)  # type: ignore[arg-type]
    internal, external = both(routes(snapshot(everything(external_policy=LOCAL), items), options()), "1.2.3.4")
    assert {each.address: int(each.state) for each in internal.backends} == cluster
    assert {each.address: int(each.state) for each in external.backends} == local


def test_backends_are_sorted_by_value_and_port() -> None:
    table = routes(
        snapshot(
            service(),
            endpoint_slice("10.0.10.1", "10.0.9.1", ports=[slice_port(90)]),
            endpoint_slice("10.0.10.1", leaving("10.0.1.200"), ports=[slice_port(80)]),
        ),
        options(),
    )
    assert both(table, "172.30.0.41")[INTERNAL].backends == (
        Backend("10.0.1.200", 80, 1, DRAINING),
        Backend("10.0.9.1", 90),
        Backend("10.0.10.1", 80),
        Backend("10.0.10.1", 90),
    )


@pytest.mark.parametrize("family", Family, ids=["ipv4", "ipv6"])
def test_backends_are_sorted_when_all_are_ready(family: Family) -> None:
    items = endpoint_slice("10.0.10.1", "10.0.9.1", "10.0.2.3")
    table = routes(in_family(snapshot(service(), items), family), in_family(options(), family))
    backends = both(table, in_family("172.30.0.41", family))[INTERNAL].backends
    assert [each.address for each in backends] == [
        in_family(each, family) for each in ("10.0.2.3", "10.0.9.1", "10.0.10.1")
    ]


def test_frontends_of_a_service_port_share_their_backends() -> None:
    """One tuple of backends for all frontends of a port, so that a dataplane can share one range of slots."""
    table = routes(snapshot(everything(), TWO), options())
    assert len({id(route.backends) for route in table.values()}) == 1


def test_default_algorithm() -> None:
    table = routes(snapshot(service(), TWO), options(default_algorithm="maglev"))
    assert {route.algorithm for route in table.values()} == {Algorithm.MAGLEV}


ANNOTATIONS = {
    "none": ((), Algorithm.RANDOM, Forwarding.SNAT),
    "round-robin": ((("algorithm", "round-robin"),), Algorithm.ROUND_ROBIN, Forwarding.SNAT),
    "maglev-dsr": ((("algorithm", "maglev"), ("forwarding", "dsr")), Algorithm.MAGLEV, Forwarding.DSR),
    "least-connections": ((("algorithm", "least-connections"),), Algorithm.LEAST_CONNECTIONS, Forwarding.SNAT),
    "said-outright": ((("algorithm", "random"), ("forwarding", "snat")), Algorithm.RANDOM, Forwarding.SNAT),
}


@pytest.mark.parametrize(("notes", "algorithm", "forwarding"), ANNOTATIONS.values(), ids=ANNOTATIONS)
def test_annotations(notes: tuple[tuple[str, str], ...], algorithm: Algorithm, forwarding: Forwarding) -> None:
    table = routes(snapshot(service(annotations=notes), TWO), options())
    assert {(route.algorithm, route.forwarding) for route in table.values()} == {(algorithm, forwarding)}
    assert not table.problems


@pytest.mark.parametrize(
    ("key", "known"), [("algorithm", "round-robin"), ("forwarding", "dsr"), ("drain", "keep, reset")]
)
def test_an_unknown_annotation_value_is_a_problem_and_the_default_holds(key: str, known: str) -> None:
    table = routes(snapshot(service(annotations=[(key, "Magic")]), TWO), options(default_algorithm="maglev"))
    assert {(route.algorithm, route.forwarding) for route in table.values()} == {(Algorithm.MAGLEV, Forwarding.SNAT)}
    (problem,) = table.problems[name_of("ns1/svc1")]
    assert problem.subject == "ns1/svc1"
    assert f"ebpflb/{key}" in problem.reason and "Magic" in problem.reason and known in problem.reason


HAD = {
    "what the dataplane has": ("maglev", ("random", "maglev"), ""),
    "what every dataplane has": ("random", ("random",), ""),
    "what it does not have": (
        "round-robin",
        ("random", "maglev"),
        "round-robin is none that this node's dataplane has",
    ),
    "nothing": ("", ("random",), ""),
    "anything, where all is had": ("least-connections", (), ""),
}


@pytest.mark.parametrize(("asked", "had", "remark"), HAD.values(), ids=HAD)
def test_a_service_that_asks_for_another_algorithm_than_there_is_hears_of_it(
    asked: str, had: tuple[str, ...], remark: str
) -> None:
    annotations = [("algorithm", asked)] if asked else []
    table = routes(snapshot(service(annotations=annotations), TWO), options(algorithms=had))
    assert {route.algorithm.label for route in table.values()} == {asked or "random"}
    problems = table.problems.get(name_of("ns1/svc1"), ())
    assert [problem.code for problem in problems] == (["AlgorithmNotSupported"] if remark else [])
    assert all(remark in problem.reason and "random, maglev" in problem.reason for problem in problems)


@pytest.mark.parametrize(
    ("asked", "had", "remark"),
    [("dsr", False, True), ("dsr", True, False), ("snat", False, False), ("", False, False)],
)
def test_a_service_that_asks_for_direct_return_where_there_is_none_hears_of_it(
    asked: str, had: bool, remark: bool
) -> None:
    annotations = [("forwarding", asked)] if asked else []
    table = routes(snapshot(service(annotations=annotations), TWO), options(direct_return=had))
    assert {route.forwarding for route in table.values()} == {Forwarding.DSR if asked == "dsr" else Forwarding.SNAT}
    problems = table.problems.get(name_of("ns1/svc1"), ())
    assert [problem.code for problem in problems] == (["ForwardingNotSupported"] if remark else [])
    assert all("ebpflb/forwarding: dsr" in problem.reason and "by NAT" in problem.reason for problem in problems)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("keep", ""),
        ("reset", "DrainNotSupported"),
        ("30", "DrainNotSupported"),
        ("", "UnknownAnnotationValue"),
        ("-1", "UnknownAnnotationValue"),
        ("٣", "UnknownAnnotationValue"),
    ],
)
def test_a_service_that_asks_for_an_end_of_its_connections_hears_that_they_are_kept(asked: str, code: str) -> None:
    table = routes(snapshot(service(annotations=[("drain", asked)]), TWO), options())
    assert table == routes(snapshot(service(), TWO), options())
    problems = table.problems.get(name_of("ns1/svc1"), ())
    assert [problem.code for problem in problems] == ([code] if code else [])
    assert all(f"ebpflb/drain: {asked}" in problem.reason for problem in problems if code == "DrainNotSupported")


def test_locality() -> None:
    this = node(addresses=["fd00::2", "192.168.0.2", "127.0.0.1", "::1"])
    table = routes(snapshot(node=this), options(cluster_cidrs=["fd00:10::/32", "10.0.0.0/8"]))
    assert table.locality == Locality(
        ("127.0.0.1", "192.168.0.2", "::1", "fd00::2"), ("10.0.0.0/8", "fd00:10::/32"), ""
    )
