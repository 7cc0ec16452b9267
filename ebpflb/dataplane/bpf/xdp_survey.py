"""What XDP would come to on this node, or has come to, for a command that is no daemon.

Rules of this file: it looks and touches nothing. Whether a driver takes a program is known for certain only once it has
been tried; where the kernel tells what drivers can do (Linux 6.3), what cannot be is said beforehand.
"""

from __future__ import annotations

from contextlib import closing

from ebpflb import rtnetlink
from ebpflb.dataplane.bpf.edges import is_edge
from ebpflb.dataplane.bpf.xdp_choice import GENERIC, NATIVE, OFF, Surroundings, Told, Wish, wish
from ebpflb.dataplane.bpf.xdp_features import BASIC, Features
from ebpflb.dataplane.bpf.xdp_links import foreign, is_ours
from ebpflb.rtnetlink import Netlink


def survey(mode: str, patterns: tuple[str, ...]) -> tuple[Told, ...]:
    """Each device that might carry outside traffic, with what runs there, or what would be tried. Raises OSError."""
    with closing(Netlink()) as netlink, closing(Features()) as features:
        links = rtnetlink.links(netlink)
        around = Surroundings(links, rtnetlink.addresses(netlink), rtnetlink.default_devices(netlink), patterns)
        able = features.all()
    found = []
    for index, link in links.items():
        wished = wish(link, around, mode) if is_edge(link, patterns) else Wish(OFF, told=False)
        if not wished.told:
            continue
        try:
            ours = is_ours(link)
            other = foreign(link) if link.xdp and not ours else ""
        except PermissionError:
            ours, other = False, "an XDP program runs there; whose, root may ask"
        if ours:
            native = dict(link.xdp).keys() == {rtnetlink.XDP_DRIVER}
            found.append(Told(link.name, NATIVE if native else GENERIC, "", False))
        elif wished.mode == OFF:
            found.append(Told(link.name, OFF, wished.reason, False))
        elif other:
            found.append(Told(link.name, OFF, other, True))
        elif wished.mode == NATIVE and able is not None and not able.get(index, 0) & BASIC:
            found.append(Told(link.name, OFF, "its driver runs no XDP programs", mode == NATIVE))
        else:
            found.append(Told(link.name, wished.mode, "would be tried", False))
    return tuple(sorted(found))
