"""`run` and `run --once`: the parts put together around the loop.

Rules of this file: order and lifetime only. The control socket is taken first, so that a second daemon ends before it
touches anything. What the dataplane installed stays when the process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import selectors
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import msgspec

from ebpflb import __version__
from ebpflb.commands import OK, REFUSED, Result
from ebpflb.commands.attend import Attend, Canary
from ebpflb.commands.handover import HandOver
from ebpflb.commands.patience import Patience, require_privilege, unheard
from ebpflb.commands.status import Identity, status_document
from ebpflb.config import STACK, Config
from ebpflb.control import Control, listen
from ebpflb.dataplane import Dataplane
from ebpflb.dataplane.limits import ALGORITHMS, limited
from ebpflb.errors import EbpflbError, Unsupported
from ebpflb.log import hold_repeats
from ebpflb.loop import Stop, Worker, run, stop_on_signals
from ebpflb.model import Problem
from ebpflb.parts import Changes, Choice, NoAttendants, Parts, choose
from ebpflb.problems import Found
from ebpflb.reconcile import Desired, Reconciler, Timing
from ebpflb.routes import packed, unpacked
from ebpflb.source import Source

log = logging.getLogger("ebpflb.daemon")


def run_daemon(config: Config, parts: Parts, *, once: bool = False) -> Result:
    """Serve until SIGTERM or SIGINT; with `once`, make one complete attempt and end. Raises SourceError if there is
    nothing to attempt within `parts.patience`, Unsupported if no dataplane that the Config allows can be had."""
    require_privilege(parts)
    if once:
        config = msgspec.structs.replace(config, state_dir="")  # what was remembered is not worth one attempt
    with ExitStack() as stack:
        server = stack.enter_context(listen(parts.socket_name))
        stop = stack.enter_context(stop_on_signals(signal.SIGTERM, signal.SIGINT))
        changes = parts.config_changes(config)
        if changes is not None:
            stack.callback(changes.close)
        repeats = hold_repeats(parts.clock)
        stack.callback(repeats.close)
        for warning in config.warnings:
            log.warning("%s", warning)
        ladder = parts.dataplanes(config)
        passed: tuple[tuple[str, str], ...] = ()
        while True:
            chosen = choose(ladder, config.dataplane, lambda each: parts.prepare(config, each), passed)
            for name, reason in chosen.passed[len(passed) :]:
                log.warning("dataplane %s cannot carry services here: %s", name, reason)
            daemon = _Daemon(config, parts, ladder, chosen, server, stop, once)
            try:
                return daemon.serve(changes, repeats)
            except Unsupported as error:
                # What `check` cannot see, such as a verifier that refuses a program.
                passed = (*chosen.passed, (chosen.dataplane.name, str(error)))
                log.warning("dataplane %s cannot carry services here: %s", *passed[-1])


class _Daemon:
    """One dataplane's time at work: from its choice to the end, or until it turns out that it cannot."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        ladder: Sequence[Dataplane],
        chosen: Choice,
        server: socket.socket,
        stop: Stop,
        once: bool,
    ) -> None:
        carrier = chosen.dataplane.name
        proxy = msgspec.structs.replace(
            config.proxy,
            algorithms=ALGORITHMS.get(carrier, ()),
            direct_return=not limited(carrier, "forwarding"),
        )
        self._config = msgspec.structs.replace(config, proxy=proxy)
        self._parts = parts
        self._ladder = ladder
        self._chosen = chosen
        self._server = server
        self._stop = stop
        self._once = once

    def serve(self, changes: Changes | None, repeats: Worker) -> Result:
        """Until the end. Raises Unsupported if the dataplane cannot be started here."""
        config, parts, dataplane, once = self._config, self._parts, self._chosen.dataplane, self._once
        log.info(
            "ebpflb %s: node %s, dataplane %s, source %s",
            __version__, config.node_name, dataplane.name, config.manifests or "the API server",
        )  # fmt: skip
        with ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(self._stop, selectors.EVENT_READ, lambda: None)
            if changes is not None:
                _watch_config(config, changes, selector, self._stop)
            missing = tuple(
                Found("node", *problem) for problem in (*parts.set_up_node(config), *_unmet(config, dataplane.name))
            )
            sources, desired = _sources(config, parts, stack)
            attendants = NoAttendants() if once else parts.attendants(config, self._chosen, sources, desired)
            stack.callback(attendants.close)

            def problems() -> Iterator[Found]:
                yield from missing
                yield from (Found("devices", *problem) for problem in parts.device_problems(dataplane))
                yield from attendants.problems()
                yield from hand_over.problems()

            reconciler = Reconciler(
                desired=desired,
                sources=sources,
                dataplane=dataplane,
                clock=parts.clock,
                random=parts.random,
                timing=Timing(min_interval=config.min_sync_period, audit_period=config.audit_period),
                other_problems=problems,
                after_whole_tables=release_memory,
                observer=attendants.observer,
            )
            hand_over = HandOver(
                self._ladder,
                dataplane,
                parts.kube_proxy,
                clock=parts.clock,
                complete=lambda: reconciler.settled,
            )
            hand_over.begin()
            attendants.begin()
            for watch in attendants.watches:
                selector.register(watch.fd, selectors.EVENT_READ, watch.handle)
            for source in sources:
                selector.register(source.fileno(), selectors.EVENT_READ, lambda source=source: reconciler.read(source))
            reconciler.read_all()
            attend = Attend(parts, dataplane, reconciler, selector)
            canary = Canary(config, parts, dataplane, reconciler)
            workers: list[Worker] = [reconciler, attend, canary, _ColdStart(reconciler), hand_over]
            workers += (*attendants.workers, repeats)
            stack.callback(gc.unfreeze)
            stack.callback(gc.enable)
            gc.disable()
            if not once:
                identity = Identity(
                    config.node_name,
                    dataplane.name,
                    parts.now(),
                    self._chosen.passed,
                    xdp=config.xdp,
                    patterns=config.devices,
                )
                control = Control(
                    self._server,
                    selector,
                    parts.clock,
                    document=lambda: status_document(identity, dataplane, reconciler.overview(), hand_over.retiring()),
                    ready=lambda: reconciler.first_sync,
                )
                stack.callback(control.close)
                workers.append(control)
            patience = Patience(sources, parts)
            if once:
                workers.append(patience)
            self._run(selector, workers, lambda: once and (reconciler.attempted or patience.is_over()))
            return self._ended(reconciler, sources)

    def _run(self, selector: selectors.BaseSelector, workers: list[Worker], done: Callable[[], bool]) -> None:
        try:
            run(selector, workers, self._parts.clock, stopped=lambda: self._stop.asked or done())
        except EbpflbError:
            # Ctrl-C reaches the compiler's process too: what fails after the request to stop is not an error.
            if not self._stop.asked:
                raise

    def _ended(self, reconciler: Reconciler, sources: Sequence[Source]) -> Result:
        if self._once and not (reconciler.attempted or self._stop.asked):
            raise unheard(sources, self._parts)
        if not self._once or self._stop.asked:
            log.info("stopping: the kernel keeps serving what it holds")
            return Result(status=OK)
        overview = reconciler.overview()
        return Result(status=OK if overview.complete and overview.sound else REFUSED)


