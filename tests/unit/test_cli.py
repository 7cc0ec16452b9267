"""The commands as they are typed, on parts in memory: what is printed where, and the exit statuses.

Rules of this file: everything goes through `main`, as a shell would; nothing looks inside.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

from ebpflb.cli import main
from ebpflb.control import listen
from ebpflb.dataplane import Requirement
from ebpflb.errors import ApplyError, Unsupported, UserError
from ebpflb.model import Problem, ProxyOptions, ServiceName
from ebpflb.observer import Attempt, Observers
from ebpflb.parts import NoAttendants, Parts
from ebpflb.problems import Found
from ebpflb.routes import Algorithm, Kind, Locality, Masquerade, RouteTable, Scope, Verdict
from ebpflb.source import Condition, Event, SourceState
from tests.fakes import FakeDataplane, FakeSource, World, both, routes, row
from tests.said import Said

Shell = Callable[..., Said]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """`shell(parts, "dump", "-o", "json")`."""

    def run(parts: Parts | World, *words: str) -> Said:
        capsys.readouterr()
        status = main(words, parts.parts if isinstance(parts, World) else parts)
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run


@pytest.fixture
def world() -> World:
    return World(want=routes(*both()))


@pytest.fixture
def manifests(tmp_path: Path) -> str:
    return str(tmp_path)


def refused(said: Said, status: int) -> str:
    """The one line on stderr of a command that failed with `status`."""
    assert said.status == status, said
    assert said.one_line.startswith("ebpflb: ")
    return said.one_line


# ---- run ----


def test_run_once_syncs_and_leaves_everything_in_place(shell: Shell, world: World, manifests: str) -> None:
    said = shell(world, "run", "--once", "--manifests", manifests)
    assert said.status == 0
    assert said.out == ""
    assert "2 rows written" in said.err
    assert world.dataplane.held == world.desired.want
    assert "cleanup" not in world.dataplane.calls
    assert world.source.closed


def test_run_once_says_when_something_was_refused(shell: Shell, world: World, manifests: str) -> None:
    world.dataplane.fail_next = 1
    said = shell(world, "run", "--once", "--manifests", manifests)
    assert said.status == 1
    assert "frontends: no room (ENOSPC)" in said.err


def test_run_once_says_when_a_manifest_was_refused(shell: Shell, world: World, manifests: str) -> None:
    """The rest is served, and whoever waits for the exit status hears of it."""
    world.source.wrong = (Problem("web.yaml document 2", "kind Servise is unknown"),)
    said = shell(world, "run", "--once", "--manifests", manifests)
    assert said.status == 1
    assert "manifests: web.yaml document 2: kind Servise is unknown" in said.err
    assert world.dataplane.held == world.desired.want


def test_run_once_minds_no_remark_of_the_policy(shell: Shell, manifests: str) -> None:
    name = ServiceName("ns", "web")
    world = World(want=routes(*both(), problems={name: (Problem("ns/web", "a remark"),)}))
    said = shell(world, "run", "--once", "--manifests", manifests)
    assert said.status == 0
    assert "policy: ns/web: a remark" in said.err


def test_run_without_a_source_says_which_option_to_give(shell: Shell, world: World) -> None:
    assert "--manifests DIR" in refused(shell(world, "run"), 2)


def test_run_needs_root(shell: Shell, world: World, manifests: str) -> None:
    parts = world.but(privileged=lambda: False)
    assert "sudo" in refused(shell(parts, "run", "--manifests", manifests), 2)
    assert world.dataplane.calls == []


def test_run_where_nothing_can_carry_services(shell: Shell, world: World, manifests: str) -> None:
    world.dataplane.raises["check"] = Unsupported("no python3-bpfcc: apt-get install python3-bpfcc")
    line = shell(world, "run", "--manifests", manifests)
    assert line.status == 3
    assert "apt-get install python3-bpfcc" in line.err
    assert world.dataplane.held is None


def test_a_second_daemon_is_refused_before_it_touches_anything(shell: Shell, world: World, manifests: str) -> None:
    with listen(world.parts.socket_name):
        said = shell(world, "run", "--manifests", manifests)
    assert "another ebpflb daemon runs in this network namespace" in refused(said, 2)
    assert world.dataplane.calls == []


def test_run_warns_of_a_detector_without_its_value(shell: Shell, world: World, manifests: str) -> None:
    said = shell(world, "run", "--once", "--manifests", manifests)
    assert "WARNING detect-local mode ClusterCIDR needs --cluster-cidr" in said.err


def test_run_logs_json_lines_when_asked(shell: Shell, world: World, manifests: str) -> None:
    said = shell(world, "run", "--once", "--manifests", manifests, "--log-format", "json")
    lines = [json.loads(line) for line in said.err.splitlines()]
    (sync,) = [line for line in lines if line.get("event") == "sync"]
    assert sync["written"] == 2 and sync["failed"] == 0 and sync["level"] == "info"


def test_run_ends_well_on_sigterm(shell: Shell, world: World, manifests: str) -> None:
    class Terminated(type(world.dataplane)):  # type: ignore[misc]
        def sync(self, routes: RouteTable) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().sync(routes)

    world.dataplane = Terminated()
    said = shell(world, "run", "--manifests", manifests)
    assert said.status == 0
    assert "the kernel keeps serving" in said.err
    assert world.dataplane.held == world.desired.want


def test_what_fails_because_of_the_signal_is_no_error(shell: Shell, world: World, manifests: str) -> None:
    """Ctrl-C reaches the compiler's process as well."""

    class Interrupted(type(world.dataplane)):  # type: ignore[misc]
        def start(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            raise Unsupported("the compiler was interrupted")

    world.dataplane = Interrupted()
    said = shell(world, "run", "--manifests", manifests)
    assert said.status == 0
    assert "interrupted" not in said.err


def test_the_collector_rests_while_the_first_tables_are_built(world: World, manifests: str) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching(type(world.dataplane)):  # type: ignore[misc]
        def sync(self, routes: RouteTable) -> object:
            seen.append((gc.isenabled(), gc.get_freeze_count() > frozen))
            if len(seen) == 1:
                world.source.change()
            else:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().sync(routes)

    frozen = gc.get_freeze_count()
    world.dataplane = Watching()
    assert main(["run", "--manifests", manifests], world.but(clock=time.monotonic)) == 0
    assert seen == [(False, False), (True, True)]
    assert gc.isenabled()


def test_run_once_does_not_wait_for_ever(shell: Shell, world: World, manifests: str) -> None:
    world.source = FakeSource("kubernetes")
    world.source.state = Condition(SourceState.STARTING, detail="https://10.0.0.1:6443: connection refused")
    said = shell(world.but(clock=time.monotonic, patience=0.05), "run", "--once", "--manifests", manifests)
    assert said.status == 1
    assert said.err.splitlines()[-1] == (
        "ebpflb: kubernetes has not said everything: https://10.0.0.1:6443: connection refused; try again"
    )
    assert world.dataplane.held is None


@pytest.mark.parametrize("command", [("run", "--once"), ("plan",)])
def test_a_source_that_fails_again_and_again_is_not_waited_out(
    shell: Shell, world: World, manifests: str, command: tuple[str, ...]
) -> None:
    world.source = FakeSource("kubernetes")
    world.source.state = Condition(SourceState.STARTING, detail="kubeconfig: it has no current-context", failures=3)
    said = shell(world.but(clock=time.monotonic, patience=3600.0), *command, "--manifests", manifests)
    assert said.status == 1
    assert said.err.splitlines()[-1] == (
        "ebpflb: kubernetes has not said everything: kubeconfig: it has no current-context; try again"
    )


def test_who_only_looks_is_not_told_what_a_daemon_would_log(shell: Shell, world: World, manifests: str) -> None:
    class Chatty(type(world.source)):  # type: ignore[misc]
        def read(self) -> Iterable[Event]:
            logging.getLogger("ebpflb.kubernetes").info("services: 3 listed")
            return super().read()  # type: ignore[no-any-return]

    def chatty(*words: str) -> str:
        world.source = Chatty()
        world.source.synced()
        return shell(world, *words, "--manifests", manifests).err

    assert "services: 3 listed" not in chatty("plan")
    assert "services: 3 listed" in chatty("plan", "--log-level", "info")
    assert "services: 3 listed" in chatty("run", "--once")


class Edited:
    """A configuration file that has just been changed."""

    def __init__(self) -> None:
        self.ends = socket.socketpair()
        self.ends[1].send(b"!")
        self.closed = False

    def fileno(self) -> int:
        return self.ends[0].fileno()

    def changed(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        for end in self.ends:
            end.close()


def test_a_changed_configuration_ends_the_daemon_well(shell: Shell, world: World, manifests: str) -> None:
    """Whoever runs it starts it again, with what the file says now."""
    edited = Edited()
    world.config_changes = edited
    said = shell(world, "run", "--manifests", manifests)
    assert said.status == 0
    assert "has changed: ending, to be started again" in said.err
    assert edited.closed


class Story(Observers):
    """Notes what it is told, and ends the daemon after its first sync."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def event(self, event: Event) -> None:
        self.told.append(type(event).__name__)

    def queued(self, at: float) -> None:
        self.told.append("queued")

    def attempted(self, attempt: Attempt) -> None:
        self.told.append(attempt.what)
        os.kill(os.getpid(), signal.SIGTERM)


class Company(NoAttendants):
    """Attendants that note what happens to them."""

    def __init__(self) -> None:
        self.observer = Story()
        self.story = self.observer.told

    def begin(self) -> None:
        self.story.append("begin")

    def problems(self) -> Iterable[Found]:
        return (Found("health", "ns/web", "port 30000 is taken"),)

    def close(self) -> None:
        self.story.append("close")


def test_attendants_go_along_from_before_the_first_event_to_the_end(shell: Shell, world: World, manifests: str) -> None:
    company = Company()
    world.attendants = company
    world.node_problems = (Problem("nf_conntrack_max", "there is no such file"),)
    said = shell(world, "run", "--manifests", manifests)
    assert said.status == 0
    assert company.story == ["begin", "queued", "Synced", "sync", "close"]
    assert "health: ns/web: port 30000 is taken" in said.err
    assert "node: nf_conntrack_max: there is no such file" in said.err


@pytest.mark.parametrize(("algorithm", "told"), [("random", False), ("maglev", False), ("round-robin", True)])
def test_an_algorithm_that_the_dataplane_does_not_have_is_told(
    shell: Shell, world: World, manifests: str, algorithm: str, told: bool
) -> None:
    said = shell(world, "run", "--once", "--manifests", manifests, "--algorithm", algorithm)
    assert said.status == 0
    reason = "node: --algorithm: round-robin is none that this node's dataplane has (random, maglev)"
    assert (reason in said.err) is told
    assert {config.proxy.default_algorithm for config in world.configs} == {algorithm}


@pytest.mark.parametrize(
    ("dataplane", "mode", "told"), [("bpf", "native", False), ("ipvs", "native", True), ("ipvs", "auto", False)]
)
def test_xdp_that_the_dataplane_does_not_have_is_told(
    shell: Shell, world: World, manifests: str, dataplane: str, mode: str, told: bool
) -> None:
    world.dataplane.name = dataplane
    said = shell(world, "run", "--once", "--manifests", manifests, "--xdp", mode)
    assert said.status == 0
    assert ("node: --xdp: native is for the dataplane bpf; this node's is ipvs" in said.err) is told


def test_a_daemon_that_runs_once_has_no_attendants(shell: Shell, world: World, manifests: str) -> None:
    company = Company()
    world.attendants = company
    assert shell(world, "run", "--once", "--manifests", manifests).status == 0
    assert company.story == []


def test_options_reach_the_config(shell: Shell, world: World, manifests: str) -> None:
    shell(
        world, "run", "--once", "--manifests", manifests, "--hostname-override", "N1", "--masquerade-all",
        "--cluster-cidr", "10.0.0.0/8,fd00::/8", "--nodeport-addresses", "primary",
        "--iptables-localhost-nodeports=false", "--bpffs", "/sys/fs/bpf/x", "--dataplane", "bpf", "-v=2",
        "--xdp", "off", "--devices", "eth*",
    )  # fmt: skip
    (config,) = world.configs
    assert config.node_name == "n1"
    assert config.bpffs == "/sys/fs/bpf/x"
    assert config.devices == ("eth*",)
    assert config.proxy == ProxyOptions(
        masquerade_all=True,
        cluster_cidrs=("10.0.0.0/8", "fd00::/8"),
        nodeport_primary=True,
        localhost_nodeports=False,
    )


@pytest.mark.parametrize("spelling", ["--cleanup", "--cleanup=true"])
def test_run_cleanup_is_cleanup(shell: Shell, world: World, spelling: str) -> None:
    world.dataplane.held = RouteTable()
    said = shell(world, "run", spelling)
    assert said.status == 0
    assert world.dataplane.held is None


# ---- dump ----


def test_dump_shows_what_the_kernel_holds(shell: Shell) -> None:
    said = shell(World(held=routes(*both())), "dump")
    assert said.status == 0
    assert said.out.splitlines() == [
        "SERVICE     KIND       FRONTEND            SCOPE  VERDICT  BACKENDS",
        "ns/web:p80  ClusterIP  172.30.0.41:80/TCP  any    FORWARD  10.180.0.1:8080",
    ]


def test_dump_changes_nothing(shell: Shell) -> None:
    world = World(held=routes(*both()))
    shell(world, "dump")
    assert set(world.dataplane.calls) <= {"state"}


def test_dump_json_and_yaml_agree(shell: Shell) -> None:
    world = World(held=routes(*both(), *both("fd00::1", backends=())))
    as_json, as_yaml = shell(world, "dump", "-o", "json"), shell(world, "dump", "routes", "-o", "yaml")
    assert len(as_json.items) == 4
    assert yaml.safe_load(as_yaml.out) == json.loads(as_json.out)


def test_dump_of_nothing(shell: Shell, world: World) -> None:
    assert "nothing is programmed here" in refused(shell(world, "dump"), 4)


def test_dump_needs_root(shell: Shell, world: World) -> None:
    assert "sudo" in refused(shell(world.but(privileged=lambda: False), "dump"), 2)


@pytest.mark.parametrize(("service", "number"), [("ns/web", 2), ("ns/other", 0)], ids=["own", "absent"])
def test_dump_of_one_service(shell: Shell, service: str, number: int) -> None:
    said = shell(World(held=routes(*both())), "dump", "-o", "json", "--service", service)
    assert len(said.items) == number


@pytest.mark.parametrize("text", ["web", "a/b/c", "/web", "ns/", ""])
def test_a_service_has_a_namespace_and_a_name(shell: Shell, text: str) -> None:
    assert "NAMESPACE/NAME" in refused(shell(World(held=routes()), "dump", "--service", text), 2)


def test_dump_of_other_tables(shell: Shell) -> None:
    world = World(held=routes(*both()))
    world.dataplane.rows["backends"] = [
        {"id": 1, "service": {"namespace": "ns", "name": "web", "port": "p80"}, "address": "10.180.0.1"},
        {"id": 2, "service": {"namespace": "ns", "name": "other", "port": ""}, "address": "10.180.0.2"},
    ]
    assert shell(world, "dump", "backends").out == (
        "ID  SERVICE     ADDRESS\n1   ns/web:p80  10.180.0.1\n2   ns/other    10.180.0.2\n"
    )
    narrowed = shell(world, "dump", "backends", "-o", "json", "--service", "ns/other")
    assert [item["id"] for item in narrowed.items] == [2]
    assert json.loads(narrowed.out)["kind"] == "Backend"


def test_dump_of_a_table_that_the_dataplane_lacks(shell: Shell) -> None:
    assert "no such table" in refused(shell(World(held=routes()), "dump", "traffic"), 2)


def test_dump_of_a_word_that_is_none(shell: Shell) -> None:
    assert "routes, services, backends" in refused(shell(World(held=routes()), "dump", "rooutes"), 2)


# ---- plan, verify ----


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_nothing_to_do(shell: Shell, manifests: str, command: str) -> None:
    world = World(want=routes(*both()), held=routes(*both()))
    said = shell(world, command, "--manifests", manifests)
    assert said.status == 0
    assert "nothing to do" in said.out
    assert shell(world, command, "--manifests", manifests).status == 0


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_additions_changes_and_removals(shell: Shell, manifests: str, command: str) -> None:
    want = routes(*both(), *both("172.30.0.42", name="new"))
    world = World(want, held=routes(*both(backends=()), *both("172.30.0.43", name="old")))
    said = shell(world, command, "--manifests", manifests, "-o", "json")
    assert said.status == 5
    assert [(item["change"], item["service"]["name"]) for item in said.items] == [  # type: ignore[index]
        ("change", "web"), ("change", "web"), ("add", "new"), ("add", "new"), ("remove", "old"), ("remove", "old"),
    ]  # fmt: skip
    first = said.items[0]
    assert first["wanted"]["verdict"] == "FORWARD" and first["held"]["verdict"] == "REJECT"  # type: ignore[index]


def test_a_plan_for_people(shell: Shell, manifests: str) -> None:
    world = World(routes(*both()), held=routes(*both("172.30.0.43", name="old")))
    said = shell(world, "plan", "--manifests", manifests)
    assert said.status == 5
    assert [line.split()[0] for line in said.out.splitlines() if line] == [
        "add", "SERVICE", "ns/web:p80", "remove", "SERVICE", "ns/old:p80",
    ]  # fmt: skip


def test_a_plan_changes_nothing(shell: Shell, world: World, manifests: str) -> None:
    assert shell(world, "plan", "--manifests", manifests).status == 5
    assert world.dataplane.held is None
    assert set(world.dataplane.calls) <= {"state"}


def test_what_tells_local_clients_is_planned_too(shell: Shell, manifests: str) -> None:
    want = routes(*both(), locality=Locality(pod_cidrs=("10.180.0.0/16",)))
    said = shell(World(want, held=routes(*both())), "plan", "--manifests", manifests)
    assert said.status == 5
    assert "10.180.0.0/16" in said.out


WEB_OWNS = ServiceName("ns", "web")
OLD_OWNS = ServiceName("ns", "old")


@pytest.mark.parametrize("command", ["plan", "verify"])
@pytest.mark.parametrize(
    ("want", "held", "change"),
    [(WEB_OWNS, None, "add"), (WEB_OWNS, OLD_OWNS, "change"), (None, OLD_OWNS, "remove")],
)
def test_whose_a_cluster_ip_is_is_compared_too(
    shell: Shell, manifests: str, command: str, want: ServiceName | None, held: ServiceName | None, change: str
) -> None:
    """Its undefined ports are refused by that, whatever rows there are."""
    address = "172.30.0.41"
    world = World(
        routes(*both(), owned={address: want} if want else {}),
        held=routes(*both(), owned={address: held} if held else {}),
    )
    said = shell(world, command, "--manifests", manifests, "-o", "json")
    assert said.status == 5
    names = [{"namespace": each.namespace, "name": each.name} if each else None for each in (want, held)]
    assert said.items == [
        {"change": change, "clusterIP": address, "service": names[0] or names[1], "wanted": names[0], "held": names[1]}
    ]
    said = shell(world, command, "--manifests", manifests)
    assert said.status == 5
    assert said.out.splitlines()[1:] == [
        "CLUSTER-IP   WANTED  HELD",
        f"{address}  {str(want or '-'):6}  {held or '-'}",
    ]


def test_whose_cluster_ips_are_is_shown_in_order_and_by_service(shell: Shell, manifests: str) -> None:
    owned = {address: WEB_OWNS for address in ("fd00:172:30::41", "172.30.0.100", "172.30.0.41")}
    world = World(routes(*both(), owned=owned), held=routes(*both(), owned={"172.30.0.9": OLD_OWNS}))
    said = shell(world, "verify", "--manifests", manifests, "-o", "json")
    assert [item["clusterIP"] for item in said.items] == [
        "172.30.0.9",
        "172.30.0.41",
        "172.30.0.100",
        "fd00:172:30::41",
    ]
    said = shell(world, "verify", "--manifests", manifests, "-o", "json", "--service", "ns/old")
    assert [item["clusterIP"] for item in said.items] == ["172.30.0.9"]
    assert shell(world, "verify", "--manifests", manifests, "--service", "ns/other").status == 0


def test_a_plan_of_one_service(shell: Shell, manifests: str) -> None:
    world = World(routes(*both(), *both("172.30.0.42", name="other")), held=routes(*both()))
    assert shell(world, "plan", "--manifests", manifests, "--service", "ns/web").status == 0
    assert shell(world, "plan", "--manifests", manifests, "--service", "ns/other").status == 5


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_what_was_refused_is_told_beside_the_plan(shell: Shell, world: World, manifests: str, command: str) -> None:
    """Who asks what a changed manifest would do must hear that it has a typo."""
    world.source.wrong = (Problem("web.yaml document 2", "kind Servise is unknown"),)
    said = shell(world, command, "--manifests", manifests)
    assert said.status == 5
    assert "manifests: web.yaml document 2: kind Servise is unknown" in said.err


def test_all_that_was_refused_is_told_beside_the_plan(shell: Shell, world: World, manifests: str) -> None:
    world.source.wrong = tuple(Problem(f"{number}.yaml", "no YAML") for number in range(100))
    said = shell(world, "plan", "--manifests", manifests, "-o", "json")
    assert len([line for line in said.err.splitlines() if "no YAML" in line]) == 100
    assert len(said.items) == 2


def test_a_plan_waits_for_a_source_that_takes_its_time(shell: Shell, world: World, manifests: str) -> None:
    def later(source: FakeSource) -> FakeSource:
        source.change()
        thread = threading.Timer(0.05, source.synced)
        thread.start()
        return source

    source = FakeSource()
    source.fileno()
    said = shell(
        world.but(sources=lambda config: (later(source),), clock=time.monotonic), "plan", "--manifests", manifests
    )
    assert said.status == 5 and said.err == ""


def test_a_source_that_does_not_come_to_an_end_is_said_in_its_words(shell: Shell, world: World, manifests: str) -> None:
    source = FakeSource("kubernetes")
    source.state = Condition(SourceState.STARTING, detail="https://10.0.0.1:6443: connection refused", failures=3)
    parts = world.but(sources=lambda config: (source,), patience=0.0)
    said = shell(parts, "plan", "--manifests", manifests)
    assert said.status == 1
    assert said.err == (
        "ebpflb: kubernetes has not said everything: https://10.0.0.1:6443: connection refused; try again\n"
    )
    assert source.closed


def test_a_plan_needs_a_source(shell: Shell, world: World) -> None:
    assert "--manifests DIR" in refused(shell(world, "plan"), 2)


# ---- trace ----

TRACED = routes(
    *both(backends=("10.180.0.1", "10.180.1.1"), masquerade=Masquerade.NOT_POD),
    *both("172.30.0.42", name="empty", backends=()),
    *both("fd00::41", backends=("fd00:10::1",)),
    row("192.168.0.2", 30080, Scope.INTERNAL),
    ((row("192.168.0.2", 30080)[0][0], Scope.EXTERNAL), row(backends=())[1]),
    locality=Locality(node_addresses=("192.168.0.2",), pod_cidrs=("10.180.0.0/24",)),
)


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (("10.180.0.9", "172.30.0.41:80"), 0, ("scope INTERNAL", "10.180.0.1:8080, which sees 10.180.0.9")),
        (("192.168.0.2", "172.30.0.41:80/tcp"), 0, ("10.180.1.1:8080, which sees this node",)),
        (("10.180.0.9", "172.30.0.42:80"), 6, ("REJECT",)),
        (("10.180.0.9", "172.30.0.41:81"), 7, ("NOT A SERVICE",)),
        (("10.180.0.9", "172.30.0.41:80/UDP"), 7, ("NOT A SERVICE",)),
        (("fd00::9", "[fd00::41]:80"), 0, ("[fd00:10::1]:8080",)),
        (("FD00:0::9", "[fd00:0:0::41]:80"), 0, ("[fd00:10::1]:8080",)),
        (("203.0.113.5", "192.168.0.2:30080"), 6, ("scope EXTERNAL",)),
    ],
)
def test_trace(shell: Shell, words: tuple[str, str], status: int, parts: tuple[str, ...]) -> None:
    said = shell(World(held=TRACED), "trace", *words)
    assert said.status == status
    for part in parts:
        assert part in said.out


def test_trace_by_interface(shell: Shell) -> None:
    world = World(held=routes(*TRACED.ordered(), locality=Locality(pod_interface="veth*")))
    assert "scope INTERNAL" in shell(world, "trace", "10.9.9.9", "172.30.0.41:80", "--interface", "veth12").out
    assert "scope EXTERNAL" in shell(world, "trace", "10.9.9.9", "172.30.0.41:80", "--interface", "eth0").out


@pytest.mark.parametrize(
    ("dataplane", "algorithm", "told"),
    [("bpf", "MAGLEV", False), ("bpf", "ROUND_ROBIN", True), ("iptables", "MAGLEV", True), ("ipvs", "MAGLEV", False)],
)
def test_trace_says_where_a_dataplane_does_not_choose_as_asked(
    shell: Shell, dataplane: str, algorithm: str, told: bool
) -> None:
    held = routes(*both(backends=("10.180.0.1", "10.180.1.1"), algorithm=Algorithm[algorithm]))
    world = World()
    world.dataplane = FakeDataplane(held, name=dataplane)
    said = shell(world, "trace", "10.180.0.9", "172.30.0.41:80")
    assert said.status == 0
    asked = Algorithm[algorithm].label
    assert f"chosen by {asked}" in said.out
    assert (f"{dataplane} does not do {asked}: one of them is chosen at random" in said.out) is told


def test_trace_in_json(shell: Shell) -> None:
    (item,) = shell(World(held=TRACED), "trace", "192.168.0.2", "172.30.0.41:80", "-o", "json").items
    assert item["verdict"] == "FORWARD"
    assert item["service"] == {"namespace": "ns", "name": "web", "port": "p80"}
    assert [each["source"] for each in item["candidates"]] == ["node", "node"]  # type: ignore[attr-defined]
    assert len(item["steps"]) >= 3  # type: ignore[arg-type]


WEB = {"namespace": "ns", "name": "web", "port": "p80"}
LATELY = {"service": WEB, "protocol": "TCP", "client": "10.180.0.9", "secondsLeft": 590.0}


@pytest.mark.parametrize(
    ("remembered", "step", "candidates"),
    [
        ({**LATELY, "backend": "10.180.1.1:8080"}, "it goes to 10.180.1.1:8080, as before", 1),
        ({**LATELY, "backend": "10.180.7.7:8080"}, "10.180.7.7:8080 takes no new flows: chosen anew", 2),
        ({**LATELY, "backend": None}, "where it went takes no new flows: chosen anew", 2),
        ({**LATELY, "backend": "10.180.1.1:8080", "client": "10.180.0.8"}, "10.180.0.9 is not remembered", 2),
        ({**LATELY, "backend": "10.180.1.1:8080", "protocol": "UDP"}, "10.180.0.9 is not remembered", 2),
        ({**LATELY, "backend": "10.180.1.1:8080", "service": {**WEB, "name": "a"}}, "10.180.0.9 is not remembered", 2),
        ({**LATELY, "backend": "10.180.1.1:8080", "frontend": "10.0.0.9:80/TCP"}, "10.180.0.9 is not remembered", 2),
        (
            {"service": WEB, "client": "10.180.0.9", "backend": "10.180.1.1:8080", "idleSeconds": 599.0},
            "it goes to 10.180.1.1:8080, as before",
            1,
        ),
    ],
)
def test_trace_of_a_client_with_session_affinity(
    shell: Shell, remembered: dict[str, object], step: str, candidates: int
) -> None:
    """Whatever its dataplane says of clients, and however: it is one of these for bpf, IPVS or iptables."""
    world = World(held=routes(*both(backends=("10.180.0.1", "10.180.1.1"), affinity_seconds=600)))
    world.dataplane.rows["affinity"] = [remembered]
    (item,) = shell(world, "trace", "10.180.0.9", "172.30.0.41:80", "-o", "json").items
    steps = item["steps"]
    assert isinstance(steps, list) and step in steps[-1], steps
    assert len(item["candidates"]) == candidates  # type: ignore[arg-type]


def test_trace_of_a_pod_whose_sockets_are_remembered(shell: Shell) -> None:
    """They are another client than the pod's address, and nothing here tells which pod's they are."""
    found = routes(
        *both(backends=("10.180.0.1", "10.180.1.1"), affinity_seconds=600),
        locality=Locality(pod_cidrs=("10.180.0.0/24",)),
    )
    world = World(held=found)
    world.dataplane.rows["affinity"] = [{**LATELY, "client": "netns:4711", "backend": "10.180.1.1:8080"}]
    assert "by their network namespace" in shell(world, "trace", "10.180.0.9", "172.30.0.41:80").out
    assert "by their network namespace" not in shell(world, "trace", "203.0.113.9", "172.30.0.41:80").out


def test_dump_of_consistent_hashing_is_a_line_for_each_backend(shell: Shell) -> None:
    world = World(held=routes(*both()))
    shares = [
        {"address": "10.180.0.1", "port": 8080, "weight": 1, "share": 0.3337},
        {"address": "fd00::1", "port": 8080, "weight": 2, "share": 0.6663},
    ]
    item = {"service": WEB, "protocol": "TCP", "size": 1021, "backends": shares, "id": 3}
    world.dataplane.rows["maglev"] = [item]
    lines = [line.split() for line in shell(world, "dump", "maglev").out.splitlines()]
    assert lines == [
        ["SERVICE", "PROTOCOL", "SIZE", "ID", "BACKEND", "WEIGHT", "SHARE"],
        ["ns/web:p80", "TCP", "1021", "3", "10.180.0.1:8080", "1", "33.4%"],
        ["ns/web:p80", "TCP", "1021", "3", "[fd00::1]:8080", "2", "66.6%"],
    ]
    assert shell(world, "dump", "maglev", "-o", "json").items == [item]


def test_dump_of_consistent_hashing_where_the_kernel_tells_no_shares(shell: Shell) -> None:
    world = World(held=routes(*both()))
    backends = [{"address": "10.180.0.1", "port": 8080, "weight": 3, "share": None}]
    world.dataplane.rows["maglev"] = [
        {"service": WEB, "protocol": "TCP", "size": None, "backends": backends, "id": "FWM 0x7 IPv4"}
    ]
    (line,) = shell(world, "dump", "maglev").out.splitlines()[1:]
    assert line.split() == ["ns/web:p80", "TCP", "-", "FWM", "0x7", "IPv4", "10.180.0.1:8080", "3", "-"]


def test_dump_sources_of_a_service_are_its_source_ranges(shell: Shell) -> None:
    world = World(held=routes(*both("172.30.0.41"), *both("172.30.0.42", name="other")))
    everybody = {"cidr": "192.168.0.2/32", "node": True, "pod": False}
    ranged = {"cidr": "10.0.0.0/8", "node": False, "pod": False}
    frontends = ["172.30.0.41:80/TCP", "172.30.0.42:80/TCP"]
    world.dataplane.rows["sources"] = [everybody, {**ranged, "mayUse": frontends}]
    assert shell(world, "dump", "sources", "-o", "json").items == [everybody, {**ranged, "mayUse": frontends}]
    of_web = shell(world, "dump", "sources", "--service", "ns/web", "-o", "json").items
    assert of_web == [{**ranged, "mayUse": frontends[:1]}]


def test_trace_of_a_port_that_a_cluster_ip_does_not_have(shell: Shell) -> None:
    world = World(held=routes(*both(), owned={"172.30.0.41": ServiceName("ns", "web")}))
    said = shell(world, "trace", "10.180.0.9", "172.30.0.41:4711")
    assert said.status == 6
    assert "a cluster IP of ns/web, which has no such port: refused at once" in said.out


@pytest.mark.parametrize(
    "words",
    [
        ("nobody", "172.30.0.41:80"),
        ("10.0.0.1", "172.30.0.41"),
        ("10.0.0.1", "172.30.0.41:0"),
        ("10.0.0.1", "172.30.0.41:65536"),
        ("10.0.0.1", "172.30.0.41:http"),
        ("10.0.0.1", "172.30.0.41:80/ICMP"),
        ("10.0.0.1", "[fd00::41]:80"),
        ("fd00::1", "fd00::41:80"),
        ("10.0.0.1", "web:80"),
    ],
)
def test_a_packet_that_makes_no_sense(shell: Shell, words: tuple[str, str]) -> None:
    refused(shell(World(held=TRACED), "trace", *words), 2)


def test_trace_of_nothing(shell: Shell, world: World) -> None:
    refused(shell(world, "trace", "10.0.0.1", "172.30.0.41:80"), 4)


# ---- check ----


def test_check_says_who_would_carry_services(shell: Shell, world: World) -> None:
    said = shell(world, "check")
    assert said.status == 0
    assert "bpf would carry services here" in said.out
    assert "kernel 6.1" in said.out


def test_check_says_what_is_missing_and_what_to_do(shell: Shell, world: World) -> None:
    world.dataplane.lacks = (Requirement("bcc", False, "not installed", "apt-get install python3-bpfcc"),)
    world.dataplane.raises["check"] = Unsupported("no bcc")
    said = shell(world, "check")
    assert said.status == 3
    assert "MISSING" in said.out and "apt-get install python3-bpfcc" in said.out
    assert "nothing here can carry services: bpf: no bcc" in said.out


def test_check_looks_at_every_dataplane_and_says_why_not_the_better_one(shell: Shell, world: World) -> None:
    world.others = [FakeDataplane(name="ipvs"), FakeDataplane(name="iptables")]
    world.dataplane.raises["check"] = Unsupported("no bcc")
    said = shell(world, "check")
    assert said.status == 0
    assert "ipvs would carry services here\nnot bpf: no bcc\n" in said.out
    assert {line.partition(" ")[0] for line in said.out.splitlines()} >= {"bpf", "ipvs", "iptables"}


def test_check_of_a_dataplane_by_name(shell: Shell, world: World) -> None:
    world.others = [FakeDataplane(name="iptables")]
    assert "iptables would carry services here\n" in shell(world, "check", "--dataplane", "iptables").out
    world.others[0].raises["check"] = Unsupported("no iptables binary: apt-get install iptables")
    said = shell(world, "check", "--dataplane", "iptables")
    assert said.status == 3
    assert "dataplane iptables cannot carry services here: no iptables binary: apt-get install iptables" in said.out


def test_check_in_json(shell: Shell, world: World) -> None:
    (item,) = shell(world, "check", "-o", "json").items
    assert item["requirement"] == "bpf(2)" and item["found"] is True


# ---- cleanup ----


def test_cleanup_removes_everything(shell: Shell) -> None:
    world = World(held=routes(*both()))
    said = shell(world, "cleanup")
    assert said.status == 0
    assert world.dataplane.held is None
    assert said.out == "removed map frontends\nremoved program connect4\n"
    assert shell(world, "cleanup").out == "nothing was installed\n"


def test_cleanup_dry_run_only_says(shell: Shell) -> None:
    world = World(held=routes(*both()))
    said = shell(world, "cleanup", "--dry-run")
    assert said.out == "would remove map frontends\nwould remove program connect4\n"
    assert world.dataplane.held is not None


def test_cleanup_is_refused_while_a_daemon_would_undo_it(shell: Shell) -> None:
    world = World(held=routes(*both()))
    with listen(world.parts.socket_name):
        assert "stop it first" in refused(shell(world, "cleanup"), 2)
    assert world.dataplane.held is not None


def test_cleanup_asks_every_dataplane_whatever_one_says(shell: Shell) -> None:
    world = World(held=routes(*both()))
    world.others = [FakeDataplane(routes(*both()), "iptables")]
    world.dataplane.raises["cleanup"] = ApplyError("links", "", 1, "links: Operation not permitted")
    assert "links: Operation not permitted" in shell(world, "cleanup", "--dataplane", "bpf").err
    assert world.others[0].held is None


def test_cleanup_of_kube_proxy_takes_its_things_only(shell: Shell) -> None:
    world = World(held=routes(*both()))
    world.kube_proxy.lines = ("chain KUBE-SERVICES of nat", "ipset KUBE-CLUSTER-IP")
    said = shell(world, "cleanup", "--kube-proxy", "--dry-run")
    assert said.out == "would remove chain KUBE-SERVICES of nat\nwould remove ipset KUBE-CLUSTER-IP\n"
    assert len(world.kube_proxy.lines) == 2
    said = shell(world, "cleanup", "--kube-proxy")
    assert (said.status, said.out) == (0, "removed chain KUBE-SERVICES of nat\nremoved ipset KUBE-CLUSTER-IP\n")
    assert shell(world, "cleanup", "--kube-proxy").out == "kube-proxy left nothing here\n"
    assert world.dataplane.held is not None


def test_cleanup_of_kube_proxy_goes_on_beside_a_daemon(shell: Shell, world: World) -> None:
    with listen(world.parts.socket_name):
        assert shell(world, "cleanup", "--kube-proxy").status == 0


def test_cleanup_of_kube_proxy_that_still_runs(shell: Shell, world: World) -> None:
    world.kube_proxy.raises = UserError("kube-proxy runs here (process 7): take it off this node first")
    assert "process 7" in refused(shell(world, "cleanup", "--kube-proxy"), 2)


# ---- status ----


def test_status_without_a_daemon(shell: Shell, world: World) -> None:
    assert "start it with `ebpflb run`" in refused(shell(world, "status"), 1)


# ---- Errors ----


@pytest.mark.parametrize(
    "words",
    [
        ("fly",),
        ("dump", "--fast"),
        ("trace", "10.0.0.1"),
        ("dump", "-o", "xml"),
        ("run", "-v", "much"),
        ("dump", "a", "b"),
    ],
)
def test_usage_errors_are_one_line_that_names_the_help(shell: Shell, world: World, words: tuple[str, ...]) -> None:
    assert "--help" in refused(shell(world, *words), 2)


def test_an_unexpected_error_is_one_line(shell: Shell) -> None:
    world = World(held=routes(*both()))
    world.dataplane.raises["state"] = KeyError("oops")
    assert "unexpected KeyError" in refused(shell(world, "dump"), 1)


def test_its_traceback_is_in_the_debug_log(shell: Shell) -> None:
    world = World(held=routes(*both()))
    world.dataplane.raises["state"] = KeyError("oops")
    assert "Traceback" in shell(world, "dump", "--log-level", "debug").err


def test_an_error_of_the_kernel_is_one_line(shell: Shell) -> None:
    world = World(held=routes(*both()))
    world.dataplane.raises["cleanup"] = ApplyError("links", "", 1, "links: operation not permitted;\n try as root")
    assert refused(shell(world, "cleanup"), 1) == "ebpflb: links: operation not permitted; try as root"


def test_no_words_at_all_are_help(shell: Shell, world: World) -> None:
    said = shell(world)
    assert said.status == 0
    assert [line for line in said.out.splitlines() if line.startswith("  run")]


@pytest.mark.parametrize("command", ["run", "dump", "plan", "verify", "trace", "check", "status", "cleanup", "demo"])
def test_each_command_has_help(shell: Shell, world: World, command: str) -> None:
    said = shell(world, command, "--help")
    assert said.status == 0
    assert f"Usage: ebpflb {command}" in said.out


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from ebpflb.cli import main; main(['--help']); "
        "print(sorted({'yaml', 'bcc', 'pyroute2', 'immutables', 'ebpflb.policy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_quiet() -> None:
    """`ebpflb dump | head -1`."""
    code = (
        "import sys; from ebpflb.cli import main; from tests.fakes import World, both, routes; "
        "held = routes(*(row for number in range(1, 3000) for row in both(port=number))); "
        "sys.exit(main(['dump', '-o', 'json'], World(held=held).parts))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_words_of_the_vocabulary() -> None:
    """What the tests above rely on."""
    assert row()[1].kind is Kind.CLUSTER_IP
    assert row(backends=())[1].verdict is Verdict.REJECT
