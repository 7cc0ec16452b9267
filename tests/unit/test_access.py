"""Which addresses are tried and as whom: from kubeconfigs as people have them, a pod's service account, or a URL."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from ebpflb.config import ApiServer
from ebpflb.errors import EbpflbError, SourceError, UserError
from ebpflb.source.kube.access import (
    Access,
    Address,
    Resolver,
    Told,
    read_kubeconfig,
)
from ebpflb.source.kube.connections import tls_context
from ebpflb.source.kube.expiry import certificate_end, day, token_end
from ebpflb.source.kube.proxies import proxy_for
from tests.web import Authority, authority

POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A pod's service account."""
    directory = tmp_path / "serviceaccount"
    directory.mkdir()
    (directory / "token").write_text("t")
    (directory / "ca.crt").write_text("the CA")
    return directory


def told(**more: object) -> Told:
    return Told(server="https://10.0.0.1:6443", identity="u", files=("/k",), **more)  # type: ignore[arg-type]


def resolver(api: ApiServer, account: Path | None = None, environ: Mapping[str, str] = POD, **more: object) -> Resolver:
    return Resolver(api, environ=environ, service_account=account or Path("/nowhere"), **more)  # type: ignore[arg-type]


# ---- Which addresses ----


def test_a_kubeconfig_names_the_server() -> None:
    access = resolver(ApiServer(kubeconfig="/k"), read=lambda path, environ: told(ca="C", token="t")).resolve()
    assert access == Access(
        addresses=(Address("https://10.0.0.1:6443"),),
        ca="C",
        ca_from="kubeconfig /k",
        token="t",
        identity="u",
        files=("/k",),
    )


def test_apiserver_goes_before_the_kubeconfigs_server_and_keeps_its_credentials() -> None:
    api = ApiServer(kubeconfig="/k", addresses=("https://10.0.0.2:6443/", "10.0.0.3:6443"))
    access = resolver(api, read=lambda path, environ: told(token="t", server_name="api")).resolve()
    assert access.addresses == (Address("https://10.0.0.2:6443", "api"), Address("https://10.0.0.3:6443", "api"))
    assert access.token == "t"


def test_a_pod_uses_the_clusters_own_address_when_nothing_better_is_known(account: Path) -> None:
    access = resolver(ApiServer(), account).resolve()
    (address,) = access.addresses
    assert address.url == "https://10.96.0.1:443"
    assert "give --apiserver" in address.note
    assert (access.ca, access.ca_from, access.token_file) == (
        "the CA",
        str(account / "ca.crt"),
        str(account / "token"),
    )


def test_a_pod_goes_to_the_endpoints_that_it_remembers_first(account: Path) -> None:
    access = resolver(ApiServer(), account, remembered=lambda: ("10.0.0.1:6443", "[fd00::1]:6443")).resolve()
    assert [(each.url, each.server_name) for each in access.addresses] == [
        ("https://10.0.0.1:6443", "10.96.0.1"),
        ("https://[fd00::1]:6443", "10.96.0.1"),
        ("https://10.96.0.1:443", ""),
    ]


def test_endpoints_that_become_known_count_at_the_next_resolving(account: Path) -> None:
    known: list[str] = []
    made = resolver(ApiServer(), account, remembered=lambda: known)
    made.resolve()
    assert not made.changed()
    known.append("10.0.0.1:6443")
    assert made.changed()
    assert made.resolve().addresses[0].url == "https://10.0.0.1:6443"
    assert not made.changed()


def test_a_pod_with_apiserver_never_uses_the_clusters_own_address(account: Path) -> None:
    api = ApiServer(addresses=("https://10.0.0.2:6443",))
    access = resolver(api, account, remembered=lambda: ("10.0.0.1:6443",)).resolve()
    assert access.addresses == (Address("https://10.0.0.2:6443"),)
    assert access.token_file == str(account / "token")


