"""How to reach the API server and as whom: from a kubeconfig, a pod's service account, or an address alone.

Rules of this file: it decides which addresses are tried and in which order, and asks a child process what a kubeconfig
means (see `credentials`); it never talks to a server. An Access holds everything inline, so that no later step reads a
file, but for the one file that is meant to change under way: the token's. Secrets stay out of texts and reprs.

Which addresses, in their order: those of `--apiserver`; else the kubeconfig's server; else, in a pod, what the
EndpointSlice default/kubernetes last said, and only then the cluster's own address in the environment, since that is a
Service, and there may be no proxy yet but us. All of these are verified by the name that the environment has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias
from urllib.parse import urlsplit

import msgspec
from urllib3.util import parse_url

from ebpflb.config import ApiServer
from ebpflb.errors import SourceError, UserError
from ebpflb.source.kube.proxies import checked, proxy_for

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod has the token and the CA of its service account."""

_NOTHING_TO_GO_BY = "nothing says where the API server is: give --manifests DIR, --kubeconfig FILE or --apiserver URL"

# A plugin may have to ask a cloud, which may be slow; the daemon waits in the thread of the one who asked.
_CHILD_SECONDS = 60.0
_GRACE_SECONDS = 2.0

# Where we are goes by argument: a PYTHONPATH would reach the plugins, of which many are written in Python.
_CHILD = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
from ebpflb.source.kube.credentials import end_with_parent, main
end_with_parent()
main()
"""

_LAST_RESORT = "most likely a Service, which needs a proxy before there is one: give --apiserver URL"

_HOST = "KUBERNETES_SERVICE_HOST"
_PORT = "KUBERNETES_SERVICE_PORT"


class Address(msgspec.Struct, frozen=True):
    """One place where the API server may be. `url` may have a path, without a slash at its end. `server_name` is whom
    its certificate must name ("" for the URL's host), `proxy` the URL of a proxy on the way ("" for none). `note` is
    what to know about it when it cannot be reached; an address that has one is the last resort."""

    url: str
    server_name: str = ""
    proxy: str = ""
    note: str = ""

    @property
    def tls(self) -> bool:
        return self.url.startswith("https:")


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """As whom we go, and whom we believe. Certificates and keys are PEM. `ca` is "" for the authorities that the system
    trusts. `verify`: whether the server must prove itself. `token_file` goes before `token`, and is to be read again;
    `authorization` is a whole header for what is no token. `expires` is when credentials end by what their giver said
    (seconds since the epoch, None if nothing was said), `renewable` whether asking anew gives new ones. `identity` is
    whom we go as, in words. `files` are what it was all read from, but for the token's."""

    ca: str = ""
    verify: bool = True
    certificate: str = ""
    key: str = ""
    token: str = ""
    token_file: str = ""
    authorization: str = ""
    expires: float | None = None
    renewable: bool = False
    identity: str = "nobody"
    files: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.identity})"


class Access(Credentials, frozen=True, kw_only=True):
    """All that a client needs: where, and as whom. `ca_from` is where the CA came from, in words."""

    addresses: tuple[Address, ...]
    ca_from: str = "the system"

    def __repr__(self) -> str:
        return f"Access({', '.join(each.url for each in self.addresses)} as {self.identity})"

    @property
    def anonymous(self) -> bool:
        return not (self.certificate or self.token or self.token_file or self.authorization)


