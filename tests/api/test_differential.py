"""What real kube-proxies do with every packet, and what we do: the same, but for differences that have a name.

Rules of this file: kube-proxy's own rules are walked, as its iptables-save prints them, and so are ours for what the
same API server and the same kernel say. Both are compared with `decide`. Where kube-proxy differs it is known how: a
Difference says in which situation, and what kube-proxy does there, which is checked like everything else. One that no
packet meets is an error, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import pytest

from ebpflb.decide import Decision, Outcome, Packet, decide
from ebpflb.model import Address, DetectLocal, Protocol, ServiceName, Snapshot
from ebpflb.policy import routes
from ebpflb.routes import Frontend, Key, Kind, Route, RouteTable, Scope, Verdict
from tests.api.conftest import OnFailure
from tests.api.kube_proxies import KubeProxies, Proxy
from tests.api.random_objects import MOST, backend_at_a_refused_frontend, world
from tests.plan.rulesets import saved
from tests.plan.worlds import Client, packets
from tests.tracers import Traced, expected, is_local
from tests.tracers.iptables import Tracer
from tests.world import options

pytestmark = [pytest.mark.api, pytest.mark.root]

BOTH = ("10.0.0.0/8", "fd00:10::/32")
BRIDGE, PREFIX = DetectLocal.BRIDGE_INTERFACE, DetectLocal.INTERFACE_NAME_PREFIX
PROXIES = (
    Proxy("cluster-cidr", "node1", options(cluster_cidrs=BOTH)),
    Proxy("no-detector", "node2", options(cluster_cidrs=())),
    Proxy(
        "bridge",
        "node1",
        options(cluster_cidrs=(), detect_local=BRIDGE, bridge_interface="cni0", nodeport_addresses=("192.168.0.0/24",)),
    ),
    Proxy(
        "prefix-masquerade-all",
        "node2",
        options(
            cluster_cidrs=(),
            detect_local=PREFIX,
            interface_name_prefix="veth",
            masquerade_all=True,
            localhost_nodeports=False,
        ),
    ),
    Proxy("primary", "node1", options(cluster_cidrs=BOTH[:1], nodeport_primary=True)),
    Proxy(
        "node-cidr",
        "node3",
        options(
            cluster_cidrs=(), detect_local=DetectLocal.NODE_CIDR, nodeport_addresses=("127.0.0.0/8", "192.168.0.0/24")
        ),
    ),
)

MANY, FEW = 32, 8
"""Packets of a world for its frontends, and for what is none."""

LEAST = 50
"""Packets of each verdict, for every kube-proxy."""

SEED = 5


# ---- What is known to differ ----


NodePorts = dict[tuple[bool, int, Protocol], Route]
"""The EXTERNAL routes of node ports, by family, port and protocol."""


class Situation(NamedTuple):
    """A packet, and all that decides about it."""

    packet: Packet
    own: bool
    decision: Decision
    table: RouteTable
    snapshot: Snapshot
    node_ports: NodePorts

    @property
    def frontend(self) -> Frontend:
        return Frontend(self.packet.destination, self.packet.port, self.packet.protocol)

    @property
    def stays(self) -> bool:
        """Whether it goes to an address of the node."""
        return is_local(self.packet.destination, self.table.locality.node_addresses)


Difference = Callable[[Situation, Traced], "Traced | None"]
"""What kube-proxy does where we do as the answer says; None where it does the same. Its docstring says why."""

NOTHING = Traced(Outcome.NOT_SERVICE)


def undefined_port(at: Situation, answer: Traced) -> Traced | None:
    """A port that a cluster IP does not have is let go; we refuse it, as nftables mode does."""
    return NOTHING if answer.verdict is Outcome.REJECT and at.decision.route is None else None


def no_endpoints_before_ranges(at: Situation, answer: Traced) -> Traced | None:
    """Without any endpoint there is no firewall: even who is in no source range is told so. As nftables mode, we look
    at the ranges first."""
    route = at.decision.route
    if answer.verdict is Outcome.DROP and route and route.verdict is Verdict.REJECT:
        return Traced(Outcome.REJECT, "tcp-reset")
    return None


def external_ip_that_is_a_balancers(at: Situation, answer: Traced) -> Traced | None:
    """Of an external IP that is also a load balancer's the source ranges are not looked at; nftables mode and we do."""
    route = at.decision.route
    if route is None or route.kind is not Kind.LOAD_BALANCER or not route.source_ranges:
        return None
    if at.packet.destination not in at.snapshot.services[route.service.service].external_ips:
        return None
    rows = {(at.frontend, scope): at.table[at.frontend, scope] for scope in Scope}
    opened = {key: msgspec.structs.replace(found, source_ranges=()) for key, found in rows.items()}
    return expected(decide(RouteTable(opened, at.table.locality), at.packet), at.packet)


