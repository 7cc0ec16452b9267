"""etcd, kube-apiserver and kube-controller-manager, on this machine's loopback or in a network namespace.

Rules of this file: ports are the kernel's choice, data lies in memory, each program's output in `logs`; whatever was
started is gone with this object. A program can be stopped, killed and started again, and the API server has the same
port and certificates ever after, as a real one would.

The `kubernetes` Service's endpoint is ADVERTISED at that port: an address of the box's fabric, which is where the API
server is when it runs in that namespace.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import yaml

from ebpflb.demo.namespaces import path_of
from tests.api.authority import Authority, Identity, signing_key
from tests.api.client import Api, Object, inside

T = TypeVar("T")

LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"
ADVERTISED = "192.168.0.1"  # tests.world's nodes are there, too
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
KUBERNETES_IP = "10.96.0.1"
HOSTS = (LOOPBACK, ADVERTISED, KUBERNETES_IP, "192.168.0.2", "localhost", "kubernetes.default.svc")

ETCD_TRANSACTION = 128  # operations; etcd's limit
PATIENCE = 60.0  # seconds for a program to be there; far more than it takes
CONTROLLERS = (
    "endpointslice-controller",
    "endpointslice-mirroring-controller",
    "namespace-controller",
)


class User(NamedTuple):
    """Somebody whom the API server knows by a token."""

    name: str
    token: str
    group: str = ""


ADMIN = User("admin", "admin-token", "system:masters")
NOBODY = User("nobody", "nobody-token")  # is known, and may do nothing
_CONTROLLERS = User("controllers", "controllers-token", "system:masters")


def until(what: str, probe: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The first true answer of `probe`."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}; last seen: {answer!r}"
        time.sleep(0.005)
    return answer


class Program:
    """One of them: its process while it runs, and its output, of all its lives."""

    def __init__(self, name: str, argv: Sequence[str], log: Path, namespace: str = "") -> None:
        self.name = name
        self.log = log
        # Each of these replaces itself by what follows, so that the pid is the program's. None outlives the tests.
        inside = ["nsenter", f"--net={path_of(namespace)}", "--"] if namespace else []
        self.argv = [*inside, "setpriv", "--pdeathsig", "KILL", "--", *argv]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            # In a process group of its own: Ctrl-C ends the tests first, whose clean-up still needs the API server.
            self._process = subprocess.Popen(
                self.argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, process_group=0
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        """SIGSTOP makes it hang with its connections open, SIGCONT ends that."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """At once, and wait until it is gone; one that does not run is none."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def tail(self, lines: int = 200) -> str:
        """The last of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until it answers."""

        def probe() -> bool:
            assert self.running, "it has ended"
            return ready()

        try:
            until("it is ready", probe)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {error}\n{self.tail(20)}") from None


