"""deploy/base as the objects that it stands for, without kubectl; a test with kubectl compares them.

Rules of this file: it knows what our own kustomization.yaml uses, and refuses what it does not know.
"""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import CHECKOUT

Object = dict[str, Any]

DEPLOY = CHECKOUT / "deploy"
BASE = DEPLOY / "base"
_KNOWN = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator"}
_CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding"}


def kustomization() -> Object:
    """The file itself."""
    found: Object = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert set(found) <= _KNOWN, set(found) - _KNOWN
    return found


def objects() -> list[Object]:
    """What `kubectl kustomize deploy/base` prints, in the order of the files; for the caller to change as it likes."""
    return copy.deepcopy(_objects())


@functools.cache  # to read them takes longer than all that is asked of them
def _objects() -> list[Object]:
    outer = kustomization()
    found: list[Object] = []
    for name in outer["resources"]:
        found += [each for each in yaml.safe_load_all((BASE / name).read_text()) if each]
    found += [_config_map(generator) for generator in outer["configMapGenerator"]]
    for each in found:
        if each["kind"] not in _CLUSTER_WIDE:
            each["metadata"]["namespace"] = outer["namespace"]
    return found


def _config_map(generator: Object) -> Object:
    assert generator["options"]["disableNameSuffixHash"]
    files = [BASE / name for name in generator["files"]]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": generator["name"], "labels": generator["options"]["labels"]},
        "data": {path.name: path.read_text() for path in files},
    }


def the(kind: str) -> Object:
    """The one object of a kind."""
    (found,) = (each for each in objects() if each["kind"] == kind)
    return found


def pod() -> Object:
    """The specification of the DaemonSet's pods."""
    found: Object = the("DaemonSet")["spec"]["template"]["spec"]
    return found


def containers() -> list[Object]:
    """All containers of the pod, in the order in which they start."""
    return [*pod()["initContainers"], *pod()["containers"]]


def container(name: str) -> Object:
    """One of them."""
    (found,) = (each for each in containers() if each["name"] == name)
    return found


def installed() -> Path:
    """The `ebpflb` of the environment that runs the tests."""
    return Path(sys.executable).with_name("ebpflb")
