"""Devices under XDP: which of them run our program, which cannot or must not, and what is said of it.

Rules of this file: whatever a device lacks, traffic is served; tc carries it then. node1's uplink is eth0.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Place
from ebpflb.demo.network import Addresses, Cni, Join, port
from ebpflb.rtnetlink import XDP_DRIVER
from tests.box.box import NODES, SLO, Box
from tests.box.clients import Answer, Target
from tests.box.conftest import OnFailure, know_each_other, tidied
from tests.box.expect import TRIES
from tests.box.modes import XDP_NATIVE
from tests.box.objects import Member, endpoint_slice
from tests.box.paths import Carried, carried
from tests.box.services import TARGET
from tests.box.wires import pass_everything, programs_on, run_nothing

# Daemons are restarted and commands run, some dozens a test: that takes its time where the machine has none.
pytestmark = [pytest.mark.box, pytest.mark.timeout(300)]

NATIVELY = {"name": "eth0", "xdp": "native", "reason": "", "problem": False}


@pytest.fixture(scope="module")
def standing() -> Iterator[Box]:
    """A box of two nodes with XDP in their drivers, for tests that take devices and daemons down."""
    with Box(XDP_NATIVE, Cni.ROUTED, Join.ROUTES, NODES[:2], options=("--audit-period", "1")) as found:
        yield found


@pytest.fixture
def box(standing: Box, on_failure: OnFailure) -> Iterator[Box]:
    """That box, with all its daemons and programs running again afterwards."""
    know_each_other(standing)
    try:
        yield from tidied(standing, on_failure)
    finally:
        missing = [node for node in standing.cluster.nodes if not standing.daemon_runs(node)]
        standing.cluster.start_daemons(missing)
        eventually(lambda: told(standing)["eth0"] == NATIVELY)


def eventually(holds: Callable[[], bool], seconds: float = SLO) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(box: Box) -> dict[str, dict[str, object]]:
    """What `status` of node1 says of each device."""
    (status,) = json.loads(box.cluster.ebpflb("node1", "status", "-o", "json").stdout)["items"]
    return {each["name"]: each for each in status["devices"]}


def problems(box: Box) -> list[str]:
    (status,) = json.loads(box.cluster.ebpflb("node1", "status", "-o", "json").stdout)["items"]
    return [f"{each['subject']}: {each['reason']}" for each in status["problems"]]


def uplink(box: Box) -> dict[int, int]:
    """The XDP programs of node1's uplink."""
    return programs_on(box.cluster.nodes["node1"].namespace, "eth0")


def outside_asks(box: Box, family: str) -> Carried:
    """An outside client asks node1 for a backend elsewhere, and gets it; by which path."""
    web = box.service("b1", kinds=["NodePort"])
    with carried(box) as seen:
        box.expect("outside", to=web.node_port("node1", family)).reaches("b1").sees_source("node1")
        box.check()
    return seen[0]


def by_xdp(seen: Carried) -> bool:
    return (seen.xdp, seen.tc) == (2 * TRIES, 0)


def by_tc(seen: Carried) -> bool:
    return seen == Carried(xdp=0, tc=2 * TRIES, sent=0)


# ---- Others' programs, and other instances ----


def test_somebody_elses_program_is_kept_and_named_and_tc_carries(box: Box, family: str) -> None:
    """Also through a restart and `cleanup`; once it has gone, ours runs."""
    node = box.cluster.nodes["node1"]
    assert node.daemon is not None
    node.daemon.stop()
    assert box.cluster.ebpflb("node1", "cleanup", *box.cluster.target("node1")).returncode == 0
    assert uplink(box) == {}
    pass_everything(node.namespace, "eth0")
    try:
        theirs = uplink(box)
        before = len(box.cluster.log("node1").read_text())
        for _ in range(2):
            box.cluster.start_daemons(["node1"])
            box.settle()
            assert uplink(box) == theirs
            assert by_tc(outside_asks(box, family))
        device = told(box)["eth0"]
        assert device["xdp"] == "off" and "pass_everything" in str(device["reason"])
        assert [line for line in problems(box) if "eth0" in line]
        lines = box.cluster.log("node1").read_text()[before:].splitlines()
        assert len([line for line in lines if "pass_everything" in line]) == 2, lines  # one for each start
        node.daemon.stop()
        assert box.cluster.ebpflb("node1", "cleanup", *box.cluster.target("node1")).returncode == 0
        assert uplink(box) == theirs
        box.cluster.start_daemons(["node1"])
        box.settle()
    finally:
        run_nothing(node.namespace, "eth0")
    eventually(lambda: told(box)["eth0"] == NATIVELY)
    assert by_xdp(outside_asks(box, family))
    assert not [line for line in problems(box) if "eth0" in line]


