"""Parts that live in memory, in the shape of the real ones: a dataplane, a source, a store with a policy, time.

Rules of this file: every fake keeps the contract of its protocol (a dataplane's `state()` is what was synced, a second
sync writes nothing), so that what is tested on them is true of what they stand for. Failures are asked for, not random.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ebpflb.config import Config
from ebpflb.dataplane import Dataplane, Report, Requirement
from ebpflb.errors import UserError
from ebpflb.model import Problem, Protocol, ServiceName
from ebpflb.parts import Attendants, Changes, NoAttendants, Parts
from ebpflb.reconcile import Desired
from ebpflb.routes import (
    Backend,
    Frontend,
    Key,
    Kind,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
)
from ebpflb.source import LIVE, Condition, DropService, Event, Remembered, Source, Synced

Row = tuple[Key, Route]


def row(
    address: str = "172.30.0.41",
    port: int = 80,
    scope: Scope = Scope.INTERNAL,
    *,
    backends: Sequence[str] = ("10.180.0.1",),
    name: str = "web",
    **more: object,
) -> Row:
    """One route, by what a test is about: `ns/NAME:p80` at `address`, served by port 8080 of `backends`."""
    service = ServicePortName("ns", name, "p80")
    found = tuple(Backend(each, 8080) for each in backends)
    verdict = Verdict.FORWARD if found else Verdict.REJECT
    route = Route(service, Kind.CLUSTER_IP, verdict, found, **more)  # type: ignore[arg-type]
    return ((Frontend(address, port, Protocol.TCP), scope), route)


def both(*arguments: object, **more: object) -> list[Row]:
    """`row` in both scopes."""
    return [row(*arguments, scope=scope, **more) for scope in Scope]  # type: ignore[arg-type, misc]


def routes(*rows: Row, **more: object) -> RouteTable:
    return RouteTable(dict(rows), **more)  # type: ignore[arg-type]


class FakeClock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeDataplane:
    """Holds routes in memory. `fail_next` syncs or audits are refused; `raises` is raised by the next call of that
    name; `drift` puts something else in the kernel behind the daemon's back."""

    def __init__(self, held: RouteTable | None = None, name: str = "bpf") -> None:
        self.name = name
        self.held = held
        self.keeps = 0  # how often `retire` has to be asked before nothing is left to keep
        self.wanted: RouteTable | None = None
        self.calls: list[str] = []
        self.fail_next = 0
        self.raises: dict[str, Exception] = {}
        self.lacks: tuple[Requirement, ...] = ()
        self.rows: dict[str, list[dict[str, object]]] = {"fill": [{"name": "frontends", "entries": 1, "max": 10}]}

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if what in self.raises:
            raise self.raises.pop(what)

    def check(self) -> None:
        self._called("check")

    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement("bpf(2)", True, "kernel 6.1"), *self.lacks)

    def start(self) -> None:
        self._called("start")
        if self.held is None:
            self.held = RouteTable()

    def sync(self, routes: RouteTable) -> Report:
        self._called("sync")
        self.wanted = routes
        return self._make_equal()

    def audit(self) -> Report:
        self._called("audit")
        return self._make_equal()

    def _make_equal(self) -> Report:
        if self.fail_next:
            self.fail_next -= 1
            return Report(failed=1, problems=(Problem("frontends", "no room (ENOSPC)"),))
        assert self.wanted is not None
        held = self.held or RouteTable()
        written = sum(held.get(key) != route for key, route in self.wanted.items())
        removed = sum(key not in self.wanted for key in held)
        self.held = self.wanted
        return Report(written=written, removed=removed)

    def state(self) -> RouteTable:
        self._called("state")
        return self.held or RouteTable()

    def tables(self, what: str) -> list[dict[str, object]]:
        if what not in self.rows:
            raise UserError(f"dump {what}: this dataplane has no such table")
        return self.rows[what]

    def take_over(self) -> None:
        self._called("take_over")

    def canary(self) -> bool:
        self._called("canary")
        return self.held is not None

    def retire(self) -> bool:
        self._called("retire")
        self.keeps -= 1
        return self.keeps < 0

    def inventory(self) -> tuple[str, ...]:
        if "inventory" in self.raises:
            raise self.raises.pop("inventory")
        return () if self.held is None else ("map frontends", "program connect4")

    def cleanup(self) -> None:
        self._called("cleanup")
        self.held = None


