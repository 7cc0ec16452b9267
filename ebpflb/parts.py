"""The parts that commands are given: where dataplanes, sources and the policy come from.

Rules of this file: types and choices between parts, no concrete part and no I/O. Commands see these seams only, so a
test runs any command on parts of its own; `wiring` makes the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ebpflb.config import AUTO, Config
from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError, Unsupported, UserError
from ebpflb.loop import Worker
from ebpflb.model import Problem
from ebpflb.observer import Observer, Observers
from ebpflb.problems import Found
from ebpflb.reconcile import Desired
from ebpflb.routes import BackendState, RouteTable, Verdict
from ebpflb.source import Source


class NothingProgrammed(EbpflbError):
    """No dataplane holds anything here. Exit status 4."""

    exit_status = 4


class Watch(NamedTuple):
    """A descriptor, and what to call when it is readable. Should that fail for a dataplane's, an audit follows."""

    fd: int
    handle: Callable[[], object]


class Changes(Protocol):
    """A descriptor that is readable when something may have changed."""

    def fileno(self) -> int:
        """Readable when `changed` should be asked."""

    def changed(self) -> bool:
        """Whether it has."""

    def close(self) -> None:
        """Release descriptors."""


class Choice(NamedTuple):
    """The dataplane that will carry services, and why not the ones before it: (name, reason)."""

    dataplane: Dataplane
    passed: tuple[tuple[str, str], ...]


class Leftovers(Protocol):
    """What another proxy left behind on this node."""

    def present(self) -> tuple[str, ...]:
        """What kinds of things there are, in few words; () if nothing is. Costs little, however much it is. Raises
        UserError or ApplyError."""

    def inventory(self) -> tuple[str, ...]:
        """All of it, one line each. Raises UserError or ApplyError."""

    def cleanup(self) -> None:
        """Remove it. Raises UserError (its owner runs here) or ApplyError."""


class Attendants(Protocol):
    """Who goes along with a reconciler: health, metrics, notices, the keeper of what is to be remembered."""

    @property
    def observer(self) -> Observer:
        """Is told what the reconciler does."""

    @property
    def workers(self) -> Sequence[Worker]:
        """Are called by the loop."""

    @property
    def watches(self) -> Sequence[Watch]:
        """What the loop is to listen to for them, until they are closed."""

    def begin(self) -> None:
        """Start what has threads and sockets. Raises UserError for an address that cannot be had, if that is to be
        fatal."""

    def problems(self) -> Iterable[Found]:
        """What is wrong with what they do, now."""

    def close(self) -> None:
        """End threads, release sockets."""


class NoAttendants:
    """For a daemon that runs once."""

    observer: Observer = Observers()
    workers: Sequence[Worker] = ()
    watches: Sequence[Watch] = ()

    def begin(self) -> None:
        """Nothing to begin."""

    def problems(self) -> Iterable[Found]:
        """Nothing to be wrong."""
        return ()

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How a command gets at the world.

    `dataplanes` gives the ladder for a Config, all of them, best first; `prepare` makes the node ready for one of them
    (for bpf: the BPF file system) and raises UserError for a value that was given, Unsupported where none was.
    `settings_of` makes the kernel's settings that one of them makes by itself where it may, which in a container it may
    not; it answers with what could not be had. `kube_proxy` is what kube-proxy left behind. `attendants` go along with
    a daemon that stays: by Config, choice of dataplane, sources and what these come to. `set_up_node` makes the node as
    the Config wants it (kernel settings beside Services); it answers with what could not be had. `config_changes` tells
    of changes of the file that the Config came from, None without one. `watches` and `device_problems` ask a started
    dataplane what else to listen to, and what is wrong with the devices. `privileged` is whether this process may
    change the node's network. `clock` counts seconds from anywhere, `random` gives [0, 1), `now` is the time of day as
    RFC 3339. `patience` is how many seconds a command that needs the sources' whole content waits for it.
    """

    hostname: Callable[[], str]
    dataplanes: Callable[[Config], Sequence[Dataplane]]
    prepare: Callable[[Config, Dataplane], None]
    settings_of: Callable[[Config, Dataplane], Iterable[Problem]]
    kube_proxy: Leftovers
    sources: Callable[[Config], Sequence[Source]]
    desired: Callable[[Config, Sequence[Source]], Desired]
    attendants: Callable[[Config, Choice, Sequence[Source], Desired], Attendants]
    set_up_node: Callable[[Config], Iterable[Problem]]
    config_changes: Callable[[Config], Changes | None]
    watches: Callable[[Dataplane], Sequence[Watch]]
    device_problems: Callable[[Dataplane], Iterable[Problem]]
    privileged: Callable[[], bool]
    clock: Callable[[], float]
    random: Callable[[], float]
    now: Callable[[], str]
    socket_name: str
    patience: float = 30.0


def candidates(ladder: Sequence[Dataplane], name: str) -> tuple[Dataplane, ...]:
    """Those that `name` leaves the choice of: the one of that name, or all for "auto"."""
    return tuple(dataplane for dataplane in ladder if name in (AUTO, dataplane.name))


def choose(
    ladder: Sequence[Dataplane],
    name: str = AUTO,
    prepare: Callable[[Dataplane], None] = lambda dataplane: None,
    passed: Sequence[tuple[str, str]] = (),
) -> Choice:
    """The first of the candidates that passes its `check` and can be prepared; one that was asked for by name is the
    only one. `passed` are those that are out of question already, each with its reason. Raises Unsupported with every
    reason if none is left, and UserError."""
    found = list(passed)
    out = {each for each, _ in passed}
    for dataplane in candidates(ladder, name):
        if dataplane.name in out:
            continue
        try:
            dataplane.check()
            prepare(dataplane)
        except Unsupported as error:
            found.append((dataplane.name, str(error)))
        else:
            return Choice(dataplane, tuple(found))
    if name != AUTO and len(found) == 1:
        raise Unsupported(f"dataplane {name} cannot carry services here: {found[0][1]}")
    raise Unsupported("nothing here can carry services: " + "; ".join(f"{each}: {reason}" for each, reason in found))


def installed(dataplane: Dataplane) -> tuple[str, ...]:
    """Its inventory; () where it cannot be had, and so has nothing. Raises UserError or ApplyError."""
    try:
        return dataplane.inventory()
    except Unsupported:
        return ()


def holder(ladder: Sequence[Dataplane], name: str = AUTO) -> Dataplane:
    """The candidate that holds something here; of several, while one takes over from another, the one that most new
    connections are carried by. Raises NothingProgrammed if none does, UserError or ApplyError if it cannot be told."""
    found, refusals = [], []
    for dataplane in candidates(ladder, name):
        try:
            if installed(dataplane):
                found.append(dataplane)
        except UserError:
            raise
        except EbpflbError as error:
            refusals.append(error)
    if len(found) > 1:
        return max(found, key=lambda dataplane: _carried(dataplane.state()))  # the first of equals
    if found:
        return found[0]
    if refusals:
        raise refusals[0]
    who = "nothing is" if name == AUTO else f"{name} has nothing"
    raise NothingProgrammed(f"{who} programmed here; start `ebpflb run`, or give the --bpffs that it was given")


def _carried(routes: RouteTable) -> int:
    """Frontends that give a new connection a backend: who retires has none."""
    return sum(
        route.verdict is Verdict.FORWARD and any(backend.state is BackendState.ACTIVE for backend in route.backends)
        for route in routes.values()
    )
