"""What one Service asks of this node: its frontends, each with a route for either scope, as if it were alone.

Rules of this file: pure; imports `model`, `routes`, `topology`, `facts`, `annotations`. Everything here is a function
of one Service, its slices and the node's facts, so that `policy` can remember the result; it knows of no other Service.

Verdicts: without any usable endpoint anywhere REJECT; with some, but none for the scope's traffic policy, DROP.
A Service without a cluster IP in a family has nothing in that family.

Masquerade, in canonical form (a value is never wider than what can come to pass in its scope):

    ClusterIP                     INTERNAL NOT_POD   EXTERNAL ALWAYS   with a detector for the family
                                  INTERNAL NEVER     EXTERNAL NEVER    without
                                  INTERNAL ALWAYS    EXTERNAL ALWAYS   with masqueradeAll
    external, policy Cluster      INTERNAL ALWAYS    EXTERNAL ALWAYS
    external, policy Local        INTERNAL NOT_POD   EXTERNAL NEVER    with a detector for the family
                                  INTERNAL ALWAYS    EXTERNAL NEVER    without: INTERNAL is the node alone

As in kube-proxy, masqueradeAll is about cluster IPs only; and policy Local sends INTERNAL clients to the cluster's
endpoints, as if they had used the cluster IP.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ebpflb.annotations import Settings, settings_of
from ebpflb.facts import Facts
from ebpflb.model import Address, EndpointSlice, Family, Problem, Protocol, Service, ServiceName, TrafficPolicy
from ebpflb.routes import (
    Backend,
    Frontend,
    HealthCheck,
    Kind,
    Masquerade,
    Route,
    ServicePortName,
    Serving,
    ServingKey,
    Verdict,
    cidr_order,
    in_cidr,
)
from ebpflb.topology import Selection, health_counts, select, serving_endpoints

RoutePair: TypeAlias = tuple[Route, Route]  # indexed by Scope: INTERNAL, EXTERNAL

_FAMILIES = tuple(Family)
_FORWARD, _REJECT, _DROP = Verdict.FORWARD, Verdict.REJECT, Verdict.DROP
_NEVER, _NOT_POD, _ALWAYS = Masquerade.NEVER, Masquerade.NOT_POD, Masquerade.ALWAYS

# Who wins within one Service. As in kube-proxy, node ports are looked at last; and a load balancer address that is also
# an external IP keeps its source ranges, as in nftables mode.
_PRECEDENCE = {Kind.CLUSTER_IP: 0, Kind.LOAD_BALANCER: 1, Kind.EXTERNAL_IP: 2, Kind.NODE_PORT: 3}


class Claims(msgspec.Struct, frozen=True):
    """What one Service asks for, and what it was worked out from. `problems` are those that it has all by itself,
    `health` the health checks to be answered for it, `serving` who serves its UDP ports."""

    service: Service
    slices: tuple[EndpointSlice, ...]
    frontends: dict[Frontend, RoutePair]
    problems: tuple[Problem, ...] = ()
    health: tuple[HealthCheck, ...] = ()
    serving: tuple[tuple[ServingKey, Serving], ...] = ()

    @property
    def rank(self) -> tuple[bool, str, ServiceName]:
        """Sorts Services that claim one frontend: the older first, then by name; of unknown age is youngest."""
        return (not self.service.created, self.service.created, self.service.name)


def claims_of(service: Service, slices: tuple[EndpointSlice, ...], facts: Facts) -> Claims:
    """The frontends of one Service with their routes."""
    problems: list[Problem] = []
    settings = settings_of(service, facts, problems)
    frontends: dict[Frontend, RoutePair] = {}

    def claim(addresses: tuple[Address, ...], port: int, protocol: Protocol, pair: RoutePair) -> None:
        for address in addresses:
            frontend = Frontend(address, port, protocol)
            held = frontends.setdefault(frontend, pair)
            if held is not pair:
                frontends[frontend] = _prefer(frontend, held, pair, problems)

    for family in _FAMILIES:
        cluster_ips = _of(family, service.cluster_ips)
        if not cluster_ips:
            continue
        external_ips = _of(family, service.external_ips)
        balancer_ips = _of(family, service.load_balancer_ips)
        detector = family in facts.detectors
        for port in service.ports:
            name = ServicePortName(*service.name, port.name)
            chosen = select(slices, family, port.name, port.protocol, facts.node, facts.zone)
            inside = _cluster_ip(name, service, chosen, settings, detector, facts.masquerade_all)
            claim(cluster_ips, port.port, port.protocol, inside)
            for address in balancer_ips:
                ranges = source_ranges(service, address, facts)
                outside = _external(Kind.LOAD_BALANCER, name, service, chosen, settings, detector, ranges)
                claim((address,), port.port, port.protocol, outside)
            if external_ips:
                outside = _external(Kind.EXTERNAL_IP, name, service, chosen, settings, detector)
                claim(external_ips, port.port, port.protocol, outside)
            if port.node_port:
                outside = _external(Kind.NODE_PORT, name, service, chosen, settings, detector)
                claim(_of(family, facts.nodeport_addresses), port.node_port, port.protocol, outside)
    return Claims(
        service, slices, frontends, tuple(problems), _health(service, slices, facts), _serving(service, slices)
    )


def _serving(service: Service, slices: tuple[EndpointSlice, ...]) -> tuple[tuple[ServingKey, Serving], ...]:
    """Who serves each UDP port: as TCP's flows are kept by endpoints that terminate, or that a policy or a hint has
    turned away from, so are its own (kube-proxy's conntrack reconciler, 1.32)."""
    if not any([port.protocol is Protocol.UDP for port in service.ports]):
        return ()
    return tuple(
        (
            (ServicePortName(*service.name, port.name), family),
            serving_endpoints(slices, family, port.name, Protocol.UDP),
        )
        for port in service.ports
        if port.protocol is Protocol.UDP
        for family in _FAMILIES
        if _of(family, service.cluster_ips)
    )


def _health(service: Service, slices: tuple[EndpointSlice, ...], facts: Facts) -> tuple[HealthCheck, ...]:
    """The health checks to answer for this Service; none where node ports are confined to nothing."""
    if not service.health_check_node_port:
        return ()
    return tuple(
        HealthCheck(service.name, family, service.health_check_node_port, addresses, count)
        for family, count in health_counts(service, slices, facts.node).items()
        if (addresses := facts.health_addresses[family == Family.IPV6]) is not None
    )


def source_ranges(service: Service, address: Address, facts: Facts) -> tuple[str, ...]:
    """Who may use the load balancer IP `address`, as a Route holds it. Only ranges of its family count; a /0 opens it
    to all. Where this node may, so may the address itself: the node's packets to it can have it as their source."""
    version6 = ":" in address
    ranges = {cidr for cidr in service.source_ranges if (":" in cidr) == version6}
    if not ranges or any(cidr.endswith("/0") for cidr in ranges):
        return ()
    node_ip = facts.node_ip(Family.IPV6 if version6 else Family.IPV4)
    if any(in_cidr(node_ip, cidr) for cidr in ranges):
        ranges.add(f"{address}/{128 if version6 else 32}")
    return tuple(sorted(ranges, key=cidr_order))


def _cluster_ip(
    name: ServicePortName,
    service: Service,
    chosen: Selection,
    settings: Settings,
    detector: bool,
    masquerade_all: bool,
) -> RoutePair:
    backends = chosen.cluster if service.internal_policy is TrafficPolicy.CLUSTER else chosen.local
    internal, external = (_NOT_POD, _ALWAYS) if detector else (_NEVER, _NEVER)
    if masquerade_all:
        internal = external = _ALWAYS
    route = _route(Kind.CLUSTER_IP, name, backends, chosen.exists, internal, (), settings)
    if internal == external:
        return route, route
    return route, _route(Kind.CLUSTER_IP, name, backends, chosen.exists, external, (), settings)


def _external(
    kind: Kind,
    name: ServicePortName,
    service: Service,
    chosen: Selection,
    settings: Settings,
    detector: bool,
    ranges: tuple[str, ...] = (),
) -> RoutePair:
    if service.external_policy is TrafficPolicy.CLUSTER:
        route = _route(kind, name, chosen.cluster, chosen.exists, _ALWAYS, ranges, settings)
        return route, route
    internal = _NOT_POD if detector else _ALWAYS
    return (
        _route(kind, name, chosen.cluster, chosen.exists, internal, ranges, settings),
        _route(kind, name, chosen.local, chosen.exists, _NEVER, ranges, settings),
    )


def _route(
    kind: Kind,
    name: ServicePortName,
    backends: tuple[Backend, ...],
    exists: bool,
    masquerade: Masquerade,
    ranges: tuple[str, ...],
    settings: Settings,
) -> Route:
    if backends:
        verdict = _FORWARD
    else:
        verdict, masquerade = (_DROP if exists else _REJECT), _NEVER
    return Route(
        name,
        kind,
        verdict,
        backends,
        masquerade,
        settings.affinity_seconds,
        ranges,
        settings.algorithm,
        settings.forwarding,
    )


def _prefer(frontend: Frontend, held: RoutePair, pair: RoutePair, problems: list[Problem]) -> RoutePair:
    """Which of two claims of one Service to one frontend is served. It is worth a word where two ports quarrel."""
    first, second = sorted((held, pair), key=lambda each: _PRECEDENCE[each[0].kind])
    if first[0].service != second[0].service:
        winner, loser = (f"{each[0].kind.label} of its port {each[0].service.port!r}" for each in (first, second))
        problems.append(
            Problem(
                str(first[0].service.service),
                f"{frontend} is claimed twice: {winner} is served, {loser} is not",
                "FrontendClaimedTwice",
            )
        )
    return first


def _of(family: Family, addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    if not addresses:
        return addresses
    version6 = family is Family.IPV6
    if len(addresses) == 1:
        return addresses if (":" in addresses[0]) == version6 else ()
    return tuple([address for address in addresses if (":" in address) == version6])
