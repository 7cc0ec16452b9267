"""Rows of the packet-flow table: a situation, and by hand what becomes of each packet in it.

Rules of this file: a row is written in IPv4 and runs in IPv6 too; nothing expected is computed with the policy's code.

A packet is `CLIENT ADDRESS:PORT[/PROTOCOL]`; the client is a role (pod, remote-pod, node, other-node, outside) or an
address, with `@INTERFACE` behind it if that matters. What becomes of it is REJECT, DROP or NOT_SERVICE, or the backends
that it may reach: `10.0.1.1:80 10.0.2.1:80`, with `masq` in front if they see this node as the source, or with a star
at each backend that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import pytest

from ebpflb.decide import Decision, Outcome, Packet, decide
from ebpflb.model import EndpointSlice, Family, Node, Protocol, ProxyOptions, Service, Snapshot
from ebpflb.policy import routes
from ebpflb.routes import RouteTable
from tests.world import NODE_IP, OTHER_NODE_IP, OUTSIDE, POD, REMOTE_POD, in_family, options, snapshot, v6

_ROLES = {"pod": POD, "remote-pod": REMOTE_POD, "node": NODE_IP, "other-node": OTHER_NODE_IP, "outside": OUTSIDE}
_Test = TypeVar("_Test", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Situation:
    """A named row; `families` it makes sense in."""

    name: str
    snapshot: Snapshot
    options: ProxyOptions
    wanted: Mapping[str, str]
    families: tuple[Family, ...]


def situation(
    name: str,
    *objects: Service | EndpointSlice,
    wanted: Mapping[str, str],
    node: Node | None = None,
    options: ProxyOptions = options(),  # noqa: B008  (immutable)
    families: tuple[Family, ...] = tuple(Family),
) -> Situation:
    """A row about `objects`, on the node and with the options of the address convention unless told otherwise."""
    return Situation(name, snapshot(*objects, node=node), options, wanted, families)


def table_of(row: Situation, family: Family) -> RouteTable:
    """The routes in that situation."""
    return routes(in_family(row.snapshot, family), in_family(row.options, family))


def packet(text: str, family: Family = Family.IPV4) -> Packet:
    """The packet that a row's text is about."""
    who, _, target = text.partition(" ")
    client, _, interface = who.partition("@")
    where, _, protocol = target.partition("/")
    address, _, port = where.rpartition(":")
    source = _ROLES.get(client, client)
    return Packet(_in(source, family), _in(address, family), int(port), Protocol[protocol or "TCP"], interface)


def outcome(decision: Decision) -> object:
    """A decision in the terms of `expected`."""
    if decision.verdict is not Outcome.FORWARD:
        return decision.verdict.name
    return {(each.backend.address, each.backend.port): each.masquerade for each in decision.candidates}


def expected(text: str, family: Family = Family.IPV4) -> object:
    """What a row's text says: a verdict's name, or {(address, port): masqueraded}."""
    words = text.split()
    if words[0] in Outcome.__members__:
        return words[0]
    everywhere = words[0] == "masq"
    wanted = {}
    for word in words[everywhere:]:
        address, _, port = word.rstrip("*").rpartition(":")
        wanted[_in(address, family), int(port)] = everywhere or word.endswith("*")
    return wanted


def every(rows: Iterable[Situation]) -> Callable[[_Test], _Test]:
    """Runs a test, which takes `row` and `family`, for each row in each of its families."""
    cases = [
        pytest.param(row, family, id=f"{row.name}-{family.name.lower()}") for row in rows for family in row.families
    ]
    names = [case.id for case in cases]
    assert len(names) == len(set(names)), "two rows of one name"
    return pytest.mark.parametrize(("row", "family"), cases)


def check(row: Situation, family: Family) -> None:
    """Asserts what becomes of each of the row's packets; says all that is wrong, with the reasons."""
    table = table_of(row, family)
    wrong = []
    for text, then in row.wanted.items():
        decision = decide(table, packet(text, family))
        if outcome(decision) != expected(then, family):
            wrong.append(f"{text}: wanted {then}, got {outcome(decision)}: {'; '.join(decision.reasons)}")
    assert not wrong, "\n".join(wrong)


def _in(address: str, family: Family) -> str:
    return v6(address) if family is Family.IPV6 and ":" not in address else address
