"""kube-proxy and ebpflb one after the other beside the same API server, in the same namespace.

Rules of this file: everybody is measured by the same means, a client that connects to one Service all the time: the
first sync is over when its first connection comes about (all three programs write everything in one piece), a change
has arrived when the other backend answers. kube-proxy runs as it is shipped, but for JSON instead of protobuf, which
our server does not speak, and for kernel settings, which are not its to change here. It is only run if it is there.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from bench.clusters import PORT, cluster_ip
from bench.daemon import memory
from bench.lab import CHECKOUT, Lab, ahead
from bench.orders import LIVE, ApiServer, Change
from bench.plane import ENDPOINTS
from bench.prober import Reached
from bench.report import Figure
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.demo.daemon import environment
from ebpflb.errors import EbpflbError

# kube-proxy syncs at most once a second: each change finds it at rest.
_REST = 2.5


def beside(
    lab: Lab, services: int, changes: int, kube_proxy: Path | None, say: Callable[[str], None]
) -> Iterator[Figure]:
    """All figures of this file."""
    namespace = f"{lab.name}-beside"
    namespaces.create(namespace)
    addresses = [f"addr add {address}/24 dev eth0" for address in LIVE]
    namespaces.ip(
        namespace,
        [
            "link add eth0 type veth peer name far",
            *addresses,
            "link set eth0 up",
            "link set far up",
            "route add default dev eth0",
        ],
    )
    size = f"{services:,} Services × {ENDPOINTS}"
    who = ["ebpflb"] if kube_proxy is None else ["ebpflb", "iptables", "nftables"]
    with ApiServer(namespace, lab.directory, services, ENDPOINTS) as server, ahead(server.pid):
        for name in who:
            say(f"{name} with {services} Services")
            words = name if name == "ebpflb" else f"kube-proxy, {name}"
            begin = time.monotonic()
            with (
                _follower(lab, namespace, services) as follower,
                _proxy(lab, namespace, server, name, kube_proxy) as pid,
            ):
                first = follower()
                yield Figure(
                    f"beside.first.{name}", f"exec to the first connection, {words}, {size}", first.at - begin, "s"
                )
                taken, backend = [], first.backend
                for _ in range(changes):
                    time.sleep(_REST)
                    backend = next(each for each in LIVE if each != backend)
                    written = server.do(Change(services, backend)).at
                    reached = follower()
                    if reached.backend != backend:
                        raise EbpflbError(f"{reached.backend} answers in place of {backend}")
                    taken.append((reached.at - written) * 1000)
                what = f"a slice changes: bytes written to the other backend answers, {words}, {size}"
                yield Figure(
                    f"beside.change.{name}",
                    what,
                    statistics.median(taken),
                    "ms",
                    tuple(taken),
                    f"most {max(taken):.1f} ms",
                )
                yield Figure(f"beside.rss.{name}", f"resident, {words}, {size}", memory(pid)["VmRSS"] / 1024, "MB")


@contextmanager
def _follower(lab: Lab, namespace: str, services: int) -> Iterator[Callable[[], Reached]]:
    """A client of the Service after the last; what is given waits for the next backend that answers."""
    cgroup = lab.cgroup / "prober"
    cgroup.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "bench.prober", "follow", cluster_ip(services), str(PORT), *LIVE]
    process = namespaces.spawn(namespace, cgroup, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT)
    out = process.stdout
    assert out is not None

    def reached() -> Reached:
        line = out.readline()
        if not line:
            raise EbpflbError("the client ended")
        return msgspec.json.decode(line, type=Reached)

    try:
        if not out.readline():
            raise EbpflbError("the client did not begin")
        yield reached
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _proxy(lab: Lab, namespace: str, server: ApiServer, name: str, kube_proxy: Path | None) -> Iterator[int]:
    """The process, which leaves nothing behind."""
    with ExitStack() as stack:
        if name == "ebpflb":
            bpffs = lab.bpffs()
            argv = [sys.executable, "-m", "ebpflb", "run", "--kubeconfig", str(server.kubeconfig)]
            argv += ["--node-name", "node-0", "--bpffs", str(bpffs), "--cgroup", str(lab.cgroup)]
            argv += ["--state-dir", str(lab.directory / "beside-state")]
            stack.callback(_clean, lab, namespace, bpffs)
        else:
            config = lab.directory / f"kube-proxy-{name}.json"
            config.write_text(_configuration(name, server))
            argv = [str(kube_proxy), "--config", str(config)]
            stack.callback(namespaces.nft, namespace, ["flush ruleset"])
        log = stack.enter_context((lab.directory / "beside.log").open("ab"))
        process = namespaces.spawn(namespace, lab.cgroup, argv, stdout=log, stderr=log, env=environment())
        stack.callback(_end, process)
        stack.enter_context(ahead(process.pid))
        yield process.pid


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _clean(lab: Lab, namespace: str, bpffs: Path) -> None:
    with namespaces.inside(namespace):
        BpfDataplane(bpffs, lab.cgroup).cleanup()


def _configuration(mode: str, server: ApiServer) -> str:
    untouched = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    json_only = {"contentType": "application/json", "acceptContentTypes": "application/json"}
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode,
            "hostnameOverride": "node-0",
            "clientConnection": {"kubeconfig": str(server.kubeconfig), **json_only},
            "conntrack": untouched,
        }
    )
