"""What the IPVS dataplane writes, in which order, and what follows from what the kernel refuses."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from ebpflb.conntrack import StaleFlows
from ebpflb.dataplane import Report
from ebpflb.dataplane.ipvs import facts, messages, rules
from ebpflb.dataplane.ipvs.dataplane import IpvsDataplane
from ebpflb.dataplane.ipvs.messages import Operation
from ebpflb.dataplane.ipvs.names import LOCALITY, OURS, SET_NAMES, Set
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.reading import Destination
from ebpflb.dataplane.ipvs.table import Server, Settings, packed, place, server_of
from ebpflb.errors import Unsupported, UserError
from ebpflb.model import Family, Protocol
from ebpflb.netfilter.ruleset import Rules
from ebpflb.policy import routes as routes_of
from ebpflb.routes import Frontend, HealthCheck, RouteTable
from ebpflb.rtnetlink import Netlink
from tests.ipvs import FakeKernel, FakeTables
from tests.world import (
    LOCAL,
    NODE_IP,
    endpoint_slice,
    leaving,
    options,
    port,
    ready,
    service,
    slice_port,
    snapshot,
)

NODE_ADDRESSES = ("127.0.0.1", NODE_IP)
WEB = Frontend("172.30.0.41", 80, Protocol.TCP)


class Standing:
    """A dataplane over a kernel in memory. It never starts: sysctls are the real kernel's."""

    def __init__(self, **more: object) -> None:
        self.kernel = FakeKernel(NODE_ADDRESSES)
        self.tables = {4: FakeTables(), 6: FakeTables()}
        self.options = IpvsOptions(**more)  # type: ignore[arg-type]
        self.dataplane = self.successor()

    def successor(self) -> IpvsDataplane:
        found = IpvsDataplane(
            self.options, kernel=self.kernel, tables=dict(self.tables), stale=_NoFlows(), settings=lambda options: 0
        )
        found.start()
        return found

    def sync(self, table: RouteTable) -> Report:
        self.kernel.log.clear()
        report = self.dataplane.sync(table)
        assert report.complete, report.problems
        assert self.dataplane.state() == table
        return report

    def places(self, frontend: Frontend = WEB) -> dict[bytes, Destination]:
        return self.kernel.places[server_of(frontend)]


class _NoFlows(StaleFlows):
    def __init__(self) -> None:
        super().__init__(connect=_no_socket)


def _no_socket() -> Netlink:
    raise OSError(errno.EPROTONOSUPPORT, "not here")


def world(*objects: object) -> RouteTable:
    return routes_of(snapshot(*objects), options(localhost_nodeports=False))  # type: ignore[arg-type]


def web(*backends: object, **more: object) -> RouteTable:
    """`ns1/svc1` with these endpoints."""
    return world(service(**more), *([endpoint_slice(*backends)] if backends else []))  # type: ignore[arg-type]


@pytest.fixture
def standing() -> Standing:
    return Standing()


# ---- What is written


def test_only_what_changed_is_written(standing: Standing) -> None:
    standing.sync(web("10.0.1.1", "10.0.2.1"))
    report = standing.sync(web("10.0.1.1", "10.0.2.1", "10.0.2.2"))
    assert [line for line in standing.kernel.log if line.startswith("ipvs")] == [
        f"ipvs {messages.NEW_DEST} {server_of(WEB)}"
    ]
    assert (report.written, report.removed) == (2, 0), "a destination, and its hairpin"


def test_what_leads_to_a_frontend_comes_last_and_goes_first(standing: Standing) -> None:
    standing.sync(world())
    standing.sync(web("10.0.1.1", "10.0.2.1", external=("192.168.99.1",), external_policy=LOCAL))
    log = standing.kernel.log
    marks, address = log.index(f"ipset add {Set.MARKS.base}"), log.index("address add")
    first = [at for at, line in enumerate(log) if line.startswith("ipvs")]
    assert log.index(f"ipset add {Set.CLUSTER_IP.base}") < first[0] < first[-1] < marks < address
    standing.sync(world())
    log = standing.kernel.log
    assert log.index(f"ipset del {Set.MARKS.base}") < log.index("address del")
    assert log.index("address del") < log.index(f"ipset del {Set.CLUSTER_IP.base}")
    assert log.index(f"ipset del {Set.CLUSTER_IP.base}") < log.index(f"ipvs {messages.DEL_SERVICE} {server_of(WEB)}")


def test_a_frontend_that_loses_its_endpoints_refuses_before_they_go(standing: Standing) -> None:
    standing.sync(web("10.0.1.1"))
    standing.sync(web())
    log = standing.kernel.log
    assert log.index(f"ipset add {Set.REJECT.base}") < next(
        at for at, line in enumerate(log) if line.startswith("ipvs")
    )


