"""Rules as routes: the inverse of `rules`.

Rules of this file: pure. What it does not understand (a rule that somebody put into a chain of ours) it passes over:
`state` tells what the kernel holds of ours, and an audit, which compares text, finds the rest. A row of which a part is
missing (a chain, a rule) is no row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ebpflb.model import Address, Family
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.routes import RouteTable

MARK_OF_OWNERSHIP = ("filter", "EBPFLB-LOCALITY")
"""(table, chain): KUBE-* chains beside it are ours, without it kube-proxy's."""


def owned(ruleset: Ruleset) -> bool:
    """Whether the KUBE-* chains of `ruleset` are ours."""
    table, chain = MARK_OF_OWNERSHIP
    return chain in ruleset.get(table, {})


def routes(rulesets: Mapping[Family, Ruleset], node_addresses: Iterable[Address]) -> RouteTable:
    """The routes that saved rulesets carry (tables filter and nat), with the locality that they name; `node_addresses`
    are what the kernel calls local. Rulesets that are not ours give no rows. `owned` is read back, too."""
    raise NotImplementedError
