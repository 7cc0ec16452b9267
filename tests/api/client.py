"""A tiny client of the API server, for tests to write with and to compare with.

Rules of this file: it shares nothing with the client of the package under test. Objects are plain documents; where one
lives is worked out from its kind. A refusal is an ApiRefusal with the server's own words.
"""

from __future__ import annotations

import http.client
import json
import select
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlencode

from ebpflb.demo import namespaces

Object = dict[str, Any]

MERGE = "application/merge-patch+json"

# Kind: API group and version, plural, whether it lives in a namespace.
_KINDS = {
    "Namespace": ("v1", "namespaces", False),
    "Node": ("v1", "nodes", False),
    "Service": ("v1", "services", True),
    "Pod": ("v1", "pods", True),
    "Event": ("v1", "events", True),
    "Endpoints": ("v1", "endpoints", True),
    "ConfigMap": ("v1", "configmaps", True),
    "ServiceAccount": ("v1", "serviceaccounts", True),
    "EndpointSlice": ("discovery.k8s.io/v1", "endpointslices", True),
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles", False),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings", False),
}


class Answer(NamedTuple):
    """What the server said; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Object:
        found: Object = json.loads(self.body)
        return found


class ApiRefusal(Exception):
    """The server said no."""

    def __init__(self, method: str, path: str, answer: Answer) -> None:
        super().__init__(f"{method} {path}: {answer.status} {answer.body.decode(errors='replace')}")
        self.answer = answer
        self.status = answer.status


def path_of(kind: str, namespace: str = "", name: str = "") -> str:
    """Where objects of a kind are: all, those of a namespace, or one."""
    version, plural, namespaced = _KINDS[kind]
    path = ("/api/" if "/" not in version else "/apis/") + version
    if namespaced and namespace:
        path += f"/namespaces/{namespace}"
    return f"{path}/{plural}" + (f"/{name}" if name else "")


class _Connection(http.client.HTTPSConnection):
    """A connection from a network namespace ("" for that of this process)."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, timeout: float, namespace: str) -> None:
        super().__init__(host, port, context=tls, timeout=timeout)
        self._namespace = namespace

    def connect(self) -> None:
        with inside(self._namespace):
            super().connect()


def inside(namespace: str) -> AbstractContextManager[object]:
    """Sockets that this thread makes in the block belong to a network namespace ("" for that of this process)."""
    return namespaces.inside(namespace) if namespace else nullcontext()


class Api:
    """For any thread; each has a connection of its own, from the network namespace `namespace`."""

    def __init__(self, host: str, port: int, bundle: Path, token: str, namespace: str = "") -> None:
        self._host, self._port, self._namespace = host, port, namespace
        self._tls = ssl.create_default_context(cafile=str(bundle))
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        self._own = threading.local()
        self._lock = threading.Lock()
        self._all: list[_Connection] = []

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for connection in self._all:
                connection.close()

    # ---- One request ----

    def raw(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: object = None,
        content_type: str = "application/json", more: Mapping[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        """One request, with `more` headers, whatever comes of it; raises OSError or HTTPException if nothing does."""
        if query:
            path += "?" + urlencode(query)
        headers = {**self._headers, "Content-Type": content_type, **(more or {})}
        payload = None if body is None else json.dumps(body).encode()
        connection = self._connection()
        if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
            connection.close()  # nothing was asked: the server has ended it
        fresh = connection.sock is None
        try:
            return self._ask(connection, method, path, payload, headers)
        except (OSError, http.client.HTTPException):
            if fresh or (method != "GET" and method != "PUT"):
                raise
        # A server that was restarted has closed the connection that was kept.
        return self._ask(connection, method, path, payload, headers)

    def ask(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: object = None,
        content_type: str = "application/json",
    ) -> Object:  # fmt: skip
        """One request that must succeed, and the object it gives. Raises ApiRefusal."""
        answer = self.raw(method, path, query, body, content_type)
        if answer.status >= 300:
            raise ApiRefusal(method, path, answer)
        return answer.document

    def watch(self, path: str, query: Mapping[str, str], timeout: float = 20) -> Iterator[Object]:
        """The events of a watch, on a connection of its own, until the server ends it. Raises TimeoutError after
        `timeout` seconds of silence, ApiRefusal."""
        connection = self._connect(timeout)
        try:
            path += "?" + urlencode({**query, "watch": "true"})
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            if answer.status >= 300:
                headers = {key.lower(): value for key, value in answer.getheaders()}
                raise ApiRefusal("GET", path, Answer(answer.status, headers, answer.read()))
            while line := answer.readline():
                yield json.loads(line)
        finally:
            connection.close()

    # ---- Objects ----

    def create(self, found: Object) -> Object:
        return self.ask("POST", self._place(found), body=found)

    def replace(self, found: Object) -> Object:
        """The object is now this; one with no resourceVersion replaces whatever there is."""
        return self.ask("PUT", self._path(found), body=found)

    def status(self, found: Object) -> Object:
        """The object's status is now the one given."""
        return self.ask("PUT", self._path(found) + "/status", body=found)

    def patch(self, kind: str, namespace: str, name: str, change: object, part: str = "") -> Object:
        """Merge `change` into an object, or into a `part` of it ("status")."""
        path = path_of(kind, namespace, name) + (f"/{part}" if part else "")
        return self.ask("PATCH", path, body=change, content_type=MERGE)

    def delete(self, kind: str, namespace: str, name: str, grace: int = 0) -> None:
        """An object goes, at once unless `grace` says otherwise."""
        self.ask("DELETE", path_of(kind, namespace, name), {"gracePeriodSeconds": str(grace)})

    def delete_all(self, kind: str, namespace: str) -> None:
        """All objects of a kind in a namespace go."""
        self.ask("DELETE", path_of(kind, namespace), {"gracePeriodSeconds": "0"})

    def get(self, kind: str, namespace: str, name: str) -> Object:
        return self.ask("GET", path_of(kind, namespace, name))

    def list(self, kind: str, namespace: str = "", query: Mapping[str, str] | None = None) -> list[Object]:
        """All objects of a kind, with apiVersion and kind, in one answer."""
        found: list[Object] = self.ask("GET", path_of(kind, namespace), query)["items"]
        return [{"apiVersion": _KINDS[kind][0], "kind": kind, **each} for each in found]

    def _place(self, found: Object) -> str:
        return path_of(found["kind"], found["metadata"].get("namespace", ""))

    def _path(self, found: Object) -> str:
        return path_of(found["kind"], found["metadata"].get("namespace", ""), found["metadata"]["name"])

    # ---- Connections ----

    def _connect(self, timeout: float) -> _Connection:
        return _Connection(self._host, self._port, self._tls, timeout, self._namespace)

    def _connection(self) -> _Connection:
        found: _Connection | None = getattr(self._own, "connection", None)
        if found is None:
            found = self._own.connection = self._connect(30)
            with self._lock:
                self._all.append(found)
        return found

    def _ask(
        self, connection: _Connection, method: str, path: str, body: bytes | None,
        headers: Mapping[str, str],
    ) -> Answer:  # fmt: skip
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())
        except BaseException:  # nor may an interruption leave half an answer to the next request
            connection.close()
            raise
