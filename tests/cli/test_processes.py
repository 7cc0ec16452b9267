"""The commands as processes, on the real kernel: what is promised of a daemon's life, its death, and its traces."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf import map_calls, pins, syscall, tcx
from ebpflb.dataplane.bpf.owned import pack_owner
from ebpflb.model import ServiceName
from ebpflb.routes import packed
from tests.cli.place import Place, alive, place_in, until

pytestmark = [pytest.mark.root, pytest.mark.box]

WEB = """\
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec:
  clusterIP: 10.96.0.80
  ports: [{name: http, port: 80, targetPort: 8080}]
"""

SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
"""

REST = """\
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: empty}
spec:
  clusterIP: 10.96.0.81
  ports: [{port: 53, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: headless}
spec:
  clusterIP: None
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: door}
spec:
  type: NodePort
  clusterIP: 10.96.0.82
  ports: [{port: 80, nodePort: 30080}]
"""


def endpoints(*addresses: str) -> str:
    return SLICE + "".join(f"- {{addresses: [{address}], conditions: {{ready: true}}}}\n" for address in addresses)


def shop(place: Place) -> None:
    place.write("web.yaml", WEB + "---\n" + endpoints("10.244.1.7", "10.244.2.7"))
    place.write("rest.yaml", REST)


def many(number: int) -> list[dict[str, object]]:
    """Services without endpoints."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": "many", "name": f"s{each}"},
            "spec": {"clusterIP": f"10.97.{each // 250}.{each % 250 + 1}", "ports": [{"port": 80}]},
        }
        for each in range(number)
    ]


def expected(scope: str, *addresses: str) -> dict[str, object]:
    """The published item of shop/web."""
    return {
        "frontend": {"address": "10.96.0.80", "port": 80, "protocol": "TCP"},
        "scope": scope,
        "service": {"namespace": "shop", "name": "web", "port": "http"},
        "kind": "ClusterIP",
        "verdict": "FORWARD" if addresses else "REJECT",
        "masquerade": "NEVER",
        "affinitySeconds": 0,
        "algorithm": "random",
        "sourceRanges": [],
        "backends": [{"address": address, "port": 8080, "weight": 1, "state": "active"} for address in addresses],
    }


def backends(place: Place) -> list[str]:
    """Where shop/web goes, by the kernel."""
    items = place.ebpflb("dump", "-o", "json", "--service", "shop/web").items
    assert len(items) == 2
    return [backend["address"] for backend in items[0]["backends"]]  # type: ignore[attr-defined]


def test_dump_says_what_the_manifests_say(place: Place) -> None:
    shop(place)
    once = place.ebpflb("run", "--once")
    assert once.status == 0, once
    items = place.ebpflb("dump", "-o", "json").items
    frontends = {
        (item["frontend"]["address"], item["frontend"]["port"], item["kind"], item["verdict"])  # type: ignore[index]
        for item in items
    }
    assert frontends == {
        ("10.96.0.80", 80, "ClusterIP", "FORWARD"),
        ("10.96.0.81", 53, "ClusterIP", "REJECT"),
        ("10.96.0.82", 80, "ClusterIP", "REJECT"),
        ("127.0.0.1", 30080, "NodePort", "REJECT"),
        ("192.168.0.2", 30080, "NodePort", "REJECT"),
    }
    assert len(items) == 2 * len(frontends)
    web = [item for item in items if item["service"]["name"] == "web"]  # type: ignore[index]
    assert web == [expected(scope, "10.244.1.7", "10.244.2.7") for scope in ("INTERNAL", "EXTERNAL")]
    assert place.ebpflb("verify").status == 0
    assert place.ebpflb("plan").status == 0


def test_without_a_daemon_the_kernel_still_answers(place: Place) -> None:
    shop(place)
    assert place.ebpflb("run", "--once").status == 0
    served = place.ebpflb("trace", "10.244.1.9", "10.96.0.80:80")
    assert served.status == 0 and "10.244.2.7:8080" in served.out
    assert place.ebpflb("trace", "10.244.1.9", "10.96.0.81:53/UDP").status == 6
    assert place.ebpflb("trace", "10.244.1.9", "10.96.0.80:81").status == 6  # no such port of an address that we own
    assert place.ebpflb("trace", "10.244.1.9", "10.99.0.80:80").status == 7
    for what in ("services", "backends", "flows", "sources", "counters", "raw"):
        said = place.ebpflb("dump", what, "-o", "json")
        assert said.status == 0, said
    assert "start it with" in place.ebpflb("status").one_line


def test_a_service_that_asks_for_what_the_dataplane_does_not_do_is_named(place: Place) -> None:
    """It is served nevertheless; and it is over when it asks no more."""
    notes = "annotations: {ebpflb/forwarding: dsr, ebpflb/algorithm: round-robin}"
    place.write("web.yaml", WEB.replace("name: web}", f"name: web, {notes}}}") + "---\n" + endpoints("10.244.1.7"))
    place.start()

    def problems() -> list[object]:
        (status,) = place.ebpflb("status", "-o", "json").items
        return [(each["subject"], each["code"]) for each in status["problems"]]  # type: ignore[attr-defined]

    assert problems() == [("shop/web", "AlgorithmNotSupported"), ("shop/web", "ForwardingNotSupported")]
    assert backends(place) == ["10.244.1.7"]
    place.write("web.yaml", WEB + "---\n" + endpoints("10.244.1.7"))
    until("nothing is asked for any more", lambda: not problems())


def test_verify_tells_whose_cluster_ips_refuse_undefined_ports(place: Place) -> None:
    """A row that is missing, and one that is nobody's: by name, though every frontend is as it should be."""
    shop(place)
    assert place.ebpflb("run", "--once").status == 0
    fd = syscall.obj_get(str(place.bpffs / pins.MAPS / "owned"))
    try:
        assert map_calls.delete(fd, packed("10.96.0.80"))
        row = pack_owner(ServiceName("shop", "gone"))
        assert row is not None
        map_calls.update(fd, packed("10.96.0.99"), row)
    finally:
        os.close(fd)
    said = place.ebpflb("verify", "-o", "json")
    assert said.status == 5
    web, gone = ({"namespace": "shop", "name": name} for name in ("web", "gone"))
    assert said.items == [
        {"change": "add", "clusterIP": "10.96.0.80", "service": web, "wanted": web, "held": None},
        {"change": "remove", "clusterIP": "10.96.0.99", "service": gone, "wanted": None, "held": gone},
    ]
    assert place.ebpflb("run", "--once").status == 0
    assert place.ebpflb("verify").status == 0


