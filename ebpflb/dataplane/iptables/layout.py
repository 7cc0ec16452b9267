"""Rows grouped by service port, as the chains are, and which chain carries which backends.

Rules of this file: pure; it knows the shapes of pairs of routes that policy makes (listed at the top of `claims`), and
refuses any other in words, so that `rules` never has to. kube-proxy keeps two sets of endpoints for a service port:
KUBE-SVC-… has those of policy Cluster, KUBE-SVL-… those of policy Local, and KUBE-EXT-… leads external traffic to
either. Rows do not name a policy, and need not: sets that are equal share a chain, so that a cluster IP of policy Local
alone uses KUBE-SVC-….
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from ebpflb.model import Address, Family, Protocol
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Forwarding,
    Frontend,
    Key,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
    packed,
)

_FORWARD = Verdict.FORWARD
_CLUSTER_IP, _NODE_PORT = Kind.CLUSTER_IP, Kind.NODE_PORT
_INTERNAL, _EXTERNAL = Scope.INTERNAL, Scope.EXTERNAL
_NEVER, _NOT_POD, _ALWAYS = Masquerade.NEVER, Masquerade.NOT_POD, Masquerade.ALWAYS
_ACTIVE = BackendState.ACTIVE
_IPV4, _IPV6 = Family.IPV4, Family.IPV6
IFNAMSIZ = 16
_INSIDE_MASQUERADE = frozenset(((_NOT_POD, _ALWAYS), (_NEVER, _NEVER), (_ALWAYS, _ALWAYS)))


class PortKey(NamedTuple):
    """Whose chains: one port of a Service in one family."""

    service: ServicePortName
    protocol: Protocol
    family: Family


class Inside(NamedTuple):
    """The cluster IPs of a service port. `local`: their backends are KUBE-SVL's, not KUBE-SVC's. `masquerade` is that
    of scope INTERNAL."""

    frontends: tuple[Frontend, ...]
    verdict: Verdict
    masquerade: Masquerade
    local: bool


class Place(NamedTuple):
    """One external frontend."""

    frontend: Frontend
    kind: Kind
    source_ranges: tuple[str, ...]


class Outside(NamedTuple):
    """The external frontends of a service port, by their kind, then by address. `internal` and `external` are the
    verdicts of the two scopes; `split`: INTERNAL goes to KUBE-SVC's backends and EXTERNAL to KUBE-SVL's (policy Local),
    where pods keep their addresses if `spare_pods`; otherwise all goes to KUBE-SVC's, masqueraded."""

    places: tuple[Place, ...]
    internal: Verdict
    external: Verdict
    split: bool
    spare_pods: bool


class PortLayout(NamedTuple):
    """What the chains of one service port carry: `cluster` KUBE-SVC-…, `local` KUBE-SVL-…; () where there is none."""

    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    inside: Inside | None
    outside: Outside | None
    affinity_seconds: int
    algorithm: Algorithm
    forwarding: Forwarding


class ShapeError(ValueError):
    """The routes of a service port go together in a way that the chains cannot express; `str()` is a clause."""


def family_of(address: Address) -> Family:
    return _IPV6 if ":" in address else _IPV4


def port_key(frontend: Frontend, route: Route) -> PortKey:
    """The service port that a row belongs to."""
    return PortKey(route.service, frontend.protocol, _IPV6 if ":" in frontend.address else _IPV4)


@lru_cache(maxsize=8)
def pod_matches(pod_cidrs: tuple[str, ...], pod_interface: str, family: Family) -> tuple[str, ...]:
    """What tells a pod in `family`, as matches: `-s CIDR`, `-i IFACE`, and "" for what matches everything, which
    iptables does not print; () where nothing does."""
    found = [
        "" if cidr.endswith("/0") else f"-s {cidr}" for cidr in pod_cidrs if (":" in cidr) == (family == Family.IPV6)
    ]
    if pod_interface:
        found.append(f"-i {pod_interface[:-1]}+" if _is_pattern(pod_interface) else f"-i {pod_interface.rstrip('*')}")
    return tuple(found)


def is_full_prefix(pod_interface: str) -> bool:
    """Whether an interface is given by a prefix that leaves room for nothing behind it: iptables knows it as a name."""
    return pod_interface.endswith("*") and not _is_pattern(pod_interface)


def _is_pattern(pod_interface: str) -> bool:
    return pod_interface.endswith("*") and len(pod_interface) < IFNAMSIZ


def matches_of(locality: Locality, family: Family) -> tuple[str, ...]:
    """`pod_matches` of a locality."""
    return pod_matches(locality.pod_cidrs, locality.pod_interface, family)


