"""The options that commands share, in groups; names and defaults are those of the published interface.

Rules of this file: spelling and help texts only. What an option means is checked in `config`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ebpflb.config.durations import Duration, parse_duration

F = TypeVar("F", bound=Callable[..., Any])


class _Verbosity(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.2 only
    """A number; kube-proxy's `-v=2` arrives with the equals sign."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(str(value).lstrip("="))
        except ValueError:
            self.fail(f"{value} is not a number", param, ctx)


class _Duration(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A length of time as kube-proxy has it: 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Duration:
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _group(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def switch(name: str, field: str, help: str, default: bool | None = None) -> Callable[[F], F]:
    """A flag in kube-proxy's two spellings: `--name`, and `--name=true` or `--name=false`. With no default, not given
    is None."""
    return click.option(
        name,
        field,
        is_flag=False,
        flag_value=True,
        default=default,
        type=click.BOOL,
        metavar="[=true|false]",
        help=help,
    )


_LOG = (
    click.option("--log-format", metavar="text|json", help="How it logs.  [default: text]"),
    click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.  [default: info]"),
    click.option("-v", "--v", "verbosity", type=_Verbosity(), metavar="N", help="kube-proxy's: 4 and more is debug."),
)
_CONFIG = click.option(
    "--config", metavar="FILE", help="A KubeProxyConfiguration or EbpflbConfiguration; options go before it."
)
_BPFFS = click.option(
    "--bpffs",
    metavar="DIR",
    help="Where maps and links are pinned.  [default: /sys/fs/bpf/ebpflb]",
)
_CGROUP = click.option(
    "--cgroup", metavar="DIR", help="Where the socket programs attach.  [default: the mounted cgroup2 root]"
)
_DATAPLANE = (
    click.option(
        "--dataplane",
        metavar="auto|bpf|ipvs|iptables",
        help="Who carries services; auto takes the first of these that this node can have.  [default: auto]",
    ),
    click.option("--proxy-mode", metavar="MODE", help="kube-proxy's word for --dataplane."),
    click.option(
        "--iptables-variant",
        metavar="auto|nft|legacy",
        help="Which of a node's two kinds of iptables; auto: the kubelet's.  [default: auto]",
    ),
)
_ROUTES = (
    click.option("--manifests", metavar="DIR", help="A directory of YAML or JSON manifests as source, watched."),
    click.option(
        "--kubeconfig", metavar="FILE", help="How to reach the API server.  [default: as a pod's service account]"
    ),
    click.option(
        "--apiserver",
        multiple=True,
        metavar="URL",
        help="Where the API server is, before any Service works; may be repeated.  [default: from kubeconfig]",
    ),
    click.option(
        "--node-name", "--hostname-override", "node_name", metavar="NAME", help="This node.  [default: the host's name]"
    ),
    click.option(
        "--nodeport-addresses",
        multiple=True,
        metavar="CIDR,...|primary",
        help="Which of this node's addresses carry NodePorts.  [default: all]",
    ),
    click.option("--cluster-cidr", multiple=True, metavar="CIDR,...", help="Where pods' addresses come from."),
    click.option(
        "--detect-local-mode",
        metavar="MODE",
        help="What tells this node's pods: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix.  "
        "[default: ClusterCIDR]",
    ),
    click.option("--pod-bridge-interface", metavar="NAME", help="For BridgeInterface: the pods' bridge."),
    click.option("--pod-interface-name-prefix", metavar="TEXT", help="For InterfaceNamePrefix: how names begin."),
    click.option(
        "--algorithm",
        metavar="random|maglev|round-robin|least-connections",
        help="How a backend is chosen where a Service does not say.  [default: random]",
    ),
    switch("--masquerade-all", "masquerade_all", "Masquerade everything that is sent to a cluster IP."),
    switch(
        "--iptables-localhost-nodeports",
        "localhost_nodeports",
        "Whether 127.0.0.0/8 carries NodePorts.  [default: true]",
    ),
)
_DEVICES = (
    click.option(
        "--devices", multiple=True, metavar="PATTERN,...", help="Node devices for outside traffic.  [default: detected]"
    ),
    click.option(
        "--xdp",
        metavar="auto|native|generic|off",
        help="Packets before the stack: in drivers that can (auto), also on veths (native), in none (generic).  "
        "[default: auto]",
    ),
)
_RUN = (
    click.option(
        "--min-sync-period",
        type=float,
        metavar="SECONDS",
        help="Least time between two syncs in a storm of changes.  [default: 0.01]",
    ),
    click.option(
        "--audit-period",
        type=float,
        metavar="SECONDS",
        help="How often the kernel is read back, compared and repaired.  [default: 30]",
    ),
    click.option(
        "--state-dir",
        metavar="DIR",
        help='Where the last good state is kept for a start without the API server; "" for nowhere.  '
        "[default: /var/lib/ebpflb]",
    ),
    click.option(
        "--healthz-bind-address",
        metavar="ADDRESS:PORT",
        help='Where /healthz and /livez are; "" for nowhere.  [default: 0.0.0.0:10256]',
    ),
    click.option(
        "--metrics-bind-address",
        metavar="ADDRESS:PORT",
        help='Where /metrics, /proxyMode and /configz are; "" for nowhere.  [default: 127.0.0.1:10249]',
    ),
    click.option(
        "--service-metrics",
        type=click.IntRange(min=0),
        metavar="N",
        help="How many Services may have metrics of their own.  [default: 0]",
    ),
)

_DATAPLANES = (
    click.option(
        "--pod-path",
        metavar="stack|redirect",
        help="Flows between pods of this node: through the stack, or around it, unseen by network policies.  "
        "[default: stack]",
    ),
    click.option(
        "--maglev-table-size",
        type=click.IntRange(min=0),
        metavar="N",
        help="How many positions a Maglev table has at most, for bpf.  [default: 131071]",
    ),
    click.option(
        "--iptables-masquerade-bit",
        "masquerade_bit",
        type=click.IntRange(0, 31),
        metavar="N",
        help="Which bit of a packet's mark asks for masquerade; for iptables and ipvs.  [default: 14]",
    ),
    click.option("--ipvs-scheduler", metavar="NAME", help="How IPVS chooses a backend.  [default: rr]"),
    click.option(
        "--ipvs-exclude-cidrs",
        multiple=True,
        metavar="CIDR,...",
        help="Virtual servers there are somebody else's: IPVS leaves them alone.",
    ),
    switch("--ipvs-strict-arp", "ipvs_strict_arp", "Answer ARP for no address that only kube-ipvs0 has."),
    *(
        click.option(name, type=_Duration(), metavar="DURATION", help=help)
        for name, help in (
            ("--ipvs-tcp-timeout", "Of idle TCP connections; 0s: as it is.  [default: 0s]"),
            ("--ipvs-tcpfin-timeout", "Of TCP connections after a FIN; 0s: as it is.  [default: 0s]"),
            ("--ipvs-udp-timeout", "Of idle UDP flows; 0s: as it is.  [default: 0s]"),
        )
    ),
)

_NATURAL = click.IntRange(min=0, max=2**31 - 1)
_NODE = (
    click.option(
        "--oom-score-adj",
        type=click.IntRange(-1000, 1000),
        metavar="N",
        help="The daemon's own.  [default: -999; with --manifests: as it is]",
    ),
    click.option(
        "--conntrack-max-per-core",
        type=_NATURAL,
        metavar="N",
        help="Tracked connections for each CPU; 0: as it is.  [default: 32768; with --manifests: 0]",
    ),
    click.option("--conntrack-min", type=_NATURAL, metavar="N", help="And at least so many.  [default: 131072]"),
    *(
        click.option(name, field, type=_Duration(), metavar="DURATION", help=help)
        for name, field, help in (
            (
                "--conntrack-tcp-timeout-established",
                "conntrack_tcp_established",
                "0s: as it is.  [default: 24h; with --manifests: 0s]",
            ),
            (
                "--conntrack-tcp-timeout-close-wait",
                "conntrack_tcp_close_wait",
                "0s: as it is.  [default: 1h; with --manifests: 0s]",
            ),
            ("--conntrack-udp-timeout", "conntrack_udp", "0s: as it is.  [default: 0s]"),
            ("--conntrack-udp-timeout-stream", "conntrack_udp_stream", "0s: as it is.  [default: 0s]"),
        )
    ),
    switch("--conntrack-tcp-be-liberal", "conntrack_tcp_be_liberal", "Take TCP packets out of the window for valid."),
    switch("--bind-address-hard-fail", "bind_address_hard_fail", "End if a port of ours is taken."),
)

looking = _group(_CONFIG, _BPFFS, _CGROUP, *_DATAPLANE, *_LOG)
"""Options of commands that look at the kernel."""

checking = _group(_CONFIG, _BPFFS, _CGROUP, *_DATAPLANE, *_DEVICES, *_LOG)
"""Options of `check`."""

routes = _group(_CONFIG, *_ROUTES, _BPFFS, _CGROUP, *_DATAPLANE, *_LOG)
"""Options of commands that also read the source."""

daemon = _group(_CONFIG, *_ROUTES, _BPFFS, _CGROUP, *_DATAPLANE, *_DATAPLANES, *_DEVICES, *_RUN, *_NODE, *_LOG)
"""Options of `run`."""

status = _group(
    click.option(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="Return as soon as the first complete sync is in the kernel.",
    ),
    _BPFFS,
)
"""Options of `status`."""

service = click.option("--service", metavar="NAMESPACE/NAME", help="This Service only.")
output = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    help="How to print.  [default: table]",
)
