from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
)

NAME = "unpack-qkv"
WEIGHTS = """float[2, 6] w = {1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6}, float[6] b = {6, 5, 4, 3, 2, 1},
    int64[3] thirds = {2, 2, 2}, int64[3] odd = {1, 2, 3}, int64[2] halves = {2, 4}"""
PARTS = """float[2, 2] wq = {1, 2, -1, -2}, float[2, 2] wk = {3, 4, -3, -4}, float[2, 2] wv = {5, 6, -5, -6},
    float[2] bq = {6, 5}, float[2] bk = {4, 3}, float[2] bv = {2, 1}"""
QKV = "float[B, S, 2] q, float[B, S, 2] k, float[B, S, 2] v"
SPLIT = "q, k, v = Split<axis = -1>(s, thirds)"


def model(
    body: str, weights: str = WEIGHTS, *, x: str = "[B, S, 2]", outputs: str = QKV, more: str = "", inputs: str = ""
) -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float{x} x{inputs}) => ({outputs}{more})
    <{weights}>
    {{ {body} }}
    """


def feed(*dims: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(dims, dtype=np.float32)}


BIASED = f"m = MatMul(x, w)\n s = Add(m, b)\n {SPLIT}"


def test_three_products_with_their_biases() -> None:
    after = """mq = MatMul(x, wq)
        q = Add(mq, bq)
        mk = MatMul(x, wk)
        k = Add(mk, bk)
        mv = MatMul(x, wv)
        v = Add(mv, bv)"""
    check_rewrite(NAME, model(BIASED), model(after, PARTS), edits=1)


def test_without_bias() -> None:
    after = "q = MatMul(x, wq)\n k = MatMul(x, wk)\n v = MatMul(x, wv)"
    check_rewrite(NAME, model(f"s = MatMul(x, w)\n {SPLIT}"), model(after, PARTS), edits=1)


FORMS = {
    "thirds": SPLIT,
    "last axis": SPLIT.replace("axis = -1", "axis = 2"),
    "by number": "q, k, v = Split<axis = -1, num_outputs = 3>(s)",
    "unequal": "q, k, v = Split<axis = -1>(s, odd)",
    "halves": "q, k = Split<axis = -1>(s, halves)",
    "number and remainder": "q, k = Split<axis = -1, num_outputs = 2>(s)",
}


@pytest.mark.parametrize("dims", [(1, 1, 2), (1, 5, 2), (3, 7, 2), (0, 4, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_numbers(form: str, dims: tuple[int, int, int]) -> None:
    names = FORMS[form].split(" =")[0].split(", ")
    outputs = ", ".join(f"float[B, S, n{name}] {name}" for name in names)
    text = model(f"m = MatMul(x, w)\n s = Add(b, m)\n {FORMS[form]}", outputs=outputs)
    program = check_numerics(NAME, text, feed(*dims))
    assert "Split" not in {n.op_type for n in program.main.graph}


def test_weights_are_not_kept_twice_nor_copied_if_stored_by_columns() -> None:
    program = program_of(model(BIASED))
    graph = program.main.graph
    stored = np.ascontiguousarray(graph.initializers["w"].const_value.numpy().T)  # type: ignore[union-attr]
    graph.initializers["w"].const_value = ir.tensor(stored.T, name="w")
    apply_pass(f"{NAME},eliminate-dead-code", program)
    parts = [v.const_value.numpy() for v in graph.initializers.values() if v.const_value is not None]
    matrices = [p for p in parts if p.ndim == 2]
    assert len(matrices) == 3 and all(np.shares_memory(p, stored) for p in matrices)


DECLINES = {
    "is one row": model(BIASED, x="[1, 1, 2]", outputs=QKV.replace("B, S", "1, 1")),
    "no weight": model(BIASED.replace("(x, w)", "(x, u)"), inputs=", float[2, 6] u"),
    "no constant bias": model(BIASED.replace("(m, b)", "(m, c)"), inputs=", float[6] c"),
    "not split along its columns": model(
        BIASED.replace("axis = -1", "axis = 1"), x="[B, 6, 2]", outputs=QKV.replace("S, 2", "2, 6")
    ),
    "would be stored twice": model(BIASED + "\n z = MatMul(x, w)", more=", float[B, S, 6] z"),
    "'s'": model(BIASED, more=", float[B, S, 6] s"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines(NAME, DECLINES[reason], reason)


def test_limit() -> None:
    check_declines(NAME + "{limit=8}", model(BIASED), "48 bytes, and the limit is 8")


def test_a_split_of_something_else_is_left_alone() -> None:
    check_untouched(NAME, model(f"s = Concat<axis = -1>(x, x, x)\n {SPLIT}"))
