"""Certificates for servers and clients of a test, made by openssl.

Rules of this file: every key is fresh and lives in one directory; nothing is valid for longer than a day.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1")


class Identity(NamedTuple):
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority with its files in `directory`; `bundle` is what to believe it by."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._own = Identity(directory / f"{name}.crt", directory / f"{name}.key")
        _openssl("req", "-x509", *_KEY, "-subj", f"/CN={name}", *_files(self._own))

    @property
    def bundle(self) -> Path:
        return self._own.certificate

    def server(self, name: str, hosts: Sequence[str]) -> Identity:
        """For a server that is known by these addresses and names."""
        named = ",".join(("IP:" if ":" in host or host.replace(".", "").isdigit() else "DNS:") + host for host in hosts)
        return self._issue(name, f"/CN={name}", "serverAuth", f"subjectAltName={named}")

    def client(self, user: str, group: str = "") -> Identity:
        """For a client that the API server knows as this user of this group."""
        return self._issue(user, (f"/O={group}" if group else "") + f"/CN={user}", "clientAuth")

    def _issue(self, name: str, subject: str, usage: str, *extensions: str) -> Identity:
        made = Identity(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        words = ["-subj", subject, "-CA", str(self._own.certificate), "-CAkey", str(self._own.key)]
        for extension in ("basicConstraints=critical,CA:false", f"extendedKeyUsage={usage}", *extensions):
            words += ["-addext", extension]
        _openssl("req", "-x509", *_KEY, *words, *_files(made))
        return made


def signing_key(path: Path) -> Path:
    """A key for the tokens of service accounts, in the form that serves Kubernetes as a public key, too."""
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path))
    return path


def _files(identity: Identity) -> tuple[str, ...]:
    return ("-out", str(identity.certificate), "-keyout", str(identity.key))


def _openssl(*words: str) -> None:
    done = subprocess.run(["openssl", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"openssl {' '.join(words)}: {done.stderr}"
