"""The real parts, put together: which dataplanes there are, where events come from, what they come to.

Rules of this file: construction only, and the one place besides `cli` that knows concrete parts. Concrete modules are
imported when they are needed, because a command that only reads should not pay for all of them.
"""

from __future__ import annotations

import datetime
import random
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ebpflb import control
from ebpflb.config import Config
from ebpflb.dataplane import Dataplane
from ebpflb.model import Problem, ProxyOptions
from ebpflb.parts import NoAttendants, Parts, Watch
from ebpflb.policy import Router
from ebpflb.reconcile import Desired
from ebpflb.routes import RouteTable
from ebpflb.source import Event, Source
from ebpflb.source.store import Store


class Intent:
    """The store and the policy behind each other: events in, routes out."""

    def __init__(
        self,
        node_name: str,
        options: ProxyOptions,
        sources: Iterable[str],
        make_router: Callable[[], Router] = Router,
    ) -> None:
        self._store = Store(node_name, sources)
        self._options = options
        self._make_router = make_router
        self._router = make_router()
        self._table = RouteTable()
        self._torn = False  # a failed update leaves the router in between: the next one starts from scratch

    def apply(self, event: Event) -> bool:
        return self._store.apply(event)

    @property
    def synced(self) -> bool:
        return self._store.synced

    @property
    def ready(self) -> bool:
        return self._store.ready

    @property
    def remembered(self) -> float | None:
        return self._store.remembered

    def routes(self) -> RouteTable:
        change = self._store.take()
        if change is None and not self._torn:
            return self._table
        if self._torn:
            self._router = self._make_router()
        snapshot = self._store.snapshot() if change is None else change.snapshot
        touched = None if change is None or self._torn else change.touched
        self._torn = True
        self._table = self._router.update(snapshot, touched, self._options)
        self._torn = False
        return self._table


def real_parts() -> Parts:
    """This machine."""
    return Parts(
        hostname=socket.gethostname,
        dataplanes=_dataplanes,
        sources=_sources,
        desired=_desired,
        attendants=lambda config, choice, sources, desired: NoAttendants(),
        set_up_node=lambda config: (),
        config_changes=lambda config: None,
        watches=_watches,
        device_problems=_device_problems,
        privileged=_privileged,
        clock=time.monotonic,
        random=random.random,
        now=_now,
        socket_name=control.NAME,
    )


def _desired(config: Config, sources: Sequence[Source]) -> Desired:
    return Intent(config.node_name, config.proxy, [source.name for source in sources])


def _privileged() -> bool:
    from ebpflb.dataplane.bpf.facts import may_administrate

    return may_administrate()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _sources(config: Config) -> Sequence[Source]:
    from ebpflb.source.local import LocalSource
    from ebpflb.source.manifests import ManifestSource

    return (ManifestSource(config.manifests), LocalSource())


def _dataplanes(config: Config) -> Sequence[Dataplane]:
    from ebpflb.dataplane.bpf.dataplane import BpfDataplane

    return (
        BpfDataplane(
            Path(config.bpffs),
            Path(config.cgroup) if config.cgroup else None,
            config.devices,
            count_traffic=config.service_metrics > 0,
        ),
    )


def _watches(dataplane: Dataplane) -> Sequence[Watch]:
    from ebpflb.dataplane.bpf.dataplane import BpfDataplane

    if not isinstance(dataplane, BpfDataplane) or dataplane.devices is None:
        return ()
    return (Watch(dataplane.devices.fileno(), dataplane.devices.handle),)


def _device_problems(dataplane: Dataplane) -> Iterable[Problem]:
    from ebpflb.dataplane.bpf.dataplane import BpfDataplane

    if not isinstance(dataplane, BpfDataplane) or dataplane.devices is None:
        return ()
    return dataplane.devices.problems()
