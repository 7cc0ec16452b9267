"""The BPF dataplane: programs, maps and devices behind the one interface that all dataplanes have.

Rules of this file: it puts the parts together, in the order that keeps traffic going, and decides nothing about rows
(`ledger`), writes (`writer`), programs (`programs`) or devices (`devices`). What was attached before stays in force
until its successor has the same rows: fresh maps under attached programs are filled first and attached to last. All
that reads only (`state`, `tables`, `inventory`) works on the pins alone, with no compiler and no other process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ebpflb.dataplane import NODE, Report, Requirement
from ebpflb.dataplane.bpf import devices, facts, maglev, map_calls, pins, ports, tcx
from ebpflb.dataplane.bpf.artifact import Artifact, load_artifact, read_sources, source_directory
from ebpflb.dataplane.bpf.constants import Sizes
from ebpflb.dataplane.bpf.device_rows import Rows, device_layout
from ebpflb.dataplane.bpf.devices import Devices
from ebpflb.dataplane.bpf.flatten import enumerators
from ebpflb.dataplane.bpf.inspect import Inspector
from ebpflb.dataplane.bpf.layouts import KEY_VALUE, LAYOUT, SIZES, check_layouts
from ebpflb.dataplane.bpf.locality import NodeFacts
from ebpflb.dataplane.bpf.looking import read_tables
from ebpflb.dataplane.bpf.maps import KernelMaps
from ebpflb.dataplane.bpf.programs import Programs, cgroup_directory
from ebpflb.dataplane.bpf.reading import Reading
from ebpflb.dataplane.bpf.retiring import KEPT_SECONDS, flows_kept, leave
from ebpflb.dataplane.bpf.sockets import Orphans
from ebpflb.dataplane.bpf.succeeding import answers_elsewhere, spare_ports
from ebpflb.dataplane.bpf.table_parts import LARGEST
from ebpflb.dataplane.bpf.writer import Writer, collector_paused
from ebpflb.dataplane.bpf.xdp import Xdp
from ebpflb.dataplane.bpf.xdp_choice import OFF, Told
from ebpflb.dataplane.bpf.xdp_survey import survey
from ebpflb.errors import ApplyError, EbpflbError, Unsupported, UserError
from ebpflb.model import Problem
from ebpflb.routes import RouteTable

log = logging.getLogger(__name__)

FLOW_IDLE_SECONDS = 120
"""How long a UDP flow keeps its backend without a packet: Linux' nf_conntrack_udp_timeout_stream."""

REFRESH_SECONDS = 1
"""How exactly a flow's last use is known."""

BY_STACK_SECONDS = 5
"""How often XDP leaves a packet to a neighbour to the stack: Linux' delay_first_probe_time."""


