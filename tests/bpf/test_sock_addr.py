"""Real sockets under the socket programs: whom they reach, and whom they think that they have reached.

Rules of this file: rows are written by hand; each test begins without any.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import pytest

from ebpflb.dataplane.bpf import program_calls
from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.dataplane.bpf.constants import BACKEND_FREE, CGROUP_HOOKS, POD_SOCKETS_IPV4, POD_SOCKETS_IPV6
from ebpflb.dataplane.bpf.facts import has_set_retval
from tests.bpf.loaded import DROP, REJECT, To
from tests.bpf.sock_lab import PATIENCE, Lab
from tests.packets import address

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

both_families = pytest.mark.parametrize("family", (4, 6), ids=("v4", "v6"))
both_protocols = pytest.mark.parametrize("protocol", ("tcp", "udp"))
needs_errno = pytest.mark.skipif(
    not has_set_retval(), reason="no bpf_set_retval (Linux 5.18): refusals are the packet path's"
)


@pytest.fixture
def lab(sock_lab: Lab) -> Lab:
    return sock_lab


def _ask(role: str, port: int, family: int) -> tuple[str, int]:
    return (address(role, family), port)


# ---- connected sockets


@both_families
@both_protocols
@pytest.mark.parametrize("frontend", (("vip", 80), ("node", 30080), ("lb", 80)), ids=("cluster", "nodeport", "lb"))
def test_connect_reaches_the_backend_and_sees_the_frontend(
    lab: Lab, family: int, protocol: str, frontend: tuple[str, int]
) -> None:
    lab.loaded.put_frontend(*frontend, protocol, family, To((("local", 8080),)))
    server = lab.server("local", 8080, family, protocol)
    client = lab.client(family, protocol)
    client.connect(_ask(*frontend, family))
    assert client.getpeername()[:2] == _ask(*frontend, family)
    assert lab.reached(server, client)
    assert lab.loaded.counters() == {"SOCKET_FORWARDED": 1}


@both_protocols
def test_an_ipv6_socket_reaches_an_ipv4_frontend(lab: Lab, protocol: str) -> None:
    """::ffff:a.b.c.d, as every dual-stack program has it."""
    lab.loaded.put_frontend("vip", 80, protocol, 4, To((("local", 8080),)))
    server = lab.server("local", 8080, 4, protocol)
    client = lab.client(6, protocol)
    mapped = "::ffff:" + address("vip", 4)
    client.connect((mapped, 80))
    assert client.getpeername()[:2] == (mapped, 80)
    assert lab.reached(server, client)


@both_families
@both_protocols
def test_what_is_no_service_is_untouched(lab: Lab, family: int, protocol: str) -> None:
    lab.loaded.put_frontend("vip", 80, protocol, family, To((("local2", 8080),)))
    server = lab.server("local", 80, family, protocol)
    client = lab.client(family, protocol)
    client.connect(_ask("local", 80, family))
    assert client.getpeername()[:2] == _ask("local", 80, family)
    assert lab.reached(server, client)
    with pytest.raises(OSError) as refused:
        lab.client(family, protocol).connect(_ask("vip", 81, family))
    assert refused.value.errno == errno.ENETUNREACH, "the Service's address, another port: no route"
    assert lab.loaded.counters() == {}


@both_families
@both_protocols
def test_a_process_outside_the_cgroup_is_untouched(lab: Lab, family: int, protocol: str) -> None:
    lab.loaded.put_frontend("vip", 80, protocol, family, To((("local", 8080),)))
    with pytest.raises(OSError) as refused:
        lab.client(family, protocol, in_cgroup=False).connect(_ask("vip", 80, family))
    assert refused.value.errno == errno.ENETUNREACH
    assert lab.loaded.counters() == {}


@both_families
def test_tcp_and_udp_of_one_port_are_two_frontends(lab: Lab, family: int) -> None:
    """Upstream: "should serve endpoints on same port and different protocols"."""
    for protocol, port in (("tcp", 8001), ("udp", 8002)):
        lab.loaded.put_frontend("vip", 80, protocol, family, To((("local", port),)))
    for protocol, port in (("tcp", 8001), ("udp", 8002)):
        server = lab.server("local", port, family, protocol)
        client = lab.client(family, protocol)
        client.connect(_ask("vip", 80, family))
        assert lab.reached(server, client)


@both_families
def test_fast_open_is_a_connect(lab: Lab, family: int) -> None:
    lab.loaded.put_frontend("vip", 80, "tcp", family, To((("local", 8080),)))
    server = lab.server("local", 8080, family, "tcp")
    client = lab.client(family, "tcp")
    client.setblocking(True)
    assert client.sendto(b"early", socket.MSG_FASTOPEN, _ask("vip", 80, family)) == 5
    connection, _ = server.accept()
    with connection:
        connection.settimeout(PATIENCE)
        assert connection.recv(10) == b"early"
    assert client.getpeername()[:2] == _ask("vip", 80, family)


@both_families
def test_connections_are_spread_evenly(lab: Lab, family: int) -> None:
    """4 backends, 400 connects: each share is within 8 standard deviations (6 would be exceeded by chance once in
    2·10^7 runs)."""
    ports = (8001, 8002, 8003, 8004)
    lab.loaded.put_frontend("vip", 80, "udp", family, To(tuple(("local", port) for port in ports)))
    servers = {port: lab.server("local", port, family, "udp") for port in ports}
    for _ in range(400):
        client = lab.client(family, "udp")
        client.connect(_ask("vip", 80, family))
        client.send(b"x")
        client.close()
    heard = lab.heard(list(servers.values()), 400)
    counts = [heard.count(server) for server in servers.values()]
    assert all(abs(count - 100) < 8 * (400 * 0.25 * 0.75) ** 0.5 for count in counts), counts


# ---- unconnected datagrams


@both_families
def test_one_socket_asks_two_services(lab: Lab, family: int) -> None:
    """A resolver's way: each answer comes from whom it was asked of."""
    lab.loaded.put_frontend("vip", 53, "udp", family, To((("local", 5301),)))
    lab.loaded.put_frontend("vip2", 53, "udp", family, To((("local2", 5302),)))
    servers = {"vip": lab.server("local", 5301, family, "udp"), "vip2": lab.server("local2", 5302, family, "udp")}
    client = lab.client(family, "udp")
    for _ in range(3):
        for role, server in servers.items():
            client.sendto(role.encode(), _ask(role, 53, family))
            question, asker = server.recvfrom(100)
            assert question == role.encode()
            server.sendto(b"answer of " + question, asker)
            answer, source = client.recvfrom(100)
            assert answer == b"answer of " + role.encode()
            assert source[:2] == _ask(role, 53, family)
    assert lab.loaded.counters() == {"SOCKET_FORWARDED": 2}


