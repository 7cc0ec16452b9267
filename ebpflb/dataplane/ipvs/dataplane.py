"""The IPVS dataplane: virtual servers, sets, rules and a device behind the one interface that all dataplanes have.

Rules of this file: it puts the parts together and decides nothing about rows (`table`), writes (`writer`) or rules
(`rules`). What is ours is told by EBPFLB-FRONTENDS and EBPFLB-LOCALITY; without them KUBE-* sets and chains are
kube-proxy's, and only their content is taken over by a sync. All that reads only works without `start`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from ebpflb.conntrack import StaleFlows
from ebpflb.dataplane import Report, Requirement
from ebpflb.dataplane.ipvs import chains, facts, inspect, reading, rules
from ebpflb.dataplane.ipvs.chains import IptablesTables
from ebpflb.dataplane.ipvs.messages import DEL_SERVICE, SET_DEST, Operation
from ebpflb.dataplane.ipvs.names import DEVICE, SET_NAMES, Mark, Set
from ebpflb.dataplane.ipvs.netlink import Kernel, NetlinkKernel
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.reading import Held
from ebpflb.dataplane.ipvs.table import Server, is_loopback, server_of, unpacked
from ebpflb.dataplane.ipvs.writer import Writer, explained
from ebpflb.errors import ApplyError, Unsupported, UserError
from ebpflb.model import Family
from ebpflb.netfilter.iptables import Variant, detect
from ebpflb.routes import Locality, RouteTable, Verdict, in_cidr

log = logging.getLogger(__name__)


class IpvsDataplane:
    """See `ebpflb.dataplane.Dataplane`. `mark_bit` asks for masquerade; `variant` is that of iptables, None for the one
    that this node uses. `kernel`, `tables` and the others stand in for the
    real ones."""

    name = "ipvs"

    def __init__(
        self,
        options: IpvsOptions,
        *,
        mark_bit: int = 14,
        variant: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        kernel: Kernel | None = None,
        tables: dict[int, chains.Tables] | None = None,
        stale: StaleFlows | None = None,
        settings: Callable[[IpvsOptions], int] = facts.set_sysctls,
    ) -> None:
        self._options = options
        self.mark = Mark(mark_bit)
        self._set = settings
        self._variant = Variant(variant) if variant else None
        self._clock = clock
        self._kernel: Kernel = kernel or NetlinkKernel()
        self._given_tables = tables
        self._writer: Writer | None = None
        self._stale = stale or StaleFlows()
        self._routes: RouteTable | None = None

    # ---- Before anything is touched

    def requirements(self) -> tuple[Requirement, ...]:
        """What this dataplane needs of the node."""
        return facts.requirements(self._kernel, self._options, self._chosen_variant(Variant.NFT))

    def check(self) -> None:
        """Raises Unsupported with all that is missing."""
        missing = [each for each in self.requirements() if each.essential and not each.found]
        if missing:
            raise Unsupported("; ".join(f"{each.name} is missing ({each.detail}): {each.remedy}" for each in missing))

    def _chosen_variant(self, otherwise: Variant | None = None) -> Variant:
        if self._variant is None:
            try:
                return detect()
            except (Unsupported, ApplyError):
                if otherwise is None:
                    raise
                return otherwise
        return self._variant

    def _tables(self) -> dict[int, chains.Tables]:
        """iptables by IP version; IPv6 where the kernel speaks it."""
        if self._given_tables is None:
            variant = self._chosen_variant()
            families = (Family.IPV4, Family.IPV6) if facts.has_version6() else (Family.IPV4,)
            self._given_tables = {int(family): IptablesTables(family, variant) for family in families}
        return self._given_tables

    # ---- Work

    def take_over(self) -> None:
        """Nothing: conntrack knows the flows that another began, and translates them before IPVS sees them."""

    def start(self) -> None:
        """Settings, sets, the device. Rules come with the first sync, when there is something behind them."""
        self._refuse_other_types()
        try:
            self._kernel.servers()  # loads the module, without which there are no settings
            self._set(self._options)
            self._kernel.set_timeouts(self._options)
            self._make_sets()
            self._kernel.create_device()
        except OSError as error:
            raise ApplyError("ipvs", "", error.errno or 0, explained("IPVS cannot be set up", error)) from error
        if self._writer is None:
            self._writer = Writer(self._kernel, self._tables(), self._options, self.mark, self._clock)

    def _refuse_other_types(self) -> None:
        """A set under a name of ours that is of another type would be filled with what it has no room for."""
        for name, header in self._headers().items():
            if name in SET_NAMES:
                each, version = SET_NAMES[name]
                wrong = ""
                if header.type != each.type.value:
                    wrong = f"of type {header.type}, not {each.type.value}"
                elif header.version not in (0, version):
                    wrong = f"of IPv{header.version}"
                elif (each.with_comment, each.with_mark) != (header.with_comment, header.with_mark):
                    if each.with_comment > header.with_comment or each.with_mark > header.with_mark:
                        wrong = f"without {'comments' if each.with_comment else 'marks (skbinfo)'}"
                if wrong:
                    raise UserError(
                        f"there is an ipset {name} already, but {wrong}: whoever made it must remove it, or "
                        f"`ipset destroy {name}`"
                    )

    def _headers(self) -> dict[str, inspect.SetHeader]:
        try:
            return self._kernel.headers()
        except OSError as error:
            raise ApplyError("ipset", "", error.errno or 0, explained("ipsets cannot be read", error)) from error

    def _make_sets(self) -> None:
        there = self._kernel.headers()
        for name, (each, version) in SET_NAMES.items():
            if name not in there:
                self._kernel.create(each, version)

    def sync(self, routes: RouteTable) -> Report:
        """Make the kernel hold `routes`."""
        first, self._routes = self._routes is None, routes
        return self._with_flows(self._started().sync(routes), routes, anew=first)

    def audit(self) -> Report:
        """Read everything back, repair what differs, and let go of destinations whose connections have ended."""
        writer = self._started()
        if self._routes is None:
            return Report()
        try:
            self._refuse_other_types()
            self._make_sets()
            self._kernel.create_device()
        except (OSError, UserError) as error:
            raise ApplyError("ipvs", "", getattr(error, "errno", 0) or 0, str(error)) from error
        changed = self._set(self._options)
        report = writer.audit()
        report = self._with_flows(report, self._routes, anew=report.written > 0)
        return msgspec.structs.replace(report, written=report.written + changed)

    def _with_flows(self, report: Report, routes: RouteTable, *, anew: bool) -> Report:
        """After a complete sync: flows of UDP to endpoints that serve no more end."""
        if not report.complete:
            return report
        self._stale.reconcile(routes, anew=anew)
        problems = (*report.problems, *self._stale.problems)
        return msgspec.structs.replace(report, problems=problems, reconciled=self._stale.reconciled)

    def _started(self) -> Writer:
        if self._writer is None:
            raise UserError("the ipvs dataplane has not been started")
        return self._writer

    # ---- Looking

    def state(self) -> RouteTable:
        """What the kernel holds. Empty if nothing is programmed."""
        return reading.routes(self.held()) if self._is_ours() else RouteTable()

    def tables(self, what: str) -> list[dict[str, object]]:
        """Rows of `dump what`; none if nothing is programmed."""
        if what in inspect.WHATS and not self._is_ours():
            return []
        return inspect.Inspector(self.held, self._headers, self.mark).tables(what)

    def held(self) -> Held:
        """All that is ours in the kernel, read. Raises ApplyError."""
        try:
            entries = {pair: self._kernel.entries(*pair) for pair in SET_NAMES.values()}
            servers = self._kernel.servers()
            destinations = self._kernel.destinations(servers)
            bound, others = self._kernel.addresses()
        except OSError as error:
            raise ApplyError("ipvs", "", error.errno or 0, explained("IPVS cannot be read", error)) from error
        rulesets = {version: tables.read() for version, tables in self._tables().items()}
        return Held(servers, destinations, entries, bound, others, rulesets)

    def canary(self) -> bool:
        """Whether the sets, the device, the rules and a virtual server are there: who flushed any of them flushed
        all."""
        there = self._headers()
        sample = self._any_server()
        try:
            device = self._kernel.has_device()
            alive = sample is None or bool(self._kernel.destinations((sample,))[sample])
        except OSError as error:
            raise ApplyError("ipvs", "", error.errno or 0, explained("IPVS cannot be read", error)) from error
        if not (device and alive) or not all(name in there for name in SET_NAMES):
            return False
        wanted = rules.ruleset(Locality(), 4, self.mark)
        for tables in self._tables().values():
            found = tables.read()
            if chains.jumps(found) or any(
                name not in found.get(table, {}) for table in wanted for name in wanted[table]
            ):
                return False
        return True

    def _any_server(self) -> Server | None:
        """One that must be there; None if none must."""
        for (frontend, _), route in (self._routes or RouteTable()).items():
            if route.verdict is Verdict.FORWARD and not is_loopback(frontend.address):
                return server_of(frontend)
        return None

    # ---- Leaving

    def retire(self) -> bool:
        """All destinations to weight 0; whether no connection is left."""
        if not self._is_ours():
            return True
        try:
            operations = []
            connections = 0
            for server, found in self._kernel.destinations(self._servers_of_ours()).items():
                for place, has in found.items():
                    connections += has.connections
                    if has.weight:
                        operations.append(Operation(SET_DEST, server, None, place, 0, leaving=True))
            refused = self._kernel.apply(operations) if operations else {}
        except OSError as error:
            raise ApplyError("ipvs", "", error.errno or 0, explained("IPVS cannot be read", error)) from error
        for refusal in refused.values():
            raise ApplyError("ipvs", "", refusal.errno or 0, explained("a destination stays", refusal)) from refusal
        if operations:
            log.info("ipvs: %d destinations get no new connections any more", len(operations))
        log.debug("ipvs: %d connections are kept", connections)
        return connections == 0

    def _servers_of_ours(self) -> list[Server]:
        """Virtual servers of marks and frontends of ours."""
        named = set()
        held = Held(
            entries={(Set.FRONTENDS, version): self._kernel.entries(Set.FRONTENDS, version) for version in (4, 6)}
        )
        for version in (4, 6):
            named |= {server_of(frontend) for frontend, _, _ in reading.frontends(held, version)}
        return [
            server
            for server in self._kernel.servers()
            if (server in named or (server.mark and self.mark.number(server.mark) is not None))
            and not self._is_excluded(server)
        ]

    def _is_excluded(self, server: Server) -> bool:
        return not server.mark and any(in_cidr(unpacked(server.address), cidr) for cidr in self._options.exclude_cidrs)

    def _is_ours(self) -> bool:
        """Whether KUBE-* sets and the device are ours: our registry is there. Where IPVS was never used, nothing is
        loaded by asking."""
        return self._kernel.is_loaded() and Set.FRONTENDS.base in self._headers()

    def inventory(self) -> tuple[str, ...]:
        """Everything of ours that is installed here."""
        if not self._is_ours():
            return ()
        found = []
        for version, tables in self._tables().items():
            wanted = rules.ruleset(Locality(), version, self.mark)
            for table, mine in sorted(chains.ours(wanted, tables.read()).items()):
                for chain, lines in sorted(mine.items()):
                    found.append(
                        f"chain {chain} in table {table} (IPv{version})"
                        if chain in wanted[table]
                        else f"{len(lines)} rules in {chain} of table {table} (IPv{version})"
                    )
        headers = self._headers()
        found += [f"ipset {name}: {headers[name].entries} entries" for name in sorted(SET_NAMES) if name in headers]
        found += [f"virtual server {server}" for server in sorted(self._servers_of_ours())]
        if self._kernel.has_device():
            found.append(f"device {DEVICE} with {len(self._kernel.addresses()[0])} addresses")
        return tuple(found)

    def cleanup(self) -> None:
        """Rules, virtual servers, addresses and sets of ours; of others nothing."""
        self._writer = None
        self._routes = None
        if not self._is_ours():
            return
        for version, tables in self._tables().items():
            chains.remove(tables, rules.ruleset(Locality(), version, self.mark), tables.read())
        try:
            refused = self._kernel.apply([Operation(DEL_SERVICE, server) for server in self._servers_of_ours()])
            for refusal in refused.values():
                raise refusal
            self._kernel.remove_device()
            headers = self._kernel.headers()
            # The registry tells whose all others are: it goes last.
            registry = {Set.FRONTENDS.named(version) for version in (4, 6)}
            for name in sorted(SET_NAMES, key=lambda name: (name in registry, name)):
                if name in headers:
                    self._kernel.destroy(name)
        except OSError as error:
            raise ApplyError("ipvs", "", error.errno or 0, explained("IPVS cannot be cleaned up", error)) from error
