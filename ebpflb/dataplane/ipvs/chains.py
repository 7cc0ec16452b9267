"""The iptables rules of IPVS mode in the kernel: read, compared as text, written where they differ.

Rules of this file: it decides only what differs. A chain of ours that is not as it should be is written anew as a
whole; rules of ours in chains of others are put at their head when they are not there or in the wrong order. Whatever
else stands in chains of others stays. Chains that another dataplane has too are left to it while it has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ebpflb.dataplane.ipvs.rules import GUESTS, SHARED, guests, has_services
from ebpflb.model import Family
from ebpflb.netfilter.iptables import Iptables, Variant
from ebpflb.netfilter.ruleset import Ruleset, restore_input, target_of

TABLES = ("mangle", "nat", "filter")


class Tables(Protocol):
    """The iptables of one family. Both raise ApplyError."""

    def read(self) -> Ruleset:
        """All chains of the three tables, built-in ones included."""

    def write(self, lines: Iterable[str]) -> None:
        """Input of iptables-restore."""


class IptablesTables:
    """The commands, in one variant."""

    def __init__(self, family: Family, variant: Variant) -> None:
        self._iptables = Iptables(family, variant)

    def read(self) -> Ruleset:
        found: Ruleset = {}
        for chain in self._iptables.save(TABLES):
            found.setdefault(chain.table, {})[chain.name] = chain.rules
        return found

    def write(self, lines: Iterable[str]) -> None:
        self._iptables.restore(lines)


def differing(wanted: Ruleset, found: Ruleset) -> Ruleset:
    """The chains of ours that are not as they should be."""
    return {
        table: changed
        for table, chains in wanted.items()
        if (changed := {name: rules for name, rules in chains.items() if found.get(table, {}).get(name) != rules})
    }


def jumps(found: Ruleset) -> dict[str, list[str]]:
    """Commands by table that put our rules at the head of the built-in chains which lack one of them, or have them in
    another order."""
    commands: dict[str, list[str]] = {}
    for table, chains in guests().items():
        for chain, rules in chains.items():
            there = [rule for rule in found.get(table, {}).get(chain, ()) if rule in rules]
            if there == list(rules):
                continue
            lines = commands.setdefault(table, [])
            lines += [f"-D {rule.removeprefix('-A ')}" for rule in there]
            lines += [f"-I {chain} {at} {rule}" for at, rule in enumerate(GUESTS[table][chain], 1)]
    return commands


def put(tables: Tables, wanted: Ruleset, found: Ruleset) -> int:
    """Make the kernel hold `wanted`, given what it holds; how many chains and rules had to be written."""
    chains, commands = differing(wanted, found), jumps(found)
    if not chains and not commands:
        return 0
    # A jump needs its chain in the same table; each table is one transaction, those that decide least come first.
    order = [table for table in ("filter", "mangle", "nat") if table in chains or table in commands]
    tables.write(
        line
        for table in order
        for line in restore_input({table: chains.get(table, {})}, {table: commands.get(table, [])})
    )
    return sum(map(len, chains.values())) + sum(map(len, commands.values()))


def ours(wanted: Ruleset, found: Ruleset) -> dict[str, dict[str, Sequence[str]]]:
    """By table and chain what is ours of `found`: for each chain of ours that is there its rules, for each built-in
    chain the rules that jump to ours. Chains that another dataplane has now are none of ours."""
    shared = not has_services(found)
    mine: dict[str, dict[str, Sequence[str]]] = {}
    for table, chains in found.items():
        names = {name for name in wanted.get(table, {}) if name in chains and not (shared and name in SHARED[table])}
        for name, rules in chains.items():
            if name in names:
                mine.setdefault(table, {})[name] = rules
            elif name not in wanted.get(table, {}):
                jumping = [rule for rule in rules if target_of(rule) in names]
                if jumping:
                    mine.setdefault(table, {})[name] = jumping
    return mine


def remove(tables: Tables, wanted: Ruleset, found: Ruleset) -> None:
    """Take away what is ours."""
    mine = ours(wanted, found)
    commands: dict[str, list[str]] = {}
    gone: dict[str, set[str]] = {}
    for table, chains in mine.items():
        for name, rules in chains.items():
            if name in wanted.get(table, {}):
                gone.setdefault(table, set()).add(name)
            else:
                commands.setdefault(table, []).extend(f"-D {rule.removeprefix('-A ')}" for rule in rules)
    if commands or gone:
        tables.write(restore_input({}, commands, gone))
