"""Makes the kernel hold a RouteTable: what is written, in which order, and what follows from what is refused.

Rules of this file: `ledger` plans, the kernel's seam does it. The order of every sync is

    entries that protect (masquerade, source ranges, REJECT, DROP), virtual servers, destinations,
    rules, entries that lead to them (marks), addresses,
    and only then, backwards, what nobody asks for any more.

A sync costs its change: the rows of the changed frontends before and after are compared with each other. The first one,
one after a refusal, and an audit read the kernel and compare with that. A destination that goes has weight 0 until its
connections have ended; of UDP, which has none, it goes at once, and so does all of a frontend that is gone.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from ebpflb.dataplane import NODE, Report, RestoreFailure
from ebpflb.dataplane.ipvs import chains, rules
from ebpflb.dataplane.ipvs.ledger import Found, Ledger, Plan
from ebpflb.dataplane.ipvs.messages import DEL_DEST, DEL_SERVICE, Operation
from ebpflb.dataplane.ipvs.names import Mark, Set
from ebpflb.dataplane.ipvs.netlink import Kernel
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.table import Entry, EntryValue, Server, frontend_of, placed, unpacked
from ebpflb.errors import ApplyError
from ebpflb.model import Family, Problem
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.routes import Frontend, RouteTable, Scope

PART = 512
"""Frontends that are planned and written at a time."""

# Who is guarded comes after those whom the guard lets in.
_ADD_ORDER: dict[Set, int] = {each: at for at, each in enumerate(sorted(Set, key=lambda e: e is Set.LOAD_BALANCER_FW))}

Tables = Mapping[int, chains.Tables]


class Tally:
    """What a sync has done so far."""

    def __init__(self) -> None:
        self.written = 0
        self.removed = 0
        self.failed = 0
        self.problems: dict[Problem, None] = {}
        self.restores: list[RestoreFailure] = []

    def refuse(self, problem: Problem) -> None:
        self.failed += 1
        self.problems[problem] = None

    def report(self, seconds: float) -> Report:
        return Report(
            self.written,
            self.removed,
            self.failed,
            seconds,
            tuple(self.problems),
            restore_failures=tuple(self.restores),
        )


class Writer:
    """One process's hold on the kernel. `tables` are the iptables by IP version; `clock` counts seconds."""

    def __init__(
        self, kernel: Kernel, tables: Tables, options: IpvsOptions, mark: Mark, clock: Callable[[], float]
    ) -> None:
        self._kernel = kernel
        self._tables = tables
        self._mark = mark
        self._clock = clock
        self._ledger = Ledger(options, mark)
        self._target: RouteTable | None = None
        self._held: RouteTable | None = None  # what the kernel holds, as far as we know; None if that must be read

    def sync(self, routes: RouteTable) -> Report:
        """Make the kernel hold `routes`."""
        started = self._clock()
        tally = Tally()
        self._target = routes
        held, self._held = self._held, None
        try:
            if held is None or held.locality != routes.locality:
                self._whole(routes, tally)
            else:
                self._change(held, routes, tally)
        except (OSError, ApplyError) as error:
            tally.refuse(Problem(NODE, explained("IPVS cannot be written", error)))
        if not tally.failed:
            self._held = routes
        for problem in self._ledger.refused.values():
            tally.refuse(problem)
        return tally.report(self._clock() - started)

    def audit(self) -> Report:
        """Read the kernel, repair what differs from the last table given to `sync`, and let go of what has ended."""
        if self._target is None:
            return Report()
        self._held = None
        return self.sync(self._target)

    def _change(self, held: RouteTable, routes: RouteTable, tally: Tally) -> None:
        late = Plan()
        for part in _parts(dict.fromkeys(frontend for frontend, _ in routes.changed_from(held))):
            self._give(self._ledger.change(part, held, routes, late), tally)
        self._give(self._ledger.change_health(_health_ports(routes), late), tally)
        self._ledger.count_down(late)
        self._lead(late, tally)
        self._take(late, tally)
        self._reap(late.leaving, tally)

    def _whole(self, routes: RouteTable, tally: Tally) -> None:
        """Read the kernel, and make it hold `routes`."""
        entries = {(each, version): self._kernel.entries(each, version) for each in Set for version in (4, 6)}
        found = Found(entries, self._kernel.servers(), self._kernel.addresses()[0])
        self._ledger.begin(found)
        late = Plan()
        for part in _parts(dict.fromkeys(frontend for frontend, _ in routes)):
            wanted = self._ledger.wanted(part, routes)
            places = self._kernel.destinations(
                [server for rows in wanted.values() for server in rows.servers if server in found.servers]
            )
            self._give(self._ledger.meet(wanted, found, places, late), tally)
        self._give(self._ledger.meet_health(_health_ports(routes), found), tally)
        self._lead(late, tally, routes)
        self._ledger.leave(self._kernel.destinations(self._ledger.unwanted(found)), found, routes, late)
        self._take(late, tally)
        self._reap(set(self._ledger.leaving), tally)
        self._ledger.marks.keep(routes, self._ledger.leaving)

    def _reap(self, servers: Collection[Server], tally: Tally) -> None:
        """Let go of the destinations whose connections have ended."""
        if servers:
            self._take(self._ledger.reap(self._kernel.destinations(servers)), tally)

    # ---- Writing

    def _give(self, plan: Plan, tally: Tally) -> None:
        """Entries that protect, then virtual servers and destinations."""
        self._add(plan.entries, tally)
        self._operate(plan.servers, tally)

    def _lead(self, plan: Plan, tally: Tally, routes: RouteTable | None = None) -> None:
        """What brings traffic to what has been given. Where another dataplane of ours or kube-proxy still has the
        rules, they carry all connections until everything else is ready; else they must be there before the first.
        Rules are looked at where `routes` are given."""
        before: dict[int, Ruleset] = {}
        if routes is not None:
            before = {version: tables.read() for version, tables in self._tables.items()}
        late = any("KUBE-SERVICES" in found.get("nat", {}) and not rules.is_ours(found) for found in before.values())
        if routes is not None and not late:
            self._write_rules(routes, before, tally)
        self._add(plan.marks, tally)
        self._bind(plan.bind, tally, add=True)
        if routes is not None and late:
            self._write_rules(routes, before, tally)

    def _write_rules(self, routes: RouteTable, before: Mapping[int, Ruleset], tally: Tally) -> None:
        for version, found in before.items():
            wanted = rules.ruleset(routes.locality, version, self._mark)
            try:
                tally.written += chains.put(self._tables[version], wanted, found)
            except ApplyError as error:
                tally.refuse(Problem(NODE, str(error)))
                tally.restores.append(RestoreFailure(Family(version), False))

    def _take(self, plan: Plan, tally: Tally) -> None:
        """Backwards: what leads there, addresses, entries, virtual servers."""
        steering = [entry for entry in plan.gone_entries if entry[0] is Set.MARKS]
        self._delete(steering, tally)
        self._bind(plan.unbind, tally, add=False)
        self._delete([entry for entry in plan.gone_entries if entry[0] is not Set.MARKS], tally)
        self._operate(plan.gone_servers, tally)
        for mark in plan.freed:  # not before its virtual server is gone
            self._ledger.marks.release(mark)

    def _add(self, entries: Mapping[Entry, EntryValue], tally: Tally) -> None:
        for (each, version), found in _by_set(entries, _ADD_ORDER.__getitem__).items():
            values = {key: entries[each, version, key] for key in found}
            self._count_entries(self._kernel.change(each, version, values, add=True), each, version, values, tally)

    def _delete(self, entries: Iterable[Entry], tally: Tally) -> None:
        for (each, version), found in _by_set(entries, lambda each: -_ADD_ORDER[each]).items():
            values: dict[bytes, EntryValue] = dict.fromkeys(found)
            refused = self._kernel.change(each, version, values, add=False)
            self._count_entries(refused, each, version, values, tally, gone=True)

    def _count_entries(
        self,
        refused: Mapping[bytes, OSError],
        each: Set,
        version: int,
        entries: Mapping[bytes, EntryValue],
        tally: Tally,
        *,
        gone: bool = False,
    ) -> None:
        if gone:
            tally.removed += len(entries) - len(refused)
        else:
            tally.written += len(entries) - len(refused)
        for error in refused.values():
            tally.refuse(Problem(NODE, explained(f"ipset {each.named(version)}", error)))

    def _bind(self, addresses: list[bytes], tally: Tally, *, add: bool) -> None:
        if not addresses:
            return
        refused = self._kernel.bind(addresses, add=add)
        if add:
            tally.written += len(addresses) - len(refused)
        else:
            tally.removed += len(addresses) - len(refused)
        for address, error in refused.items():
            tally.refuse(Problem(NODE, explained(f"{unpacked(address)} on kube-ipvs0", error)))

    def _operate(self, operations: list[Operation], tally: Tally) -> None:
        if not operations:
            return
        refused = self._kernel.apply(operations)
        for index, operation in enumerate(operations):
            error = refused.get(index)
            if error is None:
                if operation.command in (DEL_SERVICE, DEL_DEST):
                    tally.removed += 1
                else:
                    tally.written += 1
                continue
            what = f"virtual server {operation.server}"
            if operation.place:
                address, port = placed(operation.place)
                what += f", destination {address} port {port}"
            elif operation.settings is not None and error.errno == errno.ENOENT:
                what += f": the kernel has no scheduler {operation.settings.scheduler} (module ip_vs_"
                what += f"{operation.settings.scheduler})"
            tally.refuse(Problem(self._subject(operation.server), explained(what, error)))

    def _subject(self, server: Server) -> str:
        """The Service that a virtual server is of."""
        routes = self._target
        frontend: Frontend | None = None
        if server.mark:
            frontend = self._ledger.marks.owner(server.mark)
        elif server.address:
            frontend = frontend_of(server.address + server.port.to_bytes(2, "big") + bytes([server.protocol]))
        route = routes.get((frontend, Scope.INTERNAL)) if routes is not None and frontend is not None else None
        return str(route.service.service) if route is not None else NODE


def explained(what: str, error: OSError | ApplyError) -> str:
    """A refusal, in words that say what to do where that is known."""
    said = str(error) if isinstance(error, ApplyError) else error.strerror or str(error)
    if error.errno == errno.EPERM:
        said += ": it needs root and the capability CAP_NET_ADMIN"
    return f"{what}: {said}"


def _parts(frontends: Iterable[Frontend], size: int = PART) -> Iterator[list[Frontend]]:
    rest = iter(frontends)
    while part := list(itertools.islice(rest, size)):
        yield part


def _by_set(entries: Iterable[Entry], order: Callable[[Set], int]) -> dict[tuple[Set, int], list[bytes]]:
    found: dict[tuple[Set, int], list[bytes]] = {}
    for each, version, key in entries:
        found.setdefault((each, version), []).append(key)
    return dict(sorted(found.items(), key=lambda item: (order(item[0][0]), item[0][1])))


def _health_ports(routes: RouteTable) -> set[tuple[int, int]]:
    return {(int(check.family), check.port) for check in routes.health.values()}
