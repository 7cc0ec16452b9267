"""What this node must do: a table from (frontend, scope) to route.

Rules of this file: data only, no policy, no I/O; imports `model` alone. A route carries decisions, never reasons to
decide again: a dataplane that needs an `if` about Kubernetes has found a missing field here. Everything is immutable,
comparable and printable; a `RouteTable` is a persistent map, so that the next table costs its change only.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypeVar, overload

import immutables
import msgspec

from ebpflb.model import Address, Family, Problem, Protocol, ServiceName


class Scope(enum.IntEnum):
    """Where a client is: INTERNAL is this node itself and what detect-local calls a local pod; EXTERNAL is all else,
    and pods too in a family that has no detector."""

    INTERNAL = 0
    EXTERNAL = 1

    __hash__ = int.__hash__


class Kind(enum.IntEnum):
    """Why the frontend exists."""

    CLUSTER_IP = 0
    NODE_PORT = 1
    LOAD_BALANCER = 2
    EXTERNAL_IP = 3

    @property
    def label(self) -> str:
        """Kubernetes' spelling."""
        return ("ClusterIP", "NodePort", "LoadBalancer", "ExternalIP")[self]


class Verdict(enum.IntEnum):
    """What happens to a new connection. REJECT answers (RST, port unreachable, ECONNREFUSED); DROP is silent."""

    FORWARD = 0
    REJECT = 1
    DROP = 2


class Masquerade(enum.IntEnum):
    """Whether the source is replaced by this node's address. NOT_POD spares what detect-local calls a pod.

    A client that is sent to itself (hairpin) is masqueraded whatever this says.
    """

    NEVER = 0
    NOT_POD = 1
    ALWAYS = 2


class BackendState(enum.IntEnum):
    """ACTIVE backends get new flows; DRAINING ones only keep the flows that they have."""

    ACTIVE = 0
    DRAINING = 1


class Algorithm(enum.IntEnum):
    """How a backend is chosen for a new flow; `label` is the annotation's spelling."""

    RANDOM = 0
    MAGLEV = 1
    ROUND_ROBIN = 2
    LEAST_CONNECTIONS = 3

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


class Forwarding(enum.IntEnum):
    """How a packet reaches a remote backend."""

    SNAT = 0
    DSR = 1


class Frontend(NamedTuple):
    """A thing that a packet may be addressed to."""

    address: Address
    port: int
    protocol: Protocol

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}/{self.protocol.name}"


class ServicePortName(NamedTuple):
    """A Service's port; `port` is its name, "" if it has none. Text as kube-proxy's: `ns/name:port` or `ns/name`."""

    namespace: str
    name: str
    port: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" + (f":{self.port}" if self.port else "")

    @property
    def service(self) -> ServiceName:
        return ServiceName(self.namespace, self.name)


class Backend(msgspec.Struct, frozen=True, gc=False):
    """One place where a frontend's packets may go."""

    address: Address
    port: int
    weight: int = 1
    state: BackendState = BackendState.ACTIVE


class Route(msgspec.Struct, frozen=True, gc=False):
    """What to do with a packet for one frontend from one scope.

    `backends` is sorted (see `backend_order`), holds one family only, and is empty unless `verdict` is FORWARD, where
    at least one is ACTIVE. `masquerade` is NEVER unless `verdict` is FORWARD. `affinity_seconds` 0 means none;
    affinity is per Service port and client address, shared by all its frontends and scopes. `source_ranges` are
    canonical CIDRs of the frontend's family, sorted by `cidr_order`; empty means everybody.
    """

    service: ServicePortName
    kind: Kind
    verdict: Verdict
    backends: tuple[Backend, ...] = ()
    masquerade: Masquerade = Masquerade.NEVER
    affinity_seconds: int = 0
    source_ranges: tuple[str, ...] = ()
    algorithm: Algorithm = Algorithm.RANDOM
    forwarding: Forwarding = Forwarding.SNAT


