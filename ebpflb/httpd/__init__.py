"""HTTP to whoever asks for health and metrics.

Rules of this package: it knows nothing of Services. `exchange` is the protocol without sockets, `clients` one socket
after another without ports, `server` the ports and the one thread that serves them all. What is answered comes from
handlers, which are given to `listen`.
"""

from __future__ import annotations

from ebpflb.httpd.clients import Limits
from ebpflb.httpd.exchange import NOT_FOUND, Handler, Request, Response, routed
from ebpflb.httpd.server import HttpServer, Listening

__all__ = ["NOT_FOUND", "Handler", "HttpServer", "Limits", "Listening", "Request", "Response", "routed"]
