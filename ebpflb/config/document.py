"""The configuration as a document: the fields of kube-proxy's KubeProxyConfiguration, with ours beside them.

Rules of this file: names and types. A field that was not given is zero or None, as kube-proxy has it; what that stands
for is in `defaults`, and whether values make sense in `checks`. Decoded strictly: a string is no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

from ebpflb.config.durations import Duration

KUBE_PROXY_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KUBE_PROXY_KIND = "KubeProxyConfiguration"
VERSION = "ebpflb/v1"
KIND = "EbpflbConfiguration"

OFF = "off"
"""The word for a server that is not wanted; "" stands for the default, as kubeadm writes it."""

Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Integer = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]

_ZERO = Duration(0)


class Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A part of the document. Those that follow are named as kube-proxy names them, and hold its fields."""


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
    iptables_variant: str = ""
    algorithm: str = ""
    maglev_table_size: Natural | None = None
    pod_path: str = ""
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
