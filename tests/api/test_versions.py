"""The same lists and watches with API servers of several minor versions.

Rules of this file: it runs with the newest one always, and with all that tests/api/binaries.py names where
EBPFLB_API_VERSIONS is "all" (`make test-api-versions`), since each takes minutes to build. No controllers run here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from ebpflb.source import SourceState
from tests.api.accounts import deploy
from tests.api.binaries import CURRENT, ETCD, OLDER, Build, Missing, find
from tests.api.chaos import ChaosProxy
from tests.api.conftest import loopback_listener
from tests.api.control_plane import ControlPlane
from tests.api.follower import QUICK, Follower, access
from tests.api.objects import endpoint_slice, node, put_node, service

pytestmark = pytest.mark.api

VERSIONS = (CURRENT, *(OLDER if os.environ.get("EBPFLB_API_VERSIONS") == "all" else ()))
OnFailure = Callable[[str, Callable[[], "str | bytes"]], None]


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda build: build.name)
def standing(request: pytest.FixtureRequest) -> Iterator[tuple[Build, ControlPlane]]:
    try:
        programs = {**find(ETCD), "kube-apiserver": find(request.param)["kube-apiserver"]}
    except Missing as error:
        pytest.fail(f"{error} --all", pytrace=False)
    with ControlPlane(programs) as found:
        yield request.param, found


@pytest.fixture
def version(standing: tuple[Build, ControlPlane], on_failure: OnFailure) -> ControlPlane:
    """The control plane of one version, of which nothing but the version is shared."""
    build, cluster = standing
    said = cluster.api.ask("GET", "/version")
    assert said["gitVersion"] == build.version
    on_failure("kube-apiserver.log", cluster.apiserver.tail)
    return cluster


def test_lists_watches_and_every_interruption(version: ControlPlane) -> None:
    api, account = version.api, deploy(version.api)
    put_node(api, node("node-1", "192.168.0.77", zone="a"))
    for number in range(30):
        api.create(service("default", f"s{number}"))
        api.create(endpoint_slice("default", f"s{number}-a", f"s{number}", [f"10.1.0.{number + 1}"]))
    api.create(service("default", "headless", clusterIP="None"))
    api.create(service("default", "elsewhere", type="ExternalName", externalName="example.com"))
    timing = replace(QUICK, page=10, watch_least=2.0, watch_most=4.0)
    with (
        ChaosProxy(loopback_listener(), version.identity, version.port) as proxy,
        Follower(access(version, account, proxy.port), node="node-1", timing=timing) as following,
    ):
        following.sync()
        assert following.snapshot.node.zone == "a"
        following.agrees(api)
        lists = following.client.lists("services")

        proxy.cut()
        api.delete("Service", "default", "s0")
        api.create(service("default", "headless-2", clusterIP="None"))
        following.until("gone", lambda: not following.has("default", "s0"))
        following.until("watches that ended", lambda: following.client.watches("services") >= 4)
        following.agrees(api)
        assert following.client.lists("services") == lists

        proxy.refusing = True
        proxy.cut()
        api.delete("Service", "default", "s1")
        api.patch("Service", "default", "s2", {"spec": {"type": "ExternalName", "externalName": "example.com"}})
        version.compact()
        version.apiserver.kill()
        version.start_apiserver()
        proxy.behave()
        following.until("gone", lambda: not following.has("default", "s1"))
        following.agrees(api)
        assert following.client.lists("services") > lists and not following.has("default", "s2")

        version.apiserver.kill()
        following.until("stale", lambda: following.source.condition().state is SourceState.STALE)
        version.start_apiserver()
        api.create(service("default", "after"))
        following.until("after", lambda: following.has("default", "after"))
        following.agrees(api)


def test_a_restored_etcd(version: ControlPlane) -> None:
    api = version.api
    api.create(service("default", "old"))
    saved = version.save()
    with Follower(access(version, deploy(api))) as following:
        following.sync()
        for number in range(60):
            api.create(service("default", f"new-{number}"))
        following.until("the last", lambda: following.has("default", "new-59"))
        version.restore(saved)
        following.until("taken back", lambda: not following.has("default", "new-59"))
        following.agrees(api)
