"""The source under test in this process: what it says goes into a Store, and what the Store gives is compared with what
the API server says when it is simply asked.

Rules of this file: the source is read in the test's thread, as the loop would. A fresh list is fetched by the tests'
own client; the product's decoding makes objects of it, since it is the watching that is in question here.
"""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from msgspec.structs import replace

from ebpflb.model import Problem, ServiceName, Snapshot
from ebpflb.source import Event, Remembered, Synced
from ebpflb.source.kube import Client, Reply, decode
from ebpflb.source.kube.access import Access, Address, Resolves
from ebpflb.source.kube.client import HttpClient
from ebpflb.source.kube.lastgood import Saved
from ebpflb.source.kube.lists import Timing
from ebpflb.source.kube.source import NAME, KubeSource
from ebpflb.source.store import Store
from tests.api.client import Api
from tests.api.control_plane import LOOPBACK, ControlPlane, User

T = TypeVar("T")

PATIENCE = 30.0

# Comes back sooner than the daemon does, and waits for the server as patiently: a busy machine can hold it for seconds.
QUICK = Timing(watch_least=30.0, watch_most=60.0, retry_first=0.02, retry_most=0.3, proven=0.1)
# Where connections are left open and say nothing, which only their silence tells.
IMPATIENT = replace(QUICK, answer=2.0, silence=2.0)


class Fixed:
    """A resolver whose answer never changes."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def resolve(self) -> Access:
        return self._access

    def changed(self) -> bool:
        return False


def access(cluster: ControlPlane, user: User, *ports: int, token_file: Path | None = None) -> Fixed:
    """The cluster's API server as this user, at these ports of the loopback (none: its own)."""
    return Fixed(
        Access(
            addresses=tuple(Address(f"https://{LOOPBACK}:{port}") for port in ports or (cluster.port,)),
            ca=cluster.authority.bundle.read_text(),
            token="" if token_file else user.token,
            token_file=str(token_file or ""),
        )
    )


class Recording:
    """A client that keeps what was asked. Without `streaming` it is one of a server that cannot stream lists."""

    def __init__(self, client: Client, streaming: bool = True) -> None:
        self._client = client
        self._streaming = streaming
        self.asked: list[tuple[str, Mapping[str, str]]] = []

    def get(self, path: str, query: Mapping[str, str], *, timeout: float, stream: bool = False) -> Reply:
        self.asked.append((path, dict(query)))
        if not self._streaming and "sendInitialEvents" in query:
            query = {**query, "resourceVersionMatch": "Exact"}  # refused by a real server, as unknown
        return self._client.get(path, query, timeout=timeout, stream=stream)

    def send(self, method: str, path: str, body: bytes, *, content_type: str, timeout: float) -> bytes:
        return self._client.send(method, path, body, content_type=content_type, timeout=timeout)

    def close(self) -> None:
        self._client.close()

    def lists(self, resource: str) -> int:
        """How often all objects were asked for (a list in pages counts once)."""
        return sum(
            path.endswith(f"/{resource}")
            and ("sendInitialEvents" in query or ("watch" not in query and "continue" not in query))
            and query.get("limit") != "1"
            for path, query in self.asked
        )

    def pages(self, resource: str) -> int:
        """How many further pages of lists were asked for."""
        return sum(path.endswith(f"/{resource}") and "continue" in query for path, query in self.asked)

    def watches(self, resource: str) -> int:
        """How often a watch was asked for that goes on from somewhere."""
        return sum(path.endswith(f"/{resource}") and "resourceVersion" in query for path, query in self.asked)


