"""A directory of manifests, followed through everything that people, editors and kubectl do to files.

Rules of this file: real files and real inotify, in a directory of the test's own. Nothing sleeps: `follow` waits for
the source's descriptor, with a deadline, until the cluster that its events describe is the expected one. That nothing
is said is shown by something else that is said after it, or by watching for longer than it would take.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpflb.errors import SourceError, UserError
from ebpflb.model import ServiceName
from ebpflb.source import DropNode, DropSlice, Event, PutNode, PutService, PutSlice, Synced
from ebpflb.source.manifests import ManifestSource
from ebpflb.source.store import Store
from tests.json_objects import service_object, slice_object

DEADLINE = 20.0
GRACE = 0.02


def manifest(name: str = "web", ip: str = "172.30.0.41") -> str:
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )


def node_manifest(name: str, zone: str = "a") -> str:
    labels = f"topology.kubernetes.io/zone: {zone}"
    return f"apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n"


# For what must not be taken for gone, however slow the machine is.
LONG_GRACE = 60.0


class Follower:
    """A source, a store, and what was read; `steps` holds the services after each `read` that said something."""

    def __init__(self, directory: Path, grace: float = GRACE) -> None:
        self.source = ManifestSource(str(directory), grace=grace)
        self.store = Store("node1", [self.source.name])
        self.heard: list[Event] = []
        self.complaints: set[str] = set()
        self.steps: list[dict[str, str]] = []
        self.read()

    def read(self) -> list[Event]:
        events = list(self.source.read())
        for event in events:
            self.store.apply(event)
        self.heard += events
        self.complaints.update(self.problems())
        if events:
            self.steps.append(self.services())
        return events

    def services(self) -> dict[str, str]:
        """name -> cluster IP"""
        return {name.name: each.cluster_ips[0] for name, each in self.store.snapshot().services.items()}

    def problems(self) -> list[str]:
        return [f"{problem.subject}: {problem.reason}" for problem in self.source.problems()]

    def wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not reached():
            left = deadline - time.monotonic()
            if left <= 0:
                pytest.fail(f"last seen: {self.services()}, {self.problems()}, {self.steps}")
            if select.select([self.source], [], [], left)[0]:
                self.read()

    def watch(self, seconds: float) -> None:
        """Read whatever there is for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.source], [], [], left)[0]:
                self.read()

    def follow(self, **services: str) -> None:
        """Until exactly these services are there."""
        self.wait(lambda: self.services() == services)

    def say(self, problem: str) -> None:
        """Until a problem begins like this."""
        self.wait(lambda: any(each.startswith(problem) for each in self.problems()))

    def mend(self) -> None:
        """Until there are no problems."""
        self.wait(lambda: not self.problems())


Start = Callable[..., Follower]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "manifests"
    made.mkdir()
    return made


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    started: list[Follower] = []

    def make(grace: float = GRACE) -> Follower:
        started.append(Follower(directory, grace))
        return started[-1]

    yield make
    for each in started:
        each.source.close()


A, B = "172.30.0.41", "172.30.0.42"


# ---- The first list ----


def test_everything_there_and_then_synced(directory: Path, start: Start) -> None:
    (directory / "sub" / "deep").mkdir(parents=True)
    (directory / "a.yaml").write_text(manifest("a", A))
    (directory / "sub" / "b.yml").write_text(manifest("b", B))
    (directory / "sub" / "deep" / "c.json").write_text(json.dumps(service_object(meta={"name": "c"})))
    source = ManifestSource(str(directory))
    events = list(source.read())
    source.close()
    assert [each.service.name.name for each in events if isinstance(each, PutService)] == ["a", "b", "c"]
    assert events[-1] == Synced("manifests")
    assert len(events) == 4


def test_an_empty_directory_is_complete(start: Start) -> None:
    follower = start()
    assert follower.store.synced
    assert list(follower.source.read()) == []


