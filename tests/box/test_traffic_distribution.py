"""Traffic that stays near: hints of the slices, for zones (node1 and node2 are in a, node3 is in b) and for nodes."""

from __future__ import annotations

import pytest

from tests.box.box import Box
from tests.box.objects import Member
from tests.box.services import ready, unready

pytestmark = pytest.mark.box


def zonal(*places: str) -> tuple[Member, ...]:
    """Each endpoint hinted for its own zone, as PreferClose and PreferSameZone do."""
    return tuple(ready(place, zones=("b" if place in ("c1", "sc", "node3") else "a",)) for place in places)


def nodal(*places: str) -> tuple[Member, ...]:
    """Each endpoint hinted for its own zone and node, as PreferSameNode does."""
    nodes = {"a": "node1", "b": "node2", "c": "node3"}
    return tuple(
        ready(place, zones=("b" if place.startswith("c") else "a",), nodes=(nodes[place[0]],)) for place in places
    )


@pytest.mark.parametrize("distribution", ["PreferClose", "PreferSameZone"])
def test_should_route_traffic_to_an_endpoint_in_the_same_zone(
    box: Box, family: str, pod: str, distribution: str
) -> None:
    web = box.service(*zonal("a2", "b1", "c1"), kinds=["NodePort"], trafficDistribution=distribution)
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2", "b1").sees_source(pod)
    box.expect("sc", to=web.cluster_ip(family)).reaches("c1").sees_source("sc")
    box.expect("node2", to=web.cluster_ip(family)).reaches("a2", "b1")
    box.expect("outside", to=web.node_port("node3", family)).reaches("c1").sees_source("node3")
    box.check()


def test_should_route_traffic_correctly_between_pods_on_multiple_nodes(box: Box, family: str, pod: str) -> None:
    """A zone without an endpoint, or one endpoint without a hint: then everywhere."""
    web = box.service(*zonal("b1", "b2"))
    box.expect("c1", to=web.cluster_ip(family)).reaches("b1", "b2")
    box.check()
    web.endpoints(*zonal("b1", "c1"), "a2")
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2", "b1", "c1")
    box.check()


def test_should_route_traffic_to_an_endpoint_on_the_same_node_or_fall_back_to_same_zone(
    box: Box, family: str, pod: str
) -> None:
    web = box.service(*nodal("a2", "b1", "c1"), trafficDistribution="PreferSameNode")
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2").sees_source(pod)
    box.expect("b2", to=web.cluster_ip(family)).reaches("b1")
    box.check()
    web.endpoints(*nodal("b1", "c1"))
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1").sees_source(pod)
    box.expect("c1", to=web.cluster_ip(family)).reaches("c1")
    box.check()


def test_should_route_traffic_to_an_endpoint_on_the_same_node_and_fall_back_when_the_endpoint_becomes_unavailable(
    box: Box, family: str, pod: str
) -> None:
    web = box.service(*nodal("a2", "b1"), trafficDistribution="PreferSameNode")
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2")
    box.check()
    web.endpoints(unready("a2"), *nodal("b1"))
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1")
    box.check()
    web.endpoints(*nodal("a2", "b1"))
    box.expect(pod, to=web.cluster_ip(family)).reaches("a2")
    box.check()
