"""Messages of IPVS and ipset as bytes: against pyroute2's opinion of them, and back."""

from __future__ import annotations

import struct

import pytest
from pyroute2.netlink.generic.ipvs import ipvsmsg
from pyroute2.netlink.nfnetlink.ipset import ipset_msg

from ebpflb.dataplane.ipvs import messages
from ebpflb.dataplane.ipvs.names import Set
from ebpflb.dataplane.ipvs.reading import Destination
from ebpflb.dataplane.ipvs.table import (
    PERSISTENT,
    EntryValue,
    Server,
    Settings,
    frontend_key,
    network,
    packed,
    place,
)
from ebpflb.model import Protocol
from ebpflb.routes import Frontend

SERVERS = [
    Server(4, 0, 6, packed("172.30.0.41"), 80),
    Server(6, 0, 132, packed("fd00:172:30::41"), 443),
    Server(4, 0xCB600001),
    Server(6, 0xCB600002),
]


def framed(body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), 0x20, 0, 0, 0) + body


@pytest.mark.parametrize("server", SERVERS, ids=str)
def test_a_virtual_server_comes_back(server: Server) -> None:
    settings = Settings("wlc", PERSISTENT | messages.HASHED, 10800)
    body = messages.service(messages.NEW_SERVICE, server, settings)
    assert messages.read_service(body) == (server, settings._replace(flags=PERSISTENT))


@pytest.mark.parametrize("server", SERVERS, ids=str)
def test_a_destination_comes_back(server: Server) -> None:
    where = place("10.0.1.1" if server.version == 4 else "fd00:10:0:1::1", 8080)
    body = messages.destination(messages.NEW_DEST, server, where, 7)
    assert messages.read_destination(body, server.version) == (where, Destination(7))
    body = messages.destination(messages.SET_DEST, server, where, 7, leaving=True)
    assert messages.read_destination(body, server.version) == (where, Destination(0, leaving=True))
    drains = messages.destination(messages.SET_DEST, server, where, 0)
    assert messages.read_destination(drains, server.version) == (where, Destination(0))


def test_pyroute2_reads_the_same() -> None:
    settings = Settings("rr", PERSISTENT, 60)
    read = ipvsmsg(framed(messages.service(messages.NEW_SERVICE, SERVERS[0], settings)))
    read.decode()
    found = read.get("IPVS_CMD_ATTR_SERVICE")
    assert read["cmd"] == messages.NEW_SERVICE
    said = {name: found.get(f"IPVS_SVC_ATTR_{name}") for name in ("AF", "PROTOCOL", "PORT", "SCHED_NAME", "TIMEOUT")}
    assert said == {"AF": 2, "PROTOCOL": 6, "PORT": 80, "SCHED_NAME": "rr", "TIMEOUT": 60}
    read = ipvsmsg(framed(messages.destination(messages.NEW_DEST, SERVERS[0], place("10.0.1.1", 8080), 3)))
    read.decode()
    found = read.get("IPVS_CMD_ATTR_DEST")
    assert (found.get("IPVS_DEST_ATTR_PORT"), found.get("IPVS_DEST_ATTR_WEIGHT")) == (8080, 3)
    assert found.get("IPVS_DEST_ATTR_FWD_METHOD") == 0, "masquerading"


TCP80 = frontend_key(Frontend("172.30.0.41", 80, Protocol.TCP))
TCP80_6 = frontend_key(Frontend("fd00:172:30::41", 80, Protocol.TCP))


@pytest.mark.parametrize(
    ("each", "version", "key", "value"),
    [
        (Set.CLUSTER_IP, 4, TCP80, None),
        (Set.FRONTENDS, 6, TCP80_6, "default/web:http ClusterIP"),
        (Set.MARKS, 4, TCP80, 0xCB600001),
        (Set.LOOP_BACK, 6, TCP80_6 + packed("fd00:10::1"), None),
        (Set.SOURCE_CIDR, 4, TCP80 + network("203.0.113.0/24"), None),
        (Set.NODE_PORT_TCP, 4, (30080).to_bytes(2, "big"), None),
        (Set.IPVS_IPS, 6, packed("fd00::1"), None),
    ],
)
def test_an_entry_comes_back(each: Set, version: int, key: bytes, value: EntryValue) -> None:
    body = messages.entries_message(each.named(version), messages.entry(each.type, version, key, value) * 3)
    assert list(messages.read_entries(body, each)) == [(key, value)] * 3


def test_pyroute2_reads_the_same_entry() -> None:
    entry = messages.entry(Set.FRONTENDS.type, 4, TCP80, "default/web:http ClusterIP")
    read = ipset_msg(framed(messages.entries_message("EBPFLB-FRONTENDS", entry)))
    read.decode()
    assert read.get("IPSET_ATTR_SETNAME") == "EBPFLB-FRONTENDS"
    (data,) = read.get("IPSET_ATTR_ADT").get_attrs("IPSET_ATTR_DATA")
    assert data.get("IPSET_ATTR_IP_FROM").get("IPSET_ATTR_IPADDR_IPV4") == "172.30.0.41"
    assert (data.get("IPSET_ATTR_PORT_FROM"), data.get("IPSET_ATTR_PROTO")) == (80, 6)
    assert data.get("IPSET_ATTR_COMMENT") == "default/web:http ClusterIP"
