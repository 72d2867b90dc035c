"""planish::MergeTokens and its relatives: bodies on ONNX Runtime against the float64 references; ties, edges, types."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import DIALECT, InferenceError, TensorInfo, import_functions
from planish.ir.ops.merge_reference import directions, merged_count
from planish.ir.ops.merge_tokens import MERGE_TOKENS
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
NAMES = sorted(MERGE_TOKENS)


def model_of(name: str, attributes: dict[str, Any], opset: int = 23) -> ir.Model:
    listed = ", ".join(f"{key} = {value}" for key, value in attributes.items())
    given = f"<{listed}>" if listed else ""
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : {opset}, "planish" : 1]>
        g (float[B, T, C] x, float[B, T, K] keys, float[B, T] sizes)
          => (float[B, N, C] y, float[B, N] merged, int64[B, T] index) {{
            y, merged, index = planish.{name} {given} (x, keys, sizes)
        }}
        """
    )
    import_functions(model)
    return model


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def arrays(shape: tuple[int, int, int], heads: int, size: int = 8, seed: int | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    batch, tokens, _ = shape
    sizes = rng.integers(1, 5, (batch, tokens)).astype(np.float32)
    keys = rng.standard_normal((batch, tokens, heads * size), np.float32)
    return [rng.standard_normal(shape, np.float32), keys, sizes]


def check(name: str, inputs: list[np.ndarray], attributes: dict[str, Any], running: Any = None) -> list[np.ndarray]:
    running = running or session(model_of(name, attributes))
    got = running.run(None, dict(zip(("x", "keys", "sizes"), inputs, strict=True)))
    want = DIALECT[name].reference(*inputs, **attributes)
    np.testing.assert_array_equal(got[2], want[2])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-6)
    assert [g.dtype for g in got] == [np.float32, np.float32, np.int64]
    return [np.asarray(g) for g in got]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protected", [0, 1, 2, 3, 5])
