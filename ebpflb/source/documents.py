"""From the bytes of one manifest file to the objects in it.

Rules of this file: no file is opened here. A file is JSON if it begins like JSON, else YAML; either holds any number of
documents, each an object or a List of them. A wrong object costs itself only, and a sentence that names document and
field; a file that cannot be parsed at all raises SourceError.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import msgspec

from ebpflb import model, strict_yaml
from ebpflb.errors import SourceError
from ebpflb.source import parse, validate, wire

Value: TypeAlias = model.Service | model.EndpointSlice | model.Node | None


class Key(NamedTuple):
    """What makes two objects the same one. A Node has no namespace: it is ""."""

    kind: str
    name: model.ServiceName

    def __str__(self) -> str:
        return f"{self.kind} {self.name if self.name.namespace else self.name.name}"


class Entry(NamedTuple):
    """An acceptable object; `value` is None if it is not ours to serve. `where`: "document 2 item 1"."""

    value: Value
    where: str


class Remark(NamedTuple):
    """What is wrong with an object. `key` is set if it was refused for that, and could be told to be this one."""

    where: str
    reason: str
    key: Key | None = None


class Content(NamedTuple):
    """All that one file says."""

    entries: dict[Key, Entry]
    remarks: tuple[Remark, ...]


class _Kind(NamedTuple):
    version: str
    strict: Any
    wrong: Callable[[Any], tuple[str, ...]]
    missing: Callable[[Any], tuple[str, ...]]
    build: Callable[[Any], Value]
    namespaced: bool = True


def _nothing(_: object) -> tuple[str, ...]:
    return ()


_SLICES = "discovery.k8s.io/v1"
_KINDS = {
    "Service": _Kind("v1", wire.strict(wire.Service), validate.service, validate.missing_service, parse.service),
    "EndpointSlice": _Kind(
        _SLICES,
        wire.strict(wire.EndpointSlice),
        validate.endpoint_slice,
        validate.missing_endpoint_slice,
        parse.endpoint_slice,
    ),
    "Node": _Kind("v1", wire.strict(wire.Node), validate.node, _nothing, parse.node, namespaced=False),
}
_LISTS = {"List": "", **{f"{kind}List": kind for kind in _KINDS}}
_DECODERS = {kind: msgspec.json.Decoder(row.strict) for kind, row in _KINDS.items()}
_HEAD = msgspec.json.Decoder(wire.Head)
_RAW_LIST = msgspec.json.Decoder(wire.RawList)


class _Form(NamedTuple):
    """One object before it is known what it is: how to decode it as something."""

    head: Callable[[], wire.Head]
    items: Callable[[], list[_Form] | None]
    typed: Callable[[str], Any]
    plain: Callable[[], object]


def _json_form(data: bytes | msgspec.Raw) -> _Form:
    return _Form(
        head=lambda: _HEAD.decode(data),
        items=lambda: _forms(_RAW_LIST.decode(data).items, _json_form),
        typed=lambda kind: _DECODERS[kind].decode(data),
        plain=lambda: msgspec.json.decode(data),
    )


def _plain_form(value: object) -> _Form:
    return _Form(
        head=lambda: msgspec.convert(value, wire.Head),
        items=lambda: _forms(value.get("items") if isinstance(value, dict) else None, _plain_form),
        typed=lambda kind: msgspec.convert(value, _KINDS[kind].strict),
        plain=lambda: value,
    )


def _forms(items: Iterable[Any] | None, form: Callable[[Any], _Form]) -> list[_Form] | None:
    return [form(item) for item in items] if isinstance(items, list) else None


# ---- Files ----


def read(data: bytes, *, is_json: bool = False) -> Content:
    """What a file says. `is_json`: by its name it is nothing else. Raises SourceError if it cannot be parsed."""
    entries: dict[Key, Entry] = {}
    remarks: list[Remark] = []
    try:
        for number, form in enumerate(_documents(data, is_json), 1):
            _take(form, f"document {number}", "", entries, remarks)
    except msgspec.DecodeError as error:
        raise SourceError(f"cannot be parsed: {error}") from error
    except UnicodeEncodeError as error:
        raise SourceError("not text in Unicode: half a surrogate pair") from error
    except RecursionError as error:
        raise SourceError("cannot be parsed: it is nested too deeply") from error
    return Content(entries, tuple(remarks))


def _documents(data: bytes, is_json: bool) -> Iterator[_Form]:
    data = data.removeprefix(b"\xef\xbb\xbf")
    if is_json or data.lstrip()[:1] in (b"{", b"["):
        try:
            msgspec.json.decode(data, type=msgspec.Raw)
            return iter([_json_form(data)])
        except msgspec.DecodeError:
            # Several documents, or none of JSON at all; a YAML file may begin like this too.
            try:
                return map(_plain_form, _json_stream(data))
            except SourceError:
                if is_json:
                    raise
    return map(_plain_form, _yaml_documents(data))


def _json_stream(data: bytes) -> list[object]:
    """JSON documents one after another, as kubectl takes them."""
    text = _text(data)
    decoder, values, position = json.JSONDecoder(parse_constant=_refuse_constant), [], 0
    try:
        while position < len(text):
            if text[position].isspace():
                position += 1
                continue
            value, position = decoder.raw_decode(text, position)
            values.append(value)
    except json.JSONDecodeError as error:
        raise SourceError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    return values


def _refuse_constant(word: str) -> object:
    raise SourceError(f"not JSON: {word} is no number")


def _text(data: bytes) -> str:
    try:
        return strict_yaml.text(data)
    except strict_yaml.NotYaml as error:
        raise SourceError(str(error)) from error


def _yaml_documents(data: bytes) -> list[object]:
    try:
        return strict_yaml.documents(data)
    except strict_yaml.NotYaml as error:
        raise SourceError(str(error)) from error


# ---- Objects ----


def _take(form: _Form, where: str, kind_of_list: str, entries: dict[Key, Entry], remarks: list[Remark]) -> None:
    """Put what `form` says into `entries` and `remarks`. In a ServiceList, an item need not say its kind."""
    try:
        head = form.head()
    except msgspec.ValidationError as error:
        remarks.append(Remark(where, _words(error)))
        return
    kind = head.kind or kind_of_list
    version = head.api_version or (_KINDS[kind_of_list].version if kind_of_list else "")
    if not kind or not version:
        remarks.append(Remark(where, f"{'apiVersion' if kind else 'kind'}: Required value"))
    elif kind in _LISTS and version == (_KINDS[_LISTS[kind]].version if _LISTS[kind] else "v1"):
        items = form.items()
        if items is None:
            remarks.append(Remark(where, "items: Required value"))
        for number, item in enumerate(items or (), 1):
            _take(item, f"{where} item {number}", _LISTS[kind], entries, remarks)
    elif kind in _KINDS and version == _KINDS[kind].version:
        _take_object(form, where, kind, entries, remarks)
    else:
        known = (
            f"{kind} is read in version {_KINDS[kind].version}" if kind in _KINDS else "it is not one that is read here"
        )
        remarks.append(Remark(where, f'no matches for kind "{kind}" in version "{version}": {known}'))


def _take_object(form: _Form, where: str, kind: str, entries: dict[Key, Entry], remarks: list[Remark]) -> None:
    row = _KINDS[kind]
    try:
        obj = form.typed(kind)
    except msgspec.ValidationError as error:
        key = _key_of_plain(kind, form.plain())
        remarks.append(Remark(where, f"{key or kind}: {_words(error)}", key))
        return
    key = _key(kind, obj.metadata)
    wrong = row.wrong(obj)
    if wrong:
        remarks.extend(Remark(where, f"{key}: {words}", key) for words in wrong)
        return
    if key in entries:
        remarks.append(Remark(where, f"{key} is also in {entries[key].where}, which counts: remove one of them"))
        return
    remarks.extend(Remark(where, f"{key}: {words}") for words in row.missing(obj))
    entries[key] = Entry(row.build(obj), where)


def _key(kind: str, meta: wire.Meta | None) -> Key:
    name = parse.service_name(meta)
    return Key(kind, name if _KINDS[kind].namespaced else model.ServiceName("", name.name))


def _key_of_plain(kind: str, value: object) -> Key | None:
    """Which object this wants to be, if that much of it is readable."""
    meta = value.get("metadata") if isinstance(value, dict) else None
    name, namespace = (meta.get("name"), meta.get("namespace")) if isinstance(meta, dict) else (None, None)
    if not name or not isinstance(name, str) or not isinstance(namespace, str | None):
        return None
    return _key(kind, wire.Meta(name=name, namespace=namespace))


# ---- Words ----

_WORDS = {"str": "a string", "int": "an integer", "bool": "a boolean", "array": "a list", "object": "an object",
          "float": "a float", "null": "null"}  # fmt: skip
_API_FIELDS = sorted(
    {
        field.encode_name
        for each in vars(wire).values()
        if isinstance(each, type) and issubclass(each, msgspec.Struct)
        for field in msgspec.structs.fields(wire.strict(each))
    }
)


def _words(error: msgspec.ValidationError) -> str:
    """A decoder's complaint, beginning with the field's path as the API server writes it."""
    said, _, at = str(error).partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", said, re.DOTALL):
        field = unknown[1]
        close = difflib.get_close_matches(field, _API_FIELDS, n=1)
        hint = f', did you mean "{close[0]}"?' if close else ""
        return f'unknown field "{path + "." if path else ""}{field}"{hint}'
    if expected := re.fullmatch(r"Expected `(.*)`, got `(.*)`", said):
        wanted = [_WORDS.get(each, each) for each in expected[1].split(" | ") if each != "null"]
        said = f"expected {' or '.join(wanted)}, got {_WORDS.get(expected[2], expected[2])}"
    return f"{path}: {said}" if path else said
