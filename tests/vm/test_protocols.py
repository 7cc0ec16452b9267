"""What each dataplane carries on this kernel: TCP, UDP and SCTP, both families, from every kind of client.

Rules of this file: whatever `limits.py` does not name must work, on every kernel of the matrix.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

from ebpflb.dataplane.bpf.artifact import load_artifact
from ebpflb.dataplane.bpf.facts import has_set_retval, has_xdp_frags
from ebpflb.dataplane.limits import limited
from tests.box.modes import BPF, IPTABLES_LEGACY, IPTABLES_NFT, IPVS
from tests.vm.small import (
    EMPTY_NODE_PORT,
    FAMILIES,
    MAPPED_NODE_PORT,
    NODE_PORT,
    PORT,
    PROTOCOLS,
    SILENCE,
    Refused,
    Small,
)

pytestmark = [pytest.mark.vm, pytest.mark.root]

MODES = (BPF, IPTABLES_NFT, IPTABLES_LEGACY, IPVS)


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: mode.name)
def standing(request: pytest.FixtureRequest) -> Iterator[Small]:
    subprocess.run(["modprobe", "sctp"], check=True)
    if request.param is BPF:
        # Once, before two nodes' daemons do it at the same time.
        load_artifact(set_retval=has_set_retval(), xdp_frags=has_xdp_frags())
    with Small(request.param).running() as found:
        yield found


@pytest.fixture
def small(standing: Small, on_failure: Callable[[str, Callable[[], str]], None]) -> Small:
    for node in standing.cluster.nodes:
        on_failure(f"{node}.log", standing.cluster.log(node).read_text)
    return standing


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# What sends SCTP takes no port unreachable for an answer and goes on trying: it is never refused at once.
REFUSABLE = ("TCP", "UDP")


@pytest.mark.parametrize("client", ["a1", "sa"])
def test_a_cluster_ip_is_served(small: Small, client: str, protocol: str, family: str) -> None:
    assert small.ask(client, "web", PORT, protocol, family) == client


def test_a_cluster_ip_is_served_to_the_node(small: Small, protocol: str, family: str) -> None:
    if protocol == "SCTP" and limited(small.mode.dataplane, "sctp-sockets"):
        with pytest.raises(OSError):
            small.ask("node1", "web", PORT, protocol, family, SILENCE)
    else:
        assert small.ask("node1", "web", PORT, protocol, family) == "node1"


def test_a_node_port_is_served(small: Small, protocol: str, family: str) -> None:
    assert small.ask("outside", "node1", NODE_PORT, protocol, family) == "node1"
    assert small.ask("outside", "node2", NODE_PORT, protocol, family) == "node2"


@pytest.mark.parametrize(
    ("client", "to", "port", "seen"),
    [("sa", "mapped", PORT, "sa"), ("outside", "node1", MAPPED_NODE_PORT, "node1")],
    ids=["cluster-ip", "node-port"],
)
def test_a_backend_on_another_port_is_served(
    small: Small, client: str, to: str, port: int, seen: str, protocol: str, family: str
) -> None:
    if protocol == "SCTP" and limited(small.mode.dataplane, "sctp-ports"):
        with pytest.raises(TimeoutError):
            small.ask(client, to, port, protocol, family, SILENCE)
    else:
        assert small.ask(client, to, port, protocol, family) == seen


@pytest.mark.parametrize("protocol", REFUSABLE)
@pytest.mark.parametrize("client", ["a1", "sa", "node1"])
def test_without_endpoints_one_is_refused_at_once(small: Small, client: str, protocol: str, family: str) -> None:
    own_datagram = client == "node1" and protocol == "UDP" and limited(small.mode.dataplane, "own-datagrams")
    nameless = own_datagram or (small.mode is BPF and client == "node1" and not has_set_retval())
    with pytest.raises(PermissionError if nameless else Refused):
        small.ask(client, "empty", PORT, protocol, family)


@pytest.mark.parametrize("protocol", REFUSABLE)
def test_a_node_port_without_endpoints_is_refused_at_once(small: Small, protocol: str, family: str) -> None:
    with pytest.raises(Refused):
        small.ask("outside", "node1", EMPTY_NODE_PORT, protocol, family)
