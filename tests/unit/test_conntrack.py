"""Which UDP flows are stale: situations of Services and endpoints, and entries as conntrack has them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from ebpflb.conntrack import Frontends, StaleFlows, stale
from ebpflb.ctnetlink import Entry, end
from ebpflb.model import EndpointSlice, Family, Service
from ebpflb.policy import routes
from ebpflb.routes import RouteTable
from ebpflb.rtnetlink import Netlink
from tests.world import (
    LOCAL,
    NODE_IP,
    OTHER_NODE_IP,
    TCP,
    UDP,
    dying,
    endpoint_slice,
    in_family,
    leaving,
    options,
    port,
    service,
    slice_port,
    snapshot,
    unready,
    v6,
)

DNS = service("kube-system/dns", "172.30.0.10", port(53, "dns", UDP))
ON_NODES = service("ns1/syslog", "172.30.0.20", port(514, "in", UDP, node_port=30514), external=("192.168.99.11",))
FAMILIES = pytest.mark.parametrize("family", Family, ids=["IPv4", "IPv6"])


def answering(*endpoints: object, of: Service = DNS) -> EndpointSlice:
    name, number = of.ports[0].name, {"dns": 5353, "in": 5514}[of.ports[0].name]
    return endpoint_slice(*endpoints, of=str(of.name), ports=(slice_port(number, name, UDP),), name="one")  # type: ignore[arg-type]


def world(*objects: Service | EndpointSlice, family: Family = Family.IPV4) -> RouteTable:
    return routes(in_family(snapshot(*objects), family), in_family(options(), family))


def at(text: str, family: Family) -> bytes:
    address, _, number = text.partition(":")
    return end(address if family is Family.IPV4 else v6(address), int(number))


def entry(destination: str, answerer: str, family: Family = Family.IPV4, zoned: bool = False) -> Entry:
    return Entry(at(destination, family), at(answerer, family), zoned, b"")


def judged(found: Entry, *tables: RouteTable, family: Family = Family.IPV4) -> bool:
    """Whether `found` is stale when the last of `tables` holds, after the others."""
    frontends = Frontends()
    for table in tables:
        frontends.update(table)
    return list(stale([found], frontends.answerers(family))) == [found]


# What the table is, whom the client sends to and who answers, whether that is to end.
SITUATIONS = {
    "the endpoint serves": ((DNS, answering("10.0.1.1")), "172.30.0.10:53", "10.0.1.1:5353", False),
    "the endpoint is on another node": ((DNS, answering("10.0.2.1")), "172.30.0.10:53", "10.0.2.1:5353", False),
    "the endpoint has gone": ((DNS, answering("10.0.1.2")), "172.30.0.10:53", "10.0.1.1:5353", True),
    "the endpoint's port has moved": ((DNS, answering("10.0.1.1")), "172.30.0.10:53", "10.0.1.1:53", True),
    "the endpoint terminates and serves": (
        (DNS, answering(leaving("10.0.1.1"), "10.0.1.2")),
        "172.30.0.10:53",
        "10.0.1.1:5353",
        False,
    ),
    "the endpoint terminates and serves no more": (
        (DNS, answering(dying("10.0.1.1"), "10.0.1.2")),
        "172.30.0.10:53",
        "10.0.1.1:5353",
        True,
    ),
    "the endpoint's probe fails": (
        (DNS, answering(unready("10.0.1.1"), "10.0.1.2")),
        "172.30.0.10:53",
        "10.0.1.1:5353",
        True,
    ),
    "no endpoint serves": ((DNS, answering(unready("10.0.1.1"))), "172.30.0.10:53", "10.0.1.1:5353", True),
    "there is no slice": ((DNS,), "172.30.0.10:53", "10.0.1.1:5353", True),
    "never translated, and now there are endpoints": (
        (DNS, answering("10.0.1.1")),
        "172.30.0.10:53",
        "172.30.0.10:53",
        True,
    ),
    "never translated, and it would be refused now": ((DNS,), "172.30.0.10:53", "172.30.0.10:53", True),
    "another port of the cluster IP": ((DNS, answering("10.0.1.1")), "172.30.0.10:54", "10.0.9.9:54", False),
    "an address that is not ours": ((DNS, answering("10.0.1.1")), "172.30.0.99:53", "10.0.9.9:53", False),
    "a policy that no longer allows the endpoint": (
        (
            service("kube-system/dns", "172.30.0.10", port(53, "dns", UDP), internal_policy=LOCAL),
            answering("10.0.2.1", "10.0.1.1"),
        ),
        "172.30.0.10:53",
        "10.0.2.1:5353",
        False,
    ),
    "a node port": ((ON_NODES, answering("10.0.1.1", of=ON_NODES)), f"{NODE_IP}:30514", "10.0.1.1:5514", False),
    "a node port's endpoint has gone": (
        (ON_NODES, answering("10.0.1.2", of=ON_NODES)),
        f"{NODE_IP}:30514",
        "10.0.1.1:5514",
        True,
    ),
    "the number of a node port at another node": (
        (ON_NODES, answering("10.0.1.2", of=ON_NODES)),
        f"{OTHER_NODE_IP}:30514",
        f"{OTHER_NODE_IP}:30514",
        False,
    ),
    "an external IP's endpoint has gone": (
        (ON_NODES, answering("10.0.1.2", of=ON_NODES)),
        "192.168.99.11:514",
        "10.0.1.1:5514",
        True,
    ),
    "a TCP port of the same number": (
        (service("ns1/web", "172.30.0.10", port(53, "dns", TCP)), endpoint_slice("10.0.1.1", of="ns1/web")),
        "172.30.0.10:53",
        "172.30.0.10:53",
        False,
    ),
}


@FAMILIES
@pytest.mark.parametrize("case", SITUATIONS)
def test_a_flow_is_stale_if(case: str, family: Family) -> None:
    objects, destination, answerer, wanted = SITUATIONS[case]
    assert judged(entry(destination, answerer, family), world(*objects, family=family), family=family) is wanted


def test_an_endpoint_on_the_node_port_itself_is_no_lack_of_translation() -> None:
    """A host network server may listen where the node port is."""
    own = service("ns1/syslog", "172.30.0.20", port(30514, "in", UDP, node_port=30514))
    slices = endpoint_slice(NODE_IP, of="ns1/syslog", ports=(slice_port(30514, "in", UDP),))
    assert not judged(entry(f"{NODE_IP}:30514", f"{NODE_IP}:30514"), world(own, slices))


def test_what_another_tracks_in_a_zone_of_its_own_needs_no_translation() -> None:
    table = world(DNS, answering("10.0.1.1"))
    assert not judged(entry("172.30.0.10:53", "172.30.0.10:53", zoned=True), table)
    assert judged(entry("172.30.0.10:53", "10.0.1.9:5353", zoned=True), table)


def test_a_deleted_service_ends_what_was_translated_for_it() -> None:
    before, now = world(DNS, answering("10.0.1.1")), world(ON_NODES)
    assert judged(entry("172.30.0.10:53", "10.0.1.1:5353"), before, now)
    # Somebody else answers there: it is none of ours any more.
    assert not judged(entry("172.30.0.10:53", "172.30.0.10:53"), before, now)


def test_a_service_that_came_back_is_not_gone() -> None:
    there, gone = world(DNS, answering("10.0.1.1")), world()
    assert not judged(entry("172.30.0.10:53", "10.0.1.1:5353"), there, gone, there)


def test_a_cluster_ip_that_another_service_has_got() -> None:
    other = service("default/other", "172.30.0.10", port(53, "dns", UDP))
    slices = endpoint_slice("10.0.1.7", of="default/other", ports=(slice_port(5353, "dns", UDP),))
    assert judged(entry("172.30.0.10:53", "10.0.1.1:5353"), world(DNS, answering("10.0.1.1")), world(other, slices))
    assert not judged(entry("172.30.0.10:53", "10.0.1.7:5353"), world(DNS, answering("10.0.1.1")), world(other, slices))


# ---- When conntrack is looked at


class Table:
    """conntrack in memory: entries as messages that `decode` turns into what the test put in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
        self.entries = list(entries)
        self.dumps = 0
        self.deleted: list[Entry] = []
        self.closed = 0
        self.refusals: list[int] = []
        self.going: list[Entry] = []  # end between the look and the deletion
        monkeypatch.setattr("ebpflb.ctnetlink.udp_entries", self._read)
        monkeypatch.setattr("ebpflb.ctnetlink.delete", self._delete)

    def _read(self, netlink: Netlink, family: Family) -> Iterator[Entry]:
        self.dumps += 1
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        yield from (each for each in self.entries if len(each.destination) == (6 if family == 4 else 18))

    def _delete(self, netlink: Netlink, family: Family, found: Entry) -> bool:
        self.entries.remove(found)
        self.deleted.append(found)
        return found not in self.going

    def close(self) -> None:
        self.closed += 1

    def flows(self, clock: Callable[[], float] = lambda: 0.0) -> StaleFlows:
        return StaleFlows(lambda: cast(Netlink, self), clock)


