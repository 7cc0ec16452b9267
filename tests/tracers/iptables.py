"""Walks the text of iptables-save (any tool's) for one new packet, as the kernel would.

    from elsewhere   raw, mangle, nat PREROUTING -> mangle, filter INPUT, or FORWARD and mangle, nat POSTROUTING
    the node's own   raw, mangle, nat OUTPUT     -> filter OUTPUT -> mangle, nat POSTROUTING (-> by lo to INPUT)

Rules of this file: chance branches, so that a walk gives every path with its probability. The packet is the first of
its flow: conntrack says NEW. What is unknown is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum

from ebpflb.decide import Outcome, Packet
from ebpflb.model import Address
from tests.tracers import Path, Traced, is_local, summary
from tests.tracers.ruleset import Chain, Members, Rule, Ruleset, State, Unknown, World

DEPTH = 16
"""More chains than any sane ruleset nests: the kernel would refuse a loop."""


class _End(Enum):
    """How a chain is left; RETURN by its end, too."""

    NEXT = 0
    """Not at all: the next rule is looked at."""
    RETURN = 1
    ACCEPT = 2
    DROP = 3
    REJECT = 4


Branch = tuple[float, State, _End, str]


class Tracer:
    """`texts` is what iptables-save and ip6tables-save print, by whether it is IPv6; `local` are the node's addresses.
    `recent` says how many seconds ago a source was put on a list; `sets` holds ipsets."""

    def __init__(
        self,
        texts: Mapping[bool, str],
        local: frozenset[Address],
        sets: Mapping[str, Members] | None = None,
    ) -> None:
        self._rulesets = {version6: Ruleset(text) for version6, text in texts.items()}
        self._world = World(local, sets=sets or {})

    def trace(self, packet: Packet, recent: Mapping[str, Mapping[Address, float]] | None = None) -> Traced:
        """What becomes of the packet."""
        return summary(self.paths(packet, recent))

    def paths(self, packet: Packet, recent: Mapping[str, Mapping[Address, float]] | None = None) -> list[Path]:
        """Everything that may become of the packet."""
        ruleset = self._rulesets[":" in packet.destination]
        world = self._world._replace(recent=recent or {})
        own = not packet.interface and is_local(packet.source, world.local)
        entered = packet.interface or ("" if own else "unknown")
        state = State(packet.source, packet.destination, packet.port, packet.protocol, entered)
        return [
            _path(chance, after, end, how, packet)
            for chance, after, end, how in _Walk(ruleset, world).hooks(state, own)
        ]


def _path(chance: float, state: State, end: _End, how: str, packet: Packet) -> Path:
    if end is _End.DROP:
        return Path(chance, Outcome.DROP)
    if end is _End.REJECT:
        return Path(chance, Outcome.REJECT, how)
    if not state.chosen:
        assert not state.masqueraded, f"the source of what is no Service's is replaced: {packet}"
        return Path(chance, Outcome.NOT_SERVICE)
    to = (state.destination, state.port)
    return Path(chance, Outcome.FORWARD, "", to, state.masqueraded, state.remembered)


class _Walk:
    """One packet's way through one family's rules."""

    def __init__(self, ruleset: Ruleset, world: World) -> None:
        self._ruleset = ruleset
        self._world = world

    def hooks(self, state: State, own: bool) -> Iterator[Branch]:
        """All hooks in turn."""
        first = "OUTPUT" if own else "PREROUTING"
        branches: list[Branch] = [(1.0, state, _End.ACCEPT, "")]
        for table in ("raw", "mangle", "nat"):
            branches = self._hook(branches, table, first)
        for branch in branches:
            chance, after, end, _ = branch
            if end is not _End.ACCEPT:
                yield branch
                continue
            stays = is_local(after.destination, self._world.local)
            middle = "OUTPUT" if own else "INPUT" if stays else "FORWARD"
            some = [branch]
            for table in ("filter",) if own else ("mangle", "filter"):
                some = self._hook(some, table, middle)
            if own or not stays:
                for table in ("mangle", "nat"):
                    some = self._hook(some, table, "POSTROUTING")
            if own and stays:
                looped = [(each, state._replace(entered="lo"), end, how) for each, state, end, how in some]
                for table, hook in (("raw", "PREROUTING"), ("mangle", "PREROUTING"), ("mangle", "INPUT")):
                    looped = self._hook(looped, table, hook)
                some = self._hook(looped, "filter", "INPUT")
            yield from some

    def _hook(self, branches: list[Branch], table: str, name: str) -> list[Branch]:
        """What becomes of those that are still on their way, in a built-in chain."""
        chain = self._ruleset.chain(table, name)
        if chain is None:
            return branches
        out: list[Branch] = []
        for chance, state, end, how in branches:
            if end is not _End.ACCEPT:
                out.append((chance, state, end, how))
                continue
            for own, after, ended, answer in self._chain(table, chain, state, 0):
                if ended is _End.RETURN:
                    ended = {"ACCEPT": _End.ACCEPT, "DROP": _End.DROP}[chain.policy]
                out.append((chance * own, after, ended, answer))
        return out

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
                        if end is _End.NEXT:
                            still.append((own, after))
                        else:
                            yield own, after, end, how
            going = still
        for chance, now in going:
            yield chance, now, _End.RETURN, ""

    def _target(self, table: str, rule: Rule, state: State, depth: int) -> Iterator[Branch]:
        """What a rule does with what it matches; NEXT also after a jump that came back."""
        match rule.target:
            case "":
                yield 1.0, state, _End.NEXT, ""
            case "ACCEPT":
                yield 1.0, state, _End.ACCEPT, ""
            case "DROP":
                yield 1.0, state, _End.DROP, ""
            case "RETURN":
                yield 1.0, state, _End.RETURN, ""
            case "REJECT":
                assert table == "filter", rule.text
                yield 1.0, state, _End.REJECT, rule.options.get("--reject-with", "icmp-port-unreachable")
            case "MARK":
                mark, _, mask = rule.options["--set-xmark"].partition("/")
                bits = int(mask or "0xffffffff", 0)
                yield 1.0, state._replace(mark=state.mark & ~bits ^ int(mark, 0)), _End.NEXT, ""
            case "DNAT":
                assert table == "nat", rule.text
                address, _, port = rule.options["--to-destination"].rpartition(":")
                to = (address.strip("[]"), int(port))
                changed = to != (state.destination, state.port)  # else conntrack calls it no DNAT
                after = state._replace(destination=to[0], port=to[1], chosen=True, translated=changed)
                yield 1.0, after, _End.ACCEPT, ""
            case "MASQUERADE":
                assert table == "nat", rule.text
                yield 1.0, state._replace(masqueraded=True), _End.ACCEPT, ""
            case name:
                chain = self._ruleset.chain(table, name)
                if chain is None:
                    raise Unknown(f"neither a chain nor a known target: {rule.text}")
                for own, after, end, how in self._chain(table, chain, state, depth + 1):
                    if end is _End.RETURN and not rule.goto:
                        end = _End.NEXT
                    yield own, after, end, how
