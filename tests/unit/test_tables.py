"""Rows: their bytes, what they share, and what becomes of a table that does not fit."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable

import msgspec
import pytest

from ebpflb.dataplane.bpf import layouts, remembered
from ebpflb.dataplane.bpf.constants import POD_SOCKETS_IPV4, POD_SOCKETS_IPV6, SOURCE_NODE, SOURCE_POD
from ebpflb.dataplane.bpf.fields import fields
from ebpflb.dataplane.bpf.inspect import Inspector
from ebpflb.dataplane.bpf.known import known_bit
from ebpflb.dataplane.bpf.layouts import KEY_VALUE, REQUIRED, SIZES, SOURCE_KEY, U32, check_layouts, size_of
from ebpflb.dataplane.bpf.locality import pack_settings, pack_sources
from ebpflb.dataplane.bpf.tables import pack_frontend, pack_name, unpack_network
from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.errors import Unsupported, UserError
from ebpflb.model import Protocol, ServiceName
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Frontend,
    Key,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
    packed,
)
from tests.maps import FakeMaps
from tests.tables import FACTS, interpret, left_over, settings_of

WEB = ServicePortName("default", "web", "http")


def backends(*numbers: int, port: int = 8080) -> tuple[Backend, ...]:
    return tuple(Backend(f"10.180.0.{number}", port) for number in numbers)


def route(service: ServicePortName = WEB, to: tuple[Backend, ...] = (), **more: object) -> Route:
    made = Route(service, Kind.CLUSTER_IP, Verdict.FORWARD if to else Verdict.REJECT, to)
    return msgspec.structs.replace(made, **more)


def both(frontend: Frontend, made: Route) -> dict[Key, Route]:
    return {(frontend, scope): made for scope in Scope}


def frontend(number: int, port: int = 80, protocol: Protocol = Protocol.TCP) -> Frontend:
    return Frontend(f"172.30.{number // 250}.{number % 250}", port, protocol)


def writer(maps: FakeMaps) -> Writer:
    return Writer(maps, FACTS, time.monotonic)


# ---- Layouts


@pytest.mark.parametrize(
    ("name", "packer"),
    [
        ("frontend_key", layouts.FRONTEND_KEY),
        ("route", layouts.ROUTE),
        ("backend", layouts.BACKEND),
        ("name", layouts.NAME),
        ("source_key", layouts.SOURCE_KEY),
        ("range_key", layouts.RANGE_KEY),
        ("settings", layouts.SETTINGS),
        ("flow_key", layouts.FLOW_KEY),
        ("flow", layouts.FLOW),
        ("socket_key", layouts.SOCKET_KEY),
        ("socket_value", layouts.SOCKET_VALUE),
        ("owner", layouts.OWNER),
        ("table_key", layouts.TABLE_KEY),
        ("member_key", layouts.MEMBER_KEY),
        ("affinity_key", layouts.AFFINITY_KEY),
        ("affinity", layouts.AFFINITY),
        ("vlan_key", layouts.VLAN_KEY),
    ],
)
def test_packers_have_the_size_of_their_rows(name: str, packer: struct.Struct) -> None:
    assert packer.size == size_of(name)


def test_references_are_members_of_a_route() -> None:
    numbers = dict(zip((name for name, _ in layouts.REQUIRED["route"]), range(1, 13), strict=False))
    row = layouts.ROUTE.pack(*numbers.values())
    asked = ("service", "slots", "count", "draining", "affinity", "ranges", "table")
    assert layouts.ROUTE_REFERENCES.size == layouts.ROUTE.size
    assert layouts.ROUTE_REFERENCES.unpack(row) == tuple(numbers[name] for name in asked)


class _Field(msgspec.Struct):
    name: str
    offset: int
    bytes: int
    fields: tuple[_Field, ...] = ()


class _Layout(msgspec.Struct):
    size: int
    fields: tuple[_Field, ...] = ()


class _Map(msgspec.Struct):
    key: _Layout
    value: _Layout
    max_entries: int = 1


def _layout(name: str) -> _Layout:
    return _Layout(size_of(name), tuple(_fields(name)))


def _fields(name: str) -> Iterable[_Field]:
    at = 0
    for member, width in REQUIRED.get(name, ()):
        yield _Field(member, at, width, tuple(_fields("route")) if name == "frontend" else ())
        at += width


def _maps() -> dict[str, _Map]:
    return {table: _Map(_layout(key), _layout(value)) for table, (key, value) in KEY_VALUE.items()}


def test_the_layouts_that_are_required_pass() -> None:
    check_layouts(_maps())


@pytest.mark.parametrize("drift", ["moved", "renamed", "longer", "inner", "missing"])
def test_drift_is_refused_in_words(drift: str) -> None:
    maps = _maps()
    if drift == "moved":
        maps["backends"].value.fields[2].offset = 20
    elif drift == "renamed":
        maps["settings"].value.fields[0].name = "namespace"
    elif drift == "longer":
        maps["slots"].value.size = 8
    elif drift == "inner":
        maps["frontends"].value.fields[0].fields[5].name = "first"
    else:
        del maps["names"]
    with pytest.raises(Unsupported, match="reinstall ebpflb"):
        check_layouts(maps)


def test_a_frontends_key_byte_by_byte() -> None:
    """Address in network order, IPv4 as ::ffff:a.b.c.d; port in network order; protocol; padding."""
    key = pack_frontend(Frontend("172.30.0.41", 80, Protocol.TCP))
    assert key == bytes(10) + b"\xff\xff" + bytes((172, 30, 0, 41)) + b"\x00\x50" + b"\x06" + b"\x00"


def test_a_name_that_is_too_long_has_no_row() -> None:
    assert pack_name(ServicePortName("n" * 63, "s" * 63, "")) is not None
    assert pack_name(ServicePortName("n" * 64, "s", "")) is None


# ---- Locality


def flags(locality: Locality) -> dict[str, int]:
    """The bits that a program sees, by prefix."""
    return {
        unpack_network(*SOURCE_KEY.unpack(key)): U32.unpack(value)[0] & 0xFFFF
        for key, value in pack_sources(locality).items()
    }


def test_a_node_address_inside_a_pod_cidr_is_both() -> None:
    """A longest-prefix match finds the node's row only."""
    found = flags(Locality(("10.180.0.1", "192.168.0.2"), ("10.180.0.0/16", "10.180.0.0/24")))
    assert found == {
        "10.180.0.1/32": SOURCE_NODE | SOURCE_POD,
        "192.168.0.2/32": SOURCE_NODE,
        "10.180.0.0/16": SOURCE_POD,
        "10.180.0.0/24": SOURCE_POD,
    }