RIGHT, WRONG = entry("172.30.0.10:53", "10.0.1.1:5353"), entry("172.30.0.10:53", "10.0.1.9:5353")


def test_the_first_time_compares_and_keeps_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of the daemon ends no flow (k/k #122740)."""
    table = Table(monkeypatch, RIGHT, WRONG, RIGHT)
    assert table.flows().reconcile(world(DNS, answering("10.0.1.1"))) == 1
    assert (table.entries, table.deleted) == ([RIGHT, RIGHT], [WRONG])
    assert table.closed == table.dumps == 1


def test_nothing_of_udp_changed_and_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, RIGHT)
    flows = table.flows()
    now = world(DNS, answering("10.0.1.1"))
    flows.reconcile(now)
    web = world(DNS, answering("10.0.1.1"), service(), endpoint_slice("10.0.1.5"))
    assert [flows.reconcile(each) for each in (now, web, now)] == [0, 0, 0]
    assert table.dumps == 1
    assert flows.reconciled == ()


@pytest.mark.parametrize(
    "after",
    [
        (DNS, answering("10.0.1.2")),
        (DNS, answering("10.0.1.1", "10.0.1.2")),
        (DNS,),
        (),
        (service("kube-system/dns", "172.30.0.10", port(53, "other", UDP)),),
        (DNS, answering("10.0.1.1"), ON_NODES),
    ],
    ids=["another endpoint", "one more", "no endpoint", "no Service", "another port name", "a new frontend"],
)
def test_a_change_of_udp_is_looked_into(monkeypatch: pytest.MonkeyPatch, after: tuple[Service, ...]) -> None:
    table = Table(monkeypatch)
    flows = table.flows()
    flows.reconcile(world(DNS, answering("10.0.1.1")))
    flows.reconcile(world(*after))
    assert table.dumps == 2


