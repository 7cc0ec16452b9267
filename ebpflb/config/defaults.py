"""What is in force where a configuration says nothing, and what of it means nothing.

Rules of this file: kube-proxy's defaults, by kube-proxy's rules; ours beside them. `with_defaults` of what has its
defaults is the same again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from ebpflb.config import (
    AUTO,
    DEFAULT_BPFFS,
    DEFAULT_HEALTHZ_PORT,
    DEFAULT_METRICS_PORT,
    DEFAULT_MIN_SYNC_SECONDS,
    DEFAULT_STATE_DIR,
    GREATEST_TABLE,
    STACK,
)
from ebpflb.config.document import (
    KIND,
    VERSION,
    EbpflbConfiguration,
    Iptables,
    Ipvs,
    LogOptions,
    Nftables,
    Routing,
    Winkernel,
)
from ebpflb.config.durations import Duration

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

_ZERO = Duration(0)
_SYNC = Duration.of(30)
_MIN_SYNC = Duration.of(1)
_MASQUERADE_BIT = 14


def mode_settings(document: EbpflbConfiguration) -> Iptables | Ipvs | Nftables:
    """The part that kube-proxy would go by in the document's mode."""
    if document.mode == "ipvs":
        return document.ipvs
    return document.nftables if document.mode == "nftables" else document.iptables


MODES = ("iptables", "ipvs")
"""kube-proxy's modes that are dataplanes of ours, too, under the same name."""


def dataplane(document: EbpflbConfiguration) -> str:
    """The one that is asked for, by our word or else by kube-proxy's."""
    return document.dataplane or (document.mode if document.mode in MODES else AUTO)


def masquerade_bit(document: EbpflbConfiguration) -> int:
    """IPVS mode has no field of its own for it."""
    bit = (document.nftables if document.mode == "nftables" else document.iptables).masquerade_bit
    return _or(bit, _MASQUERADE_BIT)


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
            masquerade_bit=_or(document.iptables.masquerade_bit, _MASQUERADE_BIT),
            localhost_node_ports=_or(document.iptables.localhost_node_ports, True),
            sync_period=document.iptables.sync_period or _SYNC,
            min_sync_period=document.iptables.min_sync_period or _MIN_SYNC,
        ),
        ipvs=_but(document.ipvs, sync_period=document.ipvs.sync_period or _SYNC),
        nftables=_but(
            document.nftables,
            masquerade_bit=_or(document.nftables.masquerade_bit, _MASQUERADE_BIT),
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
        iptables_variant=document.iptables_variant or AUTO,
        algorithm=document.algorithm or "random",
        pod_path=document.pod_path or STACK,
        maglev_table_size=_or(document.maglev_table_size, GREATEST_TABLE),
        min_sync_period=_or(document.min_sync_period, _min_sync(document)),
        dataplane=document.dataplane or ("" if document.mode else AUTO),
    )
    # kube-proxy takes any length of time above zero; reading the kernel back more than once a second serves nobody.
    sync = max(mode_settings(filled).sync_period, Duration.of(1), key=_length)
    return _but(
        filled,
        audit_period=_or(document.audit_period, sync),
        health_timeout=_or(document.health_timeout, Duration(2 * sync.nanoseconds)),
    )


def _min_sync(document: EbpflbConfiguration) -> Duration:
    """kube-proxy's word counts where its dataplane is the one that is asked for, and who gave it knows what for."""
    asked: dict[str, Iptables | Ipvs] = {"iptables": document.iptables, "ipvs": document.ipvs}
    part = asked.get(dataplane(document))
    return (part.min_sync_period if part else _ZERO) or Duration.of(DEFAULT_MIN_SYNC_SECONDS)


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
        ("winkernel", document.winkernel, (Winkernel(),)),
        ("configSyncPeriod", document.config_sync_period, (_ZERO, Duration.of(900))),
        ("portRange", document.port_range, ("",)),
        ("windowsRunAsService", document.windows_run_as_service, (False,)),
    ):
        if value not in neutral:
            yield path
    yield from _of_other_dataplanes(document)
    used = mode_settings(document)
    for name, part in (("iptables", document.iptables), ("ipvs", document.ipvs), ("nftables", document.nftables)):
        if part is not used and part.sync_period not in (_ZERO, _SYNC):
            yield f"{name}.syncPeriod"
    if document.mode != "nftables" and document.nftables.masquerade_all:
        yield "nftables.masqueradeAll"


def _of_other_dataplanes(document: EbpflbConfiguration) -> Iterator[str]:
    """What concerns dataplanes that are not asked for."""
    word = dataplane(document)
    marks, ipvs = word != "bpf", word in (AUTO, "ipvs")
    nftables = document.mode == "nftables"
    for path, value, neutral, counts in (
        ("iptables.masqueradeBit", document.iptables.masquerade_bit, (None, _MASQUERADE_BIT), marks and not nftables),
        ("iptables.minSyncPeriod", document.iptables.min_sync_period, (_ZERO, _MIN_SYNC), word == "iptables"),
        ("iptablesVariant", document.iptables_variant, ("", AUTO), marks),
        ("maglevTableSize", document.maglev_table_size, (None, GREATEST_TABLE), word in (AUTO, "bpf")),
        ("ipvs.minSyncPeriod", document.ipvs.min_sync_period, (_ZERO,), word == "ipvs"),
        ("ipvs.scheduler", document.ipvs.scheduler, ("", "rr"), ipvs),
        ("ipvs.excludeCIDRs", document.ipvs.exclude_cidrs, ((),), ipvs),
        ("ipvs.strictARP", document.ipvs.strict_arp, (False,), ipvs),
        ("ipvs.tcpTimeout", document.ipvs.tcp_timeout, (_ZERO,), ipvs),
        ("ipvs.tcpFinTimeout", document.ipvs.tcp_fin_timeout, (_ZERO,), ipvs),
        ("ipvs.udpTimeout", document.ipvs.udp_timeout, (_ZERO,), ipvs),
        ("nftables.masqueradeBit", document.nftables.masquerade_bit, (None, _MASQUERADE_BIT), marks and nftables),
        ("nftables.minSyncPeriod", document.nftables.min_sync_period, (_ZERO, _MIN_SYNC), False),
    ):
        if not counts and value not in neutral:
            yield path


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
