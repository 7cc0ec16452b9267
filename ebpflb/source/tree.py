"""Which manifest files below a directory are there, and which have changed: inotify, and the habits of those who write.

Rules of this file: names and times only, no file is opened here. What is reported as changed has been written whole:
closed, or moved into place. A file that somebody writes to is `being_written` until it is closed. A file that goes is
reported only after a moment's grace, for editors move the old one away before they make the new one. A switch of a
ConfigMap's `..data` link changes all files behind it in one step. The first path that leads to a directory counts, so
that links may form a circle.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import time
from typing import NamedTuple

from inotify_simple import INotify, flags

from ebpflb.errors import SourceError, UserError
from ebpflb.model import Problem

# Seconds after which a file that somebody is at work on is looked at again.
_SOON = 0.002

# Seconds after which a directory that was gone is looked for again, where no event tells of its return.
_LATER = 0.5

SUFFIXES = (".yaml", ".yml", ".json")

_DIRECTORY = int(
    flags.CLOSE_WRITE | flags.MODIFY | flags.MOVED_TO | flags.MOVED_FROM | flags.CREATE | flags.DELETE
    | flags.ATTRIB | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
)  # fmt: skip
_LINKED_FILE = int(flags.CLOSE_WRITE | flags.MODIFY | flags.ATTRIB | flags.DELETE_SELF | flags.MOVE_SELF)
_PARENT = int(flags.CREATE | flags.MOVED_TO | flags.DELETE | flags.MOVED_FROM | flags.ONLYDIR)
_CAME = int(flags.CREATE | flags.MOVED_TO)
_WENT = int(flags.DELETE | flags.MOVED_FROM)
_SELF = int(flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT)

_LIMITS = {
    errno.ENOSPC: "this user may watch no more files: raise the sysctl fs.inotify.max_user_watches",
    errno.EMFILE: "this user may make no more inotify instances: raise the sysctl fs.inotify.max_user_instances",
}


def is_manifest(name: str) -> bool:
    """Whether a file of this name is read: not hidden, not an editor's, one of SUFFIXES."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "#"))


