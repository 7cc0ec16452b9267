"""What is there against what should be, as the transactions that make up the difference.

Rules of this file: pure. The rules of service ports are rendered one port after the other and forgotten again, so that
a table of half a million rules costs no memory. First nat, where new chains are complete before anything jumps to them,
then filter; in each, what nothing needs any more goes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ebpflb.dataplane.iptables import names
from ebpflb.dataplane.iptables.changes import Change, Step, different, guest_commands, removals, rule_count, same_rules
from ebpflb.dataplane.iptables.frame import SHARED
from ebpflb.dataplane.iptables.holding import Holding
from ebpflb.dataplane.iptables.layout import PortKey
from ebpflb.dataplane.iptables.rules import PortRules
from ebpflb.dataplane.iptables.surroundings import World
from ebpflb.model import Family
from ebpflb.netfilter.ruleset import Chains

Group = list[tuple[PortKey, Chains]]
"""Chains of table nat to write, by service port."""


class Comparison:
    """`ports`: the rules of each service port of the family. `at_once`: how many chains a transaction should have at
    most. `attempt`, if given, writes a group of service ports' chains itself and says which ports were refused."""

    def __init__(
        self,
        holding: Holding,
        world: World,
        family: Family,
        ports: Iterable[tuple[PortKey, PortRules]],
        at_once: int,
        attempt: Callable[[Group], set[PortKey]] | None = None,
    ) -> None:
        self._holding = holding
        self._world = world
        self._family = family
        self._ports = ports
        self._at_once = at_once
        self._attempt = attempt
        self._hashes = {table: dict(chains) for table, chains in holding.hashes.items()}
        self._lines: dict[tuple[str, str], list[str]] = {place: [] for place in SHARED}
        self._filter: Chains = {}
        self._tails = world.tails(family)
        self._guests = world.guests(family)
        self._any_refused = False
        self.wanted: dict[str, int] = {}
        """How many rules there should be, by table; known once all steps were asked for."""

    def steps(self) -> Iterator[Step]:
        """The transactions, in their order."""
        chains = self._world.chains(self._family)
        for table, found in self._world.blocks(self._family).items():
            chains[table].update(found)
        yield Step("mangle", Change(self._different("mangle", chains["mangle"])))
        yield Step("nat", Change(self._different("nat", chains["nat"])))
        for group in self._groups():
            if self._attempt is None:
                yield Step("nat", _together(group))
            else:
                self._drop_refused(self._attempt(group))
        yield Step("nat", Change(self._shared("nat"), self._guest_commands("nat")))
        yield from self._removals("nat")
        own = self._different("filter", {**chains["filter"], **self._filter})
        yield Step(
            "filter", Change({**self._firewall(), **own, **self._shared("filter")}, self._guest_commands("filter"))
        )
        yield from self._removals("filter")
        yield from self._removals("mangle")

    def _different(self, table: str, want: Chains) -> Chains:
        """What of `want` is not there; what is wanted is no longer among what nothing needs."""
        self._count(table, rule_count(want))
        hashes = self._hashes.get(table, {})
        found = different(hashes, want)
        for chain in want:
            hashes.pop(chain, None)
        return found

    def _count(self, table: str, rules: int) -> None:
        self.wanted[table] = self.wanted.get(table, 0) + rules

    def _groups(self) -> Iterator[Group]:
        """The service ports that have something to write, so many together as suit a transaction."""
        group: Group = []
        size = 0
        for key, rules in self._ports:
            for table, chains in rules.shared.items():
                for chain, lines in chains.items():
                    self._lines[table, chain] += lines
            self._filter.update(rules.own.get("filter", {}))
            chains = self._different("nat", rules.own.get("nat", {}))
            if chains:
                group.append((key, chains))
                size += len(chains)
            if size >= self._at_once:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _drop_refused(self, refused: set[PortKey]) -> None:
        """What jumps to chains that could not be written stays as it is."""
        if not refused:
            return
        self._any_refused = True
        hashed = {names.port_hash(str(key.service), key.protocol.name.lower()) for key in refused}
        for place, lines in self._lines.items():
            there = set(self._holding.shared.get(place, ()))
            self._lines[place] = [line for line in lines if line in there or not any(each in line for each in hashed)]

    def _shared(self, table: str) -> Chains:
        """The shared chains that must be written anew."""
        found: Chains = {}
        for place, lines in self._lines.items():
            tail = self._tails.get(table, {}).get(place[1], ())
            if place[0] == table:
                self._count(table, len(lines) + len(tail))
            if place[0] == table and not same_rules(self._holding.shared.get(place), lines, tail):
                found[place[1]] = (*lines, *tail)
        return found

    def _guest_commands(self, table: str) -> list[str]:
        guests = self._guests.get(table, {})
        self._count(table, rule_count(guests))
        there = {chain: rules for (each, chain), rules in self._holding.guests.items() if each == table}
        commands = []
        for chain in {**there, **guests}:
            if chain != names.KUBELET_FIREWALL:
                commands += guest_commands(table, there.get(chain, ()), guests.get(chain, ()))
        return commands + self._firewall_commands(table)

    def _firewall(self) -> Chains:
        """kubelet's chain, made where it is wanted and not there; it is never emptied."""
        want = self._guests.get("filter", {}).get(names.KUBELET_FIREWALL, ())
        if want and ("filter", names.KUBELET_FIREWALL) not in self._holding.guests:
            return {names.KUBELET_FIREWALL: want}
        return {}

    def _firewall_commands(self, table: str) -> list[str]:
        place = (table, names.KUBELET_FIREWALL)
        want = self._guests.get(table, {}).get(names.KUBELET_FIREWALL, ())
        have = self._holding.guests.get(place)
        return [] if have is None else [rule for rule in want if rule not in have]

    def _removals(self, table: str) -> Iterator[Step]:
        kept = {chain for each, chain in self._holding.wanted_by_others if each == table}
        stale = self._hashes.get(table, {}).keys() - kept
        if self._any_refused:
            stale = {chain for chain in stale if not chain.startswith((names.SVC, names.SVL, names.SEP, names.EXT))}
        for change in removals(stale, self._at_once):
            yield Step(table, change)


def _together(group: Group) -> Change:
    found: Chains = {}
    for _, chains in group:
        found.update(chains)
    return Change(found)
