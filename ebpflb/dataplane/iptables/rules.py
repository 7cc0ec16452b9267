"""Routes as iptables rules, in exactly the text in which `iptables-save` prints them.

Rules of this file: pure; no policy. The whole ruleset of a family is

    guests()                 rules of ours in chains of others (INPUT, …, KUBE-FIREWALL), in the order of the chain's head
    fixed()                  chains whose whole content this names: KUBE-POSTROUTING, KUBE-MARK-MASQ, KUBE-FORWARD,
                             filter KUBE-NODEPORTS, EBPFLB-LOCALITY, KUBE-PROXY-CANARY, …
    port_rules() per port    `own`: chains of this service port alone; `shared`: its lines in the SHARED chains,
                             whose order among themselves means nothing
    blocks()                 KUBE-CIP-…: what refuses the undefined ports of cluster IPs
    tails()                  the last lines of SHARED chains, which must stay behind all others

and `ruleset` puts these together, but for `guests`.
"""

from __future__ import annotations

from typing import NamedTuple

from ebpflb.dataplane.iptables.layout import Index, PortKey
from ebpflb.model import Address, Family, Problem
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.routes import RouteTable

SHARED: tuple[tuple[str, str], ...] = (
    ("nat", "KUBE-SERVICES"),
    ("nat", "KUBE-NODEPORTS"),
    ("filter", "KUBE-SERVICES"),
    ("filter", "KUBE-EXTERNAL-SERVICES"),
    ("filter", "KUBE-PROXY-FIREWALL"),
)
"""(table, chain) in which every service port has lines: any order, then the lines of `tails`."""


class Settings(NamedTuple):
    """What shapes rules beside the routes. `mark` is the bit's value; `random_fully`: whether this iptables knows it;
    `drop_invalid`: unless nf_conntrack_tcp_be_liberal is on; `comments`: on the rules of each endpoint, which cost a
    large cluster a third of its text (see `wants_comments`)."""

    mark: int = 1 << 14
    random_fully: bool = True
    drop_invalid: bool = True
    comments: bool = True


class PortRules(NamedTuple):
    """The rules of one service port. If its routes have a shape that there is no rule for, `problem` says so and the
    others are empty."""

    own: Ruleset
    shared: Ruleset
    problem: Problem | None = None


def wants_comments(routes: RouteTable) -> bool:
    """Whether the rules of endpoints should have comments: a pure function of the table, in less than a millisecond.
    Where it changes, all chains of endpoints do."""
    raise NotImplementedError


def nodeport_addresses(routes: RouteTable, family: Family) -> frozenset[Address]:
    """All addresses that a node port row has in `family`."""
    raise NotImplementedError


def port_rules(
    key: PortKey, routes: RouteTable, index: Index, settings: Settings, nodeports: frozenset[Address]
) -> PortRules:
    """The rules of one service port of `routes`; `nodeports` is `nodeport_addresses(routes, key.family)`. A service port
    without a frontend has none. Depends on nothing but its rows, the locality and these arguments."""
    raise NotImplementedError


def fixed(routes: RouteTable, family: Family, settings: Settings) -> Ruleset:
    """The chains of ours whose content this names wholly; depends on locality and health checks alone."""
    raise NotImplementedError


def blocks(routes: RouteTable, family: Family) -> Ruleset:
    """The chains KUBE-CIP-…, which refuse the undefined ports of cluster IPs, one a /20 (IPv6: /116)."""
    raise NotImplementedError


def tails(routes: RouteTable, family: Family, nodeports: frozenset[Address], localhost: bool = True) -> Ruleset:
    """The lines that stand last in SHARED chains, in this order."""
    raise NotImplementedError


def guests(family: Family, nodeports: frozenset[Address]) -> Ruleset:
    """Rules of ours in chains that are not: jumps from the built-in ones, to stand at their head in this order, and
    kubelet's martian rule in KUBE-FIREWALL where node ports are on loopback."""
    raise NotImplementedError


def ruleset(routes: RouteTable, family: Family, settings: Settings) -> tuple[Ruleset, tuple[Problem, ...]]:
    """All chains of ours in one family, with their rules, and what could not be written."""
    raise NotImplementedError
