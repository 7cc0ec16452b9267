"""Any backends: the compiled fill and its words in Python agree, and the table says nothing but who they are."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ebpflb.dataplane.bpf.maglev import SIZES, built, filled_slowly, positions
from ebpflb.routes import Backend, unpacked

ADDRESSES = st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda address: unpacked(address.packed)))
BACKENDS = st.builds(Backend, ADDRESSES, st.integers(1, 65535), st.integers(0, 65535))
EVEN = st.builds(Backend, ADDRESSES, st.integers(1, 65535))
CODES = st.sampled_from([1, 2, 3])


def identity(backend: Backend) -> tuple[str, int]:
    return backend.address, backend.port


@given(st.lists(BACKENDS, min_size=1, max_size=40), CODES)
def test_both_ways_of_filling_agree(backends: list[Backend], code: int) -> None:
    """Invariant: to the byte, whatever the addresses, ports and weights; also for backends that are named twice."""
    compiled = built()
    assert compiled is not None, "run make setup"
    assert positions(backends, code, filled_slowly) == positions(backends, code, compiled)


@given(st.lists(BACKENDS, min_size=1, max_size=40, unique_by=identity), CODES, st.randoms(use_true_random=False))
def test_places_follow_from_who_the_backends_are(backends: list[Backend], code: int, dice: random.Random) -> None:
    """Invariant: in any order the same backend is at each place, and there is one at each."""
    shuffled = dice.sample(backends, len(backends))
    one, other = (memoryview(positions(each, code)).cast("H") for each in (backends, shuffled))
    assert len(one) == SIZES[code]
    assert [backends[position] for position in one] == [shuffled[position] for position in other]


@given(st.lists(EVEN, min_size=1, max_size=2000, unique_by=identity), CODES)
def test_shares_differ_by_one_place_at_most(backends: list[Backend], code: int) -> None:
    """Invariant: nobody has two places more than anybody else, also where not everybody has one."""
    found = Counter(memoryview(positions(backends, code)).cast("H"))
    shares = [found[number] for number in range(len(backends))]
    assert max(shares) - min(shares) <= 1
