"""The kernel as the IPVS dataplane sees it: virtual servers, ipsets, kube-ipvs0, addresses.

Rules of this file: it asks and writes, and decides nothing. What is refused is an OSError with a sentence, of many
writes the refusals by their index; what is to be removed and is not there is no refusal.

pyroute2 knows the messages that make sets and devices, which are few. What there is by the hundred thousand (virtual
servers, destinations, entries, addresses) is encoded by `messages` and sent many to a system call: pyroute2 takes 60 µs
for each, which is seven seconds for 10,000 Services of 10 endpoints. It is imported when it is first needed, since it
takes 21 MB.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ebpflb import rtnetlink
from ebpflb.dataplane.ipvs import messages
from ebpflb.dataplane.ipvs.messages import Operation, SetHeader
from ebpflb.dataplane.ipvs.names import DEVICE, Set, SetType
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.reading import Destination
from ebpflb.dataplane.ipvs.table import EntryValue, Server, Settings, unpacked
from ebpflb.model import Address
from ebpflb.rtnetlink import IFA_F_DADFAILED, SCOPE_LINK, Netlink, attribute, attributes

MOST_ENTRIES = 1 << 20
"""maxelem of our sets: a limit, not a size."""

_NETFILTER, _GENERIC = 12, 16
_CONTROL, _GET_FAMILY = 16, 3
_CREATE, _EXCLUSIVE = 0x400, 0x200
_NO_DAD = 0x02
_BUNDLE = 128
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

_GONE = {errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL}

# linux/netfilter/ipset/ip_set.h, which strerror does not know.
_IPSET_ERRORS = {
    4098: "the kernel has no such type of set: it lacks the module",
    4099: "the kernel has as many sets as it can have",
    4101: "a rule uses the set",
    4103: "the entry is there already",
    4352: "the set is full",
}


_AGAIN = {
    (messages.NEW_SERVICE, errno.EEXIST): messages.SET_SERVICE,
    (messages.SET_SERVICE, errno.ESRCH): messages.NEW_SERVICE,
    (messages.NEW_DEST, errno.EEXIST): messages.SET_DEST,
    (messages.SET_DEST, errno.ENOENT): messages.NEW_DEST,
}
"""What to do where the kernel holds something else than we thought."""

_DELETES = (messages.DEL_SERVICE, messages.DEL_DEST)


class Kernel(Protocol):
    """What the dataplane asks of the kernel. Every method raises OSError if the kernel refuses the whole."""

    def is_loaded(self) -> bool:
        """Whether IPVS is in use at all; asking loads nothing."""

    def servers(self) -> dict[Server, Settings]:
        """All virtual servers of this network namespace."""

    def destinations(self, servers: Iterable[Server]) -> dict[Server, dict[bytes, Destination]]:
        """Those of virtual servers; one that is not there has none."""

    def apply(self, operations: Sequence[Operation]) -> dict[int, OSError]:
        """Carry out each, in order; what was refused, by index."""

    def set_timeouts(self, options: IpvsOptions) -> None:
        """Those that are not 0."""

    def headers(self) -> dict[str, SetHeader]:
        """All ipsets by name."""

    def create(self, each: Set, version: int) -> None:
        """Make an empty ipset."""

    def destroy(self, name: str) -> None:
        """Remove an ipset, which no rule may use."""

    def entries(self, each: Set, version: int) -> dict[bytes, EntryValue]:
        """What an ipset holds; nothing if it is not there."""

    def change(
        self, each: Set, version: int, entries: Mapping[bytes, EntryValue], *, add: bool
    ) -> dict[bytes, OSError]:
        """Add (or change) entries, or remove them; what was refused, by key."""

    def has_device(self) -> bool:
        """Whether there is a kube-ipvs0."""

    def create_device(self) -> None:
        """Make kube-ipvs0; no matter if it is there."""

    def remove_device(self) -> None:
        """Remove kube-ipvs0 with its addresses; no matter if it is not there."""

    def addresses(self) -> tuple[set[bytes], tuple[Address, ...]]:
        """Those of kube-ipvs0, packed, and all others that this node has."""

    def bind(self, addresses: Sequence[bytes], *, add: bool) -> dict[bytes, OSError]:
        """Give addresses to kube-ipvs0, or take them; what was refused, by address."""


class NetlinkKernel:
    """The kernel of the network namespace that the calling thread is in."""

    # ---- IPVS

    def is_loaded(self) -> bool:
        return Path("/proc/thread-self/net/ip_vs").exists()

    def servers(self) -> dict[Server, Settings]:
        with _ipvs() as (netlink, family):
            return dict(
                messages.read_service(body) for body in netlink.dump(family, messages.generic(messages.GET_SERVICE))
            )

    def destinations(self, servers: Iterable[Server]) -> dict[Server, dict[bytes, Destination]]:
        with _ipvs() as (netlink, family):
            return {
                server: dict(
                    messages.read_destination(body, server.version)
                    for body in netlink.dump(family, messages.destinations_of(server))
                )
                for server in servers
            }

    def apply(self, operations: Sequence[Operation]) -> dict[int, OSError]:
        with _ipvs() as (netlink, family):
            refused = netlink.batch(family, 0, (operation.body() for operation in operations))
            again: dict[int, Operation] = {}
            for index, error in list(refused.items()):
                operation = operations[index]
                command = _AGAIN.get((operation.command, error.errno or 0))
                if command is not None:
                    again[index] = operation._replace(command=command)
                elif operation.command in _DELETES and error.errno in _GONE:
                    del refused[index]
            if again:
                indices = list(again)
                for index in indices:
                    del refused[index]
                failed = netlink.batch(family, 0, (operation.body() for operation in again.values()))
                refused.update((indices[at], error) for at, error in failed.items())
            return refused

    def set_timeouts(self, options: IpvsOptions) -> None:
        wanted = (options.tcp_timeout, options.tcp_fin_timeout, options.udp_timeout)
        if any(wanted):
            with _ipvs() as (netlink, family):
                netlink.request(family, 0, messages.timeouts(*wanted))

    # ---- ipsets

    def headers(self) -> dict[str, SetHeader]:
        only_headers = struct.pack("!HHI", 0, 0, 1 << 2)
        body = messages.set_message("") + struct.pack("=HH", 8, 6 | 0x4000) + only_headers[4:]
        with _closing(_NETFILTER) as netlink:
            found = (messages.read_set(body) for body in netlink.dump(_type(messages.LIST), body))
            return {header.name: header for header in found if header is not None}

    def create(self, each: Set, version: int) -> None:
        with _ipsets() as sets:
            options: dict[str, Any] = {"family": int(_FAMILIES[version]), "maxelem": MOST_ENTRIES}
            if each.type is SetType.PORT:
                options = {"bitmap_ports_range": (0, 65535)}
            if each.with_comment:
                options["comment"] = True
            if each.with_mark:
                options["skbinfo"] = True
            sets.create(each.named(version), stype=each.type.value, exclusive=True, **options)

    def destroy(self, name: str) -> None:
        with _ipsets() as sets, _absence_is_fine():
            sets.destroy(name)

    def entries(self, each: Set, version: int) -> dict[bytes, EntryValue]:
        with _closing(_NETFILTER) as netlink, _absence_is_fine():
            bodies = netlink.dump(_type(messages.LIST), messages.set_message(each.named(version)))
            return {key: value for body in bodies for key, value in messages.read_entries(body, each)}
        return {}

    def change(
        self, each: Set, version: int, entries: Mapping[bytes, EntryValue], *, add: bool
    ) -> dict[bytes, OSError]:
        name, command = each.named(version), _type(messages.ADD if add else messages.DELETE)

        def body(parts: Iterable[bytes]) -> bytes:
            return messages.entries_message(name, b"".join(parts))

        def encoded(key: bytes) -> bytes:
            return messages.entry(each.type, version, key, entries[key] if add else None)

        refused: dict[bytes, OSError] = {}
        with _closing(_NETFILTER) as netlink:
            bundles = list(_bundles(entries))
            failed = netlink.batch(command, 0, (body(map(encoded, keys)) for keys in bundles))
            for index in failed:
                # It stopped at the first that it did not like: one by one, then.
                alone = netlink.batch(command, 0, (body((encoded(key),)) for key in bundles[index]))
                refused.update((bundles[index][at], _in_words(error)) for at, error in alone.items())
        if not add:
            refused = {key: error for key, error in refused.items() if error.errno not in _GONE}
        return refused

    # ---- The device and addresses

    def has_device(self) -> bool:
        with _closing(socket.NETLINK_ROUTE) as netlink:
            return rtnetlink.device_index(netlink, DEVICE) is not None

    def create_device(self) -> None:
        if self.has_device():
            return
        with _routes() as routes:
            routes.link("add", ifname=DEVICE, kind="dummy")

    def remove_device(self) -> None:
        with _closing(socket.NETLINK_ROUTE) as netlink:
            index = rtnetlink.device_index(netlink, DEVICE)
        if index is not None:
            with _routes() as routes:
                routes.link("del", index=index)

    def addresses(self) -> tuple[set[bytes], tuple[Address, ...]]:
        with _closing(socket.NETLINK_ROUTE) as netlink:
            index = rtnetlink.device_index(netlink, DEVICE)
            bound: set[bytes] = set()
            others: set[bytes] = set()
            for each in rtnetlink.addresses(netlink):
                raw = each.address[12:] if each.version == 4 else each.address
                if each.version == 6 and each.scope == SCOPE_LINK:
                    continue
                if each.ifindex == index:
                    bound.add(raw)
                elif not each.flags & IFA_F_DADFAILED:
                    others.add(raw)
        return bound, tuple(unpacked(each) for each in sorted(others, key=lambda raw: (len(raw), raw)))

    def bind(self, addresses: Sequence[bytes], *, add: bool) -> dict[bytes, OSError]:
        with _closing(socket.NETLINK_ROUTE) as netlink:
            index = rtnetlink.device_index(netlink, DEVICE)
            if index is None:
                if not add:
                    return {}
                raise OSError(errno.ENODEV, f"there is no {DEVICE}")
            kind = rtnetlink.RTM_NEWADDR if add else rtnetlink.RTM_DELADDR
            refused = netlink.batch(
                kind, _CREATE | _EXCLUSIVE if add else 0, (_address(index, each) for each in addresses)
            )
        fine = {errno.EEXIST} if add else _GONE
        return {addresses[at]: error for at, error in refused.items() if error.errno not in fine}


def _address(index: int, address: bytes) -> bytes:
    version6 = len(address) == 16
    head = struct.pack(
        "=BBBBI",
        socket.AF_INET6 if version6 else socket.AF_INET,
        len(address) * 8,
        _NO_DAD if version6 else 0,
        0,
        index,
    )
    return head + attribute(2, address) + attribute(1, address)


def _bundles(entries: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Keys, as many as one message may have: an attribute has at most 64 KB, and an entry's comment 255 bytes."""
    keys = iter(entries)
    while bundle := list(itertools.islice(keys, _BUNDLE)):
        yield bundle