def test_all_of_ipv6_is_not_ipv4() -> None:
    """::/0 holds ::ffff:0:0/96 as bytes go, but means IPv6."""
    found = flags(Locality(("192.168.0.2", "2001:db8::2"), ("::/0",)))
    assert found == {
        "::/0": SOURCE_POD,
        "0.0.0.0/0": 0,
        "192.168.0.2/32": SOURCE_NODE,
        "2001:db8::2/128": SOURCE_NODE | SOURCE_POD,
    }


@pytest.mark.parametrize(
    ("locality", "families"),
    [
        (Locality(), 0),
        (Locality(pod_cidrs=("10.180.0.0/24",)), POD_SOCKETS_IPV4),
        (Locality(pod_cidrs=("fd00:10::/64",)), POD_SOCKETS_IPV6),
        (Locality(pod_interface="cni0"), POD_SOCKETS_IPV4 | POD_SOCKETS_IPV6),
    ],
)
def test_other_namespaces_sockets_are_pods_where_pods_can_be_told(locality: Locality, families: int) -> None:
    maps = FakeMaps()
    assert writer(maps).sync(RouteTable({}, locality)).complete
    assert settings_of(maps)[4] == families


def test_settings_name_the_interface_without_its_star() -> None:
    row = pack_settings(FACTS, Locality(pod_interface="cali*"))
    assert row[40:56] == b"cali".ljust(16, b"\0") and row[56] == 1


# ---- Sharing, switching, freeing


def test_one_slot_range_for_the_same_backends_of_a_service_port() -> None:
    maps = FakeMaps()
    rows = both(frontend(1), route(to=backends(1, 2))) | both(frontend(2, 30080), route(to=backends(1, 2)))
    assert writer(maps).sync(RouteTable(rows)).complete
    assert len(maps.tables["slots"]) == 2
    assert len(maps.tables["backends"]) == 2