def test_a_broken_file_does_not_hold_up_the_rest(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text("a: b: c\n")
    (directory / "b.yaml").write_text(manifest("b", B))
    follower = start()
    assert follower.store.synced
    assert follower.services() == {"b": B}
    assert follower.problems() == ["a.yaml: line 1, column 5: not YAML: mapping values are not allowed in this context"]


def test_a_file_that_is_being_written_belongs_to_the_first_list(directory: Path, start: Start) -> None:
    (directory / "b.yaml").write_text(manifest("b", B))
    with open(directory / "a.yaml", "w") as file:
        file.write(manifest("a", A))
        file.flush()
        os.utime(directory / "a.yaml", (2**32, 2**32))  # just written, however slow the machine is
        follower = start()
        assert follower.services() == {"b": B}
        assert not follower.store.synced
        file.write(f"---\n{manifest('c', A)}")
    follower.wait(lambda: follower.store.synced)
    assert follower.services() == {"a": A, "b": B, "c": A}
    assert [step for step in follower.steps if "a" in step] == [follower.services()]


def test_a_file_that_is_kept_open_is_read_in_the_end(directory: Path, start: Start) -> None:
    with open(directory / "a.yaml", "w") as file:
        file.write(manifest("a", A))
        file.flush()
        os.utime(directory / "a.yaml", (0, 0))
        assert start().services() == {"a": A}


UNREAD = [
    ".web.yaml",
    "web.yaml~",
    ".web.yaml.swp",
    "web.yaml.bak",
    "web.txt",
    "web",
    "#web.yaml#",
    "4913",
    ".#web.yaml",
]


@pytest.mark.parametrize("name", UNREAD)
def test_files_that_are_not_read(name: str, directory: Path, start: Start) -> None:
    (directory / name).write_text(manifest("before"))
    follower = start()
    (directory / name).write_text(manifest("after"))
    (directory / "b.yaml").write_text(manifest("b", B))
    follower.follow(b=B)
    assert follower.steps == [{}, {"b": B}]


def test_hidden_directories_are_not_read(directory: Path, start: Start) -> None:
    (directory / ".git").mkdir()
    (directory / ".git" / "a.yaml").write_text(manifest())
    assert start().services() == {}


def test_a_pipe_of_that_name_is_not_read(directory: Path, start: Start) -> None:
    os.mkfifo(directory / "a.yaml")
    assert start().services() == {}


# ---- What cannot be a source ----


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none does not exist: create the directory, or name another one"):
        ManifestSource(str(tmp_path / "none"))


def test_a_file_instead(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(manifest())
    with pytest.raises(UserError, match=r"web.yaml is not a directory"):
        ManifestSource(str(tmp_path / "web.yaml"))


def test_gone_before_the_first_read(directory: Path) -> None:
    """Nothing may be taken for an empty cluster."""
    source = ManifestSource(str(directory))
    directory.rmdir()
    with pytest.raises(SourceError, match="the directory is gone"):
        source.read()
    directory.mkdir()
    (directory / "a.yaml").write_text(manifest())
    assert select.select([source], [], [], DEADLINE)[0]
    assert [type(each) for each in source.read()] == [PutService, Synced]
    source.close()


# ---- How files change ----


def test_written_in_place(directory: Path, start: Start) -> None:
    path = directory / "a.yaml"
    path.write_text(manifest(ip=A))
    follower = start()
    path.write_text(manifest(ip=B))
    follower.follow(web=B)
    assert follower.steps == [{"web": A}, {"web": B}]


def test_written_in_pieces(directory: Path, start: Start) -> None:
    """Each prefix that ends with a document is good YAML: none of them may be taken for the file."""
    path = directory / "a.yaml"
    path.write_text(manifest("old", A))
    follower = start()
    other = directory / "other.yaml"
    with open(path, "w") as file:
        for number in range(3):
            file.write(f"---\n{manifest(f'new-{number}', f'172.30.1.{number}')}")
            file.flush()
            # Something else that is said, so that the source has certainly been asked.
            other.write_text(manifest("other", f"172.30.2.{number}"))
            follower.follow(old=A, other=f"172.30.2.{number}")
    expected = {f"new-{number}": f"172.30.1.{number}" for number in range(3)}
    follower.wait(lambda: follower.services() == {**expected, "other": "172.30.2.2"})
    assert [step for step in follower.steps if "new-0" in step] == [follower.services()]


def test_a_new_file_in_pieces(directory: Path, start: Start) -> None:
    follower = start()
    with open(directory / "a.yaml", "w") as file:
        file.write(manifest("a", A))
        file.flush()
        (directory / "other.yaml").write_text(manifest("other", B))
        follower.follow(other=B)
        file.write(f"---\n{manifest('b', B)}")
    follower.follow(a=A, b=B, other=B)
    assert follower.steps == [{}, {"other": B}, {"a": A, "b": B, "other": B}]


def test_written_again_while_it_is_read(directory: Path, start: Start) -> None:
    """No step shows a mixture, or a part, of what somebody writes all the time."""
    path, names, last = directory / "a.yaml", [f"s{number}" for number in range(40)], "172.30.9.255"

    def write(ip: str) -> None:
        with open(path, "w") as file:
            for name in names:
                file.write(f"---\n{manifest(name, ip)}")
                file.flush()

    write(A)
    follower = start()
    writer = threading.Thread(target=lambda: list(map(write, (f"172.30.9.{number}" for number in range(256)))))
    writer.start()
    follower.wait(lambda: follower.services() == dict.fromkeys(names, last))
    writer.join()
    assert follower.complaints == set()
    for step in follower.steps:
        assert sorted(step) == sorted(names)
        assert len(set(step.values())) == 1


def test_replaced_by_rename(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest(ip=A))
    follower = start()
    (directory / ".a.yaml.tmp").write_text(manifest(ip=B))
    (directory / ".a.yaml.tmp").rename(directory / "a.yaml")
    follower.follow(web=B)
    assert follower.steps == [{"web": A}, {"web": B}]


def test_replaced_from_elsewhere(tmp_path: Path, directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest(ip=A))
    follower = start()
    (tmp_path / "new.yaml").write_text(manifest(ip=B))
    (tmp_path / "new.yaml").rename(directory / "a.yaml")
    follower.follow(web=B)


def test_saved_by_vim(directory: Path, start: Start) -> None:
    """The old file is moved away, the new one written, the old one deleted; read at every step."""
    path, backup = directory / "a.yaml", directory / "a.yaml~"
    path.write_text(manifest(ip=A))
    follower = start(LONG_GRACE)
    (directory / "4913").write_text("")
    (directory / "4913").unlink()
    path.rename(backup)
    follower.read()
    with open(path, "w") as file:
        follower.read()
        file.write(manifest(ip=B))
    follower.follow(web=B)
    backup.unlink()
    (directory / "b.yaml").write_text(manifest("b", B))
    follower.follow(web=B, b=B)
    assert follower.steps == [{"web": A}, {"web": B}, {"web": B, "b": B}]


def test_deleted_and_made_again(directory: Path, start: Start) -> None:
    """As git does."""
    path = directory / "a.yaml"
    path.write_text(manifest(ip=A))
    follower = start(LONG_GRACE)
    path.unlink()
    follower.read()
    path.write_text(manifest(ip=B))
    follower.follow(web=B)
    assert follower.steps == [{"web": A}, {"web": B}]


def test_moved_away_and_back(directory: Path, start: Start) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "a.yaml").write_text(manifest(ip=A))
    follower = start(LONG_GRACE)
    (directory / "sub").rename(directory / "bus")
    (directory / "bus").rename(directory / "sub")
    (directory / "b.yaml").write_text(manifest("b", B))
    follower.follow(web=A, b=B)
    (directory / "sub" / "a.yaml").write_text(manifest(ip=B))
    follower.follow(web=B, b=B)
    assert all("web" in step for step in follower.steps)


def test_removed(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest("a", A))
    (directory / "b.yaml").write_text(manifest("b", B))
    follower = start()
    (directory / "a.yaml").unlink()
    follower.follow(b=B)


def test_renamed(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest("a", A))
    follower = start()
    (directory / "a.yaml").rename(directory / "b.yaml")
    (directory / "b.yaml").write_text(manifest("a", B))
    follower.follow(a=B)
    assert follower.steps == [{"a": A}, {"a": B}]
    assert follower.complaints == set()


def test_renamed_to_what_is_not_read(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest("a", A))
    follower = start()
    (directory / "a.yaml").rename(directory / "a.yaml.off")
    follower.follow()


def test_emptied(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest("a", A))
    follower = start()
    (directory / "a.yaml").write_text("")
    follower.follow()


def test_linked_into_place(tmp_path: Path, directory: Path, start: Start) -> None:
    """link(2) makes no other event than the creation."""
    (tmp_path / "a.yaml").write_text(manifest("a", A))
    follower = start()
    os.link(tmp_path / "a.yaml", directory / "a.yaml")
    follower.follow(a=A)


def test_written_again_with_the_same_content(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest("a", A))
    follower = start()
    (directory / "a.yaml").write_text(manifest("a", A))
    (directory / "b.yaml").write_text(manifest("b", B))
    follower.follow(a=A, b=B)
    assert follower.steps == [{"a": A}, {"a": A, "b": B}]


def test_many_files_at_once(directory: Path, start: Start) -> None:
    follower = start()
    expected = {f"s{number}": f"172.30.3.{number}" for number in range(200)}
    for name, ip in expected.items():
        (directory / f"{name}.yaml").write_text(manifest(name, ip))
    follower.wait(lambda: follower.services() == expected)


# ---- Directories ----


def test_a_new_directory(directory: Path, start: Start) -> None:
    follower = start()
    (directory / "sub" / "deep").mkdir(parents=True)
    (directory / "sub" / "deep" / "a.yaml").write_text(manifest(ip=A))
    follower.follow(web=A)
    (directory / "sub" / "deep" / "a.yaml").write_text(manifest(ip=B))
    follower.follow(web=B)


def test_a_directory_moved_in_and_out(tmp_path: Path, directory: Path, start: Start) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text(manifest(ip=A))
    follower = start()
    (tmp_path / "sub").rename(directory / "sub")
    follower.follow(web=A)
    (directory / "sub").rename(tmp_path / "sub")
    follower.follow()
    (tmp_path / "sub" / "a.yaml").write_text(manifest(ip=B))
    (directory / "b.yaml").write_text(manifest("b", B))
    follower.follow(b=B)


def test_a_directory_removed(directory: Path, start: Start) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "a.yaml").write_text(manifest(ip=A))
    follower = start()
    shutil.rmtree(directory / "sub")
    follower.follow()


