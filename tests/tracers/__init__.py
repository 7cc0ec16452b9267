"""Observers of a dataplane's plan: each reads what was written for the kernel and says what becomes of one new packet.

Rules of this file: the one form of all tracers' answers, and what `decide` says in that form. A tracer knows what the
kernel does and nothing of Services: what it cannot interpret is an error, never ignored. It shares no code with what
it observes but the layout of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ebpflb.decide import Decision, Outcome, Packet
from ebpflb.model import Address, Protocol
from ebpflb.routes import in_cidr

Place = tuple[Address, int]
"""Where a packet may go: a backend's address and port."""

TOLERANCE = 1e-6


class Traced(NamedTuple):
    """What becomes of a packet: `backends` says for each possible place whether it sees the node as the source,
    `chances` how probable it is; `how` is what a REJECT answers with ("tcp-reset", "icmp-port-unreachable", …)."""

    verdict: Outcome
    how: str = ""
    backends: Mapping[Place, bool] = {}
    chances: Mapping[Place, float] = {}

    @property
    def evenly(self) -> bool:
        """Whether each backend is as probable as every other one."""
        wanted = 1 / max(1, len(self.chances))
        return all(abs(chance - wanted) < TOLERANCE for chance in self.chances.values())


class Path(NamedTuple):
    """One thing that may happen to a packet, with its probability. `to` is where it goes if something was chosen for
    it; `remembered` are the lists that its source was put on, on the way."""

    chance: float
    verdict: Outcome
    how: str = ""
    to: Place | None = None
    masqueraded: bool = False
    remembered: tuple[str, ...] = ()


def summary(paths: Iterable[Path]) -> Traced:
    """All that may happen, as one answer. Fails if chance decides over anything but the backend."""
    found = [path for path in paths if path.chance > 0]
    verdicts = {(path.verdict, path.how) for path in found}
    assert len(verdicts) == 1, f"the verdict is left to chance: {found}"
    assert abs(sum(path.chance for path in found) - 1) < TOLERANCE, f"something gets lost: {found}"
    ((verdict, how),) = verdicts
    if verdict is not Outcome.FORWARD:
        return Traced(verdict, how)
    backends: dict[Place, bool] = {}
    chances: dict[Place, float] = {}
    for path in found:
        assert path.to is not None, f"forwarded nowhere: {path}"
        assert backends.setdefault(path.to, path.masqueraded) == path.masqueraded, f"{path.to} sees two sources"
        chances[path.to] = chances.get(path.to, 0.0) + path.chance
    return Traced(verdict, how, backends, chances)


def expected(decision: Decision, packet: Packet) -> Traced:
    """What `decide` says, in a tracer's form."""
    backends = {(each.backend.address, each.backend.port): each.masquerade for each in decision.candidates}
    how = refusal(packet) if decision.verdict is Outcome.REJECT else ""
    return Traced(decision.verdict, how, backends, {place: 1 / len(backends) for place in backends})


def refusal(packet: Packet) -> str:
    """What a refused packet is answered with, as iptables calls it: at once a reset where there is one: a client's
    connect() may miss an ICMP error for a second."""
    if packet.protocol is Protocol.TCP:
        return "tcp-reset"
    return "icmp6-port-unreachable" if ":" in packet.destination else "icmp-port-unreachable"


def is_local(address: Address, local: Iterable[Address]) -> bool:
    """Whether the kernel's local table has an address: it has all of 127.0.0.0/8 by one entry."""
    return address in local or in_cidr(address, "127.0.0.0/8")