def _type(command: int) -> int:
    return messages.SUBSYSTEM << 8 | command


@contextlib.contextmanager
def _closing(protocol: int) -> Iterator[Netlink]:
    """A socket for a moment. Errors that only ipset knows get words."""
    netlink = Netlink(protocol=protocol)
    try:
        yield netlink
    except OSError as error:
        raise _in_words(error) from error
    finally:
        netlink.close()


@contextlib.contextmanager
def _ipvs() -> Iterator[tuple[Netlink, int]]:
    """A socket, and the number that IPVS has in generic netlink; asking for it loads the module."""
    with _closing(_GENERIC) as netlink:
        body = struct.pack("=BBH", _GET_FAMILY, 1, 0) + attribute(2, b"IPVS\0")
        try:
            (answer,) = netlink.request(_CONTROL, 0, body)
        except FileNotFoundError:
            # Older kernels (5.10) do not load the module by that name.
            if not _modprobe("ip_vs"):
                raise
            (answer,) = netlink.request(_CONTROL, 0, body)
        (number,) = struct.unpack("=H", attributes(answer[4:])[1])
        yield netlink, number


def _modprobe(module: str) -> bool:
    """Load a module; whether it could be."""
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if modprobe is None:
        return False
    return subprocess.run([modprobe, "--quiet", module], capture_output=True, check=False).returncode == 0


def _in_words(error: OSError) -> OSError:
    known = _IPSET_ERRORS.get(error.errno or 0)
    return OSError(error.errno, known) if known else error


@contextlib.contextmanager
def _absence_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise


@contextlib.contextmanager
def _ipsets() -> Iterator[Any]:
    """pyroute2's ipsets, its errors as OSError."""
    from pyroute2 import IPSet  # see the top of this file
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPSet() as sets:
            yield sets
    except NetlinkError as error:
        raise _in_words(OSError(error.code, os.strerror(error.code))) from error


@contextlib.contextmanager
def _routes() -> Iterator[Any]:
    """pyroute2's links, its errors as OSError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as routes:
            yield routes
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error
