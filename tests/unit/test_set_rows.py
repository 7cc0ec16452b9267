"""What hangs on sets of backends and on addresses as a whole: when it comes, whose it is, and when it goes."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping

import msgspec
import pytest

from ebpflb.dataplane.bpf.affinity_rows import forget_clients
from ebpflb.dataplane.bpf.known import Known, known_bit
from ebpflb.dataplane.bpf.layouts import AFFINITY, AFFINITY_KEY, ROUTE, SIZES, TABLE_KEY, U32, U64
from ebpflb.dataplane.bpf.tables import pack_frontend
from ebpflb.dataplane.bpf.writer import Writer
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
from tests.tables import FACTS, interpret, known_bits, left_over
from tests.tracers.bpf import bit_of

WEB = ServicePortName("default", "web", "http")


def backends(*numbers: int) -> tuple[Backend, ...]:
    return tuple(Backend(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 8080) for number in numbers)


def service(number: int, to: tuple[Backend, ...], **more: object) -> dict[Key, Route]:
    """Both scopes of a Service of one frontend."""
    name = WEB._replace(name=f"s{number}")
    route = Route(name, Kind.CLUSTER_IP, Verdict.FORWARD, to, Masquerade.NOT_POD)
    frontend = Frontend(f"172.30.0.{number}", 80, Protocol.TCP)
    return {(frontend, scope): msgspec.structs.replace(route, **more) for scope in Scope}


def hashing(number: int, to: tuple[Backend, ...], **more: object) -> dict[Key, Route]:
    return service(number, to, algorithm=Algorithm.MAGLEV, **more)


def writer(maps: FakeMaps, cap: int = 131071) -> Writer:
    return Writer(maps, FACTS, time.monotonic, cap=cap)


def table_of(maps: FakeMaps, number: int, scope: Scope = Scope.INTERNAL) -> tuple[int, int]:
    """First slot and size of the table that a Service's row names."""
    row = maps.tables["frontends"][pack_frontend(Frontend(f"172.30.0.{number}", 80, Protocol.TCP))]
    fields = ROUTE.unpack_from(row, scope * ROUTE.size)
    return fields[5], fields[11]


# ---- Tables of consistent hashing


def test_two_algorithms_share_one_set() -> None:
    """Its table lives as long as one of the two routes hashes."""
    maps = FakeMaps()
    node = writer(maps)
    rows = hashing(1, backends(1, 2))
    inside, outside = rows
    plain = msgspec.structs.replace(rows[outside], algorithm=Algorithm.RANDOM)
    table = RouteTable({**rows, outside: plain})
    node.sync(table)
    assert (table_of(maps, 1)[1], table_of(maps, 1, Scope.EXTERNAL)[1]) == (1, 0)
    assert len(maps.tables["slots"]) == 2 and len(maps.tables["tables"]) == 1
    assert node.state() == table
    node.sync(table.evolve({inside: plain}))
    assert maps.tables["tables"] == {} and left_over(maps) == []


def test_a_large_table_has_many_parts() -> None:
    """300 backends: 60000 positions and more, of 1024 to a part, and the last part ends in zeros."""
    maps = FakeMaps({"slots": 4000, "backends": 2000})
    node = writer(maps)
    assert node.sync(RouteTable(hashing(1, backends(*range(300))))).complete
    start, code = table_of(maps, 1)
    assert code == 7 and len(maps.tables["tables"]) == 64
    interpret(maps)
    assert not maps.tables["tables"][TABLE_KEY.pack(start, 63)][-2 * (65536 - 65521) :].strip(b"\0")
    node.sync(RouteTable())
    assert maps.tables["tables"] == {}


def test_another_cap_is_another_table_in_other_slots() -> None:
    """Rows that name the old one find it whole until they are switched."""
    maps = FakeMaps()
    routes = RouteTable(hashing(1, backends(*range(30))))
    writer(maps, cap=1021).sync(routes)
    old = table_of(maps, 1)
    report = writer(maps).sync(routes)
    new = table_of(maps, 1)
    assert report.complete and (old[1], new[1]) == (1, 3)
    assert old[0] != new[0] and left_over(maps) == []
    writes = maps.writes
    assert writer(maps).sync(routes).complete and maps.writes == writes


