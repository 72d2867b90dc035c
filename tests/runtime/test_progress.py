"""The status line: silent where nobody looks, shown when something takes long, with an estimate where there is one."""

from __future__ import annotations

import time
from io import StringIO

import pytest
from rich.console import Console

from planish.runtime.progress import Progress


def console() -> Console:
    return Console(file=StringIO(), force_terminal=True, width=100)


def test_quick_work_shows_nothing() -> None:
    out = console()
    with Progress("quick", enabled=True, patience=5, console=out) as progress:
        progress("step")
    assert not progress.shown
    assert out.file.getvalue() == ""  # type: ignore[attr-defined]


def test_long_work_shows_title_step_and_clock() -> None:
    out = console()
    with Progress("optimizing", enabled=True, patience=0.05, console=out) as progress:
        progress("fuse-gelu")
        time.sleep(0.7)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert progress.shown and "optimizing" in text and "fuse-gelu" in text


def test_it_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", patience=0) as progress:
        progress("step")
        time.sleep(0.05)
    assert not progress.shown and capsys.readouterr() == ("", "")


def test_the_share_comes_from_steps_or_from_time() -> None:
    steps = Progress("x", total=4, enabled=False)
    assert steps.fraction() == 0.0
    for name in ("a", "b", "c"):
        steps(name)
    assert steps.fraction() == 0.5
    assert Progress("x", enabled=False).fraction() is None
    timed = Progress("x", seconds=1000.0, enabled=False)
    share = timed.fraction()
    assert share is not None and share < 0.01
    late = Progress("x", seconds=1e-9, enabled=False)
    time.sleep(0.001)
    assert late.fraction() == 0.99


def test_an_error_inside_passes_through_and_the_line_goes() -> None:
    with pytest.raises(ValueError, match="boom"), Progress("x", enabled=True, patience=0, console=console()):
        raise ValueError("boom")
