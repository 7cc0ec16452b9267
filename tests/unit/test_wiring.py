"""The store and the policy behind each other: what the daemon's loop is given as "desired"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ebpflb.commands.daemon import run_daemon
from ebpflb.commands.look import compare
from ebpflb.config.options import Options, configure
from ebpflb.model import ProxyOptions, ServiceName, Snapshot
from ebpflb.output import Format
from ebpflb.policy import Router
from ebpflb.policy import routes as routes_from_scratch
from ebpflb.routes import RouteTable
from ebpflb.source import DropService, LocalAddresses, PutService, PutSlice, Synced
from ebpflb.source.manifests import ManifestSource
from ebpflb.wiring import Intent
from tests.fakes import World
from tests.world import NODE_IP, endpoint_slice, options, service, snapshot

ADDRESSES = LocalAddresses(("127.0.0.1", NODE_IP), (NODE_IP,))


def intent(make_router: Callable[[], Router] = Router) -> Intent:
    made = Intent("node1", options(), ("manifests", "addresses"), make_router)
    for event in (ADDRESSES, Synced("addresses"), PutService(service()), PutSlice(endpoint_slice("10.0.1.1"))):
        made.apply(event)
    return made


def from_scratch(*objects: object) -> RouteTable:
    node = snapshot().node
    bare = type(node)("node1", ADDRESSES.addresses, ADDRESSES.primary)
    return routes_from_scratch(snapshot(*objects, node=bare), options())  # type: ignore[arg-type]


def test_nothing_is_wanted_before_all_sources_have_synced() -> None:
    made = intent()
    assert not made.synced
    assert len(made.routes()) == 0
    made.apply(Synced("manifests"))
    assert made.synced
    assert made.routes() == from_scratch(service(), endpoint_slice("10.0.1.1"))


def test_the_next_table_evolves_from_the_last() -> None:
    made = intent()
    made.apply(Synced("manifests"))
    first = made.routes()
    assert made.routes() is first
    assert made.apply(PutService(service("ns1/svc2", "172.30.0.42")))
    second = made.routes()
    assert {str(frontend) for frontend, _ in second.changed_from(first)} == {"172.30.0.42:80/TCP"}


def test_an_event_that_says_nothing_new_is_known_as_such() -> None:
    made = intent()
    assert made.apply(Synced("manifests"))
    assert not made.apply(PutService(service()))
    assert not made.apply(DropService(service("ns1/other").name))


class FaultyRouter(Router):
    """Breaks when it is asked for the second time; whoever takes a new one is served."""

    asked = 0

    def update(self, snapshot: Snapshot, touched: frozenset[ServiceName] | None, options: ProxyOptions) -> RouteTable:
        self.asked += 1
        if self.asked >= 2:
            raise ZeroDivisionError
        return super().update(snapshot, touched, options)


@pytest.mark.parametrize("more", [False, True], ids=["alone", "with another change"])
def test_after_a_fault_the_policy_starts_from_scratch(more: bool) -> None:
    """What the store had handed out when the policy failed must not be lost."""
    made = intent(FaultyRouter)
    made.apply(Synced("manifests"))
    made.routes()
    made.apply(PutService(service("ns1/svc2", "172.30.0.42")))
    with pytest.raises(ZeroDivisionError):
        made.routes()
    second = service("ns1/svc2", "172.30.0.42")
    if more:
        third = service("ns1/svc3", "172.30.0.43")
        made.apply(PutService(third))
        assert made.routes() == from_scratch(service(), endpoint_slice("10.0.1.1"), second, third)
    else:
        assert made.routes() == from_scratch(service(), endpoint_slice("10.0.1.1"), second)


MANIFEST = """\
apiVersion: v1
kind: Service
metadata: {namespace: ns1, name: svc1}
spec:
  clusterIP: 172.30.0.41
  ports: [{port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: ns1, name: svc1-a, labels: {kubernetes.io/service-name: svc1}}
addressType: IPv4
ports: [{name: "", port: 80}]
endpoints: [{addresses: [10.0.1.1]}]
"""


def test_manifests_become_routes(tmp_path: Path) -> None:
    """All that is pure, from a file to what a dataplane is given."""
    (tmp_path / "svc1.yaml").write_text(MANIFEST)
    world = World()
    parts = world.but(
        sources=lambda config: (ManifestSource(config.manifests),),
        desired=lambda config, sources: Intent(config.node_name, options(), [source.name for source in sources]),
    )
    config = configure(Options(manifests=str(tmp_path), node_name="node1"), hostname="x")
    assert run_daemon(config, parts, once=True).status == 0
    bare = type(snapshot().node)("node1")
    want = routes_from_scratch(snapshot(service(), endpoint_slice("10.0.1.1"), node=bare), options())
    assert world.dataplane.held == want
    assert len(want) == 2
    assert compare(config, parts, kind="Change", service=None, form=Format.TABLE).status == 0
