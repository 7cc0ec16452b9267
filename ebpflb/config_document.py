"""The configuration as a document: the fields of kube-proxy's KubeProxyConfiguration, with ours beside them.

Rules of this file: names, types, defaults, and which fields have no meaning for ebpflb. A field that was not given is
zero or None, as kube-proxy has it; `with_defaults` fills them in by kube-proxy's rules. That values make sense is
checked in `options`, where they are used. Decoded strictly: a string is no number.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from ebpflb.config import (
    DEFAULT_BPFFS,
    DEFAULT_HEALTHZ_PORT,
    DEFAULT_METRICS_PORT,
    DEFAULT_MIN_SYNC_SECONDS,
    DEFAULT_STATE_DIR,
)
from ebpflb.durations import Duration

KUBE_PROXY_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KUBE_PROXY_KIND = "KubeProxyConfiguration"
VERSION = "ebpflb/v1"
KIND = "EbpflbConfiguration"

OFF = "off"
"""The word for a server that is not wanted; "" stands for the default, as kubeadm writes it."""

Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Integer = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

_ZERO = Duration(0)
_SYNC = Duration.of(30)
_MIN_SYNC = Duration.of(1)


class Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A part of the document."""


class ClientConnection(Part, frozen=True, kw_only=True):
    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = ""
    qps: float = 0.0
    burst: Natural = 0


class Routing(Part, frozen=True, kw_only=True):
    split_stream: bool = False
    info_buffer_size: str | int = "0"


class LogOptions(Part, frozen=True, kw_only=True):
    text: Routing = Routing()
    json: Routing = Routing()


class FileVerbosity(Part, frozen=True, kw_only=True):
    file_pattern: str = ""
    verbosity: Natural = 0


class Logging(Part, frozen=True, kw_only=True):
    format: str = ""
    flush_frequency: str | int = 0
    verbosity: Natural = 0
    vmodule: tuple[FileVerbosity, ...] = ()
    options: LogOptions = LogOptions()


class Iptables(Part, frozen=True, kw_only=True):
    masquerade_bit: Natural | None = None
    masquerade_all: bool = False
    localhost_node_ports: bool | None = None
    sync_period: Duration = _ZERO
    min_sync_period: Duration = _ZERO


class Ipvs(Part, frozen=True, kw_only=True):
    sync_period: Duration = _ZERO
    min_sync_period: Duration = _ZERO
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = msgspec.field(default=(), name="excludeCIDRs")
    strict_arp: bool = msgspec.field(default=False, name="strictARP")
    tcp_timeout: Duration = _ZERO
    tcp_fin_timeout: Duration = _ZERO
    udp_timeout: Duration = _ZERO


class Nftables(Part, frozen=True, kw_only=True):
    masquerade_bit: Natural | None = None
    masquerade_all: bool = False
    sync_period: Duration = _ZERO
    min_sync_period: Duration = _ZERO


class Winkernel(Part, frozen=True, kw_only=True):
    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = msgspec.field(default=False, name="enableDSR")
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class ConntrackSettings(Part, frozen=True, kw_only=True):
    max_per_core: Natural | None = None
    min: Natural | None = None
    tcp_established_timeout: Duration | None = None
    tcp_close_wait_timeout: Duration | None = None
    tcp_be_liberal: bool = False
    udp_timeout: Duration = _ZERO
    udp_stream_timeout: Duration = _ZERO


class DetectLocalSettings(Part, frozen=True, kw_only=True):
    bridge_interface: str = ""
    interface_name_prefix: str = ""


class KubeProxyConfiguration(Part, frozen=True, kw_only=True):
    api_version: str = ""
    kind: str = ""
    feature_gates: dict[str, bool] = {}
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = ""
    healthz_bind_address: str = ""
    metrics_bind_address: str = ""
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = ""
    iptables: Iptables = Iptables()
    ipvs: Ipvs = Ipvs()
    nftables: Nftables = Nftables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: str = ""
    detect_local: DetectLocalSettings = DetectLocalSettings()
    cluster_cidr: str = msgspec.field(default="", name="clusterCIDR")
    node_port_addresses: tuple[str, ...] = ()
    oom_score_adj: Integer | None = None
    conntrack: ConntrackSettings = ConntrackSettings()
    config_sync_period: Duration = _ZERO
    port_range: str = ""
    windows_run_as_service: bool = False


