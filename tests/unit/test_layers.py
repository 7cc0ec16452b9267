"""Who may import whom: the layer rule of the design, read off the source by AST.

Rules of this file: every module of the package falls under exactly one row of LAYERS (the most specific prefix wins),
so that a new module is placed on purpose; imports under `if TYPE_CHECKING` and inside functions count like any other.
A row says which of our modules may be imported, and whether the module is pure. What only named files may import is in
CONFINED.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Layer:
    """The modules `name` and `name.*` may import these of ours (each with all that is under it), and themselves."""

    name: str
    ours: tuple[str, ...]
    pure: bool = False


_WORLD = ("model", "routes", "errors")
_SEAMS = (*_WORLD, "=source", "=dataplane")
_ROWS = (*_WORLD, "diff", "dataplane.bpf.constants")
_IPTABLES = ("model", "routes", "netfilter.ruleset")

# Names are relative to `ebpflb`; "*" is everything, `=source` a package's own file without what is under it: a seam.
LAYERS = (
    Layer("model", (), pure=True),
    Layer("errors", (), pure=True),
    Layer("rtnetlink", ()),
    Layer("strict_yaml", ()),
    Layer("routes", ("model",), pure=True),
    Layer("topology", ("model", "routes"), pure=True),
    Layer("facts", ("model", "routes"), pure=True),
    Layer("annotations", ("model", "routes", "facts"), pure=True),
    Layer("claims", ("model", "routes", "topology", "facts", "annotations"), pure=True),
    Layer("policy", ("model", "routes", "topology", "facts", "claims"), pure=True),
    Layer("decide", ("model", "routes"), pure=True),
    Layer("diff", ("model", "routes"), pure=True),
    Layer("source", ("model", "errors", "=source")),
    Layer("source.documents", ("model", "errors", "strict_yaml", "source.parse", "source.validate", "source.wire")),
    Layer("source.parse", ("model", "source.wire"), pure=True),
    Layer("source.wire", ("model",), pure=True),
    Layer("source.validate", ("model", "source.wire", "source.parse"), pure=True),
    Layer("source.store", ("model", "=source"), pure=True),
    Layer("source.local", ("model", "errors", "=source", "rtnetlink")),
    Layer("source.manifests", ("model", "errors", "source")),
    Layer(
        "source.kube", ("model", "errors", "=source", "source.parse", "source.validate", "source.wire", "source.kube")
    ),
    Layer("source.kube.access", ("errors", "config", "source.kube.proxies")),
    Layer("source.kube.event_objects", ("model",), pure=True),
    Layer("source.kube.events", ("model", "errors", "=source.kube", "source.kube.event_objects")),
    Layer("source.kube.decode", ("model", "errors", "=source", "source.parse", "source.wire"), pure=True),
    Layer("dataplane", ("model", "routes")),
    Layer("dataplane.limits", (), pure=True),
    Layer("dataplane.items", ("model", "routes"), pure=True),
    Layer("ctnetlink", ("model", "rtnetlink")),
    Layer("conntrack", ("model", "routes", "=dataplane", "rtnetlink", "ctnetlink")),
    Layer(
        "dataplane.bpf",
        (*_WORLD, "rtnetlink", "ctnetlink", "diff", "=dataplane", "dataplane.bpf", "dataplane.items"),
    ),
    Layer("dataplane.bpf.syscall", ()),
    Layer("dataplane.bpf.map_calls", ("dataplane.bpf.syscall",)),
    Layer("dataplane.bpf.program_calls", ("dataplane.bpf.syscall",)),
    Layer("dataplane.bpf.ids", ("model", "routes"), pure=True),
    Layer("dataplane.bpf.constants", ("model", "routes"), pure=True),
    Layer("dataplane.bpf.edges", ("model", "routes", "errors", "rtnetlink", "dataplane.bpf.constants")),
    Layer("dataplane.bpf.xdp_choice", ("rtnetlink", "dataplane.bpf.edges")),
    Layer("dataplane.bpf.xdp_features", ("rtnetlink",)),
    Layer("dataplane.bpf.xdp_links", ("rtnetlink", "dataplane.bpf.constants", "dataplane.bpf.program_calls")),
    Layer("dataplane.bpf.flatten", (), pure=True),
    Layer(
        "dataplane.bpf.ledger",
        (
            *_ROWS,
            "dataplane.bpf.holdings",
            "dataplane.bpf.ids",
            "dataplane.bpf.layouts",
            "dataplane.bpf.tables",
            "dataplane.bpf.reading",
            "dataplane.bpf.records",
            "dataplane.bpf.set_rows",
            "dataplane.bpf.table_parts",
        ),
        pure=True,
    ),
    Layer(
        "dataplane.bpf.holdings",
        (
            *_ROWS,
            "dataplane.bpf.ids",
            "dataplane.bpf.layouts",
            "dataplane.bpf.tables",
            "dataplane.bpf.records",
            "dataplane.bpf.set_rows",
            "dataplane.bpf.table_parts",
        ),
        pure=True,
    ),
    Layer("dataplane.bpf.set_rows", ("dataplane.bpf.ids", "dataplane.bpf.records"), pure=True),
    Layer(
        "dataplane.bpf.table_parts",
        ("routes", "dataplane.bpf.layouts", "dataplane.bpf.maglev", "dataplane.bpf.records"),
        pure=True,
    ),
    Layer("dataplane.bpf.known", ("dataplane.bpf.layouts",), pure=True),
    Layer("dataplane.bpf.owned", ("model", "dataplane.bpf.layouts", "dataplane.bpf.tables"), pure=True),
    Layer("dataplane.bpf.affinity_rows", ("dataplane.bpf.layouts", "dataplane.bpf.maps")),
    Layer(
        "dataplane.bpf.remembered",
        (*_ROWS, "dataplane.bpf.layouts", "dataplane.bpf.tables", "dataplane.items"),
        pure=True,
    ),
    Layer("dataplane.bpf.looking", ("dataplane.bpf.layouts", "dataplane.bpf.maps", "dataplane.bpf.reading")),
    Layer(
        "dataplane.bpf.image",
        (
            *_ROWS,
            "dataplane.bpf.layouts",
            "dataplane.bpf.ledger",
            "dataplane.bpf.reading",
            "dataplane.bpf.tables",
        ),
        pure=True,
    ),
    Layer("dataplane.bpf.layouts", _ROWS, pure=True),
    Layer("dataplane.bpf.tables", (*_ROWS, "dataplane.bpf.layouts"), pure=True),
    Layer("dataplane.bpf.maglev", (*_ROWS, "dataplane.bpf.tables")),  # pure but for loading its C
    Layer("dataplane.bpf.locality", (*_ROWS, "dataplane.bpf.layouts", "dataplane.bpf.tables"), pure=True),
    Layer(
        "dataplane.bpf.reading",
        (*_ROWS, "dataplane.bpf.layouts", "dataplane.bpf.tables", "dataplane.bpf.locality", "dataplane.bpf.owned"),
        pure=True,
    ),
    Layer("dataplane.bpf.records", (*_ROWS, "dataplane.bpf.tables"), pure=True),
    Layer(
        "dataplane.bpf.retiring",
        (
            *_WORLD,
            "dataplane.bpf.layouts",
            "dataplane.bpf.locality",
            "dataplane.bpf.maps",
            "dataplane.bpf.remembered",
        ),
    ),
    Layer(
        "dataplane.bpf.succeeding",
        (*_WORLD, "ctnetlink", "dataplane.bpf.layouts", "dataplane.bpf.maps", "dataplane.bpf.remembered"),
    ),
    Layer("netfilter", ("model", "errors", "rtnetlink", "netfilter")),
    Layer("netfilter.ruleset", (), pure=True),
    Layer(
        "dataplane.iptables",
        (*_WORLD, "rtnetlink", "conntrack", "netfilter", "=dataplane", "dataplane.iptables", "dataplane.items"),
    ),
    Layer("dataplane.iptables.names", _IPTABLES, pure=True),
    Layer("dataplane.iptables.layout", _IPTABLES, pure=True),
    Layer(
        "dataplane.iptables.frame",
        (*_IPTABLES, "dataplane.iptables.names", "dataplane.iptables.layout"),
        pure=True,
    ),
    Layer(
        "dataplane.iptables.rules",
        (*_IPTABLES, "dataplane.iptables.names", "dataplane.iptables.layout", "dataplane.iptables.frame"),
        pure=True,
    ),
    Layer(
        "dataplane.iptables.reading",
        (*_IPTABLES, "dataplane.iptables.names"),
        pure=True,
    ),
    Layer(
        "dataplane.ipvs",
        (*_WORLD, "rtnetlink", "conntrack", "netfilter", "=dataplane", "dataplane.ipvs", "dataplane.items"),
    ),
    Layer("dataplane.ipvs.options", (), pure=True),
    Layer("dataplane.ipvs.names", (), pure=True),
    Layer(
        "dataplane.ipvs.table",
        ("model", "routes", "dataplane.ipvs.names", "dataplane.ipvs.options"),
        pure=True,
    ),
    Layer("dataplane.ipvs.rules", ("routes", "netfilter.ruleset", "dataplane.ipvs.names"), pure=True),
    Layer(
        "dataplane.ipvs.reading",
        (*_IPTABLES, "dataplane.ipvs.names", "dataplane.ipvs.rules", "dataplane.ipvs.table"),
        pure=True,
    ),
    Layer(
        "dataplane.ipvs.messages",
        ("dataplane.ipvs.names", "dataplane.ipvs.reading", "dataplane.ipvs.table"),
        pure=True,
    ),
    Layer("dataplane.ipvs.marks", ("routes", "dataplane.ipvs.names", "dataplane.ipvs.table"), pure=True),
    Layer(
        "dataplane.ipvs.ledger",
        (
            "model",
            "routes",
            "dataplane.ipvs.marks",
            "dataplane.ipvs.messages",
            "dataplane.ipvs.names",
            "dataplane.ipvs.options",
            "dataplane.ipvs.reading",
            "dataplane.ipvs.table",
        ),
        pure=True,
    ),
    Layer("config", ("model",), pure=True),
    Layer("config.durations", (), pure=True),
    Layer("config.document", ("config.durations",), pure=True),
    Layer("config.defaults", ("=config", "config.durations", "config.document"), pure=True),
    Layer("config.values", ("=config", "errors")),
    Layer("config.file", ("errors", "strict_yaml", "config.durations", "config.document")),
    Layer("config.checks", ("model", "errors", "config")),
    Layer("config.options", ("errors", "config")),
    Layer("node_setup", ("model", "=config")),
    Layer("log", ("=config",)),
    Layer("loop", ("errors",)),
    Layer("problems", ()),
    Layer("observer", (*_SEAMS, "problems")),
    Layer("notices", ("model", "=source", "observer", "problems", "source.kube.event_objects")),
    Layer("httpd", ("model", "httpd")),
    Layer("ports", ("model", "httpd")),
    Layer("health", (*_SEAMS, "problems", "observer", "httpd")),
    Layer("healthchecks", (*_SEAMS, "problems", "observer", "httpd", "ports")),
    Layer("overview", (*_SEAMS, "problems")),
    Layer("metrics", (*_SEAMS, "problems", "observer", "metrics")),
    Layer("metrics.cells", ()),
    Layer("metrics.page", ("httpd", "metrics.cells")),
    Layer("metrics.traffic", (), pure=True),
    Layer("reconcile", (*_SEAMS, "problems", "loop", "observer", "overview")),
    Layer("control", (*_SEAMS, "loop", "reconcile")),
    Layer("output", ("model", "routes", "errors", "decide", "=dataplane", "dataplane.items")),
    Layer("parts", (*_SEAMS, "config", "loop", "observer", "overview", "problems", "reconcile")),
    Layer(
        "commands",
        (
            *_SEAMS,
            "dataplane.items",
            "dataplane.limits",
            "decide",
            "config",
            "log",
            "loop",
            "problems",
            "reconcile",
            "control",
            "output",
            "parts",
            "commands",
            "observer",
            "overview",
        ),  # fmt: skip
    ),
    Layer("leftovers", ("model", "errors", "rtnetlink", "netfilter", "leftovers")),
    Layer("leftovers.rules", ("netfilter.ruleset",), pure=True),
    Layer("attendants", ("*",)),
    Layer("wiring", ("*",)),
    Layer("cli", ("*",)),
    Layer("cli_options", ("config.durations",)),
    Layer("__main__", ("cli",)),
    Layer("demo", ("errors", "demo")),
)

# "*" does not include these: nobody but the entry point starts the command line.
UNIMPORTABLE = {"cli", "__main__"}

# Who imports these at all, by file; nobody else may.
CONFINED = {
    "bcc": {"dataplane.bpf.compile"},  # it costs 75 MB: only a child process may
    "kubernetes": {"source.kube.credentials"},  # it costs 30 MB: only a child process may
    "prometheus_client": {"metrics.cells", "metrics.page"},  # its instruments name things their own way
    "pyroute2": {"dataplane.ipvs.netlink"},  # see the tops of rtnetlink and of that file
    "subprocess": {
        "dataplane.bpf.artifact",
        "dataplane.ipvs.netlink",  # modprobe
        "demo.cluster",
        "demo.daemon",
        "demo.namespaces",
        "demo.servers",
        "demo.stage",
        "netfilter.commands",
        "netfilter.iptables",
        "source.kube.access",
    },
}

# What a dataplane may know of Kubernetes: words for addresses and names, never an object.
MODEL_FOR_DATAPLANES = {"Address", "Family", "family_of", "Problem", "Protocol", "ServiceName"}

PURE_OUTSIDE = {
    "__future__", "array", "bisect", "collections", "dataclasses", "datetime", "enum", "functools",
    "hashlib", "heapq", "immutables", "ipaddress", "itertools", "math", "msgspec", "operator", "re", "socket",
    "struct", "typing", "types", "weakref",
}  # fmt: skip
# `socket` is I/O but for the arithmetic of addresses.
PURE_SOCKET = {"htons", "ntohs", "inet_aton", "inet_ntoa", "inet_pton", "inet_ntop", "AF_INET", "AF_INET6"}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval"}


def layer_of(module: str) -> Layer | None:
    """The row that `module` falls under."""
    found = [row for row in LAYERS if module == row.name or module.startswith(row.name + ".")]
    return max(found, key=lambda row: len(row.name), default=None)


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every (module, name) that is imported; name is "" for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)


def allowed(target: str, is_package: bool, layer: Layer, module: str) -> bool:
    """Whether `module` in `layer` may import our `target`."""
    for entry in (*layer.ours, module):
        if entry == "*":
            return target not in UNIMPORTABLE
        if entry.startswith("=") and entry[1:] == target and is_package:
            return True
        if target == entry or target.startswith(entry + "."):
            return True
    return False


def violations(module: str, source: str, modules: dict[str, bool]) -> list[str]:
    """What `source`, as the text of `module`, does against the rule. `modules`: each of ours, and whether a package."""
    layer = layer_of(module)
    if layer is None:
        return [f"{module}: no row in LAYERS: say which layer it belongs to"]
    tree = ast.parse(source)
    found = []
    for imported, name in imports(tree):
        if imported.startswith("."):
            found.append(f"{module}: relative import of {imported}{name}")
        elif imported == "ebpflb" or imported.startswith("ebpflb."):
            target = imported.removeprefix("ebpflb").removeprefix(".")
            if name and f"{target}.{name}".removeprefix(".") in modules:
                target = f"{target}.{name}".removeprefix(".")
            if target and not allowed(target, modules.get(target, False), layer, module):
                found.append(f"{module}: imports ebpflb.{target}")
            if target == "model" and module.startswith("dataplane") and name not in MODEL_FOR_DATAPLANES:
                found.append(f"{module}: a dataplane knows nothing of model.{name}")
        else:
            top = imported.split(".")[0]
            if top in CONFINED and module not in CONFINED[top]:
                found.append(f"{module}: {top} is confined to {', '.join(sorted(CONFINED[top]))}")
            if layer.pure and top not in PURE_OUTSIDE:
                found.append(f"{module}: is pure, and imports {imported}")
            if layer.pure and top == "socket" and name and name not in PURE_SOCKET:
                found.append(f"{module}: is pure, and imports socket.{name}")
    if layer.pure:
        found += [f"{module}: is pure, and uses {use}" for use in impure_uses(tree)]
    return found


def impure_uses(tree: ast.AST) -> Iterator[str]:
    """Calls and attributes that a pure module has no use for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            yield f"{node.func.id}()"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "socket" and node.attr not in PURE_SOCKET:
                yield f"socket.{node.attr}"


