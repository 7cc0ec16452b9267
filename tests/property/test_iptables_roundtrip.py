"""iptables rules say what the routes say: read back they are the same routes, and a change writes what it changes.

The tables are those that the policy makes of random clusters and of random histories of one.
"""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.dataplane.iptables import frame, names, reading, rules
from ebpflb.dataplane.iptables.frame import SHARED, Settings
from ebpflb.dataplane.iptables.layout import Index
from ebpflb.model import EndpointSlice, Family, Node, ProxyOptions, Service, ServiceName
from ebpflb.netfilter.ruleset import COMMENT_LIMIT, Ruleset, restore_input, ruleset_of
from ebpflb.policy import Router, routes
from ebpflb.routes import RouteTable
from tests.property.clusters import choices_for_rules, nodes, objects, owner, steps, things, world

SETTINGS = st.builds(Settings, st.sampled_from([1 << 14, 1 << 31]), st.booleans(), st.booleans(), st.booleans())


def rendered(table: RouteTable, settings: Settings) -> dict[Family, Ruleset]:
    """The rules of both families, every route written."""
    found = {}
    for family in Family:
        found[family], problems = rules.ruleset(table, family, settings)
        assert problems == ()
    return found


def saved(ruleset: Ruleset) -> Ruleset:
    """`ruleset` after it was written and read as text."""
    lines = list(restore_input(ruleset))
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    return ruleset_of(lines)


@given(things, nodes, choices_for_rules, SETTINGS)
def test_rules_read_back_as_the_routes(
    said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions, settings: Settings
) -> None:
    """Invariant: rows, locality and owned addresses survive being written as rules, as text, and being read."""
    table = routes(world(said, node), chosen)
    found = {family: saved(ruleset) for family, ruleset in rendered(table, settings).items()}
    back = reading.routes(found, table.locality.node_addresses)
    assert back.locality == table.locality
    assert dict(back) == dict(table)
    assert back.owned == table.owned


@given(things, nodes, choices_for_rules, SETTINGS)
def test_rules_are_well_formed(
    said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions, settings: Settings
) -> None:
    """Invariant: every chain is one that cleanup knows; a rule stands in its chain, jumps to a chain that there is, and
    its comment is short enough; every chain of a service port is reached; no two lines of a shared chain say the same
    of one packet."""
    table = routes(world(said, node), chosen)
    for ruleset in rendered(table, settings).values():
        for name, chains in ruleset.items():
            jumped = set()
            for chain, found in chains.items():
                assert names.is_ours(name, chain)
                for rule in found:
                    assert rule.startswith(f"-A {chain} ")
                    for comment in re.findall(r'--comment "([^"]*)"', rule):
                        assert len(comment) <= COMMENT_LIMIT
                    target = rule.rpartition(" -j ")[2].split(" ")[0]
                    if target.startswith(("KUBE-", "EBPFLB-")) and " -j " in rule:
                        assert target in chains
                        jumped.add(target)
            own = {chain for chain in chains if chain.startswith((names.SVL, names.SEP, names.FW, names.EXT))}
            assert own <= jumped
        for name, chain in SHARED:
            matches = [re.sub(r'-m comment --comment "[^"]*" |-j .*', "", rule) for rule in ruleset[name][chain]]
            assert len(set(matches)) == len(matches)


@given(things, nodes, choices_for_rules, steps)
def test_a_change_writes_what_it_changes(
    said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions, history: list[tuple[str, object]]
) -> None:
    """Invariant: an index that followed a history is the index of its end; service ports that `update` does not name
    have the same rules before and after."""
    there = {(type(each), each.name): each for each in said}
    router = Router()
    table = router.update(world(there.values(), node), None, chosen)
    index = Index(table)
    settings = Settings()
    for _, argument in history:
        touched: frozenset[ServiceName] = frozenset()
        if isinstance(argument, Service | EndpointSlice):
            place = (type(argument), argument.name)
            old = there.get(place)
            there[place] = argument
            touched = frozenset(owner(each) for each in (old, argument) if each is not None)
        elif isinstance(argument, Node):
            node = argument
        elif isinstance(argument, ProxyOptions):
            chosen = argument
        elif isinstance(argument, int) and argument < len(there):
            touched = frozenset([owner(there.pop(list(there)[argument]))])
        older = table
        before = {key: rules.port_rules(key, older, index, settings) for key in index.ports()}
        table = router.update(world(there.values(), node), touched, chosen)
        named = index.update(older, table, table.changed_from(older))
        fresh = Index(table)
        assert {key: index.frontends(key) for key in index.ports()} == {
            key: fresh.frontends(key) for key in fresh.ports()
        }
        assert all(index.nodeports(family) == fresh.nodeports(family) for family in Family)
        after = {key: rules.port_rules(key, table, index, settings) for key in index.ports()}
        changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        assert changed <= named


@given(st.lists(objects, max_size=6), nodes, choices_for_rules)
def test_chains_of_one_service_port_are_its_own(
    said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions
) -> None:
    """Invariant: no two service ports of a family write the same chain, nor one that is fixed."""
    table = routes(world(said, node), chosen)
    index = Index(table)
    for family in Family:
        seen = {(name, chain) for name, chains in frame.fixed(table, family, Settings()).items() for chain in chains}
        for key in index.ports():
            if key.family is family:
                own = {
                    (name, chain)
                    for name, chains in rules.port_rules(key, table, index, Settings()).own.items()
                    for chain in chains
                }
                assert not own & seen
                seen |= own