def test_an_ipv6_socket_asks_an_ipv4_service_unconnected(lab: Lab) -> None:
    lab.loaded.put_frontend("vip", 53, "udp", 4, To((("local", 5301),)))
    server = lab.server("local", 5301, 4, "udp")
    client = lab.client(6, "udp")
    mapped = "::ffff:" + address("vip", 4)
    client.sendto(b"question", (mapped, 53))
    _, asker = server.recvfrom(100)
    server.sendto(b"answer", asker)
    assert client.recvfrom(100)[1][:2] == (mapped, 53)


@both_families
def test_a_datagram_of_a_stranger_shows_the_stranger(lab: Lab, family: int) -> None:
    """Even where it is the backend of a Service that this socket never asked."""
    lab.loaded.put_frontend("vip", 53, "udp", family, To((("local", 5301),)))
    server = lab.server("local", 5301, family, "udp")
    client = lab.server("node", 4000, family, "udp")
    server.sendto(b"hello", _ask("node", 4000, family))
    assert client.recvfrom(100)[1][:2] == _ask("local", 5301, family)


@both_families
def test_an_unconnected_socket_stays_with_its_backend(lab: Lab, family: int) -> None:
    ports = tuple(range(8001, 8009))
    lab.loaded.put_frontend("vip", 53, "udp", family, To(tuple(("local", port) for port in ports)))
    servers = [lab.server("local", port, family, "udp") for port in ports]
    client = lab.client(family, "udp")
    for _ in range(40):
        client.sendto(b"x", _ask("vip", 53, family))
    assert len(set(lab.heard(servers, 40))) == 1


