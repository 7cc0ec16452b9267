"""Items of `dump` that every dataplane shows alike: what its rows come to, in plain values.

Rules of this file: pure. The shapes are published (apiVersion ebpflb/v1): fields may be added, none changes its meaning
or place. A dataplane adds what only it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ebpflb.model import Protocol
from ebpflb.routes import Backend, Frontend, RouteTable, Scope, ServicePortName, cidr_order, key_order

Item: TypeAlias = dict[str, object]


def service_item(name: ServicePortName) -> Item:
    """A Service port."""
    return {"namespace": name.namespace, "name": name.name, "port": name.port}


def backend_item(backend: Backend) -> Item:
    """A backend, whomever it serves."""
    return {
        "address": backend.address,
        "port": backend.port,
        "weight": backend.weight,
        "state": backend.state.name.lower(),
    }


def endpoint_text(address: str, port: int) -> str:
    """`10.0.0.1:80`, `[fd00::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def service_items(
    routes: RouteTable, more: Callable[[ServicePortName, Protocol], Item] = lambda name, protocol: {}
) -> list[Item]:
    """One item per Service port and protocol: its frontends, and how many backends have new and old flows. `more` is
    what else is said of one."""
    found: dict[tuple[ServicePortName, Protocol], tuple[set[str], set[Backend]]] = {}
    for (frontend, _), route in routes.items():
        frontends, backends = found.setdefault((route.service, frontend.protocol), (set(), set()))
        frontends.add(str(frontend))
        backends.update(route.backends)
    return [
        {
            "service": service_item(name),
            "protocol": protocol.name,
            "frontends": sorted(frontends),
            **more(name, protocol),
            "activeBackends": sum(not backend.state for backend in backends),
            "drainingBackends": sum(bool(backend.state) for backend in backends),
        }
        for (name, protocol), (frontends, backends) in sorted(
            found.items(), key=lambda each: (each[0][0], each[0][1].name)
        )
    ]


def source_items(routes: RouteTable) -> list[Item]:
    """Who counts as the node or a pod, and behind them who may use which load balancer."""
    locality = routes.locality
    items: list[Item] = [
        {"cidr": f"{address}/{128 if ':' in address else 32}", "node": True, "pod": False}
        for address in locality.node_addresses
    ]
    items += [{"cidr": cidr, "node": False, "pod": True} for cidr in locality.pod_cidrs]
    return sorted(items, key=lambda item: cidr_order(str(item["cidr"]))) + range_items(routes)


def range_items(routes: RouteTable) -> list[Item]:
    """An item for each source range, beside those that tell nodes and pods: with the frontends that it may use."""
    found: dict[str, set[Frontend]] = {}
    for (frontend, _), route in routes.items():
        for cidr in route.source_ranges:
            found.setdefault(cidr, set()).add(frontend)
    return [
        {"cidr": cidr, "node": False, "pod": False, "mayUse": [str(each) for each in sorted(found[cidr], key=_order)]}
        for cidr in sorted(found, key=cidr_order)
    ]


def _order(frontend: Frontend) -> tuple[int, bytes, int, int, int]:
    return key_order((frontend, Scope.INTERNAL))
