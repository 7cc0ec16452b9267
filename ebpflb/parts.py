"""The parts that commands are given: where dataplanes, sources and the policy come from.

Rules of this file: types and choices between parts, no concrete part and no I/O. Commands see these seams only, so a
test runs any command on parts of its own; `wiring` makes the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ebpflb.config import Config
from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError, Unsupported
from ebpflb.model import Problem
from ebpflb.reconcile import Desired
from ebpflb.source import Source


class NothingProgrammed(EbpflbError):
    """No dataplane holds anything here. Exit status 4."""

    exit_status = 4


class Watch(NamedTuple):
    """A descriptor of a dataplane, and what to call when it is readable. Should that fail, an audit follows."""

    fd: int
    handle: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Parts:
    """How a command gets at the world.

    `dataplanes` gives the ladder for a Config, best first. `watches` and `device_problems` ask a started dataplane
    what else to listen to, and what is wrong with the devices. `privileged` is whether this process may change the
    node's network. `patience` is how many seconds a command that only looks waits for the sources. `clock` counts seconds from anywhere, `random` gives [0, 1), `now` is the time of day as RFC 3339.
    """

    hostname: Callable[[], str]
    dataplanes: Callable[[Config], Sequence[Dataplane]]
    sources: Callable[[Config], Sequence[Source]]
    desired: Callable[[Config, Sequence[Source]], Desired]
    watches: Callable[[Dataplane], Sequence[Watch]]
    device_problems: Callable[[Dataplane], Iterable[Problem]]
    privileged: Callable[[], bool]
    clock: Callable[[], float]
    random: Callable[[], float]
    now: Callable[[], str]
    socket_name: str
    patience: float = 30.0


class Choice(NamedTuple):
    """The dataplane that will carry services, and why not the ones before it: (name, reason)."""

    dataplane: Dataplane
    passed: tuple[tuple[str, str], ...]


def choose(ladder: Sequence[Dataplane]) -> Choice:
    """The first dataplane whose `check` passes. Raises Unsupported with every reason if none does."""
    passed: list[tuple[str, str]] = []
    for dataplane in ladder:
        try:
            dataplane.check()
        except Unsupported as error:
            passed.append((dataplane.name, str(error)))
        else:
            return Choice(dataplane, tuple(passed))
    raise Unsupported("; ".join(f"{name}: {reason}" for name, reason in passed))


def holder(ladder: Sequence[Dataplane]) -> Dataplane:
    """The dataplane that holds something here. Raises NothingProgrammed if none does."""
    for dataplane in ladder:
        if dataplane.inventory():
            return dataplane
    raise NothingProgrammed("nothing is programmed here; start `ebpflb run`, or give the --bpffs that it was given")
