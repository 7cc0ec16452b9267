"""What Kubernetes said, turned into what this node must do: the one policy function.

Rules of this file: pure; imports `model`, `routes` and the parts of policy: `facts` (this node and the options),
`topology` (which endpoints), `claims` (one Service by itself). What one Service wants is worked out there; here the
results are remembered, contested frontends get their one owner, and the difference is handed on. `routes` is a Router
with nothing to remember, so that the two cannot drift apart.

Of Services that claim one frontend the oldest is served, equals by name. The others get a Problem, and the next one
takes over when the owner goes.
"""

from __future__ import annotations

from ebpflb.claims import Claims, claims_of
from ebpflb.facts import Facts, facts_of
from ebpflb.model import Address, Problem, Protocol, ProxyOptions, ServiceName, Snapshot
from ebpflb.routes import (
    Frontend,
    HealthCheck,
    HealthKey,
    Key,
    Kind,
    Route,
    RouteTable,
    Scope,
    Serving,
    ServingKey,
    address_order,
)
from ebpflb.topology import health_counts

__all__ = ["Router", "health_counts", "routes"]

_INTERNAL, _EXTERNAL = Scope.INTERNAL, Scope.EXTERNAL


class _Affected:
    """What may have changed by an update: frontends, Services with problems, and what lies beside the rows."""

    __slots__ = ("checks", "frontends", "owned", "remarked", "serving")

    def __init__(self) -> None:
        self.frontends: list[Frontend] = []
        self.remarked: set[ServiceName] = set()
        self.checks: dict[HealthKey, HealthCheck | None] = {}
        self.owned: dict[Address, ServiceName | None] = {}
        self.serving: dict[ServingKey, Serving | None] = {}


def routes(snapshot: Snapshot, options: ProxyOptions) -> RouteTable:
    """What this node must do, from scratch."""
    return Router().update(snapshot, None, options)


