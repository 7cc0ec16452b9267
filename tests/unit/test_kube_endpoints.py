"""Where API servers listen, before and after somebody could say so."""

from __future__ import annotations

import msgspec
import pytest

from ebpflb.errors import SourceError
from ebpflb.model import Endpoint, EndpointSlice, ServiceName, SlicePort
from ebpflb.source import DropSlice, Event, PutSlice
from ebpflb.source.kube.endpoints import ApiServers
from ebpflb.source.kube.lastgood import Saved
from tests.world import TCP, endpoint_slice, unready

HTTPS = SlicePort("https", TCP, 6443)


def servers_slice(*addresses: object, name: str = "kubernetes") -> EndpointSlice:
    made = endpoint_slice(*addresses, of="default/kubernetes", name=name, ports=[HTTPS])  # type: ignore[arg-type]
    return msgspec.structs.replace(made, name=ServiceName("default", name))


def saved(*events: Event) -> Saved:
    return Saved(1000.0, events)


def test_the_first_start_knows_of_none() -> None:
    assert ApiServers(lambda: None)() == ()


def test_a_later_start_remembers_those_of_the_last_run() -> None:
    made = servers_slice(unready("192.168.0.3"), "192.168.0.2")
    servers = ApiServers(lambda: saved(PutSlice(endpoint_slice("10.0.1.1")), PutSlice(made)))
    assert servers() == ("192.168.0.2:6443", "192.168.0.3:6443"), "ready ones first"


def test_the_file_is_read_once_and_only_if_somebody_asks() -> None:
    asked = 0

    def recall() -> Saved | None:
        nonlocal asked
        asked += 1
        return None

    servers = ApiServers(recall)
    assert asked == 0
    servers()
    servers()
    assert asked == 1


def test_a_damaged_file_is_as_good_as_none() -> None:
    def damaged() -> Saved | None:
        raise SourceError("the snapshot is damaged")

    assert ApiServers(damaged)() == ()


def test_the_current_ones_replace_those_remembered() -> None:
    servers = ApiServers(lambda: saved(PutSlice(servers_slice("192.168.0.2"))))
    assert servers() == ("192.168.0.2:6443",)
    servers.event(PutSlice(servers_slice("192.168.0.7", Endpoint("fd00::7"), name="kubernetes")))
    servers.event(PutSlice(endpoint_slice("10.0.1.1")))
    assert servers() == ("192.168.0.7:6443", "[fd00::7]:6443")


def test_several_slices_count_together() -> None:
    servers = ApiServers(lambda: None)
    servers.event(PutSlice(servers_slice("192.168.0.2")))
    servers.event(PutSlice(servers_slice(Endpoint("fd00::2"), name="kubernetes-v6")))
    assert set(servers()) == {"192.168.0.2:6443", "[fd00::2]:6443"}
    servers.event(DropSlice(ServiceName("default", "kubernetes")))
    assert servers() == ("[fd00::2]:6443",)


@pytest.mark.parametrize("last", [DropSlice(ServiceName("default", "kubernetes")), PutSlice(servers_slice())])
def test_no_server_at_all_is_no_place_to_go_to(last: Event) -> None:
    """Somebody's mistake must not cost us the way back."""
    servers = ApiServers(lambda: None)
    servers.event(PutSlice(servers_slice("192.168.0.2")))
    servers.event(last)
    assert servers() == ("192.168.0.2:6443",)
