"""Stale UDP flows: conntrack translates a datagram as it did the first one of its flow, whatever the rules say since.

Rules of this file: which entries are stale is a pure decision; what is done about it is to delete them, so that their
next datagram is a new flow's. Compared is what is with what should be, never what was: a restart deletes nothing that
is right. TCP needs none of this: whoever answers for an endpoint that has gone resets the connection.

An entry is stale if it is addressed to a UDP frontend of ours and its answers come from elsewhere than a serving
endpoint of that Service port. Traffic policies, topology and whether an endpoint terminates do not count: a change of
these moves no established flow, as with TCP. So is one that was never translated, because it began before the frontend
had rules; and one of a frontend that is no more, if it still is translated. (kube-proxy 1.36 leaves those of a Service
without serving endpoints, k/k #139628, and matches a node port on every address.)
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from ebpflb import ctnetlink
from ebpflb.ctnetlink import End, Entry, end
from ebpflb.dataplane import Reconciled
from ebpflb.model import Family, Problem, Protocol, family_of
from ebpflb.routes import RouteTable, ServicePortName
from ebpflb.rtnetlink import Netlink

Answerers: TypeAlias = Mapping[End, frozenset[End]]
"""By frontend: who may answer for it."""


def stale(entries: Iterable[Entry], answerers: Answerers) -> Iterator[Entry]:
    """Those of `entries` that keep their client from where it should be."""
    for entry in entries:
        right = answerers.get(entry.destination)
        if right is None or entry.answerer in right:
            continue
        # In a zone of its own a flow may be tracked a second time, by whoever looks at it before us (Open vSwitch).
        if entry.zoned and entry.answerer == entry.destination:
            continue
        yield entry


class Frontends:
    """The UDP frontends of a table, and those that have gone: kept up to date at the cost of what changed."""

    def __init__(self) -> None:
        self._routes = RouteTable()
        self._services: dict[Family, dict[End, ServicePortName]] = {family: {} for family in Family}
        self._gone: dict[Family, set[End]] = {family: set() for family in Family}

    def update(self, routes: RouteTable) -> bool:
        """Whether entries that were right may be stale now."""
        older, self._routes = self._routes, routes
        changed = routes.serving is not older.serving and routes.serving != older.serving
        for key in routes.changed_from(older) if older else routes:  # the first time needs no set of all keys
            frontend, _ = key
            if frontend.protocol is not Protocol.UDP:
                continue
            family, at = family_of(frontend.address), end(frontend.address, frontend.port)
            services, gone = self._services[family], self._gone[family]
            route = routes.get(key)
            if route is None:
                changed |= services.pop(at, None) is not None
                gone.add(at)
            elif services.get(at) != route.service:
                services[at] = route.service
                gone.discard(at)
                changed = True
        return changed

    def answerers(self, family: Family) -> dict[End, frozenset[End]]:
        """By frontend, of now and of before: who may answer for it. What has gone may only answer for itself."""
        serving: dict[ServicePortName, frozenset[End]] = {
            service: frozenset(end(*endpoint) for endpoint in endpoints)
            for (service, of), endpoints in self._routes.serving.items()
            if of is family
        }
        nobody: frozenset[End] = frozenset()
        found = {at: frozenset((at,)) for at in self._gone[family]}
        found.update((at, serving.get(service, nobody)) for at, service in self._services[family].items())
        return found

    def forget_gone(self) -> None:
        """The flows of those that have gone have ended."""
        for gone in self._gone.values():
            gone.clear()


class StaleFlows:
    """Deletes stale entries of the network namespace that the thread is in.

    `problems`: why they cannot be, until that changes. `reconciled`: what the last call of `reconcile` did, in each
    family that it looked at. `connect` makes a socket to conntrack."""

    def __init__(
        self,
        connect: Callable[[], Netlink] = ctnetlink.conntrack_socket,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._frontends = Frontends()
        self._due = True
        self.problems: tuple[Problem, ...] = ()
        self.reconciled: tuple[Reconciled, ...] = ()

    def reconcile(self, routes: RouteTable, *, before: RouteTable | None = None, anew: bool = False) -> int:
        """How many entries were deleted, now that the kernel holds `routes`. Looks at conntrack if anything of UDP has
        changed since the last time that went well, and the first time. `before`: what the kernel held until then,
        where no earlier call knows it. `anew`: look in any case, because rules had been missing meanwhile."""
        if before is not None:
            self._frontends.update(before)
        self._due |= self._frontends.update(routes) or anew
        self.reconciled = ()
        if not self._due:
            return 0
        answerers = {family: found for family in Family if (found := self._frontends.answerers(family))}
        try:
            self.reconciled = tuple(self._reconcile(family, found) for family, found in answerers.items())
        except OSError as error:
            self.problems = (_problem(error),)
            return 0
        self._frontends.forget_gone()
        self._due = False
        self.problems = ()
        return sum(each.deleted for each in self.reconciled)

    def _reconcile(self, family: Family, answerers: Answerers) -> Reconciled:
        began = self._clock()
        seen = 0

        def counted(entries: Iterator[Entry]) -> Iterator[Entry]:
            nonlocal seen
            for entry in entries:
                seen += 1
                yield entry

        with contextlib.closing(self._connect()) as netlink:
            # The socket takes no other request before all has come.
            found = list(stale(counted(ctnetlink.udp_entries(netlink, family)), answerers))
            deleted = sum(ctnetlink.delete(netlink, family, entry) for entry in found)
        return Reconciled(family, self._clock() - began, seen, deleted)


def _problem(error: OSError) -> Problem:
    """Traffic flows all the same: what is lost are flows of UDP whose endpoint goes and that never pause."""
    if error.errno in (errno.EINVAL, errno.EPROTONOSUPPORT):
        reason = "the kernel lacks nf_conntrack_netlink (CONFIG_NF_CT_NETLINK): modprobe nf_conntrack_netlink"
    elif error.errno == errno.EPERM:
        reason = "CAP_NET_ADMIN is missing"
    else:
        reason = f"{error.strerror}; it is tried again with the next sync"
    return Problem("conntrack", f"stale UDP flows stay until their client pauses: {reason}", "StaleFlows")
