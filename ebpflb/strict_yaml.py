"""YAML as Kubernetes reads it: no timestamps, no numbers in base 60, and no key twice.

Rules of this file: bytes in, plain values out; what they mean is for others. (2001:10:20:30:40:50:51:52 is an address.)
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_DEEPEST = 500
_FAR_RIGHT = re.compile(rb"^[ \t?:-]{%d}" % (_DEEPEST // 2), re.MULTILINE)


class NotYaml(ValueError):
    """It cannot be parsed; the text says where and why, in one line."""


def documents(data: bytes) -> list[object]:
    """All documents but empty ones: a file that begins or ends with `---` has no more for it. Raises NotYaml, and
    RecursionError for what is nested too deeply."""
    try:
        content = text(data)
        if _may_be_deep(data):
            _refuse_deep(content)
        return [each for each in yaml.load_all(content, Loader=_Loader) if each is not None]
    except NotYaml:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise NotYaml(f"{where}not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise NotYaml("not YAML: " + " ".join(str(error).split())) from error


def text(data: bytes) -> str:
    """Raises NotYaml, with the line, for what is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotYaml(f"line {line}: not text in UTF-8") from error


def _may_be_deep(data: bytes) -> bool:
    """Quick, and never wrongly False: each level costs a bracket, or moves what is in it (at every second level at
    least) to the right."""
    return data.count(b"[") + data.count(b"{") > _DEEPEST or _FAR_RIGHT.search(data) is not None


def _refuse_deep(content: str) -> None:
    """The loader goes down a level for each, on a stack that nobody checks: the process would end."""
    depth = 0
    for event in yaml.parse(content, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                raise RecursionError
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Loader(yaml.CSafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f'key "{key.value}" already set in map'
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{each}" for each in ("int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)
