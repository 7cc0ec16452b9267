"""The iptables tracer, on rulesets small enough to be followed by eye."""

from __future__ import annotations

import pytest

from ebpflb.decide import Outcome, Packet
from ebpflb.model import Protocol
from tests.tracers import Traced
from tests.tracers.iptables import Tracer
from tests.tracers.ruleset import Unknown

LOCAL = frozenset(("127.0.0.1", "192.168.0.2", "::1", "fd00:192:168::2"))
NODE, POD, OUTSIDE = "192.168.0.2", "10.0.1.9", "203.0.113.5"

FRAME = """
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
{filter}
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-1 - [0:0]
:KUBE-SEP-2 - [0:0]
:KUBE-SEP-3 - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SEP-1 -s 10.0.1.1/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-1 -p tcp -m recent --set --name KUBE-SEP-1 {whole} -m tcp -j DNAT --to-destination 10.0.1.1:8080
-A KUBE-SEP-2 -p tcp -m recent --set --name KUBE-SEP-2 {whole} -m tcp -j DNAT --to-destination 10.0.2.1:8080
-A KUBE-SEP-3 -p tcp -m tcp -j DNAT --to-destination 192.168.0.2:8080
{nat}
COMMIT
"""

VIP = "-A KUBE-SERVICES -d 172.30.0.41/32 -p tcp -m tcp --dport 80"
THIRDS = """
-A KUBE-SVC-A -m statistic --mode random --probability 0.33333333349 -j KUBE-SEP-1
-A KUBE-SVC-A -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-2
-A KUBE-SVC-A -j KUBE-SEP-3
"""


def text(nat: str = "", filter: str = "") -> str:
    return FRAME.format(nat=nat, filter=filter, whole="--mask 255.255.255.255 --rsource")


def tracer(nat: str = "", filter: str = "", version6: bool = False) -> Tracer:
    return Tracer({version6: text(nat, filter)}, LOCAL)


def packet(source: str = POD, to: str = "172.30.0.41", port: int = 80, interface: str = "") -> Packet:
    return Packet(source, to, port, Protocol.TCP, interface)


def places(found: Traced) -> dict[str, bool]:
    assert found.verdict is Outcome.FORWARD
    return {f"{address}:{port}": masked for (address, port), masked in found.backends.items()}


def test_what_matches_nothing_is_no_services() -> None:
    assert tracer(f"{VIP} -j KUBE-SVC-A" + THIRDS).trace(packet(port=81)) == Traced(Outcome.NOT_SERVICE)


def test_probabilities_accumulate() -> None:
    found = tracer(f"{VIP} -j KUBE-SVC-A" + THIRDS).trace(packet())
    assert places(found) == {"10.0.1.1:8080": False, "10.0.2.1:8080": False, "192.168.0.2:8080": False}
    assert found.evenly


def test_an_uneven_choice_shows() -> None:
    halves = THIRDS.replace("0.33333333349", "0.50000000000")
    found = tracer(f"{VIP} -j KUBE-SVC-A" + halves).trace(packet())
    assert not found.evenly
    assert found.chances["10.0.1.1", 8080] == pytest.approx(0.5)
    assert found.chances["192.168.0.2", 8080] == pytest.approx(0.25)


def test_a_probability_of_nothing_never_matches() -> None:
    nat = """
-A KUBE-SVC-A -m statistic --mode random --probability 0.00000000000 -j KUBE-SEP-1
-A KUBE-SVC-A -j KUBE-SEP-2
"""
    assert places(tracer(f"{VIP} -j KUBE-SVC-A" + nat).trace(packet())) == {"10.0.2.1:8080": False}


def test_a_backend_that_is_its_own_client_is_masqueraded() -> None:
    found = tracer(f"{VIP} -j KUBE-SVC-A" + THIRDS).trace(packet("10.0.1.1"))
    assert places(found) == {"10.0.1.1:8080": True, "10.0.2.1:8080": False, "192.168.0.2:8080": False}