def test_a_pod_of_an_ipv6_cluster(account: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    assert resolver(ApiServer(), account, environ).resolve().addresses[0].url == "https://[fd00::1]:443"


def test_an_address_alone_is_asked_by_nobody_in_particular() -> None:
    access = resolver(ApiServer(addresses=("http://127.0.0.1:8001",)), environ={}).resolve()
    assert access == Access(addresses=(Address("http://127.0.0.1:8001"),))
    assert access.anonymous


def test_nothing_to_go_by() -> None:
    with pytest.raises(UserError, match="give --manifests DIR, --kubeconfig FILE or --apiserver URL"):
        resolver(ApiServer(), environ={}).resolve()


@pytest.mark.parametrize(
    "url",
    ["ftp://x", "https://", "https://x:99999", "https://x:y", "https://x/?q=1", "", "https://a b:1", "https://[::1"],
)
def test_an_apiserver_that_is_no_url(url: str) -> None:
    with pytest.raises(UserError, match="--apiserver: .* is no URL"):
        resolver(ApiServer(addresses=(url,)), environ={}).resolve()


def test_secrets_are_not_in_the_words_for_an_access() -> None:
    assert "hidden" not in repr(Access(addresses=(), token="hidden", key="hidden", authorization="hidden"))
    assert "hidden" not in repr(Told(token="hidden", key="hidden", authorization="hidden"))


# ---- Proxies ----


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://api.example:6443", "http://p:3128"),
        ("http://api.example", ""),
        ("https://a.internal:6443", ""),
        ("https://internal:6443", "http://p:3128"),
        ("https://x.corp", ""),
        ("https://corp", ""),
        ("https://notcorp", "http://p:3128"),
        ("https://10.1.2.3:6443", ""),
        ("https://10.2.2.3:6443", "http://p:3128"),
        ("https://[fd00::7]:6443", ""),
        ("https://port.example:6443", ""),
        ("https://port.example:443", "http://p:3128"),
        ("https://127.0.0.1:6443", ""),
        ("https://localhost:6443", ""),
    ],
)
def test_a_proxy_is_used_unless_no_proxy_has_the_host(url: str, proxy: str) -> None:
    environ = {"HTTPS_PROXY": "p:3128", "NO_PROXY": ".internal, corp,10.1.0.0/16,fd00::7,port.example:6443"}
    assert proxy_for(url, environ) == proxy