class Router:
    """`routes`, remembering what it worked out: an update costs the Services that changed.

    `recomputed` is the number of Services that the last update worked out anew.
    """

    def __init__(self) -> None:
        self.recomputed = 0
        self._facts: Facts | None = None
        self._claims: dict[ServiceName, Claims] = {}
        self._claimants: dict[Frontend, tuple[ServiceName, ...]] = {}  # by rank: the first one is served
        self._owners: dict[Address, tuple[ServiceName, ...]] = {}  # of cluster IPs, by name
        self._table = RouteTable()

    def update(self, snapshot: Snapshot, touched: frozenset[ServiceName] | None, options: ProxyOptions) -> RouteTable:
        """The table for `snapshot`, evolved from the one returned before.

        `touched` names every Service that changed since, itself or in its slices; None means any may have. A change of
        the node or of the options is noticed without being named.
        """
        facts = facts_of(snapshot.node, options)
        before, self._facts = self._facts, facts
        names = touched if touched is not None else frozenset(snapshot.services) | self._claims.keys()
        concerned: set[ServiceName] = set()
        if before is not None and before != facts:
            concerned = {
                name for name, held in self._claims.items() if facts.concern(held.service, held.slices, before)
            }
        self.recomputed = 0
        affected = _Affected()
        for name in names | concerned:
            self._reconsider(name, snapshot, facts, name in concerned, affected)
        return self._evolve(facts, affected)

    def _reconsider(
        self,
        name: ServiceName,
        snapshot: Snapshot,
        facts: Facts,
        concerned: bool,
        affected: _Affected,
    ) -> None:
        """Bring one Service's claims up to date, and add to `affected` what may have changed thereby."""
        service = snapshot.services.get(name)
        old = self._claims.get(name)
        if service is None:
            if old is None:
                return
            new = None
            gone = set(old.frontends)
            del self._claims[name]
        else:
            slices = snapshot.slices.get(name, ())
            if old and not concerned and (old.service, old.slices) == (service, slices):
                return
            new = self._claims[name] = claims_of(service, slices, facts)
            self.recomputed += 1
            gone = old.frontends.keys() - new.frontends.keys() if old else set()
        if (old and old.problems) or (new and new.problems):
            affected.remarked.add(name)
        self._beside_rows(name, old, new, affected)
        claimants = self._claimants
        for frontend in gone:
            held = claimants[frontend]
            if len(held) == 1:
                del claimants[frontend]
            else:
                affected.remarked.update(held)
                claimants[frontend] = tuple(other for other in held if other != name)
        affected.frontends += gone
        if new:
            alone = (name,)
            for frontend in new.frontends:
                if claimants.setdefault(frontend, alone) != alone:
                    both = {*claimants[frontend], name}
                    affected.remarked |= both
                    claimants[frontend] = tuple(sorted(both, key=lambda each: self._claims[each].rank))
            affected.frontends += new.frontends

    def _beside_rows(self, name: ServiceName, old: Claims | None, new: Claims | None, affected: _Affected) -> None:
        """The health checks, cluster IPs and serving endpoints of one Service."""
        if old is None or new is None or old.health != new.health:
            affected.checks.update({(name, check.family): None for check in (old.health if old else ())})
            affected.checks.update({(name, check.family): check for check in (new.health if new else ())})
        if old is None or new is None or old.serving != new.serving:
            affected.serving.update({key: None for key, _ in (old.serving if old else ())})
            affected.serving.update(new.serving if new else ())
        before = old.service.cluster_ips if old else ()
        after = new.service.cluster_ips if new else ()
        if before == after:
            return
        alone = (name,)
        for address in before:
            held = tuple(other for other in self._owners.pop(address) if other != name)
            if held:
                self._owners[address] = held
            affected.owned[address] = held[0] if held else None
        for address in after:
            held = self._owners.setdefault(address, alone)
            if name not in held:
                # Which of several it is only shows in a sentence: the API server gives an address to one.
                held = self._owners[address] = tuple(sorted((*held, name)))
            affected.owned[address] = held[0]

    def _evolve(self, facts: Facts, affected: _Affected) -> RouteTable:
        """The next table: the affected frontends as their first claimants want them."""
        table = self._table
        put: dict[Key, Route] = {}
        drop: list[Key] = []
        for frontend in affected.frontends:
            claimants = self._claimants.get(frontend)
            if claimants is None:
                drop += ((frontend, _INTERNAL), (frontend, _EXTERNAL))
                continue
            internal, external = self._claims[claimants[0]].frontends[frontend]
            if table.get(key := (frontend, _INTERNAL)) != internal:
                put[key] = internal
            if table.get(key := (frontend, _EXTERNAL)) != external:
                put[key] = external
        problems = {
            name: found for name in affected.remarked if (found := self._problems(name)) != table.problems.get(name, ())
        }
        beside = (problems, affected.checks, affected.owned, affected.serving)
        if put or drop or any(beside) or facts.locality != table.locality:
            self._table = table.evolve(
                put,
                drop,
                locality=facts.locality,
                problems=problems,
                health=affected.checks,
                owned=affected.owned,
                serving=affected.serving,
            )
        return self._table

    def _problems(self, name: ServiceName) -> tuple[Problem, ...]:
        """What is wrong with a Service, its lost claims included."""
        claims = self._claims.get(name)
        if claims is None:
            return ()
        lost: dict[tuple[Kind, int, Protocol, ServiceName], list[Address]] = {}
        for frontend, (route, _) in claims.frontends.items():
            winner = self._claimants[frontend][0]
            if winner != name:
                lost.setdefault((route.kind, frontend.port, frontend.protocol, winner), []).append(frontend.address)
        return claims.problems + tuple(
            Problem(
                str(name),
                f"{kind.label} port {port}/{protocol.name} on {', '.join(sorted(addresses, key=address_order))} belongs"
                f" to {winner}, which comes first (the older Service, then by name); it is not served for this one",
                "FrontendTaken",
            )
            for (kind, port, protocol, winner), addresses in sorted(lost.items())
        )
