"""Tables of consistent hashing: who is where, how evenly, and what moves when somebody comes or goes."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf.maglev import (
    MODULE,
    MOST_BACKENDS,
    SIZES,
    Fill,
    built,
    filled_slowly,
    missing,
    positions,
    size_code,
)
from ebpflb.routes import Backend

HEADER = Path(__file__).resolve().parents[2] / "bpf/maglev.h"
FOR_A_HUNDRED = size_code(100, SIZES[8])
MOVED, SHARES = 0.015, 1.02
"""The promises: what moves of the others' places when one of a hundred leaves, and the greatest share ÷ the least."""


def pods(count: int, net: str = "10.244.{}.{}", port: int = 8080) -> list[Backend]:
    """Backends as a cluster has them: neighbouring addresses, one port."""
    return [Backend(net.format(number // 250, number % 250 + 1), port) for number in range(count)]


def holders(backends: Sequence[Backend], code: int, fill: Fill | None = None) -> list[Backend]:
    """Who is at each place."""
    return [backends[position] for position in memoryview(positions(backends, code, fill)).cast("H")]


def moved(before: Sequence[Backend], after: Sequence[Backend], gone: Backend) -> float:
    """The part of the others' places that have another holder since `gone` has gone."""
    others = [(old, new) for old, new in zip(before, after, strict=True) if old != gone]
    return sum(old != new for old, new in others) / len(others)


def compiled() -> Fill:
    found = built()
    assert found is not None, "run make setup"
    return found


WAYS: dict[str, Callable[[], Fill]] = {"compiled": compiled, "in Python": lambda: filled_slowly}


@pytest.fixture(params=WAYS)
def fill(request: pytest.FixtureRequest) -> Fill:
    """Both ways in which a table is filled."""
    return WAYS[request.param]()


# ---- Sizes


def test_the_programs_know_the_same_sizes() -> None:
    cases = re.findall(r"case (\d+):\s*return (\d+);", HEADER.read_text())
    assert {int(code): int(size) for code, size in cases} == SIZES


@pytest.mark.parametrize("code", SIZES)
def test_sizes_are_the_greatest_primes_below_powers_of_two(code: int) -> None:
    def prime(number: int) -> bool:
        return all(number % divisor for divisor in range(2, int(number**0.5) + 1))

    power = 1 << SIZES[code].bit_length()
    assert next(number for number in range(power - 1, 0, -1) if prime(number)) == SIZES[code]


NO_CAP = SIZES[8]
WANTED = {
    "one backend": (1, NO_CAP, 1021),
    "ten": (10, NO_CAP, 1021),
    "eleven": (11, NO_CAP, 4093),
    "forty-one": (41, NO_CAP, 16381),
    "fifty": (50, NO_CAP, 16381),
    "eighty-two": (82, NO_CAP, 65521),
    "a hundred": (100, NO_CAP, 65521),
    "a thousand": (1000, NO_CAP, 131071),
    "more than any table is fair to": (100_000, NO_CAP, 131071),
    "none yet": (0, NO_CAP, 1021),
    "a cap that is a size": (1000, 16381, 16381),
    "a cap between two sizes": (1000, 20_000, 16381),
    "a cap that is no step": (1000, 8191, 8191),
    "a cap that does not matter": (10, 16381, 1021),
    "a cap below all sizes": (1000, 1, 1021),
}


@pytest.mark.parametrize(("backends", "cap", "size"), WANTED.values(), ids=WANTED)
def test_a_table_has_room_for_all_that_share_it(backends: int, cap: int, size: int) -> None:
    assert SIZES[size_code(backends, cap)] == size


@pytest.mark.parametrize("backends", [1, 2, 10, 49, 50, 81, 163, 327, 655, 1310])
def test_without_a_cap_there_are_a_hundred_positions_for_each(backends: int) -> None:
    assert SIZES[size_code(backends, NO_CAP)] >= 100 * backends


# ---- Who is where


DUAL = [*pods(7), *pods(5, "fd00:10:244::{}:{}", 443), Backend("192.0.2.7", 53)]
DIGESTS = {1: "c0dd1d375a8654bb", 5: "9497090b033a8553", 8: "4ee9bddde98a0d5e"}
"""A table is the same on all nodes, whichever version of this program they run: these never change."""


@pytest.mark.parametrize("code", DIGESTS)
def test_the_table_of_some_backends_is_this_one(code: int) -> None:
    assert hashlib.sha256(positions(DUAL, code)).hexdigest()[:16] == DIGESTS[code]


def test_what_is_not_compiled_is_the_same() -> None:
    assert positions(DUAL, 5, filled_slowly) == positions(DUAL, 5, compiled())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_backends_says_nothing(seed: int, fill: Fill) -> None:
    shuffled = random.Random(seed).sample(DUAL, len(DUAL))
    assert shuffled != DUAL
    assert holders(shuffled, 2, fill) == holders(DUAL, 2, fill)


def test_one_backend_has_all(fill: Fill) -> None:
    assert set(holders(pods(1), 1, fill)) == set(pods(1))


def test_an_address_with_another_port_is_another_backend(fill: Fill) -> None:
    both = [Backend("10.0.0.1", 80), Backend("10.0.0.1", 81)]
    assert set(Counter(holders(both, 1, fill)).values()) == {510, 511}


def test_a_backend_that_is_named_twice_has_two_shares(fill: Fill) -> None:
    twice = [*pods(3), pods(1)[0]]
    assert Counter(holders(twice, 1, fill))[pods(1)[0]] == pytest.approx(SIZES[1] / 2, abs=1)


def test_of_more_backends_than_places_the_same_ones_are_left_out_everywhere(fill: Fill) -> None:
    many = pods(3000)
    found = holders(many, 1, fill)
    assert len(set(found)) == SIZES[1]
    assert holders(many[::-1], 1, fill) == found


def test_backends_beyond_what_a_position_can_tell_have_no_place() -> None:
    many = [Backend(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 80) for number in range(MOST_BACKENDS + 2)]
    found = Counter(memoryview(positions(many, 8)).cast("H"))
    assert set(found) == set(range(MOST_BACKENDS))


WEIGHTS = {
    "even": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "even, and great": ((65535, 65535), (1, 1)),
    "twice as much": ((2, 1, 1), (2, 1, 1)),
    "of any ratio": ((3, 7, 5), (3, 7, 5)),
    "one has none": ((1, 0, 1), (1, 0, 1)),
    "nobody has any": ((0, 0), (1, 1)),
}


@pytest.mark.parametrize(("weights", "shares"), WEIGHTS.values(), ids=WEIGHTS)
def test_shares_are_in_proportion_to_weights(weights: tuple[int, ...], shares: tuple[int, ...], fill: Fill) -> None:
    backends = [Backend(f"10.0.0.{number}", 80, weight) for number, weight in enumerate(weights)]
    found = Counter(holders(backends, 1, fill))
    for backend, share in zip(backends, shares, strict=True):
        assert found[backend] == pytest.approx(SIZES[1] * share / sum(shares), abs=2)


# ---- How evenly, and what moves


@pytest.mark.parametrize("backends", [2, 10, 11, 49, 50, 100, 163, 1310])
def test_shares_hardly_differ(backends: int) -> None:
    found = Counter(holders(pods(backends), size_code(backends, NO_CAP)))
    assert len(found) == backends
    assert max(found.values()) / min(found.values()) <= SHARES


HUNDREDS = {
    "neighbours": pods(100),
    "on a hundred nodes": [Backend(f"10.{number}.3.17", 80) for number in range(100)],
    "IPv6": pods(100, "fd00:10:244:{}::{}"),
    "ports of one address": [Backend("192.0.2.1", 1024 + number) for number in range(100)],
    "from anywhere": [
        Backend(str(number // 7 % 223 + 1) + f".{number % 251}.9.1", 80) for number in range(0, 9900, 99)
    ],
}


@pytest.mark.parametrize("backends", HUNDREDS.values(), ids=HUNDREDS)
def test_when_one_of_a_hundred_leaves_few_of_the_others_move(backends: list[Backend]) -> None:
    assert len(set(backends)) == 100
    before = holders(backends, FOR_A_HUNDRED)
    for gone in backends[::9]:
        after = holders([each for each in backends if each != gone], FOR_A_HUNDRED)
        assert moved(before, after, gone) <= MOVED


@pytest.mark.parametrize("count", [50, 81, 82, 163, 164, 327])
def test_that_holds_for_other_numbers_too(count: int) -> None:
    backends = pods(count)
    code = size_code(count, NO_CAP)
    before = holders(backends, code)
    for gone in backends[:: count // 6]:
        assert moved(before, holders([each for each in backends if each != gone], code), gone) <= MOVED


def test_who_comes_back_finds_its_own_places() -> None:
    backends = pods(100)
    before = holders(backends, 5)
    assert holders(backends[1:], 5) != before
    assert holders([*backends[1:], backends[0]], 5) == before


def test_with_few_backends_nearly_all_stays() -> None:
    backends = pods(10)
    before = holders(backends, 1)
    for gone in backends:
        assert moved(before, holders([each for each in backends if each != gone], 1), gone) < 0.06


# ---- A checkout that has not been built


def test_what_has_not_been_built_is_not_found() -> None:
    assert built("ebpflb.dataplane.bpf._of_no_such_name") is None


def test_what_was_built_for_another_machine_is_as_if_it_was_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_another_machine.so").write_bytes(b"\x7fELF and no more")
    assert importlib.util.find_spec("of_another_machine")
    assert built("of_another_machine") is None


def test_a_library_without_our_function_is_not_ours() -> None:
    assert built("_ctypes_test") is None


def test_without_the_compiled_part_tables_are_the_same_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = positions(DUAL, 2)
    assert missing() == ""
    monkeypatch.setitem(sys.modules, MODULE, None)  # so that Python finds none
    built.cache_clear()
    try:
        assert positions(DUAL, 2) == whole
        assert "has not been built" in missing() and "\n" not in missing()
    finally:
        built.cache_clear()
