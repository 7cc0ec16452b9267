"""The options of `run`, and of the commands that read the same things, as one frozen, validated Config.

Rules of this file: pure but for the host's name, which the caller passes in. Every option of the published interface
is accepted here; one whose work is not in this version passes with its neutral value only and is refused in one line
otherwise, so that no option is ever ignored in silence. A UserError says what is wrong and what to write instead.
"""

from __future__ import annotations

import enum
import ipaddress
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from ebpflb.errors import UserError
from ebpflb.model import DetectLocal, ProxyOptions

DEFAULT_BPFFS = "/sys/fs/bpf/ebpflb"
DEFAULT_HEALTHZ = "0.0.0.0:10256"
DEFAULT_METRICS = "127.0.0.1:10249"
DEFAULT_STATE_DIR = "/var/lib/ebpflb"
DEFAULT_AUDIT_SECONDS = 30.0
DEFAULT_MIN_SYNC_SECONDS = 0.01

SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"
"""Who has this file is a pod with a service account."""

# kube-proxy's -v counts up; from 4 on klog calls it debug.
_DEBUG_VERBOSITY = 4

E = TypeVar("E", bound=enum.Enum)


class LogFormat(enum.Enum):
    TEXT = "text"
    JSON = "json"


class LogLevel(enum.Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options as they were typed. `None` or () is "not given"."""

    manifests: str | None = None
    node_name: str | None = None
    dataplane: str | None = None
    proxy_mode: str | None = None
    cgroup: str | None = None
    bpffs: str = DEFAULT_BPFFS
    devices: tuple[str, ...] = ()
    xdp: str = "auto"
    nodeport_addresses: tuple[str, ...] = ()
    cluster_cidr: tuple[str, ...] = ()
    detect_local_mode: str | None = None
    pod_bridge_interface: str = ""
    pod_interface_name_prefix: str = ""
    masquerade_all: bool = False
    localhost_nodeports: bool = True
    healthz_bind_address: str = DEFAULT_HEALTHZ
    metrics_bind_address: str = DEFAULT_METRICS
    config: str | None = None
    kubeconfig: str | None = None
    apiserver: tuple[str, ...] = ()
    state_dir: str | None = None
    init_only: bool = False
    write_config_to: str | None = None
    log_format: str = "text"
    log_level: str | None = None
    verbosity: int | None = None
    min_sync_period: float = DEFAULT_MIN_SYNC_SECONDS
    audit_period: float = DEFAULT_AUDIT_SECONDS


class ApiServer(msgspec.Struct, frozen=True, kw_only=True):
    """How to find and reach the API server. `kubeconfig` is "" for in-cluster (or, with `addresses` and no service
    account, for nobody in particular). `addresses` are URLs that are tried in turn instead of the configured one.
    `qps` and `burst` bound what is written (Events)."""

    kubeconfig: str = ""
    addresses: tuple[str, ...] = ()
    qps: float = 5.0
    burst: int = 10


class Bind(NamedTuple):
    """Where a server listens: a canonical address ("0.0.0.0" and "::" are all of IPv4, all of both) and a port."""

    address: str
    port: int


class Conntrack(msgspec.Struct, frozen=True, kw_only=True):
    """kube-proxy's conntrack settings; None or 0 leaves the kernel's own. Times are seconds."""

    max_per_core: int = 32768
    least: int = 131072
    tcp_established: int | None = 86400
    tcp_close_wait: int | None = 3600
    tcp_be_liberal: bool = False
    udp: int | None = None
    udp_stream: int | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator asked for, checked. Exactly one of `manifests` and `api` is given for a command that needs a
    source, neither for one that does not; `cgroup` is "" for "find the mounted cgroup2 root", `state_dir` "" for
    "remember nothing". `healthz` and `metrics` are None for "no such server". `conntrack` and `oom_score_adj` are None
    for "leave the kernel's". `service_metrics` is how many Services may have metrics of their own, 0 for none.
    `file` is the absolute path of `--config`, "" without; `document` is what /configz shows. Periods are seconds.
    `warnings` are sentences to log once."""

    manifests: str
    node_name: str
    dataplane: str
    cgroup: str
    bpffs: str
    devices: tuple[str, ...]
    proxy: ProxyOptions
    log_format: LogFormat
    log_level: LogLevel
    min_sync_period: float
    audit_period: float
    api: ApiServer | None = None
    state_dir: str = ""
    healthz: Bind | None = None
    metrics: Bind | None = None
    bind_hard_fail: bool = False
    health_timeout: float = 60.0
    conntrack: Conntrack | None = None
    oom_score_adj: int | None = None
    service_metrics: int = 0
    file: str = ""
    document: Mapping[str, object] = {}
    warnings: tuple[str, ...] = ()


def configure(options: Options, *, hostname: str, need_source: bool = True, in_cluster: bool = False) -> Config:
    """The Config that `options` ask for. `in_cluster` is whether this process is a pod with a service account, which
    is a source too. Raises UserError in one line for the first thing that is wrong."""
    _refuse_what_is_not_here(options)
    proxy = _proxy_options(options)
    manifests, api = _source(options, need_source, in_cluster)
    return Config(
        manifests=manifests,
        api=api,
        state_dir=_state_dir(options.state_dir, api),
        healthz=_bind("--healthz-bind-address", options.healthz_bind_address, 10256),
        metrics=_bind("--metrics-bind-address", options.metrics_bind_address, 10249),
        node_name=_node_name(options.node_name, hostname),
        dataplane=_dataplane(options.dataplane, options.proxy_mode),
        cgroup=_directory("--cgroup", options.cgroup, "the cgroup2 directory whose processes are to be served"),
        bpffs=_bpffs(options.bpffs),
        devices=_devices(options.devices),
        proxy=proxy,
        log_format=_choice("--log-format", options.log_format, LogFormat),
        log_level=_log_level(options.log_level, options.verbosity),
        min_sync_period=_seconds("--min-sync-period", options.min_sync_period, lowest=0.0),
        audit_period=_seconds("--audit-period", options.audit_period, lowest=1.0),
        warnings=_warnings(proxy),
    )


def _refuse_what_is_not_here(options: Options) -> None:
    for given, name, instead in (
        (options.config, "--config", "give the settings as options"),
        (options.init_only, "--init-only", "run the daemon as root"),
        (options.write_config_to, "--write-config-to", "leave it out"),
    ):
        if given:
            raise UserError(f"{name} is not in this version yet; {instead}")
    if options.xdp not in ("auto", "native", "generic", "off"):
        raise UserError(f"--xdp {options.xdp}: choose auto or off")
    if options.xdp in ("native", "generic"):
        raise UserError(f"--xdp {options.xdp} is not in this version yet; choose auto or off (both leave XDP alone)")


def _source(options: Options, need_source: bool, in_cluster: bool) -> tuple[str, ApiServer | None]:
    """The manifests' directory or the API server: the one where events come from."""
    if not need_source:
        return "", None
    if options.manifests:
        other = "--kubeconfig" if options.kubeconfig else "--apiserver" if options.apiserver else ""
        if other:
            raise UserError(f"--manifests and {other} are two sources of Services: give one of them")
        return _directory("--manifests", options.manifests, "a directory of YAML or JSON manifests"), None
    if not (options.kubeconfig or options.apiserver or in_cluster):
        raise UserError(
            "no source of Services: give --kubeconfig FILE or --manifests DIR, or run in a pod with a service account"
        )
    return "", ApiServer(
        kubeconfig=_file("--kubeconfig", options.kubeconfig),
        addresses=tuple(dict.fromkeys(_url("--apiserver", text) for text in options.apiserver)),
    )


def _file(option: str, path: str | None) -> str:
    """An existing, readable file as an absolute path, "" if not given."""
    if not path:
        return ""
    if not os.path.exists(path):
        raise UserError(f"{option} {path}: there is no such file")
    if os.path.isdir(path):
        raise UserError(f"{option} {path} is a directory; give the file in it")
    if not os.access(path, os.R_OK):
        raise UserError(f"{option} {path} cannot be read; run as root or change its mode")
    return os.path.abspath(path)


def _url(option: str, text: str) -> str:
    example = "write such as https://10.0.0.1:6443"
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise UserError(f"{option} {text} is not a URL; {example}") from None
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        raise UserError(f"{option} {text} is not a URL of a server; {example}")
    if url.username is not None or url.query or url.fragment:
        raise UserError(f"{option} {text}: a server is a host, a port and perhaps a path; {example}")
    return text.rstrip("/")


def _state_dir(path: str | None, api: ApiServer | None) -> str:
    if path is None:
        return DEFAULT_STATE_DIR if api else ""
    return os.path.abspath(path) if path else ""


def _bind(option: str, text: str, default_port: int) -> Bind | None:
    """ADDRESS:PORT, [IPV6]:PORT, or an address alone for the usual port; "" for no server."""
    if not text:
        return None
    host, port = text, str(default_port)
    if not _is_address(text):
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
    if not _is_address(host):
        example = f"write such as 0.0.0.0:{default_port} or [::]:{default_port}"
        raise UserError(f'{option} {text} is not an address and a port; {example}, or "" for no such server')
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f'{option} {text}: a port is a number from 1 to 65535; give "" for no such server')
    return Bind(str(ipaddress.ip_address(host)), int(port))


