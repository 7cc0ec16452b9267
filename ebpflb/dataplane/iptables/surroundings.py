"""What stands around the rules of service ports, for one table of routes, and the step from one to the next.

Rules of this file: pure. It puts `frame`'s parts together at the cost of what changed: the cluster IPs of a large
cluster are ten thousand, and a change concerns one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import msgspec

from ebpflb.dataplane.iptables import frame, names
from ebpflb.dataplane.iptables.changes import Change, Steps, deletion, insertion
from ebpflb.dataplane.iptables.frame import Settings
from ebpflb.dataplane.iptables.layout import family_of
from ebpflb.model import Address, Family, ServiceName
from ebpflb.netfilter.ruleset import Rules, Ruleset
from ebpflb.routes import RouteTable, packed


class World(msgspec.Struct, frozen=True):
    """A table of routes with what else its rules depend on. `nodeports`: the addresses of node ports, in each family.
    `localnet`: whether this dataplane let packets to loopback addresses be routed, which a chain remembers."""

    routes: RouteTable
    settings: Settings
    nodeports: dict[Family, frozenset[Address]]
    localnet: bool

    def chains(self, family: Family) -> Ruleset:
        """The chains that are known whole, without those for undefined ports."""
        found = frame.fixed(self.routes, family, self.settings)
        if self.localnet and family is Family.IPV4:
            found["filter"][names.LOCALNET] = ()
        return found

    def blocks(self, family: Family) -> Ruleset:
        """The chains for undefined ports."""
        return frame.blocks(self.routes.owned, family)

    def tails(self, family: Family) -> Ruleset:
        """The last lines of shared chains."""
        return frame.tails(self.routes.owned, self.nodeports[family], family)

    def guests(self, family: Family) -> Ruleset:
        """Our rules in others' chains."""
        return frame.guests(self.nodeports[family])


def surrounding_steps(before: World, after: World, family: Family) -> Steps:
    """What turns the surroundings of a world into those of another, but for guests."""
    old, new = before.chains(family), after.chains(family)
    steps = Steps(Change(), Change(), Change())
    block_old, block_new = _changed_blocks(before, after, family)
    for chain in block_old.keys() | block_new.keys():
        if chain in block_old and chain in block_new:  # thousands of cluster IPs, of which one came or went
            there, wanted = set(block_old[chain]), set(block_new[chain])
            steps.learn.commands += map(insertion, sorted(wanted - there))
            steps.forget.commands += map(deletion, sorted(there - wanted))
        else:
            (old if chain in block_old else new)["filter"][chain] = (block_old | block_new)[chain]
    for table, first, last in (("filter", steps.learn, steps.forget), ("nat", steps.nat, steps.nat)):
        first.chains |= {chain: rules for chain, rules in new[table].items() if old[table].get(chain) != rules}
        last.remove |= old[table].keys() - new[table].keys()
    if block_old.keys() != block_new.keys() or before.nodeports[family] != after.nodeports[family]:
        tails_old, tails_new = before.tails(family), after.tails(family)
        for table, change in (("filter", steps.learn), ("nat", steps.nat)):
            for chain in tails_old[table].keys() | tails_new[table].keys():
                change.commands += _replaced(tails_old[table].get(chain, ()), tails_new[table].get(chain, ()))
    return steps


def _replaced(old: Rules, new: Rules) -> list[str]:
    """Commands that turn the last lines of a chain into others."""
    if old == new:
        return []
    kept = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))))
    return [*map(deletion, old[kept:]), *new[kept:]]


def _changed_blocks(before: World, after: World, family: Family) -> tuple[dict[str, Rules], dict[str, Rules]]:
    """The chains for undefined ports that are different, before and after."""
    old, new = before.routes.owned, after.routes.owned
    if old is new:
        return {}, {}
    changed = {
        address for address in {*old, *new} if family_of(address) is family and old.get(address) != new.get(address)
    }
    blocks = {_block(address) for address in changed}

    return _blocks_of(old, blocks, family), _blocks_of(new, blocks, family)


def _blocks_of(owned: Mapping[Address, ServiceName], blocks: set[int], family: Family) -> dict[str, Rules]:
    """The chains of some blocks."""
    within = {address: name for address, name in owned.items() if _block(address) in blocks} if blocks else {}
    return dict(frame.blocks(within, family).get("filter", {}))


def _block(address: Address) -> int:
    return int.from_bytes(packed(address)) >> frame.BLOCK_BITS