def our_modules() -> dict[str, bool]:
    """Each module of the package, relative to it, and whether it is a package."""
    package = ROOT / "ebpflb"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if name:
            found[name] = is_package
    return found


def source_of(module: str, is_package: bool) -> str:
    path = ROOT / "ebpflb" / module.replace(".", "/")
    return (path / "__init__.py" if is_package else path.with_suffix(".py")).read_text()


MODULES = our_modules()


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_to_its_layer(module: str) -> None:
    assert violations(module, source_of(module, MODULES[module]), MODULES) == []


def test_every_row_has_a_module() -> None:
    names = [row.name for row in LAYERS]
    assert [name for name in names if name not in MODULES] == []
    assert [name for name in names if names.count(name) > 1] == []


def test_the_bpf_package_says_what_each_of_its_modules_is_for() -> None:
    said = ast.get_docstring(ast.parse(source_of("dataplane.bpf", True))) or ""
    named = set(re.findall(r"`(\w+)`", said))
    assert [name for name in MODULES if name.startswith("dataplane.bpf.") and name.split(".")[2] not in named] == []


@pytest.mark.parametrize("table", CONFINED)
def test_confined_names_have_importers(table: str) -> None:
    """A file that stopped importing what it is named for loses its licence."""
    for module in CONFINED[table] & set(MODULES):
        imported = {name.split(".")[0] for name, _ in imports(ast.parse(source_of(module, MODULES[module])))}
        assert table in imported, module


