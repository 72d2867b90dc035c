"""The peak of activations, before and after, reaches every form of the report, at the sizes of the calibration."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import planish
from planish.ir.analyses.liveness import liveness
from planish.ir.printer import op_counts, parse_model
from planish.runtime.report import Report

# The fusion of what is written out as five nodes needs less at once.
GELU = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, length, 64] x) => (float[batch, length, 64] y)
    <float root = {1.4142135}, float one = {1}, float half = {0.5}>
    { a = Div(x, root)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  e = Mul(d, half)
      y = Transpose<perm=[0,1,2]>(e) }"""
BRANCHES = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 64] x, bool q) => (float[n, 64] y) {
    a = Exp(x)
    b = If (q) <then_branch = t () => (float[n, 64] r) { k = Concat<axis=0>(a, a, a)  s = ReduceSum<keepdims=1>(k)
                                                         r = Mul(a, s) },
                else_branch = e () => (float[n, 64] u) { u = Neg(a) }>
    y = Neg(b) }"""


def optimized(text: str, feed: dict[str, np.ndarray]) -> Any:
    return planish.optimize(
        parse_model(text), "ort-cpu:threads=1", calibration=[feed], budget=planish.Budget(gates=False)
    )


def report_of(text: str, feed: dict[str, np.ndarray]) -> Report:
    found: Report = optimized(text, feed).report
    return found


@pytest.mark.parametrize("dims", [(1, 1), (2, 7), (4, 16)])
def test_at_the_sizes_of_the_calibration(dims: tuple[int, int]) -> None:
    feed = {"x": np.ones((*dims, 64), np.float32)}
    report = report_of(GELU, feed)
    size = dims[0] * dims[1] * 64 * 4
    sizes = dict(zip(("batch", "length"), dims, strict=True))
    # x, the product with the gate, and what it needs; afterwards x and y.
    assert report.before.peak_activation_bytes == liveness(parse_model(GELU), dims=sizes).peak_bytes == 3 * size
    assert report.after.peak_activation_bytes == 2 * size


def test_every_form_of_the_report_shows_it(tmp_path: Path) -> None:
    report = report_of(GELU, {"x": np.ones((4, 16, 64), np.float32)})
    data = json.loads(json.dumps(report.to_dict()))
    assert data["before"]["peak_activation_bytes"] == 49152 and data["after"]["peak_activation_bytes"] == 32768
    assert Report.from_dict(data).after == report.after
    text = io.StringIO()
    report.print(Console(file=text, width=140))
    row = next(line for line in text.getvalue().splitlines() if "Peak activations" in line)
    assert "-33" in row.replace("−", "-")
    report.to_html(tmp_path / "report.html")
    assert "Peak activations" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_ledger_has_it_with_gates() -> None:
    exe = planish.optimize(
        parse_model(GELU), "ort-cpu:threads=1", calibration=[{"x": np.ones((4, 16, 64), np.float32)}]
    )
    entry = exe.report.ledger["exact passes"]
    assert (entry.peak_memory_before, entry.peak_memory_after) == (49152, 32768)


def test_branches_count() -> None:
    feed = {"x": np.ones((5, 64), np.float32), "q": np.array(True)}
    report = report_of(BRANCHES, feed)
    size = 5 * 64 * 4
    # x, q, a, room for the result of If; inside the three copies, their sum, and the product.
    assert report.before.peak_activation_bytes is not None
    assert report.before.peak_activation_bytes >= 6 * size
    assert {"Concat", "ReduceSum", "If"} <= set(op_counts(parse_model(BRANCHES)))
    assert "Concat" in report.before.ops
