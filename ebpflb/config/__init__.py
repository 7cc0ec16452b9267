"""What the operator asked for: one frozen, checked Config.

Rules of this file: types and names of defaults; it is what everybody else sees of the configuration. How it comes about
is in `options`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ebpflb.model import ProxyOptions

DEFAULT_BPFFS = "/sys/fs/bpf/ebpflb"
DEFAULT_HEALTHZ_PORT = 10256
DEFAULT_METRICS_PORT = 10249
DEFAULT_STATE_DIR = "/var/lib/ebpflb"
DEFAULT_MIN_SYNC_SECONDS = 0.01
LEAST_TABLE, GREATEST_TABLE = 1021, 131071
"""Between these is what the tables of consistent hashing may be confined to."""
STACK, REDIRECT = POD_PATHS = ("stack", "redirect")
"""How flows get from pod to pod: through the stack, or around it."""

AUTO = "auto"
"""The word for a choice that is left to us."""

DATAPLANES = ("bpf", "ipvs", "iptables")
"""Best first."""

IPTABLES_VARIANTS = ("nft", "legacy")

ALGORITHMS = ("random", "maglev", "round-robin", "least-connections")
"""The labels of `routes.Algorithm`."""

SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"
"""Who has this file is a pod with a service account."""


class LogFormat(enum.Enum):
    TEXT = "text"
    JSON = "json"


class LogLevel(enum.Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ApiServer(msgspec.Struct, frozen=True, kw_only=True):
    """How to find and reach the API server. `kubeconfig` is "" for in-cluster (or, with `addresses` and no service
    account, for nobody in particular). `addresses` are URLs that are tried in turn instead of the configured one.
    `qps` and `burst` bound what is written (Events)."""

    kubeconfig: str = ""
    addresses: tuple[str, ...] = ()
    qps: float = 5.0
    burst: int = 10


class Bind(NamedTuple):
    """Where a server listens: a canonical address ("0.0.0.0" and "::" are all of both families) and a port."""

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


class Ipvs(msgspec.Struct, frozen=True, kw_only=True):
    """kube-proxy's settings of IPVS. `exclude_cidrs` are of virtual servers that are somebody else's. Times are whole
    seconds, 0 leaves the kernel's own."""

    scheduler: str = "rr"
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_timeout: int = 0
    tcp_fin_timeout: int = 0
    udp_timeout: int = 0


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator asked for, checked. Exactly one of `manifests` and `api` is given for a command that needs a
    source, neither for one that does not; `dataplane` is "auto" for "the best that this node can have", or a name;
    `cgroup` is "" for "find the mounted cgroup2 root", `state_dir` "" for
    "remember nothing". `healthz` and `metrics` are None for "no such server". `conntrack` and `oom_score_adj` are None
    for "leave the kernel's". `service_metrics` is how many Services may have metrics of their own, 0 for none.
    `file` is the absolute path of `--config`, "" without, and `file_digest` tells what it held; `document` is what
    /configz shows. `masquerade_bit` of a packet's mark says that it is to be masqueraded; `iptables_variant` is
    "nft", "legacy" or "auto" for "as the node has it". `xdp` is "auto", "native", "generic" or "off".
    `maglev_table_size` is how many positions a table of consistent hashing has at most. `pod_path` is
    "stack" or "redirect". Periods are seconds. `warnings` are sentences to log once."""

    manifests: str
    node_name: str
    dataplane: str
    cgroup: str
    bpffs: str
    devices: tuple[str, ...]
    xdp: str
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
    masquerade_bit: int = 14
    iptables_variant: str = AUTO
    maglev_table_size: int = GREATEST_TABLE
    pod_path: str = STACK
    ipvs: Ipvs = Ipvs()
    file: str = ""
    file_digest: str = ""
    document: Mapping[str, object] = {}
    warnings: tuple[str, ...] = ()
