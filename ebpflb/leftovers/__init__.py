"""What kube-proxy left behind on this node: rules, ipsets, kube-ipvs0 with its virtual servers, nftables tables.

Rules of this package: it looks for names that kube-proxy gives and removes nothing without being told to, one thing
after the other that stands upon it. What is ours has kube-proxy's names too, with a mark beside it; what is the
kubelet's stays in any case. `rules` says which chains those are, `kernel` speaks with the kernel about all else.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from ebpflb.errors import ApplyError, Unsupported, UserError
from ebpflb.leftovers import kernel
from ebpflb.leftovers.kernel import VirtualServer
from ebpflb.leftovers.rules import Removal, are_ours, commands, removals
from ebpflb.model import Family
from ebpflb.netfilter import iptables, legacy, nftables
from ebpflb.netfilter.iptables import Iptables, Variant

__all__ = ["KubeProxyLeftovers"]

log = logging.getLogger("ebpflb.leftovers")

T = TypeVar("T")

_FAMILIES = {Family.IPV4: "IPv4", Family.IPV6: "IPv6"}
_CANARY, _SERVICES, _MARK = "KUBE-PROXY-CANARY", "KUBE-SERVICES", "EBPFLB-LOCALITY"


class _Tables(NamedTuple):
    """One variant's rules of one family, as far as they are kube-proxy's."""

    tool: Iptables
    removals: dict[str, Removal]

    @property
    def where(self) -> str:
        return f"{_FAMILIES[self.tool.family]}, {self.tool.variant}"


class KubeProxyLeftovers:
    """See `parts.Leftovers`; of the network namespace that the thread is in."""

    def present(self) -> tuple[str, ...]:
        """What kinds of things there are, in few words. Raises UserError or ApplyError."""
        found = []
        sets = _asked(kernel.ipsets)
        ours = _ipvs_is_ours(sets)
        for family, words in _FAMILIES.items():
            if _nft_has(family, ours):
                found.append(f"iptables rules ({words}, nft)")
            if _legacy_has(family):
                found.append(f"iptables rules ({words}, legacy)")
        if not ours:
            if any(map(_is_kube_proxys_set, sets)):
                found.append("ipsets KUBE-*")
            if _asked(kernel.device):
                found.append(kernel.DEVICE)
        if _asked(kernel.tables):
            found.append("nftables tables kube-proxy")
        if found and (running := _kube_proxy()):
            found.append(f"the process {running}, which is a kube-proxy at work")
        return tuple(found)

    def inventory(self) -> tuple[str, ...]:
        """All of it, one line each. Raises UserError or ApplyError."""
        sets = _asked(kernel.ipsets)
        lines = []
        if not _ipvs_is_ours(sets):
            servers = self._servers(sets)
            lines += [f"virtual server {server}" for server in servers]
            if _asked(kernel.device):
                lines.append(f"device {kernel.DEVICE}")
        for tables in self._rules(sets):
            for table, removal in tables.removals.items():
                lines += [f"rule of {table} ({tables.where}): {rule}" for rule in removal.jumps]
                lines += [f"chain {chain} of {table} ({tables.where})" for chain in sorted(removal.chains)]
        lines += [f"ipset {name}" for name in self._sets(sets)]
        lines += [f"nftables table {family} {kernel.TABLE}" for family in _asked(kernel.tables)]
        return tuple(lines)

    def cleanup(self) -> None:
        """Remove it, in the order in which nothing is in use any more. Raises UserError while a kube-proxy runs in this
        network namespace, which would write all of it again; ApplyError, Unsupported."""
        running = _kube_proxy()
        if running:
            raise UserError(
                f"kube-proxy runs here (process {running}) and would write all of it again: take it off this node "
                "first, such as by a nodeSelector in its DaemonSet"
            )
        sets = _asked(kernel.ipsets)
        if not _ipvs_is_ours(sets):
            servers = self._servers(sets)
            _asked(lambda: kernel.remove_servers(servers))
            _asked(kernel.remove_device)
        for tables in self._rules(sets):
            for chain, by in {**tables.removals}.items():
                for kept, reason in sorted(by.kept.items()):
                    log.warning("chain %s of %s (%s) stays: %s jumps to it", kept, chain, tables.where, reason)
            tables.tool.restore(commands(tables.removals, _at_once(tables.tool)))
        names = self._sets(sets)
        _asked(lambda: kernel.remove_ipsets(names))
        _asked(kernel.remove_tables)

    # ---- By kind ----

    def _sets(self, sets: list[str]) -> list[str]:
        return [] if _ipvs_is_ours(sets) else [name for name in sets if _is_kube_proxys_set(name)]

    def _servers(self, sets: list[str]) -> list[VirtualServer]:
        """Those whose address kube-ipvs0 has, and those of node ports: at any address, at a port that is in a set of
        them. Others are somebody else's."""
        bound = _asked(kernel.bound_addresses)
        named = [name for name in sets if "NODE-PORT" in name]
        ports = _asked(lambda: {port for name in named for port in kernel.ports(name)})
        return [
            server
            for server in _asked(kernel.servers)
            if not server.mark and (server.address in bound or server.port in ports)
        ]

    def _rules(self, sets: list[str]) -> Iterator[_Tables]:
        for family in Family:
            for variant in Variant:
                if not _has_tables(family, variant):
                    continue
                tool = Iptables(family, variant)
                saved = [chain for chain in tool.save() if chain.table in iptables.TABLES]
                found = removals(saved, ipvs_is_ours=_ipvs_is_ours(sets))
                if found:
                    yield _Tables(tool, found)


