"""Reading a kubeconfig with the official package: a program, `python -m ebpflb.source.kube.credentials FILE`.

Rules of this file: it is the only importer of `kubernetes`, which costs 30 MB and is therefore gone when the answer is
given: one JSON document on stdout, a Told or a Failed. The package decides what a kubeconfig means, and runs exec
plugins; what it says badly or not at all (unknown users, broken PEM, plugins that failed) is looked at here, so that
every mistake has one line that names the file. Secrets appear in the document only, never on a command line.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import logging
import os
import signal
import ssl
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Never

import msgspec
import yaml
from kubernetes.client import Configuration
from kubernetes.config import ConfigException
from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

from ebpflb.errors import SourceError
from ebpflb.source.kube.access import Failed, Told

# Fields that name a file, each with whose they are; each has a twin in base64 that goes before it.
_FILES = (
    ("certificate-authority", "cluster"),
    ("client-certificate", "user"),
    ("client-key", "user"),
)


_PR_SET_PDEATHSIG = 1


class _Complaints(logging.Handler):
    """What the package logs instead of raising."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main() -> None:
    answer: Told | Failed
    try:
        answer = told_by(sys.argv[1])
    except SourceError as error:
        answer = Failed(str(error))
    except Exception as error:
        # Whatever the package stumbles over in a file: the operator gets a line, not its traceback.
        answer = Failed(_one_line(f"kubeconfig {sys.argv[1]}: {type(error).__name__}: {error}"))
    sys.stdout.buffer.write(msgspec.json.encode(answer))


def end_with_parent() -> None:
    """Whoever asked may be gone before a plugin has answered: then it ends too, and so does this process, in order. For
    the leader of a process group that is its own."""

    def end(number: int, frame: object) -> Never:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def told_by(path: str) -> Told:
    """What the kubeconfig at `path` says of its current context. Raises SourceError in one line."""
    complaints = _Complaints()
    # The package speaks to the root logger.
    logging.getLogger().addHandler(complaints)
    try:
        return _read(path, complaints)
    except SourceError as error:
        raise SourceError(_one_line(str(error))) from None
    finally:
        logging.getLogger().removeHandler(complaints)


def _read(path: str, complaints: _Complaints) -> Told:
    where = f"kubeconfig {path}"
    cluster, user = _chosen(where, _document(where, path))
    if user.get("as"):
        # The package would go as the user itself, without a word.
        raise SourceError(
            f"{where}: its user acts as {user['as']!r}, which is not served; use credentials of that user"
        )
    base = Path(path).absolute().parent
    for field, owner in _FILES:
        _check_entry(where, base, field, cluster if owner == "cluster" else user)
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        loader, found = _load(where, path, scratch)
        _check_plugin(where, user, complaints)
        ca = _text(where, "certificate-authority", found.ssl_ca_cert)
        certificate = _text(where, "client-certificate", found.cert_file)
        key = _text(where, "client-key", found.key_file)
    _check_pem(where, ca, certificate, key, scratch=_scratch())
    authorization = str(getattr(loader, "token", "")).strip()
    scheme, _, token = authorization.partition(" ")
    if user.get("auth-provider") and not authorization and not certificate:
        raise SourceError(f"{where}: its auth-provider gives no token; use an exec plugin or a token")
    expiry = getattr(loader, "expiry", None)
    token_file = str(base / str(user["tokenFile"])) if user.get("tokenFile") else ""
    return Told(
        server=str(cluster.get("server") or ""),
        server_name=str(cluster.get("tls-server-name") or ""),
        proxy=str(cluster.get("proxy-url") or ""),
        verify=cluster.get("insecure-skip-tls-verify") is not True,
        ca=ca,
        certificate=certificate,
        key=key,
        token=token.strip() if scheme.lower() == "bearer" else "",
        token_file=token_file,
        authorization=authorization if scheme.lower() == "basic" else "",
        expires=expiry.timestamp() if expiry is not None else None,
        renewable=_by_plugin(user),
        identity=_identity(where, user, token_file),
        files=(os.path.abspath(path), *_named_files(base, cluster, user)),
    )


# ---- The file ----


