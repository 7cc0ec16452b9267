"""The demo's stage: which pods there are and what runs in them, the manifests that say so, and the clients' tools.

Rules of this file: it sets up, changes and asks; it judges nothing and prints nothing but progress. The manifests are
those of deploy/demo, copied; a change to the cluster is a change to a copy, as the control plane would make it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

import yaml

from ebpflb.demo import prober, servers
from ebpflb.demo.cluster import Cluster, Place, Pod
from ebpflb.errors import EbpflbError, UserError

NAME = "ebpflb-demo"
DNS_ADDRESS = "10.96.0.10"

# Pods in the order in which their node numbers them, as the addresses in deploy/demo say.
PODS = (
    ("node1", "web-1"),
    ("node1", "dns"),
    ("node1", "client"),
    ("node2", "web-2"),
    ("node2", "mysql"),
)
READY_SECONDS = 30.0
COMMAND_SECONDS = 30.0
SILENCE_SECONDS = 10.0
LEAST_ANSWERS = 20


def manifest_directory() -> Path:
    """Where deploy/demo is: inside the installed package, or beside it in a checkout. Raises UserError."""
    package = Path(__file__).resolve().parents[1]
    for found in (package / "_deploy" / "demo", package.parent / "deploy" / "demo"):
        if found.is_dir():
            return found
    raise UserError(f"the demo's manifests are not beside {package}: install the package again, or run in a checkout")


def dns_records(documents: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The names of cluster DNS and their addresses: a Service's cluster IPs, or its endpoints if it is headless."""
    everything = list(documents)
    records = {}
    for service in everything:
        if service["kind"] == "Service":
            name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
            addresses = service["spec"].get("clusterIPs") or [service["spec"]["clusterIP"]]
            if addresses == ["None"]:
                addresses = [
                    address
                    for item in everything
                    if item["kind"] == "EndpointSlice"
                    and item["metadata"]["labels"]["kubernetes.io/service-name"] == name
                    for endpoint in item["endpoints"]
                    for address in endpoint["addresses"]
                ]
            records[f"{name}.{namespace}.svc.{servers.DOMAIN}"] = tuple(addresses)
    return records


