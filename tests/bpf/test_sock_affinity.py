"""What sockets get by rows beyond a plain choice: session affinity, refusal of undefined ports, consistent hashing.

Rules of this file: real sockets in a cgroup of their own (see sock_lab). A client is a network namespace here, since a
socket that connects has no address yet; backends are datagram sockets, of which the one that hears a client is found.
"""

from __future__ import annotations

import errno
import select
import socket

import pytest

from ebpflb.dataplane.bpf.constants import POD_SOCKETS_IPV4, POD_SOCKETS_IPV6
from ebpflb.dataplane.bpf.facts import has_set_retval
from tests.bpf.loaded import REJECT, To
from tests.bpf.sock_lab import PATIENCE, Lab, Place
from tests.packets import address

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_families = pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))
both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))
needs_errno = pytest.mark.skipif(
    not has_set_retval(), reason="no bpf_set_retval (Linux 5.18): refusals are the packet path's"
)

PORTS = tuple(range(8001, 8009))
TIMEOUT = 60
ENOUGH = 30
"""New sockets after which one backend out of 8 can be no chance."""


class Backends:
    """Datagram sockets on every port of PORTS, in the node's namespace and the pod's."""

    def __init__(self, lab: Lab, family: int) -> None:
        self._lab, self._family = lab, family
        self._served: dict[socket.socket, int] = {}
        for place in (lab.node, lab.pod):
            for port in PORTS:
                self._served[lab.server("local", port, family, "udp", place)] = port

    def asked(self, role: str, place: Place | None = None, *, connected: bool = True) -> int:
        """A new socket asks a Service; the port of the backend that hears it."""
        with self._lab.client(self._family, "udp", place) as client:
            where = (address(role, self._family), 80)
            if connected:
                client.connect(where)
                client.send(b"hello")
            else:
                client.sendto(b"hello", where)
            ready, _, _ = select.select(list(self._served), [], [], PATIENCE)
            assert len(ready) == 1, "nobody has heard it"
            ready[0].recv(10)
            return self._served[ready[0]]


def to(*ports: int, affinity: int = TIMEOUT, **more: object) -> To:
    return To(tuple(("local", port) for port in ports), affinity=affinity, **more)  # type: ignore[arg-type]


ALL = to(*PORTS)


@both_families
@pytest.mark.parametrize("connected", (True, False), ids=("connect", "sendto"))
def test_a_namespace_goes_where_it_went(sock_lab: Lab, family: int, connected: bool) -> None:
    backends = Backends(sock_lab, family)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, ALL)
    assert len({backends.asked("vip", connected=connected) for _ in range(ENOUGH)}) == 1
    assert sock_lab.loaded.counters()["CLIENT_KEPT"] == ENOUGH - 1


@both_families
def test_without_affinity_it_does_not(sock_lab: Lab, family: int) -> None:
    backends = Backends(sock_lab, family)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, to(*PORTS, affinity=0))
    assert len({backends.asked("vip") for _ in range(ENOUGH)}) > 1
    assert sock_lab.loaded.clients() == {}


@both_families
def test_connections_of_streams(sock_lab: Lab, family: int) -> None:
    """TCP has rows of its own Service port."""
    servers = {sock_lab.server("local", port, family, "tcp"): port for port in PORTS}
    sock_lab.loaded.put_frontend("vip", 80, "tcp", family, ALL)
    places = set()
    for _ in range(ENOUGH):
        with sock_lab.client(family, "tcp") as client:
            client.connect((address("vip", family), 80))
            ready, _, _ = select.select(list(servers), [], [], PATIENCE)
            accepted, _ = ready[0].accept()
            accepted.close()
            places.add(servers[ready[0]])
    assert len(places) == 1


@both_families
def test_another_namespace_is_another_client(sock_lab: Lab, family: int) -> None:
    backends = Backends(sock_lab, family)
    sock_lab.put_settings(pod_sockets=POD_SOCKETS_IPV4 | POD_SOCKETS_IPV6)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, ALL)
    for place in (sock_lab.node, sock_lab.pod):
        assert len({backends.asked("vip", place) for _ in range(ENOUGH)}) == 1
    kinds = [(service, kind) for _, service, kind in sock_lab.loaded.clients()]
    assert kinds == [(1, 1), (1, 1)]