def _document(where: str, path: str) -> Mapping[str, object]:
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise SourceError(f"{where}: there is no such file") from None
    except OSError as error:
        raise SourceError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SourceError(f"{where} is not text") from None
    try:
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise SourceError(f"{where} is not YAML: {error.problem}{line}") from None
    except yaml.YAMLError as error:
        raise SourceError(f"{where} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise SourceError(f"{where} is empty" if document is None else f"{where} is no kubeconfig: it is not a mapping")
    return document


def _chosen(where: str, document: Mapping[str, object]) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """The cluster and the user of the current context; the user is empty for nobody."""
    current = document.get("current-context")
    if not current:
        raise SourceError(f"{where} has no current-context; choose one with `kubectl config use-context`")
    context = _named(where, document, "contexts", "context", current, "its current-context is")
    cluster = _named(where, document, "clusters", "cluster", context.get("cluster"), f"context {current!r} names")
    user: Mapping[str, object] = {}
    if context.get("user"):
        user = _named(where, document, "users", "user", context["user"], f"context {current!r} names")
    return cluster, user


def _named(
    where: str, document: Mapping[str, object], plural: str, kind: str, name: object, whose: str
) -> Mapping[str, object]:
    """The content of the entry called `name` in one of the three lists."""
    entries = document.get(plural) or []
    if not isinstance(entries, list) or not all(isinstance(each, dict) and "name" in each for each in entries):
        raise SourceError(f"{where}: {plural} is not a list of entries with names")
    for entry in entries:
        if entry["name"] == name:
            content = entry.get(kind)
            if content is None and kind == "user":
                return {}
            if not isinstance(content, dict):
                raise SourceError(f"{where}: the {kind} {name!r} is not a mapping")
            return content
    raise SourceError(f"{where}: {whose} the {kind} {name!r}, which is not there")


def _check_entry(where: str, base: Path, field: str, entry: Mapping[str, object]) -> None:
    """That the data of `field` is base64, or else that its file is there."""
    data = entry.get(f"{field}-data")
    if not data:
        path = base / str(entry[field]) if entry.get(field) else None
        if path and not path.is_file():
            raise SourceError(f"{where}: {field} {path}: there is no such file")
    else:
        try:
            base64.b64decode(str(data), validate=True)
        except (binascii.Error, ValueError):
            # Line breaks in the data are allowed.
            try:
                base64.b64decode("".join(str(data).split()), validate=True)
            except (binascii.Error, ValueError):
                raise SourceError(f"{where}: {field}-data is not base64") from None


# ---- The package ----


def _scratch() -> str | None:
    """Where the package may put keys into files: in memory if there is such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _load(where: str, path: str, scratch: str) -> tuple[KubeConfigLoader, Configuration]:
    found = Configuration()
    try:
        # A base path of None has each path taken relative to the file.
        merged = KubeConfigMerger(path).config  # type: ignore[no-untyped-call]
        loader = KubeConfigLoader(merged, config_base_path=None, temp_file_path=scratch)  # type: ignore[no-untyped-call]
        loader.load_and_set(found)  # type: ignore[no-untyped-call]
    except ConfigException as error:
        raise SourceError(f"{where}: {error}") from None
    except OSError as error:
        raise SourceError(f"{where}: {error.filename} cannot be read: {error.strerror}") from None
    return loader, found


def _check_plugin(where: str, user: Mapping[str, object], complaints: _Complaints) -> None:
    """The package logs that a plugin failed, and goes on as nobody."""
    plugin = user.get("exec")
    if not isinstance(plugin, dict) or not _by_plugin(user) or not complaints.texts:
        return
    command = plugin.get("command")
    text = complaints.texts[-1]
    if "No such file or directory" in text:
        hint = f" ({plugin['installHint']})" if plugin.get("installHint") else ""
        raise SourceError(f"{where}: the exec plugin {command!r} is not installed here{hint}")
    lines = [line.strip() for line in text.removeprefix("exec: ").splitlines() if line.strip()]
    raise SourceError(f"{where}: the exec plugin {command!r} failed: {_last(lines)}")


def _by_plugin(user: Mapping[str, object]) -> bool:
    """Whether a plugin gives the credentials. In the package's order a token goes before it."""
    return "exec" in user and not user.get("token") and not user.get("tokenFile")


def _last(lines: list[str]) -> str:
    """The plugin's last line; the first one also holds the package's own words."""
    if len(lines) == 1:
        status, _, said = lines[0].partition(". ")
        return said if said and status.startswith("process returned") else lines[0]
    return lines[-1] if lines else "it said nothing"


# ---- What came of it ----


def _text(where: str, field: str, path: str | None) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text()
    except OSError as error:
        raise SourceError(f"{where}: {field} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SourceError(f"{where}: {field} is not PEM") from None


def _check_pem(where: str, ca: str, certificate: str, key: str, scratch: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca:
        try:
            context.load_verify_locations(cadata=ca)
        except (ssl.SSLError, ValueError):
            raise SourceError(f"{where}: certificate-authority holds no certificate in PEM") from None
    if bool(certificate) != bool(key):
        given, lacking = ("client-certificate", "client-key") if certificate else ("client-key", "client-certificate")
        raise SourceError(f"{where}: there is a {given} without a {lacking}")
    if certificate:
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            pair = Path(directory, "pair")
            pair.write_text(f"{certificate}\n{key}")
            try:
                context.load_cert_chain(pair, password=_no_password)
            except ssl.SSLError as error:
                reason = (
                    "client-key belongs to another certificate"
                    if error.reason == "KEY_VALUES_MISMATCH"
                    else "client-certificate and client-key are not a certificate and its unencrypted key in PEM"
                )
                raise SourceError(f"{where}: {reason}") from None


def _no_password() -> str:
    # Without this OpenSSL would ask at the terminal.
    return ""


def _named_files(base: Path, cluster: Mapping[str, object], user: Mapping[str, object]) -> list[str]:
    """The files that the kubeconfig names and that may be replaced, absolute."""
    owners = {"cluster": cluster, "user": user}
    return [
        str(base / str(owners[owner][field]))
        for field, owner in _FILES
        if owners[owner].get(field) and not owners[owner].get(f"{field}-data")
    ]


def _identity(where: str, user: Mapping[str, object], token_file: str) -> str:
    """Whom we go as, in words."""
    plugin = user.get("exec")
    if user.get("token") or token_file:
        return f"the token of {token_file or where}"
    if isinstance(plugin, dict):
        return f"what the exec plugin {plugin.get('command')!r} of {where} gave"
    if user.get("username"):
        return f"the name and password of {where}"
    if user.get("client-certificate") or user.get("client-certificate-data"):
        return f"the client certificate of {where}"
    if user.get("auth-provider"):
        return f"the auth-provider of {where}"
    return f"nobody: {where} has no credentials"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
