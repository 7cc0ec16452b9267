"""healthCheckNodePort: what load balancers are told of each Service on this node.

Rules of this file: one answer for each Service and family, whatever path and method they ask with. A new count changes
the answer, never a port. Whether this node can be trusted is `healthy`'s to say; what the routes ask for is followed at
once, whether or not the kernel took all of them: a node that should get no traffic must not wait to say so.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

import immutables

from ebpflb.httpd import Request, Response
from ebpflb.model import Family, Problem, ServiceName
from ebpflb.observer import Attempt
from ebpflb.ports import Opener, Port, Ports
from ebpflb.problems import Found
from ebpflb.routes import HealthCheck, HealthKey
from ebpflb.source import Event

FAILED = "FailedToStartServiceHealthcheck"
"""The `reason` of kube-proxy's Event, and the code of our Problem."""

# Names of Services and namespaces need no quoting: the API server allows only letters, digits and "-".
_BODY = (
    '{\n\t"service": {\n\t\t"namespace": "%s",\n\t\t"name": "%s"\n\t},\n'
    '\t"localEndpoints": %d,\n\t"serviceProxyHealthy": %s\n}'
)


class _Answer:
    """What one check answers; `check` is replaced by the loop's thread and read by the server's."""

    __slots__ = ("_healthy", "check")

    def __init__(self, check: HealthCheck, healthy: Callable[[], bool]) -> None:
        self.check = check
        self._healthy = healthy

    def __call__(self, request: Request) -> Response:
        service, count = self.check.service, self.check.local_endpoints
        healthy = self._healthy()
        headers = (
            ("Content-Type", "application/json"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Load-Balancing-Endpoint-Weight", str(count)),
        )
        body = _BODY % (service.namespace, service.name, count, "true" if healthy else "false")
        return Response(200 if count and healthy else 503, body.encode(), headers)


class HealthChecks:
    """All checks of this node: an Observer, and a Worker of the loop.

    `healthy` is asked in the server's thread.
    """

    def __init__(
        self,
        server: Opener,
        healthy: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._healthy = healthy
        self._ports: Ports[HealthKey] = Ports(server, clock)
        self._health: Mapping[HealthKey, HealthCheck] = immutables.Map()
        self._answers: dict[HealthKey, _Answer] = {}
        self._failures: dict[HealthKey, str] = {}

    # ---- What the reconciler says ----

    def attempted(self, attempt: Attempt) -> None:
        self.update(attempt.routes.health)

    def event(self, event: Event) -> None:
        """Only what comes of it in the routes matters."""

    def queued(self, at: float) -> None:
        """That is `healthy`'s matter."""

    def problems(self, come: tuple[Found, ...], gone: tuple[Found, ...]) -> None:
        """No problem but ours is of a health check."""

    def update(self, health: Mapping[HealthKey, HealthCheck]) -> None:
        """From now on, answer these and no others. Costs nothing when it is the same object as before."""
        before, self._health = self._health, health
        if health is before:
            return
        opening: list[tuple[HealthKey, Port]] = []
        for key in {**before, **health}:
            old, new = before.get(key), health.get(key)
            if old != new:
                held, wanted = _ports(old), _ports(new)
                for port in held - wanted:
                    self._ports.unwant(key, port)
                self._set_answer(key, new)
                opening += [(key, port) for port in wanted - held]
        self._ports.settle()
        for key, port in sorted(opening):
            self._ports.want(key, port, self._answers[key])
        self._look()

    def _set_answer(self, key: HealthKey, check: HealthCheck | None) -> None:
        if check is None:
            del self._answers[key]
        elif key in self._answers:
            self._answers[key].check = check
        else:
            self._answers[key] = _Answer(check, self._healthy)

    # ---- What the loop calls ----

    def due(self) -> float | None:
        """When `work` should next be called, in the clock's time; None if all is answered."""
        return self._ports.due()

    def work(self) -> None:
        """Try again what could not be opened."""
        if self._ports.work():
            self._look()

    def wrong(self) -> tuple[Problem, ...]:
        """The checks that are not answered, and why."""
        found = [Problem(str(service), reason, FAILED) for (service, _), reason in self._failures.items()]
        return tuple(sorted(found))

    def _look(self) -> None:
        self._failures = self._reasons()

    def _reasons(self) -> dict[HealthKey, str]:
        """Why checks are not answered, all ports of one in one sentence."""
        refused: dict[HealthKey, list[tuple[Port, OSError]]] = {}
        for key, port, error in self._ports.refused():
            if error.errno != errno.EAFNOSUPPORT:  # nobody can ask in a family that this kernel lacks
                refused.setdefault(key, []).append((port, error))
        if not refused:
            return {}
        holders = {(port.port, port.family): key[0] for key, port, _ in self._ports.opened()}
        return {key: _reason(key, found, holders) for key, found in refused.items()}


def _ports(check: HealthCheck | None) -> frozenset[Port]:
    if check is None:
        return frozenset()
    return frozenset(Port(address, check.port, check.family) for address in check.addresses or ("",))


def _reason(
    key: HealthKey, refused: list[tuple[Port, OSError]], holders: Mapping[tuple[int, Family | None], ServiceName]
) -> str:
    port, error = refused[0]
    holder = holders.get((port.port, port.family))
    if error.errno == errno.EADDRINUSE and holder not in (None, key[0]):
        return f"healthCheckNodePort {port.port} is that of {holder} too, which has it; give one of them another"
    where = ", ".join(sorted(port.address for port, _ in refused)) or f"all addresses of IPv{key[1].value}"
    why = ", ".join(sorted({error.strerror or str(error) for _, error in refused}))
    what = f"healthCheckNodePort {port.port} cannot be answered on {where}: {why}"
    return f"{what}; stop what else listens there" if error.errno == errno.EADDRINUSE else what
