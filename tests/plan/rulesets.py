"""What iptables-save would print, were our rules written where no others are."""

from __future__ import annotations

from ebpflb.dataplane.iptables.frame import Settings, guests
from ebpflb.dataplane.iptables.layout import Index
from ebpflb.dataplane.iptables.rules import ruleset
from ebpflb.model import Family
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.routes import RouteTable

_BUILT_IN: Ruleset = {
    "mangle": dict.fromkeys(("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"), ()),
    "filter": dict.fromkeys(("INPUT", "FORWARD", "OUTPUT"), ()),
    "nat": dict.fromkeys(("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"), ()),
}


def saved(table: RouteTable) -> dict[bool, str]:
    """The rules of `table`, by whether they are IPv6."""
    return {family is Family.IPV6: _saved(table, family) for family in Family}


def _saved(table: RouteTable, family: Family) -> str:
    rules, problems = ruleset(table, family, Settings())
    assert not problems
    chains = {name: {**_BUILT_IN[name], **rules.get(name, {})} for name in _BUILT_IN}
    for name, heads in guests(Index(table).nodeports(family)).items():
        chains[name] |= heads
    return text_of(chains)


def text_of(rules: Ruleset) -> str:
    """All chains of a family as iptables-save prints them."""
    lines: list[str] = []
    for name, found in rules.items():
        lines.append(f"*{name}")
        lines += [f":{chain} {'ACCEPT' if chain in _BUILT_IN[name] else '-'} [0:0]" for chain in found]
        lines += [rule for each in found.values() for rule in each]
        lines.append("COMMIT")
    return "\n".join(lines)