def layout_of(frontends: Iterable[Frontend], rows: Mapping[Key, Route], detects: bool) -> PortLayout:
    """How the rows of one service port lie in its chains. `detects`: whether pods are told from others in this family.
    Raises ShapeError."""
    inside: tuple[Route, Route] | None = None
    outside: tuple[Route, Route] | None = None
    inside_frontends: list[Frontend] = []
    places: list[Place] = []
    first: Route | None = None
    for frontend in frontends:
        internal, external = rows.get((frontend, _INTERNAL)), rows.get((frontend, _EXTERNAL))
        if internal is None or external is None:
            raise ShapeError(f"{frontend} has a route for one scope only")
        if internal is not external:
            _check_common(frontend, internal, external)
        if first is None:
            first = internal
        elif not _same_settings(internal, first):
            raise ShapeError(f"{frontend} has other settings than another frontend of the port")
        if internal.kind is _CLUSTER_IP:
            if inside is None:
                inside = (internal, external)
            elif not _same_fate(inside, internal, external):
                raise ShapeError(f"{frontend} has other backends than another cluster IP of the port")
            if internal.source_ranges:
                raise ShapeError(f"{frontend} is a cluster IP with source ranges")
            inside_frontends.append(frontend)
            continue
        if outside is None:
            outside = (internal, external)
        elif not _same_fate(outside, internal, external):
            raise ShapeError(f"{frontend} has other backends than another external frontend of the port")
        if internal.source_ranges and internal.kind is _NODE_PORT:
            raise ShapeError(f"{frontend} is a node port with source ranges")
        places.append(Place(frontend, internal.kind, internal.source_ranges))
    if first is None:
        raise ShapeError("it has no frontend")
    cluster: tuple[Backend, ...] = ()
    local: tuple[Backend, ...] = ()
    found_outside = found_inside = None
    if outside is not None:
        found_outside = _outside(outside, tuple(places), detects)
        cluster = outside[0].backends
        if found_outside.split:
            local = outside[1].backends
    if inside is not None:
        route = inside[0]
        apart = False
        if route.verdict is _FORWARD:
            if not cluster:
                cluster = route.backends
            elif route.backends is not cluster and route.backends != cluster:
                apart = True
                if local and local != route.backends:
                    raise ShapeError("its cluster IP, and either scope of its external frontends have backends apart")
                local = route.backends
        found_inside = _inside(inside, tuple(inside_frontends), apart, detects)
    _check_backends(cluster)
    _check_backends(local)
    return PortLayout(
        cluster, local, found_inside, found_outside, first.affinity_seconds, first.algorithm, first.forwarding
    )


def _inside(pair: tuple[Route, Route], frontends: tuple[Frontend, ...], local: bool, detects: bool) -> Inside:
    internal, external = pair
    same = internal.backends is external.backends or internal.backends == external.backends
    if internal.verdict != external.verdict or not same:
        raise ShapeError("the two scopes of its cluster IP have different backends")
    if (internal.masquerade, external.masquerade) not in _INSIDE_MASQUERADE or (
        internal.masquerade is _NOT_POD and not detects
    ):
        raise ShapeError(f"its cluster IP masquerades {internal.masquerade.name} and {external.masquerade.name}")
    return Inside(frontends, internal.verdict, internal.masquerade, local)


def _outside(pair: tuple[Route, Route], places: tuple[Place, ...], detects: bool) -> Outside:
    internal, external = pair
    same = internal.backends is external.backends or internal.backends == external.backends
    if internal.verdict == external.verdict and same and internal.masquerade is external.masquerade:
        if internal.verdict is _FORWARD and internal.masquerade is not _ALWAYS:
            raise ShapeError(f"its external frontends masquerade {internal.masquerade.name} in both scopes")
        return Outside(places, internal.verdict, external.verdict, False, False)
    if (
        internal.verdict is not _FORWARD
        or internal.masquerade is not (_NOT_POD if detects else _ALWAYS)
        or external.masquerade is not _NEVER
    ):
        raise ShapeError(
            f"its external frontends {internal.verdict.name}, {internal.masquerade.name} inside and"
            f" {external.verdict.name}, {external.masquerade.name} outside"
        )
    return Outside(places, internal.verdict, external.verdict, True, detects)


def _check_common(frontend: Frontend, internal: Route, external: Route) -> None:
    if (internal.service, internal.kind, internal.source_ranges) != (
        external.service,
        external.kind,
        external.source_ranges,
    ) or not _same_settings(internal, external):
        raise ShapeError(f"the two scopes of {frontend} differ in more than their backends")


