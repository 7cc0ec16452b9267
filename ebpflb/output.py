"""How results are printed: tables for people, JSON and YAML for programs.

Rules of this file: pure; values in, text out. The JSON shapes are published (apiVersion ebpflb/v1): fields may be
added, none changes its meaning or place. Addresses are canonical text, and lists are in a fixed order, so that two
outputs can be compared byte for byte whichever dataplane they come from. A table never repeats for people what they
can see from the line above, and never cuts a name short.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from ebpflb.dataplane.items import backend_item, endpoint_text, service_item
from ebpflb.routes import Frontend, Key, Route, RouteTable, Scope, ServicePortName, key_order

API_VERSION = "ebpflb/v1"

Item: TypeAlias = Mapping[str, object]

# So many backends stand in a table; `wide` has them all.
_FEW = 3


class Format(enum.Enum):
    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"

    @property
    def structured(self) -> bool:
        return self in (Format.JSON, Format.YAML)


# ---- Published shapes ----


def frontend_item(frontend: Frontend) -> Item:
    return {"address": frontend.address, "port": frontend.port, "protocol": frontend.protocol.name}


def route_item(key: Key, route: Route) -> Item:
    """A route as published."""
    frontend, scope = key
    return {
        "frontend": frontend_item(frontend),
        "scope": scope.name,
        "service": service_item(route.service),
        "kind": route.kind.label,
        "verdict": route.verdict.name,
        "masquerade": route.masquerade.name,
        "affinitySeconds": route.affinity_seconds,
        "algorithm": route.algorithm.label,
        "sourceRanges": list(route.source_ranges),
        "backends": [backend_item(backend) for backend in route.backends],
    }


def route_items(rows: Iterable[tuple[Key, Route]]) -> list[Item]:
    """Routes as published; the order is that of `rows`."""
    return [route_item(key, route) for key, route in rows]


def select(table: RouteTable, service: tuple[str, str] | None) -> list[tuple[Key, Route]]:
    """The table's rows in the order of `dump`, of one Service (namespace, name) only if given."""
    rows = table.ordered()
    if service is None:
        return rows
    return [(key, route) for key, route in rows if route.service[:2] == service]


# ---- Documents ----


def document(kind: str, items: Sequence[Item], form: Format) -> str:
    """The envelope of JSON and YAML, newline included."""
    envelope = {"apiVersion": API_VERSION, "kind": kind, "items": list(items)}
    if form is Format.JSON:
        return msgspec.json.format(msgspec.json.encode(envelope), indent=2).decode() + "\n"
    return _yaml(envelope)


def _yaml(envelope: object) -> str:
    import yaml  # not for every command: it costs 20 ms

    plain = msgspec.to_builtins(envelope)
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(plain, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120))


# ---- Tables ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart, no trailing blanks; "-" where a cell is empty."""
    lines = [list(header), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def _backends_text(route: Route, most: int | None) -> str:
    names = [
        endpoint_text(backend.address, backend.port) + (" (draining)" if backend.state else "")
        + (f" x{backend.weight}" if backend.weight != 1 else "")
        for backend in route.backends
    ]  # fmt: skip
    if most is not None and len(names) > most:
        names[most:] = [f"+{len(names) - most} more"]
    return ",".join(names)


def routes_table(rows: Sequence[tuple[Key, Route]], wide: bool) -> str:
    """Routes for people, by Service. Two scopes that say the same are one line, "any"."""
    merged: list[tuple[Frontend, str, Route]] = []
    by_frontend: dict[Frontend, dict[Scope, Route]] = {}
    for (frontend, scope), route in rows:
        by_frontend.setdefault(frontend, {})[scope] = route
    for frontend, scopes in by_frontend.items():
        if len(scopes) == 2 and scopes[Scope.INTERNAL] == scopes[Scope.EXTERNAL]:
            merged.append((frontend, "any", scopes[Scope.INTERNAL]))
        else:
            merged.extend((frontend, scope.name.lower(), scopes[scope]) for scope in sorted(scopes))
    merged.sort(
        key=lambda line: (line[2].service, line[2].kind, key_order((line[0], Scope.INTERNAL)), line[1] == "external")
    )
    header = ["SERVICE", "KIND", "FRONTEND", "SCOPE", "VERDICT", "BACKENDS"]
    if wide:
        header[5:5] = ["MASQUERADE", "AFFINITY", "ALGORITHM", "SOURCE-RANGES"]
    lines = []
    for frontend, scope_text, route in merged:
        line = [str(route.service), route.kind.label, str(frontend), scope_text, route.verdict.name]
        if wide:
            line += [
                route.masquerade.name,
                f"{route.affinity_seconds}s" if route.affinity_seconds else "",
                route.algorithm.label,
                ",".join(route.source_ranges),
            ]
        lines.append([*line, _backends_text(route, None if wide else _FEW)])
    return table(header, lines)


def items_table(items: Sequence[Item]) -> str:
    """Any list of like items: a column for each field, in the order in which fields first appear."""
    columns: dict[str, None] = {}
    for item in items:
        columns.update(dict.fromkeys(item))
    header = [_heading(name) for name in columns]
    return table(header, [[cell(item.get(name)) for name in columns] for item in items])


def _heading(field: str) -> str:
    """`affinitySeconds` becomes `AFFINITY-SECONDS`."""
    words = "".join(f"-{letter}" if letter.isupper() else letter for letter in field.replace("_", "-"))
    return words.upper()


def cell(value: object) -> str:
    """A plain value in a table's cell; the published shapes in their usual text."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return _shape(value)
    if isinstance(value, (list, tuple)):
        return ",".join(cell(part) for part in value)
    return str(value)


def _shape(value: Mapping[str, object]) -> str:
    fields = set(value)
    if fields in ({"address", "port"}, {"address", "port", "protocol"}):
        text = endpoint_text(str(value["address"]), int(str(value["port"])))
        return f"{text}/{value['protocol']}" if "protocol" in fields else text
    if fields in ({"namespace", "name"}, {"namespace", "name", "port"}):
        return str(ServicePortName(str(value["namespace"]), str(value["name"]), str(value.get("port") or "")))
    return " ".join(f"{name}={cell(part) or '-'}" for name, part in value.items())


def render(kind: str, items: Sequence[Item], form: Format) -> str:
    """Items of any kind, as asked."""
    return document(kind, items, form) if form.structured else items_table(items)