def test_the_kubeconfigs_proxy_goes_before_the_environments() -> None:
    made = resolver(
        ApiServer(kubeconfig="/k"),
        environ={"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "*"},
        read=lambda path, environ: told(proxy="http://q:8080"),
    )
    assert made.resolve().addresses[0].proxy == "http://q:8080"


def test_a_proxy_of_another_kind_is_refused() -> None:
    made = resolver(ApiServer(kubeconfig="/k"), read=lambda path, environ: told(proxy="socks5://u:p@q:1"))
    with pytest.raises(UserError, match="the proxy q:1 is not of a kind"):
        made.resolve()
    made = resolver(ApiServer(kubeconfig="/k"), read=lambda path, environ: told(proxy="http://u:p@q r:1"))
    with pytest.raises(UserError, match="the proxy q r:1 is no URL"):
        made.resolve()


# ---- What becomes of files ----


def test_a_kubeconfig_that_is_written_anew_is_noticed(tmp_path: Path) -> None:
    kubeconfig, key = tmp_path / "k", tmp_path / "key"
    for path in (kubeconfig, key):
        path.write_text("1")
    files = (str(kubeconfig), str(key))
    made = resolver(ApiServer(kubeconfig=str(kubeconfig)), read=lambda path, environ: Told(server="x", files=files))
    made.resolve()
    assert not made.changed()
    for path in (kubeconfig, key):
        path.write_text("2 2")
        assert made.changed()
        made.resolve()
        assert not made.changed()
    key.unlink()
    assert made.changed()


# ---- Kubeconfigs, as the official package reads them ----


class Kubeconfig:
    """A kubeconfig being written. All that is not said is right."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "kubeconfig"
        self.cluster: dict[str, object] = {"server": "https://127.0.0.1:6443"}
        self.user: dict[str, object] = {}
        self.document: dict[str, object] = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": self.cluster}],
            "users": [{"name": "u", "user": self.user}],
        }

    def plugin(self, script: str, **more: object) -> None:
        """The user's credentials come from an exec plugin."""
        path = self.path.parent / "plugin"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        self.user["exec"] = {"command": "./plugin", "apiVersion": "client.authentication.k8s.io/v1", **more}

    def read(self) -> Told:
        """In this process, which costs less time than the child's and is the same otherwise."""
        from ebpflb.source.kube.credentials import told_by

        self.path.write_text(yaml.safe_dump(self.document))
        return told_by(str(self.path))

    def complaint(self) -> str:
        with pytest.raises(EbpflbError) as caught:
            self.read()
        text = str(caught.value)
        assert "\n" not in text
        return text.removeprefix(f"kubeconfig {self.path}").lstrip(": ")


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Kubeconfig:
    return Kubeconfig(tmp_path)


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_a_kubeconfig_with_everything_in_it(kubeconfig: Kubeconfig, ca: Authority) -> None:
    certificate, key = ca.issue("node")
    kubeconfig.cluster |= {"certificate-authority-data": encoded(ca.path), "tls-server-name": "api"}
    kubeconfig.user |= {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}
    found = kubeconfig.read()
    assert (found.server, found.server_name, found.ca, found.verify) == ("https://127.0.0.1:6443", "api", ca.pem, True)
    assert (found.certificate, found.key) == (certificate.read_text(), key.read_text())
    assert found.identity == f"the client certificate of kubeconfig {kubeconfig.path}"
    assert found.files == (str(kubeconfig.path),)
    tls_context(Access(addresses=(), ca=found.ca, certificate=found.certificate, key=found.key))


def test_a_kubeconfig_that_names_files_beside_it(kubeconfig: Kubeconfig, ca: Authority) -> None:
    certificate, key = ca.issue("node")
    directory = kubeconfig.path.parent
    for source, name in ((ca.path, "ca.pem"), (certificate, "n.pem"), (key, "n.key")):
        (directory / name).write_bytes(source.read_bytes())
    (directory / "token").write_text("t\n")
    kubeconfig.cluster["certificate-authority"] = "ca.pem"
    kubeconfig.user |= {"client-certificate": "n.pem", "client-key": str(directory / "n.key"), "tokenFile": "token"}
    found = kubeconfig.read()
    assert found.files == tuple(str(directory / name) for name in ("kubeconfig", "ca.pem", "n.pem", "n.key"))
    assert (found.token, found.token_file) == ("t", str(directory / "token"))


def test_a_token_and_a_name_with_password(kubeconfig: Kubeconfig) -> None:
    kubeconfig.user["token"] = "t"
    assert (kubeconfig.read().token, kubeconfig.read().renewable) == ("t", False)
    kubeconfig.user.clear()
    kubeconfig.user |= {"username": "u", "password": "p"}
    assert kubeconfig.read().authorization == "Basic dTpw"


def test_a_context_without_a_user_is_nobody(kubeconfig: Kubeconfig) -> None:
    kubeconfig.document["contexts"] = [{"name": "here", "context": {"cluster": "c"}}]
    found = kubeconfig.read()
    assert (found.token, found.certificate, found.identity.partition(":")[0]) == ("", "", "nobody")


def test_an_exec_plugin_gives_a_token_until_it_expires(kubeconfig: Kubeconfig) -> None:
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "t", "expirationTimestamp": "2030-01-01T00:00:00Z"},
    }
    kubeconfig.plugin(f"echo '{json.dumps(credential)}'")
    found = kubeconfig.read()
    assert (found.token, found.renewable, found.expires) == ("t", True, 1893456000.0)
    assert found.identity == f"what the exec plugin './plugin' of kubeconfig {kubeconfig.path} gave"


def test_an_exec_plugin_gives_a_certificate(kubeconfig: Kubeconfig, ca: Authority) -> None:
    certificate, key = ca.issue("node")
    status = {"clientCertificateData": certificate.read_text(), "clientKeyData": key.read_text()}
    credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    kubeconfig.plugin(f"cat <<'E'\n{json.dumps(credential)}\nE")
    found = kubeconfig.read()
    assert (found.certificate, found.key, found.renewable) == (certificate.read_text(), key.read_text(), True)