def test_a_family_without_udp_frontends_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch)
    flows = table.flows()
    assert flows.reconcile(world(service(), endpoint_slice("10.0.1.5"))) == 0
    assert (table.dumps, flows.problems, flows.reconciled) == (0, (), ())


def test_repaired_rules_are_reason_enough_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """While they were missing, datagrams went untranslated, and their flows would go on so."""
    table = Table(monkeypatch)
    flows = table.flows()
    now = world(DNS, answering("10.0.1.1"))
    flows.reconcile(now)
    table.entries = [entry("172.30.0.10:53", "172.30.0.10:53"), RIGHT]
    assert flows.reconcile(now, anew=True) == 1
    assert table.entries == [RIGHT]


def test_a_service_deleted_while_no_daemon_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, RIGHT)
    assert table.flows().reconcile(world(ON_NODES), before=world(DNS, answering("10.0.1.1"))) == 1


def test_an_entry_that_ended_by_itself_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, WRONG)
    table.going = [WRONG]
    assert table.flows().reconcile(world(DNS, answering("10.0.1.1"))) == 0


def test_figures_are_those_of_each_family(monkeypatch: pytest.MonkeyPatch) -> None:
    both = service("kube-system/dns", ("172.30.0.10", v6("172.30.0.10")), port(53, "dns", UDP))
    table = Table(monkeypatch, RIGHT, WRONG, entry("172.30.0.10:53", "10.0.1.9:5353", Family.IPV6))
    flows = table.flows(iter((1.0, 1.5, 2.0, 2.25)).__next__)
    assert flows.reconcile(world(both, answering("10.0.1.1"))) == 2
    assert [(each.family, each.seconds, each.entries, each.deleted) for each in flows.reconciled] == [
        (Family.IPV4, 0.5, 2, 1),
        (Family.IPV6, 0.25, 1, 1),
    ]


# ---- What the kernel refuses


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EINVAL, "modprobe nf_conntrack_netlink"),
        (errno.EPROTONOSUPPORT, "modprobe nf_conntrack_netlink"),
        (errno.EPERM, "CAP_NET_ADMIN"),
        (errno.ENOBUFS, "No buffer space available"),
    ],
)
def test_a_refusal_is_a_problem_until_it_works(monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    table = Table(monkeypatch, WRONG)
    table.refusals = [number, number]
    flows = table.flows()
    now = world(DNS, answering("10.0.1.1"))
    assert [flows.reconcile(now), flows.reconcile(now)] == [0, 0]  # again, though nothing has changed
    (problem,) = flows.problems
    assert problem.subject == "conntrack"
    assert said in problem.reason
    assert flows.reconcile(now) == 1
    assert flows.problems == ()
    assert table.closed == table.dumps == 3


def test_what_has_gone_is_remembered_until_conntrack_could_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, RIGHT)
    flows = table.flows()
    flows.reconcile(world(DNS, answering("10.0.1.1")))
    table.refusals = [errno.ENOBUFS]
    assert [flows.reconcile(world()), flows.reconcile(world())] == [0, 1]
    assert flows.reconcile(world(), anew=True) == 0
