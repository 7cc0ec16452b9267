"""A Service and what iptables rules are made of it, for the tests of these rules."""

from __future__ import annotations

from ebpflb.dataplane.iptables.frame import Settings
from ebpflb.dataplane.iptables.rules import ruleset
from ebpflb.model import EndpointSlice, Family, Node, ProxyOptions, Service
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.policy import routes
from ebpflb.routes import RouteTable
from tests.world import endpoint_slice, in_family, options, port, service, slice_port, snapshot


def table_of(
    *objects: Service | EndpointSlice,
    options: ProxyOptions = options(),  # noqa: B008
    node: Node | None = None,
    family: Family = Family.IPV4,
) -> RouteTable:
    """The routes of a cluster that is written in IPv4, in `family`."""
    return routes(in_family(snapshot(*objects, node=node), family), in_family(options, family))


def written(table: RouteTable, family: Family = Family.IPV4, settings: Settings = Settings()) -> Ruleset:  # noqa: B008
    """All chains; every route was written."""
    found, problems = ruleset(table, family, settings)
    assert problems == ()
    return found


def rules_of(*objects: Service | EndpointSlice, options: ProxyOptions = options()) -> Ruleset:  # noqa: B008
    """The rules of IPv4 for a cluster."""
    return written(table_of(*objects, options=options))


def chain(found: Ruleset, table: str, prefix: str) -> tuple[str, ...]:
    """The rules of the only chain of its kind, each without `-A CHAIN `."""
    names = [name for name in found[table] if name.startswith(prefix)]
    assert len(names) == 1, names
    return tuple(rule.split(" ", 2)[2] for rule in found[table][names[0]])


def absent(found: Ruleset, table: str, prefix: str) -> bool:
    """Whether there is no chain of a kind."""
    return not any(name.startswith(prefix) for name in found[table])


WEB = service("ns1/web", "172.30.0.41", port(80, "p80"))
WEB_PODS = endpoint_slice("10.0.1.1", "10.0.2.2", of="ns1/web", ports=[slice_port(8080, "p80")])
P80 = [slice_port(80, "p80")]
