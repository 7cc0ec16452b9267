"""What this node has for the iptables dataplane: commands, and a kernel that takes our rules.

Rules of this file: it looks and leaves nothing. What the kernel takes is not read off version numbers: rules of each
kind are restored in a network namespace of their own, which goes with the process that made it. Where such a one may
not be made, nothing is known, and that is said.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ebpflb import rtnetlink
from ebpflb.dataplane import Requirement
from ebpflb.errors import ApplyError, Unsupported
from ebpflb.model import Address, Family
from ebpflb.netfilter.iptables import OLDEST, Iptables, LockHeldError, Variant, detect, missing_commands
from ebpflb.rtnetlink import IFA_F_DADFAILED, SCOPE_LINK, Netlink

_IPVS_DEVICE = "kube-ipvs0"  # its addresses are Services', not the node's
_LIBERAL = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
_ROUTE_LOCALNET = Path("/proc/sys/net/ipv4/conf/all/route_localnet")
_CLONE_NEWNET = 0x40000000
_INSTALL = "apt install iptables"
_NO_LOCK = "/dev/null"  # rules that are tried in a namespace of their own concern nobody
_CHAIN = "EBPFLB-PROBE"


class _Probe(NamedTuple):
    """Rules of one kind, which the kernel takes or not."""

    name: str
    detail: str
    table: str
    rules: tuple[str, ...]
    remedy: str
    essential: bool = True


_PROBES = (
    _Probe(
        "nat",
        "translates addresses (DNAT, MASQUERADE, MARK)",
        "nat",
        (
            "-p tcp -m tcp -j DNAT --to-destination {address}:80",
            "-j MARK --set-xmark 0x4000/0x4000",
            "-m mark ! --mark 0x4000/0x4000 -j MASQUERADE",
        ),
        "a kernel with CONFIG_NF_NAT, CONFIG_NETFILTER_XT_TARGET_MASQUERADE and CONFIG_NETFILTER_XT_MARK",
    ),
    _Probe(
        "filter",
        "refuses (REJECT, conntrack, addrtype, comment)",
        "filter",
        (
            "-p tcp -m conntrack --ctstate NEW -j REJECT --reject-with tcp-reset",
            '-m comment --comment "a comment" -m addrtype --src-type LOCAL -j REJECT',
        ),
        "a kernel with CONFIG_IP_NF_TARGET_REJECT, CONFIG_NETFILTER_XT_MATCH_CONNTRACK, _ADDRTYPE and _COMMENT",
    ),
    _Probe(
        "statistic",
        "chooses among backends",
        "nat",
        ("-m statistic --mode random --probability 0.5 -j RETURN",),
        "a kernel with CONFIG_NETFILTER_XT_MATCH_STATISTIC",
    ),
    _Probe(
        "recent",
        "session affinity",
        "nat",
        ("-m recent --name EBPFLB-PROBE --rcheck --seconds 10800 --reap -j RETURN",),
        "a kernel with CONFIG_NETFILTER_XT_MATCH_RECENT",
        essential=False,
    ),
    _Probe(
        "sctp",
        "SCTP ports",
        "nat",
        ("-p sctp -m sctp --dport 80 -j RETURN",),
        "a kernel with CONFIG_NETFILTER_XT_MATCH_SCTP",
        essential=False,
    ),
)


def requirements(variant: str | None) -> tuple[Requirement, ...]:
    """All that this dataplane needs here, found or missing; `variant` as the user named it."""
    return tuple(_requirements(variant))


def _requirements(variant: str | None) -> Iterator[Requirement]:
    try:
        chosen = Variant(variant) if variant else detect()
    except LockHeldError as error:
        yield Requirement("iptables", True, str(error))
        return
    except ApplyError as error:
        yield Requirement("iptables", False, str(error), "run as root" if error.errno == errno.EPERM else "see there")
        return
    except Unsupported as error:
        yield Requirement("iptables", False, str(error).removesuffix(f": {_INSTALL}"), _INSTALL)
        return
    for family in Family:
        essential = family is Family.IPV4
        name = "iptables" if essential else "ip6tables"
        missing = missing_commands(family, chosen)
        if missing:
            yield Requirement(name, False, f"no {', '.join(missing)}", _INSTALL, essential)
            continue
        tool = Iptables(family, chosen, lock=_NO_LOCK)
        version = tool.version
        yield Requirement(
            name,
            version >= OLDEST,
            f"{'.'.join(map(str, version))}, variant {chosen}" + ("" if variant else " (detected)"),
            "1.6.2 or newer",
            essential,
        )
        yield from _kernel(tool, "" if essential else " for IPv6", essential)


def _kernel(tool: Iptables, suffix: str, essential: bool) -> list[Requirement]:
    """What the kernel takes of our rules."""
    found: list[Requirement] = []
    libc = ctypes.CDLL(None, use_errno=True)

    def attempt() -> None:
        # The namespace is this thread's alone, and goes with it.
        if libc.unshare(_CLONE_NEWNET) < 0:
            detail = f"no network namespace can be made to try rules in: {os.strerror(ctypes.get_errno())}"
            found.append(Requirement(f"privileges{suffix}", False, detail, "run as root", essential))
            return
        found.extend(_tried(tool, probe, suffix, essential) for probe in _PROBES)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found


def _tried(tool: Iptables, probe: _Probe, suffix: str, essential: bool) -> Requirement:
    address = "192.0.2.1" if tool.family is Family.IPV4 else "[2001:db8::1]"
    rules = [f"-A {_CHAIN} {rule.format(address=address)}\n" for rule in probe.rules]
    found, detail = True, probe.detail
    try:
        tool.restore([f"*{probe.table}\n", f":{_CHAIN} - [0:0]\n", *rules, "COMMIT\n"])
    except ApplyError as error:
        found, detail = False, f"{probe.detail}: {error}"
    return Requirement(f"{probe.name}{suffix}", found, detail, probe.remedy, essential and probe.essential)


def node_addresses() -> tuple[Address, ...]:
    """What the kernel calls its own, IPv4 first and by value. Raises OSError."""
    with contextlib.closing(Netlink()) as kernel:
        services = {link.ifindex for link in rtnetlink.links(kernel).values() if link.name == _IPVS_DEVICE}
        found = {
            (each.version, each.address)
            for each in rtnetlink.addresses(kernel)
            if each.ifindex not in services
            and not each.flags & IFA_F_DADFAILED
            and not (each.version == 6 and each.scope == SCOPE_LINK)
        }
    return tuple(
        socket.inet_ntop(socket.AF_INET, address[12:]) if version == 4 else socket.inet_ntop(socket.AF_INET6, address)
        for version, address in sorted(found)
    )


def is_liberal() -> bool:
    """Whether conntrack takes segments out of a TCP connection's window for valid."""
    try:
        return _LIBERAL.read_text().strip() not in ("", "0")
    except OSError:
        return False  # without conntrack there are no connections to be liberal about


def localnet_routed() -> bool:
    """Whether packets to and from 127.0.0.0/8 are routed. Raises OSError."""
    return _ROUTE_LOCALNET.read_text().strip() != "0"


def route_localnet(on: bool) -> None:
    """Route such packets, or do not. Raises OSError."""
    _ROUTE_LOCALNET.write_text("1" if on else "0")