def _same_settings(one: Route, other: Route) -> bool:
    return (
        one.affinity_seconds == other.affinity_seconds
        and one.algorithm is other.algorithm
        and one.forwarding is other.forwarding
    )


def _same_fate(pair: tuple[Route, Route], internal: Route, external: Route) -> bool:
    return all(
        one is other
        or (
            one.verdict is other.verdict
            and one.masquerade is other.masquerade
            and (one.backends is other.backends or one.backends == other.backends)
        )
        for one, other in zip(pair, (internal, external), strict=True)
    )


def _check_backends(backends: tuple[Backend, ...]) -> None:
    if not backends:
        return
    active = 0
    for backend in backends:
        if backend.weight != 1:
            raise ShapeError(f"{backend.address} has weight {backend.weight}, and all are chosen alike")
        if backend.state is _ACTIVE:
            active += 1
    if not active:
        raise ShapeError("none of its backends takes new flows")


class Index:
    """The frontends of each service port of a table. Kept up to date at the cost of a change, since a change names
    frontends and chains go by service port."""

    def __init__(self, routes: RouteTable) -> None:
        found: dict[PortKey, list[Frontend]] = {}
        self._nodeports: dict[Address, int] = {}
        for (frontend, scope), route in routes.items():
            if scope is _INTERNAL:
                found.setdefault(port_key(frontend, route), []).append(frontend)
                if route.kind is _NODE_PORT:
                    self._nodeports[frontend.address] = self._nodeports.get(frontend.address, 0) + 1
        self._ports = {key: _sorted(frontends) for key, frontends in found.items()}
        self._covered = {family: self._addresses(family) for family in Family}

    def ports(self) -> Iterable[PortKey]:
        """Every service port that has a frontend."""
        return self._ports.keys()

    def frontends(self, key: PortKey) -> tuple[Frontend, ...]:
        """The frontends of a service port, sorted; () if it has none."""
        return self._ports.get(key, ())

    def nodeports(self, family: Family) -> frozenset[Address]:
        """All addresses that have a node port in `family`."""
        return self._covered[family]

    def update(self, before: RouteTable, after: RouteTable, changed: Iterable[Key]) -> set[PortKey]:
        """Follow the step from `before`, the table that this is an index of, to `after`; the service ports whose rules
        may differ by it. Keys that did not change do no harm."""
        touched: set[PortKey] = set()
        counted = False
        for frontend in {frontend for frontend, _ in changed}:
            old, new = before.get((frontend, _INTERNAL)), after.get((frontend, _INTERNAL))
            old_key = port_key(frontend, old) if old is not None else None
            new_key = port_key(frontend, new) if new is not None else None
            touched |= {key for key in (old_key, new_key) if key is not None}
            if old_key != new_key:
                if old_key is not None:
                    self._drop(old_key, frontend)
                if new_key is not None:
                    self._ports[new_key] = _sorted([*self._ports.get(new_key, ()), frontend])
            was, now = (route is not None and route.kind is _NODE_PORT for route in (old, new))
            if was != now:
                counted = True
                self._count(frontend.address, 1 if now else -1)
        if counted:
            touched |= self._recover(after)
        if (before.locality.pod_cidrs, before.locality.pod_interface) != (
            after.locality.pod_cidrs,
            after.locality.pod_interface,
        ):
            touched |= self._ports.keys()
        return touched

    def _drop(self, key: PortKey, frontend: Frontend) -> None:
        left = tuple(each for each in self._ports[key] if each != frontend)
        if left:
            self._ports[key] = left
        else:
            del self._ports[key]

    def _count(self, address: Address, step: int) -> None:
        count = self._nodeports.get(address, 0) + step
        if count:
            self._nodeports[address] = count
        else:
            del self._nodeports[address]

    def _addresses(self, family: Family) -> frozenset[Address]:
        return frozenset(address for address in self._nodeports if (":" in address) == (family is Family.IPV6))

    def _recover(self, routes: RouteTable) -> set[PortKey]:
        """Take the addresses of node ports anew. Where they changed, every node port may be written otherwise."""
        touched: set[PortKey] = set()
        for family in Family:
            addresses = self._addresses(family)
            if addresses != self._covered[family]:
                self._covered[family] = addresses
                touched |= {
                    key
                    for key, frontends in self._ports.items()
                    if key.family is family
                    and any(routes[frontend, _INTERNAL].kind is _NODE_PORT for frontend in frontends)
                }
        return touched


def _sorted(frontends: list[Frontend]) -> tuple[Frontend, ...]:
    if len(frontends) == 1:
        return (frontends[0],)
    return tuple(sorted(frontends, key=lambda each: (packed(each.address), each.port)))
