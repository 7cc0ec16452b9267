"""Properties of what the iptables dataplane writes: the rules that are there, changed so, are those that should be.

restore is played by `restored`, which does what iptables-restore does with such input, and refuses what it refuses.
"""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.dataplane.iptables import names
from ebpflb.dataplane.iptables.changes import Step, port_steps
from ebpflb.dataplane.iptables.comparison import Comparison
from ebpflb.dataplane.iptables.frame import SHARED, Settings
from ebpflb.dataplane.iptables.holding import held
from ebpflb.dataplane.iptables.layout import Index, port_key
from ebpflb.dataplane.iptables.rules import port_rules
from ebpflb.dataplane.iptables.surroundings import World, surrounding_steps
from ebpflb.model import EndpointSlice, Family, Node, ProxyOptions, Service
from ebpflb.netfilter.ruleset import SavedChain, target_of
from ebpflb.policy import Router
from ebpflb.routes import RouteTable
from tests.property.clusters import choices_for_rules, nodes, objects, things, world

_BUILTIN = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
}
_FOREIGN = "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT"

Kernel = dict[str, dict[str, list[str]]]


def empty() -> Kernel:
    """A node's tables, with a rule of somebody else's."""
    kernel: Kernel = {table: {chain: [] for chain in chains} for table, chains in _BUILTIN.items()}
    kernel["filter"]["INPUT"].append(_FOREIGN)
    return kernel


def restored(kernel: Kernel, steps: Iterable[Step]) -> Kernel:
    """The tables after some transactions. Each must leave every jump with a chain to go to."""
    for table, change in steps:
        chains = {chain: list(rules) for chain, rules in kernel[table].items()}
        for line in change.lines(table):
            command, _, rest = line.strip().partition(" ")
            chain = rest.split(" ")[0]
            rule = f"-A {rest}"
            if command.startswith(":"):
                chains[command[1:]] = []
            elif command == "-A":
                chains[chain].append(rule)
            elif command == "-I":
                chains[chain].insert(0, rule)
            elif command == "-D":
                chains[chain].remove(rule)
            elif command == "-X":
                assert chains.pop(chain) == []
            else:
                assert command in (f"*{table}", "COMMIT")
        for rules in chains.values():
            for each in rules:
                target = target_of(each)
                assert target in chains or not target.startswith(("KUBE-", "EBPFLB-")), each
        kernel = {**kernel, table: chains}
    return kernel


def alike(kernel: Kernel) -> Kernel:
    """The tables without the order of chains in which it does not count: that of lines which service ports share. What
    must stand last there, a comparison has looked at."""
    return {
        table: {
            chain: sorted(rules) if (table, chain) in SHARED or chain.startswith(names.CIP) else rules
            for chain, rules in chains.items()
        }
        for table, chains in kernel.items()
    }


def world_of(table: RouteTable, index: Index) -> World:
    return World(table, Settings(), {family: index.nodeports(family) for family in Family}, False)


def compared(kernel: Kernel, table: RouteTable, family: Family, at_once: int) -> list[Step]:
    """What a comparison writes."""
    index = Index(table)
    saved = [
        SavedChain(name, chain, "ACCEPT" if chain in _BUILTIN[name] else "-", tuple(rules))
        for name, chains in kernel.items()
        for chain, rules in chains.items()
    ]
    ports = ((key, port_rules(key, table, index, Settings())) for key in index.ports() if key.family is family)
    found = Comparison(held(saved), world_of(table, index), family, ports, at_once).steps()
    return [step for step in found if step.change]


@given(things, things, nodes, choices_for_rules, st.sampled_from(Family), st.sampled_from([1, 5, 500]))
def test_a_comparison_ends_in_the_rules_of_the_routes(
    said: list[Service | EndpointSlice],
    later: list[Service | EndpointSlice],
    node: Node,
    chosen: ProxyOptions,
    family: Family,
    at_once: int,
) -> None:
    """Invariant: from whatever rules of ours, a comparison comes to those of an empty node; a second one has nothing to
    do; and a rule of somebody else's stays."""
    first, second = (Router().update(world(each, node), None, chosen) for each in (said, later))
    kernel = restored(empty(), compared(empty(), first, family, at_once))
    assert compared(kernel, first, family, at_once) == []
    kernel = restored(kernel, compared(kernel, second, family, at_once))
    assert compared(kernel, second, family, at_once) == []
    fresh = restored(empty(), compared(empty(), second, family, at_once))
    assert _FOREIGN in kernel["filter"]["INPUT"]
    for table in fresh:
        kubelet = kernel[table].pop("KUBE-FIREWALL", None), fresh[table].pop("KUBE-FIREWALL", None)
        assert kubelet[0] is not None or kubelet[1] is None
        for chain in _BUILTIN[table]:  # its jumps stay with it
            kernel[table][chain] = [rule for rule in kernel[table][chain] if target_of(rule) != "KUBE-FIREWALL"]
            fresh[table][chain] = [rule for rule in fresh[table][chain] if target_of(rule) != "KUBE-FIREWALL"]
    assert alike(kernel) == alike(fresh)


@given(things, nodes, choices_for_rules, st.lists(objects, min_size=1, max_size=6), st.sampled_from(Family))
def test_a_change_ends_where_a_comparison_would(
    said: list[Service | EndpointSlice],
    node: Node,
    chosen: ProxyOptions,
    history: list[Service | EndpointSlice],
    family: Family,
) -> None:
    """Invariant: after the steps of a change a comparison finds nothing to do, unless node ports came to loopback or
    went from it, which is written by comparison."""
    router = Router()
    told = [*said]
    table = router.update(world(told, node), None, chosen)
    kernel = restored(empty(), compared(empty(), table, family, 500))
    index = Index(table)
    for each in history:
        told.append(each)
        after = router.update(world(told, node), None, chosen)
        changed = after.changed_from(table)
        keys = {
            port_key(key[0], route)
            for key in changed
            for route in (table.get(key), after.get(key))
            if route is not None
        }
        old = {key: port_rules(key, table, index, Settings()) for key in keys}
        before = world_of(table, index)
        touched = index.update(table, after, changed)
        now = world_of(after, index)
        if touched - keys or before.guests(family) != now.guests(family):
            kernel = restored(kernel, compared(kernel, after, family, 500))
        else:
            steps = surrounding_steps(before, now, family)
            pairs = [
                (rules, port_rules(key, after, index, Settings())) for key, rules in old.items() if key.family is family
            ]
            steps.add(port_steps(pairs))
            kernel = restored(kernel, steps.in_order())
        assert compared(kernel, after, family, 500) == []
        table = after
