"""From the options of a command, and the file that `--config` names, to a Config.

Rules of this file: pure but for asking whether files are there. Options are laid over the file, the file over
kube-proxy's defaults; what that comes to is a document (which `--write-config-to` writes and /configz shows), and the
Config follows from the document alone. What another version will do passes with its neutral value only and is refused
in one line otherwise; what has no meaning here is named in one warning. Nothing is ignored in silence. An error begins
with where the value stands: `--cluster-cidr` or `--config FILE: clusterCIDR`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from ebpflb import config_document, config_values
from ebpflb.config import (
    DEFAULT_BPFFS,
    DEFAULT_HEALTHZ_PORT,
    DEFAULT_METRICS_PORT,
    ApiServer,
    Bind,
    Config,
    Conntrack,
    LogFormat,
    LogLevel,
)
from ebpflb.config_document import OFF, EbpflbConfiguration, Said
from ebpflb.durations import Duration
from ebpflb.errors import UserError
from ebpflb.model import DetectLocal, ProxyOptions

# kube-proxy's -v counts up; from 4 on klog calls it debug.
_DEBUG_VERBOSITY = 4


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
    return lambda value: Duration.of(config_values.seconds(option, value, lowest))


_ROWS = (
    _Row("manifests", "--manifests", "manifests", _absolute),
    _Row("node_name", "--node-name", "hostnameOverride"),
    _Row("dataplane", "--dataplane", "dataplane"),
    _Row("proxy_mode", "--proxy-mode", "mode"),
    _Row("cgroup", "--cgroup", "cgroup", _absolute),
    _Row("bpffs", "--bpffs", "bpffs"),
    _Row("devices", "--devices", "devices", config_values.split),
    _Row("xdp", "--xdp", "xdp"),
    _Row("nodeport_addresses", "--nodeport-addresses", "nodePortAddresses", config_values.split),
    _Row("cluster_cidr", "--cluster-cidr", "clusterCIDR", lambda texts: ",".join(config_values.split(texts))),
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


class _Draft(NamedTuple):
    """A document with no defaults yet, and where each path of it stands that an option was laid over."""

    document: EbpflbConfiguration
    file: str
    options: dict[str, str]

    def where(self, path: str) -> str:
        return self.options.get(path) or (f"--config {self.file}: {path}" if self.file else path)


def configure(options: Options, *, hostname: str, need_source: bool = True, in_cluster: bool = False) -> Config:
    """The Config that `options` ask for. `in_cluster` is whether this process is a pod with a service account, which
    is a source too. Raises UserError in one line for the first thing that is wrong."""
    said = _said(options.config)
    draft = _laid_over(said.document, options)
    document = config_document.with_defaults(draft.document)
    draft = draft._replace(document=document)
    _refuse_what_is_not_here(draft)
    manifests, api = _source(draft, in_cluster) if need_source else ("", None)
    proxy = _proxy_options(draft)
    where = draft.where
    return Config(
        manifests=manifests,
        api=api,
        state_dir=_absolute(document.state_dir or ""),
        node_name=_node_name(document.hostname_override, hostname),
        dataplane=_dataplane(draft, options),
        cgroup=config_values.directory(
            where("cgroup"), document.cgroup, "the cgroup2 directory whose processes are to be served"
        ),
        bpffs=config_values.in_bpffs(where("bpffs"), document.bpffs, DEFAULT_BPFFS),
        devices=config_values.devices(where("devices"), document.devices),
        proxy=proxy,
        log_format=config_values.choice(where("logging.format"), document.logging.format, LogFormat),
        log_level=_log_level(draft),
        min_sync_period=_period(draft, "minSyncPeriod", document.min_sync_period, 0.0),
        audit_period=_period(draft, "auditPeriod", document.audit_period, 1.0),
        healthz=_bind(draft, "healthzBindAddress", document.healthz_bind_address, DEFAULT_HEALTHZ_PORT),
        metrics=_bind(draft, "metricsBindAddress", document.metrics_bind_address, DEFAULT_METRICS_PORT),
        bind_hard_fail=document.bind_address_hard_fail,
        health_timeout=_period(draft, "healthTimeout", document.health_timeout, 1.0),
        conntrack=_conntrack(draft),
        oom_score_adj=_oom_score_adj(draft),
        service_metrics=_service_metrics(draft),
        file=os.path.abspath(options.config) if options.config else "",
        file_digest=said.digest,
        document=config_document.as_plain(document),
        warnings=_warnings(draft, proxy, said.retired),
    )


def _said(path: str | None) -> Said:
    if not path:
        return Said(EbpflbConfiguration())
    from ebpflb import config_file  # most commands have no use for its parser

    return config_file.read(path)


# ---- Options over the file ----


def _laid_over(document: EbpflbConfiguration, options: Options) -> _Draft:
    """Some options are about the same thing: what was typed puts out what the file says about it elsewhere."""
    if options.bpffs == "":
        config_values.in_bpffs("--bpffs", "", DEFAULT_BPFFS)
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
        if path == "iptables.masqueradeAll" and document.mode == "nftables":
            path = "nftables.masqueradeAll"
        document = _replaced(document, path, row.written(value))
        spellings[path] = row.spelling
    return _Draft(document, options.config or "", spellings)


_EMPTY_IS_NOT_GIVEN = {"manifests", "node_name", "kubeconfig"}


def _replaced(part: Any, path: str, value: object) -> Any:
    """`part` with another value at `path`."""
    name, _, rest = path.partition(".")
    (field,) = (each for each in msgspec.structs.fields(part) if each.encode_name == name)
    if rest:
        value = _replaced(getattr(part, field.name), rest, value)
    return msgspec.structs.replace(part, **{field.name: value})


# ---- From the document ----


def _refuse_what_is_not_here(draft: _Draft) -> None:
    xdp, where = draft.document.xdp, draft.where("xdp")
    if xdp not in ("auto", "native", "generic", "off"):
        raise UserError(f"{where} {xdp}: choose auto or off")
    if xdp in ("native", "generic"):
        raise UserError(f"{where} {xdp} is not in this version yet; choose auto or off (both leave XDP alone)")


def _source(draft: _Draft, in_cluster: bool) -> tuple[str, ApiServer | None]:
    """The manifests' directory or the API server: the one where events come from."""
    document, where = draft.document, draft.where
    client = document.client_connection
    if document.manifests:
        if client.kubeconfig or document.api_servers:
            other = "clientConnection.kubeconfig" if client.kubeconfig else "apiServers"
            raise UserError(f"{where('manifests')} and {other} are two sources of Services: keep one of them")
        directory = config_values.directory(where("manifests"), document.manifests, _MANIFESTS)
        return directory, None
    if not (client.kubeconfig or document.api_servers or in_cluster):
        raise UserError(
            "no source of Services: give --kubeconfig FILE or --manifests DIR, or run in a pod with a service account"
        )
    urls = (config_values.url(where("apiServers"), text) for text in document.api_servers)
    return "", ApiServer(
        kubeconfig=config_values.file(where("clientConnection.kubeconfig"), client.kubeconfig),
        addresses=tuple(dict.fromkeys(urls)),
        qps=client.qps,
        burst=client.burst,
    )


