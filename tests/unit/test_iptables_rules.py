"""Which rules a Service gets, situation by situation, in the text of `iptables-save`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from ebpflb.dataplane.iptables.frame import Settings, wants_comments
from ebpflb.dataplane.iptables.rules import probabilities
from ebpflb.model import DetectLocal, Family, Protocol
from tests.iptables import P80, WEB, WEB_PODS, absent, chain, rules_of, table_of, written
from tests.world import (
    LOCAL,
    NODE_IP,
    SCTP,
    TCP,
    UDP,
    endpoint_slice,
    leaving,
    options,
    port,
    service,
    slice_port,
    v6,
)

NODE_PORTS_LAST = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'


def test_a_cluster_ip() -> None:
    found = rules_of(service("ns1/svc1", "172.30.0.41", port(80, "p80")), endpoint_slice("10.180.0.1", ports=P80))
    svc, sep = "KUBE-SVC-XPGD46QRK7WJZT7O", "KUBE-SEP-SXIVWICOYRO3J4NJ"
    whose = '-m comment --comment "ns1/svc1:p80 cluster IP" -m tcp --dport 80'
    assert found["nat"]["KUBE-SERVICES"] == (f"-A KUBE-SERVICES -d 172.30.0.41/32 -p tcp {whose} -j {svc}",)
    assert found["nat"][svc] == (
        f"-A {svc} ! -s 10.0.0.0/8 -d 172.30.0.41/32 -p tcp {whose} -j KUBE-MARK-MASQ",
        f'-A {svc} -m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" -j {sep}',
    )
    assert found["nat"][sep] == (
        f'-A {sep} -s 10.180.0.1/32 -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ',
        f'-A {sep} -p tcp -m comment --comment "ns1/svc1:p80" -m tcp -j DNAT --to-destination 10.180.0.1:80',
    )
    assert found["filter"]["KUBE-EXTERNAL-SERVICES"] == found["filter"]["KUBE-PROXY-FIREWALL"] == ()


def test_a_cluster_ip_in_ipv6() -> None:
    table = table_of(WEB, WEB_PODS, family=Family.IPV6)
    found = written(table, Family.IPV6)
    masquerade = chain(found, "nat", "KUBE-SVC-")[0]
    assert masquerade.startswith(f"! -s {v6('10.0.0.0/8')} -d {v6('172.30.0.41')}/128 -p tcp ")
    pod = v6("10.0.1.1")
    assert f'"ns1/web:p80 -> [{pod}]:8080"' in chain(found, "nat", "KUBE-SVC-")[1]
    endpoint = found["nat"][chain(found, "nat", "KUBE-SVC-")[1].rpartition(" ")[2]]
    assert f" -s {pod}/128 " in endpoint[0] and endpoint[1].endswith(f" -j DNAT --to-destination [{pod}]:8080")
    assert written(table, Family.IPV4)["nat"]["KUBE-SERVICES"] == ()


def test_three_endpoints_are_chosen_alike() -> None:
    found = rules_of(WEB, endpoint_slice("10.0.1.1", "10.0.1.2", "10.0.1.3", of="ns1/web", ports=P80))
    chosen = chain(found, "nat", "KUBE-SVC-")[1:]
    assert [rule.rpartition(" -j ")[0].rpartition("10.0.1.")[2] for rule in chosen] == [
        '1:80" -m statistic --mode random --probability 0.33333333349',
        '2:80" -m statistic --mode random --probability 0.50000000000',
        '3:80"',
    ]


def test_probabilities_are_what_the_kernel_keeps() -> None:
    assert probabilities(1) == ()
    assert probabilities(4) == ("0.25000000000", "0.33333333349", "0.50000000000")
    assert len(probabilities(1000)) == 999


def test_a_large_cluster_goes_without_comments_on_endpoints() -> None:
    found = written(table_of(WEB, WEB_PODS), settings=Settings(comments=False))
    assert chain(found, "nat", "KUBE-SVC-")[0].count("--comment") == 1
    assert all("--comment" not in rule for rule in chain(found, "nat", "KUBE-SVC-")[1:])
    assert [rule for name, rules in found["nat"].items() if name.startswith("KUBE-SEP-") for rule in rules] == [
        "-A KUBE-SEP-TYO2ROFELS5VQVGU -s 10.0.1.1/32 -j KUBE-MARK-MASQ",
        "-A KUBE-SEP-TYO2ROFELS5VQVGU -p tcp -m tcp -j DNAT --to-destination 10.0.1.1:8080",
        "-A KUBE-SEP-FAKG7CV7BBVUKRLC -s 10.0.2.2/32 -j KUBE-MARK-MASQ",
        "-A KUBE-SEP-FAKG7CV7BBVUKRLC -p tcp -m tcp -j DNAT --to-destination 10.0.2.2:8080",
    ]


def test_whether_a_cluster_is_large() -> None:
    small = table_of(WEB, WEB_PODS)
    assert wants_comments(small)
    many = [f"10.0.{each >> 8}.{each & 255}" for each in range(1, 2100)]
    assert not wants_comments(table_of(WEB, endpoint_slice(*many, of="ns1/web", ports=P80)))


def test_affinity_asks_before_it_chooses() -> None:
    found = rules_of(service("ns1/web", "172.30.0.41", port(80, "p80"), affinity=10800), WEB_PODS)
    rules = chain(found, "nat", "KUBE-SVC-")
    seps = [name for name in found["nat"] if name.startswith("KUBE-SEP-")]
    assert [rule.partition(" -m recent ")[2] for rule in rules[1:3]] == [
        f"--rcheck --seconds 10800 --reap --name {sep} --mask 255.255.255.255 --rsource -j {sep}" for sep in seps
    ]
    for sep in seps:
        assert f"-m recent --set --name {sep} --mask 255.255.255.255 --rsource -m tcp -j DNAT" in found["nat"][sep][1]


def test_a_terminating_endpoint_is_never_chosen_but_named() -> None:
    slices = endpoint_slice("10.0.1.1", leaving("10.0.1.2"), of="ns1/web", ports=P80)
    found = rules_of(service("ns1/web", "172.30.0.41", port(80, "p80"), affinity=60), slices)
    rules = chain(found, "nat", "KUBE-SVC-")[1:]
    assert ["10.0.1.1" in rules[0], "--rcheck" in rules[0]] == [True, True]
    assert '10.0.1.2:80" -m statistic --mode random --probability 0.00000000000 -j' in rules[1]
    assert '10.0.1.1:80" -j' in rules[2]
    assert len(rules) == 3


def test_masquerade_all() -> None:
    found = rules_of(WEB, WEB_PODS, options=options(masquerade_all=True))
    assert chain(found, "nat", "KUBE-SVC-")[0].startswith("-d 172.30.0.41/32 -p tcp ")
    assert chain(found, "nat", "KUBE-SVC-")[0].endswith(" -j KUBE-MARK-MASQ")


def test_nothing_tells_pods_from_others() -> None:
    found = rules_of(WEB, WEB_PODS, options=options(cluster_cidrs=()))
    assert all("KUBE-MARK-MASQ" not in rule for rule in chain(found, "nat", "KUBE-SVC-"))
    assert found["filter"]["EBPFLB-LOCALITY"] == ()


@pytest.mark.parametrize(
    ("mode", "match"), [(DetectLocal.BRIDGE_INTERFACE, "cni0"), (DetectLocal.INTERFACE_NAME_PREFIX, "veth+")]
)
def test_pods_are_told_by_their_interface(mode: DetectLocal, match: str) -> None:
    chosen = options(detect_local=mode, bridge_interface="cni0", interface_name_prefix="veth")
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), external=["192.168.99.1"], external_policy=LOCAL)
    found = rules_of(web, WEB_PODS, options=chosen)
    assert chain(found, "nat", "KUBE-SVC-")[0].startswith(f"-d 172.30.0.41/32 ! -i {match} -p tcp ")
    assert chain(found, "nat", "KUBE-EXT-")[0].startswith(f'-i {match} -m comment --comment "pod traffic for ')
    assert found["filter"]["EBPFLB-LOCALITY"] == (f"-A EBPFLB-LOCALITY -i {match}",)


@pytest.mark.parametrize("cidrs", [("10.0.0.0/9", "10.128.0.0/9"), ("0.0.0.0/0",)])
def test_what_one_rule_cannot_deny_takes_a_chain(cidrs: Sequence[str]) -> None:
    found = rules_of(WEB, WEB_PODS, options=options(cluster_cidrs=cidrs))
    assert chain(found, "nat", "KUBE-SVC-")[0].endswith(" -j EBPFLB-NOT-POD")
    returns = [f"-A EBPFLB-NOT-POD -s {cidr} -j RETURN" for cidr in cidrs if not cidr.endswith("/0")]
    assert found["nat"]["EBPFLB-NOT-POD"] == (
        *(returns or ["-A EBPFLB-NOT-POD -j RETURN"]),
        "-A EBPFLB-NOT-POD -j KUBE-MARK-MASQ",
    )


def test_an_external_frontend_of_policy_cluster() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), external=["192.168.99.1"], lb=["1.2.3.4"])
    found = rules_of(web, WEB_PODS)
    svc, ext = (next(name for name in found["nat"] if name.startswith(kind)) for kind in ("KUBE-SVC-", "KUBE-EXT-"))
    assert found["nat"]["KUBE-SERVICES"][1:] == (
        '-A KUBE-SERVICES -d 1.2.3.4/32 -p tcp -m comment --comment "ns1/web:p80 loadbalancer IP"'
        f" -m tcp --dport 80 -j {ext}",
        '-A KUBE-SERVICES -d 192.168.99.1/32 -p tcp -m comment --comment "ns1/web:p80 external IP"'
        f" -m tcp --dport 80 -j {ext}",
    )
    assert found["nat"][ext] == (
        f'-A {ext} -m comment --comment "masquerade traffic for ns1/web:p80 external destinations" -j KUBE-MARK-MASQ',
        f"-A {ext} -j {svc}",
    )


def test_an_external_frontend_of_policy_local() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4"], external_policy=LOCAL)
    found = rules_of(web, WEB_PODS)
    ext = next(name for name in found["nat"] if name.startswith("KUBE-EXT-"))
    svc, svl = ext.replace("EXT", "SVC"), ext.replace("EXT", "SVL")
    local = "ns1/web:p80 external destinations"
    assert found["nat"][ext] == (
        f'-A {ext} -s 10.0.0.0/8 -m comment --comment "pod traffic for {local}" -j {svc}',
        f'-A {ext} -m comment --comment "masquerade LOCAL traffic for {local}" -m addrtype --src-type LOCAL'
        " -j KUBE-MARK-MASQ",
        f'-A {ext} -m comment --comment "route LOCAL traffic for {local}" -m addrtype --src-type LOCAL -j {svc}',
        f"-A {ext} -j {svl}",
    )
    assert [rule.partition("-> ")[2].partition('"')[0] for rule in found["nat"][svl]] == ["10.0.1.1:8080"]
    assert found["filter"]["KUBE-EXTERNAL-SERVICES"] == ()


def test_policy_local_without_an_endpoint_here() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80", TCP, 30080), lb=["1.2.3.4"], external_policy=LOCAL)
    found = rules_of(web, endpoint_slice("10.0.2.2", of="ns1/web", ports=P80))
    assert [rule.rpartition(" -j ")[2][:9] for rule in chain(found, "nat", "KUBE-EXT-")] == [
        "KUBE-SVC-",
        "KUBE-MARK",
        "KUBE-SVC-",
    ]
    lacks = "ns1/web:p80 has no local endpoints"
    assert found["filter"]["KUBE-EXTERNAL-SERVICES"] == (
        f'-A KUBE-EXTERNAL-SERVICES -d 1.2.3.4/32 -p tcp -m comment --comment "{lacks} kind=LoadBalancer"'
        " -m tcp --dport 80 -j DROP",
        f'-A KUBE-EXTERNAL-SERVICES -d 127.0.0.1/32 -p tcp -m comment --comment "{lacks} kind=NodePort"'
        " -m tcp --dport 30080 -j DROP",
        f'-A KUBE-EXTERNAL-SERVICES -d {NODE_IP}/32 -p tcp -m comment --comment "{lacks} kind=NodePort"'
        " -m tcp --dport 30080 -j DROP",
    )


def test_internal_policy_local_beside_external_policy_cluster() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4"], internal_policy=LOCAL)
    found = rules_of(web, WEB_PODS)
    assert "-j KUBE-SVL-" in found["nat"]["KUBE-SERVICES"][0]
    assert '--comment "ns1/web:p80 cluster IP"' in chain(found, "nat", "KUBE-SVL-")[0]
    assert len(chain(found, "nat", "KUBE-SVL-")) == 2  # masquerade, and the one pod that is here
    assert len(chain(found, "nat", "KUBE-SVC-")) == 2  # both pods


def test_internal_policy_local_without_an_endpoint_here() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), internal_policy=LOCAL)
    found = rules_of(web, endpoint_slice("10.0.2.2", of="ns1/web", ports=P80))
    assert found["nat"]["KUBE-SERVICES"] == ()
    assert found["filter"]["KUBE-SERVICES"][0] == (
        '-A KUBE-SERVICES -d 172.30.0.41/32 -p tcp -m comment --comment "ns1/web:p80 has no local endpoints"'
        " -m tcp --dport 80 -j DROP"
    )


@pytest.mark.parametrize(
    ("protocol", "family", "answer"),
    [
        (TCP, Family.IPV4, "tcp-reset"),
        (UDP, Family.IPV4, "icmp-port-unreachable"),
        (SCTP, Family.IPV4, "icmp-port-unreachable"),
        (TCP, Family.IPV6, "tcp-reset"),
        (UDP, Family.IPV6, "icmp6-port-unreachable"),
    ],
)
def test_no_endpoint_anywhere_is_refused(protocol: Protocol, family: Family, answer: str) -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80", protocol), external=["192.168.99.1"])
    found = written(table_of(web, family=family), family)
    for name in ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"):
        assert found["filter"][name][0].endswith(f" --dport 80 -j REJECT --reject-with {answer}")
        assert "ns1/web:p80 has no endpoints" in found["filter"][name][0]
    assert absent(found, "nat", "KUBE-SVC-") and absent(found, "nat", "KUBE-EXT-")


RANGES = ["203.0.113.0/24", "198.51.100.0/24"]


def test_source_ranges() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4"], ranges=RANGES)
    found = rules_of(web, WEB_PODS)
    fw = next(name for name in found["nat"] if name.startswith("KUBE-FW-"))
    ext = fw.replace("FW", "EXT")
    assert found["nat"]["KUBE-SERVICES"][1].endswith(f" -j {fw}")
    allow = f'-m comment --comment "ns1/web:p80 loadbalancer IP" -j {ext}'
    assert found["nat"][fw] == (
        f"-A {fw} -s 198.51.100.0/24 {allow}",
        f"-A {fw} -s 203.0.113.0/24 {allow}",
        f'-A {fw} -m comment --comment "other traffic to ns1/web:p80 will be dropped by KUBE-PROXY-FIREWALL"',
    )
    assert found["filter"]["KUBE-PROXY-FIREWALL"] == (
        f'-A KUBE-PROXY-FIREWALL -d 1.2.3.4/32 -p tcp -m comment --comment "ns1/web:p80 traffic not accepted by {fw}"'
        " -m tcp --dport 80 -j DROP",
    )


def test_a_load_balancers_own_address_where_this_node_may_use_it() -> None:
    web = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4", "5.6.7.8"], ranges=["192.168.0.0/24"])
    allowed = [rule.partition(" -m ")[0] for rule in chain(rules_of(web, WEB_PODS), "nat", "KUBE-FW-")[:-1]]
    assert allowed == ["-s 1.2.3.4/32 -d 1.2.3.4/32", "-s 5.6.7.8/32 -d 5.6.7.8/32", "-s 192.168.0.0/24"]
    alone = service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4"], ranges=["192.168.0.0/24"])
    allowed = [rule.partition(" -m ")[0] for rule in chain(rules_of(alone, WEB_PODS), "nat", "KUBE-FW-")[:-1]]
    assert allowed == ["-s 1.2.3.4/32", "-s 192.168.0.0/24"]


def test_source_ranges_come_before_a_refusal() -> None:
    """kube-proxy's iptables mode refuses everybody; its nftables mode drops who may not come."""
    found = rules_of(service("ns1/web", "172.30.0.41", port(80, "p80"), lb=["1.2.3.4"], ranges=RANGES))
    fw = next(name for name in found["filter"] if name.startswith("KUBE-FW-"))
    refuse = '-p tcp -m comment --comment "ns1/web:p80 has no endpoints" -j REJECT --reject-with tcp-reset'
    assert found["filter"][fw] == (
        f"-A {fw} -s 198.51.100.0/24 {refuse}",
        f"-A {fw} -s 203.0.113.0/24 {refuse}",
        f'-A {fw} -m comment --comment "ns1/web:p80 traffic not accepted by {fw}" -j DROP',
    )
    assert [rule.rpartition(" -j ")[2] for rule in found["filter"]["KUBE-PROXY-FIREWALL"]] == [fw]
    assert found["filter"]["KUBE-EXTERNAL-SERVICES"] == found["nat"]["KUBE-SERVICES"] == ()


