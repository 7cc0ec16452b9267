"""Walks chains for one packet: the part of netfilter that iptables and IPVS have in common.

Rules of this file: chance branches, so that a walk gives every path with its probability. The packet is the first of
its flow: conntrack says NEW. What is unknown is an error. Which hook comes when is said by the tracers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from ebpflb.decide import Outcome, Packet
from tests.tracers import Path, is_local
from tests.tracers.ruleset import Chain, Rule, Ruleset, State, Unknown, World

DEPTH = 16
"""More chains than any sane ruleset nests: the kernel would refuse a loop."""


class End(Enum):
    """How a chain is left; RETURN by its end, too."""

    NEXT = 0
    """Not at all: the next rule is looked at."""
    RETURN = 1
    ACCEPT = 2
    DROP = 3
    REJECT = 4


class Branch(NamedTuple):
    """One way that a packet may have gone. `how` is what a REJECT answers."""

    chance: float
    state: State
    end: End = End.ACCEPT
    how: str = ""


def entering(packet: Packet, world: World) -> tuple[State, bool]:
    """The packet before the first hook, and whether it is the node's own."""
    own = not packet.interface and is_local(packet.source, world.local)
    entered = packet.interface or ("" if own else "unknown")
    return State(packet.source, packet.destination, packet.port, packet.protocol, entered), own


def path_of(branch: Branch) -> Path:
    """What a branch comes to at its end."""
    state = branch.state
    if branch.end is End.DROP:
        return Path(branch.chance, Outcome.DROP)
    if branch.end is End.REJECT:
        return Path(branch.chance, Outcome.REJECT, branch.how)
    if not state.chosen:
        assert not state.masqueraded, f"the source of what is no Service's is replaced: {state}"
        return Path(branch.chance, Outcome.NOT_SERVICE)
    to = (state.destination, state.port)
    return Path(branch.chance, Outcome.FORWARD, "", to, state.masqueraded, state.remembered)


class Walk:
    """One packet's way through one family's rules."""

    def __init__(self, ruleset: Ruleset, world: World) -> None:
        self._ruleset = ruleset
        self._world = world

    def hook(self, branches: Iterable[Branch], name: str, *tables: str) -> list[Branch]:
        """What becomes of those that are still on their way in the built-in chains `name` of these tables."""
        found = list(branches)
        for table in tables:
            chain = self._ruleset.chain(table, name)
            if chain is not None:
                found = [after for branch in found for after in self._built_in(table, chain, branch)]
        return found

    def _built_in(self, table: str, chain: Chain, branch: Branch) -> Iterator[Branch]:
        if branch.end is not End.ACCEPT:
            yield branch
            return
        for after in self._chain(table, chain, branch.state, 0):
            end = {"ACCEPT": End.ACCEPT, "DROP": End.DROP}[chain.policy] if after.end is End.RETURN else after.end
            yield Branch(branch.chance * after.chance, after.state, end, after.how)

    def _chain(self, table: str, chain: Chain, state: State, depth: int) -> Iterator[Branch]:
        """Every way through a chain."""
        if depth > DEPTH:
            raise Unknown("chains that jump in a circle")
        world = self._world
        going = [(1.0, state)]
        for rule in chain.rules_for(state):
            if not going:
                return
            still: list[tuple[float, State]] = []
            for chance, now in going:
                for match in rule.matches:
                    if not match(now, world):
                        still.append((chance, now))
                        break
                else:
                    if rule.chance < 1:
                        still.append((chance * (1 - rule.chance), now))
                    if rule.lists:
                        now = now._replace(remembered=now.remembered + rule.lists)
                    for own, after, end, how in self._target(table, rule, now, depth) if rule.chance else ():
                        own *= chance * rule.chance
                        if end is End.NEXT:
                            still.append((own, after))
                        else:
                            yield Branch(own, after, end, how)
            going = still
        for chance, now in going:
            yield Branch(chance, now, End.RETURN)

    def _target(self, table: str, rule: Rule, state: State, depth: int) -> Iterator[Branch]:
        """What a rule does with what it matches; NEXT also after a jump that came back."""
        match rule.target:
            case "":
                yield Branch(1.0, state, End.NEXT)
            case "ACCEPT":
                yield Branch(1.0, state, End.ACCEPT)
            case "DROP":
                yield Branch(1.0, state, End.DROP)
            case "RETURN":
                yield Branch(1.0, state, End.RETURN)
            case "REJECT":
                assert table == "filter", rule.text
                yield Branch(1.0, state, End.REJECT, rule.options.get("--reject-with", "icmp-port-unreachable"))
            case "MARK":
                mark, _, mask = rule.options["--set-xmark"].partition("/")
                bits = int(mask or "0xffffffff", 0)
                yield Branch(1.0, state._replace(mark=state.mark & ~bits ^ int(mark, 0)), End.NEXT)
            case "SET":
                # Of all that SET can do: take a mark from an element. A packet of no element keeps its own.
                found = self._world.element(rule.options["--map-set"], state, tuple(rule.options["ways"].split(",")))
                assert "--map-mark" in rule.options, rule.text
                yield Branch(1.0, state if found is None else state._replace(mark=found), End.NEXT)
            case "DNAT":
                assert table == "nat", rule.text
                address, _, port = rule.options["--to-destination"].rpartition(":")
                to = (address.strip("[]"), int(port))
                changed = to != (state.destination, state.port)  # else conntrack calls it no DNAT
                after = state._replace(destination=to[0], port=to[1], chosen=True, translated=changed)
                yield Branch(1.0, after, End.ACCEPT)
            case "MASQUERADE":
                assert table == "nat", rule.text
                yield Branch(1.0, state._replace(masqueraded=True), End.ACCEPT)
            case name:
                chain = self._ruleset.chain(table, name)
                if chain is None:
                    raise Unknown(f"neither a chain nor a known target: {rule.text}")
                for own, after, end, how in self._chain(table, chain, state, depth + 1):
                    if end is End.RETURN and not rule.goto:
                        end = End.NEXT
                    yield Branch(own, after, end, how)