def printable(text: str) -> str:
    """Fit for one line: a file's name and what it says may be any bytes."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


class Changes(NamedTuple):
    """Paths relative to the directory."""

    changed: set[str]
    gone: set[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.gone)


Signature = tuple[int, int, int, int, int]


class Tree:
    """The manifest files below `root`, which must be a directory that can be listed. Raises UserError."""

    def __init__(self, root: str, *, grace: float) -> None:
        self.root = os.path.abspath(root)
        self.being_written: set[str] = set()
        self.unreadable: set[str] = set()
        self.problems: dict[str, Problem] = {}
        self._grace = grace
        self._files: dict[str, Signature] = {}
        self._directories: dict[int, str] = {}
        self._linked: dict[int, set[str]] = {}
        self.going: dict[str, float] = {}  # those that were there a moment ago, and until when they may return
        self._again: set[str] = set()
        self._parent = -1
        self._check()
        try:
            self._inotify = INotify(nonblocking=True)
            self._watch(self.root, _DIRECTORY)
        except OSError as error:
            raise UserError(f"cannot watch {self.root}: {_LIMITS.get(error.errno or 0, error.strerror)}") from error
        self._timer = _Timer()
        self._epoll = select.epoll()
        self._epoll.register(self._inotify.fileno(), select.EPOLLIN)
        self._epoll.register(self._timer.fd, select.EPOLLIN)

    def _check(self) -> None:
        try:
            with os.scandir(self.root):
                pass
        except FileNotFoundError:
            raise UserError(f"{self.root} does not exist: create the directory, or name another one") from None
        except NotADirectoryError:
            raise UserError(f"{self.root} is not a directory: name the one that holds the manifests") from None
        except OSError as error:
            raise UserError(f"{self.root} cannot be read: {error.strerror}") from error

    def fileno(self) -> int:
        """Readable when `poll` has something to say."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Release descriptors."""
        self._epoll.close()
        self._timer.close()
        self._inotify.close()

    def scan(self) -> Changes:
        """Look at everything. Watches are set before files are looked at, so that nothing happens unseen in between.
        Raises SourceError if the directory is gone."""
        changes = Changes(set(), set())
        self._scan(changes)
        if "" in self.problems:
            raise SourceError(self.problems[""].reason)
        return changes

    def poll(self) -> Changes:
        """What has changed since the last call. Never blocks."""
        changes = Changes(self._again, set())
        self._again = set()
        rescan = "" in self.problems
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                rescan = True
            elif event.mask & flags.IGNORED:
                self._directories.pop(event.wd, None)
                self._linked.pop(event.wd, None)
            elif event.wd in self._linked:
                # What a link leads to was replaced, perhaps: then it is another file that must be watched.
                rescan |= bool(event.mask & (_SELF | flags.ATTRIB))
                for path in sorted(self._linked[event.wd]):
                    self._file(path, event.mask, changes)
            elif event.wd in self._directories:
                rescan |= self._entry(self._directories[event.wd], event.name, event.mask, changes)
            if event.wd == self._parent and event.name == os.path.basename(self.root):
                rescan = True
        if rescan:
            self._scan(changes)
        self._expire(changes)
        changes.changed.difference_update(self.being_written)  # their closing is another event
        return changes

    def again(self, paths: set[str]) -> None:
        """Report these as changed by the next `poll`, and soon."""
        self._again |= paths
        if paths:
            self.wake()

    def wake(self) -> None:
        """Become readable soon."""
        self._timer.arm(_SOON)

    @property
    def settled(self) -> bool:
        """Whether nobody is known to be at work on any file."""
        return not self.being_written and not self._again

    # ---- Events ----

    def _entry(self, directory: str, name: str, mask: int, changes: Changes) -> bool:
        """Take in what happened to `name` in `directory`; whether everything must be looked at."""
        if mask & _SELF:
            return True
        path = os.path.join(directory, name)
        hidden = name.startswith(".")
        if mask & flags.ISDIR:
            # Permissions matter where they were wanting.
            return (bool(mask & (_CAME | _WENT)) and not hidden) or path in self.problems
        if mask & _CAME and self._is_link(path):
            return True
        if mask & _WENT and (hidden or path in self._directories.values()):
            # A link that many files hang on may be gone; of a hidden name it is not known any more what it was.
            return bool(self._linked) or not hidden
        if not is_manifest(name):
            return False
        self._file(path, mask, changes)
        return False

    def _file(self, path: str, mask: int, changes: Changes) -> None:
        if mask & _WENT:
            self._leave(path, changes)
        elif mask & (flags.CLOSE_WRITE | flags.MOVED_TO | _SELF):
            self.being_written.discard(path)
            self._change(path, changes)
        elif mask & flags.MODIFY:
            self.being_written.add(path)
        elif (mask & flags.ATTRIB and path in self.unreadable) or (mask & flags.CREATE and self._is_filled(path)):
            self._change(path, changes)

    def _change(self, path: str, changes: Changes) -> None:
        found = self._signature(path)
        if found is None:
            self._leave(path, changes)
            return
        self.going.pop(path, None)
        self._files[path] = found
        changes.gone.discard(path)
        changes.changed.add(path)

    def _leave(self, path: str, changes: Changes) -> None:
        self.being_written.discard(path)
        changes.changed.discard(path)
        if path in self._files and path not in self.going:
            self.going[path] = time.monotonic() + self._grace
            self._timer.arm(self._grace)

    def _expire(self, changes: Changes) -> None:
        """Those whose grace is over, and which nobody is making anew."""
        self._timer.drain()
        now = time.monotonic()
        for path, until in list(self.going.items()):
            if self._signature(path) is not None:
                del self.going[path]  # somebody is making it, which ends with an event
            elif until <= now:
                del self.going[path]
                del self._files[path]
                self.unreadable.discard(path)
                changes.gone.add(path)
        if self.going:
            self._timer.arm(min(self.going.values()) - now)

    # ---- Looking ----

    def _scan(self, changes: Changes) -> None:
        self._watch_parent()
        self.problems.clear()
        before = {*self._directories, *self._linked}
        self._directories.clear()
        self._linked.clear()
        found: dict[str, Signature] = {}
        gone: OSError | None = None
        try:
            self._walk("", set(), found)
        except OSError as error:
            gone = error
        for wd in before - {*self._directories, *self._linked, self._parent}:
            with contextlib.suppress(OSError):  # the kernel has forgotten it already
                self._inotify.rm_watch(wd)
        if gone is not None:
            # Whoever deletes a directory deletes its files first: those are not gone on purpose.
            self.going.clear()
            words = f"cannot be read: {_LIMITS.get(gone.errno or 0, gone.strerror)}"
            words = "is gone" if isinstance(gone, FileNotFoundError) else words
            self.problems[""] = Problem(
                printable(self.root), f"the directory {words}; what it said before stays in force"
            )
            self._timer.arm(_LATER)
            return
        for path, signature in found.items():
            if self._files.get(path) != signature and path not in self.being_written:
                self._change(path, changes)
        unread = tuple(each + os.sep for each in self.problems)
        for path in self._files.keys() - found.keys():
            if not path.startswith(unread):
                self._leave(path, changes)

    def _walk(self, directory: str, seen: set[tuple[int, int]], found: dict[str, Signature]) -> None:
        """Watch `directory` and below, and put its files into `found`. OSError is about `directory` itself."""
        full = os.path.join(self.root, directory)
        status = os.stat(full)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        self._directories[self._watch(full, _DIRECTORY)] = directory
        with os.scandir(full) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            path = os.path.join(directory, entry.name)
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    self._walk(path, seen, found)
                elif is_manifest(entry.name) and (signature := self._signature(path)) is not None:
                    found[path] = signature
                    if entry.is_symlink():
                        wd = self._watch(os.path.join(self.root, path), _LINKED_FILE)
                        self._linked.setdefault(wd, set()).add(path)
            except FileNotFoundError:
                continue  # it went while we looked; there is an event for that
            except OSError as error:
                words = f"cannot be read: {_LIMITS.get(error.errno or 0, error.strerror)}"
                self.problems[path] = Problem(printable(path), words)

    def _watch(self, full: str, mask: int) -> int:
        return int(self._inotify.add_watch(full, mask))

    def _watch_parent(self) -> None:
        """To see the directory return after it was deleted or moved, or be switched if it is a link itself."""
        parent = os.path.dirname(self.root)
        if parent != self.root:
            with contextlib.suppress(OSError):  # one that we may not watch costs the notice of a return only
                self._parent = self._watch(parent, _PARENT)

    def _signature(self, path: str) -> Signature | None:
        """What changes whenever a file does; None if it is no regular file."""
        try:
            status = os.stat(os.path.join(self.root, path))
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _is_link(self, path: str) -> bool:
        return os.path.islink(os.path.join(self.root, path))

    def _is_filled(self, path: str) -> bool:
        """A link(2) makes a whole file with no other event than its creation; one that is opened begins empty."""
        found = self._signature(path)
        return found is not None and found[2] > 0


class _Timer:
    """A timerfd: a time to wake up at, as a descriptor. (The standard library has it from Python 3.13 on.)"""

    _CLOCK_MONOTONIC = 1

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = int(self._libc.timerfd_create(self._CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        if self.fd < 0:
            raise UserError(f"cannot make a timer: {os.strerror(ctypes.get_errno())}")

    def arm(self, seconds: float) -> None:
        """Become readable once, in `seconds`."""
        whole, rest = divmod(max(int(seconds * 1e9), 1), 10**9)
        self._libc.timerfd_settime(self.fd, 0, struct.pack("@4l", 0, 0, whole, rest), None)

    def drain(self) -> None:
        """Become unreadable."""
        with contextlib.suppress(BlockingIOError):  # it is unreadable already
            os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)
