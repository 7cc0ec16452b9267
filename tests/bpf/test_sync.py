"""The BPF dataplane on a kernel's maps: what `Dataplane` promises, with the loader, the pins and the batches for real.

Rules of this file: each test has a network namespace, a cgroup and a pin directory of its own, all removed whatever
happens. What the maps hold is read by a second dataplane that has nothing but the pins, as `dump` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from ebpflb.dataplane.bpf import facts, pins, program_calls, syscall
from ebpflb.dataplane.bpf.constants import Sizes
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.dataplane.bpf.layouts import AFFINITY, AFFINITY_KEY, CLIENT_NETNS, ROUTE, U32
from ebpflb.dataplane.bpf.layouts import SIZES as SIZES_OF
from ebpflb.dataplane.bpf.maps import KernelMaps
from ebpflb.dataplane.bpf.tables import pack_frontend
from ebpflb.errors import UserError
from ebpflb.model import Protocol
from ebpflb.routes import (
    Algorithm,
    BackendState,
    Frontend,
    Key,
    Kind,
    Locality,
    Route,
    RouteTable,
    Verdict,
    cidr_order,
)
from tests.bpf.dataplanes import (
    BIGGER,
    LOCALITY,
    ROOMY,
    SIDE,
    SIZES,
    Node,
    carried,
    own_namespace,
    own_node,
    rows,
    service,
    table,
)
from tests.bpf.namespaces import Namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with own_namespace() as made:
        yield made


@pytest.fixture
def node(namespace: Namespace) -> Iterator[Node]:
    with own_node() as made:
        yield made


def rich(count: int) -> RouteTable:
    """As `table`, with everything that a Service can ask for: a third hashes consistently, a third keeps clients, and
    every cluster IP is owned."""
    found: dict[Key, Route] = {}
    for number in range(count):
        found |= asking(number, hashing=number % 3 == 1, keeping=number % 3 == 2)
    owned = {frontend.address: each.service.service for (frontend, _), each in found.items()}
    return RouteTable(found, LOCALITY, owned=owned)


def asking(number: int, count: int = 2, *, hashing: bool = False, keeping: bool = False) -> dict[Key, Route]:
    algorithm = Algorithm.MAGLEV if hashing else Algorithm.RANDOM
    return {
        key: msgspec.structs.replace(route, algorithm=algorithm, affinity_seconds=60 if keeping else 0)
        for key, route in rows(number, count).items()
    }


@pytest.mark.parametrize("kind", [table, rich])
def test_what_is_synced_is_what_is_held(node: Node, kind: Callable[[int], RouteTable]) -> None:
    """state() == routes, read by another process from the pins; a second sync and a restart write nothing."""
    routes = kind(6)
    dataplane = node.started()
    assert dataplane.state() == RouteTable()
    report = dataplane.sync(routes)
    assert report.complete and report.written
    assert dataplane.state() == routes
    assert node.dataplane().state() == routes
    again = dataplane.sync(routes)
    assert (again.written, again.removed, again.failed) == (0, 0, 0)
    assert node.dataplane().state().owned == routes.owned
    restarted = node.restarted()
    fresh = restarted.sync(RouteTable(dict(routes), LOCALITY, owned=routes.owned))
    assert (fresh.written, fresh.removed, fresh.failed) == (0, 0, 0)
    audit = restarted.audit()
    assert (audit.written, audit.removed, audit.failed) == (0, 0, 0)


def test_changes_while_down_cost_the_change(node: Node) -> None:
    """One Service less and one backend more: its row, its set of three slots, one frontend; one name and one frontend
    and two backends gone, and an address' bit."""
    routes = table(4)
    node.started().sync(routes)
    gone = [key for key in routes if routes[key].service == service(3)]
    changed = routes.evolve(rows(2, 3), gone)
    dataplane = node.restarted()
    report = dataplane.sync(changed)
    assert (report.written, report.removed, report.failed) == (1 + 3 + 1 + 2 + 1, 2, 0)
    assert dataplane.state() == changed