def test_a_new_locality_writes_rules(standing: Standing) -> None:
    standing.sync(web("10.0.1.1"))
    before = standing.tables[4].writes
    standing.sync(routes_of(snapshot(service(), endpoint_slice("10.0.1.1")), options(cluster_cidrs=("10.0.0.0/16",))))
    assert standing.tables[4].writes == before + 1
    assert standing.tables[4].chains["filter"][LOCALITY] == (f"-A {LOCALITY} -s 10.0.0.0/16",)


def test_health_checks_are_let_in(standing: Standing) -> None:
    table = web("10.0.1.1")
    check = HealthCheck(service().name, Family.IPV4, 32000, (), 1)
    standing.sync(table)
    standing.sync(table.evolve({}, health={(check.service, check.family): check}))
    assert standing.kernel.contents[Set.HEALTH.base] == {(32000).to_bytes(2, "big"): None}
    standing.sync(table.evolve({}))
    assert standing.kernel.contents[Set.HEALTH.base] == {}


def test_two_services_with_one_backend_share_its_hairpin(standing: Standing) -> None:
    other = (service("ns1/other", "172.30.0.42"), endpoint_slice("10.0.1.1", of="ns1/other"))
    both = world(service(), endpoint_slice("10.0.1.1"), *other)
    standing.sync(both)
    assert len(standing.kernel.contents[Set.LOOP_BACK.base]) == 1
    standing.sync(world(*other))
    assert len(standing.kernel.contents[Set.LOOP_BACK.base]) == 1
    standing.sync(world())
    assert standing.kernel.contents[Set.LOOP_BACK.base] == {}


# ---- Leaving


def test_a_destination_with_connections_leaves_when_they_have_ended(standing: Standing) -> None:
    gone = place("10.0.2.1", 80)
    standing.sync(web("10.0.1.1", "10.0.2.1"))
    standing.kernel.busy[gone] = 2
    standing.sync(web("10.0.1.1"))
    assert standing.places()[gone] == Destination(0, leaving=True)
    standing.dataplane.audit()
    assert gone in standing.places(), "its connections go on"
    standing.kernel.busy.clear()
    report = standing.dataplane.audit()
    assert gone not in standing.places()
    assert report.removed == 1


def test_a_destination_without_connections_leaves_at_once(standing: Standing) -> None:
    standing.sync(web("10.0.1.1", "10.0.2.1"))
    standing.sync(web("10.0.1.1"))
    assert set(standing.places()) == {place("10.0.1.1", 80)}


def test_a_datagram_destination_leaves_at_once(standing: Standing) -> None:
    def dns(*backends: str) -> RouteTable:
        ports = (slice_port(53, "d", Protocol.UDP),)
        return world(
            service("ns1/svc1", "172.30.0.41", port(53, "d", Protocol.UDP)), endpoint_slice(*backends, ports=ports)
        )

    standing.sync(dns("10.0.1.1", "10.0.2.1"))
    standing.kernel.busy[place("10.0.2.1", 53)] = 2
    standing.sync(dns("10.0.1.1"))
    assert set(standing.places(Frontend("172.30.0.41", 53, Protocol.UDP))) == {place("10.0.1.1", 53)}


def test_a_destination_that_comes_back_serves_again(standing: Standing) -> None:
    gone = place("10.0.2.1", 80)
    standing.sync(web("10.0.1.1", "10.0.2.1"))
    standing.kernel.busy[gone] = 2
    standing.sync(web("10.0.1.1"))
    standing.sync(web("10.0.1.1", "10.0.2.1"))
    assert standing.places()[gone] == Destination(1)
    standing.dataplane.audit()
    assert standing.places()[gone] == Destination(1)


def test_draining_is_not_leaving(standing: Standing) -> None:
    """Both have weight 0; but one is a backend of the route, the other is none."""
    draining = place("10.0.2.1", 80)
    standing.sync(web(ready("10.0.1.1"), leaving("10.0.2.1")))
    assert standing.places()[draining] == Destination(0)
    assert standing.dataplane.audit().written == 0


def test_all_destinations_leave_and_the_virtual_server_follows(standing: Standing) -> None:
    gone = place("10.0.1.1", 80)
    standing.sync(web("10.0.1.1"))
    standing.kernel.busy[gone] = 1
    standing.sync(web())
    assert standing.places()[gone] == Destination(0, leaving=True)
    successor = standing.successor()
    table = web()
    assert successor.sync(table).complete
    assert gone in standing.places(), "a restart does not end connections"
    standing.kernel.busy.clear()
    successor.audit()
    assert standing.kernel.held == {}


