"""How many examples: as for the properties."""

from tests.property import conftest as _profiles  # noqa: F401  # whose import registers and loads them