_MANIFESTS = "a directory of YAML or JSON manifests"


def _node_name(given: str, hostname: str) -> str:
    # kube-proxy trims and lowers both, so that a node is found under the name that the kubelet registered.
    name = (given or hostname).strip().lower()
    if not name:
        raise UserError("this node has no name: give --node-name NAME, as `kubectl get nodes` shows it")
    return name


def _dataplane(draft: _Draft, options: Options) -> str:
    """Who names a dataplane has said more than kube-proxy's word for it can; both as options must agree."""
    chosen, mode = draft.document.dataplane, draft.document.mode
    if options.proxy_mode and options.dataplane and options.proxy_mode in ("iptables", "ipvs"):
        if options.dataplane != options.proxy_mode:
            raise UserError(
                f"--proxy-mode {options.proxy_mode} and --dataplane {options.dataplane} disagree; "
                "give --dataplane alone"
            )
    elif options.proxy_mode:
        chosen = ""
    where = draft.where("dataplane" if chosen else "mode")
    if not chosen and mode == "nftables":
        instead = "leave the option out" if "mode" in draft.options else "leave it empty, or give --dataplane auto"
        raise UserError(f"{where} nftables: ebpflb has no nftables dataplane; {instead}")
    if not chosen and mode not in ("", "iptables", "ipvs"):
        raise UserError(f"{where} {mode} is unknown; use --dataplane auto or --dataplane bpf")
    word = chosen or mode or "auto"
    if word in ("ipvs", "iptables"):
        raise UserError(f"{where} {word} is not in this version yet; choose --dataplane auto or bpf")
    if word not in ("auto", "bpf"):
        raise UserError(f"{where} {word} is unknown; choose auto or bpf")
    return word


def _proxy_options(draft: _Draft) -> ProxyOptions:
    document, where = draft.document, draft.where
    addresses = document.node_port_addresses
    primary = "primary" in addresses
    if primary and len(addresses) > 1:
        raise UserError(f"{where('nodePortAddresses')}: `primary` stands alone; give either it or CIDRs")
    bridge, prefix = "detectLocal.bridgeInterface", "detectLocal.interfaceNamePrefix"
    if not config_values.is_address(document.bind_address):
        raise UserError(f"{where('bindAddress')} {document.bind_address} is not an address; write such as 0.0.0.0")
    return ProxyOptions(
        masquerade_all=config_document.masquerade_all(document),
        detect_local=_detect_local(where("detectLocalMode"), document.detect_local_mode),
        cluster_cidrs=config_values.cidrs(where("clusterCIDR"), config_values.split((document.cluster_cidr,))),
        bridge_interface=config_values.interface(where(bridge), document.detect_local.bridge_interface),
        interface_name_prefix=config_values.interface(where(prefix), document.detect_local.interface_name_prefix),
        nodeport_addresses=() if primary else config_values.cidrs(where("nodePortAddresses"), addresses),
        nodeport_primary=primary,
        localhost_nodeports=document.iptables.localhost_node_ports is not False,
    )


