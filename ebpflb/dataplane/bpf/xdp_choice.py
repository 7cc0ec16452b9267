"""Which devices are to run XDP, in which mode, and if not, why: pure.

Rules of this file: links, addresses and routes in, a wish for each device out. XDP is for the node's own devices, by
which outside traffic comes: those that hold an address of this node's network or a default route, and those that
--devices names. Never for what other devices carry anyhow (VLANs, overlays, a bridge's ports) nor for pods' devices.

    auto      hardware and hypervisors' devices: native where the driver takes it, else not at all
    native    also veths and taps, if they are the node's own devices; where the driver refuses it, not at all
    generic   as native, before the stack instead of in the driver; every device takes it

A bond's driver takes a program too, and runs it on the bond's ports, which have no addresses, routes or rows: native is
nothing for bonds. `auto` never falls to generic, which for most is slower than tc, and never takes a veth or a tap:
what comes from another namespace or a virtual machine by these may have a checksum that nobody has computed, and XDP
cannot tell.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ebpflb.dataplane.bpf.edges import OVERLAYS, is_pod_device
from ebpflb.rtnetlink import SCOPE_GLOBAL, InterfaceAddress, Link

AUTO, NATIVE, GENERIC, OFF = "auto", "native", "generic", "off"
_ASKING = (NATIVE, GENERIC)  # what does not run is then not as it was asked for

_PORTS = ("bridge", "openvswitch")
WIRES = {"veth": "veth", "tun": "tap", "netkit": "netkit"}
"""Kinds whose other end is a namespace or a virtual machine, and how they are called."""
_HOST_BITS = {4: 32, 6: 128}


class Wish(NamedTuple):
    """What is to be tried on a device: NATIVE, GENERIC or OFF, and why it is OFF. `told`: whether `status` names it;
    pods' devices are too many, and never meant. `problem`: whether it was asked to run and never will."""

    mode: str
    reason: str = ""
    told: bool = True
    problem: bool = False


