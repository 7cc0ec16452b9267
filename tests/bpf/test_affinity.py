"""Session affinity on the packet paths: a client is an address, and goes where it went before, by tc and XDP alike.

Rules of this file: every situation is tried on both paths, and on both in turn; backends are many, so that whoever is
not led by a row of `affinity` is soon seen elsewhere. Time is written into rows, nothing waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from ebpflb.dataplane.bpf import facts
from ebpflb.dataplane.bpf.constants import SOURCE_POD
from ebpflb.dataplane.bpf.inspect import Inspector
from ebpflb.dataplane.bpf.maps import KernelMaps
from ebpflb.routes import BackendState, Masquerade
from tests.bpf.loaded import SECOND, To
from tests.bpf.xdp_lab import Lab
from tests.packets import Packet, address, parse

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))

MANY = tuple(("remote", 8000 + number) for number in range(16))
TIMEOUT = 60
STICKY = To(MANY, masquerade=Masquerade.ALWAYS, affinity=TIMEOUT)
ENOUGH = 40
"""New connections after which one backend out of 16 can be no chance."""

Choose = Callable[[Packet], int]


@pytest.fixture(params=("tc", "xdp", "both"))
def choose(request: pytest.FixtureRequest, lab: Lab) -> Choose:
    """Pass a request by one of the paths, or by both in turn; the backend's port."""
    ways: Iterator[str] = itertools.cycle(("tc", "xdp") if request.param == "both" else (request.param,))

    def chosen(packet: Packet) -> int:
        frame = packet.frame(lab.family)
        parsed = parse(lab.by_stack(frame) if next(ways) == "tc" else lab.sent(frame))
        assert parsed and parsed.ports
        return parsed.ports[1]

    return chosen


def connections(protocol: str, count: int = ENOUGH, client: str = "outside", role: str = "lb") -> Iterator[Packet]:
    """New ones, each from a port of its own."""
    for _ in range(count):
        yield Packet(client, next(_ports), role, 80, protocol)


_ports = itertools.cycle(range(10000, 60000))