@both_families
def test_an_unconnected_socket_leaves_a_backend_that_is_gone(lab: Lab, family: int) -> None:
    """Upstream: "should be able to preserve UDP traffic when server pod cycles"."""
    service = lab.loaded.put_frontend("vip", 53, "udp", family, To((("local", 8001),)))
    first = lab.server("local", 8001, family, "udp")
    second = lab.server("local2", 8002, family, "udp")
    client = lab.client(family, "udp")
    client.sendto(b"1", _ask("vip", 53, family))
    assert first.recv(1) == b"1"
    lab.loaded.set_backend(1, address("local2", family), 8002, service)
    client.sendto(b"2", _ask("vip", 53, family))
    assert second.recv(1) == b"2"


@both_families
def test_a_connected_datagram_socket_moves_when_it_connects_again(lab: Lab, family: int) -> None:
    """A connected socket is bound to its backend by the kernel; its backend's end shows as ECONNREFUSED, and the
    connect that programs answer it with goes to a backend that is there."""
    service = lab.loaded.put_frontend("vip", 53, "udp", family, To((("local", 8001),)))
    first = lab.server("local", 8001, family, "udp")
    second = lab.server("local2", 8002, family, "udp")
    client = lab.client(family, "udp")
    client.connect(_ask("vip", 53, family))
    assert lab.reached(first, client)
    lab.loaded.set_backend(1, address("local2", family), 8002, service)
    first.close()
    client.send(b"into the void")
    with pytest.raises(ConnectionRefusedError):
        client.recv(1)
    client.connect(_ask("vip", 53, family))
    assert lab.reached(second, client)


# ---- verdicts


@needs_errno
@both_families
@both_protocols
def test_refused_at_once(lab: Lab, family: int, protocol: str) -> None:
    """REJECT: ECONNREFUSED, as from a host whose port is closed. Upstream: "should be rejected when no endpoints
    exist"."""
    lab.loaded.put_frontend("vip", 81, protocol, family, REJECT)
    with pytest.raises(ConnectionRefusedError):
        lab.client(family, protocol).connect(_ask("vip", 81, family))
    assert lab.loaded.counters() == {"SOCKET_REJECTED": 1}


@needs_errno
@both_families
def test_an_unconnected_datagram_is_refused_at_once(lab: Lab, family: int) -> None:
    lab.loaded.put_frontend("vip", 81, "udp", family, REJECT)
    with pytest.raises(ConnectionRefusedError):
        lab.client(family, "udp").sendto(b"x", _ask("vip", 81, family))


@needs_errno
@both_families
@both_protocols
def test_dropped_is_a_timeout_at_once(lab: Lab, family: int, protocol: str) -> None:
    """DROP: ETIMEDOUT without the wait, since the outcome is known."""
    lab.loaded.put_frontend("vip", 82, protocol, family, DROP)
    with pytest.raises(OSError) as refused:
        lab.client(family, protocol).connect(_ask("vip", 82, family))
    assert refused.value.errno == errno.ETIMEDOUT
    assert lab.loaded.counters() == {"SOCKET_DROPPED": 1}


