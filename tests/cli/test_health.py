"""A daemon's health as load balancers and kubelets ask for it: its ports, on its addresses, in both families."""

from __future__ import annotations

import http.client
import json
import signal
import socket
from typing import NamedTuple

import pytest

from ebpflb.demo.namespaces import inside
from tests.cli.place import Place, until

pytestmark = [pytest.mark.root, pytest.mark.box]

NODE, CHECK = 10256, 32000

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{namespace: shop, name: web}}
spec:
  type: {type}
  clusterIP: 10.96.0.80
  clusterIPs: [10.96.0.80, "fd00:96::80"]
  ipFamilies: [IPv4, IPv6]
  {more}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
"""
LOCAL = SERVICE.format(type="LoadBalancer", more=f"externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK}")

SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.244.1.7], nodeName: node-1, conditions: {ready: READY}}
- {addresses: [10.244.2.7], nodeName: node-2, conditions: {ready: true}}
"""

LEAVING = """\
apiVersion: v1
kind: Node
metadata: {name: node-1}
spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}
"""


class Answer(NamedTuple):
    status: int
    weight: str | None
    body: dict[str, object]


def ask(place: Place, host: str, port: int, path: str = "/") -> Answer | None:
    """None if nobody listens, or stops listening just then."""
    with inside(place.name):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            weight = response.getheader("X-Load-Balancing-Endpoint-Weight")
            return Answer(response.status, weight, json.loads(response.read()))
        except (ConnectionRefusedError, ConnectionResetError):
            return None
        finally:
            connection.close()


def status_of(answer: Answer | None) -> int:
    return answer.status if answer else 0


def test_health_checks_follow_endpoints_and_types(place: Place) -> None:
    place.write("web.yaml", LOCAL)
    place.write("slice.yaml", SLICE.replace("READY", "true"))
    daemon = place.start()
    served = until("the health check is answered", lambda: ask(place, "192.168.0.2", CHECK, "/any"))
    assert served == Answer(
        200,
        "1",
        {"service": {"namespace": "shop", "name": "web"}, "localEndpoints": 1, "serviceProxyHealthy": True},
    )
    until("the other family says that it has none", lambda: status_of(ask(place, "::1", CHECK)) == 503)
    place.write("slice.yaml", SLICE.replace("READY", "false"))
    until("it has no endpoint", lambda: status_of(ask(place, "192.168.0.2", CHECK)) == 503)
    place.write("slice.yaml", SLICE.replace("READY", "true"))
    until("it has one again", lambda: status_of(ask(place, "192.168.0.2", CHECK)) == 200)
    place.write("web.yaml", SERVICE.format(type="ClusterIP", more="internalTrafficPolicy: Cluster"))
    for host in ("192.168.0.2", "::1"):  # one port closes after the other
        until(f"the health check is gone from {host}", lambda host=host: ask(place, host, CHECK) is None)  # type: ignore[misc]
    assert daemon.end(signal.SIGTERM) == 0
    assert [ask(place, host, NODE, "/healthz") for host in ("127.0.0.1", "::1")] == [None, None]


def test_a_node_that_is_being_taken_away_is_alive_and_wants_no_traffic(place: Place) -> None:
    place.write("web.yaml", LOCAL)
    place.write("slice.yaml", SLICE.replace("READY", "true"))
    place.start()
    for host in ("127.0.0.1", "192.168.0.2", "::1"):
        assert [status_of(ask(place, host, NODE, path)) for path in ("/healthz", "/livez")] == [200, 200]
    place.write("node.yaml", LEAVING)
    until("/healthz says so", lambda: status_of(ask(place, "::1", NODE, "/healthz")) == 503)
    assert status_of(ask(place, "::1", NODE, "/livez")) == 200
    assert status_of(ask(place, "192.168.0.2", CHECK)) == 200


def test_a_health_check_whose_port_another_process_has(place: Place) -> None:
    with inside(place.name):
        other = socket.create_server(("192.168.0.2", CHECK))
    with other:
        place.write("web.yaml", LOCAL)
        place.write("slice.yaml", SLICE.replace("READY", "true"))
        place.start()
        said = until(
            "the problem is known", lambda: [*filter(_is_of_the_port, place.ebpflb("status").out.splitlines())]
        )
        assert "shop/web" in said[0]
        assert status_of(ask(place, "::1", CHECK)) == 503, "the other family is not concerned"
    until("it has the port", lambda: status_of(ask(place, "192.168.0.2", CHECK)) == 200)
    until("the problem is gone", lambda: not any(map(_is_of_the_port, place.ebpflb("status").out.splitlines())))


def _is_of_the_port(line: str) -> bool:
    return f"healthCheckNodePort {CHECK} cannot be answered" in line
