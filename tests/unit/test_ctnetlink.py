"""ctnetlink: entries as bytes, and the kernel's own in a network namespace that a test makes: flows of real datagrams
through real rules, which go on being wrong until they are reconciled."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpflb import ctnetlink, policy
from ebpflb.conntrack import StaleFlows
from ebpflb.ctnetlink import Answer, Entry, conntrack_socket, decoded, delete, end, masqueraded, udp_entries
from ebpflb.model import Family
from ebpflb.routes import RouteTable
from ebpflb.rtnetlink import Netlink, attribute, attributes
from tests.world import UDP, endpoint_slice, in_family, options, port, service, slice_port, snapshot, v6

CLONE_NEWNET = 0x40000000
PATIENCE = 30.0
FAMILIES = pytest.mark.parametrize("family", Family, ids=["IPv4", "IPv6"])

_T = TypeVar("_T")


# ---- Bytes


def tuple_of(family: Family, source: bytes, destination: bytes, protocol: int, zone: int = 0) -> bytes:
    """What an attribute of a tuple holds; `source` and `destination` are ends."""
    first = 1 if family is Family.IPV4 else 3
    addresses = attribute(first, source[:-2]) + attribute(first + 1, destination[:-2])
    ports = attribute(1, bytes([protocol])) + attribute(2, source[-2:]) + attribute(3, destination[-2:])
    zoned = attribute(3, zone.to_bytes(2)) if zone else b""
    return attribute(0x8001, addresses) + attribute(0x8002, ports) + zoned


def message_of(family: Family, original: bytes, reply: bytes, *others: bytes, shuffled: bool = False) -> bytes:
    parts = [attribute(0x8001, original), attribute(0x8002, reply), *others]
    return struct.pack("=BBH", 2, 0, 0) + b"".join(reversed(parts) if shuffled else parts)


def ends(family: Family) -> st.SearchStrategy[bytes]:
    size = 6 if family is Family.IPV4 else 18
    return st.binary(min_size=size, max_size=size)


class Told:
    """A socket whose kernel has these messages."""

    def __init__(self, *messages: bytes) -> None:
        self.stream = lambda *_: iter(messages)


@FAMILIES
def test_the_ports_of_masquerade_are_those_of_flows_whose_source_is_replaced(family: Family) -> None:
    width = 4 if family is Family.IPV4 else 16
    client, service_, server, node = (bytes([number]) * width + number.to_bytes(2) for number in (1, 2, 3, 4))
    confirmed, replaced, redirected = 1 << 3, 1 << 4, 1 << 5

    def message(protocol: int, status: int, shuffled: bool = False) -> bytes:
        original, reply = tuple_of(family, client, service_, protocol), tuple_of(family, server, node, protocol)
        return message_of(family, original, reply, attribute(3, status.to_bytes(4)), shuffled=shuffled)

    ping = attribute(0x8001, b"") + attribute(0x8002, attribute(1, b"\1") + attribute(4, b"\0\1"))
    kernel = Told(
        message(6, confirmed | replaced | redirected),
        message(6, confirmed | redirected),
        message(17, replaced, shuffled=True),
        message_of(family, ping, ping, attribute(3, replaced.to_bytes(4))),
    )
    assert list(masqueraded(cast(Netlink, kernel), family)) == [Answer(6, server, node), Answer(17, server, node)]


@FAMILIES
@given(data=st.data())
def test_an_entry_is_what_it_says_in_whatever_order(family: Family, data: st.DataObject) -> None:
    client, to, by, back = (data.draw(ends(family)) for _ in range(4))
    zone, own = data.draw(st.booleans()), data.draw(st.integers(0, 1))
    protocol = data.draw(st.sampled_from((17, 17, 6, 132)))
    message = message_of(
        family,
        tuple_of(family, client, to, protocol, own),
        tuple_of(family, by, back, protocol),
        *([attribute(18, b"\0\7")] if zone else []),
        attribute(3, bytes(4)),
        attribute(12, b"\x12\0\0\0"),
        shuffled=data.draw(st.booleans()),
    )
    wanted = [Entry(to, by, zone or own > 0, message)] if protocol == 17 else []
    assert list(decoded([message], family)) == wanted


@FAMILIES
@given(messages=st.lists(st.binary(max_size=200)))
def test_any_bytes_are_survived(family: Family, messages: list[bytes]) -> None:
    assert len(list(decoded(messages, family))) <= len(messages)


@FAMILIES
def test_echo_requests_have_no_ports(family: Family) -> None:
    """Their tuples are of another length."""
    addresses = tuple_of(family, bytes(6 if family is Family.IPV4 else 18), bytes(18), 1)[: 20 if family == 4 else 44]
    ping = addresses + attribute(0x8002, attribute(1, b"\1") + attribute(4, b"\0\1") + attribute(5, b"\x08"))
    assert list(decoded([message_of(family, ping, ping)], family)) == []


def test_a_message_that_ends_after_its_tuples() -> None:
    one = tuple_of(Family.IPV4, end("10.0.0.1", 1), end("10.0.0.2", 53), 17)
    (found,) = decoded([message_of(Family.IPV4, one, one)], Family.IPV4)
    assert (found.destination, found.zoned) == (end("10.0.0.2", 53), False)


def test_ends() -> None:
    assert end("10.0.0.1", 53) == b"\x0a\0\0\1\0\x35"
    assert end("fd00::1", 0x1234) == b"\xfd\0" + bytes(13) + b"\1\x12\x34"


# ---- The kernel


class Place:
    """A network namespace with a thread in it, and a node's worth of addresses on its loopback device."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._thread = ThreadPoolExecutor(1, initializer=_enter)
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Place:
        addresses = [self.address(pod) for pod in ("10.0.1.1", "10.0.1.2")]
        nodad = "" if self.family is Family.IPV4 else " nodad"
        pods = [f"address add {address} dev lo{nodad}" for address in addresses]
        # Neither is an address of the node, but what is sent there stays here.
        away = [f"route add {self.address(ip)} dev svc" for ip in ("172.30.0.10", "192.168.99.99")]
        wire = ["link add svc type veth peer name away", "link set svc up", "link set away up"]
        self.run("ip -batch -", lines=["link set lo up", *pods, *wire, *away])
        # An IPv6 address is there at once, and is led to when a worker of the kernel has come to it, even on loopback.
        deadline = time.monotonic() + PATIENCE
        while not all(self.run(f"ip route get {address}").startswith("local") for address in addresses):
            assert time.monotonic() < deadline
        # Somebody asks for conntrack; without, nothing is tracked in this namespace.
        self.iptables("-A OUTPUT -m conntrack --ctstate INVALID", table="filter")
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()
        self._thread.shutdown()

    def inside(self, act: Callable[[], _T]) -> _T:
        return self._thread.submit(act).result()

    def run(self, command: str, lines: Sequence[str] = ()) -> str:
        said = "\n".join(lines)
        done = self.inside(
            lambda: subprocess.run(command.split(), input=said, capture_output=True, text=True, check=False)
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def iptables(self, rule: str, table: str = "nat") -> None:
        self.run(f"{'iptables' if self.family is Family.IPV4 else 'ip6tables'} -w -t {table} {rule}")

    def address(self, text: str) -> str:
        return text if self.family is Family.IPV4 else v6(text)

    def translate(self, endpoint: str) -> None:
        """New flows to the cluster IP go to `endpoint`."""
        where = endpoint if self.family is Family.IPV4 else f"[{self.address(endpoint)}]"
        self.iptables("-F OUTPUT")
        self.iptables(
            f"-A OUTPUT -d {self.address('172.30.0.10')} -p udp --dport 53 -j DNAT --to-destination {where}:5353"
        )

    def socket(self, *bound: str) -> socket.socket:
        kind = socket.AF_INET if self.family is Family.IPV4 else socket.AF_INET6
        made = self.inside(lambda: socket.socket(kind, socket.SOCK_DGRAM))
        self._sockets.append(made)
        made.settimeout(PATIENCE)
        for address in bound:
            made.bind((self.address(address), 5353))
        return made

    def routes(self, *endpoints: str) -> RouteTable:
        dns = service("kube-system/dns", "172.30.0.10", port(53, "dns", UDP))
        slices = endpoint_slice(*endpoints, of="kube-system/dns", ports=(slice_port(5353, "dns", UDP),), name="one")
        return routes_of(self.family, dns, *([slices] if endpoints else []))

    def entries(self) -> list[Entry]:
        def read() -> list[Entry]:
            with contextlib.closing(conntrack_socket()) as netlink:
                return list(udp_entries(netlink, self.family))

        return self.inside(read)

    def end(self, address: str, number: int) -> bytes:
        return end(self.address(address), number)


def routes_of(family: Family, *objects: object) -> RouteTable:
    return policy.routes(in_family(snapshot(*objects), family), in_family(options(), family))  # type: ignore[arg-type]


def _enter() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


@pytest.fixture(params=Family, ids=["IPv4", "IPv6"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with Place(request.param) as place:
        yield place


def ask(place: Place, client: socket.socket, servers: dict[str, socket.socket], seconds: float = PATIENCE) -> str:
    """Which of `servers` a datagram to the cluster IP gets to, and the answer back; "" if to none in that time."""
    client.sendto(b"which", (place.address("172.30.0.10"), 53))
    # The loopback device delivers before sendto returns, but for a machine that has put that off.
    ready, _, _ = select.select(list(servers.values()), [], [], seconds)
    for name, server in servers.items():
        if server in ready:
            _, sender = server.recvfrom(100)
            server.sendto(name.encode(), sender)
            answer, whence = client.recvfrom(100)
            assert (answer.decode(), whence[0]) == (name, place.address("172.30.0.10"))
            return name
    return ""


@pytest.mark.root
def test_an_endpoint_goes_and_its_clients_follow(place: Place) -> None:
    """Also those that keep their port and never pause."""
    servers = {name: place.socket(name) for name in ("10.0.1.1", "10.0.1.2")}
    client, flows = place.socket(), StaleFlows()
    place.translate("10.0.1.1")
    assert ask(place, client, servers) == "10.0.1.1"
    assert place.inside(lambda: flows.reconcile(place.routes("10.0.1.1"))) == 0
    assert ask(place, client, servers) == "10.0.1.1"
    place.translate("10.0.1.2")
    assert ask(place, client, servers) == "10.0.1.1", "conntrack has forgotten by itself: this test shows nothing"
    assert place.inside(lambda: flows.reconcile(place.routes("10.0.1.2"))) == 1
    assert ask(place, client, servers) == "10.0.1.2"
    assert flows.problems == ()


@pytest.mark.root
def test_should_preserve_udp_traffic_when_initial_unready_endpoints_get_ready(place: Place) -> None:
    """k/k #105657: a client has sent into the void before; its flow is [UNREPLIED], and each datagram renews it."""
    servers = {"10.0.1.1": place.socket("10.0.1.1")}
    client, flows = place.socket(), StaleFlows()
    assert place.inside(lambda: flows.reconcile(place.routes())) == 0
    assert ask(place, client, servers, 0.1) == ""
    place.translate("10.0.1.1")
    assert ask(place, client, servers, 0.1) == "", "conntrack has forgotten by itself: this test shows nothing"
    assert place.inside(lambda: flows.reconcile(place.routes("10.0.1.1"))) == 1
    assert ask(place, client, servers) == "10.0.1.1"


@pytest.mark.root
def test_a_restart_ends_no_flow_that_is_right(place: Place) -> None:
    servers = {"10.0.1.1": place.socket("10.0.1.1")}
    client = place.socket()
    place.translate("10.0.1.1")
    assert ask(place, client, servers) == "10.0.1.1"
    before = place.entries()
    assert place.inside(lambda: StaleFlows().reconcile(place.routes("10.0.1.1", "10.0.1.2"))) == 0
    assert [each.destination for each in place.entries()] == [each.destination for each in before]


@pytest.mark.root
def test_the_last_endpoint_goes_and_the_flow_is_refused_like_a_new_one(place: Place) -> None:
    servers = {"10.0.1.1": place.socket("10.0.1.1")}
    client, flows = place.socket(), StaleFlows()
    place.translate("10.0.1.1")
    assert ask(place, client, servers) == "10.0.1.1"
    place.iptables("-F OUTPUT")
    place.iptables(
        f"-A OUTPUT -d {place.address('172.30.0.10')} -p udp --dport 53 -m conntrack --ctstate NEW -j REJECT", "filter"
    )
    assert ask(place, client, servers) == "10.0.1.1"
    assert place.inside(lambda: flows.reconcile(place.routes())) == 1
    with pytest.raises(PermissionError if place.family is Family.IPV4 else OSError):
        ask(place, client, servers)


@pytest.mark.root
def test_flows_of_others_stay(place: Place) -> None:
    servers = {"10.0.1.1": place.socket("10.0.1.1")}
    client = place.socket()
    place.translate("10.0.1.1")
    assert ask(place, client, servers) == "10.0.1.1"
    client.sendto(b"x", (place.address("10.0.1.2"), 53))  # the port, not the address
    with contextlib.suppress(ConnectionRefusedError):
        client.sendto(b"x", (place.address("172.30.0.10"), 54))  # the address, not the port
    client.sendto(b"x", (place.address("192.168.99.99"), 53))
    assert len(place.entries()) == 4
    assert place.inside(lambda: StaleFlows().reconcile(place.routes("10.0.1.2"))) == 1
    assert {each.destination for each in place.entries()} == {
        place.end("10.0.1.2", 53),
        place.end("172.30.0.10", 54),
        place.end("192.168.99.99", 53),
    }


@pytest.mark.root
def test_the_kernel_sends_entries_of_udp_only(place: Place) -> None:
    client = place.socket()
    client.sendto(b"x", (place.address("192.168.99.99"), 53))
    kind = socket.AF_INET if place.family is Family.IPV4 else socket.AF_INET6

    def read() -> tuple[list[Entry], list[bytes], list[Entry]]:
        web = (place.address("10.0.1.1"), 80)
        with (
            socket.create_server(web, family=kind),
            socket.create_connection(web),
            contextlib.closing(conntrack_socket()) as netlink,
        ):
            chosen = list(udp_entries(netlink, place.family))
            everything = list(netlink.stream(0x101, struct.pack("=BBH", kind, 0, 0)))
            return chosen, everything, list(decoded(everything, place.family))

    chosen, everything, ours = place.inside(read)
    assert len(everything) > len(chosen)
    assert [each.destination for each in chosen] == [each.destination for each in ours]
    assert place.end("192.168.99.99", 53) in {each.destination for each in chosen}


@pytest.mark.root
def test_a_kernel_that_refuses_the_filter_is_asked_for_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.socket().sendto(b"x", (place.address("192.168.99.99"), 53))
    monkeypatch.setattr(ctnetlink, "_BY_PROTOCOL", 1 << 31)
    assert [each.destination for each in place.entries()] == [place.end("192.168.99.99", 53)]


@pytest.mark.root
def test_an_entry_that_has_gone_is_no_error(place: Place) -> None:
    client = place.socket()
    client.sendto(b"x", (place.address("192.168.99.99"), 53))
    (entry,) = place.entries()

    def twice() -> list[bool]:
        with contextlib.closing(conntrack_socket()) as netlink:
            return [delete(netlink, place.family, entry) for _ in range(2)]

    assert place.inside(twice) == [True, False]
    # Its successor has the same addresses and ports, and is another one.
    client.sendto(b"x", (place.address("192.168.99.99"), 53))
    assert place.inside(twice) == [False, False]
    assert len(place.entries()) == 1


@pytest.mark.root
def test_zones_tell_flows_of_the_same_addresses_apart(place: Place) -> None:
    """As with virtual routers, or Open vSwitch."""
    place.iptables(f"-A OUTPUT -d {place.address('172.30.0.10')} -p udp -j CT --zone 7", "raw")
    place.translate("10.0.1.1")
    client = place.socket()
    client.sendto(b"x", (place.address("172.30.0.10"), 53))
    (entry,) = [each for each in place.entries() if each.destination == place.end("172.30.0.10", 53)]
    assert entry.zoned
    assert place.inside(lambda: StaleFlows().reconcile(place.routes("10.0.1.2"))) == 1
    assert place.end("172.30.0.10", 53) not in {each.destination for each in place.entries()}


@pytest.mark.root
def test_a_refusal_is_an_error_with_a_number(place: Place) -> None:
    place.socket().sendto(b"x", (place.address("192.168.99.99"), 53))
    (entry,) = place.entries()
    broken = entry._replace(message=entry.message[:4] + attribute(0x8001, attribute(0x8001, b"")))

    def ask_to_delete() -> None:
        with contextlib.closing(conntrack_socket()) as netlink:
            delete(netlink, place.family, broken)

    with pytest.raises(OSError) as refused:
        place.inside(ask_to_delete)
    assert refused.value.errno == errno.EINVAL
    assert attributes(entry.message[4:])
