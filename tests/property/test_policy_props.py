"""Properties of the policy, over random clusters and random histories of one.

Every docstring starts with the invariant.
"""

from __future__ import annotations

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ebpflb.model import (
    Endpoint,
    EndpointSlice,
    Node,
    ProxyOptions,
    Service,
    ServiceName,
    Snapshot,
    TrafficPolicy,
    family_of,
)
from ebpflb.policy import Router, routes
from ebpflb.routes import (
    BackendState,
    Frontend,
    Kind,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    Verdict,
    backend_order,
    cidr_order,
)
from tests.property.clusters import choices, nodes, owner, steps, things, world

# ---- A second, plainer reading of the rules ----


def merged(snapshot: Snapshot, route: Route, frontend: Frontend) -> dict[tuple[str, int], list[Endpoint]]:
    """All that was said of each (address, port) that could serve a frontend."""
    found: dict[tuple[str, int], list[Endpoint]] = {}
    for each in snapshot.slices.get(route.service.service, ()):
        if each.family is family_of(frontend.address):
            for port in each.ports:
                if (port.name, port.protocol) == (route.service.port, frontend.protocol):
                    for endpoint in each.endpoints:
                        found.setdefault((endpoint.address, port.port), []).append(endpoint)
    return found


def plain(
    snapshot: Snapshot, table: RouteTable
) -> list[tuple[Frontend, Scope, Route, dict[tuple[str, int], Endpoint]]]:
    """Every row with its endpoints, of rows where none is said twice."""
    rows = []
    for (frontend, scope), route in table.items():
        found = merged(snapshot, route, frontend)
        if all(len(said) == 1 for said in found.values()):
            rows.append((frontend, scope, route, {where: said[0] for where, said in found.items()}))
    return rows


def is_local(snapshot: Snapshot, route: Route, scope: Scope) -> bool:
    """Whether a row is bound to this node's endpoints."""
    service = snapshot.services[route.service.service]
    if route.kind is Kind.CLUSTER_IP:
        return service.internal_policy is TrafficPolicy.LOCAL
    return scope is Scope.EXTERNAL and service.external_policy is TrafficPolicy.LOCAL


@given(things, nodes, choices)
def test_backends_are_those_who_may_serve(
    said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions
) -> None:
    """Invariant: a new flow goes to a ready endpoint, or, when no ready one qualifies for the policy, to one that
    serves while it terminates; policy Local stays on this node; hints only narrow a set, never empty it."""
    now = world(said, node)
    for _, scope, route, known in plain(now, routes(now, chosen)):
        local = is_local(now, route, scope)
        mine = {where: each for where, each in known.items() if not local or each.node == node.name}
        ready = {where for where, each in mine.items() if each.ready}
        leaving = {where for where, each in mine.items() if each.serving and each.terminating and not each.ready}
        active = {(each.address, each.port) for each in route.backends if each.state is BackendState.ACTIVE}
        draining = {(each.address, each.port) for each in route.backends if each.state is BackendState.DRAINING}
        if ready:
            assert active and active <= ready
            assert draining == leaving
            assert (
                active == ready
                or not local
                and any(known[where].zone_hints or known[where].node_hints for where in ready)
            )
        else:
            assert (active, draining) == (leaving, set())


@given(things, nodes, choices)
def test_verdicts(said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions) -> None:
    """Invariant: REJECT if and only if nobody could serve, on any node; DROP only under policy Local; else FORWARD."""
    now = world(said, node)
    for _, scope, route, known in plain(now, routes(now, chosen)):
        usable = any(each.ready or each.serving and each.terminating for each in known.values())
        assert (route.verdict is Verdict.REJECT) == (not usable)
        assert route.verdict is not Verdict.DROP or is_local(now, route, scope)
        assert any(each.state is BackendState.ACTIVE for each in route.backends) == (route.verdict is Verdict.FORWARD)