def test_the_directory_itself_goes_and_returns(tmp_path: Path, directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest(ip=A))
    follower = start(LONG_GRACE)
    directory.rename(tmp_path / "away")
    follower.say(f"{directory}: the directory is gone; what it said before stays in force")
    (tmp_path / "away" / "a.yaml").unlink()
    assert follower.read() == []
    directory.mkdir()
    (directory / "a.yaml").write_text(manifest(ip=B))
    follower.follow(web=B)
    follower.mend()
    assert all("web" in step for step in follower.steps)


def test_the_directory_itself_is_deleted(directory: Path, start: Start) -> None:
    """The files go first, and yet what they said stays."""
    (directory / "a.yaml").write_text(manifest("a", A))
    follower = start()
    shutil.rmtree(directory)
    follower.say(f"{directory}: the directory is gone")
    follower.watch(2 * GRACE)
    assert follower.services() == {"a": A}
    directory.mkdir()
    (directory / "b.yaml").write_text(manifest("b", B))
    follower.follow(b=B)
    assert follower.problems() == []


def test_the_directory_goes_and_returns_with_its_parent(tmp_path: Path) -> None:
    """No event tells of that."""
    directory = tmp_path / "parent" / "manifests"
    directory.mkdir(parents=True)
    (directory / "a.yaml").write_text(manifest(ip=A))
    follower = Follower(directory)
    shutil.rmtree(tmp_path / "parent")
    follower.say(f"{directory}: the directory is gone")
    follower.watch(2 * GRACE)
    directory.mkdir(parents=True)
    (directory / "a.yaml").write_text(manifest(ip=B))
    follower.follow(web=B)
    follower.source.close()


