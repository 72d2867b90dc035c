from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

NAME = "cancel-transposes"
LAST, FIRST = "perm = [0, 2, 3, 1]", "perm = [0, 3, 1, 2]"


def model(
    body: str,
    consts: str = "float[4] c = {1, 2, 3, 4}",
    y: str = "[B, 4, H, W]",
    more: str = "",
    opset: int = 20,
    extra: str = "",
) -> str:
    return f"""<ir_version: 10, opset_import: ["" : {opset}]>
    f (float[B, 4, H, W] x, float[B, 4, H, W] z{extra}) => (float{y} y{more}) <{consts}> {{ {body} }}"""


def inner(body: str, before: str = "x") -> str:
    """`body` from a to b in channels-last order."""
    return f"a = Transpose<{LAST}>({before})  {body}  y = Transpose<{FIRST}>(b)"


def ops(program: Any) -> list[str]:
    return [node.op_type for node in program.main.graph]


def test_before_and_after() -> None:
    before = model(inner("m = Mul(a, c)  n = Relu(m)  b = Softmax<axis = -1>(n)"))
    after = model("m = Mul(x, c)  n = Relu(m)  y = Softmax<axis = 1>(n)", "float[1, 4, 1, 1] c = {1, 2, 3, 4}")
    check_rewrite(NAME, before, after, edits=1)


MOVED = {
    "b = Gelu(a)": "",
    "b = Add(a, c)": "",
    "b = Sub(k, a)": "float k = {2}",
    "m = Sigmoid(a)  b = Mul(a, m)": "",
    "b = LogSoftmax<axis = 3>(a)": "",
    "b = ReduceMean<keepdims = 1>(a, k)": "int64[2] k = {1, 2}",
    "m = ReduceMax(a, k)  b = Sub(a, m)": "int64[1] k = {-1}",
    "b = Pad(a, k)": "int64[8] k = {0, 1, 0, 0, 0, 2, 1, 0}",
    "b = Pad(a, k, , j)": "int64[4] k = {1, 0, 2, 1}, int64[2] j = {1, -1}",
    "b = Slice(a, i, j, k)": "int64[1] i = {1}, int64[1] j = {9}, int64[1] k = {-2}",
    "b = Slice(a, i, j)": "int64[3] i = {0, 1, 0}, int64[3] j = {9, 9, 2}",
    "b = Concat<axis = -1>(a, a)": "",
    "m, n = Split<axis = 3, num_outputs = 2>(a)  b = Concat<axis = 3>(n, m)": "",
    "m = Greater(a, k)  b = Where(m, a, k)": "float k = {0}",
    "b = Clip(a, k)": "float k = {0}",
}


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("body", MOVED)
def test_moves_through(body: str, batch: int) -> None:
    if batch == 0 and "ReduceMax" in body:
        pytest.skip("a maximum of nothing")
    consts = MOVED[body] or "float[4] c = {1, 2, 3, 4}"
    rng = np.random.default_rng(0)
    feed = {n: rng.standard_normal((batch, 4, 5, 3)).astype(np.float32) for n in "xz"}
    program = check_numerics(NAME, model(inner(body), consts, y="[B, C, M, N]"), feed)
    assert "Transpose" not in ops(program)


