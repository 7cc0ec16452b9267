"""What this kernel and this node have of what IPVS needs, and the settings that IPVS wants.

Rules of this file: `requirements` asks and changes nothing that outlives the call (to ask loads modules, as using them
would); `set_sysctls` writes what is not as it should be. The settings are kube-proxy's, by its rules.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

from ebpflb.dataplane import Requirement
from ebpflb.dataplane.ipvs import messages
from ebpflb.dataplane.ipvs.messages import DEL_SERVICE, NEW_SERVICE, Operation
from ebpflb.dataplane.ipvs.names import DEVICE, SetType
from ebpflb.dataplane.ipvs.netlink import Kernel
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.table import Server, Settings, packed
from ebpflb.errors import ApplyError
from ebpflb.model import Family
from ebpflb.netfilter.iptables import Variant, missing_commands
from ebpflb.rtnetlink import Netlink, attribute

log = logging.getLogger(__name__)

SYS = Path("/proc/sys/net")

_CAP_NET_ADMIN = 12
_CONN_REUSE = "ipv4/vs/conn_reuse_mode"
_REUSE_FROM, _REUSE_FIXED = (4, 1), (5, 9)

# Nobody's (TEST-NET-2): kube-proxy's own probe.
_PROBE = Server(4, 0, 6, packed("198.51.100.0"), 20000)
_NETFILTER = 12
_TYPE = 13


class Sysctl(NamedTuple):
    """A setting by its path under /proc/sys/net, the value that it must have, and what for."""

    path: str
    value: int
    why: str


def release() -> tuple[int, int]:
    """The kernel's version, as far as rules go by it."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def sysctls(options: IpvsOptions, kernel: tuple[int, int]) -> tuple[Sysctl, ...]:
    """What IPVS needs to be set on such a kernel."""
    found = [
        Sysctl("ipv4/vs/conntrack", 1, "what IPVS translates is masqueraded by conntrack"),
        Sysctl("ipv4/vs/expire_nodest_conn", 1, "a connection to a destination that is gone ends"),
        Sysctl("ipv4/vs/expire_quiescent_template", 1, "affinity to an endpoint that terminates ends"),
        Sysctl("ipv4/ip_forward", 1, "packets go on to the endpoints"),
    ]
    if _REUSE_FROM <= kernel < _REUSE_FIXED:
        # 1 costs a second for each port that a client uses again, 0 sends such connections to endpoints at weight 0;
        # since 5.9 1 does neither (kubernetes #93297), and is left as it is.
        found.append(Sysctl(_CONN_REUSE, 0, "a client's port that is used again does not wait"))
    if options.strict_arp:
        found.append(Sysctl("ipv4/conf/all/arp_ignore", 1, "ARP is not answered for addresses of kube-ipvs0"))
        found.append(Sysctl("ipv4/conf/all/arp_announce", 2, "ARP does not tell addresses of kube-ipvs0"))
    return tuple(found)


def set_sysctls(options: IpvsOptions, directory: Path = SYS, kernel: tuple[int, int] | None = None) -> int:
    """Make the settings; how many were not as they should be. Raises ApplyError."""
    changed = 0
    for each in sysctls(options, kernel or release()):
        path = directory / each.path
        try:
            if path.read_text().strip() == str(each.value):
                continue
            path.write_text(str(each.value))
        except OSError as error:
            raise ApplyError(
                "sysctl",
                each.path,
                error.errno or 0,
                f"{path} cannot be set to {each.value} ({each.why}): {error.strerror}",
            ) from error
        log.info("%s = %d: %s", path, each.value, each.why)
        changed += 1
    return changed


def has_version6(directory: Path = Path("/proc/thread-self/net")) -> bool:
    """Whether this kernel speaks IPv6."""
    return (directory / "if_inet6").exists()


