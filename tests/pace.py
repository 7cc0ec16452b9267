"""How fast the machine is that tests run on.

Rules of this file: only waits for something to happen and for nothing to happen are stretched by it, never a figure
that is asserted.
"""

from __future__ import annotations

import os

PACE = float(os.environ.get("EBPFLB_PACE", "1"))
"""How many times slower than a plain one: an emulated machine says so (tests/vm/machine.py)."""
