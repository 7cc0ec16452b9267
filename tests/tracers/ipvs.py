"""Walks one new packet through what IPVS mode has in the kernel: iptables rules, ipsets, virtual servers.

    from elsewhere   PREROUTING; to an address of the node or of kube-ipvs0: mangle, filter INPUT -> IPVS
    the node's own   raw, mangle, nat OUTPUT -> IPVS -> filter OUTPUT
    what IPVS sends away begins again at OUTPUT (nat aside: that was asked already) -> mangle, nat POSTROUTING

Rules of this file: the order of the hooks, whom IPVS picks, and what an ipset's bytes mean. A virtual server of a mark
comes before one of the address (ip_vs_service_find); a destination of weight 0 gets nothing new; a virtual server
without any other is an error.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

from ebpflb.decide import Packet
from ebpflb.model import Address
from tests.tracers import Path, Place, Traced, is_local, summary
from tests.tracers.netfilter import Branch, End, Walk, entering, path_of
from tests.tracers.ruleset import Members, Ruleset, State, World

Elements = Mapping[bytes, object]
"""An ipset's elements, packed, with the mark of each if it has one."""

ServerKey = tuple[int, int, int, bytes, int]
"""A virtual server: IP version, mark (0 for none), protocol number, address, port."""


class Held(NamedTuple):
    """What the kernel holds. `texts`: rules by whether they are IPv6; `sets`: type and elements by name; `servers`:
    the weight of each destination (address and port, packed); `bound`: the addresses of kube-ipvs0, packed."""

    texts: Mapping[bool, str]
    sets: Mapping[str, tuple[str, Elements]]
    servers: Mapping[ServerKey, Mapping[bytes, int]]
    bound: frozenset[bytes]


class Tracer:
    """`local` are the node's addresses but for those of kube-ipvs0."""

    def __init__(self, held: Held, local: frozenset[Address]) -> None:
        self._rulesets = {version6: Ruleset(text) for version6, text in held.texts.items()}
        self._servers = held.servers
        sets = {name: _members(kind, elements) for name, (kind, elements) in held.sets.items()}
        self._world = World(local | {_text(each) for each in held.bound}, sets=sets)

    def trace(self, packet: Packet) -> Traced:
        """What becomes of the packet."""
        return summary(self.paths(packet))

    def paths(self, packet: Packet) -> list[Path]:
        """Everything that may become of the packet."""
        state, own = entering(packet, self._world)
        walk = Walk(self._rulesets[":" in packet.destination], self._world)
        hooks = self._from_here(walk, state) if own else self._from_elsewhere(walk, state)
        return [path_of(branch) for branch in hooks]

    def _from_elsewhere(self, walk: Walk, state: State) -> Iterator[Branch]:
        for branch in walk.hook([Branch(1.0, state)], "PREROUTING", "raw", "mangle", "nat"):
            if not self._stays(branch.state):
                yield from walk.hook(walk.hook([branch], "FORWARD", "mangle", "filter"), "POSTROUTING", "mangle", "nat")
                continue
            for balanced in self._balance(walk.hook([branch], "INPUT", "mangle", "filter")):
                if balanced.state.chosen and not self._stays(balanced.state):
                    yield from self._away(walk, balanced)
                else:
                    yield balanced

    def _from_here(self, walk: Walk, state: State) -> Iterator[Branch]:
        for branch in self._balance(walk.hook([Branch(1.0, state)], "OUTPUT", "raw", "mangle", "nat")):
            if not self._stays(branch.state):
                if branch.state.chosen:
                    yield from self._away(walk, branch)
                else:
                    yield from walk.hook(walk.hook([branch], "OUTPUT", "filter"), "POSTROUTING", "mangle", "nat")
                continue
            there = walk.hook(walk.hook([branch], "OUTPUT", "filter"), "POSTROUTING", "mangle", "nat")
            looped = [each._replace(state=each.state._replace(entered="lo")) for each in there]
            yield from walk.hook(walk.hook(looped, "PREROUTING", "raw", "mangle"), "INPUT", "mangle", "filter")

    def _away(self, walk: Walk, branch: Branch) -> list[Branch]:
        """From IPVS to another host: through OUTPUT, as if the node had made it (ip_vs_nat_send_or_cont)."""
        out = branch._replace(state=branch.state._replace(entered=""))
        return walk.hook(walk.hook([out], "OUTPUT", "raw", "mangle", "filter"), "POSTROUTING", "mangle", "nat")

    def _balance(self, branches: list[Branch]) -> Iterator[Branch]:
        """IPVS, for those that are still on their way."""
        for branch in branches:
            weights = self._server(branch.state) if branch.end is End.ACCEPT else None
            if weights is None:
                yield branch
                continue
            places = [_place(key) for key, weight in weights.items() if weight]
            assert places, f"a virtual server without a destination: {branch.state}"
            for address, port in places:
                after = branch.state._replace(destination=address, port=port, chosen=True, balanced=True)
                yield Branch(branch.chance / len(places), after)

    def _server(self, state: State) -> Mapping[bytes, int] | None:
        version = 6 if ":" in state.destination else 4
        by_mark = self._servers.get((version, state.mark, 0, b"", 0)) if state.mark else None
        if by_mark is not None:
            return by_mark
        return self._servers.get((version, 0, int(state.protocol), _packed(state.destination), state.port))

    def _stays(self, state: State) -> bool:
        return is_local(state.destination, self._world.local)


