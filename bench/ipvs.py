"""What the IPVS dataplane costs: N Services of M endpoints cold, and one change, beside `ipvsadm --restore` of the same
virtual servers and destinations.

    python -m tests.vm.machine -- .venv/bin/python -m bench.ipvs --services 10000 --endpoints 10

Rules of this file: it runs in a network namespace of its own, on a kernel that has IPVS; an emulated machine is some
ten to thirty times slower than a real one, so that the ratio says more than the seconds. Ours does more than ipvsadm:
ipsets, addresses, rules, and it reads the kernel first. Figures go to standard output as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from ebpflb.dataplane.ipvs.dataplane import IpvsDataplane
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.demo import namespaces
from ebpflb.model import Protocol
from ebpflb.routes import (
    Backend,
    Frontend,
    Key,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
    backend_order,
)

CHANGES = 5
_NODE = ("127.0.0.1", "::1")


def address(network: int, number: int) -> str:
    return f"{network}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def table_of(services: int, endpoints: int) -> RouteTable:
    """ClusterIPs over distinct endpoints."""
    rows: dict[Key, Route] = {}
    for at in range(services):
        frontend = Frontend(address(172, (16 << 16) + at), 80, Protocol.TCP)
        found = [Backend(address(10, at * endpoints + each), 8080) for each in range(endpoints)]
        backends = tuple(sorted(found, key=backend_order))
        name = ServicePortName("default", f"svc-{at}", "http")
        for scope, masquerade in ((Scope.INTERNAL, Masquerade.NOT_POD), (Scope.EXTERNAL, Masquerade.ALWAYS)):
            rows[frontend, scope] = Route(name, Kind.CLUSTER_IP, Verdict.FORWARD, backends, masquerade)
    return RouteTable(rows, Locality(_NODE, ("10.0.0.0/8",)))


def less_one(table: RouteTable, at: int) -> RouteTable:
    """One endpoint of one Service gone."""
    frontend = Frontend(address(172, (16 << 16) + at), 80, Protocol.TCP)
    put = {}
    for scope in Scope:
        route = table[frontend, scope]
        put[frontend, scope] = msgspec.structs.replace(route, backends=route.backends[:-1])
    return table.evolve(put)


def progress(what: str, seconds: float) -> None:
    print(f"{what}: {seconds:.3f} s", file=sys.stderr, flush=True)


def timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def measure(namespace: str, services: int, endpoints: int) -> dict[str, object]:
    table = table_of(services, endpoints)
    with namespaces.inside(namespace):
        dataplane = IpvsDataplane(IpvsOptions(), variant="nft")
        start = timed(dataplane.start)
        cpu = time.process_time()
        began = time.monotonic()
        report = dataplane.sync(table)
        cold = time.monotonic() - began
        assert report.complete, report.problems
        cold_cpu = time.process_time() - cpu
        progress("cold", cold)
        changes = []
        for at in range(CHANGES):
            table = less_one(table, at * (services // CHANGES))
            changes.append(timed(lambda table=table: dataplane.sync(table)))  # type: ignore[misc]
        progress("one change", statistics.median(changes))
        audit = timed(dataplane.audit)
        progress("audit", audit)
        figures: dict[str, object] = {
            "services": services,
            "endpoints": endpoints,
            "rows": report.written,
            "startSeconds": round(start, 3),
            "coldSeconds": round(cold, 3),
            "coldCpuSeconds": round(cold_cpu, 3),
            "oneChangeMilliseconds": round(1000 * statistics.median(changes), 2),
            "auditSeconds": round(audit, 3),
            "rssMegabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
        if shutil.which("ipvsadm"):
            text = subprocess.run(["ipvsadm", "-Sn"], capture_output=True, check=True).stdout
            dataplane.cleanup()
            restore = timed(lambda: subprocess.run(["ipvsadm", "-R"], input=text, check=True))
            figures |= {"ipvsadmSeconds": round(restore, 3), "coldRatio": round(cold / restore, 2)}
            subprocess.run(["ipvsadm", "-C"], check=True)  # of this namespace alone
        else:
            dataplane.cleanup()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ipvs")
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--endpoints", type=int, default=10)
    asked = parser.parse_args()
    namespace = f"ebpflb-bench-{os.getpid()}"
    namespaces.create(namespace)
    try:
        print(json.dumps(measure(namespace, asked.services, asked.endpoints), indent=2))
    finally:
        namespaces.delete(namespace)


if __name__ == "__main__":
    main()
