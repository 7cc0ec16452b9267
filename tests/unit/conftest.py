"""What all unit tests share: none finds the package's logging as another has left it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set up the package's logger; the next test finds it as it was."""
    logger = logging.getLogger("ebpflb")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
