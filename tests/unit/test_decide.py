"""`decide` on tables written by hand: every step of reading a row, without the policy."""

from __future__ import annotations

import pytest

from ebpflb.decide import Candidate, Client, Decision, Outcome, Packet, client_of, decide
from ebpflb.model import Protocol
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
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

TCP, UDP = Protocol.TCP, Protocol.UDP
NAME = ServicePortName("default", "web", "http")
VIP = Frontend("10.96.0.1", 80, TCP)
ONE, TWO, GOING = (
    Backend("10.0.1.1", 8080),
    Backend("10.0.2.1", 8080),
    Backend("10.0.3.1", 8080, 1, BackendState.DRAINING),
)
LOCALITY = Locality(("127.0.0.1", "192.168.0.2", "fd00::2"), ("10.0.1.0/24", "fd00:10::/64"), "cali*")


def forward(**more: object) -> Route:
    return Route(NAME, Kind.CLUSTER_IP, Verdict.FORWARD, (ONE, TWO, GOING), **more)  # type: ignore[arg-type]


def ask(route: Route, source: str = "10.0.1.9", interface: str = "", scope: Scope | None = None) -> Decision:
    """What happens to a packet from `source` where both scopes (or only one) have `route`."""
    rows = {(VIP, each): route for each in Scope if scope in (None, each)}
    return decide(RouteTable(rows, LOCALITY), Packet(source, VIP.address, VIP.port, VIP.protocol, interface))


CLIENTS = {
    "pod": ("10.0.1.9", "", Client(False, True)),
    "pod-by-interface": ("203.0.113.5", "cali12", Client(False, True)),
    "interface-named-as-the-prefix": ("203.0.113.5", "cali", Client(False, True)),
    "other-interface": ("203.0.113.5", "eth0", Client(False, False)),
    "node": ("192.168.0.2", "", Client(True, False)),
    "loopback": ("127.0.0.1", "", Client(True, False)),
    "outside": ("203.0.113.5", "", Client(False, False)),
    "just-outside-the-cidr": ("10.0.2.0", "", Client(False, False)),
    "last-of-the-cidr": ("10.0.1.255", "", Client(False, True)),
    "node-v6": ("fd00::2", "", Client(True, False)),
    "pod-v6": ("fd00:10::9", "", Client(False, True)),
    "outside-v6": ("fd00:10:0:1::9", "", Client(False, False)),
}


@pytest.mark.parametrize(("source", "interface", "wanted"), CLIENTS.values(), ids=CLIENTS)
def test_client(source: str, interface: str, wanted: Client) -> None:
    assert client_of(LOCALITY, Packet(source, "10.96.0.1", 80, TCP, interface)) == wanted


def test_exact_interface_name_is_no_prefix() -> None:
    bridge = Locality((), (), "cni0")
    assert client_of(bridge, Packet("10.0.1.9", "10.96.0.1", 80, TCP, "cni0")).is_pod
    assert not client_of(bridge, Packet("10.0.1.9", "10.96.0.1", 80, TCP, "cni01")).is_pod


def test_no_pod_interface_matches_no_interface() -> None:
    assert not client_of(Locality(), Packet("10.0.1.9", "10.96.0.1", 80, TCP, "")).is_pod


def test_a_cidr_never_holds_the_other_family() -> None:
    everybody = Locality((), ("::/0",), "")
    assert not client_of(everybody, Packet("10.0.1.9", "10.96.0.1", 80)).is_pod
    assert client_of(everybody, Packet("2001:db8::1", "fd00::1", 80)).is_pod


@pytest.mark.parametrize(
    ("source", "scope"),
    [("10.0.1.9", Scope.INTERNAL), ("192.168.0.2", Scope.INTERNAL), ("203.0.113.5", Scope.EXTERNAL)],
)
def test_scope_picks_the_row(source: str, scope: Scope) -> None:
    assert ask(forward(), source, scope=scope).verdict is Outcome.FORWARD
    other = Scope.EXTERNAL if scope is Scope.INTERNAL else Scope.INTERNAL
    assert ask(forward(), source, scope=other).verdict is Outcome.NOT_SERVICE


@pytest.mark.parametrize(
    "where",
    [("10.96.0.2", 80, TCP), ("10.96.0.1", 81, TCP), ("10.96.0.1", 80, UDP)],
    ids=["address", "port", "protocol"],
)
def test_not_a_service(where: tuple[str, int, Protocol]) -> None:
    table = RouteTable({(VIP, scope): forward() for scope in Scope}, LOCALITY)
    decision = decide(table, Packet("10.0.1.9", *where))
    assert (decision.verdict, decision.route, decision.candidates) == (Outcome.NOT_SERVICE, None, ())
    assert "left alone" in decision.reasons[-1]


