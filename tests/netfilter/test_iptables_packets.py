"""Real connections through the iptables dataplane's rules: the node is client and servers at once, in one namespace."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.iptables import table_of
from tests.netfilter.conftest import Place
from tests.pace import PACE
from tests.world import LOCAL, UDP, endpoint_slice, port, service, slice_port

pytestmark = pytest.mark.root

PATIENCE = 10.0 * PACE

VIP, PODS, NODE = "172.30.0.41", ("10.0.1.1", "10.0.1.2"), "192.168.0.2"
SERVICE = service("ns1/web", VIP, port(80, node_port=30080))
SLICE = endpoint_slice(*PODS, of="ns1/web", ports=[slice_port(8080)])


@pytest.fixture(autouse=True)
def addresses(place: Place) -> None:
    """The node's address, those of two pods, and a way to everywhere."""
    place.run("ip", "-batch", "-", given="".join(f"{line}\n" for line in (
        "link add eth0 type veth peer name eth1",
            "link set eth1 up",
        "link set eth0 up",
        f"address add {NODE}/24 dev eth0",
        *(f"address add {pod}/32 dev lo" for pod in PODS),
        f"route add default dev eth0 src {NODE}",
    )))  # fmt: skip


@contextmanager
def servers(*places: tuple[str, int]) -> Iterator[dict[tuple[str, int], socket.socket]]:
    """Listening sockets."""
    found = {place: socket.create_server(place) for place in places}
    try:
        yield found
    finally:
        for each in found.values():
            each.close()


def reached(address: str, number: int, seconds: float = PATIENCE) -> str:
    """Who answers at an address: the server's own, as a connection's end there tells. Raises what connect raises."""
    with closing(socket.create_connection((address, number), timeout=seconds)), closing(accepted()) as end:
        return str(end.getsockname()[0])


def accepted(seconds: float = PATIENCE) -> socket.socket:
    """The server's end of a connection whose client has just been told that it is there: the last word of three may
    still be on its way to the server."""
    readable, _, _ = select.select([*_listening.values()], [], [], seconds)
    assert len(readable) == 1, "nobody accepted"
    end, _ = readable[0].accept()
    end.settimeout(seconds)
    return end


_listening: dict[tuple[str, int], socket.socket] = {}


@pytest.fixture
def pods() -> Iterator[None]:
    """Servers on the pods' addresses."""
    with servers(*((pod, 8080) for pod in PODS)) as found:
        _listening.update(found)
        yield
        _listening.clear()


def test_a_cluster_ip_leads_to_every_pod(place: Place, pods: None) -> None:
    assert place.dataplane().sync(table_of(SERVICE, SLICE)).complete
    assert {reached(VIP, 80) for _ in range(40)} == set(PODS)


def test_a_port_that_a_cluster_ip_does_not_have_is_refused_at_once(place: Place, pods: None) -> None:
    place.dataplane().sync(table_of(SERVICE, SLICE))
    with pytest.raises(ConnectionRefusedError):
        reached(VIP, 81)
    counters = {row["counter"]: row["value"] for row in place.dataplane().tables("counters")}
    assert counters["undefined_port_refused"] == 1


def test_without_an_endpoint_it_is_refused_and_an_endpoint_heals_it(place: Place, pods: None) -> None:
    dataplane = place.dataplane()
    dataplane.sync(table_of(SERVICE))
    for number in (80, 81):
        with pytest.raises(ConnectionRefusedError):
            reached(VIP, number)
    dataplane.sync(table_of(SERVICE, SLICE))
    assert reached(VIP, 80) in PODS
    dataplane.sync(table_of(SERVICE))
    with pytest.raises(ConnectionRefusedError):
        reached(VIP, 80)


def test_node_ports_answer_on_the_node_and_on_loopback(place: Place, pods: None) -> None:
    place.dataplane().sync(table_of(SERVICE, SLICE))
    assert reached(NODE, 30080) in PODS
    assert reached("127.0.0.1", 30080) in PODS


def test_whoever_is_outside_the_source_ranges_gets_no_answer(place: Place, pods: None) -> None:
    guarded = service("ns1/web", VIP, port(80), lb=["1.2.3.4"], ranges=["203.0.113.0/24"])
    place.dataplane().sync(table_of(guarded, SLICE))
    with pytest.raises(TimeoutError):
        reached("1.2.3.4", 80, seconds=0.3)
    assert reached(VIP, 80) in PODS


