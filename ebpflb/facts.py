"""What of this node and of the options shapes routes: local clients, NodePort addresses, the node's own address.

Rules of this file: pure; imports `model` and `routes`. Facts are worked out once for an update and compared with those
of the update before, so that a change recomputes only the Services that it concerns.
"""

from __future__ import annotations

import msgspec

from ebpflb.model import Address, DetectLocal, EndpointSlice, Family, Node, ProxyOptions, Service, family_of
from ebpflb.routes import Locality, address_order, cidr_order, in_cidr


class Facts(msgspec.Struct, frozen=True, gc=False):
    """`nodeport_addresses` are sorted; `detectors` are the families in which pods are told from others; `node_ips` has
    this node's main address of either family (loopback where it has none, as kube-proxy). `algorithms` are those that
    can be had, () for all. `health_addresses` are those that answer health checks, by family: () is all, None is none.
    `direct_return`: whether that can be had.
    """

    node: str
    zone: str
    nodeport_addresses: tuple[Address, ...]
    node_ips: tuple[Address, Address]
    detectors: frozenset[Family]
    masquerade_all: bool
    default_algorithm: str
    algorithms: tuple[str, ...]
    locality: Locality
    health_addresses: tuple[tuple[Address, ...] | None, tuple[Address, ...] | None] = ((), ())
    direct_return: bool = True

    def concern(self, service: Service, slices: tuple[EndpointSlice, ...], before: Facts) -> bool:
        """Whether the routes of `service` may differ under these facts from those under the facts `before`."""
        if (self.node, self.detectors, self.masquerade_all, self.default_algorithm, self.algorithms) != (
            before.node,
            before.detectors,
            before.masquerade_all,
            before.default_algorithm,
            before.algorithms,
        ):
            return True
        if self.direct_return != before.direct_return and service.annotations:
            return True
        if self.nodeport_addresses != before.nodeport_addresses and any(port.node_port for port in service.ports):
            return True
        if self.node_ips != before.node_ips and service.source_ranges:
            return True
        if self.health_addresses != before.health_addresses and service.health_check_node_port:
            return True
        return self.zone != before.zone and any(endpoint.zone_hints for each in slices for endpoint in each.endpoints)

    def node_ip(self, family: Family) -> Address:
        """This node's main address in `family`."""
        return self.node_ips[family == Family.IPV6]


def facts_of(node: Node, options: ProxyOptions) -> Facts:
    """The facts of this node under these options."""
    locality = locality_of(node, options)
    detectors = frozenset(Family) if locality.pod_interface else frozenset(map(family_of, locality.pod_cidrs))
    return Facts(
        node=node.name,
        zone=node.zone,
        nodeport_addresses=nodeport_addresses(node, options),
        node_ips=(_primary(node, Family.IPV4, "127.0.0.1"), _primary(node, Family.IPV6, "::1")),
        detectors=detectors,
        masquerade_all=options.masquerade_all,
        default_algorithm=options.default_algorithm,
        algorithms=options.algorithms,
        locality=locality,
        health_addresses=(_health_addresses(node, options, Family.IPV4), _health_addresses(node, options, Family.IPV6)),
        direct_return=options.direct_return,
    )


def locality_of(node: Node, options: ProxyOptions) -> Locality:
    """What tells this node's own traffic and its pods' from the rest. A mode whose input is missing (no cluster CIDR,
    no pod CIDR yet, no name) detects nothing, as in kube-proxy; with CIDRs that holds for each family apart."""
    cidrs: tuple[str, ...] = ()
    interface = ""
    match options.detect_local:
        case DetectLocal.CLUSTER_CIDR:
            cidrs = options.cluster_cidrs
        case DetectLocal.NODE_CIDR:
            cidrs = node.pod_cidrs
        case DetectLocal.BRIDGE_INTERFACE:
            interface = options.bridge_interface
        case DetectLocal.INTERFACE_NAME_PREFIX:
            interface = options.interface_name_prefix and options.interface_name_prefix + "*"
    return Locality(
        tuple(sorted(set(node.addresses), key=address_order)), tuple(sorted(set(cidrs), key=cidr_order)), interface
    )


def nodeport_addresses(node: Node, options: ProxyOptions) -> tuple[Address, ...]:
    """The local addresses that carry NodePorts, sorted: all, the primary ones, or those in the given CIDRs (CIDRs of
    one family leave the other one open). Never ::1, IPv6 link-local ones, nor IPv4 loopback ones but 127.0.0.1, and
    that one only while `localhost_nodeports` is on."""
    by_family: dict[Family, list[str]] = {family: [] for family in Family}
    for cidr in options.nodeport_addresses:
        by_family[family_of(cidr)].append(cidr)
    chosen = set()
    for address in node.addresses:
        if ":" in address:
            if address == "::1" or in_cidr(address, "fe80::/10"):
                continue
        elif in_cidr(address, "127.0.0.0/8") and not (address == "127.0.0.1" and options.localhost_nodeports):
            continue
        cidrs = by_family[family_of(address)]
        if options.nodeport_primary:
            if address in node.primary:
                chosen.add(address)
        elif not cidrs or any(in_cidr(address, cidr) for cidr in cidrs):
            chosen.add(address)
    return tuple(sorted(chosen, key=address_order))


def _primary(node: Node, family: Family, otherwise: Address) -> Address:
    return next((address for address in node.primary if family_of(address) == family), otherwise)


def _health_addresses(node: Node, options: ProxyOptions, family: Family) -> tuple[Address, ...] | None:
    """Where health checks are answered: everywhere, unless node ports are confined in this family; then where they
    are, and nowhere if that is nowhere."""
    cidrs = [cidr for cidr in options.nodeport_addresses if family_of(cidr) is family]
    confined = options.nodeport_primary or (cidrs and not any(cidr.endswith("/0") for cidr in cidrs))
    if not confined:
        return ()
    return tuple(address for address in nodeport_addresses(node, options) if family_of(address) is family) or None