def test_a_plan_says_what_a_sync_would_change(place: Place) -> None:
    shop(place)
    assert place.ebpflb("plan").status == 5
    assert place.ebpflb("run", "--once").status == 0
    place.write("web.yaml", WEB + "---\n" + endpoints("10.244.1.8"))
    said = place.ebpflb("plan", "-o", "json")
    assert said.status == 5
    assert [(item["change"], item["scope"]) for item in said.items] == [("change", "INTERNAL"), ("change", "EXTERNAL")]
    assert backends(place) == ["10.244.1.7", "10.244.2.7"], "a plan changes nothing"


def test_changes_are_followed(place: Place) -> None:
    shop(place)
    place.start()
    assert backends(place) == ["10.244.1.7", "10.244.2.7"]
    place.write("web.yaml", WEB + "---\n" + endpoints("10.244.1.7"))
    until("one backend", lambda: backends(place) == ["10.244.1.7"])
    place.write("web.yaml", WEB)
    until("refused", lambda: place.ebpflb("trace", "10.244.1.9", "10.96.0.80:80").status == 6)
    (place.manifests / "web.yaml").unlink()
    until("gone", lambda: place.ebpflb("trace", "10.244.1.9", "10.96.0.80:80").status == 7)


def test_a_new_address_of_the_node_carries_node_ports(place: Place) -> None:
    shop(place)
    place.start()
    place.ip("address", "add", "192.168.0.77/24", "dev", "eth0")
    until("a node port there", lambda: place.ebpflb("trace", "10.244.1.9", "192.168.0.77:30080").status == 6)


def test_a_second_daemon_is_refused_and_the_first_goes_on(place: Place) -> None:
    shop(place)
    first = place.start()
    assert "another ebpflb daemon" in place.ebpflb("run").one_line
    assert "another ebpflb daemon" in place.ebpflb("run", "--once").one_line
    assert "another ebpflb daemon" in place.ebpflb("cleanup").one_line
    assert first.process.poll() is None
    assert backends(place) == ["10.244.1.7", "10.244.2.7"]


def test_two_namespaces_do_not_share_a_pin_directory(place: Place, tmp_path: Path) -> None:
    """Two daemons side by side, each with its own; with the other's it is refused, and touches nothing."""
    shop(place)
    place.start()
    held, installed = place.traces(), place.objects()
    (tmp_path / "other").mkdir()
    with place_in(tmp_path / "other") as other:
        other.write("rest.yaml", REST)
        said = other.ebpflb("run", "--once", "--bpffs", str(place.bpffs))
        assert said.status == 2
        assert str(place.bpffs) in said.err.splitlines()[-1]
        other.start()
        assert len(other.ebpflb("dump", "-o", "json").items) == 8
        assert backends(place) == ["10.244.1.7", "10.244.2.7"]
    assert place.traces() ^ held == set()
    assert place.objects() == installed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_that_is_asked_to_end_leaves_the_services_working(place: Place, number: int) -> None:
    shop(place)
    daemon = place.start()
    assert daemon.end(number) == 0
    assert backends(place) == ["10.244.1.7", "10.244.2.7"]


