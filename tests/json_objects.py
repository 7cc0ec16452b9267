"""Services and slices as the JSON that arrives: what each test leaves open is as an API server fills it in.

Rules of this file: it knows no model; a keyword argument stands for a field, and the last word counts.
"""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]


def service_object(spec: Json | None = None, *, meta: Json | None = None, **more: Any) -> Json:
    """A ClusterIP Service on port 80."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop", **(meta or {})},
        "spec": {"clusterIP": "172.30.0.41", "ports": [{"port": 80}], **(spec or {})},
        **more,
    }


def slice_object(*endpoints: Json, meta: Json | None = None, **more: Any) -> Json:
    """A slice of shop/web on port 8080."""
    return {
        "metadata": {
            "name": "web-abc",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
            **(meta or {}),
        },
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": list(endpoints or ({"addresses": ["10.0.1.1"]},)),
        **more,
    }


def decode(type_: type[Any], value: Json) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value), type=type_)
