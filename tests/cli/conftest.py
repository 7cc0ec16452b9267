"""A place for each test that wants one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.place import Place, place_in
from tests.conftest import Collect


@pytest.fixture
def place(tmp_path: Path, on_failure: Callable[[str, Collect], None]) -> Iterator[Place]:
    """A network namespace, cgroup, pin directory and manifests of this test's own."""
    with place_in(tmp_path) as made:
        on_failure("logs", lambda: "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log"))))
        on_failure("traces", lambda: "\n".join(sorted(made.traces())))
        yield made
