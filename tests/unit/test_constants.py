"""The constants that Python and C share: neither side has one that the other lacks."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf.constants import CGROUP_HOOKS, PREFIX, TC_HOOKS, Sizes, definitions, hook

CONFIG = (Path(__file__).resolve().parents[2] / "bpf" / "config.h").read_text()


def asked_for() -> list[str]:
    """What config.h refuses to compile without."""
    return re.findall(r'^#ifndef (\w+)\n#error "\1 is not defined"\n#endif$', CONFIG, re.MULTILINE)


def test_every_constant_of_config_h_is_given_and_every_given_one_is_in_config_h() -> None:
    given = definitions(Sizes(), set_retval=True)
    assert sorted(asked_for()) == sorted(given)


def test_config_h_holds_nothing_but_what_is_asked_for() -> None:
    assert CONFIG.count("#ifndef") == len(asked_for()) + 1  # the guard
    assert re.findall(r"#define (\w+)", CONFIG) == ["EBPFLB_CONFIG_H"]


def test_values_within_a_group_differ() -> None:
    given = definitions(Sizes(), set_retval=False)
    for group in ("VERDICT_", "MASQUERADE_", "SCOPE_", "SOURCE_", "POD_SOCKETS_", "BACKEND_"):
        values = [value for name, value in given.items() if name.startswith(group)]
        assert len(values) > 1
        assert len(set(values)) == len(values), group


def test_sizes_reach_the_c_code() -> None:
    given = definitions(Sizes(flows=12345), set_retval=False)
    assert given["MAX_FLOWS"] == 12345
    assert given["HAVE_SET_RETVAL"] == 0
    assert len([name for name in given if name.startswith("MAX_")]) == len(dataclasses.fields(Sizes))


@pytest.mark.parametrize("function", [*CGROUP_HOOKS, *TC_HOOKS])
def test_kernel_names_fit_and_are_recognised(function: str) -> None:
    name = hook(function).kernel_name
    assert len(name) <= 15
    assert name.startswith(PREFIX)


def test_kernel_names_and_attach_types_differ() -> None:
    hooks = [*CGROUP_HOOKS.values(), *TC_HOOKS.values()]
    assert len({each.kernel_name for each in hooks}) == len(hooks)
    assert len({each.attach_type for each in CGROUP_HOOKS.values()}) == len(CGROUP_HOOKS)


def test_a_function_of_no_hook_is_refused() -> None:
    with pytest.raises(KeyError):
        hook("helper")