def test_an_exec_plugin_that_fails_is_told_by_its_last_line(kubeconfig: Kubeconfig) -> None:
    kubeconfig.plugin("echo warning >&2; echo 'the cloud says no' >&2; exit 3")
    assert kubeconfig.complaint() == "the exec plugin './plugin' failed: the cloud says no"


def test_an_exec_plugin_that_fails_without_a_word(kubeconfig: Kubeconfig) -> None:
    kubeconfig.plugin("exit 3")
    assert kubeconfig.complaint() == "the exec plugin './plugin' failed: process returned 3"


def test_an_exec_plugin_that_talks_nonsense(kubeconfig: Kubeconfig) -> None:
    kubeconfig.plugin("echo hello")
    assert "the exec plugin './plugin' failed: failed to decode process output" in kubeconfig.complaint()


def test_an_exec_plugin_that_is_not_installed(kubeconfig: Kubeconfig) -> None:
    kubeconfig.plugin("", command="aws-token", installHint="see the cloud's manual")
    assert kubeconfig.complaint() == "the exec plugin 'aws-token' is not installed here (see the cloud's manual)"


@pytest.mark.parametrize("kind", ["contexts", "clusters", "users"])
def test_a_name_that_is_not_there(kubeconfig: Kubeconfig, kind: str) -> None:
    kubeconfig.document[kind] = [{"name": "other", kind[:-1]: {}}]
    whose = (
        "its current-context is the context 'here'" if kind == "contexts" else f"context 'here' names the {kind[:-1]}"
    )
    assert kubeconfig.complaint().startswith(whose)
    assert kubeconfig.complaint().endswith("which is not there")