@given(things, nodes, choices)
def test_rows_are_canonical(said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions) -> None:
    """Invariant: every frontend has both scopes, of one Service; a route holds one family; everything in it is sorted,
    without repetition, and neutral where it has no meaning; source ranges stand on load balancer IPs alone."""
    table = routes(world(said, node), chosen)
    for (frontend, scope), route in table.items():
        family = family_of(frontend.address)
        assert table[frontend, Scope(1 - scope)].service == route.service
        assert {family_of(each.address) for each in route.backends} <= {family}
        assert {family_of(each) for each in route.source_ranges} <= {family}
        assert list(route.backends) == sorted(route.backends, key=backend_order)
        assert len({(each.address, each.port) for each in route.backends}) == len(route.backends)
        assert list(route.source_ranges) == sorted(set(route.source_ranges), key=cidr_order)
        assert not route.source_ranges or route.kind is Kind.LOAD_BALANCER
        assert route.verdict is Verdict.FORWARD or (route.backends, route.masquerade) == ((), Masquerade.NEVER)


@given(things, nodes, choices, st.randoms(use_true_random=False))
def test_order_of_events(
    said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions, chance: random.Random
) -> None:
    """Invariant: the order in which a cluster became known does not show in its routes nor in its problems."""
    final = world(said, node)
    everything: list[Service | EndpointSlice] = [*final.services.values()]
    everything += [each for owned in final.slices.values() for each in owned]
    chance.shuffle(everything)
    router, known = Router(), list[Service | EndpointSlice]()
    router.update(world([], node), None, chosen)
    for each in everything:
        known.append(each)
        table = router.update(world(known, node), frozenset([owner(each)]), chosen)
    wanted = routes(final, chosen)
    if everything:
        assert table == wanted and table.problems == wanted.problems


@given(things, nodes, choices, st.randoms(use_true_random=False))
def test_slicing(said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions, chance: random.Random) -> None:
    """Invariant: how endpoints are spread over slices does not matter, nor does saying one twice."""
    before = world(said, node)
    other: list[Service | EndpointSlice] = [*before.services.values()]
    for owned in before.slices.values():
        pieces = [(each, endpoint) for each in owned for endpoint in each.endpoints]
        pieces += [piece for piece in pieces if chance.random() < 0.3]
        chance.shuffle(pieces)
        for number, (each, endpoint) in enumerate(pieces):
            name = ServiceName(each.name.namespace, f"piece-{each.service.name}-{number}")
            other.append(msgspec.structs.replace(each, name=name, endpoints=(endpoint,)))
    after = world(other, node)
    assert routes(after, chosen) == routes(before, chosen)


@given(things, nodes, choices, steps)
def test_router_is_routes(
    said: list[Service | EndpointSlice], node: Node, chosen: ProxyOptions, history: list[tuple[str, object]]
) -> None:
    """Invariant: after any history a Router's table equals the one made from scratch, problems included, and it names
    exactly the rows in which it differs from the table before."""
    there = {(type(each), each.name): each for each in said}
    router = Router()
    table = router.update(world(there.values(), node), None, chosen)
    for what, argument in history:
        touched: frozenset[ServiceName] | None = frozenset()
        if isinstance(argument, Service | EndpointSlice):
            place = (type(argument), argument.name)
            old = there.get(place)
            there[place] = argument
            touched = frozenset(owner(each) for each in (old, argument) if each is not None)
        elif what == "drop" and isinstance(argument, int) and argument < len(there):
            touched = frozenset([owner(there.pop(list(there)[argument]))])
        elif isinstance(argument, Node):
            node = argument
        elif isinstance(argument, ProxyOptions):
            chosen = argument
        elif what == "resync":
            touched = None
        now = world(there.values(), node)
        older, table = table, router.update(now, touched, chosen)
        wanted = routes(now, chosen)
        assert table == wanted
        assert table.problems == wanted.problems
        assert table.changed_from(older) == {key for key in {*older, *table} if older.get(key) != table.get(key)}
