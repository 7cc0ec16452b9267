"""Names of the iptables dataplane's chains: kube-proxy's, with kube-proxy's hashes, and a few of our own.

Rules of this file: pure; every name of a chain stands here, once.
"""

from __future__ import annotations

from hashlib import sha256

# kube-proxy's (1.36, pkg/proxy/iptables/proxier.go). KUBE-FIREWALL is kubelet's, too, and outlives both.
SERVICES = "KUBE-SERVICES"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
POSTROUTING = "KUBE-POSTROUTING"
MARK_MASQ = "KUBE-MARK-MASQ"
FORWARD = "KUBE-FORWARD"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"
CANARY = "KUBE-PROXY-CANARY"
KUBELET_FIREWALL = "KUBE-FIREWALL"

# Ours. LOCALITY holds what tells pods from others, nothing jumps to it, and that it is there says whose all others are.
# NOT_POD marks for masquerading what no detector calls a pod, where one rule cannot. CIP_* refuse undefined ports.
LOCALITY = "EBPFLB-LOCALITY"
NOT_POD = "EBPFLB-NOT-POD"
CIP_REJECT = "KUBE-CIP-REJECT"

# Empty; it says that this dataplane has turned the sysctl route_localnet on, and not somebody else.
LOCALNET = "EBPFLB-LOCALNET"

# The IPVS dataplane has LOCALITY too, and then this one beside it.
IPVS_MARK = "EBPFLB-IPVS"

SVC = "KUBE-SVC-"
SVL = "KUBE-SVL-"
EXT = "KUBE-EXT-"
FW = "KUBE-FW-"
SEP = "KUBE-SEP-"
CIP = "KUBE-CIP-"
PER_PORT = (SVC, SVL, EXT, FW, SEP)
"""What the names of service ports' chains begin with."""

_FIXED = {
    "filter": frozenset(
        (SERVICES, EXTERNAL_SERVICES, NODE_PORTS, FORWARD, PROXY_FIREWALL, CANARY, LOCALITY, LOCALNET, CIP_REJECT)
    ),
    "nat": frozenset((SERVICES, NODE_PORTS, POSTROUTING, MARK_MASQ, CANARY, NOT_POD)),
    "mangle": frozenset((CANARY,)),
}
_BASE32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_PAIRS = tuple(high + low for high in _BASE32 for low in _BASE32)
_PREFIXES = {"filter": (EXT, FW, CIP), "nat": (SVC, SVL, EXT, FW, SEP), "mangle": ()}


def is_ours(table: str, chain: str) -> bool:
    """Whether a chain has a name that this dataplane gives (kube-proxy gives most of them as well: see LOCALITY).
    KUBE-FIREWALL has not: it is kubelet's."""
    return chain in _FIXED.get(table, ()) or chain.startswith(_PREFIXES.get(table, ()))


def hashed(text: str) -> str:
    """kube-proxy's 16 characters: the first 10 bytes of a SHA-256 in base 32. By hand, in pairs of characters: `base64`
    would take half of the time of a cold start."""
    value = int.from_bytes(sha256(text.encode()).digest()[:10])
    pairs = _PAIRS
    return (
        f"{pairs[value >> 70]}{pairs[value >> 60 & 1023]}{pairs[value >> 50 & 1023]}{pairs[value >> 40 & 1023]}"
        f"{pairs[value >> 30 & 1023]}{pairs[value >> 20 & 1023]}{pairs[value >> 10 & 1023]}{pairs[value & 1023]}"
    )


def port_hash(service_port: str, protocol: str) -> str:
    """What follows KUBE-SVC-, -SVL-, -EXT- and -FW-. `service_port` is `ns/name:port`, `protocol` in small letters."""
    return hashed(service_port + protocol)


def endpoint_chain(service_port: str, protocol: str, endpoint: str) -> str:
    """KUBE-SEP-…; `endpoint` is `10.0.0.1:80` or `[fd00::1]:80`."""
    return SEP + hashed(service_port + protocol + endpoint)
