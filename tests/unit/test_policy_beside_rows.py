"""What a route table says beside its rows: which addresses are a Service's as a whole, and who serves datagrams."""

from __future__ import annotations

from ebpflb.model import Family, ServiceName
from ebpflb.policy import Router, routes
from ebpflb.routes import RouteTable, ServicePortName
from tests.world import (
    LOCAL,
    UDP,
    dying,
    endpoint_slice,
    leaving,
    options,
    port,
    ready,
    service,
    slice_port,
    snapshot,
    unready,
)

WEB = ServiceName("ns1", "svc1")
DNS = (ServicePortName("ns1", "svc1", "dns"), Family.IPV4)
DNS_PORT = port(53, "dns", UDP)
DNS_TARGET = [slice_port(5353, "dns", UDP)]


def test_every_cluster_ip_is_owned_in_both_families_whatever_its_endpoints() -> None:
    dual = service("ns1/svc1", ["172.30.0.41", "fd00:172:30::41"], external=["192.168.99.1"], lb=["1.2.3.4"])
    table = routes(snapshot(dual), options())
    assert dict(table.owned) == {"172.30.0.41": WEB, "fd00:172:30::41": WEB}


def test_an_address_is_owned_as_long_as_a_service_has_it() -> None:
    router = Router()
    both = snapshot(service("ns1/svc1", "172.30.0.41"), service("ns1/svc2", "172.30.0.41", port(81)))
    router.update(both, None, options())
    one = snapshot(service("ns1/svc2", "172.30.0.41", port(81)))
    assert dict(router.update(one, frozenset({WEB}), options()).owned) == {"172.30.0.41": ServiceName("ns1", "svc2")}
    moved = snapshot(service("ns1/svc2", "172.30.0.42", port(81)))
    touched = frozenset({ServiceName("ns1", "svc2")})
    assert list(router.update(moved, touched, options()).owned) == ["172.30.0.42"]
    assert not router.update(snapshot(), touched, options()).owned


def test_udp_ports_have_all_that_serve_whatever_policies_and_hints_say() -> None:
    table = routes(
        snapshot(
            service("ns1/svc1", "172.30.0.41", DNS_PORT, internal_policy=LOCAL),
            endpoint_slice(
                ready("10.0.2.1", zones=["b"]), leaving("10.0.2.2"), unready("10.0.1.3"), dying("10.0.1.4"),
                ports=DNS_TARGET,
            ),
        ),
        options(),
    )  # fmt: skip
    assert dict(table.serving) == {DNS: {("10.0.2.1", 5353), ("10.0.2.2", 5353)}}


def test_tcp_ports_have_none() -> None:
    assert not routes(snapshot(service(), endpoint_slice("10.0.1.1")), options()).serving


def test_a_udp_port_without_anybody_to_serve_it_has_an_empty_set() -> None:
    table = routes(snapshot(service("ns1/svc1", "172.30.0.41", DNS_PORT)), options())
    assert dict(table.serving) == {DNS: frozenset()}


def test_who_serves_follows_the_slices_and_goes_with_the_service() -> None:
    router = Router()
    web = service("ns1/svc1", "172.30.0.41", DNS_PORT)
    touched = frozenset({WEB})
    router.update(snapshot(web, endpoint_slice("10.0.1.1", ports=DNS_TARGET)), None, options())
    later = router.update(snapshot(web, endpoint_slice("10.0.1.2", ports=DNS_TARGET)), touched, options())
    assert dict(later.serving) == {DNS: {("10.0.1.2", 5353)}}
    assert not router.update(snapshot(), touched, options()).serving


def test_what_lies_beside_the_rows_does_not_count_in_equality() -> None:
    """The kernel's own table, read back, need not know it."""
    table = routes(snapshot(service("ns1/svc1", "172.30.0.41", DNS_PORT)), options())
    assert table.owned and table.serving
    assert RouteTable(dict(table), table.locality) == table
