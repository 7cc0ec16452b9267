"""The kernel's tables in plain values, for `dump`.

Rules of this file: it reads and never writes. Every field comes from a row that has just been read; what names another
row that is not there is shown as null or by its number. Items are sorted, so that two dumps can be compared.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from socket import ntohs

from ebpflb.dataplane.bpf.constants import BACKEND_FREE, SOURCE_NODE, SOURCE_POD
from ebpflb.dataplane.bpf.fields import fields
from ebpflb.dataplane.bpf.fill import fill_items
from ebpflb.dataplane.bpf.layouts import (
    BACKEND,
    KEY_VALUE,
    REQUIRED,
    ROUTE_REFERENCES,
    SIZES,
    SOURCE_KEY,
    TABLE_KEY,
    U32,
    entries,
    rows_of,
)
from ebpflb.dataplane.bpf.locality import unpack_facts
from ebpflb.dataplane.bpf.looking import read_backends, read_tables
from ebpflb.dataplane.bpf.maps import Maps
from ebpflb.dataplane.bpf.reading import Reading
from ebpflb.dataplane.bpf.remembered import Clock, Owner, affinity_items, flow_items, owner_item
from ebpflb.dataplane.bpf.table_parts import part_count, table_size
from ebpflb.dataplane.bpf.tables import by_slot, unpack_address, unpack_frontend, unpack_name, unpack_network
from ebpflb.dataplane.items import Item, range_items, service_item
from ebpflb.errors import UserError
from ebpflb.routes import Backend, BackendState, Frontend, ServicePortName, address_order, cidr_order

_ARRAYS = ("slots", "backends")
_SPARSE = (*_ARRAYS, "known", "marks")
_STATES = {**{int(state): state.name.lower() for state in BackendState}, BACKEND_FREE: "free"}


class Inspector:
    """`counters`: names of the counters, by index. `jiffies` is asked for the kernel's count of now, of which the lower
    32 bits are enough."""

    def __init__(self, maps: Maps, counters: tuple[str, ...], jiffies: Callable[[], int]) -> None:
        self._maps = maps
        self._counters = counters
        self._jiffies = jiffies

    def tables(self, what: str) -> list[Item]:
        """The items of `dump what`. Raises UserError for a WHAT that there is not, OSError if a map cannot be read."""
        known = {
            "services": self._services,
            "backends": self._backends,
            "flows": self._flows,
            "affinity": self._affinity,
            "maglev": self._maglev,
            "sources": self._sources,
            "counters": self._counter_cells,
            "traffic": self._traffic,
            "raw": self._raw,
        }
        if what == "fill":
            return fill_items(self._maps)
        if what not in known:
            raise UserError(f"dump {what}: the bpf dataplane has none; choose routes, {', '.join(known)}")
        return known[what]()

    def _names(self) -> dict[int, ServicePortName]:
        rows = entries("names", *self._maps.read("names"))
        return {U32.unpack(key)[0]: unpack_name(row) for key, row in rows}

    def _services(self) -> list[Item]:
        """One item per Service port and protocol: its frontends, and how many backends have new and old flows."""
        reading = Reading(read_tables(self._maps))
        found: dict[int, Item] = {}
        counts: dict[int, tuple[set[Backend], set[Backend]]] = {}
        for key, value in reading.frontends():
            frontend = unpack_frontend(key)
            for service, start, count, draining, *_ in ROUTE_REFERENCES.iter_unpack(value):
                if not service or frontend is None:
                    continue
                item = found.setdefault(
                    service,
                    {
                        "service": owner_item(reading.names.get(service)),
                        "protocol": frontend.protocol.name,
                        "frontends": [],
                        "id": service,
                    },
                )
                text = str(frontend)
                listed = item["frontends"]
                assert isinstance(listed, list)
                if text not in listed:
                    listed.append(text)
                active, left = counts.setdefault(service, (set(), set()))
                slots = reading.backend_set(service, start, count, draining) if count + draining else None
                for backend in slots.backends if slots else ():
                    (left if backend.state else active).add(backend)
        for service, item in found.items():
            active, left = counts[service]
            listed = item["frontends"]
            assert isinstance(listed, list)
            listed.sort()
            item["activeBackends"], item["drainingBackends"] = len(active), len(left)
        return sorted(found.values(), key=_by_service)

    def _backends(self) -> list[Item]:
        names = self._names()
        _, values = self._read("backends")
        items: list[Item] = []
        for number, (address, port, weight, state, service) in enumerate(BACKEND.iter_unpack(values)):
            if service and state != BACKEND_FREE:
                items.append(
                    {
                        "service": owner_item(names.get(service)),
                        "address": unpack_address(address),
                        "port": ntohs(port),
                        "weight": weight,
                        "state": _STATES.get(state, str(state)),
                        "id": number,
                    }
                )
        return sorted(items, key=_by_service)

    def _flows(self) -> list[Item]:
        return flow_items(*self._maps.read("flows"), self._names(), self._clock())

    def _affinity(self) -> list[Item]:
        reading = Reading(read_tables(self._maps))
        owners: dict[int, Owner] = {}
        for frontend, (service, _, _, _, affinity, *_) in _halves(reading):
            if service:
                known = owners.get(service)
                seconds = max(affinity, known.affinity if known else 0)
                owners[service] = Owner(reading.names.get(service), frontend.protocol.name, seconds)
        return affinity_items(*self._maps.read("affinity"), owners, read_backends(self._maps), self._clock())

    def _clock(self) -> Clock:
        facts, _ = unpack_facts(self._maps.read_array("settings", 0, 1))
        return Clock(self._jiffies(), facts.second or 1)

    def _maglev(self) -> list[Item]:
        """One item per table of consistent hashing: which part of its places each backend has. Several frontends of
        a Service port share one where they have the same backends."""
        reading = Reading(read_tables(self._maps))
        sets = {
            (service, start, count, draining, table): frontend.protocol.name
            for frontend, (service, start, count, draining, *_, table) in _halves(reading)
            if table
        }
        parts = dict(self._table_parts())
        items: list[Item] = []
        for (service, start, count, draining, code), protocol in sets.items():
            found = reading.backend_set(service, start, count, draining)
            size = table_size(code)
            places = b"".join(parts.get((start, part), b"") for part in range(part_count(code)))
            held = Counter(array("H", places[: 2 * size]))
            items.append(
                {
                    "service": owner_item(reading.names.get(service)),
                    "protocol": protocol,
                    "size": size,
                    "backends": [
                        {
                            "address": backend.address,
                            "port": backend.port,
                            "weight": backend.weight,
                            "share": round(held[at] / size, 4),
                        }
                        for at, backend in enumerate(by_slot(found.backends)[:count] if found else ())
                    ],
                    "id": start,
                }
            )
        return sorted(items, key=_by_service)

    def _table_parts(self) -> Iterator[tuple[tuple[int, int], bytes]]:
        for key, part in entries("tables", *self._maps.read("tables")):
            slots, number = TABLE_KEY.unpack(key)
            yield (slots, number), part

    def _sources(self) -> list[Item]:
        """Who counts as the node or a pod, and behind them who may use which load balancer."""
        keys, values = self._maps.read("sources")
        found = []
        for (bits, address), (flags,) in zip(SOURCE_KEY.iter_unpack(keys), U32.iter_unpack(values), strict=True):
            if flags:  # a row without flags only stops a shorter prefix
                found.append((unpack_network(bits, address), flags))
        items: list[Item] = [
            {"cidr": cidr, "node": bool(flags & SOURCE_NODE), "pod": bool(flags & SOURCE_POD)}
            for cidr, flags in sorted(found, key=lambda row: cidr_order(row[0]))
        ]
        return items + range_items(Reading(read_tables(self._maps)).routes())

    def _counter_cells(self) -> list[Item]:
        """Each counter, summed over the CPUs, in the order of bpf/maps.h."""
        _, values = self._maps.read("counters")
        count = self._maps.capacity["counters"]
        width = len(values) // count
        return [
            {
                "counter": self._counters[at].lower() if at < len(self._counters) else str(at),
                "value": sum(
                    int.from_bytes(cell, "little") for cell in rows_of(values[at * width : (at + 1) * width], 8)
                ),
            }
            for at in range(count)
        ]

    def _traffic(self) -> list[Item]:
        """What each Service port has carried since its name came into the kernel; none where it is not counted."""
        names = self._names()
        items: list[Item] = [
            {"service": service_item(names[id]), **cells, "id": id}
            for id, cells in self._traffic_cells()
            if id in names
        ]
        return sorted(items, key=_by_service)

    def _traffic_cells(self) -> Iterator[tuple[int, dict[str, int]]]:
        """The rows of `traffic`, summed over the CPUs."""
        keys, values = self._maps.read("traffic")
        members = [name for name, _ in REQUIRED["traffic"]]
        ids = [id for (id,) in U32.iter_unpack(keys)]
        if not ids:
            return
        for id, cells in zip(ids, rows_of(values, len(values) // len(ids)), strict=True):
            numbers = struct.unpack(f"={len(cells) // 8}Q", cells)
            yield id, {name: sum(numbers[at :: len(members)]) for at, name in enumerate(members)}

    def _raw(self) -> list[Item]:
        """Every row of every map, field by field; of the arrays, the rows that were ever used."""
        items: list[Item] = []
        for table, (key_type, value_type) in sorted(KEY_VALUE.items()):
            if table == "counters":
                items += [
                    {"map": table, "key": item["counter"], "value": item["value"]} for item in self._counter_cells()
                ]
                continue
            if table == "traffic":
                items += [{"map": table, "key": id, "value": cells} for id, cells in sorted(self._traffic_cells())]
                continue
            for key, value in sorted(entries(table, *self._read(table))):
                if table in _SPARSE and not value.strip(b"\0"):
                    continue
                items.append({"map": table, "key": fields(key_type, key), "value": fields(value_type, value)})
        return items

    def _read(self, table: str) -> tuple[bytes, bytes]:
        """As `Maps.read`; an array only as far as it is used."""
        if table not in _ARRAYS:
            return self._maps.read(table)
        raw = read_tables(self._maps)
        values = raw.slots if table == "slots" else raw.backends
        return b"".join(map(U32.pack, range(len(values) // SIZES[table][1]))), values


def _by_service(item: Mapping[str, object]) -> tuple[object, ...]:
    service = item["service"]
    owner = tuple(service.values()) if isinstance(service, dict) else ()
    address = item.get("address")
    place = (*address_order(address), item["port"]) if isinstance(address, str) else (str(item.get("protocol")),)
    return (owner, *place, item["id"])


def _halves(reading: Reading) -> Iterator[tuple[Frontend, tuple[int, ...]]]:
    """Each frontend, with what each scope's route of it refers to."""
    for key, value in reading.frontends():
        frontend = unpack_frontend(key)
        for half in ROUTE_REFERENCES.iter_unpack(value):
            if frontend is not None:
                yield frontend, half
