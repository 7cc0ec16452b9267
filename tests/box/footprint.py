"""Everything of a node that cleaning up should restore."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ebpflb.dataplane.bpf import tcx
from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Cluster

# What changes by itself: lifetimes, counters, and the dates of comments.
_PASSING = re.compile(
    r"(valid_lft|preferred_lft|expires) \d+sec|packets \d+ bytes \d+|\[\d+:\d+\]|^# (Generated|Completed) .*$",
    re.MULTILINE,
)

# What a running kernel changes by itself.
_COUNTED = re.compile(r"ipv[46]/(neigh|route)/.*|netfilter/nf_conntrack_count|ipv6/conf/.*/stable_secret")


class Footprint(NamedTuple):
    """Text by what it is about."""

    parts: dict[str, str]

    def differences(self, before: Footprint) -> list[str]:
        """One line for each part that is not what it was. A sysctl that only one of them has is no difference: it is of
        a device, whose link is a part as well, or of a module that anybody on this machine may have loaded."""
        return [
            f"{part}: was {before.parts.get(part)!r}, is {self.parts.get(part)!r}"
            for part in sorted({*self.parts, *before.parts})
            if self.parts.get(part) != before.parts.get(part)
            if not part.startswith("sysctl ") or (part in self.parts and part in before.parts)
        ]


def footprint_of(cluster: Cluster, name: str) -> Footprint:
    """A node's links, qdiscs, filters, programs, rules, sets, routes, sysctls, cgroup attachments, and pins."""
    node = cluster.nodes[name]

    def said(*argv: str) -> str:
        done = cluster.run(node, argv)
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout

    parts = {}
    links = json.loads(said("ip", "-d", "-j", "link"))
    for link in links:
        device = link["ifname"]
        link.get("linkinfo", {}).pop("info_data", None)  # a bridge's running timers
        port = link.get("linkinfo", {}).get("info_slave_data", {})
        for timer in [key for key in port if key.endswith("_timer")]:
            del port[timer]
        parts[f"link {device}"] = json.dumps(link, sort_keys=True)
        for side in ("ingress", "egress"):
            parts[f"filters {device} {side}"] = cluster.run(node, ["tc", "filter", "show", "dev", device, side]).stdout
        with namespaces.inside(node.namespace):
            parts[f"tcx {device}"] = str(tcx.running(link["ifindex"]))
    for what, argv in {
        "addresses": ("ip", "-o", "address"),
        "routes": ("ip", "route", "show", "table", "all"),
        "routes6": ("ip", "-6", "route", "show", "table", "all"),
        "rules": ("ip", "rule"),
        "qdiscs": ("tc", "qdisc", "show"),
        "nftables": ("nft", "list", "ruleset"),
        "legacy rules": ("iptables-legacy-save",),
        "legacy rules6": ("ip6tables-legacy-save",),
        "sets": ("ipset", "save"),
        "cgroup": ("bpftool", "cgroup", "tree", str(node.node_cgroup)),
    }.items():
        parts[what] = _PASSING.sub("", said(*argv))
    parts["pins"] = "\n".join(sorted(map(str, cluster.pins(name).rglob("*"))))
    with namespaces.inside(node.namespace):
        parts.update(_sysctls(Path("/proc/sys/net")))
    return Footprint(parts)


def _sysctls(top: Path) -> dict[str, str]:
    found: dict[str, Any] = {}
    for directory, _, files in os.walk(top):
        for file in files:
            path = Path(directory, file)
            key = str(path.relative_to(top))
            if not _COUNTED.fullmatch(key):
                try:
                    found[f"sysctl {key}"] = path.read_text()
                except OSError:  # some may only be written
                    continue
    return found