def _is_address(text: str) -> bool:
    try:
        return not getattr(ipaddress.ip_address(text), "scope_id", None)
    except ValueError:
        return False


def _directory(option: str, path: str | None, meaning: str) -> str:
    """An existing directory as an absolute path, "" if not given."""
    if not path:
        return ""
    if not os.path.exists(path):
        raise UserError(f"{option} {path}: there is no such directory; give {meaning}")
    if not os.path.isdir(path):
        raise UserError(f"{option} {path} is not a directory; give {meaning}")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{option} {path} cannot be read; run as root or change its mode")
    return os.path.abspath(path)


def _bpffs(path: str) -> str:
    # Not made absolute: nobody stands in a BPF file system, so a relative path is a slip.
    if not os.path.isabs(path):
        what = f"{path} is a relative path" if path else "is empty"
        raise UserError(f"--bpffs {what}; give a directory in a BPF file system, such as {DEFAULT_BPFFS}")
    return os.path.normpath(path)


def _node_name(given: str | None, hostname: str) -> str:
    # kube-proxy trims and lowers both, so that a node is found under the name that the kubelet registered.
    name = (hostname if given is None else given).strip().lower()
    if not name:
        raise UserError("this node has no name: give --node-name NAME, as `kubectl get nodes` shows it")
    return name


