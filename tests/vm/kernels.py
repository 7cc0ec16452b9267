"""The kernels that the virtual machines boot: Debian's own packages, unpacked, from the mirror that this machine uses.

    python -m tests.vm.kernels 6.12         fetches it if it is not there yet, says where it is
    python -m tests.vm.kernels --all        every kernel of the matrix
    python -m tests.vm.kernels --newer …    also looks for a newer release of what is there

Rules of this file: apt runs with lists, caches and sources of its own, so that this machine's stay as they are, and
checks signatures as ever; nothing is installed. What was fetched is kept outside the checkout until --newer. Modules
that no test needs (other hardware's) are not kept, and the rest is stored plain: a guest that is emulated would take
seconds to decompress what this machine does in none. Nothing but Python's own library.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
META_PACKAGE = "linux-image-amd64"

# What takes space and is no part of any network of namespaces.
_UNWANTED = (
    *("sound", "drivers/gpu", "drivers/media", "drivers/usb", "drivers/infiniband", "drivers/scsi", "drivers/iio"),
    *("drivers/hwmon", "drivers/platform", "drivers/staging", "drivers/isdn", "drivers/video", "drivers/hid"),
    *("drivers/input", "drivers/mmc", "drivers/mtd", "drivers/nvme", "drivers/ata", "drivers/md", "drivers/target"),
    *("drivers/net/ethernet", "drivers/net/wireless", "drivers/net/usb", "drivers/net/can", "drivers/net/wwan"),
    *("drivers/net/phy", "drivers/net/fddi", "drivers/net/hamradio", "drivers/net/arcnet", "drivers/edac"),
    *("drivers/thunderbolt", "drivers/i2c", "drivers/power", "drivers/regulator", "drivers/mfd", "drivers/comedi"),
    *("drivers/accel", "drivers/w1", "drivers/ntb", "drivers/vdpa", "drivers/bluetooth", "drivers/firewire"),
    *("net/bluetooth", "net/mac80211", "net/wireless", "net/can", "net/sunrpc", "net/ceph", "net/rds", "net/tipc"),
    *("fs/xfs", "fs/btrfs", "fs/ext4", "fs/ocfs2", "fs/gfs2", "fs/nfs", "fs/nfsd", "fs/smb", "fs/cifs", "fs/f2fs"),
    *("fs/jfs", "fs/reiserfs", "fs/bcachefs", "fs/ntfs", "fs/ntfs3", "fs/ceph", "fs/afs", "fs/ubifs", "fs/jffs2"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a kernel of the matrix comes from: the newest that these suites of Debian have; `name` is its release
    (5.10), or a word that moves on (newest)."""

    name: str
    suites: tuple[str, ...]


MATRIX = (
    Source("5.10", ("bullseye", "bullseye-security")),
    Source("6.1", ("bookworm",)),
    Source("6.12", ("trixie",)),
    Source("newest", ("trixie-backports", "sid")),
)
DEFAULT = "6.12"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One that can be booted: the release as `uname -r` says it, the image, and the modules' directory."""

    name: str
    release: str
    image: Path
    modules: Path


class Missing(Exception):
    """A kernel is not there, or cannot be had; one line, with what to do."""


def cache() -> Path:
    """Where kernels are kept."""
    base = os.environ.get("EBPFLB_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ebpflb", "kernels")


def find(name: str) -> Kernel:
    """The kernel of that name, as fetched. Raises Missing if it is not there, or if the matrix has none such."""
    _source(name)
    (modules,) = [*(cache() / name).glob("usr/lib/modules/*/modules.dep"), None][:1]
    if modules is None:
        raise Missing(f"the kernel {name} has not been fetched yet; run: {sys.executable} -m tests.vm.kernels {name}")
    return Kernel(name, modules.parent.name, modules.with_name("vmlinuz"), modules.parent)


def fetch(name: str, *, newer: bool = False) -> Kernel:
    """As `find`, but fetches what is not there, or (`newer`) what has a newer release by now."""
    source = _source(name)
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(Missing):
            found = find(name)
            if not newer:
                return found
        with _apt(source.suites) as apt:
            packages = _packages(apt, source)
            made = cache() / name / "packages"
            if not made.exists() or made.read_text() != "\n".join(packages):
                print(f"vm: fetching the kernel {packages[0]}", file=sys.stderr)
                _unpack(apt, packages, cache() / name)
    return find(name)


def _source(name: str) -> Source:
    for source in MATRIX:
        if source.name == name:
            return source
    raise Missing(f"no kernel {name!r} in the matrix: {', '.join(source.name for source in MATRIX)}")


# ---- apt, beside the machine's own ----