@both_families
def test_all_frontends_of_a_service_port_share_it(sock_lab: Lab, family: int) -> None:
    backends = Backends(sock_lab, family)
    service = sock_lab.loaded.put_frontend("vip", 80, "udp", family, ALL)
    sock_lab.loaded.put_frontend("lb", 80, "udp", family, ALL, service=service)
    assert len({backends.asked(role) for _ in range(ENOUGH // 2) for role in ("vip", "lb")}) == 1


@both_families
def test_after_the_timeout_it_may_go_elsewhere(sock_lab: Lab, family: int) -> None:
    backends = Backends(sock_lab, family)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, ALL)
    kept, moved = set(), set()
    for _ in range(ENOUGH):
        kept.add(backends.asked("vip"))
        sock_lab.loaded.age_clients(TIMEOUT - 1)
    for _ in range(ENOUGH):
        moved.add(backends.asked("vip"))
        sock_lab.loaded.age_clients(TIMEOUT + 1)
    assert len(kept) == 1 and len(moved) > 1


@both_families
def test_datagrams_of_one_socket_do_not_begin_the_time_anew(sock_lab: Lab, family: int) -> None:
    Backends(sock_lab, family)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, ALL)
    client = sock_lab.client(family, "udp")
    client.sendto(b"first", (address("vip", family), 80))
    sock_lab.loaded.age_clients(30)
    before = sock_lab.loaded.clients()
    client.sendto(b"second", (address("vip", family), 80))
    assert sock_lab.loaded.clients() == before


@both_families
@pytest.mark.parametrize("draining", (False, True), ids=("gone", "draining"))
def test_a_backend_that_left_is_not_kept(sock_lab: Lab, family: int, draining: bool) -> None:
    backends = Backends(sock_lab, family)
    service = sock_lab.loaded.put_frontend("vip", 80, "udp", family, ALL)
    first = backends.asked("vip")
    rest = to(*(port for port in PORTS if port != first), draining=(("local", first),) if draining else ())
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, rest, service=service)
    places = {backends.asked("vip") for _ in range(ENOUGH)}
    assert len(places) == 1 and first not in places


@both_families
def test_a_backend_that_the_other_scope_does_not_have(sock_lab: Lab, family: int) -> None:
    """The namespace's own scope changes; what it has in the other one is not used in this."""
    backends = Backends(sock_lab, family)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, to(*PORTS[:4]), to(*PORTS[4:]))
    outside = {backends.asked("vip", sock_lab.pod) for _ in range(ENOUGH)}
    sock_lab.put_settings(pod_sockets=POD_SOCKETS_IPV4 | POD_SOCKETS_IPV6)
    inside = {backends.asked("vip", sock_lab.pod) for _ in range(ENOUGH)}
    assert len(outside) == len(inside) == 1
    assert outside <= {*PORTS[4:]} and inside <= {*PORTS[:4]}


@both_families
def test_switched_on_off_and_on(sock_lab: Lab, family: int) -> None:
    backends = Backends(sock_lab, family)
    service = sock_lab.loaded.put_frontend("vip", 80, "udp", family, ALL)
    seen = []
    for affinity in (TIMEOUT, 0, TIMEOUT):
        sock_lab.loaded.put_frontend("vip", 80, "udp", family, to(*PORTS, affinity=affinity), service=service)
        seen.append(len({backends.asked("vip") for _ in range(ENOUGH)}))
    assert seen[0] == seen[2] == 1 and seen[1] > 1


def test_a_service_of_both_families_remembers_both(sock_lab: Lab) -> None:
    """One namespace that asks by IPv4 and IPv6 in turn, as browsers do."""
    backends = {family: Backends(sock_lab, family) for family in (4, 6)}
    service = sock_lab.loaded.put_frontend("vip", 80, "udp", 4, ALL)
    sock_lab.loaded.put_frontend("vip", 80, "udp", 6, ALL, service=service)
    places: dict[int, set[int]] = {4: set(), 6: set()}
    for _ in range(ENOUGH):
        for family in (4, 6):
            places[family].add(backends[family].asked("vip"))
    assert len(places[4]) == len(places[6]) == 1


# ---- Undefined ports of cluster IPs


@needs_errno
@both_families
@both_protocols
def test_a_port_that_a_cluster_ip_does_not_have(sock_lab: Lab, family: int, protocol: str) -> None:
    sock_lab.loaded.put_owned("vip", family)
    sock_lab.loaded.put_frontend("vip", 80, protocol, family, ALL)
    with pytest.raises(ConnectionRefusedError):
        sock_lab.client(family, protocol).connect((address("vip", family), 81))
    assert sock_lab.loaded.counters() == {"SOCKET_UNDEFINED": 1}


