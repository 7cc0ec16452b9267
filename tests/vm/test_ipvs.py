"""The IPVS dataplane with the kernel's IPVS: rows, and packets that go where `decide` says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebpflb.dataplane.ipvs.dataplane import IpvsDataplane
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.model import DetectLocal, Family, Protocol
from ebpflb.policy import routes as routes_of
from ebpflb.routes import RouteTable
from tests.vm.lab import NODE_IP, PEER, POD, Lab
from tests.world import (
    OUTSIDE,
    endpoint_slice,
    in_family,
    node,
    options,
    port,
    service,
    slice_port,
    snapshot,
    v6,
)

pytestmark = [pytest.mark.vm, pytest.mark.root]

TCP, UDP = Protocol.TCP, Protocol.UDP
OPTIONS = options(detect_local=DetectLocal.NODE_CIDR, localhost_nodeports=False)
NODE_ADDRESSES = ("10.0.1.254", "127.0.0.1", NODE_IP)


def both(address: str) -> tuple[str, str]:
    return address, v6(address)


def service_of(
    name: str, ip: str, *backends: str, node_port: int = 0, target: int = 80, **more: object
) -> list[object]:
    """A Service on port 80 of TCP and UDP, in both families, with a slice for each."""
    ports = (port(80, "t", TCP, node_port), port(80, "u", UDP, node_port))
    made = service(f"ns1/{name}", both(ip), *ports, **more)  # type: ignore[arg-type]
    slices: list[object] = []
    if backends:
        targets = (slice_port(target, "t", TCP), slice_port(target, "u", UDP))
        found = endpoint_slice(*backends, of=f"ns1/{name}", ports=targets)
        slices = [
            found,
            in_family(endpoint_slice(*backends, of=f"ns1/{name}", ports=targets, name=f"{name}6"), Family.IPV6),
        ]
    return [made, *slices]


def world_of(*objects: object, **more: object) -> RouteTable:
    here = node(
        addresses=[address for each in NODE_ADDRESSES for address in both(each)],
        primary=both(NODE_IP),
        pod_cidrs=both("10.0.1.0/24"),
    )
    return routes_of(snapshot(*objects, node=here), OPTIONS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab().open() as found:
        yield found


@pytest.fixture
def dataplane(lab: Lab) -> Iterator[IpvsDataplane]:
    found = IpvsDataplane(IpvsOptions(), variant="nft")
    lab.on_node(found.check)
    lab.on_node(found.start)
    yield found
    lab.on_node(found.cleanup)
    assert lab.on_node(found.inventory) == ()


def test_one_cluster_ip(lab: Lab, dataplane: IpvsDataplane) -> None:
    table = world_of(*service_of("web", "172.30.0.41", POD, target=8080))
    report = lab.on_node(lambda: dataplane.sync(table))
    assert report.complete, report.problems
    state = lab.on_node(dataplane.state)
    assert dict(state) == dict(table)
    assert state == table
    again = lab.on_node(lambda: dataplane.sync(table))
    assert (again.written, again.removed) == (0, 0)
    audit = lab.on_node(dataplane.audit)
    assert (audit.written, audit.removed) == (0, 0), audit
    assert lab.on_node(dataplane.canary)
    for protocol in (TCP, UDP):
        for address in both("172.30.0.41"):
            assert lab.ask(PEER, address, 80, protocol).server in both(POD)
            assert lab.ask("", address, 80, protocol).server in both(POD)
            assert lab.ask(OUTSIDE, address, 80, protocol).server in both(POD)
