"""What should come of asking somewhere from somewhere, written so that a test reads like the situation it is about.

    box.expect("a1", to=web.cluster_ip(family)).reaches("b1", "c1").sees_source("a1")
    box.expect("outside", to=web.node_port("node3", family)).dropped(at="node3")
    box.check()

Rules of this file: `check` tries everything and prints the whole matrix, with what is WRONG marked. Each expectation
is tried over every protocol of the box. "Reaches" means all of these and nobody else, by enough tries: 20 for each
backend, of which one of five is missed by chance once in 10^9, and as many again where one was (once in 10^18: a run
has thousands of expectations). "Sticks" means one of them every time, by as many (the same of two by chance: once in
10^12). "Dropped" needs three proofs: silence, the drop counter of the node, and a control connection of the same
client that worked meanwhile. What the test's author wants is also compared with what `decide` says at the node where
the client's packet is first looked at.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from ebpflb.decide import Decision, Outcome
from ebpflb.demo.cluster import Place
from tests.box.clients import PATIENCE, Answer, Clients, Nothing, Target
from tests.pace import PACE

TRIES = 20
SILENCE = 0.25 * PACE  # seconds; an answer takes less than one hundredth of that


class Want(enum.Enum):
    ANSWER = "reaches"
    ALWAYS_ONE = "sticks to one of"
    REFUSED = "refused"
    DROPPED = "dropped"
    UNANSWERED = "unanswered"


class World(Protocol):
    """What an expectation needs to know of the cluster."""

    clients: Clients

    def place(self, name: str) -> Place:
        """By its name."""

    def addresses_of(self, name: str) -> frozenset[str]:
        """Every address that a place has."""

    def name_of(self, address: str) -> str:
        """Of the place with this address."""

    def drops(self, node: str) -> int:
        """How much a node has dropped so far by a verdict."""

    def may_not_send(self, client: str, verdict: Outcome) -> bool:
        """Whether this client's own kernel fails what it sends in vain."""

    def first_decision(self, client: str, to: Target, protocol: str) -> Decision:
        """What the reference says at the node where this client's packet is first looked at."""

    def control(self, client: str, family: int) -> tuple[str, Target]:
        """A server that this client reaches without any Service, and where."""


