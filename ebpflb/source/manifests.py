"""Kubernetes objects from a directory of YAML and JSON files, followed as the files change.

Rules of this file: what a file says is its last whole and parsable content. A broken file keeps what it said before, a
refused object keeps what it was before (as on an API server), a file that is gone takes its objects with it. An object
in several files counts once: in the first of them by path. Nothing here raises for what it read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterable

from ebpflb.errors import SourceError
from ebpflb.model import EndpointSlice, Node, Problem, Service
from ebpflb.source import (
    LIVE,
    Condition,
    DropNode,
    DropService,
    DropSlice,
    Event,
    PutNode,
    PutService,
    PutSlice,
    SourceState,
    Synced,
    documents,
)
from ebpflb.source.documents import Content, Entry, Key, Value
from ebpflb.source.tree import Changes, Tree, printable

# A file that is written again and again while we read it is left alone for a moment after this many tries.
_READS = 8

# Seconds after the last write for which one who has a file open is thought to be at work on it.
_PATIENCE = 1.0

# Seconds that the first list waits for those who are at work.
_PATIENCE_AT_FIRST = 3.0

_KEPT = "; what it said before stays in force"


class ManifestSource:
    """The objects in a directory. Raises UserError if there is none.

    `grace`: seconds that a file may be missing while somebody replaces it."""

    name = "manifests"

    def __init__(self, directory: str, *, grace: float = 0.05) -> None:
        self._tree = Tree(directory, grace=grace)
        self._complete_by: float | None = None
        self._synced = False
        self._files: dict[str, dict[Key, Entry]] = {}
        self._owners: dict[Key, list[str]] = {}
        self._given: dict[Key, Value] = {}
        self._wrong: dict[str, tuple[Problem, ...]] = {}
        self._repeated: dict[Key, tuple[Problem, ...]] = {}
        self._problems: tuple[Problem, ...] | None = None

    def fileno(self) -> int:
        """Readable when `read` has something to say."""
        return self._tree.fileno()

    def close(self) -> None:
        """Release descriptors."""
        self._tree.close()

    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with the files now, by path."""
        if self._problems is None:
            found = [*self._tree.problems.values()]
            for group in (self._wrong, self._repeated):
                for problems in group.values():
                    found.extend(problems)
            self._problems = tuple(sorted(found))
        return self._problems

    def condition(self) -> Condition:
        """Live as soon as the first list is complete."""
        return LIVE if self._synced else Condition(SourceState.STARTING)

    def read(self) -> list[Event]:
        """All that is new, of whole files only; never blocks for what others write."""
        if self._complete_by is None:
            events = self._apply(self._read_files(self._tree.scan()))
            self._complete_by = time.monotonic() + _PATIENCE_AT_FIRST
        else:
            events = self._apply(self._read_files(self._tree.poll()))
        if not self._synced:
            # What is being written is a part of the first list: without it, it might be taken for gone.
            self._synced = self._tree.settled or time.monotonic() > self._complete_by
            if self._synced:
                events.append(Synced(self.name))
            else:
                self._tree.wake()
        return events

    # ---- Files ----

    def _read_files(self, changes: Changes) -> dict[str, bytes | OSError | None]:
        """The content of each file that changed: None if it is gone, OSError if it cannot be read. A file that was
        written to while it was read is read again, now or a moment later."""
        found: dict[str, bytes | OSError | None] = {}
        busy: set[str] = set()
        for _ in range(_READS):
            for path in changes.changed:
                found.pop(path, None)
                try:
                    data = _whole(os.path.join(self._tree.root, path))
                except FileNotFoundError:
                    continue  # an event tells of it
                except OSError as error:
                    self._tree.unreadable.add(path)
                    found[path] = error
                    continue
                self._tree.unreadable.discard(path)
                if data is None:
                    busy.add(path)
                else:
                    found[path] = data
            found.update(dict.fromkeys(changes.gone))
            changes = self._tree.poll()
            if not changes:
                break
        found.update(dict.fromkeys(changes.gone))
        self._tree.again(busy | changes.changed)
        unsure = self._tree.being_written | changes.changed
        return {path: data for path, data in found.items() if data is None or path not in unsure}

    def _apply(self, files: dict[str, bytes | OSError | None]) -> list[Event]:
        """Take in new contents, all in one step."""
        self._problems = None
        touched: dict[Key, None] = {}
        for path in sorted(files):
            data = files[path]
            if data is None:
                self._wrong.pop(path, None)
                touched.update(dict.fromkeys(self._own(path, {})))
            elif isinstance(data, OSError):
                self._keep(path, f"cannot be read: {data.strerror}")
            else:
                try:
                    content = documents.read(data, is_json=path.endswith(".json"))
                except SourceError as error:
                    self._keep(path, str(error))
                else:
                    touched.update(dict.fromkeys(self._own(path, self._judge(path, content))))
        return self._events(touched)

    def _keep(self, path: str, reason: str) -> None:
        """A file that says nothing now: leave in force what it said."""
        self._wrong[path] = (Problem(printable(path), printable(reason) + (_KEPT if self._files.get(path) else "")),)

    def _judge(self, path: str, content: Content) -> dict[Key, Entry]:
        """The entries of a file, with those of before in place of refused ones; what is wrong is noted."""
        entries, before = content.entries, self._files.get(path, {})
        kept = {
            remark.key: before[remark.key]
            for remark in content.remarks
            if remark.key is not None and remark.key in before and remark.key not in entries
        }
        problems = tuple(
            Problem(
                f"{printable(path)} {remark.where}", printable(remark.reason) + (_KEPT if remark.key in kept else "")
            )
            for remark in content.remarks
        )
        if problems:
            self._wrong[path] = problems
        else:
            self._wrong.pop(path, None)
        return {**entries, **kept} if kept else entries

    def _own(self, path: str, entries: dict[Key, Entry]) -> Iterable[Key]:
        """Let `path` hold these entries; which keys may have changed."""
        before = self._files.pop(path, {})
        if entries:
            self._files[path] = entries
        for key in before.keys() - entries.keys():
            owners = self._owners[key]
            owners.remove(path)
            if not owners:
                del self._owners[key]
        for key in entries.keys() - before.keys():
            owners = self._owners.setdefault(key, [])
            owners.append(path)
            owners.sort()
        return (*before, *entries)

    # ---- Objects ----

    def _events(self, touched: Iterable[Key]) -> list[Event]:
        """What has changed about these objects, now that all files are taken in."""
        events: list[Event] = []
        for key in touched:
            owners = self._owners.get(key, [])
            self._note_repeated(key, owners)
            value = self._files[owners[0]][key].value if owners else None
            before = self._given.get(key)
            if value == before:
                continue
            if value is None:
                del self._given[key]
                events.append(_DROP[key.kind](key))
                if key.kind == "Node":
                    # DropNode names no node: say again what is known of the others.
                    events += [PutNode(each) for each in self._given.values() if isinstance(each, Node)]
            else:
                self._given[key] = value
                events.append(_put(value))
        return events

    def _note_repeated(self, key: Key, owners: list[str]) -> None:
        # A file that is renamed is in both places for a moment.
        owners = [path for path in owners if path not in self._tree.going]
        if len(owners) < 2:
            self._repeated.pop(key, None)
            return
        first = f"{printable(owners[0])} {self._files[owners[0]][key].where}"
        self._repeated[key] = tuple(
            Problem(
                f"{printable(path)} {self._files[path][key].where}",
                f"{key} is also in {first}, which counts: remove one of them",
            )
            for path in owners[1:]
        )


