"""Cluster IPs as rows: ports of them that have no frontend are refused.

Rules of this file: pure. An address is owned by one Service at a time; its row is replaced in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ebpflb.dataplane.bpf.layouts import OWNER, entries
from ebpflb.dataplane.bpf.tables import NAME_LIMIT, pack_address, unpack_address
from ebpflb.model import Address, ServiceName


def pack_owner(service: ServiceName) -> bytes | None:
    """An `owned` row; None if a name is too long for one."""
    namespace, name = service.namespace.encode(), service.name.encode()
    if max(len(namespace), len(name)) > NAME_LIMIT or b"\0" in namespace + name:
        return None
    return OWNER.pack(namespace, name)


def unpack_owner(row: bytes) -> ServiceName:
    """The inverse of `pack_owner`."""
    return ServiceName(*(part.rstrip(b"\0").decode(errors="replace") for part in OWNER.unpack(row)))


def unpack_owned(keys: bytes, values: bytes) -> dict[Address, ServiceName]:
    """All rows, back to back, as `RouteTable.owned`."""
    return {unpack_address(key): unpack_owner(row) for key, row in entries("owned", keys, values)}


class OwnedChange:
    """What one sync is to write: `puts`, each with its row, and `removals` by address, and Services whose names no row
    can hold."""

    __slots__ = ("puts", "refused", "removals")

    def __init__(self) -> None:
        self.puts: dict[Address, tuple[ServiceName, bytes]] = {}
        self.removals: list[Address] = []
        self.refused: dict[Address, ServiceName] = {}


class Owned:
    """The rows that the map holds. `held`: by address."""

    def __init__(self, held: Mapping[Address, ServiceName] | None = None) -> None:
        self.held: dict[Address, ServiceName] = dict(held or {})

    def prepare(self, want: Mapping[Address, ServiceName], addresses: Iterable[Address]) -> OwnedChange:
        """What makes the rows of `addresses` those of `want`."""
        change = OwnedChange()
        for address in addresses:
            owner, held = want.get(address), self.held.get(address)
            if owner == held:
                continue
            row = pack_owner(owner) if owner is not None else None
            if owner is not None and row is not None:
                change.puts[address] = (owner, row)
                continue
            if owner is not None:
                change.refused[address] = owner
            if held is not None:
                change.removals.append(address)
        return change

    def rows(self) -> dict[bytes, bytes | None]:
        """All rows as they should be in the map."""
        return {pack_address(address): pack_owner(owner) for address, owner in self.held.items()}