def test_only_active_backends_are_candidates() -> None:
    assert [candidate.backend for candidate in ask(forward()).candidates] == [ONE, TWO]


@pytest.mark.parametrize(
    ("masquerade", "pod", "node", "outside"),
    [
        (Masquerade.NEVER, False, False, False),
        (Masquerade.NOT_POD, False, True, True),
        (Masquerade.ALWAYS, True, True, True),
    ],
)
def test_masquerade(masquerade: Masquerade, pod: bool, node: bool, outside: bool) -> None:
    route = forward(masquerade=masquerade)
    for source, wanted in (("10.0.1.9", pod), ("192.168.0.2", node), ("203.0.113.5", outside)):
        assert ask(route, source).candidates == (Candidate(ONE, wanted), Candidate(TWO, wanted)), source


def test_a_client_sent_to_itself_is_masqueraded_there_alone() -> None:
    assert ask(forward(), "10.0.1.1").candidates == (Candidate(ONE, True), Candidate(TWO, False))
    assert any("itself" in reason for reason in ask(forward(), "10.0.1.1").reasons)
    assert not any("itself" in reason for reason in ask(forward(), "10.0.1.9").reasons)


RANGES = {
    "inside": ("203.0.113.5", Outcome.FORWARD),
    "outside": ("198.51.100.9", Outcome.DROP),
    "last-inside": ("203.0.113.255", Outcome.FORWARD),
    "first-behind": ("203.0.114.0", Outcome.DROP),
    "second-range": ("10.0.1.9", Outcome.FORWARD),
    "node": ("192.168.0.2", Outcome.DROP),
}


@pytest.mark.parametrize(("source", "wanted"), RANGES.values(), ids=RANGES)
def test_source_ranges(source: str, wanted: Outcome) -> None:
    decision = ask(forward(source_ranges=("10.0.1.9/32", "203.0.113.0/24")), source)
    assert decision.verdict is wanted
    assert bool(decision.candidates) == (wanted is Outcome.FORWARD)


@pytest.mark.parametrize("verdict", [Verdict.REJECT, Verdict.DROP])
def test_verdicts_without_backends(verdict: Verdict) -> None:
    route = Route(NAME, Kind.NODE_PORT, verdict)
    decision = ask(route)
    assert (decision.verdict.name, decision.route, decision.candidates) == (verdict.name, route, ())


def test_source_ranges_come_before_reject() -> None:
    route = Route(NAME, Kind.LOAD_BALANCER, Verdict.REJECT, source_ranges=("203.0.113.0/24",))
    assert ask(route, "203.0.113.5").verdict is Outcome.REJECT
    assert ask(route, "198.51.100.9").verdict is Outcome.DROP


def test_every_verdict_has_an_outcome_of_its_number() -> None:
    assert {verdict.name: int(verdict) for verdict in Verdict} | {"NOT_SERVICE": 3} == {
        outcome.name: int(outcome) for outcome in Outcome
    }


def test_reasons_tell_the_whole_way() -> None:
    route = forward(
        masquerade=Masquerade.NOT_POD,
        affinity_seconds=60,
        source_ranges=("10.0.0.0/8",),
        algorithm=Algorithm.MAGLEV,
    )
    assert ask(route).reasons == (
        "10.0.1.9 counts as a local pod (in 10.0.1.0/24): scope INTERNAL",
        "10.96.0.1:80/TCP is the ClusterIP of default/web:http",
        "10.0.1.9 is in the source ranges 10.0.0.0/8",
        "2 of 3 backends take new flows, chosen by maglev; 1 terminating, only keeping the flows they have",
        "a client that came within 60 s goes where it went then, if that is there",
        "masquerade is NOT_POD: the backend sees 10.0.1.9 as the source",
    )


WHO = {
    "pod": ("10.0.1.9", "", "10.0.1.9 counts as a local pod (in 10.0.1.0/24): scope INTERNAL"),
    "interface": ("10.9.9.9", "cali12", "10.9.9.9 counts as a local pod (comes by cali12): scope INTERNAL"),
    "node": ("192.168.0.2", "", "192.168.0.2 is this node itself: scope INTERNAL"),
    "outside": ("203.0.113.5", "eth0", "203.0.113.5 is neither this node nor a local pod: scope EXTERNAL"),
}


@pytest.mark.parametrize(("source", "interface", "wanted"), WHO.values(), ids=WHO)
def test_the_first_reason_says_who_asks(source: str, interface: str, wanted: str) -> None:
    assert ask(forward(), source, interface).reasons[0] == wanted