def test_one_endpoint_among_many_costs_itself() -> None:
    """The new backend, the new set's slots, the frontends' rows and the old backend's end: nothing else."""
    maps = FakeMaps()
    rows: dict[Key, Route] = {}
    for number in range(1, 100):
        rows |= both(frontend(number), route(ServicePortName("default", f"s{number}", ""), backends(number)))
    rows |= both(frontend(0), route(to=backends(1, 2, 3)))
    table = RouteTable(rows)
    node = writer(maps)
    node.sync(table)
    report = node.sync(table.evolve(both(frontend(0), route(to=backends(1, 3, 4)))))
    assert (report.written, report.removed, report.failed) == (1 + 3 + 1 + 1, 0, 0)


def test_a_draining_backend_keeps_its_id() -> None:
    """And with it the flows that it has."""
    maps = FakeMaps()
    node = writer(maps)
    table = RouteTable(both(frontend(1), route(to=backends(1, 2))))
    node.sync(table)
    before = {row[:18]: key for key, row in maps.tables["backends"].items()}
    left = (backends(1)[0], msgspec.structs.replace(backends(2)[0], state=BackendState.DRAINING))
    node.sync(table.evolve(both(frontend(1), route(to=left))))
    assert {row[:18]: key for key, row in maps.tables["backends"].items()} == before
    assert sorted(row[20] for row in maps.tables["backends"].values()) == [0, 1]


def test_a_restart_renumbers_nothing() -> None:
    maps = FakeMaps()
    rows = both(frontend(1), route(to=backends(1, 2), source_ranges=("10.0.0.0/8",)))
    table = RouteTable(rows, Locality(("192.168.0.2",), ("10.180.0.0/24",)))
    writer(maps).sync(table)
    before = {name: dict(content) for name, content in maps.tables.items()}
    more = both(frontend(2), route(ServicePortName("default", "db", ""), to=backends(3)))
    report = writer(maps).sync(table.evolve(more))
    assert (report.written, report.removed) == (1 + 1 + 1 + 1 + 1, 0)  # with the address' bit
    assert all(content.items() <= maps.tables[name].items() for name, content in before.items())


def test_nothing_is_left_of_a_service_that_goes() -> None:
    maps = FakeMaps()
    node = writer(maps)
    node.sync(RouteTable(both(frontend(1), route(to=backends(1, 2), source_ranges=("10.0.0.0/8",)))))
    assert node.sync(RouteTable()).complete
    assert not any(maps.tables[name] for name in ("frontends", "names", "ranges"))
    assert left_over(maps) == []


def test_one_name_over_two_protocols_is_two_services() -> None:
    """Affinity and flows are per Service port, and a port has one protocol."""
    maps = FakeMaps()
    dns = ServicePortName("kube-system", "dns", "")
    rows = both(frontend(1, 53), route(dns, backends(1)))
    rows |= both(frontend(1, 53, Protocol.UDP), route(dns, backends(1)))
    node = writer(maps)
    node.sync(RouteTable(rows))
    assert len(maps.tables["names"]) == 2
    assert node.state() == RouteTable(rows)


# ---- What does not fit


@pytest.mark.parametrize(
    ("full", "capacity"), [("frontends", 3), ("slots", 7), ("backends", 8), ("names", 3), ("ranges", 3)]
)
def test_a_full_map_costs_only_those_that_do_not_fit(full: str, capacity: int) -> None:
    """Five Services into maps for three: three are served, two are named, and they come when there is room."""
    maps = FakeMaps({full: capacity})
    rows: dict[Key, Route] = {}
    for number in range(5):
        to = backends(2 * number, 2 * number + 1)
        ranges = (f"10.{number}.0.0/16",)
        rows |= both(frontend(number), route(ServicePortName("default", f"s{number}", ""), to, source_ranges=ranges))
    node = writer(maps)
    report = node.sync(RouteTable(rows))
    assert report.failed == 2 and len(report.problems) == 2
    assert all(f"the map {full} is full" in problem.reason for problem in report.problems)
    served = {str(row.service) for row in node.state().values()}
    assert {problem.subject for problem in report.problems} == {f"default/s{number}" for number in range(5)} - served
    assert len(served) == 3
    writes = maps.writes
    assert node.sync(RouteTable(rows)).failed == 2
    assert maps.writes == writes, "a retry that cannot succeed writes nothing"

    gone = next(iter(served))
    fewer = {key: row for key, row in rows.items() if str(row.service) != gone}
    for _ in range(2):  # the first frees what the second takes
        report = node.sync(RouteTable(fewer))
    assert report.failed == 1
    assert len({row.service for row in node.state().values()}) == 3
    assert left_over(maps) == []