def own_packet_to_elsewhere(at: Situation, answer: Traced) -> Traced | None:
    """The refusal of an external address hangs on INPUT and FORWARD: the node's own packets leave. nftables mode and we
    refuse them."""
    route = at.decision.route
    external = route is not None and route.kind in (Kind.LOAD_BALANCER, Kind.EXTERNAL_IP)
    return NOTHING if answer.verdict is Outcome.REJECT and external and at.own and not at.stays else None


def node_port_on_every_address(at: Situation, answer: Traced) -> Traced | None:
    """A node port without endpoints is refused, and one without local ones dropped, on all addresses of the node,
    whichever may have node ports; nftables mode and we leave the others alone."""
    if answer.verdict is not Outcome.NOT_SERVICE or not at.stays:
        return None
    route = at.node_ports.get((":" in at.packet.destination, at.packet.port, at.packet.protocol))
    if route is None or route.verdict is Verdict.FORWARD:
        return None
    return Traced(Outcome.REJECT, "tcp-reset") if route.verdict is Verdict.REJECT else Traced(Outcome.DROP)


def translated_to_a_refused_frontend(at: Situation, answer: Traced) -> Traced | None:
    """Refusals look at where a packet goes after its translation: whoever is sent to a backend that listens where an
    external frontend without endpoints is, is refused. We spare what was translated."""
    if answer.verdict is not Outcome.FORWARD or len(answer.backends) != 1:
        return None
    (((address, port), masqueraded),) = answer.backends.items()
    route = at.table.get((Frontend(address, port, at.packet.protocol), Scope.EXTERNAL))
    if route is None or route.kind is Kind.CLUSTER_IP or route.verdict is not Verdict.REJECT:
        return None
    # On its way to another host, what is masqueraded is accepted before that, and the node's own is not asked.
    spared = (at.own or masqueraded) and not is_local(address, at.table.locality.node_addresses)
    return None if spared else Traced(Outcome.REJECT, "tcp-reset")


def refused_by_icmp(at: Situation, answer: Traced) -> Traced | None:
    """TCP is refused by an ICMP error, which a client's connect() may miss for a second; we reset."""
    how = "icmp6-port-unreachable" if ":" in at.packet.destination else "icmp-port-unreachable"
    return answer._replace(how=how) if answer.verdict is Outcome.REJECT and answer.how != how else None


DIFFERENCES: tuple[Difference, ...] = (
    undefined_port,
    no_endpoints_before_ranges,
    external_ip_that_is_a_balancers,
    own_packet_to_elsewhere,
    node_port_on_every_address,
    translated_to_a_refused_frontend,
    refused_by_icmp,
)
"""In the order in which one may lead to another."""


def node_ports_of(table: RouteTable) -> NodePorts:
    return {
        (":" in frontend.address, frontend.port, frontend.protocol): route
        for (frontend, scope), route in table.items()
        if route.kind is Kind.NODE_PORT and scope is Scope.EXTERNAL
    }


# ---- The comparison ----


@pytest.fixture(scope="module")
def kube_proxies(programs: dict[str, Path]) -> Iterator[KubeProxies]:
    """All of them, with everything written or on its way."""
    chance = Random(SEED)
    worlds = [*(world(chance, number) for number in range(MOST)), backend_at_a_refused_frontend(MOST)]
    with KubeProxies(programs, PROXIES) as found:
        found.load([each for some, _ in worlds for each in some], [each for _, some in worlds for each in some])
        found.start()
        yield found


@pytest.fixture(scope="module")
def met() -> Iterator[dict[str, Counter[str]]]:
    """How many packets met each difference, by kube-proxy. A difference that nobody met is none."""
    found: dict[str, Counter[str]] = {}
    yield found
    if len(found) == len(PROXIES):
        missing = {each.__name__ for each in DIFFERENCES} - set().union(*found.values())
        assert not missing, f"never met: {missing}"


