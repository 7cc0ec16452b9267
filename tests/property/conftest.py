"""How many examples a property is tried with: few each time that `pytest` runs, many where that is asked for.

EBPFLB_FUZZ is a number of packets (see tests/bpf/test_packet_fuzz.py); a thousandth of it is a number of examples here.
A test has a number of its own only if it is marked `fuzz`.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FEW = 8

# How fast the machine is, and how large what is drawn happens to be, is no matter of a property.
_NO_MATTER = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

settings.register_profile("few", max_examples=FEW, deadline=None, suppress_health_check=_NO_MATTER)
settings.register_profile(
    "many", settings.get_profile("few"), max_examples=max(FEW, int(os.environ.get("EBPFLB_FUZZ", "0")) // 1000)
)
settings.load_profile("many" if "EBPFLB_FUZZ" in os.environ else "few")
