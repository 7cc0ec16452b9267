"""What a node's kernel holds, and what it should hold, read in this process.

Rules of this file: reads only. `held` is the dataplane's own reading of what is installed, with or without a daemon;
`wanted` is made of the same manifests by the product's sources and policy, so it says nothing about those: the
expectations that tests write by hand do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType

from ebpflb import control
from ebpflb.config import Config
from ebpflb.config.options import Options, configure
from ebpflb.dataplane import Dataplane
from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Cluster
from ebpflb.demo.network import POD_CIDRS
from ebpflb.routes import RouteTable
from ebpflb.wiring import real_parts
from tests.box.modes import Mode
from tests.pace import PACE


class Kernel:
    """Of every node of a cluster; `modes` says how each is served now."""

    def __init__(self, cluster: Cluster, modes: Mapping[str, Mode]) -> None:
        self._cluster = cluster
        self._modes = modes
        self._parts = real_parts()
        self._dataplanes: dict[tuple[str, Mode], Dataplane] = {}

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
        """The counters of the node's dataplane, by their names."""
        return {str(row["counter"]): int(str(row["value"])) for row in self.table(node, "counters")}

    def drops(self, node: str) -> int:
        """How much the node has dropped so far by a verdict, at a socket or as a packet."""
        return self._modes[node].drops(lambda *argv: self.said(node, *argv), lambda: self.counters(node))

    def translations(self, node: str) -> int:
        """A number that grows whenever the node translates something."""
        return self._modes[node].translations(lambda *argv: self.said(node, *argv), lambda: self.counters(node))

    def settled(self, node: str) -> None:
        """Wait until the node's daemon has ended what it was doing when asked: it answers between two syncs only, and
        at the end of one flows follow the rows."""
        with namespaces.inside(self._cluster.nodes[node].namespace):
            control.ask(patience=10.0 * PACE)

    def said(self, node: str, *argv: str) -> str:
        """What a command prints on the node."""
        done = self._cluster.run(self._cluster.nodes[node], argv)
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout

    def addresses(self, node: str) -> frozenset[str]:
        """All addresses that the node's kernel calls its own."""
        return frozenset(self.wanted(node).locality.node_addresses)

    def picture(self, node: str) -> str:
        """Everything of one node that helps to understand a failure."""
        home = self._cluster.nodes[node]
        commands = (
            ("ip", "address"), ("ip", "route"), ("ip", "-6", "route"), ("ip", "neighbour"), ("tc", "-s", "qdisc"),
            ("conntrack", "-L"), ("conntrack", "-L", "-f", "ipv6"), ("iptables-legacy-save", "-c"),
            ("ip6tables-legacy-save", "-c"), ("nft", "list", "ruleset"), ("ipset", "list"),
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
        mode = self._modes[node]
        if (node, mode) not in self._dataplanes:
            ladder = {each.name: each for each in self._parts.dataplanes(self._config(node))}
            self._dataplanes[node, mode] = ladder[mode.dataplane]
        return self._dataplanes[node, mode]

    def _config(self, node: str) -> Config:
        options = Options(
            manifests=str(self._cluster.manifests.directory),
            node_name=node,
            cgroup=str(self._cluster.nodes[node].node_cgroup),
            bpffs=str(self._cluster.pins(node)),
            cluster_cidr=POD_CIDRS,
            dataplane=self._modes[node].dataplane,
            iptables_variant=self._modes[node].variant,
        )
        return configure(options, hostname=node)
