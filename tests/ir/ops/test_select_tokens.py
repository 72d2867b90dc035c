"""planish::UnmergeTokens and planish::PruneTokens: bodies on ONNX Runtime against the references."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.ops import DIALECT, InferenceError, TensorInfo, import_functions
from planish.ir.printer import parse_model

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def run(text: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    model = parse_model(f'<ir_version: 10, opset_import: ["" : 18, "planish" : 1]> {text}')
    import_functions(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, inputs)]


@pytest.mark.parametrize("batch, kept, tokens", [(2, 3, 7), (1, 1, 1), (0, 2, 3), (2, 4, 0)])
def test_unmerge(batch: int, kept: int, tokens: int) -> None:
    rng = np.random.default_rng(1)
    y, index = rng.standard_normal((batch, kept, 5), np.float32), rng.integers(0, kept, (batch, tokens))
    text = "g (float[B, N, C] y, int64[B, T] index) => (float[B, T, C] x) { x = planish.UnmergeTokens(y, index) }"
    (got,) = run(text, {"y": y, "index": index})
    np.testing.assert_array_equal(got, DIALECT["UnmergeTokens"].reference(y, index)[0])


def test_unmerging_what_was_merged_gives_every_token_its_mean() -> None:
    rng = np.random.default_rng(2)
    x, keys = rng.standard_normal((2, 9, 4), np.float32), rng.standard_normal((2, 9, 4), np.float32)
    text = """g (float[B, T, C] x, float[B, T, K] k, float[B, T] s) => (float[B, T, C] z, int64[B, T] index) {
        y, m, index = planish.MergeTokens <r = 4> (x, k, s)  z = planish.UnmergeTokens(y, index) }"""
    z, index = run(text, {"x": x, "k": keys, "s": np.ones((2, 9), np.float32)})
    for b in range(2):
        for i in range(9):
            np.testing.assert_allclose(z[b, i], x[b, index[b] == index[b, i]].mean(0), rtol=1e-5, atol=1e-6)


def prune(x: np.ndarray, scores: np.ndarray, **attributes: Any) -> list[np.ndarray]:
    listed = ", ".join(f"{key} = {value}" for key, value in attributes.items())
    given = f"<{listed}>" if listed else ""
    text = f"""g (float[B, T, C] x, float[B, T] s) => (float[B, N, C] y, int64[B, N] kept) {{
        y, kept = planish.PruneTokens {given} (x, s) }}"""
    got = run(text, {"x": x, "s": scores})
    for g, w in zip(got, DIALECT["PruneTokens"].reference(x, scores, **attributes), strict=True):
        np.testing.assert_array_equal(g, w)
    return got


@pytest.mark.parametrize("attributes", [
    {"keep": 3}, {"keep": 3, "protected": 1}, {"ratio": 0.3, "protected": 2}, {"keep": 99}, {"keep": 0}, {},
    {"drop": 4, "protected": 1}, {"drop": 99},
])  # fmt: skip
@pytest.mark.parametrize("batch, tokens", [(2, 11), (1, 1), (3, 2), (0, 4), (2, 0)])
def test_prune(batch: int, tokens: int, attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    # Few different scores: most are equal.
    prune(rng.standard_normal((batch, tokens, 4), np.float32), rng.integers(0, 3, (batch, tokens)).astype(np.float32),
          **attributes)  # fmt: skip


def test_prune_by_hand() -> None:
    x = np.arange(6, dtype=np.float32)[None, :, None]
    y, kept = prune(x, np.array([[-9, 1, 3, 2, 3, 1]], np.float32), keep=1, ratio=0.5, protected=1)
    np.testing.assert_array_equal(kept, [[0, 2, 3, 4]])
    np.testing.assert_array_equal(y[0, :, 0], [0, 2, 3, 4])


def test_inference() -> None:
    prune_op, unmerge = DIALECT["PruneTokens"], DIALECT["UnmergeTokens"]
    attributes = {"keep": 4, "ratio": 0.0, "protected": 1}
    y, kept = prune_op.infer((TensorInfo(FLOAT, ("B", 9, 8)), TensorInfo(FLOAT, (2, None))), attributes)
    assert (y.dims, kept.dims) == ((2, 5, 8), (2, 5))
    y, _ = prune_op.infer((TensorInfo(FLOAT, ("B", "T", 8)), None), attributes)
    assert y.dims == ("B", None, 8)
    (x,) = unmerge.infer((TensorInfo(FLOAT, ("B", 3, 8)), TensorInfo(INT64, (None, "T"))), {})
    assert x.dims == ("B", "T", 8)
    with pytest.raises(InferenceError, match="keep is -1"):
        prune_op.infer((None, None), attributes | {"keep": -1})
    with pytest.raises(InferenceError, match="index has rank 1; it must have 2"):
        unmerge.infer((None, TensorInfo(INT64, (3,))), {})
