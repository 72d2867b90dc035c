"""Mixed precision: errors measured one by one, the cheapest that fit, and what goes back when they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir import processor
from planish.ir.errors import InputError
from planish.ir.program import Calibration, Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.precision.bf16 import Bf16
from planish.passes.precision.sensitivity import Candidate, affordable, choose, measure
from planish.runtime.ort import compile_ort
from tests.passes.precision.test_bf16 import ids, program_of


def candidates(*triples: tuple[str, float, float]) -> list[Candidate]:
    return [Candidate(name, error, gain, name) for name, error, gain in triples]


def names(found: list[Candidate]) -> list[str]:
    return [c.name for c in found]


def test_the_cheapest_that_fit_are_taken() -> None:
    """Prices 9, 1, 0.25, 100: errors of 0.3 and 0.1 fit into 0.4, that of 0.2 with a fiftieth of the gain does not."""
    found = candidates(("a", 0.3, 0.01), ("b", 0.1, 0.01), ("c", 0.05, 0.01), ("d", 0.2, 0.0004))
    taken, left = affordable(found, 0.33)
    assert names(taken) == ["c", "b", "a"] and names(left) == ["d"]
    taken, left = affordable(found, 0.12)
    assert names(taken) == ["c", "b"] and names(left) == ["a", "d"]


def test_an_error_that_is_no_number_is_left_out() -> None:
    taken, left = affordable(candidates(("a", float("nan"), 1), ("b", 0.1, 1), ("c", float("inf"), 1)), 0.5)
    assert names(taken) == ["b"] and names(left) == ["a", "c"]


def test_groups_go_back_one_at_a_time_the_dearest_first() -> None:
    found = candidates(("a", 0.01, 1), ("b", 0.02, 1), ("c", 0.03, 1))
    true = {"a": 0.1, "b": 0.2, "c": 0.3}  # ten times what they are by themselves
    asked = []

    def error_with(kept: frozenset[str]) -> float:
        asked.append(sorted(kept))
        return sum(true[name] for name in kept)

    chosen = choose(found, 0.15, error_with)
    assert asked == [["a", "b", "c"], ["a", "b"], ["a"]]
    assert chosen.names == {"a"} and chosen.error == pytest.approx(0.1)
    assert [(g, pytest.approx(e)) for g, e in chosen.back] == [("c", 0.6), ("b", 0.3)]
    assert "'c' went back to float32: the error was 6.00e-01 with it" in chosen.notes(0.15)


def test_never_all_go_back_and_the_closest_is_said() -> None:
    chosen = choose(candidates(("a", 0.01, 1), ("b", 0.02, 1)), 0.05, lambda kept: 0.1 * len(kept))
    assert chosen.names == {"a"}
    assert chosen.notes(0.05)[-1] == "no choice meets an error of 5.00e-02; the closest is 1.00e-01"
    nothing_fits = choose(candidates(("a", 0.5, 1), ("b", 0.4, 1)), 0.1, lambda kept: 0.4)
    assert nothing_fits.names == {"b"} and nothing_fits.left_out == ("a",)


def context(program: Program) -> PassContext:
    """Runs programs by the operators' bodies, so that no processor matters."""

    def run(candidate: Program, entry: str) -> list[dict[str, Any]]:
        assert program.calibration is not None
        runner = compile_ort(candidate.entry(entry), Target.parse("ort-cpu"))
        return [runner.run(batch) for batch in program.calibration.batches]

    return PassContext(program.target, run=run)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(processor, "features", lambda: processor.AMX_BF16)
    made = program_of()
    made.calibration = Calibration([ids(2, 9), ids(1, 30)])
    return made


def test_own_errors_are_those_of_rounding(program: Program) -> None:
    """A candidate is given what it would be given in float32, whatever stands before it."""
    from planish.passes.precision.bf16_choice import compute, is_candidate

    nodes = [node for node in program.main.graph if is_candidate(node)]
    found = measure(program, "main", nodes, context(program), compute)
    assert len(found) == 5 and all(1e-4 < c.error < 1e-2 for c in found)
    by_name = {c.name: c for c in found}
    linear = next(node for node in nodes if node.op_type == "Linear")
    assert by_name[linear.name].gain == 2 * (2 * 9 + 30) * 32 * 32  # type: ignore[index]


def test_a_budget_keeps_a_part_in_float32(program: Program) -> None:
    whole = program.clone()
    Bf16().apply(whole, PassContext(whole.target))
    ctx = context(program)
    assert ctx.run is not None
    want, all_low = ctx.run(program, "main"), ctx.run(whole, "main")
    lost = max(np.linalg.norm(a["y"] - b["y"]) / np.linalg.norm(a["y"]) for a, b in zip(want, all_low, strict=True))
    limit = float(lost) * 0.7
    part = program.clone()
    result = Bf16(error=limit).apply(part, ctx)
    low = ctx.run(part, "main")
    kept = max(np.linalg.norm(a["y"] - b["y"]) / np.linalg.norm(a["y"]) for a, b in zip(want, low, strict=True))
    assert result.modified and 0 < kept <= limit and 0 < result.fired < 6
    assert result.notes[0].startswith(f"{result.fired} operator") and " kept in low precision: " in result.notes[0]
    dtypes = {v.dtype for v in part.main.graph.initializers.values()}
    assert dtypes == {ir.DataType.FLOAT, ir.DataType.BFLOAT16}


def test_a_budget_that_nothing_meets_changes_nothing(program: Program) -> None:
    result = Bf16(error=1e-7).apply(program, context(program))
    assert not result.modified and result.notes[-1].startswith("no choice meets an error of 1.00e-07; the closest is")
    assert result.declined[0].reason == result.notes[-1]


def test_wrong_use(program: Program) -> None:
    with pytest.raises(InputError, match="error is 2; it is a relative error between 0 and 1"):
        Bf16(error=2.0)
    with pytest.raises(InputError, match="there is nothing to run"):
        Bf16(error=0.1).apply(program, PassContext(program.target))
