"""The iptables dataplane beside what kube-proxy feeds to iptables-restore for the same state, in either variant.

Rules of this file: kube-proxy's part is its restore alone, in the shape of version 1.36 in a large cluster (no
comments):
cold one input with everything, all chains of a table in one transaction; for a change every chain that is no Service's
written anew, KUBE-SERVICES with its line for each Service among them, and the chains of the Service that changed. Ours
is all that a sync does: working out what to write, looking at what is there, restoring, looking for stale flows. Each
has a namespace of its own; changes take turns, an endpoint going and another one coming.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.clusters import cluster_ip, endpoint_ips
from bench.lab import Lab
from bench.plane import ENDPOINTS, SPARE
from bench.report import Figure, middle
from ebpflb.dataplane.iptables import names
from ebpflb.dataplane.iptables.dataplane import IptablesDataplane
from ebpflb.dataplane.iptables.frame import Settings, fixed, guests
from ebpflb.dataplane.iptables.layout import Index, PortKey
from ebpflb.dataplane.iptables.rules import port_rules
from ebpflb.demo import namespaces
from ebpflb.model import Family, Protocol, ServiceName
from ebpflb.netfilter.commands import required
from ebpflb.netfilter.iptables import Iptables, Variant
from ebpflb.routes import (
    Backend,
    Frontend,
    Key,
    Kind,
    Locality,
    Masquerade,
    Route,
    RouteTable,
    Scope,
    ServicePortName,
    Verdict,
    backend_order,
)

_COMMENT = re.compile(r' -m comment --comment "[^"]*"')
_PATIENCE = 180.0
"""Seconds after which a restore of everything is stopped, and counted as if it were done."""
_SETTINGS = Settings(comments=False)
_OURS_ALONE = (names.LOCALITY, names.CIP_REJECT)


def iptables(lab: Lab, services: int, changes: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """All figures of this file."""
    table = _table(services)
    # iptables' own variable: a restore of everything holds the lock for longer than others on this machine wait for it.
    os.environ["XTABLES_LOCKFILE"] = str(lab.directory / "xtables.lock")
    for variant in reversed(Variant):
        with _namespace(lab, f"{variant}-ours") as ours, _namespace(lab, f"{variant}-theirs") as theirs:
            yield from _figures(lab, ours, theirs, variant, table, services, changes, say)


def _figures(
    lab: Lab,
    ours: str,
    theirs: str,
    variant: Variant,
    table: RouteTable,
    services: int,
    changes: int,
    say: Callable[[str], None],
) -> Iterator[Figure]:
    size = f"{services:,} Services × {ENDPOINTS}, variant {variant}"
    what = f"iptables.{variant}"
    tool = Iptables(Family.IPV4, variant)
    say(f"iptables: cold, {size}")
    dataplane = IptablesDataplane(variant=variant)
    with namespaces.inside(ours):
        dataplane.start()
        cold = _timed(lambda: _complete(dataplane, table))
    yield Figure(f"{what}.cold", f"cold sync, {size}", cold, "s")
    say(f"iptables: kube-proxy's restore of everything, {size}")
    with namespaces.inside(theirs):
        tool.restore(_jumps())
        their_cold, note = _restore_all(lab, tool, _full(table))
        if note:
            tool.restore(_in_parts(table))
    yield Figure(f"{what}.cold.kube-proxy", f"kube-proxy's restore of everything, {size}", their_cold, "s", note=note)
    yield Figure(f"{what}.cold.ratio", f"cold sync ÷ kube-proxy's restore, {size}", cold / their_cold, "")
    say(f"iptables: changes, {size}")
    gc.collect()
    gc.freeze()
    mine: list[float] = []
    yours: list[float] = []
    index = Index(table)
    dispatch = _dispatch(table, index)
    for number in range(changes):
        at = number * 7919 % services
        table = table.evolve(_rows(at, (*endpoint_ips(at, ENDPOINTS)[1:], SPARE[number % len(SPARE)])))
        with namespaces.inside(ours):
            mine.append(1000 * _timed(lambda table=table: _complete(dataplane, table)))  # type: ignore[misc]
        lines = _partial(table, index, dispatch, at)
        with namespaces.inside(theirs):
            yours.append(1000 * _timed(lambda lines=lines: tool.restore(lines)))  # type: ignore[misc]
    change, their_change = (
        middle(f"{what}.change", f"one endpoint replaced, {size}", mine, "ms"),
        middle(f"{what}.change.kube-proxy", f"kube-proxy's restore of that, {size}", yours, "ms"),
    )
    yield change
    yield their_change
    ratio = change.value / their_change.value
    yield Figure(f"{what}.change.ratio", f"one endpoint replaced ÷ kube-proxy's restore, {size}", ratio, "")
    say(f"iptables: restart, {size}")
    with namespaces.inside(ours):
        again = IptablesDataplane(variant=variant)
        again.start()
        restart = _timed(lambda: _complete(again, table))
    yield Figure(f"{what}.restart", f"first sync of a restart that finds all in place, {size}", restart, "s")
    gc.unfreeze()


def _restore_all(lab: Lab, tool: Iptables, lines: list[str]) -> tuple[float, str]:
    """How long it takes in one piece, up to `_PATIENCE`."""
    file = lab.directory / "restore"
    file.write_text("".join(lines))
    argv = [required(tool.family, tool.variant, "-restore"), "-w", "5", "--noflush", "--counters"]
    begin = time.perf_counter()
    with file.open("rb") as given:
        try:
            subprocess.run(argv, stdin=given, check=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            return _PATIENCE, f"given up after {_PATIENCE:.0f} s"
    return time.perf_counter() - begin, ""


def _timed(deed: Callable[[], object]) -> float:
    begin = time.perf_counter()
    deed()
    return time.perf_counter() - begin


def _complete(dataplane: IptablesDataplane, table: RouteTable) -> None:
    report = dataplane.sync(table)
    assert report.complete, report.problems


@contextmanager
def _namespace(lab: Lab, name: str) -> Iterator[str]:
    namespace = f"{lab.name}-{name}"
    namespaces.create(namespace)
    try:
        yield namespace
    finally:
        namespaces.delete(namespace)


# ---- The state


def _table(services: int) -> RouteTable:
    rows: dict[Key, Route] = {}
    for number in range(services):
        rows.update(_rows(number, endpoint_ips(number, ENDPOINTS)))
    owned = {cluster_ip(number): ServiceName("bench", f"svc-{number}") for number in range(services)}
    return RouteTable(rows, Locality(("127.0.0.1", "::1"), ("10.244.0.0/16",)), owned=owned)


def _rows(number: int, endpoints: tuple[str, ...] | list[str]) -> dict[Key, Route]:
    backends = tuple(sorted((Backend(address, 8080) for address in endpoints), key=backend_order))
    frontend = Frontend(cluster_ip(number), 80, Protocol.TCP)
    return {
        (frontend, scope): Route(_name(number), Kind.CLUSTER_IP, Verdict.FORWARD, backends, masquerade)
        for scope, masquerade in ((Scope.INTERNAL, Masquerade.NOT_POD), (Scope.EXTERNAL, Masquerade.ALWAYS))
    }


def _name(number: int) -> ServicePortName:
    return ServicePortName("bench", f"svc-{number}", "http")


# ---- kube-proxy's part


def _jumps() -> list[str]:
    lines = []
    for table, chains in guests(()).items():
        targets = sorted({rule.rpartition(" ")[2] for rules in chains.values() for rule in rules})
        lines += [f"*{table}\n", *(f":{target} - [0:0]\n" for target in targets)]
        lines += [_COMMENT.sub("", rule) + "\n" for rules in chains.values() for rule in rules]
        lines.append("COMMIT\n")
    return lines


def _around(table: RouteTable) -> dict[str, dict[str, tuple[str, ...]]]:
    """The chains that are no Service's, which kube-proxy writes each time."""
    found = fixed(table, Family.IPV4, _SETTINGS)
    shared = {"nat": (), "filter": (names.SERVICES, names.EXTERNAL_SERVICES, names.PROXY_FIREWALL)}
    return {
        name: {chain: rules for chain, rules in found[name].items() if chain not in _OURS_ALONE}
        | dict.fromkeys(shared[name], ())
        for name in ("filter", "nat")
    }


