"""Operators with products in bfloat16: body and reference, and with AMX the kernel, against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import DIALECT
from planish.ir.ops.base import InferenceError
from planish.ir.ops.feed_forward import FEED_FORWARD
from planish.ir.ops.linear import COMPUTE_TYPE
from planish.ir.target import Target
from planish.runtime.ort import compile_ort

BF16 = int(ir.DataType.BFLOAT16)
HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}
_WEIGHTS = {"weight": "kf", "gate_weight": "kf", "up_weight": "kf", "out_weight": "fn", "bias": "f", "out_bias": "n"}


def feeds_of(op: str, sizes: dict[str, int], transposed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    shapes = _WEIGHTS | ({"weight": "fk"} if transposed else {}) | {"x": "bmk", "residual": "bmn"}
    made = {}
    for operand in DIALECT[op].schema.inputs:
        shape = [sizes[axis] for axis in shapes[operand.name]]
        scale = max(shape[-1 if transposed else 0], 1) ** -0.5 if "weight" in operand.name else 1.0
        made[operand.name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return made


def model_of(op: str, feeds: dict[str, np.ndarray], **attributes: Any) -> ir.Model:
    """One node over inputs of unknown sizes, but for the last axis, by which a kernel is chosen."""
    node = ir.node(op, [ir.Value(name=name) for name in feeds], attributes, domain="planish", name="node")
    for value, array in zip(node.inputs, feeds.values(), strict=True):
        assert value is not None
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape([*([None] * (array.ndim - 1)), *array.shape[-1:]])
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [v for v in node.inputs if v is not None],
        list(node.outputs),
        nodes=[node],
        opset_imports={"": 23, "planish": 1},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def agree(op: str, feeds: dict[str, np.ndarray], limit: float, **attributes: Any) -> None:
    (want,) = DIALECT[op].reference(*feeds.values(), **attributes)
    made = model_of(op, feeds, **attributes)
    infer_shapes(made)
    assert tuple(made.graph.outputs[0].shape or ())[-1] == want.shape[-1]
    for target in _targets():
        got = compile_ort(made, Target.parse(target)).run(feeds)["y"]
        assert got.shape == want.shape
        assert np.all(np.isfinite(got)) and np.linalg.norm(got - want) <= limit * np.linalg.norm(want), target


def _targets() -> list[str]:
    """The body everywhere; the kernel where there is one."""
    import importlib.util

    from planish.runtime.kernels.cpu import detect, permit_tiles

    kernels = importlib.util.find_spec("tvm") is not None and detect("amx") is not None and permit_tiles()
    return ["ort-cpu", *(["ort-cpu:kernels"] if kernels else [])]


SIZES = ({"b": 1, "m": 1, "k": 16, "f": 16, "n": 16}, {"b": 2, "m": 33, "k": 40, "f": 70, "n": 50})


@pytest.mark.parametrize("op", ["FeedForwardGelu", "FeedForwardSwiGLU"])
def test_feed_forward(op: str) -> None:
    for sizes in SIZES:
        agree(op, feeds_of(op, sizes, False), 1e-3, **{COMPUTE_TYPE: BF16})


@pytest.mark.parametrize("op", sorted(FEED_FORWARD))
def test_feed_forward_in_float32_is_its_parts(op: str) -> None:
    feeds = feeds_of(op, SIZES[1], False)
    (want,) = DIALECT[op].reference(*feeds.values())
    got = compile_ort(model_of(op, feeds), Target.parse("ort-cpu")).run(feeds)["y"]
    assert np.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [1, BF16])
def test_transposed_weight(kind: int) -> None:
    for sizes in SIZES:
        agree("LinearTransposed", feeds_of("LinearTransposed", sizes, True), 1e-6, **{COMPUTE_TYPE: kind})


@pytest.mark.parametrize("op", ["FlashAttentionBf16", "FlashAttentionKeyMaskBf16"])
def test_attention(op: str) -> None:
    rng = np.random.default_rng()
    for batch, queries, keys in ((1, 1, 1), (2, 40, 70)):
        feeds: dict[str, np.ndarray] = {"q": rng.standard_normal((batch, queries, 64)).astype(np.float32)}
        feeds |= {name: rng.standard_normal((batch, keys, 32)).astype(np.float32) for name in "kv"}
        if "KeyMask" in op:
            feeds["key_mask"] = (np.arange(keys) < rng.integers(1, keys + 1, (batch, 1)))[:, None, None]
        # The kernel rounds weights too.
        agree(op, feeds, 3e-3, **HEADS, is_causal=1)


def test_wrong_shapes() -> None:
    feeds = feeds_of("FeedForwardGelu", SIZES[1], False)
    feeds["out_weight"] = feeds["out_weight"][:-1]
    made = model_of("FeedForwardGelu", feeds, **{COMPUTE_TYPE: BF16})
    for value, array in zip(made.graph.inputs, feeds.values(), strict=True):
        value.shape = ir.Shape(array.shape)
    with pytest.raises(InferenceError, match="columns of x and the weight's rows: sizes 70 and 69"):
        DIALECT["FeedForwardGelu"].infer_node(next(iter(made.graph)))


def test_flops_are_those_of_the_products() -> None:
    from planish.ir.ops.base import TensorInfo

    feeds = feeds_of("FeedForwardSwiGLU", SIZES[1], False)
    inputs = [TensorInfo(ir.DataType.FLOAT, array.shape) for array in feeds.values()]
    outputs = [TensorInfo(ir.DataType.FLOAT, (2, 33, 50))]
    assert DIALECT["FeedForwardSwiGLU"].cost(inputs, outputs, {}).flops == 2 * 66 * 70 * (2 * 40 + 50)


def test_weights_stored_as_bfloat16_beside_others() -> None:
    """Both are there in one graph: the same numbers, whichever way a weight is kept."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    sizes = SIZES[1] | {"n": SIZES[1]["f"]}
    feeds = feeds_of("Linear", sizes, False)
    x, weight, bias = feeds.values()
    kept = weight.astype(ml_dtypes.bfloat16)
    text = (
        '<ir_version: 10, opset_import: ["" : 23, "planish" : 1]> g (float[b, m, 40] x) => (float[b, m, 70] y, '
        "float[b, m, 70] z, float[b, m, 70] t) { y = planish.Linear <compute_type = 16> (x, w, bias) "
        "z = planish.Linear <compute_type = 16> (x, w16, bias) "
        "t = planish.LinearTransposed <compute_type = 16> (x, wt, bias) }"
    )
    tensors = {"w": weight, "w16": kept, "wt": np.ascontiguousarray(kept.T), "bias": bias}
    made = ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in tensors.items()])
    (want,) = DIALECT["Linear"].reference(x, weight, bias, compute_type=BF16)
    for target in _targets():
        got = compile_ort(made, Target.parse(target)).run({"x": x})
        for name in "yzt":
            assert np.allclose(got[name], want, rtol=1e-5, atol=1e-5), (target, name)


def test_a_float32_product_of_a_bfloat16_weight_has_no_kernel() -> None:
    from planish.runtime.kernels.linear import LinearKernel

    weight = ir.Value(name="w", type=ir.TensorType(ir.DataType.BFLOAT16))
    node = ir.node("Linear", [ir.Value(name="x"), weight, ir.Value(name="b")], domain="planish")
    assert LinearKernel.of("Linear", [node]) is None
