"""What passes a place's network device, frame by frame.

Rules of this file: a Wire sees everything from the moment it is made, in order, and what a test sends here goes out as
it is.
"""

from __future__ import annotations

import socket
from types import TracebackType

from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Place

_EVERY_PROTOCOL = 0x0003
_BUFFER = 4 << 20


class Wire:
    """`eth0` of a place."""

    def __init__(self, place: Place) -> None:
        with namespaces.inside(place.namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._socket.bind(("eth0", 0))
        self._socket.setblocking(False)

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def segments(self) -> list[Ether]:
        """The TCP segments that passed since this was last asked, either way."""
        found: list[Ether] = []
        while True:
            try:
                frame = Ether(self._socket.recv(1 << 16))
            except BlockingIOError:
                return found
            if TCP in frame:
                found.append(frame)

    def send(self, frame: Ether) -> None:
        """Checksums are computed if the frame has none."""
        self._socket.send(bytes(frame))


def source_of(frame: Ether) -> str:
    """The source address of an IP packet."""
    return str(frame.payload.src)
