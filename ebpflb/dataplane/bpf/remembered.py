"""What the programs remember, in plain values for `dump`: flows, and where clients went before.

Rules of this file: pure; rows in, items out. Times are jiffies, of which the lower 32 bits are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from socket import ntohs
from typing import NamedTuple

from ebpflb.dataplane.bpf.constants import BACKEND_FREE
from ebpflb.dataplane.bpf.layouts import AFFINITY, AFFINITY_KEY, BACKEND, CLIENT_NETNS, FLOW, FLOW_KEY, entries
from ebpflb.dataplane.bpf.tables import unpack_address
from ebpflb.dataplane.items import Item, endpoint_text, service_item
from ebpflb.model import Protocol
from ebpflb.routes import ServicePortName

# The values of bpf/maps.h.
HOOK_INGRESS, HOOK_EGRESS = 0, 1
FLOW_DNAT, FLOW_SNAT, FLOW_ELSEWHERE = 0, 1, 4
FLOW_CLOSING, FLOW_UNALLOCATED, FLOW_MASQUERADE, FLOW_WHOLE = 1, 2, 4, 16

PROTOCOLS = {int(protocol): protocol.name for protocol in Protocol}


class Clock(NamedTuple):
    """What the time is, and how long a second: both in jiffies."""

    now: int
    second: int

    def ticks_since(self, then: int) -> int:
        """Jiffies, in which the programs count."""
        return (self.now - then) & 0xFFFFFFFF

    def seconds(self, ticks: int) -> float:
        """As published."""
        return round(ticks / self.second, 1)

    def since(self, then: int) -> float:
        """Seconds, as published."""
        return self.seconds(self.ticks_since(then))


class Owner(NamedTuple):
    """What the rows say of a Service port: who it is, its protocol, and for how many seconds it keeps its clients."""

    name: ServicePortName | None
    protocol: str
    affinity: int


def owner_item(name: ServicePortName | None) -> Item | None:
    """A Service port as published; None for one that has no name."""
    return None if name is None else service_item(name)


def flow_items(keys: bytes, values: bytes, names: Mapping[int, ServicePortName], clock: Clock) -> list[Item]:
    """One item per flow of the packet paths, made of its up to four rows. `source` is the masquerade, null if there is
    none: the request's row tells it where the whole translation is known."""
    rows = dict(entries("flows", keys, values))
    items: list[Item] = []
    for key, value in rows.items():
        client, frontend, client_port, port, protocol, hook, _ = FLOW_KEY.unpack(key)
        fields = FLOW.unpack(value)
        address, backend_port, other_port, action, flags, _, service, _, seen, created, beyond, beyond_port, *_ = fields
        if hook != HOOK_INGRESS or action != FLOW_DNAT:
            continue
        others = [
            FLOW_KEY.pack(client, address, other_port, backend_port, protocol, HOOK_EGRESS, 0),
            FLOW_KEY.pack(address, client, backend_port, other_port, protocol, HOOK_EGRESS, 0),
        ]
        source = None
        if flags & FLOW_WHOLE:
            others.append(FLOW_KEY.pack(address, beyond, backend_port, beyond_port, protocol, HOOK_INGRESS, 0))
            source = _endpoint(beyond, beyond_port) if flags & FLOW_MASQUERADE else None
        last = seen
        for other in others:
            if other not in rows:
                continue
            to, to_port, _, kind, state, _, _, _, other_seen, *_ = FLOW.unpack(rows[other])
            last = max(last, other_seen)
            if kind == FLOW_SNAT and not state & FLOW_UNALLOCATED:
                source = _endpoint(to, to_port)
        items.append(
            {
                "protocol": PROTOCOLS.get(protocol, str(protocol)),
                "client": _endpoint(client, client_port),
                "frontend": _endpoint(frontend, port),
                "backend": _endpoint(address, backend_port),
                "source": source,
                "service": owner_item(names.get(service)),
                "state": "closing" if flags & FLOW_CLOSING else "open",
                "idleSeconds": clock.since(last),
                "ageSeconds": clock.since(created),
            }
        )
    return sorted(items, key=lambda item: (str(item["frontend"]), str(item["client"]), str(item["protocol"])))


def affinity_items(
    keys: bytes, values: bytes, owners: Mapping[int, Owner], backends: bytes, clock: Clock
) -> list[Item]:
    """One item per client that a Service remembers: one whose time is over (to the jiffy, as bpf/affinity.h reckons)
    has a row until somebody needs the place, and is nobody's. A client of the socket path is a network namespace, named
    by its cookie. `backend` is null where it has gone."""
    items: list[Item] = []
    for (client, service, kind), (backend, _, seen) in zip(
        AFFINITY_KEY.iter_unpack(keys), AFFINITY.iter_unpack(values), strict=True
    ):
        owner = owners.get(service, Owner(None, "", 0))
        idle = clock.ticks_since(seen)
        left = owner.affinity * clock.second - idle
        if left < 0 or not owner.affinity:
            continue
        cookie = int.from_bytes(client[:8], "little")
        items.append(
            {
                "service": owner_item(owner.name),
                "protocol": owner.protocol,
                "client": f"netns:{cookie}" if kind == CLIENT_NETNS else unpack_address(client),
                "backend": _backend(backends, backend, service),
                "idleSeconds": clock.seconds(idle),
                "secondsLeft": clock.seconds(left),
            }
        )
    return sorted(items, key=lambda item: (str(item["service"]), str(item["protocol"]), str(item["client"])))


def _backend(rows: bytes, number: int, service: int) -> str | None:
    if (number + 1) * BACKEND.size > len(rows):
        return None
    address, port, _, state, owner = BACKEND.unpack_from(rows, number * BACKEND.size)
    return _endpoint(address, port) if owner == service and state != BACKEND_FREE else None


def _endpoint(address: bytes, port: int) -> str:
    return endpoint_text(unpack_address(address), ntohs(port))
