"""The packet-flow table, part 1: cluster IPs. Ids are the names of the upstream tests where they have one."""

from __future__ import annotations

from ebpflb.model import Endpoint, Family
from tests.flows import Situation, check, every, situation
from tests.world import (
    LOCAL,
    SCTP,
    TCP,
    UDP,
    dying,
    endpoint_slice,
    leaving,
    node,
    options,
    port,
    ready,
    service,
    slice_port,
    unready,
)

TWO = endpoint_slice("10.0.1.1", "10.0.2.1")
BOTH = "10.0.1.1:80 10.0.2.1:80"
MASQ_BOTH = f"masq {BOTH}"
EVERY_CLIENT = ("pod", "remote-pod", "node", "outside")


def all_clients(target: str, then: str) -> dict[str, str]:
    return {f"{client} {target}": then for client in EVERY_CLIENT}


WHO = (
    situation("pod-to-cluster-ip", service(), TWO, wanted={"pod 172.30.0.41:80": BOTH}),
    situation(
        "should-preserve-source-pod-ip-for-traffic-thru-service-cluster-ip",
        service(),
        endpoint_slice("10.0.2.1"),
        wanted={"pod 172.30.0.41:80": "10.0.2.1:80"},
    ),
    situation("pod-of-another-node-to-cluster-ip", service(), TWO, wanted={"remote-pod 172.30.0.41:80": BOTH}),
    situation("node-to-cluster-ip", service(), TWO, wanted={"node 172.30.0.41:80": MASQ_BOTH}),
    situation("outside-to-cluster-ip", service(), TWO, wanted={"outside 172.30.0.41:80": MASQ_BOTH}),
    situation("another-node-to-cluster-ip", service(), TWO, wanted={"other-node 172.30.0.41:80": MASQ_BOTH}),
    situation(
        "no-detector-masquerades-nobody",
        service(),
        TWO,
        options=options(cluster_cidrs=()),
        wanted=all_clients("172.30.0.41:80", BOTH),
    ),
    situation(
        "masquerade-all",
        service(),
        TWO,
        options=options(masquerade_all=True),
        wanted=all_clients("172.30.0.41:80", MASQ_BOTH),
    ),
    situation(
        "masquerade-all-without-detector",
        service(),
        TWO,
        options=options(masquerade_all=True, cluster_cidrs=()),
        wanted=all_clients("172.30.0.41:80", MASQ_BOTH),
    ),
    situation(
        "should-allow-pods-to-hairpin-back-to-themselves-through-services",
        service(),
        TWO,
        wanted={"10.0.1.1 172.30.0.41:80": "10.0.1.1:80* 10.0.2.1:80"},
    ),
    situation(
        "hairpin-without-detector",
        service(),
        TWO,
        options=options(cluster_cidrs=()),
        wanted={"10.0.1.1 172.30.0.41:80": "10.0.1.1:80* 10.0.2.1:80"},
    ),
    situation(
        "host-network-backend-from-its-own-node-without-detector",
        service(),
        endpoint_slice("192.168.0.2", "192.168.0.3"),
        options=options(cluster_cidrs=()),
        wanted={"node 172.30.0.41:80": "192.168.0.2:80* 192.168.0.3:80"},
    ),
    situation(
        "should-support-service-endpoints-using-hostnetwork",
        service(),
        endpoint_slice("192.168.0.2", "192.168.0.3"),
        wanted={
            "pod 172.30.0.41:80": "192.168.0.2:80 192.168.0.3:80",
            "node 172.30.0.41:80": "masq 192.168.0.2:80 192.168.0.3:80",
        },
    ),
)

