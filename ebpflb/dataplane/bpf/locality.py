"""What tells local clients from others, as rows: the trie of sources, and the settings.

Rules of this file: pure, and exact: what was packed reads back as the same `routes.Locality`, however prefixes lie in
each other.
"""

from __future__ import annotations

import msgspec

from ebpflb.dataplane.bpf.constants import POD_SOCKETS_IPV4, POD_SOCKETS_IPV6, SOURCE_NODE, SOURCE_POD
from ebpflb.dataplane.bpf.layouts import LAYOUT, SETTINGS, SOURCE_KEY, U32
from ebpflb.dataplane.bpf.tables import IPV4_BITS, MAPPED, pack_address, pack_network, unpack_address, unpack_network
from ebpflb.model import Family, family_of
from ebpflb.routes import Locality, address_order, cidr_order

ONLY = U32.pack(0)
"""The key of the only `settings` row."""

# The upper half of a source's flags says what the row itself stands for, the lower half what holds for the address:
# a node address inside a pod CIDR has both bits below, but is no pod CIDR itself.
_OWN = 16

_RETIRED = -2  # where the settings' fields say so


class NodeFacts(msgspec.Struct, frozen=True, gc=False):
    """What the settings say besides locality. `netns` is the cookie of the node's network namespace; times are in
    jiffies, `second` too; the ports are the range of masquerade, both inclusive. `flows_elsewhere`: another dataplane
    carried Services before this one, and its connections go on. `retired`: another one carries Services now. After
    `by_stack` a packet to a neighbour goes by the stack, not XDP (0: never)."""

    netns: int
    flow_idle: int
    refresh: int
    snat_low: int
    snat_high: int
    flows_elsewhere: bool = False
    retired: bool = False
    second: int = 250
    by_stack: int = 0


def pack_sources(locality: Locality) -> dict[bytes, bytes]:
    """The `sources` rows. A longest-prefix match finds one row only, so each row also has the bits of all prefixes
    around it."""
    own: dict[tuple[int, bytes], int] = {}
    for cidr in locality.pod_cidrs:
        own[pack_network(cidr)] = SOURCE_POD
    for address in locality.node_addresses:
        key = (128, pack_address(address))
        own[key] = own.get(key, 0) | SOURCE_NODE
    # An IPv6 prefix that is short enough holds all of IPv4's, which it does not mean: a row of no bits stops it.
    ipv4 = (IPV4_BITS, MAPPED + bytes(4))
    if any(bits < IPV4_BITS and _encloses((bits, network), ipv4[1]) for bits, network in own):
        own.setdefault(ipv4, 0)
    wide = sorted(key for key in own if key[0] < 128)
    rows: dict[bytes, bytes] = {}
    for (bits, network), mine in own.items():
        flags = mine
        for around in wide:
            same = _is_ipv4(bits, network) == _is_ipv4(*around)
            if same and around[0] < bits and _encloses(around, network):
                flags |= own[around]
        rows[SOURCE_KEY.pack(bits, network)] = U32.pack(flags | mine << _OWN)
    return rows


def _is_ipv4(bits: int, network: bytes) -> bool:
    return bits >= IPV4_BITS and network[:12] == MAPPED


def _encloses(around: tuple[int, bytes], address: bytes) -> bool:
    shift = 128 - around[0]
    return int.from_bytes(around[1]) >> shift == int.from_bytes(address) >> shift


def pack_settings(facts: NodeFacts, locality: Locality) -> bytes:
    """The `settings` row. A family has `pod_sockets` where something tells its pods apart."""
    families = {family_of(cidr) for cidr in locality.pod_cidrs}
    if locality.pod_interface:
        families = set(Family)
    sockets = POD_SOCKETS_IPV4 * (Family.IPV4 in families) | POD_SOCKETS_IPV6 * (Family.IPV6 in families)
    interface = locality.pod_interface
    return SETTINGS.pack(
        facts.netns,
        facts.flow_idle,
        facts.refresh,
        LAYOUT,
        sockets,
        facts.snat_low,
        facts.snat_high,
        facts.second,
        interface.removesuffix("*").encode()[:15],
        interface.endswith("*"),
        facts.flows_elsewhere,
        facts.retired,
        facts.by_stack,
    )


def unpack_facts(settings: bytes) -> tuple[NodeFacts, int]:
    """The facts of a `settings` row, and its layout version (0: never written)."""
    netns, idle, refresh, layout, _, low, high, second, _, _, elsewhere, retired, by_stack = SETTINGS.unpack(settings)
    return NodeFacts(netns, idle, refresh, low, high, bool(elsewhere), bool(retired), second, by_stack), layout


def retired(settings: bytes) -> bytes:
    """The `settings` row of a dataplane that has retired."""
    fields = list(SETTINGS.unpack(settings))
    fields[_RETIRED] = True
    return SETTINGS.pack(*fields)


def unpack_locality(keys: bytes, values: bytes, settings: bytes) -> Locality:
    """Locality as the `sources` rows (keys and values back to back) and the `settings` row say it."""
    nodes, cidrs = [], []
    for (bits, address), (flags,) in zip(SOURCE_KEY.iter_unpack(keys), U32.iter_unpack(values), strict=True):
        if flags >> _OWN & SOURCE_NODE:
            nodes.append(unpack_address(address))
        if flags >> _OWN & SOURCE_POD:
            cidrs.append(unpack_network(bits, address))
    *_, interface, prefix, _, _, _ = SETTINGS.unpack(settings)
    return Locality(
        tuple(sorted(nodes, key=address_order)),
        tuple(sorted(cidrs, key=cidr_order)),
        interface.rstrip(b"\0").decode(errors="replace") + ("*" if prefix else ""),
    )
