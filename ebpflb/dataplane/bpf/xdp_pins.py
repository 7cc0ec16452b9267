"""The BPF links by which devices run our XDP program: held by descriptors, and pinned for whoever comes next.

    <bpffs>/links/xdp-<index of the device>

Rules of this file: devices are indexes here. It makes no link and ends none, and knows neither modes nor wishes. A pin
that cannot be had is said; the link is held all the same, and the next audit tries again.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ebpflb.dataplane.bpf import pins, program_calls
from ebpflb.dataplane.bpf.xdp_links import runs_on
from ebpflb.errors import EbpflbError
from ebpflb.rtnetlink import Link

log = logging.getLogger(__name__)

_PIN = "xdp-"


class PinnedLinks:
    """The links that this process holds, by device; `directory` has the pins."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[int, int] = {}
        self._looked_at: set[int] = set()  # whose pins are known to be right

    def close(self) -> None:
        """Let go of descriptors; what runs goes on, by its pin."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def doubt(self) -> None:
        """Have `pin` look at every pin once more."""
        self._looked_at.clear()

    def __contains__(self, index: int) -> bool:
        return index in self._held

    def __iter__(self) -> Iterator[int]:
        """The devices whose links are held."""
        return iter(self._held)

    def pinned(self) -> Iterator[int]:
        """The devices that there are pins for."""
        for path in self._directory.glob(f"{_PIN}*"):
            number = path.name.removeprefix(_PIN)
            if number.isdecimal():
                yield int(number)

    def intact(self) -> bool:
        """Whether every link that is held is in force, and pinned."""
        return all(
            os.path.lexists(self._path(index)) and program_calls.link_info(fd).device == index
            for index, fd in self._held.items()
        )

    def hold(self, index: int, fd: int) -> None:
        """A device's link from now on; `fd` is closed with it."""
        self._held[index] = fd

    def of(self, link: Link) -> int | None:
        """The link by which a device runs its program: the one that is held, else the pinned one, which is held from
        then on."""
        held = self._held.get(link.ifindex)
        if held is not None:
            if runs_on(held, link):
                return held
            self.let_go(link.ifindex)
        found = self._opened(link.ifindex)
        if found is not None and not runs_on(found, link):
            os.close(found)
            return None
        if found is not None:
            self.hold(link.ifindex, found)
        return found

    def of_another_namespace(self, index: int) -> int | None:
        """The link that was made for a device which is not here any more, held or pinned, whatever it runs."""
        if index not in self._held:
            found = self._opened(index)
            if found is not None:
                self.hold(index, found)
        return self._held.get(index)

    def pin(self, index: int) -> bool:
        """Pin the link that is held, unless it is; whether it had to be."""
        if index in self._looked_at:
            return False
        self._looked_at.add(index)
        fd = self._held[index]
        pinned = self._opened(index)
        if pinned is not None:
            try:
                if program_calls.link_info(pinned).id == program_calls.link_info(fd).id:
                    return False
            finally:
                os.close(pinned)
        try:
            pins.put(fd, self._path(index))
        except EbpflbError as error:
            log.warning("%s", error)  # without a pin it ends with this process
        return True

    def let_go(self, index: int) -> None:
        """Close a device's link, and remove its pin: nothing runs by it any more."""
        held = self._held.pop(index, None)
        if held is not None:
            os.close(held)
        self._looked_at.discard(index)
        self._path(index).unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self._directory / f"{_PIN}{index}"

    def _opened(self, index: int) -> int | None:
        """What is pinned for a device, if that is an XDP link."""
        try:
            fd = pins.opened(self._path(index))
        except EbpflbError:
            return None
        if fd is not None:
            with contextlib.suppress(OSError):
                if program_calls.link_info(fd).type == program_calls.LINK_XDP:
                    return fd
            os.close(fd)
        return None
