"""Two nodes with pods whose daemons have the real API server for their source, and nothing else.

    192.168.0.1 (the fabric): etcd, kube-apiserver, kube-controller-manager
    node1 (zone a)  a1 a2 and sa         node2 (zone b)  b1 b2 and sb

Rules of this file: daemons run under the service account and the role that ebpflb ships. A pod's place and its Pod
object have the same name and addresses; places stay, objects come and go. Servers answer on TARGET in each place.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ebpflb.demo import network
from ebpflb.demo.cluster import Cluster, Place
from ebpflb.demo.daemon import environment
from ebpflb.demo.network import POD_CIDRS
from tests.api import accounts
from tests.api.client import Api, Object
from tests.api.control_plane import KUBERNETES_IP, ControlPlane, User, write_kubeconfig
from tests.api.objects import node, pod, put_node, put_pod
from tests.box.clients import Answer, Clients, Nothing, Target
from tests.box.servers import Servers
from tests.box.sockets import Sockets

T = TypeVar("T")

TARGET = 8080
ZONES = {"node1": "a", "node2": "b"}
PODS = {"node1": ("a1", "a2", "sa"), "node2": ("b1", "b2", "sb")}
PATIENCE = 45.0
LONG = 15.0  # for an answer that must come, though the machine may stand still meanwhile
SOON = 0.3  # for an answer, where one that does not come is asked for again
ACCOUNT = Path("/run/secrets/kubernetes.io/serviceaccount")  # behind /var/run, where a pod has it


class ApiCluster(Cluster):
    """A cluster whose daemons are told by the API server."""

    kubeconfig = Path("/nonexistent")

    def daemon_options(self, node: str) -> tuple[str, ...]:
        return (
            *("--kubeconfig", str(self.kubeconfig), "--node-name", node, *self.target(node)),
            *("--cluster-cidr", ",".join(POD_CIDRS), "--state-dir", str(self.state(node)), *self.options),
        )

    def state(self, node: str) -> Path:
        """Where a node's daemon remembers."""
        return self.directory / "state" / node


