"""From the options of a command, and the file that `--config` names, to a Config.

Rules of this file: pure but for asking whether files are there. Options are laid over the file, the file over
kube-proxy's defaults; what that comes to is a document (which `--write-config-to` writes and /configz shows), and the
Config follows from the document alone. What another version will do passes with its neutral value only and is refused
in one line otherwise; what has no meaning here is named in one warning. Nothing is ignored in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from ebpflb.config import (
    DEFAULT_BPFFS,
    DEFAULT_HEALTHZ_PORT,
    DEFAULT_METRICS_PORT,
    Config,
    LogFormat,
    checks,
    defaults,
    values,
)
from ebpflb.config.checks import Draft
from ebpflb.config.document import OFF, EbpflbConfiguration, Said, as_plain
from ebpflb.config.durations import Duration
from ebpflb.errors import UserError


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options as they were typed. `None` or () is "not given"."""

    manifests: str | None = None
    node_name: str | None = None
    dataplane: str | None = None
    proxy_mode: str | None = None
    cgroup: str | None = None
    bpffs: str | None = None
    devices: tuple[str, ...] = ()
    xdp: str | None = None
    iptables_variant: str | None = None
    algorithm: str | None = None
    maglev_table_size: int | None = None
    pod_path: str | None = None
    masquerade_bit: int | None = None
    ipvs_scheduler: str | None = None
    ipvs_exclude_cidrs: tuple[str, ...] = ()
    ipvs_strict_arp: bool | None = None
    ipvs_tcp_timeout: Duration | None = None
    ipvs_tcpfin_timeout: Duration | None = None
    ipvs_udp_timeout: Duration | None = None
    nodeport_addresses: tuple[str, ...] = ()
    cluster_cidr: tuple[str, ...] = ()
    detect_local_mode: str | None = None
    pod_bridge_interface: str | None = None
    pod_interface_name_prefix: str | None = None
    masquerade_all: bool | None = None
    localhost_nodeports: bool | None = None
    healthz_bind_address: str | None = None
    metrics_bind_address: str | None = None
    config: str | None = None
    kubeconfig: str | None = None
    apiserver: tuple[str, ...] = ()
    state_dir: str | None = None
    service_metrics: int | None = None
    log_format: str | None = None
    log_level: str | None = None
    verbosity: int | None = None
    min_sync_period: float | None = None
    audit_period: float | None = None
    bind_address_hard_fail: bool | None = None
    oom_score_adj: int | None = None
    conntrack_max_per_core: int | None = None
    conntrack_min: int | None = None
    conntrack_tcp_established: Duration | None = None
    conntrack_tcp_close_wait: Duration | None = None
    conntrack_tcp_be_liberal: bool | None = None
    conntrack_udp: Duration | None = None
    conntrack_udp_stream: Duration | None = None


class _Row(NamedTuple):
    """An option, the path of the field that it is laid over, and how its value is written there."""

    attribute: str
    spelling: str
    path: str
    written: Callable[[Any], object] = lambda value: value


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""


def _server(address: str) -> str:
    return address or OFF


def _seconds(option: str, lowest: float) -> Callable[[float], Duration]:
    return lambda value: Duration.of(values.seconds(option, value, lowest))


