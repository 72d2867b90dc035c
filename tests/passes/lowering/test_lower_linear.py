from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.driver import apply_rules
from planish.passes.lowering.lower_linear import LowerLinear
from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
)

KERNELS = "ort-cpu:kernels"
K, N = 20, 17
X, Y, WIDE = f"float[B, S, {K}] x", f"float[B, S, {N}] y", f"float[B, S, {K}] y"
GEMM = (f"float[B, {K}] x", f"float[B, {N}] y")
SIZES = {
    "w": (K, N), "u": (K, N), "s": (K, K), "t": (N, K), "b": (N,), "c": (K,), "row": (1, N), "one": (1,),
    "narrow": (K, 15), "short": (15, N), "short_u": (15, N), "full": (2, 3, N),
    "factor": (),
}  # fmt: skip


def model(
    body: str, inputs: str = f"float[B, S, {K}] x", outputs: str = f"float[B, S, {N}] y", **more: Any
) -> ir.Model:
    """A model of this body; the weights it names are made here."""
    dtype, opset = more.get("dtype", np.float32), more.get("opset", 23)
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "planish" : 1]>
    g ({inputs}) => ({outputs}) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    used = {name for node in _nodes(proto.graph) for name in node.input}
    for name in SIZES:
        if name in used:
            array = np.full(SIZES[name], 1.702) if name == "factor" else rng.standard_normal(SIZES[name])
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(dtype), name))
    found = ir.from_proto(proto)
    if "planish." in body:
        import_functions(found)
    else:
        del found.graph.opset_imports["planish"]
    infer_shapes(found)
    return found


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.node, *(node for item in inner for node in _nodes(item))]


def with_kernels(*args: Any, **more: Any) -> Program:
    return program_of(model(*args, **more), KERNELS)


def residual_declines(program: Program) -> list[str]:
    """Why nothing is a residual: asked of these rules alone, since what another rule replaces is not told of again."""
    rules = [rule for rule in LowerLinear().rules() if rule.name.startswith("linear-add")]
    result = apply_rules("lower-linear", rules, program_of(program), PassContext(program.target))
    assert not result.fired
    return [declined.reason for declined in result.declined]


def operators(program: Program) -> list[str]:
    return [node.op_type for node in program.main.graph]


ACTIVATIONS = {
    "LinearRelu": "y = Relu(h)",
    "LinearGelu": "y = Gelu(h)",
    "LinearGeluTanh": 'y = Gelu <approximate = "tanh"> (h)',
    "LinearSilu": "g = Sigmoid(h)\n y = Mul(h, g)",
    "LinearQuickGelu": "q = Mul(h, factor)\n g = Sigmoid(q)\n y = Mul(g, h)",
}
WITH_BIAS = ["m = MatMul(x, w)\n h = Add(m, b)", "m = MatMul(x, w)\n h = Add(b, m)"]


@pytest.mark.parametrize("product", WITH_BIAS)
@pytest.mark.parametrize("op", sorted(ACTIVATIONS))
def test_product_bias_and_activation_become_one(op: str, product: str) -> None:
    before = with_kernels(product + "\n" + ACTIVATIONS[op])
    check_rewrite("lower-linear", before, model(f"y = planish.{op}(x, w, b)"), edits=1)
    check_numerics("lower-linear", before, dims={"B": 2, "S": 3})


@pytest.mark.parametrize("product", WITH_BIAS)
def test_product_and_bias(product: str) -> None:
    before = with_kernels(product.replace("h =", "y ="))
    check_rewrite("lower-linear", before, model("y = planish.Linear(x, w, b)"), edits=1)
    for rows in ((1, 1), (5, 3), (0, 3)):
        x = np.random.default_rng().standard_normal((*rows, K)).astype(np.float32)
        check_numerics("lower-linear", before, {"x": x}, limit=1e-6)


def test_without_a_bias_there_are_zeros() -> None:
    before = with_kernels("h = MatMul(x, w)\n y = Relu(h)\n z = MatMul(x, u)", outputs=f"{Y}, float[B, S, {N}] z")
    program = check_numerics("lower-linear", before)
    assert sorted(operators(program)) == ["Linear", "LinearRelu"]
    for node in program.main.graph:
        bias = node.inputs[2]
        assert bias is not None and bias.const_value is not None
        np.testing.assert_array_equal(bias.const_value.numpy(), np.zeros(N, np.float32))


