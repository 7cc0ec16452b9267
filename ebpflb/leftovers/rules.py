"""Which chains and rules of a saved ruleset are kube-proxy's, and the commands that remove them.

Rules of this file: pure. A chain goes by its name. What the kubelet has under such a name stays, and so does what
somebody else's chain jumps to, with all that it leads to: a ruleset is removed whole or not at all, table by table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ebpflb.netfilter.ruleset import Rules, SavedChain, target_of

_KUBELETS = frozenset(("KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-MARK-DROP"))
_OURS = frozenset(("KUBE-CIP-REJECT",))
_OUR_PREFIX = "KUBE-CIP-"

# Beside the mark of our iptables dataplane the rest is ours, and so are these beside that of our IPVS dataplane.
_OF_IPVS = frozenset(
    (
        "KUBE-NODE-PORT",
        "KUBE-LOAD-BALANCER",
        "KUBE-SOURCE-RANGES-FIREWALL",
        "KUBE-IPVS-FILTER",
        "KUBE-IPVS-OUT-FILTER",
    )
)
_OF_IPTABLES = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-XLB-")
_OF_IPTABLES_FIXED = frozenset(("KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES"))
_MARKS = frozenset(("EBPFLB-LOCALITY", "EBPFLB-IPVS"))


class Removal(NamedTuple):
    """What goes from one table: `jumps` from built-in chains, as they are saved, and `chains` of which nothing is left
    then. `kept` are chains that would go, but for the other chain that jumps to them or to what leads there."""

    jumps: tuple[str, ...]
    chains: frozenset[str]
    kept: Mapping[str, str]


def are_ours(filter_chains: Iterable[str]) -> bool:
    """Whether a family's rules bear our mark, by the names of its chains of table filter."""
    return not _MARKS.isdisjoint(filter_chains)


def removals(saved: Iterable[SavedChain], *, ipvs_is_ours: bool) -> dict[str, Removal]:
    """By table; those of which nothing goes are not in it. `saved` is one family's whole ruleset of one variant,
    `ipvs_is_ours` is whether our IPVS dataplane is at work, or its ipsets are still here."""
    tables: dict[str, dict[str, SavedChain]] = {}
    for chain in saved:
        tables.setdefault(chain.table, {})[chain.name] = chain
    marked = are_ours(tables.get("filter", {}))
    found = {table: _removal(chains, marked, ipvs_is_ours) for table, chains in tables.items()}
    return {table: removal for table, removal in found.items() if removal.jumps or removal.chains}


def is_kube_proxys(name: str, *, marked: bool, ipvs_is_ours: bool) -> bool:
    """Whether a chain of this name is kube-proxy's, where our mark is, or is not."""
    if not name.startswith("KUBE-") or name in _KUBELETS:
        return False
    if not marked:
        return True
    if name in _OURS or name.startswith(_OUR_PREFIX):
        return False
    if ipvs_is_ours:
        return name in _OF_IPTABLES_FIXED or name.startswith(_OF_IPTABLES)
    return name in _OF_IPVS


def _removal(chains: Mapping[str, SavedChain], marked: bool, ipvs_is_ours: bool) -> Removal:
    going = {name for name in chains if is_kube_proxys(name, marked=marked, ipvs_is_ours=ipvs_is_ours)}
    kept: dict[str, str] = {}
    for name, chain in chains.items():
        if not chain.builtin and name not in going:
            _keep(name, chain.rules, chains, going, kept)
    jumps = tuple(
        rule for chain in chains.values() if chain.builtin for rule in chain.rules if target_of(rule) in going
    )
    return Removal(jumps, frozenset(going - kept.keys()), kept)


def _keep(by: str, rules: Rules, chains: Mapping[str, SavedChain], going: set[str], kept: dict[str, str]) -> None:
    """Note what `rules` of `by`, which stays, lead to."""
    reached = [(by, rules)]
    while reached:
        name, lines = reached.pop()
        for target in {target_of(rule) for rule in lines} & going:
            if target not in kept:
                kept[target] = name
                reached.append((target, chains[target].rules))


def commands(removals: Mapping[str, Removal], at_once: int = 0) -> Iterator[str]:
    """Input of `iptables-restore --noflush`, with its line ends. First no packet comes to the chains, then they are
    emptied, then deleted: so it can be done in transactions of `at_once` chains, 0 for one of all."""
    for table, removal in removals.items():
        names = sorted(removal.chains)
        parts = [names[at : at + at_once] for at in range(0, len(names), at_once)] if at_once else [names]
        many = len(parts) > 1
        if removal.jumps and (many or not names):
            yield from _transaction(table, (f"-D{rule.removeprefix('-A')}" for rule in removal.jumps))
        if many:
            for part in parts:
                yield from _transaction(table, (f"-F {name}" for name in part))
            for part in parts:
                yield from _transaction(table, (f"-X {name}" for name in part))
        elif names:
            lines = [f"-D{rule.removeprefix('-A')}" for rule in removal.jumps]
            lines += [f"-F {name}" for name in names] + [f"-X {name}" for name in names]
            yield from _transaction(table, lines)


def _transaction(table: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"*{table}\n"
    yield from (f"{line}\n" for line in lines)
    yield "COMMIT\n"
