"""What `dump` shows of IPVS."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpflb.dataplane.ipvs.inspect import Connection, Inspector, connection_of, entry_text
from ebpflb.dataplane.ipvs.table import frontend_key, network, packed
from ebpflb.errors import UserError
from ebpflb.model import Protocol
from ebpflb.routes import Frontend
from tests.unit.test_ipvs_writer import Standing, web
from tests.world import LOCAL, leaving

HEADER = "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData\n"
LINES = (
    "TCP CB007105 C350 AC1E0029 0050 0A000101 0050 ESTABLISHED     899\n"
    "TCP CB007105 0000 AC1E0029 0050 0A000101 0050 ASSURED         59\n"
    "TCP [fd00:0010:0000:0001:0000:0000:0000:0009] C350 [fd00:0172:0030:0000:0000:0000:0000:0041] 0050"
    " [fd00:0010:0000:0001:0000:0000:0000:0001] 0050 SYN_RECV 3\n"
)


def inspector(standing: Standing, net: Path) -> Inspector:
    (net / "ip_vs_conn").write_text(HEADER + LINES)
    (net / "ip_vs_stats").write_text("   Total Incoming\n   Conns\n       A  14  1E  28  32\n")
    return Inspector(standing.dataplane.held, standing.kernel.headers, standing.dataplane.mark, net)


@pytest.fixture
def standing() -> Standing:
    found = Standing()
    found.sync(web("10.0.1.1", "10.0.2.1", external=("192.168.99.1",), external_policy=LOCAL))
    return found


def test_connections_of_either_family_are_read() -> None:
    first, template, version6 = LINES.splitlines()
    assert connection_of(first) == Connection(
        "TCP", ("203.0.113.5", 50000), ("172.30.0.41", 80), ("10.0.1.1", 80), "ESTABLISHED", 899
    )
    found = connection_of(version6)
    assert found is not None and found.frontend == ("fd00:172:30::41", 80)
    assert connection_of(template) is not None
    assert connection_of("something else") is None


def test_flows_and_affinity_name_the_service(standing: Standing, tmp_path: Path) -> None:
    look = inspector(standing, tmp_path)
    (first, _) = look.tables("flows")
    assert first["service"] == {"namespace": "ns1", "name": "svc1", "port": ""}
    assert (first["client"], first["backend"], first["state"]) == ("203.0.113.5:50000", "10.0.1.1:80", "established")
    (kept,) = look.tables("affinity")
    assert kept == {
        "service": {"namespace": "ns1", "name": "svc1", "port": ""},
        "frontend": "172.30.0.41:80/TCP",
        "client": "203.0.113.5",
        "backend": "10.0.1.1:80",
        "secondsLeft": 59,
    }


def test_services_and_backends(standing: Standing, tmp_path: Path) -> None:
    look = inspector(standing, tmp_path)
    (item,) = look.tables("services")
    assert item["frontends"] == ["172.30.0.41:80/TCP", "192.168.99.1:80/TCP"]
    assert (item["activeBackends"], item["drainingBackends"]) == (2, 0)
    assert [each["address"] for each in look.tables("backends")] == ["10.0.1.1", "10.0.2.1"]


def test_the_rest(standing: Standing, tmp_path: Path) -> None:
    look = inspector(standing, tmp_path)
    assert {"cidr": "10.0.0.0/8", "node": False, "pod": True} in look.tables("sources")
    assert look.tables("counters")[0] == {"counter": "connections", "value": 10}
    raw = look.tables("raw")
    assert {"ipset": "KUBE-CLUSTER-IP", "entry": "172.30.0.41,tcp:80", "value": None} in raw
    assert {"device": "kube-ipvs0", "address": "172.30.0.41"} in raw
    assert {"name": "KUBE-CLUSTER-IP", "entries": 1, "max": 1 << 20} in look.tables("fill")
    assert look.tables("maglev") == []
    with pytest.raises(UserError, match="traffic"):
        look.tables("traffic")


def test_consistent_hashing_is_told_by_virtual_server_without_the_shares_that_the_kernel_keeps_to_itself(
    standing: Standing, tmp_path: Path
) -> None:
    standing.sync(
        web(
            "10.0.1.1",
            "10.0.2.1",
            external=("192.168.99.1",),
            external_policy=LOCAL,
            annotations=(("algorithm", "maglev"),),
        )
    )
    cluster_ip, external, by_mark = inspector(standing, tmp_path).tables("maglev")
    assert cluster_ip == {
        "service": {"namespace": "ns1", "name": "svc1", "port": ""},
        "protocol": "TCP",
        "size": None,
        "backends": [
            {"address": "10.0.1.1", "port": 80, "weight": 1, "share": None},
            {"address": "10.0.2.1", "port": 80, "weight": 1, "share": None},
        ],
        "id": "172.30.0.41:80/TCP",
        "frontend": "172.30.0.41:80/TCP",
    }
    assert [each["frontend"] for each in (external, by_mark)] == ["192.168.99.1:80/TCP"] * 2
    assert (external["id"], str(by_mark["id"])[:4]) == ("192.168.99.1:80/TCP", "FWM ")
    assert by_mark["backends"] == [{"address": "10.0.1.1", "port": 80, "weight": 1, "share": None}]


def test_consistent_hashing_has_what_takes_new_flows(tmp_path: Path) -> None:
    """Also where the operator's scheduler is mh, and no Service asks for anything."""
    hashing = Standing(scheduler="mh")
    hashing.sync(web("10.0.1.1", leaving("10.0.2.1")))
    (item,) = inspector(hashing, tmp_path).tables("maglev")
    assert item["backends"] == [{"address": "10.0.1.1", "port": 80, "weight": 1, "share": None}]


def test_entries_are_written_as_ipset_writes_them() -> None:
    key = frontend_key(Frontend("fd00::1", 80, Protocol.UDP))
    assert entry_text("hash:ip,port", 6, key) == "fd00::1,udp:80"
    assert entry_text("hash:ip,port,net", 6, key + network("fd00::/16")) == "fd00::1,udp:80,fd00::/16"
    assert entry_text("hash:ip,port,ip", 6, key + packed("fd00::2")) == "fd00::1,udp:80,fd00::2"
    assert entry_text("bitmap:port", 4, b"\x75\x30") == "30000"
    assert entry_text("hash:ip", 4, packed("10.0.0.1")) == "10.0.0.1"