@dataclass(frozen=True, slots=True)
class _Apt:
    options: tuple[str, ...]
    scratch: Path

    def __call__(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run([program, *self.options, *arguments], capture_output=True, text=True, cwd=cwd)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
            raise Missing(f"{program} {arguments[0]}: {said[0] if said else f'exit status {done.returncode}'}")
        return done.stdout


@contextlib.contextmanager
def _apt(suites: tuple[str, ...]) -> Iterator[_Apt]:
    with tempfile.TemporaryDirectory(prefix="apt-", dir=cache()) as directory:
        scratch = Path(directory)
        for each in ("lists/partial", "cache/archives/partial", "unpacked"):
            (scratch / each).mkdir(parents=True)
        lines = [
            f"deb [signed-by={KEYRING}] {mirror} {suite} main"
            for suite in suites
            for mirror in [_mirror("debian-security" if suite.endswith("-security") else "debian")]
        ]
        (scratch / "sources.list").write_text("\n".join(lines) + "\n")
        settings = {
            "Dir::Etc::sourcelist": scratch / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": scratch / "lists",
            "Dir::State::status": "/dev/null",  # nothing is installed as far as it knows
            "Dir::Cache": scratch / "cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",  # its own user may not write into these directories
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "APT::Update::Post-Invoke-Success::": "true",
        }
        apt = _Apt(tuple(f"-o{key}={value}" for key, value in settings.items()), scratch)
        apt("apt-get", "update")
        yield apt


def _mirror(archive: str) -> str:
    """The address of the archive ("debian" or "debian-security"), as this machine's own apt is told."""
    try:
        said = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"kernels come by apt, which cannot be asked: {error}") from None
    for address in sorted(set(said.split())):
        if address.rstrip("/").endswith(f"/{archive}"):
            return address
    raise Missing(f"apt has no mirror of {archive} in its sources, from which a kernel could come")


# ---- Packages ----


def _packages(apt: _Apt, source: Source) -> list[str]:
    """The packages that hold the kernel, its modules and its configuration (once one, in newer releases one each), as
    `name=version`, the one that gives the kernel its name first."""
    meta = _newest(apt, META_PACKAGE)
    (image,) = re.findall(r"\b(linux-image-[0-9]\S*-amd64)\b", meta["Depends"])
    version = meta["Version"]
    depends = _show(apt, f"{image}={version}").get("Depends", "")
    parts = re.findall(r"\b(linux-(?:base|binary|modules)-[0-9]\S*-amd64)\b", depends)
    return [f"{package}={version}" for package in (image, *parts)]


def _newest(apt: _Apt, package: str) -> dict[str, str]:
    """apt lists several versions newest first."""
    return _show(apt, package)


def _show(apt: _Apt, package: str) -> dict[str, str]:
    said = apt("apt-cache", "show", package).partition("\n\n")[0]
    return {key: value for key, _, value in (line.partition(": ") for line in said.splitlines())}


def _unpack(apt: _Apt, packages: list[str], target: Path) -> None:
    apt("apt-get", "download", *packages, cwd=apt.scratch)
    root = apt.scratch / "unpacked"
    for package in sorted(apt.scratch.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        package.unlink()
    if not (root / "usr/lib/modules").exists():  # before the merge of / and /usr
        (root / "usr/lib").mkdir(parents=True, exist_ok=True)
        (root / "lib/modules").rename(root / "usr/lib/modules")
    shutil.rmtree(root / "lib", ignore_errors=True)
    (root / "lib").symlink_to("usr/lib")
    (modules,) = (root / "usr/lib/modules").iterdir()
    for name in ("vmlinuz", "config"):
        if not (modules / name).exists():  # newer packages have them there
            (boot,) = root.glob(f"boot/{name}-*")
            shutil.copyfile(boot, modules / name)
    for path in (root / "boot", root / "usr/share", *(modules / "kernel" / each for each in _UNWANTED)):
        shutil.rmtree(path, ignore_errors=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(_plain, [*modules.rglob("*.ko.xz"), *modules.rglob("*.ko.zst")]))
    depmod = shutil.which("depmod", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if depmod is None:
        raise Missing("there is no depmod: install kmod")
    subprocess.run([depmod, "-b", str(root), modules.name], check=True, capture_output=True)
    (root / "packages").write_text("\n".join(packages))
    shutil.rmtree(target, ignore_errors=True)
    root.rename(target)


def _plain(module: Path) -> None:
    tool = "xz" if module.suffix == ".xz" else "zstd"
    subprocess.run([tool, "-dq", *(["--rm"] if tool == "zstd" else []), str(module)], check=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm.kernels")
    parser.add_argument("names", nargs="*", metavar="KERNEL", help=", ".join(source.name for source in MATRIX))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--newer", action="store_true")
    asked = parser.parse_args(arguments)
    names = [source.name for source in MATRIX] if asked.all else asked.names or [DEFAULT]
    try:
        for name in names:
            kernel = fetch(name, newer=asked.newer)
            print(f"{name}: {kernel.release} {kernel.modules}")
    except Missing as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
