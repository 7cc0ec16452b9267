"""How many examples a property is tried with: few each time that `pytest` runs, many where that is asked for.

EBPFLB_FUZZ is a number of packets (see tests/bpf/test_packet_fuzz.py); a thousandth of it is a number of examples here.
A test has a number of its own only if it is marked `fuzz`.
"""

from __future__ import annotations

import os

from hypothesis import settings

FEW = 8

settings.register_profile("few", max_examples=FEW, deadline=None)
settings.register_profile("many", max_examples=max(FEW, int(os.environ.get("EBPFLB_FUZZ", "0")) // 1000), deadline=None)
settings.load_profile("many" if "EBPFLB_FUZZ" in os.environ else "few")
