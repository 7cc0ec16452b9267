"""`dump`, `plan`, `verify` and `check`: what is, what would be, and what could be. Nothing here changes anything.

Rules of this file: whatever is said about the kernel has just been read from it.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Sequence

import msgspec

from ebpflb.commands import CHANGES, OK, UNSUPPORTED, Result
from ebpflb.commands.patience import Patience, require_privilege, unheard
from ebpflb.config import Config
from ebpflb.dataplane.items import endpoint_text, service_item
from ebpflb.errors import Unsupported
from ebpflb.model import Address, ServiceName
from ebpflb.output import (
    Format,
    Item,
    document,
    frontend_item,
    items_table,
    render,
    route_item,
    route_items,
    routes_table,
    select,
    table,
)
from ebpflb.overview import found_in
from ebpflb.parts import NothingProgrammed, Parts, choose, holder
from ebpflb.problems import in_order
from ebpflb.reconcile import Desired
from ebpflb.routes import Key, Kind, Route, RouteTable, address_order, key_order
from ebpflb.source import Source

log = logging.getLogger("ebpflb.look")

# How `kind` of a document spells what `dump` was asked for.
_KINDS = {
    "services": "Service",
    "backends": "Backend",
    "flows": "Flow",
    "affinity": "Affinity",
    "sources": "Source",
    "maglev": "Maglev",
    "counters": "Counter",
    "traffic": "Traffic",
    "raw": "Raw",
}
WHATS = ("routes", *_KINDS)


def dump(config: Config, parts: Parts, *, what: str, service: ServiceName | None, form: Format) -> Result:
    """What the kernel holds, read back."""
    require_privilege(parts)
    dataplane = holder(parts.dataplanes(config), config.dataplane)
    if what == "routes":
        rows = select(dataplane.state(), service)
        if form.structured:
            return Result(document("Route", route_items(rows), form))
        return Result(routes_table(rows, wide=form is Format.WIDE))
    items: Sequence[Item] = dataplane.tables(what)
    if what == "sources" and service is not None:
        frontends = {str(frontend) for (frontend, _), _ in select(dataplane.state(), service)}
        found = _who_may_use(items, frontends)
    else:
        found = _of_service(items, service)
    if what == "maglev" and not form.structured:
        found = _by_backend(found)
    return Result(render(_KINDS[what], found, form))


def _who_may_use(items: Sequence[Item], frontends: set[str]) -> Sequence[Item]:
    """The source ranges of these frontends; who counts as this node or a pod is no Service's."""
    found = []
    for item in items:
        named = item.get("mayUse")
        theirs = [each for each in named if each in frontends] if isinstance(named, (list, tuple)) else []
        if theirs:
            found.append({**item, "mayUse": theirs})
    return found


def _by_backend(items: Sequence[Item]) -> Sequence[Item]:
    """Tables of consistent hashing for people: a line for each backend of each. The kernel may not tell shares."""
    lines = []
    for item in items:
        backends = item["backends"]
        assert isinstance(backends, (list, tuple))
        for backend in backends:
            place = endpoint_text(backend["address"], backend["port"])
            share = backend["share"]
            line = {"backend": place, "weight": backend["weight"], "share": share if share is None else f"{share:.1%}"}
            lines.append({name: value for name, value in item.items() if name != "backends"} | line)
    return lines


def _of_service(items: Sequence[Item], service: ServiceName | None) -> Sequence[Item]:
    """The items that belong to a Service, where items say so."""
    if service is None:
        return items
    found = []
    for item in items:
        owner = item.get("service")
        if isinstance(owner, dict) and (owner.get("namespace"), owner.get("name")) == service:
            found.append(item)
    return found


def wanted(config: Config, parts: Parts) -> RouteTable:
    """What the sources ask for now; what is wrong with it goes to the log. Raises SourceError if one does not say
    everything within `parts.patience`."""
    # What was remembered is no answer to what is asked for now.
    sources = parts.sources(msgspec.structs.replace(config, state_dir=""))
    try:
        desired = parts.desired(config, sources)
        _hear(sources, desired, parts)
        routes = desired.routes()
        for problem in in_order(found_in(sources, routes)):
            log.warning("%s: %s: %s", problem.part, problem.subject, problem.reason)
        return routes
    finally:
        for source in sources:
            source.close()


def _hear(sources: Sequence[Source], desired: Desired, parts: Parts) -> None:
    """Read until every source has said everything. Raises SourceError in the words of one that has not in time, or
    that fails again and again."""
    patience = Patience(sources, parts)
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source.fileno(), selectors.EVENT_READ, source)
        ready = list(sources)
        while True:
            for source in ready:
                for event in source.read():
                    desired.apply(event)
            if desired.synced:
                return
            if patience.is_over():
                raise unheard(sources, parts)
            ready = [key.data for key, _ in selector.select(patience.left())]


def differences(want: RouteTable, have: RouteTable) -> list[tuple[Key, Route | None, Route | None]]:
    """Every key whose rows differ: (key, wanted, held), in the order of `dump`."""
    keys = [key for key in {*want, *have} if want.get(key) != have.get(key)]
    return [(key, want.get(key), have.get(key)) for key in sorted(keys, key=key_order)]


def owner_differences(
    want: RouteTable, have: RouteTable
) -> list[tuple[Address, ServiceName | None, ServiceName | None]]:
    """Every cluster IP whose Service differs, by which its undefined ports are refused: (address, wanted, held). None
    is missed where other Services' frontends have taken the address: IPVS, which has frontends only, cannot hold it."""
    differing = {each for each in {*want.owned, *have.owned} if want.owned.get(each) != have.owned.get(each)}
    missing = {each for each in differing if each not in have.owned}
    if missing:
        rows = [(frontend.address, route) for (frontend, _), route in want.items() if frontend.address in missing]
        differing -= {address for address, _ in rows} - {
            address
            for address, route in rows
            if route.kind is Kind.CLUSTER_IP and route.service.service == want.owned[address]
        }
    return [(each, want.owned.get(each), have.owned.get(each)) for each in sorted(differing, key=address_order)]


