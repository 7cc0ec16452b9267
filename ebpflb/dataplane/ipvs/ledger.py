"""What is remembered between syncs, and what follows from it for the next: the plan of the writes.

Rules of this file: pure. The ledger knows which firewall marks are given, who uses the rows that frontends share, and
which destinations only stay for their connections. It turns rows before and after, or rows wanted and rows found, into
a `Plan`; `writer` carries plans out. After a sync that failed it is not true any more, and is made anew of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from ebpflb.dataplane.ipvs.marks import Marks
from ebpflb.dataplane.ipvs.messages import (
    DEL_DEST,
    DEL_SERVICE,
    NEW_DEST,
    NEW_SERVICE,
    SET_DEST,
    SET_SERVICE,
    Operation,
)
from ebpflb.dataplane.ipvs.names import Mark, Set
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
    Settings,
    frontend_of,
    health_entries,
    is_udp,
    rows_of,
    server_of,
    unpacked,
)
from ebpflb.model import Problem
from ebpflb.routes import Frontend, RouteTable, Scope, in_cidr

_K = TypeVar("_K")


class Plan:
    """Writes that wait for their turn: `entries` that protect and `servers` with their destinations first, then what
    leads to them (`marks`, `bind`), then what goes. `leaving` are virtual servers with destinations to look after, of
    `freed` marks the virtual server goes."""

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


class Found:
    """What the kernel holds, as it was read: `entries` by set, virtual servers, the addresses of kube-ipvs0. What is
    wanted is taken out of `entries`; what is left in the end is not."""

    def __init__(
        self,
        entries: dict[tuple[Set, int], dict[bytes, EntryValue]],
        servers: Mapping[Server, Settings],
        bound: set[bytes],
    ) -> None:
        self.entries = entries
        self.servers = servers
        self.bound = bound
        self.wanted: set[Server] = set()


class Ledger:
    """See the top of this file."""

    def __init__(self, options: IpvsOptions, mark: Mark) -> None:
        self._options = options
        self.marks = Marks(mark)
        self._uses: dict[Entry, int] = {}
        self._address_uses: dict[bytes, int] = {}
        self._health: Mapping[Entry, EntryValue] = {}
        self._named: set[Server] = set()
        self.leaving: dict[Server, set[bytes]] = {}
        self._ending: set[Server] = set()  # virtual servers that go when their last destination has
        self.refused: dict[Frontend, Problem] = {}
        """Frontends whose routes cannot be carried."""

    # ---- Rows

    def _rows(self, frontend: Frontend, routes: RouteTable) -> Rows | None:
        """The rows of a frontend; None if it has no routes, or such as cannot be carried."""
        internal, external = (routes.get((frontend, scope)) for scope in Scope)
        if internal is None or external is None:
            present = internal or external
            if present is not None:
                self._refuse(frontend, str(present.service.service), "it has a route for one scope only")
            return None
        try:
            return rows_of(
                frontend,
                internal,
                external,
                self._options,
                lambda scope: self.marks.given(frontend, scope),
                routes.locality.node_addresses,
            )
        except Refusal as refusal:
            self._refuse(frontend, str(internal.service.service), str(refusal))
            return None

    def _refuse(self, frontend: Frontend, service: str, reason: str) -> None:
        self.refused[frontend] = Problem(service, f"{frontend} is not carried: {reason}", "UnknownShape")

    # ---- A change

    def change(self, frontends: Iterable[Frontend], before: RouteTable, after: RouteTable, late: Plan) -> Plan:
        """What turns the rows of some frontends into the next ones: additions are in the plan that is returned, the
        rest goes to `late`."""
        plan = Plan()
        for frontend in frontends:
            old = self._rows(frontend, before) or Rows()
            self.refused.pop(frontend, None)
            new = self._rows(frontend, after)
            self._compare(frontend, old, new or Rows(), (frontend, Scope.INTERNAL) in after, plan, late)
            self.marks.forget(frontend, new)
        return plan

    def change_health(self, ports: set[tuple[int, int]], late: Plan) -> Plan:
        """As `change`, for the node ports of health checks."""
        plan = Plan()
        wanted = health_entries(ports)
        for entry in wanted.keys() - self._health.keys():
            plan.put(entry, None)
        late.gone_entries += self._health.keys() - wanted.keys()
        self._health = wanted
        return plan

    def count_down(self, late: Plan) -> None:
        """When all has been counted up, of what goes only that goes which nobody else uses."""
        late.gone_entries = [entry for entry in late.gone_entries if self._is_last_use(entry)]
        late.unbind = [each for each in late.unbind if _count(self._address_uses, each, -1) == 0]

    def _compare(self, frontend: Frontend, old: Rows, new: Rows, there: bool, plan: Plan, late: Plan) -> None:
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
            if address not in old.addresses and _count(self._address_uses, address, 1) == 1:
                late.bind.append(address)
        late.unbind += [address for address in old.addresses if address not in new.addresses]
        for server, (settings, wanted) in new.servers.items():
            before = old.servers.get(server)
            if before is None and server not in self.leaving:
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

    def _add_destinations(self, server: Server, wanted: Destinations, before: Destinations, plan: Plan) -> None:
        leaving = self.leaving.get(server, set())
        for place, weight in wanted.items():
            if place in leaving:
                leaving.discard(place)
                plan.servers.append(Operation(SET_DEST, server, None, place, weight))
            elif place not in before:
                plan.servers.append(Operation(NEW_DEST, server, None, place, weight))
            elif before[place] != weight:
                plan.servers.append(Operation(SET_DEST, server, None, place, weight))
        if server in self.leaving and not leaving:
            del self.leaving[server]

    def _part(self, server: Server, places: Iterable[bytes], at_once: bool, plan: Plan) -> None:
        """Destinations that are no backends any more."""
        for place in places:
            if at_once:
                plan.gone_servers.append(Operation(DEL_DEST, server, None, place))
            else:
                plan.gone_servers.append(Operation(SET_DEST, server, None, place, 0, leaving=True))
                self.leaving.setdefault(server, set()).add(place)
                plan.leaving.add(server)

    def _end(self, server: Server, places: Iterable[bytes], gently: bool, plan: Plan) -> None:
        """A virtual server that nobody asks for any more."""
        if gently:
            self._part(server, places, False, plan)
        if gently and self.leaving.get(server):
            self._ending.add(server)
            plan.leaving.add(server)
            return
        plan.gone_servers.append(Operation(DEL_SERVICE, server))
        plan.freed.append(server.mark)
        self.leaving.pop(server, None)
        self._ending.discard(server)

    def _is_first_use(self, entry: Entry) -> bool:
        return entry[0] not in SHARED or _count(self._uses, entry, 1) == 1

    def _is_last_use(self, entry: Entry) -> bool:
        return entry[0] not in SHARED or _count(self._uses, entry, -1) == 0

    # ---- The whole

    def begin(self, found: Found) -> None:
        """Forget everything but what the kernel's rows tell."""
        self._uses, self._address_uses, self.refused = {}, {}, {}
        self.leaving, self._ending = {}, set()
        self._adopt(found.entries)

    def wanted(self, frontends: Iterable[Frontend], routes: RouteTable) -> dict[Frontend, Rows]:
        """The rows of some frontends."""
        found = {}
        for frontend in frontends:
            rows = self._rows(frontend, routes)
            self.marks.forget(frontend, rows)
            if rows is not None:
                found[frontend] = rows
        return found

    def meet(
        self,
        wanted: Mapping[Frontend, Rows],
        found: Found,
        places: Mapping[Server, Mapping[bytes, Destination]],
        late: Plan,
    ) -> Plan:
        """What is missing of the rows of some frontends, given their destinations; the rest goes to `late`."""
        plan = Plan()
        for frontend, rows in wanted.items():
            for entry, value in rows.entries.items():
                self._settle(entry, value, found, late if entry[0] is Set.MARKS else plan)
            for address in rows.addresses:
                if _count(self._address_uses, address, 1) == 1 and address not in found.bound:
                    late.bind.append(address)
            for server, (settings, destinations) in rows.servers.items():
                found.wanted.add(server)
                if server not in found.servers:
                    plan.servers.append(Operation(NEW_SERVICE, server, settings))
                elif found.servers[server] != settings:
                    plan.servers.append(Operation(SET_SERVICE, server, settings))
                self._meet(server, destinations, places.get(server, {}), is_udp(frontend), plan, late)
        return plan

    def meet_health(self, ports: set[tuple[int, int]], found: Found) -> Plan:
        """As `meet`, for the node ports of health checks."""
        plan = Plan()
        self._health = health_entries(ports)
        for entry, value in self._health.items():
            self._settle(entry, value, found, plan)
        return plan

    def unwanted(self, found: Found) -> list[Server]:
        """Virtual servers of ours that nobody asks for."""
        return [server for server in found.servers if server not in found.wanted and self._is_ours(server, found)]

    def leave(
        self,
        unwanted: Mapping[Server, Mapping[bytes, Destination]],
        found: Found,
        routes: RouteTable,
        late: Plan,
    ) -> None:
        """What nobody asked for, given the destinations of such virtual servers."""
        for (each, version), left in found.entries.items():
            late.gone_entries += [(each, version, key) for key in left]
        late.unbind = [address for address in found.bound if address not in self._address_uses]
        for server, places in unwanted.items():
            self._end_unknown(server, places, routes, late)

    def _adopt(self, entries: Mapping[tuple[Set, int], Mapping[bytes, EntryValue]]) -> None:
        """Take over the marks that the kernel's rows have, and learn which frontends they name."""
        self.marks.clear()
        held = Held(entries={each: dict(found) for each, found in entries.items() if each[0] is Set.FRONTENDS})
        self._named = set()
        for version in (4, 6):
            for frontend, _, said in frontends(held, version):
                self._named.add(server_of(frontend))
                if said.parked:
                    self.marks.adopt(frontend, Scope.INTERNAL, said.parked)
            for key, mark in entries[Set.MARKS, version].items():
                try:
                    frontend = frontend_of(key)
                except ValueError:
                    continue
                if isinstance(mark, int):
                    self.marks.adopt(frontend, Scope.EXTERNAL, mark)

    def _settle(self, entry: Entry, value: EntryValue, found: Found, plan: Plan) -> None:
        """One entry that is wanted."""
        if entry[0] in SHARED and _count(self._uses, entry, 1) > 1:
            return
        held = found.entries[entry[:2]]
        if entry[2] not in held or held.pop(entry[2]) != value:
            plan.put(entry, value)

    def _meet(
        self,
        server: Server,
        wanted: Destinations,
        found: Mapping[bytes, Destination],
        udp: bool,
        plan: Plan,
        late: Plan,
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
                self.leaving.setdefault(server, set()).add(place)
            else:
                self._part(server, [place], udp, late)

    def _is_ours(self, server: Server, found: Found) -> bool:
        """Whether a virtual server that nobody asks for is ours to remove: of a mark of ours, of a frontend that we
        named, or at an address that only kube-ipvs0 has; but none that the operator excluded."""
        if server.mark:
            return self.marks.are_ours(server.mark)
        if any(in_cidr(unpacked(server.address), cidr) for cidr in self._options.exclude_cidrs):
            return False
        return server in self._named or server.address in found.bound or server.address in self._address_uses

    def _end_unknown(self, server: Server, found: Mapping[bytes, Destination], routes: RouteTable, plan: Plan) -> None:
        """A virtual server of ours of which only the kernel knows: gently, as long as there is a frontend, or (of a
        mark, which does not tell its frontend) as long as there are connections."""
        if server.mark:
            gently = True
            self.marks.take(server.mark)
        else:
            frontend = frontend_of(server.address + server.port.to_bytes(2, "big") + bytes([server.protocol]))
            gently = not is_udp(frontend) and (frontend, Scope.INTERNAL) in routes
        staying = {place for place, has in found.items() if has.leaving}
        if gently and staying:
            self.leaving[server] = staying
        self._end(server, [place for place in found if place not in staying], gently, plan)

    # ---- Letting go

    def reap(self, held: Mapping[Server, Mapping[bytes, Destination]]) -> Plan:
        """What goes now: destinations that were kept for their connections and have none any more, and with its last
        one a virtual server that nobody asks for."""
        plan = Plan()
        for server, found in held.items():
            leaving = self.leaving.get(server, set())
            for place in list(leaving):
                has = found.get(place)
                if has is None or has.connections == 0:
                    leaving.discard(place)
                    plan.gone_servers.append(Operation(DEL_DEST, server, None, place))
            if not leaving:
                self.leaving.pop(server, None)
                if server in self._ending:
                    self._ending.discard(server)
                    plan.gone_servers.append(Operation(DEL_SERVICE, server))
                    plan.freed.append(server.mark)
        return plan


def _count(uses: dict[_K, int], key: _K, by: int) -> int:
    """How many use it now."""
    number = uses.get(key, 0) + by
    if number:
        uses[key] = number
    else:
        uses.pop(key, None)
    return number
