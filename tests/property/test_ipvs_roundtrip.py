"""Routes of any cluster, as rows of IPVS and back."""

from __future__ import annotations

import time

from hypothesis import given

from ebpflb.commands.look import owner_differences
from ebpflb.dataplane.ipvs.names import SET_NAMES, Mark, Set
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.reading import Held, routes
from ebpflb.dataplane.ipvs.table import Entry, EntryValue
from ebpflb.dataplane.ipvs.writer import Writer
from ebpflb.policy import routes as routes_of
from ebpflb.routes import RouteTable
from tests.ipvs import FakeKernel, FakeTables, with_sets
from tests.plan.worlds import World, worlds


class Standing:
    """A writer over a kernel in memory."""

    def __init__(self, table: RouteTable) -> None:
        self.kernel = with_sets(FakeKernel(table.locality.node_addresses))
        self.tables = {4: FakeTables(), 6: FakeTables()}
        self.writer = self.successor()

    def successor(self) -> Writer:
        return Writer(self.kernel, self.tables, IpvsOptions(), Mark(), time.monotonic)

    def state(self) -> RouteTable:
        return routes(self.held())

    def held(self) -> Held:
        return Held(
            self.kernel.servers(),
            self.kernel.destinations(self.kernel.servers()),
            {pair: self.kernel.entries(*pair) for pair in SET_NAMES.values()},
            self.kernel.bound,
            self.kernel.node_addresses,
            {version: each.read() for version, each in self.tables.items()},
        )

    def contents(self) -> tuple[object, ...]:
        """Everything that is in the kernel but for the marks' numbers."""
        return (self.kernel.contents, self.kernel.held, self.kernel.places, self.kernel.bound, self.tables[4].chains)


@given(worlds)
def test_what_was_written_is_read_back(world: World) -> None:
    """Invariant: `state() == routes`, and a second sync, also another process's, writes nothing."""
    table = routes_of(*world)
    standing = Standing(table)
    report = standing.writer.sync(table)
    assert report.complete, report.problems
    assert standing.state() == table and not owner_differences(table, standing.state())
    again = standing.writer.sync(table)
    assert (again.written, again.removed) == (0, 0)
    other = standing.successor().sync(table)
    assert (other.written, other.removed) == (0, 0)


@given(worlds, worlds)
def test_a_change_leads_where_a_fresh_start_leads(world: World, next: World) -> None:
    """Invariant: after a sync of another table the kernel holds that, and nothing of the first."""
    first, second = routes_of(*world), routes_of(*next)
    second = RouteTable(dict(second.items()), first.locality, health=second.health, owned=second.owned)
    standing = Standing(first)
    standing.writer.sync(first)
    report = standing.writer.sync(second)
    assert report.complete, report.problems
    assert standing.state() == second
    audit = standing.writer.audit()
    assert (audit.written, audit.removed) == (0, 0)
    fresh = Standing(first)
    fresh.writer.sync(second)
    assert _without_marks(standing) == _without_marks(fresh)


def _without_marks(standing: Standing) -> dict[object, object]:
    """The rows, in which a mark is only told from none."""

    def plain(entry: Entry, value: EntryValue) -> object:
        if isinstance(value, str):
            return value.split(" parked=")[0]
        return "mark" if entry[0] is Set.MARKS else value

    held = standing.held()
    entries: dict[object, object] = {
        (each, version, key): plain((each, version, key), value)
        for (each, version), found in held.entries.items()
        for key, value in found.items()
    }
    servers = {server: settings for server, settings in held.servers.items() if not server.mark}
    marked = sorted(str(settings) for server, settings in held.servers.items() if server.mark)
    return entries | dict(servers) | {"marked": marked, "addresses": held.addresses}