@both_families
@both_protocols
@pytest.mark.parametrize("broken", ("free", "absent"))
def test_a_missing_backend_is_counted_and_the_call_goes_on(lab: Lab, family: int, protocol: str, broken: str) -> None:
    lab.loaded.put_frontend("vip", 83, protocol, family, To(broken=broken))
    with pytest.raises(OSError) as refused:
        lab.client(family, protocol).connect(_ask("vip", 83, family))
    assert refused.value.errno == errno.ENETUNREACH
    assert lab.loaded.counters() == {"SOCKET_NO_BACKEND": 1}


# ---- who asks


@both_families
@both_protocols
def test_loopback_is_the_nodes_own(lab: Lab, family: int, protocol: str) -> None:
    """A nodePort on 127.0.0.1 serves the node; a pod's 127.0.0.1 is the pod's."""
    loopback = "127.0.0.1" if family == 4 else "::1"
    lab.loaded.put_frontend(loopback, 30080, protocol, family, To((("local", 8080),)))
    server = lab.server("local", 8080, family, protocol)
    client = lab.client(family, protocol)
    client.connect((loopback, 30080))
    assert client.getpeername()[:2] == (loopback, 30080)
    assert lab.reached(server, client)

    own = lab.server(loopback, 30080, family, protocol, lab.pod)
    client = lab.client(family, protocol, lab.pod)
    client.connect((loopback, 30080))
    assert lab.reached(own, client)
    assert lab.loaded.counters() == {"SOCKET_FORWARDED": 1}


@both_families
@both_protocols
def test_a_process_that_has_bound_a_nodeport_does_not_get_the_services_clients(
    lab: Lab, family: int, protocol: str
) -> None:
    lab.loaded.put_frontend("node", 30080, protocol, family, To((("local", 8080),)))
    squatter = lab.server("node", 30080, family, protocol)
    server = lab.server("local", 8080, family, protocol)
    client = lab.client(family, protocol)
    client.connect(_ask("node", 30080, family))
    assert lab.reached(server, client)
    squatter.setblocking(False)
    with pytest.raises(BlockingIOError):
        if protocol == "tcp":
            squatter.accept()
        else:
            squatter.recv(1)


@needs_errno
@both_families
@both_protocols
def test_the_scope_of_a_pods_socket_is_a_setting(lab: Lab, family: int, protocol: str) -> None:
    lab.loaded.put_frontend("vip", 80, protocol, family, To((("local", 8080),)), DROP)
    server = lab.server("local", 8080, family, protocol, lab.pod)
    with pytest.raises(OSError) as refused:
        lab.client(family, protocol, lab.pod).connect(_ask("vip", 80, family))
    assert refused.value.errno == errno.ETIMEDOUT

    lab.put_settings(pod_sockets=POD_SOCKETS_IPV6 if family == 4 else POD_SOCKETS_IPV4)
    with pytest.raises(OSError):
        lab.client(family, protocol, lab.pod).connect(_ask("vip", 80, family))

    lab.put_settings(pod_sockets=POD_SOCKETS_IPV4 if family == 4 else POD_SOCKETS_IPV6)
    client = lab.client(family, protocol, lab.pod)
    client.connect(_ask("vip", 80, family))
    assert client.getpeername()[:2] == _ask("vip", 80, family)
    assert lab.reached(server, client)


@both_families
@both_protocols
def test_the_node_itself_is_always_internal(lab: Lab, family: int, protocol: str) -> None:
    lab.loaded.put_frontend("vip", 80, protocol, family, To((("local", 8080),)), DROP)
    server = lab.server("local", 8080, family, protocol)
    client = lab.client(family, protocol)
    client.connect(_ask("vip", 80, family))
    assert lab.reached(server, client)