def requirements(kernel: Kernel, options: IpvsOptions, variant: Variant) -> tuple[Requirement, ...]:
    """All that is needed, each found or missing."""
    able = _may_administer()
    found = [
        Requirement(
            "CAP_NET_ADMIN",
            able,
            "effective" if able else "not among the effective capabilities",
            "run as root, or with CAP_NET_ADMIN",
        ),
        _pyroute2(),
        *(ipvs := _ipvs(kernel, options)),
        *_ipsets(),
    ]
    if ipvs[0].found:  # to try it takes pyroute2, which a node without IPVS need not load
        found.append(_device(kernel))
    for family in (Family.IPV4, Family.IPV6) if has_version6() else (Family.IPV4,):
        missing = missing_commands(family, variant)
        found.append(
            Requirement(
                "iptables" if family is Family.IPV4 else "ip6tables",
                not missing,
                f"{', '.join(missing)} not found" if missing else f"variant {variant}",
                "apt install iptables",
            )
        )
    return tuple(found)


def _may_administer() -> bool:
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return False


def _pyroute2() -> Requirement:
    there = importlib.util.find_spec("pyroute2") is not None
    return Requirement("pyroute2", there, "installed" if there else "not installed", "pip install pyroute2")


def _ipvs(kernel: Kernel, options: IpvsOptions) -> list[Requirement]:
    """IPVS itself, its connection tracking, and the scheduler: by a virtual server that nobody reaches."""
    how = "a kernel with CONFIG_IP_VS; modprobe ip_vs"
    try:
        kernel.servers()
    except OSError as failure:
        return [Requirement("ipvs", False, f"the kernel has no IPVS: {failure.strerror}", how)]
    found = [Requirement("ipvs", True, "the kernel has it", how)]
    tracks = (SYS / "ipv4/vs/conntrack").exists()
    found.append(
        Requirement(
            "ipvs conntrack", tracks, "found" if tracks else "net.ipv4.vs.conntrack is missing", "CONFIG_IP_VS_NFCT=y"
        )
    )
    error: OSError | None
    try:
        refused = kernel.apply([Operation(NEW_SERVICE, _PROBE, Settings(options.scheduler))])
        kernel.apply([Operation(DEL_SERVICE, _PROBE)])
        error = refused.get(0)
    except OSError as failure:
        error = failure
    found.append(
        Requirement(
            "scheduler",
            error is None,
            options.scheduler if error is None else f"{options.scheduler}: {error.strerror}",
            f"modprobe ip_vs_{options.scheduler}, or choose another by --ipvs-scheduler",
        )
    )
    return found


def _ipsets() -> list[Requirement]:
    """Each type of set that we use."""
    found = []
    try:
        netlink = Netlink(protocol=_NETFILTER)
    except OSError as failure:
        return [Requirement("ipset", False, f"no netlink to netfilter: {failure.strerror}", "CONFIG_NETFILTER_NETLINK")]
    try:
        for each in SetType:
            error = _ask_for_type(netlink, each)
            module = each.value.replace(":", "_").replace(",", "")
            found.append(
                Requirement(
                    f"ipset {each.value}",
                    error is None,
                    "found" if error is None else f"the kernel has none: {error.strerror}",
                    f"a kernel with CONFIG_IP_SET_{module.upper()}; modprobe ip_set_{module}",
                )
            )
    finally:
        netlink.close()
    return found


def _ask_for_type(netlink: Netlink, each: SetType) -> OSError | None:
    body = messages.set_message("") + attribute(3, each.value.encode() + b"\0") + attribute(5, struct.pack("=B", 2))
    try:
        netlink.request(messages.SUBSYSTEM << 8 | _TYPE, 0, body)
    except OSError as error:
        return error
    return None


def _device(kernel: Kernel) -> Requirement:
    how = "a kernel with CONFIG_DUMMY; modprobe dummy"
    try:
        if not kernel.has_device():
            kernel.create_device()
            kernel.remove_device()
    except OSError as error:
        detail = "the kernel has no such device" if error.errno == errno.EOPNOTSUPP else str(error.strerror)
        return Requirement("dummy", False, f"{DEVICE} cannot be made: {detail}", how)
    return Requirement("dummy", True, f"{DEVICE} can be made", how)
