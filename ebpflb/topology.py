"""Which endpoints serve a Service port, seen from this node: hints, traffic policies, terminating fallback.

Rules of this file: pure; imports `model` and `routes`. It is kube-proxy's CategorizeEndpoints (1.36), for one port in
one family:

* endpoints join by port name and protocol, over all slices; of duplicates the one that does not terminate wins;
* Cluster: the ready ones that the topology hints allow; without any, all that serve while they terminate, hints aside;
* Local: the ready ones of this node; without any, those of this node that serve while they terminate;
* both fallbacks are decided apart; a hint never empties a set.

Whoever serves while terminating and was not chosen, because ready ones exist, is a DRAINING backend of that set: it
keeps the flows it has. A cold start runs this for 100,000 endpoints, hence comprehensions in place of calls.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from functools import partial
from itertools import repeat

import msgspec

from ebpflb.model import Address, Endpoint, EndpointSlice, Family, Protocol, Service, ServiceType, TrafficPolicy
from ebpflb.routes import Backend, BackendState, backend_order

_IPV4_VALUE = socket.inet_aton
_IPV6_VALUE = partial(socket.inet_pton, socket.AF_INET6)


class Selection(msgspec.Struct, frozen=True, gc=False):
    """The backends of one Service port in one family. `cluster` and `local` are sorted, and empty or with at least
    one ACTIVE backend; `exists`: somebody could serve, be it elsewhere (no backends mean DROP if so, else REJECT)."""

    cluster: tuple[Backend, ...] = ()
    local: tuple[Backend, ...] = ()
    exists: bool = False


NOTHING = Selection()


def select(
    slices: Iterable[EndpointSlice], family: Family, name: str, protocol: Protocol, node: str, zone: str
) -> Selection:
    """Choose among the endpoints of the Service port called `name`, as seen from `node` in `zone`."""
    by_port = endpoints_by_port(slices, family, name, protocol)
    if len(by_port) == 1:
        ((port, found),) = by_port.items()
        addresses = [endpoint.address for endpoint in found if endpoint.ready]
        if len(addresses) == len(found) and not (found[0].zone_hints or found[0].node_hints):
            cluster = _active(addresses, port, family)
            here = {endpoint.address for endpoint in found if endpoint.node == node}
            local = tuple([backend for backend in cluster if backend.address in here]) if here else ()
            return Selection(cluster, local, True)
    return _select([(endpoint, port) for port, found in by_port.items() for endpoint in found], node, zone)


def endpoints_by_port(
    slices: Iterable[EndpointSlice], family: Family, name: str, protocol: Protocol
) -> dict[int, list[Endpoint]]:
    """The endpoints of a Service port, each address once, by the port number that they listen on; no list is empty."""
    by_port: dict[int, list[Endpoint]] = {}
    for each in slices:
        if each.family == family and each.endpoints:
            for port in each.ports:
                if port.name == name and port.protocol == protocol:
                    by_port.setdefault(port.port, []).extend(each.endpoints)
    for number, found in by_port.items():
        if len({endpoint.address for endpoint in found}) != len(found):
            by_port[number] = _distinct(found)
    return by_port


def serving_endpoints(
    slices: Iterable[EndpointSlice], family: Family, name: str, protocol: Protocol
) -> frozenset[tuple[Address, int]]:
    """Every endpoint of a Service port that serves, whether it terminates or is ready or not, as (address, port)."""
    return frozenset(
        (endpoint.address, port)
        for port, found in endpoints_by_port(slices, family, name, protocol).items()
        for endpoint in found
        if endpoint.serving
    )


def local_ready_addresses(slices: tuple[EndpointSlice, ...], family: Family, node: str) -> frozenset[Address]:
    """The distinct addresses of `node` that are ready on some slice port, be it one that the Service lacks or not."""
    ports = {(port.name, port.protocol) for each in slices if each.family == family for port in each.ports}
    return frozenset(
        endpoint.address
        for name, protocol in ports
        for found in endpoints_by_port(slices, family, name, protocol).values()
        for endpoint in found
        if endpoint.ready and endpoint.node == node
    )


def health_counts(service: Service, slices: tuple[EndpointSlice, ...], node: str) -> dict[Family, int]:
    """What the healthCheckNodePort of `service` reports on this node, for each family it listens in: the number of
    distinct local ready addresses. Empty if the Service has no such port (it takes type LoadBalancer and policy
    Local). Terminating endpoints do not count, so that load balancers turn away while traffic still works."""
    if (
        not service.health_check_node_port
        or service.type is not ServiceType.LOAD_BALANCER
        or service.external_policy is not TrafficPolicy.LOCAL
    ):
        return {}
    families = {Family.IPV6 if ":" in address else Family.IPV4 for address in service.cluster_ips}
    return {family: len(local_ready_addresses(slices, family, node)) for family in sorted(families)}


def _select(pairs: list[tuple[Endpoint, int]], node: str, zone: str) -> Selection:
    ready = [pair for pair in pairs if pair[0].ready]
    leaving = [pair for pair in pairs if pair[0].serving and pair[0].terminating and not pair[0].ready]
    if not ready and not leaving:
        return NOTHING
    here = [pair for pair in ready if pair[0].node == node]
    leaving_here = [pair for pair in leaving if pair[0].node == node]
    return Selection(_backends(_hinted(ready, node, zone), leaving), _backends(here, leaving_here), True)


def _hinted(ready: list[tuple[Endpoint, int]], node: str, zone: str) -> list[tuple[Endpoint, int]]:
    """Those of `ready` that topology hints give to this node: by node, else by zone, else all. One endpoint without
    hints switches that kind off, and so does nobody being hinted for us."""
    if all(endpoint.node_hints for endpoint, _ in ready):
        near = [pair for pair in ready if node in pair[0].node_hints]
        if near:
            return near
    if all(endpoint.zone_hints for endpoint, _ in ready):
        near = [pair for pair in ready if zone in pair[0].zone_hints]
        if near:
            return near
    return ready


def _backends(chosen: list[tuple[Endpoint, int]], leaving: list[tuple[Endpoint, int]]) -> tuple[Backend, ...]:
    if not chosen:
        chosen, leaving = leaving, []
    backends = [Backend(endpoint.address, port) for endpoint, port in chosen]
    backends += [Backend(endpoint.address, port, 1, BackendState.DRAINING) for endpoint, port in leaving]
    return tuple(sorted(backends, key=backend_order))


def _active(addresses: list[Address], port: int, family: Family) -> tuple[Backend, ...]:
    """ACTIVE backends of one family and one port, in `backend_order`."""
    value = _IPV6_VALUE if family == Family.IPV6 else _IPV4_VALUE
    return tuple(map(Backend, sorted(addresses, key=value), repeat(port)))


def _distinct(found: list[Endpoint]) -> list[Endpoint]:
    """One endpoint for each address. The better condition wins; the rest of the order only serves to make the winner
    independent of how endpoints are spread over slices."""
    best: dict[Address, Endpoint] = {}
    for endpoint in found:
        held = best.setdefault(endpoint.address, endpoint)
        if held is not endpoint and _preference(endpoint) > _preference(held):
            best[endpoint.address] = endpoint
    return list(best.values())


def _preference(endpoint: Endpoint) -> tuple[bool, bool, bool, str, list[str], list[str]]:
    return (
        not endpoint.terminating,
        endpoint.ready,
        endpoint.serving,
        endpoint.node,
        sorted(endpoint.node_hints),
        sorted(endpoint.zone_hints),
    )
