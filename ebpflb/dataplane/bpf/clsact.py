"""Our filters under a device's clsact qdisc: how our programs run there where the kernel has no tcx (before Linux 6.6),
or where an older ebpflb has put them.

Rules of this file: direct action, handle 0xeb, before everybody else's filter wherever that is possible (preference 1;
also among other bpf filters there, where the newest runs first). The qdisc is removed with our filters only where we
made it and nobody else's filter is in it. `made` says that: True or False as the device's row has it, None where the
row is lost; then a clsact that holds our filters alone counts as ours.

A qdisc that comes or goes costs the datagrams that leave by the device meanwhile: the kernel has it drop everything for
some milliseconds (dev_deactivate). That is why tcx is preferred.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from ebpflb.dataplane.bpf import tc
from ebpflb.dataplane.bpf.constants import PREFIX
from ebpflb.rtnetlink import Netlink

_HANDLE = 0xEB


def keep(netlink: Netlink, index: int, hooked: Iterable[tc.Hooked], made: bool | None) -> tuple[int, bool]:
    """These programs as filters of the device, whatever was there: how many had to be written, and `made` from now on.

    Raises OSError: EEXIST where an ingress qdisc is in the way."""
    created = tc.add_clsact(netlink, index)
    there = tc.filters(netlink, index)
    if not created and not there and tc.side_qdisc(netlink, index) == "ingress":
        raise OSError(errno.EEXIST, "its ingress qdisc has no egress side; replace that by clsact")
    written = sum(_put(netlink, index, each, there) for each in hooked)
    return written, created or _made(made, there)


def _put(netlink: Netlink, index: int, hooked: tc.Hooked, there: tuple[tc.Filter, ...]) -> int:
    """One side's filter; whether it had to be written."""
    side = [each for each in there if each.parent == hooked.side]
    mine = [each for each in side if is_ours(each)]
    for extra in mine[1:]:
        tc.remove_filter(netlink, index, extra)
    if mine and mine[0].program == hooked.id:
        return 0
    preference, handle = (mine[0].preference, mine[0].handle) if mine else (first_preference(side), _HANDLE)
    tc.put_filter(
        netlink, index, hooked.side, preference, handle, hooked.program, hooked.name, replace=bool(mine)
    )  # fmt: skip
    return 1


def first_preference(side: Iterable[tc.Filter]) -> int:
    """The lowest preference where our filter can be: a free one, or among bpf filters for all protocols."""
    taken: dict[int, bool] = {}
    for each in side:
        shared = each.kind == "bpf" and each.protocol == tc.ALL_PROTOCOLS and each.handle != _HANDLE
        taken[each.preference] = taken.get(each.preference, True) and shared
    preference = 1
    while not taken.get(preference, True):
        preference += 1
    return preference


def is_at_work(netlink: Netlink, index: int) -> bool:
    """Whether the device has a filter of ours."""
    return any(map(is_ours, tc.filters(netlink, index)))


def release(netlink: Netlink, index: int, made: bool | None) -> int:
    """Remove our filters, and the qdisc if we made it and it is empty then; how many filters were removed."""
    there = tc.filters(netlink, index)
    mine = [each for each in there if is_ours(each)]
    for each in mine:
        tc.remove_filter(netlink, index, each)
    if _made(made, there) and len(mine) == len(there) and tc.side_qdisc(netlink, index) == "clsact":
        tc.remove_clsact(netlink, index)
    return len(mine)


def inventory(netlink: Netlink, index: int, device: str, made: bool | None) -> list[str]:
    """What `release` would remove, one line each."""
    there = tc.filters(netlink, index)
    mine = [each for each in there if is_ours(each)]
    lines = []
    for each in mine:
        side = "ingress" if each.parent == tc.INGRESS else "egress"
        lines.append(f"filter {each.name} on {device} {side} pref {each.preference} handle {each.handle:#x}")
    if _made(made, there) and len(mine) == len(there) and tc.side_qdisc(netlink, index) == "clsact":
        lines.append(f"qdisc clsact on {device}")
    return lines


def is_ours(found: tc.Filter) -> bool:
    """Whether a filter is ours, or another ebpflb's."""
    return found.kind == "bpf" and found.name.startswith(PREFIX)


def _made(made: bool | None, there: tuple[tc.Filter, ...]) -> bool:
    if made is None:
        return bool(there) and all(map(is_ours, there))
    return made