def test_a_frontend_that_is_gone_goes_at_once(standing: Standing) -> None:
    standing.sync(web("10.0.1.1"))
    standing.kernel.busy[place("10.0.1.1", 80)] = 1
    standing.sync(world())
    assert standing.kernel.held == {}
    assert standing.kernel.bound == set()


def test_retire_gives_no_new_connections(standing: Standing) -> None:
    standing.sync(web("10.0.1.1"))
    standing.kernel.busy[place("10.0.1.1", 80)] = 1
    assert not standing.dataplane.retire()
    assert standing.places() == {place("10.0.1.1", 80): Destination(0, leaving=True)}
    standing.kernel.busy.clear()
    assert standing.successor().retire()


# ---- What others did


DAMAGES: dict[str, Callable[[FakeKernel], object]] = {
    "a virtual server was deleted": lambda kernel: kernel.apply([Operation(messages.DEL_SERVICE, server_of(WEB))]),
    "a destination was deleted": lambda kernel: kernel.places[server_of(WEB)].clear(),
    "a weight was changed": lambda kernel: kernel.places[server_of(WEB)].update(
        {place("10.0.1.1", 80): Destination(7)}
    ),
    "a destination was added": lambda kernel: kernel.places[server_of(WEB)].update(
        {place("10.9.9.9", 80): Destination(1)}
    ),
    "a scheduler was changed": lambda kernel: kernel.held.update({server_of(WEB): Settings("lc")}),
    "a set was flushed": lambda kernel: kernel.contents[Set.CLUSTER_IP.base].clear(),
    "our registry was flushed": lambda kernel: kernel.contents[Set.FRONTENDS.base].clear(),
    "a set was destroyed": lambda kernel: kernel.destroy(Set.LOOP_BACK.base),
    "an entry was added": lambda kernel: kernel.contents[Set.REJECT.base].update({b"\x01\x02\x03\x04\0\x50\x06": None}),
    "an address was taken": lambda kernel: kernel.bound.clear(),
    "an address was added": lambda kernel: kernel.bound.add(packed("1.2.3.4")),
    "the device was removed": lambda kernel: kernel.remove_device(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_audit_repairs(standing: Standing, damage: str) -> None:
    table = web("10.0.1.1", "10.0.2.1")
    standing.sync(table)
    DAMAGES[damage](standing.kernel)
    report = standing.dataplane.audit()
    assert report.complete and report.written + report.removed >= 1, report
    assert standing.dataplane.state() == table
    clean = standing.dataplane.audit()
    assert (clean.written, clean.removed) == (0, 0)


RULE_DAMAGES: dict[str, tuple[str, str, Callable[[Rules], Rules]]] = {
    "a rule was inserted": ("nat", "KUBE-SERVICES", lambda rules: ("-A KUBE-SERVICES -j DROP", *rules)),
    "a chain was flushed": ("filter", "KUBE-IPVS-FILTER", lambda rules: ()),
    "a jump was removed": ("nat", "PREROUTING", lambda rules: ()),
    "jumps stand in another order": ("filter", "INPUT", lambda rules: tuple(reversed(rules))),
}


@pytest.mark.parametrize("damage", RULE_DAMAGES)
def test_an_audit_mends_rules_and_leaves_others(standing: Standing, damage: str) -> None:
    table, chain, change = RULE_DAMAGES[damage]
    standing.sync(web("10.0.1.1"))
    rules = standing.tables[4].chains
    rules["nat"]["OUTPUT"] += ("-A OUTPUT -j DOCKER",)
    rules["nat"]["DOCKER"] = ("-A DOCKER -j RETURN",)
    before = standing.tables[4].read()
    rules[table][chain] = change(rules[table][chain])
    assert standing.dataplane.audit().written >= 1
    assert standing.tables[4].read() == before


def test_a_flush_is_noticed(standing: Standing) -> None:
    standing.sync(web("10.0.1.1"))
    assert standing.dataplane.canary()
    rules = standing.tables[6].chains
    rules["nat"] = {name: () for name in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")}
    assert not standing.dataplane.canary()
    standing.dataplane.audit()
    assert standing.dataplane.canary()
    standing.kernel.held.clear()
    standing.kernel.places.clear()
    assert not standing.dataplane.canary()


def test_virtual_servers_of_others_stay() -> None:
    """Also one at an address of ours that the operator excluded."""
    standing = Standing(exclude_cidrs=("172.30.0.0/24",))
    kernel = standing.kernel
    theirs = [Server(4, 0, 6, packed("198.51.100.1"), 80), Server(4, 7), Server(4, 0, 6, packed("172.30.0.41"), 8443)]
    kernel.apply([Operation(messages.NEW_SERVICE, server, Settings("rr")) for server in theirs])
    standing.sync(web("10.0.1.1"))
    standing.dataplane.audit()
    standing.sync(world())
    standing.dataplane.cleanup()
    assert set(kernel.held) == set(theirs)


def test_a_stale_virtual_server_at_an_address_of_ours_goes(standing: Standing) -> None:
    """kube-proxy's, of a port that the Service has no more."""
    stale = Server(4, 0, 6, packed("172.30.0.41"), 8443)
    standing.kernel.apply([Operation(messages.NEW_SERVICE, stale, Settings("rr"))])
    standing.sync(web("10.0.1.1"))
    assert stale not in standing.kernel.held


def test_cleanup_leaves_what_was_there(standing: Standing) -> None:
    for tables in standing.tables.values():
        tables.chains["filter"]["KUBE-FIREWALL"] = ("-A KUBE-FIREWALL -j RETURN",)
        tables.chains["filter"]["INPUT"] = ("-A INPUT -j KUBE-FIREWALL",)
    before = [tables.read() for tables in standing.tables.values()]
    standing.sync(web("10.0.1.1", external=("192.168.99.1",), external_policy=LOCAL))
    assert standing.dataplane.inventory()
    standing.dataplane.cleanup()
    assert [tables.read() for tables in standing.tables.values()] == before
    kernel = standing.kernel
    assert (kernel.held, kernel.sets, kernel.device) == ({}, {}, False)
    assert standing.dataplane.inventory() == ()
    standing.dataplane.cleanup()


# ---- The other netfilter dataplane


def iptables_rules(tables: FakeTables) -> None:
    """As it has them, as far as names go."""
    chains = tables.chains
    chains["nat"]["PREROUTING"] = ('-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',)
    chains["nat"]["KUBE-SERVICES"] = ("-A KUBE-SERVICES -d 172.30.0.41/32 -j KUBE-SVC-A",)
    chains["nat"]["KUBE-SVC-A"] = ("-A KUBE-SVC-A -j KUBE-SEP-A",)
    chains["nat"]["KUBE-SEP-A"] = ("-A KUBE-SEP-A -j DNAT",)
    chains["filter"][LOCALITY] = ()
    chains["filter"]["INPUT"] = ("-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES",)
    chains["filter"]["KUBE-EXTERNAL-SERVICES"] = ()


def test_taking_over_from_iptables_replaces_its_chains(standing: Standing) -> None:
    iptables_rules(standing.tables[4])
    standing.sync(web("10.0.1.1"))
    chains = standing.tables[4].chains
    assert OURS in chains["filter"]
    wanted = rules.ruleset(standing.dataplane.state().locality, 4, standing.dataplane.mark)
    for table in chains:
        assert {name for name in chains[table] if name.startswith(("KUBE", "EBPFLB"))} == set(wanted[table])
    assert not any("KUBE-EXTERNAL" in rule for rule in chains["filter"]["INPUT"])


def test_what_iptables_has_taken_over_is_left_to_it(standing: Standing) -> None:
    standing.sync(web("10.0.1.1"))
    chains = standing.tables[4].chains
    del chains["filter"][OURS]
    chains["nat"]["KUBE-SERVICES"] = ("-A KUBE-SERVICES -d 172.30.0.41/32 -j KUBE-SVC-A",)
    portals = chains["nat"]["PREROUTING"]
    assert dict(standing.dataplane.state()) == {}
    assert standing.dataplane.retire()
    standing.dataplane.cleanup()
    assert chains["nat"]["PREROUTING"] == portals
    assert chains["nat"]["KUBE-SERVICES"]
    assert set(chains["filter"]) == {"INPUT", "FORWARD", "OUTPUT", LOCALITY, "KUBE-FORWARD", "KUBE-PROXY-FIREWALL"}
    assert standing.kernel.held == {}


# ---- Refusals


def test_a_refused_write_is_named_and_tried_again(standing: Standing) -> None:
    standing.kernel.refuse[messages.NEW_SERVICE] = errno.ENOENT
    report = standing.dataplane.sync(web("10.0.1.1"))
    assert not report.complete
    assert any("no scheduler rr" in problem.reason and problem.subject == "ns1/svc1" for problem in report.problems)
    standing.kernel.refuse.clear()
    standing.sync(web("10.0.1.1"))


def test_a_missing_right_is_named(standing: Standing) -> None:
    standing.kernel.refuse[Set.CLUSTER_IP.base] = errno.EPERM
    report = standing.dataplane.sync(web("10.0.1.1"))
    assert [problem.reason for problem in report.problems] == [
        "ipset KUBE-CLUSTER-IP: Operation not permitted: it needs root and the capability CAP_NET_ADMIN"
    ]


def test_an_ipset_of_another_type_under_our_name_is_refused_before_anything_is_written() -> None:
    standing = Standing()
    standing.dataplane.cleanup()
    name = Set.NODE_PORT_TCP.base
    standing.kernel.create(Set.NODE_IPS, 4)
    standing.kernel.sets[name] = standing.kernel.sets.pop(Set.NODE_IPS.base)._replace(name=name)
    standing.kernel.contents[name] = standing.kernel.contents.pop(Set.NODE_IPS.base)
    with pytest.raises(UserError, match="ipset KUBE-NODE-PORT-TCP already, but of type hash:ip, not bitmap:port"):
        standing.successor()
    assert set(standing.kernel.sets) == {name}


def test_marks_are_given_again_when_they_are_free(standing: Standing) -> None:
    def table(*external: str) -> RouteTable:
        return web("10.0.1.1", "10.0.2.1", external=external, external_policy=LOCAL)

    standing.sync(table("192.168.99.1"))
    first = next(server.mark for server in standing.kernel.held if server.mark)
    for at in range(2, 6):
        standing.sync(table(f"192.168.99.{at}"))
    marks = {server.mark for server in standing.kernel.held if server.mark}
    assert len(marks) == 1 and max(marks) <= first + 1


def test_a_restart_keeps_marks(standing: Standing) -> None:
    table = web("10.0.1.1", "10.0.2.1", external=("192.168.99.1", "192.168.99.2"), external_policy=LOCAL)
    standing.sync(table)
    before = dict(standing.kernel.contents[Set.MARKS.base])
    report = standing.successor().sync(table)
    assert (report.written, report.removed) == (0, 0)
    assert standing.kernel.contents[Set.MARKS.base] == before


# ---- Settings


@pytest.mark.parametrize(
    ("kernel", "strict", "expected"),
    [
        ((4, 0), False, set()),
        ((4, 1), False, {"ipv4/vs/conn_reuse_mode"}),
        ((5, 8), False, {"ipv4/vs/conn_reuse_mode"}),
        ((5, 9), False, set()),
        ((6, 12), True, {"ipv4/conf/all/arp_ignore", "ipv4/conf/all/arp_announce"}),
    ],
)
def test_settings_by_kernel(kernel: tuple[int, int], strict: bool, expected: set[str]) -> None:
    always = {"ipv4/vs/conntrack", "ipv4/vs/expire_nodest_conn", "ipv4/vs/expire_quiescent_template", "ipv4/ip_forward"}
    assert {each.path for each in facts.sysctls(IpvsOptions(strict_arp=strict), kernel)} == always | expected


def test_settings_that_are_right_are_not_written(tmp_path: Path) -> None:
    for each in facts.sysctls(IpvsOptions(), (6, 1)):
        path = tmp_path / each.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0\n" if each.path == "ipv4/ip_forward" else f"{each.value}\n")
    assert facts.set_sysctls(IpvsOptions(), tmp_path, (6, 1)) == 1
    assert facts.set_sysctls(IpvsOptions(), tmp_path, (6, 1)) == 0


class WithoutIpvs(FakeKernel):
    def servers(self) -> dict[Server, Settings]:
        raise OSError(errno.ENOENT, "No such file or directory")


def test_a_kernel_without_ipvs_is_refused_in_words() -> None:
    found = IpvsDataplane(IpvsOptions(), kernel=WithoutIpvs(), tables={}, variant="nft")
    with pytest.raises(Unsupported, match="ipvs is missing .*CONFIG_IP_VS; modprobe ip_vs"):
        found.check()


def test_a_scheduler_that_the_kernel_lacks_is_named() -> None:
    kernel = FakeKernel()
    kernel.refuse[messages.NEW_SERVICE] = errno.ENOENT
    found = IpvsDataplane(IpvsOptions("twos"), kernel=kernel, tables={}, variant="nft")
    (said,) = (each for each in found.requirements() if each.name == "scheduler")
    assert not said.found and "modprobe ip_vs_twos" in said.remedy
    assert kernel.held == {} and not kernel.device, "nothing outlives the question"


def test_every_set_is_made(standing: Standing) -> None:
    assert set(standing.kernel.sets) == set(SET_NAMES)
