"""The commands of iptables: by which names each variant has them, and what version they are.

Rules of this file: it looks for programs and asks them for their version; no table is touched.
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
from typing import NamedTuple

from ebpflb.errors import Unsupported
from ebpflb.model import Family

_PATH = os.pathsep.join(("/usr/local/sbin", "/usr/sbin", "/sbin"))
_COMMANDS = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}


class Variant(enum.StrEnum):
    """Which of the kernel's two engines the rules are in. Both may be in use, each unaware of the other."""

    NFT = "nft"
    LEGACY = "legacy"


class Version(NamedTuple):
    """What `iptables --version` says."""

    numbers: tuple[int, ...]
    variant: Variant


def plain_variant() -> Variant | None:
    """That of plain `iptables`, the system's default; None if there is none. Raises Unsupported if it does not say."""
    plain = shutil.which("iptables", path=_search_path())
    return version_of(plain).variant if plain else None


def version_of(binary: str) -> Version:
    """Raises Unsupported if it does not say."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
        match = re.search(r" v(\d+(?:\.\d+)+)(?: \((\w+)\))?", said)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unsupported(f"{binary} cannot be run: {error}") from error
    if match is None:
        raise Unsupported(f"{binary} --version says {said.strip()!r}, which is no version")
    numbers = tuple(int(part) for part in match[1].split("."))
    return Version(numbers, Variant.NFT if match[2] == "nf_tables" else Variant.LEGACY)


def missing_commands(family: Family, variant: Variant) -> list[str]:
    """The commands that `Iptables` would need and does not find."""
    return [
        f"{_COMMANDS[family]}-{variant}{suffix}"
        for suffix in ("", "-save", "-restore")
        if binary(family, variant, suffix) is None
    ]


def required(family: Family, variant: Variant, suffix: str) -> str:
    found = binary(family, variant, suffix)
    if found is None:
        raise Unsupported(f"{_COMMANDS[family]}-{variant}{suffix} is not installed: apt install iptables")
    return found


def binary(family: Family, variant: Variant, suffix: str) -> str | None:
    """The path of a command. Where the variant has none of its own name, plain iptables may be of it."""
    own = shutil.which(f"{_COMMANDS[family]}-{variant}{suffix}", path=_search_path())
    if own is not None:
        return own
    plain = shutil.which(_COMMANDS[family], path=_search_path())
    if plain is None or version_of(plain).variant is not variant:
        return None
    return shutil.which(f"{_COMMANDS[family]}{suffix}", path=_search_path())


def _search_path() -> str:
    return os.pathsep.join((os.environ.get("PATH", os.defpath), _PATH))
