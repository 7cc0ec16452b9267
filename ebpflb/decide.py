"""The reference semantics in executable form: what a route table does with the first packet of a flow.

Rules of this file: pure; imports `model` and `routes`; no policy, only the reading of a row. Every dataplane does what
`decide` says, and `ebpflb trace` prints its steps, so each reason is a sentence for an operator at 3 a.m.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec

from ebpflb.model import Address, Protocol
from ebpflb.routes import (
    Backend,
    BackendState,
    Frontend,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    Verdict,
    in_cidr,
)


class Outcome(enum.IntEnum):
    """Verdict, and what is no Service's: such a packet is left alone."""

    FORWARD = 0
    REJECT = 1
    DROP = 2
    NOT_SERVICE = 3


class Packet(msgspec.Struct, frozen=True, gc=False):
    """The first packet of a flow. `interface` is the one that it enters by, "" if it is the node's own or unknown."""

    source: Address
    destination: Address
    port: int
    protocol: Protocol = Protocol.TCP
    interface: str = ""


class Client(NamedTuple):
    """Who sent a packet; both may hold (the node's address on its own bridge lies in the pod CIDR)."""

    is_node: bool
    is_pod: bool


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A backend that may get the flow, and whether it then sees this node's address in place of the client's."""

    backend: Backend
    masquerade: bool


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What happens to a packet. `route` is None where `verdict` is NOT_SERVICE, and where it is REJECT because a
    cluster IP has no such port. `candidates` is empty unless it is FORWARD; `reasons` are the steps, a sentence
    each."""

    verdict: Outcome
    scope: Scope
    route: Route | None
    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...]


def client_of(locality: Locality, packet: Packet) -> Client:
    """Who sent `packet`, by its source address and the interface it came by."""
    name = locality.pod_interface
    by_interface = name != "" and (
        packet.interface.startswith(name[:-1]) if name.endswith("*") else packet.interface == name
    )
    return Client(
        packet.source in locality.node_addresses,
        by_interface or any(in_cidr(packet.source, cidr) for cidr in locality.pod_cidrs),
    )


def decide(routes: RouteTable, packet: Packet) -> Decision:
    """What `routes` does with `packet`."""
    frontend = Frontend(packet.destination, packet.port, packet.protocol)
    client = client_of(routes.locality, packet)
    scope = Scope.INTERNAL if client.is_node or client.is_pod else Scope.EXTERNAL
    reasons = [f"{packet.source} {_who(routes.locality, packet, client)}: scope {scope.name}"]
    route = routes.get((frontend, scope))
    if route is None:
        owner = routes.owned.get(packet.destination)
        if owner is not None:
            reasons.append(f"{packet.destination} is a cluster IP of {owner}, which has no such port: refused at once")
            return Decision(Outcome.REJECT, scope, None, (), tuple(reasons))
        reasons.append(f"{frontend} is no frontend of any Service: the packet is left alone")
        return Decision(Outcome.NOT_SERVICE, scope, None, (), tuple(reasons))
    reasons.append(f"{frontend} is the {route.kind.label} of {route.service}")
    if route.source_ranges:
        allowed = any(in_cidr(packet.source, cidr) for cidr in route.source_ranges)
        listed = ", ".join(route.source_ranges)
        if not allowed:
            reasons.append(f"{packet.source} is in none of the source ranges {listed}: dropped without an answer")
            return Decision(Outcome.DROP, scope, route, (), tuple(reasons))
        reasons.append(f"{packet.source} is in the source ranges {listed}")
    if route.verdict is Verdict.REJECT:
        reasons.append("no endpoint of the Service can serve, on any node: refused at once")
        return Decision(Outcome.REJECT, scope, route, (), tuple(reasons))
    if route.verdict is Verdict.DROP:
        reasons.append(
            "the traffic policy is Local: endpoints of other nodes could serve, none of this node: dropped, no answer"
        )
        return Decision(Outcome.DROP, scope, route, (), tuple(reasons))
    masked = route.masquerade is Masquerade.ALWAYS or (route.masquerade is Masquerade.NOT_POD and not client.is_pod)
    active = [backend for backend in route.backends if backend.state is BackendState.ACTIVE]
    candidates = tuple(
        Candidate(each, (masked or each.address == packet.source) and _leaves(routes.locality, client, each))
        for each in active
    )
    reasons += _choice(route, packet, candidates, masked)
    return Decision(Outcome.FORWARD, scope, route, candidates, tuple(reasons))


def _leaves(locality: Locality, client: Client, backend: Backend) -> bool:
    """Whether a packet to `backend` leaves this node, or began on it: what comes in for the node's own address passes
    nothing that could replace its source."""
    return client.is_node or backend.address not in locality.node_addresses


def _who(locality: Locality, packet: Packet, client: Client) -> str:
    if client.is_pod:
        near = [cidr for cidr in locality.pod_cidrs if in_cidr(packet.source, cidr)]
        return f"counts as a local pod ({f'in {near[0]}' if near else f'comes by {packet.interface}'})"
    return "is this node itself" if client.is_node else "is neither this node nor a local pod"


def _choice(route: Route, packet: Packet, candidates: tuple[Candidate, ...], masked: bool) -> list[str]:
    """The steps that lead to a backend, in words."""
    draining = len(route.backends) - len(candidates)
    steps = [f"{len(candidates)} of {len(route.backends)} backends take new flows, chosen by {route.algorithm.label}"]
    if draining:
        steps[0] += f"; {draining} terminating, only keeping the flows they have"
    if route.affinity_seconds:
        steps.append(f"a client that came within {route.affinity_seconds} s goes where it went then, if that is there")
    if masked:
        steps.append(f"masquerade is {route.masquerade.name}: the backend sees an address of this node as the source")
        staying = [candidate.backend.address for candidate in candidates if not candidate.masquerade]
        if staying:
            steps.append(f"{staying[0]} is this node itself: there the packet never leaves, and keeps its source")
    else:
        steps.append(f"masquerade is {route.masquerade.name}: the backend sees {packet.source} as the source")
        if any(candidate.masquerade for candidate in candidates):
            steps.append(f"should it be sent to itself, {packet.source} sees an address of this node as the source")
    return steps
