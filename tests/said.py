"""What a command of ours said, wherever it ran."""

from __future__ import annotations

import json
from typing import NamedTuple


class Said(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def items(self) -> list[dict[str, object]]:
        """Those of a document in JSON."""
        found: list[dict[str, object]] = json.loads(self.out)["items"]
        return found

    @property
    def one_line(self) -> str:
        """The error of a command that failed as one should."""
        assert self.status != 0 and self.out == "", self
        (line,) = self.err.splitlines()
        return line
