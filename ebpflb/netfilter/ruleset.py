"""iptables rules as text: what `iptables-save` prints, taken apart by chain, and what `iptables-restore` takes.

Rules of this file: pure, and ignorant of what a rule means. A rule is the whole line as `iptables-save` prints it,
`-A CHAIN …`, without counters, so that what was written and what was read are compared as text. A table's text may be
hundreds of thousands of lines: it is read and written chain by chain, never held as a whole unless somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple, TypeAlias

Rules: TypeAlias = tuple[str, ...]
"""The rules of one chain in their order, each a line `-A CHAIN …`."""

Chains: TypeAlias = dict[str, Rules]
"""The chains of one table by name."""

Ruleset: TypeAlias = dict[str, Chains]
"""Chains by table: `filter`, `nat`, `mangle`."""

COMMENT_LIMIT = 255
"""Bytes that a rule's comment may have (XT_MAX_COMMENT_LEN less its end)."""

_PLAIN = frozenset("_-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class SavedChain(NamedTuple):
    """One chain as it was saved. `policy` is `ACCEPT` or `DROP` for a built-in chain, `-` for any other."""

    table: str
    name: str
    policy: str
    rules: Rules

    @property
    def builtin(self) -> bool:
        return self.policy != "-"


def quoted(text: str) -> str:
    """A string argument as `iptables-save` prints it (xtables_save_string): in quotes unless it is plain."""
    if text and _PLAIN.issuperset(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
    return f'"{escaped}"'


def chain_of(rule: str) -> str:
    """The chain that a rule `-A CHAIN …` stands in."""
    return rule.split(" ", 2)[1]


def target_of(rule: str) -> str:
    """Where a rule jumps or goes: the word after its last `-j` or `-g`; "" if it only counts."""
    for flag in (" -j ", " -g "):
        _, found, rest = rule.rpartition(flag)
        if found and '"' not in rest:
            return rest.split(" ", 1)[0]
    return ""


def saved_chains(lines: Iterable[str]) -> Iterator[SavedChain]:
    """The chains of the output of `iptables-save` (of one table or of all; counters are dropped), each as soon as its
    rules have been read; those without rules come at the end of their table. Raises ValueError for text that is no
    such output, and for output that ends before its COMMIT."""
    table = ""
    policies: dict[str, str] = {}
    name = ""
    rules: list[str] = []
    for raw in lines:
        line = raw.rstrip("\n")
        if line.startswith("[") and "] -A " in line:
            line = line[line.index("] -A ") + 2 :]
        if line.startswith("-A "):
            chain = line.split(" ", 2)[1]
            if chain != name:
                if name:
                    yield SavedChain(table, name, policies.pop(name), tuple(rules))
                if chain not in policies:
                    raise ValueError(f"a rule of a chain that was not announced, or in two places: {line}")
                name, rules = chain, []
            rules.append(line)
        elif line.startswith(":"):
            chain, policy, *_ = line[1:].split(" ")
            policies[chain] = policy
        elif line.startswith("*"):
            table = line[1:]
        elif line == "COMMIT":
            if name:
                yield SavedChain(table, name, policies.pop(name), tuple(rules))
            for chain, policy in policies.items():
                yield SavedChain(table, chain, policy, ())
            table, policies, name, rules = "", {}, "", []
        elif line and not line.startswith("#"):
            raise ValueError(f"not the output of iptables-save: {line}")
    if table:
        raise ValueError(f"the output of iptables-save ends within table {table}")


def ruleset_of(lines: Iterable[str]) -> Ruleset:
    """All chains of the output of `iptables-save`, built-in ones included."""
    found: Ruleset = {}
    for chain in saved_chains(lines):
        found.setdefault(chain.table, {})[chain.name] = chain.rules
    return found


def restore_input(
    chains: Mapping[str, Mapping[str, Rules]],
    commands: Mapping[str, Iterable[str]] | None = None,
    remove: Mapping[str, AbstractSet[str]] | None = None,
) -> Iterator[str]:
    """Input lines of `iptables-restore --noflush`, with their ends, each table one transaction: `chains` of our own are
    made or emptied and filled with just these rules, then `commands` (`-I INPUT 1 …`, `-D KUBE-SERVICES …`, `-A …`:
    lines for chains that are not rewritten) run in their order, then the chains to `remove` are emptied and deleted;
    by then nothing may jump to them."""
    commands = commands or {}
    remove = remove or {}
    for table in dict.fromkeys([*chains, *commands, *remove]):
        own = chains.get(table, {})
        gone = sorted(remove.get(table, ()))
        yield f"*{table}\n"
        for name in own:
            yield f":{name} - [0:0]\n"
        for name in gone:
            yield f":{name} - [0:0]\n"
        for rules in own.values():
            for rule in rules:
                yield rule + "\n"
        for command in commands.get(table, ()):
            yield command + "\n"
        for name in gone:
            yield f"-X {name}\n"
        yield "COMMIT\n"
