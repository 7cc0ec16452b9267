"""The demo judges honestly: what fails is said where it fails, in the summary and by the exit status."""

from __future__ import annotations

import io

from ebpflb.demo.console import Console
from ebpflb.errors import EbpflbError


def test_kept_promises_are_success() -> None:
    out = io.StringIO()
    console = Console(out)
    with console.step("one"):
        console.check(True, "it works")
    console.summary(1.0)
    assert not console.failed
    assert "  ok  it works" in out.getvalue()
    assert "1 promises kept, 0 broken" in out.getvalue()


def test_one_broken_promise_is_failure() -> None:
    out = io.StringIO()
    console = Console(out)
    with console.step("one"):
        console.check(True, "it works")
        console.check(False, "so does this")
    with console.step("two"):
        console.check(True, "and this")
    console.summary(1.0)
    assert console.failed
    assert "FAILED  so does this" in out.getvalue()
    assert "not as promised: so does this" in out.getvalue()


def test_an_error_breaks_its_step_and_the_story_goes_on() -> None:
    out = io.StringIO()
    console = Console(out)
    with console.step("one"):
        raise EbpflbError("nobody answered")
    with console.step("two"):
        console.check(True, "this works")
    assert console.failed
    assert "FAILED  nobody answered" in out.getvalue() and "ok  this works" in out.getvalue()


def test_a_step_that_promises_nothing_is_no_success() -> None:
    console = Console(io.StringIO())
    assert console.failed
    with console.step("one"):
        pass
    assert console.failed


def test_long_output_is_cut_and_says_so() -> None:
    out = io.StringIO()
    console = Console(out)
    with console.step("one"):
        console.command("node1", ("seq", "100"), "".join(f"{number}\n" for number in range(100)))
    assert "    23\n" in out.getvalue() and "    24\n" not in out.getvalue()
    assert "… 76 more lines" in out.getvalue()