BAD = {
    "policy reads a file": ("policy", "def f():\n    return open('x')", "uses open()"),
    "policy imports a dataplane": ("policy", "from ebpflb.dataplane import Report", "imports ebpflb.dataplane"),
    "policy imports os": ("policy", "import os.path", "imports os.path"),
    "policy opens a socket": ("policy", "import socket\ns = socket.socket()", "uses socket.socket"),
    "model imports routes in a function": (
        "model",
        "def f():\n    from ebpflb import routes\n    return routes",
        "imports ebpflb.routes",
    ),
    "a source sees policy": ("source.manifests", "import ebpflb.policy", "imports ebpflb.policy"),
    "a dataplane sees a Service": (
        "dataplane.bpf.tables",
        "from ebpflb.model import Service",
        "knows nothing of model.Service",
    ),
    "a dataplane sees all of model": ("dataplane.bpf.maps", "from ebpflb import model", "knows nothing of model"),
    "a dataplane sees a source": (
        "dataplane.bpf.maps",
        "from ebpflb.source.store import Store",
        "imports ebpflb.source.store",
    ),
    "a tool speaks rtnetlink": ("commands.look", "from ebpflb.rtnetlink import links", "imports ebpflb.rtnetlink"),
    "reconcile picks a dataplane": (
        "reconcile",
        "from ebpflb.dataplane.bpf.dataplane import BpfDataplane",
        "imports ebpflb.dataplane.bpf.dataplane",
    ),
    "bcc in the daemon": ("dataplane.bpf.maps", "import bcc", "bcc is confined"),
    "subprocess anywhere": ("source.manifests", "from subprocess import run", "subprocess is confined"),
    "somebody imports cli": ("commands.dump", "from ebpflb.cli import main", "imports ebpflb.cli"),
    "a relative import": ("policy", "from .model import Service", "relative import"),
    "a module that nobody placed": ("surprise", "", "no row in LAYERS"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_walker_finds(case: str) -> None:
    module, source, complaint = BAD[case]
    modules = {**MODULES, "policy": False, "cli": False, "source.store": False, "dataplane.bpf.dataplane": False}
    found = violations(module, source, modules)
    assert any(complaint in line for line in found), found


def test_the_walker_lets_good_code_pass() -> None:
    source = "import socket\nfrom ebpflb.model import Service\nA = socket.inet_aton('10.0.0.1')\n"
    assert violations("policy", source, MODULES) == []
