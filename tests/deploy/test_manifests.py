"""deploy/base is consistent in itself, and with what the daemon does: no cluster, no root."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ebpflb import __version__
from ebpflb.config import Bind
from ebpflb.config.options import Options, configure
from ebpflb.dataplane.bpf import artifact
from ebpflb.source.kube import decode
from tests.conftest import CHECKOUT
from tests.deploy.base import BASE, DEPLOY, Object, container, containers, kustomization, objects, pod, the

NAMES = [each["name"] for each in containers()]
# Of container runtimes' default set none is left, so that what is added is all there is.
CAPABILITIES = {"NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE", "SYS_RESOURCE"}


def volumes() -> dict[str, Object]:
    return {volume["name"]: volume for volume in pod()["volumes"]}


def test_every_file_of_the_base_is_used() -> None:
    used = {name for generator in kustomization()["configMapGenerator"] for name in generator["files"]}
    used |= {"kustomization.yaml", *kustomization()["resources"]}
    assert {path.name for path in BASE.iterdir()} == used


def test_everything_bears_the_same_name_and_label() -> None:
    for found in objects():
        assert found["metadata"]["name"] == "ebpflb"
        assert found["metadata"]["labels"] == {"app.kubernetes.io/name": "ebpflb"}
    assert sorted(found["kind"] for found in objects()) == sorted({found["kind"] for found in objects()})


def test_the_daemon_set_selects_its_own_pods() -> None:
    spec = the("DaemonSet")["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


def test_the_service_account_is_bound_to_the_role() -> None:
    binding = the("ClusterRoleBinding")
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "ebpflb"}
    (subject,) = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "ebpflb", "namespace": kustomization()["namespace"]}
    assert pod()["serviceAccountName"] == the("ServiceAccount")["metadata"]["name"]


def test_the_role_is_what_the_daemon_asks_for_and_no_more() -> None:
    granted = {
        (group, resource, verb)
        for rule in the("ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    watched = (decode.SERVICES, decode.SLICES, decode.node("node1"))
    wanted = {(kind.group, kind.resource, verb) for kind in watched for verb in ("list", "watch")}
    # What it writes, see its sender of Events: each is created, and patched when it repeats.
    wanted |= {("events.k8s.io", "events", verb) for verb in ("create", "patch")}
    assert granted == wanted


def test_it_is_where_no_service_and_no_other_pod_is_needed() -> None:
    assert pod()["hostNetwork"] is pod()["hostPID"] is True
    assert pod()["dnsPolicy"] == "Default"
    assert pod()["priorityClassName"] == "system-node-critical"
    assert pod()["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert pod()["tolerations"] == [{"operator": "Exists"}]
    update = the("DaemonSet")["spec"]["updateStrategy"]
    assert update == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_mounted_is_there(name: str) -> None:
    mounts = container(name)["volumeMounts"]
    assert {mount["name"] for mount in mounts} <= set(volumes())
    assert len({mount["mountPath"] for mount in mounts}) == len(mounts)


def test_every_volume_is_mounted() -> None:
    assert {mount["name"] for each in containers() for mount in each["volumeMounts"]} == set(volumes())


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_arguments_name_are_keys_of_the_config_map(name: str) -> None:
    (place,) = (mount["mountPath"] for mount in container(name)["volumeMounts"] if mount["name"] == "config")
    assert volumes()["config"]["configMap"] == {"name": the("ConfigMap")["metadata"]["name"]}
    (config,) = (word.partition("=")[2] for word in container(name)["args"] if word.startswith("--config="))
    keys = the("ConfigMap")["data"]
    kubeconfig = yaml.safe_load(keys["config.conf"])["clientConnection"]["kubeconfig"]
    for path in (config, kubeconfig):
        assert str(Path(path).parent) == place and Path(path).name in keys


@pytest.mark.parametrize("name", NAMES)
def test_variables_in_arguments_are_set(name: str) -> None:
    used = {found for word in container(name)["args"] for found in re.findall(r"\$\((\w+)\)", word)}
    assert used == {variable["name"] for variable in container(name)["env"]} == {"NODE_NAME"}


def test_the_configuration_is_accepted_as_kubeadm_writes_it(tmp_path: Path) -> None:
    for name, text in the("ConfigMap")["data"].items():
        (tmp_path / name).write_text(text.replace("/var/lib/kube-proxy/", f"{tmp_path}/"))
    config = configure(Options(config=str(tmp_path / "config.conf"), node_name="node1"), hostname="host")
    assert config.api is not None and config.api.kubeconfig == str(tmp_path / "kubeconfig.conf")
    assert config.healthz == Bind("0.0.0.0", 10256) and config.state_dir == "/var/lib/ebpflb"
    assert config.node_name == "node1" and config.warnings == ()


def test_probes_ask_the_health_server() -> None:
    found = container("ebpflb")
    paths = {name: found[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: (get["path"], get["port"]) for name, get in paths.items()} == {
        "startup": ("/livez", 10256),
        "liveness": ("/livez", 10256),
        "readiness": ("/healthz", 10256),
    }


def test_the_first_start_may_compile_for_as_long_as_the_daemon_lets_it() -> None:
    probe = container("ebpflb")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > artifact._COMPILE_SECONDS


def test_only_the_preparation_is_privileged() -> None:
    assert container("prepare")["securityContext"] == {"privileged": True}
    assert "--init-only" in container("prepare")["args"]
    context = container("ebpflb")["securityContext"]
    assert context["privileged"] is False and context["readOnlyRootFilesystem"] is True
    assert context["capabilities"]["drop"] == ["ALL"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert set(context["capabilities"]["add"]) == CAPABILITIES


def test_each_capability_is_named_with_its_reason() -> None:
    text = (BASE / "daemonset.yaml").read_text()
    for capability in CAPABILITIES:
        assert re.search(rf"^ *- {capability}  # \S.{{10,}}$", text, re.MULTILINE), capability


@pytest.mark.parametrize("name", ["prepare", "ebpflb"])
def test_rules_are_written_under_the_nodes_own_lock(name: str) -> None:
    """The kubelet and the network plugin hold it too."""
    (mount,) = (each for each in container(name)["volumeMounts"] if each["name"] == "xtables-lock")
    assert mount["mountPath"] == volumes()["xtables-lock"]["hostPath"]["path"] == "/run/xtables.lock"
    assert volumes()["xtables-lock"]["hostPath"]["type"] == "FileOrCreate"


def test_pins_outlive_the_container() -> None:
    """A mount that reaches the node takes a privileged container, and is there before the daemon starts."""
    for name, propagation in (("prepare", "Bidirectional"), ("ebpflb", None)):
        (mount,) = (each for each in container(name)["volumeMounts"] if each["name"] == "bpf")
        assert (mount["mountPath"], mount.get("mountPropagation")) == ("/sys/fs/bpf", propagation)
    assert volumes()["bpf"]["hostPath"]["path"] == "/sys/fs/bpf"


@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_this_version(name: str) -> None:
    assert container(name)["image"] == f"ebpflb:{__version__}"
    assert container(name)["command"] == ["ebpflb"]


def test_the_kubeconfig_is_a_service_accounts() -> None:
    document = yaml.safe_load(the("ConfigMap")["data"]["kubeconfig.conf"])
    (cluster,), (user,) = document["clusters"], document["users"]
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    assert cluster["cluster"]["certificate-authority"] == f"{place}/ca.crt"
    assert user["user"] == {"tokenFile": f"{place}/token"}


def test_the_image_is_built_from_all_that_the_package_is_made_of() -> None:
    kept = re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert all((CHECKOUT / name).exists() for name in names)
    assert {name for name in names if not any(name == each or name.startswith(f"{each}/") for each in kept)} == set()
    assert set(kept) <= names
