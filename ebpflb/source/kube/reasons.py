"""Why a server could not be asked, and what it answered instead, in words for the operator.

Rules of this file: pure. Every text is one line, stable (no time of ours, no counter, no port of ours) and names what
to look at. What a Status object says is handed on as it is: it names the verb, the resource and the user.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from ebpflb.source.kube import ApiError
from ebpflb.source.kube.access import Access, Address
from ebpflb.source.kube.decode import Status
from ebpflb.source.kube.expiry import certificate_end, day, token_end

_SYSTEM = {
    errno.ECONNREFUSED: "connection refused",
    errno.ETIMEDOUT: "no answer",
    errno.EHOSTUNREACH: "no route to the host",
    errno.ENETUNREACH: "no route to its network",
    errno.ECONNRESET: "the connection was cut",
    errno.EPIPE: "the connection was cut",
    errno.ECONNABORTED: "the connection was cut",
}

# OpenSSL's X509_V_ERR_…
_EXPIRED = 10
_NOT_YET_VALID = 9
_UNKNOWN_ISSUER = {2, 18, 19, 20, 21}
_OTHER_NAME = {62, 64}

_NOT_TLS = {
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "RECORD_LAYER_FAILURE",
    "UNKNOWN_PROTOCOL",
    "PACKET_LENGTH_TOO_LONG",
}

# What Go's and nginx' servers answer to plain HTTP on a TLS port.
_PLAIN_TO_TLS = (b"HTTP request to an HTTPS server", b"plain HTTP request was sent to HTTPS port")

_MOST_TEXT = 300


class Answer(NamedTuple):
    """The head of an answer, and the beginning of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def unreachable(reasons: Sequence[tuple[Address, str]]) -> str:
    """One text for all addresses that were tried."""
    tried = "; ".join(f"{each.url}: {why}" + (f" ({each.note})" if each.note else "") for each, why in reasons)
    return f"the API server cannot be reached: {tried}"


def why(error: BaseException, address: Address, access: Access) -> str:
    """What `error`, of a connection to `address`, means."""
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _distrusted(cause, address, access)
    if isinstance(cause, (ConnectTimeoutError, ReadTimeoutError, TimeoutError)):
        return "no answer in time"
    if isinstance(cause, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(cause, ssl.SSLEOFError):
        return "the server ended the connection during the TLS handshake"
    if isinstance(cause, ssl.SSLError):
        return _tls(cause)
    if isinstance(cause, (http.client.RemoteDisconnected, http.client.IncompleteRead, IncompleteRead, EOFError)):
        return "the connection was cut"
    if isinstance(cause, http.client.HTTPException):
        return "it does not speak HTTP" + (": write https://" if not address.tls else "")
    if isinstance(cause, OSError):
        if str(cause).startswith("Tunnel connection failed"):
            said = _plain(str(cause).partition(": ")[2])
            return f"the proxy {_without_secrets(address.proxy)} refuses to connect: {said}"
        return _SYSTEM.get(cause.errno or 0) or _plain(os.strerror(cause.errno) if cause.errno else str(cause))
    if isinstance(cause, HTTPError):
        return "the connection was cut"
    return _plain(f"{type(cause).__name__}: {cause}")


def _cause(error: BaseException) -> BaseException:
    """What the library wrapped."""
    while True:
        inner: BaseException | None = None
        if isinstance(error, (NameResolutionError, NewConnectionError)):
            inner = error.__cause__
        elif isinstance(error, (SSLError, ProtocolError)):
            inner = next((each for each in error.args if isinstance(each, BaseException)), error.__cause__)
        if inner is None or inner is error:
            return error
        error = inner


def _distrusted(error: ssl.SSLCertVerificationError, address: Address, access: Access) -> str:
    code = error.verify_code
    if code in _UNKNOWN_ISSUER:
        return f"the server's certificate is not signed by the CA of {access.ca_from}: is this the right cluster?"
    if code in _OTHER_NAME:
        name = address.server_name or _host(address.url)
        return (
            f"the server's certificate is not for {name}: "
            "give --apiserver with a name that it has, or tls-server-name in the kubeconfig"
        )
    if code == _EXPIRED:
        return "the server's certificate, or one of its CAs, has expired (or this node's clock is wrong)"
    if code == _NOT_YET_VALID:
        return "the server's certificate is not valid yet (or this node's clock is wrong)"
    return f"the server's certificate is not accepted: {error.verify_message}"


def _tls(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    if reason in _NOT_TLS:
        return "it does not speak TLS: is it http://?"
    if "ALERT" in reason:
        said = reason.rpartition("ALERT_")[2].lower().replace("_", " ")
        return f"the server ended the TLS handshake: {said} (does it know the CA of our client certificate?)"
    return f"TLS failed: {_plain(reason.lower().replace('_', ' ') or str(error))}"


def not_an_api_server(answer: Answer, address: Address) -> str | None:
    """Why what answered cannot be an API server; None if it may be one."""
    if not address.tls and answer.status == 400 and any(text in answer.body for text in _PLAIN_TO_TLS):
        return "it speaks TLS: write https://"
    if 300 <= answer.status < 400:
        return f"it redirects to {_plain(answer.headers.get('Location', 'nowhere'))}, which is not followed"
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        return f"it answers with a web page (HTTP {answer.status}): this is no API server"
    return None


def refusal(answer: Answer, access: Access, token: str, now: float) -> ApiError:
    """The error for an answer that is not 2xx; `token` is the one that was sent, `now` the time of day."""
    try:
        status = msgspec.json.decode(answer.body, type=Status)
    except ValueError:  # a DecodeError or text that is not UTF-8
        status = Status()
    if status.kind != "Status":
        status = Status()
    message = _plain(status.message or "")
    if answer.status == 401:
        message = _unauthorized(access, token, now)
    elif not message:
        said = _plain(answer.body.decode(errors="replace"))
        message = f"the API server answers HTTP {answer.status} {http.client.responses.get(answer.status, '')}".rstrip()
        message += f": {said}" if said else ""
    return ApiError(answer.status, status.reason or "", message, _retry_after(status, answer.headers))


def _unauthorized(access: Access, token: str, now: float) -> str:
    ended = token_end(token) if token else None
    if ended is None and access.certificate and not token:
        ended = certificate_end(access.certificate)
    if ended is None:
        ended = access.expires
    if access.anonymous:
        said = "it wants to know who we are: give --kubeconfig FILE"
    elif ended is not None and ended <= now:
        said = f"{access.identity} expired on {day(ended)}"
    else:
        said = f"{access.identity} has expired, was revoked or is for another cluster"
    return f"the API server does not accept our credentials: {said}"


def _retry_after(status: Status, headers: Mapping[str, str]) -> float | None:
    if status.details and status.details.retry_after_seconds:
        return status.details.retry_after_seconds
    text = headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _without_secrets(proxy: str) -> str:
    scheme, _, rest = proxy.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _plain(text: str) -> str:
    """On one line, without control characters, and not without end."""
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(each if each.isprintable() else "\ufffd" for each in line)
    return line if len(line) <= _MOST_TEXT else line[: _MOST_TEXT - 1] + "…"