class ControlPlane:
    """See the top of this file. `programs` are paths by name; without a kube-controller-manager among them nothing
    makes EndpointSlices of Pods. `options` are further ones of the API server. In a `namespace` (one that has the
    address ADVERTISED) it listens on all addresses."""

    def __init__(self, programs: dict[str, Path], *, options: Sequence[str] = (), namespace: str = "") -> None:
        self._paths = programs
        self._options = tuple(options)
        self._namespace = namespace
        self.address = ADVERTISED if namespace else LOOPBACK
        with inside(namespace):
            self._etcd_port, self._etcd_peer_port, self.port = _free_ports(3)

    def __enter__(self) -> ControlPlane:
        with ExitStack() as stack:
            _sweep()
            made = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=_MEMORY)
            self.directory = Path(stack.enter_context(made))
            stack.callback(self._kill_all)
            self._make_files()
            self.etcd = self._program("etcd", self._etcd_options())
            self.apiserver = self._program("kube-apiserver", self._apiserver_options())
            self.controllers = self._program("kube-controller-manager", self._controller_options())
            self.etcd.start()
            self.etcd.wait(self._etcd_answers)
            self.api = stack.enter_context(self.api_of(ADMIN))
            self.start_apiserver()
            until("the server's own Service has its endpoint", lambda: self.api.list("EndpointSlice", "default"))
            if "kube-controller-manager" in self._paths:
                self.controllers.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # ---- Who may speak to it ----

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    def api_of(self, user: User, *, port: int = 0) -> Api:
        """A client that is this user, directly or through what listens on another port."""
        return Api(self.address, port or self.port, self.authority.bundle, user.token, self._namespace)

    def kubeconfig(
        self, path: Path, user: User = ADMIN, *, server: str = "", entry: Mapping[str, object] | None = None
    ) -> Path:
        """A kubeconfig by which `user` reaches `server` (a URL); `entry` has the fields of another user entry."""
        return write_kubeconfig(path, server or self.url, self.authority.bundle, entry or {"token": user.token})

    def know(self, *users: User) -> None:
        """The API server knows these users, too, by their tokens, from its next start on."""
        with self._tokens.open("a") as file:
            for user in users:
                file.write(f'{user.token},{user.name},{user.name},"{user.group}"\n')

    # ---- What happens to it ----

    def start_apiserver(self) -> None:
        """Start it, and wait until it has all it serves. Controllers that run start anew: their back-off, of up to a
        minute, is not what anybody here waits for."""
        self.apiserver.start()
        self.apiserver.wait(self._apiserver_answers)
        if self.controllers.running:
            self.controllers.kill()
            self.controllers.start()

    def compact(self) -> None:
        """etcd forgets every revision before now, and the API server's watch caches go with its process: so starts one
        that can answer no watch from before."""
        self.etcd_call("/v3/kv/compaction", {"revision": str(self.revision()), "physical": True})

    def revision(self) -> int:
        """etcd's newest."""
        status = self.etcd_call("/v3/maintenance/status", {})
        return int(status["header"]["revision"])

    def etcd_call(self, path: str, body: dict[str, object]) -> dict[str, dict[str, str]]:
        """One call of etcd's JSON gateway."""
        with self._etcd() as etcd:
            return etcd(path, body)

    @contextmanager
    def _etcd(self) -> Iterator[Callable[[str, dict[str, object]], dict[str, Any]]]:
        """Calls of etcd's JSON gateway by one connection."""
        connection = http.client.HTTPConnection(LOOPBACK, self._etcd_port, timeout=20)

        def call(path: str, body: dict[str, object]) -> dict[str, Any]:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            found: dict[str, Any] = json.loads(answer.read())
            assert answer.status == 200, (path, found)
            return found

        try:
            with inside(self._namespace):
                connection.connect()
            yield call
        finally:
            connection.close()

    def load(self, resource: str, objects: Iterable[Object]) -> None:
        """Store objects of `resource` ("services/specs") behind the API server's back, thousands a second. They must
        have all that it would have defaulted."""
        for batch in batches(objects, ETCD_TRANSACTION):
            self.etcd_call("/v3/kv/txn", {"success": [{"request_put": _put(resource, each)} for each in batch]})

    def unload(self, resource: str, namespace: str) -> None:
        """Delete all objects of `resource` in a namespace in the same way, one by one: a watch that ends amid many of
        one revision, as no API server writes them, could not go on where it was."""
        start, end = f"/registry/{resource}/{namespace}/", f"/registry/{resource}/{namespace}0"
        with self._etcd() as etcd:
            found = etcd("/v3/kv/range", {"key": _base64(start), "range_end": _base64(end), "keys_only": True})
            for each in found.get("kvs", ()):
                etcd("/v3/kv/deleterange", {"key": each["key"]})

    def save(self) -> Path:
        """A copy of all data, for `restore`; the API server sees a pause."""
        self.etcd.kill()
        copy = self.directory / f"saved-{next(_numbers)}"
        shutil.copytree(self._data, copy)
        self.etcd.start()
        self.etcd.wait(self._etcd_answers)
        self.apiserver.wait(self._apiserver_answers)
        return copy

    def restore(self, saved: Path) -> int:
        """All is again as it was when `saved` was made, resource versions too; the API server starts anew. Gives the
        revision that etcd went back to, from which it counts on at once."""
        self.apiserver.kill()
        self.etcd.kill()
        shutil.rmtree(self._data)
        shutil.copytree(saved, self._data)
        self.etcd.start()
        self.etcd.wait(self._etcd_answers)
        revision = self.revision()
        self.start_apiserver()
        return revision

    # ---- Its parts ----

    @property
    def programs(self) -> tuple[Program, ...]:
        return (self.etcd, self.apiserver, self.controllers)

    def _program(self, name: str, options: Sequence[str]) -> Program:
        argv = [str(self._paths.get(name, name)), *options]
        return Program(name, argv, self.directory / f"{name}.log", self._namespace)

    def _kill_all(self) -> None:
        for name in ("controllers", "apiserver", "etcd"):
            program = getattr(self, name, None)
            if isinstance(program, Program):
                program.kill()

    def _make_files(self) -> None:
        self._data = self.directory / "etcd"
        self.authority = Authority(self.directory)
        self.identity: Identity = self.authority.server("apiserver", HOSTS)
        self._signing_key = signing_key(self.directory / "service-accounts.key")
        self._tokens = self.directory / "tokens.csv"
        self._tokens.touch()
        self.know(ADMIN, NOBODY, _CONTROLLERS)

    def _etcd_options(self) -> list[str]:
        client, peer = f"http://{LOOPBACK}:{self._etcd_port}", f"http://{LOOPBACK}:{self._etcd_peer_port}"
        return [
            f"--data-dir={self._data}", f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync", "--log-level=warn", "--logger=zap",
        ]  # fmt: skip

    def _apiserver_options(self) -> list[str]:
        return [
            f"--etcd-servers=http://{LOOPBACK}:{self._etcd_port}", "--etcd-compaction-interval=0",
            f"--bind-address={ANY if self._namespace else LOOPBACK}", f"--secure-port={self.port}",
            f"--advertise-address={ADVERTISED}",
            f"--tls-cert-file={self.identity.certificate}", f"--tls-private-key-file={self.identity.key}",
            f"--client-ca-file={self.authority.bundle}", f"--token-auth-file={self._tokens}",
            "--authorization-mode=RBAC", f"--service-cluster-ip-range={','.join(SERVICE_CIDRS)}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._signing_key}",
            f"--service-account-signing-key-file={self._signing_key}",
            "--disable-admission-plugins=ServiceAccount",  # no controller here makes the default ones
            "--allow-privileged", "--profiling=false", "--shutdown-delay-duration=0", "--v=0", *self._options,
        ]  # fmt: skip

    def _controller_options(self) -> list[str]:
        kubeconfig = self.kubeconfig(self.directory / "controllers.kubeconfig", _CONTROLLERS)
        return [
            f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0", "--profiling=false",
            f"--controllers={','.join(CONTROLLERS)}", "--kube-api-qps=1000", "--kube-api-burst=2000",
            f"--service-account-private-key-file={self._signing_key}", "--v=0",
        ]  # fmt: skip

    def _etcd_answers(self) -> bool:
        with suppress(OSError, http.client.HTTPException, AssertionError):
            self.etcd_call("/v3/maintenance/status", {})
            return True
        return False

    def _apiserver_answers(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return self.api.raw("GET", "/readyz").status == 200
        return False


def write_kubeconfig(path: Path, server: str, bundle: Path, user: Mapping[str, object]) -> Path:
    """A kubeconfig of one context; `user` has the fields of its user entry."""
    cluster = {"server": server, "certificate-authority": str(bundle)}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "user", "user": dict(user)}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
        "current-context": "test",
    }
    path.write_text(yaml.safe_dump(document))
    return path


_numbers = itertools.count(1)
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
_PREFIX = "ebpflb-api-"


def _sweep() -> None:
    """Remove what processes left that were killed: their data would stay in memory."""
    for directory in Path(_MEMORY).glob(f"{_PREFIX}*-*"):
        if not Path("/proc", directory.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(directory, ignore_errors=True)


def batches(objects: Iterable[Object], size: int) -> Iterator[list[Object]]:
    """Lists of at most `size` of them."""
    rest = iter(objects)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _put(resource: str, found: Object) -> dict[str, str]:
    metadata = found["metadata"]
    own = {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z", **metadata}
    key = f"/registry/{resource}/{metadata['namespace']}/{metadata['name']}"
    return {"key": _base64(key), "value": _base64(json.dumps({**found, "metadata": own}))}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has now; these programs cannot be told to take any. The kernel gives them to nobody who asks
    for some port or other: whoever is killed here finds his own free when he comes back."""
    least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(least // 2, least), least // 2):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} ports are free below {least}")
