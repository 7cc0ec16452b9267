"""From a document with its defaults to the parts of a Config.

Rules of this file: what a value means and whether it makes sense, one part a function. Errors are UserErrors, and begin
with where the value stands: `--cluster-cidr` or `--config FILE: clusterCIDR`. Pure but for asking whether files are
there.
"""

from __future__ import annotations

from typing import NamedTuple

from ebpflb.config import (
    ALGORITHMS,
    AUTO,
    DATAPLANES,
    GREATEST_TABLE,
    IPTABLES_VARIANTS,
    LEAST_TABLE,
    POD_PATHS,
    ApiServer,
    Bind,
    Conntrack,
    Ipvs,
    LogLevel,
    defaults,
    values,
)
from ebpflb.config.document import OFF, EbpflbConfiguration
from ebpflb.config.durations import Duration
from ebpflb.errors import UserError
from ebpflb.model import DetectLocal, ProxyOptions

# kube-proxy's -v counts up; from 4 on klog calls it debug.
_DEBUG_VERBOSITY = 4

# IP_VS_SCHEDNAME_MAXLEN, of which the end takes one.
_SCHEDULER_ROOM = 16

_MANIFESTS = "a directory of YAML or JSON manifests"
_XDP = ("auto", "native", "generic", "off")


class Draft(NamedTuple):
    """A document, the file that it is from ("" for none), and the options that were laid over it, by path."""

    document: EbpflbConfiguration
    file: str
    options: dict[str, str]

    def where(self, path: str) -> str:
        """Where the value at `path` stands, in words."""
        return self.options.get(path) or (f"--config {self.file}: {path}" if self.file else path)


def xdp(draft: Draft) -> str:
    """Whether and how packets are met before the stack."""
    asked = draft.document.xdp
    if asked not in _XDP:
        raise UserError(f"{draft.where('xdp')} {asked} is unknown; choose one of {', '.join(_XDP)}")
    return asked


def pod_path(draft: Draft) -> str:
    """Whether flows between pods of this node go through the stack."""
    asked = draft.document.pod_path
    if asked not in POD_PATHS:
        raise UserError(f"{draft.where('podPath')} {asked} is unknown; choose one of {', '.join(POD_PATHS)}")
    return asked


def source(draft: Draft, in_cluster: bool) -> tuple[str, ApiServer | None]:
    """The manifests' directory or the API server: the one where events come from."""
    document, where = draft.document, draft.where
    client = document.client_connection
    if document.manifests:
        if client.kubeconfig or document.api_servers:
            other = "clientConnection.kubeconfig" if client.kubeconfig else "apiServers"
            raise UserError(f"{where('manifests')} and {other} are two sources of Services: keep one of them")
        directory = values.directory(where("manifests"), document.manifests, _MANIFESTS)
        return directory, None
    if not (client.kubeconfig or document.api_servers or in_cluster):
        raise UserError(
            "no source of Services: give --kubeconfig FILE or --manifests DIR, or run in a pod with a service account"
        )
    urls = (values.url(where("apiServers"), text) for text in document.api_servers)
    return "", ApiServer(
        kubeconfig=values.file(where("clientConnection.kubeconfig"), client.kubeconfig),
        addresses=tuple(dict.fromkeys(urls)),
        qps=client.qps,
        burst=client.burst,
    )


def node_name(given: str, hostname: str) -> str:
    """Under which name the API server has this node."""
    # kube-proxy trims and lowers both, so that a node is found under the name that the kubelet registered.
    name = (given or hostname).strip().lower()
    if not name:
        raise UserError("this node has no name: give --node-name NAME, as `kubectl get nodes` shows it")
    return name


def dataplane(draft: Draft) -> str:
    """Who names a dataplane has said more than kube-proxy's word for it can; both as options must agree."""
    chosen, mode = draft.document.dataplane, draft.document.mode
    if mode and "mode" in draft.options:
        if mode not in defaults.MODES:
            chosen = ""
        elif "dataplane" in draft.options and chosen != mode:
            raise UserError(f"--proxy-mode {mode} and --dataplane {chosen} disagree; give --dataplane alone")
    where = draft.where("dataplane" if chosen else "mode")
    choices = ", ".join(DATAPLANES)
    if not chosen and mode == "nftables":
        instead = "leave the option out" if "mode" in draft.options else "leave it empty, or give --dataplane auto"
        raise UserError(f"{where} nftables: ebpflb has no nftables dataplane; {instead}")
    if not chosen and mode and mode not in defaults.MODES:
        raise UserError(f"{where} {mode} is unknown; use --dataplane with one of {AUTO}, {choices}")
    if chosen and chosen not in (AUTO, *DATAPLANES):
        raise UserError(f"{where} {chosen} is unknown; choose one of {AUTO}, {choices}")
    return defaults.dataplane(draft.document)


