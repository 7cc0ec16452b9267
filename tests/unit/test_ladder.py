"""Which dataplane carries Services, which one is looked at, and what is said of those before it."""

from __future__ import annotations

import json

import pytest

from ebpflb.cli import main
from ebpflb.config import AUTO
from ebpflb.dataplane import Dataplane
from ebpflb.errors import ApplyError, Unsupported, UserError
from ebpflb.parts import NothingProgrammed, choose, holder
from ebpflb.routes import Backend, BackendState, RouteTable
from tests.fakes import FakeDataplane, World, both, routes


def ladder(*lacking: str) -> tuple[FakeDataplane, ...]:
    """bpf, ipvs and iptables; those named in `lacking` cannot be had."""
    made = tuple(FakeDataplane(name=name) for name in ("bpf", "ipvs", "iptables"))
    for dataplane in made:
        if dataplane.name in lacking:
            dataplane.raises["check"] = Unsupported(f"no {dataplane.name} here: get some")
    return made


# ---- Choice ----


@pytest.mark.parametrize(
    ("lacking", "chosen"), [((), "bpf"), (("bpf",), "ipvs"), (("bpf", "ipvs"), "iptables"), (("ipvs",), "bpf")]
)
def test_auto_takes_the_first_that_can(lacking: tuple[str, ...], chosen: str) -> None:
    found = choose(ladder(*lacking))
    assert found.dataplane.name == chosen
    names = ("bpf", "ipvs", "iptables")
    assert [name for name, _ in found.passed] == [each for each in names[: names.index(chosen)] if each in lacking]
    assert all(reason == f"no {name} here: get some" for name, reason in found.passed)


def test_nothing_at_all_is_told_with_every_reason() -> None:
    with pytest.raises(Unsupported) as caught:
        choose(ladder("bpf", "ipvs", "iptables"))
    assert str(caught.value) == (
        "nothing here can carry services: bpf: no bpf here: get some; ipvs: no ipvs here: get some; "
        "iptables: no iptables here: get some"
    )


@pytest.mark.parametrize("name", ["bpf", "ipvs", "iptables"])
def test_one_that_is_asked_for_by_name_never_falls_back(name: str) -> None:
    assert choose(ladder(), name).dataplane.name == name
    made = ladder(name)
    with pytest.raises(Unsupported, match=f"^dataplane {name} cannot carry services here: no {name} here: get some$"):
        choose(made, name)
    assert [each.name for each in made if each.calls] == [name]


def test_one_for_which_the_node_cannot_be_made_ready_is_passed() -> None:
    def prepare(dataplane: Dataplane) -> None:
        if dataplane.name == "bpf":
            raise Unsupported("the BPF file system cannot be mounted")

    assert choose(ladder(), AUTO, prepare).passed == (("bpf", "the BPF file system cannot be mounted"),)


def test_a_wrong_value_is_no_reason_to_take_another() -> None:
    made = ladder()
    made[0].raises["check"] = UserError("--cgroup /tmp is no cgroup2 directory")
    with pytest.raises(UserError):
        choose(made)


def test_what_is_out_of_question_is_not_asked_again() -> None:
    made = ladder()
    found = choose(made, AUTO, passed=(("bpf", "the kernel refuses the program connect4"),))
    assert found.dataplane.name == "ipvs"
    assert found.passed == (("bpf", "the kernel refuses the program connect4"),)
    assert made[0].calls == []


# ---- Who is looked at ----

DRAINING = (Backend("10.180.0.1", 8080, state=BackendState.DRAINING),)


def drained(table: RouteTable) -> RouteTable:
    """As IPVS holds it while it retires: every weight is 0."""
    return RouteTable({key: type(route)(route.service, route.kind, route.verdict, DRAINING)
                       for key, route in table.items()})  # fmt: skip


def held(**tables: RouteTable | None) -> tuple[FakeDataplane, ...]:
    return tuple(FakeDataplane(tables.get(name), name) for name in ("bpf", "ipvs", "iptables"))


SERVED = routes(*both())
LOOKED_AT: dict[str, tuple[dict[str, RouteTable | None], str]] = {
    "the only one": ({"iptables": SERVED}, "iptables"),
    "the successor has begun": ({"bpf": SERVED, "iptables": RouteTable()}, "bpf"),
    "bpf has left its frontends": ({"bpf": RouteTable(), "iptables": SERVED}, "iptables"),
    "ipvs has weights of 0 only": ({"ipvs": drained(SERVED), "iptables": SERVED}, "iptables"),
    "both are complete": ({"bpf": SERVED, "iptables": SERVED}, "bpf"),
    "nothing is served": ({"iptables": RouteTable()}, "iptables"),
}