def test_links_in_a_circle(directory: Path, start: Start) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "up").symlink_to(directory)
    (directory / "sub" / "a.yaml").write_text(manifest(ip=A))
    follower = start()
    assert follower.services() == {"web": A}
    assert follower.problems() == []


# ---- Links ----


def config_map(directory: Path, version: str, files: dict[str, str]) -> None:
    """Write a ConfigMap volume as the kubelet does, or switch it to another version."""
    hidden = directory / f"..{version}"
    for name, text in files.items():
        path = hidden / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    old = os.readlink(directory / "..data") if (directory / "..data").is_symlink() else None
    (directory / "..data_tmp").symlink_to(hidden.name)
    (directory / "..data_tmp").rename(directory / "..data")
    top = {Path(name).parts[0] for name in files}
    for name in top:
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(Path("..data") / name)
    for entry in directory.iterdir():
        if entry.is_symlink() and not entry.name.startswith("..") and entry.name not in top:
            entry.unlink()
    if old:
        shutil.rmtree(directory / old)


def test_a_config_map_is_switched_in_one_step(directory: Path, start: Start) -> None:
    config_map(directory, "v1", {"a.yaml": manifest("a", A), "b.yaml": manifest("b", A)})
    follower = start()
    assert follower.services() == {"a": A, "b": A}
    for version, ip in (("v2", B), ("v3", A)):
        config_map(directory, version, {"a.yaml": manifest("a", ip), "b.yaml": manifest("b", ip)})
        follower.follow(a=ip, b=ip)
    assert follower.steps == [{"a": A, "b": A}, {"a": B, "b": B}, {"a": A, "b": A}]
    assert follower.problems() == []


