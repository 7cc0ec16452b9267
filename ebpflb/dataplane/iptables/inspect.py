"""What the kernel holds in plain values, for `dump`.

Rules of this file: it reads and never writes; the shapes of items are those of the other dataplanes. What is of one
service port is named by `id`, the 16 characters that its chains' names have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ebpflb.dataplane.iptables import flows, names
from ebpflb.dataplane.iptables.changes import is_known
from ebpflb.dataplane.items import Item, backend_item, endpoint_text, service_item, service_items, source_items
from ebpflb.errors import ApplyError, UserError
from ebpflb.model import Protocol
from ebpflb.netfilter.iptables import Iptables
from ebpflb.netfilter.ruleset import target_of
from ebpflb.routes import Backend, RouteTable, Scope, ServicePortName, address_order

_CONNTRACK = Path("/proc/sys/net/netfilter")
# (counter, table, chain, what the rules that count for it have in their text)
_COUNTERS = (
    ("marked_for_masquerade", "nat", names.MARK_MASQ, "-j MARK"),
    ("masqueraded", "nat", names.POSTROUTING, "-j MASQUERADE"),
    ("invalid_dropped", "filter", names.FORWARD, "--ctstate INVALID -j DROP"),
    ("undefined_port_refused", "filter", names.CIP_REJECT, "-j REJECT"),
    ("cluster_ip_refused", "filter", names.SERVICES, "-j REJECT"),
    ("cluster_ip_dropped", "filter", names.SERVICES, "-j DROP"),
    ("external_refused", "filter", names.EXTERNAL_SERVICES, "-j REJECT"),
    ("external_dropped", "filter", names.EXTERNAL_SERVICES, "-j DROP"),
    ("source_range_dropped", "filter", names.PROXY_FIREWALL, "-j DROP"),
    ("localnet_dropped", "filter", names.KUBELET_FIREWALL, "-d 127.0.0.0/8"),
)


def tables(what: str, tools: Sequence[Iptables], state: Callable[[], RouteTable]) -> list[Item]:
    """The items of `dump what`, where `tools` have rules of ours, which come to `state`. Raises UserError for a WHAT
    that there is not, ApplyError if it cannot be read."""
    known: dict[str, Callable[[], list[Item]]] = {
        "services": lambda: service_items(state(), _id),
        "backends": lambda: _backends(state()),
        "flows": lambda: _flows(state(), tools),
        "affinity": lambda: _affinity(state()),
        "sources": lambda: source_items(state()),
        "maglev": list,  # backends are chosen at random, whatever a Service asks for
        "counters": lambda: _counters(tools),
        "raw": lambda: _raw(tools),
        "fill": lambda: _fill(tools),
    }
    if what not in known:
        choices = ", ".join(each for each in known if each != "fill")
        raise UserError(f"dump {what}: the iptables dataplane has none; choose routes, {choices}")
    try:
        return known[what]()
    except OSError as error:
        raise ApplyError(what, "", error.errno or 0, f"{what} cannot be read: {error.strerror}") from error


def inventory(tool: Iptables) -> tuple[str, ...]:
    """What of ours there is in one family: chains by name where they are few, and the jumps to them."""
    engine = f"iptables ({tool.variant}, IPv{tool.family.value})"
    found: list[str] = []
    many: dict[tuple[str, str], int] = {}
    for chain in tool.save():
        if chain.builtin:
            ours = [rule for rule in chain.rules if is_known(chain.table, target_of(rule))]
            found += [f"{engine}: rule in {chain.table}: {rule}" for rule in ours]
        elif names.is_ours(chain.table, chain.name):
            prefix = next((each for each in names.PER_PORT if chain.name.startswith(each)), "")
            if prefix:
                many[chain.table, prefix] = many.get((chain.table, prefix), 0) + 1
            else:
                found.append(f"{engine}: chain {chain.table} {chain.name}")
    found += [f"{engine}: {count} chains {table} {prefix}…" for (table, prefix), count in many.items()]
    return tuple(sorted(found))


def _id(name: ServicePortName, protocol: Protocol) -> Item:
    return {"id": names.port_hash(str(name), protocol.name.lower())}


def _endpoints(routes: RouteTable) -> dict[str, tuple[ServicePortName, Backend]]:
    """Each service port's backends, by the chain of each."""
    found = {}
    for (frontend, _), route in routes.items():
        for backend in route.backends:
            place = endpoint_text(backend.address, backend.port)
            chain = names.endpoint_chain(str(route.service), frontend.protocol.name.lower(), place)
            found[chain] = (route.service, backend)
    return found