def test_vectors_and_matrices() -> None:
    before = with_kernels("m = MatMul(x, w)\n y = Add(m, b)", f"float[{K}] x", f"float[{N}] y")
    assert operators(check_numerics("lower-linear", before)) == ["Linear"]
    assert "the summand is the bias" in residual_declines(before)
    before = with_kernels("y = Gemm(x, w, b)", f"float[B, {K}] x", f"float[B, {N}] y")
    check_rewrite(
        "lower-linear", before, model("y = planish.Linear(x, w, b)", f"float[B, {K}] x", f"float[B, {N}] y"), edits=1
    )
    check_numerics("lower-linear", before)


def test_gemm_with_activation() -> None:
    before = with_kernels("h = Gemm <alpha = 1.0, beta = 1.0, transA = 0, transB = 0> (x, w, b)\n y = Gelu(h)", *GEMM)
    check_rewrite("lower-linear", before, model("y = planish.LinearGelu(x, w, b)", *GEMM), edits=1)


@pytest.mark.parametrize("attribute", ["alpha = 2.0", "beta = 0.5", "transA = 1"])
def test_gemm_of_another_form_declines(attribute: str) -> None:
    inputs = f"float[{K}, B] x" if "transA" in attribute else GEMM[0]
    name, value = attribute.split(" = ")
    before = with_kernels(f"y = Gemm <{attribute}> (x, w, b)", inputs, GEMM[1])
    check_declines("lower-linear", before, f"Gemm has {name} {value}, and a kernel takes")


@pytest.mark.parametrize(
    ("after", "op"), [("y = Add(h, r)", "LinearAdd"), ("y = Relu(h)", "LinearRelu"), ("y = Identity(h)", "Linear")]
)
def test_gemm_by_a_transposed_weight(after: str, op: str) -> None:
    # What the exporter makes of a torch Linear on a matrix.
    inputs = f"{GEMM[0]}, float[B, {N}] r"
    before = with_kernels(f"h = Gemm <transB = 1> (x, t, b)\n {after}", inputs, GEMM[1])
    program = check_numerics("lower-linear", before)
    assert operators(program)[0] == op
    weight = program.main.graph[0].inputs[1]
    assert weight is not None and weight.const_value is not None
    stored = before.main.graph.initializers["t"].const_value
    assert stored is not None and weight.const_value.shape == (K, N)
    np.testing.assert_array_equal(weight.const_value.numpy(), stored.numpy().T)
    assert not weight.const_value.numpy().flags.c_contiguous  # no copy of it


@pytest.mark.parametrize("bias", ["row", "one"])
def test_gemm_with_a_bias_that_broadcasts_is_left(bias: str) -> None:
    check_untouched("lower-linear", with_kernels(f"y = Gemm(x, w, {bias})", *GEMM))


RESIDUAL = (f"float[B, S, {K}] x, float[B, S, {N}] r", f"float[B, S, {N}] y")


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, w)\n h = Add(m, b)\n y = Add(h, r)",
        "m = MatMul(x, w)\n h = Add(b, m)\n y = Add(r, h)",
        "m = MatMul(x, w)\n h = Add(m, b)\n y = Sum(h, r)",
        "m = MatMul(x, w)\n h = Add(m, b)\n y = Sum(r, h)",
        *(
            f"m = MatMul(x, w)\n y = Sum({order})"
            for order in ("m, b, r", "m, r, b", "b, m, r", "b, r, m", "r, m, b", "r, b, m")
        ),
    ],
)
def test_a_residual_comes_along(body: str) -> None:
    before = with_kernels(body, *RESIDUAL)
    check_rewrite("lower-linear", before, model("y = planish.LinearAdd(x, w, b, r)", *RESIDUAL), edits=1)
    check_numerics("lower-linear", before, dims={"B": 2, "S": 3})


def test_a_residual_without_a_bias() -> None:
    before = with_kernels("m = MatMul(x, w)\n y = Add(m, r)", *RESIDUAL)
    assert operators(check_numerics("lower-linear", before)) == ["LinearAdd"]


def test_two_products_are_summed() -> None:
    # One of them is the residual of the other.
    body = "m = MatMul(x, w)\n h = Add(m, b)\n n = MatMul(x, u)\n i = Add(n, b)\n y = Add(h, i)"
    program = check_numerics("lower-linear", with_kernels(body))
    assert sorted(operators(program)) == ["Linear", "LinearAdd"]


@pytest.mark.parametrize("shape", ["1, S, ", "B, 1, ", "S, ", ""])
def test_a_residual_that_broadcasts_stays_an_addition(shape: str) -> None:
    inputs = f"float[B, S, {K}] x, float[{shape}{N}] r"
    before = with_kernels("m = MatMul(x, w)\n h = Add(m, b)\n y = Add(h, r)", inputs)
    program = check_numerics("lower-linear", before, dims={"B": 2, "S": 3})
    assert operators(program) == ["Linear", "Add"]
    assert any("a residual has that of the product" in reason for reason in residual_declines(before))


