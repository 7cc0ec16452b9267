"""Connections and round trips through both paths, each divided by the direct way.

Rules of this file: client and server on one CPU, everything else is left to the other; all variants one after another
in each round, so that what drifts drifts for all. `direct` is measured twice: their ratio is the control, and says how
far the others can be believed. The direct way runs between namespaces that have no program of ours.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.clusters import bytes_of, cluster_ip, endpoint_slice, service
from bench.lab import COPIES, PORT, SERVER, Lab, crr_binary
from bench.report import Figure, middle, quartile_range
from ebpflb.dataplane.bpf.dataplane import BpfDataplane
from ebpflb.demo import namespaces
from ebpflb.demo.daemon import Daemon
from ebpflb.errors import EbpflbError

CPU = "0"
VIP, VIP_PORT = cluster_ip(0), 80


class Variant(NamedTuple):
    """One way from client to server. `served`: the client's sockets are in the cgroup; `copy`: whose node is passed."""

    name: str
    copy: str
    served: bool
    address: str
    port: int


DIRECT = Variant("direct", "plain", False, SERVER, PORT)
AGAIN = Variant("control", "plain", False, SERVER, PORT)
SOCKET = Variant("socket", "served", True, VIP, VIP_PORT)
PACKET = Variant("packet", "served", False, VIP, VIP_PORT)
ALONE = Variant("socket-alone", "plain", True, VIP, VIP_PORT)
PASSING = Variant("passing", "served", False, SERVER, PORT)
AROUND = Variant("packet-around", "around", False, VIP, VIP_PORT)
XDP = Variant("packet-xdp", "xdp", False, VIP, VIP_PORT)
OPTIONS = {
    "served": ["--cluster-cidr", "10.200.0.0/16"],
    "around": ["--cluster-cidr", "10.200.0.0/16", "--pod-path", "redirect"],
    "xdp": ["--cluster-cidr", "10.99.0.0/16", "--xdp", "native"],
}
"""Of the daemon on each copy's node."""
RISES = {"served": ("SOCKET_FORWARDED", "PACKET_FORWARDED"), "around": ("AROUND_SENT",), "xdp": ("XDP_FORWARDED",)}
"""What shows on each node that the load went as it should."""

EXPLAINED = {
    "control": "direct again ÷ direct (the control)",
    "socket": "socket path ÷ direct",
    "packet": "packet path ÷ direct",
    "socket-alone": "socket programs alone (no tc program on the way) ÷ direct",
    "packet-around": "packet path, around the stack (--pod-path redirect) ÷ direct",
    "packet-xdp": "packet path before the stack (--xdp native), from outside to outside ÷ direct",
    "passing": "traffic that is nobody's Service, through a served node ÷ direct",
}


class Mode(NamedTuple):
    """One kind of load; `seconds` for each variant in each round."""

    name: str
    what: str
    variants: tuple[Variant, ...]
    seconds: float


MODES = (
    Mode("crr", "connect, request, close", (DIRECT, SOCKET, PACKET, AGAIN, AROUND, XDP, ALONE, PASSING), 0.5),
    Mode("rr", "request and answer, TCP", (DIRECT, SOCKET, PACKET, AGAIN, AROUND, XDP), 0.25),
    Mode("udp", "request and answer, connected UDP", (DIRECT, SOCKET, PACKET), 0.2),
    Mode("sendto", "request and answer, unconnected UDP", (DIRECT, SOCKET, PACKET), 0.2),
)