@pytest.mark.parametrize("case", LOOKED_AT)
def test_who_carries_new_connections_is_looked_at(case: str) -> None:
    tables, name = LOOKED_AT[case]
    assert holder(held(**tables)).name == name


def test_one_that_is_asked_for_is_looked_at_even_if_another_carries() -> None:
    made = held(bpf=SERVED, iptables=RouteTable())
    assert holder(made, "iptables").name == "iptables"
    with pytest.raises(NothingProgrammed, match="ipvs has nothing programmed here"):
        holder(made, "ipvs")


def test_one_that_cannot_be_asked_is_in_the_way_of_nobody_else() -> None:
    made = held(iptables=SERVED)
    made[0].raises["inventory"] = ApplyError("links", "", 1, "links: Operation not permitted")
    assert holder(made).name == "iptables"
    made[0].raises["inventory"] = ApplyError("links", "", 1, "links: Operation not permitted")
    with pytest.raises(ApplyError):
        holder(made[:2])


def test_one_that_this_node_cannot_have_has_nothing_here(capsys: pytest.CaptureFixture[str]) -> None:
    """As on a node without iptables, whatever is asked."""
    world = World()
    missing = FakeDataplane(name="iptables")
    world.others = [missing]
    for words, status in ((["dump"], 4), (["cleanup", "--dry-run"], 0), (["cleanup"], 0)):
        missing.raises |= {"inventory": Unsupported("no iptables"), "cleanup": Unsupported("no iptables")}
        assert main(words, world.parts) == status
    assert "no iptables" not in capsys.readouterr().err


# ---- The daemon ----


@pytest.fixture
def world() -> World:
    world = World(want=routes(*both()))
    world.others = [FakeDataplane(name="ipvs"), FakeDataplane(name="iptables")]
    return world


def run_once(world: World, manifests: object, *words: str) -> int:
    return main(["run", "--once", "--manifests", str(manifests), *words], world.parts)


def test_the_daemon_says_loudly_whom_it_passed(
    world: World, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    world.dataplane.raises["check"] = Unsupported("no bcc")
    assert run_once(world, tmp_path) == 0
    said = capsys.readouterr().err
    assert "WARNING dataplane bpf cannot carry services here: no bcc" in said
    assert "dataplane ipvs, source" in said
    assert world.others[0].held == world.desired.want
    assert world.others[1].held is world.dataplane.held is None


def test_the_daemon_ends_where_the_one_by_name_cannot_be_had(
    world: World, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    world.others[0].raises["check"] = Unsupported("the module ip_vs cannot be loaded")
    assert run_once(world, tmp_path, "--dataplane", "ipvs") == 3
    assert "dataplane ipvs cannot carry services here: the module ip_vs cannot be loaded" in capsys.readouterr().err
    assert all(each.held is None for each in (world.dataplane, *world.others))


def test_a_start_that_shows_what_the_check_could_not_see_moves_on(
    world: World, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    world.dataplane.raises["start"] = Unsupported("the kernel refuses the program connect4: Invalid argument")
    assert run_once(world, tmp_path) == 0
    said = capsys.readouterr().err
    assert "WARNING dataplane bpf cannot carry services here: the kernel refuses the program connect4" in said
    assert world.others[0].held == world.desired.want


def test_a_start_that_fails_for_the_one_by_name_ends(
    world: World, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    world.dataplane.raises["start"] = Unsupported("the kernel refuses the program connect4: Invalid argument")
    assert run_once(world, tmp_path, "--dataplane", "bpf") == 3
    assert "the kernel refuses the program connect4" in capsys.readouterr().err.splitlines()[-1]
    assert world.others[0].held is None


def test_the_node_is_made_ready_for_whoever_may_be_chosen(
    world: World, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    world.unprepared["bpf"] = Unsupported("the BPF file system cannot be mounted")
    assert main(["run", "--init-only", "--manifests", str(tmp_path)], world.parts) == 0
    assert "dataplane ipvs can carry services here" in capsys.readouterr().err
    assert run_once(world, tmp_path) == 0
    assert world.others[0].held == world.desired.want


def test_a_plan_is_the_chosen_dataplanes(world: World, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Who is about to change it sees what the change will write."""
    world.dataplane.held = world.desired.want
    words = ["plan", "--manifests", str(tmp_path), "-o", "json"]
    assert main(words, world.parts) == 0
    capsys.readouterr()
    assert main([*words, "--dataplane", "iptables"], world.parts) == 5
    assert [item["change"] for item in json.loads(capsys.readouterr().out)["items"]] == ["add", "add"]