class Expectation:
    """One client, one target, and what should come of it; see the top of this file."""

    def __init__(self, world: World, client: str, to: Target, protocols: Sequence[str]) -> None:
        self._world = world
        self._client = client
        self._to = to
        self._protocols = protocols
        self._want: Want | None = None
        self._servers: tuple[str, ...] = ()
        self._source = ""
        self._node = ""

    def reaches(self, *servers: str) -> Expectation:
        """All of these servers answer in turn, and no other."""
        self._want, self._servers = Want.ANSWER, servers
        return self

    def sticks_to_one_of(self, *servers: str) -> Expectation:
        """One of these servers answers every time; the reference says that it may be any of them."""
        self._want, self._servers = Want.ALWAYS_ONE, servers
        return self

    def sees_source(self, place: str) -> Expectation:
        """The servers see an address of this place as the client's."""
        self._source = place
        return self

    def refused(self) -> Expectation:
        """At once: ECONNREFUSED, by whatever way it came."""
        self._want = Want.REFUSED
        return self

    def dropped(self, at: str) -> Expectation:
        """No answer at all, by the verdict of this node."""
        self._want, self._node = Want.DROPPED, at
        return self

    def unanswered(self) -> Expectation:
        """Nobody answers, for whatever reason: nothing serves there any more."""
        self._want = Want.UNANSWERED
        return self

    def tcp_only(self) -> Expectation:
        """Leave the other protocols out."""
        self._protocols = ("TCP",)
        return self

    def udp_only(self) -> Expectation:
        """Leave the other protocols out."""
        self._protocols = ("UDP",)
        return self

    def run(self) -> list[str]:
        """Try it; one line for each protocol, those that are not as they should be begin with WRONG."""
        attempts: dict[Want, Callable[[str], tuple[bool, str]]] = {
            Want.ANSWER: self._answered,
            Want.ALWAYS_ONE: self._answered,
            Want.REFUSED: self._refused,
            Want.DROPPED: self._dropped,
            Want.UNANSWERED: self._unanswered,
        }
        if self._want is None:
            raise ValueError(f"nothing is expected of {self._client} -> {self._to}")
        lines = []
        for protocol in self._protocols:
            disagreement = self._disagreement(protocol)
            right, seen = attempts[self._want](protocol) if not disagreement else (False, disagreement)
            wanted = f"{self._want.value} {', '.join(self._servers)}".strip()
            if self._source:
                wanted += f" as {self._source}"
            lines.append(
                f"{'right' if right else 'WRONG'}  {self._client} -> {self._to}/{protocol}  {wanted}; got {seen}"
            )
        return lines

    def _disagreement(self, protocol: str) -> str:
        """In which way the reference wants something else than the test; "" if it does not."""
        decision = self._world.first_decision(self._client, self._to, protocol)
        if self._want in (Want.ANSWER, Want.ALWAYS_ONE):
            if decision.verdict is Outcome.NOT_SERVICE:
                # Another node's address, or no Service at all: it is looked at there, or nowhere.
                return ""
            wanted = set(self._servers)
            found = {self._world.name_of(candidate.backend.address) for candidate in decision.candidates}
            return "" if wanted == found else f"a disagreement: decide says {decision.verdict.name} to {sorted(found)}"
        fitting = {
            Want.REFUSED: {Outcome.REJECT, Outcome.NOT_SERVICE},
            Want.DROPPED: {Outcome.DROP},
            Want.UNANSWERED: {Outcome.REJECT, Outcome.DROP, Outcome.NOT_SERVICE},
            None: set(),
        }[self._want]
        return "" if decision.verdict in fitting else f"a disagreement: decide says {decision.verdict.name}"

    def _answered(self, protocol: str) -> tuple[bool, str]:
        place = self._world.place(self._client)
        seen: Counter[str] = Counter()
        right = True
        sources = self._world.addresses_of(self._source) if self._source else None
        enough = TRIES * len(self._servers)
        for number in range(2 * enough):
            if number >= enough and (self._want is Want.ALWAYS_ONE or _names(seen) >= set(self._servers)):
                break
            got = self._world.clients.ask(place, self._to, protocol)
            seen[str(got)] += 1
            if isinstance(got, Nothing) or (sources is not None and got.source not in sources):
                right = False
            if isinstance(got, Nothing) and seen[str(got)] == 2:
                break  # it will not get better, and each may cost its whole patience
        names = _names(seen)
        if self._want is Want.ALWAYS_ONE:
            return right and len(names) == 1 and names <= set(self._servers), _listed(seen)
        return right and names == set(self._servers), _listed(seen)

    def _refused(self, protocol: str) -> tuple[bool, str]:
        place = self._world.place(self._client)
        seen = Counter(str(self._world.clients.ask(place, self._to, protocol)) for _ in range(3))
        return set(seen) == {self._shows(protocol, "refused")}, _listed(seen)

    def _shows(self, protocol: str, how: str) -> str:
        """How this client is shown by a verdict what otherwise shows as `how`."""
        verdict = self._world.first_decision(self._client, self._to, protocol).verdict
        told = (
            protocol == "UDP" and verdict is not Outcome.NOT_SERVICE and self._world.may_not_send(self._client, verdict)
        )
        return "not permitted" if told else how

    def _unanswered(self, protocol: str) -> tuple[bool, str]:
        got = self._world.clients.ask(self._world.place(self._client), self._to, protocol, patience=SILENCE)
        return isinstance(got, Nothing), str(got)

    def _dropped(self, protocol: str) -> tuple[bool, str]:
        place = self._world.place(self._client)
        before = self._world.drops(self._node)
        got = self._world.clients.ask(place, self._to, protocol, patience=SILENCE)
        deadline = time.monotonic() + PATIENCE
        while not (counted := self._world.drops(self._node) - before) and time.monotonic() < deadline:
            time.sleep(0.01)  # a packet that is still on its way there is counted when it comes
        server, control = self._world.control(self._client, 6 if ":" in self._to.address else 4)
        meanwhile = self._world.clients.ask(place, control, protocol)
        alive = isinstance(meanwhile, Answer) and meanwhile.server == server
        words = f"{got}, {counted} counted at {self._node}, control connection: {meanwhile}"
        return got == Nothing(self._shows(protocol, "silence")) and counted > 0 and alive, words


def _names(seen: Counter[str]) -> set[str]:
    """Of the servers that answered."""
    return {words.split()[0] for words in seen}


def _listed(seen: Counter[str]) -> str:
    return ", ".join(f"{count} x {words}" for words, count in sorted(seen.items()))