def test_a_config_map_gets_and_loses_keys(directory: Path, start: Start) -> None:
    config_map(directory, "v1", {"a.yaml": manifest("a", A)})
    follower = start()
    config_map(directory, "v2", {"b.yaml": manifest("b", B)})
    follower.follow(b=B)


def test_a_volume_with_paths(directory: Path, start: Start) -> None:
    """The link that is seen is one to a directory."""
    config_map(directory, "v1", {"sub/a.yaml": manifest("a", A)})
    follower = start()
    assert follower.services() == {"a": A}
    config_map(directory, "v2", {"sub/a.yaml": manifest("a", B)})
    follower.follow(a=B)
    config_map(directory, "v3", {"sub/a.yaml": manifest("a", A)})
    follower.follow(a=A)


def test_a_link_to_a_file_elsewhere(tmp_path: Path, directory: Path, start: Start) -> None:
    target = tmp_path / "target"
    target.write_text(manifest(ip=A))
    follower = start()
    (directory / "a.yaml").symlink_to(target)
    follower.follow(web=A)
    target.write_text(manifest(ip=B))
    follower.follow(web=B)
    (tmp_path / "new").write_text(manifest(ip=A))
    (tmp_path / "new").rename(target)
    follower.follow(web=A)
    target.write_text(manifest(ip=B))
    follower.follow(web=B)
    (directory / "a.yaml").unlink()
    follower.follow()


def test_the_directory_is_a_link_that_is_switched(tmp_path: Path) -> None:
    for version, ip in (("v1", A), ("v2", B)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.yaml").write_text(manifest(ip=ip))
    (tmp_path / "current").symlink_to("v1")
    follower = Follower(tmp_path / "current")
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "current")
    follower.follow(web=B)
    (tmp_path / "v2" / "a.yaml").write_text(manifest(ip=A))
    follower.follow(web=A)
    follower.source.close()


# ---- What is wrong with files ----


