"""The IPVS dataplane with the kernel's IPVS: rows, and packets that go where `decide` says."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from ebpflb import rtnetlink
from ebpflb.dataplane import Report
from ebpflb.dataplane.ipvs import facts
from ebpflb.dataplane.ipvs.dataplane import IpvsDataplane
from ebpflb.dataplane.ipvs.messages import DEL_SERVICE, NEW_SERVICE, Operation
from ebpflb.dataplane.ipvs.netlink import NetlinkKernel
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.table import Server, Settings, packed
from ebpflb.decide import Decision, Outcome, Packet, decide
from ebpflb.errors import Unsupported, UserError
from ebpflb.model import DetectLocal, Family, Protocol
from ebpflb.policy import routes as routes_of
from ebpflb.routes import Frontend, RouteTable
from tests.vm.lab import BRIDGE_IP, PATIENCE, PEER, POD, REMOTES, SILENCE, Answer, Lab, Refused, asked
from tests.world import (
    LOCAL,
    NODE_IP,
    OUTSIDE,
    endpoint_slice,
    in_family,
    node,
    options,
    port,
    service,
    slice_port,
    snapshot,
    v6,
)

pytestmark = [pytest.mark.vm, pytest.mark.root]

TCP, UDP = Protocol.TCP, Protocol.UDP
OPTIONS = options(detect_local=DetectLocal.NODE_CIDR, localhost_nodeports=False)
NODE_ADDRESSES = ("10.0.1.254", "127.0.0.1", NODE_IP)


def both(address: str) -> tuple[str, str]:
    return address, v6(address)


def service_of(
    name: str, ip: str, *backends: str, node_port: int = 0, target: int = 80, **more: object
) -> list[object]:
    """A Service on port 80 of TCP and UDP, in both families, with a slice for each."""
    ports = (port(80, "t", TCP, node_port), port(80, "u", UDP, node_port))
    made = service(f"ns1/{name}", both(ip), *ports, **more)  # type: ignore[arg-type]
    slices: list[object] = []
    if backends:
        targets = (slice_port(target, "t", TCP), slice_port(target, "u", UDP))
        found = endpoint_slice(*backends, of=f"ns1/{name}", ports=targets)
        slices = [
            found,
            in_family(endpoint_slice(*backends, of=f"ns1/{name}", ports=targets, name=f"{name}6"), Family.IPV6),
        ]
    return [made, *slices]


def world_of(*objects: object, **more: object) -> RouteTable:
    here = node(
        addresses=[address for each in NODE_ADDRESSES for address in both(each)],
        primary=both(NODE_IP),
        pod_cidrs=both("10.0.1.0/24"),
    )
    return routes_of(snapshot(*objects, node=here), OPTIONS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab().open() as found:
        yield found


@pytest.fixture(params=["nft"])
def dataplane(lab: Lab, request: pytest.FixtureRequest) -> Iterator[IpvsDataplane]:
    found = IpvsDataplane(IpvsOptions(), variant=request.param)
    before = saved(lab)
    lab.on_node(found.start)
    yield found
    lab.on_node(found.cleanup)
    assert lab.on_node(found.inventory) == ()
    assert saved(lab) == before


def run(lab: Lab, *words: str) -> str:
    """What a command says on the node."""
    done = lab.on_node(lambda: subprocess.run(words, capture_output=True, text=True, check=True))
    return done.stdout


def saved(lab: Lab) -> dict[str, list[str]]:
    """All rules and sets, virtual servers and devices on the node."""
    rules = [
        line
        for tool in ("iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save")
        for line in run(lab, tool).splitlines()
        if line.startswith(("-A", ":KUBE", ":EBPFLB"))
    ]
    kernel = NetlinkKernel()
    return {
        "rules": rules,
        "sets": run(lab, "ipset", "list", "-n").split(),
        "servers": sorted(map(str, lab.on_node(kernel.servers))),
        "devices": sorted(link.name for link in lab.on_node(_links)),
    }


def _links() -> list[rtnetlink.Link]:
    with contextlib.closing(rtnetlink.Netlink()) as netlink:
        return list(rtnetlink.links(netlink).values())


def synced(lab: Lab, dataplane: IpvsDataplane, table: RouteTable) -> Report:
    """The kernel holds the table, and says so."""
    report = lab.on_node(lambda: dataplane.sync(table))
    assert report.complete, report.problems
    assert lab.on_node(dataplane.state) == table
    return report


def test_a_second_sync_writes_nothing(lab: Lab, dataplane: IpvsDataplane) -> None:
    table = world_of(*WORLD)
    synced(lab, dataplane, table)
    again = lab.on_node(lambda: dataplane.sync(table))
    assert (again.written, again.removed) == (0, 0)
    audit = lab.on_node(dataplane.audit)
    assert (audit.written, audit.removed) == (0, 0), audit
    other = IpvsDataplane(IpvsOptions(), variant="nft")
    lab.on_node(other.start)
    taken = lab.on_node(lambda: other.sync(table))
    assert (taken.written, taken.removed) == (0, 0)
    assert lab.on_node(dataplane.canary)


# ---- Packets

WEB, LOCAL_WEB, ELSEWHERE, EMPTY, GUARDED, NODE_GUARDED, INSIDE_LOCAL, STICKY, LOCAL_STICKY = (
    f"172.30.0.{at}" for at in range(41, 50)
)
REMOTE = REMOTES[0]
HOST_NETWORK = "172.30.0.50"

WORLD = (
    *service_of(
        "web", WEB, POD, REMOTE, target=8080, node_port=30041, external=both("192.168.99.1"), lb=both("1.2.3.1")
    ),
    *service_of(
        "local",
        LOCAL_WEB,
        *(POD, REMOTE),
        target=8080,
        node_port=30042,
        external=both("192.168.99.2"),
        lb=both("1.2.3.2"),
        external_policy=LOCAL,
    ),
    *service_of("elsewhere", ELSEWHERE, REMOTE, node_port=30043, lb=both("1.2.3.3"), external_policy=LOCAL),
    *service_of("empty", EMPTY, node_port=30044, external=both("192.168.99.4"), lb=both("1.2.3.4")),
    *service_of("guarded", GUARDED, POD, lb=both("1.2.3.5"), ranges=both("203.0.113.0/24")),
    *service_of("node-guarded", NODE_GUARDED, POD, lb=both("1.2.3.6"), ranges=both("192.168.0.0/24")),
    *service_of("inside-local", INSIDE_LOCAL, REMOTE, internal_policy=LOCAL),
)
CLIENTS = ("", PEER, POD, OUTSIDE)


class Question(NamedTuple):
    client: str
    frontend: Frontend

    def asked(self, lab: Lab, patience: float = PATIENCE) -> Answer | str:
        try:
            return lab.ask(self.client, self.frontend.address, self.frontend.port, self.frontend.protocol, patience)
        except Refused:
            return "REJECT"
        except TimeoutError:
            return "DROP"
        except PermissionError:
            return "DROP" if self.client == "" and self.frontend.protocol is UDP else "EPERM"


def decided(table: RouteTable, question: Question) -> Decision:
    source = question.client or NODE_IP
    frontend = question.frontend
    if ":" in frontend.address:
        source = v6(source)
    return decide(table, Packet(source, frontend.address, frontend.port, frontend.protocol))


def differences(lab: Lab, table: RouteTable, questions: list[Question]) -> list[str]:
    """Where packets do not go as `decide` says."""
    own = {both_ for each in (NODE_IP, BRIDGE_IP) for both_ in both(each)}
    found = []
    silent = [each for each in questions if decided(table, each).verdict is Outcome.DROP]
    with ThreadPoolExecutor(24) as threads:
        answers = threads.map(lambda each: each.asked(lab, SILENCE), silent)
        found += [
            f"{each}: {answer}, not DROP" for each, answer in zip(silent, answers, strict=True) if answer != "DROP"
        ]
    for each in questions:
        decision = decided(table, each)
        if decision.verdict is Outcome.REJECT:
            answer = each.asked(lab)
            if answer != "REJECT":
                found.append(f"{each}: {answer}, not REJECT")
        if decision.verdict is not Outcome.FORWARD:
            continue
        servers = set()
        for _ in decision.candidates:
            answer = each.asked(lab)
            if isinstance(answer, str):
                found.append(f"{each}: {answer}, not {decision.candidates}")
                break
            servers.add(answer.server)
            masked = next((c.masquerade for c in decision.candidates if c.backend.address == answer.server), None)
            client = v6(each.client) if each.client and ":" in answer.client else each.client
            if (
                masked is None
                or (answer.client in own) != (masked or not each.client)
                or not (masked or answer.client in (client, *own))
            ):
                found.append(f"{each}: {answer}, not {decision.candidates}")
        if servers and servers != {c.backend.address for c in decision.candidates}:
            found.append(f"{each}: only {servers}")
    return found


@pytest.mark.timeout(900)
def test_packets_go_where_decide_says(lab: Lab, dataplane: IpvsDataplane) -> None:
    """TCP over IPv4 and datagrams over IPv6: what the two have in common need not be asked twice."""
    table = world_of(*WORLD)
    synced(lab, dataplane, table)
    undefined = {Frontend(WEB, 81, TCP), Frontend(v6(WEB), 81, UDP)}
    frontends = sorted(
        frontend
        for frontend in {frontend for frontend, _ in table} | undefined
        if (frontend.protocol is UDP) == (":" in frontend.address) and frontend.address not in both(BRIDGE_IP)
    )
    questions = [Question(client, frontend) for client in CLIENTS for frontend in frontends]
    assert len(questions) > 100
    found = differences(lab, table, questions)
    assert not found, "\n".join(found)


# ---- Flows


def talks(made: socket.socket) -> bool:
    """Whether a connection goes on."""
    try:
        return bool(asked(made))
    except (Refused, OSError):
        return False


def test_an_established_connection_goes_on_while_its_backend_leaves(lab: Lab, dataplane: IpvsDataplane) -> None:
    synced(lab, dataplane, world_of(*service_of("web", WEB, POD)))
    with lab.connected(PEER, WEB, 80) as made:
        assert asked(made).server == POD
        synced(lab, dataplane, world_of(*service_of("web", WEB, REMOTE)))
        assert talks(made), "the backend left, its connection did not"
        assert lab.ask(PEER, WEB, 80).server == REMOTE
        lab.on_node(dataplane.audit)
        assert talks(made)
        raw = lab.on_node(lambda: dataplane.tables("raw"))
        assert any(item.get("leaving") and item["destination"] == f"{POD}:80" for item in raw)
        client = f"{PEER}:{made.getsockname()[1]}"
        (flow,) = (item for item in lab.on_node(lambda: dataplane.tables("flows")) if item["client"] == client)
        assert (flow["frontend"], flow["backend"], flow["state"]) == (f"{WEB}:80", f"{POD}:80", "established")
        assert not lab.on_node(dataplane.retire), "a connection is left"
        assert talks(made)


def test_affinity_keeps_a_client_where_it_was(lab: Lab, dataplane: IpvsDataplane) -> None:
    external = both("192.168.99.7")
    table = world_of(
        *service_of("sticky", STICKY, POD, REMOTE, target=8080, affinity=600, external_policy=LOCAL, external=external)
    )
    synced(lab, dataplane, table)
    for address in (STICKY, v6(STICKY)):
        first = lab.ask(PEER, address, 80).server
        assert {lab.ask(PEER, address, 80).server for _ in range(4)} == {first}
    assert lab.ask(OUTSIDE, "192.168.99.7", 80).server == POD
    templates = lab.on_node(lambda: dataplane.tables("affinity"))
    assert any(item["client"] == PEER and item["frontend"] == f"{STICKY}:80/TCP" for item in templates)


def test_every_scheduler_of_the_kernel_can_be_chosen(lab: Lab) -> None:
    for scheduler in ("rr", "wrr", "lc", "wlc", "sh", "mh", "sed", "nq", "dh", "ovf", "fo", "lblc", "lblcr"):
        found = IpvsDataplane(IpvsOptions(scheduler), variant="nft")
        (said,) = (each for each in lab.on_node(found.requirements) if each.name == "scheduler")
        assert said.found, said
    lab.on_node(IpvsDataplane(IpvsOptions(), variant="nft").check)
    with pytest.raises(Unsupported, match="scheduler is missing .nosuch.*modprobe ip_vs_nosuch"):
        lab.on_node(IpvsDataplane(IpvsOptions("nosuch"), variant="nft").check)


def test_settings_are_made(lab: Lab) -> None:
    chosen = IpvsOptions("wlc", strict_arp=True, tcp_timeout=901, tcp_fin_timeout=121, udp_timeout=301)
    found = IpvsDataplane(chosen, variant="nft")
    lab.on_node(found.start)
    try:
        assert "901 121 301" in run(lab, "ipvsadm", "-l", "--timeout")
        for each in facts.sysctls(chosen, facts.release()):
            assert lab.on_node((facts.SYS / each.path).read_text).strip() == str(each.value)
    finally:
        lab.on_node(found.cleanup)


# ---- What others do


def test_damage_is_noticed_and_repaired(lab: Lab, dataplane: IpvsDataplane) -> None:
    table = world_of(*WORLD)
    synced(lab, dataplane, table)
    kernel = NetlinkKernel()
    theirs = Server(4, 0, 6, packed("198.51.100.1"), 80)
    lab.on_node(lambda: kernel.apply([Operation(NEW_SERVICE, theirs, Settings("rr"))]))
    run(lab, "ipset", "create", "THEIRS", "hash:ip")
    run(lab, "iptables-nft", "-I", "INPUT", "-s", "198.51.100.2", "-j", "ACCEPT")
    try:
        for damage in (
            lambda: kernel.apply([Operation(DEL_SERVICE, Server(4, 0, 6, packed(WEB), 80))]),
            lambda: run(lab, "ipset", "flush", "KUBE-CLUSTER-IP"),
            lambda: run(lab, "ip", "addr", "del", f"{WEB}/32", "dev", "kube-ipvs0"),
            lambda: run(lab, "iptables-nft", "-t", "nat", "-I", "KUBE-SERVICES", "-j", "ACCEPT"),
        ):
            lab.on_node(damage)
            report = lab.on_node(dataplane.audit)
            assert report.complete and report.written, report
            assert lab.on_node(dataplane.state) == table
        run(lab, "iptables-nft", "-t", "nat", "-F")
        assert not lab.on_node(dataplane.canary)
        assert lab.on_node(dataplane.audit).complete
        assert lab.on_node(dataplane.canary)
        assert lab.ask(PEER, WEB, 80).server in (POD, REMOTE)
        lab.on_node(dataplane.cleanup)
        assert list(lab.on_node(kernel.servers)) == [theirs]
        assert run(lab, "ipset", "list", "-n").split() == ["THEIRS"]
        assert "198.51.100.2" in run(lab, "iptables-nft-save")
    finally:
        lab.on_node(lambda: kernel.apply([Operation(DEL_SERVICE, theirs)]))
        run(lab, "ipset", "destroy", "THEIRS")
        run(lab, "iptables-nft", "-D", "INPUT", "-s", "198.51.100.2", "-j", "ACCEPT")


def test_an_ipset_of_another_type_under_our_name_is_named(lab: Lab) -> None:
    run(lab, "ipset", "create", "KUBE-CLUSTER-IP", "hash:net")
    try:
        with pytest.raises(UserError, match="ipset KUBE-CLUSTER-IP already, but of type hash:net, not hash:ip,port"):
            lab.on_node(IpvsDataplane(IpvsOptions(), variant="nft").start)
        assert run(lab, "ipset", "list", "-n").split() == ["KUBE-CLUSTER-IP"]
    finally:
        run(lab, "ipset", "destroy", "KUBE-CLUSTER-IP")


@pytest.mark.parametrize("dataplane", ["legacy"], indirect=True)
def test_the_legacy_variant(lab: Lab, dataplane: IpvsDataplane) -> None:
    table = world_of(*service_of("web", WEB, POD))
    synced(lab, dataplane, table)
    audit = lab.on_node(dataplane.audit)
    assert (audit.written, audit.removed) == (0, 0)
    assert lab.ask(POD, WEB, 80) == Answer(POD, BRIDGE_IP), "who reaches itself is masqueraded"
