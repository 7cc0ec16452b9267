"""What an operator may set of the IPVS dataplane.

Rules of this file: data only. Zero and empty mean: as the kernel has it.
"""

from __future__ import annotations

import msgspec


class IpvsOptions(msgspec.Struct, frozen=True):
    """`scheduler`: how backends are chosen where a Service asks for nothing else, by IPVS' name (rr, wrr, lc, wlc, sh,
    mh, sed, nq, dh, ovf, …). `exclude_cidrs`: virtual servers in these are never touched. `strict_arp`: answer ARP for
    no address that only kube-ipvs0 has. The timeouts are seconds, 0 to leave the kernel's."""

    scheduler: str = "rr"
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_timeout: int = 0
    tcp_fin_timeout: int = 0
    udp_timeout: int = 0
