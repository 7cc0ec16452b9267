"""What XDP would come to on this node, or has come to, for a command that is no daemon.

Rules of this file: it looks and touches nothing. Whether a driver takes a program is known for certain only once it has
been tried; where the kernel tells what drivers can do (Linux 6.3), what cannot be is said beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from ebpflb import rtnetlink
from ebpflb.dataplane.bpf.edges import is_edge
from ebpflb.dataplane.bpf.xdp_choice import (
    GENERIC,
    NATIVE,
    OFF,
    Surroundings,
    Told,
    carries_vlans,
    refused,
    running,
    strips_tags,
    wish,
)
from ebpflb.dataplane.bpf.xdp_features import BASIC, Features, sends
from ebpflb.dataplane.bpf.xdp_links import foreign, is_ours
from ebpflb.rtnetlink import Link, Netlink


def survey(mode: str, patterns: tuple[str, ...]) -> tuple[Told, ...]:
    """Each device that might carry outside traffic, with what runs there, or what would be tried. Raises OSError."""
    with closing(Netlink()) as netlink, closing(Features()) as features:
        links = rtnetlink.links(netlink)
        around = Surroundings(links, rtnetlink.addresses(netlink), rtnetlink.default_devices(netlink), patterns)
        able = features.all()
        edges = (link for link in links.values() if is_edge(link, patterns))
        found = (_told(link, around, mode, features, able) for link in edges)
        return tuple(sorted(told for told in found if told is not None))


def _told(
    link: Link, around: Surroundings, mode: str, features: Features, able: Mapping[int, int] | None
) -> Told | None:
    """One edge; `able` is what the drivers say that they can do, None where the kernel does not tell."""
    try:
        ours = is_ours(link)
        other = foreign(link) if link.xdp and not ours else ""
    except PermissionError:
        ours, other = False, "an XDP program runs there; whose, root may ask"
    wished = wish(link, around, mode, runs=ours)
    if not wished.told:
        return None
    bits = able.get(link.ifindex, 0) if able is not None else None
    if ours:
        runs = NATIVE if dict(link.xdp).keys() == {rtnetlink.XDP_DRIVER} else GENERIC
        takes = sends(bits, features.driver(link.name) if bits is None else "")
        return running(link, runs, sends=takes, is_known=bits is not None)
    if wished.mode == OFF:
        return Told(link.name, OFF, wished.reason, wished.problem)
    if carries_vlans(link, around) and features.strips_tags(link.name):
        return refused(link, mode, strips_tags(link))
    if other:
        return refused(link, mode, other)
    if wished.mode == NATIVE and bits is not None and not bits & BASIC:
        return refused(link, mode, "its driver runs no XDP programs")
    return Told(link.name, wished.mode, "would be tried", False)
