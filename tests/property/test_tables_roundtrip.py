"""What is packed into rows reads back as it was."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.dataplane.bpf.locality import NodeFacts, pack_settings, pack_sources, unpack_facts, unpack_locality
from ebpflb.dataplane.bpf.tables import (
    pack_backend,
    pack_frontend,
    pack_name,
    pack_ranges,
    unpack_backend,
    unpack_frontend,
    unpack_name,
    unpack_ranges,
)
from ebpflb.dataplane.bpf.writer import Writer
from ebpflb.model import Protocol
from ebpflb.routes import (
    Backend,
    BackendState,
    Frontend,
    Locality,
    RouteTable,
    ServicePortName,
    address_order,
    cidr_order,
    packed,
    unpacked,
)
from tests.maps import FakeMaps
from tests.tables import FACTS, tables

PORTS = st.integers(1, 65535)
ADDRESSES = st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda address: unpacked(address.packed)))
CIDRS = st.one_of(
    st.builds(lambda address, bits: _masked(packed(str(address)), bits + 96), st.ip_addresses(v=4), st.integers(0, 32)),
    st.builds(lambda address, bits: _masked(address.packed, bits), st.ip_addresses(v=6), st.integers(0, 128)),
)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=63)


def _masked(address: bytes, bits: int) -> str:
    value = int.from_bytes(address) >> (128 - bits) << (128 - bits)
    text = unpacked(value.to_bytes(16))
    return f"{text}/{bits}" if ":" in text else f"{text}/{bits - 96}"


@given(ADDRESSES, PORTS, st.sampled_from(Protocol))
def test_frontend(address: str, port: int, protocol: Protocol) -> None:
    """Invariant: a frontend's key says the frontend."""
    frontend = Frontend(address, port, protocol)
    assert unpack_frontend(pack_frontend(frontend)) == frontend


@given(ADDRESSES, PORTS, st.integers(0, 65535), st.sampled_from(BackendState), st.integers(1, 2**32 - 1))
def test_backend(address: str, port: int, weight: int, state: BackendState, service: int) -> None:
    """Invariant: a backend's row says the backend and whose it is."""
    backend = Backend(address, port, weight, state)
    assert unpack_backend(pack_backend(backend, state, service)) == (backend, service)


@given(NAMES, NAMES, st.one_of(st.just(""), NAMES))
def test_name(namespace: str, name: str, port: str) -> None:
    """Invariant: a name's row says the name, of any length that Kubernetes allows."""
    row = pack_name(ServicePortName(namespace, name, port))
    assert row is not None
    assert unpack_name(row) == ServicePortName(namespace, name, port)


@given(st.dictionaries(st.integers(1, 5), st.sets(CIDRS, min_size=1, max_size=5)))
def test_ranges(sets: dict[int, set[str]]) -> None:
    """Invariant: the rows of any sets of source ranges say the sets, whatever order the kernel gives them in."""
    canonical = {id: tuple(sorted(cidrs, key=cidr_order)) for id, cidrs in sets.items()}
    keys = sorted((key for id, cidrs in canonical.items() for key in pack_ranges(id, cidrs)), key=lambda key: key[::-1])
    assert unpack_ranges(b"".join(keys)) == canonical


@given(st.sets(ADDRESSES, max_size=6), st.sets(CIDRS, max_size=6), st.sampled_from(("", "cni0", "cali*", "*")))
def test_locality(nodes: set[str], cidrs: set[str], interface: str) -> None:
    """Invariant: the rows of sources and settings say the locality, however its prefixes lie in each other."""
    locality = Locality(tuple(sorted(nodes, key=address_order)), tuple(sorted(cidrs, key=cidr_order)), interface)
    rows = pack_sources(locality)
    assert unpack_locality(b"".join(rows), b"".join(rows.values()), pack_settings(FACTS, locality)) == locality


@given(
    st.builds(
        NodeFacts,
        *(st.integers(0, 2**64 - 1) for _ in range(3)),
        *(st.integers(0, 2**16 - 1) for _ in range(2)),
    )
)
def test_facts(known: NodeFacts) -> None:
    """Invariant: the settings say the node's facts."""
    assert unpack_facts(pack_settings(known, Locality()))[0] == known


@given(tables())
def test_table(routes: RouteTable) -> None:
    """Invariant: what was synced is what is read back: state() == routes, and a second sync writes nothing."""
    maps = FakeMaps()
    writer = Writer(maps, FACTS, time.monotonic)
    assert writer.sync(routes).complete
    assert writer.state() == routes and writer.state().owned == routes.owned
    writes = maps.writes
    assert writer.sync(RouteTable(dict(routes), routes.locality, owned=routes.owned)).complete
    assert maps.writes == writes