_ROWS = (
    _Row("manifests", "--manifests", "manifests", _absolute),
    _Row("node_name", "--node-name", "hostnameOverride"),
    _Row("dataplane", "--dataplane", "dataplane"),
    _Row("proxy_mode", "--proxy-mode", "mode"),
    _Row("cgroup", "--cgroup", "cgroup", _absolute),
    _Row("bpffs", "--bpffs", "bpffs"),
    _Row("devices", "--devices", "devices", values.split),
    _Row("xdp", "--xdp", "xdp"),
    _Row("iptables_variant", "--iptables-variant", "iptablesVariant"),
    _Row("algorithm", "--algorithm", "algorithm"),
    _Row("pod_path", "--pod-path", "podPath"),
    _Row("maglev_table_size", "--maglev-table-size", "maglevTableSize"),
    _Row("masquerade_bit", "--iptables-masquerade-bit", "iptables.masqueradeBit"),
    _Row("ipvs_scheduler", "--ipvs-scheduler", "ipvs.scheduler"),
    _Row("ipvs_exclude_cidrs", "--ipvs-exclude-cidrs", "ipvs.excludeCIDRs", values.split),
    _Row("ipvs_strict_arp", "--ipvs-strict-arp", "ipvs.strictARP"),
    _Row("ipvs_tcp_timeout", "--ipvs-tcp-timeout", "ipvs.tcpTimeout"),
    _Row("ipvs_tcpfin_timeout", "--ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout"),
    _Row("ipvs_udp_timeout", "--ipvs-udp-timeout", "ipvs.udpTimeout"),
    _Row("nodeport_addresses", "--nodeport-addresses", "nodePortAddresses", values.split),
    _Row("cluster_cidr", "--cluster-cidr", "clusterCIDR", lambda texts: ",".join(values.split(texts))),
    _Row("detect_local_mode", "--detect-local-mode", "detectLocalMode"),
    _Row("pod_bridge_interface", "--pod-bridge-interface", "detectLocal.bridgeInterface"),
    _Row("pod_interface_name_prefix", "--pod-interface-name-prefix", "detectLocal.interfaceNamePrefix"),
    _Row("masquerade_all", "--masquerade-all", "iptables.masqueradeAll"),
    _Row("localhost_nodeports", "--iptables-localhost-nodeports", "iptables.localhostNodePorts"),
    _Row("healthz_bind_address", "--healthz-bind-address", "healthzBindAddress", _server),
    _Row("metrics_bind_address", "--metrics-bind-address", "metricsBindAddress", _server),
    _Row("kubeconfig", "--kubeconfig", "clientConnection.kubeconfig", _absolute),
    _Row("apiserver", "--apiserver", "apiServers"),
    _Row("state_dir", "--state-dir", "stateDir", _absolute),
    _Row("service_metrics", "--service-metrics", "serviceMetrics"),
    _Row("log_format", "--log-format", "logging.format"),
    _Row("log_level", "--log-level", "logLevel"),
    _Row("verbosity", "-v", "logging.verbosity", lambda number: max(number, 0)),
    _Row("bind_address_hard_fail", "--bind-address-hard-fail", "bindAddressHardFail"),
    _Row("oom_score_adj", "--oom-score-adj", "oomScoreAdj"),
    _Row("conntrack_max_per_core", "--conntrack-max-per-core", "conntrack.maxPerCore"),
    _Row("conntrack_min", "--conntrack-min", "conntrack.min"),
    _Row("conntrack_tcp_established", "--conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout"),
    _Row("conntrack_tcp_close_wait", "--conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout"),
    _Row("conntrack_tcp_be_liberal", "--conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal"),
    _Row("conntrack_udp", "--conntrack-udp-timeout", "conntrack.udpTimeout"),
    _Row("conntrack_udp_stream", "--conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout"),
    _Row("min_sync_period", "--min-sync-period", "minSyncPeriod", _seconds("--min-sync-period", 0.0)),
    _Row("audit_period", "--audit-period", "auditPeriod", _seconds("--audit-period", 1.0)),
)