class EbpflbConfiguration(KubeProxyConfiguration, frozen=True, kw_only=True):
    """With what kube-proxy has no word for. `min_sync_period`, `audit_period` and `health_timeout` are ours alone:
    kube-proxy's periods stand with its modes."""

    manifests: str = ""
    api_servers: tuple[str, ...] = ()
    state_dir: str | None = None
    dataplane: str = ""
    cgroup: str = ""
    bpffs: str = ""
    devices: tuple[str, ...] = ()
    xdp: str = ""
    min_sync_period: Duration | None = None
    audit_period: Duration | None = None
    health_timeout: Duration | None = None
    service_metrics: Natural = 0
    log_level: str = ""


RETIRED: Mapping[str, tuple[object, ...]] = {
    "udpIdleTimeout": ("", "0s", "250ms"),
    "resourceContainer": ("", "/kube-proxy"),
}
"""Fields that old files still have, with what they have if nobody asked for anything."""


class Said(NamedTuple):
    """What a file says, the retired fields that say something, and a digest of all its bytes."""

    document: EbpflbConfiguration
    retired: tuple[str, ...] = ()
    digest: str = ""


def as_plain(document: EbpflbConfiguration) -> dict[str, object]:
    """With field names as they are written, of plain values; what is None is left out."""
    plain: dict[str, object] = _plain(msgspec.to_builtins(document, enc_hook=str))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def mode_settings(document: EbpflbConfiguration) -> Iptables | Ipvs | Nftables:
    """The part that kube-proxy would go by in the document's mode."""
    if document.mode == "ipvs":
        return document.ipvs
    return document.nftables if document.mode == "nftables" else document.iptables


def masquerade_all(document: EbpflbConfiguration) -> bool:
    """IPVS mode has no field of its own for it."""
    return (document.nftables if document.mode == "nftables" else document.iptables).masquerade_all


def with_defaults(document: EbpflbConfiguration) -> EbpflbConfiguration:
    """What is in force where nothing was said. Where manifests are the source, this is no cluster's node, and the
    kernel's settings are left as they are, unless the document says what they should be."""
    node = not document.manifests
    conntrack, client = document.conntrack, document.client_connection
    healthz, metrics = _default_hosts(document.bind_address)
    filled = _but(
        document,
        api_version=VERSION,
        kind=KIND,
        bind_address=document.bind_address or "0.0.0.0",
        healthz_bind_address=_with_port(document.healthz_bind_address or healthz, DEFAULT_HEALTHZ_PORT),
        metrics_bind_address=_with_port(document.metrics_bind_address or metrics, DEFAULT_METRICS_PORT),
        client_connection=_but(
            client,
            content_type=client.content_type or "application/vnd.kubernetes.protobuf",
            qps=client.qps or 5.0,
            burst=client.burst or 10,
        ),
        iptables=_but(
            document.iptables,
            masquerade_bit=_or(document.iptables.masquerade_bit, 14),
            localhost_node_ports=_or(document.iptables.localhost_node_ports, True),
            sync_period=document.iptables.sync_period or _SYNC,
            min_sync_period=document.iptables.min_sync_period or _MIN_SYNC,
        ),
        ipvs=_but(document.ipvs, sync_period=document.ipvs.sync_period or _SYNC),
        nftables=_but(
            document.nftables,
            masquerade_bit=_or(document.nftables.masquerade_bit, 14),
            sync_period=document.nftables.sync_period or _SYNC,
            min_sync_period=document.nftables.min_sync_period or _MIN_SYNC,
        ),
        conntrack=_but(
            conntrack,
            max_per_core=_or(conntrack.max_per_core, 32768 if node else 0),
            min=_or(conntrack.min, 131072),
            tcp_established_timeout=_or(conntrack.tcp_established_timeout, Duration.of(86400 if node else 0)),
            tcp_close_wait_timeout=_or(conntrack.tcp_close_wait_timeout, Duration.of(3600 if node else 0)),
        ),
        oom_score_adj=_or(document.oom_score_adj, -999 if node else None),
        config_sync_period=document.config_sync_period or Duration.of(900),
        detect_local_mode=document.detect_local_mode or "ClusterCIDR",
        logging=_but(document.logging, format=document.logging.format or "text"),
        state_dir=_or(document.state_dir, DEFAULT_STATE_DIR if node else ""),
        bpffs=document.bpffs or DEFAULT_BPFFS,
        xdp=document.xdp or "auto",
        min_sync_period=_or(document.min_sync_period, Duration.of(DEFAULT_MIN_SYNC_SECONDS)),
        dataplane=document.dataplane or ("" if document.mode else "auto"),
    )
    # kube-proxy takes any length of time above zero; reading the kernel back more than once a second serves nobody.
    sync = max(mode_settings(filled).sync_period, Duration.of(1), key=_length)
    return _but(
        filled,
        audit_period=_or(document.audit_period, sync),
        health_timeout=_or(document.health_timeout, Duration(2 * sync.nanoseconds)),
    )


