"""The iptables rules of IPVS mode in the kernel: read, compared as text, written where they differ.

Rules of this file: it decides only what differs. A chain of ours that is not as it should be is written anew as a
whole; rules of ours in chains of others are put at their head when they are not there or in the wrong order. Whatever
else stands in chains of others stays. Chains that another dataplane has too are left to it while it has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ebpflb.dataplane.ipvs.names import LOCALITY
from ebpflb.dataplane.ipvs.rules import GUESTS, SHARED, guests, is_ours
from ebpflb.model import Family
from ebpflb.netfilter.iptables import CHAINS_AT_ONCE, Iptables, Variant
from ebpflb.netfilter.ruleset import Ruleset, restore_input, target_of

TABLES = ("mangle", "nat", "filter")

# What the iptables dataplane has: it leaves them to us when we take over.
_PREDECESSORS = {
    "mangle": frozenset(("KUBE-PROXY-CANARY",)),
    "nat": SHARED["nat"] | {"KUBE-NODEPORTS", "KUBE-PROXY-CANARY"},
    "filter": SHARED["filter"]
    | {"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-PROXY-CANARY", "KUBE-CIP-REJECT"},
}
_PREDECESSORS_PREFIXES = {
    "nat": ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-"),
    "filter": ("KUBE-EXT-", "KUBE-FW-", "KUBE-CIP-"),
}


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
    another order; rules by which the iptables dataplane led to chains that are now ours go."""
    commands: dict[str, list[str]] = {}
    for table, chains in guests().items():
        names = predecessors(found).get(table, set())
        for chain, rules in found.get(table, {}).items():
            guest = chains.get(chain, ())
            if chain in names:
                continue
            there = [rule for rule in rules if rule in guest]
            old = [rule for rule in rules if rule not in guest and target_of(rule) in names]
            if old or there != list(guest):
                lines = commands.setdefault(table, [])
                lines += [f"-D {rule.removeprefix('-A ')}" for rule in old]
                if there != list(guest):
                    lines += [f"-D {rule.removeprefix('-A ')}" for rule in there]
                    lines += [f"-I {chain} {at} {rule}" for at, rule in enumerate(GUESTS[table][chain], 1)]
        for chain in chains.keys() - found.get(table, {}).keys():  # a table that is not there yet
            commands.setdefault(table, []).extend(
                f"-I {chain} {at} {rule}" for at, rule in enumerate(GUESTS[table][chain], 1)
            )
    return commands


def predecessors(found: Ruleset) -> dict[str, set[str]]:
    """The chains of the iptables dataplane by table, where the chains are that one's; a name of both is among them."""
    if LOCALITY not in found.get("filter", {}) or is_ours(found):
        return {}
    return {
        table: {
            name
            for name in found.get(table, {})
            if name in fixed or name.startswith(_PREDECESSORS_PREFIXES.get(table, ()))
        }
        for table, fixed in _PREDECESSORS.items()
    }


def put(tables: Tables, wanted: Ruleset, found: Ruleset) -> int:
    """Make the kernel hold `wanted`, given what it holds; how many chains and rules had to be written. Where the
    iptables dataplane had the chains, its own go afterwards."""
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
    for table, names in predecessors(found).items():
        _remove_chains(tables, table, sorted(names - wanted.get(table, {}).keys()))
    return sum(map(len, chains.values())) + sum(map(len, commands.values()))


def _remove_chains(tables: Tables, table: str, names: Sequence[str]) -> None:
    """Empty all, then delete all, which jump to one another; some at a time, since iptables-nft takes time quadratic in
    their number."""
    parts = [names[at : at + CHAINS_AT_ONCE] for at in range(0, len(names), CHAINS_AT_ONCE)]
    for part in parts:
        tables.write(restore_input({table: dict.fromkeys(part, ())}))
    for part in parts:
        tables.write(restore_input({}, {}, {table: set(part)}))


def ours(wanted: Ruleset, found: Ruleset) -> dict[str, dict[str, Sequence[str]]]:
    """By table and chain what is ours of `found`: for each chain of ours that is there its rules, for each built-in
    chain the rules that jump to ours. Chains that the iptables dataplane has now are none of ours."""
    shared = not is_ours(found)
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