def _detect_local(where: str, mode: str) -> DetectLocal:
    for known in DetectLocal:
        if known.value == mode:
            return known
    choices = ", ".join(known.value for known in DetectLocal)
    raise UserError(f"{where} {mode} is unknown; choose one of {choices}")


def _log_level(draft: _Draft) -> LogLevel:
    if draft.document.log_level:
        return config_values.choice(draft.where("logLevel"), draft.document.log_level, LogLevel)
    return LogLevel.DEBUG if draft.document.logging.verbosity >= _DEBUG_VERBOSITY else LogLevel.INFO


def _bind(draft: _Draft, path: str, text: str, default_port: int) -> Bind | None:
    off = '""' if path in draft.options else OFF
    return config_values.bind(draft.where(path), "" if text == OFF else text, default_port, off)


def _period(draft: _Draft, path: str, duration: Duration | None, lowest: float) -> float:
    seconds = duration.seconds if duration else 0.0
    if seconds < lowest:
        raise UserError(f"{draft.where(path)} {duration}: give a duration of at least {Duration.of(lowest)}")
    return seconds


def _conntrack(draft: _Draft) -> Conntrack | None:
    """None if it leaves everything as it is."""
    said = draft.document.conntrack
    found = Conntrack(
        max_per_core=said.max_per_core or 0,
        least=said.min or 0,
        tcp_established=_whole(draft, "tcpEstablishedTimeout", said.tcp_established_timeout),
        tcp_close_wait=_whole(draft, "tcpCloseWaitTimeout", said.tcp_close_wait_timeout),
        tcp_be_liberal=said.tcp_be_liberal,
        udp=_whole(draft, "udpTimeout", said.udp_timeout),
        udp_stream=_whole(draft, "udpStreamTimeout", said.udp_stream_timeout),
    )
    timeouts = (found.tcp_established, found.tcp_close_wait, found.udp, found.udp_stream)
    return found if found.max_per_core or found.tcp_be_liberal or any(timeouts) else None


def _whole(draft: _Draft, name: str, duration: Duration | None) -> int | None:
    """Whole seconds, as the kernel counts; None for zero, which leaves the kernel's."""
    if duration is not None and duration.nanoseconds < 0:
        raise UserError(
            f"{draft.where(f'conntrack.{name}')} {duration}: give at least 0s, which leaves the kernel's own"
        )
    return int(duration.seconds) or None if duration else None


def _oom_score_adj(draft: _Draft) -> int | None:
    score = draft.document.oom_score_adj
    if score is not None and not -1000 <= score <= 1000:
        raise UserError(f"{draft.where('oomScoreAdj')} {score}: give a number from -1000 to 1000")
    return score


def _service_metrics(draft: _Draft) -> int:
    number = draft.document.service_metrics
    if number < 0:
        raise UserError(f"{draft.where('serviceMetrics')} {number}: give a number of Services, 0 for none")
    return number


# ---- Warnings ----


def _warnings(draft: _Draft, proxy: ProxyOptions, retired: tuple[str, ...]) -> tuple[str, ...]:
    found = (_undetected(proxy), _without_meaning(draft, retired))
    return tuple(each for each in found if each)


def _undetected(proxy: ProxyOptions) -> str:
    """What kube-proxy also only warns of: a detect-local mode without its value detects nothing."""
    missing = {
        DetectLocal.CLUSTER_CIDR: ("" if proxy.cluster_cidrs else "--cluster-cidr"),
        DetectLocal.NODE_CIDR: "",
        DetectLocal.BRIDGE_INTERFACE: ("" if proxy.bridge_interface else "--pod-bridge-interface"),
        DetectLocal.INTERFACE_NAME_PREFIX: ("" if proxy.interface_name_prefix else "--pod-interface-name-prefix"),
    }[proxy.detect_local]
    if not missing:
        return ""
    return (
        f"detect-local mode {proxy.detect_local.value} needs {missing}, which is not given: "
        "pods are not told from other clients"
    )


def _without_meaning(draft: _Draft, retired: tuple[str, ...]) -> str:
    paths = (*config_document.meaningless(draft.document), *retired)
    return f"--config {draft.file}: without meaning for ebpflb: {', '.join(paths)}" if paths else ""
