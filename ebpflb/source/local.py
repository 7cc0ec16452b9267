"""What the kernel says of this node: its addresses.

Rules of this file: rtnetlink, read only, in this process's network namespace; no other source of truth.

The addresses of kube-ipvs0 are Services', not the node's: else each cluster IP would get every node port.

IPv6 link-local addresses are left out. Every veth brings one, so that each pod's coming would change the node's
addresses and with them every NodePort; and no Service can be reached there, since a socket address names the link too.
"""

from __future__ import annotations

import contextlib
import socket

from ebpflb import rtnetlink
from ebpflb.errors import SourceError
from ebpflb.model import Problem
from ebpflb.rtnetlink import IFA_F_DADFAILED, SCOPE_GLOBAL, SCOPE_LINK, Netlink, Overrun
from ebpflb.source import LIVE, Condition, Event, LocalAddresses, Synced

_GROUPS = (
    rtnetlink.GROUP_IPV4_ADDRESS,
    rtnetlink.GROUP_IPV4_ROUTE,
    rtnetlink.GROUP_IPV6_ADDRESS,
    rtnetlink.GROUP_IPV6_ROUTE,
)


SERVICE_DEVICE = "kube-ipvs0"
"""Where IPVS has the addresses of Services: ours, or kube-proxy's."""


class LocalSource:
    """This node's addresses, followed as they change."""

    name = "local"

    def __init__(self) -> None:
        # Deaf before the first look would be blind to what happens between the two.
        self._events = Netlink(*_GROUPS)
        self._last: LocalAddresses | None = None

    def fileno(self) -> int:
        """Readable when addresses or routes changed."""
        return self._events.fileno()

    def close(self) -> None:
        """Release descriptors."""
        self._events.close()

    def problems(self) -> tuple[Problem, ...]:
        """None: what cannot be read is raised."""
        return ()

    def condition(self) -> Condition:
        """Live: the kernel is always there."""
        return LIVE

    def read(self) -> list[Event]:
        """LocalAddresses if they are new. Raises SourceError."""
        concerns_us = self._drain()
        if self._last is not None and not concerns_us:
            return []
        try:
            now = look()
        except OSError as error:
            raise SourceError(f"the kernel's addresses cannot be read: {error.strerror}") from error
        first, changed = self._last is None, now != self._last
        self._last = now
        return [*([now] if changed else []), *([Synced(self.name)] if first else [])]

    def _drain(self) -> bool:
        """Whether anything was said about addresses or default routes; other routes come and go with every pod."""
        try:
            return _is_news(self._events.events())
        except Overrun:
            return True
        except OSError as error:
            raise SourceError(f"the kernel's events cannot be read: {error.strerror}") from error


def _is_news(events: list[tuple[int, bytes]]) -> bool:
    """Whether anything was said about the node's addresses or default routes. Other routes come and go with every pod,
    addresses of Services with every Service, each of which would cost a look at all of them."""
    changed = {rtnetlink.ifindex_of_address(body) for kind, body in events if kind in rtnetlink.ADDRESS_EVENTS}
    if changed:
        with contextlib.closing(Netlink()) as kernel:
            changed.discard(rtnetlink.device_index(kernel, SERVICE_DEVICE) or 0)
    return bool(changed) or any(
        kind in rtnetlink.ROUTE_EVENTS and rtnetlink.is_default_route(body) for kind, body in events
    )


def look() -> LocalAddresses:
    """All addresses that the kernel calls its own, IPv4 first and by value, and its main one per family: the source
    that its default route prefers, else its first global address. Raises OSError."""
    with contextlib.closing(Netlink()) as kernel:
        services = rtnetlink.device_index(kernel, SERVICE_DEVICE)
        found = [
            address
            for address in rtnetlink.addresses(kernel)
            if address.ifindex != services
            and not address.flags & IFA_F_DADFAILED
            and not (address.version == 6 and address.scope == SCOPE_LINK)
        ]
        primary = []
        for version in (4, 6):
            in_order = [each.address for each in found if each.scope == SCOPE_GLOBAL and each.version == version]
            first = rtnetlink.preferred_source(kernel, version) or next(iter(in_order), None)
            # An address on loopback alone (a router's, say) is global, 127.0.0.1 is not.
            if first is not None and first in in_order:
                primary.append(_text(version, first))
    own = sorted({(each.version, each.address) for each in found})
    return LocalAddresses(tuple(_text(*each) for each in own), tuple(primary))


def _text(version: int, address: bytes) -> str:
    return (
        socket.inet_ntop(socket.AF_INET, address[12:]) if version == 4 else socket.inet_ntop(socket.AF_INET6, address)
    )