def _dispatch(table: RouteTable, index: Index) -> list[str]:
    return [
        _COMMENT.sub("", line) + "\n"
        for key in index.ports()
        for line in port_rules(key, table, index, _SETTINGS).shared["nat"][names.SERVICES]
    ]


def _full(table: RouteTable) -> list[str]:
    index = Index(table)
    own: dict[str, tuple[str, ...]] = {}
    for key in index.ports():
        own.update(port_rules(key, table, index, _SETTINGS).own["nat"])
    return _restore(table, own, _dispatch(table, index))


def _in_parts(table: RouteTable) -> list[str]:
    """The same state, in transactions of a size that variant nft can cope with."""
    index = Index(table)
    lines = _restore(table, {}, [])
    keys = list(index.ports())
    for at in range(0, len(keys), 45):
        own: dict[str, tuple[str, ...]] = {}
        for key in keys[at : at + 45]:
            own.update(port_rules(key, table, index, _SETTINGS).own["nat"])
        lines += ["*nat\n", *(f":{chain} - [0:0]\n" for chain in own)]
        lines += [_COMMENT.sub("", rule) + "\n" for rules in own.values() for rule in rules]
        lines.append("COMMIT\n")
    return [*lines, "*nat\n", *_dispatch(table, index), "COMMIT\n"]


def _partial(table: RouteTable, index: Index, dispatch: list[str], number: int) -> list[str]:
    key = PortKey(_name(number), Protocol.TCP, Family.IPV4)
    return _restore(table, port_rules(key, table, index, _SETTINGS).own["nat"], dispatch)


def _restore(table: RouteTable, own: dict[str, tuple[str, ...]], dispatch: list[str]) -> list[str]:
    around = _around(table)
    lines = ["*filter\n", *(f":{chain} - [0:0]\n" for chain in around["filter"])]
    lines += [_COMMENT.sub("", rule) + "\n" for rules in around["filter"].values() for rule in rules]
    lines += ["COMMIT\n", "*nat\n", f":{names.SERVICES} - [0:0]\n"]
    lines += [f":{chain} - [0:0]\n" for chain in (*around["nat"], *own)]
    lines += [_COMMENT.sub("", rule) + "\n" for rules in around["nat"].values() for rule in rules]
    lines += dispatch
    lines += [_COMMENT.sub("", rule) + "\n" for rules in own.values() for rule in rules]
    return [*lines, "COMMIT\n"]