def test_a_draining_backend_is_in_no_table() -> None:
    maps = FakeMaps()
    left = (*backends(1, 2), msgspec.structs.replace(backends(3)[0], state=BackendState.DRAINING))
    assert writer(maps).sync(RouteTable(hashing(1, left))).complete
    interpret(maps)  # the table names the active ones, all of them and nobody else
    assert len(maps.tables["slots"]) == 3


def test_no_room_for_a_table_costs_its_service_nothing_but_that() -> None:
    """It has the backends that it should have, at random; a retry writes nothing, and its table comes with room."""
    maps = FakeMaps({"tables": 2})
    node = writer(maps)
    routes = RouteTable({**hashing(1, backends(1)), **hashing(2, backends(2)), **service(3, backends(3))})
    assert node.sync(routes).complete
    wanted = routes.evolve(hashing(3, backends(3, 4)))
    report = node.sync(wanted)
    assert [(problem.subject, problem.reason) for problem in report.problems] == [
        ("default/s3:http", "the map tables is full (2 entries): its backends are chosen at random")
    ]
    assert node.state() == routes.evolve(service(3, backends(3, 4)))
    writes = maps.writes
    assert node.sync(wanted).failed == 1 and maps.writes == writes
    wanted = wanted.evolve({}, list(hashing(1, ())))
    for _ in range(2):  # the first frees what the second takes
        report = node.sync(wanted)
    assert report.complete and node.state() == wanted and left_over(maps) == []