class Told(NamedTuple):
    """A device for `status`: how our XDP program runs there (NATIVE, GENERIC, OFF), and why not native, or what keeps
    it from sending. `problem`: whether that is not as it was asked for."""

    device: str
    mode: str
    reason: str
    problem: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """What a wish depends on beside the device: all links and addresses of the namespace, the devices of default routes
    by IP version, the patterns of --devices, and the pods' interface as in `routes.Locality`. Of these, `vlans` are the
    VLAN devices and `held` the global addresses of each device."""

    links: Mapping[int, Link]
    addresses: tuple[InterfaceAddress, ...] = ()
    defaults: Mapping[int, int] | None = None
    patterns: tuple[str, ...] = ()
    pod_interface: str = ""
    vlans: tuple[Link, ...] = dataclasses.field(init=False)
    held: Mapping[int, tuple[InterfaceAddress, ...]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # A node has hundreds of pods' devices, and each is asked about: what is looked for is put in order once.
        found: dict[int, list[InterfaceAddress]] = {}
        for address in self.addresses:
            if address.scope == SCOPE_GLOBAL:
                found.setdefault(address.ifindex, []).append(address)
        object.__setattr__(self, "held", {index: tuple(addresses) for index, addresses in found.items()})
        object.__setattr__(self, "vlans", tuple(link for link in self.links.values() if link.kind == "vlan"))


def wish(link: Link, around: Surroundings, mode: str, *, runs: bool = False) -> Wish:
    """What `link`, an edge, is to run; `mode` is that of --xdp.

    `runs`: it runs already, and does not stop for the lack of an address: drivers may drop the carrier for a moment
    when a program comes or goes, at which some network managers take addresses away, at which the program would go…
    """
    if link.slave_kind in _PORTS:
        return Wish(OFF, f"a port of {_name(link.master, around)}", told=False)
    if is_pod_device(link, around.links, around.pod_interface):
        return Wish(OFF, "a pod's device", told=False)
    named, asked = _is_named(link, around), mode in _ASKING
    if link.kind == "vlan":
        # Who names the device below too has XDP where it was asked for, or is told of that device.
        parent = around.links.get(link.parent)
        alone = named and (parent is None or not _is_named(parent, around))
        return Wish(OFF, f"a VLAN of {_name(link.parent, around)}, where its frames are met", problem=asked and alone)
    if link.kind in OVERLAYS:
        return Wish(OFF, "an overlay: its frames come inside another device's", problem=asked and named)
    wire = link.kind in WIRES
    if around.patterns and not named:
        return Wish(OFF, "not named by --devices", told=not wire)
    if not (named or runs or is_way_out(link, around)):
        return Wish(OFF, "holds neither an address of the node's network nor a default route", told=not wire)
    if mode == OFF:
        return Wish(OFF, "--xdp off")
    if link.kind == "bond" and mode != GENERIC:
        return Wish(OFF, "a bond: in its driver, programs run on its ports", problem=asked)
    if mode == AUTO and link.kind:
        what = WIRES.get(link.kind, f"device of kind {link.kind}")
        why = ": checksums of what comes by it may be still to be computed" if wire else ""
        return Wish(OFF, f"auto takes no {what}{why}")
    return Wish(GENERIC if mode == GENERIC else NATIVE)


def running(link: Link, mode: str, *, sends: bool, is_known: bool) -> Told:
    """A device that runs our program. `sends`: whether it takes frames from programs; `is_known`: whether the kernel
    tells that, else its driver's name has to."""
    if mode == GENERIC:
        return Told(link.name, mode, "--xdp generic", False)
    if sends:
        return Told(link.name, mode, "", False)
    if link.kind not in WIRES:
        return Told(link.name, mode, "takes no frames from other devices", False)
    # A veth that takes no redirected frames gives nothing back either.
    if is_known:
        why = "before its other end has GRO (there: ethtool -K DEVICE gro on) or an XDP program"
        return Told(link.name, mode, f"nothing is sent by it {why}", True)
    return Told(
        link.name, mode, "nothing is sent by it: this kernel does not tell whether its other end takes frames", True
    )


def refused(link: Link, mode: str, reason: str) -> Told:
    """A device that does not run our program although it is wished; `mode` is that of --xdp. Somebody else's program
    is a problem also for `auto`."""
    return Told(link.name, OFF, reason, mode in _ASKING or bool(link.xdp))


def strips_tags(link: Link) -> str:
    """Why a device with VLANs runs none while it takes their tags off."""
    return f"VLAN tags are gone before XDP sees them (ethtool -K {link.name} rxvlan off)"


def is_way_out(link: Link, around: Surroundings) -> bool:
    """Whether outside traffic comes by `link`, as far as its addresses tell: those of its VLANs are its own. A veth's
    or tap's address must be of a network: that of one host is how some CNIs number the node's end of a pod's wire."""
    own = {link.ifindex}
    own.update(each.ifindex for each in around.vlans if each.parent == link.ifindex)
    if own.intersection((around.defaults or {}).values()):
        return True
    return any(
        link.kind not in WIRES or address.bits < _HOST_BITS[address.version]
        for index in own
        for address in around.held.get(index, ())
    )


def carries_vlans(link: Link, around: Surroundings) -> bool:
    """Whether VLAN devices lie on `link`."""
    return any(each.parent == link.ifindex for each in around.vlans)


def vlans_of(links: Mapping[int, Link], edges: Iterable[int]) -> dict[tuple[int, int], int]:
    """VLAN devices by parent and id: frames with that tag which enter by the parent are theirs."""
    found = {}
    for index in edges:
        link = links[index]
        if link.kind == "vlan" and link.vlan and link.parent in links and links[link.parent].kind != "vlan":
            found[link.parent, link.vlan] = index
    return found


def _is_named(link: Link, around: Surroundings) -> bool:
    return any(fnmatch.fnmatchcase(link.name, pattern) for pattern in around.patterns)


def _name(index: int, around: Surroundings) -> str:
    link = around.links.get(index)
    return link.name if link else "another network namespace"