def test_a_mark_leads_to_masquerade_but_not_where_the_packet_stays_here() -> None:
    nat = f"{VIP} -j KUBE-SVC-A\n-A KUBE-SVC-A ! -s 10.0.0.0/8 -j KUBE-MARK-MASQ{THIRDS}"
    wanted = {"10.0.1.1:8080": True, "10.0.2.1:8080": True, "192.168.0.2:8080": False}
    assert places(tracer(nat).trace(packet(OUTSIDE))) == wanted
    assert places(tracer(nat).trace(packet(NODE))) == wanted | {"192.168.0.2:8080": True}  # by OUTPUT, POSTROUTING, lo
    assert not any(places(tracer(nat).trace(packet(POD))).values())


def test_affinity_is_what_the_lists_say() -> None:
    sticky = "".join(
        f"-A KUBE-SVC-A -m recent --rcheck --seconds 60 --reap --name KUBE-SEP-{at} --mask 255.255.255.255 --rsource "
        f"-j KUBE-SEP-{at}\n"
        for at in (1, 2)
    )
    under = tracer(f"{VIP} -j KUBE-SVC-A\n{sticky}{THIRDS}")
    first = {path.to: path.remembered for path in under.paths(packet())}
    assert first["10.0.2.1", 8080] == ("KUBE-SEP-2",)
    assert places(under.trace(packet(), {"KUBE-SEP-2": {POD: 59}})) == {"10.0.2.1:8080": False}
    assert len(places(under.trace(packet(), {"KUBE-SEP-2": {POD: 60}}))) == 3
    assert len(places(under.trace(packet(), {"KUBE-SEP-2": {OUTSIDE: 1}}))) == 3


@pytest.mark.parametrize(("client", "hook"), [(NODE, "OUTPUT"), (POD, "FORWARD")])
def test_a_filter_rule_refuses_where_its_hook_is(client: str, hook: str) -> None:
    rules = f"-A {hook} -m conntrack --ctstate NEW -j KUBE-SERVICES\n{VIP} -j REJECT --reject-with tcp-reset"
    other = {NODE: POD, POD: NODE}[client]
    assert tracer(filter=rules).trace(packet(client)) == Traced(Outcome.REJECT, "tcp-reset")
    assert tracer(filter=rules).trace(packet(other)) == Traced(Outcome.NOT_SERVICE)


def test_a_node_port_is_met_on_input() -> None:
    rules = (
        "-A INPUT -j KUBE-SERVICES\n-A KUBE-SERVICES -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j DROP\n"
    )
    assert tracer(filter=rules).trace(packet(OUTSIDE, NODE, 30080)) == Traced(Outcome.DROP)
    assert tracer(filter=rules).trace(packet(OUTSIDE, "192.168.0.3", 30080)) == Traced(Outcome.NOT_SERVICE)
    assert tracer(filter=rules).trace(packet(NODE, "127.0.0.1", 30080)) == Traced(Outcome.DROP)  # by way of lo


def test_a_policy_of_a_built_in_chain_counts() -> None:
    strict = text().replace(":FORWARD ACCEPT", ":FORWARD DROP")
    assert Tracer({False: strict}, LOCAL).trace(packet()) == Traced(Outcome.DROP)


def test_return_goes_back_and_goto_does_not() -> None:
    back = f"{VIP} -j KUBE-SVC-A\n-A KUBE-SVC-A -j RETURN\n-A KUBE-SERVICES -j KUBE-SEP-2"
    assert places(tracer(back).trace(packet())) == {"10.0.2.1:8080": False}
    assert tracer(back.replace("-j KUBE-SVC-A", "-g KUBE-SVC-A")).trace(packet()).verdict is Outcome.NOT_SERVICE


def test_who_comes_by_an_interface() -> None:
    nat = f"{VIP} -i cni0 -j KUBE-SEP-1\n{VIP} -i veth+ -j KUBE-SEP-2\n{VIP} ! -i eth0 -j KUBE-SEP-3"
    under = tracer(nat)
    assert list(places(under.trace(packet(interface="cni0")))) == ["10.0.1.1:8080"]
    assert list(places(under.trace(packet(interface="veth1a")))) == ["10.0.2.1:8080"]
    assert list(places(under.trace(packet(interface="cni01")))) == ["192.168.0.2:8080"]
    assert under.trace(packet(interface="eth0")).verdict is Outcome.NOT_SERVICE
    # The node's own packets come by no interface at all.
    assert list(places(under.trace(packet(NODE)))) == ["192.168.0.2:8080"]


