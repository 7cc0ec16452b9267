"""Small worlds of routes for the tests of tables: Hypothesis strategies, and a reader of rows of its own.

Rules of this file: `interpret` reads the rows of fake maps from the layouts alone, as the programs would, and shares
nothing with the code under test but the layouts; it knows only what a program can look up.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from functools import lru_cache

from hypothesis import strategies as st

from ebpflb.dataplane.bpf.fields import fields
from ebpflb.dataplane.bpf.layouts import (
    AFFINITY_KEY,
    BACKEND,
    LAYOUT,
    MEMBER_KEY,
    SETTINGS,
    TABLE_KEY,
    TABLE_PART,
    U32,
    U64,
)
from ebpflb.dataplane.bpf.locality import NodeFacts
from ebpflb.model import Address, Protocol, ServiceName
from ebpflb.routes import (
    Algorithm,
    Backend,
    BackendState,
    Frontend,
    Key,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
    backend_order,
)
from tests.maps import FakeMaps
from tests.tracers.bpf import bit_of, is_known

FACTS = NodeFacts(netns=4026531840, flow_idle=120 * 250, refresh=250, snat_low=1024, snat_high=32767)

ADDRESSES = {4: ("172.30.0.41", "172.30.0.42", "192.168.0.2"), 6: ("fd00:30::41", "::1", "2001:db8::2")}
PODS = {4: tuple(f"10.180.0.{at}" for at in range(1, 6)), 6: tuple(f"fd00:10::{at:x}" for at in range(1, 6))}
CIDRS: dict[int, tuple[tuple[str, ...], ...]] = {
    4: ((), ("203.0.113.0/24",), ("0.0.0.0/0",), ("10.0.0.0/8", "203.0.113.7/32")),
    6: ((), ("2001:db8::/32",), ("::/0",), ("::/0", "fd00::/8", "fd00::1/128")),
}
SERVICES = tuple(
    ServicePortName(namespace, name, port)
    for namespace, name in (("default", "web"), ("default", "db"), ("kube-system", "dns"))
    for port in ("", "p")
)

LOCALITIES = st.sampled_from(
    (
        Locality(),
        Locality(("127.0.0.1", "192.168.0.2", "::1"), ("10.180.0.0/24",)),
        Locality(("10.180.0.1", "192.168.0.2"), ("10.180.0.0/16", "10.180.0.0/24"), "cali*"),
        Locality(("::1", "2001:db8::2"), ("0.0.0.0/0", "::/0"), "cni0"),
        Locality(("10.180.0.1",), ("10.180.0.1/32", "::/1"), "*"),
    )
)


@st.composite
def frontends(draw: st.DrawFn) -> Frontend:
    version = draw(st.sampled_from((4, 6)))
    address = draw(st.sampled_from(ADDRESSES[version]))
    return Frontend(address, draw(st.sampled_from((53, 80))), draw(st.sampled_from((Protocol.TCP, Protocol.UDP))))


@st.composite
def backend_sets(draw: st.DrawFn, version: int) -> tuple[Backend, ...]:
    """One to five backends, at least one of them active, in order."""
    addresses = draw(st.lists(st.sampled_from(PODS[version]), min_size=1, max_size=5, unique=True))
    draining = draw(st.integers(0, 2 ** (len(addresses) - 1) - 1))
    weight = draw(st.sampled_from((1, 1, 7)))
    made = (
        Backend(address, 8080, weight, BackendState.DRAINING if draining >> at & 1 else BackendState.ACTIVE)
        for at, address in enumerate(addresses)
    )
    return tuple(sorted(made, key=backend_order))


@st.composite
def halves(draw: st.DrawFn, service: ServicePortName, version: int) -> Route:
    """A route of one scope."""
    kind = draw(st.sampled_from(Kind))
    verdict = draw(st.sampled_from((Verdict.FORWARD, Verdict.FORWARD, Verdict.FORWARD, Verdict.REJECT, Verdict.DROP)))
    cidrs = draw(st.sampled_from(CIDRS[version]))
    if verdict != Verdict.FORWARD:
        return Route(service, kind, verdict, source_ranges=cidrs)
    return Route(
        service,
        kind,
        verdict,
        draw(backend_sets(version)),
        draw(st.sampled_from(Masquerade)),
        draw(st.sampled_from((0, 10800))),
        cidrs,
        draw(st.sampled_from(Algorithm)),
    )


@st.composite
def rows(draw: st.DrawFn) -> dict[Key, Route]:
    """Both scopes of one frontend, the same backends for both as often as not."""
    frontend = draw(frontends())
    version = 6 if ":" in frontend.address else 4
    service = draw(st.sampled_from(SERVICES))
    internal = draw(halves(service, version))
    external = internal if draw(st.booleans()) else draw(halves(service, version))
    return {(frontend, Scope.INTERNAL): internal, (frontend, Scope.EXTERNAL): external}


def owners() -> st.SearchStrategy[dict[Address, ServiceName]]:
    """Who owns which cluster IP; with and without frontends there."""
    addresses = st.sampled_from((*ADDRESSES[4], *ADDRESSES[6], "172.30.0.99"))
    return st.dictionaries(addresses, st.sampled_from([each.service for each in SERVICES]), max_size=3)


@st.composite
def tables(draw: st.DrawFn) -> RouteTable:
    """A few frontends with a locality, and some cluster IPs."""
    merged: dict[Key, Route] = {}
    for some in draw(st.lists(rows(), max_size=6)):
        merged |= some
    return RouteTable(merged, draw(LOCALITIES), owned=draw(owners()))


SIZES = (0, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
"""`table_size` of bpf/maglev.h."""


def known_bits(maps: FakeMaps) -> Iterator[int]:
    """The bits that are set."""
    for key, value in maps.tables["known"].items():
        (cell,) = U64.unpack(value)
        yield from (U32.unpack(key)[0] * 64 + bit for bit in range(64) if cell >> bit & 1)


def interpret(maps: FakeMaps) -> dict[tuple[bytes, int], object]:
    """What each frontend's row leads to, by (key, scope): all that a program could look up, in plain values.

    Fails where a row refers to something that is not there, or is another Service's.
    """
    found: dict[tuple[bytes, int], object] = {}
    for address in maps.tables["owned"]:
        assert is_known(maps.tables["known"], address), "nobody looks whose address this is"
    for key, value in maps.tables["frontends"].items():
        assert is_known(maps.tables["known"], key), "nobody looks for this frontend"
        decoded = fields("frontend", value)
        assert isinstance(decoded, dict)
        for scope, half in enumerate(decoded["scope"]):
            found[key, scope] = _follow(maps, half)
    return found


def _follow(maps: FakeMaps, half: Mapping[str, int]) -> object:
    if not half["service"]:
        assert not any(half.values()), "a scope without a service says something"
        return None
    name = maps.tables["names"].get(U32.pack(half["service"]))
    assert name is not None, f"service {half['service']} has no name"
    backends = []
    for slot in range(half["slots"], half["slots"] + half["count"] + half["draining"]):
        content = maps.tables["slots"].get(U32.pack(slot))
        assert content is not None, f"slot {slot} was never written"
        row = maps.tables["backends"].get(content)
        assert row is not None and content != U32.pack(0), f"backend {U32.unpack(content)} was never written"
        address, port, weight, state, service = BACKEND.unpack(row)
        assert state in (0, 1), f"backend {U32.unpack(content)} is free"
        assert service == half["service"], f"backend {U32.unpack(content)} is of service {service}"
        backends.append((address, port, weight, slot < half["slots"] + half["count"]))
    assert half["verdict"] != Verdict.FORWARD or half["count"], "nobody to forward to"
    ranges = {key for key in maps.tables["ranges"] if U32.unpack(key[4:8])[0] == half["ranges"]}
    assert not half["ranges"] or ranges, f"ranges {half['ranges']} are nowhere"
    places = _places(maps, half)
    if half["affinity"]:
        for at, slot in enumerate(range(half["slots"], half["slots"] + half["count"])):
            member = maps.tables["members"].get(U32.pack(half["slots"]) + maps.tables["slots"][U32.pack(slot)])
            assert member == U32.pack(at), f"clients of the backend in slot {slot} do not find it again"
    plain = {field: number for field, number in half.items() if field not in ("service", "slots", "ranges")}
    return plain, name, tuple(backends), frozenset(key[:4] + key[8:] for key in ranges), places


def _parts(table: int) -> int:
    return -(-SIZES[table] // TABLE_PART)


def _places(maps: FakeMaps, half: Mapping[str, int]) -> bytes:
    """The table of consistent hashing that a route names, which is whole."""
    size = SIZES[half["table"]]
    parts = [maps.tables["tables"].get(TABLE_KEY.pack(half["slots"], at)) for at in range(_parts(half["table"]))]
    whole = b""
    for at, part in enumerate(parts):
        assert part is not None, f"part {at} of the table of slot {half['slots']} is not there"
        whole += part
    assert not whole[2 * size :].strip(b"\0"), "the last part is not padded"
    assert _within(whole[: 2 * size], half["count"]), f"the table of slot {half['slots']} names others"
    return whole


@lru_cache(maxsize=1 << 10)
def _within(places: bytes, count: int) -> bool:
    """Whether all places name one of so many backends, and each is named."""
    return not places or set(array("H", places)) == set(range(count))


def left_over(maps: FakeMaps) -> list[str]:
    """Rows that no frontend leads to, and bits of addresses that none has."""
    halves: list[Mapping[str, int]] = []
    for value in maps.tables["frontends"].values():
        decoded = fields("frontend", value)
        assert isinstance(decoded, dict)
        halves += decoded["scope"]
    used = {
        maps.tables["slots"][U32.pack(slot)]
        for half in halves
        for slot in range(half["slots"], half["slots"] + half["count"] + half["draining"])
    }
    live = {key for key, row in maps.tables["backends"].items() if BACKEND.unpack(row)[3] != 255}
    names = set(maps.tables["names"]) - {U32.pack(half["service"]) for half in halves}
    ranges = {key[4:8] for key in maps.tables["ranges"]} - {U32.pack(half["ranges"]) for half in halves}
    hashed = {half["slots"]: half["table"] for half in halves if half["table"]}
    kept = {half["slots"]: half["count"] for half in halves if half["affinity"] and half["count"]}
    parts = {TABLE_KEY.pack(slots, at) for slots, table in hashed.items() for at in range(_parts(table))}
    members = {
        MEMBER_KEY.pack(slots, *U32.unpack(maps.tables["slots"][U32.pack(slots + at)]))
        for slots, count in kept.items()
        for at in range(count)
    }
    here = {key[:16] for key in (*maps.tables["frontends"], *maps.tables["owned"])}
    keeping = {half["service"] for half in halves if half["affinity"]}
    return [
        *(f"part {key!r}" for key in maps.tables["tables"].keys() - parts),
        *(f"member {key!r}" for key in maps.tables["members"].keys() - members),
        *(f"bit {bit}" for bit in set(known_bits(maps)) - {bit_of(address) for address in here}),
        *(f"client {key!r}" for key in maps.tables["affinity"] if AFFINITY_KEY.unpack(key)[1] not in keeping),
        *(f"backend {key!r}" for key in live - used),
        *(f"name {key!r}" for key in names),
        *(f"ranges {key!r}" for key in ranges),
    ]


def settings_of(maps: FakeMaps) -> tuple[int, ...]:
    """The settings row's numbers, layout checked."""
    row = SETTINGS.unpack(maps.tables["settings"][U32.pack(0)])
    assert row[3] == LAYOUT
    return row
