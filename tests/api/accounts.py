"""Service accounts with the role that ebpflb ships, and with less.

Rules of this file: all has names of the tests' own, so that what is shipped can itself be applied beside it.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.api.client import Api, ApiRefusal, Object
from tests.api.control_plane import User
from tests.conftest import CHECKOUT

SHIPPED = CHECKOUT / "deploy" / "base" / "rbac.yaml"
NAMESPACE = "kube-system"
NAME = "ebpflb-tests"


def shipped(path: Path = SHIPPED) -> list[Object]:
    """The account, its role and their binding, as they are deployed, but for their names."""
    found: list[Object] = list(yaml.safe_load_all(path.read_text()))
    for each in found:
        each["metadata"]["name"] = NAME
        for named in (*each.get("subjects", ()), each.get("roleRef", {})):
            named["name"] = NAME
    return found


def deploy(api: Api) -> User:
    """Make the account of the deployment, with its role; what of it exists stays as it is."""
    for found in shipped():
        if found["kind"] == "ServiceAccount":
            found["metadata"]["namespace"] = NAMESPACE
        try:
            api.create(found)
        except ApiRefusal as refusal:
            if refusal.status != 409:
                raise
    return account(api, NAMESPACE, NAME)


def account(api: Api, namespace: str, name: str) -> User:
    """A fresh token of an account that exists."""
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
    token: str = api.ask("POST", path, body=request)["status"]["token"]
    return User(f"system:serviceaccount:{namespace}:{name}", token)


def new_account(api: Api, namespace: str, name: str) -> User:
    """An account that may do nothing; one of that name from before is another, and its tokens are worth nothing."""
    try:
        api.delete("ServiceAccount", namespace, name)
    except ApiRefusal as refusal:
        if refusal.status != 404:
            raise
    metadata = {"name": name, "namespace": namespace}
    api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
    return account(api, namespace, name)


def bind(api: Api, namespace: str, name: str) -> str:
    """Give an account the shipped role; the name of the binding, which is to be deleted."""
    binding = f"{namespace}-{name}"
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAME}
    version = "rbac.authorization.k8s.io/v1"
    metadata = {"name": binding}
    api.create(
        {
            "apiVersion": version,
            "kind": "ClusterRoleBinding",
            "metadata": metadata,
            "roleRef": role,
            "subjects": [subject],
        }
    )
    return binding