def _whole(full: str) -> bytes | None:
    """A file's content; None if somebody is at work on it. Raises OSError."""
    with open(full, "rb") as file:
        # Before: so that waiting for a writer costs no reading. After: so that none came meanwhile.
        if _is_at_work(file.fileno()):
            return None
        data = file.read()
        return None if _is_at_work(file.fileno()) else data


def _is_at_work(descriptor: int) -> bool:
    return _has_writer(descriptor) and time.time() - os.fstat(descriptor).st_mtime < _PATIENCE


def _has_writer(descriptor: int) -> bool:
    """Whether somebody has this file open for writing. The kernel grants a lease on reading only while nobody has; and
    a writer's descriptor counts until after the event of its closing, which the caller therefore sees."""
    try:
        # Whoever opens the file before the lease is returned makes the kernel signal it: not with the deadly SIGIO.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN  # else it cannot be known here (another's file, a network's)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


_DROP: dict[str, Callable[[Key], Event]] = {
    "Service": lambda key: DropService(key.name),
    "EndpointSlice": lambda key: DropSlice(key.name),
    "Node": lambda key: DropNode(),
}


def _put(value: Service | EndpointSlice | Node) -> Event:
    if isinstance(value, Service):
        return PutService(value)
    return PutSlice(value) if isinstance(value, EndpointSlice) else PutNode(value)
