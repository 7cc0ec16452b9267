"""Who we are to the API server and whether we believe it, with a real one; and each mistake as one clear line.

Rules of this file: kubeconfigs are read as the daemon reads them, by the child process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpflb.config import ApiServer
from ebpflb.source import SourceState
from ebpflb.source.kube.access import Resolver
from tests.api.accounts import bind, deploy, new_account
from tests.api.authority import Authority
from tests.api.chaos import ChaosProxy
from tests.api.client import Api
from tests.api.conftest import loopback_listener
from tests.api.control_plane import ADMIN, KUBERNETES_IP, LOOPBACK, NOBODY, ControlPlane, User, write_kubeconfig
from tests.api.follower import Follower, access
from tests.api.objects import service

pytestmark = pytest.mark.api


def by_kubeconfig(path: Path, *addresses: str) -> Resolver:
    return Resolver(ApiServer(kubeconfig=str(path), addresses=addresses), environ={})


def only_problem(following: Follower) -> str:
    """Its text, as soon as it has one; it may say the same of each kind."""
    problems = following.until("a problem", following.source.problems)
    assert all("\n" not in problem.reason for problem in problems)
    return problems[0].reason


# ---- What works ----


def test_the_shipped_role_is_enough_and_nothing_more(cluster: ControlPlane, api: Api) -> None:
    account = deploy(api)
    with Follower(access(cluster, account)) as following:
        following.sync()
        following.agrees(api)
        assert not following.source.problems()
    with cluster.api_of(account) as own:
        for path in ("/api/v1/pods", "/api/v1/secrets", "/api/v1/configmaps", "/apis/apps/v1/deployments"):
            assert own.raw("GET", path).status == 403, path
        assert own.raw("DELETE", "/api/v1/namespaces/default/services/kubernetes").status == 403


def test_a_kubeconfig_with_a_token(cluster: ControlPlane, api: Api, tmp_path: Path) -> None:
    with Follower(by_kubeconfig(cluster.kubeconfig(tmp_path / "config"))) as following:
        following.sync()
        following.agrees(api)


def test_a_kubeconfig_with_a_client_certificate(cluster: ControlPlane, api: Api, tmp_path: Path) -> None:
    identity = cluster.authority.client("certified", "system:masters")
    entry = {"client-certificate": str(identity.certificate), "client-key": str(identity.key)}
    config = cluster.kubeconfig(tmp_path / "config", entry=entry)
    with Follower(by_kubeconfig(config)) as following:
        following.sync()
        following.agrees(api)


def test_a_kubeconfig_with_an_exec_plugin(cluster: ControlPlane, api: Api, tmp_path: Path) -> None:
    answer = '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"%s"}}'
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "printf",
        "args": [answer.replace("%s", ADMIN.token)],
        "interactiveMode": "Never",
    }
    with Follower(by_kubeconfig(cluster.kubeconfig(tmp_path / "config", entry={"exec": plugin}))) as following:
        following.sync()
        following.agrees(api)


def test_the_service_account_of_a_pod_and_where_the_server_was_last(
    cluster: ControlPlane, api: Api, tmp_path: Path
) -> None:
    """The environment's address is a Service that nobody serves yet; what was remembered of its endpoint goes before
    it."""
    (tmp_path / "token").write_text(deploy(api).token)
    (tmp_path / "ca.crt").write_text(cluster.authority.bundle.read_text())
    environment = {"KUBERNETES_SERVICE_HOST": KUBERNETES_IP, "KUBERNETES_SERVICE_PORT": "443"}
    resolver = Resolver(
        ApiServer(),
        environ=environment,
        remembered=lambda: (f"{LOOPBACK}:{cluster.port}",),
        service_account=tmp_path,
    )
    with Follower(resolver) as following:
        following.sync()
        following.agrees(api)


def test_the_first_of_several_addresses_that_answers(cluster: ControlPlane, api: Api, tmp_path: Path) -> None:
    config = cluster.kubeconfig(tmp_path / "config", server="https://127.0.0.1:1")
    with Follower(by_kubeconfig(config, "https://127.0.0.1:9", cluster.url)) as following:
        following.sync()
        following.agrees(api)


def test_a_token_that_is_rotated_before_the_old_one_ends(
    cluster: ControlPlane, api: Api, namespace: str, tmp_path: Path
) -> None:
    """The old one is refused from a moment on; the file has the new one by then."""
    deploy(api)
    account = new_account(api, namespace, "rotated")
    binding = bind(api, namespace, "rotated")
    file = tmp_path / "token"
    file.write_text(account.token)
    try:
        with Follower(access(cluster, account, token_file=file)) as following:
            following.sync()
            file.write_text(new_account(api, namespace, "rotated").token)
            cluster.apiserver.kill()
            cluster.start_apiserver()  # and it believes no old token from its cache
            api.create(service(namespace, "after"))
            following.until("after", lambda: following.has(namespace, "after"))
            following.agrees(api)
    finally:
        api.delete("ClusterRoleBinding", "", binding)


def test_a_token_that_is_rotated_too_late(cluster: ControlPlane, api: Api, namespace: str, tmp_path: Path) -> None:
    deploy(api)
    account = new_account(api, namespace, "rotated")
    binding = bind(api, namespace, "rotated")
    file = tmp_path / "token"
    file.write_text(account.token)
    try:
        with Follower(access(cluster, account, token_file=file)) as following:
            following.sync()
            new = new_account(api, namespace, "rotated")
            cluster.apiserver.kill()
            cluster.start_apiserver()
            # One kind may still be told that nobody is there.
            refused = following.until("refused", lambda: following.problem("Unauthorized"))
            assert refused is not None
            assert "credentials" in refused.reason and account.token not in refused.reason
            assert "\n" not in refused.reason
            assert following.source.condition().state is SourceState.STALE
            file.write_text(new.token)
            api.create(service(namespace, "after"))
            following.until("after", lambda: following.has(namespace, "after"))
            following.until("live", lambda: following.source.condition().state is SourceState.LIVE)
            following.agrees(api)
    finally:
        api.delete("ClusterRoleBinding", "", binding)


def test_permissions_that_come_later(cluster: ControlPlane, api: Api, namespace: str) -> None:
    deploy(api)
    account = new_account(api, namespace, "late")
    with Follower(access(cluster, account)) as following:
        following.until("refused", lambda: len([p for p in following.source.problems() if p.code == "Forbidden"]) == 3)
        texts = {problem.reason for problem in following.source.problems()}
        assert any("give the ServiceAccount list and watch on endpointslices" in text for text in texts), texts
        assert not following.store.synced
        binding = bind(api, namespace, "late")
        try:
            following.sync()
            following.agrees(api)
        finally:
            api.delete("ClusterRoleBinding", "", binding)


# ---- Mistakes ----


def test_somebody_who_may_nothing(cluster: ControlPlane) -> None:
    with Follower(access(cluster, NOBODY)) as following:
        following.until("refused", lambda: following.source.condition().failures >= 2)
        text = only_problem(following)
        assert 'User "nobody" cannot' in text and "give the ServiceAccount list and watch" in text


def test_a_token_that_nobody_knows(cluster: ControlPlane) -> None:
    with Follower(access(cluster, User("stranger", "unheard-of-token"))) as following:
        text = only_problem(following)
        assert "does not accept our credentials" in text and "unheard-of-token" not in text


def test_the_certificate_of_another_authority(cluster: ControlPlane, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    config = write_kubeconfig(tmp_path / "config", cluster.url, other.bundle, {"token": ADMIN.token})
    with Follower(by_kubeconfig(config)) as following:
        assert "is not signed by the CA of" in only_problem(following)


def test_a_kubeconfig_of_another_cluster(cluster: ControlPlane, tmp_path: Path) -> None:
    """Its authority is the right one, as where several clusters share one, but its user is not known here."""
    other = Authority(tmp_path, "other")
    identity = other.client("admin", "system:masters")
    user = {"client-certificate": str(identity.certificate), "client-key": str(identity.key)}
    config = write_kubeconfig(tmp_path / "config", cluster.url, cluster.authority.bundle, user)
    with Follower(by_kubeconfig(config)) as following:
        assert "does not accept our credentials" in only_problem(following)


def test_a_server_whose_certificate_is_for_another_name(cluster: ControlPlane, tmp_path: Path) -> None:
    stranger = cluster.authority.server("stranger", ("192.0.2.1",))
    with ChaosProxy(loopback_listener(), stranger, cluster.port) as proxy:
        config = cluster.kubeconfig(tmp_path / "config", server=f"https://{LOOPBACK}:{proxy.port}")
        with Follower(by_kubeconfig(config)) as following:
            assert f"the server's certificate is not for {LOOPBACK}" in only_problem(following)


def test_a_server_that_is_not_there(cluster: ControlPlane, tmp_path: Path) -> None:
    config = cluster.kubeconfig(tmp_path / "config", server="https://127.0.0.1:1")
    with Follower(by_kubeconfig(config)) as following:
        assert "https://127.0.0.1:1: connection refused" in only_problem(following)
        assert following.source.condition().retry_in is not None


def test_plain_http_where_tls_is_spoken(cluster: ControlPlane, tmp_path: Path) -> None:
    config = cluster.kubeconfig(tmp_path / "config", server=cluster.url.replace("https:", "http:"))
    with Follower(by_kubeconfig(config)) as following:
        assert "it speaks TLS: write https://" in only_problem(following)
