"""The configuration file: read strictly, written back, watched.

Rules of this file: what a file says becomes one EbpflbConfiguration, of whichever kind it is, or a UserError in one
line that names the field, by its path. Keys are told apart by case, as kube-proxy's strict reading does. A null is a
field that was not given. Whether values make sense is not asked here.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import msgspec
import yaml
from inotify_simple import INotify, flags

from ebpflb import strict_yaml
from ebpflb.config.document import (
    KIND,
    KUBE_PROXY_KIND,
    KUBE_PROXY_VERSION,
    RETIRED,
    VERSION,
    EbpflbConfiguration,
    KubeProxyConfiguration,
    Part,
    Said,
)
from ebpflb.config.durations import Duration, parse_duration
from ebpflb.errors import UserError

# A configuration is a page or two; a file beyond this is something else.
_MOST_BYTES = 1 << 20

_KINDS: Mapping[str, tuple[str, type[KubeProxyConfiguration]]] = {
    KUBE_PROXY_KIND: (KUBE_PROXY_VERSION, KubeProxyConfiguration),
    KIND: (VERSION, EbpflbConfiguration),
}


def read(path: str) -> Said:
    """Raises UserError."""
    where = f"--config {path}"
    try:
        data = _bytes(path)
    except OSError as error:
        reason = {FileNotFoundError: "there is no such file", IsADirectoryError: "is a directory; give the file in it"}
        raise UserError(f"{where}: {reason.get(type(error), error.strerror)}") from None
    return parse(data, where)._replace(digest=digest(data))


def digest(data: bytes) -> str:
    """Of all bytes of a file."""
    return hashlib.sha256(data).hexdigest()


def _bytes(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(_MOST_BYTES + 1)


def parse(data: bytes, where: str) -> Said:
    """What `data` says; errors begin with `where`. Raises UserError."""
    try:
        if len(data) > _MOST_BYTES:
            raise UserError(f"it has more than {_MOST_BYTES >> 20} MiB: this is no configuration")
        return _said(strict_yaml.documents(data.removeprefix(b"\xef\xbb\xbf")))
    except RecursionError:
        raise UserError(f"{where}: cannot be parsed: it is nested too deeply") from None
    except (strict_yaml.NotYaml, UserError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def _said(documents: list[object]) -> Said:
    if not documents:
        raise UserError(
            f"it is empty; write a {KUBE_PROXY_KIND} ({KUBE_PROXY_VERSION}) or an {KIND} ({VERSION}) into it"
        )
    if len(documents) > 1:
        kinds = ", ".join(
            str(each.get("kind") or "no kind") if isinstance(each, dict) else "text" for each in documents
        )
        raise UserError(
            f"it holds {len(documents)} documents ({kinds}); "
            f"leave one of kind {KUBE_PROXY_KIND} or {KIND} in a file of its own"
        )
    (value,) = documents
    if not isinstance(value, dict):
        raise UserError(f"it holds no fields; write a {KUBE_PROXY_KIND} or an {KIND} into it")
    type_ = _type(value)
    retired = tuple(
        name for name in RETIRED if name in value and value[name] is not None and value[name] not in RETIRED[name]
    )
    value = {key: each for key, each in value.items() if key not in RETIRED}
    _refuse_unknown(value, type_, "", type_)
    try:
        return Said(msgspec.convert(_without_nulls(value), EbpflbConfiguration, dec_hook=_decode), retired)
    except msgspec.ValidationError as error:
        raise UserError(_words(error)) from None


def _type(value: Mapping[Any, Any]) -> type[KubeProxyConfiguration]:
    kind, version = value.get("kind"), value.get("apiVersion")
    if kind == "ConfigMap":
        data = value.get("data")
        inside = next((key for key in data if "config" in str(key)), "") if isinstance(data, dict) else ""
        raise UserError(f"it is a ConfigMap; give what is in it{f' under data, {inside}' if inside else ''}")
    for name, got in (("kind", kind), ("apiVersion", version)):
        if not got:
            raise UserError(
                f"{name} is missing; write {KUBE_PROXY_KIND} of {KUBE_PROXY_VERSION}, or {KIND} of {VERSION}"
            )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"kind {kind} is not a configuration of ebpflb; write {KUBE_PROXY_KIND} or {KIND}")
    wanted, type_ = _KINDS[kind]
    if version != wanted:
        raise UserError(f"apiVersion {version} of {kind} is unknown; write {wanted}")
    return type_


# ---- Fields ----


def _refuse_unknown(value: object, type_: type[Part], path: str, whole: type[KubeProxyConfiguration]) -> None:
    """Every key at every depth must be a field."""
    if not isinstance(value, dict):
        return
    fields = {field.encode_name: field for field in msgspec.structs.fields(type_)}
    for key, each in value.items():
        if key not in fields:
            raise UserError(f"{path}{key}: unknown field{_hint(str(key), path, list(fields), whole)}")
        for part in _parts(fields[key].type):
            for item in each if isinstance(each, list) else (each,):
                _refuse_unknown(item, part, f"{path}{key}.", whole)


def _parts(hint: object) -> Iterator[type[Part]]:
    for each in (hint, *get_args(hint)):
        if isinstance(each, type) and issubclass(each, Part):
            yield each


def _hint(key: str, path: str, here: list[str], whole: type[KubeProxyConfiguration]) -> str:
    """What was most likely meant: a field of that name elsewhere, or one of nearly that name here, or anywhere."""
    everywhere = dict(_everywhere(whole))
    if key in everywhere:
        return f', did you mean "{everywhere[key]}"?'
    ours = {name for name, _ in _everywhere(EbpflbConfiguration)} - set(everywhere)
    if key in ours:
        return f": {KUBE_PROXY_KIND} has none of that name; write apiVersion {VERSION} and kind {KIND}"
    lowered = {name.lower(): name for name in here}
    if close := difflib.get_close_matches(key.lower(), lowered, n=1):
        return f', did you mean "{path}{lowered[close[0]]}"?'
    if close := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75):
        return f', did you mean "{everywhere[close[0]]}"?'
    return "; take it out"


def _everywhere(type_: type[Part], path: str = "") -> Iterator[tuple[str, str]]:
    """Every field's name and whole path, the first and outermost ones last, so that in a dict they count."""
    for field in reversed(msgspec.structs.fields(type_)):
        for part in _parts(field.type):
            yield from _everywhere(part, f"{path}{field.encode_name}.")
    for field in msgspec.structs.fields(type_):
        yield field.encode_name, path + field.encode_name


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _decode(type_: type[object], value: object) -> object:
    if type_ is not Duration:
        raise NotImplementedError(f"{type_} has no spelling")
    if not isinstance(value, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        raise ValueError(f'expected a duration such as "{f"{value:g}s" if number else "30s"}", got {_word_for(value)}')
    return parse_duration(value)


def _word_for(value: object) -> str:
    words = {bool: "a boolean", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return words.get(type(value), "something else")


_WORDS = {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false", "array": "a list",
          "object": "fields", "null": "nothing"}  # fmt: skip


def _words(error: msgspec.ValidationError) -> str:
    """A decoder's complaint, beginning with the field's path."""
    said, _, at = str(error).partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    if expected := re.fullmatch(r"Expected `([^`]*)`, got `([^`]*)`", said):
        wanted = [_WORDS.get(each, each) for each in expected[1].split(" | ") if each != "null"]
        said = f"expected {' or '.join(wanted)}, got {_WORDS.get(expected[2], expected[2])}"
    elif bound := re.fullmatch(r"Expected `int` (>=|<=|<|>) (-?[0-9]+)", said):
        word = {">=": "at least", "<=": "at most", "<": "less than", ">": "more than"}[bound[1]]
        said = f"expected a number of {word} {bound[2]}"
    return f"{path}: {said}" if path else said


# ---- Written ----


def written(document: Mapping[str, object]) -> str:
    """A document as `parse` reads it."""
    text: str = yaml.safe_dump(dict(document), sort_keys=True, default_flow_style=False, allow_unicode=True)
    return text


# ---- Watched ----

# The file itself may be written in place, moved over, or be behind links that change: those who keep ConfigMaps switch
# a link `..data` beside the file. The directory tells of all but what is behind a link elsewhere.
_FILE = int(flags.CLOSE_WRITE | flags.ATTRIB | flags.DELETE_SELF | flags.MOVE_SELF)
_DIRECTORY = int(
    flags.CLOSE_WRITE | flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ATTRIB | flags.ONLYDIR
)


class Watch:
    """Tells when a file says something else than it did at the start. What is not readable at the moment says nothing
    else: whoever replaces a file may remove it first."""

    def __init__(self, path: str, seen: str | None = None) -> None:
        """`seen` is the digest of what the file held when it was read, None for now. Raises UserError."""
        self._path = path
        self._seen = _digest(path) if seen is None else seen
        try:
            self._events = INotify(nonblocking=True)
        except OSError as error:
            raise UserError(
                f"--config {path} cannot be watched: {error.strerror}; raise the sysctl fs.inotify.max_user_instances"
            ) from None
        self._listen()

    def fileno(self) -> int:
        return int(self._events.fileno())

    def changed(self) -> bool:
        """Whether the content is another. To be asked once at the start, and when `fileno` is readable."""
        self._events.read(timeout=0)
        self._listen()
        now = _digest(self._path)
        return now is not None and now != self._seen

    def close(self) -> None:
        self._events.close()

    def _listen(self) -> None:
        """Watch what the path leads through now; watching the same again changes nothing."""
        for path in _way(self._path):
            for place, mask in ((os.path.dirname(path), _DIRECTORY), (path, _FILE)):
                try:
                    self._events.add_watch(place, mask)
                except OSError:
                    continue  # it is gone for the moment: its directory tells when it is back


def _way(path: str) -> list[str]:
    """The file's path and, where links lead elsewhere, the places between and the end."""
    found = [os.path.abspath(path)]
    while os.path.islink(found[-1]) and len(found) < 40:
        found.append(os.path.normpath(os.path.join(os.path.dirname(found[-1]), os.readlink(found[-1]))))
    real = os.path.realpath(path)
    return found if real == found[-1] else [*found, real]


def _digest(path: str) -> str | None:
    try:
        return digest(_bytes(path))
    except OSError:
        return None
