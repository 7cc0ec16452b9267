"""The last good snapshot on disk: what is saved comes back, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

import immutables
import msgspec
import pytest

from ebpflb.errors import SourceError
from ebpflb.model import Endpoint, EndpointSlice, Family, Node, Protocol, ServiceName, SlicePort, Snapshot
from ebpflb.source import DropService, LocalAddresses, PutNode, PutService, PutSlice, Synced
from ebpflb.source.kube import lastgood
from ebpflb.source.kube.keeper import Keeper
from ebpflb.source.store import Store
from tests.world import service

AT = 1767323045.5


def slice_of(owner: str, *addresses: str, name: str = "", port: SlicePort | None = None) -> EndpointSlice:
    found = ServiceName(*owner.split("/"))
    endpoints = tuple(Endpoint(each, node="node1", zone_hints=frozenset({"zone-a"})) for each in addresses)
    ports = (port or SlicePort("", Protocol.TCP, 8080),)
    return EndpointSlice(ServiceName(found.namespace, name or f"{found.name}-1"), found, Family.IPV4, ports, endpoints)


NODE = Node("node1", ("127.0.0.1", "192.168.0.2"), ("192.168.0.2",), "zone-a", ("10.0.1.0/24",), known=True)


def snapshot_of(count: int = 3) -> Snapshot:
    store = Store("node1", [])
    for number in range(count):
        store.apply(PutService(service(f"ns/web-{number}", f"172.30.{number // 250}.{number % 250 + 1}")))
        store.apply(PutSlice(slice_of(f"ns/web-{number}", "10.0.1.1", "10.0.1.2")))
    store.apply(PutNode(msgspec.structs.replace(NODE, addresses=())))
    store.apply(LocalAddresses(NODE.addresses, NODE.primary))
    return store.snapshot()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return lastgood.path_in(str(tmp_path / "state"), "kubernetes")


def loaded(path: str, node: str = "node1") -> Snapshot:
    """The Snapshot that the saved events come to."""
    saved = lastgood.load(path, node)
    assert saved is not None
    store = Store(node, [])
    for event in saved.events:
        assert store.apply(event)
    store.apply(LocalAddresses(NODE.addresses, NODE.primary))
    return store.snapshot()


# ---- Saved and loaded ----


@pytest.mark.parametrize("count", [0, 1, 3, 700])
def test_what_was_saved_comes_back(path: str, count: int) -> None:
    snapshot = snapshot_of(count)
    lastgood.save(path, snapshot, saved=AT)
    assert loaded(path) == snapshot
    saved = lastgood.load(path, "node1")
    assert saved is not None
    assert saved.saved == AT


def test_an_unknown_node_is_not_remembered_as_one(path: str) -> None:
    lastgood.save(path, Snapshot(immutables.Map(), immutables.Map(), Node("node1", ("127.0.0.1",))), saved=AT)
    assert lastgood.load(path, "node1") == (AT, ())


def test_what_is_loaded_shares_what_is_equal(path: str) -> None:
    """Nine of ten endpoints name one of a few nodes and zones."""
    lastgood.save(path, snapshot_of(), saved=AT)
    saved = lastgood.load(path, "node1")
    assert saved is not None
    slices = [event.slice for event in saved.events if isinstance(event, PutSlice)]
    endpoints = [endpoint for each in slices for endpoint in each.endpoints]
    assert len({id(each.node) for each in endpoints}) == 1
    assert len({id(each.zone_hints) for each in endpoints}) == 1
    assert len({id(each.ports) for each in slices}) == 1


def test_where_nothing_was_saved_nothing_comes_back(path: str) -> None:
    assert lastgood.load(path, "node1") is None


def test_only_we_may_read_it(path: str) -> None:
    lastgood.save(path, snapshot_of(), saved=AT)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    assert os.listdir(os.path.dirname(path)) == ["kubernetes.snapshot"]


def test_a_new_one_replaces_the_old_one_and_what_a_crash_left(path: str) -> None:
    lastgood.save(path, snapshot_of(3), saved=AT)
    Path(f"{path}.new").write_bytes(b"half a snapshot")
    lastgood.save(path, snapshot_of(5), saved=AT + 1)
    assert len(loaded(path).services) == 5
    assert os.listdir(os.path.dirname(path)) == ["kubernetes.snapshot"]


# ---- Refused ----


def test_every_cut_is_noticed(path: str) -> None:
    lastgood.save(path, snapshot_of(2), saved=AT)
    whole = Path(path).read_bytes()
    for length in range(0, len(whole), 3):
        Path(path).write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"is not used: .*(damaged|another version)"):
            lastgood.load(path, "node1")


def test_every_flipped_bit_is_noticed(path: str) -> None:
    lastgood.save(path, snapshot_of(2), saved=AT)
    whole = Path(path).read_bytes()
    for at in range(0, len(whole), 3):
        Path(path).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SourceError, match="is not used"):
            lastgood.load(path, "node1")


def resealed(data: bytes) -> bytes:
    """With a checksum that fits."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def test_another_nodes_is_refused(path: str) -> None:
    lastgood.save(path, snapshot_of(), saved=AT)
    with pytest.raises(SourceError, match=r"it is of node node1, and this is node2$"):
        lastgood.load(path, "node2")