def test_every_kind_of_change(node: Node) -> None:
    """Drain, verdict, locality, removal: each is held exactly, one after the other."""
    dataplane = node.started()
    routes = table(4)
    drained = {
        key: msgspec.structs.replace(
            route,
            backends=(route.backends[0], msgspec.structs.replace(route.backends[1], state=BackendState.DRAINING)),
        )
        for key, route in rows(1).items()
    }
    refused = {key: Route(service(2), Kind.CLUSTER_IP, Verdict.REJECT) for key in rows(2)}
    steps = [
        routes,
        (routes := routes.evolve(drained)),
        (routes := routes.evolve(refused)),
        (routes := routes.evolve({}, locality=Locality(("192.168.0.3",), ("::/0",)))),
        (routes := routes.evolve({}, list(rows(0)))),
        RouteTable(),
    ]
    for step in steps:
        report = dataplane.sync(step)
        assert report.complete, report.problems
        assert dataplane.state() == step


@pytest.mark.parametrize("full", ["frontends", "services", "backends", "slots", "ranges"])
def test_a_full_map_costs_only_those_that_do_not_fit(node: Node, full: str) -> None:
    """Room for six of nine: those that fit are served and keep being served, the others are named."""
    count = 6
    exact = {"frontends": count, "services": count, "backends": 2 * count + 1, "slots": 2 * count, "ranges": 2 * count}
    found: dict[Key, Route] = {}
    for number in range(count + 3):
        cidrs = (f"2001:db8:{number}::/48", "fd00::/8") if number % 2 else ("10.0.0.0/8", f"203.0.{number}.0/24")
        found |= rows(number, source_ranges=tuple(sorted(cidrs, key=cidr_order)) if full == "ranges" else ())
    dataplane = node.started(Sizes(**{**ROOMY, full: exact[full]}, **SIDE))
    report = dataplane.sync(RouteTable(found, LOCALITY))
    assert report.failed == 3
    name = {"services": "names"}.get(full, full)
    assert all(f"the map {name} is full" in problem.reason for problem in report.problems)
    held = dataplane.state()
    assert len(held) == 2 * count
    assert all(found[key] == route for key, route in held.items())
    served = {str(route.service) for route in held.values()}
    assert not served & {problem.subject for problem in report.problems}

    fewer = {key: route for key, route in found.items() if str(route.service) not in sorted(served)[:3]}
    for _ in range(2):  # the first frees what the second takes
        report = dataplane.sync(RouteTable(fewer, LOCALITY))
    assert report.complete
    assert dataplane.state() == RouteTable(fewer, LOCALITY)


def _remove_frontend(maps: KernelMaps) -> None:
    maps.remove("frontends", pack_frontend(next(iter(rows(0)))[0]))


def _foreign_frontend(maps: KernelMaps) -> None:
    maps.put("frontends", pack_frontend(Frontend("192.0.2.1", 1, Protocol.TCP)), ROUTE.pack(*[0] * 4, 99, *[0] * 7) * 2)


def _disown(maps: KernelMaps) -> None:
    keys, _ = maps.read("owned")
    maps.remove("owned", keys[:16])


def _own_what_is_nobodys(maps: KernelMaps) -> None:
    maps.put("owned", bytes(16), bytes(128))