def test_a_killed_daemon_changes_nothing_and_its_successor_writes_nothing(place: Place) -> None:
    shop(place)
    daemon = place.start()
    before = place.ebpflb("dump", "-o", "json").out
    held, installed = place.traces(), place.objects()
    daemon.end(signal.SIGKILL)
    assert place.ebpflb("dump", "-o", "json").out == before
    again = place.start()
    assert "0 rows written, 0 removed, 0 failed" in again.log
    assert place.ebpflb("dump", "-o", "json").out == before
    assert place.objects() == installed
    assert place.traces() ^ held == set()


@pytest.mark.parametrize("moment", ["maps/frontends", "programs/connect4", "programs/tc_ingress", "links/sendmsg6"])
def test_a_daemon_that_dies_while_it_starts_is_made_good_by_the_next(place: Place, moment: str) -> None:
    """Killed as soon as a certain pin is there, in the middle of its first sync."""
    shop(place)
    place.write("many.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": many(1000)}))
    daemon = place.start(wait=False)
    until(f"{moment} is pinned", (place.bpffs / moment).exists)
    daemon.end(signal.SIGKILL)
    place.start()
    assert place.ebpflb("verify").status == 0
    assert len(place.ebpflb("dump", "-o", "json").items) == 10 + 2 * 1000


def test_a_thousand_changes_are_one_or_a_few_syncs(place: Place) -> None:
    place.write("many.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": many(10)}))
    daemon = place.start()
    for number in range(1000):
        place.write("web.yaml", WEB + "---\n" + endpoints(f"10.244.{number // 250}.{number % 250 + 1}"))
    until("the last one is in", lambda: backends(place) == ["10.244.3.250"])
    assert daemon.log.count(" sync: ") < 500
    assert place.ebpflb("status").status == 0


def test_a_successor_writes_what_changed_meanwhile(place: Place) -> None:
    shop(place)
    place.start().end(signal.SIGKILL)
    place.write("web.yaml", WEB + "---\n" + endpoints("10.244.1.7"))
    place.start()
    assert backends(place) == ["10.244.1.7"]


def test_cleanup_leaves_no_difference(place: Place) -> None:
    before = place.traces()
    shop(place)
    place.start().end(signal.SIGTERM)
    assert place.traces() != before
    installed = place.objects()
    assert {kind for kind, _ in installed} == {"map", "prog", "link"}
    listed = place.ebpflb("cleanup", "--dry-run")
    assert listed.status == 0 and str(place.bpffs) in listed.out
    assert backends(place) == ["10.244.1.7", "10.244.2.7"], "a dry run changes nothing"
    assert place.ebpflb("cleanup").status == 0
    assert place.traces() ^ before == set()
    until("maps, programs and links gone", lambda: not installed & alive())
    assert place.ebpflb("cleanup").out == "nothing was installed\n"
    assert "nothing is programmed" in place.ebpflb("dump").one_line


def test_a_row_that_somebody_removes_comes_back_with_the_next_audit(place: Place) -> None:
    shop(place)
    daemon = place.start("--audit-period", "5")
    before = place.ebpflb("dump", "-o", "json").out
    with daemon.stopped():  # else the next audit may come before the look
        place.delete_first_row("frontends")
        assert place.ebpflb("dump", "-o", "json").out != before
    until("repaired", lambda: place.ebpflb("dump", "-o", "json").out == before)
    until("told", lambda: "audit: the kernel differed and was repaired" in daemon.log)
    assert len([line for line in daemon.log.splitlines() if "repaired" in line]) == 1


def test_a_program_that_somebody_detaches_comes_back(place: Place) -> None:
    """Of filters the kernel tells at once; of programs at tcx it does not."""
    shop(place)
    place.start("--audit-period", "1" if tcx.supported() else "3600")
    hooked = {("eth0", "ingress"), ("eth0", "egress"), ("peer0", "ingress"), ("peer0", "egress")}
    assert place.hooks() == hooked
    if tcx.supported():
        place.detach("eth0")
    else:
        place.command("tc", "qdisc", "del", "dev", "eth0", "clsact")
    until("hooked again", lambda: place.hooks() == hooked)


