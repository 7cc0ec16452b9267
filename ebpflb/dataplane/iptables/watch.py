"""Whether one family's rules are still there, by a look that costs the same however many there are.

Rules of this file: it notices that rules were flushed, which tools do table by table; what else somebody may do to them
an audit finds. With variant nft, one chain of each table is listed: the one through which our rules are entered. With
legacy, listing a chain reads its table: the small ones are listed, of table nat the kernel is asked how many entries it
has, and only if these have become fewer than at our last look is it read.
"""

from __future__ import annotations

from ebpflb.dataplane.iptables import names
from ebpflb.netfilter.iptables import Iptables, Variant
from ebpflb.netfilter.ruleset import target_of

_ENTRANCES = (("nat", "PREROUTING", names.SERVICES), ("filter", "FORWARD", names.FORWARD))


class Watch:
    """One family's."""

    def __init__(self, tool: Iptables) -> None:
        self._tool = tool
        self._entries: int | None = None

    def note(self) -> None:
        """The rules were just written or compared."""
        if self._tool.variant is Variant.LEGACY:
            self._entries = self._tool.entries("nat")

    def intact(self) -> bool:
        """Raises ApplyError."""
        if not self._tool.has_chain("mangle", names.CANARY):
            return False
        for table, chain, target in _ENTRANCES:
            if table == "nat" and self._tool.variant is Variant.LEGACY:
                before, self._entries = self._entries, self._tool.entries("nat")
                if before is not None and self._entries is not None and self._entries >= before:
                    continue
            if not any(target_of(rule) == target for rule in self._tool.rules(table, chain) or ()):
                return False
        return True
