"""The documents speak of what exists: commands, options, files."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from ebpflb import cli
from ebpflb.dataplane.limits import LIMITS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bpf/README.md"]
COMMANDS = {name: command for name, command in vars(cli).items() if isinstance(command, click.Group)}["root"].commands


def code(text: str) -> list[str]:
    """What stands in backticks and in blocks, line by line."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`]+)`", rest)


def wrong_usage(line: str) -> list[str]:
    """Commands and options of ours in a line that do not exist."""
    found = re.search(r"(?:^|[ /$#])ebpflb ([a-z]+)\b(.*)", line)
    if not found or (found[1] not in COMMANDS and not line.lstrip("# $").startswith("ebpflb ")):
        return []
    if found[1] not in COMMANDS:
        return [f"no command {found[1]}"]
    known = {option for parameter in COMMANDS[found[1]].params for option in parameter.opts}
    return [
        f"{found[1]} has no {option}" for option in re.findall(r"(?<=\s)--[a-z-]+", found[2]) if option not in known
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(document: Path) -> None:
    assert [wrong for line in code(document.read_text()) for wrong in wrong_usage(line)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_the_files_that_the_design_names_exist() -> None:
    named = re.findall(r"`((?:ebpflb|bpf|tests)/[\w/]+\.\w+)`", (ROOT / "docs/design.md").read_text())
    assert named and [path for path in named if not (ROOT / path).exists()] == []


def test_the_limits_of_dataplanes_are_told() -> None:
    """All of them, in the words of the one list."""
    page = (ROOT / "docs/dataplanes.md").read_text()
    wanted = [f"| {limit.dataplane} | `{limit.code}` | {limit.what} |" for limit in LIMITS]
    told = re.findall(r"^\| (?:bpf|ipvs|iptables) \| `.*\|$", page, re.MULTILINE)
    assert told == wanted, "docs/dataplanes.md should have:\n" + "\n".join(wanted)


def test_a_wrong_option_is_noticed() -> None:
    assert wrong_usage("# ebpflb dump --colour") == ["dump has no --colour"]
    assert wrong_usage("ebpflb dmup") == ["no command dmup"]
    assert wrong_usage(".venv/bin/ebpflb run --manifests DIR") == []