def _held(config: Config, parts: Parts) -> RouteTable:
    """What the kernel holds; nothing, if nothing is programmed."""
    try:
        return holder(parts.dataplanes(config), config.dataplane).state()
    except NothingProgrammed:
        return RouteTable()


def compare(config: Config, parts: Parts, *, kind: str, service: ServiceName | None, form: Format) -> Result:
    """`plan` (kind Change) and `verify` (kind Difference): the sources' routes beside the kernel's."""
    require_privilege(parts)
    want, have = wanted(config, parts), _held(config, parts)
    rows = [
        (key, new, old)
        for key, new, old in differences(want, have)
        if service is None or any(route is not None and route.service[:2] == service for route in (new, old))
    ]
    owners = [
        (address, new, old)
        for address, new, old in owner_differences(want, have)
        if service is None or service in (new, old)
    ]
    locality = want.locality != have.locality and service is None
    status = CHANGES if rows or owners or locality else OK
    if form.structured:
        items = [_change_item(*row) for row in rows] + [_owner_item(*row) for row in owners]
        if locality:
            items.append(_locality_item(want, have))
        return Result(document(kind, items, form), status)
    if status == OK:
        return Result("nothing to do: the kernel holds what the source says\n", status)
    return Result(_changes_text(rows, owners, want if locality else None, wide=form is Format.WIDE), status)


def _change(new: object | None, old: object | None) -> str:
    return "add" if old is None else "remove" if new is None else "change"


def _change_item(key: Key, new: Route | None, old: Route | None) -> Item:
    owner = new or old
    return {
        "change": _change(new, old),
        "frontend": frontend_item(key[0]),
        "scope": key[1].name,
        "service": service_item(owner.service) if owner else None,
        "wanted": route_item(key, new) if new else None,
        "held": route_item(key, old) if old else None,
    }


def _owner_item(address: Address, new: ServiceName | None, old: ServiceName | None) -> Item:
    def named(owner: ServiceName | None) -> Item | None:
        return owner._asdict() if owner else None

    return {
        "change": _change(new, old),
        "clusterIP": address,
        "service": named(new or old),
        "wanted": named(new),
        "held": named(old),
    }


def _locality_item(want: RouteTable, have: RouteTable) -> Item:
    def plain(routes: RouteTable) -> Item:
        locality = routes.locality
        return {
            "nodeAddresses": list(locality.node_addresses),
            "podCIDRs": list(locality.pod_cidrs),
            "podInterface": locality.pod_interface,
        }

    return {"change": "change", "locality": True, "wanted": plain(want), "held": plain(have)}


def _changes_text(
    rows: Sequence[tuple[Key, Route | None, Route | None]],
    owners: Sequence[tuple[Address, ServiceName | None, ServiceName | None]],
    locality: RouteTable | None,
    wide: bool,
) -> str:
    text = ""
    for title, pick in (("add", 0), ("change", 0), ("remove", 1)):
        part = [(key, (new, old)[pick]) for key, new, old in rows if _change(new, old) == title]
        listed = [(key, route) for key, route in part if route is not None]
        if listed:
            text += f"{title} {len(listed)}:\n{routes_table(listed, wide)}\n"
    if owners:
        lines = [(address, str(new or ""), str(old or "")) for address, new, old in owners]
        text += "change whose cluster IPs refuse undefined ports:\n"
        text += table(("CLUSTER-IP", "WANTED", "HELD"), lines) + "\n"
    if locality is not None:
        found = locality.locality
        cells = [("node addresses", ",".join(found.node_addresses)), ("pod CIDRs", ",".join(found.pod_cidrs))]
        cells.append(("pod interface", found.pod_interface))
        text += "change what tells local clients:\n" + table(("WHAT", "WANTED"), cells)
    return text.rstrip("\n") + "\n"


def check(config: Config, parts: Parts, *, form: Format) -> Result:
    """What this node offers, and who would carry services: the one that is asked for, or the first that can. Needs no
    privilege: the lack of it is an answer."""
    ladder = parts.dataplanes(config)
    items: list[Item] = [
        {
            "dataplane": dataplane.name,
            "requirement": requirement.name,
            "found": requirement.found,
            "essential": requirement.essential,
            "detail": requirement.detail,
            "remedy": requirement.remedy,
        }
        for dataplane in ladder
        for requirement in dataplane.requirements()
    ]
    try:
        choice = choose(ladder, config.dataplane)
        passed = "".join(f"\nnot {name}: {reason}" for name, reason in choice.passed)
        verdict, status = f"{choice.dataplane.name} would carry services here{passed}", OK
    except Unsupported as error:
        verdict, status = str(error), UNSUPPORTED
    if form.structured:
        return Result(document("Requirement", items, form), status)
    shown = items if form is Format.WIDE else [_short(item) for item in items]
    return Result(f"{items_table(shown)}\n{verdict}\n", status)


def _short(item: Item) -> Item:
    """A requirement on one line: what to do stands where it is missing."""
    found = "yes" if item["found"] else "MISSING" if item["essential"] else "no (optional)"
    detail = str(item["detail"])
    if not item["found"] and item["remedy"]:
        detail = f"{detail}; {item['remedy']}" if detail else str(item["remedy"])
    return {"dataplane": item["dataplane"], "requirement": item["requirement"], "found": found, "detail": detail}
