"""What the tests of canonicalizing passes share: run a pass under all checks, compare on plain ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from planish.ir.hashing import structural_hash
from planish.ir.printer import parse_model
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.base import Pass, PassContext, PassResult

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'


def model_of(text: str, header: str = HEADER) -> ir.Model:
    return parse_model(header + text)


def run_pass(item: Pass, model: ir.Model | Program, *, full: bool = True) -> PassResult:
    """Applies a pass in place; asserts valid in and out, an honest `modified`, and that a second run does nothing."""
    program = model if isinstance(model, Program) else Program.single(model)
    verify(program, full=full)
    before = structural_hash(program)
    result = item.apply(program, PassContext())
    verify(program, full=full)
    assert result.modified == (structural_hash(program) != before)
    assert result.modified == (result.fired > 0)
    unchanged = structural_hash(program)
    again = item.apply(program, PassContext())
    assert (again.fired, again.modified) == (0, False), f"second run fired {again.fired}"
    assert structural_hash(program) == unchanged
    return result


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def reasons(result: PassResult) -> str:
    return "\n".join(f"{d.node}: {d.reason}" for d in result.declined)


def run_ort(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs on plain ONNX Runtime without its own optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def assert_same(before: ir.Model, after: ir.Model, *feeds: Mapping[str, np.ndarray]) -> None:
    """Both models give the same bits (an equal zero of the other sign is the same)."""
    for feed in feeds:
        for a, b in zip(run_ort(before, feed), run_ort(after, feed), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, b)


def interface(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]