def test_one_of_another_layout_is_refused(path: str) -> None:
    lastgood.save(path, snapshot_of(), saved=AT)
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"layout") + len("layout") + 2  # msgpack says first that bytes follow, and how many
    data[at] ^= 1
    Path(path).write_bytes(resealed(bytes(data)))
    with pytest.raises(SourceError, match="another version of ebpflb wrote it"):
        lastgood.load(path, "node1")


def test_one_of_another_format_is_refused(path: str) -> None:
    lastgood.save(path, snapshot_of(), saved=AT)
    data = Path(path).read_bytes()
    Path(path).write_bytes(resealed(data.replace(b"snapshot 1\n", b"snapshot 2\n", 1)))
    with pytest.raises(SourceError, match="another version of ebpflb wrote it"):
        lastgood.load(path, "node1")


def test_one_with_a_checksum_and_nonsense_inside_is_refused(path: str) -> None:
    lastgood.save(path, snapshot_of(), saved=AT)
    whole = Path(path).read_bytes()
    start = whole.index(b"x\x01")  # of zlib's stream
    for plain in (b"", b"\0\0\0\2s\xc1", b"\0\0\0\1?\x80", b"\0\0\0\1s\x80", b"\0\0\0\1e\xff", b"\0\0\0\2n\x81\xa1"):
        for count in (1, len(plain)):
            body = zlib.compress(plain * count, 1)
            Path(path).write_bytes(resealed(whole[:start] + body + bytes(32)))
            with pytest.raises(SourceError, match=r"^the snapshot .* is not used: it is damaged: [^\n]+$"):
                lastgood.load(path, "node1")
    for at in range(18, start):
        Path(path).write_bytes(resealed(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]))
        with contextlib.suppress(SourceError):  # the time may be another
            lastgood.load(path, "node1")


def test_what_cannot_be_opened_is_one_sentence(path: str) -> None:
    os.makedirs(path)
    with pytest.raises(SourceError, match=r"^the snapshot .* cannot be read: Is a directory$"):
        lastgood.load(path, "node1")
    with pytest.raises(SourceError, match=r"^the snapshot .* cannot be written: Is a directory$"):
        lastgood.save(path, snapshot_of(), saved=AT)


# ---- Where the API server is ----


