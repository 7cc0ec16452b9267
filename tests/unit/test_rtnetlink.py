"""rtnetlink: attributes as bytes, and the kernel's own answers in a network namespace that a test makes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpflb.rtnetlink import (
    ADDRESS_EVENTS,
    GROUP_IPV4_ADDRESS,
    IFF_LOOPBACK,
    IFF_UP,
    RTM_DELADDR,
    RTM_NEWADDR,
    RTM_NEWLINK,
    Netlink,
    Overrun,
    addresses,
    attribute,
    attributes,
    default_devices,
    device_index,
    is_default_route,
    links,
    number,
    preferred_source,
    text,
)

CLONE_NEWNET = 0x40000000
CREATE = 0x400
LOOPBACK = 1


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40)))
def test_attributes_come_back(wanted: dict[int, bytes]) -> None:
    assert attributes(b"".join(attribute(*each) for each in wanted.items())) == wanted


@given(st.binary(max_size=80))
def test_any_bytes_are_survived(data: bytes) -> None:
    assert sum(map(len, attributes(data).values())) <= len(data)


def test_flags_of_a_type_are_no_part_of_it() -> None:
    assert attributes(attribute(2 | 0x8000, b"nested")) == {2: b"nested"}


def test_absent_attributes() -> None:
    assert (text(None), number(None)) == ("", 0)
    assert (text(b"eth0\0"), number(struct.pack("=I", 7))) == ("eth0", 7)


@pytest.mark.parametrize(
    ("family", "bits", "expected"),
    [(socket.AF_INET, 0, True), (socket.AF_INET6, 0, True), (socket.AF_INET, 24, False), (socket.AF_BRIDGE, 0, False)],
)
def test_default_routes(family: int, bits: int, expected: bool) -> None:
    assert is_default_route(struct.pack("=BBBBBBBBI", family, bits, 0, 0, 0, 0, 0, 0, 0)) is expected


# ---- The kernel


@pytest.fixture
def inside() -> Iterator[ThreadPoolExecutor]:
    """A thread in a network namespace of its own, which goes with it."""

    def enter() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")

    with ThreadPoolExecutor(1, initializer=enter) as thread:
        yield thread


def put_address(netlink: Netlink, address: str, kind: int = RTM_NEWADDR) -> None:
    family, raw = socket.AF_INET, socket.inet_aton(address)
    body = struct.pack("=BBBBI", family, 32, 0, 0, LOOPBACK) + attribute(2, raw) + attribute(1, raw)
    netlink.request(kind, CREATE if kind == RTM_NEWADDR else 0, body)


def set_up(netlink: Netlink) -> None:
    netlink.request(RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, LOOPBACK, IFF_UP, IFF_UP))


@pytest.mark.root
def test_what_a_new_namespace_has(inside: ThreadPoolExecutor) -> None:
    def look() -> None:
        with contextlib.closing(Netlink()) as netlink:
            assert links(netlink)[LOOPBACK].name == "lo"
            assert links(netlink)[LOOPBACK].flags & (IFF_LOOPBACK | IFF_UP) == IFF_LOOPBACK
            assert addresses(netlink) == ()
            set_up(netlink)
            assert {socket.inet_ntop(socket.AF_INET6, each.address) for each in addresses(netlink)} == {
                "::ffff:127.0.0.1",
                "::1",
            }
            assert default_devices(netlink) == {}
            assert (preferred_source(netlink, 4), preferred_source(netlink, 6)) == (None, None)

    inside.submit(look).result()


@pytest.mark.root
def test_a_refusal_is_the_kernels_own(inside: ThreadPoolExecutor) -> None:
    def ask() -> None:
        with contextlib.closing(Netlink()) as netlink:
            with pytest.raises(
                OSError, match=r"Cannot assign requested address \(.*[Aa]ddress not found.*\)"
            ) as refused:
                put_address(netlink, "192.0.2.1", RTM_DELADDR)
            assert refused.value.errno == errno.EADDRNOTAVAIL
            assert links(netlink)  # the socket is none the worse for it

    inside.submit(ask).result()


@pytest.mark.root
def test_many_requests_at_once_are_each_carried_out_or_refused(inside: ThreadPoolExecutor) -> None:
    def body(host: int, link: int = LOOPBACK) -> bytes:
        raw = socket.inet_aton(f"10.0.{host // 250}.{host % 250}")
        return struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, link) + attribute(2, raw) + attribute(1, raw)

    def ask() -> None:
        with contextlib.closing(Netlink()) as netlink:
            missing = {7, 1999}
            refused = netlink.batch(
                RTM_NEWADDR, CREATE, (body(host, 99 if host in missing else LOOPBACK) for host in range(3000))
            )
            assert {index: error.errno for index, error in refused.items()} == dict.fromkeys(missing, errno.ENODEV)
            assert len(addresses(netlink)) == 2998
            assert netlink.batch(RTM_NEWADDR, CREATE, ()) == {}
            assert links(netlink)  # nothing is left in the socket

    inside.submit(ask).result()


@pytest.mark.root
def test_a_device_is_found_by_its_name(inside: ThreadPoolExecutor) -> None:
    def ask() -> None:
        with contextlib.closing(Netlink()) as netlink:
            assert device_index(netlink, "lo") == LOOPBACK
            assert device_index(netlink, "kube-ipvs0") is None

    inside.submit(ask).result()


@pytest.mark.root
def test_events_but_ones_own(inside: ThreadPoolExecutor) -> None:
    def listen() -> None:
        with (
            contextlib.closing(Netlink(GROUP_IPV4_ADDRESS)) as events,
            contextlib.closing(Netlink()) as mine,
            contextlib.closing(Netlink()) as others,
        ):
            assert events.events() == []
            put_address(mine, "192.0.2.1")
            put_address(others, "192.0.2.2")
            ((kind, body),) = events.events(ignore=mine.port)
            assert kind in ADDRESS_EVENTS
            assert attributes(body[8:])[2] == socket.inet_aton("192.0.2.2")

    inside.submit(listen).result()


@pytest.mark.root
def test_what_was_lost_is_said_once(inside: ThreadPoolExecutor) -> None:
    def listen() -> None:
        with contextlib.closing(Netlink(GROUP_IPV4_ADDRESS)) as events, contextlib.closing(Netlink()) as netlink:
            for host in range(8000):
                put_address(netlink, f"10.0.{host // 250}.{host % 250}")
            with pytest.raises(Overrun):
                events.events()
            assert not select.select([events], [], [], 0)[0]
            assert events.events() == []
            put_address(netlink, "192.0.2.1")
            assert len(events.events()) == 1

    inside.submit(listen).result()
