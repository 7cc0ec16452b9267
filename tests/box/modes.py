"""The proxy modes that a box can run in: which dataplane its daemons use, and what only that one can be asked.

Rules of this file: whatever a test would have to know of a dataplane is a question here, so that one text of a scenario
serves all modes. Counters are the kernel's own, not what the product makes of them, where there are such.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

# Says what a command printed on a node. Raises AssertionError if that failed.
Say = Callable[..., str]
# Gives a dataplane's own counters by their names.
Counters = Callable[[], dict[str, int]]

_COUNTED = re.compile(r"\[(?P<packets>\d+):\d+\] -A (?P<chain>\S+) .*-j (?P<target>\S+)")
# Their drops are of packets that are no Service's: what conntrack calls INVALID, and loopback addresses from elsewhere.
_NO_VERDICTS = ("KUBE-FORWARD", "KUBE-FIREWALL")


class Mode(Protocol):
    """A dataplane, and the way in which it is used."""

    @property
    def name(self) -> str:
        """As tests' ids have it."""

    @property
    def dataplane(self) -> str:
        """The dataplane's name."""

    @property
    def variant(self) -> str | None:
        """The variant of iptables, where that matters."""

    @property
    def options(self) -> tuple[str, ...]:
        """Options by which a daemon runs so."""

    @property
    def under(self) -> tuple[str, ...]:
        """Under which program every ebpflb runs; () for by itself."""

    @property
    def xdp(self) -> bool:
        """Whether XDP programs run on the nodes' uplinks: the box's wires must suit them."""

    @property
    def ways(self) -> Sequence[str]:
        """In which ways a pod is served: at its sockets, or on the way of its packets."""

    def drops(self, say: Say, counters: Counters) -> int:
        """How many packets or calls a node has dropped by a verdict."""

    def translations(self, say: Say, counters: Counters) -> int:
        """A number that grows whenever a node translates something."""


def _without(what: str) -> tuple[str, ...]:
    """Under which a kernel seems older than it is; see without.py."""
    return (sys.executable, str(Path(__file__).with_name("without.py")), what)


class Bpf:
    """Socket and packet programs; with `xdp` (`native` or `generic`), also before the stack. "" says nothing of XDP,
    and then none runs: not on a veth. `around`: from pod to pod around the stack. Without `tcx` the packet programs are
    filters, as before Linux 6.6."""

    dataplane = "bpf"
    variant = None
    ways = ("socket", "packet")

    def __init__(self, xdp: str = "", *, around: bool = False, tcx: bool = True) -> None:
        self.name = f"bpf-xdp-{xdp}" if xdp else "bpf-around" if around else "bpf" if tcx else "bpf-clsact"
        self.under = () if tcx else _without("tcx")
        self.options = (
            *("--dataplane", "bpf"),
            *(("--xdp", xdp) if xdp else ()),
            *(("--pod-path", "redirect") if around else ()),
        )
        self.xdp = xdp in ("native", "generic")

    def drops(self, say: Say, counters: Counters) -> int:
        found = counters()
        return found["socket_dropped"] + found["packet_dropped"] + found["packet_out_of_range"]

    def translations(self, say: Say, counters: Counters) -> int:
        return sum(counters().values())


class Netfilter:
    """Rules of one variant of iptables, alone or around IPVS."""

    ways = ("packet",)
    xdp = False

    def __init__(self, name: str, dataplane: str, variant: str, under: tuple[str, ...] = ()) -> None:
        """`under` is what keeps a daemon that may choose from a better one."""
        self.name = name
        self.dataplane = dataplane
        self.variant = variant
        self.options = ("--dataplane", "auto" if under else dataplane, "--iptables-variant", variant)
        self.under = under

    def drops(self, say: Say, counters: Counters) -> int:
        return self._counted(say, "filter", "DROP")

    def translations(self, say: Say, counters: Counters) -> int:
        return self._counted(say, "nat", "DNAT") + self._counted(say, "nat", "KUBE-MARK-MASQ") + self._scheduled(say)

    def _counted(self, say: Say, table: str, target: str) -> int:
        """Packets that met a rule of Kubernetes' chains with this target, in both families."""
        return sum(
            int(found["packets"])
            for command in ("iptables", "ip6tables")
            for found in map(_COUNTED.match, say(f"{command}-{self.variant}-save", "-c", "-t", table).splitlines())
            if found and found["target"] == target and found["chain"].startswith("KUBE-")
            if found["chain"] not in _NO_VERDICTS
        )

    def _scheduled(self, say: Say) -> int:
        """Connections that IPVS has begun: the first number of its statistics."""
        if self.dataplane != "ipvs":
            return 0
        return int(say("cat", "/proc/net/ip_vs_stats").splitlines()[2].split()[0], 16)


def kernel_has_ipvs() -> bool:
    """Whether this kernel has IPVS, or a module of it."""
    modules = Path("/lib/modules", os.uname().release, "kernel/net/netfilter/ipvs")
    return Path("/proc/net/ip_vs").exists() or modules.is_dir()


BPF = Bpf()
CLSACT = Bpf(tcx=False)
AROUND = Bpf(around=True)
XDP_NATIVE, XDP_GENERIC, XDP_OFF = Bpf("native"), Bpf("generic"), Bpf("off")
IPTABLES_NFT = Netfilter("iptables-nft", "iptables", "nft")
IPTABLES_LEGACY = Netfilter("iptables-legacy", "iptables", "legacy")
IPVS = Netfilter("ipvs", "ipvs", "nft")

# Machines on which the choice falls on the next best.
_NEXT = "ipvs" if kernel_has_ipvs() else "iptables"
_HIDE = 'for each in /usr/lib/python3/dist-packages /var/cache; do mount -t tmpfs none $each || exit; done; exec "$@"'
KERNEL_WITHOUT_BPF = Netfilter("kernel-without-bpf", _NEXT, "nft", _without("bpf"))
MACHINE_WITHOUT_BCC = Netfilter(
    "machine-without-bcc", _NEXT, "nft", ("unshare", "--mount", "sh", "-c", _HIDE, "without")
)
