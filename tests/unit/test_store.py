"""Events to Snapshots: who is asked for what, what a change touches, and that equal news is no news."""

from __future__ import annotations

import msgspec
import pytest

from ebpflb.model import EndpointSlice, Node, Service, ServiceName
from ebpflb.source import (
    DropNode,
    DropService,
    DropSlice,
    Event,
    LocalAddresses,
    PutNode,
    PutService,
    PutSlice,
    Remembered,
    Synced,
)
from ebpflb.source.store import Change, Store
from tests.world import endpoint_slice, node, service

WEB, DB = ServiceName("ns1", "web"), ServiceName("ns1", "db")
LOCAL = LocalAddresses(("127.0.0.1", "192.168.0.2", "::1"), ("192.168.0.2",))


def web(ip: str = "172.30.0.41") -> Service:
    return service("ns1/web", ip)


def slice_of(owner: str, *addresses: str, name: str = "s") -> EndpointSlice:
    return endpoint_slice(*addresses, of=owner, name=name)


def store(*events: Event, sources: tuple[str, ...] = ("api",)) -> Store:
    """A store that has heard `events` and that its sources are complete, and has given out that much."""
    made = Store("node1", sources)
    for event in (*events, *map(Synced, sources)):
        made.apply(event)
    made.take()
    return made


def change(made: Store, *events: Event) -> Change | None:
    for event in events:
        made.apply(event)
    return made.take()


# ---- When ----


def test_nothing_before_every_source_is_complete() -> None:
    made = Store("node1", ("api", "local"))
    for event in (PutService(web()), LOCAL, Synced("local")):
        made.apply(event)
        assert made.take() is None
        assert not made.synced
    made.apply(Synced("api"))
    assert made.synced
    first = made.take()
    assert first is not None and first.touched is None
    assert dict(first.snapshot.services) == {WEB: web()}


def test_an_empty_cluster_is_said_too() -> None:
    first = change(Store("node1", ("api",)), Synced("api"))
    assert first is not None and first.touched is None and not first.snapshot.services


def test_without_sources_the_first_take_is_complete() -> None:
    assert Store("node1", ()).take() is not None


def test_a_strange_source_completes_nothing() -> None:
    made = Store("node1", ("api",))
    made.apply(Synced("other"))
    assert not made.synced


def test_synced_again_is_no_news() -> None:
    assert change(store(), Synced("api")) is None


def test_nothing_new() -> None:
    assert store(PutService(web())).take() is None


# ---- What a change touches ----

STARTED: tuple[Event, ...] = (
    PutService(web()),
    PutService(service("ns1/db", "172.30.0.42")),
    PutSlice(slice_of("ns1/web", "10.0.1.1")),
    PutNode(node()),
    LOCAL,
)
TOUCHES: dict[str, tuple[Event, frozenset[ServiceName] | None]] = {
    "a new Service": (PutService(service("ns1/new")), frozenset({ServiceName("ns1", "new")})),
    "a changed Service": (PutService(web("172.30.0.9")), frozenset({WEB})),
    "a Service gone": (DropService(WEB), frozenset({WEB})),
    "a changed slice": (PutSlice(slice_of("ns1/web", "10.0.1.2")), frozenset({WEB})),
    "another slice": (PutSlice(slice_of("ns1/web", "10.0.1.2", name="t")), frozenset({WEB})),
    "a slice gone": (DropSlice(ServiceName("ns1", "s")), frozenset({WEB})),
    "a slice moved": (PutSlice(slice_of("ns1/db", "10.0.1.1")), frozenset({WEB, DB})),
    "a slice of nobody": (
        PutSlice(slice_of("ns1/later", "10.0.9.9", name="l")),
        frozenset({ServiceName("ns1", "later")}),
    ),
    "the node's zone": (PutNode(node(zone="zone-b")), None),
    "the node's addresses": (LocalAddresses((*LOCAL.addresses, "10.0.0.1"), LOCAL.primary), None),
    "the node leaving": (PutNode(msgspec.structs.replace(node(), deleting=True)), frozenset()),
    "the node's object gone": (DropNode(), None),
}


@pytest.mark.parametrize("case", TOUCHES)
def test_touches(case: str) -> None:
    event, expected = TOUCHES[case]
    found = change(store(*STARTED), event)
    assert found is not None
    assert found.touched == expected


NO_NEWS: dict[str, Event] = {
    "an equal Service": PutService(web()),
    "an equal slice": PutSlice(slice_of("ns1/web", "10.0.1.1")),
    "a Service that was not there": DropService(ServiceName("ns1", "ghost")),
    "a slice that was not there": DropSlice(ServiceName("ns1", "ghost")),
    "an equal Node": PutNode(node()),
    "another node's Node": PutNode(node("node2", zone="zone-b")),
    "equal addresses": LocalAddresses(LOCAL.addresses, LOCAL.primary),
}


