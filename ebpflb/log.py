"""How the daemon logs: one line an event to stderr, as text or as JSON.

Rules of this file: formatting, and counting of what repeats. What is logged is data (a message and, beside it, the
fields in `extra`), so that the JSON form needs no parsing of the text. Whoever logs decides what is worth a line;
here a warning or error that says the same again and again becomes one line a minute with a number in it. Libraries do
not write to stderr: what they have to say arrives as an error of ours.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO, TypeAlias

import msgspec

from ebpflb.config import LogFormat, LogLevel

ROOT = "ebpflb"

_LEVELS = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}

# A kind of line comes at once, and then once in so many seconds.
_QUIET = 60.0
# From so many kinds of one message on, each with another object in it, the message is the kind.
_MOST_KINDS = 20

_Kind: TypeAlias = tuple[str, ...]


def _stamp(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _repeated(record: logging.LogRecord) -> int:
    """For how many lines more this one stands."""
    number = getattr(record, "repeated", 0)
    return number if isinstance(number, int) else 0


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO message`; a traceback follows on its own lines where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_stamp(record)} {record.levelname} {record.getMessage()}"
        if number := _repeated(record):
            line += f" (and {number} more like it)"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, the fields of `extra={"fields": {...}}`, and `repeated` where the
    line stands for others too."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            document.update(fields)
        if number := _repeated(record):
            document["repeated"] = number
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(document).decode()


class _Held:
    """A kind of line: when it was last let through, how often it came since, and the last of those."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.more = 0
        self.last: logging.LogRecord | None = None


class Repeats(logging.Filter):
    """Lets the first line of a kind through at once, and then one a minute, which says how many it stands for.

    Of one kind are warnings and errors of one logger with one message, numbers in it apart: "3 refused" and "5 refused"
    are, two names are not. Where one message comes with very many names, all the later ones are of one kind. Lines
    that tell of less are let through, unless `extra={"limited": True}` says that they may be many.

    As a Worker of the loop, whose clock it has, it also tells of repeats that nothing came after. Lines may come from
    any thread.
    """

    def __init__(self, handlers: Sequence[logging.Handler], clock: Callable[[], float]) -> None:
        """Stands before `handlers` until it is closed."""
        super().__init__()
        self._handlers = handlers
        self._clock = clock
        self._held: dict[_Kind, _Held] = {}
        self._kinds: dict[_Kind, int] = {}  # of each message
        self._lock = threading.Lock()
        for handler in handlers:
            handler.addFilter(self)

    def close(self) -> None:
        """Write what is held back, and hold nothing back any more."""
        self.tell_all()
        for handler in self._handlers:
            handler.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is to be written now; every handler gets the same answer."""
        if record.levelno < logging.WARNING and not getattr(record, "limited", False):
            return True
        passed = getattr(record, "passed", None)
        if passed is None:
            passed = record.passed = self._passes(record)
        return bool(passed)

    def _passes(self, record: logging.LogRecord) -> bool:
        with self._lock:
            now = self._clock()
            kind = self._kind(record)
            held = self._held.get(kind)
            if held is None:
                self._forget(now)
                self._held[kind] = _Held(now)
                self._kinds[kind[:2]] = self._kinds.get(kind[:2], 0) + 1
                return True
            if now < held.since + _QUIET:
                held.more += 1
                held.last = record
                return False
            record.repeated = held.more
            self._held[kind] = _Held(now)
            return True

    def due(self) -> float | None:
        """When what was held back is to be written."""
        with self._lock:
            return min((held.since + _QUIET for held in self._held.values() if held.more), default=None)

    def work(self) -> None:
        """Write what was held back, once one of it has been for long enough: all of it, for of a problem's coming and
        its going the later one should be read last."""
        due = self.due()
        if due is not None and self._clock() >= due:
            self.tell_all()

    def tell_all(self) -> None:
        """Write whatever is held back, in the order in which it came."""
        with self._lock:
            now = self._clock()
            lines = []
            for kind, held in self._held.items():
                if held.last is not None:
                    held.last.repeated = held.more - 1
                    lines.append(held.last)
                    self._held[kind] = _Held(now)
        for record in sorted(lines, key=lambda record: record.created):
            for handler in self._handlers:
                handler.acquire()
                try:
                    handler.emit(record)
                finally:
                    handler.release()

    def _kind(self, record: logging.LogRecord) -> _Kind:
        arguments = record.args if isinstance(record.args, tuple) else (record.args,)
        words = tuple("" if isinstance(each, int | float) else str(each) for each in arguments or ())
        kind = (record.name, str(record.msg), *words)
        if kind in self._held or self._kinds.get(kind[:2], 0) < _MOST_KINDS:
            return kind
        return kind[:2]

    def _forget(self, now: float) -> None:
        """Drop the kinds that have been quiet for long enough to be new again."""
        for kind in [kind for kind, held in self._held.items() if not held.more and now >= held.since + _QUIET]:
            del self._held[kind]
            self._kinds[kind[:2]] -= 1
            if not self._kinds[kind[:2]]:
                del self._kinds[kind[:2]]


def set_up(form: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send everything under the package's logger to `stream` (stderr), and nothing of others' anywhere. Called again,
    it replaces what it set up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form is LogFormat.JSON else TextFormatter())
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(_LEVELS[level])
    logger.propagate = False
    everybody = logging.getLogger()
    if not everybody.handlers:  # or Python would write what it finds no handler for
        everybody.addHandler(logging.NullHandler())
    logging.captureWarnings(True)


def hold_repeats(clock: Callable[[], float]) -> Repeats:
    """From now on count what repeats, in what `set_up` set up: for a process that stays, whose loop has this clock."""
    return Repeats(tuple(logging.getLogger(ROOT).handlers), clock)
