"""What drivers say that they can do with XDP: the generic netlink family `netdev` (Linux 6.3), and names before it.

Rules of this file: it asks and decides nothing about devices. Where the kernel does not tell, the answer is what a
driver of that name is known to do once it runs a program, and nothing that is not known.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct

from ebpflb.rtnetlink import Netlink, attribute, attributes, number, text

BASIC, REDIRECT, NDO_XMIT = 1, 2, 4
"""NETDEV_XDP_ACT_…: runs programs and sends back; lets them redirect; takes what is redirected to it."""

_GENERIC = 16
_CONTROLLER, _GET_FAMILY = 16, 3
_DEV_GET = 1
_DEVICE, _FEATURES = 1, 3
_SIOCETHTOOL = 0x8946
_GDRVINFO, _DRVINFO_BYTES = 3, 196
_GFLAGS, _FLAG_RXVLAN = 0x25, 1 << 8
_SENDERS = frozenset(("i40e", "ice", "ixgbe", "mlx5_core", "virtio_net", "tun"))
"""Drivers that take redirected frames as soon as they run a program themselves, in every kernel since 5.10. A veth is
none: it delivers only where its other end has a program (or, by a bit that nobody tells, GRO)."""


class Features:
    """What the devices of one network namespace can do. Wait for `fileno()`, where it is not None: then `changed()`."""

    def __init__(self) -> None:
        self._requests = Netlink(protocol=_GENERIC)
        self._ioctl = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._events: Netlink | None = None
        self._family = 0
        try:
            self._family, group = _resolve(self._requests)
            if group:
                self._events = Netlink(group, protocol=_GENERIC)
        except OSError as error:
            if error.errno != errno.ENOENT:  # before 6.3
                self.close()
                raise

    def fileno(self) -> int | None:
        """Readable when some device can do more or less than before; None where the kernel does not tell."""
        return self._events.fileno() if self._events is not None else None

    def changed(self) -> bool:
        """Take in what has been told; whether there was anything. Raises rtnetlink.Overrun."""
        return bool(self._events is not None and self._events.events())

    def close(self) -> None:
        self._requests.close()
        self._ioctl.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def all(self) -> dict[int, int] | None:
        """NETDEV_XDP_ACT_… bits by device; None where the kernel does not tell. Raises OSError."""
        if not self._family:
            return None
        found = {}
        for message in self._requests.dump(self._family, struct.pack("=BBH", _DEV_GET, 1, 0)):
            has = attributes(message[4:])
            if _DEVICE in has and _FEATURES in has:
                found[number(has[_DEVICE])] = int(struct.unpack_from("=Q", has[_FEATURES])[0])
        return found

    def driver(self, name: str) -> str:
        """The driver of a device, as ethtool says it; "" if it does not."""
        return text(self._ethtool(name, _GDRVINFO, _DRVINFO_BYTES)[4:36])

    def strips_tags(self, name: str) -> bool:
        """Whether a device takes VLAN tags off frames before programs see them (ethtool's rx-vlan-offload)."""
        return bool(number(self._ethtool(name, _GFLAGS, 8)[4:8]) & _FLAG_RXVLAN)

    def _ethtool(self, name: str, command: int, size: int) -> bytes:
        """What ethtool's ioctl answers, zeros if nothing."""
        room = ctypes.create_string_buffer(struct.pack("=I", command), size)
        # struct ifreq: the name, and where the command is.
        request = struct.pack("@16sP16x", name.encode()[:15], ctypes.addressof(room))
        try:
            fcntl.ioctl(self._ioctl.fileno(), _SIOCETHTOOL, request)
        except OSError:
            return bytes(size)
        return room.raw


def sends(features: int | None, driver: str) -> bool:
    """Whether a device that runs a program in its driver takes frames from programs, its own and other devices'.
    `features` are its bits, None where the kernel does not tell: then `driver` does."""
    if features is not None:
        return bool(features & NDO_XMIT)
    return driver in _SENDERS


def _resolve(netlink: Netlink) -> tuple[int, int]:
    """The number of the family, and of its group for news (0: none)."""
    body = struct.pack("=BBH", _GET_FAMILY, 1, 0) + attribute(2, b"netdev\0")
    (answer,) = netlink.request(_CONTROLLER, 0, body)
    has = attributes(answer[4:])
    groups = {
        text(group.get(1)): number(group.get(2))
        for group in (attributes(entry) for entry in attributes(has.get(7, b"")).values())
    }
    return int(struct.unpack("=H", has[1][:2])[0]), groups.get("mgmt", 0)
