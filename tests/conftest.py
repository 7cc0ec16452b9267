"""What all tests share: what each marker needs, what a failure leaves behind to read, and that nothing else is left.

Rules of this file: a test is skipped only because a probe here says what this environment lacks; the reason is one of
LIMITS, which .ci/run compares with what CI may lack. Nothing here depends on the package under test.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

# Before any module with properties is imported, by whomever: its decorators take the profile that is in force then.
from tests.property import conftest as _profiles  # noqa: F401

CHECKOUT = Path(__file__).resolve().parents[1]
ARTIFACTS = CHECKOUT / "artifacts"

# Markers whose tests touch the kernel.
KERNEL_MARKERS = ("root", "bpf_load", "box")

# systemd's units come and go by themselves, each with a cgroup and some with programs (sd_…).
_SYSTEMD_CGROUP = re.compile(r"\.(slice|service|scope|mount|socket)(/|$)")

# How long the kernel may take to free what was released (programs and maps go after a grace period).
LEAK_PATIENCE_SECONDS = 60.0


# ---- What the environment lacks ----


def cgroup2() -> Path | None:
    """The mounted cgroup v2 hierarchy; as the only one, or beside the old ones."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


def _no_root() -> bool:
    return os.geteuid() != 0


def _no_bcc() -> bool:
    return not any(Path(base, "bcc").is_dir() for base in ("/usr/lib/python3/dist-packages",))


def _no_cgroup2() -> bool:
    return cgroup2() is None


def _no_namespaces() -> bool:
    return not Path("/proc/self/ns/net").exists() or shutil.which("ip") is None


def _no_vagrant() -> bool:
    return shutil.which("vagrant") is None


# Marker, what is missing, how it is found out. The texts are the only reasons for a skip.
LIMITS: tuple[tuple[str, str, Callable[[], bool]], ...] = (
    ("root", "not root", _no_root),
    ("bpf_load", "not root", _no_root),
    ("box", "not root", _no_root),
    ("bpf_load", "no python3-bpfcc", _no_bcc),
    ("box", "no python3-bpfcc", _no_bcc),
    ("box", "no cgroup2 hierarchy is mounted", _no_cgroup2),
    ("box", "no network namespaces", _no_namespaces),
    ("vagrant", "no vagrant, as Debian 13 has none", _no_vagrant),
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, lacking, probe in LIMITS:
        if item.get_closest_marker(marker) and probe():
            pytest.skip(lacking)


def pytest_collection_finish() -> None:
    """What was collected is no garbage, and thousands of tests need not be looked at each time that some is looked for:
    that would be a sixth of a plain run."""
    gc.collect()
    gc.freeze()


# ---- What a failure leaves behind ----

Collect = Callable[[], "str | bytes"]
_COLLECTORS = pytest.StashKey[list[tuple[str, Collect]]]()


@pytest.fixture
def on_failure(request: pytest.FixtureRequest) -> Callable[[str, Collect], None]:
    """`on_failure(file_name, collect)`: should this test fail, artifacts/<test>/<file_name> gets what collect() says
    then, before any fixture is torn down."""
    collectors = request.node.stash.setdefault(_COLLECTORS, [])

    def register(name: str, collect: Collect) -> None:
        collectors.append((name, collect))

    return register


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and report.when == "call" and _COLLECTORS in item.stash:
        directory = ARTIFACTS / re.sub(r"[^\w.=-]+", "_", item.nodeid)
        directory.mkdir(parents=True, exist_ok=True)
        for name, collect in item.stash[_COLLECTORS]:
            try:
                said = collect()
            except Exception as error:  # the test's own failure is the news; this is a remark beside it
                said = f"could not be had: {error!r}\n"
            (directory / name).write_bytes(said if isinstance(said, bytes) else said.encode())
        report.sections.append(("artifacts", str(directory)))
    return report


# ---- That nothing is left behind ----


def _names(directory: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return {entry.name for entry in directory.iterdir()}
    return set()


def _bpftool(*arguments: str) -> list[dict[str, object]]:
    """What it lists. Where it comes upon something that another session is just making or removing, it says so in the
    midst of its list and leaves out the rest: then it is asked again."""
    for _ in range(20):
        done = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    answer = json.loads(done.stdout or "[]")
    return [each for each in answer if "error" not in each] if isinstance(answer, list) else []


def footprint() -> set[str]:
    """Everything on this machine that a test could have forgotten, one line each."""
    found = {f"network namespace {name}" for name in _names(Path("/run/netns"))}
    hierarchy = cgroup2()
    if hierarchy:
        groups = {path for path, _, _ in os.walk(hierarchy) if not _SYSTEMD_CGROUP.search(path)}
        found |= {f"cgroup {path}" for path in groups}
        for group in _bpftool("cgroup", "tree", str(hierarchy)):
            if group["cgroup"] in groups:
                found |= {f"attachment {group['cgroup']} program {each['id']}" for each in group["programs"]}  # type: ignore[attr-defined]
    found |= {f"pin {Path(where, name)}" for where, _, files in os.walk("/sys/fs/bpf") for name in files}
    found |= {
        f"program {each['id']} {each.get('name', '')}"
        for each in _bpftool("prog", "list")
        if not str(each.get("name", "")).startswith("sd_")
    }
    found |= {f"map {each['id']} {each.get('name', '')}" for each in _bpftool("map", "list")}
    found |= {f"link {name}" for name in _names(Path("/sys/class/net"))}
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the run if anything that the tests made in the kernel outlives them.

    Sessions share a lock on the machine. Only the last one to finish can tell what was forgotten from what another one
    still uses, so that the others do not look.
    """
    touches_kernel = any(item.get_closest_marker(marker) for item in request.session.items for marker in KERNEL_MARKERS)
    if not touches_kernel or os.geteuid() != 0 or not shutil.which("bpftool"):
        yield
        return
    with open("/run/ebpflb-tests.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        before = footprint()
        yield
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        deadline = time.monotonic() + LEAK_PATIENCE_SECONDS
        while left := footprint() - before:
            if time.monotonic() > deadline:
                pytest.fail("left behind by this run:\n  " + "\n  ".join(sorted(left)), pytrace=False)
            time.sleep(0.1)
