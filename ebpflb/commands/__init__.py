"""What the commands do, without how they are typed.

Rules of this package: each command is a function from a Config and Parts to a Result; it prints nothing, exits nothing
and raises only the errors of `errors`. `cli` turns options into Configs and Results into output.
"""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    """What a command says on stdout, and its exit status."""

    text: str = ""
    status: int = 0


OK = 0
REFUSED = 1
UNSUPPORTED = 3
CHANGES = 5
NOT_FORWARDED = 6
NOT_A_SERVICE = 7