@pytest.mark.parametrize("case", NO_NEWS)
def test_no_news(case: str) -> None:
    made = store(*STARTED)
    assert made.apply(NO_NEWS[case]) is False
    assert made.take() is None


def test_changes_gather_until_they_are_taken() -> None:
    found = change(store(*STARTED), PutService(web("172.30.0.9")), DropService(DB))
    assert found is not None and found.touched == frozenset({WEB, DB})


# ---- What is in it ----


def test_slices_are_sorted_by_name_and_one_is_one() -> None:
    found = change(
        store(),
        PutSlice(slice_of("ns1/web", "10.0.1.3", name="c")),
        PutSlice(slice_of("ns1/web", "10.0.1.1", name="a")),
        PutSlice(slice_of("ns1/web", "10.0.1.2", name="b")),
        PutSlice(slice_of("ns1/web", "10.0.1.9", name="b")),
    )
    assert found is not None
    addresses = [each.endpoints[0].address for each in found.snapshot.slices[WEB]]
    assert addresses == ["10.0.1.1", "10.0.1.9", "10.0.1.3"]


def test_a_moved_slice_is_in_one_place() -> None:
    found = change(store(*STARTED), PutSlice(slice_of("ns1/db", "10.0.1.1")))
    assert found is not None
    assert set(found.snapshot.slices) == {DB}


def test_a_slice_of_the_same_name_in_another_namespace_is_another() -> None:
    found = change(store(*STARTED), PutSlice(slice_of("ns2/web", "10.0.1.1")))
    assert found is not None
    assert set(found.snapshot.slices) == {WEB, ServiceName("ns2", "web")}


def test_a_taken_snapshot_does_not_change() -> None:
    made = store(*STARTED)
    before = made.snapshot()
    made.apply(DropService(WEB))
    made.apply(DropSlice(ServiceName("ns1", "s")))
    assert WEB in before.services and WEB in before.slices
    assert WEB not in made.snapshot().services


# ---- The node ----


def node_after(*events: Event) -> Node:
    return store(*events).snapshot().node


def test_no_node_object() -> None:
    assert node_after(LOCAL) == Node("node1", LOCAL.addresses, LOCAL.primary)


def test_the_node_object_says_which_addresses_are_the_main_ones() -> None:
    said = PutNode(node(addresses=(), primary=("fd00::2", "192.168.0.9")))
    expected = node(addresses=LOCAL.addresses, primary=("fd00::2", "192.168.0.9"))
    assert node_after(LOCAL, said) == expected
    assert node_after(said, LOCAL) == expected


def test_a_node_object_without_addresses() -> None:
    assert node_after(PutNode(node(addresses=(), primary=())), LOCAL).primary == LOCAL.primary


def test_the_node_object_goes_and_the_kernel_stays() -> None:
    assert node_after(PutNode(node()), LOCAL, DropNode()) == Node("node1", LOCAL.addresses, LOCAL.primary)


# ---- What is remembered of an earlier run ----


def test_what_is_remembered_may_be_served_until_the_truth_comes() -> None:
    made = Store("node1", ("api", "local"))
    for event in (PutService(web()), PutSlice(slice_of("ns1/web", "10.0.1.1")), LOCAL, Synced("local")):
        made.apply(event)
    assert not made.ready and made.take() is None
    assert made.apply(Remembered("api", 1000.0))
    assert made.ready and not made.synced
    assert made.remembered == 1000.0
    first = made.take()
    assert first is not None and set(first.snapshot.services) == {WEB}
    live = change(made, DropService(WEB), PutService(service("ns1/db", "172.30.0.42")), Synced("api"))
    assert made.synced and made.remembered is None
    assert live is not None and set(live.snapshot.services) == {DB}


def test_the_truth_is_news_even_where_it_is_what_was_remembered() -> None:
    """Somebody waits to take away what it lacks."""
    made = Store("node1", ("api",))
    made.apply(PutService(web()))
    made.apply(Remembered("api", 1000.0))
    made.take()
    assert not made.apply(PutService(web()))
    assert made.apply(Synced("api"))


def test_the_oldest_of_what_is_remembered_counts() -> None:
    made = Store("node1", ("api", "cloud"))
    made.apply(Remembered("api", 1000.0))
    assert not made.ready
    made.apply(Remembered("cloud", 900.0))
    assert made.ready and made.remembered == 900.0
    made.apply(Synced("cloud"))
    assert made.remembered == 1000.0


def test_a_memory_that_comes_after_the_truth_says_nothing() -> None:
    made = store(PutService(web()))
    assert not made.apply(Remembered("api", 1000.0))
    assert made.remembered is None