class FakeLeftovers:
    """What kube-proxy left, line by line."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines
        self.raises: Exception | None = None

    def present(self) -> tuple[str, ...]:
        if self.raises:
            error, self.raises = self.raises, None
            raise error
        return tuple(dict.fromkeys(line.split()[0] + "s" for line in self.lines))

    def inventory(self) -> tuple[str, ...]:
        return self.lines

    def cleanup(self) -> None:
        if self.raises:
            raise self.raises
        self.lines = ()


class FakeSource:
    """Says what a test puts into `say`, and is readable while there is something."""

    def __init__(self, name: str = "manifests") -> None:
        self.name = name
        self.wrong: tuple[Problem, ...] = ()
        self.state = LIVE
        self.raises: Exception | None = None
        self.closed = False
        self._events: list[Event] = []
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def say(self, *events: Event) -> None:
        self._events += events
        if self._ends:
            self._ends[1].send(b"\0")

    def change(self) -> None:
        """Some change; what is wanted then is up to the FakeDesired."""
        self.say(DropService(ServiceName("ns", "some")))

    def synced(self) -> None:
        self.say(Synced(self.name))

    def fileno(self) -> int:
        if self._ends is None:
            self._ends = socket.socketpair()
            self._ends[0].setblocking(False)
            if self._events:
                self._ends[1].send(b"\0")
        return self._ends[0].fileno()

    def read(self) -> Iterable[Event]:
        if self._ends:
            with contextlib.suppress(BlockingIOError):
                self._ends[0].recv(4096)
        if self.raises:
            error, self.raises = self.raises, None
            raise error
        events, self._events = self._events, []
        return events

    def problems(self) -> tuple[Problem, ...]:
        return self.wrong

    def condition(self) -> Condition:
        return self.state

    def close(self) -> None:
        self.closed = True
        for end in self._ends or ():
            end.close()
        self._ends = None


class FakeDesired:
    """Wants what a test puts into `want`, once every source has synced."""

    def __init__(self, want: RouteTable | None = None, sources: Sequence[str] = ("manifests",)) -> None:
        self.want = want or RouteTable()
        self.events: list[Event] = []
        self.news = True
        self.raises: Exception | None = None
        self.stumbles_over: Event | None = None
        self._missing = set(sources)
        self._remembered: dict[str, float] = {}

    @property
    def synced(self) -> bool:
        return not self._missing

    @property
    def ready(self) -> bool:
        return self._missing <= self._remembered.keys()

    @property
    def remembered(self) -> float | None:
        return min((saved for source, saved in self._remembered.items() if source in self._missing), default=None)

    def apply(self, event: Event) -> bool:
        if event == self.stumbles_over:
            raise KeyError("a fault of ours")
        self.events.append(event)
        if isinstance(event, Synced):
            self._missing.discard(event.source)
        if isinstance(event, Remembered):
            self._remembered[event.source] = event.saved
        return self.news

    def routes(self) -> RouteTable:
        if self.raises:
            error, self.raises = self.raises, None
            raise error
        return self.want


class FakeSelector(selectors.DefaultSelector):
    """A selector whose waiting is the clock's advance: what is readable is real, the time that passes is not.

    When a wait would begin, the next of `script` runs instead, at the time it is due: (seconds from the start, what).
    """

    def __init__(self, clock: FakeClock, script: Iterable[tuple[float, Callable[[], object]]] = ()) -> None:
        super().__init__()
        self._clock = clock
        self._start = clock.now
        self._script = sorted(script, key=lambda step: step[0])

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        until = None if timeout is None else self._clock.now + timeout
        if self._script and (until is None or self._start + self._script[0][0] <= until):
            at, act = self._script.pop(0)
            self._clock.now = max(self._clock.now, self._start + at)
            act()
            return super().select(0)
        assert until is not None, "waits for ever: the script has run out"
        self._clock.now = until
        return []


class World:
    """Parts, and the fakes behind them."""

    def __init__(self, want: RouteTable | None = None, held: RouteTable | None = None) -> None:
        self.clock = FakeClock()
        self.dataplane = FakeDataplane(held)
        self.others: list[FakeDataplane] = []  # further down the ladder
        self.kube_proxy = FakeLeftovers()
        self.unprepared: dict[str, Exception] = {}
        self.setting_problems: dict[str, tuple[Problem, ...]] = {}
        self.source = FakeSource()
        self.desired = FakeDesired(want)
        self.device_problems: tuple[Problem, ...] = ()
        self.node_problems: tuple[Problem, ...] = ()
        self.attendants: Attendants = NoAttendants()
        self.config_changes: Changes | None = None
        self.configs: list[Config] = []
        self.source.synced()
        self.parts = Parts(
            hostname=lambda: "Node-1.example ",
            dataplanes=self._dataplanes,
            prepare=self._prepare,
            settings_of=lambda config, dataplane: self.setting_problems.get(dataplane.name, ()),
            kube_proxy=self.kube_proxy,
            sources=self._sources,
            desired=lambda config, sources: self.desired,
            attendants=lambda config, choice, sources, desired: self.attendants,
            set_up_node=lambda config: self.node_problems,
            config_changes=lambda config: self.config_changes,
            watches=lambda dataplane: (),
            device_problems=lambda dataplane: self.device_problems,
            privileged=lambda: True,
            clock=self.clock,
            random=lambda: 0.0,
            now=lambda: "2026-01-31T12:00:00Z",
            socket_name=f"ebpflb-test-{os.getpid()}",
        )

    def _dataplanes(self, config: Config) -> Sequence[Dataplane]:
        self.configs.append(config)
        return (self.dataplane, *self.others)

    def _sources(self, config: Config) -> Sequence[Source]:
        if self.source.closed:  # a source that is opened anew says everything again
            self.source = FakeSource()
            self.source.synced()
        return (self.source,)

    def _prepare(self, config: Config, dataplane: Dataplane) -> None:
        if dataplane.name in self.unprepared:
            raise self.unprepared[dataplane.name]

    def but(self, **parts: object) -> Parts:
        """These parts, some replaced."""
        return replace(self.parts, **parts)  # type: ignore[arg-type]


def as_protocols(
    dataplane: FakeDataplane, source: FakeSource, desired: FakeDesired
) -> tuple[Dataplane, Source, Desired]:
    """For the type checker: the fakes have the shape of what they stand for."""
    return dataplane, source, desired
