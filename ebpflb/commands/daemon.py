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
from collections.abc import Callable
from contextlib import ExitStack

from ebpflb import __version__
from ebpflb.commands import OK, REFUSED, Result
from ebpflb.commands.status import Identity, status_document
from ebpflb.config import Config
from ebpflb.control import Control, listen
from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError, UserError
from ebpflb.loop import Stop, Worker, run, stop_on_signals
from ebpflb.parts import Parts, Watch, choose
from ebpflb.reconcile import Reconciler, Timing
from ebpflb.routes import packed, unpacked

log = logging.getLogger("ebpflb.daemon")


def require_privilege(parts: Parts) -> None:
    if not parts.privileged():
        raise UserError("this needs root (CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN); run it with sudo")


def run_daemon(config: Config, parts: Parts, *, once: bool = False) -> Result:
    """Serve until SIGTERM or SIGINT; with `once`, make one complete attempt and end."""
    require_privilege(parts)
    with ExitStack() as stack:
        server = stack.enter_context(listen(parts.socket_name))
        stop = stack.enter_context(stop_on_signals(signal.SIGTERM, signal.SIGINT))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(stop, selectors.EVENT_READ, lambda: None)
        for warning in config.warnings:
            log.warning("%s", warning)
        chosen = choose(parts.dataplanes(config))
        for name, reason in chosen.passed:
            log.warning("dataplane %s cannot carry services here: %s", name, reason)
        log.info(
            "ebpflb %s: node %s, dataplane %s, manifests %s",
            __version__, config.node_name, chosen.dataplane.name, config.manifests,
        )  # fmt: skip
        dataplane = chosen.dataplane
        reconciler = _reconciler(config, parts, dataplane, selector, stack)
        workers: list[Worker] = [reconciler, _Attend(parts, dataplane, reconciler, selector), _ColdStart(reconciler)]
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
        _serve(selector, workers, parts, stop, lambda: once and reconciler.attempted)
        if not once or stop.asked:
            log.info("stopping: the kernel keeps serving what it holds")
            return Result(status=OK)
        overview = reconciler.overview()
        return Result(status=OK if overview.complete and overview.sound else REFUSED)


def _reconciler(
    config: Config, parts: Parts, dataplane: Dataplane, selector: selectors.BaseSelector, stack: ExitStack
) -> Reconciler:
    sources = parts.sources(config)
    for source in sources:
        stack.callback(source.close)
    reconciler = Reconciler(
        desired=parts.desired(config, sources),
        sources=sources,
        dataplane=dataplane,
        clock=parts.clock,
        random=parts.random,
        timing=Timing(min_interval=config.min_sync_period, audit_period=config.audit_period),
        device_problems=lambda: parts.device_problems(dataplane),
        after_whole_tables=release_memory,
    )
    for source in sources:
        selector.register(source.fileno(), selectors.EVENT_READ, lambda source=source: reconciler.read(source))
    reconciler.read_all()
    return reconciler


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
