"""The packet-flow table, part 2: NodePorts, external IPs, load balancer IPs, their traffic policies and source ranges.

Ids are the names of the upstream tests where they have one. `outside` stands for every client off the cluster."""

from __future__ import annotations

from ebpflb.model import Family, Service
from tests.flows import Situation, check, every, situation
from tests.world import (
    CLUSTER,
    LOCAL,
    NODE_IP,
    OTHER_NODE_IP,
    SCTP,
    UDP,
    dying,
    endpoint_slice,
    leaving,
    options,
    port,
    ready,
    service,
    slice_port,
    unready,
)

TWO = endpoint_slice("10.0.1.1", "10.0.2.1")
FAR = endpoint_slice("10.0.2.1")
BOTH = "10.0.1.1:80 10.0.2.1:80"
MASQ_BOTH = f"masq {BOTH}"
CLIENTS = ("pod", "remote-pod", "node", "outside")
NO_DETECTOR = options(cluster_cidrs=())

NODE_PORT = "192.168.0.2:30080"
EXTERNAL = "192.168.99.1:80"
BALANCER = "1.2.3.4:80"
FRONTENDS = (NODE_PORT, EXTERNAL, BALANCER)


def everything(**more: object) -> Service:
    """A Service with a frontend of each kind."""
    return service(
        "ns1/svc1",
        "172.30.0.41",
        port(80, node_port=30080),
        external=["192.168.99.1"],
        lb=["1.2.3.4"],
        **more,  # type: ignore[arg-type]
    )


def nodeport(**more: object) -> Service:
    return service("ns1/svc1", "172.30.0.41", port(80, node_port=30080), **more)  # type: ignore[arg-type]


def balancer(*ranges: str, **more: object) -> Service:
    ports = port(80, node_port=30080)
    return service("ns1/svc1", "172.30.0.41", ports, lb=["1.2.3.4"], ranges=ranges, **more)  # type: ignore[arg-type]


def each(then: str, clients: tuple[str, ...] = CLIENTS, frontends: tuple[str, ...] = FRONTENDS) -> dict[str, str]:
    return {f"{client} {frontend}": then for client in clients for frontend in frontends}


