"""Whom xt_recent remembers: the lines of its lists under /proc."""

from __future__ import annotations

import pytest

from ebpflb.dataplane.iptables.flows import clients

LIST = """\
src=203.0.113.9 ttl: 63 last_seen: 4294967200 oldest_pkt: 2 4294960000, 4294967200
src=2001:0db8:0203:0000:0000:0000:0000:0009 ttl: 64 last_seen: 100 oldest_pkt: 1 100
"""


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (150, [("203.0.113.9", 246), ("2001:db8:203::9", 50)]),
        (904, [("203.0.113.9", 1000), ("2001:db8:203::9", 804)]),
        (905, [("2001:db8:203::9", 805)]),
        (1100, [("2001:db8:203::9", 1000)]),
        (1101, []),
    ],
)
def test_a_client_is_listed_until_its_time_is_over(now: int, found: list[tuple[str, int]]) -> None:
    """To the jiffy, also where 32 bits of them have begun anew."""
    assert list(clients(LIST, now, 1000)) == found


def test_what_is_no_client_is_left_out() -> None:
    assert list(clients("", 0, 1000)) == list(clients("\nsrc=\n", 0, 1000)) == []