def test_no_current_context(kubeconfig: Kubeconfig) -> None:
    del kubeconfig.document["current-context"]
    assert kubeconfig.complaint() == "has no current-context; choose one with `kubectl config use-context`"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1\nb: 2", "is not YAML: .* \\(line 2\\)"),
        ("", "is empty"),
        ("just words", "is no kubeconfig: it is not a mapping"),
        ("current-context: a\ncontexts: 7", "contexts is not a list of entries with names"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_file_that_is_no_kubeconfig(tmp_path: Path, text: str, complaint: str) -> None:
    from ebpflb.source.kube.credentials import told_by

    path = tmp_path / "k"
    path.write_text(text)
    with pytest.raises(EbpflbError, match=f"^kubeconfig {path}:? {complaint}"):
        told_by(str(path))


@pytest.mark.parametrize("field", ["certificate-authority", "client-certificate"])
def test_a_file_that_the_kubeconfig_names_and_is_not_there(kubeconfig: Kubeconfig, field: str) -> None:
    entry = kubeconfig.cluster if field == "certificate-authority" else kubeconfig.user
    entry[field] = "gone.pem"
    assert kubeconfig.complaint() == f"{field} {kubeconfig.path.parent}/gone.pem: there is no such file"


def test_data_that_is_not_base64(kubeconfig: Kubeconfig) -> None:
    kubeconfig.cluster["certificate-authority-data"] = "?"
    assert kubeconfig.complaint() == "certificate-authority-data is not base64"


def test_data_that_is_no_certificate(kubeconfig: Kubeconfig) -> None:
    kubeconfig.cluster["certificate-authority-data"] = base64.b64encode(b"no").decode()
    assert kubeconfig.complaint() == "certificate-authority holds no certificate in PEM"


def test_a_key_of_another_certificate(kubeconfig: Kubeconfig, ca: Authority) -> None:
    certificate, _ = ca.issue("node")
    _, key = ca.issue("other")
    kubeconfig.user |= {"client-certificate": str(certificate), "client-key": str(key)}
    assert kubeconfig.complaint() == "client-key belongs to another certificate"


def test_a_certificate_without_a_key(kubeconfig: Kubeconfig, ca: Authority) -> None:
    certificate, _ = ca.issue("node")
    kubeconfig.user["client-certificate"] = str(certificate)
    assert kubeconfig.complaint() == "there is a client-certificate without a client-key"


def test_what_the_package_leaves_out_in_silence_is_said(kubeconfig: Kubeconfig) -> None:
    kubeconfig.user |= {"token": "t", "as": "somebody"}
    assert kubeconfig.complaint().startswith("its user acts as 'somebody', which is not served")
    kubeconfig.user.clear()
    kubeconfig.user["auth-provider"] = {"name": "azure", "config": {}}
    assert kubeconfig.complaint() == "its auth-provider gives no token; use an exec plugin or a token"


def test_no_key_is_left_in_a_file(kubeconfig: Kubeconfig, ca: Authority) -> None:
    certificate, key = ca.issue("node")
    kubeconfig.user |= {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}
    kubeconfig.read()
    assert not left_of(key)


def left_of(key: Path) -> list[str]:
    """The files in memory that hold this key. What else comes and goes there is of other tests that run now."""
    found = []
    for name in os.listdir("/dev/shm"):
        with contextlib.suppress(OSError):  # a directory, or gone already
            if key.read_bytes().strip() in Path("/dev/shm", name).read_bytes():
                found.append(name)
    return found


# ---- The child process ----


@pytest.mark.slow
def test_the_child_tells_what_the_kubeconfig_says_wherever_we_are(
    kubeconfig: Kubeconfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig.user["token"] = "t"
    expected = kubeconfig.read()
    monkeypatch.chdir("/")
    assert read_kubeconfig(str(kubeconfig.path), os.environ) == expected


@pytest.mark.slow
def test_the_child_tells_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"^kubeconfig {tmp_path}/k: there is no such file$"):
        read_kubeconfig(str(tmp_path / "k"), os.environ)


def test_a_plugin_that_hangs_ends_with_whoever_asked(kubeconfig: Kubeconfig) -> None:
    """A daemon that is stopped, or killed, while a login takes its time leaves nothing behind."""
    kubeconfig.plugin("echo $$ > pid.new; mv pid.new plugin.pid; exec sleep 100")
    kubeconfig.path.write_text(yaml.safe_dump(kubeconfig.document))
    ask = "import os, sys; from ebpflb.source.kube.access import read_kubeconfig as ask; ask(sys.argv[1], os.environ)"
    noted = kubeconfig.path.parent / "plugin.pid"
    with subprocess.Popen([sys.executable, "-c", ask, str(kubeconfig.path)]) as asking:
        until(noted.exists)
        asking.kill()
    until(lambda: has_ended(int(noted.read_text())))


@pytest.mark.slow
def test_a_plugin_that_hangs_ends_with_the_child(kubeconfig: Kubeconfig, ca: Authority) -> None:
    certificate, key = ca.issue("node")
    kubeconfig.user |= {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}
    kubeconfig.plugin("echo $$ > pid.new; mv pid.new plugin.pid; exec sleep 100")
    kubeconfig.path.write_text(yaml.safe_dump(kubeconfig.document))
    noted = kubeconfig.path.parent / "plugin.pid"
    for seconds in (2, 10, 40):  # a busy machine may not have come to the plugin by then
        with pytest.raises(SourceError, match="the exec plugin hangs"):
            read_kubeconfig(str(kubeconfig.path), os.environ, timeout=seconds)
        if noted.exists():
            break
    until(lambda: has_ended(int(noted.read_text())))
    assert not left_of(key)


def has_ended(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(probe: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- Until when ----


@pytest.mark.parametrize("days", [-1, 30, 30_000])
def test_the_end_of_a_certificate(ca: Authority, days: int) -> None:
    certificate, _ = ca.issue("node", days=days)
    end = certificate_end(certificate.read_text())
    assert end is not None
    assert abs(end - time.time() - days * 86400) < 3600


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "x"])
def test_what_is_no_certificate_has_no_end(text: str) -> None:
    assert certificate_end(text) is None


def test_the_end_of_a_token() -> None:
    assert token_end("e30.eyJleHAiOiAxNzY3MjI1NjAwfQ.x") == 1767225600
    far = base64.urlsafe_b64encode(b'{"exp": -1e300}').decode()
    assert [token_end(text) for text in ("", "a.b", "e30.e30.x", "a.b.c", "a.!.c", f"e30.{far}.x")] == [None] * 6
    assert day(1767225600) == "2026-01-01T00:00:00Z"