def _unmet(config: Config, dataplane: str) -> Iterator[Problem]:
    """What the operator asks for and the dataplane does not have."""
    algorithm, had = config.proxy.default_algorithm, config.proxy.algorithms
    if had and algorithm not in had:
        reason = f"{algorithm} is none that this node's dataplane has ({', '.join(had)}); backends are chosen at random"
        yield Problem("--algorithm", reason)
    if config.xdp in ("native", "generic") and dataplane != "bpf":
        yield Problem("--xdp", f"{config.xdp} is for the dataplane bpf; this node's is {dataplane}")
    if config.pod_path != STACK and dataplane != "bpf":
        yield Problem("--pod-path", f"{config.pod_path} is for the dataplane bpf; this node's is {dataplane}")


def _sources(config: Config, parts: Parts, stack: ExitStack) -> tuple[Sequence[Source], Desired]:
    """The sources, closed with `stack`, and what they come to."""
    sources = parts.sources(config)
    for source in sources:
        stack.callback(source.close)
    return sources, parts.desired(config, sources)


def _watch_config(config: Config, changes: Changes, selector: selectors.BaseSelector, stop: Stop) -> None:
    """End when the file that the Config came from says something else: whoever runs us starts us anew."""

    def look() -> None:
        if changes.changed():
            log.warning("%s has changed: ending, to be started again with what it says now", config.file)
            stop.ask()

    selector.register(changes.fileno(), selectors.EVENT_READ, look)
    look()  # it may have changed since it was read


def release_memory() -> None:
    """Give back what only the handling of whole tables needed: caches that refill themselves, and, where the C library
    is glibc, its free pages."""
    packed.cache_clear()
    unpacked.cache_clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _ColdStart:
    """The collector is off while the first tables are built (nothing of them is garbage), and then need not look at
    them ever again."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._over = False

    def due(self) -> float | None:
        return None

    def work(self) -> None:
        if not self._over and self._reconciler.attempted:
            self._over = True
            gc.freeze()
            gc.enable()