def configure(options: Options, *, hostname: str, need_source: bool = True, in_cluster: bool = False) -> Config:
    """The Config that `options` ask for. `in_cluster` is whether this process is a pod with a service account, which
    is a source too. Raises UserError in one line for the first thing that is wrong."""
    said = _said(options.config)
    draft = _laid_over(said.document, options)
    document = defaults.with_defaults(draft.document)
    draft = draft._replace(document=document)
    xdp = checks.xdp(draft)
    manifests, api = checks.source(draft, in_cluster) if need_source else ("", None)
    proxy = checks.proxy_options(draft)
    where = draft.where
    return Config(
        manifests=manifests,
        api=api,
        state_dir=_absolute(document.state_dir or ""),
        node_name=checks.node_name(document.hostname_override, hostname),
        dataplane=checks.dataplane(draft),
        cgroup=values.directory(
            where("cgroup"), document.cgroup, "the cgroup2 directory whose processes are to be served"
        ),
        bpffs=values.in_bpffs(where("bpffs"), document.bpffs, DEFAULT_BPFFS),
        devices=values.devices(where("devices"), document.devices),
        xdp=xdp,
        proxy=proxy,
        log_format=values.choice(where("logging.format"), document.logging.format, LogFormat),
        log_level=checks.log_level(draft),
        min_sync_period=checks.period(draft, "minSyncPeriod", document.min_sync_period, 0.0),
        audit_period=checks.period(draft, "auditPeriod", document.audit_period, 1.0),
        healthz=checks.bind(draft, "healthzBindAddress", document.healthz_bind_address, DEFAULT_HEALTHZ_PORT),
        metrics=checks.bind(draft, "metricsBindAddress", document.metrics_bind_address, DEFAULT_METRICS_PORT),
        bind_hard_fail=document.bind_address_hard_fail,
        health_timeout=checks.period(draft, "healthTimeout", document.health_timeout, 1.0),
        conntrack=checks.conntrack(draft),
        oom_score_adj=checks.oom_score_adj(draft),
        service_metrics=checks.service_metrics(draft),
        masquerade_bit=checks.masquerade_bit(draft),
        iptables_variant=checks.iptables_variant(draft),
        maglev_table_size=checks.maglev_table_size(draft),
        pod_path=checks.pod_path(draft),
        ipvs=checks.ipvs(draft),
        file=os.path.abspath(options.config) if options.config else "",
        file_digest=said.digest,
        document=as_plain(document),
        warnings=checks.warnings(draft, proxy, said.retired),
    )


def _said(path: str | None) -> Said:
    if not path:
        return Said(EbpflbConfiguration())
    from ebpflb.config import file  # most commands have no use for its parser

    return file.read(path)


# ---- Options over the file ----


def _laid_over(document: EbpflbConfiguration, options: Options) -> Draft:
    """Some options are about the same thing: what was typed puts out what the file says about it elsewhere."""
    if options.bpffs == "":
        values.in_bpffs("--bpffs", "", DEFAULT_BPFFS)
    if options.manifests and (options.kubeconfig or options.apiserver):
        other = "--kubeconfig" if options.kubeconfig else "--apiserver"
        raise UserError(f"--manifests and {other} are two sources of Services: give one of them")
    if options.manifests:
        document = _replaced(_replaced(document, "clientConnection.kubeconfig", ""), "apiServers", ())
    if options.kubeconfig or options.apiserver:
        document = _replaced(document, "manifests", "")
    if options.proxy_mode and not options.dataplane:
        document = _replaced(document, "dataplane", "")
    if options.verbosity is not None and not options.log_level:
        document = _replaced(document, "logLevel", "")
    spellings = {}
    for row in _ROWS:
        value = getattr(options, row.attribute)
        if value is None or value == () or (value == "" and row.attribute in _EMPTY_IS_NOT_GIVEN):
            continue
        path = row.path
        if document.mode == "nftables" and path in ("iptables.masqueradeAll", "iptables.masqueradeBit"):
            path = path.replace("iptables", "nftables", 1)
        document = _replaced(document, path, row.written(value))
        spellings[path] = row.spelling
    return Draft(document, options.config or "", spellings)


_EMPTY_IS_NOT_GIVEN = {"manifests", "node_name", "kubeconfig"}


def _replaced(part: Any, path: str, value: object) -> Any:
    """`part` with another value at `path`."""
    name, _, rest = path.partition(".")
    (field,) = (each for each in msgspec.structs.fields(part) if each.encode_name == name)
    if rest:
        value = _replaced(getattr(part, field.name), rest, value)
    return msgspec.structs.replace(part, **{field.name: value})
