"""Which proxy is on the way to a URL.

Rules of this file: pure; the environment is handed in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from urllib3.util import parse_url

from ebpflb.errors import UserError


def proxy_for(url: str, environ: Mapping[str, str]) -> str:
    """The proxy that the environment has for `url`, "" for none: HTTPS_PROXY or HTTP_PROXY, unless NO_PROXY has the
    host, as Go reads them: names stand for their subdomains too, and networks (CIDRs) count."""
    parts = urlsplit(url)
    name = "HTTPS_PROXY" if parts.scheme == "https" else "HTTP_PROXY"
    proxy = environ.get(name) or environ.get(name.lower()) or ""
    if not proxy or _goes_direct(parts.hostname or "", parts.port, environ):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def _goes_direct(host: str, port: int | None, environ: Mapping[str, str]) -> bool:
    address = _ip(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    for entry in (environ.get("NO_PROXY") or environ.get("no_proxy") or "").split(","):
        entry = entry.strip().lower()
        if entry == "*":
            return True
        if not entry:
            continue
        if "/" in entry:
            try:
                if address is not None and address in ipaddress.ip_network(entry, strict=False):
                    return True
            except ValueError:
                pass  # not a network, and no name has a slash
            continue
        name, _, only = entry.rpartition(":") if entry.count(":") == 1 else (entry, "", "")
        if only and only != str(port):
            continue
        name = name.strip("[]")
        if address is not None:
            if _ip(name) == address:
                return True
        elif host == name.lstrip(".") and not name.startswith(".") or host.endswith("." + name.lstrip(".*")):
            return True
    return False


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def checked(proxy: str) -> str:
    """`proxy` itself. Raises UserError if it is of a kind that we do not speak."""
    if not proxy:
        return ""
    shown = proxy.rpartition("@")[2]
    try:
        scheme = parse_url(proxy).scheme
    except ValueError:
        raise UserError(f"the proxy {shown} is no URL; write http://HOST:PORT") from None
    if scheme not in ("http", "https"):
        raise UserError(f"the proxy {shown} is not of a kind that is served here: http or https")
    return proxy