POLICY_CLUSTER = (
    situation("external-cluster-masquerades-everybody", everything(), TWO, wanted=each(MASQ_BOTH)),
    situation("external-cluster-without-detector", everything(), TWO, options=NO_DETECTOR, wanted=each(MASQ_BOTH)),
    situation("external-cluster-endpoint-only-elsewhere", everything(), FAR, wanted=each("masq 10.0.2.1:80")),
    situation(
        "external-cluster-backend-calls-its-own-node-port",
        everything(),
        TWO,
        wanted={"10.0.1.1 192.168.0.2:30080": MASQ_BOTH},
    ),
    situation(
        "should-be-able-to-create-a-functioning-nodeport-service",
        nodeport(),
        TWO,
        wanted={"pod 172.30.0.41:80": BOTH, "outside 192.168.0.2:30080": MASQ_BOTH},
    ),
    situation(
        "node-port-of-another-node-is-not-ours",
        nodeport(),
        TWO,
        wanted={"pod 192.168.0.3:30080": "NOT_SERVICE", "node 192.168.0.3:30080": "NOT_SERVICE"},
    ),
    situation(
        "service-port-on-the-node-address-is-not-ours",
        nodeport(),
        TWO,
        wanted={"outside 192.168.0.2:80": "NOT_SERVICE"},
    ),
    situation(
        "a-backend-on-this-nodes-own-address-sees-who-comes-from-elsewhere",
        nodeport(),
        endpoint_slice(NODE_IP, OTHER_NODE_IP),
        wanted={
            "outside 192.168.0.2:30080": "192.168.0.2:80 192.168.0.3:80*",
            "pod 192.168.0.2:30080": "192.168.0.2:80 192.168.0.3:80*",
            "node 192.168.0.2:30080": "masq 192.168.0.2:80 192.168.0.3:80",
        },
    ),
    situation(
        "node-port-on-the-cluster-ip-is-not-ours",
        nodeport(),
        TWO,
        wanted={"pod 172.30.0.41:30080": "REJECT"},
    ),
    situation(
        "should-be-possible-to-connect-to-a-service-via-externalip-when-the-external-ip-is-not-assigned-to-a-node",
        service(external=["192.168.99.1", "192.168.99.2"]),
        TWO,
        wanted={
            "pod 192.168.99.1:80": MASQ_BOTH,
            "node 192.168.99.1:80": MASQ_BOTH,
            "outside 192.168.99.2:80": MASQ_BOTH,
        },
    ),
    situation(
        "without-external-ips",
        service(),
        TWO,
        wanted={"outside 192.168.99.1:80": "NOT_SERVICE"},
    ),
    situation(
        "load-balancer-with-two-addresses",
        service(lb=["1.2.3.4", "5.6.7.8"]),
        TWO,
        wanted={"outside 1.2.3.4:80": MASQ_BOTH, "outside 5.6.7.8:80": MASQ_BOTH},
    ),
    situation(
        "load-balancer-ipmode-proxy-has-no-row",
        nodeport(lb=[]),
        TWO,
        wanted={"pod 1.2.3.4:80": "NOT_SERVICE", "outside 192.168.0.2:30080": MASQ_BOTH},
    ),
    situation(
        "should-be-able-to-create-loadbalancer-service-without-nodeport",
        service(lb=["1.2.3.4"]),
        TWO,
        wanted={"outside 1.2.3.4:80": MASQ_BOTH, "outside 192.168.0.2:30080": "NOT_SERVICE"},
    ),
    situation(
        "should-be-able-to-update-service-type-to-nodeport-listening-on-same-port-number-but-different-protocols",
        service("ns1/svc1", "172.30.0.41", port(80, "t", node_port=30080), port(80, "u", UDP, 30080)),
        endpoint_slice("10.0.1.1", ports=[slice_port(80, "t"), slice_port(8053, "u", UDP)]),
        wanted={
            "outside 192.168.0.2:30080": "masq 10.0.1.1:80",
            "outside 192.168.0.2:30080/UDP": "masq 10.0.1.1:8053",
            "outside 192.168.0.2:30080/SCTP": "NOT_SERVICE",
        },
    ),
    situation(
        "should-serve-endpoints-on-same-port-and-different-protocol-for-internal-traffic-on-type-loadbalancer",
        service("ns1/svc1", "172.30.0.41", port(80, "t"), port(80, "u", UDP), lb=["1.2.3.4"]),
        endpoint_slice("10.0.1.1", ports=[slice_port(80, "t"), slice_port(8053, "u", UDP)]),
        wanted={"pod 1.2.3.4:80": "masq 10.0.1.1:80", "pod 1.2.3.4:80/UDP": "masq 10.0.1.1:8053"},
    ),
    situation(
        "should-support-basic-nodeport-udp-functionality",
        service("ns1/svc1", "172.30.0.41", port(80, "", UDP, 30080)),
        endpoint_slice("10.0.1.1", "10.0.2.1", ports=[slice_port(8080, "", UDP)]),
        wanted={
            "outside 192.168.0.2:30080/UDP": "masq 10.0.1.1:8080 10.0.2.1:8080",
            "pod 192.168.0.2:30080/UDP": "masq 10.0.1.1:8080 10.0.2.1:8080",
            "node 192.168.0.2:30080/UDP": "masq 10.0.1.1:8080 10.0.2.1:8080",
        },
    ),
    situation(
        "node-port-sctp",
        service("ns1/svc1", "172.30.0.41", port(80, "", SCTP, 30080)),
        endpoint_slice("10.0.1.1", ports=[slice_port(80, "", SCTP)]),
        wanted={"outside 192.168.0.2:30080/SCTP": "masq 10.0.1.1:80"},
    ),
    situation(
        "masquerade-all-changes-nothing-for-policy-cluster",
        everything(),
        TWO,
        options=options(masquerade_all=True),
        wanted=each(MASQ_BOTH),
    ),
    situation(
        "internal-local-does-not-bind-external-frontends",
        everything(internal_policy=LOCAL),
        FAR,
        wanted=each("masq 10.0.2.1:80") | {"pod 172.30.0.41:80": "DROP"},
    ),
)

