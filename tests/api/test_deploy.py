"""deploy/base on a real API server, and its pod as a process that knows nothing but what the API server gives it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from ebpflb.demo import namespaces, network
from ebpflb.demo.manifests import node as node_manifest
from tests.api.accounts import account
from tests.api.chaos import ChaosProxy
from tests.api.client import Api, Object
from tests.api.control_plane import ADVERTISED, PATIENCE, ControlPlane
from tests.deploy import base
from tests.deploy.pod import Container, machine_root
from tests.deploy.stage import PROTOCOLS, Running, Stage, config_files, endpoint_slice, service

pytestmark = pytest.mark.api

Kubectl = Callable[..., str]
NODE = "node1"


@pytest.fixture
def kubectl(programs: dict[str, Path], cluster: ControlPlane, tmp_path: Path) -> Kubectl:
    """kubectl, as an administrator; what it prints."""
    kubeconfig = cluster.kubeconfig(tmp_path / "kubectl.kubeconfig")

    def run(*words: str | Path) -> str:
        argv = [programs["kubectl"], "--kubeconfig", kubeconfig, "--cache-dir", tmp_path / "kubectl", *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and not done.stderr, (words, done.stdout, done.stderr)
        return done.stdout

    return run


@pytest.fixture
def applied(kubectl: Kubectl) -> Iterator[list[Object]]:
    """The base is on the API server; what that says of each object."""
    try:
        yield json.loads(kubectl("apply", "-k", base.BASE, "-o", "json"))["items"]
    finally:
        kubectl("delete", "--ignore-not-found", "-k", base.BASE)


def keyed(objects: Sequence[Object]) -> dict[str, Object]:
    return {found["kind"]: found for found in objects}


def test_kustomize_makes_what_our_own_tests_read(kubectl: Kubectl) -> None:
    made = [each for each in yaml.safe_load_all(kubectl("kustomize", base.BASE)) if each]
    assert keyed(made) == keyed(base.objects()) and len(made) == len(base.objects())


def test_the_server_takes_all_of_it_without_a_warning(kubectl: Kubectl) -> None:
    said = kubectl("apply", "-k", base.BASE, "--dry-run=server").splitlines()
    assert len(said) == len(base.objects()) and all(line.endswith(" (server dry run)") for line in said), said


def test_nothing_of_it_is_lost_on_the_way(applied: list[Object], api: Api) -> None:
    """An unknown field would be dropped, and one of the wrong type refused."""
    stored = api.ask("GET", "/apis/apps/v1/namespaces/kube-system/daemonsets/ebpflb")
    assert missing(base.the("DaemonSet")["spec"], stored["spec"]) == []
    config = api.get("ConfigMap", "kube-system", "ebpflb")
    assert config["data"] == base.the("ConfigMap")["data"]
    assert keyed(applied)["ClusterRole"]["rules"] == base.the("ClusterRole")["rules"]


def missing(ours: object, theirs: object, where: str = "") -> list[str]:
    """What of ours theirs has not, or has otherwise."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [line for key in ours for line in missing(ours[key], theirs.get(key), f"{where}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) for line in missing(a, b, f"{where}[{at}]")
        ]
    return [] if ours == theirs else [f"{where}: {ours!r} became {theirs!r}"]


# ---- The pod ----


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as found:
        yield found


@pytest.fixture
def served(
    stage: Stage, cluster: ControlPlane, api: Api, namespace: str, applied: list[Object], tmp_path: Path
) -> Iterator[Running]:
    """The base's pod on a node of this cluster; the API server is beyond that node, and has the Service."""
    node = stage.cluster.nodes[NODE]
    api.create(node_manifest(NODE, node.addresses, "a", network.pod_cidrs(1)))
    api.create(service(namespace))
    api.create(endpoint_slice(namespace, *stage.web))
    token = tmp_path / "token"
    token.mkdir()
    (token / "token").write_text(account(api, "kube-system", "ebpflb").token)
    (token / "ca.crt").write_bytes(cluster.authority.bundle.read_bytes())
    (token / "namespace").write_text("kube-system")
    with namespaces.inside(stage.cluster.fabric.namespace):
        listener = socket.create_server((ADVERTISED, 0))
    try:
        with ChaosProxy(listener, cluster.identity, cluster.port) as proxy, stage.host() as host:
            files = {"config": config_files(tmp_path / "config", f"https://{ADVERTISED}:{proxy.port}")}
            found = Running(stage, host, machine_root(base.installed()), base.pod(), files)
            found.token = token
            yield found
    finally:
        api.delete("Node", "", NODE)


def asked(stage: Stage, path: str) -> int:
    """The status of a probe, as the kubelet asks it: of the node's address."""
    node = stage.cluster.nodes[NODE]
    url = f"http://{node.addresses.ipv4}:10256{path}"
    argv = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--max-time", "30", url]
    return int(stage.cluster.run(node, argv).stdout)


@pytest.mark.root
@pytest.mark.box
def test_the_pod_serves_what_the_api_server_says(served: Running, api: Api, namespace: str) -> None:
    stage = served.stage
    prepared = served.prepare()
    daemon = served.serve()
    assert stage.unanswered() == {}
    # Kernel settings take the privileges of the preparation; the daemon finds them made.
    setting = "nf_conntrack_tcp_timeout_established"
    assert f"{setting}: 86400" in prepared.words() and setting not in daemon.words()
    for probe in ("startup", "liveness", "readiness"):
        get = served.pod["containers"][0][f"{probe}Probe"]["httpGet"]
        assert get["port"] == 10256 and asked(stage, get["path"]) == 200, probe
    api.replace(endpoint_slice(namespace))
    began = time.monotonic()
    while not stage.unanswered(1.0):
        assert time.monotonic() - began < PATIENCE, daemon.words()
    daemon.process.terminate()
    assert daemon.process.wait(60) == 0, daemon.words()
    assert list((served.host.directory / "var/lib/ebpflb").iterdir())  # for a start while the server is away
    assert "ERROR" not in daemon.words() and "Traceback" not in daemon.words(), daemon.words()


@pytest.mark.root
@pytest.mark.box
def test_what_removes_it_leaves_nothing_on_the_node(served: Running, kubectl: Kubectl) -> None:
    stage = served.stage
    served.prepare()
    daemon = served.serve()
    kubectl("apply", "-k", base.DEPLOY / "remove")
    stored = json.loads(kubectl("get", "daemonset", "ebpflb", "--namespace", "kube-system", "-o", "json"))
    removing = stored["spec"]["template"]["spec"]
    assert [each["name"] for each in (*removing["initContainers"], *removing["containers"])] == ["clean-up", "wait"]
    daemon.process.terminate()
    assert daemon.process.wait(60) == 0
    assert stage.unanswered() == {}, "without a daemon it goes on"
    cleaning = Container(served.host, removing, "clean-up", served.root, files=served.files)
    assert cleaning.process.wait(60) == 0 and "ebpflb_ingress on eth0" in cleaning.words(), cleaning.words()
    assert not (served.host.directory / "sys/fs/bpf/ebpflb").exists()
    clients = ("client", "sandbox", "outside")
    assert set(stage.unanswered(1.0)) == {f"{who} {how}" for who in clients for how in PROTOCOLS}