def _asked(question: Callable[[], T]) -> T:
    try:
        return question()
    except PermissionError as error:
        raise UserError(
            f"what kube-proxy left cannot be looked at or removed ({error.strerror}): run as root"
        ) from None
    except OSError as error:
        raise ApplyError("kube-proxy", "", error.errno or 0, f"what kube-proxy left: {error.strerror}") from error


def _ipvs_is_ours(sets: list[str]) -> bool:
    return any(name.startswith("EBPFLB-") for name in sets)


def _is_kube_proxys_set(name: str) -> bool:
    return name.startswith("KUBE-")


def _nft_has(family: Family, ipvs_is_ours: bool) -> bool:
    """By the chains' names alone, which the kernel lists in no time."""
    chains = {(chain.table, chain.name) for chain in _asked(lambda: nftables.chains(family))}
    if not chains & {("mangle", _CANARY), ("nat", _SERVICES), ("filter", _SERVICES)}:
        return False
    return not are_ours(name for table, name in chains if table == "filter")


def _legacy_has(family: Family) -> bool:
    """Reading a table of the legacy engine is reading all of it: kube-proxy's canary stands in the smallest one."""
    if not _has_tables(family, Variant.LEGACY):
        return False
    tool = Iptables(family, Variant.LEGACY)
    if not (tool.has_chain("mangle", _CANARY) or tool.has_chain("nat", _SERVICES)):
        return False
    return not tool.has_chain("filter", _MARK)


def _has_tables(family: Family, variant: Variant) -> bool:
    """Whether there is anything to read, and somebody to read it with. Raises Unsupported if only the latter lacks."""
    if variant is Variant.LEGACY:
        there = bool(_asked(lambda: legacy.tables(family)))
    else:
        there = any(chain.table in iptables.TABLES for chain in _asked(lambda: nftables.chains(family)))
    if there and (missing := iptables.missing_commands(family, variant)):
        raise Unsupported(f"rules of iptables-{variant} cannot be read without {missing[0]}: apt-get install iptables")
    return there


def _at_once(tool: Iptables) -> int:
    """The chains of one transaction; 0 for all."""
    return iptables.CHAINS_AT_ONCE if tool.variant is Variant.NFT else 0


def _kube_proxy() -> int:
    """The process id of a kube-proxy of this network namespace, 0 if none is seen."""
    here = os.readlink("/proc/thread-self/ns/net")
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if (directory / "comm").read_text() == "kube-proxy\n" and os.readlink(directory / "ns/net") == here:
                    return int(directory.name)
    return 0