def test_body_equals_reference(name: str, protected: int) -> None:
    attributes = {"r": 6, "protected": protected, "heads": 3}
    if "Energy" in name:
        attributes |= {"margin": 0.4, "alpha": 0.9}
    running = session(model_of(name, attributes))
    for seed, shape in enumerate([(2, 40, 24), (3, 17, 5), (1, 14, 1), (1, 13, 7), (2, 6, 3)]):
        y, merged, _ = check(name, arrays(shape, 3, seed=seed), attributes, running)
        assert y.shape[1] == merged.shape[1] == shape[1] - max(min(6, (shape[1] - protected) // 2), 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch, tokens", [(0, 9), (2, 0), (2, 1), (2, 2), (1, 3), (1, 4)])
@pytest.mark.parametrize("protected", [0, 1, 2, 7])
def test_few_tokens(name: str, batch: int, tokens: int, protected: int) -> None:
    check(name, arrays((batch, tokens, 4), 2, seed=1), {"r": 4, "protected": protected, "heads": 2})


@pytest.mark.parametrize("name", NAMES)
def test_attributes_may_be_left_out(name: str) -> None:
    inputs = arrays((2, 9, 4), 1)
    y, merged, index = check(name, inputs, {})
    order = index[0]
    np.testing.assert_array_equal(y[:, order], inputs[0])
    np.testing.assert_array_equal(merged[:, order], inputs[2])


def test_a_share_of_the_tokens() -> None:
    running = session(model_of("MergeTokens", {"ratio": 0.25, "r": 1, "protected": 1}))
    for tokens in (4, 10, 11, 40):
        y = check("MergeTokens", arrays((1, tokens, 3), 1), {"ratio": 0.25, "r": 1, "protected": 1}, running)[0]
        assert y.shape[1] == tokens - min(1 + tokens // 4, (tokens - 1) // 2)


def ties() -> np.ndarray:
    """Keys of entries ±1, whose similarities are exact in float32, and many of which are equal."""
    rng = np.random.default_rng(5)
    return rng.choice(np.array([-1, 1], np.float32), (4, 3, 16))[rng.integers(0, 4, (2, 30)), 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("r", [1, 7, 13])
def test_of_equal_similarities_the_first_is_taken(name: str, r: int) -> None:
    x, _, sizes = arrays((2, 30, 6), 1)
    keys = ties()
    unit = directions(keys, 1)
    assert len(np.unique(unit[0] @ unit[0].T)) < 8
    # Above the margin ELU is the identity, so that energies are exact too.
    attributes = {"r": r, "protected": 1} | ({"margin": -2.0} if "Energy" in name else {})
    check(name, [x, keys, sizes], attributes)


def test_by_hand() -> None:
    # Tokens 0, 2, 4 look at 1, 3, 5: 4 is like 3, 0 like 1 but less so, 2 like none. Token 2 is the second to stay.
    keys = np.array([[1, 0, 0], [2, 1, 0], [-1, -1, 0], [0, 0, 2], [0, 0, 7], [0, -1, 1]], np.float32)[None]
    x = np.arange(6, dtype=np.float32)[None, :, None]
    sizes = np.array([[1, 3, 1, 1, 4, 1]], np.float32)
    y, merged, index = check("MergeTokens", [x, keys, sizes], {"r": 2})
    np.testing.assert_allclose(y[0, :, 0], [2, 0.75, 19 / 5, 5], rtol=1e-6)
    np.testing.assert_array_equal(merged[0], [1, 4, 5, 1])
    np.testing.assert_array_equal(index[0], [1, 1, 0, 2, 2, 3])


def test_protected_tokens_stay_first_and_as_they_are() -> None:
    x, keys, sizes = arrays((2, 21, 4), 1)
    keys[:] = keys[:, :1]  # all alike: every token would go anywhere
    for name in NAMES:
        y, merged, index = check(name, [x, keys, sizes], {"r": 16, "protected": 5})
        np.testing.assert_array_equal(y[:, :5], x[:, :5])
        np.testing.assert_array_equal(merged[:, :5], sizes[:, :5])
        np.testing.assert_array_equal(index[:, :5], np.tile(np.arange(5), (2, 1)))
        assert y.shape[1] == 13 and (index[:, 5:] >= 5).all()


def test_the_sum_over_tokens_stays() -> None:
    x, keys, sizes = arrays((2, 33, 4), 1)
    y, merged, _ = check("MergeTokens", [x, keys, sizes], {"r": 11, "protected": 2})
    np.testing.assert_allclose((y * merged[..., None]).sum(1), (x * sizes[..., None]).sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged.sum(1), sizes.sum(1))


def test_norms_stay() -> None:
    x, keys, sizes = arrays((1, 12, 4), 1)
    y, _, index = check("MergeTokensMaxNorm", [x, keys, sizes], {"r": 5})
    for position in range(y.shape[1]):
        members = x[0, index[0] == position]
        longest = np.linalg.norm(members, axis=-1).max()
        np.testing.assert_allclose(np.linalg.norm(y[0, position]), longest, rtol=1e-5)


def test_metrics_of_length_zero_are_like_nothing() -> None:
    x, keys, sizes = arrays((1, 8, 4), 1)
    keys[0, 2] = keys[0, 5] = 0
    for name in NAMES:
        y = check(name, [x, keys, sizes], {"r": 2})[0]
        assert np.isfinite(y).all()


def test_opset_18_is_enough() -> None:
    for name in NAMES:
        attributes = {"r": 3, "protected": 1}
        check(name, arrays((2, 15, 4), 1, seed=3), attributes, session(model_of(name, attributes, opset=18)))


def test_inference() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, 197, 8] x, float[B, 197, 6] k, float[B, 197] s) => (float[B, 184, 8] y, float[B, 184] m) {
            y, m, index = planish.MergeTokens <r = 13, protected = 1, heads = 3> (x, k, s)
        }
        """
    )
    infer_shapes(model)
    verify_model(model, full=True)
    (node,) = model.graph
    shapes = [tuple(d if isinstance(d, int) else d.value for d in v.shape or ()) for v in node.outputs]
    assert shapes == [("B", 184, 8), ("B", 184), ("B", 197)]
    unknown = TensorInfo(FLOAT, ("B", "T", 8)), TensorInfo(FLOAT, ("B", "T", 6)), TensorInfo(FLOAT, ("B", "T"))
    attributes = {"r": 3, "ratio": 0.0, "protected": 0, "heads": 2}
    y, merged, index = MERGE_TOKENS["MergeTokens"].infer(unknown, attributes)
    assert (y.dims, merged.dims, index.dims) == (("B", None, 8), ("B", None), ("B", "T"))
    with pytest.raises(InferenceError, match="the tokens of x and sizes: sizes 4 and 5"):
        wrong = TensorInfo(FLOAT, (1, 4, 8)), None, TensorInfo(FLOAT, (1, 5))
        MERGE_TOKENS["MergeTokens"].infer(wrong, attributes)
    with pytest.raises(InferenceError, match="keys of width 5 can not be 2 heads"):
        MERGE_TOKENS["MergeTokens"].infer((None, TensorInfo(FLOAT, (1, 4, 5)), None), attributes)
    with pytest.raises(InferenceError, match="r is -1"):
        MERGE_TOKENS["MergeTokens"].infer(unknown, attributes | {"r": -1})


def test_counts_and_cost() -> None:
    assert [merged_count(t, 16, 0.0, 1) for t in (197, 35, 33, 21, 2, 1, 0)] == [16, 16, 16, 10, 0, 0, 0]
    x = TensorInfo(FLOAT, (2, 40, 24)), TensorInfo(FLOAT, (2, 40, 24)), TensorInfo(FLOAT, (2, 40))
    op = MERGE_TOKENS["MergeTokens"]
    attributes = {"r": 6, "ratio": 0.0, "protected": 0, "heads": 3}
    cost = op.cost(x, op.infer(x, attributes), attributes)
    assert cost.flops == 2 * (40 * (24 + 24) + 2 * 20 * 20 * 8) + 2 * 2 * 40 * 24
    assert cost.bytes == 4 * (2 * 2 * 40 * 24 + 2 * 40 + 2 * 34 * 24 + 2 * 34) + 8 * 2 * 40