def test_a_device_that_comes_later_is_hooked(place: Place) -> None:
    shop(place)
    place.start("--audit-period", "3600")
    place.ip("link", "add", "pod1", "type", "veth", "peer", "name", "pod1-in")
    place.ip("link", "set", "pod1", "up")
    until("hooked", lambda: {("pod1", "ingress"), ("pod1", "egress")} <= place.hooks())


def test_status_tells_how_it_goes(place: Place) -> None:
    shop(place)
    place.start()
    (item,) = place.ebpflb("status", "-o", "json").items
    assert item["healthy"] is True
    assert item["dataplane"] == "bpf"
    assert item["counts"] == {"services": 3, "frontends": 5, "routes": 10, "backends": 2}
    fills = {fill["name"]: fill for fill in item["maps"]}  # type: ignore[attr-defined]
    assert fills["frontends"]["entries"] == 5
    assert item["problems"] == []


# ---- As a new user would ----


def test_a_manifest_with_a_typo(place: Place) -> None:
    """One line that names it, in the log and in status; the others are served."""
    shop(place)
    place.write("typo.yaml", WEB.replace("kind: Service", "kind: Servise").replace("web", "typo"))
    daemon = place.start()
    assert backends(place) == ["10.244.1.7", "10.244.2.7"]
    said = place.ebpflb("status")
    assert said.status == 0
    (line,) = [line for line in said.out.splitlines() if "typo.yaml" in line]
    assert "typo.yaml" in place.ebpflb("plan").err
    assert "Servise" in line
    assert len([line for line in daemon.log.splitlines() if "typo.yaml" in line]) == 1
    place.write("typo.yaml", REST.replace("empty", "other").split("---")[0].replace("10.96.0.81", "10.96.0.83"))
    until("no problem", lambda: "typo.yaml" not in place.ebpflb("status").out)


def test_no_root(place: Place) -> None:
    for command in ("run", "dump", "plan", "cleanup"):
        said = place.ebpflb(command, before=("setpriv", "--bounding-set=-all", "--inh-caps=-all"))
        assert said.status == 2
        assert "root" in said.one_line


def test_check_without_root_says_so(place: Place) -> None:
    said = place.ebpflb("check", before=("setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    assert said.status == 3
    assert "run as root" in said.out


def test_no_bpf_file_system(place: Place) -> None:
    for command in ("run", "check", "dump", "plan", "cleanup"):
        said = place.ebpflb(command, "--bpffs", str(place.directory))
        assert said.status == 2, (command, said)
        last = said.err.splitlines()[-1]
        assert f"--bpffs: {place.directory} is not in a BPF file system; give a directory in one" in last
    assert place.manifests.is_dir()


def test_no_cgroup2(place: Place) -> None:
    said = place.ebpflb("run", "--cgroup", str(place.directory))
    assert said.status in (2, 3)
    assert "cgroup2" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err


def test_no_compiler(place: Place, tmp_path: Path) -> None:
    """A machine without python3-bpfcc, where nothing has been compiled yet."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "bcc.py").write_text("raise ModuleNotFoundError(\"No module named 'bcc'\", name='bcc')\n")
    place.environment["PYTHONPATH"] = f"{tmp_path / 'without'}:{place.environment['PYTHONPATH']}"
    place.environment["EBPFLB_CACHE"] = str(tmp_path / "cache")
    said = place.ebpflb("run", "--dataplane", "bpf")
    assert said.status == 3
    assert "apt-get install python3-bpfcc" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    checked = place.ebpflb("check", "--dataplane", "bpf")
    assert checked.status == 3 and "python3-bpfcc" in checked.out
    checked = place.ebpflb("check")
    assert checked.status == 0 and "not bpf: compiler is missing" in checked.out
    shop(place)
    said = place.ebpflb("run", "--once")
    assert said.status == 0
    assert "WARNING dataplane bpf cannot carry services here: compiler is missing (no bcc)" in said.err
    assert backends(place) == ["10.244.1.7", "10.244.2.7"]
    assert place.ebpflb("cleanup").status == 0
    del place.environment["EBPFLB_CACHE"]


def test_a_wrong_directory(place: Place) -> None:
    said = place.ebpflb("run", "--manifests", str(place.directory / "manifest"))
    assert said.status == 2
    assert "there is no such directory" in said.one_line


def test_an_empty_directory_is_no_error(place: Place) -> None:
    assert place.ebpflb("run", "--once").status == 0
    assert place.ebpflb("dump", "-o", "json").items == []


def test_check_of_this_machine(place: Place) -> None:
    said = place.ebpflb("check")
    assert said.status == 0, said
    assert "bpf would carry services here" in said.out