def masquerade_bit(draft: Draft) -> int:
    """Of 32 bits that a mark has."""
    mode = "nftables" if draft.document.mode == "nftables" else "iptables"
    bit = defaults.masquerade_bit(draft.document)
    if not 0 <= bit < 32:
        raise UserError(f"{draft.where(f'{mode}.masqueradeBit')} {bit}: a mark has the bits 0 to 31")
    return bit


def iptables_variant(draft: Draft) -> str:
    """Which of the two kinds of iptables."""
    variant = draft.document.iptables_variant
    if variant not in (AUTO, *IPTABLES_VARIANTS):
        choices = ", ".join((AUTO, *IPTABLES_VARIANTS))
        raise UserError(f"{draft.where('iptablesVariant')} {variant} is unknown; choose one of {choices}")
    return variant


def _algorithm(draft: Draft) -> str:
    """How a backend is chosen where a Service does not say."""
    algorithm = draft.document.algorithm
    if algorithm not in ALGORITHMS:
        raise UserError(f"{draft.where('algorithm')} {algorithm} is unknown; choose one of {', '.join(ALGORITHMS)}")
    return algorithm


def maglev_table_size(draft: Draft) -> int:
    """Any number: tables are the greatest primes below powers of two, and one that is not greater is taken."""
    size = draft.document.maglev_table_size
    assert size is not None  # it has its default
    if not LEAST_TABLE <= size <= GREATEST_TABLE:
        where = draft.where("maglevTableSize")
        raise UserError(f"{where} {size}: give a number of positions from {LEAST_TABLE} to {GREATEST_TABLE}")
    return size


def ipvs(draft: Draft) -> Ipvs:
    """Which schedulers there are, the kernel knows: one that it lacks is found when IPVS is asked for it."""
    said = draft.document.ipvs
    scheduler = said.scheduler or Ipvs().scheduler
    if not (scheduler.isascii() and scheduler.replace("_", "").isalnum() and len(scheduler) < _SCHEDULER_ROOM):
        raise UserError(f"{draft.where('ipvs.scheduler')} {scheduler} is no scheduler; write such as rr, wrr, lc or mh")
    return Ipvs(
        scheduler=scheduler,
        exclude_cidrs=values.cidrs(draft.where("ipvs.excludeCIDRs"), said.exclude_cidrs),
        strict_arp=said.strict_arp,
        tcp_timeout=_whole(draft, "ipvs.tcpTimeout", said.tcp_timeout) or 0,
        tcp_fin_timeout=_whole(draft, "ipvs.tcpFinTimeout", said.tcp_fin_timeout) or 0,
        udp_timeout=_whole(draft, "ipvs.udpTimeout", said.udp_timeout) or 0,
    )


def proxy_options(draft: Draft) -> ProxyOptions:
    """What shapes routes."""
    document, where = draft.document, draft.where
    addresses = document.node_port_addresses
    primary = "primary" in addresses
    if primary and len(addresses) > 1:
        raise UserError(f"{where('nodePortAddresses')}: `primary` stands alone; give either it or CIDRs")
    bridge, prefix = "detectLocal.bridgeInterface", "detectLocal.interfaceNamePrefix"
    if not values.is_address(document.bind_address):
        raise UserError(f"{where('bindAddress')} {document.bind_address} is not an address; write such as 0.0.0.0")
    return ProxyOptions(
        masquerade_all=defaults.masquerade_all(document),
        detect_local=_detect_local(where("detectLocalMode"), document.detect_local_mode),
        cluster_cidrs=values.cidrs(where("clusterCIDR"), values.split((document.cluster_cidr,))),
        bridge_interface=values.interface(where(bridge), document.detect_local.bridge_interface),
        interface_name_prefix=values.interface(where(prefix), document.detect_local.interface_name_prefix),
        nodeport_addresses=() if primary else values.cidrs(where("nodePortAddresses"), addresses),
        nodeport_primary=primary,
        localhost_nodeports=document.iptables.localhost_node_ports is not False,
        default_algorithm=_algorithm(draft),
    )


