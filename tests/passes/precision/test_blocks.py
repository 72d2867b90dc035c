from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.passes.precision.blocks import BLOCKS, Blocks, choose_block, corrected, round_to_nearest


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def by_onnxruntime(blocks: Blocks, x: np.ndarray, level: int) -> np.ndarray:
    """x · weightᵀ as MatMulNBits computes it."""
    n, k = len(blocks.codes), blocks.depth
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[m, {k}] x) => (float[m, {n}] y) {{ y = com.microsoft.MatMulNBits
          <K = {k}, N = {n}, bits = {blocks.bits}, block_size = {blocks.block}, accuracy_level = {level}>
          (x, c, s) }}""",
        initializers=[ir.tensor(blocks.codes, name="c"), ir.tensor(blocks.scales.reshape(-1), name="s")],
    )
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(BLOCKS), st.sampled_from([4, 8]), st.integers(0, 99))
def test_every_number_is_within_a_step_of_its_code(n, k, block, bits, seed):
    weight = np.random.default_rng(seed).standard_normal((n, k)).astype("f4")
    made = round_to_nearest(weight, bits, block)
    assert made.codes.shape == (n, -(-k // block), block * bits // 8) and made.scales.shape == made.codes.shape[:2]
    steps = np.repeat(np.abs(made.scales), block, axis=1)[:, :k]
    # Half a step, but for what a clipped range leaves out, and the one code that the upper end lacks.
    limit = 0.5 if bits == 8 else 2.6
    inside = np.abs(made.weight() - weight) <= steps * (0.5 + 1e-4)
    assert (np.abs(made.weight() - weight) <= steps * (limit + (0.5 if bits == 8 else 0) + 1e-4)).all()
    assert inside.mean() > 0.8


def test_ends_of_the_range():
    weight = np.zeros((3, 32), "f4")
    weight[1] = np.linspace(-1, 7 / 8, 32)
    weight[2, 5] = 3e-38
    made = round_to_nearest(weight, 4, 16)
    assert np.isfinite(made.scales).all() and (made.weight()[0] == 0).all()
    whole = round_to_nearest(np.arange(-8, 8, dtype="f4")[None] / 4, 4, 16)
    assert (whole.weight() == np.arange(-8, 8) / 4).all()  # the lowest code is used


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k", "block"), [(50, 96, 32), (33, 100, 16), (64, 768, 128), (1, 64, 64), (20, 300, 256)]
)
def test_layout_is_that_of_onnxruntime(bits, n, k, block):
    rng = np.random.default_rng(k)
    weight, x = rng.standard_normal((n, k)).astype("f4"), rng.standard_normal((5, k)).astype("f4")
    made = round_to_nearest(weight, bits, block)
    want = x.astype("f8") @ made.weight().astype("f8").T
    assert relative(by_onnxruntime(made, x, 0), want) < 1e-6
    assert relative(by_onnxruntime(made, x, 4), want) < 0.012  # its inputs are rounded to 8 bits


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 32)])
def test_correction_loses_less_where_inputs_are_correlated(bits, block):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((40, 200)).astype("f4")
    x = rng.standard_normal((400, 200)) @ (rng.standard_normal((200, 200)) * np.exp(rng.standard_normal(200)))
    fresh = rng.standard_normal((50, 200)) @ np.linalg.cholesky(x.T @ x / 400).T
    want = fresh @ weight.T
    nearest = relative(fresh @ round_to_nearest(weight, bits, block).weight().T, want)
    better = relative(fresh @ corrected(weight, x.T @ x, bits, block).weight().T, want)
    assert better < 0.9 * nearest


def test_correction_takes_inputs_that_are_always_zero():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((8, 48)).astype("f4"), rng.standard_normal((100, 48))
    x[:, [0, 17]] = 0
    made = corrected(weight, x.T @ x, 8, 16)
    assert relative(x @ made.weight().T, x @ weight.T) < 0.01


def test_smaller_blocks_where_outliers_set_the_scale():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 512)).astype("f4")
    assert choose_block(weight, 0.1) == 128
    weight[:, ::50] *= 30
    assert choose_block(weight, 0.1) < 64
    assert choose_block(weight[:, :20], 0.1) == 16
