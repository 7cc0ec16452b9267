"""What a node's kernel holds, and what it should hold, read in this process.

Rules of this file: reads only. `held` is the dataplane's own reading of the pinned maps, with or without a daemon;
`wanted` is made of the same manifests by the product's sources and policy, so it says nothing about those: the
expectations that tests write by hand do.
"""

from __future__ import annotations

import json
from types import TracebackType

from ebpflb.config import Config
from ebpflb.config.options import Options, configure
from ebpflb.dataplane import Dataplane
from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Cluster
from ebpflb.demo.network import POD_CIDRS
from ebpflb.routes import RouteTable
from ebpflb.wiring import real_parts


class Kernel:
    """Of every node of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._parts = real_parts()
        self._dataplanes: dict[str, Dataplane] = {}

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dataplanes.clear()

    def wanted(self, node: str) -> RouteTable:
        """What policy makes of the manifests for this node."""
        config = self._config(node)
        with namespaces.inside(self._cluster.nodes[node].namespace):
            sources = self._parts.sources(config)
            try:
                desired = self._parts.desired(config, sources)
                for source in sources:
                    for event in source.read():
                        desired.apply(event)
                assert desired.synced
                return desired.routes()
            finally:
                for source in sources:
                    source.close()

    def held(self, node: str) -> RouteTable:
        """What the node's kernel holds."""
        with namespaces.inside(self._cluster.nodes[node].namespace):
            return self._dataplane(node).state()

    def table(self, node: str, what: str) -> list[dict[str, object]]:
        """`dump WHAT` on this node."""
        with namespaces.inside(self._cluster.nodes[node].namespace):
            return self._dataplane(node).tables(what)

    def inventory(self, node: str) -> tuple[str, ...]:
        """What `cleanup --dry-run` would list on this node."""
        with namespaces.inside(self._cluster.nodes[node].namespace):
            return self._dataplane(node).inventory()

    def counters(self, node: str) -> dict[str, int]:
        """The counters of the node's programs, by their names."""
        return {str(row["counter"]): int(str(row["value"])) for row in self.table(node, "counters")}

    def addresses(self, node: str) -> frozenset[str]:
        """All addresses that the node's kernel calls its own."""
        return frozenset(self.wanted(node).locality.node_addresses)

    def picture(self, node: str) -> str:
        """Everything of one node that helps to understand a failure."""
        home = self._cluster.nodes[node]
        commands = (
            ("ip", "address"), ("ip", "route"), ("ip", "-6", "route"), ("ip", "neighbour"), ("tc", "-s", "qdisc"),
            ("nft", "list", "ruleset"), ("conntrack", "-L"),
        )  # fmt: skip
        parts = []
        for argv in commands:
            done = self._cluster.run(home, argv)
            parts.append(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}")
        for what in ("counters", "flows"):
            parts.append(f"{what}\n" + "\n".join(json.dumps(row, default=str) for row in self.table(node, what)))
        parts.append("routes held\n" + "\n".join(f"{key} {route}" for key, route in self.held(node).ordered()))
        return "\n\n".join(parts)

    def _dataplane(self, node: str) -> Dataplane:
        if node not in self._dataplanes:
            (self._dataplanes[node],) = self._parts.dataplanes(self._config(node))
        return self._dataplanes[node]

    def _config(self, node: str) -> Config:
        options = Options(
            manifests=str(self._cluster.manifests.directory),
            node_name=node,
            cgroup=str(self._cluster.nodes[node].node_cgroup),
            bpffs=str(self._cluster.pins(node)),
            cluster_cidr=POD_CIDRS,
        )
        return configure(options, hostname=node)
