"""loadBalancerSourceRanges: who may use a load balancer's address."""

from __future__ import annotations

import pytest

from tests.box.box import Box

pytestmark = pytest.mark.box


def only(box: Box, *places: str) -> list[str]:
    """Ranges that hold exactly these places, in both families."""
    return [f"{address}/{32 if '.' in address else 128}" for name in places for address in box.place(name).addresses]


def test_should_only_allow_access_from_service_loadbalancer_source_ranges(box: Box, family: str, pod: str) -> None:
    """A pod, then the node, then everybody, then again a pod: each change holds at once."""
    web = box.service("b1", "c1", kinds=["LoadBalancer"], loadBalancerSourceRanges=only(box, pod))
    to = web.load_balancer(family)
    box.expect(pod, to=to).reaches("b1", "c1")
    box.expect("a2", to=to).dropped(at="node1")
    box.expect("node1", to=to).dropped(at="node1")
    box.expect("outside", to=to).dropped(at="node1")
    box.check()
    web.change(loadBalancerSourceRanges=only(box, "node1", "outside"))
    box.expect(pod, to=to).dropped(at="node1")
    box.expect("node1", to=to).reaches("b1", "c1").sees_source("node1")
    box.expect("outside", to=to).reaches("b1", "c1").sees_source("node1")
    box.check()
    web.change(loadBalancerSourceRanges=None)
    for client in (pod, "node1", "outside"):
        box.expect(client, to=to).reaches("b1", "c1")
    box.check()
    web.change(loadBalancerSourceRanges=only(box, pod))
    box.expect(pod, to=to).reaches("b1", "c1")
    box.expect("outside", to=to).dropped(at="node1")
    box.check()


def test_source_ranges_with_policy_local_keep_the_source(box: Box, family: str) -> None:
    web = box.service(
        "a1", "b1", kinds=["LoadBalancer"], externalTrafficPolicy="Local",
        loadBalancerSourceRanges=only(box, "outside"),
    )  # fmt: skip
    box.expect("outside", to=web.load_balancer(family)).reaches("a1").sees_source("outside")
    box.expect("sa", to=web.load_balancer(family)).dropped(at="node1")
    box.check()


def test_source_ranges_bind_no_other_frontend(box: Box, family: str, pod: str) -> None:
    web = box.service("b1", kinds=["LoadBalancer"], loadBalancerSourceRanges=["198.51.100.0/24", "2001:db8::/32"])
    box.expect("outside", to=web.load_balancer(family)).dropped(at="node1")
    box.expect("outside", to=web.node_port("node1", family)).reaches("b1").sees_source("node1")
    box.expect(pod, to=web.cluster_ip(family)).reaches("b1").sees_source(pod)
    box.check()


def test_source_ranges_of_one_family_leave_the_other_open(box: Box) -> None:
    web = box.service("b1", kinds=["LoadBalancer"], loadBalancerSourceRanges=["198.51.100.0/24"])
    box.expect("outside", to=web.load_balancer("ipv4")).dropped(at="node1")
    box.expect("outside", to=web.load_balancer("ipv6")).reaches("b1")
    box.check()


def test_a_range_of_everything_is_no_restriction(box: Box, family: str) -> None:
    web = box.service("b1", kinds=["LoadBalancer"], loadBalancerSourceRanges=["198.51.100.0/24", "0.0.0.0/0", "::/0"])
    box.expect("outside", to=web.load_balancer(family)).reaches("b1").sees_source("node1")
    box.check()


def test_source_ranges_of_a_service_without_endpoints(box: Box, family: str) -> None:
    """Who may ask is told that nobody serves; who may not is told nothing."""
    web = box.service(kinds=["LoadBalancer"], loadBalancerSourceRanges=only(box, "sa"))
    box.expect("sa", to=web.load_balancer(family)).refused()
    box.expect("outside", to=web.load_balancer(family)).dropped(at="node1")
    box.check()


def test_an_established_connection_outlives_a_range_that_excludes_it(box: Box, family: str) -> None:
    web = box.service("b1", kinds=["LoadBalancer"])
    with box.clients.converse(box.place("outside"), web.load_balancer(family), "TCP") as conversation:
        assert conversation.ask().server == "b1"
        web.change(loadBalancerSourceRanges=only(box, "sa"))
        assert conversation.ask().server == "b1"
        box.expect("outside", to=web.load_balancer(family)).dropped(at="node1")
        box.check()
