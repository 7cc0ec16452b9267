"""Makes one family's tables hold what the routes say: by the difference of two tables of routes, or by comparison.

Rules of this file: it decides when and in which transactions; what a difference is, is the business of `changes`,
`surroundings` and `comparison`. A change writes the chains that it touches and single lines of shared ones, never a
whole table. A comparison reads what is there and writes what differs, so that a restart with nothing changed writes
nothing. Where restore refuses many service ports at once, they are written by halves until those that it refuses are
known; the others are served. At every prefix of the transactions each rule jumps to a chain that is there.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain as chained

import msgspec

from ebpflb.dataplane.iptables import frame, names
from ebpflb.dataplane.iptables.changes import (
    Change,
    Step,
    Steps,
    deletion,
    guest_commands,
    port_steps,
    removals,
    rule_count,
)
from ebpflb.dataplane.iptables.comparison import Comparison, Group
from ebpflb.dataplane.iptables.holding import Holding, held
from ebpflb.dataplane.iptables.layout import Index, PortKey
from ebpflb.dataplane.iptables.rules import PortRules, port_rules
from ebpflb.dataplane.iptables.surroundings import World, surrounding_steps
from ebpflb.errors import ApplyError
from ebpflb.model import Problem
from ebpflb.netfilter.iptables import CHAINS_AT_ONCE, Iptables, LockHeldError, Variant
from ebpflb.netfilter.ruleset import Chains, target_of

log = logging.getLogger(__name__)

_UNLIMITED = 1 << 30
_MOST_REFUSED = 16  # service ports that are tried alone in one sync: each try costs as much as a change
_HOPELESS = (errno.EPERM, errno.EACCES, errno.ENOENT)


class Tally(msgspec.Struct):
    """What a sync has done in one family so far. `rules`: how many were written, by table; `removed` are rules and
    chains. `failures`: restores that were refused, and whether each was to write a change only."""

    rules: dict[str, int] = msgspec.field(default_factory=dict)
    removed: int = 0
    failures: list[bool] = msgspec.field(default_factory=list)

    @property
    def written(self) -> int:
        return sum(self.rules.values())

    def add(self, table: str, change: Change) -> None:
        self.rules[table] = self.rules.get(table, 0) + change.written
        self.removed += change.removed

    def take(self, other: Tally) -> None:
        """Count what `other` has, too."""
        for table, count in other.rules.items():
            self.rules[table] = self.rules.get(table, 0) + count
        self.removed += other.removed


class FamilyWriter:
    """One family's rules. `refused`: why some service ports have none, or none that are new."""

    def __init__(self, tool: Iptables) -> None:
        self._tool = tool
        self._family = tool.family
        self._at_once = CHAINS_AT_ONCE if tool.variant is Variant.NFT else _UNLIMITED
        self._sound: int | None = None
        self.refused: dict[PortKey, Problem] = {}
        self.held: dict[str, int] = {}
        """How many rules of ours there are, by table."""

    def change(self, before: World, after: World, old: Mapping[PortKey, PortRules], index: Index, tally: Tally) -> None:
        """Write what turns `before` into `after`, of which `index` is the index; `old` has the rules so far of each
        service port that may differ. Guests are not looked at. Raises ApplyError; what is there then is not known."""
        pairs = []
        for key, rules in old.items():
            new = self._rules(key, after, index)
            if new != rules:
                pairs.append((rules, new))
        steps = surrounding_steps(before, after, self._family)
        self._count(pairs, steps)
        try:
            self._write(pairs, steps, tally)
        except ApplyError:
            tally.failures.append(True)
            raise

    def _write(self, pairs: list[tuple[PortRules, PortRules]], steps: Steps, tally: Tally) -> None:
        groups = list(self._groups(pairs))
        if len(groups) <= 1:
            steps.add(port_steps(pairs))
            self._run(steps.in_order(), tally)
            return
        learn, nat, forget = steps
        self._run([Step("filter", learn), Step("nat", nat)], tally)
        for group in groups:
            self._run(port_steps(group).in_order(), tally)
        self._run([Step("filter", forget)], tally)

    def _count(self, pairs: list[tuple[PortRules, PortRules]], steps: Steps) -> None:
        """Follow a change in how many rules there are; those around service ports that were written anew as a whole
        the next comparison counts."""
        for table, changes in (("filter", (steps.learn, steps.forget)), ("nat", (steps.nat,))):
            gone = sum(rule_count(each.get(table, {})) for old, _ in pairs for each in (old.own, old.shared))
            come = sum(rule_count(each.get(table, {})) for _, new in pairs for each in (new.own, new.shared))
            around = sum(change.gain for change in changes)
            self.held[table] = self.held.get(table, 0) + come - gone + around

    def _groups(self, pairs: list[tuple[PortRules, PortRules]]) -> Iterator[list[tuple[PortRules, PortRules]]]:
        group: list[tuple[PortRules, PortRules]] = []
        size = 0
        for pair in pairs:
            group.append(pair)
            size += sum(len(chains) for rules in pair for chains in rules.own.values())
            if size >= self._at_once:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _rules(self, key: PortKey, world: World, index: Index) -> PortRules:
        rules = port_rules(key, world.routes, index, world.settings)
        self.refused.pop(key, None)
        if rules.problem is not None:
            self.refused[key] = rules.problem
        return rules

    def _run(self, steps: Iterable[Step], tally: Tally) -> None:
        """Each transaction by itself."""
        for table, change in steps:
            if change:
                self._sound = None
                self._tool.restore(change.lines(table))
                tally.add(table, change)

    def doubt(self) -> None:
        """What there should be is another than at the last look: that nothing has changed says nothing then."""
        self._sound = None

    # ---- By comparison with what is there

    def compare(self, world: World, index: Index, tally: Tally) -> None:
        """Read what is there, and write what differs from what `world` says. Raises ApplyError if the tool cannot work
        now, or refuses what all service ports need; what it refuses of single ones is in `refused`."""
        holding = self.holding()
        digest = holding.digest()
        if digest == self._sound:
            return
        self._sound = None
        self.refused = {}
        before = (tally.written, tally.removed)
        comparison = Comparison(holding, world, self._family, self._ports(world, index), CHAINS_AT_ONCE)
        try:
            self._stream(comparison, tally)
            self.held = comparison.wanted
        except ApplyError as error:
            tally.failures.append(False)
            if isinstance(error, LockHeldError) or error.errno in _HOPELESS:
                raise
            log.debug("all at once is refused: %s", error)
            self._compare_by_parts(world, index, tally)
        if before == (tally.written, tally.removed) and not self.refused:
            self._sound = digest

    def _ports(self, world: World, index: Index) -> Iterator[tuple[PortKey, PortRules]]:
        for key in index.ports():
            if key.family is self._family:
                yield key, self._rules(key, world, index)

    def _compare_by_parts(self, world: World, index: Index, tally: Tally) -> None:
        """The same, slower: each transaction by itself, and those of service ports that are refused by halves."""
        tries = _MOST_REFUSED

        def attempt(group: Group) -> set[PortKey]:
            nonlocal tries
            change = Change()
            for _, chains in group:
                change.chains.update(chains)
            try:
                self._run([Step("nat", change)], tally)
            except ApplyError as error:
                if isinstance(error, LockHeldError) or error.errno in _HOPELESS:
                    raise
                if len(group) > 1 and tries > 0:
                    middle = len(group) // 2
                    return attempt(group[:middle]) | attempt(group[middle:])
                tries -= 1
                for key, _ in group:
                    port = key.service.port or key.protocol.name
                    self.refused[key] = Problem(str(key.service.service), f"port {port}: {error}")
                return {key for key, _ in group}
            return set()

        ports = self._ports(world, index)
        self._run(Comparison(self.holding(), world, self._family, ports, self._at_once, attempt).steps(), tally)

    def _stream(self, comparison: Comparison, tally: Tally) -> None:
        """Feed all transactions to one restore."""
        done = Tally()
        lines = self._lines(comparison.steps(), done)
        first = next(lines, None)
        if first is not None:
            self._tool.restore(chained((first,), lines))
        tally.take(done)

    def _lines(self, steps: Iterable[Step], tally: Tally) -> Iterator[str]:
        """Transactions as restore takes them; neighbours of one table become one where each copies the table."""
        table = ""
        for step in steps:
            if not step.change:
                continue
            tally.add(step.table, step.change)
            if self._tool.variant is Variant.NFT:
                yield from step.change.lines(step.table)
                continue
            if step.table != table:
                yield from ("COMMIT\n",) if table else ()
                yield f"*{step.table}\n"
                table = step.table
            yield from (line for line in step.change.lines(table) if line[0] != "*" and line != "COMMIT\n")
        yield from ("COMMIT\n",) if table else ()

    # ---- Looking, and leaving

    def has_chain(self, table: str, chain: str) -> bool:
        """Raises ApplyError."""
        return self._tool.has_chain(table, chain)

    def holding(self) -> Holding:
        """What is there. Raises ApplyError."""
        return held(self._tool.save())

    def stand_by(self, holding: Holding) -> bool:
        """Remove all but our mark, which then has a rule that looks at conntrack, so that the kernel goes on to track:
        without any such rule in a network namespace it stops, and translated connections with it. Whether there was
        anything to remove. Raises ApplyError."""
        rule = f"-A {names.LOCALITY} -m conntrack --ctstate ESTABLISHED"
        mark: Chains = {names.LOCALITY: (rule,)}
        left = {table: holding.chains(table) for table in ("nat", "filter", "mangle")}
        if left["filter"] == mark.keys() and not left["nat"] and not left["mangle"]:
            return False
        self._run([Step("filter", Change(mark))], Tally())
        del holding.hashes["filter"][names.LOCALITY]
        self.remove_all(holding)
        return True

    def remove_all(self, holding: Holding) -> None:
        """Remove our chains and the jumps to them. What somebody else's chain jumps to stays, empty. Raises
        ApplyError."""
        self._sound = None
        for table in ("nat", "filter", "mangle"):
            commands = [
                command
                for (each, chain), rules in holding.guests.items()
                if each == table and chain != names.KUBELET_FIREWALL
                for command in guest_commands(table, rules, ())
            ]
            chains = holding.chains(table)
            kept = {chain for each, chain in holding.wanted_by_others if each == table} & chains
            if kept:
                log.warning("%s: left empty, since others' rules jump to it: %s", table, ", ".join(sorted(kept)))
            first = Change(dict.fromkeys(sorted(kept), ()), commands)
            steps = [first, *removals(chains - kept, self._at_once)]
            if table == "filter" and not holding.kubelet:
                steps.insert(0, _firewall_removal(holding))
            self._run([Step(table, change) for change in steps], Tally())


def _firewall_removal(holding: Holding) -> Change:
    """Takes our rule out of kubelet's chain, and the chain too if nothing else is in it."""
    guests = frame.guests(("127.0.0.1",))["filter"]
    (ours,) = guests[names.KUBELET_FIREWALL]
    rules = holding.guests.get(("filter", names.KUBELET_FIREWALL), ())
    if ours not in rules:
        return Change()
    if rules != (ours,):
        return Change(commands=[deletion(ours)])
    jumps = [
        deletion(rule)
        for chain in ("INPUT", "OUTPUT")
        for rule in holding.guests.get(("filter", chain), ())
        if rule in guests[chain] and target_of(rule) == names.KUBELET_FIREWALL
    ]
    return Change(commands=jumps, remove={names.KUBELET_FIREWALL})