def _know_nothing(maps: KernelMaps) -> None:
    cells = maps.read_array("known", 0, maps.capacity["known"])
    for at in range(len(cells) // 8):
        if cells[at * 8 : at * 8 + 8].strip(b"\0"):
            maps.put("known", U32.pack(at), bytes(8))


def _know_everything(maps: KernelMaps) -> None:
    maps.put("known", U32.pack(7), b"\xff" * 8)


def _tear_table(maps: KernelMaps) -> None:
    keys, values = maps.read("tables")
    maps.put("tables", keys[:8], values[:2048][::-1])


def _lose_table(maps: KernelMaps) -> None:
    keys, _ = maps.read("tables")
    maps.remove("tables", keys[:8])


def _lose_member(maps: KernelMaps) -> None:
    keys, _ = maps.read("members")
    maps.remove("members", keys[:8])


def _leave_rows_of_sets(maps: KernelMaps) -> None:
    maps.put("tables", U32.pack(70) + U32.pack(0), bytes(2048))
    maps.put("members", U32.pack(70) + U32.pack(1), bytes(4))


def _move_backend(maps: KernelMaps) -> None:
    row = bytearray(maps.read_array("backends", 1, 1))
    row[15] ^= 1
    maps.put("backends", U32.pack(1), bytes(row))


def _lose_name(maps: KernelMaps) -> None:
    maps.remove("names", U32.pack(1))


def _lose_range(maps: KernelMaps) -> None:
    keys, _ = maps.read("ranges")
    maps.remove("ranges", keys[:24])


def _lose_source(maps: KernelMaps) -> None:
    keys, _ = maps.read("sources")
    maps.remove("sources", keys[:20])


def _zero_settings(maps: KernelMaps) -> None:
    maps.put("settings", U32.pack(0), bytes(64))


DAMAGE = [
    _remove_frontend,
    _foreign_frontend,
    _move_backend,
    _lose_name,
    _lose_range,
    _lose_source,
    _zero_settings,
    _disown,
    _own_what_is_nobodys,
    _know_nothing,
    _know_everything,
    _tear_table,
    _lose_table,
    _lose_member,
    _leave_rows_of_sets,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_audit_repairs_what_somebody_changed(node: Node, damage: Callable[[KernelMaps], None]) -> None:
    dataplane = node.started()
    limited = rows(0, source_ranges=("10.0.0.0/8", "203.0.113.0/24"))
    routes = rich(4).evolve(limited)
    dataplane.sync(routes)
    with opened(node, *DESIRED) as maps:
        before = held(maps)
        damage(maps)
        assert held(maps) != before
        report = dataplane.audit()
        assert report.complete and report.written + report.removed
        assert dataplane.state() == routes and dataplane.state().owned == routes.owned
        after = held(maps)
        for each in ("owned", "known", "sources", "settings"):
            assert after[each] == before[each]
        for each in ("tables", "members"):  # a Service that was lost is made anew, in other slots
            assert len(after[each]) == len(before[each])
    quiet = dataplane.audit()
    assert (quiet.written, quiet.removed) == (0, 0)


DESIRED = (
    "frontends",
    "backends",
    "names",
    "ranges",
    "sources",
    "settings",
    "owned",
    "known",
    "tables",
    "members",
    "affinity",
)


@contextmanager
def opened(node: Node, *names: str) -> Iterator[KernelMaps]:
    """The pinned maps of these names."""
    descriptors = {name: syscall.obj_get(str(node.bpffs / pins.MAPS / name)) for name in names}
    try:
        yield KernelMaps(descriptors)
    finally:
        for fd in descriptors.values():
            os.close(fd)


def held(maps: KernelMaps) -> dict[str, frozenset[tuple[bytes, bytes]]]:
    """All rows by map."""
    found = {}
    for name in DESIRED:
        keys, values = maps.read(name)
        width, size = SIZES_OF[name]
        count = len(keys) // width
        found[name] = frozenset(
            (keys[at * width : (at + 1) * width], values[at * size : (at + 1) * size]) for at in range(count)
        )
    return found


def test_the_algorithm_of_a_live_service_changes_by_one_row(node: Node) -> None:
    """The table is there before the row that names it, the slots stay as they are, and nothing is left of it after."""
    plain, hashing = asking(1), asking(1, hashing=True)
    dataplane = node.started()
    routes = RouteTable(plain, LOCALITY)
    dataplane.sync(routes)
    with opened(node, "slots", "tables", "frontends") as maps:
        slots = maps.read_array("slots", 0, 80)
        routes = routes.evolve(hashing)
        report = dataplane.sync(routes)
        assert (report.written, report.removed, report.failed) == (1 + 1, 0, 0)
        assert dataplane.state() == routes
        assert maps.read_array("slots", 0, 80) == slots
        report = dataplane.sync(routes.evolve(plain))
        assert (report.written, report.removed, report.failed) == (1, 1, 0)
        assert maps.read("tables")[0] == b"" and maps.read_array("slots", 0, 80) == slots


def test_no_room_for_a_table_costs_its_service_alone(node: Node) -> None:
    """It chooses at random, is named, and has its table once there is room."""
    dataplane = node.started(Sizes(**{**ROOMY, "tables": 2}, **SIDE))
    routes = RouteTable({**asking(0, hashing=True), **asking(1, hashing=True), **asking(2)}, LOCALITY)
    assert dataplane.sync(routes).complete
    wanted = routes.evolve(asking(2, hashing=True))
    for _ in range(2):
        report = dataplane.sync(wanted)
        assert report.failed == 1
        assert {problem.subject: problem.reason for problem in report.problems} == {
            "default/s2:http": "the map tables is full (2 entries): its backends are chosen at random"
        }
        assert dataplane.state() == routes
    wanted = wanted.evolve({}, list(rows(0)))
    for _ in range(2):  # the first frees what the second takes
        report = dataplane.sync(wanted)
    assert report.complete and dataplane.state() == wanted


def test_clients_are_forgotten_with_their_services_affinity(node: Node) -> None:
    """Switched off, or gone with the Service; who keeps its clients keeps them, over a restart too."""
    routes = RouteTable({**asking(0, keeping=True), **asking(1, keeping=True), **asking(2, keeping=True)}, LOCALITY)
    dataplane = node.started()
    dataplane.sync(routes)
    ids = {row["service"]["name"]: row["id"] for row in dataplane.tables("services")}  # type: ignore[index]
    with opened(node, "affinity") as maps:
        for name in ids:
            key = AFFINITY_KEY.pack((4026531840).to_bytes(8, "little"), ids[name], CLIENT_NETNS)
            maps.put("affinity", key, AFFINITY.pack(1, 0, facts.jiffies()))
    assert {row["service"]["name"] for row in dataplane.tables("affinity")} == {"s0", "s1", "s2"}  # type: ignore[index]
    routes = routes.evolve(asking(0), list(rows(1)))
    dataplane.sync(routes)
    (left,) = dataplane.tables("affinity")
    assert (left["service"], left["client"]) == (
        {"namespace": "default", "name": "s2", "port": "http"},
        "netns:4026531840",
    )
    fresh = node.restarted()
    fresh.sync(RouteTable(dict(routes), LOCALITY))
    assert [row["client"] for row in fresh.tables("affinity")] == ["netns:4026531840"]


def test_what_an_ebpflb_with_other_pins_left_serves_until_there_are_rows(
    node: Node, namespace: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Then ours take its place, and it is said whose that was."""
    older = node.started()
    older.sync(table(2))
    older.close()
    elsewhere = node.bpffs
    node.bpffs = Path(f"{elsewhere}-other")
    try:
        caplog.clear()
        newer = node.started()
        assert running(node) == pinned(elsewhere)
        newer.sync(table(2))
        assert running(node) == pinned(node.bpffs) != pinned(elsewhere)
        newer.audit()
        assert [
            record.getMessage().partition(",")[0] for record in caplog.records if record.levelname == "WARNING"
        ] == [
            f"cgroup {node.cgroup}: replaced the socket programs of the ebpflb with --bpffs {elsewhere}",
        ]
    finally:
        pins.remove_all(elsewhere)


def running(node: Node) -> tuple[int, ...]:
    """Which programs lead connects of IPv4."""
    fd = os.open(node.cgroup, os.O_RDONLY)
    try:
        return program_calls.prog_query(fd, 10)[1]
    finally:
        os.close(fd)


def pinned(bpffs: Path) -> tuple[int, ...]:
    return tuple(pin.id for pin in pins.ours(bpffs) if pin.kind == pins.PROGRAMS and pin.path.name == "connect4")


def test_what_is_left_to_a_successor_owns_nothing(node: Node) -> None:
    """Ports of a cluster IP are refused by whoever carries it: not by us any more."""
    dataplane = node.started()
    dataplane.sync(rich(3))
    assert dataplane.retire()
    state = dataplane.state()
    assert len(state) == 0 and len(state.owned) == 0
    with opened(node, "known") as maps:
        assert not maps.read_array("known", 0, maps.capacity["known"]).strip(b"\0")


def test_audit_attaches_again_what_somebody_detached(node: Node) -> None:
    dataplane = node.started()
    dataplane.sync(table(1))
    before = set(dataplane.inventory())
    (node.bpffs / pins.LINKS / "connect4").unlink()
    assert not any("links/connect4" in line for line in dataplane.inventory())
    assert dataplane.audit().written == 1
    assert len(dataplane.inventory()) == len(before)


def test_audit_pins_again_what_somebody_unpinned(node: Node) -> None:
    """Whoever reads or restarts then finds the tables that are in force."""
    routes = table(2)
    dataplane = node.started()
    dataplane.sync(routes)
    (node.bpffs / pins.MAPS / "frontends").unlink()
    (node.bpffs / pins.PROGRAMS / "tc_egress").unlink()
    assert dataplane.audit().written == 2
    assert node.dataplane().state() == routes
    fresh = node.restarted().sync(routes)
    assert (fresh.written, fresh.removed) == (0, 0)


def test_other_maps_are_filled_before_anything_runs_on_them(node: Node) -> None:
    """An upgrade that makes new maps: the old programs serve from the old maps until the rows are in the new ones."""
    routes = table(3)
    node.started().sync(routes)
    links = {pin.path.name: pin.id for pin in pins.ours(node.bpffs) if pin.kind == pins.LINKS}
    upgraded = node.started(BIGGER)
    running = _attached_programs(node)
    assert upgraded.sync(routes).complete
    assert upgraded.state() == routes
    assert {pin.path.name: pin.id for pin in pins.ours(node.bpffs) if pin.kind == pins.LINKS} == links
    assert not running & _attached_programs(node)


def _attached_programs(node: Node) -> set[int]:
    found = set()
    for pin in pins.ours(node.bpffs):
        if pin.kind == pins.LINKS:
            fd = syscall.obj_get(str(pin.path))
            found.add(program_calls.link_info(fd).program)
            os.close(fd)
    return found


def test_nothing_programmed_is_an_answer(node: Node) -> None:
    dataplane = node.dataplane()
    assert dataplane.inventory() == ()
    assert dataplane.state() == RouteTable()
    assert dataplane.tables("flows") == []


def test_maps_of_another_version_are_not_read_as_ours(node: Node) -> None:
    node.started().sync(table(1))
    (node.bpffs / pins.MAPS / "names").unlink()
    with pytest.raises(UserError, match="the map names is missing"):
        node.dataplane().state()


def test_tables_speak_of_services(node: Node) -> None:
    node.started().sync(table(2))
    reader = node.dataplane()
    name = {"namespace": "default", "name": "s0", "port": "http"}
    services = reader.tables("services")
    assert [row["service"] for row in services][0] == name and len(services) == 2
    assert [row["address"] for row in reader.tables("backends") if row["service"] == name] == [
        "10.180.0.1",
        "10.180.0.2",
    ]
    assert {row["counter"] for row in reader.tables("counters")} >= {"socket_forwarded", "packet_forwarded"}
    assert {row["map"] for row in reader.tables("raw")} >= {"frontends", "slots", "backends", "names", "settings"}
    assert {"cidr": "10.180.0.0/24", "node": False, "pod": True} in reader.tables("sources")
    assert reader.tables("flows") == []


def test_what_a_service_carried_goes_with_its_name(node: Node) -> None:
    """Whoever gets the number next begins at nothing; who stays goes on counting, over a restart too."""
    dataplane = node.started()
    dataplane.sync(table(2))
    assert dataplane.tables("traffic") == []
    ids = {row["service"]["name"]: row["id"] for row in dataplane.tables("services")}  # type: ignore[index]
    for name, cells in (("s0", (1, 10, 100)), ("s1", (2, 20, 200))):
        carried(node, int(ids[name]), *cells)  # type: ignore[call-overload]
    first, second = dataplane.tables("traffic")
    assert first == {
        "service": {"namespace": "default", "name": "s0", "port": "http"},
        "connections": 1,
        "packets": 10,
        "bytes": 100,
        "id": ids["s0"],
    }
    fresh = node.restarted()
    fresh.sync(RouteTable(rows(1), LOCALITY))
    assert fresh.tables("traffic") == [second]
    fresh.sync(table(2))
    assert fresh.tables("traffic") == [second]


def test_counting_can_be_had_later_without_new_maps(node: Node) -> None:
    """Programs are replaced; rows and flows stay."""
    plain = node.started()
    plain.sync(table(2))
    plain.close()
    before = {pin.path.name: pin.id for pin in pins.ours(node.bpffs) if pin.kind == pins.MAPS}
    counting = BpfDataplane(node.bpffs, node.cgroup, sizes=SIZES, count_traffic=True)
    node.made.append(counting)
    counting.start()
    report = counting.sync(table(2))
    assert (report.written, report.removed, report.failed) == (0, 0, 0)
    assert {pin.path.name: pin.id for pin in pins.ours(node.bpffs) if pin.kind == pins.MAPS} == before


def test_cleanup_leaves_nothing(node: Node, namespace: Namespace) -> None:
    namespace.ip("link add veth0 type veth peer name veth1")
    before = namespace.qdiscs()
    dataplane = node.started()
    dataplane.sync(table(2))
    assert len(dataplane.inventory()) > 20
    assert any("veth0" in line for line in dataplane.inventory())
    dataplane.cleanup()
    assert dataplane.inventory() == ()
    assert namespace.qdiscs() == before
    assert not node.bpffs.exists()
