"""Errors, named by who must act.

Rules of this file: every exception that crosses a module boundary is one of these; its text is one line that says
what is wrong and what to do; nothing here prints or logs. Pure modules raise none of them in normal operation: a bad
object becomes a `model.Problem`.
"""

from __future__ import annotations


class EbpflbError(Exception):
    """Base of all; the CLI prints it as one line and exits with `exit_status`."""

    exit_status = 1


class UserError(EbpflbError):
    """The operator must act: a wrong option, path, permission, or a second daemon. Exit status 2."""

    exit_status = 2


class Unsupported(EbpflbError):
    """This node can never do it (kernel, missing package, missing mount). Exit status 3."""

    exit_status = 3


class SourceError(EbpflbError):
    """The source of truth cannot be read now; the last good content stays in force and the read is retried."""


class ApplyError(EbpflbError):
    """The kernel refused a write; retried with back-off.

    `table` is the map or table, `key` its row in words (or ""), `errno` the kernel's answer (0 if there was none).
    """

    def __init__(self, table: str, key: str, errno: int, message: str) -> None:
        super().__init__(message)
        self.table = table
        self.key = key
        self.errno = errno
