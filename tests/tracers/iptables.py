"""Walks the text of iptables-save (any tool's) for one new packet, as the kernel would.

    from elsewhere   raw, mangle, nat PREROUTING -> mangle, filter INPUT, or FORWARD and mangle, nat POSTROUTING
    the node's own   raw, mangle, nat OUTPUT     -> filter OUTPUT -> mangle, nat POSTROUTING (-> by lo to INPUT)

Rules of this file: the order of the hooks, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ebpflb.decide import Packet
from ebpflb.model import Address
from tests.tracers import Path, Traced, is_local, summary
from tests.tracers.netfilter import Branch, End, Walk, entering, path_of
from tests.tracers.ruleset import Ruleset, State, World


class Tracer:
    """`texts` is what iptables-save and ip6tables-save print, by whether it is IPv6; `local` are the node's addresses.
    `recent` says how many seconds ago a source was put on a list."""

    def __init__(self, texts: Mapping[bool, str], local: frozenset[Address]) -> None:
        self._rulesets = {version6: Ruleset(text) for version6, text in texts.items()}
        self._world = World(local)

    def trace(self, packet: Packet, recent: Mapping[str, Mapping[Address, float]] | None = None) -> Traced:
        """What becomes of the packet."""
        return summary(self.paths(packet, recent))

    def paths(self, packet: Packet, recent: Mapping[str, Mapping[Address, float]] | None = None) -> list[Path]:
        """Everything that may become of the packet."""
        world = self._world._replace(recent=recent or {})
        state, own = entering(packet, world)
        walk = Walk(self._rulesets[":" in packet.destination], world)
        return [path_of(branch) for branch in self._hooks(walk, state, own)]

    def _hooks(self, walk: Walk, state: State, own: bool) -> Iterator[Branch]:
        """All of them in turn; where it goes to decides which comes next."""
        for branch in walk.hook([Branch(1.0, state)], "OUTPUT" if own else "PREROUTING", "raw", "mangle", "nat"):
            if branch.end is not End.ACCEPT:
                yield branch
                continue
            stays = is_local(branch.state.destination, self._world.local)
            if own:
                branches = walk.hook([branch], "OUTPUT", "filter")
            else:
                branches = walk.hook([branch], "INPUT" if stays else "FORWARD", "mangle", "filter")
            if own or not stays:
                branches = walk.hook(branches, "POSTROUTING", "mangle", "nat")
            if own and stays:
                branches = [each._replace(state=each.state._replace(entered="lo")) for each in branches]
                branches = walk.hook(walk.hook(branches, "PREROUTING", "raw", "mangle"), "INPUT", "mangle", "filter")
            yield from branches