class Told(Credentials, frozen=True, kw_only=True, tag=True):
    """What a kubeconfig says, as the child tells it; `server` is "" if it has none."""

    server: str = ""
    server_name: str = ""
    proxy: str = ""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why a kubeconfig says nothing, in one line."""

    reason: str


ReadKubeconfig: TypeAlias = Callable[[str, Mapping[str, str]], Told]
"""What the kubeconfig at a path says, to a process with an environment. Raises SourceError."""


class Resolves(Protocol):
    """Who gives a client its Access."""

    def resolve(self) -> Access:
        """How things are now. May take seconds. Raises SourceError or UserError, in one line."""

    def changed(self) -> bool:
        """Whether `resolve` would look at something else than it did the last time. Takes no time."""


def read_kubeconfig(path: str, environ: Mapping[str, str], timeout: float = _CHILD_SECONDS) -> Told:
    """Ask the child process. Raises SourceError."""
    command = [sys.executable, "-P", "-c", _CHILD, str(Path(__file__).resolve().parents[3]), path]
    try:
        # A session of its own, so that a plugin that hangs ends with the child.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environ),
            start_new_session=True,
        )
    except OSError as error:
        raise SourceError(f"kubeconfig {path} could not be read: no process: {error.strerror}") from None
    with child:
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.terminate()  # it ends the plugin, and removes the files that may hold keys
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise SourceError(
                f"kubeconfig {path}: no credentials within {timeout:.0f} s: the exec plugin hangs"
            ) from None
    try:
        answer = msgspec.json.decode(out, type=Told | Failed)
    except ValueError:
        lines = err.decode(errors="replace").strip().splitlines()
        said = lines[-1] if lines else f"status {child.returncode}"
        raise SourceError(f"kubeconfig {path} could not be read: {said}") from None
    if isinstance(answer, Failed):
        raise SourceError(answer.reason)
    return answer


class Resolver:
    """Works out the Access for what the operator asked for, each time anew.

    `remembered` gives the endpoints of the Service default/kubernetes as far as they are known, each as "IP:port" with
    IPv6 in brackets; `read` asks what a kubeconfig says.
    """

    def __init__(
        self,
        api: ApiServer,
        *,
        environ: Mapping[str, str],
        remembered: Callable[[], Sequence[str]] = tuple,
        service_account: Path = SERVICE_ACCOUNT,
        read: ReadKubeconfig = read_kubeconfig,
    ) -> None:
        self._api = api
        self._environ = dict(environ)
        self._remembered = remembered
        self._service_account = service_account
        self._read = read
        self._seen: object = None
        self._files: tuple[str, ...] = (api.kubeconfig,) if api.kubeconfig else ()

    def resolve(self) -> Access:
        # What is looked at may change while it is read: it is the look before that counts.
        self._seen = self._look()
        access = self._resolve()
        if access.files != self._files:
            self._files = access.files
            self._seen = self._look()
        return access

    def changed(self) -> bool:
        return self._look() != self._seen

    def _look(self) -> object:
        return tuple(_signature(path) for path in self._files), self._endpoints()

    def _endpoints(self) -> tuple[str, ...]:
        """The remembered ones, where they count."""
        return () if self._api.kubeconfig or self._api.addresses else tuple(self._remembered())

    def _resolve(self) -> Access:
        if self._api.kubeconfig:
            return self._by_kubeconfig(self._read(self._api.kubeconfig, self._environ))
        if _has_account(self._service_account):
            return self._by_service_account()
        if not self._api.addresses:
            raise UserError(_NOTHING_TO_GO_BY)
        return Access(addresses=self._given())

    def _given(self, server_name: str = "", proxy: str = "") -> tuple[Address, ...]:
        """The operator's addresses."""
        return tuple(self._with_proxy(_address("--apiserver", url, server_name), proxy) for url in self._api.addresses)

    def _with_proxy(self, address: Address, proxy: str = "") -> Address:
        """`proxy` is the kubeconfig's, which goes before the environment's."""
        return msgspec.structs.replace(address, proxy=checked(proxy or proxy_for(address.url, self._environ)))

    def _by_kubeconfig(self, told: Told) -> Access:
        where = f"kubeconfig {self._api.kubeconfig}"
        addresses = self._given(told.server_name, told.proxy)
        if not addresses:
            if not told.server:
                raise SourceError(f"{where}: its cluster has no server; add one or give --apiserver URL")
            addresses = (self._with_proxy(_address(where, told.server, told.server_name), told.proxy),)
        return Access(
            addresses=addresses,
            ca=told.ca,
            ca_from=where if told.ca else "the system",
            verify=told.verify,
            certificate=told.certificate,
            key=told.key,
            token=told.token,
            token_file=told.token_file,
            authorization=told.authorization,
            expires=told.expires,
            renewable=told.renewable,
            identity=told.identity,
            files=told.files,
        )

    def _by_service_account(self) -> Access:
        ca = self._service_account / "ca.crt"
        try:
            text = ca.read_text()
        except OSError as error:
            raise SourceError(f"the service account's CA {ca} cannot be read: {error.strerror}") from None
        token = str(self._service_account / "token")
        return Access(
            addresses=self._given() or self._in_cluster(),
            ca=text,
            ca_from=str(ca),
            token_file=token,
            identity=f"the service account's token {token}",
            files=(str(ca),),
        )

    def _in_cluster(self) -> tuple[Address, ...]:
        host, port = self._environ.get(_HOST, ""), self._environ.get(_PORT, "")
        if not host or not port:
            raise UserError(f"the service account is here, but {_HOST} and {_PORT} are not set: give --apiserver URL")
        last = msgspec.structs.replace(
            _address(f"{_HOST} and {_PORT}", f"https://{_bracketed(host)}:{port}"), note=_LAST_RESORT
        )
        known = [
            _address("the EndpointSlice default/kubernetes", f"https://{endpoint}", host)
            for endpoint in self._endpoints()
        ]
        return tuple(self._with_proxy(address) for address in (*known, last))


def _address(whose: str, url: str, server_name: str = "") -> Address:
    """A checked URL. Without a scheme it is https. Raises UserError."""
    full = url if "://" in url else f"https://{url}"
    try:
        parts = urlsplit(full)
        port = parts.port
        parse_url(full)  # the connections' own idea of a URL
    except ValueError:
        raise UserError(f"{whose}: {url!r} is no URL; write https://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise UserError(f"{whose}: {url!r} is no URL of an API server; write https://HOST:PORT")
    return Address(full.rstrip("/"), server_name)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _has_account(service_account: Path) -> bool:
    return (service_account / "token").is_file()


def _signature(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is replaced or written; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