def test_broken_then_mended(directory: Path, start: Start) -> None:
    path = directory / "a.yaml"
    path.write_text(manifest(ip=A))
    follower = start()
    path.write_text("spec: {\n")
    follower.say("a.yaml: line 2, column 1: not YAML: ")
    assert follower.problems()[0].endswith("; what it said before stays in force")
    assert follower.services() == {"web": A}
    path.write_text(manifest(ip=B))
    follower.follow(web=B)
    assert follower.problems() == []


def test_broken_then_removed(directory: Path, start: Start) -> None:
    path = directory / "a.yaml"
    path.write_text(manifest(ip=A))
    follower = start()
    path.write_text("spec: {\n")
    follower.say("a.yaml")
    path.unlink()
    follower.follow()
    assert follower.problems() == []


def test_a_refused_object_stays_what_it_was(directory: Path, start: Start) -> None:
    """As it would on an API server; the rest of the file applies."""
    path = directory / "a.yaml"
    path.write_text(f"{manifest('a', A)}---\n{manifest('b', A)}")
    follower = start()
    path.write_text(f"{manifest('a', B).replace('port:', 'prot:')}---\n{manifest('b', B)}")
    follower.follow(a=A, b=B)
    assert follower.problems() == [
        'a.yaml document 1: Service default/a: unknown field "spec.ports[0].prot", did you mean "port"?'
        "; what it said before stays in force"
    ]
    path.write_text(manifest("b", B))
    follower.follow(b=B)
    assert follower.problems() == []


def test_one_line_for_each_problem(directory: Path, start: Start) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "x.yaml").write_text(
        f"{manifest()}---\napiVersion: v1\nkind: ConfigMap\n---\n{manifest('bad', '10.0.0')}"
    )
    follower = start()
    assert follower.services() == {"web": A}
    assert follower.problems() == [
        'sub/x.yaml document 2: no matches for kind "ConfigMap" in version "v1": it is not one that is read here',
        'sub/x.yaml document 3: Service default/bad: spec.clusterIPs[0]: Invalid value: "10.0.0": '
        "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
    ]


def test_any_name_and_any_text_fit_on_one_line(directory: Path, start: Start) -> None:
    with open(os.fsencode(directory) + b"/a\n\xff.yaml", "w") as file:
        file.write(manifest().replace("spec:", '"spec\\n\\e": 1\nspec:'))
    (problem,) = start().problems()
    assert (
        problem
        == 'a\ufffd\ufffd.yaml document 1: Service default/web: unknown field "spec\ufffd\ufffd", did you mean "spec"?'
    )


def test_one_object_in_two_files(directory: Path, start: Start) -> None:
    (directory / "b.yaml").write_text(manifest(ip=B))
    follower = start()
    (directory / "a.yaml").write_text(f"{manifest('other')}---\n{manifest(ip=A)}")
    follower.follow(web=A, other=A)
    assert follower.problems() == [
        "b.yaml document 1: Service default/web is also in a.yaml document 2, which counts: remove one of them"
    ]
    (directory / "a.yaml").write_text(manifest("other"))
    follower.follow(web=B, other=A)
    assert follower.problems() == []


def test_which_file_counts_does_not_depend_on_the_order(directory: Path, start: Start) -> None:
    (directory / "a.yaml").write_text(manifest(ip=A))
    follower = start()
    (directory / "b.yaml").write_text(manifest(ip=B))
    follower.say("b.yaml document 1")
    assert follower.services() == {"web": A}
    (directory / "a.yaml").unlink()
    follower.follow(web=B)
    follower.mend()


def allow(path: Path, mode: int) -> None:
    """chmod, as root if this is root's file."""
    nobody = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(mode)
    os.seteuid(nobody)


