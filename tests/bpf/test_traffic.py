"""What each Service carries, counted by programs that were asked to: connections, packets and bytes.

Rules of this file: flows are real ones through the programs, as in the other packet tests; what is counted is compared
with what was sent.
"""

from __future__ import annotations

import dataclasses
import errno
import struct
from collections.abc import Iterator

import pytest

from ebpflb.dataplane.bpf import map_calls
from ebpflb.dataplane.bpf.artifact import Artifact, load_artifact
from ebpflb.dataplane.bpf.facts import has_set_retval, has_xdp_frags
from ebpflb.routes import Masquerade
from tests.bpf.loaded import UNSPEC, UPLINK, XDP_TX, Loaded, To
from tests.bpf.xdp_lab import Lab, laboratory, sport_of, uplinks
from tests.packets import Packet

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_families = pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))


@pytest.fixture(scope="module")
def counting() -> Artifact:
    return load_artifact(set_retval=has_set_retval(), count_traffic=True, xdp_frags=has_xdp_frags())


@pytest.fixture(scope="module")
def loaded(counting: Artifact) -> Iterator[Loaded]:
    made = Loaded(counting, programs=("tc_ingress", "tc_egress"))
    yield made
    made.close()


@pytest.fixture
def node(loaded: Loaded) -> Loaded:
    loaded.clear()
    return loaded


def carried(node: Loaded) -> dict[int, tuple[int, int, int]]:
    """(connections, packets, bytes) of each Service, summed over the CPUs."""
    keys, values, count = map_calls.lookup_all(node.maps["traffic"])
    width = len(values) // count if count else 0
    found = {}
    for at in range(count):
        (service,) = struct.unpack_from("=I", keys, 4 * at)
        cells = struct.unpack_from(f"={width // 8}Q", values, width * at)
        found[service] = (sum(cells[0::3]), sum(cells[1::3]), sum(cells[2::3]))
    return found


def passed(node: Loaded, hook: str, packet: Packet, family: int) -> int:
    """The packet passes the hook; its length."""
    frame = packet.frame(family)
    run = node.ingress if hook == "ingress" else node.egress
    assert run(frame, family, UPLINK).verdict == UNSPEC, node.counters()
    return len(frame)


@both_families
def test_all_programs_load_with_counting(counting: Artifact, family: int) -> None:
    Loaded(counting).close()


@both_families
def test_a_flow_and_its_replies_count_once_each(node: Loaded, family: int) -> None:
    """Without masquerade: requests are seen where they enter, replies where they leave."""
    service = node.put_frontend("node", 30081, "udp", family, To((("local", 8080),), masquerade=Masquerade.NEVER))
    request = Packet("outside", 40000, "node", 30081, "udp", payload=b"hello")
    served = request.but(destination="local", dport=8080)
    length = 0
    for _ in range(3):
        length += passed(node, "ingress", request, family)
        length += passed(node, "egress", served.reply(), family)
    assert carried(node) == {service: (1, 6, length)}


@both_families
def test_a_masqueraded_flow_passes_more_hooks_and_counts_no_more(node: Loaded, family: int) -> None:
    service = node.put_frontend("node", 30081, "udp", family, To((("remote", 8080),), masquerade=Masquerade.ALWAYS))
    request = Packet("outside", 40000, "node", 30081, "udp", payload=b"hello")
    inside = request.but(destination="remote", dport=8080)
    first = passed(node, "ingress", request, family)
    passed(node, "egress", inside, family)
    assert carried(node) == {service: (1, 1, first)}
    passed(node, "ingress", request, family)
    passed(node, "egress", inside, family)
    assert carried(node) == {service: (1, 2, 2 * first)}


@both_families
def test_each_service_has_its_own_count(node: Loaded, family: int) -> None:
    web = node.put_frontend("node", 30081, "udp", family, To((("remote", 8080),)))
    dns = node.put_frontend("node", 30082, "udp", family, To((("remote", 8080),)))
    for sport in (40000, 40001):
        passed(node, "ingress", Packet("outside", sport, "node", 30081, "udp"), family)
    passed(node, "ingress", Packet("outside", 40002, "node", 30082, "udp"), family)
    assert {id: cells[:2] for id, cells in carried(node).items()} == {web: (2, 2), dns: (1, 1)}


# ---- With XDP before tc


@pytest.fixture(scope="module")
def lab_once(counting: Artifact) -> Iterator[Lab]:
    with laboratory(counting) as made:
        yield made


@pytest.mark.parametrize("protocol", ("tcp", "udp"))
def test_what_xdp_sends_counts_like_all_else(lab: Lab, protocol: str) -> None:
    """Requests and replies, each once; the connection once."""
    to = To((("remote", 8080),), masquerade=Masquerade.ALWAYS)
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, to)
    request = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello")
    frame = request.frame(lab.family)
    inside = request.but(source="uplink", sport=sport_of(lab.sent(frame)), destination="remote", dport=8080)
    assert carried(lab.node) == {service: (1, 1, len(frame))}
    reply = inside.reply().frame(lab.family)
    lab.sent(reply)
    lab.sent(frame)
    assert carried(lab.node) == {service: (1, 3, 2 * len(frame) + len(reply))}


def test_all_buffers_of_a_frame_count(lab: Lab) -> None:
    """As jumbo frames come: the program reads the first buffer only."""
    service = lab.node.put_frontend("lb", 80, "udp", lab.family, To((("remote", 8080),), masquerade=Masquerade.ALWAYS))
    frame = Packet("outside", 40000, "lb", 80, "udp", payload=bytes(1000)).frame(lab.family)
    try:
        ran = lab.xdp(frame, linear=200)
    except OSError as error:
        assert error.errno == errno.EINVAL
        pytest.skip("this kernel's test run makes no frames of several buffers")
    assert ran.verdict == XDP_TX
    assert carried(lab.node) == {service: (1, 1, len(frame))}


@pytest.mark.parametrize("protocol", ("tcp", "udp"))
@pytest.mark.parametrize("masquerade", (Masquerade.NEVER, Masquerade.ALWAYS))
def test_what_xdp_passes_up_is_counted_by_tc(lab: Lab, protocol: str, masquerade: Masquerade) -> None:
    """XDP has chosen, and the connection is counted once."""
    lab.put_device("pod0", dataclasses.replace(uplinks()["pod0"], masquerade="uplink"))
    service = lab.node.put_frontend("lb", 80, protocol, lab.family, To((("local", 8080),), masquerade=masquerade))
    frame = Packet("outside", 40000, "lb", 80, protocol, payload=b"hello").frame(lab.family)
    lab.by_both(frame, by="pod0")
    assert carried(lab.node) == {service: (1, 1, len(frame))}
    lab.by_both(frame, by="pod0")
    assert carried(lab.node) == {service: (1, 2, 2 * len(frame))}


def test_a_flow_that_is_begun_anew_counts_again(lab: Lab) -> None:
    """Whoever carries it."""
    service = lab.node.put_frontend("lb", 80, "tcp", lab.family, To((("remote", 8080),), masquerade=Masquerade.ALWAYS))
    request = Packet("outside", 40000, "lb", 80)
    for flags in ("S", "FA", "S"):
        lab.sent(request.but(flags=flags).frame(lab.family))
    assert carried(lab.node)[service][:2] == (2, 3)


def test_nobodys_packets_count_for_nobody(node: Loaded) -> None:
    passed(node, "ingress", Packet("outside", 40000, "remote", 80, "tcp"), 4)
    assert carried(node) == {}
