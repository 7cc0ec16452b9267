"""The store and the policy behind each other: what the daemon's loop is given as "desired"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from ebpflb.commands.daemon import run_daemon
from ebpflb.commands.look import compare
from ebpflb.config import DATAPLANES, Config
from ebpflb.config.durations import Duration
from ebpflb.config.options import Options, configure
from ebpflb.dataplane.bpf import dataplane as bpf
from ebpflb.dataplane.bpf import pins
from ebpflb.dataplane.iptables import dataplane as iptables
from ebpflb.dataplane.iptables import facts as iptables_facts
from ebpflb.dataplane.ipvs import dataplane as ipvs
from ebpflb.dataplane.ipvs import facts as ipvs_facts
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.errors import ApplyError, Unsupported, UserError
from ebpflb.model import ProxyOptions, ServiceName, Snapshot
from ebpflb.output import Format
from ebpflb.policy import Router
from ebpflb.policy import routes as routes_from_scratch
from ebpflb.routes import RouteTable
from ebpflb.source import DropService, LocalAddresses, PutService, PutSlice, Synced
from ebpflb.source.manifests import ManifestSource
from ebpflb.wiring import Intent, real_parts
from tests.fakes import World
from tests.world import NODE_IP, endpoint_slice, options, service, snapshot

ADDRESSES = LocalAddresses(("127.0.0.1", NODE_IP), (NODE_IP,))


def intent(make_router: Callable[[], Router] = Router) -> Intent:
    made = Intent("node1", options(), ("manifests", "addresses"), make_router)
    for event in (ADDRESSES, Synced("addresses"), PutService(service()), PutSlice(endpoint_slice("10.0.1.1"))):
        made.apply(event)
    return made


def from_scratch(*objects: object) -> RouteTable:
    node = snapshot().node
    bare = type(node)("node1", ADDRESSES.addresses, ADDRESSES.primary)
    return routes_from_scratch(snapshot(*objects, node=bare), options())  # type: ignore[arg-type]


def test_nothing_is_wanted_before_all_sources_have_synced() -> None:
    made = intent()
    assert not made.synced
    assert len(made.routes()) == 0
    made.apply(Synced("manifests"))
    assert made.synced
    assert made.routes() == from_scratch(service(), endpoint_slice("10.0.1.1"))


def test_the_next_table_evolves_from_the_last() -> None:
    made = intent()
    made.apply(Synced("manifests"))
    first = made.routes()
    assert made.routes() is first
    assert made.apply(PutService(service("ns1/svc2", "172.30.0.42")))
    second = made.routes()
    assert {str(frontend) for frontend, _ in second.changed_from(first)} == {"172.30.0.42:80/TCP"}


def test_an_event_that_says_nothing_new_is_known_as_such() -> None:
    made = intent()
    assert made.apply(Synced("manifests"))
    assert not made.apply(PutService(service()))
    assert not made.apply(DropService(service("ns1/other").name))


class FaultyRouter(Router):
    """Breaks when it is asked for the second time; whoever takes a new one is served."""

    asked = 0

    def update(self, snapshot: Snapshot, touched: frozenset[ServiceName] | None, options: ProxyOptions) -> RouteTable:
        self.asked += 1
        if self.asked >= 2:
            raise ZeroDivisionError
        return super().update(snapshot, touched, options)


@pytest.mark.parametrize("more", [False, True], ids=["alone", "with another change"])
def test_after_a_fault_the_policy_starts_from_scratch(more: bool) -> None:
    """What the store had handed out when the policy failed must not be lost."""
    made = intent(FaultyRouter)
    made.apply(Synced("manifests"))
    made.routes()
    made.apply(PutService(service("ns1/svc2", "172.30.0.42")))
    with pytest.raises(ZeroDivisionError):
        made.routes()
    second = service("ns1/svc2", "172.30.0.42")
    if more:
        third = service("ns1/svc3", "172.30.0.43")
        made.apply(PutService(third))
        assert made.routes() == from_scratch(service(), endpoint_slice("10.0.1.1"), second, third)
    else:
        assert made.routes() == from_scratch(service(), endpoint_slice("10.0.1.1"), second)


MANIFEST = """\
apiVersion: v1
kind: Service
metadata: {namespace: ns1, name: svc1}
spec:
  clusterIP: 172.30.0.41
  ports: [{port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: ns1, name: svc1-a, labels: {kubernetes.io/service-name: svc1}}
addressType: IPv4
ports: [{name: "", port: 80}]
endpoints: [{addresses: [10.0.1.1]}]
"""


def test_manifests_become_routes(tmp_path: Path) -> None:
    """All that is pure, from a file to what a dataplane is given."""
    (tmp_path / "svc1.yaml").write_text(MANIFEST)
    world = World()
    parts = world.but(
        sources=lambda config: (ManifestSource(config.manifests),),
        desired=lambda config, sources: Intent(config.node_name, options(), [source.name for source in sources]),
    )
    config = configure(Options(manifests=str(tmp_path), node_name="node1"), hostname="x")
    assert run_daemon(config, parts, once=True).status == 0
    bare = type(snapshot().node)("node1")
    want = routes_from_scratch(snapshot(service(), endpoint_slice("10.0.1.1"), node=bare), options())
    assert world.dataplane.held == want
    assert len(want) == 2
    assert compare(config, parts, kind="Change", service=None, form=Format.TABLE).status == 0


# ---- The ladder of this machine ----


def configured(**typed: Any) -> Config:
    return configure(Options(**typed), hostname="node1", need_source=False)


def test_the_ladder_is_bpf_ipvs_iptables_whatever_is_asked_for() -> None:
    for name in ("auto", "bpf", "ipvs", "iptables"):
        ladder = real_parts().dataplanes(configured(dataplane=name))
        assert tuple(dataplane.name for dataplane in ladder) == DATAPLANES


def test_each_dataplane_is_made_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, object] = {}
    monkeypatch.setattr(ipvs, "IpvsDataplane", lambda options, **more: made.update(ipvs=(options, more)))
    monkeypatch.setattr(iptables, "IptablesDataplane", lambda **more: made.update(iptables=more))
    config = configured(
        iptables_variant="legacy", masquerade_bit=17, ipvs_scheduler="mh", ipvs_strict_arp=True,
        ipvs_exclude_cidrs=("10.9.0.0/16",), ipvs_udp_timeout=Duration.of(5), conntrack_tcp_be_liberal=True,
        maglev_table_size=8191,
    )  # fmt: skip
    monkeypatch.setattr(bpf, "BpfDataplane", lambda *where, **more: made.update(bpf=(where, more)))
    real_parts().dataplanes(config)
    where, more = cast(tuple[object, dict[str, object]], made.pop("bpf"))
    assert (where, more["maglev_table_size"]) == ((Path("/sys/fs/bpf/ebpflb"), None, ()), 8191)
    options_of_ipvs = IpvsOptions(scheduler="mh", exclude_cidrs=("10.9.0.0/16",), strict_arp=True, udp_timeout=5)
    assert made == {
        "ipvs": (options_of_ipvs, {"mark_bit": 17, "variant": "legacy"}),
        "iptables": {"mark_bit": 17, "variant": "legacy", "liberal_conntrack": True},
    }
    real_parts().dataplanes(configured())
    assert made["iptables"] == {"mark_bit": 14, "variant": None, "liberal_conntrack": False}


def test_a_bpf_file_system_that_cannot_be_had_is_the_users_fault_only_if_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(bpffs: Path) -> None:
        raise UserError("the BPF file system cannot be mounted")

    monkeypatch.setattr(pins, "require_file_system", refuse)
    parts = real_parts()
    bpf, _, iptables_dataplane = parts.dataplanes(configured())
    with pytest.raises(Unsupported, match="cannot be mounted"):
        parts.prepare(configured(), bpf)
    with pytest.raises(UserError, match="cannot be mounted"):
        parts.prepare(configured(bpffs="/sys/fs/bpf/mine"), bpf)
    parts.prepare(configured(), iptables_dataplane)


@pytest.mark.parametrize(
    ("typed", "routed"),
    [
        ({}, True),
        ({"localhost_nodeports": False}, False),
        ({"nodeport_addresses": ("10.0.0.0/8",)}, False),
        ({"nodeport_addresses": ("10.0.0.0/8,127.0.0.0/8",)}, True),
        ({"nodeport_addresses": ("fd00::/8",)}, True),
        ({"nodeport_addresses": ("primary",)}, False),
    ],
)
def test_loopback_is_routed_beforehand_if_it_may_carry_node_ports(
    monkeypatch: pytest.MonkeyPatch, typed: dict[str, Any], routed: bool
) -> None:
    set_to: list[bool] = []
    monkeypatch.setattr(iptables_facts, "localnet_routed", lambda: False)
    monkeypatch.setattr(iptables_facts, "route_localnet", set_to.append)
    parts, config = real_parts(), configured(**typed)
    _, _, dataplane = parts.dataplanes(config)
    assert parts.settings_of(config, dataplane) == ()
    assert set_to == [True] * routed


def test_a_setting_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: IpvsOptions) -> None:
        raise ApplyError("sysctl", "", 30, "/proc/sys/net/ipv4/vs/conntrack cannot be set to 1: Read-only file system")

    monkeypatch.setattr(ipvs_facts, "set_sysctls", refuse)
    parts = real_parts()
    bpf, dataplane, _ = parts.dataplanes(configured())
    (problem,) = parts.settings_of(configured(), dataplane)
    assert problem.subject == "ipvs" and "Read-only file system" in problem.reason
    assert parts.settings_of(configured(), bpf) == ()