class Locality(msgspec.Struct, frozen=True, gc=False):
    """What tells an INTERNAL client from an EXTERNAL one, and a pod from the node, in facts of the packet.

    `node_addresses`: the kernel's local addresses; a packet with such a source is the node's own. `pod_cidrs`: a
    source in one of them is a local pod. `pod_interface`: a packet that enters by it is a local pod's; an exact name,
    or a prefix if it ends in "*"; "" for none. All are canonical, sorted by `address_order` and `cidr_order`.
    """

    node_addresses: tuple[Address, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    pod_interface: str = ""


class HealthCheck(NamedTuple):
    """A healthCheckNodePort to answer on, in one family (KEP-3836's contract with load balancers): the Service, the
    port, the addresses to listen on (() for all), and how many distinct ready endpoints this node has."""

    service: ServiceName
    family: Family
    port: int
    addresses: tuple[Address, ...]
    local_endpoints: int


HealthKey: TypeAlias = tuple[ServiceName, Family]

ServingKey: TypeAlias = tuple[ServicePortName, Family]

Serving: TypeAlias = frozenset[tuple[Address, int]]
"""The endpoints of a UDP service port that serve, as (address, port)."""

Key: TypeAlias = tuple[Frontend, Scope]

_T = TypeVar("_T")
_K = TypeVar("_K")
_V = TypeVar("_V")


@lru_cache(maxsize=1 << 12)
def packed(address: Address) -> bytes:
    """An address as 16 bytes, IPv4 as ::ffff:a.b.c.d: the form of every kernel row."""
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return b"\0\0\0\0\0\0\0\0\0\0\xff\xff" + socket.inet_aton(address)


_MAPPED = packed("0.0.0.0")[:12]


@lru_cache(maxsize=1 << 12)
def unpacked(address: bytes) -> Address:
    """The inverse of `packed`."""
    if address[:12] == _MAPPED:
        return socket.inet_ntoa(address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)


def address_order(address: Address) -> tuple[int, bytes]:
    """Sort key: IPv4 before IPv6, then by value."""
    return (":" in address, packed(address))


@lru_cache(maxsize=1 << 16)
def packed_network(cidr: str) -> tuple[bytes, int]:
    """A canonical CIDR as 16 bytes of address and a prefix length in bits of 128 (an IPv4 /8 is /104)."""
    address, _, bits = cidr.partition("/")
    return packed(address), int(bits) + (0 if ":" in address else 96)


def cidr_order(cidr: str) -> tuple[bool, bytes, int]:
    """Sort key of CIDRs: IPv4 before IPv6, then by value, then the shorter prefix."""
    return (":" in cidr, *packed_network(cidr))


def in_cidr(address: Address, cidr: str) -> bool:
    """Whether an address lies in a CIDR; never across families."""
    if (":" in address) != (":" in cidr):
        return False
    network, bits = packed_network(cidr)
    return int.from_bytes(packed(address)) >> (128 - bits) == int.from_bytes(network) >> (128 - bits)


def backend_order(backend: Backend) -> tuple[int, bytes, int, int]:
    """Sort key of backends: family, address, port, state."""
    return (":" in backend.address, packed(backend.address), backend.port, backend.state)


def key_order(key: Key) -> tuple[int, bytes, int, int, int]:
    """Sort key of a table's keys: family, address, port, protocol number, scope (INTERNAL first)."""
    frontend, scope = key
    return (":" in frontend.address, packed(frontend.address), frontend.port, int(frontend.protocol), int(scope))


def _persistent(mapping: Mapping[_K, _V] | None) -> immutables.Map[_K, _V]:
    return mapping if isinstance(mapping, immutables.Map) else immutables.Map(mapping or {})


def _patched(mapping: immutables.Map[_K, _V], changes: Mapping[_K, _V | None] | None) -> immutables.Map[_K, _V]:
    """`mapping` with what `changes` sets, and without what it maps to None."""
    if not changes:
        return mapping
    mutation = mapping.mutate()
    for key, value in changes.items():
        if value is not None:
            mutation[key] = value
        else:
            mutation.pop(key, None)
    return mutation.finish()


_NO_ROWS = object()
"""What all empty tables are the same by."""


class RouteTable(Mapping[Key, Route]):
    """The whole of what this node must do. Every frontend has a row for each scope.

    `owned` are the cluster IPs, each with its Service: whatever port of them has no row is refused. `serving` are the
    endpoints that serve each UDP service port, whatever policies say: a datagram flow to any other is stale. `health`
    are the health checks to answer, by Service and family; `problems` are remarks by Service. Equality is that of rows
    and locality; the others do not count. A table made by `evolve` remembers which keys it changed, so that
    `changed_from(parent)` costs the change.
    """

    __slots__ = ("_base", "_delta", "_moved", "_rows", "_token", "health", "locality", "owned", "problems", "serving")

    def __init__(
        self,
        rows: Mapping[Key, Route] | None = None,
        locality: Locality | None = None,
        problems: Mapping[ServiceName, tuple[Problem, ...]] | None = None,
        health: Mapping[HealthKey, HealthCheck] | None = None,
        owned: Mapping[Address, ServiceName] | None = None,
        serving: Mapping[ServingKey, Serving] | None = None,
    ) -> None:
        self._rows = _persistent(rows)
        self.locality = locality or Locality()
        self.problems = _persistent(problems)
        self.health = _persistent(health)
        self.owned = _persistent(owned)
        self.serving = _persistent(serving)
        self._token = object() if self._rows else _NO_ROWS
        self._base: object | None = None
        self._delta: AbstractSet[Key] = frozenset()
        self._moved: AbstractSet[Address] = frozenset()

    def __getitem__(self, key: Key) -> Route:
        return self._rows[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    @overload
    def get(self, key: Key, /) -> Route | None: ...
    @overload
    def get(self, key: Key, /, default: Route | _T) -> Route | _T: ...
    def get(self, key: Key, /, default: object = None) -> object:
        """As Mapping.get, without the price of an exception for each miss."""
        return self._rows.get(key, default)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RouteTable):
            return NotImplemented
        return self.locality == other.locality and self._rows == other._rows

    __hash__ = None  # type: ignore[assignment]  # as unhashable as the mapping it stands for

    def __repr__(self) -> str:
        return f"RouteTable({len(self._rows)} rows, {self.locality!r})"

    def evolve(
        self,
        put: Mapping[Key, Route],
        drop: Iterable[Key] = (),
        *,
        locality: Locality | None = None,
        problems: Mapping[ServiceName, tuple[Problem, ...]] | None = None,
        health: Mapping[HealthKey, HealthCheck | None] | None = None,
        owned: Mapping[Address, ServiceName | None] | None = None,
        serving: Mapping[ServingKey, Serving | None] | None = None,
    ) -> RouteTable:
        """The next table: `drop` removed (a missing key is no error), then `put` set. Costs the change. Of the others
        what is mapped to None is removed, and problems mapped to () too."""
        delta = dict.fromkeys(put)
        with self._rows.mutate() as rows:
            for key in drop:
                if rows.pop(key, None) is not None:
                    delta[key] = None
            rows.update(put if isinstance(put, dict) else dict(put))  # it would take another mapping's keys for pairs
            fresh = rows.finish()
        remarks = {name: found or None for name, found in problems.items()} if problems else None
        table = RouteTable(
            fresh,
            locality or self.locality,
            _patched(self.problems, remarks),
            _patched(self.health, health),
            _patched(self.owned, owned),
            _patched(self.serving, serving),
        )
        table._base = self._token
        table._delta = delta.keys()
        table._moved = frozenset(owned or ())
        return table

    def changed_from(self, older: RouteTable) -> AbstractSet[Key]:
        """The keys whose rows may differ between `older` and this table (a superset of those that do), in the order of
        `evolve`'s `put` where this table came of `older`: neighbours in memory, which is half of what a row costs."""
        if older._token is self._token:
            return frozenset()
        if self._base is older._token:
            return self._delta
        return frozenset(key for key in {*self._rows, *older._rows} if self._rows.get(key) != older._rows.get(key))

    def owned_changed_from(self, older: RouteTable) -> AbstractSet[Address]:
        """The addresses whose owners may differ between `older` and this table, a superset as `changed_from`."""
        if older.owned is self.owned:
            return frozenset()
        if self._base is older._token is not _NO_ROWS:
            return self._moved
        both = {*self.owned, *older.owned}
        return frozenset(address for address in both if self.owned.get(address) != older.owned.get(address))

    def ordered(self) -> list[tuple[Key, Route]]:
        """All rows in the order of `dump`."""
        return [(key, self._rows[key]) for key in sorted(self._rows, key=key_order)]
