"""Keeps our tc programs on every edge device of the network namespace, and the `devices` map true.

Rules of this file: the kernel tells by netlink what has changed, and then the whole is looked at again; nothing is
followed step by step, so that nothing can be missed. Only devices that are new, changed or touched by somebody have
their filters read. A device's failure is its own: it is a Problem, tried again by each `sync`.

The tc programs run at tcx where the kernel has it (`tcx`), else as filters (`clsact`), never as both: to the second, a
packet that the first has translated is a client's own to a backend. A device with filters of an older ebpflb keeps them
until they or it go. Of filters the kernel tells when somebody touches them; of tcx it does not, and `intact` is asked.

XDP (`xdp`) comes with the same look at everything: rows are written first, then programs attached, then the bits set
that tell of them; and the other way round where they go.

That we made a device's clsact qdisc is a bit in its row, which survives us.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import logging
import select
from collections.abc import Callable

from ebpflb import rtnetlink
from ebpflb.dataplane.bpf import clsact, program_calls, tc, tcx, xdp_links
from ebpflb.dataplane.bpf.artifact import Layout
from ebpflb.dataplane.bpf.constants import DEVICE_BACK, DEVICE_CLSACT, DEVICE_PEER, DEVICE_POD, TC_HOOKS
from ebpflb.dataplane.bpf.device_rows import Row, Rows, VlanRows
from ebpflb.dataplane.bpf.edges import (
    is_edge,
    is_out_of_reach,
    is_pod_device,
    leads_to_a_namespace,
    masquerade_addresses,
    own_mac,
)
from ebpflb.dataplane.bpf.xdp import Xdp
from ebpflb.dataplane.bpf.xdp_choice import Surroundings, Told, is_way_out, vlans_of
from ebpflb.dataplane.bpf.xdp_links import is_ours
from ebpflb.model import Problem
from ebpflb.rtnetlink import Netlink

log = logging.getLogger(__name__)

_GROUPS = (
    rtnetlink.GROUP_LINK,
    rtnetlink.GROUP_TC,
    rtnetlink.GROUP_IPV4_ADDRESS,
    rtnetlink.GROUP_IPV6_ADDRESS,
    rtnetlink.GROUP_IPV4_ROUTE,
    rtnetlink.GROUP_IPV6_ROUTE,
)


class Devices:
    """The edge devices of the network namespace in which this was made.

    `ingress` and `egress` are descriptors of the tc programs, `map` that of `devices`, `layout` its value's, `vlans`
    that of `vlans`; `patterns` are those of --devices; `xdp` has the XDP programs and is closed with this; `with_tcx`
    says whether the tc programs run at tcx. Wait for `fileno()`, then call `handle()`, in that network namespace.
    """

    def __init__(
        self,
        ingress: int,
        egress: int,
        map: int,
        layout: Layout,
        patterns: tuple[str, ...] = (),
        *,
        vlans: int | None = None,
        xdp: Xdp | None = None,
        with_tcx: bool = False,
    ) -> None:
        self._hooked = (
            tc.Hooked(tc.INGRESS, ingress, program_calls.prog_info(ingress).id, TC_HOOKS["tc_ingress"].kernel_name),
            tc.Hooked(tc.EGRESS, egress, program_calls.prog_info(egress).id, TC_HOOKS["tc_egress"].kernel_name),
        )
        self._tcx = tcx.Tcx(self._hooked) if with_tcx else None
        self._rows = Rows(map, layout)
        self._vlans = VlanRows(vlans) if vlans is not None else None
        self._xdp = xdp
        self._patterns = patterns
        self._pod_interface = ""
        self._events = Netlink(*_GROUPS)
        self._netlink = Netlink()
        self._ready = select.epoll()
        self._ready.register(self._events, select.EPOLLIN)
        if xdp is not None and (more := xdp.fileno()) is not None:
            self._ready.register(more, select.EPOLLIN)
        self._links: dict[int, rtnetlink.Link] = {}
        self._addresses: tuple[rtnetlink.InterfaceAddress, ...] = ()
        self._defaults: dict[int, int] = {}
        self._attached: dict[int, bool] = {}  # ifindex -> whether we made its clsact
        self._filtered: set[int] = set()  # those whose programs are filters
        self._failures: dict[int, str] = {}
        self._stale = True
        self._routes_stale = True
        self._leftovers = True  # whether others than `_attached` may have programs of ours: an earlier daemon's
        self._suspects: set[int] = set()

    def fileno(self) -> int:
        """Readable when `handle` has something to do."""
        return self._ready.fileno()

    def close(self) -> None:
        """Close the sockets; programs and rows stay."""
        self._ready.close()
        self._events.close()
        self._netlink.close()
        if self._xdp is not None:
            self._xdp.close()

    def attached(self) -> tuple[str, ...]:
        """Names of the devices that run our programs, sorted."""
        return tuple(sorted(self._links[index].name for index in self._attached if index in self._links))

    def problems(self) -> tuple[Problem, ...]:
        """Devices that should run our programs and do not, or the other way round, with the reason; patterns that no
        device has."""
        found = [
            Problem(
                f"device {self._links[index].name}",
                f"not {'attached' if is_edge(self._links[index], self._patterns) else 'detached'}: {reason}; "
                "tried again with the next sync",
            )
            for index, reason in sorted(self._failures.items())
            if index in self._links
        ]
        found += [
            Problem(f"device {link.name}", "carries packets without an Ethernet header: Services are not served on it")
            for link in self._links.values()
            if is_out_of_reach(link, self._patterns)
        ]
        names = [link.name for link in self._links.values()]
        found += [
            Problem("--devices", f"no device here is called {pattern}")
            for pattern in self._patterns
            if not fnmatch.filter(names, pattern)
        ]
        found += [
            Problem(f"device {told.device}", f"XDP is not at work: {told.reason}; tc carries its packets")
            for told in self.told()
            if told.problem
        ]
        return tuple(found)

    def told(self) -> tuple[Told, ...]:
        """Each device that might carry outside traffic, with its mode of XDP, and why it is not native."""
        return self._xdp.told() if self._xdp is not None else ()

    def intact(self) -> bool:
        """Whether the programs that were attached still are, where the kernel does not tell by itself. Costs little.
        Raises OSError."""
        if self._tcx is not None and not self._tcx.intact(self._attached.keys() - self._filtered):
            return False
        return self._xdp is None or self._xdp.intact()

    def handle(self) -> bool:
        """Take in what the kernel says has changed, and act on it; whether there was anything of interest."""
        try:
            for type, body in self._events.events(ignore=self._netlink.port):
                self._notice(type, body)
            if self._xdp is not None and self._xdp.changed():
                self._stale = True
        except rtnetlink.Overrun:
            log.warning("the kernel told of more changes of devices than could be read: looking at all of them")
            self._forget()
        if not (self._stale or self._suspects):
            return False
        self.sync()
        return True

    def _notice(self, type: int, body: bytes) -> None:
        if type in rtnetlink.LINK_EVENTS or type in rtnetlink.ADDRESS_EVENTS:
            self._stale = True
        elif type in rtnetlink.ROUTE_EVENTS:
            if rtnetlink.is_default_route(body):
                self._stale = self._routes_stale = True
        elif type in tc.EVENTS and tc.index_of(body) in self._filtered:
            self._suspects.add(tc.index_of(body))

    def _forget(self) -> None:
        self._stale = self._routes_stale = self._leftovers = True
        self._suspects |= set(self._attached)

    def set_pod_interface(self, name: str) -> None:
        """`Locality.pod_interface`; takes effect at once where it differs from the last."""
        if name != self._pod_interface:
            self._pod_interface = name
            self.sync()

    def audit(self) -> int:
        """Look at every device, link and row anew, and repair; how much had to be written."""
        self._forget()
        self._rows.read()
        if self._vlans is not None:
            self._vlans.read()
        if self._xdp is not None:
            self._xdp.compare()
        return self.sync()

    def sync(self) -> int:
        """Attach where it is due, forget what has gone, write the rows that changed; how many programs and rows were
        written. Raises OSError only if netlink itself fails."""
        suspects, self._suspects = self._suspects, set()
        self._stale = False
        if self._routes_stale:
            self._routes_stale = False
            self._defaults = rtnetlink.default_devices(self._netlink)
        before, self._links = self._links, rtnetlink.links(self._netlink)
        self._addresses = rtnetlink.addresses(self._netlink)
        edges = {index for index, link in self._links.items() if is_edge(link, self._patterns)}
        self._failures = {index: why for index, why in self._failures.items() if index in self._links}
        written = self._release_all_but(edges)
        if self._xdp is not None:
            around = Surroundings(self._links, self._addresses, self._defaults, self._patterns, self._pod_interface)
            self._xdp.plan(edges, around)
        known = {index: self._attached.get(index, _made(self._rows.get(index))) for index in edges}
        # Rows go first: a program that finds no row has no address to masquerade with.
        written += self._write_rows(edges)
        for index in sorted(edges):
            renamed = index in before and before[index].name != self._links[index].name
            if index not in self._attached or index in suspects or index in self._failures or renamed:
                written += self._guarded(index, functools.partial(self._attach, made=known[index]))
        if self._xdp is not None:
            written += self._xdp.release() + self._xdp.attach()
        return written + self._write_rows(edges)

    def _release_all_but(self, edges: set[int]) -> int:
        """None of our programs on devices that are no edges: they have become bonds' slaves, or --devices is another.
        Asked are those that had them, or may have them from an earlier daemon; how many programs there were."""
        written = 0
        asked = self._attached.keys() | self._failures.keys()
        if self._leftovers:
            asked.update(self._links)
            self._leftovers = False
        for index in sorted(asked - edges):
            made = self._attached.pop(index, _made(self._rows.get(index)))
            self._filtered.discard(index)
            if index in self._links:
                written += self._guarded(index, functools.partial(self._release, made=made))
        return written

    def _guarded(self, index: int, action: Callable[[int], int]) -> int:
        """What `action` wrote; its failure is the device's own."""
        try:
            written = action(index)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return 0  # it has gone meanwhile; the kernel will say so
            reason = error.strerror or str(error)
            if self._failures.get(index) != reason:
                log.warning("device %s: %s", self._links[index].name, reason)
            self._failures[index] = reason
            return 0
        self._failures.pop(index, None)
        return written

    def _attach(self, index: int, made: bool | None) -> int:
        """Our programs on both sides, whatever was there; how many had to be attached. `made`: as in `clsact`."""
        is_new = index not in self._attached
        filtered = clsact.is_at_work(self._netlink, index)
        if self._tcx is not None and (not filtered or tcx.running(index)):
            written = self._tcx.keep(index)
            if filtered:  # an older version did not know of tcx
                clsact.release(self._netlink, index, made)
            made = False
            self._filtered.discard(index)
        else:
            written, made = clsact.keep(self._netlink, index, self._hooked, made)
            self._filtered.add(index)
        if written and is_new:
            log.info("attached to device %s", self._links[index].name)
        self._attached[index] = made
        return written

    def _release(self, index: int, made: bool | None) -> int:
        """None of our programs any more; how many there were."""
        removed = self._tcx.release(index) if self._tcx is not None else 0
        removed += clsact.release(self._netlink, index, made)
        if removed:
            log.info("detached from device %s", self._links[index].name)
        return removed

    def _write_rows(self, edges: set[int]) -> int:
        """The rows of all edges, where they differ; rows of others go. How many were written."""
        written = self._rows.keep_only(edges)
        if self._vlans is not None:
            written += self._vlans.replace(vlans_of(self._links, edges))
        around = Surroundings(self._links, self._addresses, self._defaults, self._patterns, self._pod_interface)
        for index in edges:
            link = self._links[index]
            ipv4, ipv6 = masquerade_addresses(link, self._links, self._addresses, self._defaults)
            flags = DEVICE_POD if is_pod_device(link, self._links, self._pod_interface) else 0
            if leads_to_a_namespace(link) and not is_way_out(link, around):
                flags |= DEVICE_PEER
            row = self._rows.get(index)
            if self._attached.get(index, row is not None and row.made):
                flags |= DEVICE_CLSACT
            if self._xdp is not None:
                flags |= self._xdp.bits(index, row.flags if row else 0)
                if link.kind == "veth":
                    flags |= DEVICE_BACK
            try:
                written += self._rows.put(index, Row(ipv4, ipv6, flags, link.mtu, own_mac(link)))
            except OSError as error:
                self._failures[index] = f"its row cannot be written: {error.strerror}"
        return written


def _made(row: Row | None) -> bool | None:
    """Whether we made a device's clsact, as its row tells; None without one."""
    return row.made if row is not None else None


def installed(rows: Rows | None = None, *, remove: bool = False) -> tuple[str, ...]:
    """Everything of ours on the devices of this network namespace, one line each; with `remove` it is gone afterwards.

    `rows`: the `devices` map where it can still be read. Works without a Devices. Raises OSError.
    """
    lines = []
    netlink = Netlink()
    try:
        for index, link in sorted(rtnetlink.links(netlink).items()):
            made = _made(rows.get(index) if rows else None)
            xdp = [f"xdp program on {link.name}"] if is_ours(link) else []
            packets = tcx.inventory(index, link.name)
            filters = clsact.inventory(netlink, index, link.name, made)
            lines += xdp + packets + filters
            if not remove:
                continue
            try:
                if xdp:
                    xdp_links.remove(netlink, link)
                if packets:
                    tcx.release(index)
                if filters:
                    clsact.release(netlink, index, made)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
    finally:
        netlink.close()
    return tuple(lines)
