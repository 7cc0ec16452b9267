"""Storms: everything goes wrong at once while much is changed, and in the end all is as a fresh list says.

Rules of this file: what happens is drawn from a seed, which is the test's parameter; when exactly it happens is not.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from types import TracebackType

import pytest
from msgspec.structs import replace

from tests.api.chaos import ChaosProxy, answer_of
from tests.api.client import Api, ApiRefusal
from tests.api.control_plane import ADMIN, ControlPlane
from tests.api.follower import QUICK, Follower, access
from tests.api.objects import endpoint_slice, service

pytestmark = pytest.mark.api

SECONDS = 5.0
NAMES = 12  # few, so that objects are made and deleted again and again
HASTY = replace(QUICK, answer=0.5, silence=0.7, watch_least=2.0, watch_most=4.0)


class Writer:
    """Changes Services and EndpointSlices of a namespace, one after the other, until the block ends."""

    def __init__(self, api: Api, namespace: str, seed: int) -> None:
        self.changes = 0
        self.failed: list[Exception] = []
        self._api = api
        self._namespace = namespace
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.002):
            try:
                self._random.choice((self._service, self._slice, self._move, self._delete))()
                self.changes += 1
            except ApiRefusal as refusal:
                if refusal.status not in (404, 409):  # it is there already, or gone
                    self.failed.append(refusal)
            except Exception as error:  # the server was killed under it
                self.failed.append(error)

    def _name(self) -> str:
        return f"s{self._random.randrange(NAMES)}"

    def _service(self) -> None:
        self._api.create(service(self._namespace, self._name(), ports=[self._random.randrange(1, 1000)]))

    def _slice(self) -> None:
        of = self._name()
        addresses = [
            f"10.1.{self._random.randrange(250)}.{number}" for number in range(1, self._random.randrange(2, 9))
        ]
        made = endpoint_slice(self._namespace, f"{of}-{self._random.randrange(3)}", of, addresses)
        try:
            self._api.create(made)
        except ApiRefusal as refusal:
            if refusal.status != 409:
                raise
            self._api.replace(made)

    def _move(self) -> None:
        change = {"metadata": {"labels": {"kubernetes.io/service-name": self._name()}}}
        self._api.patch("EndpointSlice", self._namespace, f"{self._name()}-{self._random.randrange(3)}", change)

    def _delete(self) -> None:
        if self._random.random() < 0.5:
            self._api.delete("Service", self._namespace, self._name())
        else:
            self._api.delete("EndpointSlice", self._namespace, f"{self._name()}-{self._random.randrange(3)}")


class Weather:
    """What the proxy does next, and for how long."""

    def __init__(self, proxy: ChaosProxy, seed: int) -> None:
        self._proxy = proxy
        self._random = random.Random(seed)
        self._kinds: tuple[Callable[[], None], ...] = (
            self._cut, self._refuse, self._swallow, self._delay, self._truncate, self._answer, proxy.behave,
        )  # fmt: skip
        self._until = 0.0

    def blow(self) -> None:
        """Change, if it is time to."""
        if time.monotonic() < self._until:
            return
        self._proxy.behave()
        self._random.choice(self._kinds)()
        self._until = time.monotonic() + self._random.uniform(0.02, 0.5)

    def _cut(self) -> None:
        self._proxy.cut()

    def _refuse(self) -> None:
        self._proxy.refusing = True
        self._proxy.cut()

    def _swallow(self) -> None:
        self._proxy.swallowing = True

    def _delay(self) -> None:
        self._proxy.delay = self._random.uniform(0.01, 0.2)

    def _truncate(self) -> None:
        self._proxy.budget = self._random.randrange(1, 4000)

    def _answer(self) -> None:
        self._proxy.answer = answer_of(self._random.choice((401, 403, 429, 500, 503)))
        self._proxy.cut()


def storm(following: Follower, weather: Weather, writer: Writer, seconds: float = SECONDS, changes: int = 100) -> None:
    """For that long, and until the writer has made so many changes in it."""
    over, enough = time.monotonic() + seconds, writer.changes + changes
    while time.monotonic() < over or writer.changes < enough:
        assert time.monotonic() < over + 60, f"{writer.changes} changes, waited for {enough}"
        weather.blow()
        following.read(0.02)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_after_a_storm_on_the_network_all_is_as_a_fresh_list_says(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str, seed: int
) -> None:
    with Follower(access(cluster, ADMIN, proxy.port), timing=HASTY) as following:
        with Writer(api, namespace, seed) as writer:
            storm(following, Weather(proxy, seed), writer)
        assert not writer.failed
        proxy.behave()
        following.agrees(api)
        following.until("no problem", lambda: not following.source.problems())


def test_after_a_storm_in_which_the_server_dies_and_history_is_lost_too(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str
) -> None:
    with Follower(access(cluster, ADMIN, proxy.port), timing=HASTY) as following:
        weather = Weather(proxy, 4)
        with Writer(api, namespace, 4) as writer:
            for _ in range(2):
                storm(following, weather, writer, 1.5, 30)
                cluster.compact()
                cluster.apiserver.kill()
                cluster.start_apiserver()
                storm(following, weather, writer, 1.5, 30)
        proxy.behave()
        following.agrees(api)


def test_of_two_servers_the_one_that_answers_is_used(
    cluster: ControlPlane, api: Api, proxy: ChaosProxy, namespace: str
) -> None:
    """Both addresses lead to the same data; now one is gone, now the other."""
    with Follower(access(cluster, ADMIN, proxy.port, cluster.port)) as following:
        following.sync()
        proxy.refusing = True
        proxy.cut()
        api.create(service(namespace, "by-the-second"))
        following.until("by the second", lambda: following.has(namespace, "by-the-second"))
        proxy.behave()
        cluster.apiserver.kill()
        cluster.start_apiserver()
        api.create(service(namespace, "by-any"))
        following.until("by any", lambda: following.has(namespace, "by-any"))
        following.agrees(api)
