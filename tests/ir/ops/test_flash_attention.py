"""planish::FlashAttention and its relatives: bodies on ONNX Runtime against the float64 references, inference, cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.ops import DIALECT, InferenceError, TensorInfo, import_functions
from planish.ir.ops.flash_attention import FLASH_ATTENTION
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL
HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}
MASKS = {"FlashAttentionBias": "float", "FlashAttentionMask": "bool"}


def model_of(name: str, attributes: dict[str, Any], mask_rank: int = 4) -> ir.Model:
    mask = "" if name not in MASKS else f", {MASKS[name]}[{', '.join('WXYZ'[:mask_rank])}] m"
    given = ", ".join(f"{key} = {value}" for key, value in attributes.items())
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, S, N] q, float[B, T, M] k, float[B, T, M] v{mask}) => (float[B, S, N] y) {{
            y = planish.{name} <{given}> (q, k, v{", m" * bool(mask)})
        }}
        """
    )
    import_functions(model)
    return model


def run(model: ir.Model, arrays: list[np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, arrays, strict=True)))[0])


def qkv(batch: int, queries: int, keys: int, size: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(queries * 31 + keys)
    shapes = ((queries, 4), (keys, 2), (keys, 2))
    return [rng.standard_normal((batch, n, heads * size), np.float32) for n, heads in shapes]


def check(name: str, attributes: dict[str, Any], arrays: list[np.ndarray]) -> None:
    rank = arrays[3].ndim if len(arrays) > 3 else 4
    got = run(model_of(name, attributes, rank), arrays)
    (want,) = DIALECT[name].reference(*arrays, **attributes)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("is_causal", [0, 1])
@pytest.mark.parametrize("queries, keys", [(1, 1), (5, 5), (3, 9), (9, 3)])
def test_dense_body(queries: int, keys: int, is_causal: int) -> None:
    check("FlashAttention", {**HEADS, "is_causal": is_causal}, qkv(2, queries, keys))


def test_is_causal_may_be_left_out() -> None:
    arrays = qkv(1, 6, 6)
    left_out, zero = (run(model_of("FlashAttention", HEADS | given), arrays) for given in ({}, {"is_causal": 0}))
    np.testing.assert_array_equal(left_out, zero)


@pytest.mark.parametrize("name", sorted(MASKS))
@pytest.mark.parametrize("shape", [(2, 4, 6, 7), (2, 1, 1, 7), (1, 4, 6, 7), (6, 7), (4, 6, 7)])
def test_masked_bodies(name: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    seen = rng.random(shape) < 0.6
    # A query that sees nothing gives zeros.
    seen[..., :1, :] = False
    hidden = np.array([-np.inf, np.finfo(np.float32).min], np.float32)
    bias = np.where(seen, rng.standard_normal(shape), rng.choice(hidden, shape)).astype(np.float32)
    for is_causal in (0, 1):
        arrays = [*qkv(2, 6, 7), seen if name == "FlashAttentionMask" else bias]
        check(name, {**HEADS, "is_causal": is_causal}, arrays)


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 8), (5, 5), (3, 9), (9, 10)])
def test_past_body(queries: int, keys: int) -> None:
    check("FlashAttentionPast", HEADS, qkv(2, queries, keys))


def test_past_is_the_end_of_the_whole() -> None:
    q, k, v = qkv(1, 9, 9)
    (whole,) = DIALECT["FlashAttention"].reference(q, k, v, **HEADS, is_causal=1)
    (end,) = DIALECT["FlashAttentionPast"].reference(q[:, 6:], k, v, **HEADS)
    np.testing.assert_allclose(end, whole[:, 6:], rtol=1e-12)


@pytest.mark.parametrize("name", sorted(FLASH_ATTENTION))
def test_functions_are_valid(name: str) -> None:
    attributes = HEADS if name == "FlashAttentionPast" else {**HEADS, "is_causal": 1}
    verify_model(model_of(name, attributes), full=True)


def infer(name: str, *shapes: Any, **attributes: Any) -> Any:
    types = [BOOL if name == "FlashAttentionMask" and i == 3 else FLOAT for i in range(len(shapes))]
    given = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 1.0, "is_causal": 0, **attributes}
    infos = [TensorInfo(dtype, shape) for dtype, shape in zip(types, shapes, strict=True)]
    return DIALECT[name].infer(infos, given)


def test_inference() -> None:
    (y,) = infer("FlashAttention", ("B", "S", None), (2, "T", 16), (None, "T", 16))
    assert y == TensorInfo(FLOAT, (2, "S", 32))
    assert infer("FlashAttention", None, None, None) == [TensorInfo(FLOAT, (None, None, None))]


@pytest.mark.parametrize(
    ("name", "shapes", "attributes", "message"),
    [
        ("FlashAttention", ((1, 2, 32), (1, 2, 16), (1, 2, 16)), {"kv_num_heads": 3}, "must be a multiple"),
        ("FlashAttention", ((1, 2, 32), (1, 2, 16), (1, 3, 16)), {}, "lengths of k and v: sizes 2 and 3"),
        ("FlashAttention", ((1, 2, 32), (1, 2, 24), (1, 2, 16)), {}, "head sizes of q and k: sizes 8 and 12"),
        ("FlashAttention", ((1, 2, 30), (1, 2, 16), (1, 2, 16)), {}, "size 30, which 4 heads do not divide"),
        ("FlashAttention", ((1, 4, 2, 8), (1, 2, 16), (1, 2, 16)), {}, "q has rank 4; it must have 3"),
        ("FlashAttentionMask", ((1, 2, 32), (1, 5, 16), (1, 5, 16), (2, 4)), {}, "axis 1 of the mask has size 4"),
        ("FlashAttentionMask", ((1, 2, 32), (1, 5, 16), (1, 5, 16), (5,)), {}, "the mask has rank 1"),
        ("FlashAttentionPast", ((1, 6, 32), (1, 5, 16), (1, 5, 16)), {}, "6 queries and 5 keys"),
    ],
)
def test_inference_refuses(name: str, shapes: Any, attributes: Any, message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        infer(name, *shapes, **attributes)


def test_cost_counts_the_pairs_that_are_seen() -> None:
    q, k = TensorInfo(FLOAT, (2, 3, 32)), TensorInfo(FLOAT, (2, 5, 16))
    for name, causal, pairs in (
        ("FlashAttention", 0, 15),
        ("FlashAttention", 1, 1 + 2 + 3),
        ("FlashAttentionPast", 0, 3 + 4 + 5),
    ):
        cost = DIALECT[name].cost([q, k, k], [q], {**HEADS, "is_causal": causal})
        assert cost.flops == 2 * pairs * (4 * 32 + 5 * 4)
        assert cost.bytes == 4 * (2 * 192 + 2 * 160)
