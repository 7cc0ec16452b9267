"""The iptables dataplane: both families' rules behind the one interface that all dataplanes have.

Rules of this file: it puts the parts together and decides nothing about rules. The first sync and each audit compare
what is there with what should be; the syncs between write the difference of two tables of routes, and where that is
refused, or somebody changed the rules meanwhile, compare. What only reads works without `start`, on whatever variant
has our mark. Established flows are conntrack's, which rules have no say in: nothing has to be known when this dataplane
takes over, and when it retires only that conntrack stays at work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

from ebpflb.conntrack import StaleFlows
from ebpflb.dataplane import NODE, Report, Requirement, RestoreFailure, TableRules
from ebpflb.dataplane.iptables import facts, flows, inspect, names, reading
from ebpflb.dataplane.iptables.frame import Settings, wants_comments
from ebpflb.dataplane.iptables.layout import Index, PortKey, port_key
from ebpflb.dataplane.iptables.rules import PortRules, port_rules
from ebpflb.dataplane.iptables.surroundings import World
from ebpflb.dataplane.iptables.watch import Watch
from ebpflb.dataplane.iptables.writer import FamilyWriter, Tally
from ebpflb.errors import ApplyError, Unsupported, UserError
from ebpflb.model import Family, Problem, family_of
from ebpflb.netfilter.iptables import RANDOM_FULLY, Iptables, LockHeldError, Variant, detect, missing_commands
from ebpflb.netfilter.ruleset import Ruleset
from ebpflb.routes import RouteTable

log = logging.getLogger(__name__)

_MANY = 2000
"""Service ports from which on a change is written by comparison: it holds the text of neither."""


class IptablesDataplane:
    """See `ebpflb.dataplane.Dataplane`.

    `mark_bit`: which bit of a packet's mark asks for masquerading. `liberal_conntrack`: whether conntrack is or will be
    told to take TCP segments out of window for valid, so that invalid ones need not be dropped. `variant`: `nft` or
    `legacy`; None for the one that the node uses.
    """

    name = "iptables"

    def __init__(
        self,
        *,
        mark_bit: int = 14,
        liberal_conntrack: bool = False,
        variant: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mark = 1 << mark_bit
        self._liberal = liberal_conntrack
        self._named = variant
        self._clock = clock
        self._stale = StaleFlows(clock=clock)
        self._writers: dict[Family, FamilyWriter] = {}
        self._watches: dict[Family, Watch] = {}
        self._lacking: dict[Family, str] = {}
        self._random_fully = True
        self._localnet: bool | None = None
        self._target: World | None = None
        self._index: Index | None = None
        self._unsure: set[Family] = set()
        self._variant = Variant.NFT
        self._alone = False

    # ---- Before anything is touched

    def requirements(self) -> tuple[Requirement, ...]:
        """What this dataplane needs of the node."""
        return facts.requirements(self._named)

    def check(self) -> None:
        """Raises Unsupported with all that is missing."""
        missing = [each for each in self.requirements() if each.essential and not each.found]
        if missing:
            raise Unsupported("; ".join(f"{each.name} is missing ({each.detail}): {each.remedy}" for each in missing))

    # ---- Work

    def take_over(self) -> None:
        """Nothing: conntrack knows the flows."""

    def start(self) -> None:
        """Choose the variant. Nothing is written before the first sync."""
        if self._writers:
            return
        variant = self._variant = Variant(self._named) if self._named else detect()
        for family in Family:
            try:
                tool = Iptables(family, variant)
                self._random_fully = tool.version >= RANDOM_FULLY
            except Unsupported as error:
                if family is Family.IPV4:
                    raise
                self._lacking[family] = str(error)
                continue
            self._writers[family] = FamilyWriter(tool)
            self._watches[family] = Watch(tool)
        log.info("iptables: variant %s (%s)", variant, "as named" if self._named else "detected")

    def sync(self, routes: RouteTable) -> Report:
        """Make the kernel hold `routes`."""
        return self._sync(routes, compare=self._target is None)

    def audit(self) -> Report:
        """Read all rules back, and repair what differs. Before the first sync nothing is known to be right."""
        if self._target is None:
            return Report()
        return self._sync(self._target.routes, compare=True)

    def _sync(self, routes: RouteTable, *, compare: bool) -> Report:
        if not self._writers:
            raise UserError("the iptables dataplane has not been started")
        started = self._clock()
        before, index = self._target, self._index
        problems: list[Problem] = []
        failed = 0
        old: dict[Family, dict[PortKey, PortRules]] | None = None
        touched: set[PortKey] = set()
        if before is None or index is None:
            index = Index(routes)
        else:
            changed = routes.changed_from(before.routes)
            if not compare:
                old = self._old_rules(before, routes, index)
            if changed or before.routes.locality != routes.locality:
                touched = index.update(before.routes, routes, changed)
            if old is not None and touched - {key for keys in old.values() for key in keys}:
                old = None  # their old rules went with the old index
        problems += self._look_at_localnet(index)
        world = self._world(routes, index)
        self._target, self._index = world, index
        alike = before is not None and _alike(before, world)
        if before is None or before.routes is not world.routes or not alike:
            for writer in self._writers.values():
                writer.doubt()
        tallies: dict[Family, Tally] = {}
        for family, writer in self._writers.items():
            partly = old is not None and alike and before is not None and family not in self._unsure
            # What was refused is tried again when it changes, where nothing else is to be done, and by audits. What the
            # kernel has of it only a look tells.
            if old is not None and writer.refused and (not old[family] or writer.refused.keys() & old[family].keys()):
                partly = False
            tally = tallies[family] = Tally()
            try:
                if partly:
                    assert before is not None and old is not None
                    self._change(writer, before, world, old[family], index, tally)
                else:
                    writer.compare(world, index, tally)
                self._unsure.discard(family)
                self._watches[family].note()
            except LockHeldError as error:
                self._unsure |= self._writers.keys()
                failed += 1
                problems.append(Problem(NODE, str(error)))
                break  # it is one lock for both families
            except ApplyError as error:
                self._unsure.add(family)
                failed += 1
                problems.append(Problem(NODE, str(error)))
            failed += len(writer.refused)
            problems += writer.refused.values()
        for family, reason in self._lacking.items():
            rows = sum(family_of(frontend.address) is family for frontend, _ in routes)
            if rows:
                failed += rows
                problems.append(Problem(NODE, f"{rows} routes of IPv{family.value} have no rules: {reason}"))
        written = sum(tally.written for tally in tallies.values())
        if not failed:
            problems += self._route_localnet()
            problems += self._leave_other_variant()
            self._stale.reconcile(routes, anew=compare and written > 0)
            problems += self._stale.problems
        return Report(
            written,
            sum(tally.removed for tally in tallies.values()),
            failed,
            self._clock() - started,
            tuple(dict.fromkeys(problems)),
            () if failed else self._stale.reconciled,
            tuple(
                TableRules(family, table, count, tallies[family].rules.get(table, 0))
                for family, writer in self._writers.items()
                if family in tallies
                for table, count in writer.held.items()
            ),
            tuple(RestoreFailure(family, partial) for family, tally in tallies.items() for partial in tally.failures),
        )

    def _change(
        self,
        writer: FamilyWriter,
        before: World,
        after: World,
        old: Mapping[PortKey, PortRules],
        index: Index,
        tally: Tally,
    ) -> None:
        try:
            writer.change(before, after, old, index, tally)
        except LockHeldError:
            raise
        except ApplyError as error:
            # Somebody changed the rules, or one service port is refused: a look tells.
            log.debug("a change is refused: %s", error)
            writer.compare(after, index, tally)

    def _old_rules(
        self, before: World, routes: RouteTable, index: Index
    ) -> dict[Family, dict[PortKey, PortRules]] | None:
        """The rules so far of the service ports whose rows differ; None if they are too many to be held."""
        if before.routes.locality != routes.locality:
            return None
        keys = {
            port_key(frontend, route)
            for frontend, scope in routes.changed_from(before.routes)
            for route in (before.routes.get((frontend, scope)), routes.get((frontend, scope)))
            if route is not None
        }
        if len(keys) > _MANY:
            return None
        found: dict[Family, dict[PortKey, PortRules]] = {family: {} for family in Family}
        for key in keys:
            found[key.family][key] = port_rules(key, before.routes, index, before.settings)
        return found

    def _world(self, routes: RouteTable, index: Index) -> World:
        drop_invalid = not (self._liberal or facts.is_liberal())
        settings = Settings(self._mark, self._random_fully, drop_invalid, wants_comments(routes))
        nodeports = {family: index.nodeports(family) for family in Family}
        return World(routes, settings, nodeports, bool(self._localnet))

    def _look_at_localnet(self, index: Index) -> list[Problem]:
        """Whether it is for us to let packets with loopback addresses be routed, as node ports on these need it. That
        we did so is remembered until cleanup."""
        writer = self._writers.get(Family.IPV4)
        needed = any(address.startswith("127.") for address in index.nodeports(Family.IPV4))
        if writer is None or self._localnet or (self._localnet is not None and not needed):
            return []
        try:
            mark = writer.has_chain("filter", names.LOCALNET)
            self._localnet = mark or (needed and not facts.localnet_routed())
        except (OSError, ApplyError) as error:
            return [Problem(NODE, f"node ports on 127.0.0.1 may not be served: {error}")] if needed else []
        return []

    def _route_localnet(self) -> list[Problem]:
        """Let them, now that the rule in KUBE-FIREWALL is there, which keeps others from making use of it."""
        if not self._localnet:
            return []
        try:
            if not facts.localnet_routed():
                facts.route_localnet(True)
                log.info("net.ipv4.conf.all.route_localnet is 1 now, for node ports on loopback addresses")
        except OSError as error:
            return [
                Problem(NODE, f"node ports on 127.0.0.1 are not served: {error}; set net.ipv4.conf.all.route_localnet")
            ]
        return []

    def _leave_other_variant(self) -> list[Problem]:
        """Once all is in place: take away what an earlier run left in the kernel's other engine, which would still
        work on the same packets."""
        if self._alone:
            return []
        try:
            for tool in self._ours(Variant.LEGACY if self._variant is Variant.NFT else Variant.NFT):
                log.warning("rules of ours in variant %s are removed: %s is used now", tool.variant, self._variant)
                writer = FamilyWriter(tool)
                writer.remove_all(writer.holding())
        except ApplyError as error:
            return [Problem(NODE, f"rules of ours in iptables' other variant cannot be removed: {error}")]
        self._alone = True
        return []

    # ---- Looking

    def _ours(self, *variants: Variant) -> Iterator[Iptables]:
        """The commands for each family and variant in which there are rules of ours, by a cheap look."""
        for variant in variants or Variant:
            for family in Family:
                if missing_commands(family, variant):
                    continue
                tool = Iptables(family, variant)
                if tool.has_chain(*reading.MARK_OF_OWNERSHIP) and not tool.has_chain("filter", names.IPVS_MARK):
                    yield tool

    def state(self) -> RouteTable:
        """What the kernel holds. Empty if nothing is programmed."""
        found: dict[Family, Ruleset] = {}
        for tool in self._ours():
            ruleset: Ruleset = {}
            for chain in tool.save(("filter", "nat")):
                ruleset.setdefault(chain.table, {})[chain.name] = chain.rules
            found.setdefault(tool.family, ruleset)
        if not found:
            return RouteTable()
        return reading.routes(found, _node_addresses())

    def tables(self, what: str) -> list[dict[str, object]]:
        """Rows of `dump what`; none if nothing is programmed."""
        return inspect.tables(what, list(self._ours()), self.state)

    def canary(self) -> bool:
        """Whether our jumps and canary chains are there."""
        return all(watch.intact() for watch in self._watches.values())

    def retire(self) -> bool:
        """Rules go; what was translated goes on by conntrack, which is kept at work as long as there is any of it."""
        families = set()
        for tool in self._ours():
            families.add(tool.family)
            writer = FamilyWriter(tool)
            if writer.stand_by(writer.holding()):
                log.info("iptables: rules of IPv%d left to the successor", tool.family.value)
        try:
            return not any(
                flow.translated and not flow.closing for family in sorted(families) for flow in flows.tracked(family)
            )
        except OSError as error:
            raise ApplyError(
                "conntrack", "", error.errno or 0, f"conntrack cannot be read: {error.strerror}"
            ) from error

    def inventory(self) -> tuple[str, ...]:
        """Everything of ours that is installed here."""
        return tuple(line for tool in self._ours() for line in inspect.inventory(tool))

    def cleanup(self) -> None:
        """Remove all of it."""
        for tool in self._ours():
            writer = FamilyWriter(tool)
            holding = writer.holding()
            writer.remove_all(holding)
            if names.LOCALNET in holding.hashes.get("filter", {}):
                try:
                    facts.route_localnet(False)
                except OSError as error:
                    raise ApplyError(
                        "route_localnet", "", error.errno or 0, f"route_localnet cannot be set back: {error.strerror}"
                    ) from error
        self.close()

    def close(self) -> None:
        """Forget; what is installed stays and serves."""
        self._writers, self._watches = {}, {}
        self._target = self._index = None
        self._localnet = None


def _alike(before: World, after: World) -> bool:
    """Whether the worlds differ in their routes alone: what else shapes rules shapes all of them, and guests stand in
    chains that must be looked at."""
    return (
        before.settings == after.settings
        and before.localnet == after.localnet
        and all(before.guests(family) == after.guests(family) for family in Family)
    )


def _node_addresses() -> tuple[str, ...]:
    try:
        return facts.node_addresses()
    except OSError as error:
        raise ApplyError("addresses", "", error.errno or 0, f"addresses cannot be read: {error.strerror}") from error
