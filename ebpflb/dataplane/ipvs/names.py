"""Names of everything that the IPVS dataplane has in the kernel: kube-proxy's, and a few of our own.

Rules of this file: pure; every name, type and mark stands here, once. Sets that kube-proxy has too have its names and
types, so that operators and their tools find them; what it has no set for is EBPFLB-….
"""

from __future__ import annotations

import enum
from typing import NamedTuple

DEVICE = "kube-ipvs0"

LOCALITY = "EBPFLB-LOCALITY"
"""The chain (table filter) that nothing jumps to and that holds the locality. With it KUBE-* chains are ours, without
it kube-proxy's."""

OURS = "EBPFLB-IPVS"
"""The empty chain beside it by which they are this dataplane's, and not those of iptables."""

_NAME_LIMIT = 31


class SetType(enum.StrEnum):
    """Types of ipsets, by the kernel's names."""

    IP_PORT = "hash:ip,port"
    IP_PORT_IP = "hash:ip,port,ip"
    IP_PORT_NET = "hash:ip,port,net"
    IP = "hash:ip"
    PORT = "bitmap:port"


class Set(enum.Enum):
    """The ipsets: name, type, what is in it. There is one of each in either family."""

    LOOP_BACK = "KUBE-LOOP-BACK", SetType.IP_PORT_IP, "backends, which are masqueraded when they reach themselves"
    CLUSTER_IP = "KUBE-CLUSTER-IP", SetType.IP_PORT, "cluster IPs"
    EXTERNAL_IP = "KUBE-EXTERNAL-IP", SetType.IP_PORT, "external IPs"
    EXTERNAL_IP_LOCAL = "KUBE-EXTERNAL-IP-LOCAL", SetType.IP_PORT, "external IPs of policy Local"
    LOAD_BALANCER = "KUBE-LOAD-BALANCER", SetType.IP_PORT, "load balancer IPs"
    LOAD_BALANCER_LOCAL = "KUBE-LOAD-BALANCER-LOCAL", SetType.IP_PORT, "load balancer IPs of policy Local"
    LOAD_BALANCER_FW = "KUBE-LOAD-BALANCER-FW", SetType.IP_PORT, "frontends with source ranges"
    SOURCE_CIDR = "KUBE-LOAD-BALANCER-SOURCE-CIDR", SetType.IP_PORT_NET, "who may use these"
    SOURCE_IP = "KUBE-LOAD-BALANCER-SOURCE-IP", SetType.IP_PORT_IP, "those that may reach themselves"
    NODE_PORT_TCP = "KUBE-NODE-PORT-TCP", SetType.PORT, "node ports"
    NODE_PORT_LOCAL_TCP = "KUBE-NODE-PORT-LOCAL-TCP", SetType.PORT, "node ports of policy Local"
    NODE_PORT_UDP = "KUBE-NODE-PORT-UDP", SetType.PORT, "node ports"
    NODE_PORT_LOCAL_UDP = "KUBE-NODE-PORT-LOCAL-UDP", SetType.PORT, "node ports of policy Local"
    NODE_PORT_SCTP = "KUBE-NODE-PORT-SCTP-HASH", SetType.IP_PORT, "node ports"
    NODE_PORT_LOCAL_SCTP = "KUBE-NODE-PORT-LOCAL-SCTP-HASH", SetType.IP_PORT, "node ports of policy Local"
    HEALTH = "KUBE-HEALTH-CHECK-NODE-PORT", SetType.PORT, "health check node ports"
    IPVS_IPS = "KUBE-IPVS-IPS", SetType.IP, "addresses of kube-ipvs0"
    FRONTENDS = "EBPFLB-FRONTENDS", SetType.IP_PORT, "every frontend, with its Service port"
    NODE_IPS = "EBPFLB-NODE-IPS", SetType.IP, "addresses of node ports"
    MASQUERADE_ALL = "EBPFLB-MASQUERADE-ALL", SetType.IP_PORT, "cluster IPs that everybody is masqueraded to"
    MASQUERADE_NONE = "EBPFLB-MASQUERADE-NONE", SetType.IP_PORT, "cluster IPs that nobody is masqueraded to"
    REJECT = "EBPFLB-REJECT", SetType.IP_PORT, "frontends that no endpoint serves"
    DROP = "EBPFLB-DROP", SetType.IP_PORT, "frontends that no endpoint of this node serves"
    DROP_EXTERNAL = "EBPFLB-DROP-EXTERNAL", SetType.IP_PORT, "frontends that serve only this node and its pods"
    MARKS = "EBPFLB-MARKS", SetType.IP_PORT, "frontends that serve others by a virtual server of their own"

    __hash__ = object.__hash__  # Enum hashes its name in Python code; entries are hashed by the hundred thousand.

    @property
    def base(self) -> str:
        return self.value[0]

    @property
    def type(self) -> SetType:
        return self.value[1]

    @property
    def with_comment(self) -> bool:
        return self is Set.FRONTENDS

    @property
    def with_mark(self) -> bool:
        return self is Set.MARKS

    def named(self, version: int) -> str:
        """As the kernel has it, in the family of IP version 4 or 6; as kube-proxy, cut to what a name may have."""
        if version == 4:
            return self.base
        head, _, rest = self.base.partition("-")
        return f"{head}-6-{rest}"[:_NAME_LIMIT]


SET_NAMES = {each.named(version): (each, version) for each in Set for version in (4, 6)}


class Mark(NamedTuple):
    """The bit that asks for masquerade, and the firewall marks of virtual servers, which must not have it."""

    bit: int = 14

    @property
    def masquerade(self) -> str:
        """As iptables-save prints it."""
        return f"{1 << self.bit:#x}"

    def of(self, number: int) -> int:
        """The firewall mark of virtual server `number` (0 to 2^20 - 1)."""
        return self._spread(_MARK_BASE + number)

    def number(self, mark: int) -> int | None:
        """The inverse of `of`; None for a mark that is none of ours."""
        if mark >> self.bit & 1:
            return None
        low = mark & (1 << self.bit) - 1
        number = (mark >> self.bit + 1 << self.bit | low) - _MARK_BASE
        return number if 0 <= number <= MARK_LIMIT else None

    @property
    def range(self) -> str:
        """All our firewall marks as `mark/mask`, as iptables-save prints it."""
        return f"{self._spread(_MARK_BASE):#x}/{self._spread(0x7FF00000) | 1 << self.bit:#x}"

    def _spread(self, value: int) -> int:
        """31 bits, put around the masquerade bit."""
        low = value & (1 << self.bit) - 1
        return (value >> self.bit) << self.bit + 1 | low


_MARK_BASE = 0x65B00000
MARK_LIMIT = 0xFFFFF