class BpfDataplane:
    """See `ebpflb.dataplane.Dataplane`.

    `bpffs`: the pin directory. `cgroup`: whose processes' sockets are served; None for the mounted root. `patterns`:
    those of --devices, () for all. `xdp`: as --xdp. `count_traffic`: whether to count what each Service carries.
    `go_around`: whether flows between pods of this node go around the stack. `maglev_table_size`: how many positions
    the largest table of consistent hashing may have. `cache`: where compiled programs are kept; None for the usual
    place. `beside` asks the daemon that runs here, if one does, what it says of XDP on each device; None for nothing.
    """

    name = "bpf"

    def __init__(
        self,
        bpffs: Path,
        cgroup: Path | None = None,
        patterns: tuple[str, ...] = (),
        *,
        xdp: str = OFF,
        count_traffic: bool = False,
        maglev_table_size: int = LARGEST,
        go_around: bool = False,
        sizes: Sizes | None = None,
        cache: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        beside: Callable[[], tuple[Told, ...] | None] = lambda: None,
    ) -> None:
        self._bpffs = bpffs
        self._cgroup = cgroup
        self._patterns = patterns
        self._xdp = xdp
        self._count_traffic = count_traffic
        self._maglev_table_size = maglev_table_size
        self._go_around = go_around
        self._sizes = sizes
        self._cache = cache
        self._clock = clock
        self._beside = beside
        self._artifact: Artifact | None = None
        self._programs: Programs | None = None
        self._devices: Devices | None = None
        self._writer: Writer | None = None
        self._orphans: Orphans | None = None
        self._attached = False
        self._flows_elsewhere = False

    # ---- Before anything is touched

    def requirements(self) -> tuple[Requirement, ...]:
        """What this dataplane needs of the node, and what XDP comes to on its devices: who has tried it knows best."""
        try:
            beside = self._beside() if self._devices is None else None
            devices = tuple(_xdp_requirement(told) for told in (self._told() if beside is None else beside))
        except ApplyError as error:
            devices = (Requirement("XDP", False, str(error), essential=False),)
        return (*self._needed(), *devices)

    def _needed(self) -> tuple[Requirement, ...]:
        return facts.requirements(self._bpffs, self._cgroup, compiled=self._artifact is not None)

    def check(self) -> None:
        """Raises Unsupported with all that is missing, and UserError for a cgroup or a pin directory that is none."""
        pins.require_place(self._bpffs)
        if self._cgroup is not None:
            cgroup_directory(self._cgroup)
        missing = [requirement for requirement in self._needed() if requirement.essential and not requirement.found]
        if missing and {requirement.name for requirement in missing} <= {"compiler", "headers"}:
            # What was compiled before needs no compiler now.
            try:
                self._load_artifact()
                return
            except Unsupported:
                pass
        if missing:
            cause = [each for each in missing if each.name in ("privileges", "bpf")]
            missing = cause or missing  # what follows from these says nothing more
            raise Unsupported("; ".join(f"{each.name} is missing ({each.detail}): {each.remedy}" for each in missing))

    def _load_artifact(self) -> Artifact:
        if self._artifact is None:
            artifact = load_artifact(
                self._sizes,
                self._cache,
                set_retval=facts.has_set_retval(),
                count_traffic=self._count_traffic,
                go_around=self._go_around,
                xdp_frags=facts.has_xdp_frags(),
            )
            check_layouts(artifact.maps)
            if artifact.numbers.get("LAYOUT") != LAYOUT:
                raise Unsupported(
                    f"the BPF sources have layout {artifact.numbers.get('LAYOUT')}, not {LAYOUT}: reinstall"
                )
            self._artifact = artifact
        return self._artifact

    # ---- Work

    def take_over(self) -> None:
        """TCP that is neither a SYN nor a known flow is left to the stack, which may know it; so is what comes back to
        ports by which conntrack masquerades when this starts."""
        self._flows_elsewhere = True

    def start(self) -> None:
        """Load, attach. Programs that run already over other maps are replaced by the first sync."""
        if self._writer is not None:
            self._attach()
            return
        artifact = self._load_artifact()
        if slow := maglev.missing():
            log.warning("%s: run `make setup`, or reinstall", slow)
        cookie = facts.netns_cookie(self._cgroup)
        if cookie is None:
            raise Unsupported(
                f"kernel {facts.kernel_release()} does not tell which network namespace this is: 5.14 does"
            )
        programs = Programs(artifact, self._bpffs, self._cgroup, cookie, xdp=self._xdp != OFF)
        with ExitStack() as stack:
            stack.callback(programs.close)
            fresh = programs.open()
            xdp = Xdp(
                self._xdp,
                self._bpffs / pins.LINKS,
                programs.programs.get("xdp_ingress"),
                programs.refused.get("xdp_ingress", ""),
            )
            stack.callback(xdp.close)
            edges = Devices(
                programs.programs["tc_ingress"],
                programs.programs["tc_egress"],
                programs.maps["devices"],
                artifact.maps["devices"].value,
                self._patterns,
                vlans=programs.maps["vlans"],
                xdp=xdp,
                with_tcx=tcx.supported(),
            )
            stack.callback(edges.close)
            hertz = facts.jiffies_per_second()
            low, high = ports.snat_ports()
            known = NodeFacts(
                cookie,
                FLOW_IDLE_SECONDS * hertz,
                REFRESH_SECONDS * hertz,
                low,
                high,
                self._flows_elsewhere,
                second=hertz,
                by_stack=BY_STACK_SECONDS * hertz,
            )
            self._programs, self._devices = programs, edges
            self._orphans = Orphans(programs.maps["sockets"], cgroup_directory(self._cgroup))
            self._writer = Writer(KernelMaps(programs.maps), known, self._clock, cap=self._maglev_table_size)
            self._writer.gone_udp = self._orphans.end
            if self._flows_elsewhere:
                _spare_ports(KernelMaps(programs.maps), low, high)
            try:
                # New maps are empty. Where older programs are attached, these serve until the rows are in.
                if not (fresh and (self._was_attached() or programs.succeeds())):
                    self._attach()
            except BaseException:
                self._programs = self._devices = self._writer = self._orphans = None
                raise
            stack.pop_all()

    def _was_attached(self) -> bool:
        return any(pin.kind == pins.LINKS for pin in pins.ours(self._bpffs))

    def _attach(self) -> int:
        """Every hook has our programs; how many had to be changed. Raises ApplyError or UserError."""
        assert self._programs is not None and self._devices is not None
        changed = self._programs.attach()
        try:
            changed += self._devices.sync()
        except OSError as error:
            raise ApplyError("devices", "", error.errno or 0, f"devices cannot be read: {error.strerror}") from error
        self._attached = True
        return changed

    def sync(self, routes: RouteTable) -> Report:
        """Make the kernel hold `routes`."""
        return self._with_hooks(self._started().sync(routes), routes)

    def audit(self) -> Report:
        """Read back rows, programs and devices, and repair what differs."""
        report = self._started().audit()
        assert self._programs is not None and self._devices is not None
        try:
            changed = self._programs.repin() + self._programs.attach() + self._devices.audit()
        except (EbpflbError, OSError) as error:
            return _with_problem(report, str(error))
        log.debug("audit: %d of what was repaired is programs and devices", changed)
        return Report(report.written + changed, report.removed, report.failed, report.seconds, report.problems)

    def _started(self) -> Writer:
        if self._writer is None:
            raise UserError("the bpf dataplane has not been started")
        return self._writer

    def _with_hooks(self, report: Report, routes: RouteTable) -> Report:
        """What a sync does beside rows: attach what waited for them, and tell pods' devices from others."""
        assert self._devices is not None
        try:
            if not self._attached:
                self._attach()
            self._devices.set_pod_interface(routes.locality.pod_interface)
        except (EbpflbError, OSError) as error:
            return _with_problem(report, str(error))
        return report

    # ---- What else the daemon listens to

    @property
    def devices(self) -> Devices | None:
        """The devices to watch (`fileno`, `handle`) and their problems; None before `start`."""
        return self._devices

    @property
    def orphans(self) -> Orphans | None:
        """Who ends sockets of backends that have gone; None before `start`."""
        return self._orphans

    # ---- Looking

    def state(self) -> RouteTable:
        """What the kernel holds. Empty if nothing is programmed."""
        with self._maps() as maps:
            if maps is None:
                return RouteTable()
            with collector_paused(), _readable():
                return Reading(read_tables(maps)).routes()

    def tables(self, what: str) -> list[dict[str, object]]:
        """Rows of `dump what`; none if nothing is programmed. `devices` has, for each device that might carry outside
        traffic, its mode of XDP (`xdp`), why that is not native (`reason`), and whether it is not as it was asked for
        (`problem`)."""
        if what == "devices":
            return [
                {"name": told.device, "xdp": told.mode, "reason": told.reason, "problem": told.problem}
                for told in self._told()
            ]
        with self._maps() as maps:
            if maps is None:
                return []
            with _readable():
                return Inspector(maps, _counter_names(), facts.jiffies).tables(what)

    def _told(self) -> tuple[Told, ...]:
        if self._devices is not None:
            return self._devices.told()
        try:
            return survey(self._xdp, self._patterns)
        except OSError as error:
            raise ApplyError("devices", "", error.errno or 0, f"devices cannot be read: {error.strerror}") from error

    @contextmanager
    def _maps(self) -> Iterator[KernelMaps | None]:
        """The maps, ours or as they are pinned; None if none are. Raises UserError or ApplyError."""
        if self._programs is not None:
            yield KernelMaps(self._programs.maps)
            return
        with ExitStack() as stack:
            descriptors: dict[str, int] = {}
            for table in KEY_VALUE:
                fd = pins.opened(self._bpffs / pins.MAPS / table)
                if fd is not None:
                    stack.callback(os.close, fd)
                    descriptors[table] = fd
            if not descriptors:
                yield None
                return
            self._refuse_other_version(descriptors)
            yield KernelMaps(descriptors)

    def _refuse_other_version(self, descriptors: Mapping[str, int]) -> None:
        for table in KEY_VALUE:
            info = map_calls.map_info(descriptors[table]) if table in descriptors else None
            if info is None or (info.key_size, info.value_size) != SIZES[table]:
                what = "missing" if info is None else "of another version"
                raise UserError(
                    f"{self._bpffs}: the map {table} is {what}; `ebpflb run` replaces it, cleanup removes it"
                )

    def canary(self) -> bool:
        """Whether the pins of all maps and links are there (who flushed them flushed all), and devices run ours."""
        if not pins.complete(self._bpffs, KEY_VALUE):
            return False
        try:
            return self._devices is None or self._devices.intact()
        except OSError as error:
            raise ApplyError("devices", "", error.errno or 0, f"programs cannot be read: {error.strerror}") from error

    def retire(self) -> bool:
        """Frontends go, so that no flow begins here; flows stay."""
        with self._maps() as maps, _readable():
            if maps is None:
                return True
            if ended := leave(maps):
                log.info("bpf: %d frontends left to the successor", ended)
            kept = flows_kept(maps, facts.jiffies(), KEPT_SECONDS * facts.jiffies_per_second())
            log.debug("bpf: %d connections are kept", kept)
            return kept == 0

    def inventory(self) -> tuple[str, ...]:
        """Everything of ours that is installed here. Raises UserError for a pin directory that cannot be one."""
        pins.require_place(self._bpffs)
        return (*pins.inventory(self._bpffs), *self._on_devices(remove=False))

    def cleanup(self) -> None:
        """Detach and remove all of it."""
        self.close()
        self._on_devices(remove=True)
        pins.remove_all(self._bpffs)

    def _on_devices(self, *, remove: bool) -> tuple[str, ...]:
        fd = pins.opened(self._bpffs / pins.MAPS / "devices")
        try:
            rows = None
            if fd is not None and map_calls.map_info(fd).value_size == SIZES["devices"][1]:
                rows = Rows(fd, device_layout())
            return devices.installed(rows, remove=remove)
        except OSError as error:
            raise ApplyError("devices", "", error.errno or 0, f"devices cannot be read: {error.strerror}") from error
        finally:
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        """Let go of all descriptors; what is installed stays and serves."""
        if self._orphans is not None:
            self._orphans.close()
        if self._devices is not None:
            self._devices.close()
        if self._programs is not None:
            self._programs.close()
        self._programs = self._devices = self._writer = self._orphans = None
        self._attached = False


