"""The text of iptables-save as rules that can be asked whether they match a packet.

Rules of this file: every word of a rule is understood or an error (Unknown), also of rules that no packet reaches, as
soon as their chain is looked at. A chain is compiled when it is first asked for; its rules are found by destination
address and port, since a large cluster's have thousands that differ in nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ebpflb.model import Address, Protocol
from ebpflb.routes import in_cidr
from tests.tracers import is_local


class Unknown(Exception):
    """A rule has something that this tracer does not know; the message has the rule."""


class State(NamedTuple):
    """A packet on its way, as matches see it. `entered` is the interface that it came by, "" for the node's own;
    `chosen` says that a rule gave it a destination, `translated` that this is another
    one than it had, `balanced` that IPVS did that. `remembered` are the lists that its source was put on."""

    source: Address
    destination: Address
    port: int
    protocol: Protocol
    entered: str = ""
    mark: int = 0
    chosen: bool = False
    translated: bool = False
    balanced: bool = False
    masqueraded: bool = False
    remembered: tuple[str, ...] = ()


Members = Callable[[State, tuple[str, ...]], "int | None"]
"""What an ipset has for a packet, read by these directions ("src", "dst"): None if it is not in there, else the mark
that the element carries (0 for none)."""


class World(NamedTuple):
    """What matches know besides the packet: the node's addresses, how many seconds ago each source was put on each list
    of `recent`, and what each ipset holds."""

    local: frozenset[Address]
    recent: Mapping[str, Mapping[Address, float]] = {}
    sets: Mapping[str, Members] = {}

    def element(self, name: str, state: State, ways: tuple[str, ...]) -> int | None:
        """What an ipset has for a packet. Raises Unknown if there is no such set."""
        if name not in self.sets:
            raise Unknown(f"no such ipset: {name}")
        return self.sets[name](state, ways)


Match = Callable[[State, World], bool]


class Rule(NamedTuple):
    """A line `-A`. `chance` is the probability that its `statistic` match has; `lists` are the lists of `recent` that
    it puts a source on; `goto` says that the jump does not come back."""

    text: str
    matches: tuple[Match, ...]
    chance: float
    lists: tuple[str, ...]
    target: str
    options: Mapping[str, str]
    goto: bool
    address: Address | None
    port: int | None


class Chain:
    """The rules of one chain in order; `policy` is "" for one that is not built in."""

    def __init__(self, policy: str, lines: list[str]) -> None:
        self.policy = policy
        self._places: dict[tuple[Address | None, int | None], list[tuple[int, Rule]]] = {}
        self._known: dict[tuple[Address, int], list[Rule]] = {}
        for number, line in enumerate(lines):
            rule = compiled(line)
            self._places.setdefault((rule.address, rule.port), []).append((number, rule))

    def rules_for(self, state: State) -> list[Rule]:
        """Those that may match, in order."""
        key = (state.destination, state.port)
        found = self._known.get(key)
        if found is None:
            places = (key, (state.destination, None), (None, state.port), (None, None))
            numbered = [each for place in places for each in self._places.get(place, ())]
            found = self._known[key] = [rule for _, rule in sorted(numbered, key=lambda each: each[0])]
        return found


class Ruleset:
    """All tables of one family."""

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[str, str], list[str]] = {}
        self._policies: dict[tuple[str, str], str] = {}
        self._chains: dict[tuple[str, str], Chain] = {}
        table = ""
        for line in text.splitlines():
            line = _COUNTERS.sub("", line)
            if line.startswith("-A "):
                _, chain, rest = (line + " ").split(" ", 2)
                if (table, chain) not in self._lines:
                    raise Unknown(f"a rule in a chain that {table} lacks: {line}")
                self._lines[table, chain].append(rest.strip())
            elif line.startswith(":"):
                chain, policy = line[1:].split()[:2]
                self._lines[table, chain] = []
                self._policies[table, chain] = "" if policy == "-" else policy
            elif line.startswith("*"):
                table = line[1:]
            elif line and line != "COMMIT" and not line.startswith("#"):
                raise Unknown(line)

    def chain(self, table: str, name: str) -> Chain | None:
        """A chain; None if there is none of the name."""
        key = (table, name)
        if key not in self._lines:
            return None
        if key not in self._chains:
            self._chains[key] = Chain(self._policies[key], self._lines[key])
        return self._chains[key]

    def names(self, table: str) -> Iterator[str]:
        """The chains of a table."""
        return (chain for found, chain in self._lines if found == table)


_COUNTERS = re.compile(r"^\[\d+:\d+\] ")
_WORDS = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_PROTOCOLS = {each.name.lower(): each for each in Protocol}
_STATES = {"NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED", "DNAT", "SNAT"}

# Words that say nothing about whether a rule matches: "comment" and "nfacct" always do, the others come with a match
# that is told by its own words.
_SILENT_MATCHES = frozenset(
    ("comment", "nfacct", "tcp", "udp", "sctp", "addrtype", "conntrack", "mark", "statistic", "recent", "set", "ipvs")
)
_TARGET_OPTIONS = {
    "DNAT": {"--to-destination"},
    "MARK": {"--set-xmark"},
    "MASQUERADE": {"--random-fully"},
    "REJECT": {"--reject-with"},
    "SET": {"--map-set", "--map-mark"},
}
_FLAGS = frozenset(("--random-fully", "--map-mark"))


def compiled(text: str) -> Rule:
    """A rule, of what follows `-A CHAIN`. Raises Unknown."""
    words = [quoted or plain for quoted, plain in _WORDS.findall(text)]
    matches: list[Match] = []
    options: dict[str, str] = {}
    lists: list[str] = []
    recent: dict[str, str] = {}
    chance, target, goto = 1.0, "", False
    address: Address | None = None
    port: int | None = None
    at, negated = 0, False

    def value() -> str:
        nonlocal at
        at += 1
        if at >= len(words):
            raise Unknown(text)
        return str(words[at])

    def add(match: Match) -> None:
        matches.append((lambda state, world: not match(state, world)) if negated else match)

    while at < len(words):
        word = words[at]
        if word == "!":
            negated = True
            at += 1
            continue
        if target:
            if negated or word not in _TARGET_OPTIONS.get(target, ()):
                raise Unknown(text)
            options[word] = "" if word in _FLAGS else value()
            if word == "--map-set":
                options["ways"] = value()
        elif word in ("-j", "-g"):
            target, goto = value(), word == "-g"
        elif word == "-m":
            if value() not in _SILENT_MATCHES:
                raise Unknown(text)
        elif word in ("--comment", "--nfacct-name"):
            value()
        elif word == "-d":
            cidr = value()
            exact = cidr.endswith(("/32", "/128")) or "/" not in cidr
            if exact and not negated:
                address = cidr.partition("/")[0]
            else:
                add(_destination(cidr))
        elif word == "-s":
            add(_source(value()))
        elif word == "-i":
            add(_entered(value()))
        elif word == "-p":
            add(_protocol(value(), text))
        elif word == "--dport":
            if negated:
                raise Unknown(text)
            port = int(value())
        elif word in ("--src-type", "--dst-type"):
            if value() != "LOCAL":
                raise Unknown(text)
            add(_source_is_local if word == "--src-type" else _destination_is_local)
        elif word == "--ctstate":
            add(_conntrack(frozenset(value().split(",")), text))
        elif word == "--mark":
            add(_mark(value()))
        elif word == "--mode":
            if negated or value() != "random":
                raise Unknown(text)
        elif word == "--probability" and not negated:
            chance = float(value())
        elif word in ("--set", "--rcheck", "--reap", "--rsource") and not negated:
            recent[word] = ""
        elif word in ("--name", "--seconds", "--mask") and not negated:
            recent[word] = value()
        elif word == "--ipvs":
            add(_balanced)
        elif word == "--match-set":
            name, directions = value(), value()
            add(_set(name, directions, text))
        else:
            raise Unknown(text)
        at, negated = at + 1, False
    if negated:
        raise Unknown(text)
    if recent:
        lists += _recent(recent, text, add)
    return Rule(text, tuple(matches), chance, tuple(lists), target, options, goto, address, port)


# ---- Matches ----


def _destination(cidr: str) -> Match:
    return lambda state, world: in_cidr(state.destination, cidr)


def _source(cidr: str) -> Match:
    if "/" not in cidr:
        return lambda state, world: state.source == cidr
    return lambda state, world: in_cidr(state.source, cidr)


def _entered(name: str) -> Match:
    if name.endswith("+"):
        return lambda state, world: state.entered != "" and state.entered.startswith(name[:-1])
    return lambda state, world: state.entered == name


def _protocol(name: str, text: str) -> Match:
    protocol = _PROTOCOLS.get(name)
    if protocol is None:
        raise Unknown(text)
    return lambda state, world: state.protocol is protocol


def _source_is_local(state: State, world: World) -> bool:
    return is_local(state.source, world.local)


def _destination_is_local(state: State, world: World) -> bool:
    return is_local(state.destination, world.local)


def _balanced(state: State, world: World) -> bool:
    return state.balanced


def _conntrack(states: frozenset[str], text: str) -> Match:
    if not states <= _STATES:
        raise Unknown(text)
    new, dnat = "NEW" in states, "DNAT" in states
    return lambda state, world: new or (dnat and state.translated)


def _mark(words: str) -> Match:
    mark, _, mask = words.partition("/")
    wanted, bits = int(mark, 0), int(mask or "0xffffffff", 0)
    return lambda state, world: state.mark & bits == wanted


def _set(name: str, directions: str, text: str) -> Match:
    ways = tuple(directions.split(","))
    if not set(ways) <= {"src", "dst"}:
        raise Unknown(text)
    return lambda state, world: world.element(name, state, ways) is not None


def _recent(found: dict[str, str], text: str, add: Callable[[Match], None]) -> list[str]:
    name = found.get("--name")
    if not name or "--rsource" not in found or found.get("--mask") not in _WHOLE:
        raise Unknown(text)
    if "--set" in found and not {"--rcheck", "--seconds", "--reap"} & found.keys():
        return [name]
    if "--rcheck" in found and "--seconds" in found and "--set" not in found:
        seconds = int(found["--seconds"])
        add(lambda state, world: world.recent.get(name, {}).get(state.source, seconds) < seconds)
        return []
    raise Unknown(text)


_WHOLE = ("255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