class Stage:
    """A running demo cluster. `client` is a pod's shell on node1; `outside` is a machine that is no node. `patience`
    multiplies every time that is promised or waited for: an emulated machine is that many times slower."""

    def __init__(self, cluster: Cluster, patience: float = 1.0) -> None:
        self.cluster = cluster
        self.patience = patience
        self.source = manifest_directory()

    @property
    def client(self) -> Pod:
        return self.cluster.pods["client"]

    @property
    def outside(self) -> Place:
        return self.cluster.outside

    def address(self, pod: str) -> str:
        """A pod's IPv4 address."""
        return self.cluster.pods[pod].addresses.ipv4

    # ---- Set-up ----

    def set_up(self, progress: Callable[[str], None]) -> None:
        """Pods, servers, daemons: all of them ready when it returns. Raises EbpflbError."""
        progress("pods, and in them nginx twice, MariaDB and dnsmasq")
        for node, pod in PODS:
            self.cluster.add_pod(node, pod)
        documents = [
            document for path in sorted(self.source.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
        ]
        self._check_addresses(documents)
        servers.write_pod_view(self._directory("etc"), DNS_ADDRESS)
        with self._log("mysql").open("ab") as log:
            prepare = servers.prepare_mariadb(self._directory("mysql"))
            install = self.cluster.spawn(self.cluster.pods["mysql"], prepare, stdout=log, stderr=log)
        waits = [self.start_nginx("web-1"), self.start_nginx("web-2")]
        dns = self.cluster.pods["dns"]
        dnsmasq = servers.dnsmasq(self._directory("dns"), dns, dns_records(documents))
        waits.append(servers.start(self.cluster, dns, dnsmasq, self._log("dns")))

        progress("a daemon on each node; the first start on a machine compiles the BPF programs")
        for path in sorted(self.source.glob("*.yaml")):
            self.cluster.manifests.write_text(path.name, path.read_text())
        self.cluster.start_daemons(seconds=60 * self.patience)

        progress("until each server has served a client")
        if install.wait(READY_SECONDS * self.patience):
            raise EbpflbError(f"mariadb-install-db failed: {self._log('mysql').read_text(errors='replace')[-500:]}")
        mysql = self.cluster.pods["mysql"]
        waits.append(
            servers.start(self.cluster, mysql, servers.mariadb(self._directory("mysql"), mysql), self._log("mysql"))
        )
        for wait in waits:
            wait(READY_SECONDS * self.patience)

    def start_nginx(self, pod: str) -> Callable[[float], None]:
        """Start nginx in a pod; returns how to wait for it."""
        place = self.cluster.pods[pod]
        return servers.start(self.cluster, place, servers.nginx(self._directory(pod), place), self._log(pod))

    def _check_addresses(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """That every endpoint of the manifests is a pod of this stage, or will be."""
        pods = {address for pod in self.cluster.pods.values() for address in pod.addresses}
        for item in documents:
            for endpoint in item.get("endpoints", ()):
                if unknown := set(endpoint["addresses"]) - pods:
                    raise UserError(f"{item['metadata']['name']}: no pod of the demo has the address {unknown.pop()}")

    def _directory(self, name: str) -> Path:
        return self.cluster.directory / name

    def _log(self, name: str) -> Path:
        return self.cluster.logs / f"{name}.log"

    # ---- Changes ----

    def change_endpoints(self, file: str, change: Callable[[dict[str, Any]], None]) -> float:
        """Let `change` edit every EndpointSlice of a manifest file, and put the file in place by one rename; returns
        the monotonic time just before."""
        path = self.cluster.manifests.directory / file
        documents = list(yaml.safe_load_all(path.read_text()))
        for document in documents:
            if document["kind"] == "EndpointSlice":
                change(document)
        text = yaml.safe_dump_all(documents, sort_keys=False)
        before = time.monotonic()
        self.cluster.manifests.write_text(file, text)
        return before

    # ---- Clients ----

    def ask(self, where: Place, *argv: str, timeout: float = 20) -> CompletedProcess[str]:
        """Run a client; in a pod it sees the pod's resolv.conf. Raises EbpflbError if it takes too long."""
        words = servers.in_pod_view(self._directory("etc"), argv) if isinstance(where, Pod) else argv
        try:
            return self.cluster.run(where, words, timeout * self.patience)
        except TimeoutExpired:
            raise EbpflbError(f"{argv[0]} had no answer after {timeout * self.patience:.0f} s") from None

    def probe(self, where: Place, url: str) -> Probe:
        """Ask a URL without end, until the Probe is stopped."""
        return Probe(self, where, url)

    def routes(self, node: str, service: str) -> list[dict[str, Any]]:
        """`dump` of one Service's routes, as items."""
        done = self.cluster.ebpflb(
            node,
            *("dump", "routes", "--service", service, "-o", "json", *self.cluster.target(node)),
            timeout=COMMAND_SECONDS * self.patience,
        )
        if done.returncode not in (0, 4):
            raise EbpflbError(f"dump: {done.stderr.strip()}")
        return list(json.loads(done.stdout)["items"]) if done.stdout.strip() else []


class Probe:
    """A client that keeps asking; see `prober`."""

    def __init__(self, stage: Stage, where: Place, url: str) -> None:
        self._patience = stage.patience
        self._file = stage.cluster.logs / f"probe-{where.name}-{time.monotonic_ns()}.log"
        with self._file.open("wb") as file:
            argv = (sys.executable, "-I", prober.__file__, url)
            self._process = stage.cluster.spawn(where, argv, stdout=file, stderr=file)

    def answers(self) -> list[tuple[float, str, str]]:
        """Everything so far: when (monotonic seconds), `ok` or `failed`, and the pod that answered or why not."""
        lines = (line.split(" ", 2) for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n"))
        return [(float(words[0]), words[1], words[2].strip()) for words in lines]

    def wait(self, number: int) -> None:
        """Return once this many more answers, good or bad, have come; a slow machine gives that many times fewer.
        Raises EbpflbError if they do not."""
        wanted = len(self.answers()) + max(LEAST_ANSWERS, round(number / self._patience))
        deadline = time.monotonic() + SILENCE_SECONDS * self._patience
        while len(self.answers()) < wanted:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise EbpflbError(f"the client that keeps asking fell silent: {self._file.read_text()[-200:]}")
            time.sleep(0.005)  # the interval at which it is looked at

    def stop(self) -> list[tuple[float, str, str]]:
        """Everything that came."""
        self._process.kill()
        self._process.wait()
        return self.answers()