def test_a_service_that_no_longer_fits_keeps_what_it_had() -> None:
    maps = FakeMaps({"slots": 6})
    node = writer(maps)
    table = RouteTable(both(frontend(1), route(to=backends(1, 2))))
    node.sync(table)
    before = interpret(maps)
    report = node.sync(table.evolve(both(frontend(1), route(to=backends(1, 2, 3, 4, 5)))))
    assert [problem.subject for problem in report.problems] == ["default/web:http"]
    assert interpret(maps) == before


def test_a_value_that_no_row_can_hold_is_its_services_own_problem() -> None:
    maps = FakeMaps()
    heavy = (msgspec.structs.replace(backends(1)[0], weight=70_000),)
    rows = both(frontend(1), route(to=heavy)) | both(frontend(2), route(ServicePortName("a", "b", ""), backends(2)))
    report = writer(maps).sync(RouteTable(rows))
    assert [problem.subject for problem in report.problems] == ["default/web:http"]
    assert len(maps.tables["frontends"]) == 1
    assert left_over(maps) == []


# ---- Rows that are not ours


def test_foreign_rows_are_removed() -> None:
    maps = FakeMaps()
    node = writer(maps)
    table = RouteTable(both(frontend(1), route(to=backends(1))))
    node.sync(table)
    strange = bytes(18) + b"\x63\x01"
    maps.put("frontends", strange, bytes(64))
    maps.put("names", U32.pack(4_000_000_000), bytes(192))
    maps.put("ranges", U32.pack(64) + U32.pack(9) + bytes(16), U32.pack(1))
    report = node.audit()
    assert report.complete and report.removed == 3
    assert node.audit().removed == 0
    assert left_over(maps) == [] and len(maps.tables["frontends"]) == 1


# ---- What dump shows


def test_inspector_speaks_of_services() -> None:
    maps = FakeMaps()
    left = (backends(1)[0], msgspec.structs.replace(backends(2)[0], state=BackendState.DRAINING))
    rows = both(frontend(1), route(to=left, masquerade=Masquerade.NOT_POD))
    writer(maps).sync(RouteTable(rows, Locality(("192.168.0.2",), ("::/0",))))
    inspector = Inspector(maps, (), lambda: 0)
    name = {"namespace": "default", "name": "web", "port": "http"}
    (service,) = inspector.tables("services")
    assert service == {
        "service": name,
        "protocol": "TCP",
        "frontends": ["172.30.0.1:80/TCP"],
        "activeBackends": 1,
        "drainingBackends": 1,
        "id": 1,
    }
    assert [(row["service"], row["address"], row["state"]) for row in inspector.tables("backends")] == [
        (name, "10.180.0.1", "active"),
        (name, "10.180.0.2", "draining"),
    ]
    assert inspector.tables("sources") == [
        {"cidr": "192.168.0.2/32", "node": True, "pod": False},
        {"cidr": "::/0", "node": False, "pod": True},
    ]
    with pytest.raises(UserError, match="dump nonsense"):
        inspector.tables("nonsense")


def test_a_flow_is_one_item_of_up_to_four_rows() -> None:
    """Client, frontend, backend and masquerade come from different rows; the last use of any of them counts."""
    maps = FakeMaps()
    writer(maps).sync(RouteTable(both(frontend(1), route(to=backends(1)))))
    client, to, pod, node = (packed(text) for text in ("203.0.113.9", "172.30.0.1", "10.180.0.1", "192.168.0.2"))
    ports = {name: socket.htons(port) for name, port in (("client", 40000), ("to", 80), ("pod", 8080), ("node", 1500))}
    now = 2**32 + 10_000 * 250

    def row(key: tuple[object, ...], value: tuple[object, ...]) -> None:
        maps.put("flows", layouts.FLOW_KEY.pack(*key, 0), layouts.FLOW.pack(*value, b"", 0, 0))

    row(
        (client, to, ports["client"], ports["to"], 6, 0),
        (pod, ports["pod"], ports["client"], 0, 4, 0, 1, 1, now - 5000, now - 25_000),
    )
    row(
        (client, pod, ports["client"], ports["pod"], 6, 1),
        (node, ports["node"], ports["pod"], 1, 4, 0, 1, 1, now - 2500, now - 25_000),
    )
    row(
        (pod, node, ports["pod"], ports["node"], 6, 0), (client, ports["client"], ports["pod"], 2, 4, 0, 1, 1, now, now)
    )
    (flow,) = Inspector(maps, (), lambda: now & 0xFFFFFFFF).tables("flows")
    assert flow == {
        "protocol": "TCP",
        "client": "203.0.113.9:40000",
        "frontend": "172.30.0.1:80",
        "backend": "10.180.0.1:8080",
        "source": "192.168.0.2:1500",
        "service": {"namespace": "default", "name": "web", "port": "http"},
        "state": "open",
        "idleSeconds": 10.0,
        "ageSeconds": 100.0,
    }