NOBODY = (
    situation("no-endpoints-reject-on-each-kind-of-frontend", everything(), wanted=each("REJECT")),
    situation(
        "endpoints-not-ready-reject-on-each-kind-of-frontend",
        everything(),
        endpoint_slice(unready("10.0.1.1"), dying("10.0.2.1")),
        wanted=each("REJECT"),
    ),
    situation(
        "external-local-nobody-anywhere-rejects",
        everything(external_policy=LOCAL),
        endpoint_slice(unready("10.0.1.1")),
        wanted=each("REJECT"),
    ),
    situation(
        "should-fallback-to-terminating-endpoints-when-there-are-no-ready-endpoints-with-externaltrafficpolicy-cluster",
        everything(),
        endpoint_slice(leaving("10.0.1.1"), leaving("10.0.2.1"), dying("10.0.2.2")),
        wanted=each(MASQ_BOTH),
    ),
)

POLICY_LOCAL = (
    situation(
        "should-support-externaltrafficpolicy-local-for-type-nodeport",
        nodeport(external_policy=LOCAL),
        TWO,
        wanted={"outside 192.168.0.2:30080": "10.0.1.1:80", "other-node 192.168.0.2:30080": "10.0.1.1:80"},
    ),
    situation(
        "esipp-should-work-for-type-loadbalancer",
        everything(external_policy=LOCAL),
        TWO,
        wanted=each("10.0.1.1:80", ("outside",)),
    ),
    situation(
        "esipp-should-only-target-nodes-with-endpoints",
        everything(external_policy=LOCAL),
        FAR,
        wanted=each("DROP", ("outside", "other-node")),
    ),
    situation(
        "esipp-should-work-from-pods",
        everything(external_policy=LOCAL),
        TWO,
        wanted=each(BOTH, ("pod", "remote-pod")),
    ),
    situation(
        "external-local-none-local-pods-still-get-cluster-endpoints",
        everything(external_policy=LOCAL),
        FAR,
        wanted=each("10.0.2.1:80", ("pod", "remote-pod")),
    ),
    situation(
        "external-local-from-the-node-itself",
        everything(external_policy=LOCAL),
        TWO,
        wanted=each(MASQ_BOTH, ("node",)),
    ),
    situation(
        "external-local-none-local-the-node-still-gets-cluster-endpoints",
        everything(external_policy=LOCAL),
        FAR,
        wanted=each("masq 10.0.2.1:80", ("node",)),
    ),
    situation(
        "external-local-without-detector-pods-count-as-outside",
        everything(external_policy=LOCAL),
        TWO,
        options=NO_DETECTOR,
        wanted=each("10.0.1.1:80", ("pod", "remote-pod", "outside")) | each(MASQ_BOTH, ("node",)),
    ),
    situation(
        "external-local-none-local-without-detector",
        everything(external_policy=LOCAL),
        FAR,
        options=NO_DETECTOR,
        wanted=each("DROP", ("pod", "remote-pod", "outside")) | each("masq 10.0.2.1:80", ("node",)),
    ),
    situation(
        "external-local-hairpin",
        everything(external_policy=LOCAL),
        TWO,
        wanted={"10.0.1.1 1.2.3.4:80": "10.0.1.1:80* 10.0.2.1:80"},
    ),
    situation(
        "external-local-hairpin-without-detector",
        everything(external_policy=LOCAL),
        TWO,
        options=NO_DETECTOR,
        wanted={"10.0.1.1 1.2.3.4:80": "10.0.1.1:80*"},
    ),
    situation(
        "external-local-masquerade-all-is-about-cluster-ips",
        everything(external_policy=LOCAL),
        TWO,
        options=options(masquerade_all=True),
        wanted=each("10.0.1.1:80", ("outside",)) | each(BOTH, ("pod",)) | {"pod 172.30.0.41:80": MASQ_BOTH},
    ),
    situation(
        "should-fallback-to-local-terminating-endpoints-when-there-are-no-ready-endpoints-with-externaltrafficpolicy-local",
        everything(external_policy=LOCAL),
        endpoint_slice(leaving("10.0.1.1"), leaving("10.0.2.1")),
        wanted=each("10.0.1.1:80", ("outside",)) | each(BOTH, ("pod",)),
    ),
    situation(
        "external-local-fallback-is-decided-apart-from-cluster",
        everything(external_policy=LOCAL),
        endpoint_slice(leaving("10.0.1.1"), "10.0.2.1"),
        wanted=each("10.0.1.1:80", ("outside",)) | each("10.0.2.1:80", ("pod",)),
    ),
    situation(
        "external-local-only-remote-terminating",
        everything(external_policy=LOCAL),
        endpoint_slice(dying("10.0.1.1"), leaving("10.0.2.1")),
        wanted=each("DROP", ("outside",)) | each("10.0.2.1:80", ("pod",)),
    ),
    situation(
        "external-local-cluster-ip-keeps-all-endpoints",
        everything(external_policy=LOCAL),
        TWO,
        wanted={"pod 172.30.0.41:80": BOTH, "outside 172.30.0.41:80": MASQ_BOTH},
    ),
    situation(
        "both-policies-local",
        everything(internal_policy=LOCAL, external_policy=LOCAL),
        TWO,
        wanted={
            "pod 172.30.0.41:80": "10.0.1.1:80",
            "node 172.30.0.41:80": "masq 10.0.1.1:80",
            "outside 1.2.3.4:80": "10.0.1.1:80",
            "pod 1.2.3.4:80": BOTH,
            "node 192.168.0.2:30080": MASQ_BOTH,
        },
    ),
    situation(
        "both-policies-local-none-local",
        everything(internal_policy=LOCAL, external_policy=LOCAL),
        FAR,
        wanted={
            "pod 172.30.0.41:80": "DROP",
            "outside 1.2.3.4:80": "DROP",
            "pod 1.2.3.4:80": "10.0.2.1:80",
            "node 1.2.3.4:80": "masq 10.0.2.1:80",
        },
    ),
    situation(
        "external-local-hints-shape-what-internal-clients-get",
        everything(external_policy=LOCAL),
        endpoint_slice(ready("10.0.1.1", zones=["zone-b"]), ready("10.0.2.1", zones=["zone-a"])),
        wanted={"outside 1.2.3.4:80": "10.0.1.1:80", "pod 1.2.3.4:80": "10.0.2.1:80"},
    ),
    situation(
        "external-local-host-network-backend",
        everything(external_policy=LOCAL),
        endpoint_slice("192.168.0.2"),
        wanted={"outside 192.168.0.2:30080": "192.168.0.2:80"},
    ),
    situation(
        "esipp-should-handle-updates-to-externaltrafficpolicy-field-cluster",
        everything(external_policy=CLUSTER),
        FAR,
        wanted={"outside 1.2.3.4:80": "masq 10.0.2.1:80"},
    ),
)

