"""The packet-flow table, part 3: topology hints and traffic distribution, as consumed from EndpointSlices.

This node is node1 in zone-a. Ids are the names of the upstream tests where they have one."""

from __future__ import annotations

from ebpflb.model import Family
from tests.flows import Situation, check, every, situation
from tests.world import endpoint_slice, leaving, node, port, ready, service, slice_port, unready

TARGET = "pod 172.30.0.41:80"
NEAR, FAR = "10.0.1.1:80", "10.0.2.1:80"
BOTH = f"{NEAR} {FAR}"

ROWS: tuple[Situation, ...] = (
    situation(
        "same-zone-pods-prefersamezone",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a"]), ready("10.0.2.1", zones=["zone-b"])),
        wanted={TARGET: NEAR, "outside 172.30.0.41:80": f"masq {NEAR}"},
    ),
    situation(
        "same-node-prefersamenode",
        service(),
        endpoint_slice(
            ready("10.0.1.1", zones=["zone-a"], nodes=["node1"]),
            ready("10.0.1.2", zones=["zone-a"], nodes=["node1"]),
            ready("10.0.2.1", zones=["zone-a"], nodes=["node2"]),
        ),
        wanted={TARGET: "10.0.1.1:80 10.0.1.2:80", "node 172.30.0.41:80": "masq 10.0.1.1:80 10.0.1.2:80"},
    ),
    situation(
        "zone-hints-count-where-the-endpoint-is-does-not",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-b"]), ready("10.0.2.1", zones=["zone-a"])),
        wanted={TARGET: FAR},
    ),
    situation(
        "endpoint-hinted-for-several-zones",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a", "zone-b"]), ready("10.0.2.1", zones=["zone-b", "zone-c"])),
        wanted={TARGET: NEAR},
    ),
    situation(
        "zone-hint-missing-on-one-endpoint-switches-hints-off",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a"]), "10.0.2.1"),
        wanted={TARGET: BOTH},
    ),
    situation(
        "zone-hint-missing-on-the-first-endpoint-switches-hints-off",
        service(),
        endpoint_slice("10.0.1.1", ready("10.0.2.1", zones=["zone-a"])),
        wanted={TARGET: BOTH},
    ),
    situation(
        "zone-hint-missing-in-another-slice-switches-hints-off",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a"])),
        endpoint_slice("10.0.2.1"),
        wanted={TARGET: BOTH},
    ),
    situation(
        "no-endpoint-hinted-for-my-zone-uses-all",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-b"]), ready("10.0.2.1", zones=["zone-c"])),
        wanted={TARGET: BOTH},
    ),
    situation(
        "node-without-zone-uses-all",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a"]), ready("10.0.2.1", zones=["zone-b"])),
        node=node(zone=""),
        wanted={TARGET: BOTH},
    ),
    situation(
        "hints-of-endpoints-that-are-not-ready-do-not-count",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a"]), ready("10.0.2.1", zones=["zone-b"]), unready("10.0.3.1")),
        wanted={TARGET: NEAR},
    ),
    situation(
        "only-endpoint-of-my-zone-not-ready-uses-all-ready",
        service(),
        endpoint_slice(unready("10.0.1.1"), ready("10.0.2.1", zones=["zone-b"]), ready("10.0.3.1", zones=["zone-c"])),
        wanted={TARGET: "10.0.2.1:80 10.0.3.1:80"},
    ),
    situation(
        "terminating-fallback-ignores-hints",
        service(),
        endpoint_slice(leaving("10.0.1.1"), leaving("10.0.2.1")),
        wanted={TARGET: BOTH},
    ),
    situation(
        "terminating-endpoint-of-my-zone-does-not-beat-ready-ones-elsewhere",
        service(),
        endpoint_slice(leaving("10.0.1.1"), ready("10.0.2.1", zones=["zone-b"])),
        wanted={TARGET: FAR},
    ),
    situation(
        "client-on-the-same-node-prefersamenode",
        service(),
        endpoint_slice(
            ready("10.0.1.1", zones=["zone-a"], nodes=["node1"]), ready("10.0.2.1", zones=["zone-a"], nodes=["node2"])
        ),
        wanted={TARGET: NEAR},
    ),
    situation(
        "prefersamenode-falls-back-to-same-zone",
        service(),
        endpoint_slice(
            ready("10.0.2.1", zones=["zone-a"], nodes=["node2"]), ready("10.0.3.1", zones=["zone-b"], nodes=["node3"])
        ),
        wanted={TARGET: FAR},
    ),
    situation(
        "prefersamenode-falls-back-when-the-endpoint-becomes-unavailable",
        service(),
        endpoint_slice(
            unready("10.0.1.1"),
            ready("10.0.2.1", zones=["zone-b"], nodes=["node2"]),
            ready("10.0.3.1", zones=["zone-c"], nodes=["node3"]),
        ),
        wanted={TARGET: "10.0.2.1:80 10.0.3.1:80"},
    ),
    situation(
        "node-hint-missing-on-one-endpoint-leaves-zones-in-force",
        service(),
        endpoint_slice(
            ready("10.0.1.1", zones=["zone-a"], nodes=["node1"]),
            ready("10.0.2.1", zones=["zone-a"]),
            ready("10.0.3.1", zones=["zone-b"], nodes=["node3"]),
        ),
        wanted={TARGET: BOTH},
    ),
    situation(
        "node-hints-alone",
        service(),
        endpoint_slice(ready("10.0.1.1", nodes=["node1"]), ready("10.0.2.1", nodes=["node2"])),
        wanted={TARGET: NEAR},
    ),
    situation(
        "nobody-hinted-for-my-node-nor-zone",
        service(),
        endpoint_slice(ready("10.0.1.1", nodes=["node3"]), ready("10.0.2.1", nodes=["node2"])),
        wanted={TARGET: BOTH},
    ),
    situation(
        "multi-node-prefersamezone",
        service(),
        endpoint_slice(
            ready("10.0.1.1", zones=["zone-a"]),
            ready("10.0.2.1", zones=["zone-a"]),
            ready("10.0.3.1", zones=["zone-b"]),
        ),
        wanted={TARGET: BOTH},
    ),
    situation(
        "hints-are-judged-for-each-port-apart",
        service("ns1/svc1", "172.30.0.41", port(80, "a"), port(81, "b")),
        endpoint_slice(
            ready("10.0.1.1", zones=["zone-a"]),
            ready("10.0.2.1", zones=["zone-b"]),
            ports=[slice_port(80, "a"), slice_port(81, "b")],
        ),
        endpoint_slice("10.0.3.1", ports=[slice_port(81, "b")]),
        wanted={TARGET: NEAR, "pod 172.30.0.41:81": "10.0.1.1:81 10.0.2.1:81 10.0.3.1:81"},
    ),
    situation(
        "hints-shape-node-ports-too",
        service("ns1/svc1", "172.30.0.41", port(80, node_port=30080)),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a"]), ready("10.0.2.1", zones=["zone-b"])),
        wanted={"outside 192.168.0.2:30080": f"masq {NEAR}"},
    ),
    situation(
        "hints-over-different-target-ports",
        service(),
        endpoint_slice(ready("10.0.1.1", zones=["zone-a"]), ports=[slice_port(8080)]),
        endpoint_slice(ready("10.0.2.1", zones=["zone-b"]), ports=[slice_port(9090)]),
        wanted={TARGET: "10.0.1.1:8080"},
    ),
)


@every(ROWS)
def test_flow(row: Situation, family: Family) -> None:
    check(row, family)
