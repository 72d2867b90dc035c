"""No-ops go where they are proved to be ones; the rest stays, with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from planish.passes.canonicalize.remove_no_ops import RemoveNoOps
from tests.passes.canonicalize.canonical_support import assert_same, interface, model_of, ops, reasons, run_pass

RULES = RemoveNoOps()
WEIGHTS = """<float one = {1}, float[1] one1 = {1}, float[1,1,1,1] one4 = {1}, float zero = {0}, float ratio = {0.5},
 int64[2] z2 = {0, 0}, int64[2] ones = {1, 1}, int64[2] full = {9223372036854775807, 9223372036854775807},
 int64[2] tight = {9223372036854775807, 4}, int64[4] pads = {0, 0, 0, 0}, int64[2] copy = {0, 0},
 int64[2] open = {-1, 4}, int64[1] last = {4}, int64[2] axes = {0, 1}, int64[2] back = {-1, -1},
 bool t = {1}, bool f = {0}, float[1,4] ones4 = {1, 1, 1, 1}>"""
NO_OPS = [
    "Identity(r)", "Dropout(r)", "Dropout(r, ratio, f)", "Cast<to=1>(r)", "CastLike(r, x)", "Reshape(r, copy)",
    "Reshape(r, open)", "Flatten(r)", "Transpose<perm=[0,1]>(r)", "Expand(r, ones)", "Expand(r, last)", "Pad(r, pads)",
    "Tile(r, ones)", "Slice(r, z2, full)", "Slice(r, z2, tight)", "Slice(r, z2, full, axes, ones)", "Concat<axis=0>(r)",
    "Sum(r)", "Max(r)", "Add(r, zero)", "Add(zero, r)", "Sub(r, zero)", "Mul(one1, r)", "Mul(r, ones4)", "Div(r, one)",
    "Pow(r, one)", "Where(t, r, x)", "Where(f, x, r)", "ReduceSum<noop_with_empty_axes=1>(r)",
]  # fmt: skip
KEPT = [
    ("Dropout(r, ratio, t)", "training_mode"),
    ("Mul(r, one4)", "may broadcast"),
    ("Sub(zero, r)", ""),
    ("Div(one, r)", ""),
    ("Slice(r, z2, ones)", ""),
    ("Slice(r, back, full, axes, back)", ""),
    ("Where(t, zero, r)", "may be broadcast"),
    ("Transpose(r)", ""),
    ("Cast<to=11>(r)", ""),
    ("ReduceSum(r)", ""),
]


@pytest.mark.parametrize("expression", NO_OPS)
def test_no_op(expression):
    model = model_of(
        f"agraph (float[B,4] x) => (float[B,4] y) {WEIGHTS} {{ r = Neg(x)  n = {expression}  y = Relu(n) }}"
    )
    before = model.clone()
    assert run_pass(RULES, model).fired == 1
    assert ops(model) == ["Neg", "Relu"]
    rng = np.random.default_rng(0)
    assert_same(before, model, *({"x": rng.normal(size=(b, 4)).astype(np.float32)} for b in (0, 1, 3)))


@pytest.mark.parametrize(("expression", "reason"), KEPT)
def test_kept(expression, reason):
    model = model_of(
        f"""agraph (float[B,4] x) => (double y) {WEIGHTS}
        {{ r = Neg(x)  n = {expression}  m = Cast<to=11>(n)  y = ReduceSum<keepdims=0>(m) }}"""
    )
    result = run_pass(RULES, model)
    assert reason in reasons(result)
    assert expression.partition("(")[0].partition("<")[0] in ops(model)


def test_logic():
    model = model_of("""agraph (bool[B] x) => (bool[B] y) <bool t = {1}, bool[1] f = {0}>
    { a = And(x, t)  b = Or(f, a)  c = Xor(b, f)  y = Not(c) }""")
    before = model.clone()
    assert run_pass(RULES, model).fired == 3
    assert ops(model) == ["Not"]
    assert_same(before, model, {"x": np.array([True, False])})


def test_an_output_takes_its_name_along():
    model = model_of("agraph (float[2] x) => (float[2] y) { r = Neg(x)  y = Identity(r) }")
    assert run_pass(RULES, model).fired == 1
    assert ops(model) == ["Neg"] and interface(model) == (["x"], ["y"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("agraph (float[2] x) => (float[2] y) { y = Identity(x) }", "not made by one of its nodes"),
        ("agraph (float[2] x) => (float[2] y, float[2] z) { y = Neg(x)  z = Identity(y) }", "both outputs"),
    ],
)
def test_outputs_that_stay(text, reason):
    result = run_pass(RULES, model_of(text))
    assert result.fired == 0 and reason in reasons(result)


def test_a_used_mask_keeps_the_dropout():
    model = model_of("agraph (float[2] x) => (float[2] y, bool[2] m) { r = Neg(x)  d, m = Dropout(r)  y = Neg(d) }")
    result = run_pass(RULES, model)
    assert result.fired == 0 and "second output" in reasons(result)


def test_a_reshape_that_is_not_proved():
    model = model_of(
        "agraph (float[B,C] x) => (float[D,E] y) <int64[2] t = {-1, 6}> { r = Neg(x) n = Reshape(r, t) y = Neg(n) }"
    )
    result = run_pass(RULES, model)
    assert result.fired == 0 and "not proved equal" in reasons(result)


def test_values_of_the_outside_stay_behind_an_identity():
    model = model_of("""agraph (bool c, float[1] x) => (float[1] y)
    { y = If(c) <then_branch = g1 () => (float[1] o) { o = Identity(x) },
                 else_branch = g2 () => (float[1] o) { n = Neg(x) m = Identity(n) o = Abs(m) }> }""")
    before = model.clone()
    assert run_pass(RULES, model).fired == 1
    x = np.ones(1, np.float32)
    assert_same(before, model, {"c": np.array(True), "x": x}, {"c": np.array(False), "x": x})
