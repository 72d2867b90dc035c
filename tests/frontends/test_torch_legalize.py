"""Rotary caches of exported models: expanded to the batch, once each, and only where they must be."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

from planish.frontends.torch_legalize import legalize
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.runtime.ort import compile_ort

HEADS, LENGTH, WIDTH = 2, 5, 8


def _model(cache_batch: int | str | None, batch: int | str = "batch", *, layers: int = 1) -> ir.Model:
    """RotaryEmbedding of x [batch, heads, length, width] by caches [cache_batch, length, width / 2], `layers` times."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=floats, shape=ir.Shape([batch, HEADS, LENGTH, WIDTH]))
    shape = None if cache_batch is None else ir.Shape([cache_batch, LENGTH, WIDTH // 2])
    angle = ir.Value(name="angle", type=floats, shape=shape)
    nodes, current = [], x
    for _ in range(layers):
        cos, sin = ir.node("Cos", [angle]), ir.node("Sin", [angle])
        for node in (cos, sin):
            node.outputs[0].type, node.outputs[0].shape = floats, shape
        rotary = ir.node("RotaryEmbedding", [current, cos.outputs[0], sin.outputs[0]])
        current = rotary.outputs[0]
        current.type, current.shape = floats, x.shape
        nodes += [cos, sin, rotary]
    current.name = "y"
    graph = ir.Graph([x, angle], [current], nodes=nodes, opset_imports={"": 23}, name="rotary")
    return ir.Model(graph, ir_version=10)


def _reference(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("cache_batch", [1, None])
def test_a_cache_for_all_rows_runs_at_every_batch(batch: int, cache_batch: int | None) -> None:
    model = _model(cache_batch)
    if cache_batch is None:
        model.graph.inputs[1].shape = ir.Shape([1, LENGTH, WIDTH // 2])
    assert legalize(model) == 1
    program = Program.single(model)
    verify(program, full=True)
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, HEADS, LENGTH, WIDTH)).astype(np.float32)
    angle = rng.standard_normal((1, LENGTH, WIDTH // 2)).astype(np.float32)
    got = compile_ort(model, program.target, optimize=False).run({"x": x, "angle": angle})["y"]
    np.testing.assert_allclose(got, _reference(x, angle), atol=1e-6)


def test_the_exported_form_fails_without_it() -> None:
    """The reason for the legalization; when this fails, ONNX Runtime has learned to broadcast and it can go."""
    model = _model(1)
    x = np.zeros((2, HEADS, LENGTH, WIDTH), np.float32)
    angle = np.zeros((1, LENGTH, WIDTH // 2), np.float32)
    with pytest.raises(Exception, match="cos_cache"):
        compile_ort(model, Program.single(model).target, optimize=False).run({"x": x, "angle": angle})


def test_layers_share_one_expansion_of_cos_and_one_of_sin() -> None:
    model = _model(1, layers=3)
    assert legalize(model) == 3
    ops = [n.op_type for n in model.graph]
    assert (ops.count("Expand"), ops.count("Shape"), ops.count("Concat")) == (2, 1, 1)
    verify(Program.single(model), full=True)


@pytest.mark.parametrize(("cache_batch", "batch"), [("batch", "batch"), (1, 1), (2, 2)])
def test_declines_where_the_batches_are_known_to_be_equal(cache_batch: int | str, batch: int | str) -> None:
    assert legalize(_model(cache_batch, batch)) == 0


def test_declines_with_position_ids() -> None:
    model = _model(1)
    rotary = next(n for n in model.graph if n.op_type == "RotaryEmbedding")
    positions = ir.Value(name="p", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", LENGTH]))
    model.graph.inputs.append(positions)
    rotary.resize_inputs(4)
    rotary.replace_input_with(3, positions)
    assert legalize(model) == 0


def test_twice_changes_nothing_more() -> None:
    model = _model(1, layers=2)
    legalize(model)
    assert legalize(model) == 0
