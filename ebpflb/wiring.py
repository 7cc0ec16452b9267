"""The real parts, put together: which dataplanes there are, where events come from, what they come to.

Rules of this file: construction only, and the one place besides `cli` that knows concrete parts. Concrete modules are
imported when they are needed, because a command that only reads should not pay for all of them.
"""

from __future__ import annotations

import datetime
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ebpflb import control
from ebpflb.config import AUTO, DEFAULT_BPFFS, REDIRECT, ApiServer, Config
from ebpflb.dataplane import Dataplane
from ebpflb.errors import ApplyError, Unsupported, UserError
from ebpflb.model import Node, Problem, ProxyOptions, Snapshot
from ebpflb.observer import Observer
from ebpflb.parts import Attendants, Changes, Choice, Leftovers, Parts, Watch
from ebpflb.policy import Router
from ebpflb.reconcile import Desired
from ebpflb.routes import RouteTable
from ebpflb.source import Event, Source, SourceState
from ebpflb.source.store import Store

if TYPE_CHECKING:
    from ebpflb.dataplane.bpf.xdp_choice import Told
    from ebpflb.dataplane.ipvs.options import IpvsOptions
    from ebpflb.source.kube.client import HttpClient
    from ebpflb.source.kube.endpoints import ApiServers
    from ebpflb.source.kube.source import KubeSource


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

    def snapshot(self) -> Snapshot:
        """All that was said so far."""
        return self._store.snapshot()

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
    kubernetes = _Kubernetes()
    return Parts(
        hostname=socket.gethostname,
        dataplanes=_dataplanes,
        prepare=_prepare,
        settings_of=_settings_of,
        kube_proxy=_KubeProxy(),
        sources=lambda config: _sources(config, kubernetes),
        desired=_desired,
        attendants=lambda config, choice, sources, desired: _attendants(config, choice, sources, desired, kubernetes),
        set_up_node=_set_up_node,
        config_changes=_config_changes,
        watches=_watches,
        device_problems=_device_problems,
        privileged=_privileged,
        clock=time.monotonic,
        random=random.random,
        now=_now,
        socket_name=control.NAME,
    )


class _KubeProxy:
    """`leftovers.KubeProxyLeftovers`, which is imported when it is needed."""

    def _leftovers(self) -> Leftovers:
        from ebpflb.leftovers import KubeProxyLeftovers

        return KubeProxyLeftovers()

    def present(self) -> tuple[str, ...]:
        return self._leftovers().present()

    def inventory(self) -> tuple[str, ...]:
        return self._leftovers().inventory()

    def cleanup(self) -> None:
        self._leftovers().cleanup()


def _desired(config: Config, sources: Sequence[Source]) -> Intent:
    return Intent(config.node_name, config.proxy, [source.name for source in sources])


def _privileged() -> bool:
    from ebpflb.dataplane.bpf.facts import may_administrate

    return may_administrate()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- Sources ----


class _Kubernetes:
    """What the API server's source and its companions share; each None before, or where there is another source.
    `told` is who hears of requests, as soon as there is somebody."""

    def __init__(self) -> None:
        self.client: HttpClient | None = None
        self.servers: ApiServers | None = None
        self.told: Callable[[str, str, int | None, float | None], None] = lambda method, host, status, seconds: None


def _sources(config: Config, kubernetes: _Kubernetes) -> Sequence[Source]:
    from ebpflb.source.local import LocalSource

    if config.api is not None:
        return (_kube_source(config, config.api, kubernetes), LocalSource())
    from ebpflb.source.manifests import ManifestSource

    return (ManifestSource(config.manifests), LocalSource())


def _kube_source(config: Config, api: ApiServer, kubernetes: _Kubernetes) -> KubeSource:
    from ebpflb.source.kube import access, lastgood
    from ebpflb.source.kube.client import HttpClient
    from ebpflb.source.kube.endpoints import ApiServers
    from ebpflb.source.kube.source import NAME, KubeSource

    path = lastgood.path_in(config.state_dir, NAME) if config.state_dir else ""

    def recall() -> lastgood.Saved | None:
        return lastgood.load(path, config.node_name) if path else None

    kubernetes.servers = ApiServers(recall)
    kubernetes.client = HttpClient(
        access.Resolver(api, environ=os.environ, remembered=kubernetes.servers),
        told=lambda method, host, status, seconds: kubernetes.told(method, host, status, seconds),
    )
    return KubeSource(
        kubernetes.client,
        config.node_name,
        clock=time.monotonic,
        now=time.time,
        random=random.random,
        recall=recall,
    )


# ---- What goes along with a daemon ----


