"""The last good snapshot: what the API server said last, on disk, for a node that starts while there is no server.

Rules of this file: a snapshot is whole or it is refused, with one sentence that says why; it is never guessed at. A
file is replaced, not written to: a crash leaves the old one or the new one. Objects are encoded one by one and
compressed as they go, so that neither memory nor the interpreter is taken for long: whoever calls is in a thread.

The file: `_MAGIC`; the length of the header and the header (msgpack: layout, node, time, how many objects); a zlib
stream of objects, each its length and itself (msgpack: its kind, and the Struct of `model`); SHA-256 of all before.
The layout in the header is a hash of those Structs, so that another version's file is told apart without a number that
somebody would have to remember to raise.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import os
import struct
import typing
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import msgspec

from ebpflb.errors import SourceError
from ebpflb.model import Address, Endpoint, EndpointSlice, Node, Service, ServiceName, Snapshot
from ebpflb.source import Event, PutNode, PutService, PutSlice

_MAGIC = b"ebpflb snapshot 1\n"
_DIGEST = hashlib.sha256().digest_size
_LENGTH = struct.Struct(">I")

# Bytes that are compressed and written at once: each time others may run.
_CHUNK = 1 << 16

# zlib's fastest: a snapshot is written again and again, and flash wears.
_LEVEL = 1

API_SERVER = ServiceName("default", "kubernetes")
"""The Service of the API server itself, whose EndpointSlices the server writes."""


class Saved(NamedTuple):
    """What was saved at `saved`, in seconds since the epoch."""

    saved: float
    events: tuple[Event, ...]


class _Header(msgspec.Struct, frozen=True):
    layout: bytes
    node: str
    saved: float
    objects: int


_OTHER_VERSION = "another version of ebpflb wrote it"

_ENCODER = msgspec.msgpack.Encoder()
_HEADER = msgspec.msgpack.Decoder(_Header)
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    b"s": msgspec.msgpack.Decoder(Service),
    b"e": msgspec.msgpack.Decoder(EndpointSlice),
    b"n": msgspec.msgpack.Decoder(Node),
}


def path_in(state_dir: str, source: str) -> str:
    """Where the snapshot of `source` is kept."""
    return os.path.join(state_dir, f"{source}.snapshot")


# ---- Saving ----


def save(path: str, snapshot: Snapshot, *, saved: float) -> None:
    """Write `snapshot`, which was good at `saved` (seconds since the epoch). Raises SourceError."""
    directory = os.path.dirname(path) or "."
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        # Always the same name, so that whoever is killed here leaves one file behind, which the next one takes over.
        with open(f"{path}.new", "wb", opener=_private) as file:
            for chunk in _encoded(snapshot, saved):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
        _sync_directory(directory)
    except OSError as error:
        raise SourceError(f"the snapshot {path} cannot be written: {error.strerror}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encoded(snapshot: Snapshot, saved: float) -> Iterator[bytes]:
    """The file, piece by piece."""
    slices = sum(map(len, snapshot.slices.values()))
    header = _ENCODER.encode(_Header(_layout(), snapshot.node.name, saved, len(snapshot.services) + slices + 1))
    digest = hashlib.sha256()
    for chunk in itertools.chain((_MAGIC, _LENGTH.pack(len(header)), header), _compressed(_objects(snapshot))):
        digest.update(chunk)
        yield chunk
    yield digest.digest()


def _objects(snapshot: Snapshot) -> Iterator[tuple[bytes, Service | EndpointSlice | Node]]:
    # The kernel's addresses are the kernel's to say.
    yield b"n", msgspec.structs.replace(snapshot.node, addresses=())
    for service in snapshot.services.values():
        yield b"s", service
    for slices in snapshot.slices.values():
        for each in slices:
            yield b"e", each


def _compressed(objects: Iterable[tuple[bytes, object]]) -> Iterator[bytes]:
    compressor, plain = zlib.compressobj(_LEVEL), bytearray()
    for kind, each in objects:
        data = _ENCODER.encode(each)
        plain += _LENGTH.pack(len(data)) + kind + data
        if len(plain) >= _CHUNK:
            yield compressor.compress(plain)
            plain.clear()
    yield compressor.compress(plain)
    yield compressor.flush()


# ---- Loading ----


def load(path: str, node: str) -> Saved | None:
    """What was saved of the node `node`; None if nothing was. Raises SourceError if what is there is of no use."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"the snapshot {path} cannot be read: {error.strerror}") from error
    try:
        header, body = _opened(data)
        if header.layout != _layout():
            raise ValueError(_OTHER_VERSION)
        if header.node != node:
            raise ValueError(f"it is of node {header.node}, and this is {node}")
        return Saved(header.saved, tuple(_Sharing().events(_frames(body, header.objects))))
    except (msgspec.DecodeError, struct.error, zlib.error, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"it is damaged: {error}"
        raise SourceError(f"the snapshot {path} is not used: {reason}") from error


def _opened(data: bytes) -> tuple[_Header, memoryview]:
    """The header, and the compressed objects. Raises ValueError and others for what is damaged."""
    if not data.startswith(_MAGIC):
        kept = _MAGIC.rpartition(b" ")[0]
        raise ValueError(_OTHER_VERSION if data.startswith(kept) else "it is no snapshot, or damaged")
    view = memoryview(data)
    if len(data) < len(_MAGIC) + _DIGEST or hashlib.sha256(view[:-_DIGEST]).digest() != view[-_DIGEST:]:
        raise ValueError("it is damaged or cut off")
    (length,) = _LENGTH.unpack_from(data, len(_MAGIC))
    start = len(_MAGIC) + _LENGTH.size
    return _HEADER.decode(view[start : start + length]), view[start + length : -_DIGEST]


def _frames(body: memoryview, count: int) -> Iterator[tuple[bytes, bytes]]:
    """The kind and bytes of each of the `count` objects; never all of them at once."""
    decompressor, plain, at, found = zlib.decompressobj(), bytearray(), 0, 0
    for start in range(0, len(body), _CHUNK):
        del plain[:at]
        at = 0
        plain += decompressor.decompress(body[start : start + _CHUNK])
        while len(plain) - at > _LENGTH.size:
            (length,) = _LENGTH.unpack_from(plain, at)
            begin = at + _LENGTH.size + 1
            if len(plain) < begin + length:
                break
            yield bytes(plain[begin - 1 : begin]), bytes(plain[begin : begin + length])
            at, found = begin + length, found + 1
    if at != len(plain) or not decompressor.eof or found != count:
        raise ValueError("it is damaged: not all of it is there")


class _Sharing:
    """One object for the many equal ones that a cluster repeats, as `source.parse` has it."""

    def __init__(self) -> None:
        self._one: dict[Any, Any] = {}

    def events(self, frames: Iterable[tuple[bytes, bytes]]) -> Iterator[Event]:
        for kind, data in frames:
            if kind not in _DECODERS:
                raise ValueError("it is damaged: it has an object of a kind that there is not")
            match _DECODERS[kind].decode(data):
                case Service() as service:
                    yield PutService(msgspec.structs.replace(service, name=self._name(service.name)))
                case EndpointSlice() as found:
                    yield PutSlice(self._slice(found))
                case Node() as node:
                    if node.known:
                        yield PutNode(node)

    def _slice(self, found: EndpointSlice) -> EndpointSlice:
        one = self._one.setdefault
        endpoints = tuple(
            [
                Endpoint(
                    each.address, each.ready, each.serving, each.terminating, one(each.node, each.node),
                    one(each.zone_hints, each.zone_hints), one(each.node_hints, each.node_hints),
                )
                for each in found.endpoints
            ]
        )  # fmt: skip
        name, owner = self._name(found.name), self._name(found.service)
        return EndpointSlice(name, owner, found.family, one(found.ports, found.ports), endpoints)

    def _name(self, name: ServiceName) -> ServiceName:
        namespace = self._one.setdefault(name.namespace, name.namespace)
        return ServiceName(namespace, name.name)


def kubernetes_endpoints(events: Iterable[Event]) -> tuple[tuple[Address, int], ...]:
    """Where API servers listen, by the slices of the Service `default/kubernetes`: how to reach one when its Service
    is not served yet. Ready ones first."""
    found: dict[tuple[Address, int], bool] = {}
    for event in events:
        if isinstance(event, PutSlice) and event.slice.service == API_SERVER:
            ports = [each.port for each in event.slice.ports if each.name == "https"]
            for endpoint in event.slice.endpoints:
                found.update({(endpoint.address, port): endpoint.ready for port in ports})
    return tuple(sorted(found, key=lambda each: (not found[each], each)))


# ---- Layout ----


@cache
def _layout() -> bytes:
    """A hash of all that decides how objects are encoded: the Structs' fields with their types, the enums' values."""
    seen: dict[str, str] = {}
    for each in (Service, EndpointSlice, Node):
        _describe(each, seen)
    return hashlib.sha256(repr(sorted(seen.items())).encode()).digest()[:16]


def _describe(type_: Any, seen: dict[str, str]) -> None:
    """Add what `type_` and all types in it look like to `seen`."""
    for argument in typing.get_args(type_):
        _describe(argument, seen)
    if not isinstance(type_, type) or type_.__name__ in seen:
        return
    if issubclass(type_, msgspec.Struct):
        fields = msgspec.structs.fields(type_)
        seen[type_.__name__] = repr([(field.encode_name, str(field.type)) for field in fields])
        for field in fields:
            _describe(field.type, seen)
    elif issubclass(type_, enum.Enum):
        seen[type_.__name__] = repr([(each.name, each.value) for each in type_])
    elif issubclass(type_, tuple) and hasattr(type_, "_fields"):
        seen[type_.__name__] = repr(type_.__annotations__)