def test_a_product_that_broadcasts_to_a_larger_summand() -> None:
    before = with_kernels("m = MatMul(x, w)\n y = Add(m, full)", f"float[3, {K}] x", f"float[2, 3, {N}] y")
    assert operators(check_numerics("lower-linear", before)) == ["Linear", "Add"]


@pytest.mark.parametrize("shape", ["?, ?, 17", "B, ?, 17"])
def test_a_residual_of_unknown_size_stays_an_addition(shape: str) -> None:
    inputs = f"float[B, S, {K}] x, float[{shape}] r"
    before = with_kernels("m = MatMul(x, w)\n h = Add(m, b)\n y = Add(h, r)", inputs, f"float[?, ?, {N}] y")
    program = program_of(before)
    apply_pass("lower-linear", program)
    assert operators(program) == ["Linear", "Add"]


def test_twice_the_product_is_no_residual() -> None:
    before = with_kernels("m = MatMul(x, w)\n h = Add(m, b)\n y = Add(h, h)")
    assert "the summand is the product itself" in residual_declines(before)
    assert operators(check_numerics("lower-linear", before)) == ["Linear", "Add"]


def test_the_product_plus_its_biased_self() -> None:
    before = with_kernels("m = MatMul(x, w)\n h = Add(m, b)\n y = Add(h, m)")
    program = check_numerics("lower-linear", before, fires=False)
    assert "LinearAdd" not in operators(program) or "Linear" in operators(program)


def test_x_is_the_residual() -> None:
    before = with_kernels("m = MatMul(x, s)\n h = Add(m, c)\n y = Add(x, h)", outputs=WIDE)
    assert operators(check_numerics("lower-linear", before)) == ["LinearAdd"]


def test_a_product_with_two_users_is_computed_once() -> None:
    outputs = f"{Y}, float[B, S, {N}] z"
    before = with_kernels("m = MatMul(x, w)\n h = Add(m, b)\n y = Relu(h)\n z = Gelu(h)", outputs=outputs)
    assert operators(check_numerics("lower-linear", before)) == ["Linear", "Relu", "Gelu"]
    before = with_kernels("m = MatMul(x, w)\n z = Add(m, b)\n y = Relu(z)", outputs=outputs)
    assert operators(check_numerics("lower-linear", before)) == ["Linear", "Relu"]
    before = with_kernels("z = MatMul(x, w)\n y = Add(z, b)", outputs=outputs)
    assert operators(check_numerics("lower-linear", before)) == ["Linear", "Add"]


def test_tied_weights_stay_one() -> None:
    before = with_kernels("m = MatMul(x, s)\n h = Relu(m)\n n = MatMul(h, s)\n y = Gelu(n)", outputs=WIDE)
    program = check_numerics("lower-linear", before)
    first, second = program.main.graph
    assert (first.op_type, second.op_type) == ("LinearRelu", "LinearGelu")
    assert first.inputs[1] is second.inputs[1]


def test_layers_in_a_row() -> None:
    body = "m = MatMul(x, w)\n h = Add(m, b)\n g = Gelu(h)\n n = MatMul(g, t)\n i = Add(n, c)\n y = Add(i, x)"
    before = with_kernels(body, outputs=WIDE)
    assert operators(check_numerics("lower-linear", before)) == ["LinearGelu", "LinearAdd"]
    program = program_of(before)
    assert apply_pass("lower-linear", program).fired == 2
    assert not apply_pass("lower-linear", program).modified


SWIGLU = "g = MatMul(x, w)\n v = MatMul(x, u)\n y = planish.SwiGLU(g, v)"


def test_swiglu() -> None:
    before = with_kernels(SWIGLU)
    after = with_kernels("y = planish.LinearSwiGLU(x, w, u)")
    program = check_numerics("lower-linear", before)
    assert operators(program) == operators(after)
    (node,) = program.main.graph
    assert [v.name for v in node.inputs if v is not None] == ["x", "w", "u"]


def test_swiglu_of_the_same_product_twice() -> None:
    before = with_kernels("g = MatMul(x, w)\n y = planish.SwiGLU(g, g)")
    program = check_numerics("lower-linear", before)
    assert operators(program) in (["LinearSwiGLU"], ["Linear", "SwiGLU"])


def test_swiglu_of_products_of_different_inputs_stays() -> None:
    inputs = f"float[B, S, {K}] x, float[B, S, {K}] z"
    before = with_kernels("g = MatMul(x, w)\n v = MatMul(z, u)\n y = planish.SwiGLU(g, v)", inputs)
    assert sorted(operators(check_numerics("lower-linear", before))) == ["Linear", "Linear", "SwiGLU"]


