"""The route table as a value: equality, evolution, what changed, and the orders that dumps depend on."""

from __future__ import annotations

import pytest

from ebpflb.model import Problem, Protocol, ServiceName
from ebpflb.routes import (
    Backend,
    BackendState,
    Frontend,
    Key,
    Kind,
    Locality,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
    address_order,
    backend_order,
    cidr_order,
    in_cidr,
    key_order,
    packed,
    unpacked,
)

TCP, UDP = Protocol.TCP, Protocol.UDP
NAME = ServicePortName("default", "web", "")
REJECT, DROP = Route(NAME, Kind.CLUSTER_IP, Verdict.REJECT), Route(NAME, Kind.CLUSTER_IP, Verdict.DROP)


def key(address: str = "10.96.0.1", port: int = 80, protocol: Protocol = TCP, scope: Scope = Scope.INTERNAL) -> Key:
    return Frontend(address, port, protocol), scope


A, B, C = key(port=1), key(port=2), key(port=3)


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.1.2", "255.255.255.255", "::", "::1", "fd00::2", "2001:db8::1:0"])
def test_packed_and_back(address: str) -> None:
    assert unpacked(packed(address)) == address
    assert len(packed(address)) == 16


def test_packed_ipv4_is_mapped() -> None:
    assert packed("10.0.1.2") == bytes(10) + b"\xff\xff\x0a\x00\x01\x02"


IN_CIDR = {
    "inside": ("10.1.2.3", "10.0.0.0/8", True),
    "outside": ("11.0.0.0", "10.0.0.0/8", False),
    "host": ("10.0.0.1", "10.0.0.1/32", True),
    "other-host": ("10.0.0.2", "10.0.0.1/32", False),
    "odd-length": ("10.0.3.255", "10.0.2.0/23", True),
    "behind-odd-length": ("10.0.4.0", "10.0.2.0/23", False),
    "all": ("203.0.113.5", "0.0.0.0/0", True),
    "ipv6": ("fd00:1::5", "fd00:1::/32", True),
    "ipv6-outside": ("fd00:2::5", "fd00:1::/32", False),
    "ipv4-in-all-of-ipv6": ("10.0.0.1", "::/0", False),
    "ipv6-in-all-of-ipv4": ("fd00::1", "0.0.0.0/0", False),
}


@pytest.mark.parametrize(("address", "cidr", "wanted"), IN_CIDR.values(), ids=IN_CIDR)
def test_in_cidr(address: str, cidr: str, wanted: bool) -> None:
    assert in_cidr(address, cidr) is wanted


def test_orders() -> None:
    addresses = ["fd00::1", "10.0.0.10", "9.0.0.1", "10.0.0.9", "::1"]
    assert sorted(addresses, key=address_order) == ["9.0.0.1", "10.0.0.9", "10.0.0.10", "::1", "fd00::1"]
    cidrs = ["::/0", "10.0.0.0/16", "10.0.0.0/8", "9.0.0.0/8", "0.0.0.0/0"]
    assert sorted(cidrs, key=cidr_order) == ["0.0.0.0/0", "9.0.0.0/8", "10.0.0.0/8", "10.0.0.0/16", "::/0"]
    one, two = Backend("10.0.0.9", 80, 5), Backend("10.0.0.9", 80, 1, BackendState.DRAINING)
    far, six = Backend("10.0.0.10", 1), Backend("::1", 1)
    assert sorted([six, far, two, one], key=backend_order) == [one, two, far, six]
    keys = [
        key("9.0.0.1"),
        key(port=9),
        key(port=10),
        key(port=10, scope=Scope.EXTERNAL),
        key(port=10, protocol=UDP),
        key("fd00::1", 1),
    ]
    assert sorted(reversed(keys), key=key_order) == keys
    assert [each for each, _ in RouteTable(dict.fromkeys(keys, REJECT)).ordered()] == keys


def test_texts() -> None:
    assert str(Frontend("10.96.0.1", 80, TCP)) == "10.96.0.1:80/TCP"
    assert str(Frontend("fd00::1", 53, UDP)) == "[fd00::1]:53/UDP"
    assert str(ServicePortName("ns", "web", "http")) == "ns/web:http"
    assert str(ServicePortName("ns", "web", "")) == "ns/web"
    assert [kind.label for kind in Kind] == ["ClusterIP", "NodePort", "LoadBalancer", "ExternalIP"]


def test_equality_is_of_rows_and_locality() -> None:
    table = RouteTable({A: REJECT}, Locality(("10.0.0.1",)))
    remark = {ServiceName("default", "web"): (Problem("default/web", "odd"),)}
    assert table == RouteTable({A: REJECT}, Locality(("10.0.0.1",)), remark)
    assert table != RouteTable({A: DROP}, Locality(("10.0.0.1",)))
    assert table != RouteTable({A: REJECT}, Locality(("10.0.0.2",)))
    assert table != RouteTable({A: REJECT, B: REJECT}, Locality(("10.0.0.1",)))


def test_evolve_puts_and_drops() -> None:
    old = RouteTable({A: REJECT, B: REJECT})
    new = old.evolve({C: DROP, A: DROP}, [B, key(port=99)])
    assert dict(new) == {A: DROP, C: DROP}
    assert dict(old) == {A: REJECT, B: REJECT}
    assert new.changed_from(old) == {A, B, C}
    assert new == RouteTable({A: DROP, C: DROP})


def test_evolve_drops_before_it_puts() -> None:
    assert dict(RouteTable({A: REJECT}).evolve({A: DROP}, [A])) == {A: DROP}


def test_changed_from_itself_and_from_strangers() -> None:
    old = RouteTable({A: REJECT, B: REJECT})
    assert old.changed_from(old) == frozenset()
    grandchild = old.evolve({C: DROP}).evolve({B: DROP})
    assert grandchild.changed_from(old) == {B, C}
    assert RouteTable({A: REJECT}).changed_from(RouteTable({A: DROP, B: DROP})) == {A, B}
    assert RouteTable({A: REJECT}).changed_from(RouteTable({A: REJECT})) == frozenset()


def test_evolve_keeps_or_replaces_locality_and_problems() -> None:
    web, other = ServiceName("default", "web"), ServiceName("default", "other")
    odd, even = (Problem("default/web", "odd"),), (Problem("default/other", "even"),)
    old = RouteTable({}, Locality(("10.0.0.1",)), {web: odd})
    assert (old.evolve({}).locality, dict(old.evolve({}).problems)) == (old.locality, {web: odd})
    new = old.evolve({}, locality=Locality(), problems={web: (), other: even})
    assert (new.locality, dict(new.problems), dict(old.problems)) == (Locality(), {other: even}, {web: odd})
