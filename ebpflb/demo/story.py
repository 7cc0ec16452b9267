"""The demo's story: each step says what is asked, asks it with a real client, shows what comes back, and checks it.

Rules of this file: steps and promises only; how to do things is in `stage`, how to show them in `console`, how it
begins and ends in `ends`. A broken promise does not end the story, unless there is nothing left to ask.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ebpflb.demo import servers
from ebpflb.demo.cluster import Place
from ebpflb.demo.console import Console
from ebpflb.demo.stage import COMMAND_SECONDS, DNS_ADDRESS, Probe, Stage
from ebpflb.errors import EbpflbError

SERVICE = "10.96.0.80"
SERVICE_IPV6 = "[fd00:10:96::80]"
MYSQL = "10.96.0.33"
NOBODY = "10.96.0.99"
REQUESTS = 40

# A refusal is one round trip; a time-out would be a minute and more.
AT_ONCE_SECONDS = 0.5
# From a file's rename to the last answer of a pod that it took out.
MILLISECONDS_PROMISED = 50


class Story:
    """The steps, in order."""

    def __init__(self, stage: Stage, console: Console) -> None:
        self.stage = stage
        self.console = console

    def tell(self) -> None:
        console, stage = self.console, self.stage
        with console.step(
            "A cluster on this machine",
            "Two nodes, their pods and a client outside are network namespaces. Each node runs `ebpflb run` on the "
            "manifests of deploy/demo; nothing else here knows of Services: no kube-proxy, no iptables.",
        ):
            stage.set_up(console.progress)
            console.check(True, "servers serve, and both daemons say that the kernel carries the manifests")
        if console.failed:
            return  # there is nothing to ask
        self.spread()
        self.outside()
        self.sql()
        self.dns()
        self.headless()
        self.refused()
        self.unready()
        self.scale_up()
        self.dump()
        self.trace()
        self.killed()

    # ---- Steps ----

    def spread(self) -> None:
        with self.console.step(
            "my-service from a pod: the socket path",
            f"The address {SERVICE} is nobody's. The client's connect() is given a pod's address in its place, so that "
            "not a single packet needs translating; the answer names the pod.",
        ):
            counts = self._spread(self.stage.client, "client", f"http://{SERVICE}/")
            self.console.check(set(counts) == {"web-1", "web-2"}, f"both nginx pods served: {_words(counts)}")
            counts = self._spread(self.stage.client, "client", f"http://{SERVICE_IPV6}/")
            self.console.check(set(counts) == {"web-1", "web-2"}, f"over IPv6 too: {_words(counts)}")
            source = self._curl(self.stage.client, "client", f"http://{SERVICE}/source")
            own = self.stage.address("client")
            self.console.check(source == own, f"the server sees the client's own address {own}")

    def outside(self) -> None:
        with self.console.step(
            "my-service from outside: NodePort 30007, the packet path",
            "A machine that is no node asks a node. Packets are translated where they enter and leave the node, also "
            "when the pod is on the other one.",
        ):
            for node in self.stage.cluster.nodes.values():
                url = f"http://{node.addresses.ipv4}:30007/"
                counts = self._spread(self.stage.outside, "outside", url)
                promise = f"{node.name}: both nginx pods served: {_words(counts)}"
                self.console.check(set(counts) == {"web-1", "web-2"}, promise)

    def sql(self) -> None:
        with self.console.step(
            "mysql: SQL over port 3360",
            "MariaDB listens at 3306 on node2; clients in the cluster ask for 3360, those outside for node port 30008.",
        ):
            create = 'CREATE TABLE fruit (name TEXT, price INT); INSERT INTO fruit VALUES ("apple", 3), ("quince", 5)'
            self._run(self.stage.client, "client", servers.sql_client(MYSQL, 3360, create))
            query = servers.sql_client("192.168.0.2", 30008, "SELECT * FROM fruit", "SELECT SUM(price) FROM fruit")
            output = self._run(self.stage.outside, "outside", query)
            self.console.check(output.split()[-1:] == ["8"], "written through one, read through the other")

    def dns(self) -> None:
        with self.console.step(
            "kube-dns: one address, UDP and TCP",
            f"Pods have {DNS_ADDRESS} in their resolv.conf. dig refuses an answer that comes from another address than "
            "it asked, so that what it shows proves the way back as well.",
        ):
            name = f"my-service.default.svc.{servers.DOMAIN}"
            for how in ("+notcp", "+tcp"):
                output = self._run(self.stage.client, "client", ("dig", f"@{DNS_ADDRESS}", name, how, "+short"))
                self.console.check(output.split() == [SERVICE], f"answered over {'UDP' if how == '+notcp' else 'TCP'}")
            output = self._curl(self.stage.client, "client", "http://my-service/")
            self.console.check(output in ("web-1", "web-2"), "and curl finds my-service by its name alone")

    def headless(self) -> None:
        with self.console.step(
            "my-pods: a headless Service",
            "It has no address of its own: its name means its pods, and there is nothing to program.",
        ):
            name = f"my-pods.default.svc.{servers.DOMAIN}"
            output = self._run(self.stage.client, "client", ("dig", f"@{DNS_ADDRESS}", name, "+short"))
            pods = {self.stage.address("web-1"), self.stage.address("web-2")}
            self.console.check(set(output.split()) == pods, "DNS gives the pods' own addresses")
            self.console.check(not self.stage.routes("node1", "default/my-pods"), "the kernel holds no row for it")

    def refused(self) -> None:
        with self.console.step(
            "nobody-home: a Service without endpoints",
            "Nobody waits for a time-out: a pod's connect() fails, an outside client's SYN is answered with a reset.",
        ):
            for place, name, url in (
                (self.stage.client, "client", f"http://{NOBODY}/"),
                (self.stage.outside, "outside", "http://192.168.0.2:30009/"),
            ):
                argv = ("curl", "--verbose", "--max-time", "10", "-w", "%{time_total}", url)
                done = self.stage.ask(place, *argv)
                words = [line for line in done.stderr.splitlines() if "refused" in line or line.startswith("curl:")]
                self.console.command(name, argv, "\n".join(words))
                refused = done.returncode == 7 and "Connection refused" in done.stderr
                seconds = float(done.stdout or "inf")
                said = f"refused after {seconds * 1000:.1f} ms" if refused else "not refused"
                self.console.check(refused and seconds < AT_ONCE_SECONDS * self.stage.patience, said)

    def unready(self) -> None:
        stage = self.stage
        with self.console.step(
            "A pod becomes unready",
            "While a client asks without end, web-2's `ready` turns false in the manifest (one rename of a file).",
        ):
            probe = stage.probe(stage.client, f"http://{SERVICE}/")
            probe.wait(200)
            changed = stage.change_endpoints("my-service.yaml", lambda item: _set_ready(item, "web-2", False))
            probe.wait(400)
            answers = probe.stop()
            self._show_probe(answers, changed)
            last = max((moment for moment, _, who in answers if who == "web-2"), default=None)
            if last is None:
                self.console.check(False, "web-2 never answered at all")
            else:
                late = max(0.0, (last - changed) * 1000)
                promise = f"web-2's last answer came {late:.1f} ms after that"
                self.console.check(late < MILLISECONDS_PROMISED * stage.patience, promise)
            self._check_no_failure(answers)
            for node in stage.cluster.nodes:
                left = _backends(stage.routes(node, "default/my-service"))
                self.console.check(stage.address("web-2") not in left, f"{node}: `dump` no longer knows it")

    def scale_up(self) -> None:
        stage = self.stage
        with self.console.step("Scale up", "web-2 is ready again, and a third nginx starts on node2."):
            web3 = stage.cluster.add_pod("node2", "web-3")
            stage.start_nginx("web-3")(10 * stage.patience)
            probe = stage.probe(stage.client, f"http://{SERVICE}/")
            probe.wait(20)

            def grow(item: dict[str, Any]) -> None:
                _set_ready(item, "web-2", True)
                address = web3.addresses.ipv6 if item["addressType"] == "IPv6" else web3.addresses.ipv4
                target = {"kind": "Pod", "namespace": "default", "name": "web-3"}
                item["endpoints"].append(
                    {"addresses": [address], "nodeName": "node2", "targetRef": target, "conditions": {"ready": True}}
                )

            changed = stage.change_endpoints("my-service.yaml", grow)
            probe.wait(400)
            answers = probe.stop()
            self._show_probe(answers, changed)
            first = min((moment for moment, _, who in answers if who == "web-3"), default=None)
            if first is None:
                self.console.check(False, "web-3 never answered")
            else:
                late = (first - changed) * 1000
                promise = f"web-3's first answer came {late:.1f} ms after the change of the manifest"
                self.console.check(late < 2 * MILLISECONDS_PROMISED * stage.patience, promise)
            self._check_no_failure(answers)
            counts = self._spread(stage.outside, "outside", "http://192.168.0.3:30007/", 2 * REQUESTS)
            self.console.check(set(counts) == {"web-1", "web-2", "web-3"}, f"all three serve: {_words(counts)}")

    def dump(self) -> None:
        with self.console.step("dump: what the kernel holds", "Read back from the kernel, not from a memory of it."):
            status, _ = self._ebpflb("node1", "dump", "--service", "default/my-service", options=self._target)
            self.console.check(status == 0, "it can be read")
            found = _backends(self.stage.routes("node1", "default/my-service"))
            pods = {
                address for pod in ("web-1", "web-2", "web-3") for address in self.stage.cluster.pods[pod].addresses
            }
            self.console.check(found == pods, "its backends are the three pods, in both families")

    def trace(self) -> None:
        with self.console.step(
            "trace: why a packet goes where it goes", "One that is served, and one that is refused."
        ):
            status, output = self._ebpflb(
                "node1", "trace", self.stage.address("client"), f"{SERVICE}:80", options=self._target
            )
            self.console.check(status == 0 and "my-service" in output, "served: exit status 0")
            outside = self.stage.outside.addresses.ipv4
            status, output = self._ebpflb("node1", "trace", outside, "192.168.0.2:30009", options=self._target)
            self.console.check(status == 6 and "nobody-home" in output, "refused: exit status 6")

    def killed(self) -> None:
        stage = self.stage
        with self.console.step(
            "kill -9, and a restart that writes nothing",
            "Clients ask without end on both paths. The daemon of node1 is killed: programs and rows stay in the "
            "kernel. Its successor reads them back and finds nothing to do.",
        ):
            daemon = stage.cluster.nodes["node1"].daemon
            assert daemon is not None
            probes = {
                "socket path": stage.probe(stage.client, f"http://{SERVICE}/"),
                "packet path": stage.probe(stage.outside, "http://192.168.0.2:30007/"),
            }
            _all_wait(probes.values(), 100)
            self.console.command("node1", ("kill", "-9", str(daemon.pid)), "")
            daemon.kill()
            status, _ = self._ebpflb("node1", "status")
            self.console.check(status == 1, "`status` says that no daemon answers")
            _all_wait(probes.values(), 200)
            before = len(stage.cluster.log("node1").read_text())
            stage.cluster.start_daemons(["node1"], 30 * stage.patience)
            _all_wait(probes.values(), 100)
            log = stage.cluster.log("node1").read_text()[before:]
            synced = [line for line in log.splitlines() if "sync:" in line]
            self.console.command("node1", (), "\n".join(synced), "ebpflb run …    # its log")
            nothing = bool(synced) and all(_writes_nothing(line) for line in synced)
            self.console.check(nothing, "the new daemon wrote nothing")
            status, _ = self._ebpflb("node1", "plan", options=stage.cluster.daemon_options("node1"))
            self.console.check(status == 0, "`plan` finds nothing to change")
            for path, probe in probes.items():
                answers = probe.stop()
                self._check_no_failure(answers, f"{path}: ")

    # ---- Telling ----

    def _run(self, where: Place, name: str, argv: Sequence[str]) -> str:
        done = self.stage.ask(where, *argv)
        self.console.command(name, argv, done.stdout + done.stderr)
        return done.stdout if done.returncode == 0 else ""

    def _curl(self, where: Place, name: str, url: str) -> str:
        return self._run(where, name, ("curl", "--silent", "--show-error", "--max-time", "5", url)).strip()

    def _spread(self, where: Place, name: str, url: str, times: int = REQUESTS) -> Counter[str]:
        """Ask `times` times, each by a connection of its own; who answered how often. Raises EbpflbError."""
        argv = ("curl", "--silent", "--show-error", "--max-time", "5", "-H", "Connection: close", f"{url}?[1-{times}]")
        done = self.stage.ask(where, *argv)
        counts = Counter(done.stdout.split())
        output = "".join(f"{number:4} x {pod}\n" for pod, number in sorted(counts.items()))
        self.console.command(name, argv, output + done.stderr)
        if done.returncode or counts.total() != times:
            raise EbpflbError(f"{counts.total()} of {times} requests were answered")
        return counts

    @property
    def _target(self) -> tuple[str, ...]:
        return self.stage.cluster.target("node1")

    def _ebpflb(self, node: str, *words: str, options: Sequence[str] = ()) -> tuple[int, str]:
        """Exit status and output; the options that say where the demo's node is are not shown."""
        seconds = COMMAND_SECONDS * self.stage.patience
        done = self.stage.cluster.ebpflb(node, *words, *options, timeout=seconds)
        self.console.command(node, ("ebpflb", *words), done.stdout + done.stderr)
        return done.returncode, done.stdout

    def _show_probe(self, answers: Sequence[tuple[float, str, str]], changed: float) -> None:
        before = Counter(who for moment, _, who in answers if moment < changed)
        after = Counter(who for moment, _, who in answers if moment >= changed)
        rate = len(answers) / (answers[-1][0] - answers[0][0])
        self.console.detail(f"{rate:.0f} requests a second; before: {_words(before)}; after: {_words(after)}")

    def _check_no_failure(self, answers: Sequence[tuple[float, str, str]], prefix: str = "") -> None:
        failures = Counter(why for _, outcome, why in answers if outcome != "ok")
        said = f" ({_words(failures)})" if failures else ""
        promise = f"{prefix}{len(answers)} requests meanwhile, {failures.total()} failed{said}"
        self.console.check(not failures and len(answers) > 0, promise)


def _all_wait(probes: Iterable[Probe], number: int) -> None:
    for probe in probes:
        probe.wait(number)


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{number} x {name}" for name, number in sorted(counts.items())) or "nobody"


def _set_ready(item: dict[str, Any], pod: str, ready: bool) -> None:
    for endpoint in item["endpoints"]:
        if endpoint["targetRef"]["name"] == pod:
            endpoint["conditions"]["ready"] = ready


def _backends(routes: Sequence[dict[str, Any]]) -> set[str]:
    return {backend["address"] for route in routes for backend in route["backends"]}


def _writes_nothing(line: str) -> bool:
    found = re.search(r"(\d+) rows written, (\d+) removed, (\d+) failed", line)
    return found is not None and found.groups() == ("0", "0", "0")
