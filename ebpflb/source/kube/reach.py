"""One Access at work: its addresses, of which one is current, and the token that is sent.

Rules of this file: it remembers and decides which address comes first; it asks no server anything. A new Access is a
new Reach, and the old one's idle connections are closed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ebpflb.source.kube import Unreachable
from ebpflb.source.kube.access import Access, Address
from ebpflb.source.kube.connections import Connections, Live, tls_context

log = logging.getLogger("ebpflb.api")

_TOKEN_SECONDS = 60.0
_MOST_FAULTS = 3


class Token:
    """The token that is sent; of a file, what it last held. Any thread may call any method."""

    def __init__(self, access: Access, clock: Callable[[], float]) -> None:
        self._path = access.token_file
        self._text = access.token
        self._identity = access.identity
        self._clock = clock
        # Held while the file is read: who comes meanwhile would go as nobody, and be refused for that.
        self._lock = threading.Lock()
        self._read_at: float | None = None
        self._trouble = ""

    def text(self) -> str:
        with self._lock:
            if self._path and (self._read_at is None or self._clock() - self._read_at >= _TOKEN_SECONDS):
                self._read()
        if not (self._text.isascii() and self._text.isprintable()):
            # It would be in the text of what the library raises.
            raise Unreachable(f"{self._identity} cannot be sent: it holds characters that no token has")
        return self._text

    def read(self) -> None:
        """Read the file now. What it last held stays where it cannot be read. Raises Unreachable if it never could."""
        with self._lock:
            self._read()

    def _read(self) -> None:
        self._read_at = self._clock()
        trouble = ""
        try:
            with open(self._path) as file:
                text = file.read().strip()
            trouble = "" if text else "it is empty"
        except OSError as error:
            trouble = error.strerror or str(error)
        except ValueError:
            trouble = "it is not text"
        if not trouble:
            self._text = text
        elif not self._text:
            self._read_at = None
            raise Unreachable(f"the token file {self._path} cannot be read: {trouble}")
        elif trouble != self._trouble:
            log.warning("the token file %s cannot be read: %s; the last token stays in use", self._path, trouble)
        self._trouble = trouble


class Reach:
    """One Access, and what has come of it so far."""

    def __init__(self, access: Access, live: Live, clock: Callable[[], float]) -> None:
        self.access = access
        context = tls_context(access) if any(address.tls for address in access.addresses) else None
        self.places = tuple(
            Connections(address, context if address.tls else None, live) for address in access.addresses
        )
        self.token = Token(access, clock)
        self._lock = threading.Lock()
        self._current = 0
        self._faults = 0
        self._told = -1

    def in_turn(self) -> list[tuple[int, Connections]]:
        first = self._current
        places = list(enumerate(self.places))
        return places[first:] + places[:first]

    def prefer(self, address: Address) -> None:
        """Begin with this one, if it is still there and no last resort."""
        if address in self.access.addresses and not address.note:
            self._current = self.access.addresses.index(address)

    @property
    def current(self) -> Address:
        return self.access.addresses[self._current]

    def worked(self, index: int) -> None:
        with self._lock:
            self._faults = 0
            self._current = index
            told, self._told = self._told, index
        if told != index:
            log.info("the API server is used at %s", self.access.addresses[index].url)

    def failed(self, index: int, *, at_once: bool) -> None:
        """Go on to the next address; not `at_once`, only when this one keeps failing."""
        with self._lock:
            if index != self._current:
                return
            self._faults += 1
            if at_once or self._faults >= _MOST_FAULTS:
                self._faults = 0
                self._current = (index + 1) % len(self.places)

    def close(self) -> None:
        for place in self.places:
            place.close()