def _backends(routes: RouteTable) -> list[Item]:
    found = [(service, backend, chain) for chain, (service, backend) in _endpoints(routes).items()]
    found.sort(key=lambda each: (each[0], address_order(each[1].address), each[1].port, each[2]))
    return [
        {
            "service": service_item(service),
            **backend_item(backend),
            "id": chain.removeprefix(names.SEP),
        }
        for service, backend, chain in found
    ]


def _flows(routes: RouteTable, tools: Iterable[Iptables]) -> list[Item]:
    """conntrack's entries of our frontends. `source` is the masquerade, null if there is none."""
    items: list[Item] = []
    for family in {tool.family for tool in tools}:
        for flow in flows.tracked(family):
            route = routes.get((flow.frontend, Scope.INTERNAL))
            if route is None or flow.reply[:2] == flow.original[2:]:
                continue
            client = endpoint_text(*flow.original[:2])
            seen_as = endpoint_text(*flow.reply[2:])
            items.append(
                {
                    "protocol": flow.protocol.name,
                    "client": client,
                    "frontend": endpoint_text(*flow.original[2:]),
                    "backend": endpoint_text(*flow.reply[:2]),
                    "source": None if seen_as == client else seen_as,
                    "service": service_item(route.service),
                    "state": "closing" if flow.closing else "open",
                    "secondsLeft": flow.seconds_left,
                    "ageSeconds": flow.age,
                }
            )
    return sorted(items, key=lambda item: (str(item["frontend"]), str(item["client"]), str(item["protocol"])))


def _affinity(routes: RouteTable) -> list[Item]:
    """Which client was sent to which backend, and how long ago."""
    sticky = {route.service: route.affinity_seconds for route in routes.values() if route.affinity_seconds}
    chains: dict[str, tuple[Item, int]] = {
        chain: (
            {"service": service_item(service), "backend": endpoint_text(backend.address, backend.port)},
            sticky[service],
        )
        for chain, (service, backend) in _endpoints(routes).items()
        if service in sticky
    }
    return sorted(flows.recent(chains), key=lambda item: (str(item["service"]), str(item["client"])))


def _counters(tools: Iterable[Iptables]) -> list[Item]:
    """Packets, of which only the first of a flow meets most rules, since these were written."""
    totals = dict.fromkeys((counter for counter, *_ in _COUNTERS), 0)
    for tool in tools:
        for table in ("nat", "filter"):
            chains = {chain for _, each, chain, _ in _COUNTERS if each == table and chain != names.KUBELET_FIREWALL}
            found = tool.counted(table, sorted(chains))
            if table == "filter" and tool.has_chain(table, names.KUBELET_FIREWALL):
                found += tool.counted(table, [names.KUBELET_FIREWALL])
            for counter, each, chain, text in _COUNTERS:
                if each == table:
                    totals[counter] += sum(
                        packets for packets, _, rule in found if rule.startswith(f"-A {chain} ") and text in rule
                    )
    return [{"counter": counter, "value": value} for counter, value in totals.items()]


def _raw(tools: Iterable[Iptables]) -> list[Item]:
    """Every rule in chains of ours, and those of ours in others'."""
    items: list[Item] = []
    for tool in tools:
        for chain in tool.save():
            ours = names.is_ours(chain.table, chain.name)
            items += [
                {"family": f"IPv{tool.family.value}", "table": chain.table, "chain": chain.name, "rule": rule}
                for rule in chain.rules
                if ours or is_known(chain.table, target_of(rule))
            ]
    return sorted(items, key=lambda item: (str(item["family"]), str(item["table"]), str(item["chain"])))


def _fill(tools: Sequence[Iptables]) -> list[Item]:
    """What has a size: conntrack's table."""
    if not tools:
        return []
    found = [int((_CONNTRACK / name).read_text()) for name in ("nf_conntrack_count", "nf_conntrack_max")]
    return [{"name": "conntrack", "entries": found[0], "max": found[1]}]