def test_layer_norm_moves_where_its_axis_stays_last() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> f (float[A, B, 4] x) => (float[A, B, 4] y)
    <float[4] s = {1, 2, 3, 4}> { a = Transpose<perm = [1, 0, 2]>(x)  b = LayerNormalization(a, s)
    y = Transpose<perm = [1, 0, 2]>(b) }"""
    assert ops(check_numerics(NAME, text, dims={"A": 3, "B": 5})) == ["LayerNormalization"]
    check_untouched(NAME, model(inner("b = LayerNormalization(a, c)")))


def test_two_ways_in_one_out() -> None:
    body = f"a = Transpose<{LAST}>(x)  b = Transpose<{LAST}>(z)  s = Add(a, b)  y = Relu(s)"
    after = f"s = Add(x, z)  r = Relu(s)  y = Transpose<{LAST}>(r)"
    check_rewrite(NAME, model(body, y="[B, H, W, 4]"), model(after, y="[B, H, W, 4]"), edits=1)


def test_a_way_in_that_has_no_transpose_gets_one() -> None:
    body = f"""a = Transpose<{LAST}>(x)  b = Transpose<{LAST}>(z)  s = Add(a, b)  t = Add(s, w)
        y = Transpose<{FIRST}>(t)"""
    after = f"s = Add(x, z)  v = Transpose<{FIRST}>(w)  y = Add(s, v)"
    extra = ", float[B, H, W, 4] w"
    check_rewrite(NAME, model(body, extra=extra), model(after, extra=extra), edits=1)


def test_transposes_merge() -> None:
    body = f"a = Transpose<{LAST}>(x)  b = Relu(a)  y = Transpose<perm = [0, 2, 1, 3]>(b)"
    after = "b = Relu(x)  y = Transpose<perm = [0, 3, 2, 1]>(b)"
    check_rewrite(NAME, model(body, y="[B, W, H, 4]"), model(after, y="[B, W, H, 4]"), edits=1)


def test_a_mean_over_places_reads_either_order() -> None:
    body = f"a = Transpose<{LAST}>(x)  b = Relu(a)  y = ReduceMean<keepdims = 0>(b, k)"
    source = model(body, "int64[2] k = {1, 2}", y="[B, 4]")
    program = check_numerics(NAME, source, dims={"B": 2, "H": 3, "W": 5})
    assert ops(program) == ["Relu", "ReduceMean"]


def test_outputs_keep_their_names_and_order() -> None:
    body = f"a = Transpose<{LAST}>(x)  b = Transpose<{LAST}>(z)  u = Add(a, b)  v = Relu(u)  y = Transpose<{FIRST}>(v)"
    source = model(body, more=", float[B, H, W, 4] v")
    program = check_numerics(NAME, source, dims={"B": 2, "H": 3, "W": 5})
    assert [v.name for v in program.main.graph.outputs] == ["y", "v"]
    assert ops(program).count("Transpose") == 1


def test_users_in_subgraphs_get_the_old_order() -> None:
    body = f"""a = Transpose<{LAST}>(x)  b = Transpose<{LAST}>(z)  u = Add(a, b)
        v = If (q) <then_branch = g1 () => (float[B, H, W, 4] t) {{ t = Relu(u) }},
                    else_branch = g2 () => (float[B, H, W, 4] e) {{ e = Neg(u) }}>
        y = Add(v, u)"""
    source = model(body, "float k = {1}", y="[B, H, W, 4]", extra=", bool q")
    feed = {n: np.random.default_rng(0).standard_normal((2, 4, 3, 5)).astype(np.float32) for n in "xz"}
    program = check_numerics(NAME, source, feed | {"q": np.array(True)})
    assert ops(program).count("Transpose") == 1


@pytest.mark.parametrize(
    "text",
    [
        model(f"a = Transpose<{LAST}>(x)  y = Relu(a)", y="[B, H, W, 4]"),  # as many as before
        model(inner("b = CumSum(a, k)"), "int64 k = {1}"),  # has an axis, and is not known
        model(inner("b = Slice(a, i, i, j)"), "int64[1] i = {1}", extra=", int64[1] j"),
        model(inner("b = Mul(a, v)"), extra=", float[4] v"),  # a vector that is no constant
        model(f"a = Relu(x)  b = Relu(z)  y = Transpose<{LAST}>(a)", y="[B, H, W, 4]"),
    ],
)
def test_stays(text: str) -> None:
    check_untouched(NAME, text)


def test_old_opset() -> None:
    check_declines(NAME, model(inner("b = Relu(a)"), opset=12), "needs opset 13")


_STEPS = (
    "Relu({0})",
    "Add({0}, {1})",
    "Mul({0}, c)",
    "Transpose<perm = [1, 2, 0]>({0})",
    "Transpose<perm = [2, 0, 1]>({0})",
    "Transpose<perm = [0, 2, 1]>({0})",
    "Softmax<axis = 1>({0})",
    "Slice({0}, i, j, i)",
    "Concat<axis = 2>({0}, {0})",
    "ReduceSum({0}, i)",
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_STEPS), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=10))
def test_random_graphs(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is moved, the numbers stay, and the number of Transposes does not grow."""
    arrays = {"x": np.random.default_rng(0).standard_normal((2, 2, 2)).astype(np.float32)}
    names, lines, shapes = ["x"], [], {"x": (2, 2, 2)}
    for number, (step, a, b) in enumerate(steps):
        first, second = names[-1 - a % len(names)], names[-1 - b % len(names)]
        shape = shapes[first]
        if "{1}" in step and shapes[second] != shape:
            second = first
        if "c)" in step and shape[2] not in (1, 2):
            continue
        name = f"v{number}"
        perm = [int(d) for d in step.partition("[")[2].partition("]")[0].split(",")] if "Transpose" in step else None
        sizes = [shape[k] for k in perm] if perm else list(shape)
        if "Mul" in step:
            sizes[2] = 2
        if "Concat" in step:
            sizes[2] *= 2
        if "Reduce" in step or "Slice" in step:
            sizes[1] = 1
        shapes[name] = tuple(sizes)  # type: ignore[assignment]
        if "Slice" in step and shape[1] < 2:
            continue
        lines.append(f"{name} = {step.format(first, second)}")
        names.append(name)
    if len(names) < 3:
        return
    dims = ",".join(map(str, shapes[names[-1]]))
    lines.append(f"y = Identity({names[-1]})")
    text = f"""<ir_version: 10, opset_import: ["" : 20]> f (float[2, 2, 2] x) => (float[{dims}] y)
    <float[2] c = {{2, 3}}, int64[1] i = {{1}}, int64[1] j = {{2}}> {{ {chr(10).join(lines)} }}"""
    program = check_numerics(f"infer-shapes,{NAME}", text, arrays, fires=False)
    assert ops(program).count("Transpose") <= text.count("Transpose<")