def paths(lab: Lab, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file. Raises EbpflbError if a path did not carry what it should."""
    binary = crr_binary()
    with _servers(lab, binary), _daemons(lab) as nodes:
        for mode in MODES:
            before = {copy: _counters(bpffs) for copy, bpffs in nodes.items()}
            samples = _measure(lab, binary, mode, rounds, say)
            if _noisy(samples):
                say(f"{mode.name}: noisy, once more")
                samples = _measure(lab, binary, mode, rounds, say)
            for copy in {variant.copy for variant in mode.variants} & nodes.keys():
                _check(mode, copy, before[copy], _counters(nodes[copy]))
            yield from _figures(mode, samples)


@contextmanager
def _servers(lab: Lab, binary: str) -> Iterator[None]:
    servers = []
    try:
        for copy in COPIES:
            server = lab.spawn(copy, "server", [binary, "server", str(PORT), CPU])
            servers.append(server)
            assert server.stdout is not None
            if server.stdout.readline() != "ready\n":
                raise EbpflbError("the server of the benchmark did not start")
        yield
    finally:
        for server in servers:
            server.kill()
            server.communicate()


@contextmanager
def _daemons(lab: Lab) -> Iterator[dict[str, Path]]:
    """A daemon on each node but the plain one, whose first Service is the server, over TCP and UDP; the directories of
    their maps."""
    manifests = lab.directory / "manifests"
    manifests.mkdir()
    for number in range(10):
        described, slice_ = service(number), endpoint_slice(number, [SERVER])
        ports = [{"name": name, "protocol": name, "port": VIP_PORT, "targetPort": PORT} for name in ("TCP", "UDP")]
        ports = [{**port, "name": str(port["name"]).lower()} for port in ports]
        described["spec"]["ports"] = ports  # type: ignore[index]
        slice_["ports"] = [{"name": port["name"], "protocol": port["protocol"], "port": PORT} for port in ports]
        (manifests / f"{number}.json").write_bytes(
            bytes_of({"kind": "List", "apiVersion": "v1", "items": [described, slice_]})
        )
    _take_frames(lab)
    nodes: dict[str, Path] = {}
    with ExitStack() as stack:
        for copy, options in OPTIONS.items():
            bpffs = nodes[copy] = lab.bpffs()
            common = ["--manifests", str(manifests), "--bpffs", str(bpffs), "--cgroup", str(lab.cgroup_of(copy))]
            log = lab.directory / f"daemon-{copy}.log"
            daemon = Daemon(lab.namespace(copy, "node"), lab.cgroup, common + options, log)
            stack.callback(daemon.stop)
            daemon.wait_ready(60)
        yield nodes


def _take_frames(lab: Lab) -> None:
    """Client and server of the `xdp` copy take frames that XDP sends, and send whole checksums, as behind a wire."""
    for place in ("client", "server"):
        inside = f"--net={namespaces.path_of(lab.namespace('xdp', place))}"
        subprocess.run(
            ["nsenter", inside, "ethtool", "-K", "eth0", "gro", "on", "tx", "off"], check=True, capture_output=True
        )


def _counters(bpffs: Path) -> dict[str, int]:
    rows = BpfDataplane(bpffs).tables("counters")
    return {str(row["counter"]).upper(): int(str(row["value"])) for row in rows}


def _check(mode: Mode, copy: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """That Services carried the load, and nothing was refused."""
    rose = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    for name in RISES[copy]:
        if not rose.get(name):
            raise EbpflbError(f"{mode.name}, {copy}: {name} did not rise: the load went some other way ({rose})")
    unwanted = {
        "SOCKET_REJECTED",
        "SOCKET_DROPPED",
        "SOCKET_NO_BACKEND",
        "PACKET_DROPPED",
        "PACKET_NO_BACKEND",
    } & rose.keys()
    if unwanted:
        raise EbpflbError(f"{mode.name}, {copy}: refused meanwhile: {sorted(unwanted)}")


class Sample(NamedTuple):
    """One run of the client: how many a second, and connect() or round trip in nanoseconds."""

    rate: float
    p50: float
    p99: float


def _measure(lab: Lab, binary: str, mode: Mode, rounds: int, say: Callable[[str], None]) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in mode.variants}
    for number in range(rounds):
        # Every other round backwards: being first or last must favour nobody.
        for variant in mode.variants if number % 2 == 0 else reversed(mode.variants):
            argv = [binary, mode.name, variant.address, str(variant.port), f"{mode.seconds}", CPU]
            client = lab.spawn(variant.copy, "client", argv, served=variant.served)
            said, _ = client.communicate(timeout=60)
            if client.returncode:
                raise EbpflbError(
                    f"{mode.name} by {variant.name}: the client failed ({client.returncode}) in round {number + 1}"
                )
            answer = json.loads(said)
            samples[variant.name].append(Sample(answer["count"] / answer["seconds"], answer["p50"], answer["p99"]))
        say(f"{mode.name} {number + 1}/{rounds}")
    return samples


def _ratios(samples: Mapping[str, list[Sample]], name: str, field: int) -> list[float]:
    return [mine[field] / direct[field] for mine, direct in zip(samples[name], samples["direct"], strict=True)]


def _noisy(samples: Mapping[str, list[Sample]]) -> bool:
    """Whether direct does not even agree with itself."""
    if "control" not in samples or len(samples["control"]) < 4:
        return False
    control = _ratios(samples, "control", 0)
    return quartile_range(control) > 0.03 or abs(statistics.median(control) - 1) > 0.015


def _figures(mode: Mode, samples: Mapping[str, list[Sample]]) -> Iterator[Figure]:
    yield middle(f"direct.{mode.name}", f"{mode.what}: direct", [sample.rate for sample in samples["direct"]], "/s")
    for name in samples:
        if name != "direct":
            ratios = _ratios(samples, name, 0)
            yield middle(f"{name}.{mode.name}", f"{mode.what}: {EXPLAINED[name]}", ratios, "")
    if mode.name == "crr":
        yield middle(
            "direct.connect.p50", "connect() p50: direct", [each.p50 / 1000 for each in samples["direct"]], "µs"
        )
        for name in ("socket", "packet", "packet-around", "packet-xdp"):
            for field, percent in ((1, "p50"), (2, "p99")):
                yield middle(
                    f"{name}.connect.{percent}",
                    f"connect() {percent}: {EXPLAINED[name]}",
                    _ratios(samples, name, field),
                    "",
                )
