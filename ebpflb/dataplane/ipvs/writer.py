"""Makes the kernel hold a RouteTable: what is written, in which order, and what follows from what is refused.

Rules of this file: `table` decides what, the kernel's seam does it. The order of every sync is

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

from ebpflb.dataplane import Report, RestoreFailure
from ebpflb.dataplane.ipvs import chains, rules
from ebpflb.dataplane.ipvs.messages import (
    DEL_DEST,
    DEL_SERVICE,
    NEW_DEST,
    NEW_SERVICE,
    SET_DEST,
    SET_SERVICE,
)
from ebpflb.dataplane.ipvs.names import MARK_LIMIT, Mark, Set
from ebpflb.dataplane.ipvs.netlink import Kernel, Operation
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.reading import Destination, Held, frontends
from ebpflb.dataplane.ipvs.table import (
    SHARED,
    Destinations,
    Entry,
    EntryValue,
    Refusal,
    Rows,
    Server,
    frontend_of,
    health_entries,
    is_udp,
    placed,
    rows_of,
    server_of,
    unpacked,
)
from ebpflb.errors import ApplyError
from ebpflb.model import Family, Problem
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.routes import Frontend, RouteTable, Scope, in_cidr

NODE = "node"
"""The subject of problems that concern no Service."""

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

    def refuse(self, subject: str, reason: str, code: str = "") -> None:
        self.failed += 1
        self.problems[Problem(subject, reason, code) if code else Problem(subject, reason)] = None

    def report(self, seconds: float) -> Report:
        return Report(
            self.written,
            self.removed,
            self.failed,
            seconds,
            tuple(self.problems),
            restore_failures=tuple(self.restores),
        )


class _Plan:
    """Writes that wait for their turn."""

    def __init__(self) -> None:
        self.entries: dict[Entry, EntryValue] = {}
        self.servers: list[Operation] = []
        self.marks: dict[Entry, EntryValue] = {}
        self.bind: list[bytes] = []
        self.unbind: list[bytes] = []
        self.gone_entries: list[Entry] = []
        self.gone_servers: list[Operation] = []
        self.leaving: set[Server] = set()
        self.freed: list[int] = []

    def put(self, entry: Entry, value: EntryValue) -> None:
        (self.marks if entry[0] is Set.MARKS else self.entries)[entry] = value


class Writer:
    """One process's hold on the kernel. `tables` are the iptables by IP version; `clock` counts seconds."""

    def __init__(
        self, kernel: Kernel, tables: Tables, options: IpvsOptions, mark: Mark, clock: Callable[[], float]
    ) -> None:
        self._kernel = kernel
        self._tables = tables
        self._options = options
        self._mark = mark
        self._clock = clock
        self._target: RouteTable | None = None
        self._held: RouteTable | None = None  # what the kernel holds, as far as we know; None if that must be read
        self._marks: dict[tuple[Frontend, Scope], int] = {}
        self._taken: set[int] = set()
        self._lowest = 0
        self._uses: dict[Entry, int] = {}
        self._address_uses: dict[bytes, int] = {}
        self._health: Mapping[Entry, EntryValue] = {}
        self._leaving: dict[Server, set[bytes]] = {}
        self._ending: set[Server] = set()  # virtual servers that go when their last destination has
        self._refused: dict[Frontend, tuple[str, str]] = {}

    # ---- What the dataplane calls

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
            tally.refuse(NODE, explained("IPVS cannot be written", error))
        if not tally.failed:
            self._held = routes
        for subject, reason in self._refused.values():
            tally.refuse(subject, reason, "UnknownShape")
        return tally.report(self._clock() - started)

    def audit(self) -> Report:
        """Read the kernel, repair what differs from the last table given to `sync`, and let go of what has ended."""
        if self._target is None:
            return Report()
        self._held = None
        return self.sync(self._target)

    # ---- Firewall marks

    def _mark_of(self, frontend: Frontend, scope: Scope) -> int:
        """The mark of the frontend's own virtual server for a scope: the lowest that is free."""
        found = self._marks.get((frontend, scope))
        if found is None:
            while self._lowest in self._taken:
                self._lowest += 1
            if self._lowest > MARK_LIMIT:
                raise Refusal("there are no more firewall marks")
            found = self._marks[frontend, scope] = self._mark.of(self._lowest)
            self._taken.add(self._lowest)
        return found

    def _release(self, mark: int) -> None:
        number = self._mark.number(mark)
        if number is not None:
            self._taken.discard(number)
            self._lowest = min(self._lowest, number)

    def _forget_marks(self, frontend: Frontend, rows: Rows | None) -> None:
        """Marks that a frontend does not need any more; each is free again when its virtual server is gone."""
        for scope in Scope:
            mark = self._marks.get((frontend, scope))
            if mark is not None and (rows is None or not any(server.mark == mark for server in rows.servers)):
                del self._marks[frontend, scope]

    def _keep_marks(self, routes: RouteTable) -> None:
        """Of the marks that were taken over, those in use."""
        self._marks = {each: mark for each, mark in self._marks.items() if each in routes}
        used = {*self._marks.values(), *(server.mark for server in self._leaving)}
        self._taken = {number for mark in used if (number := self._mark.number(mark)) is not None}
        self._lowest = 0

    # ---- Rows

    def _rows(self, frontend: Frontend, routes: RouteTable) -> Rows | None:
        """The rows of a frontend; None if it has no routes, or such as cannot be carried."""
        internal, external = (routes.get((frontend, scope)) for scope in Scope)
        if internal is None or external is None:
            present = internal or external
            if present is not None:
                self._refused[frontend] = (str(present.service.service), f"{frontend} has a route for one scope only")
            return None
        try:
            return rows_of(
                frontend,
                internal,
                external,
                self._options,
                lambda scope: self._mark_of(frontend, scope),
                routes.locality.node_addresses,
            )
        except Refusal as refusal:
            self._refused[frontend] = (str(internal.service.service), f"{frontend} is not carried: {refusal}")
            return None

    # ---- A change

    def _change(self, held: RouteTable, routes: RouteTable, tally: Tally) -> None:
        changed = dict.fromkeys(frontend for frontend, _ in routes.changed_from(held))
        health = health_entries(_health_ports(routes))
        if not changed and health == self._health:
            return
        late = _Plan()
        for part in _parts(changed):
            plan = _Plan()
            for frontend in part:
                self._refused.pop(frontend, None)
                old = self._rows(frontend, held)
                self._refused.pop(frontend, None)
                new = self._rows(frontend, routes)
                there = (frontend, Scope.INTERNAL) in routes
                self._compare(frontend, old or Rows(), new or Rows(), there, plan, late)
                self._forget_marks(frontend, new)
            self._give(plan, tally, routes)
        plan = _Plan()
        for entry in health.keys() - self._health.keys():
            plan.put(entry, None)
        late.gone_entries += self._health.keys() - health.keys()
        self._health = health
        self._give(plan, tally, routes)
        # Counted down when all has been counted up: what one frontend hands to another stays.
        late.gone_entries = [entry for entry in late.gone_entries if self._is_last_use(entry)]
        late.unbind = [each for each in late.unbind if self._count(self._address_uses, each, -1) == 0]
        self._lead(late, tally, routes)
        self._take(late, tally, routes)
        self._reap(late.leaving, tally)

    def _compare(self, frontend: Frontend, old: Rows, new: Rows, there: bool, plan: _Plan, late: _Plan) -> None:
        """What turns the rows `old` of a frontend into `new`: additions to `plan`, the rest to `late`."""
        for entry, value in new.entries.items():
            if entry in old.entries:
                if old.entries[entry] != value:
                    (late if entry[0] is Set.MARKS else plan).put(entry, value)
            elif self._is_first_use(entry):
                (late if entry[0] is Set.MARKS else plan).put(entry, value)
        for entry in old.entries:
            if entry not in new.entries:
                late.gone_entries.append(entry)
        for address in new.addresses:
            if address not in old.addresses and self._count(self._address_uses, address, 1) == 1:
                late.bind.append(address)
        late.unbind += [address for address in old.addresses if address not in new.addresses]
        for server, (settings, wanted) in new.servers.items():
            before = old.servers.get(server)
            if before is None and server not in self._leaving:
                plan.servers.append(Operation(NEW_SERVICE, server, settings))
            elif before is None or before[0] != settings:
                plan.servers.append(Operation(SET_SERVICE, server, settings))
            self._ending.discard(server)
            self._add_destinations(server, wanted, before[1] if before else {}, plan)
            if before is not None:
                gone = [place for place in before[1] if place not in wanted]
                self._part(server, gone, is_udp(frontend), plan=late)
        for server, (_, places) in old.servers.items():
            if server not in new.servers:
                self._end(server, places, there and not is_udp(frontend), late)

    def _add_destinations(self, server: Server, wanted: Destinations, before: Destinations, plan: _Plan) -> None:
        leaving = self._leaving.get(server, set())
        for place, weight in wanted.items():
            if place in leaving:
                leaving.discard(place)
                plan.servers.append(Operation(SET_DEST, server, None, place, weight))
            elif place not in before:
                plan.servers.append(Operation(NEW_DEST, server, None, place, weight))
            elif before[place] != weight:
                plan.servers.append(Operation(SET_DEST, server, None, place, weight))
        if server in self._leaving and not leaving:
            del self._leaving[server]

    def _part(self, server: Server, places: Iterable[bytes], at_once: bool, plan: _Plan) -> None:
        """Destinations that are no backends any more."""
        for place in places:
            if at_once:
                plan.gone_servers.append(Operation(DEL_DEST, server, None, place))
            else:
                plan.gone_servers.append(Operation(SET_DEST, server, None, place, 0, leaving=True))
                self._leaving.setdefault(server, set()).add(place)
                plan.leaving.add(server)

    def _end(self, server: Server, places: Iterable[bytes], gently: bool, plan: _Plan) -> None:
        """A virtual server that nobody asks for any more."""
        if gently:
            self._part(server, places, False, plan)
        if gently and self._leaving.get(server):
            self._ending.add(server)
            plan.leaving.add(server)
            return
        plan.gone_servers.append(Operation(DEL_SERVICE, server))
        plan.freed.append(server.mark)
        self._leaving.pop(server, None)
        self._ending.discard(server)

    def _is_first_use(self, entry: Entry) -> bool:
        return entry[0] not in SHARED or self._count(self._uses, entry, 1) == 1

    def _is_last_use(self, entry: Entry) -> bool:
        return entry[0] not in SHARED or self._count(self._uses, entry, -1) == 0

    def _count(self, uses: dict[object, int] | dict[Entry, int] | dict[bytes, int], key: object, by: int) -> int:
        counted: dict[object, int] = uses  # type: ignore[assignment]
        number = counted.get(key, 0) + by
        if number:
            counted[key] = number
        else:
            counted.pop(key, None)
        return number

    # ---- The whole

    def _whole(self, routes: RouteTable, tally: Tally) -> None:
        """Read the kernel, and make it hold `routes`."""
        entries = {(each, version): self._kernel.entries(each, version) for each in Set for version in (4, 6)}
        servers = self._kernel.servers()
        bound, _ = self._kernel.addresses()
        named = self._adopt(entries)
        self._uses, self._address_uses, self._refused = {}, {}, {}
        self._leaving, self._ending = {}, set()
        late = _Plan()
        wanted: set[Server] = set()
        for part in _parts(dict.fromkeys(frontend for frontend, _ in routes)):
            plan = _Plan()
            asked: dict[Frontend, Rows] = {}
            for frontend in part:
                rows = self._rows(frontend, routes)
                self._forget_marks(frontend, rows)
                if rows is not None:
                    asked[frontend] = rows
            held = self._kernel.destinations(
                [server for rows in asked.values() for server in rows.servers if server in servers]
            )
            for frontend, rows in asked.items():
                for entry, value in rows.entries.items():
                    self._settle(entry, value, entries, late if entry[0] is Set.MARKS else plan)
                for address in rows.addresses:
                    if self._count(self._address_uses, address, 1) == 1 and address not in bound:
                        late.bind.append(address)
                for server, (settings, places) in rows.servers.items():
                    wanted.add(server)
                    if server not in servers:
                        plan.servers.append(Operation(NEW_SERVICE, server, settings))
                    elif servers[server] != settings:
                        plan.servers.append(Operation(SET_SERVICE, server, settings))
                    self._meet(server, places, held.get(server, {}), is_udp(frontend), plan, late)
            self._give(plan, tally, routes)
        self._health = health_entries(_health_ports(routes))
        plan = _Plan()
        for entry, value in self._health.items():
            self._settle(entry, value, entries, plan)
        self._give(plan, tally, routes)
        self._lead(late, tally, routes, rules_too=True)
        for (each, version), left in entries.items():
            late.gone_entries += [(each, version, key) for key in left]
        late.unbind = [address for address in bound if address not in self._address_uses]
        for server in servers.keys() - wanted:
            if self._is_ours(server, named, bound):
                self._end_unknown(server, routes, late)
        self._take(late, tally, routes)
        self._reap(set(self._leaving), tally)
        self._keep_marks(routes)

    def _adopt(self, entries: Mapping[tuple[Set, int], Mapping[bytes, EntryValue]]) -> set[Server]:
        """Take over the marks that the kernel's rows have. The virtual servers of the frontends that are named."""
        self._marks, self._taken, self._lowest = {}, set(), 0
        held = Held(entries={each: dict(found) for each, found in entries.items() if each[0] is Set.FRONTENDS})
        named: set[Server] = set()
        for version in (4, 6):
            for frontend, _, said in frontends(held, version):
                named.add(server_of(frontend))
                if said.parked:
                    self._adopt_mark(frontend, Scope.INTERNAL, said.parked)
            for key, mark in entries[Set.MARKS, version].items():
                try:
                    frontend = frontend_of(key)
                except ValueError:
                    continue
                if isinstance(mark, int):
                    self._adopt_mark(frontend, Scope.EXTERNAL, mark)
        return named

    def _adopt_mark(self, frontend: Frontend, scope: Scope, mark: int) -> None:
        number = self._mark.number(mark)
        if number is not None and number not in self._taken:
            self._taken.add(number)
            self._marks[frontend, scope] = mark

    def _settle(
        self, entry: Entry, value: EntryValue, have: dict[tuple[Set, int], dict[bytes, EntryValue]], plan: _Plan
    ) -> None:
        """One entry that is wanted; what is left in `have` in the end is not."""
        if entry[0] in SHARED and self._count(self._uses, entry, 1) > 1:
            return
        found = have[entry[:2]]
        if entry[2] not in found or found.pop(entry[2]) != value:
            plan.put(entry, value)

    def _meet(
        self,
        server: Server,
        wanted: Destinations,
        found: Mapping[bytes, Destination],
        udp: bool,
        plan: _Plan,
        late: _Plan,
    ) -> None:
        """The destinations of a virtual server that is wanted, given those that it has."""
        for place, weight in wanted.items():
            has = found.get(place)
            if has is None:
                plan.servers.append(Operation(NEW_DEST, server, None, place, weight))
            elif has.weight != weight or has.leaving:
                plan.servers.append(Operation(SET_DEST, server, None, place, weight))
        for place, has in found.items():
            if place in wanted:
                continue
            if has.leaving and not udp:
                self._leaving.setdefault(server, set()).add(place)
            else:
                self._part(server, [place], udp, late)

    def _is_ours(self, server: Server, named: set[Server], bound: set[bytes]) -> bool:
        """Whether a virtual server that nobody asks for is ours to remove: of a mark of ours, of a frontend that we
        named, or at an address that only our device has; but none that the operator excluded."""
        if server.mark:
            return self._mark.number(server.mark) is not None
        if any(in_cidr(unpacked(server.address), cidr) for cidr in self._options.exclude_cidrs):
            return False
        return server in named or server.address in bound or server.address in self._address_uses

    def _end_unknown(self, server: Server, routes: RouteTable, plan: _Plan) -> None:
        """A virtual server of ours of which only the kernel knows: gently, as long as there is a frontend, or (of a
        mark, which does not tell its frontend) as long as there are connections."""
        found = self._kernel.destinations((server,))[server]
        if server.mark:
            gently = True
            self._taken.add(self._mark.number(server.mark) or 0)
        else:
            frontend = frontend_of(server.address + server.port.to_bytes(2, "big") + bytes([server.protocol]))
            gently = not is_udp(frontend) and (frontend, Scope.INTERNAL) in routes
        staying = {place for place, has in found.items() if has.leaving}
        if gently and staying:
            self._leaving[server] = staying
        self._end(server, [place for place in found if place not in staying], gently, plan)

    # ---- Writing

    def _give(self, plan: _Plan, tally: Tally, routes: RouteTable) -> None:
        """Entries that protect, then virtual servers and destinations."""
        self._add(plan.entries, tally)
        self._operate(plan.servers, tally)

    def _lead(self, plan: _Plan, tally: Tally, routes: RouteTable, *, rules_too: bool = False) -> None:
        """What brings traffic to what has been given. Where another dataplane of ours or kube-proxy still has the
        rules, they carry all connections until everything else is ready; else they must be there before the first."""
        before: dict[int, Ruleset] = {}
        if rules_too:
            before = {version: tables.read() for version, tables in self._tables.items()}
        late = any("KUBE-SERVICES" in found.get("nat", {}) and not rules.is_ours(found) for found in before.values())
        if not late:
            self._write_rules(routes, before, tally)
        self._add(plan.marks, tally)
        self._bind(plan.bind, tally, add=True)
        if late:
            self._write_rules(routes, before, tally)

    def _write_rules(self, routes: RouteTable, before: Mapping[int, Ruleset], tally: Tally) -> None:
        for version, found in before.items():
            wanted = rules.ruleset(routes.locality, version, self._mark)
            try:
                tally.written += chains.put(self._tables[version], wanted, found)
            except ApplyError as error:
                tally.refuse(NODE, str(error))
                tally.restores.append(RestoreFailure(Family(version), False))

    def _take(self, plan: _Plan, tally: Tally, routes: RouteTable) -> None:
        """Backwards: what leads there, addresses, entries, virtual servers."""
        steering = [entry for entry in plan.gone_entries if entry[0] is Set.MARKS]
        self._delete(steering, tally)
        self._bind(plan.unbind, tally, add=False)
        self._delete([entry for entry in plan.gone_entries if entry[0] is not Set.MARKS], tally)
        self._operate(plan.gone_servers, tally)
        for mark in plan.freed:  # not before its virtual server is gone
            self._release(mark)

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
            tally.refuse(NODE, explained(f"ipset {each.named(version)}", error))

    def _bind(self, addresses: list[bytes], tally: Tally, *, add: bool) -> None:
        if not addresses:
            return
        refused = self._kernel.bind(addresses, add=add)
        if add:
            tally.written += len(addresses) - len(refused)
        else:
            tally.removed += len(addresses) - len(refused)
        for address, error in refused.items():
            tally.refuse(NODE, explained(f"{unpacked(address)} on kube-ipvs0", error))

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
            tally.refuse(self._subject(operation.server), explained(what, error))

    def _subject(self, server: Server) -> str:
        """The Service that a virtual server is of."""
        routes = self._target
        frontend: Frontend | None = None
        if server.mark:
            frontend = next((each for (each, _), mark in self._marks.items() if mark == server.mark), None)
        elif server.address:
            frontend = frontend_of(server.address + server.port.to_bytes(2, "big") + bytes([server.protocol]))
        route = routes.get((frontend, Scope.INTERNAL)) if routes is not None and frontend is not None else None
        return str(route.service.service) if route is not None else NODE

    # ---- Letting go

    def _reap(self, servers: Collection[Server], tally: Tally) -> None:
        """Remove the destinations that were kept for their connections and have none any more, and with the last one a
        virtual server that nobody asks for."""
        if not servers:
            return
        operations: list[Operation] = []
        held = self._kernel.destinations([server for server in servers if self._leaving.get(server)])
        for server in servers:
            leaving = self._leaving.get(server, set())
            found = held.get(server, {})
            for place in list(leaving):
                has = found.get(place)
                if has is None or has.connections == 0:
                    leaving.discard(place)
                    operations.append(Operation(DEL_DEST, server, None, place))
            if not leaving:
                self._leaving.pop(server, None)
                if server in self._ending:
                    self._ending.discard(server)
                    operations.append(Operation(DEL_SERVICE, server))
                    self._release(server.mark)
        self._operate(operations, tally)


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
