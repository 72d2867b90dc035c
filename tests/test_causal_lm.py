"""The task "causal-lm" through the driver: gates, ledger, report and calibration of two entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.ir.causal_lm import DECODE, PREFILL
from planish.ir.errors import InputError
from planish.ir.ledger import Ledger
from planish.ir.program import Program
from planish.passes.base import ExactPass, PassContext, PassResult
from tests.causal_models import causal_model, prompts


class SpoilDecode(ExactPass):
    """Claims to be exact, and doubles what the last normalization of `decode` gives."""

    name = "spoil-decode"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        graph = program.entries[DECODE].graph
        norm = [node for node in graph if node.op_type == "LayerNormalization"][-1]
        weight = norm.inputs[1]
        assert weight is not None and weight.const_value is not None
        wrong = ir.Value(name="wrong", const_value=ir.tensor(weight.const_value.numpy() * 2, name="wrong"))
        wrong.type, wrong.shape = weight.type, weight.shape
        graph.register_initializer(wrong)
        norm.replace_input_with(1, wrong)
        return PassResult(modified=True, fired=1)


@pytest.fixture(scope="module")
def exe() -> planish.Executable:
    ids, mask = prompts(3, 12)
    return planish.optimize(
        causal_model("GPT-2"),
        "ort-cpu:threads=1",
        task="causal-lm",
        calibration={"input_ids": ids, "attention_mask": mask},
        passes="eliminate-dead-code,fuse-gelu,eliminate-common-subexpressions",
        budget=planish.Budget(seconds=2, min_gain=None),
    )


def test_each_entry_has_its_own_error_and_gain(exe: planish.Executable) -> None:
    assert exe.entries == [PREFILL, DECODE]
    assert exe.report is not None
    total = next(e for e in reversed(exe.report.ledger.entries) if e.kind == "composition")
    assert set(total.by_entry) == {PREFILL, DECODE}
    for measured in total.by_entry.values():
        assert measured.error is not None and measured.error.relative_l2 < 2e-5
        assert measured.speedup is not None and measured.speedup.runs > 0
    again = Ledger.from_dict(exe.report.ledger.to_dict())
    assert again.entries[-1].by_entry == exe.report.ledger.entries[-1].by_entry
    assert not exe.report.synthetic_inputs


def test_the_report_shows_both_entries(exe: planish.Executable) -> None:
    from planish.runtime.report_html import render_html

    assert exe.report is not None
    import io

    from rich.console import Console

    from planish.runtime.report_text import print_report

    console = Console(file=io.StringIO(), width=120)
    print_report(exe.report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    page = render_html(exe.report)
    for entry in (PREFILL, DECODE):
        assert f"Speed-up of {entry}" in text and f"Speed-up of {entry}" in page


def test_calibration_is_of_both_entries(exe: planish.Executable) -> None:
    assert exe.program is not None and exe.program.calibration is not None
    first, second = exe.program.calibration.parts
    assert (first.entry, second.entry) == (PREFILL, DECODE)
    assert first.batches[0]["input_ids"].shape == (3, 12)
    assert second.batches[0]["past_0_key"].shape[2] == exe.program.sizes()["capacity"] == 12 + 8
    assert exe.program.sizes()["sequence"] == 12


def test_a_pass_that_breaks_decode_alone_is_rolled_back() -> None:
    exe = planish.optimize(
        causal_model("GPT-2"), task="causal-lm", passes=[SpoilDecode()], budget=planish.Budget(seconds=1)
    )
    assert exe.report is not None
    entry = exe.report.ledger["spoil-decode"]
    assert not entry.kept and "error" in entry.verdict and "logits" in entry.verdict


def test_the_command_line_takes_an_entry(exe: planish.Executable, tmp_path: Path) -> None:
    from planish.cli import invoke

    folder = str(exe.export(tmp_path / "a"))
    for entry in (PREFILL, DECODE):  # with inputs that are made up
        assert invoke(["run", folder, "--entry", entry]) == 0
        assert invoke(["bench", folder, folder, "--entry", entry, "--seconds", "0.1"]) == 0
    assert invoke(["verify", folder]) == 0 and invoke(["inspect", folder]) == 0
    assert invoke(["bench", folder]) == 2


def test_export_without_golden_data_of_one_entry(exe: planish.Executable, tmp_path: Path) -> None:
    exe.export(tmp_path / "a")
    found: Any = planish.load(tmp_path / "a").report
    assert found.ledger.entries[-1].by_entry.keys() == {PREFILL, DECODE}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("model.onnx", {"task": "causal-lm"}, "takes a model of transformers, not str"),
        (None, {"task": "causal"}, "unknown task 'causal'. Did you mean 'causal-lm'"),
        (None, {"task": "causal-lm", "dynamic_shapes": {}}, "batch and lengths are always dynamic"),
        (None, {"task": "causal-lm", "calibration": {"x": np.ones(3)}}, "takes input_ids and attention_mask"),
    ],
)
def test_errors(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planish.optimize(causal_model("GPT-2") if model is None else model, **options)
