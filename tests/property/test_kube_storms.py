"""Properties of lists and watches: whatever a server and a network do, the end is what a fresh list says.

The world is small on purpose: few names, so that objects go and come back, enter and leave the selectors, while faults
hit lists, pages, look-ups and watches at any line. No thread and no wait: each round of a kind is one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpflb.model import ServiceName, Snapshot
from ebpflb.source import Event, PutNode, PutService, PutSlice
from ebpflb.source.kube import decode
from ebpflb.source.kube.listwatch import ListWatch
from ebpflb.source.kube.outbox import Outbox
from ebpflb.source.store import Store
from tests.kubeapi import ApiServer, Clock, Fault, ModelClient, Object, event, node, service, slice_

KINDS = {kind.resource: kind for kind in (decode.SERVICES, decode.SLICES, decode.node("node1"))}
KEPT = ServiceName("ns", "kept")


class Never:
    """Nobody closes the source, and no wait takes time."""

    def wait(self, timeout: float) -> bool:
        return False

    def is_set(self) -> bool:
        return False


class World:
    """A server, and the three kinds that are followed into a store."""

    def __init__(self, server: ApiServer, *, page: int) -> None:
        self.server = server
        self.outbox = Outbox("kubernetes", KINDS.values())
        self.store = Store("node1", ["kubernetes"])
        client = ModelClient(server, page=page)
        self.watches = {
            resource: ListWatch(kind, client, self.outbox, stop=Never(), clock=server.clock, random=lambda: 0.5)
            for resource, kind in KINDS.items()
        }
        server.put("services", service("kept"))
        server.put("endpointslices", slice_("kept-1", "kept", "10.0.1.1"))
        self.backup = copy.deepcopy(server.objects)

    def round(self, resource: str) -> None:
        pause = self.watches[resource].attempt()
        self.server.clock.now += pause
        for said in self.outbox.take():
            self.store.apply(said)
            # Invariant: what nobody touched is never lost once it was known, not even for a moment.
            if self.store.synced:
                snapshot = self.store.snapshot()
                assert KEPT in snapshot.services
                assert snapshot.slices.get(KEPT)

    def settle(self) -> None:
        """Until nothing more goes wrong, and then as many rounds as any way back takes."""
        for resource, watch in self.watches.items():
            while self.server.faults[resource] or self.server.meanwhile:
                self.round(resource)
            for _ in range(4):
                self.round(resource)
            assert watch.doing.listed

    def fresh(self) -> Snapshot:
        """What a new list says now."""
        store = Store("node1", [])
        for resource, kind in KINDS.items():
            query = {"labelSelector": kind.labels, "fieldSelector": kind.fields}
            for obj in self.server.matching(resource, query):
                said = decode.line(kind, event("ADDED", obj))
                assert isinstance(said, decode.Change) and said.said.event is not None
                store.apply(said.said.event)
        return store.snapshot()


# ---- What happens ----

Act = Callable[[World], None]


def put(resource: str, obj: Object) -> Act:
    return lambda world: world.server.put(resource, obj)


def delete(resource: str, key: str) -> Act:
    return lambda world: world.server.delete(resource, key)


def compact(world: World) -> None:
    world.server.compact()


def back_up(world: World) -> None:
    world.backup = copy.deepcopy(world.server.objects)


def restore(world: World) -> None:
    world.server.restore(world.backup)


def remember(world: World) -> None:
    """What an earlier run saved: all of it as it was at the last backup."""
    saved: dict[str, list[tuple[ServiceName, Event]]] = {}
    for resource, kind in KINDS.items():
        for obj in world.backup[resource].values():
            found = decode.line(kind, event("ADDED", obj))
            assert isinstance(found, decode.Change) and found.said.name and found.said.event
            if isinstance(found.said.event, PutService | PutSlice | PutNode):
                saved.setdefault(resource, []).append((found.said.name, found.said.event))
    world.outbox.remember(1.0, saved)


def meanwhile(act: Act) -> Act:
    return lambda world: world.server.meanwhile.append(partial(act, world))


names = st.sampled_from(["a", "b", "c"])
pods = st.lists(st.sampled_from(["10.0.1.1", "10.0.1.2", "10.0.2.1"]), unique=True)
ips = st.sampled_from(["172.30.0.1", "172.30.0.2", "None", ""])
services = st.builds(service, names, ips)
foreign = st.builds(
    lambda obj: {**obj, "metadata": {**obj["metadata"], "labels": {"service.kubernetes.io/service-proxy-name": "x"}}},
    services,
)
slices = st.builds(
    lambda name, owner, pods, labels: slice_(name, owner, *pods, labels=labels),
    st.builds(lambda name: f"slice-{name}", names),
    names,
    pods,
    st.sampled_from([{}, {}, {"service.kubernetes.io/headless": ""}]),
)
nodes = st.builds(node, st.sampled_from(["node1", "node2"]), st.sampled_from(["zone-a", "zone-b"]))
writes: st.SearchStrategy[Act] = st.one_of(
    st.builds(put, st.just("services"), services | foreign),
    st.builds(put, st.just("endpointslices"), slices),
    st.builds(put, st.just("nodes"), nodes),
    st.builds(delete, st.just("services"), names.map(lambda name: f"ns/{name}")),
    st.builds(delete, st.just("endpointslices"), names.map(lambda name: f"ns/slice-{name}")),
    st.builds(delete, st.just("nodes"), st.just("node1")),
)
ends = st.sampled_from([compact, back_up, restore, remember])
faults = st.one_of(
    st.builds(
        Fault,
        st.sampled_from(["cut", "half", "garbage", "hang", "end", "again", "old", "odd", "down"]),
        st.integers(0, 4),
    ),
    st.builds(
        Fault, st.sampled_from(["refuse", "error"]), st.integers(0, 4), st.sampled_from([410, 429, 500, 503, 401, 403])
    ),
    st.builds(Fault, st.just("refuse"), st.just(0), st.sampled_from([400, 422])),
)


def fault(resource: str, wrong: Fault) -> Act:
    return lambda world: world.server.fault(resource, wrong)


def rounds(resource: str) -> Act:
    return lambda world: world.round(resource)


resources = st.sampled_from([*KINDS, "services", "endpointslices"])
acts: st.SearchStrategy[Act] = st.one_of(
    writes, writes.map(meanwhile), ends, ends.map(meanwhile), st.builds(fault, resources, faults),
    st.builds(rounds, resources),
)  # fmt: skip


def weather(world: World, storm: list[Act]) -> None:
    for act in storm:
        act(world)
    world.settle()
    assert world.store.synced
    assert world.store.snapshot() == world.fresh()
    world.outbox.close()


worlds = st.builds(
    lambda streams, fields, page: World(ApiServer(Clock(), streams, fields), page=page),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 500]),
)


@given(worlds, st.lists(acts, max_size=40))
def test_after_any_storm_the_store_is_what_a_fresh_list_says(world: World, storm: list[Act]) -> None:
    """Invariant: no object was lost or kept."""
    weather(world, storm)


@pytest.mark.fuzz
@settings(max_examples=3000)
@given(worlds, st.lists(acts, max_size=80))
def test_after_any_long_storm_too(world: World, storm: list[Act]) -> None:
    weather(world, storm)
