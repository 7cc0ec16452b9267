"""What a family's tables hold of ours, in a form that a hundred thousand chains fit in.

Rules of this file: pure. Of a chain that only we write it is enough to know whether it is as it should be: a hash of
its rules. The text is kept of chains that are others' too, and of those that service ports share.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ebpflb.dataplane.iptables import names
from ebpflb.dataplane.iptables.changes import fingerprint, is_known
from ebpflb.dataplane.iptables.frame import SHARED
from ebpflb.netfilter.ruleset import Rules, SavedChain, target_of

_SHARED = frozenset(SHARED)


KUBELET_CHAINS = frozenset(("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"))


class Holding(msgspec.Struct):
    """`hashes`: by table, of each chain of ours that service ports do not share. `shared`: the rules of those that they
    do. `guests`: the rules of built-in chains and of KUBE-FIREWALL. `wanted_by_others`: (table, chain) of ours that
    somebody else's chain jumps to. `kubelet`: whether one runs here, or did."""

    hashes: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    shared: dict[tuple[str, str], Rules] = msgspec.field(default_factory=dict)
    guests: dict[tuple[str, str], Rules] = msgspec.field(default_factory=dict)
    wanted_by_others: set[tuple[str, str]] = msgspec.field(default_factory=set)
    kubelet: bool = False

    @property
    def owned(self) -> bool:
        """Whether the chains are this dataplane's."""
        marks = self.hashes.get("filter", {})
        return names.LOCALITY in marks and names.IPVS_MARK not in marks

    def chains(self, table: str) -> set[str]:
        """The names of ours."""
        return {*self.hashes.get(table, ()), *(chain for each, chain in self.shared if each == table)}

    def digest(self) -> int:
        """Equal for equal holdings in this process."""
        return hash(
            (
                frozenset((table, frozenset(chains.items())) for table, chains in self.hashes.items()),
                frozenset((place, hash(rules)) for place, rules in self.shared.items()),
                frozenset((place, hash(rules)) for place, rules in self.guests.items()),
            )
        )


def held(saved: Iterable[SavedChain]) -> Holding:
    """Take account of what was saved."""
    holding = Holding()
    for table, chain, policy, rules in saved:
        if policy != "-" or chain == names.KUBELET_FIREWALL:
            holding.guests[table, chain] = rules
        elif (table, chain) in _SHARED:
            holding.shared[table, chain] = rules
        elif is_known(table, chain):
            holding.hashes.setdefault(table, {})[chain] = fingerprint(chain, rules)
        else:
            holding.kubelet |= chain in KUBELET_CHAINS
            holding.wanted_by_others |= {
                (table, target) for rule in rules if is_known(table, target := target_of(rule))
            }
    return holding