class Nodes:
    """See the top of this file."""

    def __init__(self, programs: dict[str, Path]) -> None:
        self.cluster = ApiCluster(tuple(f"{name}:{zone}" for name, zone in ZONES.items()))
        self._programs = programs
        self._stack = ExitStack()

    def __enter__(self) -> Nodes:
        with ExitStack() as stack:
            cluster = self.cluster
            stack.enter_context(cluster)
            self.control = stack.enter_context(ControlPlane(self._programs, namespace=cluster.fabric.namespace))
            self.api: Api = self.control.api
            sockets = stack.enter_context(Sockets(cluster))
            self.servers = stack.enter_context(Servers(sockets))
            self.clients = Clients(sockets)
            for name, zone in ZONES.items():
                for each in PODS[name]:
                    cluster.add_pod(name, each, sandboxed=each.startswith("s"))
                    self.servers.serve(self.place(each), TARGET)
                self._put_node(name, zone)
            # What the network brings to a node: addresses of load balancers, and of Services from outside.
            cluster.route("node1", "5.6.7.0/24", "10.96.0.0/16")
            account = accounts.deploy(self.api)
            self.token = cluster.directory / "token"
            self.token.write_text(account.token)
            cluster.kubeconfig = self.kubeconfig("daemon")
            cluster.start_daemons()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _put_node(self, name: str, zone: str) -> None:
        found = node(name, *self.place(name).addresses, zone=zone)
        found["spec"] = {"podCIDRs": list(network.pod_cidrs(self.cluster.nodes[name].index))}
        found["spec"]["podCIDR"] = found["spec"]["podCIDRs"][0]
        put_node(self.api, found)

    def kubeconfig(self, name: str, user: User | None = None, **more: object) -> Path:
        """A kubeconfig for a daemon; of the shipped account, whose token is in a file, unless `user` is given."""
        entry: Mapping[str, object] = {"token": user.token} if user else {"tokenFile": str(self.token)}
        server, bundle = str(more.get("server", self.control.url)), more.get("bundle", self.control.authority.bundle)
        return write_kubeconfig(self.cluster.directory / f"{name}.kubeconfig", server, Path(str(bundle)), entry)

    # ---- Where things are ----

    def place(self, name: str) -> Place:
        """A node, a pod or the outside client."""
        if name == "outside":
            return self.cluster.outside
        return self.cluster.nodes.get(name) or self.cluster.pods[name]

    def pod(self, namespace: str, name: str, app: str = "web", ready: bool = True) -> Object:
        """The Pod object of the place `name`, made here and now."""
        home = self.cluster.pods[name]
        made = pod(namespace, name, app, home.node.name, *home.addresses, ready=ready)
        put_pod(self.api, made)
        return made

    def cluster_ip(self, namespace: str, name: str, family: int = 0, port: int = 80) -> Target:
        """A Service's address: its first, or its second family's."""
        return Target(self.api.get("Service", namespace, name)["spec"]["clusterIPs"][family], port)

    def node_port(self, namespace: str, name: str, at: str) -> Target:
        """A Service's port on a node."""
        port = self.api.get("Service", namespace, name)["spec"]["ports"][0]["nodePort"]
        return Target(self.place(at).addresses.ipv4, port)

    # ---- Who answers ----

    def ask(self, client: str, to: Target, patience: float = LONG) -> Answer | Nothing:
        """One connection."""
        return self.clients.ask(self.place(client), to, "TCP", patience=patience)

    def who(self, client: str, to: Target, tries: int = 40, patience: float = LONG) -> set[str]:
        """Who answers, by name; what comes instead counts as a name."""
        found = set()
        for _ in range(tries):
            answer = self.ask(client, to, patience)
            found.add(answer.server if isinstance(answer, Answer) else answer.how)
            if isinstance(answer, Nothing) and answer.how == "silence":
                break
        return found

    def _now(self, client: str, to: Target, tries: int = 40) -> set[str]:
        """As `who`, for whoever asks again."""
        return self.who(client, to, tries, SOON)

    def _answers(self, server: str, client: str, to: Target) -> bool:
        return server in self._now(client, to)

    def until_reaches(self, client: str, to: Target, *servers: str, seconds: float = PATIENCE) -> None:
        """Until all of these answer, and nobody and nothing else does."""
        until(f"{client} -> {to} reaches {servers}", lambda: self._now(client, to), set(servers), seconds)

    def until_answers(self, client: str, to: Target, how: str, seconds: float = PATIENCE) -> None:
        """Until this comes instead of an answer ("refused", "silence")."""
        until(f"{client} -> {to} is {how}", lambda: self._now(client, to, 3), {how}, seconds)

    def until_all(self, asked: Iterable[tuple[str, Target]], server: str, *, answers: bool) -> None:
        """Until this server answers all of these clients, or none of them any more."""
        for client, to in asked:
            what = f"{client} -> {to} {'reaches' if answers else 'is lost to'} {server}"
            until(what, partial(self._answers, server, client, to), answers)

    def until_lost(self, client: str, to: Target, server: str) -> None:
        """Until this one answers no more, whatever comes instead."""
        until(f"{client} -> {to} is lost to {server}", lambda: server in self._now(client, to, 2), False)

    # ---- Daemons ----

    def status(self, at: str) -> dict[str, Any]:
        """What a node's daemon says of itself; {} if there is none."""
        target = ("--bpffs", str(self.cluster.pins(at)))
        said = self.cluster.ebpflb(at, "status", *target, "-o", "json").stdout
        found: dict[str, Any] = json.loads(said)["items"][0] if said else {}
        return found

    def source(self, at: str) -> dict[str, Any]:
        """How its API server's source does."""
        sources: list[dict[str, Any]] = self.status(at).get("sources", [])
        return next((each for each in sources if each["name"] == "kubernetes"), {})

    def until_source(self, at: str, state: str) -> None:
        """Until it is in this state. A daemon's back-off goes up to half a minute."""
        until(f"{at}'s source is {state}", lambda: str(self.source(at).get("state")), state, 60)

    def fetch(self, at: str, url: str) -> tuple[int, str]:
        """HTTP status and body of a URL, asked on a node."""
        argv = ["curl", "-gsS", "--max-time", "30", "-w", "\n%{http_code}", url]
        body, _, status = self.cluster.run(self.place(at), argv).stdout.rpartition("\n")
        return int(status or 0), body

    def log(self, at: str) -> str:
        """All that a node's daemons have said."""
        return self.cluster.log(at).read_text(errors="replace")

    @contextmanager
    def in_a_pod(self, at: str, *options: str) -> Iterator[Path]:
        """A node's daemon as a pod's process finds itself: no kubeconfig, but its service account, and an environment
        that names the API server by its Service. The block gets its log."""
        account = self.cluster.directory / "account"
        account.mkdir(exist_ok=True)
        shutil.copy(self.token, account / "token")
        shutil.copy(self.control.authority.bundle, account / "ca.crt")
        variables = {"KUBERNETES_SERVICE_HOST": KUBERNETES_IP, "KUBERNETES_SERVICE_PORT": "443", **environment()}
        argv = [sys.executable, "-m", "ebpflb", "run", "--node-name", at, *self.cluster.target(at)]
        argv += ["--cluster-cidr", ",".join(POD_CIDRS), *options]
        log = self.cluster.directory / "in-a-pod.log"
        ACCOUNT.mkdir(parents=True, exist_ok=True)  # empty but for that process
        enter = ["unshare", "--mount", "sh", "-c", f'mount --bind "$0" {ACCOUNT} && exec "$@"', str(account)]
        try:
            with log.open("wb") as output:
                process = self.cluster.spawn(
                    self.place(at), [*enter, *argv], stdout=output, stderr=output, env=variables
                )
            try:
                yield log
            finally:
                process.kill()
                process.wait()
        finally:
            with suppress(OSError):  # somebody else's, too
                os.removedirs(ACCOUNT)

    def reboot(self, at: str) -> None:
        """The daemon goes, and with it everything that it has in the kernel; only its files stay."""
        daemon = self.cluster.nodes[at].daemon
        if daemon is not None:
            daemon.kill()
        done = self.cluster.ebpflb(at, "cleanup", *self.cluster.target(at))
        assert done.returncode == 0, done

    @contextmanager
    def mended(self) -> Iterator[None]:
        """Whatever the block does to daemons and API server is undone after it."""
        try:
            yield
        finally:
            if not self.control.apiserver.running:
                self.control.start_apiserver()
            self.cluster.start_daemons()


def until(what: str, probe: Callable[[], T], wanted: T, seconds: float = PATIENCE) -> None:
    """Until `probe` gives what is wanted."""
    deadline = time.monotonic() + seconds
    while (found := probe()) != wanted:
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}; last: {found!r}")
        time.sleep(0.01)