def test_ctstate_knows_a_translated_packet() -> None:
    drop = "-A INPUT -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
    nat = "-A KUBE-SERVICES -d 172.30.0.41/32 -p tcp -j DNAT --to-destination 127.0.0.1:80"
    assert tracer(nat, drop).trace(packet()).verdict is Outcome.FORWARD
    assert tracer(nat, drop).trace(packet(to="127.0.0.1")) == Traced(Outcome.DROP)


def test_who_is_sent_where_he_went_anyway_is_not_translated() -> None:
    nat = "-A KUBE-SERVICES -d 10.0.2.1/32 -p tcp -j DNAT --to-destination 10.0.2.1:80"
    drop = "-A FORWARD -m conntrack ! --ctstate DNAT -j DROP"
    assert tracer(nat).trace(packet(to="10.0.2.1")).verdict is Outcome.FORWARD
    assert tracer(nat, drop).trace(packet(to="10.0.2.1")).verdict is Outcome.DROP


def test_ipv6_addresses_and_ports() -> None:
    nat = "-A KUBE-SERVICES -d fd00:172:30::41/128 -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd00:10::1]:8080"
    found = tracer(nat, version6=True).trace(packet("fd00:10::9", "fd00:172:30::41"))
    assert found.backends == {("fd00:10::1", 8080): False}


UNKNOWN = {
    "a match": f"{VIP} -m u32 --u32 0 -j KUBE-SVC-A",
    "an option of a known match": f"{VIP} -m conntrack --ctdir ORIGINAL -j KUBE-SVC-A",
    "a state": f"{VIP} -m conntrack --ctstate BRAND_NEW -j KUBE-SVC-A",
    "a protocol": "-A KUBE-SERVICES -p gre -j KUBE-SVC-A",
    "a target's option": "-A KUBE-SERVICES -j DNAT --to-destination 10.0.1.1:80 --persistent",
    "a list by destination": f"{VIP} -m recent --set --name A --mask 255.255.255.255 --rdest -j KUBE-SVC-A",
    "a list of whole networks": f"{VIP} -m recent --set --name A --mask 255.255.255.0 --rsource -j KUBE-SVC-A",
    "another kind of chance": f"{VIP} -m statistic --mode nth --every 2 --packet 0 -j KUBE-SVC-A",
    "a negation of nothing": f"{VIP} -j KUBE-SVC-A !",
    "a word without its value": f"{VIP} -j",
    "a target": f"{VIP} -j CHECKSUM",
    "another address type": "-A KUBE-SERVICES -m addrtype --dst-type BROADCAST -j KUBE-SVC-A",
}


@pytest.mark.parametrize("rule", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_unknown_is_an_error(rule: str) -> None:
    with pytest.raises(Unknown):
        tracer(rule).trace(packet())


def test_what_is_unknown_is_an_error_though_the_packet_is_another() -> None:
    with pytest.raises(Unknown):
        tracer(UNKNOWN["a match"]).trace(packet(to="172.30.0.99"))


def test_a_circle_of_chains_is_an_error() -> None:
    with pytest.raises(Unknown):
        tracer(f"{VIP} -j KUBE-SVC-A\n-A KUBE-SVC-A -j KUBE-SVC-A").trace(packet())


def test_a_line_that_is_no_rule_is_an_error() -> None:
    with pytest.raises(Unknown):
        Tracer({False: "*nat\nfrobnicate\nCOMMIT"}, LOCAL)
    with pytest.raises(Unknown):
        Tracer({False: "*nat\n-A NOWHERE -j ACCEPT\nCOMMIT"}, LOCAL)


def test_a_verdict_that_chance_decides_is_an_error() -> None:
    rules = "-A FORWARD -m statistic --mode random --probability 0.5 -j DROP"
    with pytest.raises(AssertionError, match="left to chance"):
        tracer(filter=rules).trace(packet())


def test_a_source_that_is_replaced_for_no_service_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no Service's"):
        tracer("-A KUBE-SERVICES -j KUBE-MARK-MASQ").trace(packet())