def _detect_local(where: str, mode: str) -> DetectLocal:
    for known in DetectLocal:
        if known.value == mode:
            return known
    choices = ", ".join(known.value for known in DetectLocal)
    raise UserError(f"{where} {mode} is unknown; choose one of {choices}")


def log_level(draft: Draft) -> LogLevel:
    """By its name, or by how much kube-proxy would say."""
    if draft.document.log_level:
        return values.choice(draft.where("logLevel"), draft.document.log_level, LogLevel)
    return LogLevel.DEBUG if draft.document.logging.verbosity >= _DEBUG_VERBOSITY else LogLevel.INFO


def bind(draft: Draft, path: str, text: str, default_port: int) -> Bind | None:
    """Where a server listens; None for nowhere."""
    off = '""' if path in draft.options else OFF
    return values.bind(draft.where(path), "" if text == OFF else text, default_port, off)


def period(draft: Draft, path: str, duration: Duration | None, lowest: float) -> float:
    """Seconds, `lowest` at least."""
    seconds = duration.seconds if duration else 0.0
    if seconds < lowest:
        raise UserError(f"{draft.where(path)} {duration}: give a duration of at least {Duration.of(lowest)}")
    return seconds


def conntrack(draft: Draft) -> Conntrack | None:
    """None if it leaves everything as it is."""
    said = draft.document.conntrack
    found = Conntrack(
        max_per_core=said.max_per_core or 0,
        least=said.min or 0,
        tcp_established=_whole(draft, "conntrack.tcpEstablishedTimeout", said.tcp_established_timeout),
        tcp_close_wait=_whole(draft, "conntrack.tcpCloseWaitTimeout", said.tcp_close_wait_timeout),
        tcp_be_liberal=said.tcp_be_liberal,
        udp=_whole(draft, "conntrack.udpTimeout", said.udp_timeout),
        udp_stream=_whole(draft, "conntrack.udpStreamTimeout", said.udp_stream_timeout),
    )
    timeouts = (found.tcp_established, found.tcp_close_wait, found.udp, found.udp_stream)
    return found if found.max_per_core or found.tcp_be_liberal or any(timeouts) else None


def _whole(draft: Draft, path: str, duration: Duration | None) -> int | None:
    """Whole seconds, as the kernel counts; None for zero, which leaves the kernel's."""
    if duration is not None and duration.nanoseconds < 0:
        raise UserError(f"{draft.where(path)} {duration}: give at least 0s, which leaves the kernel's own")
    return int(duration.seconds) or None if duration else None


def oom_score_adj(draft: Draft) -> int | None:
    """None leaves the kernel's."""
    score = draft.document.oom_score_adj
    if score is not None and not -1000 <= score <= 1000:
        raise UserError(f"{draft.where('oomScoreAdj')} {score}: give a number from -1000 to 1000")
    return score


def service_metrics(draft: Draft) -> int:
    """How many Services may have metrics of their own."""
    number = draft.document.service_metrics
    if number < 0:
        raise UserError(f"{draft.where('serviceMetrics')} {number}: give a number of Services, 0 for none")
    return number


def warnings(draft: Draft, proxy: ProxyOptions, retired: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences about what can be served, but hardly be meant."""
    found = (_undetected(proxy), _mode_of_old(draft), _without_meaning(draft, retired))
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


def _mode_of_old(draft: Draft) -> str:
    """Who brings kube-proxy's file along may not know that it chooses."""
    mode = draft.document.mode
    if mode in defaults.MODES and not draft.document.dataplane and "mode" not in draft.options:
        return (
            f"{draft.where('mode')} {mode}: it is done so; --dataplane auto would take the best that this node can have"
        )
    return ""


def _without_meaning(draft: Draft, retired: tuple[str, ...]) -> str:
    paths = (*defaults.meaningless(draft.document), *retired)
    said = [path for path in paths if path not in draft.options]
    if said:
        return f"--config {draft.file}: without meaning for ebpflb: {', '.join(said)}"
    asked = [draft.options[path] for path in paths]
    return f"without meaning for this dataplane: {', '.join(asked)}" if asked else ""