WHAT = (
    situation(
        "target-port-differs",
        service(),
        endpoint_slice("10.0.1.1", ports=[slice_port(8080)]),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:8080"},
    ),
    situation("other-port-of-a-cluster-ip", service(), TWO, wanted={"pod 172.30.0.41:81": "REJECT"}),
    situation("other-protocol", service(), TWO, wanted={"pod 172.30.0.41:80/UDP": "REJECT"}),
    situation("other-address", service(), TWO, wanted={"pod 172.30.0.42:80": "NOT_SERVICE"}),
    situation(
        "should-be-able-to-send-traffic-between-pods-without-snat",
        service(),
        TWO,
        wanted={"pod 10.0.2.1:80": "NOT_SERVICE", "node 10.0.2.1:80": "NOT_SERVICE"},
    ),
    situation(
        "should-provide-internet-connection-for-containers",
        service(),
        TWO,
        wanted={"pod 203.0.113.5:80": "NOT_SERVICE"},
    ),
    situation(
        "should-serve-multiport-endpoints-from-pods",
        service("ns1/svc1", "172.30.0.41", port(80, "a"), port(81, "b")),
        endpoint_slice("10.0.1.1", ports=[slice_port(100, "a")]),
        endpoint_slice("10.0.2.1", ports=[slice_port(101, "b")]),
        endpoint_slice("10.0.3.1", ports=[slice_port(100, "a"), slice_port(101, "b")]),
        wanted={
            "pod 172.30.0.41:80": "10.0.1.1:100 10.0.3.1:100",
            "pod 172.30.0.41:81": "10.0.2.1:101 10.0.3.1:101",
        },
    ),
    situation(
        "should-serve-endpoints-on-same-port-and-different-protocols",
        service("ns1/svc1", "172.30.0.41", port(80, "web"), port(80, "dns", UDP)),
        endpoint_slice("10.0.1.1", ports=[slice_port(80, "web")]),
        endpoint_slice("10.0.2.1", ports=[slice_port(53, "dns", UDP)]),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80", "pod 172.30.0.41:80/UDP": "10.0.2.1:53"},
    ),
    situation(
        "should-allow-creating-a-basic-sctp-service-with-pod-and-endpoints",
        service("ns1/svc1", "172.30.0.41", port(80, "", SCTP)),
        endpoint_slice("10.0.1.1", ports=[slice_port(5060, "", SCTP)]),
        wanted={"pod 172.30.0.41:80/SCTP": "10.0.1.1:5060", "pod 172.30.0.41:80/TCP": "REJECT"},
    ),
    situation(
        "should-support-named-targetports-that-resolve-to-different-ports-on-different-endpoints",
        service("ns1/svc1", "172.30.0.41", port(80, "http")),
        endpoint_slice("10.0.1.1", ports=[slice_port(8080, "http")]),
        endpoint_slice("10.0.2.1", ports=[slice_port(9090, "http")]),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:8080 10.0.2.1:9090"},
    ),
    situation(
        "should-mirror-a-custom-endpoint-with-multiple-subsets-and-same-ip-address",
        service("ns1/svc1", "172.30.0.41", port(80, "http")),
        endpoint_slice("10.0.1.1", ports=[slice_port(8080, "http")]),
        endpoint_slice("10.0.1.1", ports=[slice_port(9090, "http")]),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:8080 10.0.1.1:9090"},
    ),
    situation(
        "should-support-a-service-with-multiple-ports-specified-in-multiple-endpointslices",
        service("ns1/svc1", "172.30.0.41", port(80, "a"), port(81, "b")),
        endpoint_slice("10.0.1.1", ports=[slice_port(8080, "a")]),
        endpoint_slice("10.0.1.1", ports=[slice_port(9090, "b")]),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:8080", "pod 172.30.0.41:81": "10.0.1.1:9090"},
    ),
    situation(
        "should-support-a-service-with-multiple-endpoint-ips-specified-in-multiple-endpointslices",
        service(),
        endpoint_slice("10.0.1.1"),
        endpoint_slice("10.0.2.1"),
        wanted={"pod 172.30.0.41:80": BOTH},
    ),
    situation(
        "multiple-endpoint-services-with-same-selector",
        service("ns1/svc1", "172.30.0.41"),
        service("ns1/svc2", "172.30.0.42"),
        TWO,
        endpoint_slice("10.0.1.1", "10.0.2.1", of="ns1/svc2"),
        wanted={"pod 172.30.0.41:80": BOTH, "pod 172.30.0.42:80": BOTH},
    ),
    situation(
        "same-name-in-two-namespaces",
        service("ns1/svc1", "172.30.0.41"),
        service("ns2/svc1", "172.30.0.42"),
        endpoint_slice("10.0.1.1"),
        endpoint_slice("10.0.2.1", of="ns2/svc1"),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80", "pod 172.30.0.42:80": "10.0.2.1:80"},
    ),
    situation(
        "should-create-services-and-serve-on-different-service-cidrs",
        service("ns1/svc1", "172.30.0.41"),
        service("ns1/svc2", "198.18.0.1"),
        TWO,
        endpoint_slice("10.0.2.1", of="ns1/svc2"),
        wanted={"pod 172.30.0.41:80": BOTH, "pod 198.18.0.1:80": "10.0.2.1:80"},
    ),
)

