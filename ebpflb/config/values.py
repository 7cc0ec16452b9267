"""From what was written to what is meant, one value at a time.

Rules of this file: every function takes `where`, the option or field that the value stands in, and raises UserError
in one line that begins with it: what is wrong and what to write instead. Files are asked about, never opened.
"""

from __future__ import annotations

import enum
import ipaddress
import os
from collections.abc import Iterable
from typing import TypeVar
from urllib.parse import urlsplit

from ebpflb.config import Bind
from ebpflb.errors import UserError

E = TypeVar("E", bound=enum.Enum)


def directory(where: str, path: str, meaning: str) -> str:
    """An existing directory as an absolute path, "" if not given."""
    if not path:
        return ""
    if not os.path.exists(path):
        raise UserError(f"{where} {path}: there is no such directory; give {meaning}")
    if not os.path.isdir(path):
        raise UserError(f"{where} {path} is not a directory; give {meaning}")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{where} {path} cannot be read; run as root or change its mode")
    return os.path.abspath(path)


def file(where: str, path: str) -> str:
    """An existing, readable file as an absolute path, "" if not given."""
    if not path:
        return ""
    if not os.path.exists(path):
        raise UserError(f"{where} {path}: there is no such file")
    if os.path.isdir(path):
        raise UserError(f"{where} {path} is a directory; give the file in it")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where} {path} cannot be read; run as root or change its mode")
    return os.path.abspath(path)


def in_bpffs(where: str, path: str, example: str) -> str:
    """An absolute path in its shortest form, which need not be there."""
    # Not made absolute: nobody stands in a BPF file system, so a relative path is a slip.
    if not os.path.isabs(path):
        what = f"{path} is a relative path" if path else "is empty"
        raise UserError(f"{where} {what}; give a directory in a BPF file system, such as {example}")
    return os.path.normpath(path)


def url(where: str, text: str) -> str:
    """The URL of a server, without a slash at its end."""
    example = "write such as https://10.0.0.1:6443"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise UserError(f"{where} {text} is not a URL; {example}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UserError(f"{where} {text} is not a URL of a server; {example}")
    if parts.username is not None or parts.query or parts.fragment or not text.isprintable() or " " in text:
        raise UserError(f"{where} {text}: a server is a host, a port and perhaps a path; {example}")
    return text.rstrip("/")


def bind(where: str, text: str, default_port: int, off: str) -> Bind | None:
    """ADDRESS:PORT, [IPV6]:PORT, or an address alone for the usual port. None for "", which is to be written `off`."""
    if not text:
        return None
    host, port = text, str(default_port)
    if not is_address(text):
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
    if not is_address(host):
        example = f"write such as 0.0.0.0:{default_port} or [::]:{default_port}"
        raise UserError(f"{where} {text} is not an address and a port; {example}, or {off} for no such server")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"{where} {text}: a port is a number from 1 to 65535; write {off} for no such server")
    return Bind(str(ipaddress.ip_address(host)), int(port))


def is_address(text: str) -> bool:
    """An IP address with no zone."""
    try:
        return not getattr(ipaddress.ip_address(text), "scope_id", None)
    except ValueError:
        return False


def interface(where: str, name: str) -> str:
    """An interface's name, or the beginning of one; may be empty."""
    if len(name.encode()) > 15 or "/" in name or any(letter.isspace() for letter in name):
        raise UserError(f"{where} {name}: not an interface name (at most 15 bytes, no spaces or slashes)")
    return name


def devices(where: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Names or patterns of interfaces, each once."""
    found = tuple(sorted(set(split(patterns))))
    for pattern in found:
        if len(pattern.encode()) > 15 or "/" in pattern or any(letter.isspace() for letter in pattern):
            raise UserError(f"{where} {pattern}: not an interface name or pattern; write such as eth0,ens*")
    return found


def cidrs(where: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Canonical CIDRs, host bits masked, each once, in the given order."""
    found: dict[str, None] = {}
    for text in texts:
        if "/" not in text:
            raise UserError(f"{where} {text}: a CIDR is address/bits, such as {_example(text)}")
        try:
            found[str(ipaddress.ip_network(text, strict=False))] = None
        except ValueError:
            raise UserError(f"{where} {text} is not a CIDR; write such as 10.244.0.0/16 or fd00::/64") from None
    return tuple(found)


def _example(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return "10.244.0.0/16"
    return f"{address}/{address.max_prefixlen}"


def split(values: Iterable[str]) -> tuple[str, ...]:
    """What may be repeated and may hold commas, as one flat tuple."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def choice(where: str, value: str, kind: type[E]) -> E:
    """The member of `kind` that has this value."""
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member.value) for member in kind)
        raise UserError(f"{where} {value} is unknown; choose one of {choices}") from None


def seconds(where: str, value: float, lowest: float) -> float:
    """`lowest` at least, and not for ever."""
    if not lowest <= value < float("inf"):
        raise UserError(f"{where} {value:g}: give seconds, at least {lowest:g}")
    return value
