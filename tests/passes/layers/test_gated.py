"""skip-layers in a whole run: what the user asked for wrongly is an error, and what was measured is in the report."""

from __future__ import annotations

import onnx_ir as ir
import pytest

import planish
from planish.ir.errors import InputError
from planish.ir.infer import infer_shapes
from planish.passes.testing import program_of
from tests.layer_stacks import stack


def model(layers: int = 6, width: int = 4) -> ir.Model:
    program = program_of(stack(layers, width=width))
    infer_shapes(program.main)
    return program.main


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("layers=[9]", "layers names layer 9; 'stack 1' has the layers 0 to 5"),
        ("speedup=4", "speedup is 4; 6 layers of 'stack 1' allow between 1 and 3"),
        ("speedup=0.5", "speedup is 0.5; it must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_errors_of_the_user(options: str, message: str, gates: bool) -> None:
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        planish.optimize(model(), passes=f"skip-layers{{{options}}}", budget=planish.Budget(gates=gates, error=10))


def test_the_report_says_which_layers_are_gone() -> None:
    exe = planish.optimize(model(), passes="skip-layers{speedup=2}", budget=planish.Budget(gates=False))
    assert exe.report is not None
    (entry,) = [e for e in exe.report.ledger.entries if e.kind == "approximate"]
    note = "stack 1: 3 of 6 layers removed (1, 3, 4), 2.00x nominal"
    assert entry.notes == [note] and f"skip-layers: {note}" in exe.report.remarks()
    again = type(exe.report).from_dict(exe.report.to_dict())
    assert again.ledger.entries == exe.report.ledger.entries


def test_importance_is_measured_on_the_calibration_inputs() -> None:
    passes = "skip-layers{speedup=2,by='importance'}"
    exe = planish.optimize(model(), passes=passes, budget=planish.Budget(gates=False))
    assert exe.report is not None
    (entry,) = [e for e in exe.report.ledger.entries if e.kind == "approximate"]
    assert entry.fired == 3 and "importance when chosen: " in entry.notes[0]


def test_without_a_budget_the_error_gate_takes_it_back() -> None:
    exe = planish.optimize(model(), passes="skip-layers{speedup=2}")
    assert exe.report is not None
    entry = exe.report.ledger["skip-layers"]
    assert not entry.kept and entry.verdict.startswith("rolled back: error ")
    assert not any("removed" in line for line in exe.report.remarks())


def test_measured_and_nominal() -> None:
    """Wide layers take nearly all of the time, so that few more than nominal have to go."""
    budget = planish.Budget(error=100.0, seconds=4)
    exe = planish.optimize(model(8, 192), "ort-cpu:threads=1", passes="skip-layers{speedup=1.5}", budget=budget)
    assert exe.report is not None
    (entry,) = [e for e in exe.report.ledger.entries if e.kind == "approximate"]
    if entry.kept:  # a busy machine may not show a gain
        assert entry.speedup is not None and 2 <= entry.fired <= 6
        assert entry.name in exe.report.pipeline  # the variant that was taken makes the same again