def worlds_of(table: RouteTable) -> dict[str, RouteTable]:
    """The rows and cluster IPs of each world."""
    rows: dict[str, dict[Key, Route]] = {}
    for key, route in table.items():
        rows.setdefault(route.service.namespace, {})[key] = route
    owned: dict[str, dict[Address, ServiceName]] = {}
    for address, service in table.owned.items():
        owned.setdefault(service.namespace, {})[address] = service
    return {name: RouteTable(found, table.locality, owned=owned[name]) for name, found in rows.items()}


def packets_of(rows: RouteTable, chance: Random) -> Iterator[tuple[Client, Packet]]:
    """Some of the grid, most of them for a frontend."""
    grid: tuple[list[tuple[Client, Packet]], ...] = ([], [])
    for client, packet in packets(rows):
        frontend = Frontend(packet.destination, packet.port, packet.protocol)
        grid[(frontend, Scope.INTERNAL) in rows].append((client, packet))
    for found, most in zip(grid, (FEW, MANY), strict=True):
        yield from chance.sample(found, min(most, len(found)))


def kube_proxy_does(situation: Situation, answer: Traced) -> tuple[Traced, list[str]]:
    """Our answer, turned into kube-proxy's by the differences that are met; their names."""
    names = []
    for difference in DIFFERENCES:
        said = difference(situation, answer)
        if said is not None and said != answer:
            names.append(difference.__name__)
            answer = said
    return answer, names


def forgets(tracer: Tracer, packet: Packet, decision: Decision) -> str:
    """What is wrong with session affinity, in words: who was sent somewhere is sent there for the Service's time."""
    if decision.route is None or not decision.route.affinity_seconds or len(decision.candidates) < 2:
        return ""
    path = tracer.paths(packet)[-1]
    for age, wanted in ((-1, 1), (0, len(decision.candidates))):
        recent = {name: {packet.source: decision.route.affinity_seconds + age} for name in path.remembered}
        found = tracer.trace(packet, recent)
        if path.to not in found.backends or len(found.backends) != wanted:
            return f"after {path} and {recent}: {found}"
    return ""


@pytest.mark.parametrize("name", [proxy.name for proxy in PROXIES])
def test_kube_proxy_and_we_do_the_same(
    kube_proxies: KubeProxies, met: dict[str, Counter[str]], on_failure: OnFailure, name: str
) -> None:
    on_failure("kube-proxy.log", lambda: kube_proxies.log(name))
    snapshot = kube_proxies.snapshot(name)
    table = routes(snapshot, kube_proxies.proxies[name].options)
    local = frozenset(table.locality.node_addresses)
    written = {"kube-proxy": kube_proxies.saved(name), "ebpflb": saved(table)}
    for who, texts in written.items():
        on_failure(f"{who}.rules", lambda texts=texts: "".join(texts.values()))  # type: ignore[misc]
    tracers = {who: Tracer(texts, local) for who, texts in written.items()}
    node_ports = node_ports_of(table)
    chance = Random(name)
    compared, known = Counter[Outcome](), Counter[str]()
    wrong = []
    for world_name, rows in sorted(worlds_of(table).items()):
        for client, packet in packets_of(rows, chance):
            decision = decide(table, packet)
            wanted = expected(decision, packet)
            situation = Situation(packet, not client.interface, decision, table, snapshot, node_ports)
            other, names = kube_proxy_does(situation, wanted)
            compared[wanted.verdict] += 1
            known.update(names)
            for who, tracer in tracers.items():
                answer = wanted if who == "ebpflb" else other
                found = tracer.trace(packet)
                lost = forgets(tracer, packet, decision) if found.verdict is Outcome.FORWARD else ""
                if found[:3] != answer[:3] or not found.evenly or lost:
                    steps = "\n    ".join([*names, lost, *decision.reasons])
                    wrong.append(f"{world_name}, {who}: {packet}\n  wanted {answer}\n  found  {found}\n    {steps}")
    met[name] = known
    assert not wrong, f"{len(wrong)} of {compared.total()} packets:\n" + "\n".join(wrong[:10])
    assert min(compared[verdict] for verdict in Outcome) > LEAST, compared
