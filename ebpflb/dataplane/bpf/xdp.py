"""Keeps our XDP program on the devices that are to run it (`xdp_choice`), each by a BPF link (`xdp_pins`).

Rules of this file: a link's program is replaced in one step, so that a restart loses no packet. Somebody else's program
is never replaced, and a device that runs one, or whose driver refuses ours, is said with its reason; tc carries what
would have been carried here. What bears our name is ours, also where its pin is lost.

The bits of a `devices` row follow: they are set after the program runs, and gone before it goes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterable
from pathlib import Path

from ebpflb import rtnetlink
from ebpflb.dataplane.bpf import others, program_calls
from ebpflb.dataplane.bpf.constants import DEVICE_REDIRECT, DEVICE_XDP, XDP_HOOKS
from ebpflb.dataplane.bpf.xdp_choice import (
    GENERIC,
    NATIVE,
    OFF,
    WIRES,
    Surroundings,
    Told,
    Wish,
    carries_vlans,
    refused,
    running,
    strips_tags,
    wish,
)
from ebpflb.dataplane.bpf.xdp_features import Features, sends
from ebpflb.dataplane.bpf.xdp_links import find, foreign, is_ours, namespace, remove
from ebpflb.dataplane.bpf.xdp_pins import PinnedLinks
from ebpflb.rtnetlink import Link, Netlink

log = logging.getLogger(__name__)

_HOOK = XDP_HOOKS["xdp_ingress"]
_PLACES = {
    NATIVE: (rtnetlink.XDP_DRIVER, rtnetlink.XDP_FLAGS_DRV_MODE),
    GENERIC: (rtnetlink.XDP_GENERIC, rtnetlink.XDP_FLAGS_SKB_MODE),
}
_BOTH = DEVICE_XDP | DEVICE_REDIRECT


class Unwilling(Exception):
    """A device does not take our program, with the reason."""


class Xdp:
    """The XDP programs of the network namespace in which this was made.

    `mode` is that of --xdp, `links` the directory of link pins. `program` is our program's descriptor; None where it
    could not be loaded, for the reason `unable`, or is not wanted (OFF). Every method may be called again after an
    OSError.
    """

    def __init__(self, mode: str, links: Path, program: int | None = None, unable: str = "") -> None:
        self._mode = mode
        self._directory = links
        self._links = PinnedLinks(links)
        self._program = program
        self._id = program_calls.prog_info(program).id if program is not None else 0
        self._unable = unable
        self._netlink = Netlink()
        self._namespace = namespace()
        self._features = Features() if mode != OFF else None
        self._around = Surroundings({})
        self._wishes: dict[int, Wish] = {}
        self._able: dict[int, int] | None = None
        self._modes: dict[int, str] = {}
        self._refusals: dict[int, tuple[tuple[object, ...], str]] = {}  # for what, and why
        self._to_compare = True

    def fileno(self) -> int | None:
        """Readable when `changed` has something to say; None if it never is."""
        return self._features.fileno() if self._features is not None else None

    def changed(self) -> bool:
        """Whether some device can do more or less than before. Raises rtnetlink.Overrun."""
        return self._features is not None and self._features.changed()

    def close(self) -> None:
        """Let go of descriptors; what runs goes on, by its pin."""
        self._links.close()
        self._modes.clear()
        self._netlink.close()
        if self._features is not None:
            self._features.close()

    def compare(self) -> None:
        """Have the next `release` and `attach` look at every pin, and try again what was refused."""
        self._to_compare = True
        self._links.doubt()
        self._refusals.clear()

    def intact(self) -> bool:
        """Whether every link that was made is in force, and pinned."""
        return self._links.intact()

    # ---- One pass: plan, [rows], release, attach, [rows]

    def plan(self, edges: Iterable[int], around: Surroundings) -> None:
        """What each of the edges is to run from now on. Raises OSError."""
        self._around = around
        self._wishes = {
            index: wish(around.links[index], around, self._mode, runs=index in self._modes) for index in edges
        }
        self._look()

    def _look(self) -> None:
        """What the devices can do, where anything depends on it."""
        wanted = any(each.mode != OFF for each in self._wishes.values())
        self._able = self._features.all() if self._features is not None and wanted else None

    def bits(self, index: int, held: int) -> int:
        """DEVICE_XDP and DEVICE_REDIRECT of a device's row, which has the flags `held` so far."""
        mode = self._modes.get(index)
        if not self._wants(index):
            return 0
        if mode is None:
            # A program of before this process runs until it is replaced.
            return held & _BOTH if index not in self._refusals else 0
        if mode == GENERIC or self._sends(index):
            return _BOTH
        # A veth that takes no redirected frames gives nothing back either.
        return DEVICE_XDP if self._around.links[index].kind not in WIRES else 0

    def _wants(self, index: int) -> bool:
        return index in self._wishes and self._wishes[index].mode != OFF

    def _sends(self, index: int) -> bool:
        if self._able is not None:
            return sends(self._able.get(index, 0), "")
        name = self._around.links[index].name
        return sends(None, self._features.driver(name) if self._features is not None else "")

    def release(self) -> int:
        """Detach where nothing of ours is to run any more; from how many."""
        gone = {index for index in self._links if not self._wants(index)}
        if self._to_compare:
            gone.update(index for index in self._links.pinned() if not self._wants(index))
        gone.update(
            index for index, link in self._around.links.items() if link.xdp and not self._wants(index) and is_ours(link)
        )
        for index in gone:
            try:
                self._detach(index)
            except OSError as error:
                log.warning("XDP on device number %d cannot be detached: %s", index, error.strerror)
        return len(gone)

    def attach(self) -> int:
        """Our program wherever it is to run, replaced in one step where an older one does; how many links had to be
        changed. A device's refusal is its own. Raises OSError if netlink itself fails."""
        changed = 0
        for index, wished in self._wishes.items():
            if wished.mode == OFF:
                self._refusals.pop(index, None)
                continue
            link = self._around.links[index]
            strips = self._strips(link)
            cause = (wished.mode, link.mtu, link.flags, link.xdp, self._able and self._able.get(index), strips)
            if index not in self._modes and self._refusals.get(index, (None, ""))[0] == cause:
                continue
            try:
                if strips:
                    raise Unwilling(strips_tags(link))
                changed += self._keep(link, wished.mode)
            except Unwilling as refusal:
                if index in self._links or is_ours(link):
                    self._detach(index)
                self._let_go(index)
                self._refusals[index] = (cause, str(refusal))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    continue  # it has gone meanwhile; the kernel will say so
                self._let_go(index)
                self._refusals[index] = (cause, error.strerror or str(error))
            else:
                self._refusals.pop(index, None)
        self._to_compare = False
        if changed:
            self._look()
        return changed

    # ---- One device

    def _strips(self, link: Link) -> bool:
        """Whether frames of a device's VLANs would be taken for its own."""
        if self._features is None or not carries_vlans(link, self._around):
            return False
        return self._features.strips_tags(link.name)

    def _keep(self, link: Link, mode: str) -> int:
        """Our program on a device, in that mode; how many links were changed."""
        index = link.ifindex
        if self._program is None:
            raise Unwilling(self._unable)
        place, flags = _PLACES[mode]
        fd = self._link_of(link)
        if fd is not None:
            runs = program_calls.link_info(fd).program
            if link.xdp == ((place, runs),):
                if runs != self._id:
                    program_calls.link_update(fd, self._program)
                self._modes[index] = mode
                return int(self._links.pin(index) or runs != self._id)
        if fd is not None or is_ours(link):
            self._detach(index)  # it runs in the other mode, or without a link
        elif link.xdp:
            raise Unwilling(foreign(link))
        if namespace() != self._namespace:
            raise Unwilling("this thread is in another network namespace")
        try:
            made = program_calls.link_create(self._program, index, _HOOK.attach_type, flags)
        except OSError as error:
            raise Unwilling(self._explained(error, index, flags)) from None
        self._links.hold(index, made)
        self._links.pin(index)
        self._modes[index] = mode
        log.info("device %s: XDP runs in mode %s", link.name, mode)
        if link.kind in WIRES:
            log.warning(
                "device %s is a %s: what its other end sends may have no checksums yet, and XDP sends it on without; "
                "set there: ethtool -K DEVICE tx off",
                link.name, WIRES[link.kind],
            )  # fmt: skip
        return 1

    def _link_of(self, link: Link) -> int | None:
        """The link by which a device runs our program; if its pin is lost, whichever it is, which is held from then
        on."""
        found = self._links.of(link)
        if found is None:
            self._modes.pop(link.ifindex, None)
        if found is None and is_ours(link):
            self._tell_of_another(link)
            found = find(link)
            if found is not None:
                self._links.hold(link.ifindex, found)
        return found

    def _tell_of_another(self, link: Link) -> None:
        """Say whose a program is that bears our name, and is not pinned here: its daemon is gone, and ours has it from
        now on."""
        if self._program is None:
            return
        maps = frozenset(program_calls.prog_info(self._program).map_ids)
        found = others.among((("xdp_ingress", program) for _, program in link.xdp), maps, self._directory)
        if found:
            log.warning(
                "device %s: replaced the XDP program of %s, whose daemon is gone", link.name, others.described(found)
            )

    def _detach(self, index: int) -> None:
        """Whatever of ours runs on a device ends, at once and not when the kernel comes to it; also where the device is
        in another namespace by now."""
        link = self._around.links.get(index)
        fd = self._link_of(link) if link is not None else self._links.of_another_namespace(index)
        if fd is not None:
            with contextlib.suppress(FileNotFoundError):  # it has ended with its device
                program_calls.link_detach(fd)
        elif link is not None and is_ours(link):
            remove(self._netlink, link)
        if link is not None:
            log.info("device %s: XDP runs no more", link.name)
        self._let_go(index)

    def _let_go(self, index: int) -> None:
        """What ran is not there any more, whoever ended it."""
        self._links.let_go(index)
        self._modes.pop(index, None)

    def _explained(self, error: OSError, index: int, flags: int) -> str:
        """Why a device refuses, in the driver's own words: links have none, netlink, asked for the same, does."""
        plain = error.strerror or str(error)
        if error.errno in (errno.EPERM, errno.EBUSY, errno.EEXIST) or self._program is None:
            return plain
        try:
            rtnetlink.set_xdp(self._netlink, index, self._program, flags | rtnetlink.XDP_FLAGS_UPDATE_IF_NOEXIST)
        except OSError as refusal:
            return refusal.strerror or plain
        # It takes this and no link, as before Linux 5.9: not worth a second way, where nothing is atomic or pinned.
        rtnetlink.set_xdp(self._netlink, index, -1, flags | rtnetlink.XDP_FLAGS_REPLACE, self._program)
        return plain

    # ---- What is said

    def told(self) -> tuple[Told, ...]:
        """Every device that might carry outside traffic, by name."""
        found = []
        for index, wished in self._wishes.items():
            link = self._around.links[index]
            if not wished.told:
                continue
            mode = self._modes.get(index, OFF)
            if index in self._refusals:
                found.append(refused(link, self._mode, self._refusals[index][1]))
            elif mode == OFF:
                found.append(Told(link.name, OFF, wished.reason, wished.problem))
            else:
                found.append(running(link, mode, sends=self._sends(index), is_known=self._able is not None))
        return tuple(sorted(found))