class Follower:
    """See the top of this file. `said` is every event so far."""

    def __init__(
        self,
        resolver: Resolves,
        node: str = "no-such-node",
        *,
        timing: Timing = QUICK,
        streaming: bool = True,
        recall: Callable[[], Saved | None] = lambda: None,
        grace: float = 0.2,
    ) -> None:
        self.node = node
        self.client = Recording(HttpClient(resolver), streaming)
        self.store = Store(node, (NAME,))
        self.said: list[Event] = []
        self.source = KubeSource(
            self.client, node, clock=time.monotonic, now=time.time, random=random.random, recall=recall, patience=0.2,
            grace=grace, timing=timing,
        )  # fmt: skip

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()
        threads = [each for each in threading.enumerate() if each.name.startswith(f"{NAME}-")]
        deadline = time.monotonic() + PATIENCE  # sooner than a watch's silence would end them
        for each in threads:
            each.join(max(0.0, deadline - time.monotonic()))
        left = [each.name for each in threads if each.is_alive()]
        assert not left or error is not None, f"still there after closing: {left}"

    def read(self, seconds: float = 0.02) -> None:
        """Take in what comes within that time; returns as soon as something has."""
        for event in self.source.read():
            self._take(event)
        if select.select([self.source], [], [], seconds)[0]:
            for event in self.source.read():
                self._take(event)

    def _take(self, event: Event) -> None:
        self.said.append(event)
        self.store.apply(event)

    def until(self, what: str, probe: Callable[[], T], seconds: float = PATIENCE) -> T:
        """Read until `probe` gives something true, and give that."""
        deadline = time.monotonic() + seconds
        while not (answer := probe()):
            assert time.monotonic() < deadline, (
                f"not within {seconds} s: {what}; {self.source.condition()}, {self.source.problems()}"
            )
            self.read()
        return answer

    def sync(self) -> None:
        """Until the first lists are complete."""
        self.until("synced", lambda: self.store.synced)

    @property
    def snapshot(self) -> Snapshot:
        """All that was said so far."""
        return self.store.snapshot()

    @property
    def remembers(self) -> bool:
        """Whether it has said that it remembers, and not yet that it knows."""
        return any(isinstance(event, Remembered) for event in self.said) and not any(
            isinstance(event, Synced) for event in self.said
        )

    def has(self, namespace: str, name: str) -> bool:
        """Whether there is this Service."""
        return ServiceName(namespace, name) in self.snapshot.services

    def backends(self, namespace: str, service: str) -> Sequence[str]:
        """The addresses of a Service's endpoints, sorted."""
        slices = self.snapshot.slices.get(ServiceName(namespace, service), ())
        return sorted(endpoint.address for each in slices for endpoint in each.endpoints)

    def problem(self, code: str) -> Problem | None:
        """The problem with this code, if it has one."""
        return next((each for each in self.source.problems() if each.code == code), None)

    def agrees(self, api: Api) -> None:
        """Wait until all is as the API server says now. A difference that stays fails, by name."""
        deadline = time.monotonic() + PATIENCE
        while difference := differences(self.snapshot, fresh(api, self.node)):
            assert time.monotonic() < deadline, "\n".join([*difference, str(self.source.condition())])
            self.read(0.1)


def fresh(api: Api, node: str) -> Snapshot:
    """What a single list of each kind says now."""
    store = Store(node, (NAME,))
    for kind in (decode.SERVICES, decode.SLICES, decode.node(node)):
        query = {"labelSelector": kind.labels, "fieldSelector": "" if kind.fields_optional else kind.fields}
        answer = api.raw("GET", kind.path, {key: value for key, value in query.items() if value})
        assert answer.status == 200, answer
        for said in decode.page(kind, answer.body).said:
            assert said.event is not None, said
            store.apply(said.event)
    return store.snapshot()


def differences(found: Snapshot, wanted: Snapshot) -> list[str]:
    """What is lost, kept or different, one line each; empty if nothing is."""
    lines = []
    for what, have, want in (
        ("Service", dict(found.services), dict(wanted.services)),
        ("slices of", dict(found.slices), dict(wanted.slices)),
        ("Node", {"": found.node}, {"": wanted.node}),
    ):
        lines += [f"lost: {what} {name}" for name in want if name not in have]
        lines += [f"kept: {what} {name}" for name in have if name not in want]
        lines += [
            f"different: {what} {name}: {have[name]} instead of {want[name]}"  # type: ignore[index]
            for name in have
            if name in want and have[name] != want[name]  # type: ignore[index]
        ]
    return lines