def test_a_flow_that_xdp_began_tells_its_source_in_one_row() -> None:
    """It has no rows of egress: the request's tells both ends, and the reply's, where it enters, is its last use."""
    maps = FakeMaps()
    writer(maps).sync(RouteTable(both(frontend(1), route(to=backends(1)))))
    client, to, pod, node = (packed(text) for text in ("203.0.113.9", "172.30.0.1", "10.180.0.1", "192.168.0.2"))
    ports = {name: socket.htons(port) for name, port in (("client", 40000), ("to", 80), ("pod", 8080), ("node", 1500))}
    flags = remembered.FLOW_WHOLE | remembered.FLOW_MASQUERADE
    maps.put(
        "flows",
        layouts.FLOW_KEY.pack(client, to, ports["client"], ports["to"], 6, 0, 0)
        + layouts.FLOW_KEY.pack(pod, node, ports["pod"], ports["node"], 6, 0, 0),
        layouts.FLOW.pack(pod, ports["pod"], ports["node"], 0, flags, 0, 1, 1, 500, 500, node, ports["node"], 0)
        + layouts.FLOW.pack(client, 0, 0, 2, flags, 0, 1, 1, 750, 500, to, ports["to"], ports["client"]),
    )
    (flow,) = Inspector(maps, (), lambda: 1000).tables("flows")
    assert (flow["source"], flow["backend"]) == ("192.168.0.2:1500", "10.180.0.1:8080")
    assert (flow["idleSeconds"], flow["ageSeconds"]) == (1.0, 2.0)


def test_affinity_says_who_goes_where_and_for_how_long() -> None:
    """Clients are addresses, or namespaces of sockets; a backend that has gone is null."""
    maps = FakeMaps()
    writer(maps).sync(RouteTable(both(frontend(1), route(to=backends(1, 2), affinity_seconds=60))))
    for client, kind, backend, seen in (
        (packed("203.0.113.9"), layouts.CLIENT_ADDRESS, 2, 900),
        ((4026531840).to_bytes(16, "little"), layouts.CLIENT_NETNS, 99, 1000 - 59 * 250),
    ):
        key = layouts.AFFINITY_KEY.pack(client, 1, kind)
        maps.put("affinity", key, layouts.AFFINITY.pack(backend, 0, seen % 2**64))
    name = {"namespace": "default", "name": "web", "port": "http"}
    assert Inspector(maps, (), lambda: 1000).tables("affinity") == [
        {
            "service": name,
            "protocol": "TCP",
            "client": "203.0.113.9",
            "backend": "10.180.0.2:8080",
            "idleSeconds": 0.4,
            "secondsLeft": 59.6,
        },
        {
            "service": name,
            "protocol": "TCP",
            "client": "netns:4026531840",
            "backend": None,
            "idleSeconds": 59.0,
            "secondsLeft": 1.0,
        },
    ]


def test_a_client_whose_time_is_over_is_nobodys() -> None:
    """To the jiffy, as the programs reckon, also where the count begins anew; its row stays until it is overwritten."""
    maps = FakeMaps()
    writer(maps).sync(RouteTable(both(frontend(1), route(to=backends(1), affinity_seconds=60))))
    key = layouts.AFFINITY_KEY.pack(packed("203.0.113.9"), 1, layouts.CLIENT_ADDRESS)
    for seen in (1_000_000, 2**32 - 10, 3 * 2**32 - 60 * 250):
        maps.put("affinity", key, layouts.AFFINITY.pack(1, 0, seen))
        for later, left in ((0, 60.0), (60 * 250 - 1, 0.0), (60 * 250, 0.0), (60 * 250 + 1, None), (90 * 250, None)):
            now = (seen + later) % 2**32
            found = Inspector(maps, (), lambda now=now: now).tables("affinity")  # type: ignore[misc]
            assert [item["secondsLeft"] for item in found] == ([] if left is None else [left]), (seen, later)
    assert len(maps.tables["affinity"]) == 1