def _dataplane(dataplane: str | None, proxy_mode: str | None) -> str:
    if proxy_mode:
        if proxy_mode == "nftables":
            raise UserError("--proxy-mode nftables: ebpflb has no nftables dataplane; leave the option out")
        if proxy_mode not in ("iptables", "ipvs"):
            raise UserError(f"--proxy-mode {proxy_mode} is unknown; use --dataplane auto or --dataplane bpf")
        if dataplane and dataplane != proxy_mode:
            raise UserError(f"--proxy-mode {proxy_mode} and --dataplane {dataplane} disagree; give --dataplane alone")
        dataplane = proxy_mode
    chosen = dataplane or "auto"
    if chosen in ("ipvs", "iptables"):
        option = "--proxy-mode" if proxy_mode else "--dataplane"
        raise UserError(f"{option} {chosen} is not in this version yet; choose --dataplane auto or bpf")
    if chosen not in ("auto", "bpf"):
        raise UserError(f"--dataplane {chosen} is unknown; choose auto or bpf")
    return chosen


def _devices(patterns: Iterable[str]) -> tuple[str, ...]:
    found = tuple(sorted(set(_split(patterns))))
    for pattern in found:
        if "/" in pattern or any(letter.isspace() for letter in pattern):
            raise UserError(f"--devices {pattern}: not a device name; give names or patterns such as eth0,ens*")
    return found