NOBODY = (
    situation("should-be-rejected-when-no-endpoints-exist", service(), wanted=all_clients("172.30.0.41:80", "REJECT")),
    situation(
        "should-be-rejected-for-evicted-pods",
        service(),
        endpoint_slice(family=Family.IPV4),
        wanted=all_clients("172.30.0.41:80", "REJECT"),
    ),
    situation(
        "endpoints-not-ready",
        service(),
        endpoint_slice(unready("10.0.1.1"), unready("10.0.2.1")),
        wanted=all_clients("172.30.0.41:80", "REJECT"),
    ),
    situation(
        "slice-port-name-differs",
        service("ns1/svc1", "172.30.0.41", port(80, "http")),
        endpoint_slice("10.0.1.1", ports=[slice_port(80, "https")]),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
    situation(
        "slice-port-protocol-differs",
        service("ns1/svc1", "172.30.0.41", port(80, "dns", TCP)),
        endpoint_slice("10.0.1.1", ports=[slice_port(80, "dns", UDP)]),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
    situation(
        "unnamed-slice-port-of-a-named-service-port",
        service("ns1/svc1", "172.30.0.41", port(80, "http")),
        endpoint_slice("10.0.1.1"),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
    situation(
        "slice-without-usable-ports",
        service(),
        endpoint_slice("10.0.1.1", ports=[]),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
    situation("slices-before-their-service", TWO, wanted={"pod 172.30.0.41:80": "NOT_SERVICE"}),
    situation(
        "slices-of-a-service-that-is-gone",
        service("ns1/svc2", "172.30.0.42"),
        TWO,
        wanted={"pod 172.30.0.41:80": "NOT_SERVICE", "pod 172.30.0.42:80": "REJECT"},
    ),
    situation(
        "slice-of-the-same-name-in-another-namespace",
        service(),
        endpoint_slice("10.0.1.1", of="ns2/svc1"),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
)

TERMINATING = (
    situation(
        "should-fallback-to-terminating-endpoints-when-there-are-no-ready-endpoints-with-internaltrafficpolicy-cluster",
        service(),
        endpoint_slice(leaving("10.0.1.1"), leaving("10.0.2.1")),
        wanted={"pod 172.30.0.41:80": BOTH, "outside 172.30.0.41:80": MASQ_BOTH},
    ),
    situation(
        "terminating-and-not-serving",
        service(),
        endpoint_slice(dying("10.0.1.1"), dying("10.0.2.1")),
        wanted=all_clients("172.30.0.41:80", "REJECT"),
    ),
    situation(
        "terminating-some-serving",
        service(),
        endpoint_slice(dying("10.0.1.1"), leaving("10.0.2.1"), unready("10.0.3.1")),
        wanted={"pod 172.30.0.41:80": "10.0.2.1:80"},
    ),
    situation(
        "ready-and-terminating-mixed",
        service(),
        endpoint_slice("10.0.1.1", leaving("10.0.2.1"), dying("10.0.3.1"), unready("10.0.4.1")),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80", "outside 172.30.0.41:80": "masq 10.0.1.1:80"},
    ),
    situation(
        "serving-but-neither-ready-nor-terminating",
        service(),
        endpoint_slice(Endpoint("10.0.1.1", ready=False, serving=True, terminating=False, node="node1")),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
    situation(
        "should-be-able-to-connect-to-terminating-and-unready-endpoints-if-publishnotreadyaddresses-is-true",
        service(),
        endpoint_slice(Endpoint("10.0.1.1", ready=True, serving=False, terminating=True, node="node1"), "10.0.2.1"),
        wanted={"pod 172.30.0.41:80": BOTH},
    ),
    situation(
        "should-not-be-able-to-connect-to-terminating-and-unready-endpoints-if-publishnotreadyaddresses-is-false",
        service(),
        endpoint_slice(dying("10.0.1.1")),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
    situation(
        "duplicate-over-slices-the-one-that-does-not-terminate-wins",
        service(),
        endpoint_slice(leaving("10.0.1.1"), name="a"),
        endpoint_slice("10.0.1.1", name="b"),
        endpoint_slice(leaving("10.0.2.1"), name="c"),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80"},
    ),
    situation(
        "duplicate-over-slices-the-other-way-round",
        service(),
        endpoint_slice("10.0.1.1", name="a"),
        endpoint_slice(leaving("10.0.1.1"), name="b"),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80"},
    ),
    situation(
        "duplicate-that-does-not-terminate-wins-even-unready",
        service(),
        endpoint_slice(leaving("10.0.1.1"), name="a"),
        endpoint_slice(unready("10.0.1.1"), name="b"),
        wanted={"pod 172.30.0.41:80": "REJECT"},
    ),
)

INTERNAL_LOCAL = (
    situation(
        "should-respect-internaltrafficpolicy-local-pod-to-pod",
        service(internal_policy=LOCAL),
        TWO,
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80", "remote-pod 172.30.0.41:80": "10.0.1.1:80"},
    ),
    situation(
        "should-respect-internaltrafficpolicy-local-pod-hostnetwork-true-to-pod",
        service(internal_policy=LOCAL),
        TWO,
        wanted={"node 172.30.0.41:80": "masq 10.0.1.1:80"},
    ),
    situation(
        "should-respect-internaltrafficpolicy-local-pod-and-node-to-pod-hostnetwork-true",
        service(internal_policy=LOCAL),
        endpoint_slice("192.168.0.2", "192.168.0.3"),
        wanted={"pod 172.30.0.41:80": "192.168.0.2:80", "node 172.30.0.41:80": "masq 192.168.0.2:80"},
    ),
    situation(
        "internal-local-outside-client",
        service(internal_policy=LOCAL),
        TWO,
        wanted={"outside 172.30.0.41:80": "masq 10.0.1.1:80"},
    ),
    situation(
        "internal-local-none-local-drops-for-every-client",
        service(internal_policy=LOCAL),
        endpoint_slice("10.0.2.1"),
        wanted=all_clients("172.30.0.41:80", "DROP"),
    ),
    situation(
        "internal-local-none-local-but-one-terminates-elsewhere",
        service(internal_policy=LOCAL),
        endpoint_slice(leaving("10.0.2.1")),
        wanted=all_clients("172.30.0.41:80", "DROP"),
    ),
    situation(
        "internal-local-local-one-unready",
        service(internal_policy=LOCAL),
        endpoint_slice(unready("10.0.1.1"), "10.0.2.1"),
        wanted=all_clients("172.30.0.41:80", "DROP"),
    ),
    situation(
        "internal-local-nobody-anywhere",
        service(internal_policy=LOCAL),
        endpoint_slice(unready("10.0.1.1"), dying("10.0.2.1")),
        wanted=all_clients("172.30.0.41:80", "REJECT"),
    ),
    situation(
        "should-fallback-to-local-terminating-endpoints-when-there-are-no-ready-endpoints-with-internaltrafficpolicy-local",
        service(internal_policy=LOCAL),
        endpoint_slice(leaving("10.0.1.1"), "10.0.2.1", leaving("10.0.2.2")),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80"},
    ),
    situation(
        "internal-local-without-detector-keeps-the-source",
        service(internal_policy=LOCAL),
        TWO,
        options=options(cluster_cidrs=()),
        wanted=all_clients("172.30.0.41:80", "10.0.1.1:80"),
    ),
    situation(
        "internal-local-ignores-hints",
        service(internal_policy=LOCAL),
        endpoint_slice(ready("10.0.1.1", zones=["zone-b"]), ready("10.0.2.1", zones=["zone-a"])),
        wanted={"pod 172.30.0.41:80": "10.0.1.1:80"},
    ),
    situation(
        "internal-local-endpoint-of-unknown-node",
        service(internal_policy=LOCAL),
        endpoint_slice(Endpoint("10.0.1.1")),
        wanted={"pod 172.30.0.41:80": "DROP"},
    ),
)

ONE = (Family.IPV4,)

DUAL_STACK = (
    situation(
        "create-service-with-ipv4-v6-cluster-ip",
        service("ns1/svc1", ["172.30.0.41", "fd00:172:30::41"]),
        TWO,
        endpoint_slice(
            Endpoint("fd00:10:0:1::1", node="node1"), Endpoint("fd00:10:0:2::1", node="node2"), name="svc1-v6"
        ),
        options=options(cluster_cidrs=["10.0.0.0/8", "fd00:10::/32"]),
        families=ONE,
        wanted={
            "pod 172.30.0.41:80": BOTH,
            "fd00:10:0:1::9 fd00:172:30::41:80": "fd00:10:0:1::1:80 fd00:10:0:2::1:80",
            "fd00:203::5 fd00:172:30::41:80": "masq fd00:10:0:1::1:80 fd00:10:0:2::1:80",
        },
    ),
    situation(
        "detector-in-one-family-only",
        service("ns1/svc1", ["fd00:172:30::41", "172.30.0.41"]),
        TWO,
        endpoint_slice(Endpoint("fd00:10:0:1::1", node="node1"), name="svc1-v6"),
        families=ONE,
        wanted={
            "outside 172.30.0.41:80": MASQ_BOTH,
            "fd00:203::5 fd00:172:30::41:80": "fd00:10:0:1::1:80",
        },
    ),
    situation(
        "one-family-without-endpoints",
        service("ns1/svc1", ["172.30.0.41", "fd00:172:30::41"]),
        TWO,
        families=ONE,
        wanted={"pod 172.30.0.41:80": BOTH, "fd00:10:0:1::9 fd00:172:30::41:80": "REJECT"},
    ),
    situation(
        "no-cluster-ip-in-a-family-nothing-in-that-family",
        service(
            "ns1/svc1",
            "172.30.0.41",
            port(80, node_port=30080),
            external=["fd00:192:168:99::1", "192.168.99.1"],
            lb=["fd00:1:2:3::4", "1.2.3.4"],
        ),
        TWO,
        endpoint_slice(Endpoint("fd00:10:0:1::1", node="node1"), name="svc1-v6"),
        node=node(addresses=["192.168.0.2", "fd00:192:168::2"]),
        families=ONE,
        wanted={
            "outside 192.168.0.2:30080": MASQ_BOTH,
            "outside 192.168.99.1:80": MASQ_BOTH,
            "outside 1.2.3.4:80": MASQ_BOTH,
            "fd00:203::5 fd00:192:168:99::1:80": "NOT_SERVICE",
            "fd00:203::5 fd00:1:2:3::4:80": "NOT_SERVICE",
            "fd00:203::5 fd00:192:168::2:30080": "NOT_SERVICE",
        },
    ),
)

GRANULAR = tuple(
    situation(
        f"granular-checks-services-should-function-for-{kind}-{label}",
        service("ns1/svc1", "172.30.0.41", port(80, "", protocol)),
        endpoint_slice("10.0.1.1", "10.0.2.1", ports=[slice_port(8080, "", protocol)]),
        wanted={f"{client} 172.30.0.41:80/{protocol.name}": then},
    )
    for label, protocol in (("http", TCP), ("udp", UDP), ("sctp", SCTP))
    for kind, client, then in (
        ("pod-service", "pod", "10.0.1.1:8080 10.0.2.1:8080"),
        ("node-service", "node", "masq 10.0.1.1:8080 10.0.2.1:8080"),
        ("endpoint-service", "10.0.1.1", "10.0.1.1:8080* 10.0.2.1:8080"),
    )
)

ROWS: tuple[Situation, ...] = WHO + WHAT + NOBODY + TERMINATING + INTERNAL_LOCAL + DUAL_STACK + GRANULAR


@every(ROWS)
def test_flow(row: Situation, family: Family) -> None:
    check(row, family)