def test_a_backend_in_its_frontends_own_place_meets_no_drop() -> None:
    """An ingress controller on the host's network behind its node's address: what conntrack does not translate would
    run into the rules for what was not translated, as it does with kube-proxy."""
    web = service(
        "ns1/web", "172.30.0.41", port(80, "p80"), lb=["192.168.0.3"], external_policy=LOCAL, ranges=["203.0.113.0/24"]
    )
    found = rules_of(web, endpoint_slice("192.168.0.3", of="ns1/web", ports=P80))
    allowed, rest = chain(found, "filter", "KUBE-FW-")
    assert allowed == '-s 203.0.113.0/24 -m comment --comment "ns1/web:p80 loadbalancer IP" -j RETURN'
    assert rest.endswith(" -j DROP")
    assert found["filter"]["KUBE-PROXY-FIREWALL"][0].rpartition(" -j ")[2].startswith("KUBE-FW-")
    pod, own, drop = chain(found, "filter", "KUBE-EXT-")
    assert (pod, own) == ("-s 10.0.0.0/8 -j RETURN", "-m addrtype --src-type LOCAL -j RETURN")
    assert drop == '-p tcp -m comment --comment "ns1/web:p80 has no local endpoints" -j DROP'
    assert found["filter"]["KUBE-EXTERNAL-SERVICES"][0].rpartition(" -j ")[2].startswith("KUBE-EXT-")