def meaningless(document: EbpflbConfiguration) -> tuple[str, ...]:
    """The paths of what says something, but nothing that ebpflb could act upon."""
    return tuple(_meaningless(document))


def _meaningless(document: EbpflbConfiguration) -> Iterator[str]:
    if not _unspecified(document.bind_address):
        yield "bindAddress"
    yield from (f"featureGates.{name}" for name in sorted(document.feature_gates))
    for path, value, neutral in (
        ("enableProfiling", document.enable_profiling, (False,)),
        ("showHiddenMetricsForVersion", document.show_hidden_metrics_for_version, ("",)),
        ("logging.vmodule", document.logging.vmodule, ((),)),
        ("logging.options", document.logging.options, _NO_LOG_OPTIONS),
        ("iptables.masqueradeBit", document.iptables.masquerade_bit, (None, 14)),
        ("iptables.minSyncPeriod", document.iptables.min_sync_period, (_ZERO, _MIN_SYNC)),
        ("ipvs.minSyncPeriod", document.ipvs.min_sync_period, (_ZERO,)),
        ("ipvs.scheduler", document.ipvs.scheduler, ("",)),
        ("ipvs.excludeCIDRs", document.ipvs.exclude_cidrs, ((),)),
        ("ipvs.strictARP", document.ipvs.strict_arp, (False,)),
        ("ipvs.tcpTimeout", document.ipvs.tcp_timeout, (_ZERO,)),
        ("ipvs.tcpFinTimeout", document.ipvs.tcp_fin_timeout, (_ZERO,)),
        ("ipvs.udpTimeout", document.ipvs.udp_timeout, (_ZERO,)),
        ("nftables.masqueradeBit", document.nftables.masquerade_bit, (None, 14)),
        ("nftables.minSyncPeriod", document.nftables.min_sync_period, (_ZERO, _MIN_SYNC)),
        ("winkernel", document.winkernel, (Winkernel(),)),
        ("configSyncPeriod", document.config_sync_period, (_ZERO, Duration.of(900))),
        ("portRange", document.port_range, ("",)),
        ("windowsRunAsService", document.windows_run_as_service, (False,)),
    ):
        if value not in neutral:
            yield path
    used = mode_settings(document)
    for name, part in (("iptables", document.iptables), ("ipvs", document.ipvs), ("nftables", document.nftables)):
        if part is not used and part.sync_period not in (_ZERO, _SYNC):
            yield f"{name}.syncPeriod"
    if document.mode != "nftables" and document.nftables.masquerade_all:
        yield "nftables.masqueradeAll"


_NO_ROUTING = tuple(Routing(info_buffer_size=size) for size in ("0", "", 0))
_NO_LOG_OPTIONS = tuple(LogOptions(text=text, json=json) for text in _NO_ROUTING for json in _NO_ROUTING)


def _default_hosts(bind_address: str) -> tuple[str, str]:
    return ("::", "::1") if ":" in bind_address else ("0.0.0.0", "127.0.0.1")


def _with_port(text: str, port: int) -> str:
    """An address alone is at the usual port."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    return f"[{text}]:{port}" if address.version == 6 else f"{text}:{port}"


def _unspecified(text: str) -> bool:
    try:
        return not text or ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _length(duration: Duration) -> int:
    return duration.nanoseconds


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _but(part: S, **changes: object) -> S:
    return msgspec.structs.replace(part, **changes)
