"""This node's addresses as the kernel tells them, in a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ebpflb.source import LocalAddresses, Synced
from ebpflb.source.local import LocalSource

pytestmark = pytest.mark.root

DEADLINE = 30.0
NAMESPACE = f"ebpflb-local-{os.getpid()}"
CLONE_NEWNET = 0x40000000


def enter_namespace() -> None:
    """Move this thread into the namespace."""
    with open(f"/run/netns/{NAMESPACE}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


class Inside:
    """A LocalSource whose every call is made in the namespace."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self.source = thread.submit(LocalSource).result()

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", NAMESPACE, *arguments], check=True, timeout=DEADLINE)

    def read(self) -> list[object]:
        return list(self._thread.submit(self.source.read).result())

    def next(self, expected: Callable[[LocalAddresses], bool]) -> LocalAddresses:
        """The first news like this."""
        deadline, last = time.monotonic() + DEADLINE, None
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.source], [], [], left)[0]:
                for last in self.read():
                    if isinstance(last, LocalAddresses) and expected(last):
                        return last
        pytest.fail(f"last heard: {last}")


@pytest.fixture
def inside() -> Iterator[Inside]:
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True, timeout=DEADLINE)
    try:
        with ThreadPoolExecutor(1, initializer=enter_namespace) as thread:
            made = Inside(thread)
            with contextlib.closing(made.source):
                made.ip("link", "set", "lo", "up")
                made.ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
                for device in ("d0", "d1"):
                    made.ip("link", "set", device, "addrgenmode", "none")
                    made.ip("link", "set", device, "up")
                yield made
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True, timeout=DEADLINE)


LOOPBACK = ("127.0.0.1", "::1")


def test_the_first_read_is_complete(inside: Inside) -> None:
    assert inside.read() == [LocalAddresses(LOOPBACK, ()), Synced("local")]
    assert inside.read() == []


def test_addresses_come_and_go(inside: Inside) -> None:
    inside.read()
    inside.ip("address", "add", "192.168.0.2/24", "dev", "d0")
    assert inside.next(lambda said: len(said.addresses) == 3) == LocalAddresses(
        ("127.0.0.1", "192.168.0.2", "::1"), ("192.168.0.2",)
    )
    inside.ip("address", "add", "fd00::2/64", "dev", "d0", "nodad")
    assert inside.next(lambda said: len(said.addresses) == 4) == LocalAddresses(
        ("127.0.0.1", "192.168.0.2", "::1", "fd00::2"), ("192.168.0.2", "fd00::2")
    )
    inside.ip("address", "del", "192.168.0.2/24", "dev", "d0")
    assert inside.next(lambda said: len(said.addresses) == 3) == LocalAddresses(
        ("127.0.0.1", "::1", "fd00::2"), ("fd00::2",)
    )


def test_the_default_route_says_which_address_is_the_main_one(inside: Inside) -> None:
    for address in ("192.168.0.2/24", "192.168.1.2/24"):
        inside.ip("address", "add", address, "dev", "d0")
    first = inside.read()[0]
    assert isinstance(first, LocalAddresses) and first.primary == ("192.168.0.2",)
    inside.ip("route", "add", "default", "via", "192.168.1.1")
    assert inside.next(lambda said: said.primary == ("192.168.1.2",)).addresses == first.addresses
    inside.ip("route", "change", "default", "via", "192.168.1.1", "src", "192.168.0.2")
    inside.next(lambda said: said.primary == ("192.168.0.2",))


def test_link_local_ipv6_is_left_out(inside: Inside) -> None:
    """Each pod's veth has one: nothing about NodePorts may hang on it."""
    inside.read()
    inside.ip("address", "add", "fe80::1/64", "dev", "d0", "nodad")
    inside.ip("address", "add", "169.254.1.1/32", "dev", "d0")
    said = inside.next(lambda said: len(said.addresses) == 3)
    assert said.addresses == ("127.0.0.1", "169.254.1.1", "::1")
    assert said.primary == ("169.254.1.1",)


def test_addresses_of_services_are_not_the_nodes(inside: Inside) -> None:
    """IPVS has them on a device of its own; node ports there would be one for each cluster IP."""
    inside.ip("link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "d2")
    inside.ip("address", "add", "172.30.0.41/32", "dev", "kube-ipvs0")
    inside.ip("address", "add", "192.168.0.2/24", "dev", "d0")
    first = inside.read()[0]
    assert first == LocalAddresses(("127.0.0.1", "192.168.0.2", "::1"), ("192.168.0.2",))
    inside.ip("address", "add", "172.30.0.42/32", "dev", "kube-ipvs0")
    assert select.select([inside.source], [], [], DEADLINE)[0]
    assert inside.read() == []


def test_a_peer_is_not_ours(inside: Inside) -> None:
    inside.ip("address", "add", "10.0.0.1", "peer", "10.0.0.2/32", "dev", "d0")
    first = inside.read()[0]
    assert isinstance(first, LocalAddresses) and first.addresses == ("10.0.0.1", *LOOPBACK)


def test_other_routes_are_no_news(inside: Inside) -> None:
    inside.read()
    inside.ip("route", "add", "10.1.0.0/16", "dev", "d0")
    inside.ip("address", "add", "10.0.0.1/32", "dev", "d0")
    said = inside.next(lambda said: "10.0.0.1" in said.addresses)
    assert said.primary == ("10.0.0.1",)
    inside.ip("route", "del", "10.1.0.0/16", "dev", "d0")
    assert select.select([inside.source], [], [], DEADLINE)[0]
    assert inside.read() == []


def test_more_events_than_the_socket_holds(inside: Inside) -> None:
    """What was lost is looked up."""
    inside.read()
    batch = "".join(f"address add 10.{number // 250}.{number % 250}.1/32 dev d0\n" for number in range(2000))
    subprocess.run(["ip", "-n", NAMESPACE, "-batch", "-"], input=batch, text=True, check=True, timeout=DEADLINE)
    assert len(inside.next(lambda said: len(said.addresses) == 2002).addresses) == 2002
