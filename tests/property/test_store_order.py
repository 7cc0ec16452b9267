"""Properties of the store: what counts is the last word about each object, however it came.

The world is small on purpose: few names, so that slices move between Services and objects go and come back.
"""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.model import Endpoint, EndpointSlice, Family, Node, ServiceName, Snapshot
from ebpflb.source import (
    DropNode,
    DropService,
    DropSlice,
    Event,
    LocalAddresses,
    PutNode,
    PutService,
    PutSlice,
    Synced,
)
from ebpflb.source.store import Store
from tests.world import service, slice_port

SERVICES = [ServiceName("ns1", name) for name in ("a", "b", "c")]
SLICES = [ServiceName("ns1", f"slice-{number}") for number in range(4)]
IPS = ["172.30.0.1", "172.30.0.2"]
PODS = [Endpoint(f"10.0.1.{number}") for number in range(3)]

services = st.builds(lambda name, ip: service(str(name), ip), st.sampled_from(SERVICES), st.sampled_from(IPS))
slices = st.builds(
    lambda name, owner, pods: EndpointSlice(name, owner, Family.IPV4, (slice_port(),), tuple(pods)),
    st.sampled_from(SLICES),
    st.sampled_from(SERVICES),
    st.lists(st.sampled_from(PODS), unique_by=lambda each: each.address),
)
nodes = st.builds(
    lambda name, zone, primary, leaving: Node(name, (), primary, zone, known=True, deleting=leaving),
    st.sampled_from(["node1", "node2"]),
    st.sampled_from(["", "zone-a"]),
    st.sampled_from([(), ("192.168.0.2",)]),
    st.booleans(),
)
locals_ = st.sampled_from([LocalAddresses((), ()), LocalAddresses(("127.0.0.1", "192.168.0.3"), ("192.168.0.3",))])
events: st.SearchStrategy[Event] = st.one_of(
    services.map(PutService),
    st.sampled_from(SERVICES).map(DropService),
    slices.map(PutSlice),
    st.sampled_from(SLICES).map(DropSlice),
    nodes.map(PutNode),
    st.just(DropNode()),
    locals_,
)
histories = st.lists(events, max_size=25)


def subject(event: Event) -> object:
    """What an event is about; events about different things may come in any order."""
    match event:
        case PutService(service=said):
            return ("service", said.name)
        case DropService(name=name):
            return ("service", name)
        case PutSlice(slice=found):
            return ("slice", found.name)
        case DropSlice(name=name):
            return ("slice", name)
        case PutNode() | DropNode():
            return "node"
        case _:
            return type(event).__name__


def store(*said: Event) -> Store:
    made = Store("node1", ("api",))
    for event in said:
        made.apply(event)
    return made


def from_scratch(history: Iterable[Event]) -> Snapshot:
    """A Snapshot of the last word about each object alone, put together without the store."""
    last: dict[object, Event] = {}
    for event in history:
        if not (isinstance(event, PutNode) and event.node.name != "node1"):
            last[subject(event)] = event
    made = Store("node1", ())
    for event in last.values():
        if not isinstance(event, DropService | DropSlice | DropNode):
            made.apply(event)
    return made.snapshot()


@given(histories, st.data())
def test_order_among_objects(history: list[Event], data: st.DataObject) -> None:
    """Invariant: any interleaving that keeps each object's own order gives the same Snapshot."""
    queues: dict[object, list[Event]] = {}
    for event in history:
        queues.setdefault(subject(event), []).append(event)
    order = data.draw(st.permutations([key for key, queue in queues.items() for _ in queue]))
    iterators = {key: iter(queue) for key, queue in queues.items()}
    assert store(*(next(iterators[key]) for key in order)).snapshot() == store(*history).snapshot()


@given(histories)
def test_the_last_word_counts(history: list[Event]) -> None:
    """Invariant: a history leaves what its last words alone would have made."""
    assert store(*history).snapshot() == from_scratch(history)


@given(histories, st.sets(st.integers(0, 24)))
def test_taking_does_not_matter(history: list[Event], when: set[int]) -> None:
    """Invariant: how a history is cut into Snapshots does not change the last one."""
    made = store(Synced("api"))
    for index, event in enumerate(history):
        made.apply(event)
        if index in when:
            made.take()
    assert made.snapshot() == store(*history).snapshot()


@given(histories, histories)
def test_touched_covers_what_differs(before: list[Event], after: list[Event]) -> None:
    """Invariant: a Service whose own objects differ between two Snapshots is touched; nothing new is no Change; a Node
    that differs in what routes look at touches everything."""
    made = store(*before, Synced("api"))
    first = made.take()
    assert first is not None and first.touched is None
    old = first.snapshot
    news = [made.apply(event) for event in after]
    change = made.take()
    new = made.snapshot()
    if change is None:
        assert not any(news)
        assert new == old
        return
    assert change.snapshot == new
    if change.touched is None:
        return
    for name in SERVICES:
        if old.services.get(name) != new.services.get(name) or old.slices.get(name) != new.slices.get(name):
            assert name in change.touched
    assert (old.node.zone, old.node.addresses, old.node.primary) == (
        new.node.zone,
        new.node.addresses,
        new.node.primary,
    )


@given(histories)
def test_repetition_is_no_news(history: list[Event]) -> None:
    """Invariant: what is in force already, said again, changes and touches nothing."""
    made = store(*history, Synced("api"))
    made.take()
    snapshot = made.snapshot()
    for said in snapshot.services.values():
        assert made.apply(PutService(said)) is False
    for slices_of_one in snapshot.slices.values():
        for found in slices_of_one:
            assert made.apply(PutSlice(found)) is False
    assert made.take() is None