def _proxy_options(options: Options) -> ProxyOptions:
    addresses = _split(options.nodeport_addresses)
    primary = "primary" in addresses
    if primary and len(addresses) > 1:
        raise UserError("--nodeport-addresses: `primary` stands alone; give either it or CIDRs")
    return ProxyOptions(
        masquerade_all=options.masquerade_all,
        detect_local=_detect_local(options.detect_local_mode),
        cluster_cidrs=_cidrs("--cluster-cidr", _split(options.cluster_cidr)),
        bridge_interface=_interface("--pod-bridge-interface", options.pod_bridge_interface),
        interface_name_prefix=_interface("--pod-interface-name-prefix", options.pod_interface_name_prefix),
        nodeport_addresses=() if primary else _cidrs("--nodeport-addresses", addresses),
        nodeport_primary=primary,
        localhost_nodeports=options.localhost_nodeports,
    )


def _detect_local(mode: str | None) -> DetectLocal:
    if not mode:
        return DetectLocal.CLUSTER_CIDR
    for known in DetectLocal:
        if known.value == mode:
            return known
    choices = ", ".join(known.value for known in DetectLocal)
    raise UserError(f"--detect-local-mode {mode} is unknown; choose one of {choices}")


def _interface(option: str, name: str) -> str:
    if len(name) > 15 or "/" in name or any(letter.isspace() for letter in name):
        raise UserError(f"{option} {name}: not an interface name (at most 15 characters, no spaces or slashes)")
    return name


def _cidrs(option: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Canonical CIDRs, host bits masked, each once, in the given order."""
    found: dict[str, None] = {}
    for text in texts:
        if "/" not in text:
            raise UserError(f"{option} {text}: a CIDR is address/bits, such as {_example(text)}")
        try:
            found[str(ipaddress.ip_network(text, strict=False))] = None
        except ValueError:
            raise UserError(f"{option} {text} is not a CIDR; write such as 10.244.0.0/16 or fd00::/64") from None
    return tuple(found)


def _example(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return "10.244.0.0/16"
    return f"{address}/{address.max_prefixlen}"


def _split(values: Iterable[str]) -> tuple[str, ...]:
    """An option that may be repeated and may hold commas, as one flat tuple."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def _choice(option: str, value: str, kind: type[E]) -> E:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member.value) for member in kind)
        raise UserError(f"{option} {value} is unknown; choose one of {choices}") from None


def _log_level(level: str | None, verbosity: int | None) -> LogLevel:
    if level is not None:
        return _choice("--log-level", level, LogLevel)
    return LogLevel.DEBUG if verbosity is not None and verbosity >= _DEBUG_VERBOSITY else LogLevel.INFO


def _seconds(option: str, value: float, lowest: float) -> float:
    if not lowest <= value < float("inf"):
        raise UserError(f"{option} {value:g}: give seconds, at least {lowest:g}")
    return value


def _warnings(proxy: ProxyOptions) -> tuple[str, ...]:
    """What kube-proxy also only warns of: a detect-local mode without its value detects nothing."""
    missing = {
        DetectLocal.CLUSTER_CIDR: ("" if proxy.cluster_cidrs else "--cluster-cidr"),
        DetectLocal.NODE_CIDR: "",
        DetectLocal.BRIDGE_INTERFACE: ("" if proxy.bridge_interface else "--pod-bridge-interface"),
        DetectLocal.INTERFACE_NAME_PREFIX: ("" if proxy.interface_name_prefix else "--pod-interface-name-prefix"),
    }[proxy.detect_local]
    if not missing:
        return ()
    return (
        f"detect-local mode {proxy.detect_local.value} needs {missing}, which is not given: "
        "pods are not told from other clients",
    )
