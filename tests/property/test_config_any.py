"""Whatever a configuration file holds, it is a configuration or refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ebpflb.config import file as config_file
from ebpflb.config.defaults import with_defaults
from ebpflb.config.document import EbpflbConfiguration, as_plain
from ebpflb.errors import UserError

WHOLE: dict[str, Any] = as_plain(with_defaults(EbpflbConfiguration()))
PATHS = [(key,) for key in WHOLE] + [
    (key, each) for key, part in WHOLE.items() if isinstance(part, dict) for each in part
]

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=8),
    st.sampled_from(["0s", "-5s", "off", "30", "auto", "10.0.0.0/8", "::", "primary", "json", "NodeCIDR"]),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=8), st.integers(), st.sampled_from(sorted(WHOLE)))
VALUES = st.recursive(
    SCALARS, lambda each: st.one_of(st.lists(each, max_size=3), st.dictionaries(KEYS, each, max_size=3)), max_leaves=6
)


def said(data: bytes) -> EbpflbConfiguration | None:
    try:
        return config_file.parse(data, "FILE").document
    except UserError as error:
        text = str(error)
        assert text.startswith("FILE: ") and "\n" not in text
        return None


@given(st.sampled_from(PATHS), VALUES)
def test_any_value_anywhere(path: tuple[str, ...], value: object) -> None:
    document = {**WHOLE}
    if len(path) == 2:
        document[path[0]] = {**WHOLE[path[0]], path[1]: value}
    else:
        document[path[0]] = value
    found = said(yaml.safe_dump(document).encode("utf-8", "surrogatepass"))
    if found is not None:
        assert said(config_file.written(as_plain(found)).encode()) == found


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_fields(fields: dict[Any, Any]) -> None:
    said(yaml.safe_dump({"kind": "EbpflbConfiguration", "apiVersion": "ebpflb/v1", **fields}).encode())


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    said(data)
    said(b"apiVersion: ebpflb/v1\nkind: EbpflbConfiguration\n" + data)


@pytest.mark.parametrize(
    "text",
    ["? {a: b}\n: c\n", "? [a]\n: c\n", "&a [*a]\n", "a: &a {b: *a}\n", "1: 2\n", "<<: {a: 1}\n", '"a\\nb": 1\n'],
)
def test_keys_that_are_none(text: str) -> None:
    said(f"kind: EbpflbConfiguration\napiVersion: ebpflb/v1\n{text}".encode())
