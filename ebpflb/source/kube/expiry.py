"""Until when a credential is good, read off the credential itself.

Rules of this file: pure, and never raises: whoever cannot be read has no known end. What it says serves the words of
an error only; whether a credential is accepted is the server's to decide.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import re

import msgspec

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)

# DER tags (X.690).
_SEQUENCE = 0x30
_VERSION = 0xA0  # [0] EXPLICIT, which TBSCertificate may begin with
_UTC_TIME = 0x17
_GENERALIZED_TIME = 0x18

_MOST_SECONDS = 253_402_300_800.0  # the year 10,000, which no calendar here reaches


class _Claims(msgspec.Struct):
    """What of a JSON Web Token we read."""

    exp: float | None = None


def certificate_end(pem: str) -> float | None:
    """notAfter of the first certificate in `pem`, in seconds since the epoch; None if there is none to be read."""
    found = _CERTIFICATE.search(pem.encode())
    if found is None:
        return None
    try:
        return _not_after(base64.b64decode(found[1]))
    except (ValueError, IndexError):
        return None


def token_end(token: str) -> float | None:
    """The `exp` of a JSON Web Token, in seconds since the epoch; None for any other token."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        body = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        end = msgspec.json.decode(body, type=_Claims).exp
    except (binascii.Error, ValueError):  # msgspec's errors are ValueErrors
        return None
    return end if end is not None and 0 <= end < _MOST_SECONDS else None


def day(moment: float) -> str:
    """A time as it is written in errors: `2026-01-31T12:00:00Z`."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _not_after(der: bytes) -> float:
    """Certificate ::= { tbsCertificate { [version], serial, signature, issuer, validity { notBefore, notAfter }, … } }
    (RFC 5280, 4.1)."""
    _, certificate, _ = _element(der, 0)
    _, body, _ = _element(certificate, 0)
    tag, _, after = _element(body, 0)
    for _field in ("serial", "signature", "issuer") if tag == _VERSION else ("signature", "issuer"):
        _, _, after = _element(body, after)
    tag, validity, _ = _element(body, after)
    if tag != _SEQUENCE:
        raise ValueError("no validity")
    _, _, after = _element(validity, 0)
    tag, text, _ = _element(validity, after)
    return _time(tag, text.decode("ascii"))


def _element(der: bytes, at: int) -> tuple[int, bytes, int]:
    """The tag and content of the element at `at`, and where the next one begins."""
    tag, length = der[at], der[at + 1]
    start = at + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[start : start + size])
        start += size
    return tag, der[start : start + length], start + length


def _time(tag: int, text: str) -> float:
    if tag == _UTC_TIME:
        # Two digits of the year: from 50 on they are of the last century.
        text = ("19" if text >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC).timestamp()