def test_swiglu_with_a_bias_stays() -> None:
    before = with_kernels("m = MatMul(x, w)\n g = Add(m, b)\n v = MatMul(x, u)\n y = planish.SwiGLU(g, v)")
    assert sorted(operators(check_numerics("lower-linear", before))) == ["Linear", "Linear", "SwiGLU"]


def test_another_target_declines() -> None:
    text = WITH_BIAS[0].replace("h =", "y =")
    for target in ("ort-cpu", "ort-cpu:threads=2"):
        before = program_of(model(text), target)
        check_declines("lower-linear", before, f"target '{target}' has no generated kernels; 'ort-cpu:kernels' has")
    before.target = Target("ort", "cuda", kernels=True)
    check_declines("lower-linear", before, "has no generated kernels")
    assert apply_pass("lower-linear", program_of(model(text), "tvm-cpu")).fired == 1


@pytest.mark.parametrize(("kind", "dtype"), [("double", np.float64), ("float16", np.float16)])
def test_other_dtypes_decline(kind: str, dtype: Any) -> None:
    inputs, outputs = f"{kind}[B, S, {K}] x", f"{kind}[B, S, {N}] y"
    before = with_kernels("y = MatMul(x, w)", inputs, outputs, dtype=dtype)
    check_declines("lower-linear", before, "it is not float32, which alone has kernels")


@pytest.mark.parametrize(("weight", "k", "n"), [("narrow", K, 15), ("short", 15, N)])
def test_small_weights_decline(weight: str, k: int, n: int) -> None:
    before = with_kernels(f"y = MatMul(x, {weight})", f"float[B, {k}] x", f"float[B, {n}] y")
    check_declines("lower-linear", before, f"the weight is {k} by {n}; kernels pay from 16 on")
    assert apply_pass(LowerLinear(min_columns=15), program_of(before)).fired == 1


def test_small_gates_decline() -> None:
    body = "g = MatMul(x, short)\n v = MatMul(x, short_u)\n y = planish.SwiGLU(g, v)"
    check_declines("lower-linear", with_kernels(body, "float[B, 15] x", f"float[B, {N}] y"), "the weight is 15 by 17")


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("y = MatMul(x, w)", f"float[B, S, {K}] x, float[{K}, {N}] w"),  # no constant
        ("y = MatMul(z, x)", f"float[B, S, {N}] x, float[B, S, S] z"),  # nothing is one
        ("y = Mul(x, b)", f"float[B, S, {N}] x"),
    ],
)
def test_without_a_weight_there_is_nothing(body: str, inputs: str) -> None:
    before = model(body, inputs)
    for name in ("w",):
        before.graph.initializers.pop(name, None)
    check_untouched("lower-linear", program_of(before, KERNELS))


def test_a_weight_that_a_caller_may_replace_is_no_constant() -> None:
    before = model("y = MatMul(x, w)")
    before.graph.inputs.append(before.graph.initializers["w"])
    check_untouched("lower-linear", program_of(before, KERNELS))


def test_an_older_opset_is_left() -> None:
    before = with_kernels("m = MatMul(x, w)\n y = Add(m, b)", opset=18)
    program = program_of(before)
    assert not apply_pass("lower-linear", program).modified


def test_inside_of_a_branch() -> None:
    body = f"""y = If (on) <
        then_branch = then () => (float[B, S, {N}] p) {{ m = MatMul(x, w)
 p = Add(m, b) }},
        else_branch = otherwise () => (float[B, S, {N}] q) {{ q = MatMul(x, u) }}
    >"""
    before = with_kernels(body, f"bool on, float[B, S, {K}] x")
    x = np.random.default_rng().standard_normal((2, 3, K)).astype(np.float32)
    for condition in (True, False):
        program = check_numerics("lower-linear", before, {"on": np.array(condition), "x": x})
    branches = [attribute.as_graph() for attribute in program.main.graph[0].attributes.values()]
    assert [[node.op_type for node in branch] for branch in branches] == [["Linear"], ["Linear"]]


def test_two_entries_share_the_weight() -> None:
    prefill = with_kernels("m = MatMul(x, w)\n y = Add(m, b)").main
    decode = prefill.clone()
    program = Program({"prefill": prefill, "decode": decode}, Target.parse(KERNELS))
    assert apply_pass("lower-linear", program).fired == 2
    tensors = [m.graph.initializers["w"].const_value for m in program.entries.values()]
    assert tensors[0] is tensors[1]
    assert all(("planish", "Linear", "") in m.functions for m in program.entries.values())