def _attendants(
    config: Config, choice: Choice, sources: Sequence[Source], desired: Desired, kubernetes: _Kubernetes
) -> Attendants:
    from ebpflb.attendants import DaemonAttendants
    from ebpflb.source.kube import lastgood
    from ebpflb.source.kube.events import EventSender
    from ebpflb.source.kube.keeper import Keeper
    from ebpflb.source.kube.source import NAME

    observers: list[Observer] = []
    if kubernetes.servers is not None:
        observers.append(kubernetes.servers)
    keeper = None
    if config.api is not None and config.state_dir and isinstance(desired, Intent):
        (source,) = (each for each in sources if each.name == NAME)
        keeper = Keeper(
            lastgood.path_in(config.state_dir, NAME),
            snapshot=desired.snapshot,
            live=lambda: source.condition().state is SourceState.LIVE,
            clock=time.monotonic,
            now=time.time,
        )
    events = None
    if config.api is not None and kubernetes.client is not None:
        events = EventSender(kubernetes.client, config.node_name, qps=config.api.qps, burst=config.api.burst)
    attendants = DaemonAttendants(
        config, choice, sources, keeper=keeper, events=events, observers=observers, clock=time.monotonic
    )
    kubernetes.told = attendants.request
    return attendants


def _set_up_node(config: Config) -> Iterable[Problem]:
    from ebpflb import node_setup

    return node_setup.set_up(config)


def _config_changes(config: Config) -> Changes | None:
    if not config.file:
        return None
    from ebpflb.config.file import Watch as FileWatch

    return FileWatch(config.file, config.file_digest)


# ---- The dataplanes ----


def _dataplanes(config: Config) -> Sequence[Dataplane]:
    return tuple(make(config) for make in (_bpf, _ipvs, _iptables))


def _bpf(config: Config) -> Dataplane:
    from ebpflb.dataplane.bpf.dataplane import BpfDataplane

    return BpfDataplane(
        Path(config.bpffs),
        Path(config.cgroup) if config.cgroup else None,
        config.devices,
        xdp=config.xdp,
        count_traffic=config.service_metrics > 0,
        maglev_table_size=config.maglev_table_size,
        go_around=config.pod_path == REDIRECT,
        beside=lambda: _told_beside(config),
    )


def _told_beside(config: Config) -> tuple[Told, ...] | None:
    """What the daemon of this network namespace says of XDP on its devices; None where it has none to tell of, is of
    another version, and where --xdp or --devices ask for something else than it was started with."""
    from ebpflb.commands.status import ask_status
    from ebpflb.dataplane.bpf.xdp_choice import Told

    try:
        status = ask_status(control.NAME)
    except (control.NotRunning, UserError):
        return None
    asked = (config.xdp, config.devices)
    if not status.devices or asked not in ((AUTO, ()), (status.xdp, status.device_patterns)):
        return None
    return tuple(Told(device.name, device.xdp, device.reason, device.problem) for device in status.devices)


def _ipvs(config: Config) -> Dataplane:
    from ebpflb.dataplane.ipvs.dataplane import IpvsDataplane

    return IpvsDataplane(_ipvs_options(config), mark_bit=config.masquerade_bit, variant=_variant(config))


def _ipvs_options(config: Config) -> IpvsOptions:
    from ebpflb.dataplane.ipvs.options import IpvsOptions

    return IpvsOptions(
        scheduler=config.ipvs.scheduler,
        exclude_cidrs=config.ipvs.exclude_cidrs,
        strict_arp=config.ipvs.strict_arp,
        tcp_timeout=config.ipvs.tcp_timeout,
        tcp_fin_timeout=config.ipvs.tcp_fin_timeout,
        udp_timeout=config.ipvs.udp_timeout,
    )


def _iptables(config: Config) -> Dataplane:
    from ebpflb.dataplane.iptables.dataplane import IptablesDataplane

    return IptablesDataplane(
        mark_bit=config.masquerade_bit,
        liberal_conntrack=config.conntrack is not None and config.conntrack.tcp_be_liberal,
        variant=_variant(config),
    )


def _variant(config: Config) -> str | None:
    return None if config.iptables_variant == AUTO else config.iptables_variant


def _prepare(config: Config, dataplane: Dataplane) -> None:
    from ebpflb.dataplane.bpf import pins
    from ebpflb.dataplane.bpf.dataplane import BpfDataplane

    if not isinstance(dataplane, BpfDataplane):
        return
    # Not only with the daemon: in a container that is not privileged a mount would not reach the node.
    try:
        pins.require_file_system(Path(config.bpffs))
    except UserError as error:
        if config.bpffs != DEFAULT_BPFFS:
            raise
        raise Unsupported(str(error)) from error


def _settings_of(config: Config, dataplane: Dataplane) -> Iterable[Problem]:
    try:
        if dataplane.name == "ipvs":
            from ebpflb.dataplane.ipvs.facts import set_sysctls

            set_sysctls(_ipvs_options(config))
        elif dataplane.name == "iptables" and _loopback_carries_node_ports(config):
            from ebpflb.dataplane.iptables.facts import localnet_routed, route_localnet

            if not localnet_routed():
                route_localnet(True)
    except (ApplyError, OSError) as error:
        return (Problem(dataplane.name, str(error)),)
    return ()


def _loopback_carries_node_ports(config: Config) -> bool:
    from ebpflb.facts import nodeport_addresses

    return bool(nodeport_addresses(Node(config.node_name, ("127.0.0.1",)), config.proxy))


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