@needs_errno
@both_families
def test_a_datagram_to_a_port_that_a_cluster_ip_does_not_have(sock_lab: Lab, family: int) -> None:
    sock_lab.loaded.put_owned("vip", family)
    with pytest.raises(ConnectionRefusedError):
        sock_lab.client(family, "udp").sendto(b"?", (address("vip", family), 53))
    assert sock_lab.loaded.counters() == {"SOCKET_UNDEFINED": 1}


@needs_errno
def test_an_ipv6_socket_and_a_port_that_an_ipv4_cluster_ip_does_not_have(sock_lab: Lab) -> None:
    sock_lab.loaded.put_owned("vip", 4)
    with pytest.raises(ConnectionRefusedError):
        sock_lab.client(6, "tcp").connect(("::ffff:" + address("vip", 4), 81))


@needs_errno
@both_families
@both_protocols
def test_pods_are_refused_like_the_node(sock_lab: Lab, family: int, protocol: str) -> None:
    sock_lab.loaded.put_owned("vip", family)
    with pytest.raises(ConnectionRefusedError):
        sock_lab.client(family, protocol, sock_lab.pod).connect((address("vip", family), 81))


@both_families
@both_protocols
@pytest.mark.parametrize("role", ("vip2", "lb"))
def test_ports_of_other_addresses_are_not_ours_to_refuse(sock_lab: Lab, family: int, protocol: str, role: str) -> None:
    """A load balancer's address may have other ports elsewhere; another address altogether is nobody's."""
    sock_lab.loaded.put_owned("vip", family)
    sock_lab.loaded.put_frontend("lb", 80, protocol, family, ALL)
    with pytest.raises(OSError) as refused:
        sock_lab.client(family, protocol).connect((address(role, family), 81))
    assert refused.value.errno == errno.ENETUNREACH, "no route"
    assert sock_lab.loaded.counters() == {}


@needs_errno
@both_families
def test_other_dataplanes_do_not_matter_to_a_socket(sock_lab: Lab, family: int) -> None:
    """Beside what another dataplane carried packets without a flow are left alone; a new socket is no such packet."""
    sock_lab.put_settings(flows_elsewhere=1)
    sock_lab.loaded.put_owned("vip", family)
    with pytest.raises(ConnectionRefusedError):
        sock_lab.client(family, "tcp").connect((address("vip", family), 81))


@both_families
def test_no_endpoint_is_counted_as_such(sock_lab: Lab, family: int) -> None:
    sock_lab.loaded.put_owned("vip", family)
    sock_lab.loaded.put_frontend("vip", 80, "tcp", family, REJECT)
    with pytest.raises(OSError):
        sock_lab.client(family, "tcp").connect((address("vip", family), 80))
    assert sock_lab.loaded.counters() == {"SOCKET_REJECTED": 1}


# ---- Consistent hashing


@both_families
def test_a_table_spreads_sockets(sock_lab: Lab, family: int) -> None:
    """Each by its own number; all of one namespace go one way where there is affinity, even without its row."""
    backends = Backends(sock_lab, family)
    service = sock_lab.loaded.put_frontend("vip", 80, "udp", family, to(*PORTS, affinity=0, table=1))
    assert len({backends.asked("vip") for _ in range(ENOUGH)}) > 2
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, to(*PORTS, table=1), service=service)
    places = set()
    for _ in range(ENOUGH):
        places.add(backends.asked("vip"))
        sock_lab.loaded.age_clients(TIMEOUT + 1)
    assert len(places) == 1


@both_families
@pytest.mark.parametrize("connected", (True, False), ids=("connect", "sendto"))
def test_a_socket_goes_by_the_table_and_not_by_chance(sock_lab: Lab, family: int, connected: bool) -> None:
    """Every place of this one is the first backend's."""
    backends = Backends(sock_lab, family)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, to(*PORTS, affinity=0, table=1))
    sock_lab.loaded.put_table(1, 1, 1)
    assert {backends.asked("vip", connected=connected) for _ in range(ENOUGH)} == {PORTS[0]}


@both_families
@pytest.mark.parametrize("table", (1, 200))
def test_a_table_that_is_missing(sock_lab: Lab, family: int, table: int) -> None:
    """Or of a size that this program does not know: any backend will do."""
    backends = Backends(sock_lab, family)
    sock_lab.loaded.put_frontend("vip", 80, "udp", family, to(*PORTS, affinity=0, table=table, broken="table"))
    assert len({backends.asked("vip") for _ in range(ENOUGH)}) > 1