def test_node_ports() -> None:
    found = rules_of(service("ns1/web", "172.30.0.41", port(80, "p80", TCP, 30080)), WEB_PODS)
    ext = next(name for name in found["nat"] if name.startswith("KUBE-EXT-"))
    assert found["nat"]["KUBE-NODEPORTS"] == (
        f'-A KUBE-NODEPORTS -p tcp -m comment --comment "ns1/web:p80" -m tcp --dport 30080 -j {ext}',
    )
    assert found["nat"]["KUBE-SERVICES"][-2:] == (
        f"-A KUBE-SERVICES -d 127.0.0.1/32 {NODE_PORTS_LAST} -j KUBE-NODEPORTS",
        f"-A KUBE-SERVICES -d {NODE_IP}/32 {NODE_PORTS_LAST} -j KUBE-NODEPORTS",
    )


def test_a_node_port_that_lost_an_address_names_the_others() -> None:
    """ns1/first has the node's address as an external IP, on the port that is ns1/web's node port."""
    first = service("ns1/first", "172.30.0.42", port(30080, "p"), external=[NODE_IP], created="2024-01-01T00:00:00Z")
    web = service("ns1/web", "172.30.0.41", port(80, "p80", TCP, 30080))
    dns = service("ns1/dns", "172.30.0.43", port(53, "dns", UDP, 30053))
    found = rules_of(
        first, web, dns, WEB_PODS,
        endpoint_slice("10.0.1.5", of="ns1/dns", ports=[slice_port(53, "dns", UDP)]),
    )  # fmt: skip
    assert sorted(rule.rpartition(" -j ")[0] for rule in found["nat"]["KUBE-NODEPORTS"]) == [
        '-A KUBE-NODEPORTS -d 127.0.0.1/32 -p tcp -m comment --comment "ns1/web:p80" -m tcp --dport 30080',
        '-A KUBE-NODEPORTS -p udp -m comment --comment "ns1/dns:dns" -m udp --dport 30053',
    ]


def test_what_iptables_cannot_do_is_said_in_the_comment() -> None:
    web = service(
        "ns1/web", "172.30.0.41", port(80), lb=["1.2.3.4"], annotations=[("algorithm", "maglev"), ("forwarding", "dsr")]
    )
    said = " algorithm=maglev forwarding=dsr"
    lines = rules_of(web, endpoint_slice("10.0.1.1", of="ns1/web"))["nat"]["KUBE-SERVICES"]
    assert f'"ns1/web cluster IP{said}"' in lines[0]
    assert f'"ns1/web loadbalancer IP{said}"' in lines[1]
    lines = rules_of(msgspec.structs.replace(web, affinity_seconds=60))["filter"]["KUBE-EXTERNAL-SERVICES"]
    assert f'"ns1/web has no endpoints kind=LoadBalancer affinity=60{said}"' in lines[0]