@lru_cache(maxsize=1 << 12)
def _packed(address: Address) -> bytes:
    return ip_address(address).packed


def _text(address: bytes) -> Address:
    return str(ip_address(address))


def _place(key: bytes) -> Place:
    return _text(key[:-2]), int.from_bytes(key[-2:])


# ---- ipsets


def _members(kind: str, elements: Elements) -> Members:
    """How the kernel reads a packet for a set of this type: each direction is the next part of the element."""
    if kind == "hash:ip,port,net":
        return _networks(elements)
    key = _KEYS[kind]

    def members(state: State, ways: tuple[str, ...]) -> int | None:
        found = key(state, ways)
        if found not in elements:
            return None
        mark = elements[found]
        return mark if isinstance(mark, int) else 0

    return members


def _end(state: State, way: str) -> bytes:
    return _packed(state.source if way == "src" else state.destination)


def _port(state: State, way: str) -> bytes:
    assert way == "dst", "nobody asks for a client's port"
    return struct.pack("!HB", state.port, int(state.protocol))


_KEYS: dict[str, Callable[[State, tuple[str, ...]], bytes]] = {
    "hash:ip": lambda state, ways: _end(state, *ways),
    "hash:ip,port": lambda state, ways: _end(state, ways[0]) + _port(state, ways[1]),
    "hash:ip,port,ip": lambda state, ways: _end(state, ways[0]) + _port(state, ways[1]) + _end(state, ways[2]),
    "bitmap:port": lambda state, ways: _port(state, *ways)[:2],
}


def _networks(elements: Elements) -> Members:
    """Elements end in an address and the bits of it that count."""
    by_frontend: dict[bytes, list[tuple[int, int]]] = {}
    for element in elements:
        width = 4 if len(element) == 4 + 3 + 5 else 16
        network, bits = element[width + 3 : -1], element[-1]
        shift = width * 8 - bits
        by_frontend.setdefault(element[: width + 3], []).append((shift, int.from_bytes(network) >> shift))

    def members(state: State, ways: tuple[str, ...]) -> int | None:
        first, second, third = ways
        client = int.from_bytes(_end(state, third))
        networks = by_frontend.get(_end(state, first) + _port(state, second), ())
        return 0 if any(client >> shift == prefix for shift, prefix in networks) else None

    return members