class Stubborn(FakeMaps):
    """Refuses to write to some maps, or to remove from them."""

    puts: tuple[str, ...] = ()
    removals: tuple[str, ...] = ()

    def put(self, table: str, keys: bytes, values: bytes) -> Mapping[int, int]:
        if table in self.puts:
            return dict.fromkeys(range(len(keys) // SIZES[table][0]), errno.ENOMEM)
        return super().put(table, keys, values)

    def remove(self, table: str, keys: bytes) -> Mapping[int, int]:
        if table in self.removals:
            return dict.fromkeys(range(len(keys) // SIZES[table][0]), errno.EAGAIN)
        return super().remove(table, keys)


@pytest.mark.parametrize(
    ("refused", "more"),
    [
        ("tables", {"algorithm": Algorithm.MAGLEV}),
        ("members", {"affinity_seconds": 60}),
    ],
)
def test_a_row_comes_only_with_what_it_needs(refused: str, more: dict[str, object]) -> None:
    """The kernel has no memory just now: the frontend keeps its old row, and the next sync brings the new one."""
    maps = Stubborn()
    node = writer(maps)
    routes = RouteTable(service(1, backends(1, 2)))
    node.sync(routes)
    before = interpret(maps)
    maps.puts = (refused,)
    wanted = routes.evolve(service(1, backends(1, 2), **more))
    report = node.sync(wanted)
    assert [problem.subject for problem in report.problems] == ["default/s1:http"]
    assert interpret(maps) == before
    maps.puts = ()
    assert node.sync(wanted).complete and node.state() == wanted
    interpret(maps)
    assert left_over(maps) == []


@pytest.mark.parametrize("number", [1, 2])
def test_no_row_comes_without_its_addresses_bit(number: int) -> None:
    """A frontend's or an owner's: nobody would look for it. Who has the bit already is not concerned."""
    maps = Stubborn()
    node = writer(maps)
    routes = RouteTable(service(1, backends(1)))
    node.sync(routes)
    maps.puts = ("known",)
    here = f"172.30.0.{number}"
    wanted = routes.evolve(service(number, backends(1, 2)), owned={here: ServiceName("default", f"s{number}")})
    assert node.sync(wanted).failed == (0 if number == 1 else 2)
    interpret(maps)
    maps.puts = ()
    assert node.sync(wanted).complete and node.state() == wanted and node.state().owned == wanted.owned
    assert left_over(maps) == []


def test_where_tables_are_full_a_backend_that_left_is_left_at_once() -> None:
    """Old table and new one do not fit together: meanwhile the others are chosen at random, and by the next sync from
    a table again."""
    maps = FakeMaps({"tables": 1})
    node = writer(maps)
    routes = RouteTable(hashing(1, backends(1, 2, 3)))
    assert node.sync(routes).complete
    wanted = routes.evolve(hashing(1, backends(1, 3)))
    assert node.sync(wanted).failed == 1
    assert node.state() == RouteTable(service(1, backends(1, 3)))
    assert node.sync(wanted).complete and node.state() == wanted and left_over(maps) == []


def test_what_is_left_of_a_table_is_not_forgotten_with_a_set_that_came_to_nothing() -> None:
    maps = Stubborn({"slots": 4, "ranges": 1})
    node = writer(maps)
    node.sync(RouteTable(hashing(1, backends(1, 2, 3, 4))))
    maps.removals = ("tables",)
    assert node.sync(RouteTable()).failed
    limited = hashing(2, backends(5, 6, 7, 8), source_ranges=("10.0.0.0/8", "203.0.113.0/24"))
    assert {problem.subject for problem in node.sync(RouteTable(limited)).problems} == {"default/s2:http", "node"}
    maps.removals = ()
    node.sync(RouteTable(limited))
    assert maps.tables["tables"] == {}


def test_what_is_left_of_a_table_is_not_removed_from_under_a_new_set() -> None:
    """The slots of a set that went are taken again while its parts could not be removed."""
    maps = Stubborn({"slots": 4})
    node = writer(maps)
    node.sync(RouteTable(hashing(1, backends(1, 2, 3, 4), affinity_seconds=60)))
    maps.removals = ("tables", "members")
    assert node.sync(RouteTable()).failed
    wanted = RouteTable(hashing(2, backends(5, 6, 7, 8), affinity_seconds=60))
    node.sync(wanted)
    maps.removals = ()
    assert node.sync(wanted).complete
    interpret(maps)
    assert node.state() == wanted and left_over(maps) == []


def test_an_audit_of_tables_as_written_fills_none(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = FakeMaps()
    node = writer(maps)
    node.sync(RouteTable({**hashing(1, backends(1, 2)), **hashing(2, backends(3))}))
    monkeypatch.setattr("ebpflb.dataplane.bpf.maglev.positions", lambda *_: pytest.fail("a table was filled"))
    for _ in range(2):
        report = node.audit()
        assert (report.written, report.removed, report.failed) == (0, 0, 0)


# ---- Members: where clients find their backends again


def test_members_are_the_active_backends_of_services_that_keep_clients() -> None:
    maps = FakeMaps()
    left = (*backends(1, 2), msgspec.structs.replace(backends(3)[0], state=BackendState.DRAINING))
    node = writer(maps)
    keeping = RouteTable({**service(1, left, affinity_seconds=60), **service(2, backends(4))})
    node.sync(keeping)
    assert sorted(maps.tables["members"].values()) == [U32.pack(0), U32.pack(1)]
    node.sync(keeping.evolve(service(1, left)))
    assert maps.tables["members"] == {}


def test_only_services_that_keep_no_clients_are_forgotten() -> None:
    maps = FakeMaps()
    for number in range(1, 4):
        maps.put("affinity", AFFINITY_KEY.pack(bytes(16), number, 0), AFFINITY.pack(1, 0, 0))
    assert forget_clients(maps, lambda id: id == 2) == {}
    assert [AFFINITY_KEY.unpack(key)[1] for key in maps.tables["affinity"]] == [2]


def test_clients_are_looked_for_only_when_a_service_lets_go_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map may have any number of rows: no change of anything else costs a look at them."""
    maps = FakeMaps()
    node = writer(maps)
    routes = RouteTable({**service(1, backends(1), affinity_seconds=60), **service(2, backends(2))})
    node.sync(routes)
    looks: list[str] = []
    read = maps.read

    def watched(table: str) -> tuple[bytes, bytes]:
        looks.append(table)
        return read(table)

    monkeypatch.setattr(maps, "read", watched)
    routes = routes.evolve(service(1, backends(1, 3), affinity_seconds=90))
    node.sync(routes)
    routes = routes.evolve(service(3, backends(4)), list(service(2, ())))
    node.sync(routes)
    assert looks == []
    node.sync(routes.evolve(service(1, backends(1))))
    assert looks == ["affinity"]


# ---- Addresses


def test_the_bit_of_an_address_is_the_programs() -> None:
    for text in ("172.30.0.41", "fd00:30::41", "::1", "255.255.255.255", "2001:db8:1:2:3:4:5:6"):
        assert known_bit(packed(text)) == bit_of(packed(text))
    assert known_bit(packed("172.30.0.41") + bytes(4)) == bit_of(packed("172.30.0.41"))


def test_a_bit_goes_with_the_last_row_behind_it() -> None:
    """Two rows of one address, or of two addresses of one hash."""
    known = Known()
    cells = known.needed([64 * 3 + 5])
    assert cells == {3: 1 << 5}
    known.wrote(cells)
    known.add(64 * 3 + 5)
    known.add(64 * 3 + 5)
    known.drop(64 * 3 + 5)
    assert known.surplus() == {}
    known.drop(64 * 3 + 5)
    assert known.surplus() == {3: 0}


def test_neighbours_in_a_cell_stay() -> None:
    known = Known(U64.pack(0b110) + bytes(16383 * 8))
    known.add(1)
    known.suspect_all()
    assert known.surplus() == {0: 0b010}


def test_an_address_that_two_services_have_in_turn_is_never_nobodys() -> None:
    maps = FakeMaps()
    node = writer(maps)
    here = "172.30.0.1"
    routes = RouteTable(service(1, backends(1)), owned={here: ServiceName("default", "a")})
    node.sync(routes)
    report = node.sync(routes.evolve({}, owned={here: ServiceName("default", "b")}))
    assert (report.written, report.removed) == (1, 0)
    assert dict(node.state().owned) == {here: ServiceName("default", "b")}
    node.sync(routes.evolve({}, list(service(1, ()))))
    assert list(known_bits(maps)) == [bit_of(packed(here))], "it is owned, whatever frontends it has"


def test_a_name_that_no_row_can_hold_is_its_services_own_problem() -> None:
    maps = FakeMaps()
    owned = {"172.30.0.1": ServiceName("default", "s" * 64), "172.30.0.2": ServiceName("default", "b")}
    node = writer(maps)
    report = node.sync(RouteTable({}, owned=owned))
    assert [problem.subject for problem in report.problems] == ["default/" + "s" * 64]
    assert set(node.state().owned) == {"172.30.0.2"}


def test_a_change_of_one_owner_looks_at_no_other() -> None:
    """Tables that evolved say what they changed."""
    many = {f"172.30.1.{at}": ServiceName("default", f"s{at}") for at in range(200)}
    table = RouteTable({}, owned=many)
    more = table.evolve({}, owned={"172.30.2.1": ServiceName("a", "b")})
    assert more.owned_changed_from(table) == {"172.30.2.1"}
    first = RouteTable(service(1, backends(1)), owned=many)
    assert first.evolve({}).owned_changed_from(first) == frozenset()
    assert first.evolve({}, owned={"172.30.1.7": None}).owned_changed_from(first) == {"172.30.1.7"}
    assert RouteTable({}).owned_changed_from(first) == many.keys()


@pytest.mark.parametrize(
    ("table", "reason"),
    [("sources", "an address of the node or its pods: "), ("settings", "the settings: ")],
)
def test_what_tells_local_clients_is_tried_again_where_it_was_refused(table: str, reason: str) -> None:
    """It is the node's problem; Services come all the same."""
    maps = Stubborn()
    node = writer(maps)
    routes = RouteTable(service(1, backends(1)))
    node.sync(routes)
    maps.puts = (table,)
    wanted = routes.evolve(service(2, backends(2)), locality=Locality(("192.168.0.2",), ("10.180.0.0/24",), "cali*"))
    report = node.sync(wanted)
    assert {problem.subject for problem in report.problems} == {"node"}
    assert all(problem.reason.startswith(reason) for problem in report.problems)
    assert dict(node.state()) == dict(wanted) and node.state().locality != wanted.locality
    assert node.sync(wanted).failed == report.failed, "it is said as long as it is so"
    maps.puts = ()
    assert node.sync(wanted).complete and node.state() == wanted


def test_who_is_no_pod_any_more_stays_one_only_as_long_as_the_kernel_refuses() -> None:
    maps = Stubborn()
    node = writer(maps)
    routes = RouteTable(service(1, backends(1)), Locality(("192.168.0.2",), ("10.180.0.0/24",)))
    node.sync(routes)
    maps.removals = ("sources",)
    wanted = routes.evolve({}, locality=Locality(("192.168.0.2",)))
    report = node.sync(wanted)
    assert report.failed and node.state().locality.pod_cidrs == ("10.180.0.0/24",)
    maps.removals = ()
    assert node.sync(wanted).complete and node.state() == wanted