def test_the_servers_own_addresses_are_remembered() -> None:
    https = SlicePort("https", Protocol.TCP, 6443)
    api = slice_of("default/kubernetes", "192.168.0.9", "192.168.0.8", port=https)
    down = msgspec.structs.replace(api.endpoints[0], address="192.168.0.1", ready=False)
    api = msgspec.structs.replace(api, endpoints=(down, *api.endpoints))
    events = [PutSlice(slice_of("ns/kubernetes", "10.0.0.1", port=https)), PutSlice(api), PutSlice(slice_of("ns/web"))]
    assert lastgood.kubernetes_endpoints(events) == (
        ("192.168.0.8", 6443), ("192.168.0.9", 6443), ("192.168.0.1", 6443),
    )  # fmt: skip
    assert lastgood.kubernetes_endpoints([]) == ()


# ---- Kept up to date ----


class Kept:
    """A Keeper of a source that is live or not, at a time that the test sets."""

    def __init__(self, path: str) -> None:
        self.now = 1000.0
        self.is_live = True
        self.count = 1
        self.keeper = Keeper(
            path,
            snapshot=lambda: snapshot_of(self.count),
            live=lambda: self.is_live,
            clock=lambda: self.now,
            now=lambda: self.now,
            every=30.0,
            settle=5.0,
        )
        self.path = path

    def say(self) -> None:
        self.keeper.event(DropService(ServiceName("ns", "web")))

    def work(self, seconds: float) -> float | None:
        """That much later: do what is due; when the last snapshot was saved."""
        self.now += seconds
        self.keeper.work()
        self.keeper.wait()
        saved = lastgood.load(self.path, "node1")
        return saved.saved if saved else None


@pytest.fixture
def kept(path: str) -> Kept:
    return Kept(path)


def test_news_are_saved_once_more_have_had_time_to_come(kept: Kept) -> None:
    assert kept.keeper.due() is None
    assert kept.work(100) is None
    kept.say()
    kept.now += 2
    kept.say()
    assert kept.keeper.due() == 1105
    assert kept.work(2.9) is None
    assert kept.work(0.1) == 1105
    assert kept.keeper.due() is None


def test_a_storm_is_saved_every_thirty_seconds(kept: Kept) -> None:
    saved = set()
    for _ in range(90):
        kept.say()
        saved.add(kept.work(1))
    assert saved == {None, 1005, 1035, 1065}


def test_what_is_remembered_is_not_saved_again(kept: Kept) -> None:
    kept.is_live = False
    kept.say()
    assert kept.work(40) is None
    kept.keeper.close()
    assert not os.path.exists(kept.path)
    kept.is_live = True
    assert kept.work(30) == 1070


def test_the_last_news_are_saved_on_closing(kept: Kept) -> None:
    kept.say()
    kept.work(5)
    kept.count = 2
    kept.say()
    kept.now += 1
    kept.keeper.close()
    assert len(loaded(kept.path).services) == 2


def test_closing_without_news_writes_nothing(kept: Kept) -> None:
    kept.say()
    kept.work(5)
    os.unlink(kept.path)
    kept.keeper.close()
    assert not os.path.exists(kept.path)


def test_a_disk_that_is_full_is_a_problem_until_it_has_room(kept: Kept, path: str) -> None:
    os.makedirs(f"{path}.new")
    kept.say()
    for seconds in (5, 35):
        assert kept.work(seconds) is None
        (problem,) = kept.keeper.wrong()
        assert problem.reason.startswith(f"the snapshot {path} cannot be written: Is a directory; ")
    os.rmdir(f"{path}.new")
    assert kept.work(35) == kept.now
    assert kept.keeper.wrong() == ()


def test_what_cannot_be_saved_on_closing_is_in_the_log(kept: Kept, path: str, caplog: pytest.LogCaptureFixture) -> None:
    os.makedirs(f"{path}.new")
    kept.say()
    kept.keeper.close()
    assert caplog.text.count("cannot be written: Is a directory") == 1


def test_a_keeper_takes_what_a_reconciler_tells(kept: Kept) -> None:
    kept.keeper.queued(1.0)
    kept.keeper.attempted(None)
    kept.keeper.problems((), ())
    assert kept.keeper.due() is None
    kept.keeper.event(Synced("kubernetes"))
    assert kept.keeper.due() is not None
