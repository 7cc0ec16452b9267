"""The image, built for real with no registry, and what it carries when its file system runs the pod.

Rules of this file: buildah's storage is a directory of this run. What debootstrap makes is kept in the user's cache, so
that only the first run takes a minute more. Both fetch packages, from Debian and from PyPI.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ebpflb import __version__
from tests.conftest import CHECKOUT
from tests.deploy.pod import Root
from tests.deploy.stage import Running

pytestmark = [pytest.mark.root, pytest.mark.box, pytest.mark.slow, pytest.mark.timeout(600)]

MEGABYTES = 600
BLOB_CACHE = Path("/var/lib/containers/cache")  # is there whatever storage.conf says


class Image(NamedTuple):
    """The unpacked file system, and the configuration by OCI's names."""

    directory: Path
    config: dict[str, Any]

    @property
    def variables(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.config["Env"])


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """What deploy/build-image makes of this checkout."""
    directory = tmp_path_factory.mktemp("image")
    places = f'graphroot = "{directory}/storage"\nrunroot = "{directory}/run"\n'
    (directory / "storage.conf").write_text(f'[storage]\ndriver = "vfs"\n{places}')
    environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf")}

    had_cache = BLOB_CACHE.exists()

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout.strip()

    try:
        run(CHECKOUT / "deploy/build-image", "--tag", "ebpflb:tested")
        container = run("buildah", "from", "--pull-never", "localhost/ebpflb:tested")
        inspected = json.loads(run("buildah", "inspect", "--type", "image", "localhost/ebpflb:tested"))
        yield Image(Path(run("buildah", "mount", container)), inspected["OCIv1"]["config"])
    finally:
        run("buildah", "rm", "--all")
        run("buildah", "rmi", "--all", "--force")
        if not had_cache:
            shutil.rmtree(BLOB_CACHE, ignore_errors=True)


@pytest.fixture
def root(image: Image) -> Root:
    """What containers run: the image."""
    return Root(image.directory, image.variables)


def test_its_file_system_carries_a_service(running: Running) -> None:
    running.prepare()
    daemon = running.serve()
    assert daemon.execute("readlink", "-f", "/proc/self/exe").stdout.startswith("/usr/bin/readlink")
    assert "/opt/ebpflb" in daemon.execute("sh", "-c", "command -v ebpflb").stdout
    assert running.stage.unanswered() == {}


def test_it_starts_what_the_daemon_set_starts(image: Image) -> None:
    assert image.config["Entrypoint"] == ["ebpflb"]
    assert image.config["Cmd"] == ["run", "--config=/var/lib/kube-proxy/config.conf"]


def test_it_says_what_it_is(image: Image) -> None:
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"
    assert (image.directory / "usr/share/doc/ebpflb/LICENSE").read_text() == (CHECKOUT / "LICENSE").read_text()
    assert (image.directory / "usr/share/doc/ebpflb/LICENSE.bpf").read_text() == (CHECKOUT / "bpf/LICENSE").read_text()
    for package in ("libbpfcc", "libllvm14", "libc6"):  # what else is in it has its licences too
        assert (image.directory / "usr/share/doc" / package / "copyright").exists(), package


def test_it_has_iptables_of_either_variant_for_nodes_without_bpf(image: Image) -> None:
    for family in ("iptables", "ip6tables"):
        for variant in ("nft", "legacy"):
            for tool in ("", "-save", "-restore"):
                assert (image.directory / f"usr/sbin/{family}-{variant}{tool}").exists(), (family, variant, tool)


def test_tables_of_consistent_hashing_are_filled_by_compiled_code(image: Image) -> None:
    package = "opt/ebpflb/lib/python3.*/site-packages/ebpflb/dataplane/bpf"
    assert len(list(image.directory.glob(f"{package}/_maglev*.so"))) == 1


def test_it_has_no_toolchain_and_nothing_of_its_making(image: Image) -> None:
    for name in ("gcc", "clang", "pip", "pip3", "make", "curl"):
        assert not any((image.directory / place / name).exists() for place in ("usr/bin", "opt/ebpflb/bin")), name
    assert not list(image.directory.glob("usr/src/*")) and not list(image.directory.glob("lib/modules/*"))
    assert not list(image.directory.glob("var/lib/apt/lists/*")) and not (image.directory / "src").exists()
    size = subprocess.run(["du", "-sm", image.directory], capture_output=True, text=True, check=True).stdout
    assert int(size.split()[0]) < MEGABYTES