def _xdp_requirement(told: Told) -> Requirement:
    """A device for `check`: nothing stops where it has no XDP."""
    detail = f"{told.mode}: {told.reason}" if told.reason else told.mode
    return Requirement(f"XDP on {told.device}", told.mode != OFF and not told.problem, detail, essential=False)


@contextmanager
def _readable() -> Iterator[None]:
    """A map that cannot be read is an ApplyError."""
    try:
        yield
    except OSError as error:
        raise ApplyError("maps", "", error.errno or 0, f"the maps cannot be read: {error.strerror}") from error


def _spare_ports(maps: KernelMaps, low: int, high: int) -> None:
    """New connections matter more than what may happen to some old ones: what is refused here stops no start."""
    try:
        count = spare_ports(maps, answers_elsewhere(), low, high)
        log.info("%d of the ports for masquerade are conntrack's by now: they are spared", count)
    except OSError as error:
        log.warning("a connection of the predecessor may lose its port to a new one: conntrack: %s", error.strerror)


def _with_problem(report: Report, reason: str) -> Report:
    problems = (*report.problems, Problem(NODE, reason))
    return Report(report.written, report.removed, report.failed + 1, report.seconds, problems)


def _counter_names() -> tuple[str, ...]:
    """As `bpf/maps.h` has them."""
    return enumerators(read_sources(source_directory())["maps.h"], "counter")[:-1]
