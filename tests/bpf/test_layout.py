"""Rows: what bpf/maps.h asserts, what the compiler laid out, and what the control plane packs are the same."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpflb.dataplane.bpf import map_calls
from ebpflb.dataplane.bpf.artifact import Artifact, Field, Layout
from ebpflb.dataplane.bpf.constants import CGROUP_HOOKS, TC_HOOKS, XDP_HOOKS, Sizes
from ebpflb.dataplane.bpf.layouts import KEY_VALUE, LAYOUT, SIZES, check_layouts

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

PROGRAMS_OWN = {"hops", "neighbours"}
"""Maps that the control plane neither reads nor writes."""

MAPS_H = (Path(__file__).resolve().parents[2] / "bpf" / "maps.h").read_text()


def structs(artifact: Artifact) -> Iterator[tuple[str, int, tuple[Field, ...]]]:
    """(name, size, members) of every struct in a row, nested ones too."""
    waiting: list[tuple[str, int, tuple[Field, ...]]] = [
        (layout.name, layout.size, layout.fields) for layout in artifact.layouts.values() if layout.fields
    ]
    while waiting:
        name, size, fields = waiting.pop()
        yield name, size, fields
        waiting += [(field.type, field.size, field.fields) for field in fields if field.fields]


def test_every_struct_has_the_size_that_maps_h_asserts(artifact: Artifact) -> None:
    asserted = dict(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", MAPS_H))
    found = {name: size for name, size, _ in structs(artifact)}
    assert found == {name: int(size) for name, size in asserted.items()}


def test_no_struct_has_padding_that_is_not_written_down(artifact: Artifact) -> None:
    for name, size, fields in structs(artifact):
        at = 0
        for field in fields:
            assert field.offset == at, f"{name}.{field.name}"
            at += field.bytes
        assert at == size, name


def test_every_map_of_maps_h_is_compiled_and_known_to_the_tables(artifact: Artifact) -> None:
    declared = re.findall(r"^BPF_(?:F_)?TABLE\([^,]+,[^,]+,[^,]+, (\w+),", MAPS_H, re.MULTILINE)
    assert sorted(artifact.maps) == sorted(declared) and set(KEY_VALUE) == set(declared) - PROGRAMS_OWN
    for name in KEY_VALUE:
        spec = artifact.maps[name]
        assert (spec.key.size, spec.value.size) == SIZES[name], name
        assert (spec.key.name, spec.value.name) == KEY_VALUE[name], name
    check_layouts(artifact.maps)


def test_version_of_the_layout_is_the_same_on_both_sides(artifact: Artifact) -> None:
    assert artifact.numbers["LAYOUT"] == LAYOUT


def test_every_program_of_ours_is_compiled(artifact: Artifact) -> None:
    assert sorted(artifact.programs) == sorted([*CGROUP_HOOKS, *TC_HOOKS, *XDP_HOOKS])
    for program in artifact.programs.values():
        assert program.relocations
        assert {relocation.map for relocation in program.relocations} <= set(artifact.maps)


def test_capacities_are_those_asked_for(artifact: Artifact) -> None:
    sizes = Sizes()
    for name in ("frontends", "backends", "slots", "flows", "sockets", "fragments", "sources", "ranges", "devices"):
        assert artifact.maps[name].max_entries == getattr(sizes, name)
    assert artifact.maps["names"].max_entries == sizes.services
    assert artifact.maps["counters"].max_entries == len(artifact.counters)
    assert artifact.counters[0] == "SOCKET_FORWARDED"


def test_a_field_is_found_by_name(artifact: Artifact) -> None:
    settings: Layout = artifact.maps["settings"].value
    assert settings.field("netns").offset == 0
    with pytest.raises(KeyError, match=r"settings\.nonsense"):
        settings.field("nonsense")


def test_kernel_agrees_with_the_artifact(artifact: Artifact) -> None:
    """A map made from its specification is what the specification says."""
    for spec in artifact.maps.values():
        fd = map_calls.map_create(spec.type, spec.key.size, spec.value.size, 16, spec.flags, "test")
        try:
            info = map_calls.map_info(fd)
            assert (info.type, info.key_size, info.value_size, info.flags, info.max_entries) == (
                spec.type,
                spec.key.size,
                spec.value.size,
                spec.flags,
                16,
            )
        finally:
            os.close(fd)
