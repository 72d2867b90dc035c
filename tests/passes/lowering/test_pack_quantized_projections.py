"""Quantized projections of an attention as one product; numbers on ONNX Runtime's CPU."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.testing import apply_pass, check_declines, check_numerics, program_of

PASS, TARGET = "pack-quantized-projections", "ort-cuda:dtype=float16"
K, SIZES = 64, {"q": 64, "k": 32, "v": 32}


def model(bits="444", zeros="", bias="", extra="", values="xxx", order="") -> ir.Model:
    """Attention of one token over a cache; letters in `zeros`, `bias` and `order` say which products have those."""
    random, weights, nodes = np.random.default_rng(0), [], []
    for (name, n), width, x in zip(SIZES.items(), bits, values, strict=True):
        made = {
            "c": random.integers(0, 256, (n, K // 32, 4 * int(width))).astype("u1"),
            "s": random.uniform(0.01, 0.03, n * K // 32).astype("f2"),
            "z": random.integers(0, 256, n * (K // 32) * int(width) // 8).astype("u1") if name in zeros else None,
            "o": np.zeros(K, "i4") if name in order else None,
            "b": random.standard_normal(n).astype("f2") if name in bias else None,
        }
        weights += [ir.tensor(array, name=name + kind) for kind, array in made.items() if array is not None]
        inputs = ", ".join("" if array is None else name + kind for kind, array in made.items()).rstrip(", ")
        nodes.append(
            f"[{name}n] {name} = com.microsoft.MatMulNBits<K={K}, N={n}, bits={width}, block_size=32>({x}, {inputs})"
        )
    weights += [ir.tensor(np.full(2, 6, "i4"), name="last"), ir.tensor(np.array(7, "i4"), name="total")]
    cache = "float16[2, 2, 8, 16]"
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    g (float16[2, 1, {K}] x, float16[2, 1, {K}] x2, {cache} pk, {cache} pv)
      => (float16[2, 1, 64] y, {cache} nk, {cache} nv{", float16[2, 1, 32] e" * bool(extra)}) {{
      {" ".join(nodes)}
      [a] y, nk, nv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, pk, pv, last, total)
      {extra} }}"""
    return ir.from_onnx_text(text, initializers=weights)


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = {"x": (2, 1, K), "x2": (2, 1, K), "pk": (2, 2, 8, 16), "pv": (2, 2, 8, 16)}
    return {name: random.standard_normal(shape).astype("f2") for name, shape in shapes.items()}


@pytest.mark.parametrize("bits", ["444", "888"])
@pytest.mark.parametrize(("zeros", "bias"), [("", ""), ("qkv", ""), ("", "qv"), ("qkv", "k")])
def test_one_product(bits, zeros, bias):
    program = program_of(model(bits, zeros, bias), TARGET)
    apply_pass(f"{PASS},eliminate-dead-code", program)
    product, attention = program.main.graph
    assert product.op_type == "MatMulNBits" and product.attributes.get_int("N") == sum(SIZES.values())
    assert product.outputs[0].shape == ir.Shape((2, 1, 128))
    assert list(attention.inputs[:3]) == [product.outputs[0], None, None] and len(program.main.graph.initializers) < 8
    check_numerics(PASS, program_of(model(bits, zeros, bias), TARGET), feeds())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": "448"}, "their weights differ in bits, blocks or columns"),
        ({"zeros": "q"}, "some of their weights have zeros"),
        ({"values": ("x", "x", "x2")}, "products of different values"),
        ({"order": "k"}, "g_idx"),
        ({"extra": "e = Identity(k)"}, "'k' is used otherwise too"),
    ],
)
def test_declines(settings, reason):
    check_declines(PASS, program_of(model(**settings), TARGET), reason)


def test_other_targets():
    check_declines(PASS, program_of(model(), "ort-cpu"), "this is for 'ort-cuda'")