@both_protocols
def test_a_client_goes_where_it_went(lab: Lab, choose: Choose, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    assert len({choose(each) for each in connections(protocol)}) == 1
    assert lab.node.counters()["CLIENT_KEPT"] == ENOUGH - 1


@both_protocols
def test_without_affinity_it_does_not(lab: Lab, choose: Choose, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, To(MANY, masquerade=Masquerade.ALWAYS))
    assert len({choose(each) for each in connections(protocol)}) > 1
    assert lab.node.clients() == {}


@both_protocols
def test_each_client_for_itself(lab: Lab, choose: Choose, protocol: str) -> None:
    """Many clients spread over the backends as ever."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    prefix = "203.0.113." if lab.family == 4 else "2001:db8:203::"
    went: dict[str, set[int]] = {}
    for _ in range(2):
        for host in range(10, 10 + ENOUGH):
            (packet,) = connections(protocol, 1, f"{prefix}{host}")
            went.setdefault(packet.source, set()).add(choose(packet))
    assert all(len(places) == 1 for places in went.values())
    assert len(set.union(*went.values())) > 4


@both_protocols
def test_after_the_timeout_it_may_go_elsewhere(lab: Lab, choose: Choose, protocol: str) -> None:
    lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    places = set()
    for packet in connections(protocol):
        places.add(choose(packet))
        lab.node.age_clients(TIMEOUT + 1)
    assert len(places) > 1
    assert "CLIENT_KEPT" not in lab.node.counters()


def test_dump_lists_a_client_until_its_time_is_over(lab: Lab, choose: Choose) -> None:
    """By the clock of the programs; from then on its row is nobody's, until it comes again."""
    lab.node.put_frontend("lb", 80, "tcp", lab.family, STICKY)
    inspector = Inspector(KernelMaps(lab.node.maps), (), facts.jiffies)
    first, again = connections("tcp", 2)
    went = choose(first)
    lab.node.age_clients(TIMEOUT - 10)
    (item,) = inspector.tables("affinity")
    assert item["client"] == address("outside", lab.family) and str(item["backend"]).endswith(f":{went}")
    assert isinstance(item["secondsLeft"], float) and 0 < item["secondsLeft"] <= 10
    lab.node.age_clients(10.01)
    assert inspector.tables("affinity") == [] and len(lab.node.clients()) == 1
    choose(again)
    assert len(inspector.tables("affinity")) == 1
    assert "CLIENT_KEPT" not in lab.node.counters()


@both_protocols
def test_within_the_timeout_it_stays_however_often(lab: Lab, choose: Choose, protocol: str) -> None:
    """Each new connection begins the time anew."""
    lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    places = set()
    for packet in connections(protocol):
        places.add(choose(packet))
        lab.node.age_clients(TIMEOUT - 1)
    assert len(places) == 1


def test_a_connection_that_goes_on_does_not_begin_the_time_anew(lab: Lab, choose: Choose) -> None:
    """As with kube-proxy, whose `recent` match sees new connections only."""
    lab.node.put_frontend("lb", 80, "tcp", lab.family, STICKY)
    (packet,) = connections("tcp", 1)
    first = choose(packet)
    lab.node.age_clients(30)
    ((_, _, before),) = lab.node.clients().values()
    for _ in range(5):
        assert choose(packet.but(flags="PA")) == first
    assert choose(packet) == first, "a SYN that is sent again"
    assert [seen for _, _, seen in lab.node.clients().values()] == [before]
    (another,) = connections("tcp", 1)
    assert choose(another) == first
    assert [seen > before + 29 * SECOND for _, _, seen in lab.node.clients().values()] == [True]


@both_protocols
def test_all_frontends_of_a_service_port_share_it(lab: Lab, choose: Choose, protocol: str) -> None:
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    lab.node.put_frontend("vip", 80, protocol, lab.family, STICKY, service=service)
    lab.node.put_frontend("node", 80, protocol, lab.family, STICKY, service=service)
    places = {choose(each) for role in ("lb", "vip", "node") for each in connections(protocol, 12, role=role)}
    assert len(places) == 1 and len(lab.node.clients()) == 1


@both_protocols
def test_another_service_does_not(lab: Lab, choose: Choose, protocol: str) -> None:
    for role in ("lb", "vip"):
        lab.node.put_frontend(role, 80, protocol, lab.family, STICKY)
    for each in connections(protocol, 4):
        choose(each)
        choose(each.but(destination="vip"))
    assert len(lab.node.clients()) == 2


@both_protocols
def test_both_scopes_share_it(lab: Lab, choose: Choose, protocol: str) -> None:
    """A client that begins to count as a pod stays with its backend where that scope has it, too."""
    lab.node.put_frontend(
        "lb", 80, protocol, lab.family, STICKY, To(MANY[::-1], masquerade=Masquerade.ALWAYS, affinity=TIMEOUT)
    )
    places = {choose(each) for each in connections(protocol, 12)}
    lab.node.put_source(f"{address('outside', lab.family)}/{32 if lab.family == 4 else 128}", SOURCE_POD)
    places |= {choose(each) for each in connections(protocol, 12)}
    assert len(places) == 1 and len(lab.node.clients()) == 1


@both_protocols
def test_a_backend_that_the_other_scope_does_not_have(lab: Lab, choose: Choose, protocol: str) -> None:
    """It is not used there; the client is then remembered with the one that was."""
    inside = To(MANY[:8], masquerade=Masquerade.ALWAYS, affinity=TIMEOUT)
    outside = To(MANY[8:], masquerade=Masquerade.ALWAYS, affinity=TIMEOUT)
    lab.node.put_frontend("lb", 80, protocol, lab.family, inside, outside)
    assert {choose(each) >= 8008 for each in connections(protocol, 12)} == {True}
    lab.node.put_source(f"{address('outside', lab.family)}/{32 if lab.family == 4 else 128}", SOURCE_POD)
    places = {choose(each) for each in connections(protocol)}
    assert len(places) == 1 and places.pop() < 8008


@both_protocols
@pytest.mark.parametrize("how", ("gone", "draining"))
def test_a_backend_that_left_is_not_kept(lab: Lab, choose: Choose, protocol: str, how: str) -> None:
    """One that drains keeps the connections that it has."""
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    (packet,) = connections(protocol, 1)
    first = choose(packet)
    rest = tuple(each for each in MANY if each[1] != first)
    left = (("remote", first),)
    number = lab.node.put_backend(address("remote", lab.family), first, service)
    if how == "gone":
        lab.node.set_backend(number, "::", 0, 0, 255)
    else:
        lab.node.set_backend(number, address("remote", lab.family), first, service, BackendState.DRAINING)
    to = To(rest, masquerade=Masquerade.ALWAYS, affinity=TIMEOUT, draining=left if how == "draining" else ())
    lab.node.put_frontend("lb", 80, protocol, lab.family, to, service=service)
    places = {choose(each) for each in connections(protocol)}
    assert len(places) == 1 and first not in places
    if how == "draining":
        assert choose(packet.but(flags="A")) == first


@both_protocols
def test_a_backend_that_returns_is_not_remembered(lab: Lab, choose: Choose, protocol: str) -> None:
    """Its client has been given another one since."""
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    first = {choose(each) for each in connections(protocol, 4)}
    rest = tuple(each for each in MANY if each[1] not in first)
    lab.node.put_frontend(
        "lb", 80, protocol, lab.family, To(rest, masquerade=Masquerade.ALWAYS, affinity=TIMEOUT), service=service
    )
    second = {choose(each) for each in connections(protocol, 4)}
    lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY, service=service)
    assert {choose(each) for each in connections(protocol, 12)} == second != first


