"""The driver's work grows with the graph, not with its square. Counted, not timed, so that load does not matter;
benchmarks/pattern_driver.py has the times."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from planish.ir.program import Program
from planish.passes import matcher
from planish.passes.base import PassContext
from planish.passes.driver import apply_rules

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("pattern_driver")
    for name in ("pattern_driver", "pattern_rules"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("fire", [False, True])
def test_work_is_linear_in_the_number_of_nodes(bench: Any, fire: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    step = matcher._Search._step

    def counted(self: Any, *goal: Any) -> Any:
        nonlocal count
        count += 1
        return step(self, *goal)

    monkeypatch.setattr(matcher._Search, "_step", counted)
    rules = bench.rules([*bench.MATCHING, *bench.OTHER] if fire else bench.OTHER)
    assert len(rules) >= 30
    work = []
    for size in (500, 2000):
        model = bench.build(size)
        count = 0
        result = apply_rules("scale", rules, Program.single(model), PassContext())
        assert bool(result.fired) == fire
        work.append(count / size)
    assert work[1] < work[0] * 1.15, f"steps per node: {work}"
    assert work[1] < 30