def test_policy_local_without_a_local_pod_serves_the_node_itself(place: Place, pods: None) -> None:
    far = endpoint_slice("10.0.2.2", of="ns1/web", ports=[slice_port(8080)])
    place.run("ip", "address", "add", "10.0.2.2/32", "dev", "lo")
    local = service("ns1/web", VIP, port(80), external=["192.168.99.1"], external_policy=LOCAL)
    place.dataplane().sync(table_of(local, far))
    with servers(("10.0.2.2", 8080)) as found:
        _listening.update(found)
        assert reached("192.168.99.1", 80) == "10.0.2.2"
    _listening.clear()


def test_affinity_keeps_a_client_with_its_pod_and_dump_shows_it(place: Place, pods: None) -> None:
    sticky = service("ns1/web", VIP, affinity=60)
    dataplane = place.dataplane()
    dataplane.sync(table_of(sticky, SLICE))
    first = reached(VIP, 80)
    assert {reached(VIP, 80) for _ in range(10)} == {first}
    (row,) = dataplane.tables("affinity")
    assert row["client"] == NODE and row["backend"] == f"{first}:8080"
    assert isinstance(row["idleSeconds"], float) and 0 <= row["idleSeconds"] < 60
    # A change of the endpoints does not forget it.
    more = endpoint_slice(*PODS, "10.0.1.3", of="ns1/web", ports=[slice_port(8080)])
    assert dataplane.sync(table_of(sticky, more)).complete
    assert {reached(VIP, 80) for _ in range(5)} == {first}


def test_a_connection_shows_among_the_flows(place: Place, pods: None) -> None:
    dataplane = place.dataplane()
    dataplane.sync(table_of(SERVICE, SLICE))
    with closing(socket.create_connection((VIP, 80), timeout=PATIENCE)) as client, closing(accepted()):
        source = client.getsockname()
        flows = [row for row in dataplane.tables("flows") if row["client"] == f"{source[0]}:{source[1]}"]
        (flow,) = flows
        assert flow["frontend"] == f"{VIP}:80" and flow["backend"] in {f"{pod}:8080" for pod in PODS}
        assert flow["state"] == "open" and flow["service"] == {"namespace": "ns1", "name": "web", "port": ""}
        assert flow["source"] is not None  # the node is no pod: masqueraded
    (fill,) = dataplane.tables("fill")
    assert fill["name"] == "conntrack"


def test_an_established_connection_outlives_its_service_and_the_dataplane(place: Place, pods: None) -> None:
    dataplane = place.dataplane()
    dataplane.sync(table_of(SERVICE, SLICE))
    with closing(socket.create_connection((VIP, 80), timeout=PATIENCE)) as client, closing(accepted()) as end:

        def answers() -> bool:
            client.sendall(b"still there?")
            return end.recv(20) == b"still there?"

        assert dataplane.sync(table_of()).complete and answers()
        assert not dataplane.retire() and answers()
        assert not dataplane.retire() and answers() and dataplane.inventory()
        assert len(dataplane.state()) == 0 and dataplane.tables("services") == []
        with pytest.raises(OSError, match=r"timed out|refused|unreachable|No route"):
            reached(VIP, 80, seconds=0.2)
    deadline = time.monotonic() + PATIENCE
    while not dataplane.retire():  # both ends are closed, which conntrack learns of by their packets
        assert time.monotonic() < deadline
        time.sleep(0.01)
    dataplane.cleanup()
    assert dataplane.inventory() == ()


def test_a_datagram_flow_follows_when_its_endpoint_goes(place: Place) -> None:
    """conntrack would keep sending it to the old one for as long as it does not pause."""
    dns = service("ns1/dns", VIP, port(53, "dns", UDP))
    dataplane = place.dataplane()

    def serve(*pods: str) -> None:
        dataplane.sync(table_of(dns, endpoint_slice(*pods, of="ns1/dns", ports=[slice_port(53, "dns", UDP)])))

    ends = {}
    with closing(socket.socket(type=socket.SOCK_DGRAM)) as client:
        for pod in PODS:
            ends[pod] = socket.socket(type=socket.SOCK_DGRAM)
            ends[pod].bind((pod, 53))
            ends[pod].settimeout(PATIENCE)
        try:
            client.connect((VIP, 53))
            for pod in (PODS[0], PODS[1], PODS[0]):
                serve(pod)
                client.send(b"?")
                assert ends[pod].recv(9) == b"?"
        finally:
            for end in ends.values():
                end.close()
