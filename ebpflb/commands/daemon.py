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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import msgspec

from ebpflb import __version__
from ebpflb.commands import OK, REFUSED, Result
from ebpflb.commands.status import Identity, status_document
from ebpflb.config import Config
from ebpflb.control import Control, listen
from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError, SourceError, UserError
from ebpflb.log import hold_repeats
from ebpflb.loop import Stop, Worker, run, stop_on_signals
from ebpflb.parts import NoAttendants, Parts, Watch, choose
from ebpflb.problems import Found
from ebpflb.reconcile import Desired, Reconciler, Timing
from ebpflb.routes import packed, unpacked
from ebpflb.source import Source, SourceState

log = logging.getLogger("ebpflb.daemon")


def require_privilege(parts: Parts) -> None:
    if not parts.privileged():
        raise UserError("this needs root (CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN); run it with sudo")


def unheard(sources: Sequence[Source], parts: Parts) -> SourceError:
    """That one of `sources` has not said everything in time, in its own words."""
    waiting = next((source for source in sources if source.condition().state is not SourceState.LIVE), sources[0])
    detail = waiting.condition().detail or f"it goes on being written after {parts.patience:g} s"
    return SourceError(f"{waiting.name} has not said everything: {detail}; try again")


def run_daemon(config: Config, parts: Parts, *, once: bool = False) -> Result:
    """Serve until SIGTERM or SIGINT; with `once`, make one complete attempt and end. Raises SourceError if there is
    nothing to attempt within `parts.patience`."""
    require_privilege(parts)
    if once:
        config = msgspec.structs.replace(config, state_dir="")  # what was remembered is not worth one attempt
    with ExitStack() as stack:
        server = stack.enter_context(listen(parts.socket_name))
        stop = stack.enter_context(stop_on_signals(signal.SIGTERM, signal.SIGINT))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(stop, selectors.EVENT_READ, lambda: None)
        _watch_config(config, parts, selector, stop, stack)
        repeats = hold_repeats(parts.clock)
        stack.callback(repeats.close)
        for warning in config.warnings:
            log.warning("%s", warning)
        chosen = choose(parts.dataplanes(config))
        for name, reason in chosen.passed:
            log.warning("dataplane %s cannot carry services here: %s", name, reason)
        log.info(
            "ebpflb %s: node %s, dataplane %s, source %s",
            __version__, config.node_name, chosen.dataplane.name, config.manifests or "the API server",
        )  # fmt: skip
        dataplane = chosen.dataplane
        missing = tuple(Found("node", *problem) for problem in parts.set_up_node(config))
        sources, desired = _sources(config, parts, stack)
        attendants = NoAttendants() if once else parts.attendants(config, chosen, sources, desired)
        stack.callback(attendants.close)

        def problems() -> Iterator[Found]:
            yield from missing
            yield from (Found("devices", *problem) for problem in parts.device_problems(dataplane))
            yield from attendants.problems()

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
        attendants.begin()
        for watch in attendants.watches:
            selector.register(watch.fd, selectors.EVENT_READ, watch.handle)
        for source in sources:
            selector.register(source.fileno(), selectors.EVENT_READ, lambda source=source: reconciler.read(source))
        reconciler.read_all()
        workers: list[Worker] = [reconciler, _Attend(parts, dataplane, reconciler, selector), _ColdStart(reconciler)]
        workers += (*attendants.workers, repeats)
        stack.callback(gc.unfreeze)
        stack.callback(gc.enable)
        gc.disable()
        if not once:
            identity = Identity(config.node_name, dataplane.name, parts.now())
            control = Control(
                server,
                selector,
                parts.clock,
                document=lambda: status_document(identity, dataplane, reconciler.overview()),
                ready=lambda: reconciler.first_sync,
            )
            stack.callback(control.close)
            workers.append(control)
        patience = Patience(sources, parts)
        if once:
            workers.append(patience)
        _serve(selector, workers, parts, stop, lambda: once and (reconciler.attempted or patience.is_over()))
        if once and not (reconciler.attempted or stop.asked):
            raise unheard(sources, parts)
        if not once or stop.asked:
            log.info("stopping: the kernel keeps serving what it holds")
            return Result(status=OK)
        overview = reconciler.overview()
        return Result(status=OK if overview.complete and overview.sound else REFUSED)


def _sources(config: Config, parts: Parts, stack: ExitStack) -> tuple[Sequence[Source], Desired]:
    """The sources, closed with `stack`, and what they come to."""
    sources = parts.sources(config)
    for source in sources:
        stack.callback(source.close)
    return sources, parts.desired(config, sources)


def _watch_config(config: Config, parts: Parts, selector: selectors.BaseSelector, stop: Stop, stack: ExitStack) -> None:
    """End when the file that the Config came from says something else: whoever runs us starts us anew."""
    changes = parts.config_changes(config)
    if changes is None:
        return
    stack.callback(changes.close)

    def look() -> None:
        if changes.changed():
            log.warning("%s has changed: ending, to be started again with what it says now", config.file)
            stop.ask()

    selector.register(changes.fileno(), selectors.EVENT_READ, look)
    look()  # it may have changed since it was read


def _serve(
    selector: selectors.BaseSelector, workers: list[Worker], parts: Parts, stop: Stop, done: Callable[[], bool]
) -> None:
    try:
        run(selector, workers, parts.clock, stopped=lambda: stop.asked or done())
    except EbpflbError:
        # Ctrl-C reaches the compiler's process too: what fails after the request to stop is not an error.
        if not stop.asked:
            raise


def release_memory() -> None:
    """Give back what only the handling of whole tables needed: caches that refill themselves, and, where the C library
    is glibc, its free pages."""
    packed.cache_clear()
    unpacked.cache_clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Patience:
    """How long somebody at a terminal waits for sources: `parts.patience` seconds from now, or until one has failed
    again and again. As a Worker, it has the loop come round to look at that."""

    _ENOUGH = 3
    _GLANCE = 0.2

    def __init__(self, sources: Sequence[Source], parts: Parts) -> None:
        self._sources = sources
        self._clock = parts.clock
        self._until = parts.clock() + parts.patience

    def is_over(self) -> bool:
        return self.left() <= 0

    def left(self) -> float:
        """Seconds until it is worth looking again; 0 when it is over."""
        if any(source.condition().failures >= self._ENOUGH for source in self._sources):
            return 0.0
        return max(0.0, min(self._until - self._clock(), self._GLANCE))

    def due(self) -> float | None:
        return self._clock() + self.left()

    def work(self) -> None:
        """The loop's own condition looks."""


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


class _Attend:
    """Listens to the dataplane's own descriptors as soon as it has been started."""

    def __init__(
        self, parts: Parts, dataplane: Dataplane, reconciler: Reconciler, selector: selectors.BaseSelector
    ) -> None:
        self._parts = parts
        self._dataplane = dataplane
        self._reconciler = reconciler
        self._selector = selector
        self._attending = False

    def due(self) -> float | None:
        return None

    def work(self) -> None:
        if self._attending or not self._reconciler.started:
            return
        self._attending = True
        for watch in self._parts.watches(self._dataplane):
            self._selector.register(watch.fd, selectors.EVENT_READ, lambda watch=watch: self._handle(watch))

    def _handle(self, watch: Watch) -> None:
        try:
            watch.handle()
        except (EbpflbError, OSError) as error:
            log.warning("%s: a change of devices: %s", self._dataplane.name, error)
            self._reconciler.check_now()