@both_protocols
def test_backends_that_come_and_change_their_places(lab: Lab, choose: Choose, protocol: str) -> None:
    """The client's is found wherever it is now."""
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    places = {choose(each) for each in connections(protocol, 4)}
    for order in (MANY[::-1], (*MANY[7:], *MANY[:7]), tuple(("remote2", 1 + at) for at in range(50)) + MANY):
        to = To(order, masquerade=Masquerade.ALWAYS, affinity=TIMEOUT)
        lab.node.put_frontend("lb", 80, protocol, lab.family, to, service=service)
        places |= {choose(each) for each in connections(protocol, 12)}
    assert len(places) == 1


@both_protocols
def test_switched_on_off_and_on(lab: Lab, choose: Choose, protocol: str) -> None:
    """Live, by rows alone."""
    off = To(MANY, masquerade=Masquerade.ALWAYS)
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    assert len({choose(each) for each in connections(protocol)}) == 1
    lab.node.put_frontend("lb", 80, protocol, lab.family, off, service=service)
    assert len({choose(each) for each in connections(protocol)}) > 1
    lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY, service=service)
    assert len({choose(each) for each in connections(protocol)}) == 1


@both_protocols
def test_a_changed_timeout_holds_at_once(lab: Lab, choose: Choose, protocol: str) -> None:
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, STICKY)
    first = {choose(each) for each in connections(protocol, 4)}
    lab.node.age_clients(2 * TIMEOUT)
    longer = To(MANY, masquerade=Masquerade.ALWAYS, affinity=86400)
    lab.node.put_frontend("lb", 80, protocol, lab.family, longer, service=service)
    assert {choose(each) for each in connections(protocol, 12)} == first
    assert lab.node.counters()["CLIENT_KEPT"] == 15


@both_protocols
def test_rows_of_members_that_are_missing_do_no_harm(lab: Lab, choose: Choose, protocol: str) -> None:
    """The place that the row remembers still tells, and where it does not, a backend is chosen."""
    broken = To(MANY, masquerade=Masquerade.ALWAYS, affinity=TIMEOUT, broken="members")
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, broken)
    assert len({choose(each) for each in connections(protocol, 12)}) == 1
    turned = To(MANY[::-1], masquerade=Masquerade.ALWAYS, affinity=TIMEOUT, broken="members")
    lab.node.put_frontend("lb", 80, protocol, lab.family, turned, service=service)
    assert {choose(each) for each in connections(protocol, 12)} <= {port for _, port in MANY}


def test_more_clients_than_there_is_room_for(lab: Lab, choose: Choose) -> None:
    """Old ones are forgotten, all are served."""
    lab.node.put_frontend("lb", 80, "udp", lab.family, STICKY)
    for host in range(1100):
        client = f"203.0.{113 + host // 250}.{host % 250}" if lab.family == 4 else f"2001:db8:203::{host:x}"
        choose(Packet(client, 40000, "lb", 80, "udp"))
    assert 0 < len(lab.node.clients()) <= 1024


def test_what_was_refused_is_not_remembered(lab: Lab) -> None:
    """Source ranges come first."""
    to = To(MANY, masquerade=Masquerade.ALWAYS, affinity=TIMEOUT, ranges=("198.51.100.0/24", "2001:db8:100::/48"))
    lab.node.put_frontend("lb", 80, "tcp", lab.family, to)
    assert lab.xdp(Packet("outside", 1, "lb", 80).frame(lab.family)).verdict == 1
    assert lab.node.clients() == {}