def test_a_second_daemon_does_not_touch_the_firsts_program(box: Box, family: str) -> None:
    """It is told in one line that there is one, whatever pins it is given."""
    before = uplink(box)
    node = box.cluster.nodes["node1"]
    for pins in (str(box.cluster.pins("node1")), str(box.cluster.bpffs / "second")):
        where = ("--cgroup", str(node.node_cgroup), "--bpffs", pins)
        words = ("--manifests", str(box.cluster.manifests.directory), "--node-name", "node1", "--xdp", "native")
        done = box.cluster.ebpflb("node1", "run", *words, *where)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1 and "another ebpflb daemon" in done.stderr
    assert uplink(box) == before
    assert by_xdp(outside_asks(box, family))


def test_cleanup_takes_ours_away(box: Box, family: str) -> None:
    node = box.cluster.nodes["node1"]
    assert node.daemon is not None and list(uplink(box)) == [XDP_DRIVER]
    node.daemon.stop()
    assert list(uplink(box)) == [XDP_DRIVER]
    planned = box.cluster.ebpflb("node1", "cleanup", "--dry-run", *box.cluster.target("node1"))
    assert re.search(r"would remove .*eth0", planned.stdout) and "xdp" in planned.stdout, planned.stdout
    assert box.cluster.ebpflb("node1", "cleanup", *box.cluster.target("node1")).returncode == 0
    assert uplink(box) == {}
    box.cluster.start_daemons(["node1"])
    box.settle()
    assert by_xdp(outside_asks(box, family))


def test_what_somebody_else_detaches_is_put_back(box: Box, family: str) -> None:
    """A device that is taken down and up again, too, runs our program as before."""
    node = box.cluster.nodes["node1"]
    links = sorted(box.cluster.pins("node1").glob("links/xdp-*"))
    assert len(links) == 1
    assert box.cluster.run(node, ["bpftool", "link", "detach", "pinned", str(links[0])]).returncode == 0
    eventually(lambda: bool(uplink(box)))
    eventually(lambda: told(box)["eth0"] == NATIVELY)
    assert by_xdp(outside_asks(box, family))


# ---- What a device cannot do ----


def test_what_the_other_end_would_lose_is_not_sent(box: Box, family: str) -> None:
    """A veth whose peer takes no frames of XDP: said, and carried by tc; followed when that changes."""
    fabric = box.cluster.fabric.namespace
    run_nothing(fabric, port(1))
    try:
        eventually(lambda: bool(told(box)["eth0"]["reason"]))
        assert "other end" in str(told(box)["eth0"]["reason"])
        assert by_tc(outside_asks(box, family))
    finally:
        pass_everything(fabric, port(1))
    eventually(lambda: told(box)["eth0"] == NATIVELY)
    assert by_xdp(outside_asks(box, family))


def test_an_other_end_with_gro_and_no_program_loses_nothing(box: Box, family: str) -> None:
    """It says that it takes frames of XDP: what is sent to it must arrive, by whichever path."""
    fabric = box.cluster.fabric
    run_nothing(fabric.namespace, port(1))
    try:
        assert box.cluster.run(fabric, ["ethtool", "-K", port(1), "gro", "on"]).returncode == 0
        eventually(lambda: told(box)["eth0"] == NATIVELY)
        seen = outside_asks(box, family)
        assert seen.xdp + seen.tc == 2 * TRIES
    finally:
        pass_everything(fabric.namespace, port(1))
        box.cluster.run(fabric, ["ethtool", "-K", port(1), "gro", "off"])