def test_a_client_of_a_service_that_keeps_none_is_nobodys() -> None:
    """Until the next sync has forgotten it."""
    maps = FakeMaps()
    writer(maps).sync(RouteTable(both(frontend(1), route(to=backends(1)))))
    for service in (1, 2):
        key = layouts.AFFINITY_KEY.pack(packed("203.0.113.9"), service, layouts.CLIENT_ADDRESS)
        maps.put("affinity", key, layouts.AFFINITY.pack(1, 0, 1000))
    assert Inspector(maps, (), lambda: 1000).tables("affinity") == []


def test_maglev_says_how_much_each_backend_has() -> None:
    """By weight; one item for all frontends that share a table."""
    maps = FakeMaps()
    heavy = (backends(1)[0], msgspec.structs.replace(backends(2)[0], weight=3))
    made = route(to=heavy, algorithm=Algorithm.MAGLEV)
    writer(maps).sync(RouteTable(both(frontend(1), made) | both(frontend(2, 8080), made)))
    (item,) = Inspector(maps, (), lambda: 0).tables("maglev")
    assert (item["service"], item["protocol"], item["size"]) == (
        {"namespace": "default", "name": "web", "port": "http"},
        "TCP",
        1021,
    )
    assert isinstance(item["backends"], list)
    one, other = item["backends"]
    assert (one["address"], one["port"], one["weight"]) == ("10.180.0.1", 8080, 1)
    assert one["share"] == pytest.approx(0.25, abs=0.002) and other["share"] == pytest.approx(0.75, abs=0.002)


def test_sources_say_who_may_use_a_load_balancer() -> None:
    """Behind those that tell nodes and pods apart."""
    maps = FakeMaps()
    ranges = ("203.0.113.0/24", "2001:db8::/32")
    lb = route(to=backends(1), kind=Kind.LOAD_BALANCER, source_ranges=ranges[:1])
    rows = both(frontend(1), route(to=backends(1))) | both(frontend(2), lb) | both(frontend(3), lb)
    writer(maps).sync(RouteTable(rows, Locality(("192.168.0.2",), ())))
    assert Inspector(maps, (), lambda: 0).tables("sources") == [
        {"cidr": "192.168.0.2/32", "node": True, "pod": False},
        {
            "cidr": "203.0.113.0/24",
            "node": False,
            "pod": False,
            "mayUse": ["172.30.0.2:80/TCP", "172.30.0.3:80/TCP"],
        },
    ]


def test_raw_has_every_map_that_holds_anything() -> None:
    """Field by field: names as text, tables as positions; of arrays, what was ever used."""
    maps = FakeMaps()
    made = route(to=backends(1), algorithm=Algorithm.MAGLEV, affinity_seconds=60)
    writer(maps).sync(RouteTable(both(frontend(1), made), owned={"172.30.0.1": ServiceName("default", "web")}))
    every = {"counters", "devices", "vlans", "fragments", "sockets", "marks"}
    for each in every - maps.tables.keys():
        maps.tables[each], maps.capacity[each] = {}, 1
    items = {str(item["map"]): item for item in Inspector(maps, (), lambda: 0).tables("raw")}
    assert items["owned"]["value"] == {"namespace": "default", "name": "web"}
    assert items["owned"]["key"] == "172.30.0.1"
    assert items["tables"]["value"] == {"position": [0] * 1024}
    assert items["members"] == {"map": "members", "key": {"slots": 0, "backend": 1}, "value": 0}
    assert items["known"]["key"] == known_bit(packed("172.30.0.1")) >> 6


def test_raw_shows_no_padding() -> None:
    shown = fields("flow", bytes(range(size_of("flow"))))
    assert isinstance(shown, dict)
    assert not [name for name in shown if "pad" in name]
    assert (shown["port"], shown["service"]) == (0x1011, 0x1B1A1918)
    assert shown["way"] == bytes(range(68, 100)).hex()


def test_every_fake_table_has_a_size() -> None:
    assert set(FakeMaps().tables) <= set(SIZES)
