"""Who may use which load balancer's frontends, for `dump sources`: the same for every dataplane.

Rules of this file: pure; plain values ready for JSON.
"""

from __future__ import annotations

from ebpflb.routes import Frontend, RouteTable, Scope, cidr_order, key_order


def range_items(routes: RouteTable) -> list[dict[str, object]]:
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