def test_a_device_whose_driver_has_no_xdp(box: Box, family: str) -> None:
    """A second uplink, a macvlan on the first one, comes while the daemon runs: it is named with the reason, and what
    comes by it is served, though XDP sees its frames first."""
    node, fabric = box.cluster.nodes["node1"], box.cluster.fabric.namespace
    namespaces.ip(fabric, ["address add 198.18.0.1/24 dev br0", "address add fd00:198:18::1/64 dev br0 nodad"])
    namespaces.ip(
        node.namespace,
        [
            "link add ext0 link eth0 type macvlan mode bridge",
            "address add 198.18.0.2/24 dev ext0",
            "address add fd00:198:18::2/64 dev ext0 nodad",
            "link set ext0 up",
            "route add 203.0.113.0/24 via 198.18.0.1 dev ext0",
            "route add fd00:203:0:113::/64 via fd00:198:18::1 dev ext0",
        ],
    )
    try:
        eventually(lambda: "ext0" in told(box))
        assert told(box)["ext0"]["xdp"] == "off" and told(box)["ext0"]["reason"]
        assert told(box)["eth0"] == NATIVELY
        box.settle()
        web = box.service("b1", kinds=["NodePort"])
        to = Target("198.18.0.2" if family == "ipv4" else "fd00:198:18::2", web.node_port_number())
        for protocol in ("TCP", "UDP"):
            with box.clients.converse(box.place("outside"), to, protocol) as conversation:
                first = conversation.ask()
                assert first.server == "b1" and first.source in box.addresses_of("node1")
                assert [conversation.ask() for _ in range(5)] == [first] * 5
    finally:
        namespaces.ip(node.namespace, ["link delete ext0"])
        namespaces.ip(fabric, ["address del 198.18.0.1/24 dev br0", "address del fd00:198:18::1/64 dev br0"])
    eventually(lambda: "ext0" not in told(box))
    box.settle()


# ---- More than one uplink ----

FAR = Addresses("198.18.7.10", "fd00:198:18:7::10")


@contextmanager
def far_away(box: Box) -> Iterator[Place]:
    """A server behind a second uplink of node1, eth1, on whose wire XDP can run."""
    place = Place("far", f"{box.cluster.name}-far", None, FAR)
    node = box.cluster.nodes["node1"]
    namespaces.create(place.namespace)
    try:
        namespaces.ip(
            node.namespace,
            [
                f"link add eth1 type veth peer name eth0 netns {place.namespace}",
                "address add 198.18.7.1/24 dev eth1",
                "address add fd00:198:18:7::1/64 dev eth1 nodad",
                "link set eth1 up",
            ],
        )
        namespaces.ip(
            place.namespace,
            [
                f"address add {FAR.ipv4}/24 dev eth0",
                f"address add {FAR.ipv6}/64 dev eth0 nodad",
                "link set eth0 up",
            ],
        )
        for namespace, device in ((node.namespace, "eth1"), (place.namespace, "eth0")):
            namespaces.whole_checksums(namespace, device)
        pass_everything(place.namespace, "eth0")
        box.servers.serve(place, TARGET)
        try:
            yield place
        finally:
            box.servers.stop(place.name, TARGET)
    finally:
        namespaces.delete(place.namespace)


def test_from_one_uplink_to_another(xdp: Box, family: str) -> None:
    """A backend behind a device that comes while the daemon runs: redirected there and back, before the stack."""
    with far_away(xdp):
        eventually(lambda: told(xdp).get("eth1", {}).get("xdp") in ("native", "generic"))
        xdp.settle()
        web = xdp.prepare(kinds=["NodePort"])
        web.headless_slices = tuple(endpoint_slice(web.name, web.ports, [Member(address)]) for address in FAR)
        web.apply()
        to = web.node_port("node1", family)
        assert isinstance(xdp.clients.ask(xdp.place("outside"), to, "UDP"), Answer)  # both ends' link layer is known
        with carried(xdp) as seen:
            for protocol in ("TCP", "UDP"):
                with xdp.clients.converse(xdp.place("outside"), to, protocol) as conversation:
                    first = conversation.ask()
                    assert first.server == "far" and first.source in ("198.18.7.1", "fd00:198:18:7::1")
                    assert [conversation.ask() for _ in range(20)] == [first] * 20
        # One to each neighbour may be the stack's.
        assert (seen[0].xdp, seen[0].tc) == (2, 0) and seen[0].sent >= 4 * 20 - 2
        web.delete()
    eventually(lambda: "eth1" not in told(xdp))
    xdp.settle()