@needs_errno
@both_families
@both_protocols
def test_source_ranges_at_the_socket(lab: Lab, family: int, protocol: str) -> None:
    """The node may if the ranges hold the address it asks, as its own packets would come from there; a pod's socket is
    let go, since only its packets say who it is."""
    inside = f"{address('lb', family)}/{32 if family == 4 else 128}"
    elsewhere = ("203.0.113.0/24", "2001:db8:203::/64")
    lab.loaded.put_frontend("lb", 80, protocol, family, To((("local", 8080),), ranges=(inside,)))
    lab.loaded.put_frontend("lb", 81, protocol, family, To((("local", 8080),), ranges=elsewhere))
    server = lab.server("local", 8080, family, protocol)
    client = lab.client(family, protocol)
    client.connect(_ask("lb", 80, family))
    assert lab.reached(server, client)
    with pytest.raises(OSError) as refused:
        lab.client(family, protocol).connect(_ask("lb", 81, family))
    assert refused.value.errno == errno.ETIMEDOUT
    for port in (80, 81):
        with pytest.raises(OSError) as untouched:
            lab.client(family, protocol, lab.pod).connect(_ask("lb", port, family))
        assert untouched.value.errno == errno.ENETUNREACH


# ---- beside others


@both_families
@both_protocols
def test_two_sets_of_programs_translate_once(lab: Lab, artifact: Artifact, family: int, protocol: str) -> None:
    """During an upgrade old and new programs may both be attached; both share the pinned maps."""
    lab.loaded.put_frontend("vip", 80, protocol, family, To((("local", 8080),)))
    again = {
        name: program_calls.prog_load(
            program.type, program.patched(lab.loaded.maps), program.kernel_name, program.attach_type
        )
        for name, program in artifact.programs.items()
        if name in CGROUP_HOOKS
    }
    links = [program_calls.link_create(fd, lab.cgroup, CGROUP_HOOKS[name].attach_type) for name, fd in again.items()]
    try:
        server = lab.server("local", 8080, family, protocol)
        client = lab.client(family, protocol)
        client.connect(_ask("vip", 80, family))
        assert client.getpeername()[:2] == _ask("vip", 80, family)
        assert lab.reached(server, client)
        assert lab.loaded.counters() == {"SOCKET_FORWARDED": 1}
    finally:
        for fd in (*links, *again.values()):
            os.close(fd)


@both_families
def test_a_full_table_of_sockets_still_forwards(lab: Lab, family: int) -> None:
    """LRU: old sockets lose their memory, new ones are served."""
    lab.loaded.put_frontend("vip", 53, "udp", family, To((("local", 5301),)))
    server = lab.server("local", 5301, family, "udp")
    for _ in range(6000):
        client = lab.node.socket(family, "udp")
        with client:
            client.connect(_ask("vip", 53, family))
            assert client.getpeername()[:2] == _ask("vip", 53, family)
    assert lab.loaded.counters() == {"SOCKET_FORWARDED": 6000}
    last = lab.client(family, "udp")
    last.connect(_ask("vip", 53, family))
    assert lab.reached(server, last)


@both_families
def test_an_unconnected_socket_leaves_a_backend_whose_row_is_free(lab: Lab, family: int) -> None:
    lab.loaded.put_frontend("vip", 53, "udp", family, To((("local", 8001), ("local2", 8002))))
    servers = {8001: lab.server("local", 8001, family, "udp"), 8002: lab.server("local2", 8002, family, "udp")}
    client = lab.client(family, "udp")
    client.sendto(b"1", _ask("vip", 53, family))
    (first,) = lab.heard(list(servers.values()), 1)
    port = next(port for port, server in servers.items() if server is first)
    number, role = (1, "local") if port == 8001 else (2, "local2")
    lab.loaded.set_backend(number, address(role, family), port, 0, BACKEND_FREE)
    for _ in range(200):  # a free row may be drawn: such a datagram goes nowhere, with a count
        with contextlib.suppress(OSError):
            client.sendto(b"2", _ask("vip", 53, family))
            break
    assert lab.heard(list(servers.values()), 1) == [servers[16003 - port]], "it left the backend that is gone"