class TestUnreadable:
    """Root reads everything: these are run as nobody. Their directory does not lie among those of other tests, for
    whenever another pytest begins, it closes the place of all of those to others."""

    @pytest.fixture
    def directory(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as place:
            Path(place).chmod(0o755)
            made = Path(place, "manifests")
            made.mkdir()
            yield made

    @pytest.fixture(autouse=True)
    def powerless(self, directory: Path) -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        yield
        os.seteuid(0)

    def test_an_unreadable_file(self, directory: Path, start: Start) -> None:
        path = directory / "a.yaml"
        allow(directory, 0o777)
        path.write_text(manifest(ip=A))
        follower = start()
        path.write_text(manifest(ip=B))
        path.chmod(0)
        follower.say("a.yaml: cannot be read: Permission denied; what it said before stays in force")
        assert follower.services() == {"web": A}
        path.chmod(0o600)
        follower.follow(web=B)
        assert follower.problems() == []

    def test_an_unreadable_directory_below(self, directory: Path, start: Start) -> None:
        allow(directory, 0o777)
        (directory / "sub").mkdir()
        (directory / "sub" / "a.yaml").write_text(manifest(ip=A))
        follower = start(0)
        (directory / "sub").chmod(0)
        (directory / "new").mkdir()
        follower.say("sub: cannot be read: Permission denied")
        (directory / "new" / "b.yaml").write_text(manifest("b", B))
        follower.follow(web=A, b=B)
        (directory / "sub").chmod(0o700)
        follower.mend()

    def test_an_unreadable_directory(self, directory: Path) -> None:
        allow(directory, 0)
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            ManifestSource(str(directory))
        allow(directory, 0o700)


def test_a_link_to_nowhere_is_no_file(directory: Path, start: Start) -> None:
    path = directory / "a.yaml"
    path.write_text(manifest(ip=A))
    follower = start()
    (directory / "loop").symlink_to("loop")
    (directory / "loop").rename(path)
    follower.follow()
    path.unlink()
    path.write_text(manifest(ip=B))
    follower.follow(web=B)


# ---- Objects ----


def test_what_becomes_foreign_is_dropped(directory: Path, start: Start) -> None:
    path = directory / "a.yaml"
    path.write_text(manifest())
    follower = start()
    path.write_text(manifest(ip="None"))
    follower.follow()
    assert follower.problems() == []


def test_slices_and_services_come_together(directory: Path, start: Start) -> None:
    follower = start()
    slice_ = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **slice_object()}
    (directory / "a.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": [service_object(), slice_]})
    )
    follower.follow(web=A)
    assert set(follower.store.snapshot().slices) == {ServiceName("shop", "web")}
    (directory / "a.json").write_text(json.dumps(service_object()))
    follower.wait(lambda: not follower.store.snapshot().slices)


def test_events_of_slices(directory: Path, start: Start) -> None:
    path = directory / "a.json"
    slice_ = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **slice_object()}
    path.write_text(json.dumps(slice_))
    source = ManifestSource(str(directory), grace=0)
    (put, synced) = source.read()
    assert isinstance(put, PutSlice) and synced == Synced("manifests")
    path.unlink()
    events: list[Event] = []
    while not events and select.select([source], [], [], DEADLINE)[0]:
        events = list(source.read())
    source.close()
    assert events == [DropSlice(ServiceName("shop", "web-abc"))]


def test_nodes(directory: Path, start: Start) -> None:
    """DropNode names none: this node stays when another one goes."""
    (directory / "1.yaml").write_text(node_manifest("node1"))
    (directory / "2.yaml").write_text(node_manifest("node2", "b"))
    follower = start()
    assert follower.store.snapshot().node.zone == "a"
    (directory / "2.yaml").unlink()
    follower.wait(lambda: DropNode() in follower.heard)
    assert follower.store.snapshot().node.zone == "a"
    (directory / "1.yaml").write_text(node_manifest("node1", "c"))
    follower.wait(lambda: follower.store.snapshot().node.zone == "c")
    (directory / "1.yaml").unlink()
    follower.wait(lambda: not follower.store.snapshot().node.known)


def test_a_node_that_goes_is_followed_by_those_that_stay(directory: Path) -> None:
    (directory / "a.yaml").write_text(f"{node_manifest('node1')}---\n{node_manifest('node2')}")
    source = ManifestSource(str(directory))
    source.read()
    (directory / "a.yaml").write_text(node_manifest("node1"))
    assert select.select([source], [], [], DEADLINE)[0]
    assert [type(each) for each in source.read()] == [DropNode, PutNode]
    source.close()
