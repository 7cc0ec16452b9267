"""From the rules that are there and those that should be, to what is written, in an order that breaks no traffic.

Rules of this file: pure. What is written are whole chains of our own, and single lines where many service ports share a
chain or where it belongs to others. A transaction is atomic for one table only, so the order of tables matters: filter
first learns what to refuse (what nat still translates never meets it), then nat changes, then filter forgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from ebpflb.dataplane.iptables import names
from ebpflb.dataplane.iptables.rules import PortRules
from ebpflb.netfilter.ruleset import Chains, Rules, Ruleset, restore_input, target_of

IPVS_CHAINS = frozenset(
    (
        names.IPVS_MARK,
        "KUBE-NODE-PORT",
        "KUBE-LOAD-BALANCER",
        "KUBE-SOURCE-RANGES-FIREWALL",
        "KUBE-IPVS-FILTER",
        "KUBE-IPVS-OUT-FILTER",
    )
)
"""Chains of an IPVS mode, kube-proxy's or ours, that this dataplane does not have. They go when it takes over."""

# Who jumps to others goes first.
_RANKS = (names.FW, names.EXT, names.SVC, names.SVL, names.SEP, names.CIP, names.NOT_POD, names.MARK_MASQ)


class Change(msgspec.Struct):
    """What is to be done in one table, in one transaction: chains of ours to write whole, commands (`-I`, `-A` or `-D`
    with a rule) to run in their order, chains to remove at the end."""

    chains: Chains = msgspec.field(default_factory=dict)
    commands: list[str] = msgspec.field(default_factory=list)
    remove: set[str] = msgspec.field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.chains or self.commands or self.remove)

    @property
    def written(self) -> int:
        """Rules."""
        return rule_count(self.chains) + len(self.commands) - self._deleted

    @property
    def removed(self) -> int:
        """Rules and chains."""
        return self._deleted + len(self.remove)

    @property
    def gain(self) -> int:
        """How many rules more there are by the commands."""
        return len(self.commands) - 2 * self._deleted

    @property
    def _deleted(self) -> int:
        return sum(command.startswith("-D") for command in self.commands)

    def lines(self, table: str) -> Iterator[str]:
        """As restore takes it."""
        return restore_input({table: self.chains}, {table: self.commands}, {table: self.remove})


class Step(NamedTuple):
    """A transaction."""

    table: str
    change: Change


def insertion(rule: str) -> str:
    """The command that puts a rule at the head of its chain."""
    return f"-I{rule[2:]}"


def deletion(rule: str) -> str:
    """The command that deletes a rule."""
    return f"-D{rule[2:]}"


class Steps(NamedTuple):
    """A change of both tables, in the order of this file."""

    learn: Change
    nat: Change
    forget: Change

    def add(self, other: Steps) -> None:
        """Do this and `other` together."""
        for mine, theirs in zip(self, other, strict=True):
            mine.chains.update(theirs.chains)
            mine.commands += theirs.commands
            mine.remove |= theirs.remove

    def in_order(self) -> list[Step]:
        """The transactions: as few as the order allows."""
        learn, nat, forget = self
        if not nat:
            learn = Change(
                {**learn.chains, **forget.chains},
                [*learn.commands, *forget.commands],
                learn.remove | forget.remove,
            )
            forget = Change()
        steps = (Step("filter", learn), Step("nat", nat), Step("filter", forget))
        return [step for step in steps if step.change]


def port_steps(pairs: Iterable[tuple[PortRules, PortRules]]) -> Steps:
    """What turns the rules of service ports into others, each given as (old, new)."""
    steps = Steps(Change(), Change(), Change())
    for old, new in pairs:
        for table, first, last in (("filter", steps.learn, steps.forget), ("nat", steps.nat, steps.nat)):
            before, after = old.own.get(table, {}), new.own.get(table, {})
            for chain, rules in after.items():
                if before.get(chain) != rules:
                    first.chains[chain] = rules
            last.remove |= before.keys() - after.keys()
            lines_before, lines_after = _lines(old.shared, table), _lines(new.shared, table)
            first.commands += [insertion(line) for line in lines_after if line not in lines_before]
            last.commands += [deletion(line) for line in lines_before if line not in lines_after]
    return steps


def _lines(shared: Ruleset, table: str) -> dict[str, None]:
    return {line: None for rules in shared.get(table, {}).values() for line in rules}


def guest_commands(table: str, have: Rules, want: Rules) -> list[str]:
    """What makes a chain of others have our rules: they may stand anywhere in it (who else puts his own at the head
    should not fight with us), but once and in this order. Jumps of ours that are not wanted go."""
    commands = [deletion(rule) for rule in have if rule not in want and is_known(table, target_of(rule))]
    present = [rule for rule in have if rule in want]
    if tuple(present) == want:
        return commands
    return [*commands, *map(deletion, present), *map(insertion, reversed(want))]


def is_known(table: str, chain: str) -> bool:
    """Whether a chain is ours to remove once nothing needs it: kube-router's have names that begin with KUBE-, too."""
    return names.is_ours(table, chain) or chain in IPVS_CHAINS


def removals(chains: Iterable[str], at_once: int) -> Iterator[Change]:
    """The removal of chains, so many in a transaction, those that jump to others first."""
    ordered = sorted(chains, key=lambda chain: (_rank(chain), chain))
    for at in range(0, len(ordered), at_once):
        yield Change(remove=set(ordered[at : at + at_once]))


def _rank(chain: str) -> int:
    for rank, prefix in enumerate(_RANKS):
        if chain.startswith(prefix):
            return rank + 1
    return 0


def same_rules(have: Rules | None, lines: Iterable[str], tail: Rules) -> bool:
    """Whether a shared chain has these lines in whatever order, and then `tail`."""
    if have is None:
        return False
    body = len(have) - len(tail)
    return have[body:] == tail and sorted(have[:body]) == sorted(lines)


def rule_count(chains: Mapping[str, Rules]) -> int:
    """How many rules some chains have."""
    return sum(map(len, chains.values()))


def fingerprint(chain: str, rules: Rules) -> int:
    """Equal, in this process, for chains that do the same: in KUBE-CIP-… the order means nothing, since cluster IPs are
    added one by one."""
    return hash(tuple(sorted(rules)) if chain.startswith(names.CIP) else rules)


def different(have: Mapping[str, int], want: Mapping[str, Rules]) -> Chains:
    """Those of the wanted chains that are not there or have other rules, by their fingerprints."""
    return {chain: rules for chain, rules in want.items() if have.get(chain) != fingerprint(chain, rules)}