RANGES = (
    situation(
        "should-only-allow-access-from-service-loadbalancer-source-ranges",
        balancer("203.0.113.0/24"),
        TWO,
        wanted={
            "outside 1.2.3.4:80": MASQ_BOTH,
            "198.51.100.9 1.2.3.4:80": "DROP",
            "pod 1.2.3.4:80": "DROP",
            "node 1.2.3.4:80": "DROP",
        },
    ),
    situation(
        "source-ranges-of-pods",
        balancer("10.0.1.0/24"),
        TWO,
        wanted={"pod 1.2.3.4:80": MASQ_BOTH, "remote-pod 1.2.3.4:80": "DROP", "outside 1.2.3.4:80": "DROP"},
    ),
    situation(
        "several-source-ranges",
        balancer("203.0.113.0/24", "10.0.2.9/32"),
        TWO,
        wanted={"outside 1.2.3.4:80": MASQ_BOTH, "remote-pod 1.2.3.4:80": MASQ_BOTH, "pod 1.2.3.4:80": "DROP"},
    ),
    situation(
        "source-ranges-with-the-node-let-the-balancer-address-in",
        balancer("192.168.0.0/24"),
        TWO,
        wanted={
            "node 1.2.3.4:80": MASQ_BOTH,
            "other-node 1.2.3.4:80": MASQ_BOTH,
            "1.2.3.4 1.2.3.4:80": MASQ_BOTH,
            "outside 1.2.3.4:80": "DROP",
        },
    ),
    situation(
        "source-ranges-without-the-node-keep-the-balancer-address-out",
        balancer("203.0.113.0/24"),
        TWO,
        wanted={"1.2.3.4 1.2.3.4:80": "DROP"},
    ),
    situation(
        "source-ranges-let-in-each-balancer-address-at-itself-only",
        service(lb=["1.2.3.4", "5.6.7.8"], ranges=["192.168.0.2/32"]),
        TWO,
        wanted={"1.2.3.4 5.6.7.8:80": "DROP", "5.6.7.8 5.6.7.8:80": MASQ_BOTH, "5.6.7.8 1.2.3.4:80": "DROP"},
    ),
    situation("source-ranges-empty", balancer(), TWO, wanted={"198.51.100.9 1.2.3.4:80": MASQ_BOTH}),
    situation(
        "source-ranges-any-zero-opens-all",
        balancer("203.0.113.0/24", "0.0.0.0/0"),
        TWO,
        wanted={"198.51.100.9 1.2.3.4:80": MASQ_BOTH, "pod 1.2.3.4:80": MASQ_BOTH},
    ),
    situation(
        "source-ranges-not-applied-to-node-ports",
        balancer("203.0.113.0/24"),
        TWO,
        wanted={"198.51.100.9 192.168.0.2:30080": MASQ_BOTH},
    ),
    situation(
        "source-ranges-not-applied-to-cluster-ips",
        balancer("203.0.113.0/24"),
        TWO,
        wanted={"pod 172.30.0.41:80": BOTH},
    ),
    situation(
        "source-ranges-not-applied-to-external-ips",
        service(external=["192.168.99.1"], lb=["1.2.3.4"], ranges=["203.0.113.0/24"]),
        TWO,
        wanted={"198.51.100.9 192.168.99.1:80": MASQ_BOTH, "198.51.100.9 1.2.3.4:80": "DROP"},
    ),
    situation(
        "external-ip-that-is-a-balancer-address-too-keeps-the-ranges",
        service(external=["1.2.3.4"], lb=["1.2.3.4"], ranges=["203.0.113.0/24"]),
        TWO,
        wanted={"198.51.100.9 1.2.3.4:80": "DROP", "outside 1.2.3.4:80": MASQ_BOTH},
    ),
    situation(
        "source-ranges-come-before-reject",
        balancer("203.0.113.0/24"),
        wanted={"outside 1.2.3.4:80": "REJECT", "198.51.100.9 1.2.3.4:80": "DROP"},
    ),
    situation(
        "source-ranges-with-external-local",
        balancer("203.0.113.0/24", "10.0.0.0/8", external_policy=LOCAL),
        TWO,
        wanted={
            "outside 1.2.3.4:80": "10.0.1.1:80",
            "198.51.100.9 1.2.3.4:80": "DROP",
            "pod 1.2.3.4:80": BOTH,
            "node 1.2.3.4:80": "DROP",
        },
    ),
    situation(
        "source-ranges-of-the-other-family-leave-it-open",
        balancer("2001:db8::/32"),
        TWO,
        families=(Family.IPV4,),
        wanted={"198.51.100.9 1.2.3.4:80": MASQ_BOTH},
    ),
    situation(
        "source-ranges-zero-of-the-other-family-opens-nothing",
        balancer("203.0.113.0/24", "::/0"),
        TWO,
        families=(Family.IPV4,),
        wanted={"198.51.100.9 1.2.3.4:80": "DROP"},
    ),
)

ROWS: tuple[Situation, ...] = POLICY_CLUSTER + NOBODY + POLICY_LOCAL + RANGES


@every(ROWS)
def test_flow(row: Situation, family: Family) -> None:
    check(row, family)
